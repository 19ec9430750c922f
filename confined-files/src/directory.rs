//! [`Directory`]: work on the files of one directory, by its descriptor.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{self as sys, AtFlags, CWD, FileType, Mode, OFlags, RenameFlags, ResolveFlags, Stat};
use rustix::io::Errno;

use crate::attributes::Attributes;
use crate::name::FileName;
use crate::trust::is_trusted;

/// The most symbolic links of trusted users that are followed on the way to a directory, as Linux itself
/// does.
const MOST_LINKS: u32 = 40;

/// Kinds of file that are accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A regular file or a block device.
    RegularOrBlock,
}

impl Kind {
    fn allows(self, found: FileType) -> bool {
        match self {
            Self::Regular => found == FileType::RegularFile,
            Self::RegularOrBlock => matches!(found, FileType::RegularFile | FileType::BlockDevice),
        }
    }
}

/// A refusal of this crate, which is no failure of the system's.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Refusal(String);

/// Makes a refusal: for callers with rules of their own on whose a file must be.
pub fn refused(why: impl Into<String>) -> io::Error {
    io::Error::other(Refusal(why.into()))
}

/// Returns the message of a refusal of this crate: a link, FIFO or device in the place of a file, or a name
/// that leads out. `None` for the system's own errors.
pub fn refusal(error: &io::Error) -> Option<String> {
    error.get_ref().and_then(|inner| inner.downcast_ref::<Refusal>()).map(ToString::to_string)
}

/// Metadata of a name in a directory; a link is not followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Device and inode.
    pub identity: (u64, u64),
    /// Number of names of the file (hard links).
    pub links: u64,
    /// Its owner.
    pub uid: u32,
    /// Its mode, without its type.
    pub mode: u32,
    /// Its size, in bytes.
    pub size: u64,
    kind: FileType,
}

impl Look {
    #[allow(clippy::unnecessary_cast, reason = "the types of the fields differ by architecture")]
    fn of(stat: &Stat) -> Self {
        Self {
            identity: identity(stat),
            links: stat.st_nlink as u64,
            uid: stat.st_uid,
            mode: stat.st_mode & 0o7777,
            size: u64::try_from(stat.st_size).unwrap_or(0),
            kind: FileType::from_raw_mode(stat.st_mode),
        }
    }

    /// Returns true for a regular file.
    pub fn is_file(&self) -> bool {
        self.kind == FileType::RegularFile
    }

    /// Returns true for a symbolic link.
    pub fn is_link(&self) -> bool {
        self.kind == FileType::Symlink
    }

    /// Returns true for a directory.
    pub fn is_directory(&self) -> bool {
        self.kind == FileType::Directory
    }

    /// Its type, for messages.
    pub fn kind(&self) -> &'static str {
        kind_text(self.kind)
    }
}

#[allow(clippy::unnecessary_cast, reason = "the types of the fields differ by architecture")]
fn identity(stat: &Stat) -> (u64, u64) {
    (stat.st_dev as u64, stat.st_ino as u64)
}

fn kind_text(kind: FileType) -> &'static str {
    match kind {
        FileType::RegularFile => "a regular file",
        FileType::Directory => "a directory",
        FileType::Symlink => "a symbolic link",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice => "a character device",
        FileType::BlockDevice => "a block device",
        FileType::Unknown => "of an unknown kind",
    }
}

/// A lock on a directory.
#[derive(Debug)]
pub struct DirectoryLock(#[expect(dead_code, reason = "the descriptor is the lock")] OwnedFd);

/// An open directory. Names in it are looked up by its descriptor, so it stays the same directory whatever is
/// renamed.
#[derive(Debug)]
pub struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    /// Opens a directory. A symbolic link in its path is followed if a trusted user owns it and no other user
    /// can replace it.
    ///
    /// # Errors
    /// The system's; a [`refusal`] for a symbolic link that others can put there.
    pub fn open(path: &Path) -> io::Result<Self> {
        let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
        let fd = match open_without_links(path, OFlags::RDONLY) {
            // To look names up takes less than to list them.
            Err(Errno::ACCESS) => open_without_links(path, OFlags::PATH),
            other => other,
        };
        let fd = match fd {
            Ok(fd) => fd,
            Err(Errno::LOOP | Errno::NOSYS | Errno::INVAL | Errno::PERM | Errno::AGAIN) => walk(path)?,
            Err(errno) => return Err(errno.into()),
        };
        Ok(Self { fd, path: path.to_owned() })
    }

    /// Opens a directory, and makes it and those above it where they are not there, each durable.
    ///
    /// # Errors
    /// As [`Directory::open`].
    pub fn make_all(path: &Path, mode: u32) -> io::Result<Self> {
        match Self::open(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => return other,
        }
        let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
            return Err(Errno::NOENT.into());
        };
        let above = Self::make_all(parent, mode)?;
        let name = FileName::new(name).map_err(|bad| refused(bad.to_string()))?;
        above.make_subdirectory(&name, mode)?;
        above.sync()?;
        above.subdirectory(&name)?.ok_or_else(|| Errno::NOENT.into())
    }

    /// Opens the directory of the file at `path`, and gives the file's name.
    ///
    /// # Errors
    /// As [`Directory::open`]; a [`refusal`] where `path` does not end in a name.
    pub fn of(path: &Path) -> io::Result<(Self, FileName)> {
        let name = path.file_name().ok_or_else(|| refused(format!("{} names no file", path.display())))?;
        let name = FileName::new(name).map_err(|bad| match bad {
            // The system's own error, which callers know.
            _ if name.as_bytes().len() > 255 => io::Error::from(Errno::NAMETOOLONG),
            bad => refused(bad.to_string()),
        })?;
        Ok((Self::open(path.parent().unwrap_or(Path::new("/")))?, name))
    }

    /// The path that it was opened by. For messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Metadata of the directory itself.
    ///
    /// # Errors
    /// The system's.
    pub fn about(&self) -> io::Result<Look> {
        Ok(Look::of(&sys::fstat(&self.fd)?))
    }

    /// Metadata of a name; `None` if there is none. A link is not followed.
    ///
    /// # Errors
    /// The system's.
    pub fn look(&self, name: &FileName) -> io::Result<Option<Look>> {
        match sys::statat(&self.fd, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(Look::of(&stat))),
            Err(Errno::NOENT) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Opens a file, for reading or for both. It does not wait, follows no link, and is what `kind` allows.
    ///
    /// # Errors
    /// The system's; a [`refusal`] for anything else than such a file.
    pub fn open_file(&self, name: &FileName, writable: bool, kind: Kind) -> io::Result<File> {
        let access = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        self.open_with(name, access, kind)
    }

    /// Opens a regular file for writing alone.
    ///
    /// # Errors
    /// As [`Directory::open_file`].
    pub fn open_to_write(&self, name: &FileName) -> io::Result<File> {
        self.open_with(name, OFlags::WRONLY, Kind::Regular)
    }

    fn open_with(&self, name: &FileName, access: OFlags, kind: Kind) -> io::Result<File> {
        // To open some devices is to do something to them.
        if let Some(found) = self.look(name)?.filter(|found| !kind.allows(found.kind)) {
            return Err(self.wrong_kind(name, found.kind, kind));
        }
        let flags = access | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let opened = sys::openat(&self.fd, name.as_os_str(), flags, Mode::empty());
        let file = match opened {
            Ok(fd) => File::from(fd),
            // A link; a FIFO or socket without a peer; a directory opened for writing.
            Err(errno @ (Errno::LOOP | Errno::NXIO | Errno::ISDIR)) => {
                return Err(match self.look(name)? {
                    Some(found) => self.wrong_kind(name, found.kind, kind),
                    None => errno.into(),
                });
            }
            Err(errno) => return Err(errno.into()),
        };
        let found = FileType::from_raw_mode(sys::fstat(&file)?.st_mode);
        if !kind.allows(found) {
            return Err(self.wrong_kind(name, found, kind));
        }
        // Only the open was not to wait.
        let now = sys::fcntl_getfl(&file)?;
        sys::fcntl_setfl(&file, now - OFlags::NONBLOCK)?;
        Ok(file)
    }

    fn wrong_kind(&self, name: &FileName, found: FileType, kind: Kind) -> io::Error {
        let wanted = match kind {
            Kind::Regular => "a regular file",
            Kind::RegularOrBlock => "a regular file or a block device",
        };
        let path = self.path.join(name);
        refused(format!("{} is {}, and must be {wanted}", path.display(), kind_text(found)))
    }

    /// Creates a file that only its owner can read, for reading and writing.
    ///
    /// # Errors
    /// The system's; `AlreadyExists` where anything has the name, a link too.
    pub fn create_new(&self, name: &FileName, mode: u32) -> io::Result<File> {
        let flags = OFlags::RDWR
            | OFlags::CREATE
            | OFlags::EXCL
            | OFlags::NOFOLLOW
            | OFlags::NOCTTY
            | OFlags::CLOEXEC;
        let fd = sys::openat(&self.fd, name.as_os_str(), flags, Mode::from_raw_mode(mode))?;
        Ok(File::from(fd))
    }

    /// Makes a file with the attributes of another, before anything is in it and before it gets its last
    /// name.
    ///
    /// # Errors
    /// The system's. After an error the file is not there.
    pub fn create_like(&self, name: &FileName, like: &Attributes) -> io::Result<File> {
        let file = self.create_new(name, 0o600)?;
        like.give(&file).inspect_err(|_| {
            // It is ours, and nothing names it yet.
            let _ = self.remove(name);
        })?;
        Ok(file)
    }

    /// Gives a regular file of this directory a further name in `to`.
    ///
    /// # Errors
    /// The system's; a [`refusal`] where it is no regular file, or another than the one of that identity.
    pub fn link(
        &self,
        from: &FileName,
        to: &Self,
        new: &FileName,
        expected: Option<(u64, u64)>,
    ) -> io::Result<()> {
        self.expect(from, expected)?;
        sys::linkat(&self.fd, from.as_os_str(), &to.fd, new.as_os_str(), AtFlags::empty())?;
        // Another file may have got the name between the look and the link.
        to.expect(new, expected).inspect_err(|_| {
            let _ = to.remove(new);
        })
    }

    /// Gives a file another name in this directory, in the place of what has it.
    ///
    /// # Errors
    /// The system's; a [`refusal`] where `from` is no regular file, or another than the one of that identity.
    pub fn rename(&self, from: &FileName, to: &FileName, expected: Option<(u64, u64)>) -> io::Result<()> {
        self.expect(from, expected)?;
        sys::renameat(&self.fd, from.as_os_str(), &self.fd, to.as_os_str())?;
        self.expect(to, expected)
    }

    /// Gives a file another name in this directory, which nothing has.
    ///
    /// # Errors
    /// As [`Directory::rename`]; `AlreadyExists`; `Unsupported` or `InvalidInput` where the file system
    /// cannot do it.
    pub fn rename_new(&self, from: &FileName, to: &FileName, expected: Option<(u64, u64)>) -> io::Result<()> {
        self.expect(from, expected)?;
        let (from, new) = (from.as_os_str(), to.as_os_str());
        sys::renameat_with(&self.fd, from, &self.fd, new, RenameFlags::NOREPLACE)?;
        self.expect(to, expected)
    }

    /// Refuses a name that is no regular file, or another than the one that was worked on.
    fn expect(&self, name: &FileName, expected: Option<(u64, u64)>) -> io::Result<()> {
        let found = self.look(name)?.ok_or_else(|| io::Error::from(Errno::NOENT))?;
        if !found.is_file() {
            return Err(self.wrong_kind(name, found.kind, Kind::Regular));
        }
        if expected.is_some_and(|expected| expected != found.identity) {
            let path = self.path.join(name);
            return Err(refused(format!("{} is another file than a moment ago", path.display())));
        }
        Ok(())
    }

    /// Takes a name away: of a file, a link, a FIFO, whatever it is but a directory. Returns false where
    /// there is none.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self, name: &FileName) -> io::Result<bool> {
        match sys::unlinkat(&self.fd, name.as_os_str(), AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            // A read-only file system says so before it looks whether there is such a name.
            Err(errno) => match self.look(name) {
                Ok(None) => Ok(false),
                _ => Err(errno.into()),
            },
        }
    }

    /// Opens a directory of this one; `None` where there is none.
    ///
    /// # Errors
    /// The system's; a [`refusal`] where the name is no directory.
    pub fn subdirectory(&self, name: &FileName) -> io::Result<Option<Self>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match sys::openat(&self.fd, name.as_os_str(), flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self { fd, path: self.path.join(name) })),
            Err(Errno::NOENT) => Ok(None),
            Err(errno @ (Errno::LOOP | Errno::NOTDIR)) => Err(match self.look(name)? {
                Some(found) => {
                    let path = self.path.join(name);
                    refused(format!(
                        "{} is {}, and must be a directory",
                        path.display(),
                        kind_text(found.kind)
                    ))
                }
                None => errno.into(),
            }),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Makes a directory in this one. Returns false where the name is taken.
    ///
    /// # Errors
    /// The system's.
    pub fn make_subdirectory(&self, name: &FileName, mode: u32) -> io::Result<bool> {
        match sys::mkdirat(&self.fd, name.as_os_str(), Mode::from_raw_mode(mode)) {
            Ok(()) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Gives a directory of this one another name in it, which nothing has.
    ///
    /// # Errors
    /// The system's, `AlreadyExists` among them; a [`refusal`] where `from` is no directory.
    pub fn rename_subdirectory(&self, from: &FileName, to: &FileName) -> io::Result<()> {
        match self.look(from)? {
            Some(found) if found.is_directory() => {}
            Some(found) => {
                let path = self.path.join(from);
                return Err(refused(format!(
                    "{} is {}, and must be a directory",
                    path.display(),
                    found.kind()
                )));
            }
            None => return Err(Errno::NOENT.into()),
        }
        match sys::renameat_with(&self.fd, from.as_os_str(), &self.fd, to.as_os_str(), RenameFlags::NOREPLACE)
        {
            // Old file systems do not know this flag. A directory never replaces a file, nor one that has
            // files in it.
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => match self.look(to)? {
                Some(_) => Err(Errno::EXIST.into()),
                None => Ok(sys::renameat(&self.fd, from.as_os_str(), &self.fd, to.as_os_str())?),
            },
            renamed => Ok(renamed?),
        }
    }

    /// Removes an empty directory of this one. Returns false where there is none.
    ///
    /// # Errors
    /// The system's; `DirectoryNotEmpty`.
    pub fn remove_subdirectory(&self, name: &FileName) -> io::Result<bool> {
        match sys::unlinkat(&self.fd, name.as_os_str(), AtFlags::REMOVEDIR) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The names in the directory, `most` at most.
    ///
    /// # Errors
    /// The system's; a [`refusal`] where there are more.
    pub fn names(&self, most: usize) -> io::Result<Vec<OsString>> {
        let mut names = Vec::new();
        for entry in sys::Dir::read_from(&self.fd)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            if names.len() == most {
                return Err(refused(format!("{} has more than {most} files", self.path.display())));
            }
            names.push(OsStr::from_bytes(name).to_owned());
        }
        Ok(names)
    }

    /// Locks the directory against others that lock it, until the value is dropped or the process ends.
    /// Returns `None` if another has locked it.
    ///
    /// # Errors
    /// The system's; some file systems of other machines cannot lock directories.
    pub fn try_lock(&self) -> io::Result<Option<DirectoryLock>> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = sys::openat(&self.fd, ".", flags, Mode::empty())?;
        match sys::flock(&fd, sys::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(DirectoryLock(fd))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Bytes that this user can still write on its file system.
    ///
    /// # Errors
    /// The system's.
    pub fn free_bytes(&self) -> io::Result<u64> {
        let found = sys::fstatvfs(&self.fd)?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }

    /// Makes its names durable.
    ///
    /// # Errors
    /// The system's.
    pub fn sync(&self) -> io::Result<()> {
        match sys::fsync(&self.fd) {
            // It was opened for its names alone.
            Err(Errno::BADF) => {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                sys::fsync(sys::openat(&self.fd, ".", flags, Mode::empty())?).map_err(io::Error::from)
            }
            other => other.map_err(io::Error::from),
        }
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn open_without_links(path: &Path, access: OFlags) -> Result<OwnedFd, Errno> {
    let flags = access | OFlags::DIRECTORY | OFlags::CLOEXEC;
    sys::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
}

/// Opens a directory component by component. Follows links of trusted users in places that no other user can
/// write to.
fn walk(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let start = |path: &Path| if path.is_absolute() { "/" } else { "." };
    let mut at = sys::openat(CWD, start(path), flags, Mode::empty())?;
    let mut rest: Vec<OsString> = components(path).rev().collect();
    let mut links = 0;
    while let Some(component) = rest.pop() {
        match sys::openat(&at, &component, flags, Mode::empty()) {
            Ok(next) => at = next,
            Err(errno @ (Errno::LOOP | Errno::NOTDIR)) => {
                let stat = sys::statat(&at, &component, AtFlags::SYMLINK_NOFOLLOW)?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
                    return Err(errno.into());
                }
                if !is_link_trusted(&sys::fstat(&at)?, &stat) {
                    return Err(refused(format!(
                        "{} leads through the symbolic link {}, which users who are not trusted can put there",
                        path.display(),
                        Path::new(&component).display()
                    )));
                }
                links += 1;
                if links > MOST_LINKS {
                    return Err(Errno::LOOP.into());
                }
                let target = sys::readlinkat(&at, &component, Vec::new())?;
                let target = Path::new(OsStr::from_bytes(target.to_bytes())).to_owned();
                if target.is_absolute() {
                    at = sys::openat(CWD, "/", flags, Mode::empty())?;
                }
                rest.extend(components(&target).rev());
            }
            Err(errno) => return Err(errno.into()),
        }
    }
    let readable = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match sys::openat(&at, ".", readable, Mode::empty()) {
        Ok(fd) => Ok(fd),
        Err(Errno::ACCESS) => Ok(at),
        Err(errno) => Err(errno.into()),
    }
}

fn components(path: &Path) -> impl DoubleEndedIterator<Item = OsString> + '_ {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name.to_owned()),
        Component::ParentDir => Some(OsString::from("..")),
        Component::RootDir | Component::CurDir | Component::Prefix(_) => None,
    })
}

/// Returns true if a trusted user made the link and no other user can replace it.
fn is_link_trusted(directory: &Stat, link: &Stat) -> bool {
    let only_trusted = directory.st_mode & 0o022 == 0 || directory.st_mode & 0o1000 != 0;
    is_trusted(link.st_uid) && is_trusted(directory.st_uid) && only_trusted
}

/// Returns true if `path` is a symbolic link that a trusted user made and no other user can replace.
///
/// # Errors
/// The system's.
pub fn is_trusted_link(path: &Path) -> io::Result<bool> {
    let (directory, name) = Directory::of(path)?;
    let stat = sys::statat(&directory.fd, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW)?;
    let is_link = FileType::from_raw_mode(stat.st_mode) == FileType::Symlink;
    Ok(is_link && is_link_trusted(&sys::fstat(&directory.fd)?, &stat))
}

/// Opens the file at `path`. A link in its place is followed where a trusted user made it and no other user
/// can replace it, as those below `/dev` are; what it leads to is opened by the same rules.
///
/// # Errors
/// The system's; a [`refusal`].
pub fn open(path: &Path, writable: bool, kind: Kind) -> io::Result<File> {
    let mut path = path.to_owned();
    for _ in 0..MOST_LINKS {
        let (directory, name) = Directory::of(&path)?;
        let link = match directory.look(&name)? {
            Some(found) if found.is_link() => {
                let stat = sys::statat(&directory.fd, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW)?;
                is_link_trusted(&sys::fstat(&directory.fd)?, &stat)
            }
            _ => false,
        };
        if !link {
            return directory.open_file(&name, writable, kind);
        }
        let target = sys::readlinkat(&directory.fd, name.as_os_str(), Vec::new())?;
        path = directory.path.join(OsStr::from_bytes(target.to_bytes()));
    }
    Err(Errno::LOOP.into())
}

/// Opens the regular file at `path` for writing alone, and follows no link in its place.
///
/// # Errors
/// The system's; a [`refusal`].
pub fn open_to_write(path: &Path) -> io::Result<File> {
    let (directory, name) = Directory::of(path)?;
    directory.open_to_write(&name)
}

/// Makes a file at `path`, where nothing is, for its owner alone.
///
/// # Errors
/// The system's; `AlreadyExists` where anything has the name, a link too.
pub fn create_private(path: &Path) -> io::Result<File> {
    let (directory, name) = Directory::of(path)?;
    directory.create_new(&name, 0o600)
}

/// Takes away the name at `path`, whatever it is but a directory. Returns false where there is none.
///
/// # Errors
/// The system's.
pub fn remove(path: &Path) -> io::Result<bool> {
    let (directory, name) = match Directory::of(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        other => other?,
    };
    directory.remove(&name)
}

/// Gives the regular file at `from` the name `to` in the same directory: in the place of what has it, or not.
///
/// # Errors
/// As [`Directory::rename`] and [`Directory::rename_new`].
pub fn rename(from: &Path, to: &Path, replace: bool) -> io::Result<()> {
    let (directory, name) = Directory::of(from)?;
    let (_, new) = Directory::of(to)?;
    match replace {
        true => directory.rename(&name, &new, None),
        false => directory.rename_new(&name, &new, None),
    }
}

/// Makes the names in the directory of `path` durable.
///
/// # Errors
/// The system's.
pub fn sync_directory_of(path: &Path) -> io::Result<()> {
    Directory::open(path.parent().unwrap_or(Path::new("/")))?.sync()
}

/// Opens the regular file at `path` and follows no link in its place.
///
/// # Errors
/// The system's; a [`refusal`].
pub fn open_regular(path: &Path, writable: bool) -> io::Result<File> {
    let (directory, name) = Directory::of(path)?;
    directory.open_file(&name, writable, Kind::Regular)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    fn name(name: &str) -> FileName {
        FileName::new(name).unwrap()
    }

    fn place() -> (tempfile::TempDir, Directory) {
        let dir = tempfile::tempdir().unwrap();
        let opened = Directory::open(dir.path()).unwrap();
        (dir, opened)
    }

    #[test]
    fn only_regular_files_are_opened_and_nothing_waits() {
        let (dir, opened) = place();
        std::fs::write(dir.path().join("file"), b"abc").unwrap();
        symlink("file", dir.path().join("link")).unwrap();
        symlink("nowhere", dir.path().join("dangling")).unwrap();
        std::fs::create_dir(dir.path().join("directory")).unwrap();
        sys::mknodat(CWD, dir.path().join("fifo"), FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        opened.open_file(&name("file"), true, Kind::Regular).unwrap();
        for bad in ["link", "dangling", "directory", "fifo", "socket"] {
            for writable in [false, true] {
                let error = opened.open_file(&name(bad), writable, Kind::RegularOrBlock).unwrap_err();
                assert!(refusal(&error).is_some_and(|text| text.contains(bad)), "{bad}: {error}");
            }
        }
        let error = opened.open_file(&name("none"), false, Kind::Regular).unwrap_err();
        assert_eq!((error.kind(), refusal(&error)), (io::ErrorKind::NotFound, None));
    }

    /// Nothing is created, renamed or removed through a symbolic link.
    #[test]
    fn link_is_never_followed_by_changes() {
        let (dir, opened) = place();
        std::fs::write(dir.path().join("victim"), b"abc").unwrap();
        symlink("victim", dir.path().join("link")).unwrap();
        let error = opened.create_new(&name("link"), 0o600).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert!(refusal(&opened.rename(&name("link"), &name("other"), None).unwrap_err()).is_some());
        assert!(refusal(&opened.link(&name("link"), &opened, &name("other"), None).unwrap_err()).is_some());
        assert!(opened.subdirectory(&name("link")).is_err());
        assert!(opened.remove(&name("link")).unwrap());
        assert!(!opened.remove(&name("link")).unwrap());
        assert_eq!(std::fs::read(dir.path().join("victim")).unwrap(), b"abc");
    }

    #[test]
    fn a_file_that_was_swapped_gets_no_other_name() {
        let (dir, opened) = place();
        let made = opened.create_new(&name("new"), 0o600).unwrap();
        let about = made.metadata().unwrap();
        let made = (about.dev(), about.ino());
        std::fs::write(dir.path().join("swapped"), b"").unwrap();
        std::fs::rename(dir.path().join("swapped"), dir.path().join("new")).unwrap();
        let error = opened.rename_new(&name("new"), &name("last"), Some(made)).unwrap_err();
        assert!(refusal(&error).is_some(), "{error}");
        assert_eq!(opened.look(&name("last")).unwrap(), None);
    }

    /// An open directory stays the same when its path becomes a link.
    #[test]
    fn open_directory_survives_replaced_path() {
        let dir = tempfile::tempdir().unwrap();
        let (home, other) = (dir.path().join("home"), dir.path().join("other"));
        std::fs::create_dir(&home).unwrap();
        std::fs::create_dir(&other).unwrap();
        let opened = Directory::open(&home).unwrap();
        std::fs::rename(&home, dir.path().join("moved")).unwrap();
        symlink(&other, &home).unwrap();
        opened.create_new(&name("file"), 0o600).unwrap();
        assert!(dir.path().join("moved/file").exists() && !other.join("file").exists());
        // Our own link in our own directory is followed.
        Directory::open(&home).unwrap().create_new(&name("file"), 0o600).unwrap();
        assert!(other.join("file").exists());
    }

    #[test]
    fn links_of_others_on_the_way_are_not_followed() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("left out: only root can give a directory away");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (tenant, victim) = (dir.path().join("tenant"), dir.path().join("victim"));
        std::fs::create_dir(&tenant).unwrap();
        std::fs::create_dir(&victim).unwrap();
        std::fs::write(victim.join("file"), b"abc").unwrap();
        symlink("../victim", tenant.join("link")).unwrap();
        symlink("../victim/file", tenant.join("file")).unwrap();
        std::os::unix::fs::chown(&tenant, Some(5000), Some(5000)).unwrap();
        for path in ["link/file", "file"] {
            let error = open(&tenant.join(path), false, Kind::Regular).unwrap_err();
            assert!(refusal(&error).is_some(), "{path}: {error}");
        }
        std::os::unix::fs::chown(&tenant, Some(0), Some(0)).unwrap();
        for path in ["link/file", "file"] {
            open(&tenant.join(path), false, Kind::Regular).unwrap();
        }
    }
}
