//! A plug-in as a [`DiskSnapshotter`].

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use snapcore::backend::{
    Capabilities, DeleteCost, DiskPlan, DiskRequest, DiskSnapshotter, DiskState, Finding, Guard,
    InspectDepth, Progress, Salvage, StepContext, StepStatus,
};
use snapcore::hypervisor::{AttachedDisk, OpenLayer};
use snapcore::manifest::{ManifestDirectory, ManifestStore};
use snapcore::{
    ActivePath, Disk, DiskAddress, DiskPoint, DiskRecord, Error, ErrorKind, LayerName, Point, PointKind,
    Result, Snapshot, Step,
};
use tokio_util::sync::CancellationToken;

use crate::checks::{self, Checked};
use crate::connection::{Connection, Limits, News};
use crate::protocol::{
    AdoptParams, CheckParams, CostParams, DiscoverParams, DiscoverResult, DiskParams, HelloParams,
    HelloResult, InspectParams, LayerParams, Lock, LockParams, ManifestParams, Method, NO_METHOD, OpenFile,
    PlanParams, SalvageParams, SalvageResult, StepParams, VERSION,
};

/// Time limit for a guard that waits until the plug-in has released a lock.
const RELEASE: Duration = Duration::from_secs(2);

/// A backend in a process of its own.
#[derive(Clone)]
pub struct Plugin {
    inner: Arc<Inner>,
}

struct Inner {
    name: String,
    program: Utf8PathBuf,
    limits: Limits,
    link: Mutex<Link>,
    /// Paths that the plug-in returned, by request. They never change.
    paths: Mutex<HashMap<String, Utf8PathBuf>>,
}

#[derive(Default)]
struct Link {
    connection: Option<Arc<Connection>>,
    capabilities: Option<Capabilities>,
    /// Number of disks that are locked over the connection.
    held: usize,
}

impl Plugin {
    /// The plug-in `program`, which serves the format `name`. It is started when it is first needed.
    pub fn new(name: impl Into<String>, program: impl Into<Utf8PathBuf>) -> Self {
        Self::with_limits(name, program, Limits::default())
    }

    /// Like [`Plugin::new`], with other limits.
    pub fn with_limits(name: impl Into<String>, program: impl Into<Utf8PathBuf>, limits: Limits) -> Self {
        Self {
            inner: Arc::new(Inner {
                name: name.into(),
                program: program.into(),
                limits,
                link: Mutex::default(),
                paths: Mutex::default(),
            }),
        }
    }

    /// The program.
    pub fn program(&self) -> &Utf8Path {
        &self.inner.program
    }

    /// Starts the plug-in if it does not run, and returns its capabilities. Waits for it on this thread.
    ///
    /// # Errors
    /// If it cannot be run, does not greet in time, or sends an invalid answer.
    pub fn greet(&self) -> Result<Capabilities> {
        self.inner.connection()?;
        match &self.inner.link().capabilities {
            Some(capabilities) => Ok(capabilities.clone()),
            None => Err(Error::new(ErrorKind::Internal, "a plug-in runs that has said nothing")),
        }
    }
}

impl Inner {
    fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the running plug-in. A plug-in that died is started again, but not while disks are locked:
    /// their locks died with it.
    fn connection(&self) -> Result<Arc<Connection>> {
        let mut link = self.link();
        if let Some(connection) = &link.connection {
            match connection.broken() {
                None => return Ok(connection.clone()),
                Some(broken) if link.held > 0 => {
                    return Err(broken.error().advise(
                        "it had the disk locked: repair it, then run `domsnap recover`, which starts it again",
                    ));
                }
                Some(_) => link.connection = None,
            }
        }
        let connection = Connection::start(&self.name, &self.program, self.limits)?;
        let params = HelloParams { protocol: VERSION, domsnap: env!("CARGO_PKG_VERSION").to_owned() };
        let answer = connection.call_blocking(Method::Hello, &params, self.limits.start)?;
        let hello: HelloResult = decoded(&connection, Method::Hello, answer)?;
        checks::hello(&hello, &self.name).map_err(|what| connection.reject(Method::Hello, &what))?;
        let connection = Arc::new(connection);
        link.capabilities = Some(hello.capabilities);
        link.connection = Some(connection.clone());
        Ok(connection)
    }

    /// Returns a path from the plug-in. If it fails or returns an invalid one, the result is `otherwise`; the
    /// next call that can fail reports the error.
    fn path(
        &self,
        method: Method,
        params: &impl Serialize,
        check: impl FnOnce(&Utf8Path) -> Checked,
        otherwise: impl FnOnce() -> Utf8PathBuf,
    ) -> Utf8PathBuf {
        let key = format!("{} {}", method.name(), serde_json::to_value(params).unwrap_or_default());
        if let Some(known) = self.paths.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return known.clone();
        }
        let answer = self.connection().and_then(|connection| {
            let answer = connection.call_blocking(method, params, self.limits.start)?;
            let path: Utf8PathBuf = decoded(&connection, method, answer)?;
            check(&path).map_err(|what| connection.reject(method, &what))?;
            Ok(path)
        });
        match answer {
            Ok(path) => {
                self.paths.lock().unwrap_or_else(PoisonError::into_inner).insert(key, path.clone());
                path
            }
            Err(error) => {
                tracing::warn!(%error, "asking a plug-in for a path");
                otherwise()
            }
        }
    }
}

/// Decodes an answer.
fn decoded<T: DeserializeOwned>(connection: &Connection, method: Method, answer: Value) -> Result<T> {
    serde_json::from_value(answer).map_err(|error| connection.reject(method, &error.to_string()))
}

/// A call whose caller may be dropped.
struct Waiting<'a> {
    connection: &'a Connection,
    id: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.connection.forget(self.id);
    }
}

/// Context of a long call.
#[derive(Clone, Copy, Default)]
struct CallContext<'a> {
    progress: Option<&'a dyn Progress>,
    cancel: Option<&'a CancellationToken>,
}

impl<'a> From<StepContext<'a>> for CallContext<'a> {
    fn from(context: StepContext<'a>) -> Self {
        Self { progress: Some(context.progress), cancel: Some(context.cancel) }
    }
}

async fn running(inner: &Arc<Inner>) -> Result<Arc<Connection>> {
    let inner = inner.clone();
    match tokio::task::spawn_blocking(move || inner.connection()).await {
        Ok(connection) => connection,
        Err(failure) => Err(Error::new(ErrorKind::Internal, "starting a plug-in broke off").because(failure)),
    }
}

/// Sends one request over a connection, and decodes the answer.
async fn ask<T: DeserializeOwned>(
    connection: &Connection,
    method: Method,
    params: &impl Serialize,
    with: CallContext<'_>,
) -> Result<T> {
    ask_if_known(connection, method, params, with)
        .await?
        .ok_or_else(|| connection.reject(method, "it does not know a method that every plug-in must"))
}

/// Like [`ask`], for an optional method. Returns `None` if the plug-in does not implement it.
async fn ask_if_known<T: DeserializeOwned>(
    connection: &Connection,
    method: Method,
    params: &impl Serialize,
    with: CallContext<'_>,
) -> Result<Option<T>> {
    let (id, call) = connection.send(method, params)?;
    let _waiting = Waiting { connection, id };
    let silence = connection.limits().silence;
    let mut deadline = Instant::now() + silence;
    let (mut furthest, mut cancelled) = (0, false);
    let never = CancellationToken::new();
    let cancel = with.cancel.unwrap_or(&never);
    loop {
        match call.news() {
            News::Nothing => {}
            News::Progress(done, total) => {
                // A plug-in also hangs if it repeats the same progress, or continues after it was cancelled.
                if done > furthest && !cancelled {
                    (furthest, deadline) = (done, Instant::now() + silence);
                }
                if let Some(progress) = with.progress {
                    progress.bytes(done.min(total), total);
                }
                continue;
            }
            News::Answer(answer) => return decoded(connection, method, answer).map(Some),
            News::Failure(failure) if failure.code == NO_METHOD => return Ok(None),
            News::Failure(failure) => return Err(connection.error_of(failure, cancelled)),
            News::Broken(broken) => return Err(broken.error()),
        }
        tokio::select! {
            () = call.changed() => {}
            () = cancel.cancelled(), if !cancelled => {
                connection.cancel(id);
                (cancelled, deadline) = (true, Instant::now() + silence);
            }
            () = tokio::time::sleep_until(deadline.into()) => {
                if matches!(call.news(), News::Nothing) {
                    return Err(connection.give_up(method, silence).error());
                }
            }
        }
    }
}

/// The files that the hypervisor has open.
async fn open_files(attached: Option<&dyn AttachedDisk>) -> Result<Vec<OpenFile>> {
    let Some(attached) = attached else { return Ok(Vec::new()) };
    let files = attached.open_files().await?;
    Ok(files.into_iter().map(|(device, inode)| OpenFile { device, inode }).collect())
}

impl Plugin {
    async fn ask<T: DeserializeOwned>(
        &self,
        method: Method,
        params: &impl Serialize,
        check: impl FnOnce(&mut T) -> Checked,
    ) -> Result<T> {
        let connection = running(&self.inner).await?;
        let mut answer = ask(&connection, method, params, CallContext::default()).await?;
        check(&mut answer).map_err(|what| connection.reject(method, &what))?;
        Ok(answer)
    }

    async fn ask_of_step<T: DeserializeOwned>(
        &self,
        method: Method,
        step: &Step,
        context: StepContext<'_>,
        with: CallContext<'_>,
    ) -> Result<T> {
        let open = open_files(context.attached).await?;
        let params = StepParams { step: step.clone(), disk: context.disk.clone(), open };
        let connection = running(&self.inner).await?;
        ask(&connection, method, &params, with).await
    }

    /// Checks the status after a success: a step that was done or undone must not be reported as the
    /// contrary.
    async fn is_not(
        &self,
        method: Method,
        step: &Step,
        context: StepContext<'_>,
        contrary: StepStatus,
    ) -> Result<()> {
        let status: StepStatus =
            self.ask_of_step(Method::Status, step, context, CallContext::default()).await?;
        if status != contrary {
            return Ok(());
        }
        let connection = running(&self.inner).await?;
        let what = format!("it succeeded, and its status is {status:?}");
        Err(connection.reject(method, &what))
    }
}

#[async_trait]
impl DiskSnapshotter for Plugin {
    /// A plug-in's actions are JSON to this process.
    type Action = serde_json::Value;

    fn format(&self) -> &str {
        &self.inner.name
    }

    fn processes(&self) -> Vec<u32> {
        self.inner.link().connection.iter().map(|connection| connection.process()).collect()
    }

    /// Returns no capabilities if the plug-in cannot be asked.
    fn capabilities(&self) -> Capabilities {
        let mut declared = self.greet().unwrap_or_else(|error| {
            tracing::warn!(%error, "asking a plug-in what it can do");
            let mut nothing = Capabilities::new(PointKind::Internal, 1);
            (nothing.internal, nothing.delete_in_chain, nothing.snapshot_of_snapshot) = (false, false, false);
            nothing
        });
        // The protocol has no calls for it.
        declared.reads_points = false;
        declared
    }

    async fn adopt(&self, disk: &Disk, active_path: ActivePath) -> Result<DiskRecord> {
        let params = AdoptParams { disk: disk.clone(), active_path };
        self.ask(Method::Adopt, &params, |record| checks::record(record, disk)).await
    }

    async fn inspect(
        &self,
        disk: &DiskRecord,
        depth: InspectDepth,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        let params = InspectParams { disk: disk.clone(), depth, open: open_files(attached).await? };
        let mut state: DiskState =
            self.ask(Method::Inspect, &params, |state| checks::state(state, disk)).await?;
        // The service, not the plug-in, knows if a hypervisor has the disk.
        state.attached = false;
        Ok(state)
    }

    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        let params = DiscoverParams { disk: record.clone(), known: known.to_vec() };
        let found: DiscoverResult =
            self.ask(Method::Discover, &params, |found| checks::discovered(found)).await?;
        for layer in found.layers {
            if !record.owned.contains(&layer) {
                record.owned.push(layer);
            }
        }
        let mut snapshots: Vec<Snapshot> = Vec::new();
        for point in found.points {
            let parent = point.parent.and_then(|index| snapshots.get(index)).map(|parent| parent.id);
            snapshots.push(
                Snapshot::new(
                    point.name,
                    point.created,
                    vec![DiskPoint::new(record.disk.target.clone(), point.point, point.virtual_size)],
                )
                .parent(parent),
            );
        }
        Ok(snapshots)
    }

    async fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan> {
        let params =
            PlanParams { disk: disk.clone(), state: state.clone(), active_path, request: request.clone() };
        let check = |plan: &mut DiskPlan| checks::plan(plan, request, state.attached, &disk.disk);
        self.ask(Method::Plan, &params, check).await
    }

    async fn lock(&self, disk: &DiskRecord, attached: Option<&dyn AttachedDisk>) -> Result<Guard> {
        let open = open_files(attached).await?;
        let connection = running(&self.inner).await?;
        let params = LockParams { disk: disk.clone(), open };
        let lock: Lock = ask(&connection, Method::Lock, &params, CallContext::default()).await?;
        checks::message(&lock.lock).map_err(|what| connection.reject(Method::Lock, &what))?;
        self.inner.link().held += 1;
        Ok(Box::new(DiskLock { inner: self.inner.clone(), connection, lock }))
    }

    async fn yield_locks(&self, disk: &DiskRecord) -> Result<()> {
        let params = DiskParams { disk: disk.clone() };
        let connection = running(&self.inner).await?;
        ask_if_known(&connection, Method::YieldLocks, &params, CallContext::default())
            .await
            .map(Option::unwrap_or_default)
    }

    async fn open_chain(&self, disk: &DiskRecord) -> Result<Vec<OpenLayer>> {
        let params = DiskParams { disk: disk.clone() };
        self.ask(Method::OpenChain, &params, |files: &mut Vec<_>| checks::chain(files, disk.disk.path()))
            .await
    }

    async fn apply(&self, step: &Step, context: StepContext<'_>) -> Result<()> {
        let () = self.ask_of_step(Method::Apply, step, context, context.into()).await?;
        self.is_not(Method::Apply, step, context, StepStatus::NotDone).await
    }

    async fn undo(&self, step: &Step, context: StepContext<'_>) -> Result<()> {
        let with = CallContext { cancel: None, ..context.into() };
        let () = self.ask_of_step(Method::Undo, step, context, with).await?;
        self.is_not(Method::Undo, step, context, StepStatus::Done).await
    }

    async fn salvage(&self, step: &Step, done: bool, context: StepContext<'_>) -> Result<Salvage> {
        let open = open_files(context.attached).await?;
        let params = SalvageParams { step: step.clone(), done, disk: context.disk.clone(), open };
        let connection = running(&self.inner).await?;
        let answer = ask_if_known(&connection, Method::Salvage, &params, CallContext::default()).await?;
        let answer = answer.unwrap_or(SalvageResult::Nothing);
        let checked = match &answer {
            SalvageResult::Nothing => Ok(()),
            SalvageResult::Saved { message } => checks::message(message),
            SalvageResult::Stays { edits, message } => {
                checks::message(message).and_then(|()| checks::edits(edits, &context.disk.disk))
            }
        };
        checked.map_err(|what| connection.reject(Method::Salvage, &what))?;
        Ok(match answer {
            SalvageResult::Nothing => Salvage::Nothing,
            SalvageResult::Saved { message } => Salvage::Saved(checks::plain(&message)),
            SalvageResult::Stays { edits, message } => Salvage::Stays(edits, checks::plain(&message)),
        })
    }

    async fn is_superseded(&self, step: &Step, context: StepContext<'_>) -> Result<bool> {
        let open = open_files(context.attached).await?;
        let params = StepParams { step: step.clone(), disk: context.disk.clone(), open };
        let connection = running(&self.inner).await?;
        let answer = ask_if_known(&connection, Method::IsSuperseded, &params, CallContext::default()).await?;
        Ok(answer.unwrap_or(false))
    }

    async fn status(&self, step: &Step, context: StepContext<'_>) -> Result<StepStatus> {
        self.ask_of_step(Method::Status, step, context, CallContext::default()).await
    }

    async fn check(&self, disk: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>> {
        let params = CheckParams { disk: disk.clone(), state: state.clone() };
        self.ask(Method::Check, &params, |found: &mut Vec<_>| checks::findings(found)).await
    }

    async fn cost_of_delete(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        drop: &[Point],
        keep: &[Point],
    ) -> Result<DeleteCost> {
        let params =
            CostParams { disk: disk.clone(), state: state.clone(), drop: drop.to_vec(), keep: keep.to_vec() };
        self.ask(Method::CostOfDelete, &params, checks::cost).await
    }

    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        let params = ManifestParams { disk: disk.clone() };
        let check = |path: &Utf8Path| checks::manifest_directory(path, disk.path());
        Arc::new(ManifestDirectory::new(self.inner.path(Method::ManifestDirectory, &params, check, || {
            disk.path().with_file_name(format!("{}.domsnap", disk.path().file_name().unwrap_or("disk")))
        })))
    }

    fn layer_address(&self, disk: &DiskRecord, layer: &LayerName) -> DiskAddress {
        let params = LayerParams { disk: disk.clone(), layer: layer.clone() };
        let check = |path: &Utf8Path| checks::path("a layer's file", path, disk.disk.path());
        self.inner.path(Method::LayerFile, &params, check, || disk.disk.path().to_owned()).into()
    }
}

/// A disk that a plug-in has locked. It is released when this is dropped, before anything else is done.
struct DiskLock {
    inner: Arc<Inner>,
    connection: Arc<Connection>,
    lock: Lock,
}

impl Drop for DiskLock {
    fn drop(&mut self) {
        // If the release fails, the plug-in is ended, and its lock with it.
        if self.connection.broken().is_none()
            && let Err(error) = self.connection.call_blocking(Method::Release, &self.lock, RELEASE)
        {
            let error = self.connection.reject(Method::Release, &error.to_string());
            tracing::warn!(%error, "giving back a disk");
        }
        let mut link = self.inner.link();
        link.held = link.held.saturating_sub(1);
    }
}
