//! The contract of a hypervisor ([`VmStateSaver`] and [`LiveDomain`]), as test cases that every hypervisor
//! runs on a machine of its own.
//!
//! They are few and short: the suites with a running guest show what a revert does to disks.

use std::{collections::HashSet, process::ExitCode, sync::Arc};

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use libtest_mimic::{Arguments, Trial};
use snapcore::backend::Progress;
use snapcore::hypervisor::{
    Control, DiskInstant, DomainContext, DomainInfo, DomainStep, GuestChange, Inside, LiveDomain, MemoryPlan,
    OpenChain, OpenLayer, PowerAfter, Quiesce, StepOutcome, VmStateSaver,
};
use snapcore::{
    Disk, DiskAddress, DiskRecord, Domain, DomainName, ErrorKind, FileIdentity, LayerName, SnapshotId, Target,
};
use tokio::{runtime, sync::Mutex};
use tokio_util::sync::CancellationToken;

/// A machine of a hypervisor, which runs, with a guest that does not mind what is done to it. It lasts as
/// long as this.
pub trait TestMachine {
    /// Its hypervisor, as a process that has just begun knows it.
    fn saver(&self) -> Arc<dyn VmStateSaver>;

    /// Where it is reached, as a user would say it.
    fn control(&self) -> Control;

    /// Its disks: what each is called, its active image, which has no backing file, and the image's format.
    fn disks(&self) -> Vec<(Target, Utf8PathBuf, String)>;

    /// An address of the right form at which nothing runs.
    fn nowhere(&self) -> String;

    /// A directory for its files. Memory images are in the place that the hypervisor names for a domain whose
    /// manifests are in this directory.
    fn memory_dir(&self) -> &Utf8Path;
}

/// Runs each test case on a machine of its own: the `main` of a test program with the arguments of every Rust
/// one.
pub fn run<M: TestMachine + 'static>(make: fn() -> Result<M>) -> ExitCode {
    let cases = vec![
        case(make, "address_has_one_form", addresses),
        case(make, "absent_machine_is_not_found", nothing),
        case(make, "machine_is_found_and_scanned", found),
        case(make, "instant_undo_restores_machine", undone),
        case(make, "nested_failure_resumes_guest", failed_inside),
        case(make, "memory_is_checked_loaded_removed", memory),
        case(make, "detach_undo_returns_disks", given_up),
    ];
    libtest_mimic::run(&Arguments::from_args(), cases).exit_code()
}

fn case<M: TestMachine + 'static>(
    make: fn() -> Result<M>,
    name: &str,
    attempt: impl AsyncFn(&dyn TestMachine) -> Result<()> + Send + 'static,
) -> Trial {
    Trial::test(name, move || {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let machine = make().map_err(|error| format!("{error:#}"))?;
        runtime.block_on(attempt(&machine)).map_err(|error| format!("{error:#}").into())
    })
}

/// Counts what runs inside an instant and what is reversed there, and fails it on request.
#[derive(Default)]
struct Counted {
    runs: Mutex<u32>,
    reversals: Mutex<u32>,
    fails: bool,
}

#[async_trait]
impl Inside for Counted {
    async fn run(&self, _: Option<&Target>) -> snapcore::Result<()> {
        *self.runs.lock().await += 1;
        match self.fails {
            true => Err(snapcore::Error::new(ErrorKind::NoSpace, "an injected failure")),
            false => Ok(()),
        }
    }

    async fn back(&self, _: Option<&Target>) -> snapcore::Result<()> {
        *self.reversals.lock().await += 1;
        Ok(())
    }
}

struct Quiet;

impl Progress for Quiet {
    fn bytes(&self, _: u64, _: u64) {}
}

/// A machine, and the domain that a catalogue would have of it.
struct Fixture {
    saver: Arc<dyn VmStateSaver>,
    domain: Domain,
    chains: Vec<OpenChain>,
    targets: Vec<Target>,
}

impl Fixture {
    fn new(machine: &dyn TestMachine) -> Result<Self> {
        let saver = machine.saver();
        let control = saver.read_control(machine.control(), machine.memory_dir())?;
        let (mut disks, mut chains, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (target, path, format) in machine.disks() {
            let active = LayerName(path.file_name().context("a file's name")?.to_owned());
            let disk = Disk::new(target.clone(), &path, format.as_str());
            disks.push(DiskRecord::new(disk, active.clone()).owned(vec![active]));
            let layers = vec![OpenLayer::new(path, format)];
            chains.push(OpenChain::new(target.clone(), layers));
            targets.push(target);
        }
        let domain = Domain::new(DomainName::new("test")?, disks)
            .hypervisor(saver.profile().name)
            .control(Some(control));
        Ok(Self { saver, domain, chains, targets })
    }

    fn control(&self) -> &Control {
        self.domain.control.as_ref().unwrap_or_else(|| unreachable!("it was given one"))
    }

    async fn connect(&self) -> Result<Arc<dyn LiveDomain>> {
        self.saver.connect(&self.domain).await?.context("it runs, and connect says that it does not")
    }

    async fn seen(&self) -> Result<DomainInfo> {
        Ok(self.connect().await?.seen().clone())
    }

    async fn open_files(&self) -> Result<Vec<HashSet<FileIdentity>>> {
        let live = self.connect().await?;
        let mut all = Vec::new();
        for target in &self.targets {
            all.push(live.disk(target).with_context(|| format!("{target} is attached"))?.open_files().await?);
        }
        Ok(all)
    }

    /// Does a step by a connection of its own, as a process does that recovers.
    async fn apply(&self, step: &DomainStep, inside: &dyn Inside) -> snapcore::Result<StepOutcome> {
        let live = self.connect().await;
        let live = live.map_err(|error| snapcore::Error::new(ErrorKind::Io, format!("{error:#}")))?;
        live.apply(step, self.context(inside, &CancellationToken::new())).await
    }

    /// Undoes a step by a connection of its own. The undo of nested steps is the work nested in the undo: it
    /// is run, and not reversed.
    async fn undo(&self, step: &DomainStep) -> Result<()> {
        let inside = Counted::default();
        self.connect().await?.undo(step, self.context(&inside, &CancellationToken::new())).await?;
        let (runs, reversals) = (*inside.runs.lock().await, *inside.reversals.lock().await);
        let nests = matches!(step, DomainStep::Instant { .. });
        ensure!(reversals == 0 && (runs > 0) == nests, "nested undo: {runs} runs, {reversals} reversals");
        Ok(())
    }

    fn context<'b>(&'b self, inside: &'b dyn Inside, cancel: &'b CancellationToken) -> DomainContext<'b> {
        DomainContext::new(&self.domain, &self.chains, &Quiet, cancel).inside(inside)
    }

    /// The instant of a snapshot whose disks the backends take.
    fn instant(&self, memory: Option<&DiskAddress>) -> DomainStep {
        let live = self.saver.profile().saves_while_running;
        let plan = |image: &DiskAddress| MemoryPlan::new(image.clone(), live, 20_000);
        DomainStep::Instant {
            disks: self.targets.iter().map(|target| (target.clone(), DiskInstant::ByBackend)).collect(),
            running: true,
            memory: memory.map(plan),
            quiesce: Quiesce::No,
            quiesce_limit_ms: 10_000,
            then: None,
            for_revert: false,
        }
    }
}

async fn addresses(machine: &dyn TestMachine) -> Result<()> {
    let fixture = Fixture::new(machine)?;
    let control = fixture.control();
    let again = fixture.saver.read_control(control.clone(), "/nowhere".into())?;
    ensure!(again == *control, "{control:?} reads as {again:?}");
    let empty = fixture.saver.read_control(Control::default(), machine.memory_dir());
    ensure!(empty.is_err_and(|error| error.kind() == ErrorKind::Usage), "no address is an address");
    let profile = fixture.saver.profile();
    ensure!(
        !profile.name.is_none() && !profile.title.is_empty() && !profile.address.is_empty(),
        "{profile:?}"
    );
    ensure!(profile.keys().first() == Some(&profile.key.as_str()), "{profile:?}");
    Ok(())
}

async fn nothing(machine: &dyn TestMachine) -> Result<()> {
    let mut fixture = Fixture::new(machine)?;
    let said = Control::at(machine.nowhere());
    let control = fixture.saver.read_control(said, machine.memory_dir())?;
    let looked = fixture.saver.look(&control).await;
    ensure!(looked.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound), "{looked:?}");
    fixture.domain.control = Some(control);
    ensure!(fixture.saver.connect(&fixture.domain).await?.is_none(), "it connects to nothing");
    Ok(())
}

async fn found(machine: &dyn TestMachine) -> Result<()> {
    let fixture = Fixture::new(machine)?;
    let looked = fixture.saver.look(fixture.control()).await?;
    ensure!(looked.running, "its guest runs");
    for (target, path, _) in machine.disks() {
        let disk = looked.disks.iter().find(|disk| disk.target == target);
        let disk = disk.with_context(|| format!("{target} is a disk of it"))?;
        ensure!(
            disk.address.local() == Some(&path) && disk.guest_writes && disk.left_out.is_none(),
            "{disk:?}"
        );
    }
    let seen = fixture.seen().await?;
    ensure!(seen.machine == looked.machine, "look and connect report different machines");
    let scanned = fixture.saver.scan().await?;
    let scanned: Vec<_> = scanned.into_iter().map(|(control, _)| control.address).collect();
    let mut read = Vec::new();
    for address in &scanned {
        let said = Control::at(address.clone());
        read.push(fixture.saver.read_control(said, machine.memory_dir())?.address);
    }
    ensure!(read.contains(&fixture.control().address), "the scan finds {scanned:?}");
    let live = fixture.connect().await?;
    let differs = live.differences(&seen.machine)?;
    ensure!(differs.is_empty(), "it differs from itself: {differs:?}");
    ensure!(live.disk(&Target::new("nowhere")?).is_none(), "it has a disk that it has not");
    Ok(())
}

async fn undone(machine: &dyn TestMachine) -> Result<()> {
    let fixture = Fixture::new(machine)?;
    let before = fixture.open_files().await?;
    let step = fixture.instant(None);
    let inside = Counted::default();
    let facts = fixture.apply(&step, &inside).await?;
    ensure!(*inside.runs.lock().await == 1, "what is inside the instant runs once");
    ensure!(facts.taken.is_some_and(|taken| taken.running), "it does not report what the instant was");
    ensure!(fixture.seen().await?.running, "the guest goes on");
    for _ in 0..2 {
        fixture.undo(&step).await?;
        ensure!(fixture.seen().await?.running && fixture.open_files().await? == before, "it is as before");
    }
    Ok(())
}

async fn failed_inside(machine: &dyn TestMachine) -> Result<()> {
    let fixture = Fixture::new(machine)?;
    let step = fixture.instant(None);
    let failed = fixture.apply(&step, &Counted { fails: true, ..Counted::default() }).await;
    ensure!(failed.as_ref().is_err_and(|error| error.kind() == ErrorKind::NoSpace), "{failed:?}");
    fixture.undo(&step).await?;
    ensure!(fixture.seen().await?.running, "the guest goes on");
    Ok(())
}

async fn memory(machine: &dyn TestMachine) -> Result<()> {
    let fixture = Fixture::new(machine)?;
    let store = fixture.saver.memory_store(&fixture.domain, Some(machine.memory_dir()))?;
    let store = store.context("it has no place for memory images")?;
    let (snapshot, other) = (SnapshotId::fresh(), SnapshotId::fresh());
    let image = store.address_of(snapshot);
    ensure!(image == store.address_of(snapshot) && image != store.address_of(other), "{image} is not unique");
    ensure!(image.check().is_ok() && store.holds(&image), "{image} is not in {}", store.place());
    ensure!(!store.holds(&"/nowhere/of/another.memory".into()), "an image elsewhere is in {}", store.place());
    store.preflight().await?;
    for _ in 0..2 {
        store.prepare().await?;
    }
    ensure!(fixture.saver.memory_size(&image).await?.is_none(), "{image} exists already");
    let foreign = fixture.saver.memory_size(&"unknown-scheme:image".into()).await;
    ensure!(foreign.as_ref().is_err_and(|error| error.kind() == ErrorKind::Unsupported), "{foreign:?}");
    let missing = fixture.saver.check_memory(&image, &Quiet).await;
    ensure!(missing.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound), "{missing:?}");
    // One connection writes what was begun at the instant.
    let (live, inside, cancel) = (fixture.connect().await?, Counted::default(), CancellationToken::new());
    live.apply(&fixture.instant(Some(&image)), fixture.context(&inside, &cancel)).await?;
    let save = DomainStep::SaveMemory { image: image.clone(), tag: "test".to_owned(), compress: 0 };
    let saved = live.apply(&save, fixture.context(&inside, &cancel)).await?;
    drop(live);
    let length = fixture.saver.memory_size(&image).await?.with_context(|| format!("{image} is not there"))?;
    ensure!(saved.memory_bytes.is_some_and(|bytes| 0 < bytes && bytes <= length), "{saved:?} of {length}");
    fixture.saver.check_memory(&image, &Quiet).await?;
    fixture.saver.release_memory(&image).await?;
    if let (Some(file), Some(cut)) = (image.local(), store.address_of(other).local()) {
        std::fs::write(cut, &std::fs::read(file)?[..usize::try_from(length)? / 2])?;
        let damaged = fixture.saver.check_memory(&cut.into(), &Quiet).await;
        ensure!(damaged.as_ref().is_err_and(|error| error.kind() == ErrorKind::Corrupt), "{damaged:?}");
    }
    if !fixture.saver.profile().recreates {
        let disks = fixture.targets.clone();
        fixture.apply(&DomainStep::CheckMemory { image: image.clone() }, &Counted::default()).await?;
        let section = DomainStep::Detach { disks: disks.clone(), running: true, restart: None };
        fixture.apply(&section, &Counted::default()).await?;
        ensure!(fixture.open_files().await?.iter().all(HashSet::is_empty), "its disks are not free");
        fixture.apply(&DomainStep::Attach { disks, restart: None }, &Counted::default()).await?;
        let power = Some(PowerAfter::Running);
        let go_on = DomainStep::Continue { memory: Some(image.clone()), reset: false, power };
        let facts = fixture.apply(&go_on, &Counted::default()).await?;
        ensure!(facts.guest == Some(GuestChange::Restored), "{facts:?}");
        ensure!(fixture.seen().await?.running, "the guest goes on");
    }
    for _ in 0..2 {
        fixture.saver.remove_memory(&image).await?;
        ensure!(fixture.saver.memory_size(&image).await?.is_none(), "it was removed");
    }
    Ok(())
}

async fn given_up(machine: &dyn TestMachine) -> Result<()> {
    let fixture = Fixture::new(machine)?;
    if fixture.saver.profile().recreates {
        return Ok(());
    }
    let before = fixture.open_files().await?;
    let section = DomainStep::Detach { disks: fixture.targets.clone(), running: true, restart: None };
    for _ in 0..2 {
        fixture.apply(&section, &Counted::default()).await?;
        ensure!(fixture.open_files().await?.iter().all(HashSet::is_empty), "its disks are not free");
        ensure!(!fixture.seen().await?.running, "the guest is paused");
    }
    for _ in 0..2 {
        fixture.undo(&section).await?;
        ensure!(fixture.open_files().await? == before, "it has its disks again");
        ensure!(fixture.seen().await?.running, "the guest goes on");
    }
    Ok(())
}
