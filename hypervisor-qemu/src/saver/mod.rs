//! The hypervisor driver for QEMU that [`snapcore`] asks for.
//!
//! | module | subject |
//! |---|---|
//! | `live` | [`snapcore::hypervisor::LiveDomain`]: a connection, and the place where each step is done |
//! | `disk`, `merge` | [`snapcore::hypervisor::AttachedDisk`]: the device of a disk, its open images; merges |
//! | `cut` | the cut, and the memory that is written after it |
//! | `reopen` | frozen images reopened by their permanent names |
//! | `section` | detached sections: disks closed and reopened under a paused guest |
//! | `mark` | the mark in QEMU that a detached section is open |
//! | `served` | the same of disks that a server of ours serves to QEMU |
//! | `preflight` | obstacles to a plan, found before it is begun |
//! | `describe` | the description of a domain, and the part of it that is recorded |
//! | `clones` | clones with memory: their plan, their memory images, their start |
//! | `start`, `scan` | a QEMU started from a memory image; all QEMUs that run here |
//! | `starting` | a QEMU between its start and the moment in which it is handed over; its end after a crash |
//! | `state` | the files of firmware variables and of TPMs, of which snapshots have copies |
//! | `fresh` | a fresh generation ID in the command that starts a QEMU |
//! | `unpacked` | compressed memory images between their check and their use |
//! | `secrets` | what is recorded of a process, and what of it is shown |
//! | `address` | canonical addresses of monitors |
//! | `error` | conversion of this crate's errors to the engine's |
//!
//! # After a crash
//!
//! Nothing here stores state that an engine could lose: the progress of a step is read from QEMU. A disk is
//! recognised by its files, and a detached one by its placeholder's name, which is derived from the disk's.
//! The name of a merge's job is derived from the merge's files. An open detached section is recognised by a
//! mark: an unused node that lives as long as the section can, until QEMU ends.

mod address;
mod clones;
mod cut;
mod describe;
mod disk;
mod error;
mod fresh;
mod live;
mod mark;
mod media;
mod merge;
mod preflight;
mod reopen;
mod room;
mod scan;
pub(crate) mod secrets;
mod section;
mod served;
mod start;
mod starting;
mod state;
mod unpacked;

use std::{
    collections::HashMap,
    error::Error as _,
    io,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::Duration,
};

use async_trait::async_trait;
use camino::Utf8Path;
use qmp::{Options, Qmp};
use snapcore::backend::{DeleteCost, Progress};
use snapcore::hypervisor::{
    CloneMachines, ClonedMachines, Control, DomainInfo, HypervisorProfile, LiveDomain, StartClone,
    StartFromMemory, StepOutcome, VmStateSaver,
};
use snapcore::{DiskAddress, Domain, Error, ErrorKind, Hypervisor, Registry, Result};
use tokio::time::timeout;

use crate::{
    discover::{Discovery, Process, shared_by},
    machine::Machine,
    memory::Draft,
};
use error::blocking;
pub(crate) use error::to_engine;
use live::QemuDomain;
use unpacked::Unpacked;

/// Time limit for QEMU's greeting: a QEMU that serves another client sends none, nor does one that hangs.
const GREETING: Duration = Duration::from_secs(5);

/// QEMU, over QMP. Clones share their connections: a QEMU serves one client of a socket at a time.
#[derive(Debug, Clone, Default)]
pub struct Qemu {
    /// By socket, as long as a user of them exists.
    connections: Arc<Mutex<HashMap<PathBuf, Weak<Connection>>>>,
    unpacked: Unpacked,
    /// The QEMUs that it reaches serve the disks of another hypervisor's domains.
    disks_only: bool,
}

/// A connection that is closed when its last user drops it.
#[derive(Debug)]
struct Connection(Machine);

impl Qemu {
    /// Makes a driver without connections.
    pub fn new() -> Self {
        Self::default()
    }

    /// Makes a driver of QEMUs that serve the disks of another hypervisor's domains, for that hypervisor: the
    /// guest's memory is not theirs. Every other driver refuses them.
    #[must_use]
    pub fn disks_only() -> Self {
        Self { disks_only: true, ..Self::default() }
    }

    /// Adds to another hypervisor's `record` what shows the abilities of the QEMU that serves its disks. Who
    /// connects with a domain that has such a record does not ask for them again: an answer of some 300 KiB.
    ///
    /// It must not be kept of a record that is not trusted: how memory is saved depends on it.
    pub fn add_program(qemu: &DomainInfo, record: &mut serde_json::Value) {
        if let Some(fields) = record.as_object_mut() {
            fields.insert(live::PROGRAM.to_owned(), live::program_record(&qemu.machine));
        }
    }

    /// Removes what [`Qemu::add_program`] adds.
    pub fn remove_program(record: &mut serde_json::Value) {
        if let Some(fields) = record.as_object_mut() {
            fields.remove(live::PROGRAM);
        }
    }

    /// Connects to the QEMU at a socket, or returns the existing connection if it is still open. `None` if no
    /// QEMU is listening.
    async fn reach(&self, socket: &Path, greeting: Duration) -> Result<Option<Arc<Connection>>> {
        let known = self.connections().get(socket).and_then(Weak::upgrade);
        if let Some(known) = known
            && timeout(Duration::ZERO, known.0.qmp().closed()).await.is_err()
        {
            return Ok(Some(known));
        }
        let Some(machine) = reach(socket, greeting).await? else { return Ok(None) };
        // A snapshot through such a QEMU would hold no memory, and a revert would go on without Xen's half.
        if !self.disks_only
            && let Some(domid) = Process::read(&machine).option("-xen-domid")
        {
            let what = format!(
                "the QEMU at {} serves disks of Xen's domain {domid}, whose memory Xen has",
                socket.display()
            );
            return Err(Error::new(ErrorKind::Refused, what)
                .advise("name the domain as Xen does, xen:NAME; `xl list` shows the names"));
        }
        let connection = Arc::new(Connection(machine));
        let mut connections = self.connections();
        connections.retain(|_, known| known.strong_count() > 0);
        connections.insert(socket.to_owned(), Arc::downgrade(&connection));
        Ok(Some(connection))
    }

    fn connections(&self) -> MutexGuard<'_, HashMap<PathBuf, Weak<Connection>>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The name under which domains that QEMU runs are recorded.
pub const NAME: Hypervisor = Hypervisor::named("qemu");

/// Registers QEMU with a program.
pub fn register(registry: &mut Registry) {
    registry.register_hypervisor(Arc::new(Qemu::new()));
}

/// Connects to the QEMU at a socket; `None` if no QEMU is listening.
async fn reach(socket: &Path, greeting: Duration) -> Result<Option<Machine>> {
    let mut options = Options::default();
    options.connect_deadline = greeting;
    let error = match Qmp::connect_with(socket, options).await {
        Ok(qmp) => return Ok(Some(Machine::new(qmp))),
        Err(error) => error,
    };
    let io = error.source().and_then(|source| source.downcast_ref::<io::Error>()).map(io::Error::kind);
    let kind = match (error.kind(), io) {
        (
            qmp::ErrorKind::Connect,
            Some(io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory),
        ) => return Ok(None),
        (qmp::ErrorKind::Connect, Some(io::ErrorKind::WouldBlock)) | (qmp::ErrorKind::Timeout, _) => {
            ErrorKind::Busy
        }
        (qmp::ErrorKind::Invalid, _) => ErrorKind::Usage,
        _ => ErrorKind::Io,
    };
    Err(Error::new(kind, error.to_string())
        .context(format!("connecting to the QEMU at {}", socket.display())))
}

#[async_trait]
impl VmStateSaver for Qemu {
    fn profile(&self) -> HypervisorProfile {
        let profile = HypervisorProfile::new(NAME, "QEMU", "SOCKET").key("qmp");
        profile.agent().start().compress().saves_while_running().groups()
    }

    fn read_control(&self, control: Control, directory: &Utf8Path) -> Result<Control> {
        address::read(control, directory)
    }

    async fn connect(&self, domain: &Domain) -> Result<Option<Arc<dyn LiveDomain>>> {
        let Some(control) = &domain.control else { return Ok(None) };
        let connection = self.reach(Path::new(&control.address), GREETING).await?;
        let Some(connection) = connection else { return Ok(None) };
        let live = QemuDomain::new(connection, domain, control, self.unpacked.clone()).await;
        let live =
            live.map_err(|error| to_engine(error).context(format!("looking at domain {}", domain.name)))?;
        Ok(Some(Arc::new(live)))
    }

    async fn look(&self, control: &Control) -> Result<DomainInfo> {
        let socket = Path::new(&control.address);
        let Some(connection) = self.reach(socket, GREETING).await? else {
            if socket.metadata().is_ok_and(|about| !about.file_type().is_socket()) {
                return Err(Error::new(ErrorKind::NotFound, format!("{} is not a socket", control.address))
                    .advise("give the path of QEMU's QMP socket (-qmp unix:PATH,server=on,wait=off)"));
            }
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("no QEMU is listening on {}", control.address),
            )
            .advise(
                "start the domain with a QMP socket (-qmp unix:PATH,server=on,wait=off), or check the path",
            ));
        };
        describe::look(&connection.0).await.map_err(to_engine)
    }

    async fn scan(&self) -> Result<Vec<(Control, DomainInfo)>> {
        scan::scan(self).await
    }

    async fn check_memory(&self, image: &DiskAddress, progress: &dyn Progress) -> Result<()> {
        self.unpacked.check(image.require_path()?, progress).await
    }

    async fn release_memory(&self, image: &DiskAddress) -> Result<()> {
        self.unpacked.release(image.require_path()?);
        Ok(())
    }

    async fn may_start(&self, domain: &Domain, machine: Option<&serde_json::Value>) -> Result<()> {
        start::may_start(domain, machine)
    }

    async fn start(&self, start: StartFromMemory<'_>) -> Result<StepOutcome> {
        start::start(start, &self.unpacked).await
    }

    async fn plan_clone(&self, clone: CloneMachines<'_>) -> Result<ClonedMachines> {
        clones::plan(clone).await
    }

    async fn clone_memory(
        &self,
        image: &DiskAddress,
        clones: &[DiskAddress],
        shares: bool,
    ) -> Result<Vec<String>> {
        clones::give_memory(&self.unpacked, image, clones, shares).await
    }

    async fn start_clone(&self, start: StartClone<'_>) -> Result<StepOutcome> {
        clones::start(start, &self.unpacked).await
    }

    async fn may_have_run_since(&self, domain: &Domain) -> Result<Option<bool>> {
        let Some(control) = &domain.control else { return Ok(None) };
        let address = PathBuf::from(&control.address);
        blocking(move || starting::Starting::may_have_run_in_place(&address)).await
    }

    async fn end_interrupted_start(&self, domain: &Domain) -> Result<Option<String>> {
        match &domain.control {
            Some(control) => starting::recover(Path::new(&control.address)).await,
            None => Ok(None),
        }
    }

    fn shown_machine(&self, machine: &serde_json::Value) -> serde_json::Value {
        secrets::shown_record(machine)
    }

    fn shown_command(&self, command: &[String]) -> Vec<String> {
        command.iter().map(|word| secrets::shown_word(word)).collect()
    }

    fn kept_machine(&self, machine: &serde_json::Value, trusted: bool) -> serde_json::Value {
        secrets::kept_record(machine, trusted)
    }

    fn outside(&self, domain: &Domain, machine: Option<&serde_json::Value>) -> Vec<String> {
        let machine = machine.or_else(|| domain.machines.last().map(|machine| &machine.record));
        let start = domain.control.as_ref().map(|control| control.start.as_slice()).unwrap_or_default();
        let taken: Vec<&str> = domain.disks.iter().map(|record| record.disk.format.as_str()).collect();
        describe::outside(machine.and_then(|machine| recorded(machine).ok()).as_ref(), start, &taken)
    }

    fn shared(&self, domain: &Domain, machine: Option<&serde_json::Value>) -> Vec<String> {
        let machine = machine.or_else(|| domain.machines.last().map(|machine| &machine.record));
        match machine.and_then(|machine| recorded(machine).ok()) {
            Some(machine) => machine.shared,
            None => {
                domain.control.as_ref().map(|control| shared_by(&control.start).nowhere).unwrap_or_default()
            }
        }
    }

    fn tidy_at_rest(&self, domain: &Domain) {
        preflight::remove_left(domain.disks.iter().map(|record| record.disk.path().as_std_path()));
    }

    async fn memory_freed(&self, image: &DiskAddress) -> Result<Option<DeleteCost>> {
        clones::freed_by_removing(image)
    }

    async fn remove_memory(&self, image: &DiskAddress) -> Result<()> {
        self.unpacked.release(image.require_path()?);
        remove_memory(image).await
    }
}

async fn remove_memory(image: &DiskAddress) -> Result<()> {
    let path = image.require_path()?.to_owned();
    blocking(move || remove_image(path.as_std_path())).await
}

/// Removes a memory image and a draft of that name; the directory is flushed when this returns.
fn remove_image(file: &Path) -> crate::Result<()> {
    let attempted = "removing a memory image";
    if file.parent().is_some_and(|directory| !directory.exists()) {
        return Ok(());
    }
    // What was made of it first: nothing names it without the image.
    clones::remove_parts(file)?;
    Draft::remove_stale(file)?;
    confined_files::remove(file).map_err(|error| crate::Error::io(attempted, file, error))?;
    match confined_files::sync_directory_of(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(crate::Error::io(attempted, file, error))
        }
        _ => Ok(()),
    }
}

pub(crate) use fresh::generation_id as fresh_generation_id;
pub(crate) use start::{Spawned, Surroundings};

/// Parses a machine that was recorded with a snapshot.
fn recorded(record: &serde_json::Value) -> Result<Discovery> {
    serde_json::from_value(record.clone()).map_err(|error| {
        Error::new(ErrorKind::Corrupt, "the recorded machine cannot be read").because(error).advise(
            "a later domsnap may have written it; the snapshot's disks can be used without its memory",
        )
    })
}
