//! The socket: opening it, and writing a line with a file descriptor.
//!
//! An address is the path of a Unix socket, or `tcp:HOST:PORT` on the loopback interface.

use std::{
    io::{self, IoSlice},
    mem::MaybeUninit,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{Mode, OFlags},
    net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg},
};
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
    time::{Instant, sleep_until},
};

use crate::error::{Error, ErrorKind, Result};

const RETRY: Duration = Duration::from_millis(20);

/// The failures to open a socket after which it is tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Only a full backlog: another client is being served.
    Busy,
    /// Also a missing socket, or one without a listener: QEMU is being restarted.
    Absent,
}

/// Prefix of a TCP address.
const TCP: &str = "tcp:";

/// Address of a listener.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Address {
    /// Parses an address. TCP is supported only on the loopback interface: QMP has no password and no
    /// encryption, and a QEMU elsewhere has other files than this machine.
    pub(crate) fn parse(address: &Path) -> Result<Self> {
        let Some(place) = address.to_str().and_then(|text| text.strip_prefix(TCP)) else {
            return Ok(Self::Unix(address.to_owned()));
        };
        let place = match place.strip_prefix("localhost:") {
            Some(port) => format!("127.0.0.1:{port}"),
            None => place.to_owned(),
        };
        let wrong = |detail: &str| {
            Error::new(ErrorKind::Invalid, "reading an address", address, detail)
                .advise("give tcp:127.0.0.1:PORT, tcp:[::1]:PORT, or the path of a Unix socket")
        };
        let place: SocketAddr = place.parse().map_err(|_| wrong("tcp: needs an IP address and a port"))?;
        match place.ip().to_canonical().is_loopback() {
            true => Ok(Self::Tcp(place)),
            false => Err(wrong("only QEMUs on this machine are connected to")),
        }
    }
}

/// An open stream.
#[derive(Debug)]
pub(crate) enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    async fn connect(address: &Address) -> io::Result<Self> {
        match address {
            Address::Unix(path) => connect_unix(path).await.map(Self::Unix),
            Address::Tcp(place) => {
                let stream = TcpStream::connect(place).await?;
                // Commands are small, and each waits for an answer.
                stream.set_nodelay(true)?;
                Ok(Self::Tcp(stream))
            }
        }
    }

    /// Returns true if it can pass descriptors.
    pub(crate) fn passes_descriptors(&self) -> bool {
        matches!(self, Self::Unix(_))
    }

    async fn send(&self, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<usize> {
        let work = || send(self.as_fd(), bytes, fd);
        match self {
            Self::Unix(stream) => stream.async_io(Interest::WRITABLE, work).await,
            Self::Tcp(stream) => stream.async_io(Interest::WRITABLE, work).await,
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
        }
    }
}

/// Connects to a Unix socket. The system takes names of 107 bytes; a QEMU that was started in a deep
/// directory has listened by a shorter, relative name. So a socket with a longer path is reached through its
/// directory.
async fn connect_unix(path: &Path) -> io::Result<UnixStream> {
    const LONGEST: usize = 107;
    let long = path.as_os_str().len() > LONGEST;
    let (Some(directory), Some(name), true) = (path.parent(), path.file_name(), long) else {
        return UnixStream::connect(path).await;
    };
    let directory =
        rustix::fs::open(directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
    UnixStream::connect(short).await
}

/// Connects, and tries again until `deadline` after the failures in `patience`.
pub(crate) async fn open(socket: &Path, patience: Patience, deadline: Instant) -> Result<Stream> {
    let address = Address::parse(socket)?;
    loop {
        let error = match Stream::connect(&address).await {
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
            "no process is listening on this socket: QEMU has ended, or was restarted with another"
        }
        io::ErrorKind::PermissionDenied => "run as the user that QEMU runs as, or as root",
        io::ErrorKind::WouldBlock => {
            "other clients wait for it already, or QEMU hangs: close them, or give QEMU a second socket"
        }
        io::ErrorKind::InvalidInput => {
            "its name is too long for the system: give QEMU one with a shorter name"
        }
        _ => "check that it is a Unix socket that QEMU serves",
    };
    Error::new(ErrorKind::Connect, "connecting", socket, error.to_string()).advise(advice).because(error)
}

/// Writes all of `bytes`, with `fd` (if any) attached to the first of them. Adds the written length to
/// `written`, also after a failure or if the future is dropped.
pub(crate) async fn write_all(
    stream: &Stream,
    bytes: &[u8],
    mut fd: Option<OwnedFd>,
    written: &mut usize,
) -> io::Result<()> {
    while let Some(rest) = bytes.get(*written..).filter(|rest| !rest.is_empty()) {
        *written += stream.send(rest, fd.as_ref()).await?;
        fd = None;
    }
    Ok(())
}

fn send(stream: BorrowedFd<'_>, bytes: &[u8], fd: Option<&OwnedFd>) -> io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(AsFd::as_fd);
    if !fds.as_slice().is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds.as_slice())) {
        return Err(io::Error::other("no room for a file descriptor in the control message"));
    }
    Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

/// Reads some bytes into `buffer`; 0 means the end.
pub(crate) async fn read(stream: &Stream, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        let read = match stream {
            Stream::Unix(stream) => {
                stream.readable().await?;
                stream.try_read(buffer)
            }
            Stream::Tcp(stream) => {
                stream.readable().await?;
                stream.try_read(buffer)
            }
        };
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            done => return done,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_loopback_is_an_address_of_tcp() {
        let parse = |text: &str| Address::parse(Path::new(text));
        for (text, place) in [
            ("tcp:127.0.0.1:4444", "127.0.0.1:4444"),
            ("tcp:localhost:1", "127.0.0.1:1"),
            ("tcp:[::1]:4444", "[::1]:4444"),
        ] {
            assert_eq!(parse(text).unwrap(), Address::Tcp(place.parse().unwrap()), "{text}");
        }
        assert_eq!(parse("/run/tcp:1").unwrap(), Address::Unix("/run/tcp:1".into()));
        for text in
            ["tcp:192.0.2.1:4444", "tcp:0.0.0.0:1", "tcp:[::]:1", "tcp:127.0.0.1", "tcp:example.org:1"]
        {
            assert_eq!(parse(text).unwrap_err().kind(), ErrorKind::Invalid, "{text}");
        }
    }

    #[tokio::test]
    async fn long_path_is_reached_through_its_directory() {
        let dir = tempfile::tempdir().unwrap();
        let deep = dir.path().join("d".repeat(80)).join("e".repeat(80));
        std::fs::create_dir_all(&deep).unwrap();
        let socket = deep.join("qmp");
        let open = rustix::fs::open(&deep, OFlags::PATH, Mode::empty()).unwrap();
        let _listener =
            tokio::net::UnixListener::bind(format!("/proc/self/fd/{}/qmp", open.as_raw_fd())).unwrap();
        let soon = Instant::now() + Duration::from_secs(10);
        super::open(&socket, Patience::Busy, soon).await.unwrap();
        let missing = super::open(&deep.join("other"), Patience::Busy, soon).await.unwrap_err();
        assert!(missing.to_string().contains("check the path"), "{missing}");
        let long = super::open(&deep.join("n".repeat(120)), Patience::Busy, soon).await.unwrap_err();
        assert!(long.to_string().contains("shorter name"), "{long}");
    }
}
