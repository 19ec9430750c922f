//! The guest's devices, and its drives with their chains of nodes.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Process, optional_property};
use crate::{
    error::Result,
    graph::{Graph, Node},
    machine::Machine,
};

/// A device of the guest, from the command line or hot-plugged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Device {
    /// Its path in QOM, with its id where it has one.
    pub path: String,
    /// `virtio-blk-pci`, ...
    pub kind: String,
    /// Its address on its bus, if it reports one.
    pub address: Option<String>,
}

/// Role of a drive in the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Role {
    /// A disk that the guest writes.
    Disk,
    /// A disk that the guest can only read: a cloud-init image, ...
    ReadOnlyDisk,
    /// A drive with a removable medium; it may be empty.
    Removable,
    /// Firmware and its variables (pflash).
    Firmware,
    /// A drive that no device of the guest uses.
    Unused,
}

/// One drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct BlockDevice {
    /// Its name: the device's id, the drive's name, or the path in QOM; the first that exists.
    pub target: String,
    /// All its names.
    pub names: Vec<String>,
    /// Its role in the guest.
    pub role: Role,
    /// True if its medium is removable.
    pub removable: bool,
    /// True if the guest cannot write it.
    pub read_only: bool,
    /// File name of a removable drive's medium; empty in an empty drive. `None` if it was not recorded.
    #[serde(default)]
    pub medium: Option<String>,
    /// Format as which the medium is opened. `None` in an empty drive, and if it was not recorded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub medium_format: Option<String>,
    /// The layers, active image first; empty in an empty drive. Each is a node; the node of its file is below
    /// it. A snapshot does not record them.
    #[serde(default)]
    pub chain: Vec<ChainLayer>,
    /// True if data read from below is written to the image (`copy-on-read=on`), as far as QEMU
    /// reports it. A snapshot does not record it.
    #[serde(skip)]
    pub copies_on_read: bool,
}

/// One layer of a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct ChainLayer {
    /// The node.
    pub node: Node,
    /// The node of the file below it. `None` if the node is the file itself.
    pub file: Option<Node>,
}

impl BlockDevice {
    /// Returns true if the guest can change its content. Firmware variables are not meant.
    pub fn guest_writes(&self) -> bool {
        match self.role {
            Role::Disk => true,
            Role::Removable => !self.chain.is_empty() && !self.read_only,
            Role::ReadOnlyDisk | Role::Firmware | Role::Unused => false,
        }
    }

    /// Returns the kind of its device, if that passes the guest's commands to a device of the host, past the
    /// block layer.
    pub(crate) fn passes_through<'a>(&self, devices: &'a [Device]) -> Option<&'a str> {
        let device = devices.iter().find(|device| self.names.contains(&device.path))?;
        matches!(device.kind.as_str(), "scsi-block" | "scsi-generic").then_some(device.kind.as_str())
    }

    /// Returns the active image's node; `None` in an empty drive.
    pub fn root(&self) -> Option<&str> {
        self.chain.first().map(|layer| layer.node.name.as_str())
    }
}

pub(super) async fn devices(machine: &Machine) -> Result<Vec<Device>> {
    let mut devices = Vec::new();
    for container in ["/machine/peripheral", "/machine/peripheral-anon"] {
        let listed = match machine.query("qom-list", json!({ "path": container })).await {
            Err(error) if error.is_lost() => return Err(error),
            other => other.unwrap_or(Value::Null),
        };
        for entry in listed.as_array().into_iter().flatten() {
            let (Some(name), Some(kind)) = (entry["name"].as_str(), entry["type"].as_str()) else { continue };
            let Some(kind) = kind.strip_prefix("child<").and_then(|kind| kind.strip_suffix('>')) else {
                continue;
            };
            let path = format!("{container}/{name}");
            let address = match optional_property(machine, &path, "addr").await? {
                Value::String(address) => Some(address),
                Value::Number(address) => Some(address.to_string()),
                _ => None,
            };
            devices.push(Device { path, kind: kind.to_owned(), address });
        }
    }
    devices.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(devices)
}

pub(super) fn drives(graph: &Graph) -> Vec<BlockDevice> {
    let drives = graph.drives().iter();
    drives.filter_map(|drive| block_device(graph, drive)).collect()
}

fn block_device(graph: &Graph, drive: &Value) -> Option<BlockDevice> {
    let names = crate::graph::device_names(drive);
    let qdev = drive["qdev"].as_str();
    let id = qdev.and_then(crate::graph::device_id);
    let target = id.map(str::to_owned).or_else(|| names.first().cloned())?;
    let inserted = drive.get("inserted").filter(|inserted| !inserted.is_null());
    let removable = drive["removable"].as_bool().unwrap_or(false);
    let read_only = inserted.is_some_and(|inserted| inserted["ro"].as_bool().unwrap_or(false));
    let role = if qdev.is_some_and(|qdev| qdev.contains(".flash"))
        || drive["device"].as_str().is_some_and(|device| device.starts_with("pflash"))
    {
        Role::Firmware
    } else if removable {
        Role::Removable
    } else if qdev.is_none() {
        Role::Unused
    } else if read_only {
        Role::ReadOnlyDisk
    } else {
        Role::Disk
    };
    let chain = match inserted.and_then(|inserted| inserted["node-name"].as_str()) {
        Some(root) => graph.chain(root),
        None => Vec::new(),
    };
    let layer = |node: &Node| ChainLayer {
        node: node.clone(),
        file: graph.file(&node.name).and_then(|file| graph.node(file)).cloned(),
    };
    let file = chain.first().map(|node| node.file.clone()).unwrap_or_default();
    let medium_format =
        (role == Role::Removable).then(|| chain.first().map(|node| node.driver.clone())).flatten();
    let medium = (role == Role::Removable).then_some(file);
    Some(BlockDevice {
        target,
        names,
        role,
        removable,
        read_only,
        medium,
        medium_format,
        chain: chain.into_iter().map(layer).collect(),
        copies_on_read: false,
    })
}

/// Finds the drives that copy on read.
///
/// No query reports `copy-on-read=on` of `-drive` and of the human monitor's `drive_add`. But QEMU refuses to
/// make the node of such a drive read-only, with a message about copy-on-read, before it checks anything
/// else. So the request is sent together with an option that can never be changed: the command always fails,
/// and changes nothing.
pub(super) async fn ask_for_copies_on_read(
    machine: &Machine,
    graph: &Graph,
    process: &Process,
    drives: &mut [BlockDevice],
) -> Result<()> {
    for drive in drives.iter_mut().filter(|drive| drive.role == Role::Disk) {
        // Only a legacy drive can have it, not a node of `-blockdev`. Drives on the command line are read
        // from there.
        let legacy = graph.drives().iter().find_map(|listed| {
            let name = listed["device"].as_str().filter(|name| !name.is_empty())?;
            drive.names.iter().any(|known| known == name).then_some(name)
        });
        let Some(name) = legacy.filter(|name| !is_on_command_line(process, name)) else { continue };
        let top = graph.drives().iter().find(|listed| listed["device"].as_str() == Some(name));
        let Some(top) = top.and_then(|top| top["inserted"]["node-name"].as_str()) else { continue };
        let (Some(node), Some(file)) = (graph.node(top), graph.file(top)) else { continue };
        if !matches!(node.driver.as_str(), "qcow2" | "raw" | "vpc") {
            continue;
        }
        let mut options = json!({ "driver": node.driver, "node-name": top, "file": file,
            "read-only": true, "force-share": true });
        if node.driver == "qcow2" {
            options["backing"] = json!(graph.backing(top));
        }
        let asked = json!({ "options": [options] });
        match machine.run("asking for copy-on-read", name, "blockdev-reopen", asked).await {
            Err(error) if error.is_lost() => return Err(error),
            Err(error) => drive.copies_on_read = error.detail().contains("copy-on-read"),
            Ok(_) => {}
        }
    }
    Ok(())
}

/// Returns true if a drive of this name is on QEMU's command line.
fn is_on_command_line(process: &Process, name: &str) -> bool {
    let id = format!("id={name}");
    process.command_line.iter().any(|word| word.split(',').any(|part| part == id))
}
