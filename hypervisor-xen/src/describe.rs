//! The description of a domain, and the server of each of its disks.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};
use snapcore::hypervisor::{DomainInfo, Obstacle, SeenDisk};
use snapcore::{Domain, Target, file_identity};

use crate::list::Row;

/// The server of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Server {
    /// A QEMU.
    Qdisk,
    /// dom0's kernel, from a block device.
    Device,
    /// dom0's kernel, from a plain file over a loop device.
    Loop,
    /// Another process or another domain, which cannot be queried.
    Other,
}

/// A disk as libxl has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct XenDisk {
    pub(crate) target: Target,
    pub(crate) path: Utf8PathBuf,
    pub(crate) format: String,
    pub(crate) writable: bool,
    pub(crate) removable: bool,
    pub(crate) server: Server,
    /// The reason why snapshots of it cannot be taken while the domain runs.
    pub(crate) unfit: Option<String>,
}

/// Advice for a plain file over a loop device.
pub(crate) const MAKE_QDISK: &str = "let QEMU serve it: set backendtype=qdisk for this disk in the domain's config, and restart the \
                                     domain; QEMU always serves a qcow2 image";

impl XenDisk {
    /// Returns true if it is this file, by whatever name.
    pub(crate) fn is_file(&self, path: &Utf8Path) -> bool {
        let identity = |path: &Utf8Path| fs::metadata(path).ok().map(|about| file_identity(&about));
        self.path == path || identity(&self.path).is_some_and(|own| identity(path) == Some(own))
    }
}

/// Returns the disks of a configuration.
pub(crate) fn disks(config: &Value) -> Vec<XenDisk> {
    let listed = config["disks"].as_array().into_iter().flatten();
    listed.filter_map(disk).collect()
}

fn disk(disk: &Value) -> Option<XenDisk> {
    let vdev = disk["vdev"].as_str()?;
    let target = Target::new(vdev).ok()?;
    let path = Utf8PathBuf::from(disk["pdev_path"].as_str().unwrap_or_default());
    let format = disk["format"].as_str().unwrap_or("raw").to_owned();
    let is_device = fs::metadata(&path).is_ok_and(|about| about.file_type().is_block_device());
    let elsewhere = served_elsewhere(disk);
    let server = match (disk["backend"].as_str(), format.as_str(), is_device) {
        _ if elsewhere.is_some() => Server::Other,
        (Some("qdisk"), ..) => Server::Qdisk,
        (_, "raw", true) => Server::Device,
        (_, "raw", false) => Server::Loop,
        _ => Server::Qdisk,
    };
    let unfit = elsewhere.map(|who| format!("{who}; {MAKE_QDISK}")).or_else(|| {
        let of_kernel = "dom0's kernel serves this plain file, over a loop device";
        (server == Server::Loop).then(|| format!("{of_kernel}; {MAKE_QDISK}"))
    });
    let (writable, removable) = (yes(disk, "readwrite"), yes(disk, "removable") || yes(disk, "is_cdrom"));
    Some(XenDisk { target, path, format, writable, removable, server, unfit })
}

/// Returns the server of a disk that neither dom0's kernel nor the domain's QEMU serves from the path in the
/// configuration.
fn served_elsewhere(disk: &Value) -> Option<String> {
    let named = |field: &str| disk[field].as_str().filter(|text| !text.is_empty());
    if let Some(domain) = named("backend_domname") {
        return (domain != "0" && domain != "Domain-0").then(|| format!("driver domain {domain} serves it"));
    }
    if let Some(domid) = disk["backend_domid"].as_u64().filter(|domid| *domid != 0) {
        return Some(format!("driver domain {domid} serves it"));
    }
    if let Some(script) =
        named("script").filter(|script| Path::new(script).file_name() != Some("block".as_ref()))
    {
        return Some(format!("the script {script} sets it up"));
    }
    match named("backend") {
        Some(backend @ ("tap" | "standalone")) => Some(format!("a backend of its own ({backend}) serves it")),
        _ => None,
    }
}

/// Returns true if a field is set: libxl writes numbers, booleans, and names for fields that may be left to a
/// default.
fn yes(of: &Value, field: &str) -> bool {
    match &of[field] {
        Value::Bool(yes) => *yes,
        Value::Number(number) => number.as_i64() != Some(0),
        Value::String(text) => text == "True",
        _ => false,
    }
}

/// Describes a running domain.
pub(crate) fn seen(row: &Row, config: &Value) -> DomainInfo {
    let drives = disks(config);
    let build = &config["b_info"];
    let memory = build["target_memkb"].as_u64().or_else(|| build["max_memkb"].as_u64()).unwrap_or_default();
    let kind = config["c_info"]["type"].as_str().unwrap_or("?");
    let cpus = build["max_vcpus"].as_u64().unwrap_or(1);
    let summary = format!("Xen {kind}, {cpus} processors, {} MiB, {} drives", memory >> 10, drives.len());
    let disks = drives.iter().map(seen_disk).chain(other_storage(config)).collect();
    DomainInfo::new(record(config), !row.flags.paused)
        .name(Some(row.name.clone()))
        .summary(summary)
        .disks(disks)
        .config(config_file(&row.name))
}

fn seen_disk(disk: &XenDisk) -> SeenDisk {
    let left_out = match (disk.removable, disk.writable) {
        (true, _) => Some("its medium is removable".to_owned()),
        (_, false) => Some("the guest can only read it".to_owned()),
        (false, true) => disk.unfit.clone(),
    };
    SeenDisk::new(disk.target.clone(), disk.path.as_path(), disk.format.clone())
        .left_out(left_out)
        .guest_writes(disk.writable)
}

/// Records which of the drives are the domain's disks, and which disk has another file in its place.
pub(crate) fn note_members(seen: &mut DomainInfo, drives: &[XenDisk], domain: &Domain) {
    for disk in &mut seen.disks {
        let Some(record) = domain.disk(&disk.target) else { continue };
        let registered = record.disk.path();
        let drive = drives.iter().find(|drive| drive.target == disk.target);
        match drive {
            // Another drive was attached under the name of a detached one: the guest does not write the
            // registered file.
            Some(drive) if !drive.is_file(registered) => {
                disk.left_out = Some(format!(
                    "{registered} is registered as disk {}, and is not what the guest has there: attach that again, or register the \
                     domain again",
                    disk.target
                ));
            }
            // The user counts it among the disks, whatever a scan would do with it.
            Some(drive) => {
                disk.member = Some(disk.target.clone());
                disk.left_out = drive.unfit.clone();
            }
            // A detached section of ours has destroyed the domain: only its previous disks are known.
            None => disk.member = Some(disk.target.clone()),
        }
    }
}

/// Records which images the domain has open under a name that leads to another one by now: those of its QEMU,
/// as that reports them, and the block devices that dom0's kernel serves, by their numbers.
pub(crate) fn note_replaced(
    seen: &mut DomainInfo,
    drives: &[XenDisk],
    qemu: Option<&DomainInfo>,
    served: &HashSet<u64>,
) {
    for disk in &mut seen.disks {
        let of_qemu = qemu.and_then(|qemu| qemu.disks.iter().find(|drive| drive.address == disk.address));
        disk.replaced = of_qemu.and_then(|drive| drive.replaced.clone());
        let path = disk.address.path();
        let is_served = drives.iter().any(|drive| drive.server == Server::Device && drive.path == path);
        let device = fs::metadata(path).ok().filter(|about| about.file_type().is_block_device());
        let Some(number) = device.map(|about| about.rdev()).filter(|_| is_served && !served.is_empty())
        else {
            continue;
        };
        if !served.contains(&number) {
            let why = format!(
                "{path} is another device than the one that the running domain has as {}: that was renamed or \
                 replaced since",
                disk.target
            );
            let advice = "give the volume that the domain has (`xl block-list`, `dmsetup info`) its name back, or shut \
                          the domain down first";
            disk.replaced = Some(Obstacle::new(why, advice));
        }
    }
}

/// Makes the record of a machine: the configuration, without the parts that each start changes.
fn record(config: &Value) -> Value {
    let mut config = config.clone();
    redact(&mut config);
    if let Some(identity) = config["c_info"].as_object_mut() {
        identity.remove("domid");
        identity.remove("uuid");
    }
    json!({ "xen": config })
}

/// Removes passwords (of VNC, of SPICE) from a configuration: a record is stored, and shown.
fn redact(value: &mut Value) {
    match value {
        Value::Object(fields) => {
            fields.retain(|name, _| !name.contains("passw"));
            fields.values_mut().for_each(redact);
        }
        Value::Array(values) => values.iter_mut().for_each(redact),
        _ => {}
    }
}

/// Lists storage that the guest can write and that is not a disk for snapshots.
fn other_storage(config: &Value) -> Vec<SeenDisk> {
    let listed = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let mut found = Vec::new();
    let mut add = |name: String, path: &str, why: &str| {
        let Ok(target) = Target::new(name) else { return };
        found.push(
            SeenDisk::new(target, path, String::new()).left_out(Some(why.to_owned())).guest_writes(true),
        );
    };
    for (number, entry) in listed(&config["disks"]).iter().enumerate() {
        if disk(entry).is_none() && yes(entry, "readwrite") {
            let path = entry["pdev_path"].as_str().unwrap_or("no path");
            add(format!("disk-{number}"), path, "its device has no name that can be a disk's");
        }
    }
    for number in 0..listed(&config["vscsictrls"]).len() {
        add(format!("vscsi-{number}"), "vscsi", "it is a SCSI device of the host");
    }
    let hvm = &config["b_info"]["type.hvm"];
    let mut emulated = listed(&hvm["usbdevice_list"]);
    emulated.push(hvm["usbdevice"].clone());
    let emulated = emulated.iter().filter_map(|device| device.as_str()?.strip_prefix("disk:"));
    for (number, device) in emulated.enumerate() {
        add(format!("usb-{number}"), device, "it is an emulated USB stick");
    }
    found
}

/// Returns true if two configurations have the same disks and other storage.
pub(crate) fn is_same_storage(one: &Value, other: &Value) -> bool {
    disks(one) == disks(other) && other_storage(one) == other_storage(other)
}

/// Lists drives of the domain's QEMU that libxl does not know: given by `device_model_args`, or hot-plugged
/// over its monitor.
pub(crate) fn unknown_to_libxl(qemu: &DomainInfo, drives: &[XenDisk]) -> Vec<SeenDisk> {
    let is_known = |disk: &SeenDisk| drives.iter().any(|drive| drive.is_file(disk.address.path()));
    let hidden =
        qemu.disks.iter().filter(|disk| disk.guest_writes && disk.member.is_none() && !is_known(disk));
    hidden
        .map(|disk| {
            let why = "libxl does not know it: it was added to QEMU directly";
            disk.clone().left_out(Some(why.to_owned()))
        })
        .collect()
}

/// Returns the reason why Xen cannot save the memory of such a domain, if there is one.
pub(crate) fn cannot_save(config: &Value) -> Option<Obstacle> {
    let obstacle = |why: &str, advice: &str| Obstacle::new(why, advice);
    if config["pcidevs"].as_array().is_some_and(|devices| !devices.is_empty()) {
        return Some(obstacle(
            "the domain has a PCI device of the host, whose state cannot be saved",
            "detach the device (`xl pci-detach`)",
        ));
    }
    yes(&config["b_info"], "disable_migrate").then(|| {
        obstacle(
            "the domain's config has nomigrate=1, which forbids saving it",
            "create the domain without nomigrate",
        )
    })
}

/// Lists the differences between a recorded machine and the domain's current disks: its memory refers to the
/// recorded ones.
pub(crate) fn differences(recorded: &Value, now: &Value) -> Vec<String> {
    let (recorded, now) = (disks(&recorded["xen"]), disks(&now["xen"]));
    let mut differ = Vec::new();
    for disk in recorded.iter().filter(|disk| disk.writable) {
        match now.iter().find(|other| other.target == disk.target) {
            None => differ.push(format!("it had disk {} ({})", disk.target, disk.path)),
            Some(other) if other.path != disk.path => {
                differ.push(format!("disk {} was {}, and is {}", disk.target, disk.path, other.path));
            }
            Some(_) => {}
        }
    }
    differ
}

/// Finds the file from which a domain was created: that of the `xl create` that waits for its end, or the one
/// in the usual directory.
fn config_file(name: &str) -> Option<Utf8PathBuf> {
    let names_it = |path: &Utf8Path| {
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().any(|line| {
            let Some((key, value)) = line.split_once('=') else { return false };
            key.trim() == "name" && value.trim().trim_matches(['"', '\'']) == name
        })
    };
    let usual = Utf8PathBuf::from(format!("/etc/xen/{name}.cfg"));
    waiting_creates().into_iter().chain([usual]).find(|path| names_it(path))
}

/// Returns the config files of all `xl create` processes that wait.
fn waiting_creates() -> Vec<Utf8PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let args: Vec<String> =
            line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
        let is_xl =
            args.first().is_some_and(|word| Path::new(word).file_name().is_some_and(|name| name == "xl"));
        if !is_xl || args.get(1).is_none_or(|word| word != "create") {
            continue;
        }
        let file = args
            .iter()
            .skip(2)
            .find(|word| !word.is_empty() && !word.starts_with('-') && !word.contains('='));
        let Some(file) = file else { continue };
        // The process has left the directory in which it was started.
        if file.starts_with('/') {
            found.push(Utf8PathBuf::from(file));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Value {
        json!({
            "c_info": { "type": "pv", "name": "web", "domid": 7, "uuid": "u" },
            "b_info": { "max_vcpus": 2, "target_memkb": 131072 },
            "disks": [
                { "pdev_path": "/nowhere/a.qcow2", "vdev": "xvda", "format": "qcow2", "readwrite": 1 },
                { "pdev_path": "/nowhere/b.raw", "vdev": "xvdb", "format": "raw", "readwrite": 1 },
                { "pdev_path": "/nowhere/c.raw", "vdev": "xvdc", "format": "raw", "backend": "qdisk", "readwrite": 1 },
                { "pdev_path": "/nowhere/cd.iso", "vdev": "xvdd", "format": "raw", "readwrite": 0, "is_cdrom": 1 }
            ]
        })
    }

    /// The server of a disk is the one that libxl reports; plain files of dom0's kernel are left out with a
    /// reason.
    #[test]
    fn disk_server_is_what_libxl_reports() {
        let servers: Vec<Server> = disks(&config()).iter().map(|disk| disk.server).collect();
        assert_eq!(servers, [Server::Qdisk, Server::Loop, Server::Qdisk, Server::Loop]);
        let row = Row {
            name: "web".to_owned(),
            domid: 7,
            flags: crate::list::Flags { paused: true, shut: false, crashed: false, dying: false },
            has_run: true,
        };
        let seen = seen(&row, &config());
        let left_out: Vec<Option<&str>> = seen.disks.iter().map(|disk| disk.left_out.as_deref()).collect();
        assert!(left_out[0].is_none() && left_out[2].is_none());
        assert!(left_out[1].unwrap().contains("backendtype=qdisk"), "{left_out:?}");
        assert_eq!(left_out[3], Some("its medium is removable"));
        assert!(!seen.running);
        assert_eq!(seen.summary, "Xen pv, 2 processors, 128 MiB, 4 drives");
    }

    /// A domain that cannot be saved is recognised, and passwords are not recorded.
    #[test]
    fn unsavable_domains_are_recognised() {
        let mut config = config();
        assert!(cannot_save(&config).is_none() && other_storage(&config).is_empty());
        config["b_info"]["disable_migrate"] = json!("True");
        assert!(cannot_save(&config).unwrap().why.contains("nomigrate=1"));
        config["pcidevs"] = json!([{ "bus": 1 }]);
        assert!(cannot_save(&config).unwrap().why.contains("PCI"));
        config["vscsictrls"] = json!([{ "devid": 0 }]);
        config["disks"][1]["vdev"] = json!(null);
        config["b_info"]["type.hvm"]["usbdevice_list"] = json!(["tablet", "disk:/nowhere/stick.img"]);
        let others: Vec<String> =
            other_storage(&config).iter().map(|disk| format!("{} {}", disk.target, disk.address)).collect();
        assert_eq!(others, ["disk-1 /nowhere/b.raw", "vscsi-0 vscsi", "usb-0 /nowhere/stick.img"]);
        config["vfbs"] = json!([{ "vnc": { "passwd": "s3cret", "listen": "::1" } }]);
        let record = record(&config).to_string();
        assert!(!record.contains("s3cret") && record.contains("::1"), "{record}");
    }

    /// The record is the same after another start, and a moved disk is a difference.
    #[test]
    fn record_survives_a_restart() {
        let mut later = config();
        later["c_info"]["domid"] = json!(9);
        later["c_info"]["uuid"] = json!("v");
        assert_eq!(record(&config()), record(&later));
        later["disks"][0]["pdev_path"] = json!("/nowhere/z.qcow2");
        let said = differences(&record(&config()), &record(&later));
        assert_eq!(said, ["disk xvda was /nowhere/a.qcow2, and is /nowhere/z.qcow2"]);
    }
}
