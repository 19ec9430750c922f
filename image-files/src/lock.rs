//! QEMU-compatible image locks: open-file-description byte locks on the image file itself.
//!
//! QEMU's protocol (`block/file-posix.c`): a process that uses permission *p* of an image takes a *shared*
//! lock on byte `100 + p`. A process that does not let others use *p* takes a shared lock on byte `200 + p`.
//! After it has locked its own bytes it asks with `F_OFD_GETLK` for locks of others on conflicting bytes: a
//! process that unshares what it uses, or uses what it does not share. No process takes an exclusive lock. So
//! two that come at the same time may both refuse, but never both continue. The locks end with the last
//! descriptor of the open file, so SIGKILL releases them.
//!
//! Locking is advisory: Xen's qdisk takes no locks.

use std::fs::File;
use std::io;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// Reasons for an image that could not be locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process has the image open; the text says how.
    #[error("another process has the image open and {0}")]
    Held(String),
    /// The system cannot lock, or cannot query locks.
    #[error("the {mode:?} lock of the image cannot be {what}")]
    System {
        /// The attempted operation.
        what: &'static str,
        /// The kind of lock.
        mode: LockMode,
        /// The system's error.
        source: io::Error,
    },
}

impl LockError {
    /// Advice for the user.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::Held(_) => {
                "shut the domain down, or stop the qemu, qemu-nbd or domsnap that uses the image, and try again"
            }
            Self::System { .. } => {
                "the file system may not support locks; open without locking only if nothing else can use the image"
            }
        }
    }
}

type Result<T> = std::result::Result<T, LockError>;

/// First byte of "I use this permission".
const PERM_BASE: i64 = 100;
/// First byte of "no other process may use this permission".
const UNSHARED_BASE: i64 = 200;

/// QEMU's block permissions, by bit.
const CONSISTENT_READ: u32 = 0;
const WRITE: u32 = 1;
const RESIZE: u32 = 3;
const ALL: [(u32, &str); 4] =
    [(CONSISTENT_READ, "consistent read"), (WRITE, "write"), (2, "write unchanged"), (RESIZE, "resize")];

/// Kinds of lock.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LockMode {
    /// Like `qemu-img info`: others may read; a writer is refused and refuses us.
    Read,
    /// Like `qemu-img snapshot`: no other process may have the image open, except to read it with `-U`.
    Write,
}

impl LockMode {
    fn uses(self) -> &'static [u32] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn unshares(self) -> &'static [u32] {
        &[WRITE, RESIZE]
    }
}

fn byte(kind: i32, at: i64) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: at,
        l_len: 1,
        l_pid: 0,
    }
}

fn refused(what: &'static str, mode: LockMode, errno: nix::errno::Errno) -> LockError {
    LockError::System { what, mode, source: io::Error::from(errno) }
}

/// Locks the image like QEMU. The lock lasts until every descriptor of this open file is closed. A writer's
/// lock on the same open file becomes a reader's, if that is asked for.
///
/// # Errors
/// [`LockError::Held`] if another process has a conflicting lock; nothing stays locked then.
pub fn lock(file: &File, mode: LockMode) -> Result<()> {
    let ours: Vec<i64> = mode
        .uses()
        .iter()
        .map(|p| PERM_BASE + i64::from(*p))
        .chain(mode.unshares().iter().map(|p| UNSHARED_BASE + i64::from(*p)))
        .collect();
    for at in &ours {
        if let Err(e) = fcntl(file, FcntlArg::F_OFD_SETLK(&byte(libc::F_RDLCK, *at))) {
            unlock(file, &ours);
            return Err(refused("taken", mode, e));
        }
    }
    let conflict = find_conflict(file, mode);
    if !matches!(conflict, Ok(None)) {
        unlock(file, &ours);
    }
    match conflict? {
        None => {
            let more = LockMode::Write.uses().iter().filter(|p| !mode.uses().contains(p));
            unlock(file, &more.map(|p| PERM_BASE + i64::from(*p)).collect::<Vec<_>>());
            Ok(())
        }
        Some(found) => Err(LockError::Held(found)),
    }
}

/// Locks a lock file of another program, all of it, against that program; returns false if it has it locked.
/// The lock lasts as [`lock`]'s.
///
/// # Errors
/// The system's.
pub fn lock_whole(file: &File) -> io::Result<bool> {
    let whole = libc::flock { l_len: 0, ..byte(libc::F_WRLCK, 0) };
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole)) {
        Ok(_) => Ok(true),
        Err(nix::errno::Errno::EAGAIN | nix::errno::Errno::EACCES) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Returns true if [`lock`] would be refused. Nothing is locked, not even for a moment.
///
/// # Errors
/// The system's.
pub fn is_locked(file: &File, mode: LockMode) -> Result<bool> {
    Ok(find_conflict(file, mode)?.is_some())
}

/// Describes the first permission that another process uses or does not share with us.
fn find_conflict(file: &File, mode: LockMode) -> Result<Option<String>> {
    let held = |at: i64| -> Result<bool> {
        let mut probe = byte(libc::F_WRLCK, at);
        fcntl(file, FcntlArg::F_OFD_GETLK(&mut probe)).map_err(|e| refused("asked for", mode, e))?;
        Ok(i32::from(probe.l_type) != libc::F_UNLCK)
    };
    for (bit, name) in ALL {
        if mode.uses().contains(&bit) && held(UNSHARED_BASE + i64::from(bit))? {
            return Ok(Some(format!("does not share its \"{name}\" lock")));
        }
        if mode.unshares().contains(&bit) && held(PERM_BASE + i64::from(bit))? {
            return Ok(Some(format!("holds its \"{name}\" lock")));
        }
    }
    Ok(None)
}

fn unlock(file: &File, bytes: &[i64]) {
    for at in bytes {
        // An error here cannot be handled: closing the file releases the lock in any case.
        let _ = fcntl(file, FcntlArg::F_OFD_SETLK(&byte(libc::F_UNLCK, *at)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_openers() -> (tempfile::NamedTempFile, File, File) {
        let f = tempfile::NamedTempFile::new().unwrap();
        let open = || File::options().read(true).write(true).open(f.path()).unwrap();
        let (a, b) = (open(), open());
        (f, a, b)
    }

    /// Two readers share the lock.
    #[test]
    fn two_readers_share_a_lock() {
        let (_f, a, b) = two_openers();
        lock(&a, LockMode::Read).unwrap();
        lock(&b, LockMode::Read).unwrap();
    }

    /// A writer excludes readers and writers until its file is closed.
    #[test]
    fn writer_excludes_all_until_it_closes() {
        let (_f, a, b) = two_openers();
        lock(&a, LockMode::Write).unwrap();
        for mode in [LockMode::Read, LockMode::Write] {
            let e = lock(&b, mode).unwrap_err();
            assert!(matches!(e, LockError::Held(_)));
            assert!(e.to_string().contains("\"write\" lock"), "{e}");
        }
        drop(a);
        lock(&b, LockMode::Write).unwrap();
    }

    /// A writer that goes on as a reader lets readers in, and no writer.
    #[test]
    fn writer_becomes_a_reader() {
        let (_f, a, b) = two_openers();
        lock(&a, LockMode::Write).unwrap();
        lock(&a, LockMode::Read).unwrap();
        lock(&b, LockMode::Read).unwrap();
        assert!(lock(&b, LockMode::Write).is_err());
    }

    /// A reader refuses a writer, which then leaves nothing locked.
    #[test]
    fn refused_writer_leaves_nothing_locked() {
        let (f, a, b) = two_openers();
        lock(&a, LockMode::Read).unwrap();
        assert!(matches!(lock(&b, LockMode::Write), Err(LockError::Held(_))));
        let c = File::open(f.path()).unwrap();
        lock(&c, LockMode::Read).unwrap();
    }
}
