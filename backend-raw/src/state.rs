//! Files of a machine's state: the firmware's variables (NVRAM), and the state of a TPM that swtpm emulates.
//!
//! They are raw files, and points of them are copies. What distinguishes them from disks:
//!
//! - They are small, so that they are copied while the guest is paused, on any file system, and each copy
//!   has a checksum.
//! - QEMU has the flash in its memory and writes changes to the file at once. With the memory of a snapshot
//!   it gets the flash of the snapshot, and writes it to the file when the guest goes on. So in a running
//!   machine the file is never exchanged.
//! - swtpm has its file not open. It reads it when the machine starts or is reset, and writes another one in
//!   its place (`rename`) at each change. While a machine uses it, it has the file `.lock` beside it locked.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use camino::{Utf8Path, Utf8PathBuf};
use image_files::names::{self, io_error};
use snapcore::hypervisor::{FIRMWARE_VARIABLES, TPM_STATE};
use snapcore::{Disk, Error, ErrorKind, Result, shown_size};

/// What a raw file is to its domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Sort {
    /// A disk of the guest.
    #[default]
    Disk,
    /// The variables of its firmware.
    FirmwareVariables,
    /// The state of its TPM.
    Tpm,
}

/// The files in which swtpm has the permanent state of a TPM 2.0, and of a TPM 1.2.
const TPM_FILES: [&str; 2] = ["tpm2-00.permall", "tpm-00.permall"];

/// swtpm's lock file, beside its state.
const TPM_LOCK: &str = ".lock";

impl Sort {
    pub(crate) fn format(self) -> &'static str {
        match self {
            Self::Disk => "raw",
            Self::FirmwareVariables => FIRMWARE_VARIABLES,
            Self::Tpm => TPM_STATE,
        }
    }

    /// The longest file of the sort: what is longer is something else, and is not copied under a paused
    /// guest.
    fn limit(self) -> u64 {
        match self {
            Self::Disk => u64::MAX,
            Self::FirmwareVariables => 64 << 20,
            Self::Tpm => 16 << 20,
        }
    }

    pub(crate) fn what(self) -> &'static str {
        match self {
            Self::Disk => "a raw disk",
            Self::FirmwareVariables => "a file of firmware variables",
            Self::Tpm => "a TPM's state",
        }
    }

    /// Refuses a disk that is no file of this sort, or of which no points can be taken where it is.
    pub(crate) fn check(self, disk: &Disk) -> Result<()> {
        if self == Self::Disk {
            return Ok(());
        }
        let path = disk.path();
        let refused = |message: String, advice: &str| {
            Err(Error::new(ErrorKind::Refused, message).state("no changes made").advise(advice))
        };
        let about = std::fs::symlink_metadata(path)
            .map_err(|error| io_error(error, format!("cannot look at {path}")))?;
        if !about.is_file() {
            return refused(
                format!("{path} is no file, and cannot be {}", self.what()),
                "give the path of the file itself",
            );
        }
        self.check_size(path, about.len())?;
        if self == Self::Tpm && path.file_name().is_none_or(|name| !TPM_FILES.contains(&name)) {
            return refused(
                format!("{path} has not the name of {}", self.what()),
                "give the file tpm2-00.permall (or tpm-00.permall, of a TPM 1.2) in swtpm's directory",
            );
        }
        names::require_writable_directory_of(path)?;
        names::require_private_directory_of(path)
    }

    /// Refuses a file that is too long for the sort.
    pub(crate) fn check_size(self, path: &Utf8Path, size: u64) -> Result<()> {
        if self == Self::Disk || size > 0 && size <= self.limit() {
            return Ok(());
        }
        let size = shown_size(size);
        let detail = format!("{path} has {size}, and is not {}", self.what());
        Err(Error::new(ErrorKind::Refused, detail).state("no changes made").advise(format!(
            "if it is a disk, register it with format=raw; {} has 1 byte to {}",
            self.what(),
            shown_size(self.limit())
        )))
    }
}

/// Locks of TPMs, as swtpm takes them, as long as operations of this process work on their files.
#[derive(Debug, Default)]
pub(crate) struct TpmLocks(Mutex<HashMap<Utf8PathBuf, Weak<TpmLock>>>);

/// The lock of one TPM. It ends when it is dropped or yielded.
#[derive(Debug)]
pub(crate) struct TpmLock(Mutex<Option<File>>);

impl TpmLocks {
    /// Locks the state at `path` against swtpm. Where swtpm never made its lock file, there is nothing to
    /// lock.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if swtpm uses it.
    pub(crate) fn lock(&self, path: &Utf8Path) -> Result<Option<Arc<TpmLock>>> {
        let file = path.with_file_name(TPM_LOCK);
        if names::file_id(&file)?.is_none() {
            return Ok(None);
        }
        let lock = names::open_own(&file, true)?;
        // A lock of a process (swtpm has such a one) and one of an open file exclude each other.
        match image_files::lock_whole(&lock) {
            Ok(true) => {}
            Ok(false) => {
                return Err(Error::new(ErrorKind::Busy, format!("a TPM (swtpm) uses {path}"))
                    .state("no changes made")
                    .advise("shut the domain down, and wait until its swtpm has ended"));
            }
            Err(error) => return Err(io_error(error, format!("cannot lock {file}"))),
        }
        let lock = Arc::new(TpmLock(Mutex::new(Some(lock))));
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        locks.insert(path.to_owned(), Arc::downgrade(&lock));
        Ok(Some(lock))
    }

    /// Releases the lock of the state at `path`, for a TPM that is to start.
    pub(crate) fn yield_of(&self, path: &Utf8Path) {
        let locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = locks.get(path).and_then(Weak::upgrade) {
            lock.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }
}
