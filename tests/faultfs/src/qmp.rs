//! QMP commands: a message to a socket that is one line of JSON with a command.
//!
//! | variable | meaning |
//! |---|---|
//! | `FAULTFS_QMP_COUNT` | file that gets one line for each command that changes something: its number and its name |
//! | `FAULTFS_QMP_KILL_AT` | number of the command (from 1) just before which the process gets SIGKILL |
//! | `FAULTFS_QMP_KILL_MODE` | `sent`: just after it was sent, before its reply is read |
//!
//! | `FAULTFS_QMP_SIGNAL` | the number of a signal that is sent there instead, with time to hear it; the command is sent then |
//!
//! Queries are not counted: what holds before one holds before the next command too.

use std::ffi::c_int;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use libc::{msghdr, ssize_t};

use crate::real::real;
use crate::session::{INTERRUPT_HEARD, die, number, output, put};

struct Config {
    count: Option<i32>,
    kill_at: Option<u64>,
    sent: bool,
    signal: Option<c_int>,
}

static CONFIG: OnceLock<Option<Config>> = OnceLock::new();
static DONE: AtomicU64 = AtomicU64::new(0);

fn config() -> Option<&'static Config> {
    CONFIG
        .get_or_init(|| {
            let config = Config {
                count: output("FAULTFS_QMP_COUNT"),
                kill_at: number("FAULTFS_QMP_KILL_AT"),
                signal: number("FAULTFS_QMP_SIGNAL").map(|signal| signal as c_int),
                sent: std::env::var("FAULTFS_QMP_KILL_MODE").as_deref() == Ok("sent"),
            };
            (config.count.is_some() || config.kill_at.is_some()).then_some(config)
        })
        .as_ref()
}

/// The name of the command in a line of JSON, if it changes something.
fn command(line: &[u8]) -> Option<&str> {
    let text = std::str::from_utf8(line).ok()?;
    let name = ["\"execute\":\"", "\"exec-oob\":\""].iter().find_map(|key| text.split_once(key))?.1;
    let name = name.split('"').next()?;
    let queries = ["query-", "qom-", "x-debug-query", "qmp_capabilities", "device-list-properties"];
    (!queries.iter().any(|query| name.starts_with(query))).then_some(name)
}

#[unsafe(no_mangle)]
extern "C" fn sendmsg(fd: c_int, message: *const msghdr, flags: c_int) -> ssize_t {
    let real = || real!(sendmsg: fn(c_int, *const msghdr, c_int) -> ssize_t; fd, message, flags);
    let Some(config) = config() else { return real() };
    // SAFETY: the caller hands libc a message header with a valid vector.
    let name = unsafe {
        let message = &*message;
        match message.msg_iovlen {
            0 => None,
            _ => {
                let first = &*message.msg_iov;
                command(std::slice::from_raw_parts(first.iov_base.cast::<u8>(), first.iov_len))
            }
        }
    };
    let Some(name) = name else { return real() };
    let number = DONE.fetch_add(1, Ordering::SeqCst) + 1;
    if let Some(fd) = config.count {
        put(fd, format!("{number} {name}\n").as_bytes());
    }
    let kills = config.kill_at == Some(number);
    if kills && let Some(signal) = config.signal {
        // SAFETY: no memory is involved.
        unsafe { libc::kill(libc::getpid(), signal) };
        std::thread::sleep(INTERRUPT_HEARD);
        return real();
    }
    if kills && !config.sent {
        die();
    }
    let sent = real();
    if kills {
        die();
    }
    sent
}
