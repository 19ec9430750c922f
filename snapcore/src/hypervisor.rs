//! The contract of a hypervisor: its operations on a running domain.
//!
//! A plan has steps of disks and steps of the domain ([`crate::HypervisorStep`]). The latter are
//! journalled like the others, and are carried out by a [`LiveDomain`]. For a disk that a hypervisor has
//! open, a backend's steps use [`AttachedDisk`]. So a backend knows no hypervisor, and a hypervisor no
//! format.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::address::{DiskAddress, FileIdentity};
use crate::backend::Progress;
use crate::domain::{Domain, Hypervisor};
use crate::error::Result;
use crate::name::Target;
use crate::shape::Plan;
use crate::snapshot::Consistency;

/// Connection to a running domain, and the hypervisor's other settings. It is recorded with the domain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub struct Control {
    /// Address in the hypervisor's form ([`VmStateSaver::read_control`]): a socket, a name.
    pub address: String,
    /// The socket of the guest agent: its path, or `tcp:IP:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub agent: Option<Utf8PathBuf>,
    /// The directory of memory images; absent: the directory of the manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub memory_dir: Option<Utf8PathBuf>,
    /// The command that starts the domain, for a revert of a stopped domain to a snapshot with memory;
    /// absent: the command that was recorded with the snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub start: Vec<String>,
    /// Compression level of memory images, 1 to 19; absent or 0: none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 19))]
    pub compress: Option<u8>,
    /// The file from which the domain is created, if its hypervisor uses one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub config: Option<Utf8PathBuf>,
}

setters!(Control {
    address: String,
    agent: Option<Utf8PathBuf>,
    memory_dir: Option<Utf8PathBuf>,
    start: Vec<String>,
    compress: Option<u8>,
    config: Option<Utf8PathBuf>,
});

impl Control {
    /// Makes a connection to the domain at `address`, without other settings.
    pub fn at(address: impl Into<String>) -> Self {
        Self { address: address.into(), ..Self::default() }
    }

    /// The highest compression level of a memory image.
    pub const MAX_COMPRESSION: u8 = 19;
}

/// Freezing of the guest's file systems during the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quiesce {
    /// They are not frozen.
    #[default]
    No,
    /// They are frozen if the guest can. Otherwise the snapshot is created anyway, and reports it.
    Try,
    /// They are frozen, or no snapshot is created.
    Require,
}

/// Power state of the domain after an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PowerAfter {
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The domain is off: its process ends.
    Off,
}

/// The cut of one disk: what happens to it at the instant of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "take", rename_all = "kebab-case")]
pub enum DiskInstant {
    /// The guest writes to an empty overlay from then on. The overlay exists and is durable.
    Overlay {
        /// The overlay's permanent address.
        #[serde(rename = "file")]
        #[schemars(with = "String")]
        address: DiskAddress,
        /// Its format.
        format: String,
    },
    /// The active image gets an internal snapshot.
    Internal {
        /// Its name.
        tag: String,
    },
    /// The hypervisor does nothing. The disk's backend takes the point, by steps nested in the cut. The guest
    /// is paused then, and everything that it wrote is in the file.
    ByBackend,
}

/// Saving of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct MemoryPlan {
    /// The memory image.
    #[schemars(with = "String")]
    pub file: Utf8PathBuf,
    /// True if the guest runs meanwhile.
    pub live: bool,
    /// Time limit of pre-copy, in milliseconds, after which the guest is paused. It applies where the
    /// hypervisor must repeatedly copy the pages that the guest changes.
    pub budget_ms: u64,
}

impl MemoryPlan {
    /// Plans the saving of memory.
    pub fn new(file: impl Into<Utf8PathBuf>, live: bool, budget_ms: u64) -> Self {
        Self { file: file.into(), live, budget_ms }
    }
}

/// The restart of a domain after a detached section in which its current state was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Restart {
    /// The source of the restart.
    pub from: RestartSource,
    /// True to keep the current memory until the restart is certain, if the hypervisor must end the domain
    /// for it. A failure then restores the previous guest.
    pub safety: bool,
    /// The file from which the domain is created instead of its own, if its hypervisor uses one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub config: Option<Utf8PathBuf>,
    /// True if the hypervisor ends the domain and creates it again.
    #[serde(default)]
    pub recreated: bool,
}

impl Restart {
    /// Makes a restart by a hypervisor that keeps the domain.
    pub fn new(from: RestartSource, safety: bool) -> Self {
        Self { from, safety, config: None, recreated: false }
    }
}

setters!(Restart {
    config: Option<Utf8PathBuf>,
    recreated: bool,
});

/// The source of a domain's restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartSource {
    /// This memory image: the guest continues from its instant.
    Memory(#[schemars(with = "String")] Utf8PathBuf),
    /// A boot, as after a reset.
    Boot,
    /// None: the domain is off.
    Off,
}

/// One action of a hypervisor on a whole domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum DomainStep {
    /// Reads a memory image and compares it with its checksums, before anything is changed.
    CheckMemory {
        /// The memory image.
        #[schemars(with = "String")]
        file: Utf8PathBuf,
    },
    /// The cut of a snapshot: all disks, and memory, at one instant. The steps nested in it (which move
    /// configured paths) run while the guest is paused. Undo merges the overlays down again, with what the
    /// guest wrote since, and deletes tags.
    Instant {
        /// The disks.
        disks: Vec<(Target, DiskInstant)>,
        /// True if the guest ran when this was planned. An undo after a crash finds the guest paused and then
        /// resumes it.
        running: bool,
        /// Memory, if it is saved.
        memory: Option<MemoryPlan>,
        /// Freezing of file systems during the cut.
        quiesce: Quiesce,
        /// Time limit of the freeze, in milliseconds.
        quiesce_limit_ms: u64,
        /// Power state of the guest afterwards; absent: the same as before.
        then: Option<PowerAfter>,
    },
    /// Waits until the memory of the instant is written, and makes it a complete and durable memory image.
    /// Undo removes the image, also a partial one.
    SaveMemory {
        /// The memory image.
        #[schemars(with = "String")]
        file: Utf8PathBuf,
        /// The tag of its internal snapshot.
        tag: String,
        /// Compression level, 1 to 19; 0: none.
        #[serde(default)]
        compress: u8,
    },
    /// Reopens each frozen image by its permanent name. The hypervisor may know it by the configured path,
    /// which names another image by now.
    ReopenByName {
        /// The disks.
        disks: Vec<Target>,
    },
    /// Opens a detached section: pauses the guest and closes the files of these disks, so that they can be
    /// changed like disks at rest. Undo reopens what the configured paths name, and resumes the guest if it
    /// was paused only for this.
    Detach {
        /// The disks.
        disks: Vec<Target>,
        /// True if the guest ran when this was planned. The end of the section then resumes it, also after a
        /// crash.
        running: bool,
        /// The restart of the domain, if the guest's current state is given up. A hypervisor that cannot
        /// close the disks of a running guest ends the domain in this case.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        restart: Option<Restart>,
    },
    /// Opens for the disks what the configured paths name now. The guest is still paused. Undo closes the
    /// files again.
    Attach {
        /// The disks.
        disks: Vec<Target>,
        /// The same as of the detached section. A hypervisor that ended the domain creates it again here,
        /// paused, so that a failure can still be undone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        restart: Option<Restart>,
    },
    /// Loads media into drives, as the memory that is loaded next expects them. Part of a detached section.
    Media {
        /// The drives that have another medium now.
        media: Vec<Medium>,
    },
    /// Ends a detached section: loads memory, resets the guest, or neither; then resumes it or leaves it
    /// paused.
    Continue {
        /// The memory image to load.
        #[schemars(with = "Option<String>")]
        memory: Option<Utf8PathBuf>,
        /// True if the guest is reset: its disks have changed and its memory is not restored.
        reset: bool,
        /// Power state afterwards; absent: the same as before the detached section, which the step that
        /// opened it records.
        power: Option<PowerAfter>,
    },
    /// Removes a memory image.
    RemoveMemory {
        /// The memory image.
        #[schemars(with = "String")]
        file: Utf8PathBuf,
    },
}

/// Content of a drive with a removable medium.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Medium {
    /// The drive, by the hypervisor's name.
    pub drive: String,
    /// The medium's file; absent: the drive is empty.
    pub file: Option<String>,
    /// The medium's format, by the hypervisor's name.
    pub format: String,
    /// True if the guest can write it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writable: bool,
}

impl Medium {
    /// Makes an empty drive.
    pub fn new(drive: impl Into<String>, format: impl Into<String>) -> Self {
        Self { drive: drive.into(), format: format.into(), file: None, writable: false }
    }
}

setters!(Medium {
    file: Option<String>,
    writable: bool,
});

/// One layer of a chain, for a hypervisor to open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct OpenLayer {
    /// The layer's permanent address; a path is absolute. The hypervisor may open it again by this address
    /// at any time.
    #[serde(rename = "file")]
    #[schemars(with = "String")]
    pub address: DiskAddress,
    /// Its format, as stated.
    pub format: String,
}

impl OpenLayer {
    /// Makes a layer to open.
    pub fn new(address: impl Into<DiskAddress>, format: impl Into<String>) -> Self {
        Self { address: address.into(), format: format.into() }
    }
}

/// The layers that the configured path of a disk opens.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenChain {
    /// The disk.
    pub target: Target,
    /// The active layer first, the base last.
    pub layers: Vec<OpenLayer>,
}

impl OpenChain {
    /// Makes a chain.
    pub fn new(target: Target, layers: Vec<OpenLayer>) -> Self {
        Self { target, layers }
    }
}

/// Work nested in a step: at the instant of a snapshot, at the pivot of a merge.
///
/// ```no_run
/// use async_trait::async_trait;
/// use snapcore::hypervisor::Inside;
/// use snapcore::{Error, ErrorKind, Result, Target};
///
/// /// Moves the configured path of one disk, by a link that takes its place.
/// struct MovePath {
///     path: &'static str,
///     from: &'static str,
///     to: &'static str,
/// }
///
/// impl MovePath {
///     fn link(&self, layer: &str) -> Result<()> {
///         let new = format!("{}.new", self.path);
///         let moved = std::fs::hard_link(layer, &new).and_then(|()| std::fs::rename(&new, self.path));
///         moved.map_err(|cause| {
///             Error::new(ErrorKind::Io, format!("{} cannot be moved to {layer}", self.path)).because(cause)
///         })
///     }
/// }
///
/// #[async_trait]
/// impl Inside for MovePath {
///     async fn run(&self, _only: Option<&Target>) -> Result<()> {
///         self.link(self.to)
///     }
///
///     async fn back(&self, _only: Option<&Target>) -> Result<()> {
///         self.link(self.from)
///     }
/// }
/// ```
#[async_trait]
pub trait Inside: Send + Sync {
    /// Performs the work for one disk, or for all without one. If it fails, it has undone its changes.
    async fn run(&self, only: Option<&Target>) -> Result<()>;

    /// Reverses [`Inside::run`] after its purpose failed: the pivot failed, and the guest continues to write
    /// to the same image as before.
    async fn back(&self, only: Option<&Target>) -> Result<()>;
}

/// No nested work.
#[async_trait]
impl Inside for () {
    async fn run(&self, _: Option<&Target>) -> Result<()> {
        Ok(())
    }

    async fn back(&self, _: Option<&Target>) -> Result<()> {
        Ok(())
    }
}

/// Context of a domain step.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct DomainContext<'a> {
    /// The domain, as recorded in the catalogue.
    pub domain: &'a Domain,
    /// The layers that the configured paths of the step's disks open now, in the order of the domain's disks.
    pub chains: &'a [OpenChain],
    /// The work nested in the step. In [`LiveDomain::apply`] of a cut it is the nested steps, run together
    /// while the guest is paused. In [`LiveDomain::undo`] it is their undo, disk by disk, each at the pivot
    /// of that disk. If the path were moved back before the pivot, what the guest still writes to the overlay
    /// would be lost.
    pub inside: &'a dyn Inside,
    /// Receiver of progress.
    pub progress: &'a dyn Progress,
    /// If it is cancelled, a step before the commit point soon fails with
    /// [`crate::ErrorKind::Cancelled`].
    pub cancel: &'a CancellationToken,
}

impl<'a> DomainContext<'a> {
    /// Makes the context of a step with nothing nested in it.
    pub fn new(
        domain: &'a Domain,
        chains: &'a [OpenChain],
        progress: &'a dyn Progress,
        cancel: &'a CancellationToken,
    ) -> Self {
        Self { domain, chains, progress, cancel, inside: &() }
    }
}

setters!(<'a> DomainContext<'a> {
    inside: &'a dyn Inside,
});

/// Effect of an operation on the guest of a domain, other than a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GuestChange {
    /// The snapshot's memory was loaded into the running process: the guest continues from the instant of the
    /// snapshot.
    Restored,
    /// The guest was reset in the running process: it boots from the disks of the snapshot, and the content
    /// of its memory is lost.
    Reset,
    /// Its domain was destroyed, and created again from the snapshot's memory.
    RecreatedFromMemory,
    /// Its domain was destroyed, and created again: it boots from the disks of the snapshot.
    Recreated,
    /// The domain was off, and was started from the snapshot's memory.
    Started,
    /// Its domain was ended: it is off.
    Ended,
}

impl std::fmt::Display for GuestChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Restored => "the snapshot's memory was restored",
            Self::Reset => "guest was reset",
            Self::RecreatedFromMemory => "the domain was destroyed and restored from the snapshot's memory",
            Self::Recreated => "the domain was destroyed and created again; its guest boots",
            Self::Started => "the domain was started from the snapshot's memory",
            Self::Ended => "the domain was ended and is off",
        })
    }
}

/// The process or domain that an operation started or created again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct StartedDomain {
    /// Process ID, if it is a process.
    pub pid: Option<u32>,
    /// Domain ID, if its hypervisor numbers domains.
    pub domid: Option<u32>,
    /// The command that started it.
    pub command: Vec<String>,
}

impl StartedDomain {
    /// A process, and the command that started it.
    pub fn process(pid: Option<u32>, command: Vec<String>) -> Self {
        Self { pid, domid: None, command }
    }

    /// A domain by its ID.
    pub fn number(domid: u32) -> Self {
        Self { domid: Some(domid), ..Self::default() }
    }
}

/// The outcome of a domain step.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct StepOutcome {
    /// Effect on the guest.
    pub guest: Option<GuestChange>,
    /// The started process or domain, if the step started one.
    pub started: Option<StartedDomain>,
    /// Notes for the user.
    pub notes: Vec<String>,
    /// Details of a cut.
    pub taken: Option<Taken>,
    /// Size of a saved memory image, in bytes.
    pub memory_bytes: Option<u64>,
    /// Uncompressed size of a compressed memory image, in bytes.
    pub memory_full: Option<u64>,
    /// Time that the guest was paused, if this step resumed it.
    pub downtime: Option<Duration>,
    /// The command that starts the domain, if the user must run it.
    pub start: Vec<String>,
}

setters!(StepOutcome {
    guest: Option<GuestChange>,
    started: Option<StartedDomain>,
    notes: Vec<String>,
    taken: Option<Taken>,
    memory_bytes: Option<u64>,
    memory_full: Option<u64>,
    downtime: Option<Duration>,
    start: Vec<String>,
});

/// Details of the cut of a snapshot.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Taken {
    /// The instant.
    pub at: Timestamp,
    /// Consistency of the disks and the memory.
    pub consistency: Consistency,
    /// True if the guest ran before.
    pub running: bool,
    /// The method, for people: `background snapshot`, `pre-copy`, `disks only`.
    pub method: String,
}

impl Taken {
    /// Makes the details of a cut.
    pub fn new(at: Timestamp, consistency: Consistency, running: bool, method: impl Into<String>) -> Self {
        Self { at, consistency, running, method: method.into() }
    }
}

/// A disk as the hypervisor reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct SeenDisk {
    /// The hypervisor's name for it, converted to a target.
    pub target: Target,
    /// The address of its active image; a path is absolute.
    #[serde(rename = "path")]
    #[schemars(with = "String")]
    pub address: DiskAddress,
    /// The format with which it is opened.
    pub format: String,
    /// The reason that it is not part of snapshots: it is read-only, removable, firmware. Absent: it is part
    /// of them.
    pub left_out: Option<String>,
    /// True if the guest can change its content. A snapshot without the disk lacks what the guest wrote
    /// there. So the disk is included, or skipped by name, or the snapshot is refused. False for firmware
    /// variables, which are reported separately.
    #[serde(default)]
    pub guest_writes: bool,
    /// The matching disk of the domain, if the query was about a domain.
    #[serde(skip)]
    pub member: Option<Target>,
    /// The reason that the hypervisor takes no internal snapshot of it while the domain runs. Absent: it
    /// does, if the format supports them.
    #[serde(skip)]
    pub no_internal: Option<String>,
    /// The reason, as far as the hypervisor knows one, if no file has the address of the image. Absent: a
    /// general one is reported.
    #[serde(skip)]
    pub if_missing: Option<Obstacle>,
}

impl SeenDisk {
    /// Makes a disk that is part of snapshots, and that the guest cannot change.
    pub fn new(target: Target, address: impl Into<DiskAddress>, format: impl Into<String>) -> Self {
        Self {
            target,
            address: address.into(),
            format: format.into(),
            if_missing: None,
            left_out: None,
            guest_writes: false,
            member: None,
            no_internal: None,
        }
    }
}

setters!(SeenDisk {
    left_out: Option<String>,
    guest_writes: bool,
    member: Option<Target>,
    no_internal: Option<String>,
    if_missing: Option<Obstacle>,
});

/// Description of a running domain by its hypervisor.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct DomainInfo {
    /// Its name, if the hypervisor knows one.
    pub name: Option<String>,
    /// True if the guest's processors run; otherwise it is paused.
    pub running: bool,
    /// Everything that is recorded with a snapshot: machine type, processors, memory, devices, how it was
    /// started. It has the hypervisor's own form. The same machine has the same value after a restart.
    pub machine: serde_json::Value,
    /// One-line summary, for people.
    pub summary: String,
    /// Reasons that its memory cannot be saved, one per entry, naming the device; empty if it can.
    pub memory_blockers: Vec<String>,
    /// Its drives.
    pub disks: Vec<SeenDisk>,
    /// The guest agent's socket, if the hypervisor reports it.
    pub agent: Option<Utf8PathBuf>,
    /// The file from which it was created ([`Control::config`]), if the hypervisor reports it.
    pub config: Option<Utf8PathBuf>,
}

setters!(DomainInfo {
    name: Option<String>,
    summary: String,
    memory_blockers: Vec<String>,
    disks: Vec<SeenDisk>,
    agent: Option<Utf8PathBuf>,
    config: Option<Utf8PathBuf>,
});

impl DomainInfo {
    /// Describes a domain by its machine alone: everything else is unknown or empty.
    pub fn new(machine: serde_json::Value, running: bool) -> Self {
        Self {
            name: None,
            running,
            machine,
            summary: String::new(),
            memory_blockers: Vec::new(),
            disks: Vec::new(),
            agent: None,
            config: None,
        }
    }
}

/// A merge of layers of an open chain into one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttachedMerge {
    /// The layers' files, by their permanent names, bottom first.
    pub run: Vec<Utf8PathBuf>,
    /// The layer that receives the others' data: the first or the last of them.
    pub into: Utf8PathBuf,
    /// The backing file of the run's bottom.
    pub below: Option<Utf8PathBuf>,
    /// The backing string that the image above the merged ones gets: it names `into`. If `into` is the last,
    /// it is the backing string of `into`.
    pub string: Option<String>,
}

impl AttachedMerge {
    /// Makes a merge of layers that have no backing file, and no image above them.
    pub fn new(run: Vec<Utf8PathBuf>, into: impl Into<Utf8PathBuf>) -> Self {
        Self { run, into: into.into(), below: None, string: None }
    }
}

setters!(AttachedMerge {
    below: Option<Utf8PathBuf>,
    string: Option<String>,
});

/// One disk of a running domain that its hypervisor has open.
///
/// A hypervisor implements it, and a backend's steps use it:
///
/// ```no_run
/// use snapcore::backend::StepContext;
/// use snapcore::hypervisor::AttachedMerge;
/// use snapcore::{Error, ErrorKind, Result};
///
/// /// Merges the layer `upper` into `lower`, below the active image.
/// async fn merge(context: StepContext<'_>, lower: &str, upper: &str) -> Result<()> {
///     let Some(attached) = context.attached else {
///         return Err(Error::new(ErrorKind::Internal, "no hypervisor has the images open"));
///     };
///     let run = vec![lower.into(), upper.into()];
///     let merge = AttachedMerge::new(run, lower).string(Some(lower.to_owned()));
///     attached.merge(&merge, context.inside, context.progress, context.cancel).await
/// }
/// ```
#[async_trait]
pub trait AttachedDisk: Send + Sync {
    /// The image files that the hypervisor has open for this disk now: none in a detached section. The
    /// hypervisor has them locked and controls their contents.
    async fn open_files(&self) -> Result<HashSet<FileIdentity>>;

    /// Merges layers of the open chain while the guest runs. Afterwards the hypervisor has closed the others'
    /// files, and the image above is backed by the merged one.
    ///
    /// If the last layer of the run is the active image and is merged down, `inside` runs at the pivot, when
    /// both show the same and the guest's writes wait. It moves the configured path.
    ///
    /// The call may be repeated, also after a crash in the middle: it continues where it stopped.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Cancelled`], or the failure: the chain is as before.
    async fn merge(
        &self,
        merge: &AttachedMerge,
        inside: &dyn Inside,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<()>;

    /// Returns true if the images are open in a server that reads their format itself. Otherwise the
    /// hypervisor reads them, with its own driver of the format.
    fn is_served(&self) -> bool {
        false
    }

    /// Deletes internal snapshots of the active image. A missing one is ignored.
    async fn drop_internal(&self, tags: &[String]) -> Result<()>;
}

/// A connection to one running domain.
///
/// What the engine does with one, for a section in which disks are changed as if the domain were at rest:
///
/// ```no_run
/// use snapcore::hypervisor::{DomainContext, DomainStep, LiveDomain};
/// use snapcore::{Result, Target};
///
/// async fn section(
///     live: &dyn LiveDomain,
///     disks: Vec<Target>,
///     context: DomainContext<'_>,
///     change: impl AsyncFnOnce() -> Result<()>,
/// ) -> Result<()> {
///     let running = live.seen().running;
///     let detach = DomainStep::Detach { disks: disks.clone(), running, restart: None };
///     live.apply(&detach, context).await?;
///     if let Err(error) = change().await {
///         // Opens what the paths name, and resumes the guest.
///         live.undo(&detach, context).await?;
///         return Err(error.state("rolled back"));
///     }
///     live.apply(&DomainStep::Attach { disks, restart: None }, context).await?;
///     live.apply(&DomainStep::Continue { memory: None, reset: true, power: None }, context).await?;
///     Ok(())
/// }
/// ```
#[async_trait]
pub trait LiveDomain: Send + Sync {
    /// The domain as it was when the connection was made.
    fn seen(&self) -> &DomainInfo;

    /// The processes of the hypervisor that have its disks open, if known. Their open files do not count as
    /// uses by other programs. Empty: not known.
    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }

    /// One of its disks; absent: the running domain has no disk whose image is a layer of it.
    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk>;

    /// Lists the differences from a recorded machine ([`DomainInfo::machine`]) that would prevent a revert
    /// with memory, as text.
    fn differences(&self, recorded: &serde_json::Value) -> Result<Vec<String>>;

    /// Lists the media of a recorded machine that are not in their drives now, and can be inserted before
    /// memory is loaded. A medium that cannot be inserted is one of the [`LiveDomain::differences`].
    fn media(&self, _recorded: &serde_json::Value) -> Result<Vec<Medium>> {
        Ok(Vec::new())
    }

    /// Returns the obstacle, if memory cannot be saved through this connection.
    fn cannot_save_memory(&self) -> Option<Obstacle> {
        None
    }

    /// Returns the obstacle, if disks cannot be detached through this connection. There is no detached
    /// section then.
    fn cannot_detach(&self) -> Option<Obstacle> {
        None
    }

    /// Resumes the guest, regardless of what paused it.
    async fn resume(&self) -> Result<()>;

    /// Limits the rate of merges, in bytes per second; 0: no limit.
    fn limit(&self, bytes_per_second: u64);

    /// Refuses a plan that cannot be carried out, as far as that is known before anything is begun. The
    /// guest's state may not permit it, or the hypervisor may be unable to open a file. `chains` has all
    /// disks.
    ///
    /// With `probe`, the hypervisor may be asked to open images and close them again. Such a call follows one
    /// without it for the same plan under the same locks. Without `probe`, nothing is changed, not even for a
    /// moment.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`], [`crate::ErrorKind::Unsupported`]: no changes made.
    async fn preflight(&self, plan: &Plan, chains: &[OpenChain], probe: bool) -> Result<()> {
        let _ = (plan, chains, probe);
        Ok(())
    }

    /// Closes nodes that a crash left open and unused in the hypervisor, so that their images can be locked.
    /// It is called before an unfinished operation is recovered. Nodes of a device are not changed.
    async fn tidy(&self) -> Result<()> {
        Ok(())
    }

    /// Performs the part of a step that does not need the guest to be paused. Used by drivers that pause it
    /// by other means before they apply the step. Other programs see no change. [`LiveDomain::undo`] reverses
    /// it, and so does [`LiveDomain::clean_up`].
    async fn prepare(&self, step: &DomainStep) -> Result<()> {
        let _ = step;
        Ok(())
    }

    /// Performs a step. It is idempotent, also after a crash: completed work is not repeated.
    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome>;

    /// Undoes a step, however far it got. It is idempotent.
    async fn undo(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()>;

    /// Cleans up what an interrupted run left in the hypervisor and the journal does not record: thaws the
    /// guest, closes unused nodes, reopens images under their permanent names. Does not resume a guest.
    /// `chains` has all disks. Returns a description of what it did.
    async fn clean_up(&self, chains: &[OpenChain]) -> Result<Vec<String>>;
}

/// Input for starting a domain from a memory image.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct StartFromMemory<'a> {
    /// The domain.
    pub domain: &'a Domain,
    /// The machine that was recorded with the snapshot.
    pub machine: Option<&'a serde_json::Value>,
    /// The memory image, already checked.
    pub file: &'a Utf8Path,
    /// The layers of its disks.
    pub chains: &'a [OpenChain],
    /// Power state afterwards; absent: the same as at the instant.
    pub power: Option<PowerAfter>,
}

impl<'a> StartFromMemory<'a> {
    /// Makes the input for a start to the state at the instant, on any machine.
    pub fn new(domain: &'a Domain, file: &'a Utf8Path, chains: &'a [OpenChain]) -> Self {
        Self { domain, file, chains, machine: None, power: None }
    }
}

setters!(<'a> StartFromMemory<'a> {
    machine: Option<&'a serde_json::Value>,
    power: Option<PowerAfter>,
});

/// An obstacle to an operation through a connection, with advice.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Obstacle {
    /// The reason.
    pub why: String,
    /// The advice.
    pub advice: String,
}

impl Obstacle {
    /// Makes an obstacle.
    pub fn new(why: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { why: why.into(), advice: advice.into() }
    }
}

/// Properties of a hypervisor, on which plans and settings of its domains depend.
///
/// ```
/// use snapcore::Hypervisor;
/// use snapcore::hypervisor::HypervisorProfile;
///
/// let profile = HypervisorProfile::new(Hypervisor::new("fake")?, "Fake", "NAME").saves_while_running();
/// assert!(profile.saves_while_running && !profile.recreates);
/// # Ok::<(), snapcore::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[schemars(description = "Properties of a hypervisor, on which plans and settings of its domains depend.")]
#[non_exhaustive]
pub struct HypervisorProfile {
    /// The name under which domains are recorded, and with which addresses begin.
    pub name: Hypervisor,
    /// The name for people.
    pub title: String,
    /// The kind of its addresses, in one word: `SOCKET`.
    pub address: String,
    /// The key of a domain file's `[control]` that has the address.
    pub key: String,
    /// True if guests have an agent that can freeze their file systems.
    pub agent: bool,
    /// True if a command line that starts a domain may be given.
    pub start: bool,
    /// True if memory images can be compressed.
    pub compress: bool,
    /// True if a file from which a domain is created may be given.
    pub config: bool,
    /// True if memory is saved while the guest runs; otherwise it is paused.
    pub saves_while_running: bool,
    /// True if a revert of a running domain ends it and creates it again; otherwise it is reverted in place.
    pub recreates: bool,
}

impl HypervisorProfile {
    /// Makes the profile of a hypervisor that saves memory while its guests are paused, reverts in place, and
    /// has no setting except the address.
    pub fn new(name: Hypervisor, title: impl Into<String>, address: impl Into<String>) -> Self {
        Self {
            key: name.to_string(),
            name,
            title: title.into(),
            address: address.into(),
            agent: false,
            start: false,
            compress: false,
            config: false,
            saves_while_running: false,
            recreates: false,
        }
    }

    /// Sets the key of a domain file's `[control]` that has the address. The default is the hypervisor's
    /// name.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>) -> Self {
        self.key = key.into();
        self
    }

    /// Guests have an agent.
    #[must_use]
    pub fn agent(mut self) -> Self {
        self.agent = true;
        self
    }

    /// A command line that starts a domain may be given.
    #[must_use]
    pub fn start(mut self) -> Self {
        self.start = true;
        self
    }

    /// Memory images can be compressed.
    #[must_use]
    pub fn compress(mut self) -> Self {
        self.compress = true;
        self
    }

    /// A file from which a domain is created may be given.
    #[must_use]
    pub fn config(mut self) -> Self {
        self.config = true;
        self
    }

    /// Memory is saved while the guest runs.
    #[must_use]
    pub fn saves_while_running(mut self) -> Self {
        self.saves_while_running = true;
        self
    }

    /// A revert of a running domain ends it and creates it again.
    #[must_use]
    pub fn recreates(mut self) -> Self {
        self.recreates = true;
        self
    }

    /// The keys that a domain file's `[control]` may have for it.
    pub fn keys(&self) -> Vec<&str> {
        let more = [
            (self.agent, "agent"),
            (true, "memory-dir"),
            (self.start, "start"),
            (self.compress, "compress"),
            (self.config, "config"),
        ];
        std::iter::once(self.key.as_str())
            .chain(more.into_iter().filter(|(takes, _)| *takes).map(|(_, key)| key))
            .collect()
    }
}

/// A hypervisor: finds running domains, and saves their VM state in memory images.
///
/// The crate in `tests/fakehypervisor` is a whole one, of files. What the service does with one:
///
/// ```no_run
/// use snapcore::hypervisor::VmStateSaver;
/// use snapcore::{Domain, DomainName, Result};
///
/// /// Shows the domains that run, and if their memory can be saved.
/// async fn show(saver: &dyn VmStateSaver) -> Result<()> {
///     let profile = saver.profile();
///     for (control, seen) in saver.scan().await? {
///         println!("{}:{} {}", profile.name, control.address, seen.summary);
///         let name = DomainName::new(seen.name.unwrap_or("unnamed".to_owned()))?;
///         let domain = Domain::new(name, Vec::new());
///         let domain = domain.hypervisor(profile.name.clone()).control(Some(control));
///         // It may have ended since.
///         let Some(live) = saver.connect(&domain).await? else { continue };
///         if let Some(obstacle) = live.cannot_save_memory() {
///             println!("  no memory: {}; {}", obstacle.why, obstacle.advice);
///         }
///     }
///     Ok(())
/// }
/// ```
#[async_trait]
pub trait VmStateSaver: Send + Sync {
    /// The properties of this hypervisor.
    fn profile(&self) -> HypervisorProfile;

    /// Converts a user's address of a domain to its canonical form: the same domain always has the same
    /// address. Relative paths start at `directory`. A canonical address is unchanged.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] if it is not an address of this hypervisor.
    fn read_control(&self, control: Control, directory: &Utf8Path) -> Result<Control>;

    /// Connects to the domain if it runs; returns `None` otherwise. Changes nothing.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] if another program has the connection; any failure that leaves it
    /// unknown.
    async fn connect(&self, domain: &Domain) -> Result<Option<Arc<dyn LiveDomain>>>;

    /// Describes the domain at an address.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] if none runs there.
    async fn look(&self, control: &Control) -> Result<DomainInfo>;

    /// Lists the domains that run on this machine and can be reached. Domains that cannot be queried are
    /// skipped.
    async fn scan(&self) -> Result<Vec<(Control, DomainInfo)>>;

    /// Reads a memory image and compares it with its checksums, before it is loaded. A copy that must be
    /// uncompressed for that is kept until the image is loaded, or until [`VmStateSaver::release_memory`]. It
    /// does not outlive this process.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] with the first wrong place;
    /// [`crate::ErrorKind::NotFound`]; [`crate::ErrorKind::NoSpace`] if it cannot be
    /// uncompressed.
    async fn check_memory(&self, file: &Utf8Path, progress: &dyn Progress) -> Result<()>;

    /// Releases what [`VmStateSaver::check_memory`] keeps of an image that is not going to be loaded.
    async fn release_memory(&self, _file: &Utf8Path) -> Result<()> {
        Ok(())
    }

    /// Starts the domain from a memory image, by the configured or recorded command. If that is impossible,
    /// returns the command for the user.
    async fn start(&self, start: StartFromMemory<'_>) -> Result<StepOutcome>;

    /// Lists state that the guest of a machine can write and that a snapshot contains only in its memory, as
    /// text: firmware variables, a TPM. `machine` is as [`DomainInfo::machine`]; without it the domain's
    /// record is used.
    fn outside(&self, _domain: &Domain, _machine: Option<&serde_json::Value>) -> Vec<String> {
        Vec::new()
    }

    /// Lists state that the guest of a machine can write and that no snapshot contains, as text: directories
    /// shared with the host, devices of the host. Parameters are as for [`VmStateSaver::outside`].
    fn shared(&self, _domain: &Domain, _machine: Option<&serde_json::Value>) -> Vec<String> {
        Vec::new()
    }

    /// Removes what a crash left beside the disks of a stopped domain, and [`LiveDomain::tidy`] could not.
    /// The caller has the domain's lock. Files that are not certainly the hypervisor's own are kept.
    fn tidy_at_rest(&self, domain: &Domain) {
        let _ = domain;
    }

    /// Removes a memory image, and leftovers of a crash under its name. A missing image is not an error.
    async fn remove_memory(&self, file: &Utf8Path) -> Result<()>;

    /// Lists which of these files running domains of this hypervisor have open without a lock that others
    /// would meet, each with the domain's name.
    async fn open_without_lock(&self, files: &HashSet<FileIdentity>) -> Result<Vec<(FileIdentity, String)>> {
        let _ = files;
        Ok(Vec::new())
    }
}
