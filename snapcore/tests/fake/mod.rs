//! A fake backend, and a catalogue in memory. A disk is a number and named copies of it, in memory. Any call
//! can fail, panic, be cancelled or stop for ever, before or after its effect. The catalogue's commits can do
//! the same.
//!
//! The unit tests of the engine and of the planner use it too: those are not public.

#![allow(dead_code, unused_imports, reason = "each test program uses its part")]

mod catalogue;
mod table;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

pub use self::catalogue::FakeCatalogue;
pub use self::table::Rows;
use async_trait::async_trait;
use camino::Utf8PathBuf;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snapcore::backend::*;
use snapcore::hypervisor::*;
use snapcore::manifest::{ManifestDirectory, ManifestStore};
use snapcore::*;
use tokio::sync::{Barrier, Notify};
use tokio_util::sync::CancellationToken;

/// The content of one disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FakeDisk {
    /// The current state.
    pub data: u64,
    /// Its points.
    pub tags: BTreeMap<String, u64>,
    /// States saved by operations: none may stay here.
    pub aside: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Action {
    /// Saves the current state.
    Stash { key: String },
    /// Names a copy of the current state.
    Tag { name: String },
    /// Replaces the current state by the copy.
    Restore { name: String, key: String },
    /// Drops the saved state.
    Unstash { key: String },
    /// Drops a copy.
    Drop { name: String },
}

/// The time of a fault, relative to the call's effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    Before,
    After,
}

/// The kind of a fault.
#[derive(Debug, Clone)]
pub enum How {
    Fail(ErrorKind),
    Panic,
    /// A killed process: the call never returns.
    Stop,
    Cancel(CancellationToken),
}

/// A fault at the call of this number, counted from 1.
#[derive(Debug, Clone)]
pub struct Fault {
    pub number: usize,
    pub when: When,
    pub how: How,
}

/// Counts calls and injects faults.
#[derive(Debug, Default)]
pub struct Faults {
    state: Mutex<(usize, Vec<Fault>)>,
    pub stopped: Notify,
}

impl Faults {
    pub fn set(&self, faults: Vec<Fault>) {
        *self.state.lock().unwrap() = (0, faults);
    }

    pub fn count(&self) -> usize {
        self.state.lock().unwrap().0
    }

    pub fn next(&self) -> usize {
        let mut state = self.state.lock().unwrap();
        state.0 += 1;
        state.0
    }

    pub async fn inject(&self, number: usize, when: When) -> Result<()> {
        let how = {
            let state = self.state.lock().unwrap();
            state.1.iter().find(|f| f.number == number && f.when == when).map(|f| f.how.clone())
        };
        match how {
            None => Ok(()),
            Some(How::Fail(kind)) => Err(Error::new(kind, "the fault that the test wanted")),
            Some(How::Panic) => panic!("the panic that the test wanted"),
            Some(How::Cancel(token)) => {
                token.cancel();
                Ok(())
            }
            Some(How::Stop) => {
                self.stopped.notify_one();
                std::future::pending().await
            }
        }
    }
}

/// The fake backend. Clones share their disks.
#[derive(Clone, Default)]
pub struct FakeBackend {
    disks: Arc<Mutex<BTreeMap<Utf8PathBuf, FakeDisk>>>,
    pub applies: Arc<Faults>,
    pub undos: Arc<Faults>,
    /// The summaries of the steps to apply, in their order.
    pub applied: Arc<Mutex<Vec<String>>>,
    /// Summaries of steps that the domain's later writes superseded.
    pub superseded: Arc<Mutex<Vec<String>>>,
    /// The calls of salvage: the target, and true if the journal has the step as done.
    pub salvaged: Arc<Mutex<Vec<(Target, bool)>>>,
    /// The declared capabilities, instead of internal points at rest.
    pub declared: Option<Capabilities>,
    /// The table for a backend whose disks are rows at `table:NAME`, and no files; its manifests are rows
    /// too.
    pub rows: Option<Rows>,
    /// If set, each step that names a copy waits here for those of other disks.
    pub meeting: Option<Arc<Barrier>>,
    /// If set, each step that names a copy takes this time.
    pub slow: Option<Duration>,
    /// The steps that name a copy and are under way.
    pub under_way: Arc<UnderWay>,
    /// For a test's hypervisor: the time of its last pause.
    pub pause: Arc<Mutex<Duration>>,
}

/// Counts steps that are under way.
#[derive(Debug, Default)]
pub struct UnderWay(Mutex<(usize, usize)>);

impl UnderWay {
    fn begin(&self) {
        let mut counts = self.0.lock().unwrap();
        counts.0 += 1;
        counts.1 = counts.1.max(counts.0);
    }

    fn end(&self) {
        self.0.lock().unwrap().0 -= 1;
    }

    /// The most that were under way at once.
    pub fn most(&self) -> usize {
        self.0.lock().unwrap().1
    }
}

impl FakeBackend {
    /// Creates a backend whose disks are rows of a table.
    pub fn of_rows() -> Self {
        Self { rows: Some(Rows::default()), ..Self::default() }
    }

    pub fn disks(&self) -> MutexGuard<'_, BTreeMap<Utf8PathBuf, FakeDisk>> {
        self.disks.lock().unwrap()
    }

    /// The content of all disks.
    pub fn world(&self) -> BTreeMap<Utf8PathBuf, FakeDisk> {
        self.disks().clone()
    }

    /// The same disks without faults, as the next process finds them.
    pub fn after_a_crash(&self) -> Self {
        let (disks, rows, declared) = (self.disks.clone(), self.rows.clone(), self.declared.clone());
        Self { disks, rows, declared, ..Self::default() }
    }

    pub fn write(&self, path: &Utf8PathBuf, data: u64) {
        self.disks().get_mut(path).expect("a disk of the test").data = data;
    }

    fn disk(&self, path: &Utf8PathBuf) -> Result<FakeDisk> {
        let found = self.disks().get(path).cloned();
        found.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("there is no fake disk {path}")))
    }

    fn change(&self, path: &Utf8PathBuf, change: impl FnOnce(&mut FakeDisk)) -> Result<()> {
        match self.disks().get_mut(path) {
            Some(disk) => {
                change(disk);
                Ok(())
            }
            None => Err(Error::new(ErrorKind::NotFound, format!("there is no fake disk {path}"))),
        }
    }
}

fn layer_of(disk: &Disk) -> LayerName {
    LayerName(format!("{}.layer", disk.address.name().replace(':', "-")))
}

/// The name of a disk in the fake's memory.
fn key(disk: &Disk) -> Utf8PathBuf {
    disk.address.as_str().into()
}

fn step(disk: &Disk, action: Action, bytes: u64) -> Step<Action> {
    let summary = format!("{action:?}");
    Step::new(disk.target.clone(), action, summary).bytes(bytes)
}

#[async_trait]
impl DiskSnapshotter for FakeBackend {
    type Action = Action;

    fn format(&self) -> &str {
        if self.rows.is_some() { "table" } else { "fake" }
    }

    fn scheme(&self) -> Option<&str> {
        self.rows.as_ref().map(|_| "table")
    }

    async fn resolve(&self, address: &DiskAddress) -> Result<DiskAddress> {
        // Names of rows have small letters, in any spelling of the user.
        let name = Utf8PathBuf::from(address.as_str().to_lowercase());
        self.disk(&name)?;
        Ok(name.into())
    }

    async fn identity(&self, disk: &Disk) -> Result<Option<DiskIdentity>> {
        let found = self.disks().contains_key(&key(disk));
        Ok(found.then(|| DiskIdentity::Named(disk.address.to_string())))
    }

    async fn has_layer(&self, record: &DiskRecord, layer: &LayerName) -> Result<bool> {
        Ok(self.disks().contains_key(&key(&record.disk)) && *layer == layer_of(&record.disk))
    }

    async fn is_gone(&self, record: &DiskRecord) -> Result<bool> {
        Ok(self.rows.is_some() && !self.disks().contains_key(&key(&record.disk)))
    }

    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        match &self.rows {
            Some(rows) => Arc::new(rows.of(disk)),
            None => Arc::new(ManifestDirectory::new(
                disk.path().with_file_name(format!("{}.domsnap", disk.address.name())),
            )),
        }
    }

    fn capabilities(&self) -> Capabilities {
        self.declared.clone().unwrap_or_else(|| Capabilities::new(PointKind::Internal, 1))
    }

    async fn adopt(&self, disk: &Disk, _: ActivePath) -> Result<DiskRecord> {
        self.disk(&key(disk))?;
        Ok(DiskRecord::new(disk.clone(), layer_of(disk)).owned(vec![layer_of(disk)]))
    }

    async fn inspect(
        &self,
        record: &DiskRecord,
        _: InspectDepth,
        _: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        let disk = self.disk(&key(&record.disk))?;
        let internal =
            disk.tags.keys().map(|tag| InternalPoint::new(tag.clone(), 4096, Timestamp::UNIX_EPOCH));
        let layer = Layer::new(record.active.clone(), record.disk.address.clone(), "fake", 4096)
            .owned(true)
            .allocated(512)
            .internal(internal.collect());
        Ok(DiskState::new(record.disk.target.clone(), record.active.clone(), vec![layer]))
    }

    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        let disk = self.disk(&key(&record.disk))?;
        let mut parent = None;
        let unknown = disk.tags.keys().filter(|tag| !known.iter().any(|p| p.tag.as_ref() == Some(tag)));
        let found = unknown.map(|tag| {
            let id = SnapshotId::fresh();
            Snapshot::new(
                SnapshotName::new(tag.clone()).unwrap(),
                Timestamp::UNIX_EPOCH,
                vec![DiskPoint::new(
                    record.disk.target.clone(),
                    Point::internal(record.active.clone(), tag.clone()),
                    4096,
                )],
            )
            .id(id)
            .parent(parent.replace(id))
        });
        Ok(found.collect())
    }

    async fn plan(
        &self,
        record: &DiskRecord,
        state: &DiskState,
        _: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan<Action>> {
        let disk = &record.disk;
        let there = self.disk(&key(disk))?;
        let mut plan = DiskPlan::default();
        let mut add = |group, action, bytes| plan.push(group, step(disk, action, bytes));
        let key = |number: &u32| format!("op{number}");
        match request {
            DiskRequest::Create { name, stamp, .. } => {
                add(Group::Prepare, Action::Stash { key: key(stamp) }, 0);
                if !state.attached {
                    add(Group::Cut, Action::Tag { name: name.to_string() }, 0);
                }
                add(Group::Finish, Action::Unstash { key: key(stamp) }, 0);
                if state.attached {
                    let take = step(disk, Action::Tag { name: name.to_string() }, 0);
                    plan.instant = Some(InstantPlan::new(DiskInstant::ByBackend, vec![take]));
                }
                plan.point = Some(Point::internal(record.active.clone(), name.as_str()));
            }
            DiskRequest::Revert { to, save, stamp, .. } => {
                add(Group::Prepare, Action::Stash { key: key(stamp) }, 0);
                if let Some(save) = save {
                    add(Group::Cut, Action::Tag { name: save.to_string() }, 0);
                }
                let name = to.tag.clone().unwrap();
                add(Group::Cut, Action::Restore { name, key: key(stamp) }, 10);
                add(Group::Finish, Action::Unstash { key: key(stamp) }, 0);
                plan.point = save.as_ref().map(|save| Point::internal(record.active.clone(), save.as_str()));
            }
            DiskRequest::Delete { keep, .. } => {
                let kept = |tag: &String| keep.iter().any(|point| point.tag.as_ref() == Some(tag));
                for name in there.tags.into_keys().filter(|tag| !kept(tag)) {
                    let drop = FinishStep::new(step(disk, Action::Drop { name }, 100));
                    plan.finish.push(drop.deferrable(true));
                }
            }
            #[allow(unreachable_patterns, reason = "outside of the crate there may be more requests")]
            other => return Err(Error::new(ErrorKind::Unsupported, format!("the fake cannot do {other:?}"))),
        }
        Ok(plan)
    }

    async fn lock(&self, _: &DiskRecord, _: Option<&dyn AttachedDisk>) -> Result<Guard> {
        Ok(Box::new(()))
    }

    async fn open_chain(&self, record: &DiskRecord) -> Result<Vec<OpenLayer>> {
        Ok(vec![OpenLayer::new(record.disk.address.clone(), "fake")])
    }

    async fn apply(&self, step: &Step<Action>, context: StepContext<'_>) -> Result<()> {
        let number = self.applies.next();
        self.applied.lock().unwrap().push(step.summary.clone());
        self.applies.inject(number, When::Before).await?;
        context.progress.bytes(step.bytes, step.bytes);
        let path = &key(&context.disk.disk);
        match step.action.clone() {
            Action::Stash { key } => self.change(path, |disk| {
                disk.aside.insert(key, disk.data);
            })?,
            Action::Tag { name } => {
                self.under_way.begin();
                if let Some(meeting) = &self.meeting {
                    meeting.wait().await;
                }
                if let Some(time) = self.slow {
                    tokio::time::sleep(time).await;
                }
                self.under_way.end();
                self.change(path, |disk| {
                    disk.tags.insert(name, disk.data);
                })?;
            }
            Action::Restore { name, .. } => self.change(path, |disk| disk.data = disk.tags[&name])?,
            Action::Unstash { key } => self.change(path, |disk| {
                disk.aside.remove(&key);
            })?,
            Action::Drop { name } => {
                if context.cancel.is_cancelled() {
                    return Err(Error::new(ErrorKind::Cancelled, "it was cancelled"));
                }
                self.change(path, |disk| {
                    disk.tags.remove(&name);
                })?;
            }
        }
        self.applies.inject(number, When::After).await
    }

    async fn undo(&self, step: &Step<Action>, context: StepContext<'_>) -> Result<()> {
        let number = self.undos.next();
        self.undos.inject(number, When::Before).await?;
        let path = &key(&context.disk.disk);
        match step.action.clone() {
            Action::Stash { key } | Action::Unstash { key } => self.change(path, |disk| {
                disk.aside.remove(&key);
            })?,
            Action::Tag { name } => self.change(path, |disk| {
                disk.tags.remove(&name);
            })?,
            Action::Restore { key, .. } => self.change(path, |disk| {
                disk.data = disk.aside.get(&key).copied().unwrap_or(disk.data);
            })?,
            Action::Drop { .. } => panic!("a finish step is never undone"),
        }
        self.undos.inject(number, When::After).await
    }

    async fn salvage(&self, step: &Step<Action>, done: bool, _: StepContext<'_>) -> Result<Salvage> {
        self.salvaged.lock().unwrap().push((step.target.clone(), done));
        Ok(Salvage::Nothing)
    }

    async fn is_superseded(&self, step: &Step<Action>, _: StepContext<'_>) -> Result<bool> {
        Ok(self.superseded.lock().unwrap().contains(&step.summary))
    }

    async fn status(&self, _: &Step<Action>, _: StepContext<'_>) -> Result<StepStatus> {
        Ok(StepStatus::Partly)
    }

    async fn check(&self, _: &DiskRecord, _: &DiskState) -> Result<Vec<Finding>> {
        Ok(Vec::new())
    }

    async fn cost_of_delete(
        &self,
        _: &DiskRecord,
        _: &DiskState,
        drop: &[Point],
        _: &[Point],
    ) -> Result<DeleteCost> {
        Ok(DeleteCost::new(512 * drop.len() as u64, 100 * drop.len() as u64))
    }

    fn layer_address(&self, disk: &DiskRecord, _: &LayerName) -> DiskAddress {
        disk.disk.address.clone()
    }
}
