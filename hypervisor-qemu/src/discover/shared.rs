//! Parts of the host that the guest can write besides its disks. No snapshot holds shared directories and
//! devices of the host. A snapshot's memory holds files that are memory to the guest.

use std::collections::BTreeMap;

use serde_json::Value;

use super::{Device, Process, optional_property};
use crate::{error::Result, machine::Machine};

/// Each as a phrase that names its place.
#[derive(Debug, Default, PartialEq)]
pub(crate) struct Shared {
    /// Parts that no snapshot holds.
    pub(crate) nowhere: Vec<String>,
    /// Parts that only a snapshot's memory holds.
    pub(crate) in_memory: Vec<String>,
}

/// Reads them from a QEMU.
pub(super) async fn shared(machine: &Machine, process: &Process, devices: &[Device]) -> Result<Shared> {
    let (mut shared, mut in_memory) = (Vec::new(), Vec::new());
    for device in devices {
        let kind = kind(&device.kind);
        let get = |name: &'static str| optional_property(machine, &device.path, name);
        let text = |value: Value| value.as_str().map(str::to_owned);
        let shown = device.path.rsplit('/').next().unwrap_or(&device.path);
        match kind {
            Kind::Plan9 => {
                let id = text(get("fsdev").await?).unwrap_or_default();
                let options = shares(&process.command_line).remove(&id).unwrap_or_default();
                if options.read_only {
                    continue;
                }
                let tag = text(get("mount_tag").await?).unwrap_or_default();
                shared.push(match options.path {
                    Some(path) => format!("the shared directory {path} (9p)"),
                    None => format!("the shared directory with the tag {tag} (9p)"),
                });
            }
            Kind::VirtioFs => {
                let tag = text(get("tag").await?).unwrap_or_else(|| shown.to_owned());
                shared.push(format!("the shared directory with the tag {tag} (virtiofs)"));
            }
            Kind::Mtp => {
                if get("readonly").await?.as_bool() == Some(false) {
                    let root = text(get("rootdir").await?).unwrap_or_else(|| shown.to_owned());
                    shared.push(format!("the shared directory {root} (MTP)"));
                }
            }
            Kind::SharedMemory => match mapped(machine, device).await? {
                Some((path, _)) => in_memory.push(format!("the shared memory {path} ({})", device.kind)),
                None => in_memory.push(format!("the shared memory of {shown} ({})", device.kind)),
            },
            // A private mapping is the guest's own memory, and is saved with it.
            Kind::Persistent => {
                if let Some((path, true)) = mapped(machine, device).await? {
                    in_memory.push(format!("the file {path} of the memory device {shown} ({})", device.kind));
                }
            }
            Kind::OfHost => shared.push(format!("the host's device {shown} ({})", device.kind)),
            Kind::Other => {}
        }
    }
    shared.extend(served_by_network(&process.command_line));
    Ok(Shared { nowhere: shared, in_memory })
}

/// Reads them from the command that starts a machine.
pub(crate) fn shared_by(command: &[String]) -> Shared {
    let options = |name: &'static str| {
        let is = move |word: &str| word == name || word.strip_prefix('-') == Some(name);
        command.windows(2).filter(move |pair| is(&pair[0])).map(|pair| pair[1].as_str())
    };
    let mut shares = shares(command);
    let (mut shared, mut in_memory, mut used) = (Vec::new(), Vec::new(), Vec::new());
    for device in options("-device") {
        let name = match device.starts_with('{') {
            true => serde_json::from_str::<Value>(device)
                .ok()
                .and_then(|value| value["driver"].as_str().map(str::to_owned))
                .unwrap_or_default(),
            false => {
                let first = device.split(',').next().unwrap_or_default();
                first.strip_prefix("driver=").unwrap_or(first).to_owned()
            }
        };
        let part = |name: &str| {
            device.split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
        };
        match kind(&name) {
            Kind::Plan9 => used.extend(part("fsdev")),
            Kind::VirtioFs => shared.push(format!(
                "the shared directory with the tag {} (virtiofs)",
                part("tag").unwrap_or_else(|| "?".to_owned())
            )),
            Kind::Mtp if !device.contains("readonly=false") && !device.contains("readonly=off") => {}
            Kind::Mtp => shared.push("a shared directory (MTP)".to_owned()),
            Kind::SharedMemory => in_memory.push(format!("shared memory ({name})")),
            Kind::Persistent => {
                let maps = |object: &str| {
                    let of = part("memdev").unwrap_or_default();
                    object.split(',').any(|part| part == format!("id={of}")) && object.contains("share=on")
                };
                if options("-object").any(maps) {
                    in_memory.push(format!("the file of a memory device ({name})"));
                }
            }
            Kind::OfHost => shared.push(format!("a device of the host's ({name})")),
            Kind::Other => {}
        }
    }
    shares.retain(|name, share| !share.read_only && (share.is_used || used.contains(name)));
    shared.extend(
        shares
            .into_values()
            .filter_map(|share| share.path)
            .map(|path| format!("the shared directory {path} (9p)")),
    );
    shared.extend(served_by_network(command));
    Shared { nowhere: shared, in_memory }
}

/// Returns the directories that QEMU serves to the guest over its own network (`-netdev user,smb=DIRECTORY`).
/// The guest can only read what QEMU serves by TFTP.
fn served_by_network(command: &[String]) -> Vec<String> {
    let mut served = Vec::new();
    for pair in command.windows(2) {
        let (Some(option), value) = (pair[0].strip_prefix('-'), &pair[1]) else { continue };
        if !matches!(option.trim_start_matches('-'), "netdev" | "nic" | "net") {
            continue;
        }
        let directory = match value.starts_with('{') {
            true => serde_json::from_str::<Value>(value)
                .ok()
                .and_then(|value| value["smb"].as_str().map(str::to_owned)),
            // A doubled comma belongs to a value.
            false => {
                let value = value.replace(",,", "\u{0}");
                let part = value.split(',').find_map(|part| part.strip_prefix("smb="));
                part.map(|directory| directory.replace('\u{0}', ","))
            }
        };
        served.extend(directory.map(|directory| format!("the shared directory {directory} (SMB)")));
    }
    served
}

enum Kind {
    Plan9,
    VirtioFs,
    Mtp,
    SharedMemory,
    Persistent,
    OfHost,
    Other,
}

fn kind(name: &str) -> Kind {
    let is =
        |wanted: &str| name == wanted || name.strip_prefix(wanted).is_some_and(|rest| rest.starts_with('-'));
    match () {
        () if is("virtio-9p") => Kind::Plan9,
        () if is("vhost-user-fs") => Kind::VirtioFs,
        () if is("usb-mtp") => Kind::Mtp,
        () if is("ivshmem") => Kind::SharedMemory,
        () if is("nvdimm") || is("virtio-pmem") => Kind::Persistent,
        () if is("vfio-pci") || is("usb-host") || is("usb-redir") => Kind::OfHost,
        () => Kind::Other,
    }
}

/// Returns the file that a memory device maps. The flag is true if the guest's writes go to the file.
async fn mapped(machine: &Machine, device: &Device) -> Result<Option<(String, bool)>> {
    let backend = optional_property(machine, &device.path, "memdev").await?;
    let Some(backend) = backend.as_str().filter(|backend| !backend.is_empty()) else { return Ok(None) };
    let path = optional_property(machine, backend, "mem-path").await?;
    let share = optional_property(machine, backend, "share").await?.as_bool().unwrap_or(false);
    let read_only = optional_property(machine, backend, "readonly").await?.as_bool().unwrap_or(false);
    Ok(path.as_str().map(|path| (path.to_owned(), share && !read_only)))
}

/// A directory that is shared by 9p.
#[derive(Default)]
struct Share {
    path: Option<String>,
    read_only: bool,
    /// It came with its device (`-virtfs`).
    is_used: bool,
}

/// Returns the directories that a command shares by 9p, by their ids; the id of a `-virtfs` may be its tag.
fn shares(command: &[String]) -> BTreeMap<String, Share> {
    let mut shares = BTreeMap::new();
    for pair in command.windows(2) {
        let is_used = match pair[0].trim_start_matches('-') {
            "fsdev" => false,
            "virtfs" => true,
            _ => continue,
        };
        let part =
            |name: &str| pair[1].split(',').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
        let read_only = matches!(part("readonly"), Some("on" | "true" | "yes"))
            || pair[1].split(',').any(|part| part == "readonly");
        let share = Share { path: part("path").map(str::to_owned), read_only, is_used };
        // QEMU names the `fsdev` of a `-virtfs` after its id, or after its tag.
        if let Some(id) = part("id").or_else(|| part("mount_tag")) {
            shares.insert(id.to_owned(), share);
        }
    }
    shares
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_read_off_a_command() {
        let found = |args: &[&str]| {
            let args: Vec<String> = args.iter().map(|word| (*word).to_owned()).collect();
            let shared = shared_by(&args);
            [shared.nowhere, shared.in_memory].concat()
        };
        let fs = [
            "-fsdev",
            "local,id=a,path=/a",
            "-fsdev",
            "local,id=b,path=/b",
            "-device",
            "virtio-9p-pci,fsdev=a",
        ];
        assert_eq!(found(&fs), ["the shared directory /a (9p)"]);
        assert_eq!(found(&["-virtfs", "local,path=/v,mount_tag=t"]), ["the shared directory /v (9p)"]);
        assert!(found(&["-virtfs", "local,path=/v,mount_tag=t,readonly=on"]).is_empty());
        let pmem = ["-object", "memory-backend-file,id=m,share=on,mem-path=/p", "-device", "nvdimm,memdev=m"];
        assert_eq!(found(&pmem), ["the file of a memory device (nvdimm)"]);
        assert!(
            found(&["-object", "memory-backend-file,id=m,mem-path=/p", "-device", "nvdimm,memdev=m"])
                .is_empty()
        );
        assert_eq!(found(&["-device", r#"{"driver":"ivshmem-plain"}"#]), ["shared memory (ivshmem-plain)"]);
        assert!(found(&["-device", "virtio-blk-pci,drive=d"]).is_empty());
        assert_eq!(found(&["-netdev", "user,id=n,smb=/a,,b,tftp=/t"]), ["the shared directory /a,b (SMB)"]);
        let json = ["-netdev", r#"{"type":"user","id":"n","smb":"/s"}"#, "-nic", "user,tftp=/t"];
        assert_eq!(found(&json), ["the shared directory /s (SMB)"]);
    }
}
