//! The plans of all disks, put together part by part. The domain's own steps are then added around them.

use crate::disk_plan::DiskPlan;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::DomainStep;
use crate::name::SnapshotName;
use crate::shape::{CutUnit, FinishUnit, HypervisorStep, Plan, PlanStep};
use crate::step::{Edit, Step};

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
    pub(super) fn add(&mut self, disk: DiskPlan) {
        let DiskPlan {
            prepare,
            instant,
            cut,
            commit,
            detached,
            finish,
            point: _,
            reserves: _,
            consumes: _,
            notes,
        } = disk;
        self.prepare.extend(prepare.into_iter().map(PlanStep::Disk));
        self.nested.extend(instant.into_iter().flat_map(|instant| instant.nested));
        self.cut.extend(cut.into_iter().map(CutUnit::Disk));
        self.commit.extend(commit);
        self.detached.extend(detached.into_iter().map(FinishUnit::Disk));
        self.finish.extend(finish.into_iter().map(FinishUnit::Disk));
        self.notes.extend(notes);
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
