//! The state directory's files: private directories, and lock files that the kernel frees when their holder
//! dies.

use std::fs::{DirBuilder, File, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::DirBuilderExt;

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Directory, Kind};

use snapcore::{Error, ErrorKind, Result, shell_command};

/// Makes `directory` and what is missing above it, for its owner alone. Durable when it returns.
pub(crate) fn make_private_directory(directory: &Utf8Path) -> Result<()> {
    let failed = |cause: std::io::Error| {
        Error::new(ErrorKind::Io, format!("the state directory {directory} cannot be made"))
            .because(cause)
            .advise("give another one with --state-dir or DOMSNAP_STATE_DIR, or make this one writable")
    };
    require_own_place(directory)?;
    let missing: Vec<&Utf8Path> = directory
        .ancestors()
        .take_while(|ancestor| !ancestor.as_str().is_empty() && !ancestor.exists())
        .collect();
    for made in missing.into_iter().rev() {
        match DirBuilder::new().mode(0o700).create(made) {
            Ok(()) => {}
            Err(cause) if cause.kind() == std::io::ErrorKind::AlreadyExists => continue,
            Err(cause) => return Err(failed(cause)),
        }
        let parent = match made.parent() {
            Some(parent) if !parent.as_str().is_empty() => parent,
            _ => Utf8Path::new("."),
        };
        File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)?;
    }
    Ok(())
}

/// Refuses a state directory that others could replace, or put files into: what the catalogue says is done.
///
/// # Errors
/// [`ErrorKind::Refused`]; the system's.
pub(crate) fn require_own_place(directory: &Utf8Path) -> Result<()> {
    let found = confined_files::foreign_place(directory.as_std_path()).map_err(|cause| {
        Error::new(ErrorKind::Io, format!("the state directory {directory} cannot be looked at"))
            .because(cause)
    })?;
    let Some((place, writers)) = found else { return Ok(()) };
    let advice = match &writers {
        confined_files::Writers::Owner(_) => {
            "give another one with --state-dir or DOMSNAP_STATE_DIR".to_owned()
        }
        others => {
            let first = others.advice(&shell_command([place.display().to_string().as_str()]));
            format!("{first}, or give another one with --state-dir or DOMSNAP_STATE_DIR")
        }
    };
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "the state directory {directory} could be replaced or written by others: {} can be written by {writers}",
            place.display()
        ),
    )
    .state("nothing was read from it; no changes were made")
    .advise(advice))
}

/// The longest text about a holder that is read back.
const MAX_HOLDER_BYTES: u64 = 256;

/// Takes the lock `name` under `locks`: an advisory lock on an open file description, so that the kernel
/// gives it back however its holder ends. The file stays: removing it would let two holders lock two files of
/// one name.
pub(crate) fn lock(locks: &Utf8Path, name: &str, holder: &str) -> Result<File> {
    make_private_directory(locks)?;
    let path = file_of(locks, name);
    let failed = |cause: std::io::Error| {
        Error::new(ErrorKind::Io, format!("the lock file {path} cannot be used"))
            .because(cause)
            .advise("make the state directory writable, or give another one with --state-dir")
    };
    let open = || {
        let (directory, name) = Directory::of(path.as_std_path())?;
        match directory.create_new(&name, 0o600) {
            Err(cause) if cause.kind() == std::io::ErrorKind::AlreadyExists => {
                directory.open_file(&name, true, Kind::Regular)
            }
            made => made,
        }
    };
    let mut file = open().map_err(failed)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut said = Vec::new();
            // The holder's name is a courtesy; the answer is that the lock is held.
            let _ = (&file).take(MAX_HOLDER_BYTES).read_to_end(&mut said);
            let said = String::from_utf8_lossy(&said);
            let said: String = said.trim().chars().filter(|c| !c.is_control()).collect();
            let by = if said.is_empty() { "another domsnap".to_owned() } else { said };
            return Err(Error::new(ErrorKind::Busy, format!("{name} is being worked on by {by}"))
                .state("no changes made")
                .advise("wait until it has ended, and try again"));
        }
        Err(TryLockError::Error(cause)) => return Err(failed(cause)),
    }
    // Over what the last holder wrote, so that it needs no new block of the file system. On a full one, who
    // holds the lock is not written: that is a courtesy, and a delete must not fail for it.
    let reported = file
        .seek(SeekFrom::Start(0))
        .and_then(|_| file.write_all(holder.as_bytes()))
        .and_then(|()| file.set_len(holder.len() as u64));
    match reported {
        Err(cause) if cause.kind() != std::io::ErrorKind::StorageFull => Err(failed(cause)),
        _ => Ok(file),
    }
}

fn file_of(locks: &Utf8Path, name: &str) -> Utf8PathBuf {
    // A file name has 255 bytes at most, and a domain's name may have as many. Names are ASCII.
    match name.get(..180) {
        None => locks.join(format!("{name}.lock")),
        Some(head) => locks.join(format!("{head}~{:08x}.lock", crc32fast::hash(name.as_bytes()))),
    }
}
