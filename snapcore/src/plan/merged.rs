//! The plans of all disks, put together part by part. The domain's own steps are then added around them.

use crate::shape::{CutUnit, FinishStep, FinishUnit, HypervisorStep, NestedStep, Plan, PlanStep};
use crate::{DiskPlan, DomainStep, Edit, Error, ErrorKind, Group, PlannedStep, Result, SnapshotName, Step};

/// The parts of a plan in the making.
#[derive(Default)]
pub(super) struct Merged {
    pub(super) prepare: Vec<PlanStep>,
    /// Steps of disks for the moment of the hypervisor's cut. Its step takes them.
    pub(super) nested: Vec<Step>,
    pub(super) cut: Vec<CutUnit>,
    pub(super) commit: Vec<Edit>,
    /// Steps of a delete that need a detached section where the domain runs. The section takes them.
    pub(super) detached: Vec<FinishUnit>,
    pub(super) finish: Vec<FinishUnit>,
    pub(super) notes: Vec<String>,
}

impl Merged {
    /// Adds the plan of one disk.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] for a plan that has no such parts: a defect of its backend.
    pub(super) fn add(&mut self, disk: DiskPlan) -> Result<()> {
        for planned in disk.steps {
            let PlannedStep { group, step, edits, deferrable, inside, window } = planned;
            let misplaced = |why: &str| {
                let detail = format!("{}: the step '{}' {why}", step.target, step.summary);
                Err(Error::new(ErrorKind::Internal, detail)
                    .state("no changes made")
                    .advise("this is a defect of the backend; please report it"))
            };
            if group != Group::Finish && (!edits.is_empty() || deferrable) {
                return misplaced("comes before the commit point, and has edits or is deferrable");
            }
            match (group, inside) {
                (Group::Prepare, false) => self.prepare.push(PlanStep::Disk(step)),
                (Group::Cut, true) => self.nested.push(step),
                (Group::Cut, false) => self.cut.push(CutUnit::Disk(step)),
                (Group::Finish, true) => match self.finish.last_mut() {
                    Some(FinishUnit::Disk(head)) if head.step.target == step.target => {
                        head.nested.push(NestedStep { step, edits });
                    }
                    Some(FinishUnit::Disk(_) | FinishUnit::Domain(_)) | None => {
                        return misplaced("is nested in no step");
                    }
                },
                (Group::Finish, false) => {
                    let unit = FinishUnit::Disk(FinishStep { edits, deferrable, ..FinishStep::new(step) });
                    if window { self.detached.push(unit) } else { self.finish.push(unit) }
                }
                (Group::Prepare, true) => return misplaced("is nested in no step"),
            }
        }
        self.commit.extend(disk.commit);
        self.notes.extend(disk.notes);
        Ok(())
    }

    /// The plan.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] if a disk has steps for a moment that the plan does not provide.
    pub(super) fn plan(self, operation: &str, snapshots: Vec<SnapshotName>) -> Result<Plan> {
        let Self { prepare, nested, cut, commit, detached, finish, notes } = self;
        if let Some(step) = nested.first() {
            let detail = format!("{}: the step '{}' is nested in no step", step.target, step.summary);
            return Err(Error::new(ErrorKind::Internal, detail).state("no changes made"));
        }
        let finish = detached.into_iter().chain(finish).collect();
        Ok(Plan { prepare, cut, commit, finish, notes, ..Plan::new(operation, snapshots) })
    }
}

/// A step of the domain.
pub(super) fn of_domain(action: DomainStep, summary: impl Into<String>) -> HypervisorStep {
    HypervisorStep { action, summary: summary.into() }
}
