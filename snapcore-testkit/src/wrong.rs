//! Backends that break one promise each, to show that a test case finds it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use snapcore::backend::{AnyDiskSnapshotter, DiskPlan, DiskRequest, DiskState, InstantPlan};
use snapcore::{DiskAddress, DiskRecord, Error, ErrorKind, LayerName, Result, Target};

use crate::fault::{FaultInjector, FaultyBackend};

/// A promise that is broken. All but the first need disks that are files, and points that are copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Wrong {
    /// `cost_of_delete` always reports that a delete frees and moves nothing.
    FreeDeletes,
    /// The point of a running domain is taken when the guest runs again.
    LatePoint,
    /// The same, of all disks but `vda`.
    LateSecondDisk,
    /// The point of a running domain is taken before the guest is paused.
    EarlyPoint,
    /// A point is another name of the file that the domain writes.
    SharedPoint,
    /// A revert of a running domain changes the disks before they are detached.
    EarlyRevert,
    /// The undo of a create brings the disk back to what it was when its point was taken.
    UndoRestores,
    /// An undo does nothing.
    UndoLeaves,
    /// A delete writes to the current state.
    DeleteDamages,
    /// The plan of an operation makes a file.
    PlanWrites,
}

/// `inner`, which breaks this promise.
pub fn backend(inner: Arc<AnyDiskSnapshotter>, wrong: Wrong) -> Arc<AnyDiskSnapshotter> {
    let faults = Arc::new(FaultInjector::default());
    faults.do_wrong(wrong);
    Arc::new(FaultyBackend { inner, faults })
}

/// Breaks a promise, at the calls at which it can be broken.
#[derive(Debug, Clone)]
pub(crate) struct Wrongdoer {
    wrong: Wrong,
    disks: Arc<Mutex<HashMap<Target, Remembered>>>,
}

/// What the last plan of a disk was.
#[derive(Debug, Default)]
struct Remembered {
    /// The layer of the point that a create makes.
    point: Option<LayerName>,
    /// The content of the disk when the first step of a create was done.
    then: Option<Vec<u8>>,
    deletes: bool,
}

impl Wrongdoer {
    pub(crate) fn new(wrong: Wrong) -> Self {
        Self { wrong, disks: Arc::default() }
    }

    pub(crate) fn is(&self, wrong: Wrong) -> bool {
        self.wrong == wrong
    }

    fn disks(&self) -> MutexGuard<'_, HashMap<Target, Remembered>> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes a plan.
    pub(crate) fn plan(
        &self,
        disk: &DiskRecord,
        state: &DiskState,
        request: &DiskRequest,
        mut plan: DiskPlan,
    ) -> Result<DiskPlan> {
        let target = &disk.disk.target;
        let remembered = Remembered {
            point: plan
                .point
                .as_ref()
                .filter(|_| matches!(request, DiskRequest::Create { .. }))
                .map(|point| point.layer.clone()),
            then: None,
            deletes: matches!(request, DiskRequest::Delete { .. }),
        };
        self.disks().insert(target.clone(), remembered);
        if self.is(Wrong::PlanWrites) {
            std::fs::write(format!("{}.planned", disk.disk.path()), "").map_err(failed)?;
        }
        if !state.attached {
            return Ok(plan);
        }
        let late = self.is(Wrong::LatePoint) || (self.is(Wrong::LateSecondDisk) && target.as_str() != "vda");
        if let Some(InstantPlan { nested, .. }) = &mut plan.instant {
            if late {
                plan.cut.splice(0..0, nested.drain(..));
            } else if self.is(Wrong::EarlyPoint) {
                plan.prepare.append(nested);
            }
        }
        if self.is(Wrong::EarlyRevert) && matches!(request, DiskRequest::Revert { .. }) {
            plan.prepare.append(&mut plan.cut);
        }
        Ok(plan)
    }

    /// Does something to the disk after a step was done.
    pub(crate) fn applied(
        &self,
        disk: &DiskRecord,
        layer_address: impl FnOnce(&LayerName) -> DiskAddress,
    ) -> Result<()> {
        let mut disks = self.disks();
        let Some(remembered) = disks.get_mut(&disk.disk.target) else { return Ok(()) };
        let path = disk.disk.path();
        match self.wrong {
            Wrong::SharedPoint => {
                let point = remembered.point.as_ref().map(layer_address);
                let Some(point) =
                    point.as_ref().and_then(|point| point.local()).filter(|point| point.exists())
                else {
                    return Ok(());
                };
                std::fs::remove_file(point).and_then(|()| std::fs::hard_link(path, point)).map_err(failed)
            }
            Wrong::UndoRestores if remembered.point.is_some() && remembered.then.is_none() => {
                remembered.then = Some(std::fs::read(path).map_err(failed)?);
                Ok(())
            }
            Wrong::DeleteDamages if remembered.deletes => {
                let file = File::options().write(true).open(path).map_err(failed)?;
                let end = file.metadata().map_err(failed)?.len();
                file.write_all_at(b"damage", end - 6).map_err(failed)
            }
            _ => Ok(()),
        }
    }

    /// Returns true if the backend is not asked to undo the step.
    pub(crate) fn replaces_undo(&self, disk: &DiskRecord) -> Result<bool> {
        let then = self.disks().get_mut(&disk.disk.target).and_then(|remembered| remembered.then.take());
        if let Some(then) = then {
            let file = File::options().write(true).open(disk.disk.path()).map_err(failed)?;
            file.write_all_at(&then, 0).map_err(failed)?;
        }
        Ok(self.is(Wrong::UndoLeaves))
    }
}

fn failed(cause: std::io::Error) -> Error {
    Error::new(ErrorKind::Io, "breaking a promise").because(cause)
}
