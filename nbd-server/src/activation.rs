//! Sockets that systemd passes (`sd_listen_fds(3)`), and the report to it that the server is ready
//! (`sd_notify(3)`).

use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixListener};

use camino::Utf8Path;
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::error::{Error, ErrorKind, Result};
use crate::place::Place;
use crate::sys;

/// The first descriptor that systemd passes.
const FIRST: i32 = 3;

/// Listening sockets that systemd passed.
#[derive(Debug, Default)]
pub struct Activation {
    /// The socket of the disk.
    pub disk: Option<Place>,
    /// The control socket.
    pub control: Option<Place>,
}

impl Activation {
    /// Takes the sockets that this process was started with: the one named `control`
    /// (`FileDescriptorName=`), and one of any other name for the disk at `socket`. Call it once, before
    /// anything else opens a file.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for descriptors that are no such sockets; the system's.
    pub fn take(socket: &Utf8Path) -> Result<Self> {
        let mut found = Self::default();
        let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u32>().ok());
        if number("LISTEN_PID") != Some(std::process::id()) {
            return Ok(found);
        }
        let count = number("LISTEN_FDS").unwrap_or(0);
        if count > 2 {
            return Err(Error::new(ErrorKind::Refused, format!("{count} sockets were passed; expected 2")));
        }
        let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
        let mut names = names.split(':');
        for index in 0..count {
            let place = listener(FIRST + index.cast_signed())?;
            let slot = match names.next() {
                Some("control") => &mut found.control,
                _ => {
                    require_path(place.listener(), socket)?;
                    &mut found.disk
                }
            };
            if slot.replace(place).is_some() {
                return Err(Error::new(
                    ErrorKind::Refused,
                    "two sockets for the same purpose were passed; FileDescriptorName= must distinguish them",
                ));
            }
        }
        Ok(found)
    }
}

#[allow(unsafe_code)]
fn listener(number: i32) -> Result<Place> {
    let passed = format!("descriptor {number}, which was passed,");
    // SAFETY: systemd passed the descriptor to this process, which has opened nothing else at that number,
    // and `take` is called once.
    let descriptor = unsafe { sys::take_inherited(number) }
        .map_err(|error| Error::io(format!("{passed} cannot be used"), error))?;
    let socket = descriptor.as_fd();
    let is_listening = sockopt::socket_domain(socket) == Ok(AddressFamily::UNIX)
        && sockopt::socket_type(socket) == Ok(SocketType::STREAM)
        && sockopt::socket_acceptconn(socket) == Ok(true);
    match is_listening {
        true => Ok(Place::inherited(UnixListener::from(descriptor))),
        false => Err(Error::new(ErrorKind::Refused, format!("{passed} is no listening unix socket"))),
    }
}

/// Refuses a socket that has another path than the command line says.
fn require_path(listener: &UnixListener, path: &Utf8Path) -> Result<()> {
    let bound = listener.local_addr().map_err(|error| Error::io("cannot read a socket's path", error))?;
    match bound.as_pathname() {
        Some(bound) if bound == path.as_std_path() => Ok(()),
        bound => Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the socket that was passed is {}, and --socket says {path}",
                bound.map_or_else(|| "without a path".to_owned(), |bound| bound.display().to_string())
            ),
        )),
    }
}

/// Reports to systemd that the server is ready. Does nothing where systemd did not ask for it.
///
/// # Errors
/// The system's.
pub fn report_ready() -> std::io::Result<()> {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::SocketAddr;
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Ok(()) };
    let socket = UnixDatagram::unbound()?;
    let bytes = path.as_encoded_bytes();
    let address = match bytes.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&path)?,
    };
    socket.send_to_addr(b"READY=1", &address)?;
    Ok(())
}
