//! What an author gives to the kit: disks, and a guest's hands on them.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::Result;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{ActivePath, DiskRecord, DiskSnapshotter};

/// Makes the disks that the backend is tried on, and does what a guest would, without the backend.
///
/// A place is a fresh directory of one trial. A backend whose disks are no files (volumes, say) makes them elsewhere, and
/// removes them in [`TestBackend::clear`]. Trials run at the same time, in threads of one process or in several.
pub trait TestBackend: Send + Sync + 'static {
    /// The backend as a process that begins now would have it: it knows of disks what is on them, and nothing else.
    fn backend(&self) -> Arc<dyn DiskSnapshotter>;

    /// Makes a disk that holds exactly `content` and is called `name`, as far as it can be; gives the path by which a domain's
    /// configuration would name it.
    fn make(&self, dir: &Utf8Path, name: &str, content: &[u8]) -> Result<Utf8PathBuf>;

    /// All bytes that a guest would find on the disk now.
    fn read(&self, disk: &DiskRecord) -> Result<Vec<u8>>;

    /// Writes as a guest would. When it returns it is what every reader sees.
    fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> Result<()>;

    /// FaultKind large disks are made, in bytes: at least 64 KiB, and a multiple of 4096.
    fn size(&self) -> u64 {
        512 << 10
    }

    /// Where active images go, where the backend cannot keep the configured path.
    fn active_path(&self) -> ActivePath {
        ActivePath::Keep
    }

    /// Whether points of its disks can be taken so: `internal`, `external`, or one of the backend's own ways. Say no only to what
    /// the backend can and this machine cannot, and say why on standard error.
    fn offers(&self, _way: &str) -> bool {
        true
    }

    /// The directory in which places are made, where not any will do: one on a file system that can clone files, say.
    fn ground(&self) -> Option<Utf8PathBuf> {
        None
    }

    /// Names of disks that are as nasty as its names can be.
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

    /// What there is of disks in a place: after all snapshots are deleted it must be what it was before the first. Without
    /// manifests, which belong to domsnap.
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

    /// Whether bytes that an undo would have lost are to be found where the backend puts such aside; absent: this cannot be
    /// told.
    fn is_saved(&self, _dir: &Utf8Path, _holds: &[u8]) -> Result<Option<bool>> {
        Ok(None)
    }

    /// Whether the configured path names a disk at every instant, and may be opened at every instant. Not where domains under
    /// [`ActivePath::New`] get another path; say no of others only where the storage cannot exchange what a name stands for.
    fn path_stays(&self) -> bool {
        self.active_path() == ActivePath::Keep
    }

    /// Whether a crash may be made by killing a copy of this program in the middle of a step. Not where the disks of a place
    /// are this process's alone.
    fn can_be_killed(&self) -> bool {
        true
    }

    /// Removes what [`TestBackend::make`] and the backend left of a place outside its directory.
    fn clear(&self, _dir: &Utf8Path) -> Result<()> {
        Ok(())
    }
}
