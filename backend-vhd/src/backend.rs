//! [`DiskSnapshotter`] for VHD.

use std::sync::Arc;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use image_files::chain::{self, ChainStep, Growth};
use image_files::layer_name::{disk_of_layer, layer_path};
use image_files::{
    DiskLocks, FileIds, FileSteps, blocking, in_place, is_held_by_others, layers, manifests_beside, names,
    open_files,
};
use snapcore::backend::{
    Base, Capabilities, Certainty, CloneDisk, ClonePlan, DeleteCost, Differences, DiskPlan, DiskRequest,
    DiskSnapshotter, DiskState, FileUses, Finding, Guard, InspectDepth, Leftover, PointImage, Salvage,
    Severity, StepContext, StepStatus,
};
use snapcore::hypervisor::{AttachedDisk, OpenLayer, SeenDisk};
use snapcore::manifest::ManifestStore;
use snapcore::{
    ActivePath, Disk, DiskAddress, DiskRecord, Error, ErrorKind, LayerName, Point, PointKind, Result,
    Snapshot, Step, TagIdentity,
};

use crate::attached;
use crate::clone;
use crate::image::{self, Chain, DEFAULT_DEPTH, Layer};
use crate::layers::{Limits, VhdChain, bases, file_of, reading};
use crate::reading;
use crate::refusal;
use crate::served;
use crate::steps::StepRunner;
use crate::under_qcow2::{self, OVERLAY};

/// Backend for disks that are VHD files.
pub struct VhdFiles {
    limits: Limits,
    locks: Arc<DiskLocks>,
}

impl Default for VhdFiles {
    fn default() -> Self {
        Self::new()
    }
}

impl VhdFiles {
    /// Allows chains of at most [`DEFAULT_DEPTH`] layers, in the disk's own directory.
    pub fn new() -> Self {
        Self {
            limits: Limits { max_depth: DEFAULT_DEPTH as u32, allowed: Vec::new() },
            locks: Arc::default(),
        }
    }

    /// Follows and makes chains of at most `layers` images.
    #[must_use]
    pub fn max_depth(mut self, layers: u32) -> Self {
        self.limits.max_depth = layers;
        self
    }

    /// Follows locators into `directory` too.
    #[must_use]
    pub fn allow_backing(mut self, directory: impl Into<Utf8PathBuf>) -> Self {
        self.limits.allowed.push(directory.into());
        self
    }

    /// Runs a step on this thread, because what it borrows does not outlive the call.
    fn step<T>(
        &self,
        step: &Step<ChainStep>,
        context: StepContext<'_>,
        open: FileIds,
        work: impl FnOnce(&StepRunner<'_>, &ChainStep) -> Result<T>,
    ) -> Result<T> {
        let locks = self.locks.of(context.disk.disk.path());
        let place = StepRunner {
            files: FileSteps { record: context.disk, locks: locks.as_deref(), open },
            progress: context.progress,
            cancel: context.cancel,
            bytes: step.bytes,
            limits: &self.limits,
            resumed: context.resumed,
        };
        in_place(|| work(&place, &step.action))
    }
}

#[async_trait]
impl DiskSnapshotter for VhdFiles {
    type Action = ChainStep;

    fn format(&self) -> &str {
        "vhd"
    }

    fn capabilities(&self) -> Capabilities {
        // Of a disk that QEMU itself has open, a point is the image under a qcow2 overlay.
        Capabilities::new(PointKind::External, self.limits.max_depth).live().methods([OVERLAY]).reads_points()
    }

    /// QEMU's name of the format is `vpc`.
    fn recognises(&self, _address: &DiskAddress, open_format: Option<&str>) -> bool {
        matches!(open_format, Some("vhd" | "vpc"))
    }

    async fn adopt(&self, disk: &Disk, active_path: ActivePath) -> Result<DiskRecord> {
        let (disk, limits) = (disk.clone(), self.limits.clone());
        blocking(move || layers::adopt(&VhdChain, disk, active_path, &limits)).await
    }

    async fn inspect(
        &self,
        disk: &DiskRecord,
        depth: InspectDepth,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        let open = open_files(attached).await?;
        let (disk, limits) = (disk.clone(), self.limits.clone());
        let is_served = attached.is_some_and(|attached| attached.is_served());
        blocking(move || {
            if !is_served {
                refusal::refuse_open_child(&disk, &open)?;
            }
            layers::inspect(&VhdChain, &disk, depth, &limits, &open)
        })
        .await
    }

    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        let (mut copy, known, limits) = (record.clone(), known.to_vec(), self.limits.clone());
        let (copy, found) = blocking(move || {
            let found = image_files::discover(&VhdChain, &mut copy, &known, &limits)?;
            Ok((copy, found))
        })
        .await?;
        *record = copy;
        Ok(found)
    }

    fn leftover(&self, _disk: &DiskRecord, _step: &Step<ChainStep>) -> Leftover {
        Leftover::PlannedAgain
    }

    async fn require_shown(&self, address: &DiskAddress, seen: &SeenDisk) -> Result<()> {
        let (path, seen) = (address.path().to_owned(), seen.clone());
        blocking(move || under_qcow2::require_shown(&path, &seen)).await
    }

    fn configured_address(&self, layer: &DiskAddress) -> Option<DiskAddress> {
        disk_of_layer(layer)
    }

    fn uses(&self, disk: &DiskRecord, step: &Step<ChainStep>) -> FileUses {
        let mut uses = chain::uses(disk, &step.action);
        if let ChainStep::CreateOverlay { virtual_size, format: None, .. } = &step.action {
            uses.room = image::bytes_of_new(*virtual_size);
        }
        uses
    }

    async fn bases(&self, disk: &DiskRecord) -> Result<Vec<Base>> {
        let (disk, limits) = (disk.clone(), self.limits.clone());
        blocking(move || bases(&disk, &limits)).await
    }

    async fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan<ChainStep>> {
        let (disk, state, request) = (disk.clone(), state.clone(), request.clone());
        let capabilities = self.capabilities();
        blocking(move || {
            let is_in_qemu = state.attached && !state.served;
            if let DiskRequest::Create { kind, method, overlay, stamp, .. } = &request
                && (method.as_deref() == Some(OVERLAY) || is_in_qemu)
            {
                return under_qcow2::plan(&disk, &state, active_path, *kind, overlay.as_ref(), *stamp);
            }
            if is_in_qemu {
                return chain::unless_tidying(&request, Err(refusal::open_in_qemu(&disk)));
            }
            if let DiskRequest::Create { overlay: Some(overlay), .. } = &request {
                chain::check_overlay_name(&disk, overlay)?;
            }
            let mut plan = chain::plan(&disk, &state, active_path, &capabilities, &request, &mut |run| {
                visible(&disk, run)
            })?;
            let checked = refusal::check(&disk, &state, &mut plan).and_then(|()| {
                let mut images = Images { disk: &disk, state: &state };
                match &request {
                    DiskRequest::Delete { drop, force: false, .. } if !drop.is_empty() => {
                        chain::require_room(&disk, &state, &plan, &mut images)
                    }
                    _ => Ok(()),
                }
            });
            chain::unless_tidying(&request, checked.map(|()| plan))
        })
        .await
    }

    async fn plan_clone(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        request: &CloneDisk,
    ) -> Result<ClonePlan<ChainStep>> {
        let (disk, state, request) = (disk.clone(), state.clone(), request.clone());
        let limits = self.limits.clone();
        blocking(move || clone::plan(&disk, &state, &request, &limits)).await
    }

    async fn open_point(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        point: &Point,
    ) -> Result<Arc<dyn PointImage>> {
        let (disk, state, point, limits) = (disk.clone(), state.clone(), point.clone(), self.limits.clone());
        blocking(move || Ok(Arc::new(reading::open(&disk, &state, &point, &limits)?) as Arc<dyn PointImage>))
            .await
    }

    async fn differences(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        from: &Point,
        to: &Point,
    ) -> Result<Differences> {
        let (disk, state, limits) = (disk.clone(), state.clone(), self.limits.clone());
        let (from, to) = (from.clone(), to.clone());
        blocking(move || {
            let open = |point| reading::open(&disk, &state, point, &limits);
            reading::compare(open(&from)?, open(&to)?)
        })
        .await
    }

    async fn lock(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard> {
        names::require_place_of(disk)?;
        let (locks, at_rest) = self.locks.begin_beside(disk.disk.path(), attached).await?;
        if at_rest {
            locks.lock(disk.disk.path())?;
            let path = disk.disk.path().to_owned();
            blocking(move || served::require_complete(&path)).await?;
        }
        Ok(Box::new(locks))
    }

    async fn borrow(&self, disk: &DiskRecord) -> Result<Option<Guard>> {
        let (locks, path) = (Arc::clone(&self.locks), disk.disk.path().to_owned());
        let loan = blocking(move || locks.borrow(&path)).await?;
        Ok(loan.map(|loan| Box::new(loan) as Guard))
    }

    async fn yield_locks(&self, disk: &DiskRecord) -> Result<()> {
        let (locks, path) = (Arc::clone(&self.locks), disk.disk.path().to_owned());
        blocking(move || locks.yield_of(&path)).await
    }

    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<OpenLayer>> {
        let (disk, limits) = (disk.clone(), self.limits.clone());
        blocking(move || layers::open_chain(&VhdChain, &disk, &limits)).await
    }

    async fn apply(&self, step: &Step<ChainStep>, context: StepContext<'_>) -> Result<()> {
        let open = open_files(context.attached).await?;
        if let Some(disk) = context.attached.filter(|disk| disk.is_served() && !open.is_empty())
            && attached::apply(disk, &open, &step.action, context).await?
        {
            return Ok(());
        }
        self.step(step, context, open, |place, action| place.apply(action))
    }

    async fn undo(&self, step: &Step<ChainStep>, context: StepContext<'_>) -> Result<()> {
        let open = open_files(context.attached).await?;
        self.step(step, context, open, |place, action| place.undo(action))
    }

    async fn salvage(&self, step: &Step<ChainStep>, done: bool, context: StepContext<'_>) -> Result<Salvage> {
        let open = open_files(context.attached).await?;
        self.step(step, context, open, |place, action| place.salvage(action, done))
    }

    async fn is_superseded(&self, step: &Step<ChainStep>, context: StepContext<'_>) -> Result<bool> {
        self.step(step, context, FileIds::new(), |place, action| place.files.is_superseded(action))
    }

    async fn status(&self, step: &Step<ChainStep>, context: StepContext<'_>) -> Result<StepStatus> {
        self.step(step, context, FileIds::new(), |place, action| place.status(action))
    }

    async fn identify(&self, _disk: &DiskRecord, _point: &Point) -> Result<Option<TagIdentity>> {
        Ok(None)
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
        blocking(move || chain::cost(&plan, &state, &mut Images { disk: &disk, state: &state })).await
    }

    async fn referenced(&self, _disk: &DiskRecord, state: &DiskState, point: &Point) -> Result<Option<u64>> {
        let chain = state.chain(&point.layer);
        let bytes = chain.iter().map(|layer| layer.allocated).fold(0, u64::saturating_add);
        Ok((!chain.is_empty()).then_some(bytes))
    }

    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        manifests_beside(disk.path())
    }

    fn layer_address(&self, disk: &DiskRecord, layer: &LayerName) -> DiskAddress {
        file_of(disk, layer).unwrap_or_else(|_| layer_path(disk.disk.path(), layer)).into()
    }
}

/// The images of a disk, as far as the cost of a delete depends on them.
struct Images<'a> {
    disk: &'a DiskRecord,
    state: &'a DiskState,
}

impl chain::Measure for Images<'_> {
    fn dropped(&mut self, layer: &LayerName, _: &[chain::Tag], _: bool) -> Result<DeleteCost> {
        Err(Error::new(ErrorKind::Internal, format!("{layer} is a VHD, which has no internal snapshots")))
    }

    fn merged(&mut self, run: &[LayerName], into: &LayerName, _: bool, moved: u64) -> Result<Growth> {
        let target = run.iter().position(|layer| layer == into).unwrap_or_default();
        let read = opened(self.disk, run).and_then(|mut run| Ok(image::merge_growth(&mut run, target)?));
        Ok(match self.state.attached {
            // The server that has them open merges them, while the guest writes.
            true => Growth { more: read.unwrap_or(moved), less: 0, certainty: Certainty::Estimate },
            false => Growth { more: read?, less: 0, certainty: Certainty::Exact },
        })
    }

    fn copied(&mut self, layer: &LayerName, _: &chain::Tag) -> Result<u64> {
        Err(Error::new(ErrorKind::Internal, format!("{layer} is a VHD, which has no internal snapshots")))
    }
}

/// Counts the sectors of each layer of a run that its top shows.
fn visible(disk: &DiskRecord, run: &[LayerName]) -> Result<Vec<u64>> {
    Ok(image::visible_bytes(&mut opened(disk, run)?)?)
}

fn opened(disk: &DiskRecord, run: &[LayerName]) -> Result<Chain> {
    let mut opened = Vec::new();
    for layer in run {
        opened.push(Layer::Vhd(Box::new(reading(&file_of(disk, layer)?)?)));
    }
    Ok(Chain::new(opened)?)
}

/// Maps a finding of the image engine about the image at `file`.
pub(crate) fn of_engine(file: &Utf8Path, found: image::Finding) -> Finding {
    let severity = match found.severity {
        image::Severity::Note => Severity::Note,
        image::Severity::Warning => Severity::Warning,
        image::Severity::Error => Severity::Error,
    };
    Finding::new(severity, file.to_string(), found.text)
}

fn check(disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut find = |severity, subject: &Utf8Path, message: String| {
        findings.push(Finding::new(severity, subject.to_string(), message));
    };
    for layer in state.layers.iter().filter(|layer| layer.format == "vhd") {
        if is_held_by_others(layer.path())? {
            find(Severity::Note, layer.path(), "another process has it open: not checked".to_owned());
            continue;
        }
        let checked = reading(layer.path()).and_then(|mut image| Ok(image.check(false)?));
        match checked {
            Ok(found) => found.into_iter().for_each(|found| {
                let found = of_engine(layer.path(), found);
                find(found.severity, layer.path(), found.message);
            }),
            Err(error) => find(Severity::Error, layer.path(), error.to_string()),
        }
        let below = layer.backing.as_ref().and_then(|name| state.layer(name));
        if let Some(below) = below.filter(|below| below.virtual_size > layer.virtual_size) {
            let message = format!(
                "its parent {} is larger than it: programs disagree about what it shows",
                below.address
            );
            find(Severity::Error, layer.path(), message);
        }
    }
    findings.extend(layers::findings(disk, state)?);
    Ok(findings)
}

/// Registers the backend with its default limits.
///
/// # Errors
/// If the registry has a backend for VHD already.
pub fn register(registry: &mut snapcore::Registry) -> Result<()> {
    registry.register(Arc::new(VhdFiles::new()))
}
