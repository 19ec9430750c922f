//! [`Half`]: one of the two files while it is written.

use std::{
    fs::{File, Permissions, TryLockError},
    io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use confined_files::{Directory, FileName};

use crate::error::{Error, ErrorKind, Result};

/// What is attempted, for errors.
pub(super) const ATTEMPTED: &str = "taking a memory image apart";

/// Number of attempts to create a file whose remains another process removes at the same time.
const ATTEMPTS: usize = 8;

/// A file that is being written: `.NAME.part` beside its final name, mode 0600, locked as long as it is
/// written. Removed when dropped.
#[derive(Debug)]
pub(super) struct Half {
    path: PathBuf,
    directory: Directory,
    name: FileName,
    part: FileName,
    file: File,
    identity: (u64, u64),
    is_named: bool,
}

impl Half {
    /// Creates it. Its final name must be free. Replaces what a killed process left.
    pub(super) fn create(path: &Path) -> Result<Self> {
        let failed = |error: io::Error| Error::io(ATTEMPTED, path, error);
        let (directory, name) = Directory::of(path).map_err(failed)?;
        if directory.look(&name).map_err(failed)?.is_some() {
            return Err(Error::new(ErrorKind::Invalid, ATTEMPTED, path.display(), "the file exists")
                .advise("use another name, or remove the file if no clone uses it"));
        }
        let part = part_of(&name).map_err(failed)?;
        for _ in 0..ATTEMPTS {
            match directory.create_new(&part, 0o600) {
                Ok(file) => {
                    // Another process may take it for remains before it is locked.
                    if file.try_lock().is_err() || !is(&directory, &part, &file).map_err(failed)? {
                        continue;
                    }
                    let about = file.metadata().map_err(failed)?;
                    let identity = (about.dev(), about.ino());
                    let path = path.to_owned();
                    return Ok(Self { path, directory, name, part, file, identity, is_named: false });
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    remove_remains(&directory, &part, path)?;
                }
                Err(error) => return Err(failed(error)),
            }
        }
        Err(busy(path))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Makes an error of it.
    pub(super) fn failed(&self, error: io::Error) -> Error {
        Error::io(ATTEMPTED, &self.path, error)
    }

    /// Makes the content durable; no user can write the file from then on.
    pub(super) fn seal(&self) -> Result<()> {
        let sealed = self.file.set_permissions(Permissions::from_mode(0o400));
        sealed.and_then(|()| self.file.sync_all()).map_err(|error| self.failed(error))
    }

    /// Gives it its final name, which must be free. The directory is not flushed.
    pub(super) fn name(&mut self) -> Result<()> {
        let renamed = self.directory.rename_new(&self.part, &self.name, Some(self.identity));
        match renamed {
            Ok(()) => self.is_named = true,
            // The file system lacks that flag. No other process creates names here, and `create` has checked.
            Err(error)
                if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported) =>
            {
                if self.directory.look(&self.name).map_err(|error| self.failed(error))?.is_some() {
                    return Err(self.failed(io::ErrorKind::AlreadyExists.into()));
                }
                let renamed = self.directory.rename(&self.part, &self.name, Some(self.identity));
                renamed.map_err(|error| self.failed(error))?;
                self.is_named = true;
            }
            Err(error) => return Err(self.failed(error)),
        }
        Ok(())
    }

    /// Takes its final name away again, after an error of the other half.
    pub(super) fn unname(&mut self) {
        if std::mem::take(&mut self.is_named) {
            let _ = self.directory.remove(&self.name);
        }
    }

    pub(super) fn flush_directory(&self) -> Result<()> {
        self.directory.sync().map_err(|error| self.failed(error))
    }
}

impl Drop for Half {
    fn drop(&mut self) {
        if !self.is_named && is(&self.directory, &self.part, &self.file).unwrap_or(false) {
            let _ = self.directory.remove(&self.part);
        }
    }
}

/// Removes a half and its remains. Returns false if there was none. The directory is flushed.
pub(super) fn remove(path: &Path) -> Result<bool> {
    let attempted = "removing a memory image that was taken apart";
    let failed = |error: io::Error| Error::io(attempted, path, error);
    let (directory, name) = Directory::of(path).map_err(failed)?;
    let part = part_of(&name).map_err(failed)?;
    remove_remains(&directory, &part, path)?;
    let was = directory.remove(&name).map_err(failed)?;
    directory.sync().map_err(failed)?;
    Ok(was)
}

/// Removes the file of a process that was killed; one that is still written is refused.
fn remove_remains(directory: &Directory, part: &FileName, of: &Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(ATTEMPTED, of, error);
    let file = match directory.open_file(part, false, confined_files::Kind::Regular) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Err(busy(of)),
        Err(TryLockError::Error(error)) => return Err(failed(error)),
    }
    // The lock is on the file that was opened, which must still have the name.
    if is(directory, part, &file).map_err(failed)? {
        directory.remove(part).map_err(failed)?;
    }
    Ok(())
}

fn busy(path: &Path) -> Error {
    let detail = "another process is making it";
    Error::new(ErrorKind::Invalid, ATTEMPTED, path.display(), detail).advise("wait until that has ended")
}

fn part_of(name: &FileName) -> io::Result<FileName> {
    let mut part = std::ffi::OsString::from(".");
    part.push(name.as_os_str());
    part.push(".part");
    FileName::new(part).map_err(io::Error::other)
}

/// Returns true if a name is this file's.
fn is(directory: &Directory, name: &FileName, file: &File) -> io::Result<bool> {
    let about = file.metadata()?;
    Ok(directory.look(name)?.is_some_and(|found| found.identity == (about.dev(), about.ino())))
}
