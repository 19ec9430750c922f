//! Addresses of monitors and guest agents, as users write them and in their canonical form.

use camino::Utf8Path;
use snapcore::hypervisor::{Control, MemoryDirectory};
use snapcore::{Error, ErrorKind, Result};

/// Prefix of a TCP address.
const TCP: &str = "tcp:";

/// Returns how a domain is reached, with canonical names of its sockets. Relative paths are relative to
/// `directory`.
///
/// # Errors
/// [`ErrorKind::Usage`] if a socket is neither a path nor `tcp:HOST:PORT` on the loopback interface.
pub(super) fn read(control: Control, directory: &Utf8Path) -> Result<Control> {
    if control.address.is_empty() {
        return Err(Error::new(ErrorKind::Usage, "the path of a socket is missing")
            .advise("give the path of a QMP socket, or tcp:127.0.0.1:PORT"));
    }
    let address = socket(directory, &control.address)?;
    let agent = control.agent.as_ref().map(|agent| socket(directory, agent.as_str())).transpose()?;
    let memory_dir = control.memory_dir.as_ref();
    let memory_dir = memory_dir.map(|named| MemoryDirectory::read(named, directory)).transpose()?;
    Ok(control.address(address).agent(agent.map(Into::into)).memory_dir(memory_dir))
}

fn socket(directory: &Utf8Path, text: &str) -> Result<String> {
    match text.starts_with(TCP) {
        true => tcp_address(text),
        false => Ok(socket_address(&directory.join(text))),
    }
}

/// Returns `tcp:IP:PORT`, where `localhost` is 127.0.0.1. Other machines are refused: QMP has no password and
/// no encryption, and a QEMU elsewhere has other files.
fn tcp_address(text: &str) -> Result<String> {
    let place = text.strip_prefix(TCP).unwrap_or(text);
    let place = match place.strip_prefix("localhost:") {
        Some(port) => format!("127.0.0.1:{port}"),
        None => place.to_owned(),
    };
    let wrong = |why: &str| {
        Error::new(ErrorKind::Usage, format!("the TCP address {text:?} cannot be used: {why}")).advise(
            "give tcp:127.0.0.1:PORT or tcp:[::1]:PORT, or better the path of a Unix socket \
             (-qmp unix:PATH,server=on,wait=off)",
        )
    };
    let read = place.parse::<std::net::SocketAddr>();
    let read = read.map_err(|_| wrong("expected tcp:HOST:PORT, with HOST an IP address or localhost"))?;
    match read.ip().to_canonical().is_loopback() {
        true => Ok(format!("{TCP}{read}")),
        false => Err(wrong("only this machine's loopback interface is connected to")),
    }
}

/// Returns the canonical name of a socket: its directory has no links and dots, so that `/var/run/web.qmp`
/// and `/run/web.qmp` are one domain. If the directory does not exist, the path is unchanged.
fn socket_address(path: &Utf8Path) -> String {
    let directory = path.parent().and_then(|directory| directory.canonicalize_utf8().ok());
    match (directory, path.file_name()) {
        (Some(directory), Some(name)) => directory.join(name).into(),
        _ => path.as_str().to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use camino::Utf8PathBuf;

    use super::*;

    fn address(text: &str) -> Result<String> {
        let here = Utf8PathBuf::try_from(std::env::current_dir().expect("there is one")).expect("of UTF-8");
        let control = read(Control::at(text), &here)?;
        assert_eq!(read(control.clone(), "/elsewhere".into())?, control, "{text}");
        Ok(control.address)
    }

    /// The address of a QEMU is the absolute path of its socket.
    #[test]
    fn address_is_the_absolute_socket_path() {
        let here = Utf8PathBuf::try_from(std::env::current_dir().expect("there is one")).expect("of UTF-8");
        let here = here.canonicalize_utf8().expect("it is there");
        for (text, wanted) in [
            ("/nowhere/web.qmp", "/nowhere/web.qmp".to_owned()),
            ("/nowhere/a,b", "/nowhere/a,b".to_owned()),
            ("web.qmp", here.join("web.qmp").into_string()),
            ("src/../web.qmp", here.join("web.qmp").into_string()),
        ] {
            assert_eq!(address(text).expect("a path"), wanted, "{text}");
        }
    }

    /// The address of a TCP monitor is its IP address and port; only the loopback interface is accepted.
    #[test]
    fn tcp_address_is_loopback_ip_and_port() {
        for (text, wanted) in [
            ("tcp:127.0.0.1:4444", "tcp:127.0.0.1:4444"),
            ("tcp:localhost:4444", "tcp:127.0.0.1:4444"),
            ("tcp:[::1]:4444", "tcp:[::1]:4444"),
        ] {
            assert_eq!(address(text).expect("of the loopback interface"), wanted, "{text}");
        }
        for text in ["tcp:192.0.2.1:4444", "tcp:example.org:4444", "tcp:127.0.0.1", "tcp:", "tcp:0.0.0.0:1"] {
            let error = address(text).expect_err("it is elsewhere");
            assert_eq!(error.kind(), ErrorKind::Usage, "{text}");
            assert!(error.to_string().contains("TCP") && error.to_string().contains("unix:"), "{error}");
        }
    }

    /// A socket below a symbolic link has the same address as through the link's target.
    #[test]
    fn links_to_a_socket_directory_are_resolved() {
        let directory = tempfile::tempdir().expect("made");
        let directory = Utf8Path::from_path(directory.path()).expect("of UTF-8");
        let directory = directory.canonicalize_utf8().expect("it is there");
        std::fs::create_dir(directory.join("run")).expect("made");
        std::os::unix::fs::symlink("run", directory.join("var-run")).expect("made");
        let by = |name: &str| address(directory.join(name).join("s").as_str()).expect("a path");
        assert_eq!(by("var-run"), by("run"));
    }

    /// An empty address is a usage error.
    #[test]
    fn missing_socket_is_a_usage_error() {
        let error = address("").expect_err("it is missing");
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.advice().expect("some").contains("QMP socket"), "{error}");
    }
}
