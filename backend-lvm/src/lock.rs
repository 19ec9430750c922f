//! The lock on a volume during an operation: a lock file of ours, because lvm has no lock that lasts longer
//! than one command.
//!
//! QEMU's byte locks cannot be used: a process that has one has the device open, and lvm defers the merge of
//! an open volume. So other users of the volume are read from the kernel, when the operation begins and again
//! before a step that needs it closed.

use std::collections::HashMap;
use std::fs::{File, TryLockError};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use camino::Utf8PathBuf;
use confined_files::{Directory, Kind};
use snapcore::{Error, ErrorKind, Result};

use crate::names::Volume;

/// Directory of the lock files: it is empty after a boot, as locks are.
const DIRECTORY: &str = "/run/lock/domsnap";

/// Time limit for a command that a killed operation left.
const PATIENCE: Duration = Duration::from_secs(20);

const LOOK: Duration = Duration::from_millis(50);

/// The volumes that operations of this process have locked.
#[derive(Default)]
pub(crate) struct VolumeLocks {
    volumes: Mutex<HashMap<Volume, Weak<VolumeLock>>>,
}

/// The lock on one volume.
pub(crate) struct VolumeLock {
    /// Locked as long as this is open, here or as the standard input of a command.
    pub(crate) file: File,
}

impl VolumeLocks {
    /// Locks a volume.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another operation has locked it.
    pub(crate) fn begin(&self, volume: &Volume) -> Result<Arc<VolumeLock>> {
        let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        volumes.retain(|_, lock| lock.strong_count() > 0);
        if volumes.contains_key(volume) {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("another operation of this process works on {volume}"),
            )
            .advise("wait until it is done"));
        }
        let lock = Arc::new(VolumeLock { file: lock_file(volume)? });
        volumes.insert(volume.clone(), Arc::downgrade(&lock));
        Ok(lock)
    }

    /// Returns the lock on a volume, if there is one.
    pub(crate) fn of(&self, volume: &Volume) -> Option<Arc<VolumeLock>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner).get(volume).and_then(Weak::upgrade)
    }
}

fn lock_file(volume: &Volume) -> Result<File> {
    let double = |name: &str| name.replace('-', "--");
    let path = Utf8PathBuf::from(DIRECTORY).join(format!(
        "lvm-{}-{}.lock",
        double(&volume.group),
        double(&volume.name)
    ));
    let failed = |error: std::io::Error| {
        Error::new(ErrorKind::Io, format!("the lock file {path} cannot be used"))
            .because(error)
            .advise("run as root: lvm's commands need that too")
    };
    // All users may create files in the directories above: this one must belong to a trusted user.
    let open = || {
        let directory = Directory::make_all(Path::new(DIRECTORY), 0o755)?;
        let about = directory.about()?;
        if !confined_files::is_trusted(about.uid) || about.mode & 0o022 != 0 {
            return Err(confined_files::refused(format!("others than root can write {DIRECTORY}")));
        }
        let (_, name) = Directory::of(path.as_std_path())?;
        match directory.create_new(&name, 0o600) {
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {
                directory.open_file(&name, true, Kind::Regular)
            }
            made => made,
        }
    };
    let file = open().map_err(failed)?;
    let until = Instant::now() + PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
            Err(TryLockError::WouldBlock) if Instant::now() < until => thread::sleep(LOOK),
            Err(TryLockError::WouldBlock) => {
                return Err(Error::new(
                    ErrorKind::Busy,
                    format!("another domsnap, or a command that one left, works on {volume}"),
                )
                .state("no changes made")
                .advise(format!("wait until it has ended; 'fuser -v {path}' shows it")));
            }
        }
    }
}
