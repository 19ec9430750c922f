//! [`DiskSnapshotter`] for qcow2.

use std::sync::Arc;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use image_files::chain::{self, ChainStep, Tag};
use image_files::layer_name::{disk_of_layer, layer_path};
use image_files::{
    BaseFormat, Bases, DiskLocks, FileIds, FileSteps, blocking, in_place, is_held_by_others,
    manifests_beside, names, open_files,
};
use snapcore::backend::{
    AdviceOn, Base, Capabilities, CloneDisk, ClonePlan, DeleteCost, Differences, DiskPlan, DiskRequest,
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
use crate::backing_string::{check_backing_string, resolve_backing};
use crate::clone;
use crate::dependents;
use crate::image::{self, Image, OpenOptions};
use crate::layers::{Limits, Qcow2Chain};
use crate::preflight;
use crate::reading;
use crate::sizes::{self, Images};
use crate::steps::StepRunner;
use crate::tags;
use image_files::layers;

/// Default limit of a chain's depth.
pub const DEFAULT_MAX_DEPTH: u32 = 200;

/// Backend for disks that are qcow2 files.
pub struct Qcow2 {
    limits: Limits,
    /// True if the space of freed clusters is returned to the file system.
    punch: bool,
    chain: Qcow2Chain,
    locks: Arc<DiskLocks>,
}

impl Default for Qcow2 {
    fn default() -> Self {
        Self::new()
    }
}

impl Qcow2 {
    /// Allows chains of at most [`DEFAULT_MAX_DEPTH`] layers, in the disk's own directory.
    pub fn new() -> Self {
        Self {
            limits: Limits { max_depth: DEFAULT_MAX_DEPTH, allowed: Vec::new() },
            punch: true,
            chain: Qcow2Chain::default(),
            locks: Arc::default(),
        }
    }

    /// Follows and makes chains of at most `layers` images.
    #[must_use]
    pub fn max_depth(mut self, layers: u32) -> Self {
        self.limits.max_depth = layers;
        self
    }

    /// Follows backing strings into `directory` too.
    #[must_use]
    pub fn allow_backing(mut self, directory: impl Into<Utf8PathBuf>) -> Self {
        self.limits.allowed.push(directory.into());
        self
    }

    /// Reads base images of one more format than raw.
    #[must_use]
    pub fn on_base(mut self, format: Arc<dyn BaseFormat>) -> Self {
        self.chain.bases.add(format);
        self
    }

    /// Leaves the space of freed clusters in the image files, instead of returning it to the file system.
    #[must_use]
    pub fn without_punching(mut self) -> Self {
        self.punch = false;
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
            max_depth: self.limits.max_depth,
            bases: &self.chain.bases,
            punch: self.punch,
            resumed: context.resumed,
        };
        in_place(|| work(&place, &step.action))
    }
}

#[async_trait]
impl DiskSnapshotter for Qcow2 {
    type Action = ChainStep;

    fn format(&self) -> &str {
        "qcow2"
    }

    fn advice(&self, _disk: &DiskRecord, on: AdviceOn<'_>) -> Option<String> {
        let advice = match on {
            AdviceOn::NewFiles => "take the snapshot with --internal, which makes no files",
            AdviceOn::AmbiguousTag { .. } => "delete all but one by their IDs with the tool that made them",
            _ => return None,
        };
        Some(advice.to_owned())
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(PointKind::Internal, self.limits.max_depth).both_kinds().live().reads_points()
    }

    async fn adopt(&self, disk: &Disk, active_path: ActivePath) -> Result<DiskRecord> {
        let (disk, limits, chain) = (disk.clone(), self.limits.clone(), self.chain.clone());
        blocking(move || layers::adopt(&chain, disk, active_path, &limits)).await
    }

    async fn inspect(
        &self,
        disk: &DiskRecord,
        depth: InspectDepth,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        let open = open_files(attached).await?;
        let (disk, limits, chain) = (disk.clone(), self.limits.clone(), self.chain.clone());
        blocking(move || layers::inspect(&chain, &disk, depth, &limits, &open)).await
    }

    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        let (mut copy, known, limits) = (record.clone(), known.to_vec(), self.limits.clone());
        let chain = self.chain.clone();
        let (copy, found) = blocking(move || {
            let found = image_files::discover(&chain, &mut copy, &known, &limits)?;
            Ok((copy, found))
        })
        .await?;
        *record = copy;
        Ok(found)
    }

    fn leftover(&self, disk: &DiskRecord, step: &Step<ChainStep>) -> Leftover {
        match &step.action {
            ChainStep::DropInternal { layer, tags } => Leftover::Stays(format!(
                "{}: the internal snapshots {} stay in layer {layer}, and the domain has them no more: `domsnap check` lists \
                 of the image, `domsnap import --replace` brings them back",
                disk.disk.target,
                Tag::names(tags)
            )),
            _ => Leftover::PlannedAgain,
        }
    }

    fn configured_address(&self, layer: &DiskAddress) -> Option<DiskAddress> {
        disk_of_layer(layer)
    }

    async fn require_shown(&self, address: &DiskAddress, seen: &SeenDisk) -> Result<()> {
        if seen.part.is_none() {
            return Ok(());
        }
        if seen.format != "qcow2" {
            return Err(seen.only_a_part());
        }
        let (path, seen) = (address.path().to_owned(), seen.clone());
        let (bases, max_depth) = (self.chain.bases.clone(), self.limits.max_depth);
        blocking(move || require_part(&path, &seen, &bases, max_depth)).await
    }

    fn uses(&self, disk: &DiskRecord, step: &Step<ChainStep>) -> FileUses {
        chain::uses(disk, &step.action)
    }

    fn room(&self, disk: &DiskRecord, step: &Step<ChainStep>) -> u64 {
        match (&step.action, self.uses(disk, step).writes.first()) {
            // The step itself reports what is wrong with the image.
            (ChainStep::TakeInternal { .. }, Some(file)) => {
                in_place(|| sizes::room_of_new_tag(file)).unwrap_or(0)
            }
            _ => 0,
        }
    }

    async fn bases(&self, disk: &DiskRecord) -> Result<Vec<Base>> {
        let disk = disk.clone();
        blocking(move || dependents::bases(&disk)).await
    }

    async fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan<ChainStep>> {
        let (disk, state, request) = (disk.clone(), state.clone(), request.clone());
        let (capabilities, max_depth, punch) = (self.capabilities(), self.limits.max_depth, self.punch);
        blocking(move || {
            if let DiskRequest::Create { overlay: Some(overlay), .. } = &request {
                chain::check_overlay_name(&disk, overlay)?;
            }
            let mut plan = chain::plan(&disk, &state, active_path, &capabilities, &request, &mut |run| {
                match visible(&state, run) {
                    // The image is being written. Its allocated size is a good estimate of what is to be
                    // moved.
                    Err(_) if state.attached => Ok(allocated(&state, run)),
                    seen => seen,
                }
            })?;
            check_backing_strings(&disk, &plan)?;
            if let (DiskRequest::Create { .. }, ActivePath::Keep, Some(Point { layer, tag: None })) =
                (&request, active_path, &plan.point)
            {
                plan.notes.extend(warnings_of_moving(&disk, layer)?);
            }
            let checked = preflight::check(&disk, &state, &request, &mut plan, max_depth).and_then(|()| {
                match &request {
                    // A delete that is forced does what it can, and leaves the rest for later.
                    DiskRequest::Delete { drop, force, .. } if *force || drop.is_empty() => Ok(()),
                    DiskRequest::Delete { .. } | DiskRequest::Revert { .. } => {
                        chain::require_room(&disk, &state, &plan, &mut Images { state: &state, punch })
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
        let max_depth = self.limits.max_depth;
        blocking(move || clone::plan(&disk, &state, &request, max_depth)).await
    }

    async fn open_point(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        point: &Point,
    ) -> Result<Arc<dyn PointImage>> {
        let (disk, state, point, bases) =
            (disk.clone(), state.clone(), point.clone(), self.chain.bases.clone());
        blocking(move || Ok(Arc::new(reading::open(&disk, &state, &point, &bases)?) as Arc<dyn PointImage>))
            .await
    }

    async fn differences(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        from: &Point,
        to: &Point,
    ) -> Result<Differences> {
        let (disk, state, bases) = (disk.clone(), state.clone(), self.chain.bases.clone());
        let (from, to) = (from.clone(), to.clone());
        blocking(move || {
            let open = |point| reading::open(&disk, &state, point, &bases);
            reading::compare(open(&from)?, open(&to)?)
        })
        .await
    }

    async fn lock(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard> {
        names::require_place_of(disk)?;
        let (locks, at_rest) = self.locks.begin_beside(disk.disk.path(), attached).await?;
        if at_rest {
            locks.lock(disk.disk.path())?;
        }
        Ok(Box::new(locks))
    }

    async fn yield_locks(&self, disk: &DiskRecord) -> Result<()> {
        let (locks, path) = (Arc::clone(&self.locks), disk.disk.path().to_owned());
        blocking(move || locks.yield_of(&path)).await
    }

    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<OpenLayer>> {
        let (disk, limits, chain) = (disk.clone(), self.limits.clone(), self.chain.clone());
        blocking(move || layers::open_chain(&chain, &disk, &limits)).await
    }

    async fn apply(&self, step: &Step<ChainStep>, context: StepContext<'_>) -> Result<()> {
        let open = open_files(context.attached).await?;
        if let Some(disk) = context.attached.filter(|_| !open.is_empty())
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

    async fn identify(&self, disk: &DiskRecord, point: &Point) -> Result<Option<TagIdentity>> {
        let (disk, point) = (disk.clone(), point.clone());
        blocking(move || match &point.tag {
            Some(tag) => tags::identify(&disk, &point.layer, tag),
            None => Ok(None),
        })
        .await
    }

    async fn check(&self, disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>> {
        let (disk, state, bases) = (disk.clone(), state.clone(), self.chain.bases.clone());
        blocking(move || check(&disk, &state, &bases)).await
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
        let (state, punch) = (state.clone(), self.punch);
        blocking(move || chain::cost(&plan, &state, &mut Images { state: &state, punch })).await
    }

    async fn referenced(&self, _disk: &DiskRecord, state: &DiskState, point: &Point) -> Result<Option<u64>> {
        let (state, point) = (state.clone(), point.clone());
        blocking(move || sizes::referenced(&state, &point)).await
    }

    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        manifests_beside(disk.path())
    }

    fn layer_address(&self, disk: &DiskRecord, layer: &LayerName) -> DiskAddress {
        layers::file_of(disk, layer).unwrap_or_else(|_| layer_path(disk.disk.path(), layer)).into()
    }
}

/// Checks that every layer that an image will refer to has a valid backing string.
fn check_backing_strings(disk: &DiskRecord, plan: &DiskPlan<ChainStep>) -> Result<()> {
    for step in plan.steps() {
        let named = match &step.action {
            ChainStep::CreateOverlay { on, .. } => on,
            ChainStep::Merge { below: Some(below), .. } => below,
            ChainStep::Repoint { to, .. } => to,
            _ => continue,
        };
        check_backing_string(disk.disk.path(), named)?;
    }
    Ok(())
}

/// Returns warnings for images whose backing file is the configured path, by that name, which becomes an
/// overlay on `frozen`. At first they show the same; but they need the frozen layer, not what the domain
/// writes from now on.
fn warnings_of_moving(disk: &DiskRecord, frozen: &LayerName) -> Result<Vec<String>> {
    let path = disk.disk.path();
    let warning = |overlay: DiskAddress| {
        format!(
            "{}: {overlay} uses {path} as its backing file; writing to that corrupts it; rebase it onto the frozen layer \
             once that exists: {}",
            disk.disk.target,
            chain::rebase(&layer_path(path, frozen), &overlay)
        )
    };
    Ok(dependents::on_configured_path(disk)?.into_iter().map(DiskAddress::from).map(warning).collect())
}

fn visible(state: &DiskState, run: &[LayerName]) -> Result<Vec<u64>> {
    let mut layers = Vec::new();
    for name in run {
        let layer = state.layer(name).ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("layer {name} is in a run but not among the disk's layers"),
            )
        })?;
        let image = Image::open(layer.path().as_std_path(), &OpenOptions::read_only().unlocked())?;
        layers.push(image::RunLayer::active(&image)?);
    }
    Ok(image::visible_bytes(layers)?)
}

fn allocated(state: &DiskState, run: &[LayerName]) -> Vec<u64> {
    run.iter().map(|name| state.layer(name).map_or(0, |layer| layer.allocated)).collect()
}

fn check(disk: &DiskRecord, state: &DiskState, bases: &Bases) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut find = |severity, subject: &Utf8Path, message: String| {
        findings.push(Finding::new(severity, subject.to_string(), message));
    };
    for layer in state.layers.iter().filter(|layer| layer.format == "qcow2") {
        if is_held_by_others(layer.path())? {
            find(Severity::Note, layer.path(), "another process has it open: not checked".to_owned());
            continue;
        }
        let opened = Image::open(layer.path().as_std_path(), &OpenOptions::read_only().unlocked());
        let report = match opened.and_then(|image| image.check()) {
            Ok(report) => report,
            Err(error) => {
                find(Severity::Error, layer.path(), Error::from(error).to_string());
                continue;
            }
        };
        for finding in &report.findings {
            find(Severity::Error, layer.path(), finding.what.clone());
        }
        if report.leaked_clusters > 0 {
            let message = format!(
                "{} clusters are leaked; the image is whole, and 'qemu-img check -r leaks' frees them",
                report.leaked_clusters
            );
            find(Severity::Note, layer.path(), message);
        }
        if report.copied_clear > 0 {
            let message = format!(
                "{} COPIED bits are clear that could be set: writes copy more than they must; 'qemu-img check -r all' \
                 sets them",
                report.copied_clear
            );
            find(Severity::Note, layer.path(), message);
        }
    }
    for layer in state.layers.iter().filter(|layer| layer.format != "qcow2") {
        if is_held_by_others(layer.path())? {
            findings.push(Finding::new(
                Severity::Note,
                layer.path().to_string(),
                "another process has it open: not checked",
            ));
            continue;
        }
        let above = layers::sizes_above(&state.layers, &layer.name);
        findings.extend(bases.check(layer.path(), &layer.format, &above)?);
    }
    findings.extend(layers::findings(disk, state)?);
    Ok(findings)
}

/// Refuses an image whose chain does not end at a base of which `seen` shows just what the base is.
fn require_part(path: &Utf8Path, seen: &SeenDisk, bases: &Bases, max_depth: u32) -> Result<()> {
    let mut file = path.to_owned();
    for _ in 0..max_depth {
        let Some(header) = image::probe(file.as_std_path())? else { break };
        let above = header.virtual_size;
        let Some(backing) = header.backing else { break };
        file = resolve_backing(&file, &backing.file)?;
        match backing.format.as_deref() {
            Some("qcow2") => {}
            Some(format)
                if bases.size(&file, format, &[above])?.is_some_and(|size| Some(size) == seen.part) =>
            {
                return Ok(());
            }
            _ => break,
        }
    }
    Err(seen.only_a_part())
}
