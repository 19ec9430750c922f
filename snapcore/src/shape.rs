//! The shape of a plan: what runs before the cut, the cut, and what runs after the commit point.
//!
//! ```text
//! prepare   steps                                            undone until the commit point
//! cut       units: a disk's step, or a step of the domain    undone until the commit point
//!                  with disks' steps nested in it
//! commit    edits of the catalogue                           one transaction
//! finish    units: a disk's step with its edits and with     carried through, or deferred
//!                  what is nested in it, or a step of the
//!                  domain
//! ```
//!
//! The shape has no place for what must not be. No step is out of order, no step before the commit point has
//! edits or can be deferred, and a nested step always has a step that it is nested in.
//!
//! In the journal and in events a step has a number: its place in running order, where a unit's own step
//! comes before those nested in it.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use crate::hypervisor::{DomainStep, GuestChange, PowerAfter, VmStateSaver};
use crate::name::{SnapshotName, Target};
use crate::step::{Edit, Group, Step};

/// The kind of operation that makes clones.
pub(crate) const OF_CLONES: &str = "clone";

/// A whole operation on a domain. The planner makes it, the engine carries it out, `--dry-run` prints it.
///
/// ```
/// use snapcore::{CutUnit, Plan, SnapshotName, Step, Target};
///
/// let step = Step::new(Target::new("vda")?, serde_json::json!({"do": "take"}), "take the point s1 of vda");
/// let plan = Plan::new("create", vec![SnapshotName::new("s1")?]).cut(vec![CutUnit::Disk(step)]);
/// let lines: Vec<String> =
///     plan.steps().map(|placed| format!("{}: {}", placed.subject(), placed.summary())).collect();
/// assert_eq!(lines, ["vda: take the point s1 of vda"]);
/// assert_eq!((plan.step_count(), plan.bytes()), (1, 0));
/// # Ok::<(), snapcore::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(
    description = "A whole operation on a domain. The planner makes it, the engine carries it out, `--dry-run` prints it."
)]
#[non_exhaustive]
pub struct Plan {
    /// Kind of the operation: "create", "revert", "delete", "tidy", "clone".
    pub operation: String,
    /// The snapshots that the request named.
    pub snapshots: Vec<SnapshotName>,
    /// Steps before the cut, while a guest would run. They are undone if the operation fails before its
    /// commit point.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub prepare: Vec<PlanStep>,
    /// The cut. Its units are undone if the operation fails before its commit point.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cut: Vec<CutUnit>,
    /// Changes of the catalogue at the commit point: after the last cut step, before the first finish step.
    pub commit: Vec<Edit>,
    /// Units after the commit point: carried through, never undone.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub finish: Vec<FinishUnit>,
    /// Notes for the user: a disk that is left out, a point that must be copied, a layer that is kept.
    pub notes: Vec<String>,
}

setters!(Plan {
    prepare: Vec<PlanStep>,
    cut: Vec<CutUnit>,
    commit: Vec<Edit>,
    finish: Vec<FinishUnit>,
    notes: Vec<String>,
});

/// A step of a plan: an action on one disk, or on the whole domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "of", rename_all = "lowercase")]
pub enum PlanStep {
    /// A backend's step on a disk.
    Disk(Step),
    /// A hypervisor's step on the domain.
    Domain(HypervisorStep),
}

/// An action of a hypervisor on the whole domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct HypervisorStep {
    /// The action.
    pub action: DomainStep,
    /// Description for people: "pause the guest and detach vda".
    pub summary: String,
}

impl HypervisorStep {
    /// Makes a step.
    pub fn new(action: DomainStep, summary: impl Into<String>) -> Self {
        Self { action, summary: summary.into() }
    }
}

/// A part of the cut that begins and is undone as one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "of", rename_all = "lowercase")]
pub enum CutUnit {
    /// A backend's step on a disk.
    Disk(Step),
    /// A hypervisor's step on the domain, and what is nested in it.
    Domain {
        /// The step.
        #[serde(flatten)]
        step: HypervisorStep,
        /// Steps of disks that run at the moment that the step provides: the guest is paused, and nothing is
        /// written. The steps of one disk run in this order; those of several disks may run side by side.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        nested: Vec<Step>,
    },
}

/// A part of the finish that begins, and is deferred, as one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "of", rename_all = "lowercase")]
pub enum FinishUnit {
    /// A backend's step on a disk, and what is nested in it.
    Disk(FinishStep),
    /// A hypervisor's step on the domain.
    Domain(HypervisorStep),
}

/// A backend's step after the commit point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "FinishStep")]
#[serde(bound(deserialize = "A: Deserialize<'de>"))]
#[non_exhaustive]
pub struct FinishStep<A = serde_json::Value> {
    /// The step.
    #[serde(flatten)]
    pub step: Step<A>,
    /// Changes of the catalogue in the transaction that records the step as done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub edits: Vec<Edit>,
    /// True if the operation may end without it. A merge that is cancelled, or fails for lack of space, is
    /// deferred together with all later steps of its disk. The layers stay as orphan layers.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deferrable: bool,
    /// Steps of the same disk that run at the moment that the step provides: the pivot of a merge, when the
    /// guest's writes wait.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nested: Vec<NestedStep<A>>,
}

setters!(<A> FinishStep<A> {
    edits: Vec<Edit>,
    deferrable: bool,
    nested: Vec<NestedStep<A>>,
});

/// A backend's step nested in one after the commit point.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "NestedStep")]
#[non_exhaustive]
pub struct NestedStep<A = serde_json::Value> {
    /// The step.
    #[serde(flatten)]
    pub step: Step<A>,
    /// Changes of the catalogue in the transaction that records the step as done.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub edits: Vec<Edit>,
}

setters!(<A> NestedStep<A> {
    edits: Vec<Edit>,
});

/// A step at its place in a plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PlacedStep<'a> {
    /// The part of the plan.
    pub group: Group,
    /// True if it runs nested in the nearest step before it that is not nested.
    pub nested: bool,
    /// The step.
    pub step: StepRef<'a>,
    /// Its changes of the catalogue; none before the commit point.
    pub edits: &'a [Edit],
    /// True if it can be deferred; never before the commit point.
    pub deferrable: bool,
}

/// A step of a disk or of the domain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum StepRef<'a> {
    /// A backend's step on a disk.
    Disk(&'a Step),
    /// A hypervisor's step on the domain.
    Domain(&'a HypervisorStep),
}

impl<'a> PlacedStep<'a> {
    fn new(group: Group, step: StepRef<'a>) -> Self {
        Self { group, nested: false, step, edits: &[], deferrable: false }
    }

    /// The disk; absent: it is a step of the domain.
    pub fn target(&self) -> Option<&'a Target> {
        match self.step {
            StepRef::Disk(step) => Some(&step.target),
            StepRef::Domain(_) => None,
        }
    }

    /// The disk, or `domain`, for people.
    pub fn subject(&self) -> &'a str {
        subject(self.target())
    }

    /// Description for people.
    pub fn summary(&self) -> &'a str {
        match self.step {
            StepRef::Disk(step) => &step.summary,
            StepRef::Domain(step) => &step.summary,
        }
    }

    /// Bytes of data that it will move, as far as known.
    pub fn bytes(&self) -> u64 {
        match self.step {
            StepRef::Disk(step) => step.bytes,
            StepRef::Domain(_) => 0,
        }
    }
}

/// The subject of a step for people: its disk, or `domain`.
pub(crate) fn subject(target: Option<&Target>) -> &str {
    target.map_or("domain", Target::as_str)
}

impl PlanStep {
    fn as_ref(&self) -> StepRef<'_> {
        match self {
            Self::Disk(step) => StepRef::Disk(step),
            Self::Domain(step) => StepRef::Domain(step),
        }
    }
}

impl<A> FinishStep<A> {
    /// Makes a step without edits and without nested steps, which must be done.
    pub fn new(step: Step<A>) -> Self {
        Self { step, edits: Vec::new(), deferrable: false, nested: Vec::new() }
    }
}

impl<A> NestedStep<A> {
    /// Makes a nested step without edits.
    pub fn new(step: Step<A>) -> Self {
        Self { step, edits: Vec::new() }
    }
}

impl CutUnit {
    fn steps(&self) -> impl Iterator<Item = PlacedStep<'_>> {
        let (head, nested): (_, &[Step]) = match self {
            Self::Disk(step) => (StepRef::Disk(step), &[]),
            Self::Domain { step, nested } => (StepRef::Domain(step), nested),
        };
        let nested = nested
            .iter()
            .map(|step| PlacedStep { nested: true, ..PlacedStep::new(Group::Cut, StepRef::Disk(step)) });
        std::iter::once(PlacedStep::new(Group::Cut, head)).chain(nested)
    }

    fn len(&self) -> usize {
        match self {
            Self::Disk(_) => 1,
            Self::Domain { nested, .. } => 1 + nested.len(),
        }
    }
}

impl FinishUnit {
    fn steps(&self) -> impl Iterator<Item = PlacedStep<'_>> {
        let placed = |step| PlacedStep::new(Group::Finish, step);
        let (head, nested): (_, &[NestedStep]) = match self {
            Self::Disk(finish) => {
                let FinishStep { step, edits, deferrable, nested } = finish;
                let head = PlacedStep { edits, deferrable: *deferrable, ..placed(StepRef::Disk(step)) };
                (head, nested)
            }
            Self::Domain(step) => (placed(StepRef::Domain(step)), &[]),
        };
        let nested = nested.iter().map(move |NestedStep { step, edits }| PlacedStep {
            nested: true,
            edits,
            ..placed(StepRef::Disk(step))
        });
        std::iter::once(head).chain(nested)
    }

    fn len(&self) -> usize {
        match self {
            Self::Disk(step) => 1 + step.nested.len(),
            Self::Domain(_) => 1,
        }
    }
}

impl Plan {
    /// Makes a plan of this kind without steps and edits.
    pub fn new(operation: impl Into<String>, snapshots: Vec<SnapshotName>) -> Self {
        Self {
            operation: operation.into(),
            snapshots,
            prepare: Vec::new(),
            cut: Vec::new(),
            commit: Vec::new(),
            finish: Vec::new(),
            notes: Vec::new(),
        }
    }

    /// All steps in the order of their numbers.
    pub fn steps(&self) -> impl Iterator<Item = PlacedStep<'_>> {
        let prepare = self.prepare.iter().map(|step| PlacedStep::new(Group::Prepare, step.as_ref()));
        let cut = self.cut.iter().flat_map(CutUnit::steps);
        prepare.chain(cut).chain(self.finish.iter().flat_map(FinishUnit::steps))
    }

    /// The number of its steps.
    pub fn step_count(&self) -> usize {
        self.before_commit() + self.finish.iter().map(FinishUnit::len).sum::<usize>()
    }

    /// The number of its steps before the commit point.
    pub(crate) fn before_commit(&self) -> usize {
        self.prepare.len() + self.cut.iter().map(CutUnit::len).sum::<usize>()
    }

    /// Returns true if it leaves the domain's disks as they are, so that it needs no lock on them and no
    /// connection to the domain: it makes other domains of their points.
    pub(crate) fn leaves_disks(&self) -> bool {
        self.operation == OF_CLONES
    }

    /// Returns true if it has steps.
    pub fn has_steps(&self) -> bool {
        !(self.prepare.is_empty() && self.cut.is_empty() && self.finish.is_empty())
    }

    /// The steps of a disk.
    pub fn steps_of<'a>(&'a self, target: &'a Target) -> impl Iterator<Item = &'a Step> {
        self.steps().filter_map(move |placed| match placed.step {
            StepRef::Disk(step) if step.target == *target => Some(step),
            StepRef::Disk(_) | StepRef::Domain(_) => None,
        })
    }

    /// The actions on the domain.
    pub fn domain_steps(&self) -> impl Iterator<Item = &DomainStep> {
        self.steps().filter_map(|placed| match placed.step {
            StepRef::Domain(step) => Some(&step.action),
            StepRef::Disk(_) => None,
        })
    }

    /// The numbers of the steps of each unit, in running order. Each prepare step is a unit of its own.
    pub(crate) fn units(&self) -> impl Iterator<Item = Range<usize>> {
        let lengths = std::iter::repeat_n(1, self.prepare.len())
            .chain(self.cut.iter().map(CutUnit::len))
            .chain(self.finish.iter().map(FinishUnit::len));
        lengths.scan(0, |begin, length| {
            let unit = *begin..*begin + length;
            *begin = unit.end;
            Some(unit)
        })
    }

    /// The plan fit for display: machines' records are without what the domain's hypervisor says is secret.
    /// Without a hypervisor they are not shown at all.
    pub(crate) fn shown(mut self, saver: Option<&dyn VmStateSaver>) -> Self {
        let of_steps = self.finish.iter_mut().flat_map(|unit| match unit {
            FinishUnit::Disk(FinishStep { edits, nested, .. }) => {
                let nested = nested.iter_mut().flat_map(|step| &mut step.edits);
                edits.iter_mut().chain(nested).collect::<Vec<_>>()
            }
            FinishUnit::Domain(_) => Vec::new(),
        });
        for edit in of_steps.chain(&mut self.commit) {
            if let Edit::AddMachine { machine } = edit {
                machine.record =
                    saver.map_or_else(Default::default, |saver| saver.shown_machine(&machine.record));
            }
        }
        let registered = self.finish.iter_mut().filter_map(|unit| match unit {
            FinishUnit::Domain(HypervisorStep { action: DomainStep::Register { domains, .. }, .. }) => {
                Some(domains)
            }
            _ => None,
        });
        for domain in registered.flatten() {
            for machine in &mut domain.machines {
                machine.record =
                    saver.map_or_else(Default::default, |saver| saver.shown_machine(&machine.record));
            }
            if let Some(control) = &mut domain.control {
                control.start = saver.map_or_else(Vec::new, |saver| saver.shown_command(&control.start));
            }
        }
        self
    }

    /// Bytes of data that all steps move together.
    pub fn bytes(&self) -> u64 {
        self.steps().map(|placed| placed.bytes()).fold(0, u64::saturating_add)
    }

    /// Effect on the guest, other than a pause, and its power state afterwards, if planned.
    pub fn guest(&self) -> Option<(GuestChange, Option<PowerAfter>)> {
        let section = self.domain_steps().find_map(|step| match step {
            DomainStep::Detach { restart, .. } => Some(restart.as_ref()),
            _ => None,
        });
        let recreated = section.flatten().is_some_and(|restart| restart.recreated);
        self.domain_steps().find_map(|step| {
            let DomainStep::Continue { memory, reset, power } = step else { return None };
            let change = match (power, memory, reset, recreated) {
                (Some(PowerAfter::Off), ..) => GuestChange::Ended,
                (_, Some(_), ..) if section.is_none() => GuestChange::Started,
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
