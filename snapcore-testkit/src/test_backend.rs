//! What an author gives to the kit: disks, and the reads and writes of a guest.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use anyhow::Result;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::backend::AnyDiskSnapshotter;
use snapcore::{ActivePath, DiskRecord};

/// Makes the disks that the backend is tested on, and reads and writes them as a guest would, without the
/// backend.
///
/// Required are [`backend`](Self::backend), [`make`](Self::make), [`read`](Self::read) and
/// [`write`](Self::write). The other methods describe storage that differs from files in a directory.
///
/// Each test case has a directory of its own, `dir`. A backend whose disks are not files (volumes, for
/// example) makes them elsewhere, distinguishes the directories by their paths, and removes the disks in
/// [`clear`](Self::clear). Test cases run at the same time, in threads of one process or in several
/// processes.
pub trait TestBackend: Send + Sync + 'static {
    /// The backend, as a process that starts now has it: it knows of a disk what is stored with the disk.
    /// `AnyDiskSnapshotter::of` makes it of a backend with actions of its own type.
    fn backend(&self) -> Arc<AnyDiskSnapshotter>;

    /// Makes a disk in `dir` that holds exactly `content`, and returns the path that a domain's configuration
    /// has.
    ///
    /// `name` is part of the disk's name as far as the storage allows. Refuse a name that it does not allow
    /// with the [`snapcore::Error`] of the backend.
    fn make(&self, dir: &Utf8Path, name: &str, content: &[u8]) -> Result<Utf8PathBuf> {
        let path = dir.join(name);
        std::fs::write(&path, content)?;
        Ok(path)
    }

    /// Reads all bytes that a guest would find on the disk now.
    fn read(&self, disk: &DiskRecord) -> Result<Vec<u8>> {
        Ok(std::fs::read(disk.disk.path())?)
    }

    /// Writes as a guest would. When it returns, every reader sees the bytes. They need not be durable.
    fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(File::options().write(true).open(disk.disk.path())?.write_all_at(bytes, offset)?)
    }

    /// The size of each disk in bytes: at least 64 KiB, and a multiple of 4096. Smaller is faster; the
    /// default is 512 KiB.
    fn size(&self) -> u64 {
        512 << 10
    }

    /// Where active images go: [`ActivePath::New`] if the backend cannot keep the configured path.
    fn active_path(&self) -> ActivePath {
        ActivePath::Keep
    }

    /// Returns true if points of these disks can be taken by `method`: `internal`, `external`, or a method of
    /// the backend's own. Return false only if the backend can and this machine cannot (a file system without
    /// reflinks, for example), and print the reason to standard error.
    fn offers(&self, _method: &str) -> bool {
        true
    }

    /// Returns true if the disks of [`TestBackend::make`] have backing files that are no snapshots. An
    /// import adopts such a file as one, so what is imported is not what was there.
    fn has_bases(&self) -> bool {
        false
    }

    /// Returns true if the backend itself takes the points of a running domain by `method`, in steps that are
    /// nested in the instant ([`snapcore::hypervisor::DiskInstant::ByBackend`]). Asked only of a backend that
    /// declares `live`. The test cases of a running domain need it.
    ///
    /// Return false if a hypervisor takes them (overlays, internal snapshots). The kit's own hypervisor does
    /// neither, so it only looks at the plan then. A test with the real hypervisor must try the rest.
    fn takes_live_points(&self, _method: &str) -> bool {
        true
    }

    /// The directory in which the directories of test cases are made, if a temporary directory will not do:
    /// one on a file system with reflinks, for example.
    fn ground(&self) -> Option<Utf8PathBuf> {
        None
    }

    /// Names of disks that a careless backend mishandles: quotes, spaces, options, other languages. Return
    /// those that the storage allows, or that the backend must refuse before it changes anything.
    fn hostile_names(&self) -> Vec<String> {
        [
            "a b",
            "quote'\"`$(exit 1)",
            "semi;colon&and|pipe",
            "-rf",
            "percent%s%n",
            "back\\slash",
            "new\nline",
            "ümläut-雪",
            "json:{}",
            "nbd:host:x",
            "comma,x=y",
            "..dots..",
            "star*?[x]",
            "#hash",
        ]
        .map(str::to_owned)
        .into()
    }

    /// The names of all files or volumes of the disks in `dir`. After all snapshots are deleted it must be
    /// what it was before the first one, and a refused operation must not change it. Leave out manifests:
    /// they belong to domsnap.
    fn footprint(&self, dir: &Utf8Path) -> Result<BTreeSet<String>> {
        let mut found = BTreeSet::new();
        let mut directories = vec![dir.to_owned()];
        while let Some(directory) = directories.pop() {
            for entry in directory.read_dir_utf8()? {
                let entry = entry?;
                let path = entry.path().to_owned();
                if entry.file_type()?.is_dir() {
                    if path.extension() != Some("domsnap") {
                        directories.push(path.clone());
                        found.insert(path.strip_prefix(dir)?.to_string() + "/");
                    }
                } else {
                    found.insert(path.strip_prefix(dir)?.to_string());
                }
            }
        }
        Ok(found)
    }

    /// Returns whether the bytes `holds` are found where the backend saves what an undo would have lost.
    /// `None`: the test cannot find out.
    fn is_saved(&self, _dir: &Utf8Path, _holds: &[u8]) -> Result<Option<bool>> {
        Ok(None)
    }

    /// Returns true if the configured path names a disk at every instant and opens at every instant. By
    /// default it does unless [`active_path`](Self::active_path) is `New`. Return false only if the storage
    /// cannot exchange a name.
    fn path_stays(&self) -> bool {
        self.active_path() == ActivePath::Keep
    }

    /// Returns true if `cost_of_delete` knows what a delete frees or moves. Return false only if the storage
    /// does not know: which blocks belong to one thin volume alone, for example.
    fn knows_cost(&self) -> bool {
        true
    }

    /// Returns true if a crash may be made by killing a copy of this program in the middle of a step. Return
    /// false if the disks of a directory belong to this process alone.
    fn can_be_killed(&self) -> bool {
        true
    }

    /// Returns true if its disks are files that this process writes through libc, so that power losses can be
    /// made from a record of its file operations. Return false for volumes, and for a backend in another
    /// process.
    fn can_lose_power(&self) -> bool {
        self.can_be_killed()
    }

    /// Removes what [`make`](Self::make) and the backend left outside `dir`. Called when a test case ends,
    /// passed or not.
    fn clear(&self, _dir: &Utf8Path) -> Result<()> {
        Ok(())
    }
}

/// Returns true if a file in `dir`, or in a directory in it, whose name begins with `prefix` holds exactly
/// `bytes`: for [`TestBackend::is_saved`].
///
/// # Errors
/// A file or directory that cannot be read.
pub fn has_file(dir: &Utf8Path, prefix: &str, bytes: &[u8]) -> Result<bool> {
    for entry in dir.read_dir_utf8()? {
        let entry = entry?;
        let found = match entry.file_type()?.is_dir() {
            true => has_file(entry.path(), prefix, bytes)?,
            false => entry.file_name().starts_with(prefix) && std::fs::read(entry.path())? == bytes,
        };
        if found {
            return Ok(true);
        }
    }
    Ok(false)
}
