//! The contract of a hypervisor ([`VmStateSaver`] and [`LiveDomain`]), as trials that every hypervisor runs on a machine of its.
//!
//! They are few and short: what a revert does to disks is shown by the suites of a running guest.

use std::{collections::HashSet, process::ExitCode, sync::Arc};

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use libtest_mimic::{Arguments, Trial};
use snapcore::{
    ActivePath, ChainFile, Control, Disk, DiskInstant, DiskRecord, Domain, DomainContext, DomainName,
    DomainStep, ErrorKind, Facts, FileIdentity, GuestChange, Inside, LayerName, LiveDomain, MemoryPlan,
    OpenChain, PowerAfter, Progress, Quiesce, Seen, Target, VmStateSaver,
};
use tokio::{runtime, sync::Mutex};
use tokio_util::sync::CancellationToken;

/// A machine of a hypervisor, which runs, with a guest that does not mind what is done to it. It lasts as long as this.
pub trait Machine {
    /// Its hypervisor, as a process that has just begun knows it.
    fn saver(&self) -> Arc<dyn VmStateSaver>;

    /// Where it is reached, as a user would say it.
    fn control(&self) -> Control;

    /// Its disks: what each is called, its active image, which stands on nothing, and the image's format.
    fn disks(&self) -> Vec<(Target, Utf8PathBuf, String)>;

    /// An address of the right form at which nothing runs.
    fn nowhere(&self) -> String;

    /// Where memory images may be made.
    fn room(&self) -> &Utf8Path;
}

/// Runs each trial on a machine of its own. Words on the command line are those of every Rust test program.
pub fn run<M: Machine + 'static>(make: fn() -> Result<M>) -> ExitCode {
    let trials = vec![
        trial(make, "an address has one form", addresses),
        trial(make, "nothing is found where nothing runs", nothing),
        trial(make, "what runs is found at its address and by a scan", found),
        trial(make, "an instant that is taken back leaves the machine as it was", undone),
        trial(make, "what fails inside an instant lets the guest go on", failed_inside),
        trial(make, "memory that was saved is checked, loaded and removed", memory),
        trial(make, "a window that is given up gives the disks back", given_up),
    ];
    libtest_mimic::run(&Arguments::from_args(), trials).exit_code()
}

fn trial<M: Machine + 'static>(
    make: fn() -> Result<M>,
    name: &str,
    statement: impl AsyncFn(&dyn Machine) -> Result<()> + Send + 'static,
) -> Trial {
    Trial::test(name, move || {
        let runtime = runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let machine = make().map_err(|error| format!("{error:#}"))?;
        runtime.block_on(statement(&machine)).map_err(|error| format!("{error:#}").into())
    })
}

/// What runs inside an instant: it is counted, and fails where it is to.
#[derive(Default)]
struct Counted {
    runs: Mutex<u32>,
    fails: bool,
}

#[async_trait]
impl Inside for Counted {
    async fn run(&self, _: Option<&Target>) -> snapcore::Result<()> {
        *self.runs.lock().await += 1;
        match self.fails {
            true => Err(snapcore::Error::new(ErrorKind::NoSpace, "the failure that the kit wanted")),
            false => Ok(()),
        }
    }

    async fn back(&self, _: Option<&Target>) -> snapcore::Result<()> {
        Ok(())
    }
}

struct Quiet;

impl Progress for Quiet {
    fn bytes(&self, _: u64, _: u64) {}
}

/// A machine, and the domain that a catalogue would have of it.
struct Bench {
    saver: Arc<dyn VmStateSaver>,
    domain: Domain,
    chains: Vec<OpenChain>,
    targets: Vec<Target>,
}

impl Bench {
    fn new(machine: &dyn Machine) -> Result<Self> {
        let saver = machine.saver();
        let control = saver.read_control(machine.control(), machine.room())?;
        let (mut disks, mut chains, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (target, path, format) in machine.disks() {
            let active = LayerName(path.file_name().context("a file's name")?.to_owned());
            let disk = Disk { target: target.clone(), path: path.clone(), format: format.clone() };
            disks.push(DiskRecord { disk, owned: vec![active.clone()], active });
            let layers = vec![ChainFile { file: path, format }];
            chains.push(OpenChain { target: target.clone(), layers });
            targets.push(target);
        }
        let domain = Domain {
            name: DomainName::new("trial")?,
            unregistered: false,
            hypervisor: saver.profile().name,
            control: Some(control),
            active_path: ActivePath::Keep,
            disks,
            current: None,
            machines: Vec::new(),
        };
        Ok(Self { saver, domain, chains, targets })
    }

    fn control(&self) -> &Control {
        self.domain.control.as_ref().unwrap_or_else(|| unreachable!("it was given one"))
    }

    async fn connect(&self) -> Result<Arc<dyn LiveDomain>> {
        self.saver.connect(&self.domain).await?.context("it runs, and connect says that it does not")
    }

    async fn seen(&self) -> Result<Seen> {
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
    async fn apply(&self, step: &DomainStep, inside: &dyn Inside) -> snapcore::Result<Facts> {
        let live = self.connect().await;
        let live = live.map_err(|error| snapcore::Error::new(ErrorKind::Io, format!("{error:#}")))?;
        live.apply(step, self.context(inside, &CancellationToken::new())).await
    }

    async fn undo(&self, step: &DomainStep) -> Result<()> {
        let inside = Counted::default();
        Ok(self.connect().await?.undo(step, self.context(&inside, &CancellationToken::new())).await?)
    }

    fn context<'b>(&'b self, inside: &'b dyn Inside, cancel: &'b CancellationToken) -> DomainContext<'b> {
        DomainContext { domain: &self.domain, chains: &self.chains, inside, progress: &Quiet, cancel }
    }

    /// The instant of a snapshot whose disks the backends take.
    fn instant(&self, memory: Option<&Utf8Path>) -> DomainStep {
        let live = self.saver.profile().saves_while_running;
        let plan = |file: &Utf8Path| MemoryPlan { file: file.to_owned(), live, budget_ms: 20_000 };
        DomainStep::Instant {
            disks: self.targets.iter().map(|target| (target.clone(), DiskInstant::ByBackend)).collect(),
            running: true,
            memory: memory.map(plan),
            quiesce: Quiesce::No,
            quiesce_limit_ms: 10_000,
            then: None,
        }
    }
}

async fn addresses(machine: &dyn Machine) -> Result<()> {
    let bench = Bench::new(machine)?;
    let control = bench.control();
    let again = bench.saver.read_control(control.clone(), "/nowhere".into())?;
    ensure!(again == *control, "{control:?} reads as {again:?}");
    let empty = bench.saver.read_control(Control::default(), machine.room());
    ensure!(empty.is_err_and(|error| error.kind() == ErrorKind::Usage), "no address is an address");
    let profile = bench.saver.profile();
    ensure!(
        !profile.name.is_none() && !profile.title.is_empty() && !profile.address.is_empty(),
        "{profile:?}"
    );
    ensure!(profile.keys().first() == Some(&profile.key.as_str()), "{profile:?}");
    Ok(())
}

async fn nothing(machine: &dyn Machine) -> Result<()> {
    let mut bench = Bench::new(machine)?;
    let said = Control { address: machine.nowhere(), ..Control::default() };
    let control = bench.saver.read_control(said, machine.room())?;
    let looked = bench.saver.look(&control).await;
    ensure!(looked.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound), "{looked:?}");
    bench.domain.control = Some(control);
    ensure!(bench.saver.connect(&bench.domain).await?.is_none(), "it connects to nothing");
    Ok(())
}

async fn found(machine: &dyn Machine) -> Result<()> {
    let bench = Bench::new(machine)?;
    let looked = bench.saver.look(bench.control()).await?;
    ensure!(looked.running, "its guest runs");
    for (target, path, _) in machine.disks() {
        let disk = looked.disks.iter().find(|disk| disk.target == target);
        let disk = disk.with_context(|| format!("{target} is a disk of it"))?;
        ensure!(disk.path == path && disk.guest_writes && disk.left_out.is_none(), "{disk:?}");
    }
    let seen = bench.seen().await?;
    ensure!(seen.machine == looked.machine, "a look and a connection tell of different machines");
    let scanned = bench.saver.scan().await?;
    let scanned: Vec<_> = scanned.into_iter().map(|(control, _)| control.address).collect();
    let mut read = Vec::new();
    for address in &scanned {
        let said = Control { address: address.clone(), ..Control::default() };
        read.push(bench.saver.read_control(said, machine.room())?.address);
    }
    ensure!(read.contains(&bench.control().address), "the scan finds {scanned:?}");
    let live = bench.connect().await?;
    let differs = live.differences(&seen.machine)?;
    ensure!(differs.is_empty(), "it differs from itself: {differs:?}");
    ensure!(live.disk(&Target::new("nowhere")?).is_none(), "it has a disk that it has not");
    Ok(())
}

async fn undone(machine: &dyn Machine) -> Result<()> {
    let bench = Bench::new(machine)?;
    let before = bench.open_files().await?;
    let step = bench.instant(None);
    let inside = Counted::default();
    let facts = bench.apply(&step, &inside).await?;
    ensure!(*inside.runs.lock().await == 1, "what is inside the instant runs once");
    ensure!(facts.taken.is_some_and(|taken| taken.running), "it does not tell how the instant was");
    ensure!(bench.seen().await?.running, "the guest goes on");
    for _ in 0..2 {
        bench.undo(&step).await?;
        ensure!(bench.seen().await?.running && bench.open_files().await? == before, "it is as before");
    }
    Ok(())
}

async fn failed_inside(machine: &dyn Machine) -> Result<()> {
    let bench = Bench::new(machine)?;
    let step = bench.instant(None);
    let failed = bench.apply(&step, &Counted { fails: true, ..Counted::default() }).await;
    ensure!(failed.as_ref().is_err_and(|error| error.kind() == ErrorKind::NoSpace), "{failed:?}");
    bench.undo(&step).await?;
    ensure!(bench.seen().await?.running, "the guest goes on");
    Ok(())
}

async fn memory(machine: &dyn Machine) -> Result<()> {
    let bench = Bench::new(machine)?;
    let file = machine.room().join("trial.memory");
    let missing = bench.saver.check_memory(&file, &Quiet).await;
    ensure!(missing.as_ref().is_err_and(|error| error.kind() == ErrorKind::NotFound), "{missing:?}");
    // One connection writes what was begun at the instant.
    let (live, inside, cancel) = (bench.connect().await?, Counted::default(), CancellationToken::new());
    live.apply(&bench.instant(Some(&file)), bench.context(&inside, &cancel)).await?;
    let save = DomainStep::SaveMemory { file: file.clone(), tag: "trial".to_owned(), compress: 0 };
    let saved = live.apply(&save, bench.context(&inside, &cancel)).await?;
    drop(live);
    let length = file.metadata()?.len();
    ensure!(saved.memory_bytes.is_some_and(|bytes| 0 < bytes && bytes <= length), "{saved:?} of {length}");
    bench.saver.check_memory(&file, &Quiet).await?;
    bench.saver.release_memory(&file).await?;
    let cut = machine.room().join("cut.memory");
    std::fs::write(&cut, &std::fs::read(&file)?[..usize::try_from(length)? / 2])?;
    let damaged = bench.saver.check_memory(&cut, &Quiet).await;
    ensure!(damaged.as_ref().is_err_and(|error| error.kind() == ErrorKind::Corrupt), "{damaged:?}");
    if !bench.saver.profile().recreates {
        let disks = bench.targets.clone();
        bench.apply(&DomainStep::CheckMemory { file: file.clone() }, &Counted::default()).await?;
        let window = DomainStep::OpenWindow { disks: disks.clone(), running: true, anew: None };
        bench.apply(&window, &Counted::default()).await?;
        ensure!(bench.open_files().await?.iter().all(HashSet::is_empty), "its disks are not free");
        bench.apply(&DomainStep::Attach { disks, anew: None }, &Counted::default()).await?;
        let power = Some(PowerAfter::Running);
        let go_on = DomainStep::Continue { memory: Some(file.clone()), reset: false, power };
        let facts = bench.apply(&go_on, &Counted::default()).await?;
        ensure!(facts.guest == Some(GuestChange::Restored), "{facts:?}");
        ensure!(bench.seen().await?.running, "the guest goes on");
    }
    for _ in 0..2 {
        bench.saver.remove_memory(&file).await?;
        ensure!(!file.exists(), "it was removed");
    }
    Ok(())
}

async fn given_up(machine: &dyn Machine) -> Result<()> {
    let bench = Bench::new(machine)?;
    if bench.saver.profile().recreates {
        return Ok(());
    }
    let before = bench.open_files().await?;
    let window = DomainStep::OpenWindow { disks: bench.targets.clone(), running: true, anew: None };
    for _ in 0..2 {
        bench.apply(&window, &Counted::default()).await?;
        ensure!(bench.open_files().await?.iter().all(HashSet::is_empty), "its disks are not free");
        ensure!(!bench.seen().await?.running, "the guest stands still");
    }
    for _ in 0..2 {
        bench.undo(&window).await?;
        ensure!(bench.open_files().await? == before, "it has its disks again");
        ensure!(bench.seen().await?.running, "the guest goes on");
    }
    Ok(())
}
