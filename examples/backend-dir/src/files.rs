//! Files that are whole and durable, or not there.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::MetadataExt;

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::backend::StepContext;
use snapcore::{Error, ErrorKind, Result};

const CHUNK: usize = 64 << 10;

/// The directory of a disk's points.
pub(crate) fn points(disk: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{disk}.points"))
}

/// The file of a point.
pub(crate) fn point(disk: &Utf8Path, name: &str) -> Utf8PathBuf {
    points(disk).join(name)
}

/// The name that a file has until it is whole.
pub(crate) fn part(file: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{file}.part"))
}

/// The error of something that was attempted.
pub(crate) fn failed(attempted: impl Into<String>) -> impl FnOnce(io::Error) -> Error {
    let attempted = attempted.into();
    move |cause| {
        let kind = match cause.kind() {
            io::ErrorKind::NotFound => ErrorKind::NotFound,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        Error::new(kind, attempted).because(cause)
    }
}

/// Makes the names in a directory durable.
pub(crate) fn flush(directory: &Utf8Path) -> Result<()> {
    let opened = File::open(directory).and_then(|directory| directory.sync_all());
    opened.map_err(failed(format!("cannot flush the directory {directory}")))
}

/// Makes the names in the directory of `file` durable.
pub(crate) fn flush_around(file: &Utf8Path) -> Result<()> {
    flush(file.parent().unwrap_or_else(|| Utf8Path::new("/")))
}

/// Removes a file; one that is not there is removed already.
pub(crate) fn remove(file: &Utf8Path) -> Result<()> {
    match fs::remove_file(file) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(failed(format!("cannot remove {file}"))(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Makes it durable that points of `disk` were removed; with the last of them their directory goes.
pub(crate) fn tidy(disk: &Utf8Path) -> Result<()> {
    let directory = points(disk);
    if !directory.exists() {
        return Ok(());
    }
    flush(&directory)?;
    match fs::remove_dir(&directory) {
        Ok(()) => flush_around(disk),
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => Ok(()),
        Err(error) => Err(failed(format!("cannot remove {directory}"))(error)),
    }
}

/// Whether two paths name one file.
pub(crate) fn same_file(one: &Utf8Path, other: &Utf8Path) -> bool {
    let id = |path: &Utf8Path| path.metadata().map(|found| (found.dev(), found.ino())).ok();
    id(one).is_some() && id(one) == id(other)
}

/// Whether two files hold the same.
pub(crate) fn same_content(one: &Utf8Path, other: &Utf8Path) -> Result<bool> {
    let compare = || {
        let (mut one, mut other) = (File::open(one)?, File::open(other)?);
        if one.metadata()?.len() != other.metadata()?.len() {
            return Ok(false);
        }
        let (mut ours, mut theirs) = (vec![0; CHUNK], vec![0; CHUNK]);
        loop {
            let count = one.read(&mut ours)?;
            if count == 0 {
                return Ok(true);
            }
            other.read_exact(&mut theirs[..count])?;
            if ours[..count] != theirs[..count] {
                return Ok(false);
            }
        }
    };
    compare().map_err(failed(format!("cannot compare {one} and {other}")))
}

/// Makes `to` a whole copy of `source`: the bytes are durable before they have the name, and the name before
/// this returns.
pub(crate) fn copy(
    disk: &Utf8Path,
    source: &Utf8Path,
    to: &Utf8Path,
    context: StepContext<'_>,
) -> Result<()> {
    if to.exists() {
        return Ok(()); // done before
    }
    let unfinished = part(to);
    let done = copy_bytes(source, &unfinished, disk, context)?;
    if !done {
        return Err(Error::new(ErrorKind::Cancelled, format!("copying {source} was cancelled")));
    }
    fs::rename(&unfinished, to).map_err(failed(format!("cannot name {to}")))?;
    flush(&points(disk))
}

/// Whether it came to the end, and was not cancelled.
fn copy_bytes(source: &Utf8Path, to: &Utf8Path, disk: &Utf8Path, context: StepContext<'_>) -> Result<bool> {
    let directory = points(disk);
    match fs::create_dir(&directory) {
        Ok(()) => flush_around(disk)?,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        Err(error) => return Err(failed(format!("cannot make {directory}"))(error)),
    }
    let work = || {
        let mut reading = File::open(source)?;
        let mut writing = File::create(to)?;
        let total = reading.metadata()?.len();
        writing.set_permissions(reading.metadata()?.permissions())?;
        let (mut chunk, mut done) = (vec![0; CHUNK], 0);
        loop {
            let count = reading.read(&mut chunk)?;
            if count == 0 {
                break;
            }
            match chunk[..count].iter().all(|byte| *byte == 0) {
                true => drop(writing.seek(SeekFrom::Current(count as i64))?), // a hole
                false => writing.write_all(&chunk[..count])?,
            }
            done += count as u64;
            context.progress.bytes(done, total);
            if context.cancel.is_cancelled() {
                return Ok(false);
            }
        }
        writing.set_len(done)?;
        writing.sync_all()?;
        Ok(true)
    };
    work().map_err(failed(format!("cannot copy {source} to {to}")))
}
