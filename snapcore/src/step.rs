//! Plans: typed, serialisable steps that are journalled before they run.

use serde::{Deserialize, Serialize};

use crate::{
    DomainStep, GuestChange, LayerName, Machine, Point, PowerAfter, Result, Snapshot, SnapshotId,
    SnapshotName, Target,
};

/// When a step runs.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Before the instant, while a guest would run. Can be undone.
    Prepare,
    /// The instant. Can be undone, as long as the plan is not committed.
    Cut,
    /// After the commit point: is carried through, never undone.
    Finish,
}

/// One action of a backend on one disk, or of a hypervisor on the whole domain.
///
/// A backend plans and receives its own type of action ([`crate::DiskSnapshotter::Action`]). In the journal, and to the
/// engine, the action is JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "Step")]
pub struct Step<A = serde_json::Value> {
    /// Which disk, or [`Target::of_domain`].
    pub target: Target,
    /// The backend's own typed action; the domain's are [`crate::DomainStep`]s.
    pub action: A,
    /// What it does, for people: "freeze base.img as base.ds-1a2b3c4d.img".
    pub summary: String,
    /// Bytes of data it will move, as far as can be told beforehand; 0 for metadata alone.
    pub bytes: u64,
}

impl<A> Step<A> {
    /// The same step with another representation of its action.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn try_map<B>(self, change: impl FnOnce(A) -> Result<B>) -> Result<Step<B>> {
        let Self { target, action, summary, bytes } = self;
        Ok(Step { target, action: change(action)?, summary, bytes })
    }
}

/// A step at its place in a plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "PlannedStep")]
pub struct PlannedStep<A = serde_json::Value> {
    /// When it runs.
    pub group: Group,
    /// What it does.
    #[serde(flatten)]
    pub step: Step<A>,
    /// What the catalogue learns in the same transaction that records a finish step as done. Steps before the
    /// commit point carry none: theirs are in [`Plan::commit`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub edits: Vec<Edit>,
    /// Whether the operation may end without it: a merge that is cancelled or fails for want of space is put off,
    /// together with all later steps of its disk in this group, and the layers stay as unnamed ones.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deferrable: bool,
    /// Whether it runs inside the nearest step before it that does not, at the moment that only that step can make: while the
    /// guest stands still, or while its writes wait.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inside: bool,
    /// Whether it changes a frozen image of an open chain, which nobody may have open then. Only of use to the planner, which
    /// puts a window around it.
    #[serde(skip)]
    pub window: bool,
}

impl<A> PlannedStep<A> {
    /// A step of this group, without edits. It must be done, and runs by itself.
    pub fn new(group: Group, step: Step<A>) -> Self {
        Self { group, step, edits: Vec::new(), deferrable: false, inside: false, window: false }
    }
}

/// One change of the catalogue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "edit")]
#[non_exhaustive]
pub enum Edit {
    /// A snapshot exists from now on.
    AddSnapshot {
        /// The snapshot.
        snapshot: Box<Snapshot>,
    },
    /// A snapshot is no more; its children become its parent's.
    RemoveSnapshot {
        /// Which.
        id: SnapshotId,
    },
    /// The present derives from this snapshot.
    SetCurrent {
        /// Which, if any.
        id: Option<SnapshotId>,
    },
    /// The domain writes this layer.
    SetActive {
        /// Which disk.
        target: Target,
        /// Which layer.
        layer: LayerName,
    },
    /// A layer is ours.
    AddLayer {
        /// Which disk.
        target: Target,
        /// Which layer.
        layer: LayerName,
    },
    /// A layer is gone.
    RemoveLayer {
        /// Which disk.
        target: Target,
        /// Which layer.
        layer: LayerName,
    },
    /// Every point of the disk that is `from` is now `to`.
    MovePoint {
        /// Which disk.
        target: Target,
        /// The point as it was.
        from: Point,
        /// The point as it is.
        to: Point,
    },
    /// Snapshots were taken on this machine.
    AddMachine {
        /// The machine.
        machine: Box<Machine>,
    },
    /// The disk is of another format, and another backend's from now on.
    SetFormat {
        /// Which disk.
        target: Target,
        /// The name of the backend.
        format: String,
    },
    /// The disk's configured path is another.
    SetPath {
        /// Which disk.
        target: Target,
        /// The path.
        #[schemars(with = "String")]
        path: camino::Utf8PathBuf,
    },
}

/// What is to be done to a domain, whole. Made by [`crate::plan`], carried out by the engine, printed by `--dry-run`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Plan {
    /// What it is for: "create", "revert", "delete", "tidy".
    pub operation: String,
    /// The snapshots that the request named.
    pub snapshots: Vec<SnapshotName>,
    /// The steps, sorted by group; within a group in the order of running.
    pub steps: Vec<PlannedStep>,
    /// What the catalogue learns at the commit point: after the last cut step, before the first finish step.
    pub commit: Vec<Edit>,
    /// What the user should know: a disk left out, a point that must be copied out, a layer that stays.
    pub notes: Vec<String>,
}

impl Plan {
    /// The plan as it may be shown: what is recorded of a machine has no environment and no secrets of a command line in it.
    #[must_use]
    pub fn shown(&self) -> Self {
        let mut shown = self.clone();
        let edits = shown.steps.iter_mut().flat_map(|planned| &mut planned.edits).chain(&mut shown.commit);
        for edit in edits {
            if let Edit::AddMachine { machine } = edit {
                machine.record = crate::secrets::shown_record(&machine.record);
            }
        }
        shown
    }

    /// Bytes of data that all steps move together.
    pub fn bytes(&self) -> u64 {
        self.steps.iter().map(|planned| planned.step.bytes).fold(0, u64::saturating_add)
    }

    /// What it does to the guest, beyond pausing it, and what the guest does afterwards, where that is planned.
    pub fn guest(&self) -> Option<(GuestChange, Option<PowerAfter>)> {
        let steps = self.steps.iter().filter(|planned| planned.step.target.is_domain());
        let steps: Vec<DomainStep> =
            steps.filter_map(|planned| serde_json::from_value(planned.step.action.clone()).ok()).collect();
        let window = steps.iter().find_map(|step| match step {
            DomainStep::OpenWindow { anew, .. } => Some(anew),
            _ => None,
        });
        let recreated = window.is_some_and(|anew| anew.as_ref().is_some_and(|anew| anew.recreated));
        steps.iter().find_map(|step| {
            let DomainStep::Continue { memory, reset, power } = step else { return None };
            let change = match (power, memory, reset, recreated) {
                (Some(PowerAfter::Off), ..) => GuestChange::Ended,
                (_, Some(_), ..) if window.is_none() => GuestChange::Started,
                (_, Some(_), _, true) => GuestChange::RecreatedFromMemory,
                (_, Some(_), ..) => GuestChange::Restored,
                (_, None, true, true) => GuestChange::Recreated,
                (_, None, true, false) => GuestChange::Reset,
                (_, None, false, _) => return None,
            };
            Some((change, *power))
        })
    }
}

/// What is asked of one disk's backend when a plan is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "request")]
#[non_exhaustive]
pub enum DiskRequest {
    /// Take a point of the disk as it is.
    Create {
        /// The way; absent: the backend chooses.
        kind: Option<crate::PointKind>,
        /// One of the backend's own ways ([`crate::Capabilities::ways`]), where the user asked for it; then `kind` is absent.
        way: Option<String>,
        /// The snapshot's name, for a tag.
        name: SnapshotName,
        /// The file of the new overlay, where the user wants a certain one.
        overlay: Option<LayerName>,
        /// All points of this disk in the catalogue.
        keep: Vec<Point>,
        /// A random number for the name of a new layer.
        stamp: u32,
    },
    /// Make the disk what it was at `to`.
    Revert {
        /// The point to return to.
        to: Point,
        /// Keep the present as a point: under this name, where it needs a tag.
        save: Option<SnapshotName>,
        /// All points of this disk in the catalogue.
        keep: Vec<Point>,
        /// Whether the step that drops the present must be one that can be undone, since other disks or the commit
        /// come after it: always, in a domain.
        undoable: bool,
        /// A random number for the name of a new layer.
        stamp: u32,
    },
    /// Delete points, then merge and remove what nothing needs.
    Delete {
        /// The points to delete.
        drop: Vec<Point>,
        /// All points of this disk that stay.
        keep: Vec<Point>,
        /// Whether a point that is damaged may be forgotten: it goes, and what it refers to stays in use,
        /// because that cannot be known.
        #[serde(default)]
        force: bool,
    },
}

/// A backend's answer: the steps for one disk, and what the catalogue is to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "DiskPlan")]
#[serde(default)]
pub struct DiskPlan<A = serde_json::Value> {
    /// The steps, sorted by group.
    pub steps: Vec<PlannedStep<A>>,
    /// What the catalogue learns at the commit point.
    pub commit: Vec<Edit>,
    /// The point that was taken: of a create, or of a revert that saves the present.
    pub point: Option<Point>,
    /// Whether the cut of this disk has a step that cannot be undone: the planner takes none such.
    pub irrevocable: bool,
    /// What the user should know.
    pub notes: Vec<String>,
    /// Of a create on an attached disk: what its hypervisor does to it at the instant.
    pub instant: Option<crate::DiskInstant>,
}

impl<A> Default for DiskPlan<A> {
    fn default() -> Self {
        Self {
            steps: Vec::new(),
            commit: Vec::new(),
            point: None,
            irrevocable: false,
            notes: Vec::new(),
            instant: None,
        }
    }
}

impl<A> DiskPlan<A> {
    /// The same plan with another representation of its actions.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn try_map<B>(self, mut change: impl FnMut(A) -> Result<B>) -> Result<DiskPlan<B>> {
        let Self { steps, commit, point, irrevocable, notes, instant } = self;
        let steps = steps.into_iter().map(|planned| {
            let PlannedStep { group, step, edits, deferrable, inside, window } = planned;
            Ok(PlannedStep { group, step: step.try_map(&mut change)?, edits, deferrable, inside, window })
        });
        Ok(DiskPlan { steps: steps.collect::<Result<_>>()?, commit, point, irrevocable, notes, instant })
    }
}

/// How far a step got, read from what is on the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StepStatus {
    /// Nothing of it is to be seen.
    NotDone,
    /// Some of it: both doing it again and undoing it are possible.
    Partly,
    /// All of it.
    Done,
}
