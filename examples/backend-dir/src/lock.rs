//! The lock of a disk: it lasts for an operation, and ends with the process whatever happens to it.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Mutex, PoisonError};

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, Result};

use crate::files::failed;

type Locks = HashMap<Utf8PathBuf, Vec<File>>;

/// The disks that this process has locked, each with the files that it has locked of it.
#[derive(Clone, Default)]
pub(crate) struct DiskLocks(Arc<Mutex<Locks>>);

/// The lock on a disk; it ends when this is dropped.
pub(crate) struct DiskLock {
    locks: DiskLocks,
    disk: Utf8PathBuf,
}

impl DiskLocks {
    /// Locks the file that `disk` names.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if any process has it, this one included.
    pub(crate) fn begin(&self, disk: &Utf8Path) -> Result<DiskLock> {
        let locked = lock(disk)?;
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(disk.to_owned(), vec![locked]);
        Ok(DiskLock { locks: self.clone(), disk: disk.to_owned() })
    }

    /// Locks a file too that becomes the disk, before it does.
    pub(crate) fn lock_too(&self, disk: &Utf8Path, file: &Utf8Path) -> Result<()> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(locked) = all.get_mut(disk) else {
            return Err(Error::new(ErrorKind::Internal, format!("{disk} is worked on and not locked")));
        };
        let id = |found: &std::fs::Metadata| (found.dev(), found.ino());
        let named = file.metadata().map_err(failed(format!("cannot look at {file}")))?;
        if !locked.iter().any(|held| held.metadata().is_ok_and(|held| id(&held) == id(&named))) {
            locked.push(lock(file)?);
        }
        Ok(())
    }
}

impl Drop for DiskLock {
    fn drop(&mut self) {
        self.locks.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.disk);
    }
}

fn lock(path: &Utf8Path) -> Result<File> {
    loop {
        let opened = File::open(path).map_err(failed(format!("cannot open {path}")))?;
        match opened.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(ErrorKind::Busy, format!("{path} is in use by another process"))
                    .advise("wait until that has ended"));
            }
            Err(TryLockError::Error(cause)) => return Err(failed(format!("cannot lock {path}"))(cause)),
        }
        let id = |found: std::fs::Metadata| (found.dev(), found.ino());
        let locked = opened.metadata().map(id).map_err(failed(format!("cannot look at {path}")))?;
        // Another operation may have put another file there before it gave its lock back.
        if path.metadata().map(id).is_ok_and(|named| named == locked) {
            return Ok(opened);
        }
    }
}
