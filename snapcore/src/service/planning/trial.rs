//! Trying what a directory takes: a file is made in it, gets another name, where it is needed a second one,
//! and is removed.
//!
//! What a file system or a security module permits is known for certain only by a try: a file system without
//! hard links, a quota, a directory that takes no new names. The file is empty, nobody else can read it, it
//! is there for a moment, and its name is of a fixed form, made of the domain's first disk. So what a crash
//! leaves does not add up, and the next operation of the domain, or `recover`, removes it. A dry run holds no
//! lock: it uses another name, so that it cannot come between an operation's steps, and where something came
//! between its own, nothing is known.

use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Directory, FileName, refusal};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;

use crate::{DiskRecord, Error, ErrorKind, Result, shown_size};

/// How the names begin.
const PREFIX: &str = ".domsnap-probe-";

/// What is done in a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) enum Needs {
    /// Names are made, moved and removed.
    #[default]
    Names,
    /// Files get second names too.
    Links,
}

/// What to do where there is no room.
pub(super) const MAKE_ROOM: &str =
    "free space there, have the quota raised, or delete snapshots (which needs no room), and try again";

/// There is no room for what is needed at least.
pub(super) fn no_room(directory: &Utf8Path, bytes: u64) -> Error {
    Error::new(
        ErrorKind::NoSpace,
        format!(
            "the file system of {directory} has no room for {}, which new files, metadata and manifests need at least",
            shown_size(bytes)
        ),
    )
    .state("no changes made")
    .advise(MAKE_ROOM)
}

/// The try in one directory.
pub(super) struct Trial {
    directory: Utf8PathBuf,
    names: [String; 2],
    dry: bool,
}

impl Trial {
    /// Of the domain with these disks.
    pub(super) fn of(directory: &Utf8Path, disks: &[DiskRecord], dry: bool) -> Self {
        let domain = disks.first().map_or("", |record| record.disk.path.as_str());
        let names = ["a", "b"].map(|letter| name(domain, dry, letter));
        Self { directory: directory.to_owned(), names, dry }
    }

    /// Removes what a crash left of a try.
    pub(super) fn sweep(&self) {
        let Ok(directory) = Directory::open(self.directory.as_std_path()) else { return };
        for left in self.names.iter().cloned().chain(self.names.iter().map(|name| format!("{name}-dry"))) {
            let Ok(name) = FileName::new(left) else { continue };
            // Another's file of that name is another's.
            let is_ours = |found: &confined_files::Look| found.is_file() && found.size == 0;
            if directory.look(&name).ok().flatten().is_some_and(|found| is_ours(&found)) {
                let _ = directory.remove(&name);
            }
        }
    }

    /// Tries it, and whether there is room for so many bytes. Afterwards the directory is as it was.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], [`ErrorKind::Unsupported`] or [`ErrorKind::NoSpace`]: what the directory does
    /// not take.
    pub(super) fn run(&self, needs: Needs, bytes: u64) -> Result<()> {
        let directory = match Directory::open(self.directory.as_std_path()) {
            Ok(directory) => directory,
            // What is there instead of a directory is for whoever works there to refuse or to pass over.
            Err(error) if error.kind() == io::ErrorKind::NotFound || refusal(&error).is_some() => {
                return Ok(());
            }
            Err(error) => return Err(self.failure(&error, "cannot be opened")),
        };
        let [first, second] = &self.names;
        let (Ok(first), Ok(second)) = (FileName::new(first), FileName::new(second)) else { return Ok(()) };
        match self.steps(&directory, &first, &second, needs, bytes) {
            // Something came between.
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
        // The size stays 0: what a crash leaves is known to be ours by being empty.
        let room = match bytes {
            0 => Ok(()),
            bytes => fallocate(&file, FallocateFlags::KEEP_SIZE, 0, bytes),
        };
        let moved = match directory.rename_new(first, second, None) {
            // Old file systems know no such flag; then a link that never replaces is used.
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
        // Whatever came of it, the names go.
        let removed = directory.remove(first).and(directory.remove(second));
        drop(file);
        // Another error says that the file system cannot do that.
        if matches!(room, Err(Errno::NOSPC | Errno::DQUOT)) {
            return Err(no_room(&self.directory, bytes));
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

/// The name of a probe: of a fixed length, whatever the disk is called.
fn name(domain: &str, dry: bool, letter: &str) -> String {
    // FNV-1a: the same in every version, so that what an older one left is found.
    let hash = domain.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let dry = if dry { "-dry" } else { "" };
    format!("{PREFIX}{hash:016x}-{letter}{dry}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_leaves_nothing_and_sweeps_what_a_crash_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(dir.path()).unwrap();
        let count = || std::fs::read_dir(path).unwrap().count();
        for dry in [false, true] {
            let (trial, before) = (Trial::of(path, &[], dry), count());
            trial.run(Needs::Links, 8192).unwrap();
            trial.run(Needs::Names, 0).unwrap();
            assert_eq!(count(), before);
            for name in &trial.names {
                std::fs::write(path.join(name), "").unwrap();
            }
        }
        Trial::of(path, &[], false).sweep();
        assert_eq!(count(), 0);
        // Another's file of that name stays.
        let trial = Trial::of(path, &[], false);
        std::fs::write(path.join(&trial.names[0]), "x").unwrap();
        trial.sweep();
        assert_eq!(count(), 1);
        assert!(trial.run(Needs::Names, 0).unwrap_err().to_string().contains("takes no new file"));
    }
}
