//! [`DiskSnapshotter`] for raw files.

use std::sync::Arc;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use image_files::layer_name::{disk_of_layer, layer_path};
use image_files::{
    DiskLocks, FileIds, FileSteps, blocking, freed_by_removing, in_place, is_held_by_others, names,
    open_files,
};
use snapcore::backend::{
    Capabilities, CloneDisk, ClonePlan, DeleteCost, Differences, DiskPlan, DiskRequest, DiskSnapshotter,
    DiskState, FileUses, Finding, Guard, InspectDepth, Layer, Leftover, PointImage, Progress, Salvage,
    Severity, StepContext, StepStatus,
};
use snapcore::hypervisor::{AttachedDisk, OpenLayer};
use snapcore::manifest::ManifestStore;
use snapcore::{
    ActivePath, Disk, DiskAddress, DiskRecord, LayerName, Point, PointKind, Result, Snapshot, Step,
};
use tokio_util::sync::CancellationToken;

use crate::copy::{self, Watch};
use crate::layers;
use crate::plan::{self, METHODS};
use crate::reading;
use crate::state::{Sort, TpmLocks};
use crate::steps::{self, RawStep, StepRunner};

/// Disks that are raw files.
#[derive(Default)]
pub struct Raw {
    locks: Arc<DiskLocks>,
    sort: Sort,
    tpms: Arc<TpmLocks>,
}

impl Raw {
    /// Makes the backend.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes the backend of files with firmware variables ([`snapcore::hypervisor::FIRMWARE_VARIABLES`]).
    pub fn firmware_variables() -> Self {
        Self { sort: Sort::FirmwareVariables, ..Self::default() }
    }

    /// Makes the backend of files with the state of a TPM ([`snapcore::hypervisor::TPM_STATE`]).
    pub fn tpm() -> Self {
        Self { sort: Sort::Tpm, ..Self::default() }
    }

    fn step<T>(
        &self,
        step: &Step<RawStep>,
        context: StepContext<'_>,
        open: FileIds,
        work: impl FnOnce(&StepRunner<'_>, &RawStep) -> Result<T>,
    ) -> Result<T> {
        let locks = self.locks.of(context.disk.disk.path());
        let watch = Watch { progress: context.progress, cancel: context.cancel, bytes: step.bytes };
        let files = FileSteps { record: context.disk, locks: locks.as_deref(), open };
        let place = StepRunner { files, watch, sort: self.sort, resumed: context.resumed };
        in_place(|| work(&place, &step.action))
    }
}

/// Progress without a receiver.
struct Unwatched;

impl Progress for Unwatched {
    fn bytes(&self, _: u64, _: u64) {}
}

#[async_trait]
impl DiskSnapshotter for Raw {
    type Action = RawStep;

    fn format(&self) -> &str {
        self.sort.format()
    }

    fn capabilities(&self) -> Capabilities {
        let files = Capabilities::new(PointKind::External, 1).live();
        match self.sort {
            Sort::Disk => files.methods(METHODS).reads_points(),
            // An export would make it an image of another format, and no machine has its state in such a one.
            Sort::FirmwareVariables | Sort::Tpm => files.methods(["copy"]).machine_state(),
        }
    }

    fn leftover(&self, _disk: &DiskRecord, _step: &Step<RawStep>) -> Leftover {
        Leftover::PlannedAgain
    }

    fn configured_address(&self, layer: &DiskAddress) -> Option<DiskAddress> {
        disk_of_layer(layer)
    }

    fn uses(&self, disk: &DiskRecord, step: &Step<RawStep>) -> FileUses {
        steps::uses(disk, step)
    }

    async fn adopt(&self, disk: &Disk, _active_path: ActivePath) -> Result<DiskRecord> {
        let (disk, sort) = (disk.clone(), self.sort);
        blocking(move || {
            layers::check_path(&disk)?;
            sort.check(&disk)?;
            let active = layers::active_name(&disk);
            Ok(DiskRecord::new(disk, active.clone()).owned(vec![active]))
        })
        .await
    }

    async fn inspect(
        &self,
        disk: &DiskRecord,
        depth: InspectDepth,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        let open = open_files(attached).await?;
        let disk = disk.clone();
        blocking(move || layers::inspect(&disk, depth, &open)).await
    }

    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        let (mut copy, known) = (record.clone(), known.to_vec());
        let (copy, found) = blocking(move || {
            let found = layers::discover(&mut copy, &known)?;
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
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan<RawStep>> {
        let (disk, state, request, sort) = (disk.clone(), state.clone(), request.clone(), self.sort);
        blocking(move || plan::plan(sort, &disk, &state, active_path, &request)).await
    }

    async fn plan_clone(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        request: &CloneDisk,
    ) -> Result<ClonePlan<RawStep>> {
        let (disk, state, request, sort) = (disk.clone(), state.clone(), request.clone(), self.sort);
        blocking(move || plan::clones(sort, &disk, &state, &request)).await
    }

    async fn open_point(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        point: &Point,
    ) -> Result<Arc<dyn PointImage>> {
        let (disk, state, point) = (disk.clone(), state.clone(), point.clone());
        blocking(move || Ok(Arc::new(reading::open(&disk, &state, &point)?) as Arc<dyn PointImage>)).await
    }

    async fn differences(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        from: &Point,
        to: &Point,
    ) -> Result<Differences> {
        let (disk, state, from, to) = (disk.clone(), state.clone(), from.clone(), to.clone());
        blocking(move || {
            let open = |point| reading::open(&disk, &state, point);
            reading::compare(open(&from)?, open(&to)?)
        })
        .await
    }

    async fn lock(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard> {
        let is_device = layers::is_device(disk.disk.path());
        if !is_device {
            names::require_place_of(disk)?;
        }
        let (locks, at_rest) = self.locks.begin_beside(disk.disk.path(), attached).await?;
        // A TPM puts another file in the place of its own while it runs.
        let at_rest = at_rest && (self.sort != Sort::Tpm || attached.is_none());
        let mut tpm = None;
        if at_rest {
            if is_device {
                layers::refuse_used_device(disk.disk.path())?;
            }
            if self.sort == Sort::Tpm {
                tpm = self.tpms.lock(disk.disk.path())?;
            }
            locks.lock(disk.disk.path())?;
        }
        Ok(Box::new((locks, tpm)))
    }

    async fn borrow(&self, disk: &DiskRecord) -> Result<Option<Guard>> {
        let (locks, path) = (Arc::clone(&self.locks), disk.disk.path().to_owned());
        let loan = blocking(move || locks.borrow(&path)).await?;
        Ok(loan.map(|loan| Box::new(loan) as Guard))
    }

    async fn yield_locks(&self, disk: &DiskRecord) -> Result<()> {
        let (locks, path) = (Arc::clone(&self.locks), disk.disk.path().to_owned());
        self.tpms.yield_of(&path);
        blocking(move || locks.yield_of(&path)).await
    }

    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<OpenLayer>> {
        Ok(vec![OpenLayer::new(disk.disk.address.clone(), "raw")])
    }

    async fn apply(&self, step: &Step<RawStep>, context: StepContext<'_>) -> Result<()> {
        let open = open_files(context.attached).await?;
        self.step(step, context, open, |place, action| place.apply(action))
    }

    async fn undo(&self, step: &Step<RawStep>, context: StepContext<'_>) -> Result<()> {
        let open = open_files(context.attached).await?;
        self.step(step, context, open, |place, action| place.undo(action))
    }

    async fn salvage(&self, step: &Step<RawStep>, done: bool, context: StepContext<'_>) -> Result<Salvage> {
        let open = open_files(context.attached).await?;
        self.step(step, context, open, |place, action| place.salvage(action, done))
    }

    async fn status(&self, step: &Step<RawStep>, context: StepContext<'_>) -> Result<StepStatus> {
        self.step(step, context, FileIds::new(), |place, action| place.status(action))
    }

    async fn check(&self, disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>> {
        let (disk, state) = (disk.clone(), state.clone());
        blocking(move || check(&disk, &state)).await
    }

    async fn cost_of_delete(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        drop: &[Point],
        keep: &[Point],
    ) -> Result<DeleteCost> {
        let request = DiskRequest::Delete { drop: drop.to_vec(), keep: keep.to_vec(), force: true };
        let plan = self.plan(disk, state, ActivePath::Keep, &request).await?;
        let (disk, state) = (disk.clone(), state.clone());
        blocking(move || Ok(cost(&disk, &state, &plan))).await
    }

    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        layers::manifests(disk)
    }

    fn layer_address(&self, disk: &DiskRecord, layer: &LayerName) -> DiskAddress {
        layer_path(disk.disk.path(), layer).into()
    }
}

/// The space that the files have which a delete removes, with their checksums.
fn cost(disk: &DiskRecord, state: &DiskState, plan: &DiskPlan<RawStep>) -> DeleteCost {
    let removed = plan.steps().filter_map(|step| match &step.action {
        RawStep::Remove { layers } => Some(layers),
        _ => None,
    });
    let removed: Vec<&LayerName> = removed.flatten().collect();
    let (gone, kept): (Vec<&Layer>, Vec<&Layer>) =
        state.layers.iter().partition(|layer| removed.contains(&&layer.name));
    let mut files: Vec<Utf8PathBuf> = gone.iter().map(|layer| layer.path().to_owned()).collect();
    let sums = removed.iter().map(|name| copy::sum_file(&layer_path(disk.disk.path(), name)));
    files.extend(sums.filter(|file| file.symlink_metadata().is_ok()));
    let path = |file: &Utf8Path| file.as_std_path().to_owned();
    let files: Vec<_> = files.iter().map(|file| path(file)).collect();
    let kept: Vec<_> = kept.iter().map(|layer| path(layer.path())).collect();
    freed_by_removing(files.iter().map(|file| (&**file, 1)), kept.iter().map(|file| &**file))
}

fn check(disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut find = |severity, subject: Utf8PathBuf, message: String| {
        findings.push(Finding::new(severity, subject.into_string(), message));
    };
    let cancel = CancellationToken::new();
    let watch = Watch { progress: &Unwatched, cancel: &cancel, bytes: 0 };
    for name in disk.owned.iter().filter(|name| **name != disk.active) {
        let file = layer_path(disk.disk.path(), name);
        if state.layer(name).is_none() {
            let message = "it does not exist: the snapshots that have it as their point cannot be returned to; bring it back, \
                         or delete them";
            find(Severity::Error, file, message.to_owned());
        } else if is_held_by_others(&file)? {
            find(Severity::Note, file, "another process has it open: not checked".to_owned());
        } else if let Err(error) = copy::verify(&file, watch) {
            find(Severity::Error, file, error.to_string());
        }
    }
    for undetermined in &state.undetermined {
        let message = format!(
            "it may depend on a snapshot of {}, so reverts and deletes are refused: {}",
            disk.disk.path(),
            undetermined.why
        );
        find(Severity::Warning, undetermined.file.path().to_owned(), message);
    }
    for stray in layers::strays(disk)? {
        let message = "it has the name of a point of this disk, and is none that the catalogue knows; 'domsnap import' takes \
                     it in";
        find(Severity::Note, layer_path(disk.disk.path(), &stray), message.to_owned());
    }
    Ok(findings)
}
