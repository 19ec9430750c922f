//! What a hypervisor does for a domain that runs.
//!
//! A domain is one more actor of a plan beside its disks: [`DomainStep`]s stand in it under [`Target::of_domain`], are
//! journalled like the others, and are carried out by a [`LiveDomain`]. For a disk that a hypervisor has open, a backend's steps
//! speak through [`AttachedDisk`]: so a backend knows no hypervisor, and a hypervisor no format.

use std::collections::HashSet;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use crate::{Consistency, Domain, Hypervisor, Plan, Progress, Result, Target};

/// The strongest level at which a memory image can be compressed.
pub const MAX_COMPRESSION: u8 = 19;

/// How a running domain is reached, and what else its hypervisor must be told. Recorded with the domain.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Control {
    /// Where, as its hypervisor reads it ([`VmStateSaver::read_control`]): a socket, a name.
    pub address: String,
    /// The socket of the guest agent: its path, or `tcp:IP:PORT`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub agent: Option<Utf8PathBuf>,
    /// The directory of memory images; absent: the one of the manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub memory_dir: Option<Utf8PathBuf>,
    /// The command that starts the domain, for a revert of one that is off to a snapshot with memory; absent: the one that was
    /// recorded with the snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub start: Vec<String>,
    /// How strongly memory images are compressed, 1 to 19; absent or 0: they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 19))]
    pub compress: Option<u8>,
    /// The file that the domain is created from, where its hypervisor has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub config: Option<Utf8PathBuf>,
}

/// Whether the guest's file systems are flushed and frozen for the instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quiesce {
    /// They are not.
    #[default]
    No,
    /// Where the guest can; otherwise the snapshot is taken all the same, and says so.
    Try,
    /// Or else no snapshot is taken.
    Require,
}

/// What the domain is to do when an operation is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PowerAfter {
    /// Run.
    Running,
    /// Stand still.
    Paused,
    /// Be off: its process ends.
    Off,
}

/// What happens to one disk at the instant of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "take", rename_all = "kebab-case")]
pub enum DiskInstant {
    /// The guest writes to an empty overlay from then on. The file is there and durable.
    Overlay {
        /// The overlay, by its permanent name.
        #[schemars(with = "String")]
        file: Utf8PathBuf,
        /// Its format.
        format: String,
    },
    /// The active image gets an internal snapshot.
    Internal {
        /// Its name.
        tag: String,
    },
    /// The hypervisor leaves it alone: its backend takes it, by steps that run inside the instant while the guest stands still
    /// and everything that it wrote is in its file.
    ByBackend,
}

/// How memory is written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MemoryPlan {
    /// The memory image.
    #[schemars(with = "String")]
    pub file: Utf8PathBuf,
    /// Whether the guest runs meanwhile.
    pub live: bool,
    /// How long, in milliseconds, it may go on before the guest is paused, where the hypervisor must copy what the guest
    /// dirties again and again.
    pub budget_ms: u64,
}

/// What a domain begins anew with, when a window is over in which its present is given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct Anew {
    /// From where.
    pub from: Beginning,
    /// Whether the present's own memory is kept until the new beginning is certain, where the hypervisor must end the domain for
    /// it: so that a failure brings the former guest back.
    pub safety: bool,
    /// The file that the domain is made from, in the place of its own, where its hypervisor has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub config: Option<Utf8PathBuf>,
    /// Whether the hypervisor ends the domain for it and makes it again.
    #[serde(default)]
    pub recreated: bool,
}

/// Where a domain begins anew.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Beginning {
    /// At the instant of this memory image.
    Memory(#[schemars(with = "String")] Utf8PathBuf),
    /// As after a reset.
    Boot,
    /// Not at all: it is off.
    Off,
}

/// One thing that a hypervisor does to a whole domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum DomainStep {
    /// Reads a memory image and compares it with its checksums, before anything is touched.
    CheckMemory {
        /// The memory image.
        #[schemars(with = "String")]
        file: Utf8PathBuf,
    },
    /// The instant of a snapshot: all disks, and memory. The steps inside it (configured paths are moved) run while the guest
    /// stands still. Undone: the overlays are merged down again, with what the guest wrote since; tags are deleted.
    Instant {
        /// The disks.
        disks: Vec<(Target, DiskInstant)>,
        /// Whether the guest ran when this was planned: then an undo after a crash, which finds it standing still, lets it
        /// go on.
        running: bool,
        /// Memory, where it is taken.
        memory: Option<MemoryPlan>,
        /// Whether file systems are frozen for it.
        quiesce: Quiesce,
        /// How long, in milliseconds, they may stay so.
        quiesce_limit_ms: u64,
        /// What the guest does after it; absent: what it did before.
        then: Option<PowerAfter>,
    },
    /// Waits until the memory of the instant is written, and makes it a memory image that is whole and durable. Undone: the
    /// image, and what is there of it, is removed.
    SaveMemory {
        /// The memory image.
        #[schemars(with = "String")]
        file: Utf8PathBuf,
        /// The tag of its internal snapshot.
        tag: String,
        /// How strongly it is compressed, 1 to 19; 0: it is not.
        #[serde(default)]
        compress: u8,
    },
    /// Makes the hypervisor know each frozen image by its permanent name: it may know one by the configured path, which is
    /// another image's by now.
    Rehome {
        /// The disks.
        disks: Vec<Target>,
    },
    /// Pauses the guest and sets the files of these disks free, so that they can be worked on as at rest. Undone: the disks
    /// are given what their configured paths name, and the guest goes on, if it stood still for this alone.
    OpenWindow {
        /// The disks.
        disks: Vec<Target>,
        /// Whether the guest ran when this was planned: then the window's end lets it go on, also after a crash.
        running: bool,
        /// Where the guest's present is given up: how the domain begins anew. A hypervisor that cannot set a running guest's disks
        /// free ends the domain then.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        anew: Option<Anew>,
    },
    /// Gives the disks what their configured paths name now. The guest stands still yet. Undone: the files are set free
    /// again.
    Attach {
        /// The disks.
        disks: Vec<Target>,
        /// As the window's: a hypervisor that ended the domain makes it anew here, standing still, so that what fails can be
        /// undone yet.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        anew: Option<Anew>,
    },
    /// Gives drives the media that the memory which is loaded next has in them. Part of a window.
    Media {
        /// The drives that have another medium now.
        media: Vec<Medium>,
    },
    /// The end of a window: loads memory or resets the guest, or neither, and lets it run or not.
    Continue {
        /// The memory image to load.
        #[schemars(with = "Option<String>")]
        memory: Option<Utf8PathBuf>,
        /// Whether the guest is reset: its disks are others, and its memory is not.
        reset: bool,
        /// What it does afterwards; absent: what it did before the window, which the step that opened it tells.
        power: Option<PowerAfter>,
    },
    /// Removes a memory image.
    RemoveMemory {
        /// The memory image.
        #[schemars(with = "String")]
        file: Utf8PathBuf,
    },
}

/// What is in a drive whose medium can be taken out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Medium {
    /// The drive, as the hypervisor knows it.
    pub drive: String,
    /// The medium's file; absent: the drive is empty.
    pub file: Option<String>,
    /// The medium's format, as the hypervisor calls it.
    pub format: String,
    /// The guest can write it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writable: bool,
}

/// One layer of a chain as files, for a hypervisor to open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct ChainFile {
    /// The file, by its permanent name, absolute. The hypervisor may open it again by this name at any time.
    #[schemars(with = "String")]
    pub file: Utf8PathBuf,
    /// Its format, as stated.
    pub format: String,
}

/// What the configured path of a disk opens, layer by layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenChain {
    /// Which disk.
    pub target: Target,
    /// The active layer first, the base last.
    pub layers: Vec<ChainFile>,
}

/// What runs inside a step: at the instant of a snapshot, at the pivot of a merge.
#[async_trait]
pub trait Inside: Send + Sync {
    /// Does what is that disk's; without one, all of it. Where it fails it has undone what it did.
    async fn run(&self, only: Option<&Target>) -> Result<()>;

    /// Takes back what [`Inside::run`] did, where the moment passed without what it was for: the pivot failed, and the guest
    /// goes on writing to the image that it wrote to.
    async fn back(&self, only: Option<&Target>) -> Result<()>;
}

/// Nothing that runs inside a step.
#[derive(Debug, Clone, Copy)]
pub struct NothingInside;

#[async_trait]
impl Inside for NothingInside {
    async fn run(&self, _: Option<&Target>) -> Result<()> {
        Ok(())
    }

    async fn back(&self, _: Option<&Target>) -> Result<()> {
        Ok(())
    }
}

/// What a step of the domain runs with.
#[derive(Clone, Copy)]
pub struct DomainContext<'a> {
    /// The domain, as the catalogue has it.
    pub domain: &'a Domain,
    /// What the configured paths of the step's disks open now, in the order of the domain's disks.
    pub chains: &'a [OpenChain],
    /// What runs inside the step: in [`LiveDomain::apply`] of an instant the steps to do, all at once while the guest stands
    /// still; in [`LiveDomain::undo`] those to undo, disk by disk, each at the pivot of that disk: what is moved back for a disk
    /// whose overlay the guest still writes to would be lost.
    pub inside: &'a dyn Inside,
    /// Where to tell progress.
    pub progress: &'a dyn Progress,
    /// When it is cancelled, a step before the commit point fails soon with [`crate::ErrorKind::Cancelled`].
    pub cancel: &'a CancellationToken,
}

/// What an operation did to the guest of a domain, beyond pausing it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GuestChange {
    /// The snapshot's memory was loaded into the running process: it goes on from the instant of the snapshot.
    Restored,
    /// It was reset in the running process: it boots from the disks of the snapshot, and what its memory held is gone.
    Reset,
    /// Its domain was destroyed, and made again from the snapshot's memory.
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

/// What runs a domain that an operation started, or made again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct StartedDomain {
    /// Its process, where it is one.
    pub pid: Option<u32>,
    /// Its number, where its hypervisor numbers domains.
    pub domid: Option<u32>,
    /// The command that it was started by.
    pub command: Vec<String>,
}

impl StartedDomain {
    /// A process, and the command that started it.
    pub fn process(pid: Option<u32>, command: Vec<String>) -> Self {
        Self { pid, domid: None, command }
    }

    /// A domain by its number.
    pub fn number(domid: u32) -> Self {
        Self { domid: Some(domid), ..Self::default() }
    }
}

/// What there is to tell of a step of the domain that was done.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Facts {
    /// What it did to the guest.
    pub guest: Option<GuestChange>,
    /// What runs it now, where that was started.
    pub started: Option<StartedDomain>,
    /// What the user should know.
    pub notes: Vec<String>,
    /// Of an instant: how it was.
    pub taken: Option<Taken>,
    /// Of memory that was saved: the size of its image, in bytes.
    pub memory_bytes: Option<u64>,
    /// Of memory that was compressed: the size of its image when it is unpacked, in bytes.
    pub memory_full: Option<u64>,
    /// How long the guest stood still, where this step let it go on.
    pub downtime: Option<Duration>,
    /// The command that starts the domain, where the user must.
    pub start: Vec<String>,
}

/// How the instant of a snapshot was.
#[derive(Debug, Clone, PartialEq)]
pub struct Taken {
    /// When.
    pub at: Timestamp,
    /// What the disks, and the memory, are at it.
    pub consistency: Consistency,
    /// Whether the guest ran before.
    pub running: bool,
    /// The way it went, in words: `background snapshot`, `pre-copy`, `disks only`.
    pub way: String,
}

/// A disk as the hypervisor has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SeenDisk {
    /// What the hypervisor calls it, made a target.
    pub target: Target,
    /// The file of its active image, absolute.
    #[schemars(with = "String")]
    pub path: Utf8PathBuf,
    /// The format that it is opened with.
    pub format: String,
    /// Why it takes no part in snapshots: it is read-only, removable, firmware. Absent: it does.
    pub left_out: Option<String>,
    /// The guest can change what is on it. A snapshot without it lacks what the guest wrote there, so that it is taken
    /// along, or skipped by name, or the snapshot is refused. False for firmware variables, which are reported apart.
    #[serde(default)]
    pub guest_writes: bool,
    /// The domain's disk that it is, where a domain was asked about.
    #[serde(skip)]
    pub member: Option<Target>,
    /// Why the hypervisor takes no internal snapshot of it while the domain runs. Absent: it does, where its format has them.
    #[serde(skip)]
    pub no_internal: Option<String>,
}

/// A running domain as its hypervisor describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct Seen {
    /// Its name, where the hypervisor knows one.
    pub name: Option<String>,
    /// Whether the guest's processors run; it is paused otherwise.
    pub running: bool,
    /// Everything that is recorded with a snapshot: machine type, processors, memory, devices, how it was started. The
    /// hypervisor's own form; the same machine started anew is the same value.
    pub machine: serde_json::Value,
    /// One line of it, for people.
    pub summary: String,
    /// Why its memory cannot be saved, one reason an entry, naming the device: empty where it can.
    pub memory_blockers: Vec<String>,
    /// Its drives.
    pub disks: Vec<SeenDisk>,
    /// The guest agent's socket, where the hypervisor tells.
    pub agent: Option<Utf8PathBuf>,
    /// The file that it was created from ([`Control::config`]), where the hypervisor tells.
    pub config: Option<Utf8PathBuf>,
}

/// Layers of an open chain that are to be merged into one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AttachedMerge {
    /// The layers' files, by their permanent names, bottom first.
    pub run: Vec<Utf8PathBuf>,
    /// The one that receives the others' data: the first or the last of them.
    pub into: Utf8PathBuf,
    /// The file that the run's bottom stands on.
    pub below: Option<Utf8PathBuf>,
    /// The backing string that names, in an image, what an image above the merged ones stands on afterwards: `into`; or, where
    /// `into` is the last, what `into` stands on.
    pub string: Option<String>,
}

/// The device and inode of a file; of a block device its number, because several nodes can lead to one.
pub type FileIdentity = (u64, u64);

/// What is in the place of the device in a block device's identity: no file system has this number.
const BLOCK_DEVICE: u64 = u64::MAX;

/// Which file this is, by whatever name it was opened.
pub fn file_identity(about: &std::fs::Metadata) -> FileIdentity {
    match about.file_type().is_block_device() {
        true => device_identity(about.rdev()),
        false => (about.dev(), about.ino()),
    }
}

/// The identity of the block device of this number.
pub(crate) fn device_identity(number: u64) -> FileIdentity {
    (BLOCK_DEVICE, number)
}

/// Returns true if it is a block device's.
pub(crate) fn is_device(identity: FileIdentity) -> bool {
    identity.0 == BLOCK_DEVICE
}

/// One disk of a running domain, which its hypervisor has open.
#[async_trait]
pub trait AttachedDisk: Send + Sync {
    /// The image files that the hypervisor has open for this disk now: none in a window. They are locked by it, and their
    /// contents are its.
    async fn open_files(&self) -> Result<HashSet<FileIdentity>>;

    /// Merges layers of the open chain while the guest runs. Afterwards the hypervisor has the others' files closed, and the
    /// image above stands on the merged one.
    ///
    /// Where the last of the run is the active image and is merged down, `inside` runs at the pivot, when both show the same
    /// and the guest's writes wait: it moves the configured path.
    ///
    /// May be repeated, also after a crash in the middle: it goes on where it was.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Cancelled`], or what failed: the chain is as before.
    async fn merge(
        &self,
        merge: &AttachedMerge,
        inside: &dyn Inside,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<()>;

    /// Deletes internal snapshots of the active image. One that is not there is passed over.
    async fn drop_internal(&self, tags: &[String]) -> Result<()>;
}

/// A connection to one running domain.
#[async_trait]
pub trait LiveDomain: Send + Sync {
    /// The domain as it was when the connection was made.
    fn seen(&self) -> &Seen;

    /// The processes that have its disks open, where they are known: what they have open is nobody else's
    /// use. Empty: not known.
    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }

    /// One of its disks; absent: the running domain has none whose image is a layer of it.
    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk>;

    /// What of a recorded machine ([`Seen::machine`]) is not so now and would not survive a revert with memory: each in words.
    fn differences(&self, recorded: &serde_json::Value) -> Result<Vec<String>>;

    /// The media of a recorded machine that are not in their drives now, and can be put back before memory is loaded. What cannot
    /// be put back is one of the [`LiveDomain::differences`].
    fn media(&self, _recorded: &serde_json::Value) -> Result<Vec<Medium>> {
        Ok(Vec::new())
    }

    /// Says why memory cannot be saved through this connection, if so.
    fn cannot_save_memory(&self) -> Option<Obstacle> {
        None
    }

    /// Says why disks cannot be detached through this connection, if so: then there is no window.
    fn cannot_detach(&self) -> Option<Obstacle> {
        None
    }

    /// Lets the guest go on, whoever paused it.
    async fn resume(&self) -> Result<()>;

    /// Limits what merges move, in bytes a second; 0: as fast as they can.
    fn limit(&self, bytes_per_second: u64);

    /// Refuses a plan that cannot be carried out, as far as that is known before anything is begun: the
    /// guest's state does not permit it, or the hypervisor cannot open what it will be told to. `chains` is
    /// of all disks. With `probe`, which follows a call without it for the same plan under the same locks, the
    /// hypervisor may be asked to open images and close them again; without, nothing is changed, not even for a moment.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`], [`crate::ErrorKind::Unsupported`]: no changes made.
    async fn preflight(&self, plan: &Plan, chains: &[OpenChain], probe: bool) -> Result<()> {
        let _ = (plan, chains, probe);
        Ok(())
    }

    /// Closes what a crash left open in the hypervisor and nobody uses, so that its images can be locked:
    /// before an unfinished operation is recovered. What a device has is not touched. Does nothing where
    /// there is nothing.
    async fn tidy(&self) -> Result<()> {
        Ok(())
    }

    /// Does ahead what of a step can be done while the guest runs: for who makes the guest stand still by other means before it
    /// has the step applied. Changes nothing that others see; [`LiveDomain::undo`] takes it back, and so does
    /// [`LiveDomain::settle`].
    async fn make_ready(&self, step: &DomainStep) -> Result<()> {
        let _ = step;
        Ok(())
    }

    /// Does a step. Idempotent, also after a crash: what is done already is not done again.
    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<Facts>;

    /// Takes a step back, wherever it had got to. Idempotent.
    async fn undo(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()>;

    /// Mends what a crash left that no journal has: thaws the guest, closes what nobody uses, makes the hypervisor know images
    /// by their permanent names. Does not let a guest go on. `chains` is of all disks. Gives what it did, in words.
    async fn settle(&self, chains: &[OpenChain]) -> Result<Vec<String>>;
}

/// What is needed to start a domain from a memory image.
#[derive(Clone, Copy)]
pub struct StartFromMemory<'a> {
    /// The domain.
    pub domain: &'a Domain,
    /// The machine that was recorded with the snapshot.
    pub machine: Option<&'a serde_json::Value>,
    /// The memory image, which was checked.
    pub file: &'a Utf8Path,
    /// What its disks are.
    pub chains: &'a [OpenChain],
    /// Whether it runs then; absent: as it did at the instant.
    pub power: Option<PowerAfter>,
}

/// Why something cannot be done through a connection, and what to do instead.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Obstacle {
    /// Why.
    pub why: String,
    /// What to do.
    pub advice: String,
}

/// What a hypervisor is like: what plans, and what is said of its domains, depend on.
///
/// ```
/// use snapcore::{Hypervisor, HypervisorProfile};
///
/// let profile = HypervisorProfile::new(Hypervisor::new("fake")?, "Fake", "NAME").saves_while_running();
/// assert!(profile.saves_while_running && !profile.recreates);
/// # Ok::<(), snapcore::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct HypervisorProfile {
    /// What domains are recorded under, and what addresses begin with.
    pub name: Hypervisor,
    /// What people call it.
    pub title: String,
    /// What an address is, in one word: `SOCKET`.
    pub address: String,
    /// The key of a domain file's `[control]` that has the address.
    pub key: String,
    /// Guests have an agent that can freeze their file systems.
    pub agent: bool,
    /// A domain is started by a command line that may be given.
    pub start: bool,
    /// Memory images can be compressed.
    pub compress: bool,
    /// A domain is made from a file that may be given.
    pub config: bool,
    /// Memory is saved while the guest runs; it is paused otherwise.
    pub saves_while_running: bool,
    /// A revert of a running domain ends it and makes it again; it is reverted in place otherwise.
    pub recreates: bool,
}

impl HypervisorProfile {
    /// One that saves memory while its guests are paused, reverts in place, and has nothing that could be said but the address.
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

    /// The key of a domain file's `[control]` that has the address; otherwise the hypervisor's name is.
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

    /// A domain is started by a command line that may be given.
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

    /// A domain is made from a file that may be given.
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

    /// A revert of a running domain ends it and makes it again.
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

/// A hypervisor: finds running domains, and keeps their VM state in memory images.
#[async_trait]
pub trait VmStateSaver: Send + Sync {
    /// What it is like.
    fn profile(&self) -> HypervisorProfile;

    /// Reads where a domain is reached, as a user says it, into its one form: the same domain has the same address, however it was
    /// written. Relative paths are taken from `directory`. What is in that form already stays as it is.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Usage`] where it is no address of this hypervisor's.
    fn read_control(&self, control: Control, directory: &Utf8Path) -> Result<Control>;

    /// Connects to the domain where it runs; none where it does not. Changes nothing.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] where another program has the connection; whatever keeps it from being known.
    async fn connect(&self, domain: &Domain) -> Result<Option<Arc<dyn LiveDomain>>>;

    /// What runs at an address.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`] where nothing does.
    async fn look(&self, control: &Control) -> Result<Seen>;

    /// The domains that run on this machine and can be reached. What cannot be asked is passed over.
    async fn scan(&self) -> Result<Vec<(Control, Seen)>>;

    /// Reads a memory image and compares it with its checksums, before it is loaded. What must be unpacked for that is kept
    /// until it is loaded, or [`VmStateSaver::release_memory`]; not beyond this process.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] with the first place that is wrong; [`crate::ErrorKind::NotFound`];
    /// [`crate::ErrorKind::NoSpace`] where it cannot be unpacked.
    async fn check_memory(&self, file: &Utf8Path, progress: &dyn Progress) -> Result<()>;

    /// Lets go of what [`VmStateSaver::check_memory`] keeps of an image that is not going to be loaded.
    async fn release_memory(&self, _file: &Utf8Path) -> Result<()> {
        Ok(())
    }

    /// Starts the domain from a memory image, by the command that is configured or was recorded; where that cannot be, gives
    /// the command for the user.
    async fn start(&self, start: StartFromMemory<'_>) -> Result<Facts>;

    /// What the guest of a machine can write that no snapshot holds but in its memory: firmware variables, a TPM. Each in words.
    /// `machine` is as [`Seen::machine`]; without it what the domain's record tells is used.
    fn outside(&self, _domain: &Domain, _machine: Option<&serde_json::Value>) -> Vec<String> {
        Vec::new()
    }

    /// What the guest of a machine can write that no snapshot holds at all: directories shared with the host, devices
    /// of the host's. Each in words. As for [`VmStateSaver::outside`].
    fn shared(&self, _domain: &Domain, _machine: Option<&serde_json::Value>) -> Vec<String> {
        Vec::new()
    }

    /// Removes what a crash left beside the disks of a domain that does not run, and [`LiveDomain::tidy`] could not. Called with
    /// the domain's lock held. What is not certainly the hypervisor's own stays.
    fn tidy_at_rest(&self, domain: &Domain) {
        let _ = domain;
    }

    /// Removes a memory image, and what a crash left of one of that name. One that is not there is no error.
    async fn remove_memory(&self, file: &Utf8Path) -> Result<()>;

    /// Which of these files running domains of this hypervisor have open without a lock that others would meet, each with the
    /// domain's name.
    async fn open_without_lock(&self, files: &HashSet<FileIdentity>) -> Result<Vec<(FileIdentity, String)>> {
        let _ = files;
        Ok(Vec::new())
    }
}
