//! What is made once and used by many test processes at a time.
//!
//! ```text
//! TARGET/testguest/lock-guest      shared by who uses a guest that was built, exclusive for who builds one
//! TARGET/testguest/packages/       the Debian packages
//! TARGET/testguest/guest-KEY/      the built guest; KEY stands for what it was built from
//!     kernel, initrd
//!     blank-MIB.qcow2              an empty disk of that size
//!     state-KEY/                   memory and disks of a ready guest; KEY is of QEMU and its command line
//! ```
//!
//! Everything is made under another name in the same directory and then renamed, so what is there is whole. A
//! lock is a file beside it and goes with the process that holds it.

use std::{
    env,
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};

use crate::build;

/// Overrides the place of the cache.
const PLACE: &str = "DOMSNAP_TEST_GUEST";

/// A guest that was built. It is not removed while this lives.
pub struct Built {
    dir: PathBuf,
    _held: File,
}

impl Built {
    /// The guest that these sources stand for; it is built now if it is missing.
    pub(crate) fn get() -> Result<Self> {
        Self::of("guest", &build::key(), build::build)
    }

    /// A guest of a kind, made from what `key` stands for; if there is none, `build` makes it in the
    /// directory that it is given first, of the packages that are kept in the other. One of the same kind and
    /// another key is removed.
    ///
    /// # Errors
    /// As `build`; the cache cannot be written.
    pub fn of(kind: &str, key: &str, build: impl Fn(&Path, &Path) -> Result<()>) -> Result<Self> {
        let root = place()?;
        let dir = root.join(format!("{kind}-{key}"));
        let (lock_name, making) = (format!("lock-{kind}"), format!("making-{kind}-"));
        loop {
            let lock = open_lock(&root.join(&lock_name))?;
            lock.lock_shared()?;
            if dir.is_dir() {
                return Ok(Self { dir, _held: lock });
            }
            lock.unlock()?;
            lock.lock()?;
            if !dir.is_dir() {
                remove_others(&root, &format!("{kind}-"), &making)?;
                let made = tempfile::Builder::new().prefix(&making).tempdir_in(&root)?;
                build(made.path(), &root.join("packages")).context("the test guest cannot be built")?;
                fs::rename(made.keep(), &dir)?;
            }
        }
    }

    /// Where it is.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The file or directory of that name in it; `make` makes it at the path that it is given if none
    /// has.
    ///
    /// # Errors
    /// As `make`.
    pub fn once(&self, name: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let path = self.dir.join(name);
        if path.exists() {
            return Ok(path);
        }
        let lock = open_lock(&self.dir.join(format!("{name}.lock")))?;
        lock.lock()?;
        if !path.exists() {
            let work = tempfile::Builder::new().prefix("making-").tempdir_in(&self.dir)?;
            let made = work.path().join(name);
            make(&made)?;
            fs::rename(made, &path)?;
        }
        Ok(path)
    }
}

/// Guests of other sources, and what a killed process left. No process uses them: the lock is held
/// exclusively.
fn remove_others(root: &Path, kind: &str, making: &str) -> Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with(kind) || name.starts_with(making) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

fn open_lock(path: &Path) -> Result<File> {
    let lock = File::options().create(true).append(true).open(path);
    lock.with_context(|| format!("{} cannot be opened", path.display()))
}

/// Below the target directory that this test was built in.
fn place() -> Result<PathBuf> {
    let place = match env::var_os(PLACE) {
        Some(place) => PathBuf::from(place),
        None => {
            let program = env::current_exe().context("this program has no path")?;
            let target = program.ancestors().find(|dir| dir.join("CACHEDIR.TAG").is_file());
            let workspace = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target");
            target.map_or_else(workspace, Path::to_owned).join("testguest")
        }
    };
    fs::create_dir_all(&place).with_context(|| format!("{} cannot be made", place.display()))?;
    Ok(place.canonicalize()?)
}
