//! Features of the file system on which a file lies.

use std::fs::File;

use camino::Utf8Path;
use image_files::names::io_error;
use rustix::fs::{IFlags, Mode, OFlags};
use rustix::io::Errno;
use snapcore::{Error, ErrorKind, Result};

/// Returns true if files beside `path` can share blocks. It tries this with two files without names, so
/// nothing changes.
///
/// # Errors
/// If the directory does not exist or cannot be written.
pub fn can_reflink(path: &Utf8Path) -> Result<bool> {
    let directory = path.parent().unwrap_or(Utf8Path::new("."));
    let nameless = || {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(directory.as_std_path(), flags, Mode::RUSR | Mode::WUSR)
    };
    let (one, other) = match (nameless(), nameless()) {
        (Ok(one), Ok(other)) => (one, other),
        // A file system without nameless files has no shared blocks either.
        (Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL), _) => return Ok(false),
        (Err(errno), _) | (_, Err(errno)) => {
            return Err(io_error(
                errno.into(),
                format!("cannot try what the file system of {directory} can do"),
            ));
        }
    };
    Ok(rustix::fs::ioctl_ficlone(&one, &other).is_ok())
}

/// Makes the empty `to` share all blocks of `from`. Afterwards it has the same length and content, atomically
/// for every observer.
pub(crate) fn reflink(from: &File, from_path: &Utf8Path, to: &File, to_path: &Utf8Path) -> Result<()> {
    // Blocks can only be shared if both files are written in place, or neither is.
    if let (Ok(like), Ok(is)) = (rustix::fs::ioctl_getflags(from), rustix::fs::ioctl_getflags(to))
        && like.contains(IFlags::NOCOW) != is.contains(IFlags::NOCOW)
    {
        let mut flags = is;
        flags.set(IFlags::NOCOW, like.contains(IFlags::NOCOW));
        rustix::fs::ioctl_setflags(to, flags).map_err(|errno| {
            io_error(errno.into(), format!("cannot give {to_path} the attributes of {from_path}"))
        })?;
    }
    rustix::fs::ioctl_ficlone(to, from).map_err(|errno| match errno {
        Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY => Error::new(
            ErrorKind::Unsupported,
            format!("{to_path} cannot share the blocks of {from_path}: their file system cannot do that"),
        )
        .because(errno)
        .advise("take this disk with =copy, or keep it on btrfs or xfs"),
        errno => io_error(errno.into(), format!("cannot make {to_path} share the blocks of {from_path}")),
    })
}
