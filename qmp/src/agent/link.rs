//! One open socket of an agent, and the exchange of a sync or a command on it.

use std::{
    collections::VecDeque,
    hash::{BuildHasher, Hasher, RandomState},
    io::{self, Read, Write},
    os::fd::AsFd,
    path::Path,
    time::Duration,
};

use serde_json::{Value, json};
use tokio::time::{Instant, timeout_at};

use crate::{
    error::{Error, ErrorKind, Reported, Result, shown},
    line::{CHUNK, Line, LineSplitter},
    message::{Message, command, parse},
    socket::{self, Address, Patience, Stream},
};

pub(super) const SYNC: &str = "guest-sync-delimited";
pub(super) const FREEZE: &str = "guest-fsfreeze-freeze";
pub(super) const FREEZE_LIST: &str = "guest-fsfreeze-freeze-list";
pub(super) const THAW: &str = "guest-fsfreeze-thaw";
pub(super) const STATUS: &str = "guest-fsfreeze-status";

/// Deepest accepted reply of an agent; the deepest of the protocol have about ten levels.
const MAX_DEPTH: usize = 64;
/// Ends a cut line in the agent's parser, and marks the sync's reply.
const DELIMITER: u8 = 0xff;

/// One open socket of an agent.
#[derive(Debug)]
pub(super) struct Link {
    stream: Stream,
    splitter: LineSplitter,
    lines: VecDeque<Line>,
    buffer: Vec<u8>,
    /// True after a cut write or the end of the socket: it is not usable any more.
    broken: bool,
}

/// Makes a number that is unlikely to have been used for a sync, within the range that every JSON parser
/// keeps exactly.
fn fresh_id() -> u64 {
    RandomState::new().build_hasher().finish() >> 12
}

fn sync_line(id: u64) -> Vec<u8> {
    let mut line = vec![DELIMITER];
    line.extend(command(false, SYNC, json!({ "id": id }), None));
    line
}

/// Returns true if a line is the reply to the sync of that id. Data before the last delimiter is older.
fn is_synced(line: &[u8], id: u64) -> bool {
    let Some(at) = line.iter().rposition(|&byte| byte == DELIMITER) else { return false };
    let reply = parse(line.get(at + 1..).unwrap_or_default(), MAX_DEPTH);
    reply.is_ok_and(|reply| reply.get("return").and_then(Value::as_u64) == Some(id))
}

impl Link {
    pub(super) async fn open(socket: &Path, line_cap: usize, deadline: Instant) -> Result<Self> {
        let stream = socket::open(socket, Patience::Busy, deadline).await?;
        let (splitter, lines) = (LineSplitter::new(line_cap), VecDeque::new());
        Ok(Self { stream, splitter, lines, buffer: vec![0; CHUNK], broken: false })
    }

    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Sends a sync with a fresh number and waits for its reply. After that, every earlier command is done,
    /// and no reply is outstanding.
    pub(super) async fn sync(&mut self, socket: &Path, deadline: Instant) -> Result<()> {
        let id = fresh_id();
        let (mut lines, mut last) = (0u64, String::new());
        let outcome = async {
            self.write(&sync_line(id), deadline).await?;
            loop {
                let line = self.line(deadline).await?;
                lines += 1;
                last = match line {
                    Line::Whole(line) if is_synced(&line, id) => return Ok(()),
                    Line::Whole(line) => shown(&line),
                    Line::TooLong { ends, .. } => shown(&ends),
                };
            }
        };
        let failure: Failure = match outcome.await {
            Ok(()) => return Ok(()),
            Err(failure) => failure,
        };
        let noise = match lines {
            0 => String::new(),
            lines => format!("; {lines} other lines came, the last: {last}"),
        };
        Err(failure.error(SYNC, socket, &noise).advise(
            "no agent runs in the guest, or it hangs: `frontend-open` of QEMU's `query-chardev` shows whether one runs; or \
             another client has the socket",
        ))
    }

    /// Sends a command and waits for its reply. Call it only right after a sync.
    pub(super) async fn exchange(
        &mut self,
        name: &str,
        arguments: Value,
        socket: &Path,
        deadline: Instant,
    ) -> Result<std::result::Result<Value, Reported>> {
        let id = format!("domsnap-{}", fresh_id());
        let outcome = async {
            self.write(&command(false, name, arguments, Some(&id)), deadline).await?;
            loop {
                let line = match self.line(deadline).await? {
                    // A late reply to an earlier sync.
                    Line::Whole(line) if line.contains(&DELIMITER) => continue,
                    Line::Whole(line) => line,
                    Line::TooLong { length, .. } => return Err(Failure::TooLong(length)),
                };
                let value = parse(&line, MAX_DEPTH)
                    .map_err(|wrong| Failure::Reply(format!("it {wrong}: {}", shown(&line))))?;
                // Current agents send the id back, old ones do not; a reply with another id is late.
                if let Message::Reply { id: of, outcome } = Message::from_value(value)
                    && of.is_none_or(|of| of.as_str() == Some(&id))
                {
                    return Ok(outcome);
                }
            }
        };
        outcome.await.map_err(|failure: Failure| failure.error(name, socket, "").sent(true))
    }

    async fn write(&mut self, bytes: &[u8], deadline: Instant) -> std::result::Result<(), Failure> {
        let mut written = 0;
        let outcome = timeout_at(deadline, socket::write_all(&self.stream, bytes, None, &mut written)).await;
        match outcome {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => {
                self.broken = true;
                Err(Failure::Lost(format!("writing failed: {error}")))
            }
            Err(_) => {
                self.broken = written > 0;
                Err(Failure::Timeout)
            }
        }
    }

    async fn line(&mut self, deadline: Instant) -> std::result::Result<Line, Failure> {
        loop {
            if let Some(line) = self.lines.pop_front() {
                return Ok(line);
            }
            if Instant::now() >= deadline {
                return Err(Failure::Timeout);
            }
            let count = match timeout_at(deadline, socket::read(&self.stream, &mut self.buffer)).await {
                Err(_) => return Err(Failure::Timeout),
                Ok(Ok(count)) => count,
                Ok(Err(error)) => {
                    self.broken = true;
                    return Err(Failure::Lost(format!("reading failed: {error}")));
                }
            };
            if count == 0 {
                self.broken = true;
                return Err(Failure::Lost("the other side closed the connection".to_owned()));
            }
            let lines = &mut self.lines;
            self.splitter.push(self.buffer.get(..count).unwrap_or_default(), |line| lines.push_back(line));
            // A guest that floods must not keep other tasks of this thread from running.
            tokio::task::yield_now().await;
        }
    }

    /// Thaws without a runtime, within `patience`: the last resort for a guest that is still frozen.
    pub(super) fn thaw_blocking(&self, patience: Duration) -> io::Result<()> {
        let socket = self.stream.as_fd().try_clone_to_owned()?;
        match &self.stream {
            Stream::Unix(_) => thaw_blocking(Blocking::Unix(socket.into()), patience),
            Stream::Tcp(_) => thaw_blocking(Blocking::Tcp(socket.into()), patience),
        }
    }
}

/// A socket that is used without a runtime.
pub(super) enum Blocking {
    Unix(std::os::unix::net::UnixStream),
    Tcp(std::net::TcpStream),
}

impl Blocking {
    /// Makes it blocking, with a write timeout of `patience`.
    fn wait_for(&self, patience: Duration) -> io::Result<()> {
        match self {
            Self::Unix(stream) => {
                stream.set_nonblocking(false).and_then(|()| stream.set_write_timeout(Some(patience)))
            }
            Self::Tcp(stream) => {
                stream.set_nonblocking(false).and_then(|()| stream.set_write_timeout(Some(patience)))
            }
        }
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.write_all(bytes),
            Self::Tcp(stream) => stream.write_all(bytes),
        }
    }

    fn read(&mut self, buffer: &mut [u8], left: Duration) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(Some(left))?;
                stream.read(buffer)
            }
            Self::Tcp(stream) => {
                stream.set_read_timeout(Some(left))?;
                stream.read(buffer)
            }
        }
    }
}

/// Time limit without a runtime for a connection to this machine itself.
const CONNECTING: Duration = Duration::from_millis(200);

/// Opens the socket without a runtime; fails if that would take time.
pub(super) fn open_blocking(socket: &Path) -> io::Result<Blocking> {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let socket = match Address::parse(socket).map_err(io::Error::other)? {
        Address::Tcp(place) => {
            return std::net::TcpStream::connect_timeout(&place, CONNECTING).map(Blocking::Tcp);
        }
        Address::Unix(path) => path,
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&fd, &SocketAddrUnix::new(&socket)?)?;
    Ok(Blocking::Unix(fd.into()))
}

/// See [`Link::thaw_blocking`], for any stream.
pub(super) fn thaw_blocking(mut stream: Blocking, patience: Duration) -> io::Result<()> {
    let end = std::time::Instant::now() + patience;
    stream.wait_for(patience)?;
    let id = fresh_id();
    let mut bytes = sync_line(id);
    bytes.extend(command(false, THAW, Value::Null, None));
    stream.write(&bytes)?;
    let (mut splitter, mut buffer) = (LineSplitter::new(CHUNK), vec![0; CHUNK]);
    let (mut synced, mut thawed) = (false, false);
    while !thawed {
        let left = end.saturating_duration_since(std::time::Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let count = stream.read(&mut buffer, left)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        splitter.push(buffer.get(..count).unwrap_or_default(), |line| {
            if let Line::Whole(line) = line {
                thawed |= synced && parse(&line, MAX_DEPTH).is_ok_and(|reply| reply.get("return").is_some());
                synced |= is_synced(&line, id);
            }
        });
    }
    Ok(())
}

/// Failure of an exchange.
#[derive(Debug)]
enum Failure {
    Timeout,
    Lost(String),
    TooLong(u64),
    Reply(String),
}

impl Failure {
    fn error(self, attempted: &str, socket: &Path, note: &str) -> Error {
        let (kind, detail) = match self {
            Self::Timeout => (ErrorKind::Timeout, format!("the guest agent did not answer in time{note}")),
            Self::Lost(reason) => (ErrorKind::Lost, format!("{reason}{note}")),
            Self::TooLong(length) => (ErrorKind::TooLong, format!("the reply is {length} bytes long{note}")),
            Self::Reply(wrong) => (ErrorKind::Reply, format!("the reply cannot be read, {wrong}{note}")),
        };
        Error::new(kind, attempted, socket, detail)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only the fresh number after the last delimiter is the reply to a sync.
    #[test]
    fn sync_reply_is_the_last_fresh_number() {
        let synced = |line: &[u8]| is_synced(line, 7);
        assert!(synced(b"\xff{\"return\": 7}"));
        assert!(synced(b"\xff\xff\xff{\"return\": 7}"), "stale delimiters");
        assert!(synced(b"{\"return\": {\"half\xff{\"return\": 7}"), "a reply that was cut before it");
        assert!(!synced(b"{\"return\": 7}"), "no delimiter: it may be a reply to anything");
        assert!(!synced(b"\xff{\"return\": 6}"), "the reply to an earlier sync");
        assert!(!synced(b"\xff{\"return\": 7}\xff"));
        assert!(!synced(b"\xff{\"error\": {\"class\": \"GenericError\", \"desc\": \"7\"}}"));
        assert!(!synced(b"\xff"));
    }
}
