//! Image locks that last for a whole operation.
//!
//! A lock belongs to an open file. During an operation on a disk, one open file keeps the lock of each of its
//! images here. The steps that work on the image open it again without locking. When the guard is dropped,
//! all locks are released.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use camino::{Utf8Path, Utf8PathBuf};
use nbd_server::Loan;
use snapcore::hypervisor::AttachedDisk;
use snapcore::{Error, ErrorKind, Result};

use crate::file_steps::open_files;
use crate::layer_name::disk_name;
use crate::lock::{self, LockError, LockMode};
use crate::names::{FileId, file_id, open_image};

/// The disks that operations of this process work on. The key is what all paths of a disk have in common,
/// because with `--active-path=new` the configured path changes during an operation.
#[derive(Default)]
pub struct DiskLocks {
    disks: Mutex<HashMap<Utf8PathBuf, Weak<ImageLocks>>>,
    loans: Mutex<HashMap<Utf8PathBuf, Weak<DiskLoan>>>,
}

/// A disk that its server has lent to an operation. Dropped, it is given back.
#[derive(Debug)]
pub struct DiskLoan(Mutex<Option<Loan>>);

/// The image locks of one disk during an operation.
#[derive(Default)]
pub struct ImageLocks {
    locks: Mutex<HashMap<FileId, File>>,
}

impl DiskLocks {
    fn key(path: &Utf8Path) -> Utf8PathBuf {
        path.with_file_name(disk_name(path))
    }

    /// Begins an operation on the disk at `path`.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another operation of this process works on it.
    pub fn begin(&self, path: &Utf8Path) -> Result<Arc<ImageLocks>> {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.retain(|_, locks| locks.strong_count() > 0);
        if disks.contains_key(&Self::key(path)) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("another operation of this process works on {path}"),
            )
            .advise("wait until it is done"));
        }
        let locks = Arc::new(ImageLocks::default());
        disks.insert(Self::key(path), Arc::downgrade(&locks));
        Ok(locks)
    }

    /// Begins an operation on the disk at `path`, as [`DiskLocks::begin`]. Also returns true if the image is
    /// at rest, so that the caller locks it: a hypervisor locks the images that it has open itself.
    ///
    /// # Errors
    /// As [`DiskLocks::begin`]; the hypervisor's.
    pub async fn begin_beside(
        &self,
        path: &Utf8Path,
        attached: Option<&dyn AttachedDisk>,
    ) -> Result<(Arc<ImageLocks>, bool)> {
        let locks = self.begin(path)?;
        let open = open_files(attached).await?;
        Ok((locks, file_id(path)?.is_none_or(|id| !open.contains(&id))))
    }

    /// Releases the locks of the disk at `path`, if an operation works on it, and gives a disk back that was
    /// borrowed. A step that needs a lock locks again.
    ///
    /// # Errors
    /// The disk's server cannot open it.
    pub fn yield_of(&self, path: &Utf8Path) -> Result<()> {
        // The server locks the images when it opens them.
        if let Some(locks) = self.of(path) {
            locks.unlock_all();
        }
        let mut loans = self.loans.lock().unwrap_or_else(PoisonError::into_inner);
        let loan = loans.remove(&Self::key(path)).and_then(|loan| loan.upgrade());
        drop(loans);
        let loan = loan.and_then(|loan| loan.0.lock().unwrap_or_else(PoisonError::into_inner).take());
        loan.map_or(Ok(()), |loan| loan.give_back().map_err(|error| of_server(&error)))
    }

    /// Borrows the disk whose configured path is `path` from the server that has its images open, if there is
    /// one that may write them. The server closes them. When the value is dropped, when the locks are
    /// yielded, or when this process ends, it opens what `path` names then; so the caller has a path that
    /// names the disk's current image at every instant. Locks must be released before that.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a client uses the disk; the server's.
    pub fn borrow(&self, path: &Utf8Path) -> Result<Option<Arc<DiskLoan>>> {
        use std::os::unix::fs::MetadataExt;
        let Ok(about) = path.symlink_metadata() else { return Ok(None) };
        let Some(control) = nbd_server::server_of((about.dev(), about.ino())) else { return Ok(None) };
        let asked = Loan::ask(&control, path).map_err(|error| not_lent(&error, path));
        let loan = Arc::new(DiskLoan(Mutex::new(Some(asked?))));
        let mut loans = self.loans.lock().unwrap_or_else(PoisonError::into_inner);
        loans.insert(Self::key(path), Arc::downgrade(&loan));
        Ok(Some(loan))
    }

    /// The locks of the disk at `path`, if an operation works on it.
    pub fn of(&self, path: &Utf8Path) -> Option<Arc<ImageLocks>> {
        self.disks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&Self::key(path))
            .and_then(Weak::upgrade)
    }
}

/// Borrows the image `path` from the server that has it open and may write it, if there is one, for a change
/// that renames no file. When the value is dropped, or this process ends, the server opens the image again.
/// Locks must be released before that.
///
/// # Errors
/// [`ErrorKind::Busy`] if a client uses the disk; the server's.
pub fn borrow_image(path: &Utf8Path) -> Result<Option<DiskLoan>> {
    let Some(file) = file_id(path)? else { return Ok(None) };
    let loan = nbd_server::borrow_file(file, path).map_err(|error| not_lent(&error, path))?;
    Ok(loan.map(|loan| DiskLoan(Mutex::new(Some(loan)))))
}

fn not_lent(error: &nbd_server::Error, path: &Utf8Path) -> Error {
    of_server(error)
        .context(format!("borrowing {path} from its server"))
        .advise("shut the domain down, or stop the server, and try again")
}

impl ImageLocks {
    /// Locks the image at `file` until the operation ends. If it is locked already, nothing happens.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another process has it locked.
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

    /// Releases all locks. A step that needs one locks again.
    pub fn unlock_all(&self) {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

fn locked(file: &Utf8Path) -> Result<File> {
    let opened = open_image(file, false)?;
    lock::lock(&opened, LockMode::Write).map_err(|error| reported(error, "locking", file))?;
    Ok(opened)
}

/// Returns true if another process has the image at `file` open in a way that excludes writers.
///
/// # Errors
/// The system's.
pub fn is_held_by_others(file: &Utf8Path) -> Result<bool> {
    let opened = open_image(file, false)?;
    lock::is_locked(&opened, LockMode::Write)
        .map_err(|error| reported(error, "asking for the locks of", file))
}

/// Maps an error of a server.
fn of_server(error: &nbd_server::Error) -> Error {
    use nbd_server::ErrorKind as Kind;
    let kind = match error.kind() {
        Kind::Busy => ErrorKind::Busy,
        Kind::Unsupported => ErrorKind::Unsupported,
        Kind::Refused | Kind::Invalid => ErrorKind::Refused,
        _ => ErrorKind::Io,
    };
    let mapped = Error::new(kind, error.to_string());
    mapped.advise(error.advice().unwrap_or("restart the server with the disk's configured path"))
}

fn reported(error: LockError, doing: &str, file: &Utf8Path) -> Error {
    let advice = error.advice();
    let kind = match error {
        LockError::Held(_) => ErrorKind::Busy,
        LockError::System { .. } => ErrorKind::Io,
    };
    Error::new(kind, format!("{doing} {file}: {error}")).because(error).advise(advice)
}
