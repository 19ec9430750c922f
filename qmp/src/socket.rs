//! The Unix socket itself: opening it, writing a line with a file descriptor, and who is at the other end.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::{
    io::Interest,
    net::UnixStream,
    time::{Instant, sleep_until},
};

use crate::error::{Error, ErrorKind, Result};

const RETRY: Duration = Duration::from_millis(20);

/// Which failures to open a socket are worth another try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Only a full backlog: somebody else is being served.
    Busy,
    /// Also a socket that is not there (yet), or that nobody serves: QEMU is being started again.
    Absent,
}

/// Connects, trying again until `deadline` where `patience` says so.
pub(crate) async fn open(socket: &Path, patience: Patience, deadline: Instant) -> Result<UnixStream> {
    loop {
        let error = match UnixStream::connect(socket).await {
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let again = match error.kind() {
            io::ErrorKind::WouldBlock => true,
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => patience == Patience::Absent,
            _ => false,
        };
        let now = Instant::now();
        if !again || now >= deadline {
            return Err(open_error(socket, error));
        }
        sleep_until(deadline.min(now + RETRY)).await;
    }
}

fn open_error(socket: &Path, error: io::Error) -> Error {
    let advice = match error.kind() {
        io::ErrorKind::NotFound => "check the path, and that QEMU runs",
        io::ErrorKind::ConnectionRefused => {
            "nobody serves this socket: QEMU has ended, or was started anew elsewhere"
        }
        io::ErrorKind::PermissionDenied => "run as the user that QEMU runs as, or as root",
        io::ErrorKind::WouldBlock => {
            "other clients wait for it already, or QEMU hangs: close them, or give QEMU a second socket"
        }
        _ => "check that it is a Unix socket that QEMU serves",
    };
    Error::new(ErrorKind::Connect, "connecting", socket, error.to_string()).advice(advice).source(error)
}

/// Writes all of `bytes`, with `fd` (if any) attached to the first of them; adds to `written` what is written, also when it
/// fails or the future is dropped.
pub(crate) async fn write_all(
    stream: &UnixStream,
    bytes: &[u8],
    mut fd: Option<OwnedFd>,
    written: &mut usize,
) -> io::Result<()> {
    while let Some(rest) = bytes.get(*written..).filter(|rest| !rest.is_empty()) {
        *written += stream.async_io(Interest::WRITABLE, || send(stream, rest, fd.as_ref())).await?;
        fd = None;
    }
    Ok(())
}

fn send(stream: &UnixStream, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(AsFd::as_fd);
    if !fds.as_slice().is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds.as_slice())) {
        return Err(io::Error::other("no room for a file descriptor in the control message"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

/// Reads some bytes into `buffer`; 0 is the end.
pub(crate) async fn read(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        stream.readable().await?;
        match stream.try_read(buffer) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

/// The process at the other end: who made the socket listen. QEMU itself, unless it was handed the socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// Its process id.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// When it started, in clock ticks since boot: tells it from a later process of the same id.
    pub start_ticks: Option<u64>,
}

impl Peer {
    pub(crate) fn of(stream: &UnixStream) -> Option<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(stream).ok()?;
        let pid = u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()?;
        Some(Self { pid, uid: credentials.uid.as_raw(), start_ticks: start_ticks(pid) })
    }
}

/// Field 22 of `/proc/PID/stat`; the second field, the command's name, may hold anything, parentheses too.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}
