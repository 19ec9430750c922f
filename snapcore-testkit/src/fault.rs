//! Faults at every call that the engine makes to a backend or to its catalogue, and watching what a backend
//! answers.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use catalogue_sqlite::SqliteCatalogue;
use snapcore::backend::{
    AnyDiskSnapshotter, Capabilities, DeleteCost, DiskPlan, DiskRequest, DiskSnapshotter, DiskState, Finding,
    Guard, InspectDepth, Progress, Salvage, StepContext, StepStatus,
};
use snapcore::catalogue::{Catalogue, CatalogueId, Change, Entry, EntrySummary, Lease, Revision, Revisions};
use snapcore::catalogue::{Operation, OperationId};
use snapcore::hypervisor::{AttachedDisk, OpenLayer};
use snapcore::manifest::ManifestStore;
use snapcore::{
    ActivePath, Disk, DiskAddress, DiskRecord, DomainName, Error, ErrorKind, LayerName, Point, Result,
    Snapshot, Step,
};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::wrong::{Wrong, Wrongdoer};

/// A moment of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Moment {
    /// A step is about to be done.
    BeforeApply,
    /// A step is done, and the engine does not know it yet.
    AfterApply,
    /// A step is about to be undone.
    BeforeUndo,
    /// A step is undone, and the engine does not know it yet.
    AfterUndo,
    /// Something is about to be recorded.
    BeforeCommit,
    /// Something is recorded, and its caller does not know it.
    AfterCommit,
    /// In the middle of a step.
    Progress,
}

impl Moment {
    /// All moments at which an operation can be stopped from outside a step.
    pub(crate) const BETWEEN: [Self; 6] = [
        Self::BeforeApply,
        Self::AfterApply,
        Self::BeforeUndo,
        Self::AfterUndo,
        Self::BeforeCommit,
        Self::AfterCommit,
    ];
}

/// The effect of a fault.
#[derive(Debug, Clone)]
pub(crate) enum FaultKind {
    /// The call fails.
    Fail(ErrorKind),
    /// The call never comes back.
    Stop,
    /// The operation is cancelled.
    Cancel(CancellationToken),
    /// This process is killed.
    Kill,
}

/// A fault at the `number`th, counted from 1, of some moments.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) moments: Vec<Moment>,
    pub(crate) number: u64,
    pub(crate) kind: FaultKind,
}

impl Fault {
    pub(crate) fn new(moments: &[Moment], number: u64, kind: FaultKind) -> Self {
        Self { moments: moments.to_vec(), number, kind }
    }
}

#[derive(Debug, Default)]
struct Armed {
    faults: Vec<Fault>,
    fired: bool,
    twice: bool,
    watched: bool,
    seen: Vec<String>,
    statuses: Vec<StepStatus>,
    declared: Option<Capabilities>,
    wrong: Option<Wrongdoer>,
}

/// Injects faults, and records what it saw.
#[derive(Debug, Default)]
pub(crate) struct FaultInjector {
    armed: Mutex<Armed>,
    pub(crate) stopped: Notify,
}

impl FaultInjector {
    fn armed(&self) -> MutexGuard<'_, Armed> {
        self.armed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Injects these faults from now on, and forgets earlier ones.
    pub(crate) fn arm(&self, faults: Vec<Fault>) {
        let mut armed = self.armed();
        (armed.faults, armed.fired) = (faults, false);
    }

    /// Injects none any more.
    pub(crate) fn disarm(&self) {
        self.armed().faults.clear();
    }

    /// Returns true if one fired since they were armed.
    pub(crate) fn has_fired(&self) -> bool {
        self.armed().fired
    }

    /// Does and undoes every step twice from now on.
    pub(crate) fn do_twice(&self) {
        self.armed().twice = true;
    }

    /// Lets the backend declare this instead of what it can.
    pub(crate) fn declare(&self, capabilities: Capabilities) {
        self.armed().declared = Some(capabilities);
    }

    /// Breaks a promise from now on.
    pub(crate) fn do_wrong(&self, wrong: Wrong) {
        self.armed().wrong = Some(Wrongdoer::new(wrong));
    }

    /// What breaks a promise, if anything does.
    fn wrong(&self) -> Option<Wrongdoer> {
        self.armed().wrong.clone()
    }

    /// Asks for every step's status, before and after, from now on.
    pub(crate) fn watch(&self) {
        self.armed().watched = true;
    }

    /// The wrong statuses that were reported.
    pub(crate) fn wrong_statuses(&self) -> Vec<String> {
        self.armed().seen.clone()
    }

    /// Returns true if the backend ever reported `status`.
    pub(crate) fn was_reported(&self, status: StepStatus) -> bool {
        self.armed().statuses.contains(&status)
    }

    fn modes(&self) -> (bool, bool) {
        let armed = self.armed();
        (armed.twice, armed.watched)
    }

    fn due(&self, moment: Moment) -> Option<FaultKind> {
        let mut armed = self.armed();
        let mut due = None;
        for fault in armed.faults.iter_mut().filter(|fault| fault.moments.contains(&moment)) {
            if fault.number == 1 {
                due = Some(fault.kind.clone());
            }
            fault.number = fault.number.wrapping_sub(1);
        }
        armed.fired |= due.is_some();
        due
    }

    pub(crate) async fn pass(&self, moment: Moment) -> Result<()> {
        match self.due(moment) {
            None => Ok(()),
            Some(FaultKind::Fail(kind)) => Err(Error::new(kind, format!("an injected fault ({moment:?})"))),
            Some(FaultKind::Stop) => {
                self.stopped.notify_one();
                std::future::pending().await
            }
            Some(FaultKind::Cancel(token)) => {
                token.cancel();
                Ok(())
            }
            Some(FaultKind::Kill) => die(),
        }
    }
}

/// Ends this process as a power failure would, as far as can be done from within.
fn die<T>() -> Result<T> {
    let own = rustix::process::getpid();
    if let Err(cause) = rustix::process::kill_process(own, rustix::process::Signal::KILL) {
        return Err(Error::new(ErrorKind::Io, "the kit cannot kill its own process").because(cause));
    }
    loop {
        std::thread::park();
    }
}

/// A backend with faults at its calls.
pub(crate) struct FaultyBackend {
    pub(crate) inner: Arc<AnyDiskSnapshotter>,
    pub(crate) faults: Arc<FaultInjector>,
}

/// Forwards progress, and injects faults there.
struct FaultyProgress<'a> {
    inner: &'a dyn Progress,
    faults: &'a FaultInjector,
}

impl Progress for FaultyProgress<'_> {
    fn bytes(&self, done: u64, total: u64) {
        self.inner.bytes(done, total);
        match self.faults.due(Moment::Progress) {
            Some(FaultKind::Kill) => {
                let _ = die::<()>();
            }
            Some(FaultKind::Cancel(token)) => token.cancel(),
            Some(FaultKind::Fail(_) | FaultKind::Stop) | None => {}
        }
    }
}

impl FaultyBackend {
    /// Records a status that is `wrong`. `Partly` never is: some steps show that they are complete only by
    /// being done again.
    async fn ask(&self, step: &Step, context: StepContext<'_>, when: &str, wrong: StepStatus) -> Result<()> {
        let status = self.inner.status(step, context).await?;
        let mut armed = self.faults.armed();
        if status == wrong {
            armed.seen.push(format!("{when}, the status of '{}' is {status:?}", step.summary));
        }
        armed.statuses.push(status);
        Ok(())
    }
}

// Every method is delegated: a default method that were forgotten here would hide the backend's own.
#[deny(clippy::missing_trait_methods)]
#[async_trait]
impl DiskSnapshotter for FaultyBackend {
    type Action = serde_json::Value;

    fn format(&self) -> &str {
        self.inner.format()
    }
    fn capabilities(&self) -> Capabilities {
        self.faults.armed().declared.clone().unwrap_or_else(|| self.inner.capabilities())
    }
    fn processes(&self) -> Vec<u32> {
        self.inner.processes()
    }
    async fn borrow(&self, disk: &DiskRecord) -> Result<Option<Guard>> {
        self.inner.borrow(disk).await
    }
    fn scheme(&self) -> Option<&str> {
        self.inner.scheme()
    }
    async fn resolve(&self, address: &DiskAddress) -> Result<DiskAddress> {
        self.inner.resolve(address).await
    }
    async fn identity(&self, disk: &Disk) -> Result<Option<snapcore::DiskIdentity>> {
        self.inner.identity(disk).await
    }
    async fn has_layer(&self, disk: &DiskRecord, layer: &LayerName) -> Result<bool> {
        self.inner.has_layer(disk, layer).await
    }
    fn advice(&self, disk: &DiskRecord, on: snapcore::backend::AdviceOn<'_>) -> Option<String> {
        self.inner.advice(disk, on)
    }
    fn needs_of(&self, disk: &DiskRecord, step: &Step) -> Vec<snapcore::backend::StepNeed> {
        self.inner.needs_of(disk, step)
    }
    async fn identify(&self, disk: &DiskRecord, point: &Point) -> Result<Option<snapcore::TagIdentity>> {
        self.inner.identify(disk, point).await
    }
    fn leftover(&self, disk: &DiskRecord, step: &Step) -> snapcore::backend::Leftover {
        self.inner.leftover(disk, step)
    }
    fn configured_address(&self, layer: &DiskAddress) -> Option<DiskAddress> {
        self.inner.configured_address(layer)
    }
    fn uses(&self, disk: &DiskRecord, step: &Step) -> snapcore::backend::FileUses {
        self.inner.uses(disk, step)
    }
    fn room(&self, disk: &DiskRecord, step: &Step) -> u64 {
        self.inner.room(disk, step)
    }
    async fn bases(&self, disk: &DiskRecord) -> Result<Vec<snapcore::backend::Base>> {
        self.inner.bases(disk).await
    }
    fn recognises(&self, address: &DiskAddress, open_format: Option<&str>) -> bool {
        self.inner.recognises(address, open_format)
    }
    async fn require_shown(
        &self,
        address: &DiskAddress,
        seen: &snapcore::hypervisor::SeenDisk,
    ) -> Result<()> {
        self.inner.require_shown(address, seen).await
    }
    async fn adopt(&self, disk: &Disk, active_path: ActivePath) -> Result<DiskRecord> {
        self.inner.adopt(disk, active_path).await
    }
    async fn inspect(
        &self,
        disk: &DiskRecord,
        depth: InspectDepth,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        self.inner.inspect(disk, depth, attached).await
    }
    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        self.inner.discover(record, known).await
    }
    async fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan> {
        let plan = self.inner.plan(disk, state, active_path, request).await?;
        match self.faults.wrong() {
            Some(wrong) => wrong.plan(disk, state, request, plan),
            None => Ok(plan),
        }
    }
    async fn plan_clone(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        request: &snapcore::backend::CloneDisk,
    ) -> Result<snapcore::backend::ClonePlan> {
        self.inner.plan_clone(disk, state, request).await
    }
    async fn open_point(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        point: &Point,
    ) -> Result<Arc<dyn snapcore::backend::PointImage>> {
        self.inner.open_point(disk, state, point).await
    }
    async fn differences(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        from: &Point,
        to: &Point,
    ) -> Result<snapcore::backend::Differences> {
        self.inner.differences(disk, state, from, to).await
    }
    async fn lock(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard> {
        self.inner.lock(disk, attached).await
    }
    async fn yield_locks(&self, disk: &DiskRecord) -> Result<()> {
        self.inner.yield_locks(disk).await
    }
    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<OpenLayer>> {
        self.inner.open_chain(disk).await
    }

    async fn apply(&self, step: &Step, context: StepContext<'_>) -> Result<()> {
        let (twice, watched) = self.faults.modes();
        if watched {
            self.ask(step, context, "before it is done", StepStatus::Done).await?;
        }
        self.faults.pass(Moment::BeforeApply).await?;
        let progress = FaultyProgress { inner: context.progress, faults: &self.faults };
        let context = context.progress(&progress);
        self.inner.apply(step, context).await?;
        if twice {
            self.inner.apply(step, context).await?;
        }
        if let Some(wrong) = self.faults.wrong() {
            wrong.applied(context.disk, |layer| self.inner.layer_address(context.disk, layer))?;
        }
        if watched {
            self.ask(step, context, "after it is done", StepStatus::NotDone).await?;
        }
        self.faults.pass(Moment::AfterApply).await
    }

    async fn undo(&self, step: &Step, context: StepContext<'_>) -> Result<()> {
        let (twice, watched) = self.faults.modes();
        self.faults.pass(Moment::BeforeUndo).await?;
        if let Some(wrong) = self.faults.wrong()
            && wrong.replaces_undo(context.disk)?
        {
            return Ok(());
        }
        self.inner.undo(step, context).await?;
        if twice {
            self.inner.undo(step, context).await?;
        }
        if watched {
            self.ask(step, context, "after it is undone", StepStatus::Done).await?;
        }
        self.faults.pass(Moment::AfterUndo).await
    }

    async fn salvage(&self, step: &Step, done: bool, context: StepContext<'_>) -> Result<Salvage> {
        self.inner.salvage(step, done, context).await
    }
    async fn is_superseded(&self, step: &Step, context: StepContext<'_>) -> Result<bool> {
        self.inner.is_superseded(step, context).await
    }
    async fn status(&self, step: &Step, context: StepContext<'_>) -> Result<StepStatus> {
        self.inner.status(step, context).await
    }
    async fn check(&self, disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>> {
        self.inner.check(disk, state).await
    }
    async fn cost_of_delete(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        drop: &[Point],
        keep: &[Point],
    ) -> Result<DeleteCost> {
        let cost = self.inner.cost_of_delete(disk, state, drop, keep).await?;
        let free = self.faults.wrong().is_some_and(|wrong| wrong.is(Wrong::FreeDeletes));
        Ok(if free { DeleteCost::new(0, 0) } else { cost })
    }
    async fn referenced(&self, disk: &DiskRecord, state: &DiskState, point: &Point) -> Result<Option<u64>> {
        self.inner.referenced(disk, state, point).await
    }
    async fn is_gone(&self, disk: &DiskRecord) -> Result<bool> {
        self.inner.is_gone(disk).await
    }

    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        self.inner.manifests(disk)
    }
    fn layer_address(&self, disk: &DiskRecord, layer: &LayerName) -> DiskAddress {
        self.inner.layer_address(disk, layer)
    }
}

/// The catalogue of one machine, with faults at its commits.
pub(crate) struct FaultyCatalogue {
    pub(crate) inner: SqliteCatalogue,
    pub(crate) faults: Arc<FaultInjector>,
}

#[async_trait]
impl Catalogue for FaultyCatalogue {
    async fn identity(&self) -> Result<Option<CatalogueId>> {
        self.inner.identity().await
    }
    async fn domains(&self) -> Result<Vec<EntrySummary>> {
        self.inner.domains().await
    }
    async fn load(&self, name: &DomainName) -> Result<Option<Entry>> {
        self.inner.load(name).await
    }
    async fn owners(&self, disks: &[DiskAddress]) -> Result<Vec<(DiskAddress, DomainName)>> {
        self.inner.owners(disks).await
    }
    async fn unfinished(&self, name: &DomainName) -> Result<Vec<Operation>> {
        self.inner.unfinished(name).await
    }
    async fn operations(&self, name: &DomainName) -> Result<Vec<Operation>> {
        self.inner.operations(name).await
    }
    async fn operation(&self, name: &DomainName, id: OperationId) -> Result<Option<Operation>> {
        self.inner.operation(name, id).await
    }
    async fn commit(&self, name: &DomainName, expected: Revision, changes: Vec<Change>) -> Result<Revision> {
        self.faults.pass(Moment::BeforeCommit).await?;
        let revision = self.inner.commit(name, expected, changes).await?;
        self.faults.pass(Moment::AfterCommit).await?;
        Ok(revision)
    }
    async fn watch(&self, name: &DomainName) -> Result<Revisions> {
        self.inner.watch(name).await
    }
    async fn lease(&self, name: &str, holder: &str, time_to_live: Duration) -> Result<Lease> {
        self.inner.lease(name, holder, time_to_live).await
    }
}
