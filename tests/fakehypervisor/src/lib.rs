//! A hypervisor of files: a stand-in, to show what it takes to add one, and that nothing else need know of
//! it.
//!
//! A machine is a file `NAME.json` in a directory: its guest's memory is a number, and its disks are files
//! that it "has open". It is reached as `fake:NAME`. A memory image is a file of the number and its
//! complement.

use std::{collections::HashSet, fs, io, sync::Arc};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snapcore::backend::Progress;
use snapcore::hypervisor::{
    AttachedDisk, AttachedMerge, Control, DiskInstant, DomainContext, DomainInfo, DomainStep, GuestChange,
    HypervisorProfile, Inside, LiveDomain, MemoryDirectory, OpenChain, PowerAfter, SeenDisk, StartFromMemory,
    StepOutcome, Taken, VmStateSaver,
};
use snapcore::{
    Consistency, DiskAddress, Domain, Error, ErrorKind, FileIdentity, Hypervisor, Result, Target,
    file_identity,
};
use tokio_util::sync::CancellationToken;

/// What its domains are recorded under.
pub const NAME: Hypervisor = Hypervisor::named("fake");

/// A machine, as its file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FakeMachine {
    /// Whether its guest runs.
    pub running: bool,
    /// What its guest's memory holds.
    pub memory: u64,
    /// Its disks.
    pub disks: Vec<FakeDisk>,
    /// A section is open; and whether the guest ran before it.
    #[serde(default)]
    pub section: Option<bool>,
}

/// A disk of a machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FakeDisk {
    /// What it is called.
    pub target: Target,
    /// The files that it has open, the active image first; none while it is detached.
    pub open: Vec<Utf8PathBuf>,
    /// The format of its image.
    pub format: String,
}

/// The machines of a directory.
#[derive(Debug, Clone)]
pub struct Fake {
    machines: Utf8PathBuf,
}

impl Fake {
    /// The machines of this directory.
    pub fn new(machines: impl Into<Utf8PathBuf>) -> Self {
        Self { machines: machines.into() }
    }

    /// The machine of this name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], or what keeps its file from being read.
    pub fn machine(&self, name: &str) -> Result<FakeMachine> {
        let file = self.file(name);
        let text = fs::read_to_string(&file).map_err(|cause| {
            let kind = match cause.kind() {
                io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            };
            Error::new(kind, format!("no machine {name} runs")).because(cause)
        })?;
        serde_json::from_str(&text)
            .map_err(|cause| Error::new(ErrorKind::Corrupt, format!("{file} is no machine")).because(cause))
    }

    /// Makes the machine of this name be so.
    ///
    /// # Errors
    /// Where its file cannot be written.
    pub fn put(&self, name: &str, machine: &FakeMachine) -> Result<()> {
        let text = serde_json::to_string(machine)
            .map_err(|cause| Error::new(ErrorKind::Internal, "a machine cannot be written").because(cause))?;
        write_whole(&self.file(name), text.as_bytes())
    }

    fn file(&self, name: &str) -> Utf8PathBuf {
        self.machines.join(format!("{name}.json"))
    }

    fn live(&self, name: &str) -> Result<Option<Live>> {
        match self.machine(name) {
            Ok(machine) => Ok(Some(Live::of(self.clone(), name.to_owned(), &machine))),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
}

/// Writes a file under another name, flushes it, and gives it its own: it is whole, or it is not there.
fn write_whole(file: &Utf8Path, bytes: &[u8]) -> Result<()> {
    let failed = |cause| Error::new(ErrorKind::Io, format!("{file} cannot be written")).because(cause);
    let draft = Utf8PathBuf::from(format!("{file}.new"));
    fs::write(&draft, bytes).map_err(failed)?;
    fs::File::open(&draft).and_then(|draft| draft.sync_all()).map_err(failed)?;
    fs::rename(&draft, file).map_err(failed)?;
    let directory = file.parent().unwrap_or(Utf8Path::new("/"));
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

/// Reads a memory image.
fn read_memory(image: &DiskAddress) -> Result<u64> {
    let file = image.require_path()?;
    let bytes = fs::read(file).map_err(|cause| {
        let kind = match cause.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            _ => ErrorKind::Io,
        };
        Error::new(kind, format!("the memory image {file} cannot be read")).because(cause)
    })?;
    let halves = bytes.split_at_checked(8).map(|(number, check)| {
        (number.try_into().map(u64::from_le_bytes), check.try_into().map(u64::from_le_bytes))
    });
    match halves {
        Some((Ok(number), Ok(check))) if number == !check => Ok(number),
        _ => Err(Error::new(ErrorKind::Corrupt, format!("{file} is not a whole memory image"))),
    }
}

fn remove_memory(image: &DiskAddress) -> Result<()> {
    let file = image.require_path()?;
    match fs::remove_file(file) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            Err(Error::new(ErrorKind::Io, format!("the memory image {file} cannot be removed"))
                .because(cause))
        }
        _ => Ok(()),
    }
}

fn seen(name: &str, machine: &FakeMachine) -> DomainInfo {
    let disks = machine.disks.iter().map(|disk| {
        SeenDisk::new(
            disk.target.clone(),
            disk.open.first().cloned().unwrap_or_default(),
            disk.format.clone(),
        )
        .guest_writes(true)
        .member(Some(disk.target.clone()))
    });
    DomainInfo::new(serde_json::json!({ "fake": name }), machine.running)
        .name(Some(name.to_owned()))
        .summary(format!("a fake machine with {} disks", machine.disks.len()))
        .disks(disks.collect())
}

#[async_trait]
impl VmStateSaver for Fake {
    fn profile(&self) -> HypervisorProfile {
        HypervisorProfile::new(NAME, "Fake", "NAME")
    }

    fn read_control(&self, control: Control, directory: &Utf8Path) -> Result<Control> {
        let name = &control.address;
        if name.is_empty() || name.contains('/') || name.starts_with('.') {
            return Err(Error::new(ErrorKind::Usage, format!("{name:?} is not the name of a fake machine")));
        }
        let memory_dir = control.memory_dir.as_ref();
        let memory_dir = memory_dir.map(|named| MemoryDirectory::read(named, directory)).transpose()?;
        Ok(control.memory_dir(memory_dir))
    }

    async fn connect(&self, domain: &Domain) -> Result<Option<Arc<dyn LiveDomain>>> {
        let Some(control) = &domain.control else { return Ok(None) };
        Ok(self.live(&control.address)?.map(|live| Arc::new(live) as Arc<dyn LiveDomain>))
    }

    async fn look(&self, control: &Control) -> Result<DomainInfo> {
        Ok(seen(&control.address, &self.machine(&control.address)?))
    }

    async fn scan(&self) -> Result<Vec<(Control, DomainInfo)>> {
        let mut found = Vec::new();
        let Ok(files) = self.machines.read_dir_utf8() else { return Ok(found) };
        for name in
            files.flatten().filter_map(|file| Some(file.file_name().strip_suffix(".json")?.to_owned()))
        {
            let Ok(machine) = self.machine(&name) else { continue };
            let seen = seen(&name, &machine);
            found.push((Control::at(name), seen));
        }
        Ok(found)
    }

    async fn check_memory(&self, image: &DiskAddress, _: &dyn Progress) -> Result<()> {
        read_memory(image).map(drop)
    }

    async fn start(&self, start: StartFromMemory<'_>) -> Result<StepOutcome> {
        let name = &start.domain.name;
        Err(Error::new(ErrorKind::Unsupported, format!("fake machines are not started; {name} is off")))
    }

    async fn remove_memory(&self, image: &DiskAddress) -> Result<()> {
        remove_memory(image)
    }
}

/// A connection to a machine.
#[derive(Debug)]
struct Live {
    fake: Fake,
    name: String,
    seen: DomainInfo,
    disks: Vec<Attached>,
}

/// A disk of a machine that is connected to.
#[derive(Debug)]
struct Attached {
    fake: Fake,
    name: String,
    target: Target,
}

impl Live {
    fn of(fake: Fake, name: String, machine: &FakeMachine) -> Self {
        let disks = machine.disks.iter().map(|disk| Attached {
            fake: fake.clone(),
            name: name.clone(),
            target: disk.target.clone(),
        });
        Self { seen: seen(&name, machine), disks: disks.collect(), fake, name }
    }

    fn change(&self, change: impl FnOnce(&mut FakeMachine)) -> Result<()> {
        let mut machine = self.fake.machine(&self.name)?;
        change(&mut machine);
        self.fake.put(&self.name, &machine)
    }

    /// Gives disks what their paths name.
    fn attach(&self, targets: &[Target], chains: &[OpenChain]) -> Result<()> {
        self.change(|machine| {
            for disk in machine.disks.iter_mut().filter(|disk| targets.contains(&disk.target)) {
                if let Some(chain) = chains.iter().find(|chain| chain.target == disk.target) {
                    disk.open = chain.layers.iter().map(|layer| layer.address.path().to_owned()).collect();
                }
            }
        })
    }

    fn detach(&self, targets: &[Target]) -> Result<()> {
        self.change(|machine| {
            machine.section = machine.section.or(Some(machine.running));
            machine.running = false;
            for disk in machine.disks.iter_mut().filter(|disk| targets.contains(&disk.target)) {
                disk.open.clear();
            }
        })
    }

    async fn take(&self, step: &DomainStep, inside: &dyn Inside) -> Result<StepOutcome> {
        let DomainStep::Instant { disks, running, memory, then, .. } = step else {
            return Err(Error::new(ErrorKind::Internal, "this step is no instant"));
        };
        let of_our_own = disks.iter().find(|(_, instant)| !matches!(instant, DiskInstant::ByBackend));
        if let Some((target, instant)) = of_our_own {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{target}: a fake machine cannot take {instant:?}"),
            ));
        }
        self.change(|machine| machine.running = false)?;
        let taken = inside.run(None).await;
        let number = self.fake.machine(&self.name)?.memory;
        if let (Ok(()), Some(memory)) = (&taken, memory) {
            let mut bytes = number.to_le_bytes().to_vec();
            bytes.extend((!number).to_le_bytes());
            write_whole(memory.image.require_path()?, &bytes)?;
        }
        let goes_on = match then {
            Some(power) if taken.is_ok() => *power == PowerAfter::Running,
            _ => *running,
        };
        self.change(|machine| machine.running = goes_on)?;
        taken?;
        let consistency = if memory.is_some() { Consistency::Memory } else { Consistency::Crash };
        let method = "fake".to_owned();
        Ok(StepOutcome::default().taken(Some(Taken::new(Timestamp::now(), consistency, *running, method))))
    }
}

#[async_trait]
impl LiveDomain for Live {
    fn seen(&self) -> &DomainInfo {
        &self.seen
    }

    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk> {
        self.disks.iter().find(|disk| disk.target == *target).map(|disk| disk as &dyn AttachedDisk)
    }

    fn differences(&self, recorded: &serde_json::Value) -> Result<Vec<String>> {
        Ok(if *recorded == self.seen.machine { Vec::new() } else { vec!["it is another machine".to_owned()] })
    }

    async fn resume(&self) -> Result<()> {
        self.change(|machine| machine.running = true)
    }

    fn limit(&self, _: u64) {}

    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        let mut facts = StepOutcome::default();
        match step {
            DomainStep::CheckMemory { image } => read_memory(image).map(drop)?,
            DomainStep::Instant { .. } => return self.take(step, context.inside).await,
            DomainStep::SaveMemory { image, .. } => {
                read_memory(image)?;
                facts.memory_bytes = Some(16);
            }
            DomainStep::ReopenByName { disks } => self.attach(disks, context.chains)?,
            DomainStep::Detach { disks, .. } => self.detach(disks)?,
            DomainStep::Attach { disks, .. } => self.attach(disks, context.chains)?,
            DomainStep::Continue { power: Some(PowerAfter::Off), .. } => {
                fs::remove_file(self.fake.file(&self.name)).map_err(|cause| {
                    Error::new(ErrorKind::Io, "the machine cannot be ended").because(cause)
                })?;
                facts.guest = Some(GuestChange::Ended);
            }
            DomainStep::Continue { memory, reset, power } => {
                let loaded = memory.as_ref().map(read_memory).transpose()?;
                self.change(|machine| {
                    // A guest that goes on already has written: it keeps its memory.
                    let Some(ran) = machine.section.take() else { return };
                    machine.memory = loaded.unwrap_or(if *reset { 0 } else { machine.memory });
                    machine.running = power.map_or(ran, |power| power == PowerAfter::Running);
                    facts.guest = match (loaded, reset) {
                        (Some(_), _) => Some(GuestChange::Restored),
                        (None, true) => Some(GuestChange::Reset),
                        (None, false) => None,
                    };
                })?;
            }
            DomainStep::RemoveMemory { image } => remove_memory(image)?,
            DomainStep::Media { .. }
            | DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => {}
        }
        Ok(facts)
    }

    async fn undo(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
        match step {
            DomainStep::Instant { running, memory, .. } => {
                // In an undo the nested work is the undo of the nested steps.
                context.inside.run(None).await?;
                if let Some(memory) = memory {
                    remove_memory(&memory.image)?;
                }
                self.change(|machine| machine.running = *running)
            }
            DomainStep::SaveMemory { image, .. } => remove_memory(image),
            DomainStep::Detach { disks, running, .. } => {
                self.attach(disks, context.chains)?;
                self.change(|machine| {
                    machine.section = None;
                    machine.running = *running;
                })
            }
            DomainStep::Attach { disks, .. } => self.detach(disks),
            DomainStep::CheckMemory { .. }
            | DomainStep::ReopenByName { .. }
            | DomainStep::Media { .. }
            | DomainStep::Continue { .. }
            | DomainStep::RemoveMemory { .. }
            | DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => Ok(()),
        }
    }

    async fn clean_up(&self, _: &[OpenChain]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl AttachedDisk for Attached {
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        let machine = self.fake.machine(&self.name)?;
        let disk = machine.disks.iter().find(|disk| disk.target == self.target);
        let files = disk.into_iter().flat_map(|disk| &disk.open);
        Ok(files.filter_map(|file| file.metadata().ok()).map(|about| file_identity(&about)).collect())
    }

    async fn merge(
        &self,
        _: &AttachedMerge,
        _: &dyn Inside,
        _: &dyn Progress,
        _: &CancellationToken,
    ) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "a fake machine merges nothing"))
    }

    async fn drop_internal(&self, _: &[String]) -> Result<()> {
        Err(Error::new(ErrorKind::Unsupported, "a fake machine has no internal snapshots"))
    }
}
