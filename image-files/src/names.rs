//! Names of files: links, renames and removals, each durable before it returns.
//!
//! The order that keeps the configured path whole at every instant: the layer to be shown exists under its permanent
//! name and is durable; a second name for it is linked; that name is renamed over the configured path, which is one
//! step for every observer; the directory is flushed. The layer shown before keeps its own permanent name throughout.

use std::fs::{self, File};
use std::io;

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, FileIdentity, Result, file_identity};

/// The identity of a file, whatever it is called: device and inode.
pub type FileId = FileIdentity;

/// The identity of the file at `path`, or `None` where there is none. Symbolic links are followed.
pub fn file_id(path: &Utf8Path) -> Result<Option<FileId>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(file_identity(&metadata))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        // No file can have such a name.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NAMETOOLONG.raw_os_error()) => Ok(None),
        Err(error) => Err(io_error(error, format!("cannot look at {path}"))),
    }
}

/// Whether both paths lead to one file, and it is there.
///
/// # Errors
/// The system's.
pub fn same_file(a: &Utf8Path, b: &Utf8Path) -> Result<bool> {
    let (a, b) = (file_id(a)?, file_id(b)?);
    Ok(a.is_some() && a == b)
}

/// An I/O failure with words.
pub fn io_error(error: io::Error, message: String) -> Error {
    let advice = match error.kind() {
        io::ErrorKind::PermissionDenied => Some("run as a user who may write there"),
        io::ErrorKind::StorageFull => Some("free space on that file system and try again"),
        io::ErrorKind::ReadOnlyFilesystem => Some("the file system is read-only: remount it writable"),
        _ => None,
    };
    let kind = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        _ => ErrorKind::Io,
    };
    let shown = Error::new(kind, message).because(error);
    match advice {
        Some(advice) => shown.advise(advice),
        None => shown,
    }
}

/// Names can be made and removed in the directory of `path`: asked before anything is begun, since an operation that
/// finds out half way can neither go on nor back.
///
/// # Errors
/// [`ErrorKind::Refused`]: no permission, a read-only file system, an immutable directory.
pub fn require_writable_directory_of(path: &Utf8Path) -> Result<()> {
    use rustix::fs::Access;
    let directory = path.parent().filter(|parent| !parent.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    rustix::fs::access(directory.as_std_path(), Access::WRITE_OK | Access::EXEC_OK).map_err(|errno| {
        io_error(errno.into(), format!("no file can be made or removed in directory {directory}"))
            .with_kind(ErrorKind::Refused)
    })
}

/// Makes the names in the directory of `path` durable.
pub fn flush_directory_of(path: &Utf8Path) -> Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    File::open(directory)
        .and_then(|opened| opened.sync_all())
        .map_err(|error| io_error(error, format!("cannot flush directory {directory}")))
}

/// Gives the file at `existing` the further name `new`. Done already: nothing happens.
///
/// # Errors
/// [`ErrorKind::Exists`] where another file has that name; [`ErrorKind::Unsupported`] where the file system has no hard
/// links.
pub fn add_name(existing: &Utf8Path, new: &Utf8Path) -> Result<()> {
    match fs::hard_link(existing, new) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            if file_id(existing)? != file_id(new)? {
                return Err(Error::new(
                    ErrorKind::Exists,
                    format!("{new} exists and is not {existing}, whose second name it was to become"),
                )
                .advise("move that file away and try again"));
            }
        }
        Err(error) => return Err(no_links(error, existing, new)),
    }
    flush_directory_of(new)
}

fn no_links(error: io::Error, existing: &Utf8Path, new: &Utf8Path) -> Error {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::PERM | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::XDEV) => {
            Error::new(ErrorKind::Unsupported, format!("{existing} cannot have a second name (a hard link) {new} here"))
                .because(error)
                .advise(
                    "register the domain with --active-path=new: then the active image gets a new path after each \
                     external snapshot, and the domain's configuration must follow; or take internal snapshots",
                )
        }
        _ => io_error(error, format!("cannot give {existing} the name {new}")),
    }
}

fn switch_name(path: &Utf8Path) -> Utf8PathBuf {
    hidden(path, "domsnap-switch")
}

/// The name under which a file is made before it is whole: in the same directory, hidden.
pub fn unfinished_name(path: &Utf8Path) -> Utf8PathBuf {
    hidden(path, "domsnap-new")
}

fn hidden(path: &Utf8Path, mark: &str) -> Utf8PathBuf {
    path.with_file_name(format!(".{}.{mark}", path.file_name().unwrap_or("disk")))
}

/// Whether a file name is one that this module makes for the time of a step.
pub fn is_passing_name(file_name: &str) -> bool {
    file_name.starts_with('.')
        && (file_name.ends_with(".domsnap-switch") || file_name.ends_with(".domsnap-new"))
}

/// Makes `path` name the file at `to`, in one step for every observer. Done already: nothing happens but the removal of
/// what an interrupted attempt left.
pub fn move_name(path: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let passing = switch_name(path);
    remove_name(&passing)?;
    let Some(wanted) = file_id(to)? else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{to}, which {path} is to name, does not exist"),
        ));
    };
    if file_id(path)? == Some(wanted) {
        return flush_directory_of(path);
    }
    fs::hard_link(to, &passing).map_err(|error| no_links(error, to, &passing))?;
    fs::rename(&passing, path)
        .map_err(|error| io_error(error, format!("cannot rename {passing} to {path}")))?;
    flush_directory_of(path)
}

/// Removes what an interrupted [`move_name`] left beside `path`, durably, and leaves `path` as it is.
pub fn clear_move(path: &Utf8Path) -> Result<()> {
    remove(&switch_name(path))
}

/// Gives a file that was made under a passing name its own: fails where that exists.
pub fn settle(unfinished: &Utf8Path, path: &Utf8Path) -> Result<()> {
    let renamed = rustix::fs::renameat_with(
        rustix::fs::CWD,
        unfinished.as_std_path(),
        rustix::fs::CWD,
        path.as_std_path(),
        rustix::fs::RenameFlags::NOREPLACE,
    );
    match renamed {
        Ok(()) => flush_directory_of(path),
        Err(rustix::io::Errno::EXIST) => {
            Err(Error::new(ErrorKind::Exists, format!("{path} exists, and nothing is written over it"))
                .advise("choose another name or move that file away"))
        }
        // Old file systems know no such flag; a link never replaces either.
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
            fs::hard_link(unfinished, path).map_err(|error| no_links(error, unfinished, path))?;
            remove_name(unfinished)?;
            flush_directory_of(path)
        }
        Err(errno) => Err(io_error(errno.into(), format!("cannot rename {unfinished} to {path}"))),
    }
}

/// Removes one name of a file; no such name: nothing happens. The caller flushes the directory, or uses [`remove`].
pub fn remove_name(path: &Utf8Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        // A read-only file system says so before it looks whether there is such a name.
        Err(error)
            if error.kind() == io::ErrorKind::NotFound || file_id(path).is_ok_and(|id| id.is_none()) =>
        {
            Ok(())
        }
        Err(error) => Err(io_error(error, format!("cannot remove {path}"))),
    }
}

/// Removes one name of a file, durably; no such name: nothing happens.
pub fn remove(path: &Utf8Path) -> Result<()> {
    remove_name(path)?;
    flush_directory_of(path)
}
