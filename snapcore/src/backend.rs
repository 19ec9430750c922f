//! What a storage backend does for one disk.

use std::any::Any;
use std::sync::Arc;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::manifest::{ManifestDirectory, ManifestStore};
use crate::{
    ActivePath, AttachedDisk, ChainFile, Disk, DiskIdentity, DiskPlan, DiskRecord, DiskRequest, DiskState,
    Error, ErrorKind, Inside, LayerName, PointKind, Result, Snapshot, Step, StepStatus,
};

/// What a backend can do with disks of its format. The planner checks it; it is not found out half way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Capabilities {
    /// Points inside the image.
    pub internal: bool,
    /// Points as frozen layers with an overlay on top.
    pub external: bool,
    /// The way it takes a point where the user does not say.
    pub preferred: PointKind,
    /// Disks that a running guest holds.
    pub live: bool,
    /// Deleting a point that others stand on.
    pub delete_in_chain: bool,
    /// A point on top of a point.
    pub snapshot_of_snapshot: bool,
    /// The longest chain of layers that it makes.
    pub max_depth: u32,
    /// The ways of taking a point that a user may ask for by name, beside the kinds: `reflink`, `copy`.
    #[serde(default)]
    pub ways: Vec<String>,
}

impl Capabilities {
    /// Points of this kind alone, at rest, chains of at most `max_depth`.
    pub fn new(preferred: PointKind, max_depth: u32) -> Self {
        Self {
            internal: preferred == PointKind::Internal,
            external: preferred == PointKind::External,
            preferred,
            live: false,
            delete_in_chain: true,
            snapshot_of_snapshot: true,
            max_depth,
            ways: Vec::new(),
        }
    }

    /// Takes points in ways of its own, which a user may ask for by name.
    #[must_use]
    pub fn ways<W: Into<String>>(mut self, names: impl IntoIterator<Item = W>) -> Self {
        self.ways = names.into_iter().map(Into::into).collect();
        self
    }

    /// Disks that a running guest holds, too.
    #[must_use]
    pub fn live(mut self) -> Self {
        self.live = true;
        self
    }

    /// Points of the other kind too.
    #[must_use]
    pub fn both_kinds(mut self) -> Self {
        self.internal = true;
        self.external = true;
        self
    }
}

/// How much [`DiskSnapshotter::inspect`] reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum InspectDepth {
    /// What taking a point needs: the active layer; and what it stands on only where the chain may be so long that its
    /// length matters.
    Active,
    /// The layers and their headers.
    Layers,
    /// And every image in their directories, to find whoever else stands on a layer: before anything is merged or
    /// removed.
    Dependents,
}

/// How bad a finding of [`DiskSnapshotter::check`] is.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Worth knowing: an unnamed layer, a leaked cluster.
    Note,
    /// Nothing is lost, and something should be done: a drifted path, a missing tag.
    Warning,
    /// Data is lost or at risk.
    Error,
}

/// One thing that a check found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Finding {
    /// How bad.
    pub severity: Severity,
    /// On what: a file, a snapshot.
    pub subject: String,
    /// What was found, and what to do.
    pub message: String,
}

/// Where a long step tells how far it is.
pub trait Progress: Send + Sync {
    /// `done` bytes of `total` so far. Called often; must be cheap.
    fn bytes(&self, done: u64, total: u64);
}

/// What a step runs with.
#[derive(Clone, Copy)]
pub struct StepContext<'a> {
    /// The disk, as the catalogue has it: before the commit point as it was when the plan was made, after it with
    /// the plan's edits. So it is the same in a first run and in a recovery.
    pub disk: &'a DiskRecord,
    /// Where to tell progress.
    pub progress: &'a dyn Progress,
    /// When it is cancelled, a deferrable step stops soon with [`crate::ErrorKind::Cancelled`], leaving the disk's
    /// contents as they were.
    pub cancel: &'a CancellationToken,
    /// The disk in a running domain, where its hypervisor has images of it open ([`AttachedDisk::open_files`]). What is done
    /// to those is done through it; other images of the disk are worked on as at rest.
    pub attached: Option<&'a dyn AttachedDisk>,
    /// What runs inside the step, where steps are planned so ([`crate::PlannedStep::inside`]); otherwise it does nothing.
    pub inside: &'a dyn Inside,
    /// Whether another process began the operation and stopped in it. What the step does may be done in part; a backend
    /// also gives back what the part left behind that nothing refers to, which it need not look for otherwise.
    pub resumed: bool,
}

/// A file that nobody else may use in some way while a step is carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepNeed {
    /// The file, or device.
    pub file: Utf8PathBuf,
    /// Not even for reading.
    pub alone: bool,
}

/// What [`DiskSnapshotter::hold`] gives: as long as it lives, nobody else can write the disk.
pub type Guard = Box<dyn Any + Send + Sync>;

/// A storage backend: points of disks of one format.
///
/// All methods may be called for several disks at once. None keeps state that a crash could lose: what was done is
/// read from the disk. Errors are [`crate::Error`]s that name the file; after one, the disk's present and every
/// point are whole, and the same call may be repeated, except where a method says otherwise.
#[async_trait]
pub trait DiskSnapshotter: Send + Sync {
    /// An action on a disk, one per step. It is recorded in the journal as JSON, so a later version of the backend must
    /// read what an earlier one wrote, or fail. A plug-in's is JSON already.
    type Action: Serialize + DeserializeOwned + Send + Sync;

    /// The format's name, as configurations state it: `qcow2`.
    fn format(&self) -> &str;

    /// What it can do.
    fn capabilities(&self) -> Capabilities;

    /// The scheme of the addresses that disks of this backend have (`rbd`); absent: they are files or block devices of this
    /// machine. A backend with a scheme fulfils [`DiskSnapshotter::resolve`], [`DiskSnapshotter::identity`],
    /// [`DiskSnapshotter::has_layer`], [`DiskSnapshotter::is_gone`] and [`DiskSnapshotter::manifests`] itself.
    fn scheme(&self) -> Option<&str> {
        None
    }

    /// The one form of an address of this backend's scheme, by which the disk is known from now on. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is no such disk; [`ErrorKind::Usage`] for text that is no address.
    async fn resolve(&self, address: &Utf8Path) -> Result<Utf8PathBuf> {
        Err(Error::new(ErrorKind::Usage, format!("the format {} has no address {address}", self.format()))
            .advise("give the path of a disk image"))
    }

    /// What tells a disk from every other, by whatever address it is named; absent where there is no such disk.
    async fn identity(&self, disk: &Disk) -> Result<Option<DiskIdentity>> {
        Ok(disk.local().and_then(crate::service::file_id).map(DiskIdentity::Inode))
    }

    /// Returns true if a layer of a disk is there.
    async fn has_layer(&self, disk: &DiskRecord, layer: &LayerName) -> Result<bool> {
        Ok(self.layer_file(disk, layer).exists())
    }

    /// Processes of the backend's own that may have images open: they are not somebody else's.
    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }

    /// What becomes of a finish step of this backend that could not be done.
    fn leftover(&self, _disk: &DiskRecord, _step: &Step<Self::Action>) -> Leftover {
        Leftover::Required
    }

    /// Files that nobody else may write, or even have open, while a step is carried out. The domain's own hypervisor, and this
    /// process, are nobody else. Writers of what the record owns are met without it.
    fn needs_of(&self, _disk: &DiskRecord, _step: &Step<Self::Action>) -> Vec<StepNeed> {
        Vec::new()
    }

    /// What a step of this backend's does with files: so that what is known to fail is found before an operation begins.
    /// A backend that works with no files gives nothing.
    fn uses(&self, _disk: &DiskRecord, _step: &Step<Self::Action>) -> FileUses {
        FileUses::default()
    }

    /// Whether a disk is this backend's to serve where nobody stated a backend: by the format that its hypervisor opens it
    /// with, or, where only the path is known, by what the path names. Never by what an image holds.
    ///
    /// A backend whose disks a hypervisor opens in another's format (a logical volume is `raw` to it) says so here, and goes
    /// before that one.
    fn recognises(&self, _path: &Utf8Path, open_format: Option<&str>) -> bool {
        open_format == Some(self.format())
    }

    /// The configured path of the disk that a layer's file is called after, where the file's name is one that this backend
    /// gives to layers. The file system is not asked.
    fn configured_path(&self, _layer_file: &Utf8Path) -> Option<Utf8PathBuf> {
        None
    }

    /// Takes in a disk that the catalogue does not know: checks that the image is what it is said to be, and names
    /// its active layer. Changes nothing.
    async fn adopt(&self, disk: &Disk, active_path: ActivePath) -> Result<DiskRecord>;

    /// The disk as it is on the machine: the chain and every point in it. Needs no lock, changes nothing. What `attached` has
    /// open is in the domain's own use; whoever else has a layer open is told as standing on it.
    ///
    /// # Errors
    /// A missing or corrupt layer, a loop, a chain deeper than the limit, a backing string that leads out of the
    /// allowed directories, a configured path that no longer names the active layer (drift).
    async fn inspect(
        &self,
        disk: &DiskRecord,
        depth: InspectDepth,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState>;

    /// The snapshots that the images themselves know and `record` does not: frozen layers of the chain and tags that
    /// another tool made. They come oldest first, parents set, with fresh ids; `record.owned` is extended by the
    /// layers that become ours. Changes nothing.
    async fn discover(&self, record: &mut DiskRecord, known: &[crate::Point]) -> Result<Vec<Snapshot>>;

    /// The files that the disk's layers are backed by, with everything below them: read from the images alone, whatever they name,
    /// so that another domain does not change what this one needs. A file that is named and is not there is among them, and so is
    /// a layer of the disk that is not there: what they are backed by is not known then. Changes nothing.
    ///
    /// # Errors
    /// Where the disk's image is not there or cannot be read.
    async fn bases(&self, _disk: &DiskRecord) -> Result<Vec<Base>> {
        Ok(Vec::new())
    }

    /// The steps that fulfil `request`. A function of its arguments and of what the layers hold; changes nothing.
    ///
    /// Where the disk is attached ([`DiskState::attached`]) the active chain is open in a hypervisor. Then a create's plan
    /// says in [`DiskPlan::instant`] what happens to it at the instant, and its cut steps are marked as running inside that:
    /// they move the configured path, or, under [`crate::DiskInstant::ByBackend`], take the point. A revert's steps that change the open chain are cut steps: they run in a
    /// window in which nothing has it open. A delete's that change it are such as [`AttachedDisk`] can do, or are marked
    /// as needing a window ([`crate::PlannedStep::window`]); the step that moves the path after a merge runs inside that.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] or `Unsupported`, with what to do instead: among others where a point that the plan
    /// names cannot be told from another one of its layer.
    async fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan<Self::Action>>;

    /// Locks the disk's images against other writers, in the way that the format's other users honour, until the
    /// guard is dropped. Steps that run meanwhile in this process use the same lock.
    ///
    /// Images that `attached` has open are its to lock, and are left out as long as it has them open.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`], naming who holds it as far as that can be known.
    async fn hold(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard>;

    /// Gives back the locks of a held disk's images, so that a hypervisor can open them; later steps take those that they
    /// need anew. The disk stays held against other operations of this process.
    async fn yield_locks(&self, _disk: &DiskRecord) -> Result<()> {
        Ok(())
    }

    /// What the configured path opens now, layer by layer: read from the images, whatever the catalogue says of the active
    /// layer. Each by its permanent name where it has one.
    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<ChainFile>>;

    /// Does a step. Idempotent: what is done already is not done again; what was begun is completed.
    async fn apply(&self, step: &Step<Self::Action>, context: StepContext<'_>) -> Result<()>;

    /// Takes a prepare or cut step back, wherever it had got to. Idempotent.
    async fn undo(&self, step: &Step<Self::Action>, context: StepContext<'_>) -> Result<()>;

    /// Asked by a recovery that undoes, before it undoes a begun step: makes safe what the domain wrote since the crash,
    /// because it was started before anybody recovered it, and what the undo would lose. Idempotent: a recovery may be
    /// interrupted too.
    ///
    /// `done` says that the journal has the step as done: it was whole before any later step began. A step that is not
    /// may have stopped anywhere, but nothing that it made was ever what the configured path named.
    ///
    /// What is put aside is durable, under a name that says so, before this returns.
    async fn salvage(
        &self,
        _step: &Step<Self::Action>,
        _done: bool,
        _context: StepContext<'_>,
    ) -> Result<Salvage> {
        Ok(Salvage::Nothing)
    }

    /// Asked by a recovery that carries through, of a finish step that the journal has as done while a later one of its
    /// disk is not: whether the domain, started since the crash, may have written what the step did not see, so that the
    /// later steps would lose it. Then the step is done once more, before them.
    ///
    /// So it is where a merge has moved the active layer's data down, and the configured path still names the active
    /// layer. It must be `false` once the path is moved: from then on the domain writes what the merge had written.
    async fn is_overtaken(&self, _step: &Step<Self::Action>, _context: StepContext<'_>) -> Result<bool> {
        Ok(false)
    }

    /// How far a step got, from what is on the disk.
    async fn status(&self, step: &Step<Self::Action>, context: StepContext<'_>) -> Result<StepStatus>;

    /// What tells an internal snapshot from another of its name, read from the image. Asked at the commit point of the operation
    /// that took it, and recorded with it. Changes nothing.
    async fn identify(
        &self,
        _disk: &DiskRecord,
        _point: &crate::Point,
    ) -> Result<Option<crate::TagIdentity>> {
        Ok(None)
    }

    /// Looks for damage in the disk's images. Changes nothing.
    async fn check(&self, disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>>;

    /// Bytes on the disk that deleting `drop` would give back, and bytes that would have to be moved.
    async fn cost_of_delete(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        drop: &[crate::Point],
        keep: &[crate::Point],
    ) -> Result<DeleteCost>;

    /// Returns true if nothing is left of a disk, neither its image nor a layer, in a place that is there. It
    /// is at rest. A device is not gone because its node is not there: it comes back with its storage, or
    /// when it is activated. A backend of devices asks those who know them.
    async fn is_gone(&self, disk: &DiskRecord) -> Result<bool> {
        let layers = disk.owned.iter().chain([&disk.active]);
        let mut files = layers.map(|layer| self.layer_file(disk, layer));
        Ok(is_gone_file(&disk.disk.path) && files.all(|file| !file.exists()))
    }

    /// The directory where manifests belong: beside the disk's data.
    fn manifest_directory(&self, disk: &Disk) -> Utf8PathBuf;

    /// The manifests of the domain whose first disk is `disk`: files in [`DiskSnapshotter::manifest_directory`], unless the
    /// backend has a store of its own.
    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        Arc::new(ManifestDirectory::new(self.manifest_directory(disk)))
    }

    /// The file that a layer opens by, for people and tools.
    fn layer_file(&self, disk: &DiskRecord, layer: &LayerName) -> Utf8PathBuf;
}

/// What becomes of a finish step that could not be done ([`DiskSnapshotter::leftover`]).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Leftover {
    /// The step must be done: the operation stays unfinished until a recovery does it. Unless the step is planned as one
    /// that may be left ([`crate::PlannedStep::deferrable`]).
    Required,
    /// The step may be left. The disk is whole without it, and the next delete, or a tidy, finds what is left of it, on the
    /// disk or by the layers that the catalogue has, and plans it anew. What is left must be in no later plan's way.
    PlannedAnew,
    /// No later plan does it. It is left only where it can never be done: the image is corrupt, or refused. The text
    /// tells the user what stays.
    Stays(String),
}

/// What a step does with files. Paths are absolute.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileUses {
    /// The names of files that are made, or that files get.
    pub makes: Vec<Utf8PathBuf>,
    /// Files that are written in place.
    pub writes: Vec<Utf8PathBuf>,
    /// Files that get another name, or lose one.
    pub renames: Vec<Utf8PathBuf>,
    /// Files that get a further name (a hard link).
    pub links: Vec<Utf8PathBuf>,
    /// The bytes that it needs at least on the file system of the disk's directory. Where that cannot be known, nothing.
    pub room: u64,
}

impl FileUses {
    /// Adds what another step does.
    pub fn extend(&mut self, other: Self) {
        self.makes.extend(other.makes);
        self.writes.extend(other.writes);
        self.renames.extend(other.renames);
        self.links.extend(other.links);
        self.room = self.room.saturating_add(other.room);
    }
}

/// Returns true if there is no file of that name in a directory that is there, and none comes back by itself.
pub(crate) fn is_gone_file(path: &Utf8Path) -> bool {
    !path.starts_with("/dev")
        && path.parent().is_some_and(Utf8Path::is_dir)
        && path.symlink_metadata().is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// An image that is backed by a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Base {
    /// The image.
    pub image: Utf8PathBuf,
    /// The file that it is backed by, as the image names it, absolute.
    pub file: Utf8PathBuf,
}

/// What [`DiskSnapshotter::salvage`] found.
#[derive(Debug, Clone, PartialEq)]
pub enum Salvage {
    /// The undo loses nothing.
    Nothing,
    /// It was put aside; the step can be undone. The words say where it is.
    PutAside(String),
    /// The step must stay as it is; the catalogue learns what it made true. The words say what that means.
    Stays(Vec<crate::Edit>, String),
}

/// What a delete would cost and give.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DeleteCost {
    /// Bytes on the disk that it would free.
    pub frees: u64,
    /// Bytes of data that it would move.
    pub moves: u64,
}
