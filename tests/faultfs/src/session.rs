//! What the environment asked for, the number of the current operation, and the decision about it.

use std::ffi::CString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock};

use crate::record::Record;

/// What is to happen to an operation.
pub enum Verdict {
    /// Do it.
    Do,
    /// Do the first half if it is a write, then die.
    Tear,
    /// Do not do it; fail with this errno.
    Fail(i32),
}

/// What the environment asked for.
pub struct Config {
    /// The watched directory.
    pub root: PathBuf,
    count: Option<i32>,
    log: Option<i32>,
    kill_at: Option<u64>,
    stop_at: Option<u64>,
    interrupt_at: Option<u64>,
    torn: bool,
    fail_at: Option<u64>,
    fail_on: bool,
    fail_kind: Option<String>,
    fail_path: Option<String>,
    leave: Option<String>,
    forget_flush: Option<String>,
    errno: i32,
}

/// The number of operations so far; its lock serialises them.
pub struct Turn {
    done: u64,
}

/// How long an operation waits after an interrupt was sent.
pub const INTERRUPT_HEARD: std::time::Duration = std::time::Duration::from_millis(20);

static CONFIG: OnceLock<Option<Config>> = OnceLock::new();
static TURN: Mutex<Turn> = Mutex::new(Turn { done: 0 });

/// A variable of the environment that is a number.
pub fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    match text.parse() {
        Ok(number) => Some(number),
        Err(_) => abort(&format!("{name} is {text:?}, which is not a number")),
    }
}

/// Opens an output file of the shim's own, at a high descriptor so that the program's own numbers stay what
/// they are.
pub fn output(name: &str) -> Option<i32> {
    let path = CString::new(std::env::var_os(name)?.into_vec()).ok()?;
    let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_APPEND | libc::O_CLOEXEC;
    // SAFETY: openat by number, so as not to come back here; `path` is a C string.
    let fd = unsafe { libc::syscall(libc::SYS_openat, libc::AT_FDCWD, path.as_ptr(), flags, 0o600) } as i32;
    // SAFETY: plain descriptors.
    let high = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 900) };
    if fd < 0 || high < 0 {
        abort(&format!("cannot open {name}: {}", std::io::Error::last_os_error()));
    }
    // SAFETY: `fd` is ours and not used again.
    unsafe { libc::close(fd) };
    Some(high)
}

/// What the environment asked for; `None` where it names no directory.
pub fn config() -> Option<&'static Config> {
    CONFIG
        .get_or_init(|| {
            let root = PathBuf::from(std::env::var_os("FAULTFS_ROOT")?);
            if let Some(program) = std::env::var_os("FAULTFS_PROGRAM")
                && std::fs::read_link("/proc/self/exe").ok()?.file_name() != Some(&*program)
            {
                return None;
            }
            let errno = match std::env::var("FAULTFS_ERRNO").as_deref() {
                Ok("EIO") => libc::EIO,
                Ok("EDQUOT") => libc::EDQUOT,
                Ok("EPERM") => libc::EPERM,
                Ok("ENOSPC") | Err(_) => libc::ENOSPC,
                Ok(other) => {
                    abort(&format!("FAULTFS_ERRNO is {other:?}; known are ENOSPC, EIO, EDQUOT, EPERM"))
                }
            };
            Some(Config {
                root,
                count: output("FAULTFS_COUNT"),
                log: output("FAULTFS_LOG"),
                kill_at: number("FAULTFS_KILL_AT"),
                stop_at: number("FAULTFS_STOP_AT"),
                interrupt_at: number("FAULTFS_INTERRUPT_AT"),
                torn: std::env::var("FAULTFS_KILL_MODE").as_deref() == Ok("torn"),
                fail_at: number("FAULTFS_FAIL_AT"),
                fail_on: std::env::var("FAULTFS_FAIL_MODE").as_deref() == Ok("on"),
                fail_kind: std::env::var("FAULTFS_FAIL_KIND").ok(),
                fail_path: std::env::var("FAULTFS_FAIL_PATH").ok(),
                leave: std::env::var("FAULTFS_LEAVE").ok().filter(|part| !part.is_empty()),
                forget_flush: std::env::var("FAULTFS_FORGET_FLUSH").ok(),
                errno,
            })
        })
        .as_ref()
}

impl Config {
    /// Whether operations on `path` (absolute) are ours.
    pub fn watches(&self, path: &Path) -> bool {
        path.starts_with(&self.root)
            && !path.as_os_str().as_encoded_bytes().ends_with(b"-shm")
            && !self.leave.as_ref().is_some_and(|part| path.to_string_lossy().contains(part))
    }

    /// Returns true if flushes of `path` are not to be recorded.
    pub fn forgets_flush(&self, path: &Path) -> bool {
        self.forget_flush.as_ref().is_some_and(|part| path.to_string_lossy().contains(part))
    }

    /// True if a process reads records.
    pub fn records(&self) -> bool {
        self.log.is_some()
    }

    /// Counts the operation `line` (kind, path, offset, length), and says what is to happen to it. May not
    /// return.
    pub fn judge(&self, turn: &mut Turn, line: &str, is_write: bool, needs_space: bool) -> Verdict {
        turn.done += 1;
        if let Some(fd) = self.count {
            put(fd, format!("{} {line}\n", turn.done).as_bytes());
        }
        if self.stop_at == Some(turn.done) {
            // SAFETY: no memory is involved.
            unsafe { libc::kill(libc::getpid(), libc::SIGSTOP) };
        }
        if self.interrupt_at == Some(turn.done) {
            // SAFETY: no memory is involved.
            unsafe { libc::kill(libc::getpid(), libc::SIGINT) };
            // So that the program has heard it before this operation is done, as far as it listens.
            std::thread::sleep(INTERRUPT_HEARD);
        }
        if self.kill_at == Some(turn.done) {
            if self.torn && is_write {
                return Verdict::Tear;
            }
            die();
        }
        if self.fail_kind.as_ref().is_some_and(|kind| line.split(' ').next() == Some(kind))
            && self.fail_path.as_ref().is_none_or(|part| line.contains(part))
        {
            return Verdict::Fail(self.errno);
        }
        match self.fail_at {
            Some(at) if at == turn.done || (self.fail_on && turn.done > at && needs_space) => {
                Verdict::Fail(self.errno)
            }
            _ => Verdict::Do,
        }
    }

    /// Records an operation that succeeded.
    pub fn record(&self, record: &Record) {
        if let Some(fd) = self.log {
            put(fd, &record.encode());
        }
    }
}

/// Waits for the operations before this one.
pub fn turn() -> MutexGuard<'static, Turn> {
    TURN.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

/// SIGKILL: no handler, no destructor, no flush.
pub fn die() -> ! {
    loop {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
    }
}

/// Writes to an output file of the shim's own.
pub fn put(fd: i32, mut bytes: &[u8]) {
    while !bytes.is_empty() {
        // SAFETY: the pointer and length are those of `bytes`.
        let n = unsafe { libc::syscall(libc::SYS_write, fd, bytes.as_ptr(), bytes.len()) };
        if n <= 0 {
            abort(&format!("cannot write its own output: {}", std::io::Error::last_os_error()));
        }
        bytes = &bytes[n as usize..];
    }
}

/// Ends the process with a message, without going through any function that the shim stands in front of.
pub fn abort(message: &str) -> ! {
    let line = format!("faultfs: {message}\n");
    // SAFETY: the pointer and length are those of `line`.
    unsafe { libc::syscall(libc::SYS_write, 2, line.as_ptr(), line.len()) };
    std::process::abort();
}
