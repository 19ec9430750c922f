//! A hypervisor whose domain runs on rows of a table: it knows its disks by the names of rows, and has no
//! file open. Its memory images are rows of another table, at `ram:PLACE/SNAPSHOT`.

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use camino::Utf8Path;
use jiff::Timestamp;
use snapcore::backend::Progress;
use snapcore::hypervisor::*;
use snapcore::*;
use tokio_util::sync::CancellationToken;

use crate::fake::{Faults, When};

/// A memory image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryRow {
    /// The memory of the guest: a number.
    pub number: u64,
    /// False as long as it is being written.
    pub whole: bool,
}

/// The bytes of a memory image.
pub const MEMORY_BYTES: u64 = 4096;

/// The memory images of a machine, and the places that were made for them.
#[derive(Debug, Default)]
pub struct MemoryTable {
    pub images: BTreeMap<DiskAddress, MemoryRow>,
    pub places: Vec<String>,
    pub is_full: bool,
}

/// A hypervisor with one domain. Clones share it.
#[derive(Clone)]
pub struct RowMachine {
    disks: Vec<RowDisk>,
    running: Arc<AtomicBool>,
    /// False while the domain is off.
    exists: Arc<AtomicBool>,
    /// The memory of the guest.
    guest: Arc<AtomicU64>,
    /// Its memory images; without a table, the hypervisor saves memory in files alone.
    table: Option<Arc<Mutex<MemoryTable>>>,
    /// Counts the steps of the domain, and stops them.
    pub steps: Arc<Faults>,
    /// The name of another domain that has all images open without a lock.
    pub other_user: Option<String>,
}

#[derive(Clone)]
struct RowDisk {
    target: Target,
    address: DiskAddress,
    attached: Arc<AtomicBool>,
}

impl RowMachine {
    pub const NAME: Hypervisor = Hypervisor::named("rows");

    /// A machine whose memory images are rows.
    pub fn new(disks: &[(&str, &str)]) -> Self {
        Self { table: Some(Arc::default()), ..Self::without_table(disks) }
    }

    /// A machine whose memory images could only be files.
    pub fn without_table(disks: &[(&str, &str)]) -> Self {
        let disk = |(target, address): &(&str, &str)| RowDisk {
            target: Target::new(*target).unwrap(),
            address: DiskAddress::from(*address),
            attached: Arc::new(AtomicBool::new(true)),
        };
        Self {
            disks: disks.iter().map(disk).collect(),
            running: Arc::new(AtomicBool::new(true)),
            exists: Arc::new(AtomicBool::new(true)),
            guest: Arc::default(),
            table: None,
            steps: Arc::default(),
            other_user: None,
        }
    }

    /// The same machine without faults, as the next process of domsnap finds it.
    pub fn after_a_crash(&self) -> Self {
        Self { steps: Arc::default(), ..self.clone() }
    }

    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    pub fn is_attached(&self) -> bool {
        self.disks.iter().all(|disk| disk.attached.load(Ordering::SeqCst))
    }

    pub fn exists(&self) -> bool {
        self.exists.load(Ordering::SeqCst)
    }

    /// Ends the domain.
    pub fn end(&self) {
        self.exists.store(false, Ordering::SeqCst);
        self.guest.store(0, Ordering::SeqCst);
    }

    /// The memory of the guest.
    pub fn guest(&self) -> u64 {
        self.guest.load(Ordering::SeqCst)
    }

    /// Makes the guest write its memory.
    pub fn write(&self, number: u64) {
        self.guest.store(number, Ordering::SeqCst);
    }

    /// Its memory images.
    pub fn table(&self) -> MutexGuard<'_, MemoryTable> {
        self.table.as_ref().expect("it has a table").lock().unwrap()
    }

    fn set(&self, attached: bool) {
        self.disks.iter().for_each(|disk| disk.attached.store(attached, Ordering::SeqCst));
    }

    fn info(&self) -> DomainInfo {
        let disks = self.disks.iter().map(|disk| {
            SeenDisk::new(disk.target.clone(), disk.address.clone(), "table")
                .guest_writes(true)
                .member(Some(disk.target.clone()))
        });
        DomainInfo::new(serde_json::json!("rows"), self.is_running()).disks(disks.collect())
    }

    /// Refuses what is no address of a row.
    fn read(&self, image: &DiskAddress) -> Result<()> {
        match (&self.table, image.named()) {
            (Some(_), Some(("ram", _))) => Ok(()),
            _ => Err(Error::new(ErrorKind::Unsupported, format!("{image} is no row of memory"))),
        }
    }

    /// Reads a whole image.
    fn load(&self, image: &DiskAddress) -> Result<u64> {
        self.read(image)?;
        match self.table().images.get(image) {
            Some(row) if row.whole => Ok(row.number),
            Some(_) => Err(Error::new(ErrorKind::Corrupt, format!("{image} is not whole"))),
            None => Err(Error::new(ErrorKind::NotFound, format!("there is no row {image}"))),
        }
    }

    fn resume(&self) {
        self.running.store(true, Ordering::SeqCst);
    }
}

fn no<T>() -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, "a machine on rows cannot do this"))
}

/// A place of memory images in the table.
#[derive(Debug)]
struct RowPlace {
    table: Arc<Mutex<MemoryTable>>,
    /// `ram:NAME`.
    place: String,
}

#[async_trait]
impl MemoryStore for RowPlace {
    fn place(&self) -> &str {
        &self.place
    }

    fn directory(&self) -> Option<&Utf8Path> {
        None
    }

    fn address_of(&self, snapshot: SnapshotId) -> DiskAddress {
        format!("{}/{snapshot}", self.place).into()
    }

    fn holds(&self, image: &DiskAddress) -> bool {
        image.as_str().strip_prefix(&self.place).is_some_and(|rest| rest.starts_with('/'))
    }

    async fn preflight(&self) -> Result<()> {
        match self.table.lock().unwrap().is_full {
            true => Err(Error::new(ErrorKind::NoSpace, format!("the table of {} is full", self.place))
                .state("no changes made")),
            false => Ok(()),
        }
    }

    async fn prepare(&self) -> Result<()> {
        self.table.lock().unwrap().places.push(self.place.clone());
        Ok(())
    }
}

#[async_trait]
impl VmStateSaver for RowMachine {
    fn profile(&self) -> HypervisorProfile {
        HypervisorProfile::new(Self::NAME, "Rows", "NAME")
    }

    fn read_control(&self, control: Control, directory: &Utf8Path) -> Result<Control> {
        // The user may name a place in the table; whatever else is a directory.
        let memory_dir = control.memory_dir.as_ref().map(|named| match self.read(named) {
            Ok(()) => Ok(named.as_str().to_lowercase().into()),
            Err(_) => MemoryDirectory::read(named, directory),
        });
        let memory_dir = memory_dir.transpose()?;
        Ok(control.memory_dir(memory_dir))
    }

    async fn connect(&self, _: &Domain) -> Result<Option<Arc<dyn LiveDomain>>> {
        match self.exists() {
            true => Ok(Some(Arc::new(RowLive { info: self.info(), machine: self.clone() }))),
            false => Ok(None),
        }
    }

    async fn look(&self, _: &Control) -> Result<DomainInfo> {
        Ok(self.info())
    }

    async fn scan(&self) -> Result<Vec<(Control, DomainInfo)>> {
        Ok(Vec::new())
    }

    fn memory_store(
        &self,
        domain: &Domain,
        beside: Option<&Utf8Path>,
    ) -> Result<Option<Arc<dyn MemoryStore>>> {
        let Some(table) = &self.table else { return MemoryDirectory::of(domain, beside) };
        let named = domain.control.as_ref().and_then(|control| control.memory_dir.as_ref());
        if let Some(named) = named {
            self.read(named)?;
        }
        let place = named.map_or(format!("ram:{}", domain.name), DiskAddress::to_string);
        Ok(Some(Arc::new(RowPlace { table: table.clone(), place })))
    }

    async fn memory_size(&self, image: &DiskAddress) -> Result<Option<u64>> {
        self.read(image)?;
        Ok(self.table().images.get(image).map(|_| MEMORY_BYTES))
    }

    async fn check_memory(&self, image: &DiskAddress, _: &dyn Progress) -> Result<()> {
        self.load(image).map(drop)
    }

    async fn start(&self, start: StartFromMemory<'_>) -> Result<StepOutcome> {
        self.write(self.load(start.image)?);
        self.exists.store(true, Ordering::SeqCst);
        self.set(true);
        self.resume();
        Ok(StepOutcome::default().guest(Some(GuestChange::Started)))
    }

    async fn remove_memory(&self, image: &DiskAddress) -> Result<()> {
        self.read(image)?;
        let number = self.steps.next();
        self.steps.inject(number, When::Before).await?;
        self.table().images.remove(image);
        self.steps.inject(number, When::After).await
    }

    async fn open_without_lock(&self, images: &HashSet<DiskIdentity>) -> Result<Vec<(DiskIdentity, String)>> {
        let users = images.iter().filter_map(|image| Some((image.clone(), self.other_user.clone()?)));
        Ok(users.collect())
    }
}

struct RowLive {
    info: DomainInfo,
    machine: RowMachine,
}

impl RowLive {
    async fn step(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        let machine = &self.machine;
        let pause = || machine.running.store(false, Ordering::SeqCst);
        let mut facts = StepOutcome::default();
        match step {
            DomainStep::Instant { memory, then, .. } => {
                pause();
                if let Some(memory) = memory {
                    machine.read(&memory.image)?;
                    let row = MemoryRow { number: machine.guest(), whole: false };
                    machine.table().images.insert(memory.image.clone(), row);
                }
                context.inside.run(None).await?;
                if *then != Some(PowerAfter::Paused) {
                    machine.resume();
                }
                let consistency = if memory.is_some() { Consistency::Memory } else { Consistency::Crash };
                facts = facts.taken(Some(Taken::new(Timestamp::now(), consistency, true, "rows")));
            }
            DomainStep::SaveMemory { image, .. } => {
                match machine.table().images.get_mut(image) {
                    Some(row) => row.whole = true,
                    None => return Err(Error::new(ErrorKind::Refused, "the memory is lost")),
                }
                facts = facts.memory_bytes(Some(MEMORY_BYTES));
            }
            DomainStep::Detach { .. } => {
                pause();
                machine.set(false);
            }
            DomainStep::Attach { .. } => machine.set(true),
            // A guest that runs again has written: it keeps its memory.
            DomainStep::Continue { .. } if machine.is_running() => {}
            DomainStep::Continue { memory, reset, power } => {
                match memory {
                    Some(image) => machine.write(machine.load(image)?),
                    None if *reset => machine.write(0),
                    None => {}
                }
                if *power != Some(PowerAfter::Paused) {
                    machine.resume();
                }
                facts = facts.guest(memory.as_ref().map(|_| GuestChange::Restored));
            }
            DomainStep::ReopenByName { .. }
            | DomainStep::Media { .. }
            | DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => {}
            DomainStep::CheckMemory { .. } | DomainStep::RemoveMemory { .. } => return no(),
        }
        Ok(facts)
    }
}

#[async_trait]
impl LiveDomain for RowLive {
    fn seen(&self) -> &DomainInfo {
        &self.info
    }

    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk> {
        self.machine.disks.iter().find(|disk| disk.target == *target).map(|disk| disk as &dyn AttachedDisk)
    }

    fn differences(&self, _: &serde_json::Value) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    async fn resume(&self) -> Result<()> {
        self.machine.resume();
        Ok(())
    }

    fn limit(&self, _: u64) {}

    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        let number = self.machine.steps.next();
        self.machine.steps.inject(number, When::Before).await?;
        let facts = self.step(step, context).await?;
        self.machine.steps.inject(number, When::After).await?;
        Ok(facts)
    }

    async fn undo(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
        let machine = &self.machine;
        match step {
            DomainStep::Instant { .. } => {
                context.inside.run(None).await?;
                machine.resume();
            }
            DomainStep::SaveMemory { image, .. } => drop(machine.table().images.remove(image)),
            DomainStep::Detach { .. } => {
                machine.set(true);
                machine.resume();
            }
            DomainStep::Attach { .. } => machine.set(false),
            _ => return no(),
        }
        Ok(())
    }

    async fn clean_up(&self, _: &[OpenChain]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl AttachedDisk for RowDisk {
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        Ok(HashSet::new())
    }

    async fn has_open(&self, image: &DiskIdentity) -> Result<bool> {
        let ours = DiskIdentity::Named(self.address.to_string());
        Ok(self.attached.load(Ordering::SeqCst) && *image == ours)
    }

    async fn merge(
        &self,
        _: &AttachedMerge,
        _: &dyn Inside,
        _: &dyn Progress,
        _: &CancellationToken,
    ) -> Result<()> {
        no()
    }

    async fn drop_internal(&self, _: &[String]) -> Result<()> {
        no()
    }
}
