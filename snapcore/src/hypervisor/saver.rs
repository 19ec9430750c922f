//! A hypervisor: its properties, how its domains are reached, what it says of them, and memory images.

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use super::clone::{CloneMachines, ClonedMachines, StartClone};
use super::live::{LiveDomain, OpenChain};
use super::memory::{MemoryDirectory, MemoryStore};
use super::step::{PowerAfter, StepOutcome};
use crate::address::{DiskAddress, DiskIdentity};
use crate::backend::{DeleteCost, Progress};
use crate::domain::{Domain, Hypervisor};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Target;

/// The format of a disk that is the file of a machine's firmware variables (NVRAM).
///
/// A hypervisor reports such files among the disks of a machine ([`SeenDisk`]) with this format, and those of
/// a TPM with [`TPM_STATE`]. Their backends declare [`crate::backend::Capabilities::machine_state`].
pub const FIRMWARE_VARIABLES: &str = "nvram";

/// The format of a disk that is the file of a machine's TPM state.
pub const TPM_STATE: &str = "tpm";

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
    /// The place of memory images, for most hypervisors a directory; absent: the directory of the manifests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub memory_dir: Option<DiskAddress>,
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
    memory_dir: Option<DiskAddress>,
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
    /// Set if the running domain has another file open than the one that an image's name leads to now: it
    /// was moved, or another was put in its place. What is done by name would be done to the wrong file.
    #[serde(skip)]
    pub replaced: Option<Obstacle>,
    /// Bytes of the disk that the guest sees. Absent: unknown.
    #[serde(skip)]
    pub bytes: Option<u64>,
    /// Bytes from the beginning of its lowest image's file that the hypervisor shows, if it was opened with
    /// this limit: a part of the file. Absent: it shows the whole file, as its format requires. A backend
    /// must confirm that this part is the disk ([`crate::backend::DiskSnapshotter::require_shown`]).
    #[serde(skip)]
    pub part: Option<u64>,
}

impl SeenDisk {
    /// Makes a disk that is part of snapshots, and that the guest cannot change.
    pub fn new(target: Target, address: impl Into<DiskAddress>, format: impl Into<String>) -> Self {
        Self {
            target,
            address: address.into(),
            format: format.into(),
            if_missing: None,
            bytes: None,
            part: None,
            left_out: None,
            guest_writes: false,
            member: None,
            no_internal: None,
            replaced: None,
        }
    }
}

impl SeenDisk {
    /// The refusal of a disk of which the hypervisor shows a part of a file that no backend knows.
    pub fn only_a_part(&self) -> Error {
        Error::new(
            ErrorKind::Refused,
            format!("disk {} ({}): its node is a slice of a file (offset or size)", self.target, self.address),
        )
        .state("no changes made")
        .advise(
            "if the file is a fixed VHD, its size in QEMU must be the VHD's; or serve it to QEMU with `domsnap disk \
             serve FILE,format=vhd`",
        )
    }
}

setters!(SeenDisk {
    left_out: Option<String>,
    guest_writes: bool,
    member: Option<Target>,
    no_internal: Option<String>,
    if_missing: Option<Obstacle>,
    replaced: Option<Obstacle>,
    bytes: Option<u64>,
    part: Option<u64>,
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

/// Input for starting a domain from a memory image.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct StartFromMemory<'a> {
    /// The domain.
    pub domain: &'a Domain,
    /// The machine that was recorded with the snapshot.
    pub machine: Option<&'a serde_json::Value>,
    /// The memory image, already checked.
    pub image: &'a DiskAddress,
    /// The layers of its disks.
    pub chains: &'a [OpenChain],
    /// Power state afterwards; absent: the same as at the instant.
    pub power: Option<PowerAfter>,
}

impl<'a> StartFromMemory<'a> {
    /// Makes the input for a start to the state at the instant, on any machine.
    pub fn new(domain: &'a Domain, image: &'a DiskAddress, chains: &'a [OpenChain]) -> Self {
        Self { domain, image, chains, machine: None, power: None }
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
    /// True if its domains can take part in a group: several running domains, at one instant.
    pub groups: bool,
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
            groups: false,
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

    /// Its domains can take part in a group ([`super::Rendezvous`]).
    #[must_use]
    pub fn groups(mut self) -> Self {
        self.groups = true;
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
    /// address. Relative paths start at `directory`, that of [`Control::memory_dir`] too: whether its text
    /// has a scheme is this hypervisor's decision. A canonical address is unchanged.
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

    /// The place of a domain's memory images. If there is none (`None`), the domain has snapshots of its
    /// disks alone. `beside` is the directory of its manifests, where they are files.
    ///
    /// By default the place is a directory ([`MemoryDirectory::of`]). A hypervisor that keeps memory images
    /// elsewhere names another place. It reads all addresses that it has given to images: in the next
    /// methods, in each [`DomainStep`](super::DomainStep), and in [`StartFromMemory`].
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] if the user named a place that is none of this hypervisor.
    fn memory_store(
        &self,
        domain: &Domain,
        beside: Option<&Utf8Path>,
    ) -> Result<Option<Arc<dyn MemoryStore>>> {
        MemoryDirectory::of(domain, beside)
    }

    /// The size of a memory image as it is stored, in bytes; `None` if it does not exist. Changes nothing.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Unsupported`] for an address that this hypervisor does not read: an operation that
    /// needs the image is then refused.
    async fn memory_size(&self, image: &DiskAddress) -> Result<Option<u64>> {
        MemoryDirectory::size(image)
    }

    /// What [`VmStateSaver::remove_memory`] of an image frees; `None` if it does not exist. Changes nothing.
    ///
    /// By default an image is one file ([`MemoryDirectory::freed`]). Of an image elsewhere, the size is an
    /// estimate of it.
    ///
    /// # Errors
    /// As [`VmStateSaver::memory_size`].
    async fn memory_freed(&self, image: &DiskAddress) -> Result<Option<DeleteCost>> {
        match image.local() {
            Some(_) => MemoryDirectory::freed(image),
            None => Ok(self.memory_size(image).await?.map(|bytes| DeleteCost::new(bytes, 0))),
        }
    }

    /// Reads a memory image and compares it with its checksums, before it is loaded. A copy that must be
    /// uncompressed for that is kept until the image is loaded, or until [`VmStateSaver::release_memory`]. It
    /// does not outlive this process.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Corrupt`] with the first wrong place;
    /// [`crate::ErrorKind::NotFound`]; [`crate::ErrorKind::NoSpace`] if it cannot be
    /// uncompressed.
    async fn check_memory(&self, image: &DiskAddress, progress: &dyn Progress) -> Result<()>;

    /// Releases what [`VmStateSaver::check_memory`] keeps of an image that is not going to be loaded.
    async fn release_memory(&self, _image: &DiskAddress) -> Result<()> {
        Ok(())
    }

    /// Refuses a start from memory that is known to fail, before an operation that ends with one begins.
    /// `machine` is the one that was recorded with the snapshot. Changes nothing.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`], with the obstacle.
    async fn may_start(&self, _domain: &Domain, _machine: Option<&serde_json::Value>) -> Result<()> {
        Ok(())
    }

    /// Starts the domain from a memory image, by the configured or recorded command. If that is impossible,
    /// returns the command for the user.
    async fn start(&self, start: StartFromMemory<'_>) -> Result<StepOutcome>;

    /// Plans the machines of clones with memory: how each is reached, and its own record, which names its own
    /// disks, sockets and command. Changes nothing.
    ///
    /// By default clones with memory are refused.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] or [`crate::ErrorKind::Unsupported`], naming the part of the machine
    /// that cannot be in a clone; [`crate::ErrorKind::NoSpace`].
    async fn plan_clone(&self, clone: CloneMachines<'_>) -> Result<ClonedMachines> {
        let domain = &clone.domain.name;
        Err(no_clones(format!("the hypervisor of domain {domain} makes no clones with memory")))
    }

    /// Gives each clone the memory of `image`, under its own address: further names, or copies. With `shares`
    /// ([`ClonedMachines::shares`]) it is prepared so that their guests share what none of them writes.
    /// Returns notes.
    ///
    /// No file that a clone uses is changed, then or later: [`VmStateSaver::remove_memory`] of the snapshot
    /// or of another clone takes names away. The new names are durable when this returns. It may be repeated
    /// after a crash; [`VmStateSaver::remove_memory`] of each address takes it back.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NoSpace`], [`crate::ErrorKind::Corrupt`] and others.
    async fn clone_memory(
        &self,
        image: &DiskAddress,
        clones: &[DiskAddress],
        shares: bool,
    ) -> Result<Vec<String>> {
        let _ = (clones, shares);
        Err(no_clones(format!("the memory image {image} cannot be cloned")))
    }

    /// Starts a clone with memory, after its registration.
    ///
    /// # Errors
    /// Any failure. No process is left then, and the clone is as at its registration, except that its guest
    /// may have run: a revert to its snapshot takes that back.
    async fn start_clone(&self, start: StartClone<'_>) -> Result<StepOutcome> {
        Err(no_clones(format!("the hypervisor of domain {} starts no clones", start.domain.name)))
    }

    /// Ends what an interrupted [`VmStateSaver::start`] or [`VmStateSaver::start_clone`] of a killed process
    /// has left of the domain: a process that waits for its memory, or one that was not handed over yet. A
    /// domain whose guest may have written to its disks by a [`VmStateSaver::start`] is left running.
    /// Returns a message if something was done. The caller has the domain's lock, and is not connected yet.
    ///
    /// A process that another program started is never ended.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`] if another process starts the domain at this moment; a process that
    /// does not end.
    async fn end_interrupted_start(&self, _domain: &Domain) -> Result<Option<String>> {
        Ok(None)
    }

    /// Returns whether the guest of a domain, which is off now, may have run after a
    /// [`DomainStep::Continue`](super::DomainStep::Continue) with memory that was interrupted; `None` if
    /// nothing is known of that. If it ran, its disks are newer than the memory.
    async fn may_have_run_since(&self, _domain: &Domain) -> Result<Option<bool>> {
        Ok(None)
    }

    /// Returns a machine's record ([`DomainInfo::machine`]) fit for display: without its secrets, such as
    /// passwords on a recorded command line.
    fn shown_machine(&self, machine: &serde_json::Value) -> serde_json::Value {
        machine.clone()
    }

    /// Returns a command that starts a domain fit for display: without its secrets.
    fn shown_command(&self, command: &[String]) -> Vec<String> {
        command.to_vec()
    }

    /// Returns what may be recorded of a machine's record that a manifest has. A manifest is data of whoever
    /// owns its directory. If it is not `trusted`, nothing may be kept that this hypervisor would run: a
    /// program, a command line, an environment. Without this method, nothing of such a record is.
    fn kept_machine(&self, machine: &serde_json::Value, trusted: bool) -> serde_json::Value {
        if trusted { machine.clone() } else { serde_json::Value::Null }
    }

    /// Lists state that the guest of a machine can write and that a snapshot contains only in its memory, as
    /// text: firmware variables, a TPM. `machine` is as [`DomainInfo::machine`]; without it the domain's
    /// record is used. What is among the disks of `domain`, with the format [`FIRMWARE_VARIABLES`] or
    /// [`TPM_STATE`], is in snapshots, and is not listed.
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
    async fn remove_memory(&self, image: &DiskAddress) -> Result<()>;

    /// Lists which of these images running domains of this hypervisor have open without a lock that others
    /// would meet, each with the domain's name. They are known by the identities that their backends give
    /// ([`crate::backend::DiskSnapshotter::identity`]).
    async fn open_without_lock(&self, images: &HashSet<DiskIdentity>) -> Result<Vec<(DiskIdentity, String)>> {
        let _ = images;
        Ok(Vec::new())
    }
}

fn no_clones(message: String) -> Error {
    Error::new(ErrorKind::Unsupported, message)
        .state("no changes made")
        .advise("clone the disks alone with --disk-only: the clone then starts as after a power failure")
}
