//! Names of files: links, renames and removals, each durable before it returns.
//!
//! The configured path is whole at every point, because of this order: the layer to be shown exists under its
//! permanent name and is durable; a second name for it is linked; that name is renamed over the configured
//! path, which is atomic for every observer; the directory is flushed. The layer shown before keeps its own
//! permanent name throughout.
//!
//! All operations use the descriptor of the directory ([`confined_files`]). The owner of the directory can
//! put a link or another file under any of these names at any moment, and none is followed.

//!
//! All of it goes through the descriptor of the directory ([`confined_files`]): whoever owns the directory
//! can put a link or another file under any of these names at any moment, and none is followed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Attributes, Directory, FileName, Kind, is_trusted_link, refusal};
use snapcore::{DiskRecord, Error, ErrorKind, FileIdentity, Result, file_identity, shell_command};

use crate::layer_name::layer_path;

/// The identity of a file, under any name: device and inode.
pub type FileId = FileIdentity;

/// Returns the identity of the file at `path`, or `None` if there is none. A symbolic link is a file of its
/// own, unless it is one of those that [`confined_files::open`] follows.
pub fn file_id(path: &Utf8Path) -> Result<Option<FileId>> {
    let look = || {
        let found = fs::symlink_metadata(path)?;
        match found.is_symlink() && is_trusted_link(path.as_std_path())? {
            true => fs::metadata(path),
            false => Ok(found),
        }
    };
    match look() {
        Ok(metadata) => Ok(Some(file_identity(&metadata))),
        Err(error) if is_nothing(&error) => Ok(None),
        Err(error) => Err(io_error(error, format!("cannot look at {path}"))),
    }
}

/// Returns true if an error means that there is no such file. A name that the file system does not accept has
/// none.
fn is_nothing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidFilename)
}

/// Opens the image at `path`, a regular file or a block device, without waiting. It follows no link that
/// others can put there.
///
/// # Errors
/// The system's; [`ErrorKind::Refused`] for anything else.
pub fn open_image(path: &Utf8Path, writable: bool) -> Result<File> {
    confined_files::open(path.as_std_path(), writable, Kind::RegularOrBlock)
        .map_err(|error| io_error(error, format!("cannot open {path}")))
}

/// Creates a file under the temporary name of `path` with the attributes of `model`. A leftover of an earlier
/// attempt is removed.
///
/// # Errors
/// The system's.
pub fn create_unfinished(path: &Utf8Path, model: &File, model_path: &Utf8Path) -> Result<File> {
    let passing = unfinished_name(path);
    let make = || {
        let like = Attributes::of(model)?;
        let (directory, name) = Directory::of(passing.as_std_path())?;
        directory.remove(&name)?;
        directory.create_like(&name, &like)
    };
    make().map_err(|error| {
        io_error(error, format!("cannot make {passing} with the owner, mode and attributes of {model_path}"))
    })
}

/// Writes a new file under the temporary name of `path`, with the attributes of the file at `model`. `write`
/// gets the file and that name, and makes the content durable. If it fails, the file is removed. Returns the
/// file, for [`publish`].
///
/// # Errors
/// Those of `write`; the system's.
pub fn write_unfinished<T, E: From<Error>>(
    path: &Utf8Path,
    model: &Utf8Path,
    write: impl FnOnce(File, &Utf8Path) -> std::result::Result<T, E>,
) -> std::result::Result<(File, T), E> {
    let passing = unfinished_name(path);
    // Owner and mode are set before the file has any content, and before it has its name.
    let made = create_unfinished(path, &open_image(model, false)?, model)?;
    let into = made.try_clone().map_err(|error| io_error(error, format!("cannot open {passing} once more")));
    match into.map_err(E::from).and_then(|into| write(into, &passing)) {
        Ok(written) => Ok((made, written)),
        Err(error) => {
            remove_name(&passing)?;
            Err(error)
        }
    }
}

/// Makes a new file at `path`, as [`write_unfinished`]. It gets its name when its content is durable, and
/// replaces no other.
///
/// # Errors
/// [`ErrorKind::Exists`]; those of `write`; the system's.
pub fn write_new<T, E: From<Error>>(
    path: &Utf8Path,
    model: &Utf8Path,
    write: impl FnOnce(File, &Utf8Path) -> std::result::Result<T, E>,
) -> std::result::Result<T, E> {
    let (made, written) = write_unfinished(path, model, write)?;
    let passing = unfinished_name(path);
    if let Err(error) = publish(&passing, path, Some(&made)) {
        remove_name(&passing)?;
        return Err(error.into());
    }
    Ok(written)
}

/// Refuses anything but a regular file at `path`, the place of a layer of ours. A link in its place is never
/// followed. A missing file is accepted.
///
/// # Errors
/// [`ErrorKind::Refused`]; the system's.
pub fn require_own(path: &Utf8Path) -> Result<()> {
    let look = || {
        let (directory, name) = Directory::of(path.as_std_path())?;
        directory.look(&name)
    };
    match look() {
        Ok(Some(found)) if !found.is_file() => Err(Error::new(
            ErrorKind::Refused,
            format!("{path}, a layer of the disk, is {}, and must be a regular file", found.kind()),
        )
        .state("no changes made, and what it leads to was not opened")
        .advise("put the layer's own file back; whoever can write its directory can have replaced it")),
        Ok(_) => Ok(()),
        Err(error) if is_nothing(&error) => Ok(()),
        Err(error) => Err(io_error(error, format!("cannot look at {path}"))),
    }
}

/// Like [`require_own`], for a raw layer, which may also be a block device. A link to a device is accepted if
/// only trusted users can put it there, like the device names in `/dev`.
///
/// # Errors
/// As [`require_own`].
pub fn require_own_or_device(path: &Utf8Path) -> Result<()> {
    let Err(refused) = require_own(path) else { return Ok(()) };
    let is_device = confined_files::open(path.as_std_path(), false, Kind::RegularOrBlock)
        .and_then(|file| file.metadata())
        .is_ok_and(|about| about.file_type().is_block_device());
    if is_device { Ok(()) } else { Err(refused) }
}

/// Opens the regular file at `path`, which is ours. A link in its place is never followed.
///
/// # Errors
/// The system's; [`ErrorKind::Refused`] for anything else.
pub fn open_own(path: &Utf8Path, writable: bool) -> Result<File> {
    confined_files::open_regular(path.as_std_path(), writable)
        .map_err(|error| io_error(error, format!("cannot open {path}")))
}

/// Returns true if both paths lead to one existing file.
///
/// # Errors
/// The system's.
pub fn same_file(a: &Utf8Path, b: &Utf8Path) -> Result<bool> {
    let (a, b) = (file_id(a)?, file_id(b)?);
    Ok(a.is_some() && a == b)
}

/// Makes the error of a failed system call, with advice.
pub fn io_error(error: io::Error, message: String) -> Error {
    if refusal(&error).is_some() {
        return Error::new(ErrorKind::Refused, message)
            .because(error)
            .advise("look at what is there, and who put it there; move it away, or put the file back");
    }
    let advice = match error.kind() {
        io::ErrorKind::PermissionDenied => Some("run as a user who may write there"),
        io::ErrorKind::StorageFull => Some("free space on that file system and try again"),
        io::ErrorKind::QuotaExceeded => Some("free space there, or have the quota raised, and try again"),
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

/// Checks that names can be created and removed in the directory of `path`. It is called before anything is
/// begun, since an operation that finds out later can neither continue nor go back.
///
/// # Errors
/// [`ErrorKind::Refused`]: no permission, a read-only file system, an immutable directory.
pub fn require_writable_directory_of(path: &Utf8Path) -> Result<()> {
    use rustix::fs::Access;
    let directory = path.parent().filter(|parent| !parent.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    rustix::fs::access(directory.as_std_path(), Access::WRITE_OK | Access::EXEC_OK).map_err(|errno| {
        let error = io_error(errno.into(), format!("directory {directory} is not writable"))
            .with_kind(ErrorKind::Refused);
        match errno {
            // Not a matter of permissions: the directory's own flag.
            rustix::io::Errno::PERM => error.advise(format!(
                "the directory has the flag i: `chattr -i {}` takes it off",
                shell_command([directory.as_str()])
            )),
            _ => error,
        }
    })
}

/// Refuses a disk on which no operation can begin: its image is not where it was, or its directory takes no
/// names, or others could replace what is there.
///
/// # Errors
/// [`ErrorKind::NotFound`], with the command that gives the image its name back where it has another;
/// [`ErrorKind::Refused`], with advice; the system's.
pub fn require_place_of(record: &DiskRecord) -> Result<()> {
    let path = record.disk.path();
    if path.symlink_metadata().is_err_and(|error| error.kind() == io::ErrorKind::NotFound) {
        let layer = layer_path(path, &record.active);
        let missing = Error::new(ErrorKind::NotFound, format!("{}: there is no {path}", record.disk.target))
            .state("no changes made");
        // An operation that was stopped in its switch, or another user, took the name away; the content has
        // another one since the layer below was frozen.
        return Err(match layer.symlink_metadata().is_ok_and(|about| about.is_file()) {
            true => missing.advise(format!(
                "its content is there as {layer}: give it its name back (`{}`), then run the command again",
                shell_command(["ln", layer.as_str(), path.as_str()])
            )),
            false => missing.advise("put the file back, then run the command again"),
        });
    }
    require_writable_directory_of(path)?;
    require_private_directory_of(path)
}

/// Refuses a directory in which other users could replace the image at `path` or its layers. Other users are
/// all but root, the user who runs this process, the image's owner, and users who can write the image itself.
///
/// # Errors
/// [`ErrorKind::Refused`], with advice; the system's.
pub fn require_private_directory_of(path: &Utf8Path) -> Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    require_private_directory(directory, path)
}

/// Refuses a directory in which other users than those of the image at `path` could replace what is made.
///
/// # Errors
/// As [`require_private_directory_of`].
pub fn require_private_directory(directory: &Utf8Path, path: &Utf8Path) -> Result<()> {
    let looking = |error| io_error(error, format!("cannot look at {path} and its directory"));
    let image = fs::symlink_metadata(path).map_err(looking)?;
    let found = confined_files::foreign_writers(directory.as_std_path(), path.as_std_path(), &image);
    let Some(writers) = found.map_err(looking)? else { return Ok(()) };
    let place = shell_command([directory.as_str()]);
    let advice = match &writers {
        confined_files::Writers::Owner(uid) => format!(
            "give the image to the owner of its directory (`chown {uid} {}`), or keep it in a directory of its own owner",
            shell_command([path.as_str()])
        ),
        others => format!(
            "{}, or `chmod +t {place}` so that each user can replace his own files only",
            others.advice(&place)
        ),
    };
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "the directory {directory} can be written by {writers}, so that another file could be put in the place of {path} or \
             of its snapshots"
        ),
    )
    .state("no changes made")
    .advise(advice))
}

/// Refuses to write a frozen layer that has names other than its own: another user may have images on such a
/// name, and would find the layer changed. `active` is the configured path of its disk.
///
/// # Errors
/// [`ErrorKind::Refused`]; the system's.
pub fn require_own_names(layer: &Utf8Path, active: &Utf8Path) -> Result<()> {
    let about =
        fs::symlink_metadata(layer).map_err(|error| io_error(error, format!("cannot look at {layer}")))?;
    let id = file_identity(&about);
    if file_id(active)? == Some(id) {
        return Ok(());
    }
    let mut own = 1;
    for name in [switch_name(active), unfinished_name(layer)] {
        own += u64::from(file_id(&name)? == Some(id));
    }
    if about.nlink() <= own {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "{layer} has {} other names (hard links), and a merge would change what they show",
            about.nlink() - own
        ),
    )
    .state("it was not written")
    .advise(format!(
        "'find / -xdev -samefile {layer}' shows them; remove them, or copy the file and give the copy away"
    )))
}

/// Makes the names in the directory of `path` durable.
pub fn flush_directory_of(path: &Utf8Path) -> Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_str().is_empty()).unwrap_or(Utf8Path::new("."));
    Directory::open(directory.as_std_path())
        .and_then(|opened| opened.sync())
        .map_err(|error| io_error(error, format!("cannot flush directory {directory}")))
}

fn directory_of(path: &Utf8Path) -> Result<(Directory, FileName)> {
    Directory::of(path.as_std_path())
        .map_err(|error| io_error(error, format!("cannot open the directory of {path}")))
}

/// Gives the file at `existing` the additional name `new`. If it has that name already, nothing happens.
///
/// # Errors
/// [`ErrorKind::Exists`] if another file has that name; [`ErrorKind::Unsupported`] if the file system has no
/// hard links.
pub fn add_name(existing: &Utf8Path, new: &Utf8Path) -> Result<()> {
    let (directory, from) = directory_of(existing)?;
    let (to, name) = directory_of(new)?;
    match directory.link(&from, &to, &name, None) {
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
    to.sync().map_err(|error| io_error(error, format!("cannot flush the directory of {new}")))
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

/// The name under which a file is made until it is complete: in the same directory, hidden.
pub fn unfinished_name(path: &Utf8Path) -> Utf8PathBuf {
    hidden(path, "domsnap-new")
}

fn hidden(path: &Utf8Path, mark: &str) -> Utf8PathBuf {
    path.with_file_name(format!(".{}.{mark}", path.file_name().unwrap_or("disk")))
}

/// Returns true for a file name that this module uses for the duration of a step.
pub fn is_passing_name(file_name: &str) -> bool {
    file_name.starts_with('.')
        && (file_name.ends_with(".domsnap-switch") || file_name.ends_with(".domsnap-new"))
}

/// Returns true for a file of the catalogue's database. It must not be opened beside the database: when a
/// process closes any descriptor of such a file, the kernel releases all locks that SQLite has on it in this
/// process.
pub fn is_of_catalogue(file_name: &str) -> bool {
    matches!(file_name, "catalogue.db" | "catalogue.db-wal" | "catalogue.db-shm")
}

/// Makes `path` name the file at `to`, atomically for every observer. If it does already, only leftovers of
/// an interrupted attempt are removed.
pub fn move_name(path: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let passing = switch_name(path);
    remove_name(&passing)?;
    let (from, shown) = directory_of(to)?;
    let look = from.look(&shown).map_err(|error| io_error(error, format!("cannot look at {to}")))?;
    let Some(wanted) = look else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{to}, which {path} is to name, does not exist"),
        ));
    };
    if file_id(path)? == Some(wanted.identity) {
        return flush_directory_of(path);
    }
    let (directory, name) = directory_of(path)?;
    let (_, second) = directory_of(&passing)?;
    // 1) Link a second name of the very file that was checked. 2) Rename it over the configured path,
    //    atomically. 3) Make that durable. A crash between 1 and 2 leaves a hidden second name, which the
    //    next attempt removes.
    from.link(&shown, &directory, &second, Some(wanted.identity))
        .map_err(|error| no_links(error, to, &passing))?;
    directory
        .rename(&second, &name, Some(wanted.identity))
        .map_err(|error| io_error(error, format!("cannot rename {passing} to {path}")))?;
    directory.sync().map_err(|error| io_error(error, format!("cannot flush the directory of {path}")))
}

/// Removes leftovers of an interrupted [`move_name`] beside `path`, durably, and leaves `path` as it is.
pub fn clear_move(path: &Utf8Path) -> Result<()> {
    remove(&switch_name(path))
}

/// Renames a file from its temporary name to its own; fails if that exists. `made` is the created file, if
/// the caller still has it open: then no other file gets the name.
pub fn publish(unfinished: &Utf8Path, path: &Utf8Path, made: Option<&File>) -> Result<()> {
    let made = match made {
        Some(made) => {
            let about =
                made.metadata().map_err(|error| io_error(error, format!("cannot look at {unfinished}")))?;
            Some((about.dev(), about.ino()))
        }
        None => None,
    };
    let (directory, from) = directory_of(unfinished)?;
    let (_, to) = directory_of(path)?;
    let exists = || {
        Error::new(ErrorKind::Exists, format!("{path} exists, and nothing is written over it"))
            .advise("choose another name or move that file away")
    };
    match directory.rename_new(&from, &to, made) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(exists()),
        // Old file systems do not support this flag. A link never replaces a file either.
        Err(error)
            if matches!(error.kind(), io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported)
                && refusal(&error).is_none() =>
        {
            match directory.link(&from, &directory, &to, made) {
                Ok(()) => remove_name(unfinished)?,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Err(exists()),
                Err(error) => return Err(no_links(error, unfinished, path)),
            }
        }
        Err(error) => return Err(io_error(error, format!("cannot rename {unfinished} to {path}"))),
    }
    directory.sync().map_err(|error| io_error(error, format!("cannot flush the directory of {path}")))
}

/// Removes one name of a file. If there is no such name, nothing happens. A directory in the file's place is
/// kept, and this is not an error: an operation past its commit point must not wait for it. The caller
/// flushes the directory, or uses [`remove`].
pub fn remove_name(path: &Utf8Path) -> Result<()> {
    let remove = || {
        let (directory, name) = Directory::of(path.as_std_path())?;
        directory.remove(&name)
    };
    match remove() {
        Ok(_) => Ok(()),
        Err(error) if is_nothing(&error) || error.kind() == io::ErrorKind::IsADirectory => Ok(()),
        Err(error) => Err(io_error(error, format!("cannot remove {path}"))),
    }
}

/// Removes one name of a file, durably. If there is no such name, nothing happens.
pub fn remove(path: &Utf8Path) -> Result<()> {
    remove_name(path)?;
    flush_directory_of(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_in_a_files_place_stays() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        fs::create_dir(dir.join("a.crc32")).unwrap();
        fs::write(dir.join("a"), b"x").unwrap();
        for name in ["a", "a.crc32", "nothing"] {
            remove_name(&dir.join(name)).unwrap();
        }
        assert!(!dir.join("a").exists() && dir.join("a.crc32").is_dir());
    }

    /// A device may be below overlays. A link that another user can put in a layer's place must not lead to
    /// one.
    #[test]
    fn a_link_to_anything_but_a_device_is_no_layer() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let file = dir.join("a.raw");
        fs::write(&file, b"x").unwrap();
        require_own_or_device(&file).unwrap();
        require_own_or_device(&dir.join("nothing")).unwrap();
        for (name, to) in [("file", "a.raw"), ("null", "/dev/null"), ("dir", "."), ("broken", "none")] {
            let link = dir.join(name);
            std::os::unix::fs::symlink(to, &link).unwrap();
            let error = require_own_or_device(&link).unwrap_err();
            assert!(error.kind() == ErrorKind::Refused, "{error}");
            assert!(error.to_string().contains("a symbolic link"), "{error}");
        }
    }
}
