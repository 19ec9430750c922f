//! Plans: typed, serialisable steps that are journalled before they run.

use serde::{Deserialize, Serialize};

use crate::{LayerName, Machine, Point, Result, Snapshot, SnapshotId, SnapshotName, Target};

/// Parts of a plan, by the time at which their steps run.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Before the cut, while a guest would run. Can be undone.
    Prepare,
    /// The cut. Can be undone until the plan is committed.
    Cut,
    /// After the commit point: carried through, never undone.
    Finish,
}

/// One action of a backend on one disk.
///
/// A backend plans and receives its own type of action ([`crate::DiskSnapshotter::Action`]). In the journal,
/// and to the engine, the action is JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "Step")]
pub struct Step<A = serde_json::Value> {
    /// The disk.
    pub target: Target,
    /// The backend's own typed action.
    pub action: A,
    /// Description for people: "freeze base.img as base.ds-1a2b3c4d.img".
    pub summary: String,
    /// Bytes of data that it will move, as far as known beforehand; 0 if it only changes metadata.
    pub bytes: u64,
}

impl<A> Step<A> {
    /// Converts the step to another representation of its action.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn try_map<B>(self, change: impl FnOnce(A) -> Result<B>) -> Result<Step<B>> {
        let Self { target, action, summary, bytes } = self;
        Ok(Step { target, action: change(action)?, summary, bytes })
    }
}

/// A step at its place in a backend's plan for one disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "PlannedStep")]
pub struct PlannedStep<A = serde_json::Value> {
    /// The part of the plan to which it belongs.
    pub group: Group,
    /// The step.
    #[serde(flatten)]
    pub step: Step<A>,
    /// Changes of the catalogue in the same transaction that records a finish step as done. Steps before the
    /// commit point have none: theirs are in [`DiskPlan::commit`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub edits: Vec<Edit>,
    /// True if the operation may end without it. A merge that is cancelled, or fails for lack of space, is
    /// deferred together with all later steps of its disk in this group. The layers stay as orphan layers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deferrable: bool,
    /// If set, the step runs nested in the closest preceding step without this flag. That step provides the
    /// moment for it: the guest is paused, or its writes wait.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub inside: bool,
    /// True if it changes a frozen image of an open chain, which no program may have open then. Only the
    /// planner uses it, to place a detached section around it.
    #[serde(skip)]
    pub window: bool,
}

impl<A> PlannedStep<A> {
    /// Makes a step of this group without edits. It must be done, and is not nested.
    pub fn new(group: Group, step: Step<A>) -> Self {
        Self { group, step, edits: Vec::new(), deferrable: false, inside: false, window: false }
    }
}

/// One change of the catalogue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "edit")]
#[non_exhaustive]
pub enum Edit {
    /// Adds a snapshot.
    AddSnapshot {
        /// The snapshot.
        snapshot: Box<Snapshot>,
    },
    /// Removes a snapshot; its children become its parent's.
    RemoveSnapshot {
        /// Its identity.
        id: SnapshotId,
    },
    /// Makes this snapshot the one from which the current state derives.
    SetCurrent {
        /// Its identity, if any.
        id: Option<SnapshotId>,
    },
    /// Sets the layer that the domain writes.
    SetActive {
        /// The disk.
        target: Target,
        /// The layer.
        layer: LayerName,
    },
    /// Adds a layer that is ours.
    AddLayer {
        /// The disk.
        target: Target,
        /// The layer.
        layer: LayerName,
    },
    /// Removes a layer.
    RemoveLayer {
        /// The disk.
        target: Target,
        /// The layer.
        layer: LayerName,
    },
    /// Replaces the point `from` of the disk by `to` in all snapshots.
    MovePoint {
        /// The disk.
        target: Target,
        /// The previous point.
        from: Point,
        /// The new point.
        to: Point,
    },
    /// Records the machine on which snapshots were created.
    AddMachine {
        /// The machine.
        machine: Box<Machine>,
    },
    /// Sets the disk's format, and with it another backend.
    SetFormat {
        /// The disk.
        target: Target,
        /// The name of the backend.
        format: String,
    },
    /// Sets the disk's configured path.
    SetPath {
        /// The disk.
        target: Target,
        /// The path.
        #[schemars(with = "String")]
        path: camino::Utf8PathBuf,
    },
}

/// A request to one disk's backend when a plan is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "request")]
#[non_exhaustive]
pub enum DiskRequest {
    /// Take a point of the disk as it is.
    Create {
        /// The kind of point; absent: the backend chooses.
        kind: Option<crate::PointKind>,
        /// One of the backend's own methods ([`crate::Capabilities::ways`]), if the user requested it; then
        /// `kind` is absent.
        way: Option<String>,
        /// The snapshot's name, for a tag.
        name: SnapshotName,
        /// The file of the new overlay, if the user chose one.
        overlay: Option<LayerName>,
        /// All points of this disk in the catalogue.
        keep: Vec<Point>,
        /// A random number for the name of a new layer.
        stamp: u32,
    },
    /// Return the disk to its state at `to`.
    Revert {
        /// The point to return to.
        to: Point,
        /// Save the current state as a point, under this name if it needs a tag.
        save: Option<SnapshotName>,
        /// All points of this disk in the catalogue.
        keep: Vec<Point>,
        /// True if the step that discards the current state must be undoable, because other disks or the
        /// commit come after it. In a domain it always is.
        undoable: bool,
        /// A random number for the name of a new layer.
        stamp: u32,
    },
    /// Delete points, then merge and remove layers that are no longer needed.
    Delete {
        /// The points to delete.
        drop: Vec<Point>,
        /// All points of this disk that are kept.
        keep: Vec<Point>,
        /// True if a damaged point may be forgotten: what it refers to is unknown and stays allocated.
        #[serde(default)]
        force: bool,
    },
}

/// A backend's answer: the steps for one disk, and the changes of the catalogue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "DiskPlan")]
#[serde(default)]
pub struct DiskPlan<A = serde_json::Value> {
    /// The steps, sorted by group.
    pub steps: Vec<PlannedStep<A>>,
    /// Changes of the catalogue at the commit point.
    pub commit: Vec<Edit>,
    /// The point of a create, or of a revert that saves the current state.
    pub point: Option<Point>,
    /// True if the cut of this disk has a step that cannot be undone. The planner accepts no such plan.
    pub irrevocable: bool,
    /// Notes for the user.
    pub notes: Vec<String>,
    /// The hypervisor's part in the cut, for a create on an attached disk.
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
    /// Converts the plan to another representation of its actions.
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

/// Progress of a step, read from the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StepStatus {
    /// No trace of it.
    NotDone,
    /// A part of it is done: it can both be done again and undone.
    Partly,
    /// All of it is done.
    Done,
}
