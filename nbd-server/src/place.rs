//! A unix socket under a name in the file system: created for its user alone, and never in the place of
//! something else.

use std::io;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Directory, FileName};
use rustix::fs::{AtFlags, FileType, FlockOperation, Mode, flock, statat};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use crate::error::{Error, ErrorKind, Result};

/// The kernel's limit of a socket's path, without the zero at its end.
const MAX_PATH: usize = 107;
/// Connections that the kernel keeps until they are accepted.
const BACKLOG: i32 = 16;
/// Another server that creates its socket in the same directory takes no longer.
const PATIENCE: Duration = Duration::from_secs(5);

/// Returns the path of the control socket that belongs to a socket.
pub fn control_path(socket: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{socket}.control"))
}

/// A listening socket and its name, which is removed with this value if it is still the socket's.
#[derive(Debug)]
pub struct Place {
    listener: UnixListener,
    /// The name, its directory and the socket's identity; `None` if the name is not ours to remove.
    name: Option<(Directory, FileName, (u64, u64))>,
}

impl Place {
    /// Creates a listening socket at `path`, with mode 0600.
    ///
    /// The order: 1) the directory is locked against other servers; 2) a socket of this user's at the path,
    /// which no process listens at, is removed: its server was killed; 3) the socket gets its mode; 4) it
    /// gets its name, which the kernel refuses if anything has it, a link included; 5) it listens.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if a server answers there; [`ErrorKind::Refused`] if something else has the name,
    /// or if other users can change the directory; the system's.
    pub fn create(path: &Utf8Path) -> Result<Self> {
        let failed = |error: io::Error| Error::io(format!("cannot create the socket {path}"), error);
        if path.as_str().len() > MAX_PATH {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("the path of the socket {path} is longer than {MAX_PATH} bytes"),
            )
            .advise("choose a shorter one, such as /run/domsnap/NAME.sock"));
        }
        require_trusted_place(path)?;
        let (directory, name) = Directory::of(path.as_std_path()).map_err(failed)?;
        lock(&directory).map_err(failed)?;
        remove_stale(&directory, &name, path)?;
        let listener = listen(path).map_err(failed)?;
        let found = look(&directory, &name).map_err(failed)?;
        drop(directory);
        // A new descriptor: the lock belongs to the previous one, and ends here.
        let (directory, _) = Directory::of(path.as_std_path()).map_err(failed)?;
        let name = found.map(|(_, identity)| (directory, name, identity));
        Ok(Self { listener, name })
    }

    /// Makes a place of a listening socket that another program created, and will remove.
    pub(crate) fn inherited(listener: UnixListener) -> Self {
        Self { listener, name: None }
    }

    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Connects to this socket, so that a thread that waits for a connection returns. Returns false if that
    /// is not possible.
    pub(crate) fn wake(&self) -> bool {
        let path =
            self.listener.local_addr().ok().and_then(|address| address.as_pathname().map(Path::to_owned));
        path.is_some_and(|path| connect(&path).is_ok())
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some((directory, name, identity)) = &self.name
            && let Ok(Some((FileType::Socket, found))) = look(directory, name)
            && found == *identity
        {
            // A name that stays is found stale by the next server.
            let _ = directory.remove(name);
        }
    }
}

/// Refuses a path that users who are not trusted can redirect.
fn require_trusted_place(path: &Utf8Path) -> Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_str().is_empty());
    let directory = directory.unwrap_or(Utf8Path::new("."));
    // The name itself may exist, as a stale socket: what matters is the directory and those above it. A name
    // that cannot exist stands for all names in it.
    let within = directory.join(".domsnap-serve");
    let found = confined_files::foreign_place(within.as_std_path())
        .map_err(|error| Error::io(format!("cannot look at {directory}"), error))?;
    match found {
        None => Ok(()),
        Some((place, writers)) => {
            let place = place.display().to_string();
            let message = format!("the socket {path} would be in {place}, which other users can change");
            Err(Error::new(ErrorKind::Refused, message).advise(writers.advice(&place)))
        }
    }
}

fn lock(directory: &Directory) -> io::Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        match flock(directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(()),
            Err(Errno::WOULDBLOCK) if Instant::now() < until => {
                std::thread::sleep(Duration::from_millis(10));
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[allow(clippy::unnecessary_cast, reason = "the types of the fields differ by architecture")]
fn look(directory: &Directory, name: &FileName) -> io::Result<Option<(FileType, (u64, u64))>> {
    match statat(directory, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => {
            Ok(Some((FileType::from_raw_mode(stat.st_mode), (stat.st_dev as u64, stat.st_ino as u64))))
        }
        Err(Errno::NOENT) => Ok(None),
        Err(errno) => Err(errno.into()),
    }
}

/// Removes a socket whose server is gone.
fn remove_stale(directory: &Directory, name: &FileName, path: &Utf8Path) -> Result<()> {
    let failed = |error: io::Error| Error::io(format!("cannot look at {path}"), error);
    let stat = match statat(directory, name.as_os_str(), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(failed(errno.into())),
    };
    let own = rustix::process::geteuid().as_raw();
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket || stat.st_uid != own {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("{path} exists, and is no socket of this user's"),
        )
        .advise("choose another path for the socket, or remove that"));
    }
    match connect(path.as_std_path()) {
        Err(Errno::CONNREFUSED) => {
            directory.remove(name).map_err(failed)?;
            Ok(())
        }
        Err(Errno::NOENT) => Ok(()),
        // A full queue is a server too.
        Ok(()) | Err(Errno::AGAIN) => {
            Err(Error::new(ErrorKind::Busy, format!("another server answers at {path}"))
                .advise("stop that one first, or choose another path"))
        }
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Connects and disconnects, without waiting.
fn connect(path: &Path) -> std::result::Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
}

fn listen(path: &Utf8Path) -> io::Result<UnixListener> {
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The name gets the mode that the socket has. So there is no moment in which others can connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path.as_std_path())?)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn directory() -> (tempfile::TempDir, Utf8PathBuf) {
        let directory = tempfile::tempdir_in("/var/tmp").unwrap();
        let path = Utf8PathBuf::from_path_buf(directory.path().join("s")).unwrap();
        (directory, path)
    }

    /// The socket is for its user alone, and its name ends with the server.
    #[test]
    fn socket_is_private_and_removed_at_the_end() {
        let (_directory, path) = directory();
        let place = Place::create(&path).unwrap();
        assert_eq!(std::fs::symlink_metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(Place::create(&path).unwrap_err().kind(), ErrorKind::Busy);
        drop(place);
        assert!(!path.exists());
    }

    /// A socket that a killed server left is replaced.
    #[test]
    fn stale_socket_is_replaced() {
        let (_directory, path) = directory();
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        Place::create(&path).unwrap();
    }

    /// A file, a link and a directory with the socket's name are refused and stay.
    #[test]
    fn what_is_no_socket_is_never_replaced() {
        let (directory, path) = directory();
        let target = directory.path().join("target");
        for make in [
            (|path, _| std::fs::write(path, "x").unwrap()) as fn(&Utf8Path, &std::path::Path),
            |path, target| std::os::unix::fs::symlink(target, path).unwrap(),
            |path, _| std::fs::create_dir(path).unwrap(),
        ] {
            make(&path, &target);
            assert_eq!(Place::create(&path).unwrap_err().kind(), ErrorKind::Refused);
            let found = std::fs::symlink_metadata(&path).unwrap();
            if found.is_dir() {
                std::fs::remove_dir(&path).unwrap();
            } else {
                std::fs::remove_file(&path).unwrap();
            }
            assert!(!target.exists());
        }
    }

    /// A name that was given to something else meanwhile is not removed.
    #[test]
    fn replaced_name_is_not_removed() {
        let (_directory, path) = directory();
        let place = Place::create(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _other = UnixListener::bind(&path).unwrap();
        drop(place);
        assert!(path.exists());
    }

    /// A directory that everybody can write is refused.
    #[test]
    fn open_directory_is_refused() {
        let (directory, path) = directory();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        let error = Place::create(&path).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert!(error.advice().unwrap().contains("chmod"), "{error}");
    }
}
