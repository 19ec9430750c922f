//! The contract of a storage backend: its operations on one disk.

use std::any::Any;
use std::sync::Arc;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::address::{DiskAddress, DiskIdentity, is_among_devices};
use crate::domain::{ActivePath, Disk, DiskRecord};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{AttachedDisk, Inside, OpenLayer, SeenDisk};
use crate::manifest::ManifestStore;
use crate::name::LayerName;
use crate::snapshot::{Point, PointKind, Snapshot};
use crate::state::TagIdentity;
use crate::step::{Edit, Step};

pub use crate::disk_plan::{CloneDisk, ClonePlace, ClonePlan, DiskPlan, DiskRequest, InstantPlan};
pub use crate::erased::AnyDiskSnapshotter;
pub use crate::reading::{Differences, PointExtent, PointImage, Ranges};
pub use crate::snapshot::{FoundSnapshots, FreeNames};
pub use crate::state::{DiskState, InternalPoint, Layer, Undetermined};
pub use crate::step::StepStatus;

/// Abilities of a backend with disks of its format. The planner checks them before an operation begins.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Capabilities {
    /// Points inside the image.
    pub internal: bool,
    /// Points as frozen layers with an overlay on top.
    pub external: bool,
    /// The kind of point that it takes by default.
    pub preferred: PointKind,
    /// Disks that a running guest uses.
    pub live: bool,
    /// Deletion of a point that others depend on.
    pub delete_in_chain: bool,
    /// A point on top of a point.
    pub snapshot_of_snapshot: bool,
    /// The longest chain of layers that it makes.
    pub max_depth: u32,
    /// Names of its methods for taking a point that a user may request, besides the kinds: `reflink`, `copy`.
    #[serde(default)]
    pub methods: Vec<String>,
    /// True if points can be read and compared ([`DiskSnapshotter::open_point`],
    /// [`DiskSnapshotter::differences`]).
    #[serde(default)]
    pub reads_points: bool,
    /// True if its disks are small parts of the machine and no disks of the guest: firmware variables, a TPM.
    /// The guest's memory has their state too, and brings it back in a running domain. So such a disk is
    /// never detached, and no snapshot consists of it alone.
    #[serde(default)]
    pub machine_state: bool,
}

impl Capabilities {
    /// Declares points of this kind only, at rest, in chains of at most `max_depth`.
    pub fn new(preferred: PointKind, max_depth: u32) -> Self {
        Self {
            internal: preferred == PointKind::Internal,
            external: preferred == PointKind::External,
            preferred,
            live: false,
            delete_in_chain: true,
            snapshot_of_snapshot: true,
            max_depth,
            methods: Vec::new(),
            reads_points: false,
            machine_state: false,
        }
    }

    /// Declares that its disks are parts of the machine, and no disks of the guest.
    #[must_use]
    pub fn machine_state(mut self) -> Self {
        self.machine_state = true;
        self
    }

    /// Declares that points can be read and compared.
    #[must_use]
    pub fn reads_points(mut self) -> Self {
        self.reads_points = true;
        self
    }

    /// Declares methods of its own for taking points, which a user may request by name.
    #[must_use]
    pub fn methods<W: Into<String>>(mut self, names: impl IntoIterator<Item = W>) -> Self {
        self.methods = names.into_iter().map(Into::into).collect();
        self
    }

    /// Declares that it also handles disks that a running guest uses.
    #[must_use]
    pub fn live(mut self) -> Self {
        self.live = true;
        self
    }

    /// Declares points of the other kind too.
    #[must_use]
    pub fn both_kinds(mut self) -> Self {
        self.internal = true;
        self.external = true;
        self
    }
}

/// Amount of information that [`DiskSnapshotter::inspect`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InspectDepth {
    /// Only the active layer, which a create needs. Its backing chain is only read if it may be so long that
    /// its length matters.
    Active,
    /// The layers and their headers.
    Layers,
    /// Also every image in their directories, to find all images that are backed by a layer. Needed before
    /// layers are merged or removed.
    Dependents,
}

/// Severity of a finding of [`DiskSnapshotter::check`].
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// For information: an orphan layer, a leaked cluster.
    Note,
    /// Nothing is lost, but the user should act: a drifted path, a missing tag.
    Warning,
    /// Data is lost or at risk.
    Error,
}

/// One finding of a check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Finding {
    /// Its severity.
    pub severity: Severity,
    /// Its subject: a file, a snapshot.
    pub subject: String,
    /// The finding, and advice.
    pub message: String,
}

impl Finding {
    /// Makes a finding.
    pub fn new(severity: Severity, subject: impl Into<String>, message: impl Into<String>) -> Self {
        Self { severity, subject: subject.into(), message: message.into() }
    }
}

/// Receiver of the progress of a long step.
///
/// ```
/// use std::sync::atomic::{AtomicU64, Ordering};
///
/// use snapcore::backend::Progress;
///
/// /// Keeps the last number.
/// #[derive(Default)]
/// struct Done(AtomicU64);
///
/// impl Progress for Done {
///     fn bytes(&self, done: u64, _total: u64) {
///         self.0.store(done, Ordering::Relaxed);
///     }
/// }
///
/// let done = Done::default();
/// done.bytes(4096, 65536);
/// assert_eq!(done.0.into_inner(), 4096);
/// ```
pub trait Progress: Send + Sync {
    /// `done` bytes of `total` so far. Called often; must be cheap.
    fn bytes(&self, done: u64, total: u64);
}

/// The context of a step.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct StepContext<'a> {
    /// The disk, as recorded in the catalogue: before the commit point as it was when the plan was made,
    /// after it with the plan's edits. So it is the same in a first run and in a recovery.
    pub disk: &'a DiskRecord,
    /// Receiver of progress.
    pub progress: &'a dyn Progress,
    /// If it is cancelled, a deferrable step soon stops with [`crate::ErrorKind::Cancelled`], and
    /// leaves the disk's contents unchanged.
    pub cancel: &'a CancellationToken,
    /// The disk in a running domain, if its hypervisor has images of it open ([`AttachedDisk::open_files`]).
    /// Changes of those go through it. Other images of the disk are treated like at rest.
    pub attached: Option<&'a dyn AttachedDisk>,
    /// The work nested in the step, if steps are planned so ([`crate::FinishStep::nested`]). Otherwise
    /// it does nothing.
    pub inside: &'a dyn Inside,
    /// True if another process began the operation and was interrupted. The step may then be partly done. A
    /// backend also frees leftovers that nothing refers to; otherwise it need not look for them.
    pub resumed: bool,
}

impl<'a> StepContext<'a> {
    /// Makes the context of a step on a disk at rest, in a first run, with nothing nested in it.
    pub fn new(disk: &'a DiskRecord, progress: &'a dyn Progress, cancel: &'a CancellationToken) -> Self {
        Self { disk, progress, cancel, attached: None, inside: &(), resumed: false }
    }
}

setters!(<'a> StepContext<'a> {
    progress: &'a dyn Progress,
    attached: Option<&'a dyn AttachedDisk>,
    inside: &'a dyn Inside,
    resumed: bool,
});

/// The subject of advice that only a disk's backend can give ([`DiskSnapshotter::advice`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum AdviceOn<'a> {
    /// A point cannot be taken because no further file, or no further name of a file, can be made for it.
    NewFiles,
    /// Several internal snapshots of a layer have one tag, so it does not say which one is meant.
    AmbiguousTag {
        /// The layer.
        layer: &'a Layer,
        /// The tag.
        tag: &'a str,
    },
}

/// A file that no other program may use in a certain manner during a step.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct StepNeed {
    /// The file, or device.
    pub file: Utf8PathBuf,
    /// True if no other program may even read it.
    pub alone: bool,
}

impl StepNeed {
    /// Makes a need.
    pub fn new(file: impl Into<Utf8PathBuf>, alone: bool) -> Self {
        Self { file: file.into(), alone }
    }
}

/// Result of [`DiskSnapshotter::lock`]. While it exists, no other program can write the disk.
pub type Guard = Box<dyn Any + Send + Sync>;

/// A storage backend: points of disks of one format.
///
/// All methods may be called for several disks at once. A backend keeps no state that a crash could lose:
/// progress is read from the disk. Errors are [`crate::Error`]s that name the file. After an error the
/// disk's current state and every point are intact, and the same call may be repeated, unless a method says
/// otherwise.
///
/// The crate in `examples/backend-dir` is a whole backend to start from. What the service does with one, for
/// a snapshot of a disk at rest:
///
/// ```no_run
/// use snapcore::backend::{AnyDiskSnapshotter, DiskRequest, InspectDepth, Progress, StepContext};
/// use snapcore::{ActivePath, Disk, Result, SnapshotName};
/// use tokio_util::sync::CancellationToken;
///
/// async fn take(backend: &AnyDiskSnapshotter, disk: &Disk, progress: &dyn Progress) -> Result<()> {
///     // Reads, and needs no lock.
///     let record = backend.adopt(disk, ActivePath::Keep).await?;
///     let state = backend.inspect(&record, InspectDepth::Active, None).await?;
///     let request = DiskRequest::Create {
///         kind: None,
///         method: None,
///         name: SnapshotName::new("before-update")?,
///         overlay: None,
///         keep: Vec::new(),
///         stamp: 0x1a2b_3c4d,
///     };
///     let plan = backend.plan(&record, &state, ActivePath::Keep, &request).await?;
///     // Changes the disk, under its lock. The service records each step in the journal before it begins.
///     let _guard = backend.lock(&record, None).await?;
///     let cancel = CancellationToken::new();
///     let context = StepContext::new(&record, progress, &cancel);
///     let mut begun = Vec::new();
///     for step in plan.steps() {
///         begun.push(step);
///         if let Err(error) = backend.apply(step, context).await {
///             for step in begun.into_iter().rev() {
///                 backend.undo(step, context).await?;
///             }
///             return Err(error.state("rolled back"));
///         }
///     }
///     Ok(())
/// }
/// ```
#[async_trait]
pub trait DiskSnapshotter: Send + Sync {
    /// An action on a disk, one per step. It is recorded in the journal as JSON, so a later version of the
    /// backend must read what an earlier one wrote, or fail. A plug-in's is JSON already.
    type Action: Serialize + DeserializeOwned + Send + Sync;

    /// The format's name, as configurations state it.
    fn format(&self) -> &str;

    /// Its abilities.
    fn capabilities(&self) -> Capabilities;

    /// The scheme of the addresses that disks of this backend have (`rbd`); absent: they are files or block
    /// devices of this machine. A backend with a scheme fulfils [`DiskSnapshotter::resolve`],
    /// [`DiskSnapshotter::identity`], [`DiskSnapshotter::has_layer`], [`DiskSnapshotter::is_gone`] and
    /// [`DiskSnapshotter::manifests`] itself.
    fn scheme(&self) -> Option<&str> {
        None
    }

    /// The one form of an address of this backend's scheme, by which the disk is known from now on. Changes
    /// nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such disk; [`ErrorKind::Usage`] for text that is no address.
    async fn resolve(&self, address: &DiskAddress) -> Result<DiskAddress> {
        Err(Error::new(ErrorKind::Usage, format!("the format {} has no address {address}", self.format()))
            .advise("give the path of a disk image"))
    }

    /// Returns the identity of a disk, which does not depend on its address; `None` if there is no such disk.
    async fn identity(&self, disk: &Disk) -> Result<Option<DiskIdentity>> {
        Ok(disk.address.inode().map(DiskIdentity::Inode))
    }

    /// Returns true if a layer of a disk is there.
    async fn has_layer(&self, disk: &DiskRecord, layer: &LayerName) -> Result<bool> {
        Ok(self.layer_address(disk, layer).local().is_some_and(Utf8Path::exists))
    }

    /// Processes of the backend itself that may have images open. They do not count as other programs.
    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Returns what to do with a finish step of this backend that failed.
    fn leftover(&self, _disk: &DiskRecord, _step: &Step<Self::Action>) -> Leftover {
        Leftover::Required
    }

    /// Lists files that no other program may write, or even have open, during a step. The domain's own
    /// hypervisor and this process do not count as others. Writers of layers that the record owns are
    /// detected without it.
    fn needs_of(&self, _disk: &DiskRecord, _step: &Step<Self::Action>) -> Vec<StepNeed> {
        Vec::new()
    }

    /// Returns the effects of a step on files, so that known failures are found before an operation begins. A
    /// backend without files returns nothing.
    fn uses(&self, _disk: &DiskRecord, _step: &Step<Self::Action>) -> FileUses {
        FileUses::default()
    }

    /// Returns the bytes that a step adds to files which exist, for which the file system must have room:
    /// more than [`FileUses::room`] says of those that it makes. It may read images, so it is asked once an
    /// operation.
    fn room(&self, _disk: &DiskRecord, _step: &Step<Self::Action>) -> u64 {
        0
    }

    /// Returns advice in the terms of the format on a refusal that the service makes, as an imperative: "take
    /// the snapshot with --internal, which makes no files". The service adds its own, which is good for every
    /// format. Without a text from the backend, only that is shown.
    fn advice(&self, _disk: &DiskRecord, _on: AdviceOn<'_>) -> Option<String> {
        None
    }

    /// Returns true if this backend should serve a disk for which the user named no backend. Decide from the
    /// open format, or from the address; never from the image's content.
    ///
    /// A backend whose disks a hypervisor opens in the format of another backend (a logical volume is `raw`
    /// to it) returns true here, and takes precedence over that one.
    fn recognises(&self, _address: &DiskAddress, open_format: Option<&str>) -> bool {
        open_format == Some(self.format())
    }

    /// Refuses a disk that a hypervisor reads by its own driver and shows the guest otherwise than this
    /// backend reads it: with another format, another size, or as another part of the file. `seen` is the
    /// disk as the hypervisor has it open, and was not asked of a server that reads the format itself.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] or [`ErrorKind::Unsupported`], with advice; those of the image.
    async fn require_shown(&self, _address: &DiskAddress, seen: &SeenDisk) -> Result<()> {
        match seen.part {
            None => Ok(()),
            Some(_) => Err(seen.only_a_part()),
        }
    }

    /// Returns the configured address of the disk to which a layer belongs, if this backend gives such
    /// addresses to layers. It does not look at what is there. A backend without a scheme gets paths alone,
    /// and one with a scheme gets addresses of its own.
    fn configured_address(&self, _layer: &DiskAddress) -> Option<DiskAddress> {
        None
    }

    /// Adopts a disk that is not in the catalogue: checks that the image is as stated, and names its active
    /// layer. Changes nothing.
    async fn adopt(&self, disk: &Disk, active_path: ActivePath) -> Result<DiskRecord>;

    /// Reads the disk on the machine: the chain and every point in it. It needs no lock and changes nothing.
    /// Files that `attached` has open are in the domain's own use. Any other program that has a layer open is
    /// reported as a dependent.
    ///
    /// # Errors
    /// A missing or corrupt layer, a loop, a chain deeper than the limit, a backing string that leads out of
    /// the allowed directories, a configured path that no longer names the active layer (drift).
    async fn inspect(
        &self,
        disk: &DiskRecord,
        depth: InspectDepth,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState>;

    /// Finds snapshots in the images that `record` does not have: frozen layers of the chain, and tags by
    /// other tools. They come oldest first, with parents and new ids. `record.owned` is extended by the
    /// layers that become ours. Changes nothing.
    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>>;

    /// Lists the files that back the disk's layers, with everything below them. It reads only the images, so
    /// that another domain does not change what this one needs. A file that an image names and that does not
    /// exist is included. So is a missing layer of the disk, because its own backing file is unknown then.
    /// Changes nothing.
    ///
    /// # Errors
    /// If the disk's image does not exist or cannot be read.
    async fn bases(&self, _disk: &DiskRecord) -> Result<Vec<Base>> {
        Ok(Vec::new())
    }

    /// Plans the steps of `request`. It is a function of its arguments and of the layers' content, and
    /// changes nothing.
    ///
    /// If the disk is attached ([`DiskState::attached`]), a hypervisor has the active chain open. Then:
    ///
    /// * The plan of a create states in [`DiskPlan::instant`] what the hypervisor's cut does to the disk, and
    ///   which steps are nested in it: they move the configured path, or take the point under
    ///   [`crate::hypervisor::DiskInstant::ByBackend`]. Steps in [`DiskPlan::cut`] come after it, when the
    ///   guest may run again.
    /// * Steps of a revert that change the open chain are cut steps. They run in a detached section, in which
    ///   no program has the chain open.
    /// * Steps of a delete that change the open chain must either be ones that [`AttachedDisk`] can do, or
    ///   need a detached section ([`DiskPlan::detached`]). The step that moves the path after a merge is
    ///   nested in the merge.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] or `Unsupported`, with advice; also if a point in the plan cannot
    /// be distinguished from another one of its layer.
    async fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan<Self::Action>>;

    /// Plans disks of new domains that are made of a point of this one. The domain may run, and its disks are
    /// neither locked nor changed: a further name of a frozen layer is all that they may get.
    ///
    /// * The prepare steps make each clone's disk at its [`ClonePlace`], durably, where nothing else is
    ///   named. What they make must not depend on anything that a delete, a revert or a merge of this disk
    ///   changes or removes: it shares frozen content by names of its own, by the store's own means, or
    ///   copies it.
    /// * The cut steps publish the disks under the addresses that the plan's records have. They move and copy
    ///   no data, so all clones of an operation come about within a moment.
    /// * All steps are steps of this disk, and are undone until the commit point. An undo removes only what
    ///   the steps made.
    ///
    /// By default it is refused.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] or [`ErrorKind::Unsupported`], with advice; [`ErrorKind::Exists`] where a place
    /// is taken; [`ErrorKind::NoSpace`].
    async fn plan_clone(
        &self,
        disk: &DiskRecord,
        _state: &DiskState,
        _request: &CloneDisk,
    ) -> Result<ClonePlan<Self::Action>> {
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("{}: disks of the format {} cannot be cloned", disk.disk.target, self.format()),
        )
        .state("no changes made")
        .advise("copy the disk with the tools of its store, and register the copy with `domsnap domain add`"))
    }

    /// Opens a point for reading. It may be open for long: while a running domain writes the disk's current
    /// state, and while other points come and go. The service has a hold on the snapshot meanwhile, and no
    /// lock. The active layer itself may be given as a point too, if no program writes it.
    ///
    /// By default it is not offered.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`], with advice; [`ErrorKind::NotFound`] where the point does not exist;
    /// [`ErrorKind::Busy`] where a program writes what is to be read.
    async fn open_point(
        &self,
        disk: &DiskRecord,
        _state: &DiskState,
        _point: &Point,
    ) -> Result<Arc<dyn PointImage>> {
        Err(not_read(&disk.disk, self.format()))
    }

    /// Finds the ranges in which two points may differ, in either order of time and on any branches. It uses
    /// metadata as far as the format has such. Ranges without a difference may be among them, and no
    /// difference is outside of them. If the second disk is larger, the rest of it is one.
    ///
    /// By default it is not offered.
    ///
    /// # Errors
    /// As [`DiskSnapshotter::open_point`].
    async fn differences(
        &self,
        disk: &DiskRecord,
        _state: &DiskState,
        _from: &Point,
        _to: &Point,
    ) -> Result<Differences> {
        Err(not_read(&disk.disk, self.format()))
    }

    /// Locks the disk's images against other writers until the guard is dropped, by the method that other
    /// users of the format honour. Steps that run meanwhile in this process use the same lock.
    ///
    /// Images that `attached` has open are locked by the hypervisor, and are left out while it has them open.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`], with the name of the other user if it can be known.
    async fn lock(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard>;

    /// Borrows a disk that is not in use from the program that has its images open to serve it, so that they
    /// can be locked. `None`: there is no such program.
    ///
    /// The program opens what the configured path names as soon as the guard is dropped, the locks are
    /// yielded or this process ends. So it is asked for domains that keep their paths alone: the path names
    /// the current image at every instant of an operation.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] if the disk is in use through that program.
    async fn borrow(&self, _disk: &DiskRecord) -> Result<Option<Guard>> {
        Ok(None)
    }

    /// Releases the locks of a held disk's images, so that a hypervisor can open them, and gives a disk back
    /// that was borrowed. Later steps lock again what they need. The disk stays reserved against other
    /// operations of this process.
    async fn yield_locks(&self, _disk: &DiskRecord) -> Result<()> {
        Ok(())
    }

    /// Returns the layers that the configured path opens now, each by its permanent name if it has one. It
    /// reads the images, even if the catalogue records another active layer.
    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<OpenLayer>>;

    /// Performs a step. It is idempotent: completed work is not repeated, and started work is completed.
    async fn apply(&self, step: &Step<Self::Action>, context: StepContext<'_>) -> Result<()>;

    /// Undoes a prepare or cut step, however far it got. It is idempotent.
    async fn undo(&self, step: &Step<Self::Action>, context: StepContext<'_>) -> Result<()>;

    /// Saves what the domain wrote since a crash, if an undo would lose it. A recovery calls it before it
    /// undoes a started step, because the domain may have been started before the recovery. It is idempotent,
    /// because a recovery may be interrupted too.
    ///
    /// `done` is true if the journal has recorded the step as done: it was complete before any later step
    /// began. Otherwise the step may have stopped anywhere, but the configured path never named anything that
    /// it made.
    ///
    /// Saved data is durable, under a name that shows its purpose, before this returns.
    async fn salvage(
        &self,
        _step: &Step<Self::Action>,
        _done: bool,
        _context: StepContext<'_>,
    ) -> Result<Salvage> {
        Ok(Salvage::Nothing)
    }

    /// Returns true if a finish step must be repeated before the later steps of its disk. A recovery that
    /// carries an operation through calls it for a step that is recorded as done while a later one is not.
    /// The domain may have been started since the crash, and may have written data that the step did not see.
    /// The later steps would lose that data.
    ///
    /// This is the case if a merge has moved the active layer's data down, and the configured path still
    /// names the active layer. Once the path has moved, the result must be `false`: the domain itself writes
    /// to the merged layer, so its content no longer proves anything.
    async fn is_superseded(&self, _step: &Step<Self::Action>, _context: StepContext<'_>) -> Result<bool> {
        Ok(false)
    }

    /// Returns how far a step got, from the state of the disk.
    async fn status(&self, step: &Step<Self::Action>, context: StepContext<'_>) -> Result<StepStatus>;

    /// Returns the identity of an internal snapshot, read from the image, to distinguish it from another of
    /// its name. It is called at the commit point of the operation that created the snapshot, and recorded
    /// with it. Changes nothing.
    async fn identify(&self, _disk: &DiskRecord, _point: &Point) -> Result<Option<TagIdentity>> {
        Ok(None)
    }

    /// Looks for damage in the disk's images. Changes nothing.
    async fn check(&self, disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>>;

    /// Returns the bytes that deleting exactly `drop` would free, all at once, and the bytes that would have
    /// to be moved. It says how certain that is ([`Certainty`]). Changes nothing, and needs no lock.
    async fn cost_of_delete(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        drop: &[Point],
        keep: &[Point],
    ) -> Result<DeleteCost>;

    /// Returns the bytes that a point refers to: its own, those that it shares with other points, and those
    /// of the layers below it. `None`: unknown. Changes nothing, and needs no lock.
    ///
    /// By default, those of its layer, if the point is the layer itself.
    async fn referenced(&self, _disk: &DiskRecord, state: &DiskState, point: &Point) -> Result<Option<u64>> {
        Ok(state.layer(&point.layer).filter(|_| point.tag.is_none()).map(|layer| layer.allocated))
    }

    /// Returns true if nothing is left of a disk at rest, neither its image nor a layer, although the place
    /// itself exists. A device whose node is missing may come back with its storage, or when it is activated.
    /// A backend of devices asks the tools that manage them.
    async fn is_gone(&self, disk: &DiskRecord) -> Result<bool> {
        let layers = disk.owned.iter().chain([&disk.active]);
        let mut layers = layers.map(|layer| self.layer_address(disk, layer));
        let exists = |layer: DiskAddress| layer.local().is_some_and(Utf8Path::exists);
        Ok(disk.disk.local().is_some_and(is_gone_file) && !layers.any(exists))
    }

    /// The manifests of the domain whose first disk is `disk`, beside the disk's data: files in a directory
    /// ([`crate::manifest::ManifestDirectory`]), or a store of the backend's own.
    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore>;

    /// The address by which a layer opens, for people and tools.
    fn layer_address(&self, disk: &DiskRecord, layer: &LayerName) -> DiskAddress;
}

fn not_read(disk: &Disk, format: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!("{}: points of disks of the format {format} cannot be read and compared by domsnap", disk.target),
    )
    .state("no changes made")
    .advise(
        "read the point with the tools of its store: `domsnap show` has its address, `domsnap hold` keeps it meanwhile",
    )
}

/// Handling of a finish step that failed ([`DiskSnapshotter::leftover`]).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Leftover {
    /// The step must be done: the operation stays unfinished until a recovery does it. A step that is planned
    /// as deferrable ([`crate::FinishStep::deferrable`]) is exempt.
    Required,
    /// The step may be left. The disk is intact without it. The next delete, or a tidy, finds the rest of it
    /// on the disk or by the catalogue's layers, and plans it again. The rest must not obstruct any later
    /// plan.
    PlannedAgain,
    /// No later plan does it. It is only left if it can never be done: the image is corrupt, or refused. The
    /// text says what is left.
    Stays(String),
}

/// The effects of a step on files. Paths are absolute.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileUses {
    /// Names of files that are created, and new names of existing files.
    pub makes: Vec<Utf8PathBuf>,
    /// Files that are written in place.
    pub writes: Vec<Utf8PathBuf>,
    /// Files that are renamed, or lose a name.
    pub renames: Vec<Utf8PathBuf>,
    /// Files that get an additional name (a hard link).
    pub links: Vec<Utf8PathBuf>,
    /// The least bytes that it needs on the file system of the disk's directory; 0 if unknown.
    pub room: u64,
}

setters!(FileUses {
    makes: Vec<Utf8PathBuf>,
    writes: Vec<Utf8PathBuf>,
    renames: Vec<Utf8PathBuf>,
    links: Vec<Utf8PathBuf>,
    room: u64,
});

impl FileUses {
    /// Adds the effects of another step.
    pub fn extend(&mut self, other: Self) {
        self.makes.extend(other.makes);
        self.writes.extend(other.writes);
        self.renames.extend(other.renames);
        self.links.extend(other.links);
        self.room = self.room.saturating_add(other.room);
    }
}

/// Returns true if the directory exists and has no such file, and the file does not come back by itself.
pub(crate) fn is_gone_file(path: &Utf8Path) -> bool {
    !is_among_devices(path)
        && path.parent().is_some_and(Utf8Path::is_dir)
        && path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// An image with a backing file.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Base {
    /// The image.
    pub image: DiskAddress,
    /// Its backing file, as the image names it; a path is absolute.
    pub file: DiskAddress,
}

impl Base {
    /// Makes a base.
    pub fn new(image: impl Into<DiskAddress>, file: impl Into<DiskAddress>) -> Self {
        Self { image: image.into(), file: file.into() }
    }
}

/// Result of [`DiskSnapshotter::salvage`].
#[derive(Debug, Clone, PartialEq)]
pub enum Salvage {
    /// The undo loses nothing.
    Nothing,
    /// Data was saved; the step can be undone. The text names the place.
    Saved(String),
    /// The step must not be undone; the catalogue records its effects. The text explains the consequence.
    Stays(Vec<Edit>, String),
}

/// Meaning of the number of freed bytes in a [`DeleteCost`].
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
pub enum Certainty {
    /// The delete frees this much, if nothing else changes meanwhile.
    Exact,
    /// It frees this much or less.
    AtMost,
    /// It frees about this much.
    #[default]
    Estimate,
    /// Nothing is known beyond the number, which is a part.
    Unknown,
}

/// Cost and gain of a delete.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DeleteCost {
    /// Bytes on the disk that it would free: the file system, the pool or the volume group gets them back.
    pub frees: u64,
    /// Bytes of data that it would move.
    pub moves: u64,
    /// Further bytes that become free inside an image, for its next writes, and stay in use on the disk.
    #[serde(default)]
    pub inside: u64,
    /// Meaning of the two numbers of freed bytes.
    #[serde(default)]
    pub certainty: Certainty,
    /// The reason why it is not exact, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl DeleteCost {
    /// Makes an estimate.
    pub fn new(frees: u64, moves: u64) -> Self {
        Self { frees, moves, ..Self::default() }
    }

    /// Says that it is exact.
    #[must_use]
    pub fn exact(mut self) -> Self {
        (self.certainty, self.why) = (Certainty::Exact, None);
        self
    }

    /// Says how certain it is, and why not more.
    #[must_use]
    pub fn but(mut self, certainty: Certainty, why: impl Into<String>) -> Self {
        (self.certainty, self.why) = (certainty, Some(why.into()));
        self
    }

    /// Sets the bytes that become free inside an image.
    #[must_use]
    pub fn inside(mut self, bytes: u64) -> Self {
        self.inside = bytes;
        self
    }

    /// All freed bytes, wherever they are.
    pub fn freed(&self) -> u64 {
        self.frees.saturating_add(self.inside)
    }

    /// The sum of several. It is as certain as the least certain of them, whose reason it has.
    pub fn sum(costs: impl IntoIterator<Item = Self>) -> Self {
        costs.into_iter().fold(Self::default().exact(), |sum, cost| {
            let (certainty, why) = match cost.certainty.cmp(&sum.certainty) {
                std::cmp::Ordering::Greater => (cost.certainty, cost.why),
                std::cmp::Ordering::Equal => (sum.certainty, sum.why.or(cost.why)),
                std::cmp::Ordering::Less => (sum.certainty, sum.why),
            };
            Self {
                frees: sum.frees.saturating_add(cost.frees),
                moves: sum.moves.saturating_add(cost.moves),
                inside: sum.inside.saturating_add(cost.inside),
                certainty,
                why,
            }
        })
    }
}
