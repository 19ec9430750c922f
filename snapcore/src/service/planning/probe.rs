//! Tests what a directory permits: a file is made in it, is renamed, gets a second name where one is needed,
//! and is removed.
//!
//! Only a try shows for certain what a file system or a security module permits. Examples are a file system
//! without hard links, a quota, and a directory that accepts no new names. The file is empty, no other user
//! can read it, and it exists for a moment. Its name has a fixed form, made of the domain's first disk. So
//! the remains of crashes do not add up, and the next operation of the domain, or `recover`, removes them.
//!
//! A dry run takes no lock. It uses another name, so that it cannot interfere with an operation's steps. If
//! something interferes with its own, the result is not known.

use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Directory, FileName, refusal};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::domain::DiskRecord;
use crate::error::{Error, ErrorKind, Result};
use crate::size::shown_size;

/// The prefix of the names.
const PREFIX: &str = ".domsnap-probe-";

/// The changes that are made in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) enum Needs {
    /// Names are made, moved and removed.
    #[default]
    Names,
    /// Files get second names too.
    Links,
}

/// The advice where there is no space.
pub(super) const MAKE_ROOM: &str =
    "free space there, have the quota raised, or delete snapshots (which needs no room), and try again";

/// The error for a file system without the least space that is needed.
pub(super) fn no_room(directory: &Utf8Path, bytes: u64, free: Option<u64>) -> Error {
    let free = free.map_or_else(String::new, |free| format!(": {} are free", shown_size(free)));
    Error::new(
        ErrorKind::NoSpace,
        format!(
            "the file system of {directory} has no room for {}, which new files, metadata and manifests need at \
             least{free}",
            shown_size(bytes)
        ),
    )
    .state("no changes made")
    .advise(MAKE_ROOM)
}

/// The test in one directory.
pub(super) struct Probe {
    directory: Utf8PathBuf,
    names: [String; 2],
    dry: bool,
}

impl Probe {
    /// Creates the test for the domain with these disks.
    pub(super) fn of(directory: &Utf8Path, disks: &[DiskRecord], dry: bool) -> Self {
        let domain = disks.first().map_or("", |record| record.disk.address.as_str());
        let names = ["a", "b"].map(|letter| name(domain, dry, letter));
        Self { directory: directory.to_owned(), names, dry }
    }

    /// Removes the remains of a test that a crash ended.
    pub(super) fn sweep(&self) {
        let Ok(directory) = Directory::open(self.directory.as_std_path()) else { return };
        for left in self.names.iter().cloned().chain(self.names.iter().map(|name| format!("{name}-dry"))) {
            let Ok(name) = FileName::new(left) else { continue };
            // A file with content is another's, in spite of its name.
            let is_ours = |found: &confined_files::Look| found.is_file() && found.size == 0;
            if directory.look(&name).ok().flatten().is_some_and(|found| is_ours(&found)) {
                let _ = directory.remove(&name);
            }
        }
    }

    /// Runs the test, and checks that there is space for `bytes`. Afterwards the directory is as it was.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], [`ErrorKind::Unsupported`] or [`ErrorKind::NoSpace`], with the change that the
    /// directory does not permit.
    pub(super) fn run(&self, needs: Needs, bytes: u64) -> Result<()> {
        let directory = match Directory::open(self.directory.as_std_path()) {
            Ok(directory) => directory,
            // The step that works there decides about anything that exists in place of a directory.
            Err(error) if error.kind() == io::ErrorKind::NotFound || refusal(&error).is_some() => {
                return Ok(());
            }
            Err(error) => return Err(self.failure(&error, "cannot be opened")),
        };
        let [first, second] = &self.names;
        let (Ok(first), Ok(second)) = (FileName::new(first), FileName::new(second)) else { return Ok(()) };
        match self.steps(&directory, &first, &second, needs, bytes) {
            // Another process interfered.
            Err(_) if self.dry && self.is_disturbed(&directory, &first, &second) => Ok(()),
            tried => tried,
        }
    }

    fn is_disturbed(&self, directory: &Directory, first: &FileName, second: &FileName) -> bool {
        let there = |name| matches!(directory.look(name), Ok(Some(_)));
        there(first) || there(second)
    }

    fn steps(
        &self,
        directory: &Directory,
        first: &FileName,
        second: &FileName,
        needs: Needs,
        bytes: u64,
    ) -> Result<()> {
        let file =
            directory.create_new(first, 0o600).map_err(|error| self.failure(&error, "takes no new file"))?;
        // The size stays 0: remains of a crash are known to be ours by being empty.
        let room = match bytes {
            0 => Ok(()),
            bytes => fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes),
        };
        let moved = match directory.rename_new(first, second, None) {
            // Old file systems do not know this flag; then a link is used, which never replaces a file.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
                    && refusal(&error).is_none() =>
            {
                directory
                    .link(first, directory, second, None)
                    .and_then(|()| directory.remove(first))
                    .map(drop)
            }
            moved => moved,
        };
        let linked = match &moved {
            Ok(()) if needs == Needs::Links => directory.link(second, directory, first, None),
            _ => Ok(()),
        };
        // The names go, whatever the result.
        let removed = directory.remove(first).and(directory.remove(second));
        drop(file);
        // Any other error means that the file system does not support the call.
        if matches!(room, Err(Errno::NOSPC | Errno::DQUOT)) {
            return Err(no_room(&self.directory, bytes, None));
        }
        moved.map_err(|error| self.failure(&error, "lets no file be renamed"))?;
        linked.map_err(|error| self.no_links(&error))?;
        removed.map_err(|error| {
            let left = format!(
                "lets no file be removed: {} or {}, which is empty, is left there",
                self.names[0], self.names[1]
            );
            self.failure(&error, &left)
        })?;
        Ok(())
    }

    fn no_links(&self, error: &io::Error) -> Error {
        let known = error.raw_os_error().map(Errno::from_raw_os_error);
        match known {
            Some(Errno::PERM | Errno::OPNOTSUPP | Errno::XDEV | Errno::NOSYS | Errno::MLINK) => Error::new(
                ErrorKind::Unsupported,
                format!("in directory {} no file can have a second name (a hard link): {error}", self.directory),
            )
            .state("no changes made")
            .advise(
                "register the domain with --active-path=new: then the active image gets a new path after each external \
                 snapshot, and the domain's configuration must follow; or take internal snapshots",
            ),
            _ => self.failure(error, "takes no second name of a file"),
        }
    }

    fn failure(&self, error: &io::Error, what: &str) -> Error {
        let (kind, advice) = match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => (ErrorKind::NoSpace, MAKE_ROOM),
            io::ErrorKind::ReadOnlyFilesystem => {
                (ErrorKind::Refused, "the file system is read-only: remount it writable")
            }
            _ => (
                ErrorKind::Refused,
                "let this user make, rename and remove files there, or run as one who can",
            ),
        };
        Error::new(kind, format!("the directory {} {what}: {error}", self.directory))
            .state("no changes made")
            .advise(advice)
    }
}

/// The name of a probe: of a fixed length, for every path of the disk.
fn name(domain: &str, dry: bool, letter: &str) -> String {
    // FNV-1a: the same in every version, so that remains of an older one are found.
    let hash = domain.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let dry = if dry { "-dry" } else { "" };
    format!("{PREFIX}{hash:016x}-{letter}{dry}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run leaves nothing in the directory, and a sweep removes the remains of a crash.
    #[test]
    fn probe_leaves_nothing_and_sweeps_remains() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap();
        let count = || std::fs::read_dir(path).unwrap().count();
        for dry in [false, true] {
            let (probe, before) = (Probe::of(path, &[], dry), count());
            probe.run(Needs::Links, 8192).unwrap();
            probe.run(Needs::Names, 0).unwrap();
            assert_eq!(count(), before);
            for name in &probe.names {
                std::fs::write(path.join(name), "").unwrap();
            }
        }
        Probe::of(path, &[], false).sweep();
        assert_eq!(count(), 0);
        // Another's file of that name stays.
        let probe = Probe::of(path, &[], false);
        std::fs::write(path.join(&probe.names[0]), "x").unwrap();
        probe.sweep();
        assert_eq!(count(), 1);
        assert!(probe.run(Needs::Names, 0).unwrap_err().to_string().contains("takes no new file"));
    }
}
