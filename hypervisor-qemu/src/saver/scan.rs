//! Finds the QEMUs that run on this machine and can be reached.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use snapcore::Result;
use snapcore::hypervisor::{Control, DomainInfo};
use tokio::time::timeout;

use super::{Qemu, describe};

/// Time limit for one QEMU's greeting: one that serves another client sends none.
const GREETING: Duration = Duration::from_millis(500);

/// Time limit for the description of one QEMU.
const LOOKING: Duration = Duration::from_secs(5);

/// Connects to each QEMU by the first of its QMP sockets that answers.
pub(super) async fn scan(qemu: &Qemu) -> Result<Vec<(Control, DomainInfo)>> {
    let mut found = Vec::new();
    let mut seen_sockets = BTreeSet::new();
    for sockets in processes() {
        for socket in sockets {
            let Some(address) = socket.to_str().map(str::to_owned) else { continue };
            if !seen_sockets.insert(socket.clone()) {
                continue;
            }
            let looked = async {
                let connection = qemu.reach(&socket, GREETING).await.ok()??;
                describe::look(&connection.0).await.ok()
            };
            let Ok(Some(seen)) = timeout(LOOKING, looked).await else {
                tracing::debug!(address, "passed over: it does not answer, or is another hypervisor's");
                continue;
            };
            found.push((Control::at(address).agent(seen.agent.clone()), seen));
            break;
        }
    }
    Ok(found)
}

/// Returns the QMP sockets of each QEMU, in the order of process ids.
fn processes() -> Vec<Vec<PathBuf>> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let mut pids: Vec<u32> =
        entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
    pids.sort_unstable();
    let of = |pid: u32| {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let program = fs::read_link(process.join("exe")).ok()?;
        let name = program.file_name()?.to_string_lossy().into_owned();
        if !(name.contains("qemu") || name.contains("kvm")) {
            return None;
        }
        let args = fs::read(process.join("cmdline")).ok()?;
        let args: Vec<String> =
            args.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let directory = fs::read_link(process.join("cwd")).unwrap_or_default();
        Some(sockets(&args, &directory))
    };
    pids.into_iter().filter_map(of).filter(|sockets| !sockets.is_empty()).collect()
}

/// Parses a TCP address, if it is on the loopback interface.
fn loopback(place: &str) -> Option<PathBuf> {
    let (host, port) = place.rsplit_once(':')?;
    let host = if host == "localhost" { "127.0.0.1" } else { host };
    let is_loopback = host.starts_with("127.") || host == "[::1]";
    (is_loopback && port.parse::<u16>().is_ok()).then(|| format!("tcp:{host}:{port}").into())
}

/// Returns the sockets on which a QEMU serves QMP, from its command line: Unix sockets, then TCP on the
/// loopback interface.
fn sockets(args: &[String], directory: &Path) -> Vec<PathBuf> {
    let mut chardevs: HashMap<String, String> = HashMap::new();
    let (mut direct, mut monitors, mut tcp) = (Vec::new(), Vec::new(), Vec::new());
    for pair in args.windows(2) {
        let [option, value] = pair else { continue };
        let option = option.strip_prefix("--").or_else(|| option.strip_prefix('-')).unwrap_or_default();
        let mut parts = value.split(',');
        let kind = parts.next().unwrap_or_default();
        let get = |name: &str| {
            let mut parts = value.split(',');
            parts.find_map(|part| part.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
        };
        match option {
            "qmp" | "qmp-pretty" => {
                direct.extend(kind.strip_prefix("unix:").map(str::to_owned));
                tcp.extend(kind.strip_prefix("tcp:").and_then(loopback));
            }
            "chardev" if kind == "socket" => {
                if let (Some(id), Some(path)) = (get("id"), get("path")) {
                    chardevs.insert(id, path);
                }
            }
            "mon" if get("mode").as_deref() == Some("control") => {
                let named = get("chardev").or_else(|| (!kind.contains('=')).then(|| kind.to_owned()));
                monitors.extend(named);
            }
            _ => {}
        }
    }
    // `-qmp chardev:ID` is `-mon chardev=ID,mode=control`.
    direct.extend(monitors.iter().filter_map(|id| chardevs.get(id).cloned()));
    let unix = direct.into_iter().filter(|path| !path.is_empty()).map(|path| directory.join(path));
    unix.chain(tcp).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// QMP sockets are found in each form of the command line, and no other sockets are.
    #[test]
    fn qmp_sockets_are_found_in_each_form() {
        let args = [
            "qemu-system-x86_64",
            "-qmp",
            "unix:/run/a.qmp,server=on,wait=off",
            "--qmp",
            "unix:b,server",
            "-chardev",
            "socket,id=m,path=/run/c.qmp,server=on",
            "-mon",
            "chardev=m,mode=control",
            "-chardev",
            "socket,id=h,path=/run/human",
            "-mon",
            "chardev=h,mode=readline",
            "-chardev",
            "socket,id=agent,path=/run/agent",
            "-qmp",
            "tcp:localhost:4444,server=on",
            "-qmp",
            "tcp:0.0.0.0:4445,server=on",
        ];
        let args = args.map(str::to_owned);
        let expected = ["/run/a.qmp", "/vm/b", "/run/c.qmp", "tcp:127.0.0.1:4444"].map(PathBuf::from);
        assert_eq!(sockets(&args, Path::new("/vm")), expected);
    }
}
