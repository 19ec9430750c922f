//! Backends whose actions are JSON: what the registry, the planner and the engine know.
//!
//! An action is encoded once, when its plan is made, and decoded once for each call that gets its step. A
//! value that cannot be encoded is an error, so the journal has no step that no backend can read.

use std::sync::Arc;

use async_trait::async_trait;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::address::{DiskAddress, DiskIdentity};
use crate::backend::{
    AdviceOn, Base, Capabilities, DeleteCost, DiskSnapshotter, FileUses, Finding, Guard, InspectDepth,
    Leftover, Salvage, StepContext, StepNeed,
};
use crate::disk_plan::{CloneDisk, ClonePlan, DiskPlan, DiskRequest};
use crate::domain::{ActivePath, Disk, DiskRecord};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{AttachedDisk, OpenLayer, SeenDisk};
use crate::manifest::ManifestStore;
use crate::name::LayerName;
use crate::reading::{Differences, PointImage};
use crate::snapshot::{Point, Snapshot};
use crate::state::{DiskState, TagIdentity};
use crate::step::{Step, StepStatus};

/// A backend of any format: its actions are JSON.
pub type AnyDiskSnapshotter = dyn DiskSnapshotter<Action = Value>;

impl AnyDiskSnapshotter {
    /// Makes a backend one whose actions are JSON.
    pub fn of<B: DiskSnapshotter + ?Sized + 'static>(backend: Arc<B>) -> Arc<Self> {
        Arc::new(Erased { inner: backend })
    }
}

struct Erased<B: ?Sized> {
    inner: Arc<B>,
}

impl<B: DiskSnapshotter + ?Sized> Erased<B> {
    fn decoded(&self, step: &Step) -> Result<Step<B::Action>> {
        decoded(self.inner.format(), step)
    }
}

fn decoded<A: DeserializeOwned>(format: &str, step: &Step) -> Result<Step<A>> {
    let action = A::deserialize(&step.action).map_err(|cause| {
        Error::new(
            ErrorKind::Internal,
            format!("the journal has a step that the backend {format} does not know: {}", step.action),
        )
        .because(cause)
        .advise("it was written by another version of domsnap: recover with that one")
    })?;
    Ok(Step { target: step.target.clone(), action, summary: step.summary.clone(), bytes: step.bytes })
}

/// Encodes the steps of a plan for `disk`.
fn recordable<A: Serialize>(format: &str, disk: &DiskRecord, plan: DiskPlan<A>) -> Result<DiskPlan> {
    let target = &disk.disk.target;
    if let Some(step) = plan.steps().find(|step| step.target != *target) {
        let detail =
            format!("{target}: '{}' is planned, which is a step of disk {}", step.summary, step.target);
        return Err(Error::new(ErrorKind::Internal, detail)
            .state("no changes made")
            .advise("this is a defect of the backend; please report it"));
    }
    plan.try_map(|action| {
        serde_json::to_value(&action).map_err(|cause| {
            Error::new(
                ErrorKind::Internal,
                format!("{target}: a step of the backend {format} cannot be recorded"),
            )
            .because(cause)
            .state("no changes made")
            .advise("this is a defect of the backend; please report it")
        })
    })
}

// Every method is delegated: a default method that were forgotten here would hide the backend's own.
#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl<B: DiskSnapshotter + ?Sized> DiskSnapshotter for Erased<B> {
    type Action = Value;

    fn format(&self) -> &str {
        self.inner.format()
    }
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn processes(&self) -> Vec<u32> {
        self.inner.processes()
    }
    fn scheme(&self) -> Option<&str> {
        self.inner.scheme()
    }
    async fn resolve(&self, address: &DiskAddress) -> Result<DiskAddress> {
        self.inner.resolve(address).await
    }
    async fn identity(&self, disk: &Disk) -> Result<Option<DiskIdentity>> {
        self.inner.identity(disk).await
    }
    async fn has_layer(&self, disk: &DiskRecord, layer: &LayerName) -> Result<bool> {
        self.inner.has_layer(disk, layer).await
    }
    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        self.inner.manifests(disk)
    }
    fn leftover(&self, disk: &DiskRecord, step: &Step) -> Leftover {
        self.decoded(step).map_or(Leftover::Required, |step| self.inner.leftover(disk, &step))
    }
    fn needs_of(&self, disk: &DiskRecord, step: &Step) -> Vec<StepNeed> {
        self.decoded(step).map_or_else(|_| Vec::new(), |step| self.inner.needs_of(disk, &step))
    }
    fn uses(&self, disk: &DiskRecord, step: &Step) -> FileUses {
        self.decoded(step).map_or_else(|_| FileUses::default(), |step| self.inner.uses(disk, &step))
    }
    fn room(&self, disk: &DiskRecord, step: &Step) -> u64 {
        self.decoded(step).map_or(0, |step| self.inner.room(disk, &step))
    }
    fn advice(&self, disk: &DiskRecord, on: AdviceOn<'_>) -> Option<String> {
        self.inner.advice(disk, on)
    }
    fn recognises(&self, address: &DiskAddress, open_format: Option<&str>) -> bool {
        self.inner.recognises(address, open_format)
    }
    async fn require_shown(&self, address: &DiskAddress, seen: &SeenDisk) -> Result<()> {
        self.inner.require_shown(address, seen).await
    }
    fn configured_address(&self, layer: &DiskAddress) -> Option<DiskAddress> {
        self.inner.configured_address(layer)
    }
    async fn adopt(&self, disk: &Disk, active_path: ActivePath) -> Result<DiskRecord> {
        self.inner.adopt(disk, active_path).await
    }
    async fn inspect(
        &self,
        disk: &DiskRecord,
        depth: InspectDepth,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        self.inner.inspect(disk, depth, attached).await
    }
    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        self.inner.discover(record, known).await
    }
    async fn bases(&self, disk: &DiskRecord) -> Result<Vec<Base>> {
        self.inner.bases(disk).await
    }
    async fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan> {
        recordable(self.inner.format(), disk, self.inner.plan(disk, state, active_path, request).await?)
    }
    async fn plan_clone(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        request: &CloneDisk,
    ) -> Result<ClonePlan> {
        let ClonePlan { plan, disks, points } = self.inner.plan_clone(disk, state, request).await?;
        Ok(ClonePlan { plan: recordable(self.inner.format(), disk, plan)?, disks, points })
    }
    async fn open_point(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        point: &Point,
    ) -> Result<Arc<dyn PointImage>> {
        self.inner.open_point(disk, state, point).await
    }
    async fn differences(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        from: &Point,
        to: &Point,
    ) -> Result<Differences> {
        self.inner.differences(disk, state, from, to).await
    }
    async fn lock(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard> {
        self.inner.lock(disk, attached).await
    }
    async fn borrow(&self, disk: &DiskRecord) -> Result<Option<Guard>> {
        self.inner.borrow(disk).await
    }
    async fn yield_locks(&self, disk: &DiskRecord) -> Result<()> {
        self.inner.yield_locks(disk).await
    }
    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<OpenLayer>> {
        self.inner.open_chain(disk).await
    }
    async fn apply(&self, step: &Step, context: StepContext<'_>) -> Result<()> {
        self.inner.apply(&self.decoded(step)?, context).await
    }
    async fn undo(&self, step: &Step, context: StepContext<'_>) -> Result<()> {
        self.inner.undo(&self.decoded(step)?, context).await
    }
    async fn salvage(&self, step: &Step, done: bool, context: StepContext<'_>) -> Result<Salvage> {
        self.inner.salvage(&self.decoded(step)?, done, context).await
    }
    async fn is_superseded(&self, step: &Step, context: StepContext<'_>) -> Result<bool> {
        self.inner.is_superseded(&self.decoded(step)?, context).await
    }
    async fn status(&self, step: &Step, context: StepContext<'_>) -> Result<StepStatus> {
        self.inner.status(&self.decoded(step)?, context).await
    }
    async fn identify(&self, disk: &DiskRecord, point: &Point) -> Result<Option<TagIdentity>> {
        self.inner.identify(disk, point).await
    }
    async fn check(&self, disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>> {
        self.inner.check(disk, state).await
    }
    async fn cost_of_delete(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        drop: &[Point],
        keep: &[Point],
    ) -> Result<DeleteCost> {
        self.inner.cost_of_delete(disk, state, drop, keep).await
    }
    async fn referenced(&self, disk: &DiskRecord, state: &DiskState, point: &Point) -> Result<Option<u64>> {
        self.inner.referenced(disk, state, point).await
    }
    async fn is_gone(&self, disk: &DiskRecord) -> Result<bool> {
        self.inner.is_gone(disk).await
    }
    fn layer_address(&self, disk: &DiskRecord, layer: &LayerName) -> DiskAddress {
        self.inner.layer_address(disk, layer)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::name::Target;

    #[derive(Debug, serde::Serialize, serde::Deserialize)]
    #[serde(tag = "do", rename_all = "kebab-case")]
    enum Known {
        Copy { tag: String },
    }

    /// A step that another version wrote is an error that names the step and the way out, not a panic or a
    /// guess.
    #[test]
    fn unknown_journalled_step_is_an_error() {
        let step = |action: Value| Step {
            target: Target::new("vda").unwrap(),
            action,
            summary: String::new(),
            bytes: 0,
        };
        let known: Step<Known> = decoded("dir", &step(json!({ "do": "copy", "tag": "a" }))).unwrap();
        let Known::Copy { tag } = known.action;
        assert_eq!(tag, "a");
        for action in [json!({ "do": "split" }), Value::Null] {
            let error = decoded::<Known>("dir", &step(action)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Internal);
            assert!(error.to_string().contains("the backend dir does not know"), "{error}");
            assert!(error.advice().unwrap().contains("another version"), "{error}");
        }
    }
}
