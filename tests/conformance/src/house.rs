//! A domain under trial: its disks, the service that changes it, and the model beside it.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use catalogue_sqlite::SqliteCatalogue;
use serde::{Deserialize, Serialize};
use snapcore::service::{Outcome, RecoveryReport};
use snapcore::{
    CreateDisk, CreateRequest, DeleteRequest, DiskRecord, DomainName, DomainRef, DomainSpec, Domsnap, Error,
    ErrorKind, PointKind, Registry, RevertRequest, SnapshotName, Target,
};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

use crate::model::{Bytes, Model, Tree};
use crate::seed::Seed;
use crate::strike::{Strike, Strikes, Struck, StruckCatalogue};
use crate::workshop::Workshop;

/// The disks of a domain under trial.
pub(crate) const TARGETS: [&str; 2] = ["vda", "vdb"];

/// How long one waits for a process that was killed to be gone.
const GONE: Duration = Duration::from_secs(30);

/// How points are taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Way {
    /// As points of a kind.
    Kind(PointKind),
    /// In a way that the backend has a name for.
    Named(String),
}

impl Way {
    /// A create of the disks `targets` in this way.
    pub(crate) fn create<T: AsRef<str>>(
        &self,
        name: SnapshotName,
        targets: &[T],
    ) -> snapcore::Result<CreateRequest> {
        let request = CreateRequest::new(name);
        match self {
            Self::Kind(kind) => Ok(request.kind(*kind)),
            Self::Named(way) => targets.iter().try_fold(request, |request, target| {
                Ok(request.disk(Target::new(target.as_ref())?, CreateDisk::Way(way.clone())))
            }),
        }
    }
}

impl std::fmt::Display for Way {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kind(PointKind::Internal) => "internal",
            Self::Kind(PointKind::External) => "external",
            Self::Named(way) => way,
        })
    }
}

/// What is done to a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Op {
    Create(String),
    Revert { to: String, save: Option<String> },
    Delete(Vec<String>),
    Tidy,
}

/// Where a house stands: enough for another process to do an operation in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Plot {
    pub(crate) root: Utf8PathBuf,
    pub(crate) domain: DomainName,
    pub(crate) way: Way,
    pub(crate) targets: Vec<String>,
}

impl Plot {
    fn disks(&self) -> Utf8PathBuf {
        self.root.join("disks")
    }

    fn state(&self) -> Utf8PathBuf {
        self.root.join("state")
    }
}

/// The service as one process has it.
pub(crate) struct Process {
    runtime: Option<Runtime>,
    pub(crate) service: Domsnap,
    pub(crate) strikes: Arc<Strikes>,
    domain: DomainRef,
    plot: Plot,
}

impl Process {
    pub(crate) fn new(shop: &dyn Workshop, plot: &Plot) -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let strikes = Arc::new(Strikes::default());
        let _entered = runtime.enter();
        let mut registry = Registry::new();
        registry.register(Arc::new(Struck { inner: shop.backend(), strikes: strikes.clone() }))?;
        let catalogue =
            StruckCatalogue { inner: SqliteCatalogue::new(plot.state()), strikes: strikes.clone() };
        let service = Domsnap::new(Arc::new(catalogue), registry);
        drop(_entered);
        let domain = DomainRef::Name(plot.domain.clone());
        Ok(Self { runtime: Some(runtime), service, strikes, domain, plot: plot.clone() })
    }

    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        match &self.runtime {
            Some(runtime) => runtime.block_on(work),
            None => unreachable!("the runtime lasts as long as the process"),
        }
    }

    /// Does an operation; `None` where it stopped for ever.
    pub(crate) fn run(
        &self,
        op: &Op,
        cancel: &CancellationToken,
    ) -> Result<Option<snapcore::Result<Outcome>>> {
        let name = |text: &String| SnapshotName::new(text.clone());
        let (service, domain, cancel) = (&self.service, &self.domain, cancel.clone());
        let work: std::pin::Pin<Box<dyn Future<Output = snapcore::Result<Outcome>> + '_>> = match op {
            Op::Create(point) => {
                let request = self.plot.way.create(name(point)?, &self.plot.targets)?;
                Box::pin(service.create(domain, request, cancel))
            }
            Op::Revert { to, save } => {
                let mut request = RevertRequest::new(name(to)?);
                if let Some(save) = save {
                    request = request.save_current(name(save)?);
                }
                Box::pin(service.revert(domain, request, cancel))
            }
            Op::Delete(names) => {
                let names = names.iter().map(name).collect::<snapcore::Result<_>>()?;
                Box::pin(service.delete(domain, DeleteRequest::new(names), cancel))
            }
            Op::Tidy => Box::pin(service.tidy(domain, cancel)),
        };
        let stopped = self.strikes.stopped.notified();
        Ok(self.wait(async {
            tokio::select! {
                outcome = work => Some(outcome),
                () = stopped => None,
            }
        }))
    }

    /// Does an operation that nothing stops. Where a process that ended still holds something, it is waited for: what it held
    /// is given back by the system in its own time, and a child that another thread starts just then has it for a moment too.
    pub(crate) fn run_patiently(&self, op: &Op) -> Result<snapcore::Result<Outcome>> {
        let begun = Instant::now();
        loop {
            let done = self.run(op, &CancellationToken::new())?;
            let outcome = done.with_context(|| format!("{op:?} stopped for ever"))?;
            if !waits(&outcome, begun) {
                return Ok(outcome);
            }
        }
    }

    /// Recovers, patiently; `None` where it stopped for ever.
    pub(crate) fn recover(&self) -> Option<snapcore::Result<Vec<RecoveryReport>>> {
        let begun = Instant::now();
        loop {
            let stopped = self.strikes.stopped.notified();
            let ended = self.wait(async {
                tokio::select! {
                    outcome = self.service.recover(Some(&self.domain), CancellationToken::new()) => Some(outcome),
                    () = stopped => None,
                }
            });
            match ended {
                Some(outcome) if waits(&outcome, begun) => {}
                ended => return ended,
            }
        }
    }
}

/// Waits a moment, where it failed because something is busy still.
fn waits<T>(outcome: &snapcore::Result<T>, begun: Instant) -> bool {
    let busy = outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy);
    if busy && begun.elapsed() < GONE {
        std::thread::sleep(Duration::from_millis(20));
        return true;
    }
    false
}

impl Drop for Process {
    fn drop(&mut self) {
        // Work on blocking threads is waited for: in one process two backends must not work on one disk at once.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(GONE);
        }
    }
}

/// A domain of two disks, with the model of what they must hold.
pub(crate) struct House<'a> {
    shop: &'a dyn Workshop,
    pub(crate) plot: Plot,
    process: Option<Process>,
    pub(crate) model: Model,
    pub(crate) dice: Seed,
    _root: tempfile::TempDir,
}

impl<'a> House<'a> {
    /// A domain without snapshots, its disks called as its targets.
    pub(crate) fn new(shop: &'a dyn Workshop, way: &Way) -> Result<Self> {
        Self::named(shop, way, &TARGETS)
    }

    /// A domain without snapshots, whose disks have these names.
    pub(crate) fn named(shop: &'a dyn Workshop, way: &Way, names: &[&str]) -> Result<Self> {
        let root = match shop.ground() {
            Some(ground) => tempfile::tempdir_in(ground)?,
            None => tempfile::tempdir()?,
        };
        let path = Utf8Path::from_path(root.path()).context("the temporary directory is not UTF-8")?;
        let path = path.canonicalize_utf8()?;
        let plot =
            Plot { root: path, domain: DomainName::new("trial")?, way: way.clone(), targets: Vec::new() };
        std::fs::create_dir(plot.disks())?;
        let mut house =
            Self { shop, process: None, model: Model::default(), dice: Seed::new(0x5eed), plot, _root: root };
        let mut spec = DomainSpec::new(house.plot.domain.clone()).active_path(shop.active_path());
        let format = {
            let process = Process::new(shop, &house.plot)?;
            let backend = process.service.registry().iter().next().context("no backend")?;
            backend.format().to_owned()
        };
        for (index, name) in names.iter().enumerate() {
            let target = format!("vd{}", char::from(b'a' + u8::try_from(index)?));
            let content = house.some_bytes(usize::try_from(shop.size())?);
            let path = shop
                .make(&house.plot.disks(), name, &content)
                .with_context(|| format!("making a disk called {name:?}"))?;
            spec = spec.disk(Target::new(target.clone())?, path, format.clone());
            house.model.present.insert(target.clone(), Arc::new(content));
            house.plot.targets.push(target);
        }
        let process = house.process()?;
        process.wait(process.service.domain_add(&spec))?;
        Ok(house)
    }

    /// A domain with the points `a`, `b` on it and `c` on that, each other than the one before, and a present that is other
    /// than all; where the backend has no point on a point, with `a` alone.
    pub(crate) fn furnished(shop: &'a dyn Workshop, way: &Way) -> Result<Self> {
        let mut house = Self::new(shop, way)?;
        let names: &[&str] =
            if house.capabilities()?.snapshot_of_snapshot { &["a", "b", "c"] } else { &["a"] };
        for name in names {
            house.create(name)?;
            house.write_somewhere()?;
        }
        Ok(house)
    }

    pub(crate) fn shop(&self) -> &'a dyn Workshop {
        self.shop
    }

    pub(crate) fn place(&self) -> Utf8PathBuf {
        self.plot.disks()
    }

    /// The process that there is, or a new one.
    pub(crate) fn process(&mut self) -> Result<&Process> {
        if self.process.is_none() {
            self.process = Some(Process::new(self.shop, &self.plot)?);
        }
        self.process.as_ref().context("there is no process")
    }

    /// This process is no more.
    pub(crate) fn crash(&mut self) {
        self.process = None;
    }

    /// Forgets the catalogue and its journal.
    pub(crate) fn lose_the_catalogue(&mut self) -> Result<()> {
        self.crash();
        Ok(std::fs::remove_dir_all(self.plot.state())?)
    }

    pub(crate) fn reference(&self) -> DomainRef {
        DomainRef::Name(self.plot.domain.clone())
    }

    pub(crate) fn capabilities(&mut self) -> Result<snapcore::Capabilities> {
        let process = self.process()?;
        Ok(process.service.registry().iter().next().context("no backend")?.capabilities())
    }

    /// The disks as the catalogue has them.
    pub(crate) fn records(&mut self) -> Result<Vec<DiskRecord>> {
        let reference = self.reference();
        let process = self.process()?;
        Ok(process.wait(process.service.resolve(&reference))?.disks)
    }

    /// Random bytes, so that no two blocks are the same by chance; with runs of zeros, which are kept in other ways.
    pub(crate) fn some_bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        for block in bytes.chunks_mut(4096) {
            if self.dice.chance(50) {
                let word = self.dice.draw().to_le_bytes();
                for (index, byte) in block.iter_mut().enumerate() {
                    *byte = word[index % 8] ^ (index / 8) as u8;
                }
            }
        }
        bytes
    }

    /// The guest writes: some bytes somewhere, on each disk.
    pub(crate) fn write_somewhere(&mut self) -> Result<()> {
        for record in self.records()? {
            let target = record.disk.target.to_string();
            let size = self.model.present.get(&target).context("a disk of the model")?.len() as u64;
            let length = [512, 4096, 20_480, 61_440][self.dice.below(4) as usize];
            let offset = 512 * self.dice.below((size - length) / 512 + 1);
            // Never all zeros: the disk must be another than before.
            let mut bytes = self.some_bytes(length as usize);
            bytes[0] = 1 + self.dice.below(255) as u8;
            bytes[1] = self.dice.below(256) as u8;
            self.shop
                .write(&record, offset, &bytes)
                .with_context(|| format!("the guest writes {length} bytes at {offset} of {target}"))?;
            self.model.write(&target, offset, &bytes);
        }
        Ok(())
    }

    /// What a guest would find on the disks now.
    pub(crate) fn read(&mut self) -> Result<Vec<(String, Vec<u8>)>> {
        let mut all = Vec::new();
        for record in self.records()? {
            let bytes = self.shop.read(&record).with_context(|| format!("reading {}", record.disk.path))?;
            all.push((record.disk.target.to_string(), bytes));
        }
        Ok(all)
    }

    /// Makes the model what `op` makes of the domain.
    pub(crate) fn imagine(&mut self, op: &Op) {
        match op {
            Op::Create(name) => self.model.create(name),
            Op::Revert { to, save } => self.model.revert(to, save.as_deref()),
            Op::Delete(names) => self.model.delete(names),
            Op::Tidy => {}
        }
    }

    /// Does an operation that must succeed.
    pub(crate) fn run(&mut self, op: &Op) -> Result<Outcome> {
        let outcome = self.process()?.run_patiently(op)?.with_context(|| format!("{op:?}"))?;
        self.imagine(op);
        Ok(outcome)
    }

    pub(crate) fn create(&mut self, name: &str) -> Result<Outcome> {
        self.run(&Op::Create(name.to_owned()))
    }

    pub(crate) fn revert(&mut self, name: &str) -> Result<Outcome> {
        self.run(&Op::Revert { to: name.to_owned(), save: None })
    }

    pub(crate) fn delete(&mut self, names: &[&str]) -> Result<Outcome> {
        self.run(&Op::Delete(names.iter().map(|name| (*name).to_owned()).collect()))
    }

    /// Does an operation while faults strike; `None` where it stopped for ever, and the process with it. The model does not
    /// learn of it.
    pub(crate) fn run_struck(
        &mut self,
        op: &Op,
        strikes: Vec<Strike>,
    ) -> Result<Option<snapcore::Result<Outcome>>> {
        self.run_cancellable(op, strikes, &CancellationToken::new())
    }

    pub(crate) fn run_cancellable(
        &mut self,
        op: &Op,
        strikes: Vec<Strike>,
        cancel: &CancellationToken,
    ) -> Result<Option<snapcore::Result<Outcome>>> {
        let process = self.process()?;
        let begun = Instant::now();
        loop {
            process.strikes.arm(strikes.clone());
            match process.run(op, cancel)? {
                // A child that another thread starts just then has our locks for a moment. (Without strikes it may be refused on purpose.)
                Some(outcome)
                    if !strikes.is_empty() && !process.strikes.have_struck() && waits(&outcome, begun) => {}
                Some(outcome) => {
                    process.strikes.disarm();
                    return Ok(Some(outcome));
                }
                None => {
                    self.crash();
                    return Ok(None);
                }
            }
        }
    }

    /// An operation is refused, as an error of this kind, and changes nothing.
    pub(crate) fn is_refused(&mut self, op: &Op, kind: ErrorKind) -> Result<()> {
        let before = self.footprint()?;
        let error = refusal(self.process()?.run_patiently(op)?, &format!("{op:?}"))?;
        ensure!(error.kind() == kind, "{op:?} is refused by {error} ({:?})", error.kind());
        let after = self.footprint()?;
        ensure!(before == after, "{op:?} is refused, and leaves {after:?} where {before:?} was");
        self.is_as_the_model()
    }

    /// Whether a fault struck since they were armed, in the process that there is.
    pub(crate) fn have_struck(&mut self) -> Result<bool> {
        Ok(self.process()?.strikes.have_struck())
    }

    /// Recovers what stopped half way, and ends with nothing left to recover. Where a process that was killed still works on a
    /// disk, it is waited for.
    pub(crate) fn recover(&mut self) -> Result<Vec<RecoveryReport>> {
        let process = self.process()?;
        process.strikes.disarm();
        let reports = process.recover().context("the recovery stopped for ever")?.context("recovering")?;
        let reference = self.reference();
        let process = self.process()?;
        let listing = process.wait(process.service.list(&reference))?;
        ensure!(listing.unfinished.is_empty(), "after a recovery there is still {:?}", listing.unfinished);
        Ok(reports)
    }

    /// The tree as the catalogue has it.
    pub(crate) fn tree(&mut self) -> Result<Tree> {
        let reference = self.reference();
        let process = self.process()?;
        let listing = process.wait(process.service.list(&reference))?;
        let tree = listing.tree();
        let name_of = |id| tree.get(id).map(|snapshot| snapshot.name.to_string());
        Ok(Tree {
            points: tree
                .iter()
                .map(|snapshot| (snapshot.name.to_string(), snapshot.parent.and_then(name_of)))
                .collect(),
            current: listing.domain.current.and_then(name_of),
        })
    }

    /// The present and the tree are the model's.
    pub(crate) fn is_as_the_model(&mut self) -> Result<()> {
        let (tree, wanted) = (self.tree()?, self.model.tree());
        ensure!(tree == wanted, "the catalogue has {tree:?} instead of {wanted:?}");
        self.shows("the present")
    }

    fn shows(&mut self, what: &str) -> Result<()> {
        for (target, found) in self.read()? {
            let wanted = self.model.present.get(&target).context("a disk of the model")?;
            same(&found, wanted).with_context(|| format!("{what} on {target}"))?;
        }
        Ok(())
    }

    /// The present, the tree and every point are the model's. Ends at the last point of the tree.
    pub(crate) fn is_whole(&mut self) -> Result<()> {
        self.is_as_the_model()?;
        for name in self.model.points.keys().cloned().collect::<Vec<_>>() {
            self.revert(&name)?;
            self.shows(&format!("the point {name}"))?;
        }
        self.is_sound()
    }

    /// The service's own check finds nothing wrong.
    pub(crate) fn is_sound(&mut self) -> Result<()> {
        let reference = self.reference();
        let process = self.process()?;
        let findings = process.wait(process.service.check(&reference))?;
        let bad: Vec<_> = findings.iter().filter(|found| found.severity > snapcore::Severity::Note).collect();
        ensure!(bad.is_empty(), "the check finds {bad:?}");
        Ok(())
    }

    /// What there is of disks.
    pub(crate) fn footprint(&self) -> Result<BTreeSet<String>> {
        self.shop.footprint(&self.place())
    }

    /// After an operation that may have happened: takes the model on to what the catalogue says, which must be as before or as
    /// after. Gives whether it happened.
    pub(crate) fn settle(&mut self, op: &Op) -> Result<bool> {
        let found = self.tree()?;
        let before = self.model.clone();
        self.imagine(op);
        if before.tree() == self.model.tree() {
            // A revert to where it came from: only the disks tell.
            let after = self.read()?;
            let happened = after.iter().all(|(target, bytes)| {
                self.model.present.get(target).is_some_and(|wanted| **wanted == *bytes)
            });
            if !happened {
                self.model = before;
            }
            return Ok(happened);
        }
        if found == self.model.tree() {
            return Ok(true);
        }
        ensure!(
            found == before.tree(),
            "the tree is neither as before ({:?}) nor as after ({:?}), but {found:?}",
            before.tree(),
            self.model.tree()
        );
        self.model = before;
        Ok(false)
    }
}

impl Drop for House<'_> {
    fn drop(&mut self) {
        self.crash();
        if let Err(error) = self.shop.clear(&self.place()) {
            eprintln!("the remains of {} cannot be removed: {error:#}", self.place());
        }
    }
}

/// Both are the same bytes.
pub(crate) fn same(found: &[u8], wanted: &Bytes) -> Result<()> {
    ensure!(found.len() == wanted.len(), "{} bytes instead of {}", found.len(), wanted.len());
    let differing = found.iter().zip(wanted.iter()).position(|(one, other)| one != other);
    if let Some(at) = differing {
        bail!("byte {at:#x} is {:#04x} instead of {:#04x}", found[at], wanted[at]);
    }
    Ok(())
}

/// The error that an operation must end with.
pub(crate) fn refusal<T>(outcome: snapcore::Result<T>, what: &str) -> Result<Error> {
    match outcome {
        Ok(_) => bail!("{what} succeeded"),
        Err(error) => {
            ensure!(error.kind() != ErrorKind::Internal, "{what} is no defect: {error}");
            Ok(error)
        }
    }
}
