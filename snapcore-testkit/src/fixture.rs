//! A domain under test: its disks, the service that changes it, and the model beside it.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use camino::{Utf8Path, Utf8PathBuf};
use catalogue_sqlite::SqliteCatalogue;
use serde::{Deserialize, Serialize};
use snapcore::hypervisor::Control;
use snapcore::service::{
    CreateDisk, CreateRequest, DeleteRequest, DomainRef, DomainSpec, Domsnap, RevertRequest,
};
use snapcore::service::{Outcome, RecoveryReport};
use snapcore::{Disk, DiskRecord, DomainName, Error, ErrorKind, PointKind, Registry, SnapshotName, Target};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

use crate::fault::{Fault, FaultInjector, FaultyBackend, FaultyCatalogue};
use crate::live::{NAME, TestGuest, TestHypervisor};
use crate::model::{Bytes, Model, Tree};
use crate::seed::Seed;
use crate::test_backend::TestBackend;

/// The disks of a domain under test.
pub(crate) const TARGETS: [&str; 2] = ["vda", "vdb"];

/// The longest wait for a process that was killed to be gone.
const GONE: Duration = Duration::from_secs(30);

/// How points are taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Method {
    /// As points of a kind.
    Kind(PointKind),
    /// A method that the backend has a name for.
    Named(String),
}

impl Method {
    /// Requests a create of the disks `targets` by this method.
    pub(crate) fn create<T: AsRef<str>>(
        &self,
        name: SnapshotName,
        targets: &[T],
    ) -> snapcore::Result<CreateRequest> {
        let request = CreateRequest::new(name);
        match self {
            Self::Kind(kind) => Ok(request.kind(*kind)),
            Self::Named(method) => targets.iter().try_fold(request, |request, target| {
                Ok(request.disk(Target::new(target.as_ref())?, CreateDisk::Method(method.clone())))
            }),
        }
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Kind(PointKind::Internal) => "internal",
            Self::Kind(PointKind::External) => "external",
            Self::Named(method) => method,
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

/// Where a fixture stands: enough for another process to do an operation in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct TestDomain {
    pub(crate) root: Utf8PathBuf,
    pub(crate) domain: DomainName,
    pub(crate) method: Method,
    pub(crate) targets: Vec<String>,
    /// The guest, if the domain is not always at rest. It lives in this process alone.
    #[serde(skip)]
    pub(crate) guest: Option<Arc<TestGuest>>,
}

impl TestDomain {
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
    pub(crate) faults: Arc<FaultInjector>,
    domain: DomainRef,
    test_domain: TestDomain,
}

impl Process {
    pub(crate) fn new(subject: &dyn TestBackend, test_domain: &TestDomain) -> Result<Self> {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
        let faults = Arc::new(FaultInjector::default());
        let _entered = runtime.enter();
        let mut registry = Registry::new();
        registry.register(Arc::new(FaultyBackend { inner: subject.backend(), faults: faults.clone() }))?;
        if let Some(guest) = &test_domain.guest {
            registry.register_hypervisor(Arc::new(TestHypervisor::new(guest.clone(), faults.clone())));
        }
        let catalogue =
            FaultyCatalogue { inner: SqliteCatalogue::new(test_domain.state()), faults: faults.clone() };
        let service = Domsnap::new(Arc::new(catalogue), registry);
        drop(_entered);
        let domain = DomainRef::Name(test_domain.domain.clone());
        Ok(Self { runtime: Some(runtime), service, faults, domain, test_domain: test_domain.clone() })
    }

    pub(crate) fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        match &self.runtime {
            Some(runtime) => runtime.block_on(work),
            None => unreachable!("the runtime lasts as long as the process"),
        }
    }

    /// Requests a create of all disks. The test hypervisor saves no memory.
    pub(crate) fn create_request(&self, name: SnapshotName) -> snapcore::Result<CreateRequest> {
        let request = self.test_domain.method.create(name, &self.test_domain.targets)?;
        Ok(if self.test_domain.guest.is_some() { request.memory(false) } else { request })
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
                let request = self.create_request(name(point)?)?;
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
        let stopped = self.faults.stopped.notified();
        Ok(self.wait(async {
            tokio::select! {
                outcome = work => Some(outcome),
                () = stopped => None,
            }
        }))
    }

    /// Does an operation that nothing stops. Where a process that ended still holds something, it is waited
    /// for: what it held is given back by the system in its own time, and a child that another thread starts
    /// just then has it for a moment too.
    pub(crate) fn run_waiting(&self, op: &Op) -> Result<snapcore::Result<Outcome>> {
        let begun = Instant::now();
        loop {
            let done = self.run(op, &CancellationToken::new())?;
            let outcome = done.with_context(|| format!("{op:?} stopped for ever"))?;
            if !wait_while_busy(&outcome, begun) {
                return Ok(outcome);
            }
        }
    }

    /// Recovers, patiently; `None` where it stopped for ever.
    pub(crate) fn recover(&self) -> Option<snapcore::Result<Vec<RecoveryReport>>> {
        let begun = Instant::now();
        loop {
            let stopped = self.faults.stopped.notified();
            let ended = self.wait(async {
                tokio::select! {
                    outcome = self.service.recover(Some(&self.domain), CancellationToken::new()) => Some(outcome),
                    () = stopped => None,
                }
            });
            match ended {
                Some(outcome) if wait_while_busy(&outcome, begun) => {}
                ended => return ended,
            }
        }
    }
}

/// Waits a moment, where it failed because something is busy still.
fn wait_while_busy<T>(outcome: &snapcore::Result<T>, begun: Instant) -> bool {
    let busy = outcome.as_ref().is_err_and(|error| error.kind() == ErrorKind::Busy);
    if busy && begun.elapsed() < GONE {
        std::thread::sleep(Duration::from_millis(20));
        return true;
    }
    false
}

impl Drop for Process {
    fn drop(&mut self) {
        // Work on blocking threads is waited for: in one process two backends must not work on one disk at
        // once.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_timeout(GONE);
        }
    }
}

/// A domain of two disks, with the model of what they must hold.
pub(crate) struct Fixture<'a> {
    subject: &'a dyn TestBackend,
    pub(crate) test_domain: TestDomain,
    process: Option<Process>,
    pub(crate) model: Model,
    pub(crate) random: Seed,
    _root: tempfile::TempDir,
}

impl<'a> Fixture<'a> {
    /// A domain without snapshots, its disks called as its targets.
    pub(crate) fn new(subject: &'a dyn TestBackend, method: &Method) -> Result<Self> {
        Self::named(subject, method, &TARGETS)
    }

    /// A domain without snapshots, whose disks have these names.
    pub(crate) fn named(subject: &'a dyn TestBackend, method: &Method, names: &[&str]) -> Result<Self> {
        Self::make(subject, method, names, false)
    }

    /// A domain without snapshots, with a guest that runs.
    pub(crate) fn running(subject: &'a dyn TestBackend, method: &Method) -> Result<Self> {
        let fixture = Self::make(subject, method, &TARGETS, true)?;
        fixture.guest()?.power_on();
        Ok(fixture)
    }

    fn make(subject: &'a dyn TestBackend, method: &Method, names: &[&str], runs: bool) -> Result<Self> {
        let root = match subject.ground() {
            Some(ground) => tempfile::tempdir_in(ground)?,
            None => tempfile::tempdir()?,
        };
        let path = Utf8Path::from_path(root.path()).context("the temporary directory is not UTF-8")?;
        let path = path.canonicalize_utf8()?;
        let test_domain = TestDomain {
            root: path,
            domain: DomainName::new("test")?,
            method: method.clone(),
            targets: Vec::new(),
            guest: None,
        };
        std::fs::create_dir(test_domain.disks())?;
        let mut fixture = Self {
            subject,
            process: None,
            model: Model::default(),
            random: Seed::new(0x5eed),
            test_domain,
            _root: root,
        };
        let mut spec = DomainSpec::new(fixture.test_domain.domain.clone()).active_path(subject.active_path());
        let format = {
            let process = Process::new(subject, &fixture.test_domain)?;
            let backend = process.service.registry().iter().next().context("no backend")?;
            backend.format().to_owned()
        };
        let mut disks = Vec::new();
        for (index, name) in names.iter().enumerate() {
            let target = format!("vd{}", char::from(b'a' + u8::try_from(index)?));
            let content = fixture.random_bytes(usize::try_from(subject.size())?);
            let path = subject
                .make(&fixture.test_domain.disks(), name, &content)
                .with_context(|| format!("making a disk called {name:?}"))?;
            let content = Arc::new(content);
            disks.push((Disk::new(Target::new(target.clone())?, &path, format.clone()), content.clone()));
            spec = spec.disk(Target::new(target.clone())?, path, format.clone());
            fixture.model.disks.insert(target.clone(), content);
            fixture.test_domain.targets.push(target);
        }
        if runs {
            fixture.test_domain.guest = Some(Arc::new(TestGuest::new(disks)));
            spec = spec.run_by(NAME, Control::at("guest"));
        }
        let process = fixture.process()?;
        process.wait(process.service.domain_add(&spec))?;
        Ok(fixture)
    }

    /// A domain with the snapshots `a`, `b` after it and `c` after that, and a current state. Each differs
    /// from the one before. Without `snapshot_of_snapshot` there is `a` alone.
    pub(crate) fn with_snapshots(subject: &'a dyn TestBackend, method: &Method) -> Result<Self> {
        let mut fixture = Self::new(subject, method)?;
        let names: &[&str] =
            if fixture.capabilities()?.snapshot_of_snapshot { &["a", "b", "c"] } else { &["a"] };
        for name in names {
            fixture.create(name)?;
            fixture.write_random()?;
        }
        Ok(fixture)
    }

    /// The guest of a domain that runs.
    pub(crate) fn guest(&self) -> Result<Arc<TestGuest>> {
        self.test_domain.guest.clone().context("the domain is at rest and has no guest")
    }

    pub(crate) fn subject(&self) -> &'a dyn TestBackend {
        self.subject
    }

    pub(crate) fn dir(&self) -> Utf8PathBuf {
        self.test_domain.disks()
    }

    /// The process that there is, or a new one.
    pub(crate) fn process(&mut self) -> Result<&Process> {
        if self.process.is_none() {
            self.process = Some(Process::new(self.subject, &self.test_domain)?);
        }
        self.process.as_ref().context("there is no process")
    }

    /// This process is no more.
    pub(crate) fn crash(&mut self) {
        self.process = None;
    }

    /// Forgets the catalogue and its journal.
    pub(crate) fn lose_catalogue(&mut self) -> Result<()> {
        self.crash();
        Ok(std::fs::remove_dir_all(self.test_domain.state())?)
    }

    pub(crate) fn reference(&self) -> DomainRef {
        DomainRef::Name(self.test_domain.domain.clone())
    }

    pub(crate) fn capabilities(&mut self) -> Result<snapcore::backend::Capabilities> {
        let process = self.process()?;
        Ok(process.service.registry().iter().next().context("no backend")?.capabilities())
    }

    /// The disks as the catalogue has them.
    pub(crate) fn records(&mut self) -> Result<Vec<DiskRecord>> {
        let reference = self.reference();
        let process = self.process()?;
        Ok(process.wait(process.service.resolve(&reference))?.disks)
    }

    /// Random bytes, so that no two blocks are the same by chance; with runs of zeros, which are kept in
    /// other methods.
    pub(crate) fn random_bytes(&mut self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        for block in bytes.chunks_mut(4096) {
            if self.random.chance(50) {
                let word = self.random.draw().to_le_bytes();
                for (index, byte) in block.iter_mut().enumerate() {
                    *byte = word[index % 8] ^ (index / 8) as u8;
                }
            }
        }
        bytes
    }

    /// The guest writes: some bytes somewhere, on each disk.
    pub(crate) fn write_random(&mut self) -> Result<()> {
        for record in self.records()? {
            let target = record.disk.target.to_string();
            let size = self.model.disks.get(&target).context("a disk of the model")?.len() as u64;
            let length = [512, 4096, 20_480, 61_440][self.random.below(4) as usize];
            let offset = 512 * self.random.below((size - length) / 512 + 1);
            // Never all zeros: the disk must be another than before.
            let mut bytes = self.random_bytes(length as usize);
            bytes[0] = 1 + self.random.below(255) as u8;
            bytes[1] = self.random.below(256) as u8;
            self.subject
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
            let bytes =
                self.subject.read(&record).with_context(|| format!("reading {}", record.disk.path()))?;
            all.push((record.disk.target.to_string(), bytes));
        }
        Ok(all)
    }

    /// Makes the model what `op` makes of the domain.
    pub(crate) fn update_model(&mut self, op: &Op) {
        match op {
            Op::Create(name) => self.model.create(name),
            Op::Revert { to, save } => self.model.revert(to, save.as_deref()),
            Op::Delete(names) => self.model.delete(names),
            Op::Tidy => {}
        }
    }

    /// Does an operation that must succeed.
    pub(crate) fn run(&mut self, op: &Op) -> Result<Outcome> {
        let outcome = self.process()?.run_waiting(op)?.with_context(|| format!("{op:?}"))?;
        self.update_model(op);
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

    /// Does an operation while faults fault; `None` where it stopped for ever, and the process with it. The
    /// model does not learn of it.
    pub(crate) fn run_with_faults(
        &mut self,
        op: &Op,
        faults: Vec<Fault>,
    ) -> Result<Option<snapcore::Result<Outcome>>> {
        self.run_cancellable(op, faults, &CancellationToken::new())
    }

    pub(crate) fn run_cancellable(
        &mut self,
        op: &Op,
        faults: Vec<Fault>,
        cancel: &CancellationToken,
    ) -> Result<Option<snapcore::Result<Outcome>>> {
        let process = self.process()?;
        let begun = Instant::now();
        loop {
            process.faults.arm(faults.clone());
            match process.run(op, cancel)? {
                // A child that another thread starts just then has our locks for a moment. (Without faults it
                // may be refused on purpose.)
                Some(outcome)
                    if !faults.is_empty()
                        && !process.faults.has_fired()
                        && wait_while_busy(&outcome, begun) => {}
                Some(outcome) => {
                    process.faults.disarm();
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
    pub(crate) fn expect_refusal(&mut self, op: &Op, kind: ErrorKind) -> Result<()> {
        let before = self.footprint()?;
        let error = refusal(self.process()?.run_waiting(op)?, &format!("{op:?}"))?;
        ensure!(error.kind() == kind, "{op:?} is refused by {error} ({:?})", error.kind());
        let after = self.footprint()?;
        ensure!(before == after, "{op:?} is refused, and leaves {after:?} where {before:?} was");
        self.check_current()
    }

    /// Whether a fault fired since they were armed, in the process that there is.
    pub(crate) fn has_fired(&mut self) -> Result<bool> {
        Ok(self.process()?.faults.has_fired())
    }

    /// Recovers what stopped half way, and ends with nothing left to recover. Where a process that was killed
    /// still works on a disk, it is waited for.
    pub(crate) fn recover(&mut self) -> Result<Vec<RecoveryReport>> {
        let process = self.process()?;
        process.faults.disarm();
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

    /// The current state and the tree are the model's.
    pub(crate) fn check_current(&mut self) -> Result<()> {
        let (tree, wanted) = (self.tree()?, self.model.tree());
        ensure!(tree == wanted, "the catalogue has {tree:?} instead of {wanted:?}");
        self.check_disks("the current state")
    }

    fn check_disks(&mut self, what: &str) -> Result<()> {
        for (target, found) in self.read()? {
            let wanted = self.model.disks.get(&target).context("a disk of the model")?;
            compare(&found, wanted).with_context(|| format!("{what} on {target}"))?;
        }
        Ok(())
    }

    /// The current state, the tree and every snapshot are the model's. Ends at the last snapshot of the tree.
    pub(crate) fn check_all(&mut self) -> Result<()> {
        self.check_current()?;
        for name in self.model.points.keys().cloned().collect::<Vec<_>>() {
            self.revert(&name)?;
            self.check_disks(&format!("the snapshot {name}"))?;
        }
        self.check_findings()
    }

    /// The service's own check finds nothing wrong.
    pub(crate) fn check_findings(&mut self) -> Result<()> {
        let reference = self.reference();
        let process = self.process()?;
        let findings = process.wait(process.service.check(&reference))?;
        let bad: Vec<_> =
            findings.iter().filter(|found| found.severity > snapcore::backend::Severity::Note).collect();
        ensure!(bad.is_empty(), "the check finds {bad:?}");
        Ok(())
    }

    /// The names of what the disks consist of.
    pub(crate) fn footprint(&self) -> Result<BTreeSet<String>> {
        self.subject.footprint(&self.dir())
    }

    /// After an operation that may have happened: takes the model on to what the catalogue says, which must
    /// be as before or as after. Gives whether it happened.
    pub(crate) fn sync_model(&mut self, op: &Op) -> Result<bool> {
        let found = self.tree()?;
        let before = self.model.clone();
        self.update_model(op);
        if before.tree() == self.model.tree() {
            // A revert to the current snapshot: only the disks show it.
            let after = self.read()?;
            let happened = after
                .iter()
                .all(|(target, bytes)| self.model.disks.get(target).is_some_and(|wanted| **wanted == *bytes));
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

impl Drop for Fixture<'_> {
    fn drop(&mut self) {
        self.crash();
        if let Err(error) = self.subject.clear(&self.dir()) {
            eprintln!("the remains of {} cannot be removed: {error:#}", self.dir());
        }
    }
}

/// Both are the same bytes.
pub(crate) fn compare(found: &[u8], wanted: &Bytes) -> Result<()> {
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
