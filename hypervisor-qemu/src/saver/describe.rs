//! The description of a domain, and the part of it that is recorded with a snapshot.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;

use camino::{Utf8Path, Utf8PathBuf};
use serde_json::{Value, json};
use snapcore::hypervisor::{DomainInfo, FIRMWARE_VARIABLES, Obstacle, SeenDisk, TPM_STATE};
use snapcore::{FileIdentity, Target, shell_command};

use super::disk::{FileView, QemuChain, QemuLayer, identity, target_name};
use super::state::StateFile;
use crate::{
    discover::{BlockDevice, Discovery, ImageOptions, Process, Role, shared_by},
    error::Result,
    graph::{self, Edge, Graph},
    machine::Machine,
    name::is_ours,
    server::Behind,
};

/// Name of the guest agent's port, which the agent in the guest looks for.
const AGENT_PORT: &str = "org.qemu.guest_agent.0";

/// Describes the machine of a QEMU. Changes nothing.
pub(super) async fn look(machine: &Machine) -> Result<DomainInfo> {
    let discovery = Discovery::read(machine).await?;
    let graph = machine.graph().await?;
    let view = FileView::of(machine);
    let state = StateFile::find(machine, &discovery, &view, &graph).await?;
    describe(machine, &discovery, &view, &graph, &state).await
}

pub(super) async fn describe(
    machine: &Machine,
    discovery: &Discovery,
    view: &FileView,
    graph: &Graph,
    state: &[StateFile],
) -> Result<DomainInfo> {
    let disks = disks(discovery, view, graph, state);
    let version = discovery.version.map(|(a, b, c)| format!("QEMU {a}.{b}.{c}, ")).unwrap_or_default();
    let summary = format!(
        "{version}{}, {} x {}, {} MiB, {} drives",
        discovery.machine,
        discovery.cpu.count,
        discovery.cpu.model,
        discovery.memory.base.saturating_add(discovery.memory.plugged) >> 20,
        disks.len(),
    );
    Ok(DomainInfo::new(record(discovery), discovery.state.running)
        .name(discovery.name.clone())
        .summary(summary)
        .memory_blockers(memory_blockers(machine).await?)
        .disks(disks)
        .agent(agent(machine, discovery, view).await?))
}

/// Returns the reason why no file has the name that QEMU opened an image by.
fn if_missing(target: &Target, path: &Utf8Path) -> Obstacle {
    // QEMU makes such a file for a drive with `snapshot=on`, and removes its name at once.
    if path.file_name().is_some_and(|name| name.starts_with("vl.") && name.len() == "vl.XXXXXX".len()) {
        let why = format!(
            "drive {target} of the running domain is a temporary one (snapshot=on): the guest writes to {path}, which has \
             no name any more and ends with QEMU"
        );
        return Obstacle::new(why, "start the domain without snapshot=on (-snapshot) for this drive");
    }
    Obstacle::new(
        format!("the running domain has {path} open as {target}, and there is no such file"),
        "start it with absolute paths: a QEMU that became a daemon has left the directory that its relative ones \
         began in; and look whether it runs in a file system of its own",
    )
}

/// Returns the reason and the advice where a name of an image of a drive leads to another file than the one
/// that QEMU, or our server, has open: the image was moved, or another put in its place. Whatever is done by
/// that name, and each reopening by QEMU itself, would be done with the wrong file, without an error.
///
/// A process that has no image open but those that the nodes name proves nothing: it may not be the QEMU.
fn replaced(
    open: &QemuChain,
    images: &HashMap<FileIdentity, PathBuf>,
    unnamed: &HashMap<FileIdentity, PathBuf>,
) -> Option<Obstacle> {
    if open.placeholder.is_some() {
        return None;
    }
    let moved = "is another file than the one that the running domain opened by that name, which was moved or replaced \
                 since";
    if open.server().is_some() {
        // The server reports what it has open; its files' names are looked up here.
        let is_other = |layer: &&QemuLayer| {
            layer.file.as_deref().and_then(identity).is_some_and(|named| layer.identity != Some(named))
        };
        let named = open.layers.iter().find(is_other)?.file.as_deref()?.display().to_string();
        let advice = "move the other file away and give the image that the server has open its name back";
        return Some(Obstacle::new(format!("{named} {moved}"), advice));
    }
    if unnamed.is_empty() {
        return None;
    }
    let is_other = |layer: &&QemuLayer| layer.identity.is_some_and(|file| !images.contains_key(&file));
    let named = open.layers.iter().find(is_other)?.file.as_deref()?.display().to_string();
    let mut now: Vec<String> = unnamed.values().map(|path| path.display().to_string()).collect();
    now.sort();
    let why = format!("{named} {moved}; it has open: {}", now.join(", "));
    let advice = match &now[..] {
        // The kernel says so behind the last name.
        [only] if only.ends_with(" (deleted)") => "copy the disk out of the running domain before it ends (QEMU's \
             `blockdev-mirror` or `blockdev-backup`), or shut it down and lose what it wrote since: no file has that name \
             any more"
            .to_owned(),
        [only] => format!(
            "move the other file away and give the image its name back: `{}`",
            shell_command(["mv", "-T", only.as_str(), named.as_str()])
        ),
        _ => "move the other file away and give the image its name back".to_owned(),
    };
    Some(Obstacle::new(why, advice))
}

fn disks(discovery: &Discovery, view: &FileView, graph: &Graph, state: &[StateFile]) -> Vec<SeenDisk> {
    let images = view.open_images().unwrap_or_default();
    let unnamed = view.unnamed(graph, images.clone());
    let mut taken = HashSet::new();
    let mut disks = Vec::new();
    for drive in &discovery.drives {
        let Some(root) = drive.root() else { continue };
        let open = QemuChain::read(graph, view, root);
        let name = target_name(&drive.target);
        let names = std::iter::once(name.clone()).chain((2..).map(|number| format!("{name}-{number}")));
        let free = names.take(discovery.drives.len() + 1).find(|name| taken.insert(name.clone()));
        let Some(Ok(target)) = free.map(Target::new) else { continue };
        let image = open.root();
        let file =
            image.and_then(|layer| layer.file.clone()).and_then(|file| Utf8PathBuf::from_path_buf(file).ok());
        let is_it = |found: &&StateFile| {
            drive.role == Role::Firmware && found.target.as_str() == target_name(&drive.target)
        };
        let flash = state.iter().find(is_it);
        let left_out = match flash {
            Some(_) => None,
            None => left_out(drive, || unfit(discovery, drive, &open, view, graph)),
        };
        // An image without a file name is shown by QEMU's name.
        let shown = || Utf8PathBuf::from(image.map(|layer| layer.node.file.as_str()).unwrap_or_default());
        // A device may use the file node itself: then the whole file is the disk.
        let format = match (&open.behind, image.map(|layer| layer.node.driver.as_str())) {
            _ if flash.is_some() => FIRMWARE_VARIABLES,
            (Some(Behind::Ours(_, info)), _) => info.format.as_str(),
            (_, Some("file" | "host_device")) => "raw",
            (_, Some(driver)) => driver,
            (_, None) => "",
        };
        let path = file.unwrap_or_else(shown);
        let missing = if_missing(&target, &path);
        disks.push(
            SeenDisk::new(target, path, format)
                .if_missing(Some(missing))
                .replaced(replaced(&open, &images, &unnamed))
                .left_out(left_out)
                .bytes(image.map(|layer| layer.node.virtual_size))
                .part(open.layers.iter().find_map(|layer| layer.node.head()))
                .guest_writes(drive.guest_writes())
                .no_internal(image.and_then(|layer| graph.internal_snapshot_blocker(&layer.node.name)).map(
                    |filter| {
                        format!(
                            "QEMU takes no internal snapshot through its {} filter {}",
                            filter.driver, filter.name
                        )
                    },
                )),
        );
    }
    for tpm in
        state.iter().filter(|found| found.format == TPM_STATE && taken.insert(found.target.to_string()))
    {
        disks.push(SeenDisk::new(tpm.target.clone(), tpm.path.clone(), tpm.format));
    }
    // Devices whose disk another process serves: QEMU's block layer has no node of it.
    for device in &discovery.devices {
        let Some(server) = served_elsewhere(&device.kind) else { continue };
        let name = target_name(device.path.rsplit('/').next().unwrap_or(&device.path));
        let Ok(target) = Target::new(name) else { continue };
        disks.push(
            SeenDisk::new(target, device.kind.as_str(), String::new())
                .left_out(Some(format!("its disk is served by {server}, not by QEMU")))
                .guest_writes(true),
        );
    }
    disks
}

/// Records which of the drives is the domain's disk `target`.
pub(super) fn is_member(
    disks: &mut [SeenDisk],
    discovery: &Discovery,
    view: &FileView,
    graph: &Graph,
    device: &BlockDevice,
    target: &Target,
) {
    // Drives are listed in the order of the discovery, without the empty ones.
    let place =
        discovery.drives.iter().filter(|drive| drive.root().is_some()).position(|drive| drive == device);
    if let Some(disk) = place.and_then(|place| disks.get_mut(place)) {
        disk.member = Some(target.clone());
        // The user counts it among the disks, whatever a scan would do with it.
        let open = device.root().map(|root| QemuChain::read(graph, view, root)).unwrap_or_default();
        disk.left_out = unfit(discovery, device, &open, view, graph);
    }
}

/// Returns the server of the disk of a device of this kind, if that is not QEMU's block layer.
fn served_elsewhere(kind: &str) -> Option<&'static str> {
    let kind = kind.strip_suffix("-device").unwrap_or(kind);
    let is = |name: &str| kind == name || kind.strip_prefix(name).is_some_and(|rest| rest.starts_with('-'));
    match () {
        () if is("vhost-user-blk") || is("vhost-user-scsi") => Some("a vhost-user process"),
        () if is("vhost-scsi") => Some("the host's kernel (vhost-scsi)"),
        () if is("vhost-vdpa") => Some("a vDPA device"),
        () => None,
    }
}

/// Returns the reasons why QEMU cannot save the machine's memory now: devices that cannot be migrated, and
/// any other blocker of a migration.
async fn memory_blockers(machine: &Machine) -> Result<Vec<String>> {
    let migration = machine.query("query-migrate", Value::Null).await?;
    let reasons = migration["blocked-reasons"].as_array().map(Vec::as_slice).unwrap_or_default();
    Ok(reasons.iter().filter_map(Value::as_str).map(explained).collect())
}

/// Adds to QEMU's reason what the user can do about it.
fn explained(reason: &str) -> String {
    match reason.contains("The vpc format") {
        true => format!(
            "{reason} (a VHD has memory images where `domsnap disk serve IMAGE,format=vhd --socket SOCKET` serves it)"
        ),
        false => reason.to_owned(),
    }
}

/// Returns the reason why a drive is not part of snapshots by default.
fn left_out(drive: &BlockDevice, unfit: impl FnOnce() -> Option<String>) -> Option<String> {
    let why = match drive.role {
        Role::Firmware => "it is firmware, or its variables",
        Role::Removable => "its medium is removable",
        Role::ReadOnlyDisk => "the guest can only read it",
        Role::Unused => "no device of the guest's uses it",
        Role::Disk => return unfit(),
    };
    Some(why.to_owned())
}

/// Records which of a machine's state files is the domain's disk `target`.
pub(super) fn is_state_member(disks: &mut [SeenDisk], found: &StateFile, target: &Target) {
    if let Some(disk) = disks.iter_mut().find(|disk| disk.target == found.target) {
        disk.member = Some(target.clone());
    }
}

/// Lists the guest's writable state that only a snapshot's memory holds: from a recorded machine, or else
/// from the command that starts it. `taken` are the formats of the disks that snapshots have.
pub(super) fn outside(machine: Option<&Discovery>, start: &[String], taken: &[&str]) -> Vec<String> {
    let taken = |wanted: &str| taken.iter().filter(|format| **format == wanted).count();
    let (flashes, tpms) = (taken(FIRMWARE_VARIABLES), taken(TPM_STATE));
    let mapped = match machine {
        Some(machine) => machine.mapped.clone(),
        None => shared_by(start).in_memory,
    };
    let (nvram, tpm) = match machine {
        Some(machine) => {
            let variables =
                machine.drives.iter().filter(|drive| drive.role == Role::Firmware && !drive.read_only);
            (variables.count() > flashes, machine.tpms.len() > tpms)
        }
        None => {
            let read_only = |word: &str| {
                word.split(',').any(|part| matches!(part, "readonly=on" | "readonly" | "read-only=on"))
            };
            let is_flash = |pair: &&[String]| match (pair[0].trim_start_matches('-'), &pair[1]) {
                ("pflash", _) => true,
                ("drive", drive) => drive.split(',').any(|part| part == "if=pflash") && !read_only(drive),
                _ => false,
            };
            let found = start.windows(2).filter(is_flash).count();
            let is_tpm = |word: &&String| word.trim_start_matches('-') == "tpmdev";
            (found > flashes, start.iter().filter(is_tpm).count() > tpms)
        }
    };
    let all = [(nvram, "firmware variables (NVRAM)"), (tpm, "TPM state")];
    all.iter().filter(|(there, _)| *there).map(|(_, what)| (*what).to_owned()).chain(mapped).collect()
}

/// Returns the reason why snapshots of a disk cannot be taken with its current chain.
fn unfit(
    discovery: &Discovery,
    drive: &BlockDevice,
    open: &QemuChain,
    view: &FileView,
    graph: &Graph,
) -> Option<String> {
    if open.placeholder.is_some() {
        return None;
    }
    // A recovery finishes or cancels our jobs before anything is done, and their filters go with them.
    let nodes = drive.root().map(|root| graph.all_below(root)).unwrap_or_default();
    let jobs =
        nodes.into_iter().flat_map(|node| graph.users(node)).filter(|edge| edge.parent_type == "block-job");
    let (ours, others): (Vec<&str>, Vec<&str>) =
        jobs.map(|edge| edge.parent.as_str()).partition(|job| job.starts_with("domsnap-"));
    if let Some(job) = others.first() {
        return Some(format!("block job {job} works on it: wait for the job, or cancel it"));
    }
    if let Some(filter) = open.filter.as_ref().filter(|_| ours.is_empty()) {
        return Some(match filter.as_str() {
            "mirror_top" | "commit_top" => {
                format!(
                    "a block job works on it (QEMU's filter {filter} is its top node): wait for the job, or end it"
                )
            }
            _ => format!("its top node is a {filter} filter, below which nothing can be put"),
        });
    }
    if let Some(filter) = open.inner_filter.as_ref().filter(|_| ours.is_empty()) {
        return Some(format!(
            "there is a {filter} filter below its active image, which would be lost where the images are opened again"
        ));
    }
    if let Some(why) = is_shared(open, graph) {
        return Some(why);
    }
    let same =
        discovery.drives.iter().filter(|other| other.guest_writes() && other.target != drive.target).find(
            |other| {
                let root = other.root().map(|root| QemuChain::read(graph, view, root)).unwrap_or_default();
                let image = root.root().and_then(|root| root.identity);
                image.is_some() && image == open.root().and_then(|root| root.identity)
            },
        );
    if let Some(other) = same {
        return Some(format!("the device {} writes the same image (share-rw)", target_name(&other.target)));
    }
    if let Some(device) = drive.passes_through(&discovery.devices) {
        return Some(format!("a {device} device hands the host's own device to the guest"));
    }
    match &open.behind {
        Some(Behind::Unknown { why, .. }) => return Some(why.clone()),
        Some(Behind::Ours(_, info)) if info.read_only => {
            return Some(match &info.snapshot {
                Some(snapshot) => format!("its server serves snapshot {snapshot}, which is only read"),
                None => "its server serves it read-only".to_owned(),
            });
        }
        Some(Behind::Ours(..)) | None => {}
    }
    // A backend may know the beginning of a file, and no other part.
    if open.layers.iter().any(|layer| layer.node.slice().is_some() && layer.node.head().is_none()) {
        return Some("its node is a slice of a file (offset or size)".to_owned());
    }
    let Some(root) = open.root().filter(|root| root.file.is_some()) else {
        return Some("its image is not a file with a name on this machine".to_owned());
    };
    let is_it = |file: &std::path::Path| root.identity.is_some() && view.identity(file) == root.identity;
    if drive.copies_on_read
        || ImageOptions::of(&discovery.process, is_it).is_some_and(|given| given.copy_on_read)
    {
        return Some(
            "it is open with copy-on-read=on: the guest's reads would be written to frozen images".to_owned(),
        );
    }
    None
}

/// Returns the reason why images cannot be exchanged below the filters of a drive, or at its top: other nodes
/// use them too.
fn is_shared(open: &QemuChain, graph: &Graph) -> Option<String> {
    let named = |user: &Edge| match user.parent.as_str() {
        "" => "an export of this QEMU".to_owned(),
        name => name.to_owned(),
    };
    let active = open.root()?.node.name.as_str();
    let filters = graph.filters_on(active);
    for filter in &filters {
        let (driver, name) = (&filter.driver, &filter.name);
        if let [_, other, ..] = graph.users(name).collect::<Vec<_>>()[..] {
            let other = named(other);
            return Some(format!("its {driver} filter {name} is used by {other} too: end that first"));
        }
        // Nodes that a backup reads.
        let targets = graph.edges().iter().filter(|edge| edge.parent == *name && edge.role == "target");
        for target in targets.map(|edge| &edge.child) {
            if let Some(reader) = graph.users(target).find(|user| user.parent != *name) {
                let reader = named(reader);
                return Some(format!(
                    "{reader} uses {target}, the target of its {driver} filter {name}: end the backup first"
                ));
            }
        }
    }
    let is_expected = |name: &str| match graph.node(name) {
        // A device.
        None => true,
        // Leftovers of a crash of ours are removed by `tidy`.
        Some(node) => {
            filters.iter().any(|filter| filter.name == name)
                || graph::is_job_filter(&node.driver)
                || is_ours(name)
        }
    };
    let other = graph.users(active).find(|user| !is_expected(&user.parent))?;
    Some(format!("the node {} uses its active image too: delete that node first", other.parent))
}

/// Makes the record of a machine, which is the same for every start of it.
///
/// It is a [`Discovery`] without its state, the images, the process's numbers, and arguments of one start
/// only: where its memory comes from, whether it waits, which descriptors it got.
pub(super) fn record(discovery: &Discovery) -> Value {
    let mut record = discovery.clone();
    record.process.pid = None;
    record.process.start_ticks = None;
    record.process.unread.clear();
    record.process.command_line = lasting(&record.process);
    record.process.environment.sort();
    for drive in &mut record.drives {
        drive.chain.clear();
    }
    let mut value = serde_json::to_value(&record).unwrap_or(Value::Null);
    if let Some(fields) = value.as_object_mut() {
        fields.remove("state");
    }
    for drive in value["drives"].as_array_mut().into_iter().flatten() {
        if let Some(fields) = drive.as_object_mut() {
            fields.remove("chain");
        }
    }
    if let Some(process) = value["process"].as_object_mut() {
        for name in ["pid", "start_ticks", "unread"] {
            process.remove(name);
        }
    }
    value
}

/// Returns the arguments of a command line that are not for one start only.
fn lasting(process: &Process) -> Vec<String> {
    let mut args = Vec::new();
    let mut skip = false;
    for (number, word) in process.command_line.iter().enumerate() {
        if std::mem::take(&mut skip) {
            continue;
        }
        let option = word.strip_prefix("--").or_else(|| word.strip_prefix('-')).filter(|_| number > 0);
        match option {
            Some("incoming") => skip = true,
            Some("S") => {}
            _ => args.push(without_descriptors(word)),
        }
    }
    args
}

/// Replacement for the number of a descriptor in a recorded command: such a command cannot be run again.
pub(super) const DESCRIPTOR: &str = "fd=?";

/// Replaces the numbers of descriptors in a word: each start gets others.
fn without_descriptors(word: &str) -> String {
    let part = |part: &str| -> String {
        let Some((name, value)) = part.split_once('=') else { return part.to_owned() };
        let is_number = !value.is_empty() && value.split(':').all(|one| one.parse::<u32>().is_ok());
        match name {
            "fd" | "fds" | "vhostfd" | "vhostfds" if is_number => DESCRIPTOR.to_owned(),
            _ => part.to_owned(),
        }
    };
    word.split(',').map(part).collect::<Vec<_>>().join(",")
}

/// Returns the socket of the guest agent's port, if other processes can connect to it.
async fn agent(machine: &Machine, discovery: &Discovery, view: &FileView) -> Result<Option<Utf8PathBuf>> {
    let ports = discovery.devices.iter().filter(|device| device.kind == "virtserialport");
    for port in ports {
        let get = |property: &'static str| {
            machine.query("qom-get", json!({ "path": port.path, "property": property }))
        };
        let (Ok(name), Ok(chardev)) = (get("name").await, get("chardev").await) else { continue };
        if name.as_str() != Some(AGENT_PORT) {
            continue;
        }
        let devices = machine.query("query-chardev", Value::Null).await?;
        let device = devices.as_array().into_iter().flatten().find(|device| device["label"] == chardev);
        let file = device.and_then(|device| device["filename"].as_str()).unwrap_or_default();
        let file = file.strip_prefix("disconnected:").unwrap_or(file);
        if file.starts_with("tcp:") {
            // The form is `tcp:127.0.0.1:5000,server=on`, followed by the connected client; an IPv6 address
            // is in brackets.
            let place = file.split([',', ' ']).next().unwrap_or(file);
            let reached = place.starts_with("tcp:127.") || place.starts_with("tcp:[::1]:");
            if reached && file.contains("server=on") {
                return Ok(Some(place.into()));
            }
        }
        let socket = file
            .strip_prefix("unix:")
            .and_then(|file| file.strip_suffix(",server=on").or_else(|| file.split(',').next()));
        if let Some(socket) = socket.filter(|socket| !socket.is_empty()) {
            return Ok(Utf8PathBuf::from_path_buf(view.absolute(socket)).ok());
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(args: &[&str]) -> Process {
        Process { command_line: args.iter().map(|word| (*word).to_owned()).collect(), ..Process::default() }
    }

    /// Firmware variables and a TPM are found in the command that starts a machine.
    #[test]
    fn outside_state_is_found_in_the_start_command() {
        let to_engine = |args: &[&str]| {
            let args: Vec<String> = args.iter().map(|word| (*word).to_owned()).collect();
            outside(None, &args, &[])
        };
        assert_eq!(to_engine(&["qemu", "-drive", "if=pflash,file=code,readonly=on"]), Vec::<String>::new());
        let all = ["-drive", "if=pflash,file=vars", "-tpmdev", "emulator,id=t", "-drive", "if=virtio,file=x"];
        assert_eq!(to_engine(&all), ["firmware variables (NVRAM)", "TPM state"]);
        assert!(to_engine(&["qemu", "-m", "1G"]).is_empty());
    }

    /// A file that QEMU made for `snapshot=on` is distinguished from one with another name here.
    #[test]
    fn missing_images_are_explained() {
        let explained = |path: &str| if_missing(&Target::new("vda").unwrap(), Utf8Path::new(path));
        let temporary = explained("/var/tmp/vl.a1B2c3");
        assert!(
            temporary.why.contains("/var/tmp/vl.a1B2c3") && temporary.advice.contains("without snapshot=on")
        );
        let relative = explained("/root.qcow2");
        assert!(relative.why.contains("no such file") && relative.advice.contains("absolute paths"));
    }

    /// Arguments of one start only are not recorded.
    #[test]
    fn arguments_of_one_start_are_not_recorded() {
        let args = ["qemu", "-S", "-m", "128", "-incoming", "file:/m,offset=16777216", "--incoming", "defer"];
        let rest = ["-netdev", "tap,id=n,fd=21,vhostfd=22,fds=3:4", "-daemonize", "-name", "fd=x"];
        let all: Vec<&str> = args.into_iter().chain(rest).collect();
        let expected =
            ["qemu", "-m", "128", "-netdev", "tap,id=n,fd=?,fd=?,fd=?", "-daemonize", "-name", "fd=x"];
        assert_eq!(lasting(&process(&all)), expected);
    }
}
