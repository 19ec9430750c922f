//! Image locks that last for a whole operation.
//!
//! A lock belongs to an open file. While an operation holds a disk, the lock of each of its images is kept here by one
//! open file, and the steps that work on the image open it anew without locking; when the guard goes, all go.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, Result};

use crate::layer_name::disk_name;
use crate::lock::{self, LockError, LockMode};
use crate::names::{FileId, file_id, open_image};

/// The disks that operations of this process hold, by what all paths of a disk have in common: with
/// `--active-path=new` its configured path changes in the middle of an operation.
#[derive(Default)]
pub struct Holds {
    disks: Mutex<HashMap<Utf8PathBuf, Weak<Hold>>>,
}

/// One disk under an operation: the locks of its images.
#[derive(Default)]
pub struct Hold {
    locks: Mutex<HashMap<FileId, File>>,
}

impl Holds {
    fn key(path: &Utf8Path) -> Utf8PathBuf {
        path.with_file_name(disk_name(path))
    }

    /// Begins to hold the disk at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where another operation of this process holds it.
    pub fn begin(&self, path: &Utf8Path) -> Result<Arc<Hold>> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.retain(|_, hold| hold.strong_count() > 0);
        if disks.contains_key(&Self::key(path)) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("another operation of this process works on {path}"),
            )
            .advise("wait until it is done"));
        }
        let hold = Arc::new(Hold::default());
        disks.insert(Self::key(path), Arc::downgrade(&hold));
        Ok(hold)
    }

    /// The hold on the disk at `path`, where there is one.
    pub fn of(&self, path: &Utf8Path) -> Option<Arc<Hold>> {
        self.disks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&Self::key(path))
            .and_then(Weak::upgrade)
    }
}

impl Hold {
    /// Locks the image at `file` until the operation ends; held already: nothing happens.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where another process holds it.
    pub fn lock(&self, file: &Utf8Path) -> Result<()> {
        let Some(id) = file_id(file)? else {
            return Err(Error::new(ErrorKind::NotFound, format!("image {file} does not exist")));
        };
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Vacant(free) = locks.entry(id) {
            free.insert(locked(file)?);
        }
        Ok(())
    }

    /// Gives all locks back; a step that needs one takes it anew.
    pub fn unlock_all(&self) {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn locked(file: &Utf8Path) -> Result<File> {
    let opened = open_image(file, false)?;
    lock::lock(&opened, LockMode::Write).map_err(|error| told(error, "locking", file))?;
    Ok(opened)
}

/// Whether another process has the image at `file` open in a way that forbids to write it.
///
/// # Errors
/// The system's.
pub fn is_held_by_others(file: &Utf8Path) -> Result<bool> {
    let opened = open_image(file, false)?;
    lock::is_locked(&opened, LockMode::Write).map_err(|error| told(error, "asking for the locks of", file))
}

fn told(error: LockError, doing: &str, file: &Utf8Path) -> Error {
    let advice = error.advice();
    let kind = match error {
        LockError::Held(_) => ErrorKind::Busy,
        LockError::System { .. } => ErrorKind::Io,
    };
    Error::new(kind, format!("{doing} {file}: {error}")).because(error).advise(advice)
}
