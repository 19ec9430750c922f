//! [`DiskSnapshotter`] for logical volumes.

use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::backend::{
    Capabilities, Certainty, CloneDisk, ClonePlan, DeleteCost, DiskPlan, DiskRequest, DiskSnapshotter,
    DiskState, Finding, Guard, InspectDepth, Leftover, Salvage, StepContext, StepNeed, StepStatus,
};
use snapcore::hypervisor::{AttachedDisk, OpenLayer};
use snapcore::manifest::{ManifestDirectory, ManifestStore};
use snapcore::{
    ActivePath, Disk, DiskAddress, DiskRecord, Error, ErrorKind, FileIdentity, LayerName, Point, PointKind,
    Result, Snapshot, Step, file_identity,
};

use crate::command::{Commands, Lvm2, Runner};
use crate::layers::{self, volume_of};
use crate::lock::VolumeLocks;
use crate::names::Volume;
use crate::plan::{self, Reserved};
use crate::report::VolumeKind;
use crate::rules::Rules;
use crate::steps::{LvmStep, StepRunner, refuse_unseen_users, wait_closed};
use crate::{check, device, discover};

/// Directory of manifests, because no file can lie beside a volume.
const MANIFESTS: &str = "/var/lib/domsnap/lvm";

/// Unlimited in practice: no point depends on another.
const MAX_DEPTH: u32 = 1 << 20;

/// The backend for disks that are logical volumes.
pub struct Lvm {
    inner: Arc<Inner>,
    manifests: Utf8PathBuf,
}

struct Inner {
    lvm: Lvm2,
    rules: Rules,
    locks: VolumeLocks,
    reserved: Mutex<Reserved>,
}

impl Default for Lvm {
    fn default() -> Self {
        Self::new()
    }
}

impl Lvm {
    /// Makes the backend with the lvm2 of this machine and the default rules.
    pub fn new() -> Self {
        Self::by(Arc::new(Commands))
    }

    /// Makes the backend with commands that `runner` runs.
    pub fn by(runner: Arc<dyn Runner>) -> Self {
        let inner = Inner {
            lvm: Lvm2::new(runner),
            rules: Rules::default(),
            locks: VolumeLocks::default(),
            reserved: Mutex::default(),
        };
        Self { inner: Arc::new(inner), manifests: MANIFESTS.into() }
    }

    /// Sets the size of thick snapshots' areas, in percent of the volume.
    #[must_use]
    pub fn area_percent(self, percent: u32) -> Self {
        self.with(|rules| rules.cow_percent = percent)
    }

    /// Sets the limits for thin pools, in percent: above them no more points are taken.
    #[must_use]
    pub fn pool_limits(self, data: u32, metadata: u32) -> Self {
        self.with(|rules| (rules.pool_data_percent, rules.pool_metadata_percent) = (data, metadata))
    }

    /// Stores manifests below `directory`.
    #[must_use]
    pub fn manifests(mut self, directory: impl Into<Utf8PathBuf>) -> Self {
        self.manifests = directory.into();
        self
    }

    fn with(mut self, change: impl FnOnce(&mut Rules)) -> Self {
        // There is only one reference before it is registered.
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            change(&mut inner.rules);
        }
        self
    }

    /// Runs `work` on a blocking thread, because it waits for other programs.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Inner) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(outcome) => outcome,
            Err(failure) => {
                Err(Error::new(ErrorKind::Internal, "the work on a volume broke off").because(failure))
            }
        }
    }

    async fn step<T: Send + 'static>(
        &self,
        step: &Step<LvmStep>,
        context: StepContext<'_>,
        work: impl FnOnce(&StepRunner<'_>, &LvmStep) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let action = step.action.clone();
        let path = context.disk.disk.path().to_owned();
        let volume = volume_of(context.disk)?;
        self.blocking(move |inner| {
            let lock = inner.locks.of(&volume);
            let runner = StepRunner { lvm: &inner.lvm, volume: &volume, path: &path, lock: lock.as_deref() };
            work(&runner, &action)
        })
        .await
    }
}

/// Returns the identity of the path's current target.
fn identity(path: &Utf8Path) -> Option<FileIdentity> {
    path.metadata().ok().map(|about| file_identity(&about))
}

#[async_trait]
impl DiskSnapshotter for Lvm {
    type Action = LvmStep;

    fn format(&self) -> &str {
        "lvm"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(PointKind::External, MAX_DEPTH).live()
    }

    /// A finish step removes unused volumes: those that a revert used, and those that the record owns without
    /// a snapshot.
    fn leftover(&self, _disk: &DiskRecord, _step: &Step<LvmStep>) -> Leftover {
        Leftover::PlannedAgain
    }

    fn needs_of(&self, disk: &DiskRecord, step: &Step<LvmStep>) -> Vec<StepNeed> {
        let Ok(volume) = volume_of(disk) else { return Vec::new() };
        let needs = step.action.needs(&volume).into_iter();
        needs.map(|(layer, alone)| StepNeed::new(file_of(disk, &volume, &layer), alone)).collect()
    }

    fn recognises(&self, address: &DiskAddress, open_format: Option<&str>) -> bool {
        let is_raw = matches!(open_format, None | Some("raw" | "lvm"));
        open_format == Some("lvm") || (is_raw && address.local().is_some_and(device::is_volume))
    }

    async fn adopt(&self, disk: &Disk, _: ActivePath) -> Result<DiskRecord> {
        let disk = disk.clone();
        self.blocking(move |inner| {
            let volume = Volume::of_path(disk.path())?;
            layers::adopt(&disk, &volume, &*inner.lvm.group(&volume.group)?)
        })
        .await
    }

    async fn inspect(
        &self,
        disk: &DiskRecord,
        _: InspectDepth,
        _: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        let disk = disk.clone();
        self.blocking(move |inner| {
            let volume = volume_of(&disk)?;
            layers::state(&disk, &volume, &*inner.lvm.group(&volume.group)?)
        })
        .await
    }

    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        let (mut copy, known) = (record.clone(), known.to_vec());
        let (copy, found) = self
            .blocking(move |inner| {
                let volume = volume_of(&copy)?;
                let group = inner.lvm.group(&volume.group)?;
                let found = discover::discover(&mut copy, &known, &volume, &group);
                Ok((copy, found))
            })
            .await?;
        *record = copy;
        Ok(found)
    }

    async fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        _: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan<LvmStep>> {
        let (disk, state, request) = (disk.clone(), state.clone(), request.clone());
        self.blocking(move |inner| {
            let volume = volume_of(&disk)?;
            let group = inner.lvm.group(&volume.group)?;
            let mut reserved = inner.reserved.lock().unwrap_or_else(PoisonError::into_inner);
            let (plan, takes) =
                plan::plan(&disk, &volume, &group, &state, &inner.rules, &reserved, &request)?;
            reserved.insert(volume, takes);
            Ok(plan)
        })
        .await
    }

    async fn plan_clone(
        &self,
        disk: &DiskRecord,
        _: &DiskState,
        request: &CloneDisk,
    ) -> Result<ClonePlan<LvmStep>> {
        let (disk, request) = (disk.clone(), request.clone());
        self.blocking(move |inner| {
            let volume = volume_of(&disk)?;
            let group = inner.lvm.group(&volume.group)?;
            plan::clones(&disk, &volume, &group, &inner.rules, &request)
        })
        .await
    }

    async fn lock(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard> {
        let open = match attached {
            Some(disk) => disk.open_files().await?,
            None => std::collections::HashSet::new(),
        };
        let disk = disk.clone();
        self.blocking(move |inner| {
            let volume = volume_of(&disk)?;
            let lock = inner.locks.begin(&volume)?;
            inner.reserved.lock().unwrap_or_else(PoisonError::into_inner).remove(&volume);
            let by_its_hypervisor = identity(disk.disk.path()).is_some_and(|id| open.contains(&id));
            if !by_its_hypervisor {
                let group = inner.lvm.group(&volume.group)?;
                if group.row(&volume.name).is_some_and(|row| row.open) {
                    wait_closed(&inner.lvm, &volume, "no other program may use it meanwhile")?;
                }
            }
            if by_its_hypervisor {
                // The service finds users that the kernel shows; it knows the hypervisor's process.
                refuse_unseen_users(&inner.lvm, disk.disk.path(), &volume)?;
            }
            Ok(Box::new(lock) as Guard)
        })
        .await
    }

    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<OpenLayer>> {
        Ok(vec![OpenLayer::new(disk.disk.address.clone(), "raw")])
    }

    async fn apply(&self, step: &Step<LvmStep>, context: StepContext<'_>) -> Result<()> {
        self.step(step, context, |runner, action| runner.apply(action)).await
    }

    async fn undo(&self, step: &Step<LvmStep>, context: StepContext<'_>) -> Result<()> {
        self.step(step, context, |runner, action| runner.undo(action)).await
    }

    async fn salvage(&self, step: &Step<LvmStep>, _: bool, context: StepContext<'_>) -> Result<Salvage> {
        self.step(step, context, |runner, action| runner.salvage(action)).await
    }

    async fn status(&self, step: &Step<LvmStep>, context: StepContext<'_>) -> Result<StepStatus> {
        self.step(step, context, |runner, action| runner.status(action)).await
    }

    async fn check(&self, disk: &DiskRecord, _: &DiskState) -> Result<Vec<Finding>> {
        let disk = disk.clone();
        self.blocking(move |inner| {
            let volume = volume_of(&disk)?;
            Ok(check::check(&disk, &volume, &*inner.lvm.group(&volume.group)?, &inner.rules))
        })
        .await
    }

    async fn cost_of_delete(
        &self,
        disk: &DiskRecord,
        _: &DiskState,
        drop: &[Point],
        keep: &[Point],
    ) -> Result<DeleteCost> {
        let (disk, drop, keep) = (disk.clone(), drop.to_vec(), keep.to_vec());
        self.blocking(move |inner| {
            let volume = volume_of(&disk)?;
            let group = inner.lvm.group(&volume.group)?;
            let gone = drop
                .iter()
                .filter(|point| !keep.contains(point))
                .filter_map(|point| group.row(point.layer.as_str()));
            Ok(DeleteCost::sum(gone.map(|row| match row.kind {
                // Blocks that others have too stay. Which these are is in the pool's metadata alone.
                VolumeKind::Thin => DeleteCost::new(row.allocated(), 0).but(
                    Certainty::AtMost,
                    "thin volumes share blocks in their pool, and lvm does not tell which: `thin_ls` reads it from \
                     the pool's metadata",
                ),
                _ => DeleteCost::new(row.size, 0).exact(),
            })))
        })
        .await
    }

    async fn is_gone(&self, disk: &DiskRecord) -> Result<bool> {
        let disk = disk.clone();
        self.blocking(move |inner| {
            let volume = volume_of(&disk)?;
            match inner.lvm.group(&volume.group) {
                // An inactive volume has no device node, and between the two renames of a revert no volume
                // has the name. So only the group shows what exists.
                Ok(group) => Ok(layers::is_gone(&disk, &volume, &group)),
                // A missing group may come back with its physical volumes.
                Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
                Err(error) => Err(error),
            }
        })
        .await
    }

    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        let directory = match Volume::of_path(disk.path()) {
            Ok(volume) => self.manifests.join(volume.group).join(format!("{}.domsnap", volume.name)),
            Err(_) => self.manifests.join("unnamed"),
        };
        Arc::new(ManifestDirectory::new(directory))
    }

    fn layer_address(&self, disk: &DiskRecord, layer: &LayerName) -> DiskAddress {
        match volume_of(disk) {
            Ok(volume) => file_of(disk, &volume, layer).into(),
            Err(_) => disk.disk.address.clone(),
        }
    }
}

/// Returns the device of a layer; of the disk's own volume the path that its configuration has.
fn file_of(disk: &DiskRecord, volume: &Volume, layer: &LayerName) -> Utf8PathBuf {
    match *layer == volume.layer() {
        true => disk.disk.path().to_owned(),
        false => layers::file(volume, layer),
    }
}
