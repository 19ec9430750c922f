//! The process at the other end of a connection.

use std::{
    collections::{HashMap, HashSet},
    fs,
    net::{IpAddr, SocketAddr},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::PathBuf,
};

use tokio::net::UnixStream;

use crate::socket::Stream;

/// The process at the other end: the one that serves the connection. If the system does not show that, the
/// one that made the socket listen, which may have handed it to QEMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Peer {
    /// Its process id.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its start time, in clock ticks since boot: distinguishes it from a later process with the same id.
    pub start_ticks: Option<u64>,
}

/// Source of information about the process at the other end.
#[derive(Debug, Clone)]
pub(crate) enum Other {
    /// The process that made a Unix socket listen, as the system reported it when the connection was opened,
    /// and the name by which the socket listens.
    Unix(Option<Peer>, Option<Vec<u8>>),
    /// Both ends of a TCP connection: ours, and the peer's.
    Tcp(SocketAddr, SocketAddr),
    Unknown,
}

impl Other {
    pub(crate) fn of(stream: &Stream) -> Self {
        match stream {
            Stream::Unix(stream) => Self::Unix(Peer::listening(stream), name_of(stream)),
            Stream::Tcp(stream) => match (stream.local_addr(), stream.peer_addr()) {
                (Ok(own), Ok(its)) => Self::Tcp(own, its),
                _ => Self::Unknown,
            },
        }
    }

    /// Returns the process. It is known only after it has accepted the connection, so after the greeting.
    pub(crate) fn peer(self) -> Option<Peer> {
        match self {
            Self::Unix(listening, None) => listening,
            Self::Unix(listening, Some(name)) => serving(listening, &name),
            Self::Tcp(own, its) => {
                let (inode, uid) = tcp_socket(its, own)?;
                let pid = process_with(inode)?;
                Some(Peer { pid, uid, start_ticks: start_ticks(pid) })
            }
            Self::Unknown => None,
        }
    }
}

/// Returns the process that serves a connection to the Unix socket of this name.
///
/// The kernel reports the process that called `listen`. That is another one where a supervisor opened the
/// socket and handed it to QEMU, as libxl and libvirt do; by now it may have ended, and its number may be
/// another process's. So it is believed only if it has such a connection, or its descriptors cannot be read.
fn serving(listening: Option<Peer>, name: &[u8]) -> Option<Peer> {
    let mut tables = Tables { name, accepted: HashMap::new() };
    let is_visible = |peer: &Peer| fs::exists(format!("/proc/{}", peer.pid)).unwrap_or(false);
    if let Some(peer) = listening
        && is_visible(&peer)
        && tables.serves(peer.pid).unwrap_or(true)
    {
        return listening;
    }
    // Two QEMUs may listen by the same relative name, in two directories: then it is not known which one.
    let mut servers = processes().filter(|pid| tables.serves(*pid) == Some(true));
    let (Some(pid), None) = (servers.next(), servers.next()) else {
        return listening.filter(|peer| !is_visible(peer));
    };
    let uid = fs::metadata(format!("/proc/{pid}")).ok()?.uid();
    Some(Peer { pid, uid, start_ticks: start_ticks(pid) })
}

/// The accepted connections of the Unix sockets of one name: their inodes, for each network namespace.
struct Tables<'a> {
    name: &'a [u8],
    accepted: HashMap<PathBuf, HashSet<u64>>,
}

impl Tables<'_> {
    /// Returns true if a process has such a connection; `None` if its descriptors cannot be read.
    fn serves(&mut self, pid: u32) -> Option<bool> {
        let mut open = sockets_of(pid)?;
        let namespace = fs::read_link(format!("/proc/{pid}/ns/net")).ok()?;
        let accepted = self.accepted.entry(namespace).or_insert_with(|| {
            let table = fs::read(format!("/proc/{pid}/net/unix")).unwrap_or_default();
            let of_name = |line| accepted(line).filter(|(_, of)| *of == self.name);
            table.split(|byte| *byte == b'\n').filter_map(of_name).map(|(inode, _)| inode).collect()
        });
        Some(!accepted.is_empty() && open.any(|inode| accepted.contains(&inode)))
    }
}

/// Parses a line of `/proc/net/unix`, if it is a connection: number, references, protocol, flags, type,
/// state, inode, name. Of the two ends, only the accepted one has a name.
fn accepted(line: &[u8]) -> Option<(u64, &[u8])> {
    const CONNECTED: &str = "03";
    const LISTENS: &str = "00010000";
    let mut rest = line;
    let mut fields = Vec::new();
    while fields.len() < 7 {
        rest = rest.trim_ascii_start();
        let end = rest.iter().position(|byte| *byte == b' ')?;
        let (field, after) = rest.split_at(end);
        fields.push(std::str::from_utf8(field).ok()?);
        rest = after;
    }
    let name = rest.strip_prefix(b" ")?;
    let (flags, state, inode) = (fields.get(3)?, fields.get(5)?, fields.get(6)?);
    (*state == CONNECTED && *flags != LISTENS).then_some((inode.parse().ok()?, name))
}

/// Returns the name by which the socket at the other end listens, as its process gave it.
fn name_of(stream: &UnixStream) -> Option<Vec<u8>> {
    let address = stream.peer_addr().ok()?;
    Some(address.as_pathname()?.as_os_str().as_bytes().to_vec())
}

/// Finds inode and user of the TCP socket between these ends in the kernel's tables.
fn tcp_socket(local: SocketAddr, remote: SocketAddr) -> Option<(u64, u32)> {
    let wanted = (canonical(local), canonical(remote));
    ["/proc/net/tcp", "/proc/net/tcp6"].iter().find_map(|table| {
        let table = fs::read_to_string(table).ok()?;
        table.lines().skip(1).find_map(|line| {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let ends = (canonical(table_address(fields.get(1)?)?), canonical(table_address(fields.get(2)?)?));
            let inode = fields.get(9)?.parse().ok().filter(|inode| *inode != 0)?;
            (ends == wanted).then_some((inode, fields.get(7)?.parse().ok()?))
        })
    })
}

/// Makes an IPv4 address in IPv6 form the same as in IPv4 form.
fn canonical(address: SocketAddr) -> (IpAddr, u16) {
    (address.ip().to_canonical(), address.port())
}

/// Parses `0100007F:1F90`: 32-bit words in the machine's byte order, then the port.
fn table_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let mut bytes = Vec::new();
    for at in (0..address.len()).step_by(8) {
        let word = u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?;
        bytes.extend(word.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
    };
    Some(SocketAddr::new(ip, port))
}

/// Finds the process that has a socket open. Processes with unreadable descriptors are skipped.
fn process_with(inode: u64) -> Option<u32> {
    processes().filter(|pid| sockets_of(*pid).is_some_and(|mut open| open.any(|one| one == inode))).min()
}

/// Returns the inodes of the sockets that a process has open; `None` if its descriptors cannot be read.
fn sockets_of(pid: u32) -> Option<impl Iterator<Item = u64>> {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).ok()?;
    Some(open.flatten().filter_map(|entry| {
        let target = fs::read_link(entry.path()).ok()?;
        target.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
    }))
}

/// Returns all processes.
fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

impl Peer {
    /// Returns the process that made the socket at the other end listen.
    fn listening(stream: &UnixStream) -> Option<Self> {
        let credentials = rustix::net::sockopt::socket_peercred(stream).ok()?;
        let pid = u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()?;
        Some(Self { pid, uid: credentials.uid.as_raw(), start_ticks: start_ticks(pid) })
    }
}

/// Reads field 22 of `/proc/PID/stat`. The second field, the command's name, may contain anything,
/// parentheses too.
fn start_ticks(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_addresses_are_read_in_both_families() {
        let native = |address: [u8; 4]| format!("{:08X}", u32::from_ne_bytes(address));
        let four = format!("{}:1F90", native([127, 0, 0, 1]));
        assert_eq!(table_address(&four), Some("127.0.0.1:8080".parse().unwrap()));
        let mapped = [[0; 4], [0; 4], [0, 0, 0xff, 0xff], [127, 0, 0, 1]].map(native).concat();
        let six = table_address(&format!("{mapped}:0050")).unwrap();
        assert_eq!(canonical(six), canonical("127.0.0.1:80".parse().unwrap()));
        assert_eq!(table_address("nothing"), None);
    }

    #[test]
    fn only_accepted_connections_are_servers() {
        let line = |text: &'static str| accepted(text.as_bytes());
        let name = &b"/run/a monitor"[..];
        assert_eq!(
            line("00000000d1b7d5a5: 00000003 00000000 00000000 0001 03 2671915 /run/a monitor"),
            Some((2_671_915, name))
        );
        // The listener, our own end, and a line that is cut short.
        for other in [
            "00000000d1b7d5a5: 00000002 00000000 00010000 0001 01 2671914 /run/a monitor",
            "00000000d1b7d5a5: 00000003 00000000 00000000 0001 03 2671916",
            "00000000d1b7d5a5: 00000003 00000000",
            "",
        ] {
            assert_eq!(line(other), None, "{other}");
        }
    }
}
