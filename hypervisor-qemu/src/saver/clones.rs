//! Clones with memory: their machines, their memory images, and their start.
//!
//! **Files.** A clone's memory image is a further name of the snapshot's (a hard link; a copy on another file
//! system). Where the memory is shared, there are two files beside it, [`Split`]: `IMAGE.ram` and
//! `IMAGE.devices`, made once beside the snapshot's image, of which each clone has further names too. Nothing
//! ever changes one of these files. Who does not need a file any more takes the own name away, so that a
//! snapshot, a clone and a clone of a clone need nothing of each other, and the last name frees the space. A
//! QEMU that has the RAM mapped needs no name.
//!
//! **What is durable before what.** 1) The two files, each under a temporary name, then their names, the
//! devices' last: with the devices there is the RAM. 2) The names of each clone, in its unpublished
//! directory: the devices' after the RAM's. 3) The flush of that directory. A crash leaves names that the
//! undo removes, and the files beside the snapshot's image, complete or begun again by the next clone.

use std::{
    fs,
    io::{self, ErrorKind as Io},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::Directory;
use qmp::Agent;
use serde_json::{Value, json};
use snapcore::backend::DeleteCost;
use snapcore::hypervisor::{
    CloneMachines, CloneNetwork, ClonedMachines, Control, MachinePlace, MemoryDirectory, StartClone,
    StartedDomain, StepOutcome,
};
use snapcore::{DiskAddress, Error, ErrorKind, Result, shown_size};
use tokio::time::sleep;

use super::{
    cut::MemoryMetadata,
    describe::DESCRIPTOR,
    error::{blocking, to_engine},
    fresh,
    live::set_clock,
    media::put_back,
    recorded,
    start::{Surroundings, plugged_since},
    unpacked::Unpacked,
};
use crate::{
    clone::{self, Identity, Source},
    discover::{Discovery, media},
    gdb::monitor,
    guest_exec,
    machine::Machine,
    memory::{Image, Stored},
    stream::{Mapping, Split},
};

/// Bytes of the longest path of a socket, without its end.
const LONGEST_SOCKET: usize = 107;

/// The block of memory that is shared: that of x86 machines.
const BLOCK: &str = "pc.ram";

/// Time limit of the script that a guest runs.
const HOOK: Duration = Duration::from_secs(300);

/// Time limit of the guest agent's first answer after the start.
const AGENT: Duration = Duration::from_secs(30);

/// Time limit of a device's removal, which the guest has to agree to.
const UNPLUG: Duration = Duration::from_secs(30);

/// Time between two looks.
const LOOK: Duration = Duration::from_millis(50);

fn refused(what: impl Into<String>) -> Error {
    let error = Error::new(ErrorKind::Refused, what.into()).state("no changes made");
    error.advise("clone the disks alone, with --disk-only")
}

/// The machines of clones. Nothing is changed.
pub(super) async fn plan(ask: CloneMachines<'_>) -> Result<ClonedMachines> {
    let machine = recorded(ask.machine)?;
    let process = &machine.process;
    let Some((_, arguments)) = process.command_line.split_first() else {
        return Err(refused("the command that started the machine of the snapshot is not recorded"));
    };
    let own = rustix::process::geteuid().as_raw();
    if let Some(uid) = process.uid.filter(|uid| *uid != own) {
        return Err(refused(format!(
            "the machine ran as the user {uid}, and a clone would run as {own}, which may not be meant to have its rights"
        )));
    }
    if arguments.iter().any(|word| word.split(',').any(|part| part == DESCRIPTOR)) {
        return Err(refused("the machine's command names descriptors, which only its supervisor can open"));
    }
    let missing = plugged_since(&machine, arguments);
    if !missing.is_empty() {
        return Err(refused(format!(
            "devices that were plugged in after the start of the machine are not in its command, and its memory needs them: {}",
            missing.join(", ")
        )));
    }
    if machine.memory.plugged > 0 {
        return Err(refused("memory was plugged into the machine, and its command does not have it"));
    }
    let image = ask.image.require_path()?.to_owned();
    let mut answer = ClonedMachines::default();
    let keeps = keeps_to_itself(&machine);
    if let Some(why) = &keeps {
        answer
            .notes
            .push(format!("the clones do not share memory: {why}; each reads all of it when it starts"));
    }
    answer.shares = keeps.is_none();
    let (mut links, mut has_id) = (0, true);
    for place in ask.clones {
        let (control, record) = machine_of(&ask, &machine, place)?;
        let networks = networks(&control.start);
        if ask.network == CloneNetwork::Swap {
            networks.iter().try_for_each(Network::require_swappable)?;
        }
        links = networks.len();
        has_id = fresh::generation_id(&mut control.start.clone());
        if ask.hook && control.agent.is_none() {
            return Err(refused("no guest agent is known that could run the script in the guest").advise(
                "register the domain with its agent's socket (--agent), and take a snapshot; or clone without --run",
            ));
        }
        answer.controls.push(control);
        answer.records.push(record);
    }
    if !has_id {
        answer.notes.push(
            "the machine has no generation ID (`-device vmgenid`), so the clones may give out the same random numbers: reseed \
             each of them (--run)"
                .to_owned(),
        );
    }
    if links > 0 && ask.network == CloneNetwork::Same {
        answer.notes.push("the links of the clones are up, and all have the snapshot's addresses".to_owned());
    }
    let above = ask.clones.first().and_then(|place| place.directory.parent()).map(Utf8Path::to_owned);
    let shares = answer.shares;
    answer.bytes = blocking_engine(move || bytes_to_write(&image, above.as_deref(), shares)).await?;
    Ok(answer)
}

/// The reason why a machine's memory is not shared.
fn keeps_to_itself(machine: &Discovery) -> Option<String> {
    if !machine.abilities.read_only_ram {
        return Some("its QEMU maps no memory read-only (before 8.2)".to_owned());
    }
    if !machine.machine.starts_with("pc-") {
        return Some(format!(
            "the machine type {} is not known to have its memory in one block",
            machine.machine
        ));
    }
    let locks =
        machine.process.command_line.windows(2).any(|pair| {
            pair[0].ends_with("-overcommit") && pair[1].split(',').any(|part| part == "mem-lock=on")
        });
    locks.then(|| "it locks its memory (mem-lock=on)".to_owned())
}

/// The machine of one clone.
fn machine_of(
    ask: &CloneMachines<'_>,
    machine: &Discovery,
    place: &MachinePlace,
) -> Result<(Control, Value)> {
    let mut arguments = machine.process.command_line.clone();
    if let (Some(program), Some(first)) = (&machine.process.program, arguments.first_mut()) {
        *first = program.display().to_string();
    }
    let mut identity = Identity::new(place.domain.as_str(), uuid::Uuid::new_v4());
    let mut taken: Vec<String> = Vec::new();
    for (from, to) in &place.disks {
        let (from, to) = (from.require_path()?, to.require_path()?);
        taken.extend(to.file_name().map(str::to_owned));
        identity = identity.path(from, to);
    }
    for file in clone::own_files(&arguments) {
        if identity.paths.iter().any(|(from, _)| *from == file) {
            continue;
        }
        let Some(name) = file.file_name().and_then(|name| name.to_str()) else { continue };
        let mut own = name.to_owned();
        while taken.contains(&own) {
            own.push('_');
        }
        let to = place.directory.join(&own);
        if to.as_str().len() > LONGEST_SOCKET {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "the path {to} of a clone's socket has {} bytes, {LONGEST_SOCKET} at most",
                    to.as_str().len()
                ),
            )
            .state("no changes made")
            .advise("give the clone a shorter name, or a directory with a shorter path with --to"));
        }
        taken.push(own);
        identity = identity.path(file, to);
    }
    let mut command =
        clone::command(&arguments, &identity).map_err(|error| to_engine(error).state("no changes made"))?;
    // Which start pauses it is decided then.
    command.retain(|word| word != "-S");
    let own = |known: &Utf8Path| {
        let same =
            |from: &Path| from == known.as_std_path() || resolved(from) == resolved(known.as_std_path());
        let found = identity.paths.iter().find(|(from, _)| same(from))?;
        Utf8PathBuf::from_path_buf(found.1.clone()).ok()
    };
    let source = ask.domain.control.clone().unwrap_or_default();
    let Some(socket) = own(Utf8Path::new(&source.address)) else {
        return Err(refused(format!(
            "the socket {} by which the domain is reached is not in its command, so that clones could not be reached",
            source.address
        )));
    };
    let control = Control::at(socket.as_str())
        .agent(source.agent.as_deref().and_then(own))
        .start(command.clone())
        .compress(source.compress);
    let mut record = ask.machine.clone();
    rename(&mut record, &identity);
    record["name"] = Value::from(place.domain.as_str());
    record["uuid"] = Value::from(identity.uuid.to_string());
    record["process"]["command_line"] = json!(command);
    Ok((control, record))
}

/// A path with its directory as it is without symbolic links.
fn resolved(path: &Path) -> PathBuf {
    match (path.parent().and_then(|directory| directory.canonicalize().ok()), path.file_name()) {
        (Some(directory), Some(name)) => directory.join(name),
        _ => path.to_owned(),
    }
}

/// Gives the files in a record the names of a clone's.
fn rename(record: &mut Value, identity: &Identity) {
    match record {
        Value::String(text) => {
            let found = identity.paths.iter().find(|(from, _)| from == Path::new(text.as_str()));
            if let Some(to) = found.and_then(|(_, to)| to.to_str()) {
                *text = to.to_owned();
            }
        }
        Value::Array(all) => all.iter_mut().for_each(|value| rename(value, identity)),
        Value::Object(all) => all.values_mut().for_each(|value| rename(value, identity)),
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// The bytes that [`give_memory`] writes; refused if there is no room for them.
fn bytes_to_write(image: &Utf8Path, above: Option<&Utf8Path>, shares: bool) -> Result<u64> {
    let stored =
        Stored::open(image.as_std_path()).map_err(|error| to_engine(error).state("no changes made"))?;
    let length = stored.length().map_err(to_engine)?;
    let full = stored.full_length().map_err(to_engine)?.unwrap_or(length);
    let Some(above) = above else { return Ok(0) };
    let device = |path: &Utf8Path| fs::metadata(path).map(|about| about.dev()).ok();
    let is_here = device(image) == device(above);
    let copies = if is_here { 0 } else { length };
    let (at, bytes) = match (is_here, shares && (!is_here || usable(image.as_std_path()).is_none())) {
        (true, true) => (image.parent().unwrap_or(above), full),
        (_, apart) => (above, copies + if apart { full } else { 0 }),
    };
    let Ok(about) = rustix::fs::statvfs(at.as_std_path()) else { return Ok(bytes) };
    let free = about.f_bavail.saturating_mul(about.f_frsize);
    if free < bytes {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "the memory of clones needs up to {}, and {at} has room for {}",
                shown_size(bytes),
                shown_size(free)
            ),
        )
        .state("no changes made")
        .advise("free space there, or clone the disks alone with --disk-only"));
    }
    Ok(bytes)
}

/// The files beside an image into which it is taken apart: the RAM, and the devices.
fn parts_of(image: &Path) -> [PathBuf; 2] {
    [".ram", ".devices"].map(|end| {
        let mut name = image.as_os_str().to_owned();
        name.push(end);
        name.into()
    })
}

/// What the removal of an image frees, with the files into which it was taken apart. Their names go with it,
/// and clones that have further names of them keep them.
pub(super) fn freed_by_removing(image: &DiskAddress) -> snapcore::Result<Option<DeleteCost>> {
    let Some(own) = MemoryDirectory::freed(image)? else { return Ok(None) };
    let mut all = vec![own];
    for part in parts_of(image.require_path()?.as_std_path()) {
        let Ok(part) = Utf8PathBuf::from_path_buf(part) else { continue };
        all.extend(MemoryDirectory::freed(&part.into())?);
    }
    Ok(Some(DeleteCost::sum(all)))
}

/// Removes what an image was taken apart into, complete or not. A QEMU that has it mapped goes on.
pub(super) fn remove_parts(image: &Path) -> crate::Result<()> {
    let [ram, devices] = parts_of(image);
    let part =
        |file: &Path| file.file_name().map(|name| file.with_file_name(format!(".{}.part", name.display())));
    let left = [Some(ram.clone()), Some(devices.clone()), part(&ram), part(&devices)];
    match left.into_iter().flatten().any(|file| file.symlink_metadata().is_ok()) {
        true => Split::remove(&ram, &devices),
        false => Ok(()),
    }
}

/// Opens what an image was taken apart into; nothing if it is not, or not by this user, or was changed since.
pub(super) fn usable(image: &Path) -> Option<Split> {
    let [ram, devices] = parts_of(image);
    let own = rustix::process::geteuid().as_raw();
    let is_ours = |file: &Path| {
        let about = file.symlink_metadata();
        about.is_ok_and(|about| about.is_file() && about.uid() == own && about.mode() & 0o277 == 0)
    };
    (is_ours(&ram) && is_ours(&devices)).then(|| Split::open(&ram, &devices).ok()).flatten()
}

/// Gives each clone the memory of an image. See the module for the order.
pub(super) async fn give_memory(
    unpacked: &Unpacked,
    image: &DiskAddress,
    clones: &[DiskAddress],
    shares: bool,
) -> Result<Vec<String>> {
    let image = image.require_path()?.to_owned();
    let clones: Vec<Utf8PathBuf> =
        clones.iter().map(|clone| clone.require_path().map(Utf8Path::to_owned)).collect::<Result<_>>()?;
    let Some(first) = clones.first().cloned() else { return Ok(Vec::new()) };
    let (from, to) = (image.clone(), first.clone());
    // On another file system the first clone's files are the ones that the others get names of.
    let anchor = blocking(move || {
        match link(from.as_std_path(), to.as_std_path()) {
            Ok(()) => Ok(from),
            Err(error) if error.kind() == Io::CrossesDevices => {
                copy(from.as_std_path(), to.as_std_path()).map(|()| to)
            }
            Err(error) => Err(error),
        }
        .map_err(|error| crate::Error::io("giving a clone its memory", first.as_std_path(), error))
    })
    .await?;
    let mut notes = Vec::new();
    let mut shares = shares;
    let whole = anchor.clone();
    if shares && blocking(move || Ok(usable(whole.as_std_path()).is_none())).await? {
        let whole = unpacked.take(&image).await?;
        let at = anchor.clone();
        match blocking(move || take_apart(&whole, at.as_std_path())).await {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                notes.push(format!(
                    "the clones do not share memory: {error}; each reads all of it when it starts"
                ));
                shares = false;
            }
            Err(error) => return Err(error),
        }
    }
    blocking(move || {
        for clone in &clones {
            let giving = |error| crate::Error::io("giving a clone its memory", clone.as_std_path(), error);
            link(anchor.as_std_path(), clone.as_std_path()).map_err(giving)?;
            if shares {
                let (from, to) = (parts_of(anchor.as_std_path()), parts_of(clone.as_std_path()));
                for (from, to) in from.iter().zip(&to) {
                    link(from, to).map_err(giving)?;
                }
            }
            confined_files::sync_directory_of(clone.as_std_path()).map_err(giving)?;
        }
        Ok(())
    })
    .await?;
    Ok(notes)
}

/// Takes an image apart, beside `at`. What was there and cannot be used loses its names: who has it mapped
/// keeps it.
fn take_apart(image: &Image, at: &Path) -> crate::Result<()> {
    let [ram, devices] = parts_of(at);
    image.verify()?;
    Split::remove(&ram, &devices)?;
    Split::make(image, BLOCK, &ram, &devices).map(drop)
}

/// Gives a file a further name, which may be its own already.
fn link(from: &Path, to: &Path) -> io::Result<()> {
    let (from, name) = Directory::of(from)?;
    let (into, new) = Directory::of(to)?;
    let found = from.look(&name)?.filter(|found| found.is_file());
    let wanted = found.map(|found| found.identity).ok_or(Io::NotFound)?;
    match from.link(&name, &into, &new, Some(wanted)) {
        Err(error) if error.kind() == Io::AlreadyExists => {
            match into.look(&new)?.is_some_and(|found| found.identity == wanted) {
                true => Ok(()),
                false => Err(error),
            }
        }
        linked => linked,
    }
}

/// Copies a memory image to another file system, durably, and no more open to others than it is.
fn copy(from: &Path, to: &Path) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    let mut source = confined_files::open_regular(from, false)?;
    let (directory, name) = Directory::of(to)?;
    // One of an earlier attempt, in a directory that only this operation uses.
    directory.remove(&name)?;
    let mut file = directory.create_new(&name, 0o600)?;
    io::copy(&mut source, &mut file)?;
    file.set_permissions(fs::Permissions::from_mode(0o400))?;
    file.sync_all()
}

/// Starts a clone. If that fails, no process is left.
pub(super) async fn start(start: StartClone<'_>, unpacked: &Unpacked) -> Result<StepOutcome> {
    let file = start.image.require_path()?;
    let record = recorded(start.machine)?;
    let control = start.domain.control.clone().unwrap_or_default();
    let mut command = control.start.clone();
    fresh::generation_id(&mut command);
    command.push("-S".to_owned());
    let networks = networks(&command);
    let surroundings = Surroundings {
        environment: Some(record.process.environment.clone()),
        directory: record.process.directory.clone(),
    };
    let path = file.to_owned();
    let split = match record.abilities.read_only_ram {
        true => blocking(move || Ok(usable(path.as_std_path()))).await?,
        false => None,
    };
    let socket = PathBuf::from(&control.address);
    let (clone, ran) = match &split {
        Some(split) => {
            let stored = file.to_owned();
            let metadata =
                blocking(move || Stored::open(stored.as_std_path()).map(|stored| ran(&stored))).await?;
            let source = Source::Split(split, Mapping::ReadOnly);
            (clone::start_as(command.clone(), &socket, source, surroundings).await?, metadata)
        }
        None => {
            let image: Arc<Image> = unpacked.take(file).await?;
            let about: Option<MemoryMetadata> = serde_json::from_slice(image.metadata()).ok();
            let source = Source::Image(&image);
            let clone = clone::start_as(command.clone(), &socket, source, surroundings).await?;
            (clone, about.is_some_and(|about| about.running))
        }
    };
    let machine = clone.machine();
    let mut facts = StepOutcome::default();
    if record.drives.iter().any(|drive| drive.medium.is_some()) {
        let now = Discovery::read(machine).await.map_err(to_engine)?;
        put_back(machine, &media(&record, &now)).await?;
    }
    let agent = control.agent.as_ref().map(|socket| Agent::new(socket.as_std_path()));
    let is_up = start.network == CloneNetwork::Same && start.hook.is_none();
    if is_up {
        clone.set_links(true).await?;
    }
    if ran {
        machine.cont().await.map_err(to_engine)?;
        facts.notes.extend(set_clock(machine, agent.as_ref()).await);
        if start.network == CloneNetwork::Swap {
            for network in &networks {
                network.swap(machine).await?;
            }
            clone.set_links(false).await?;
        }
        if let (Some(hook), Some(agent)) = (start.hook, &agent) {
            run_hook(&start, machine, agent, hook).await?;
        }
        if start.network != CloneNetwork::Off && !is_up {
            clone.set_links(true).await?;
        }
    } else if start.hook.is_some() || start.network == CloneNetwork::Swap {
        let what = "the guest was paused at the snapshot, so it can run no script and change no device";
        return Err(Error::new(ErrorKind::Refused, what).advise("clone it without --run and --network swap"));
    } else {
        machine.activate_disks().await.map_err(to_engine)?;
    }
    let machine = clone.leave();
    facts.started = Some(StartedDomain::process(machine.pid(), command));
    Ok(facts)
}

fn ran(stored: &Stored) -> bool {
    let metadata = match stored {
        Stored::Plain(image) => image.metadata(),
        Stored::Packed(packed) => packed.metadata(),
    };
    serde_json::from_slice::<MemoryMetadata>(metadata).is_ok_and(|about| about.running)
}

/// Runs the user's script in the guest of a clone.
async fn run_hook(start: &StartClone<'_>, machine: &Machine, agent: &Agent, hook: &[u8]) -> Result<()> {
    let _ = machine;
    let agent = agent.within(AGENT);
    let environment = [format!("DOMSNAP_DOMAIN={}", start.domain.name)];
    let done = guest_exec::run(&agent, "/bin/sh", &["-s"], &environment, hook, HOOK).await;
    done.map_err(|error| {
        to_engine(error)
            .context("the script of --run")
            .state("its QEMU was ended, and its links were never up")
    })
}

/// A network device of a clone's command.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Network {
    /// The value of its `-device`.
    device: String,
    /// Its id; empty: it has none.
    id: String,
    /// The reason why it cannot be removed from a running guest and added again.
    fixed: Option<String>,
}

/// The network devices of a command.
fn networks(command: &[String]) -> Vec<Network> {
    let devices: Vec<(&String, Value)> = command
        .windows(2)
        .filter(|pair| pair[0].trim_start_matches('-') == "device")
        .map(|pair| (&pair[1], parsed(&pair[1])))
        .collect();
    let text = |device: &Value, key: &str| device[key].as_str().unwrap_or_default().to_owned();
    let ports: Vec<String> = devices
        .iter()
        .filter(|(_, device)| device["driver"] == "pcie-root-port")
        .map(|(_, port)| text(port, "id"))
        .collect();
    let networks = devices.iter().filter(|(_, device)| device["netdev"].is_string());
    networks
        .map(|(word, device)| {
            let (id, bus) = (text(device, "id"), text(device, "bus"));
            let fixed = match (id.is_empty(), !bus.is_empty() && ports.contains(&bus)) {
                (false, true) => None,
                (true, _) => Some("it has no id".to_owned()),
                (false, false) => Some("it is not on a pcie-root-port of its own".to_owned()),
            };
            Network { device: (*word).clone(), id, fixed }
        })
        .collect()
}

/// The parts of a `-device`, with its driver.
fn parsed(word: &str) -> Value {
    if word.trim_start().starts_with('{') {
        return serde_json::from_str(word).unwrap_or_default();
    }
    let mut device = serde_json::Map::new();
    for (place, part) in word.split(',').enumerate() {
        match part.split_once('=') {
            Some((key, value)) => device.insert(key.to_owned(), Value::from(value)),
            None if place == 0 => device.insert("driver".to_owned(), Value::from(part)),
            None => None,
        };
    }
    Value::Object(device)
}

impl Network {
    fn require_swappable(&self) -> Result<()> {
        let Some(why) = &self.fixed else { return Ok(()) };
        Err(Error::new(
            ErrorKind::Refused,
            format!("the network device {} cannot be swapped in a running guest: {why}", self.device),
        )
        .state("no changes made")
        .advise("use --network off or same, and change the address in the guest with --run"))
    }

    /// Removes the device from the guest, and adds it again with a new MAC address. Its link is down before.
    async fn swap(&self, machine: &Machine) -> Result<()> {
        let attempted = "swapping a network device";
        let swapping = |error: crate::Error| to_engine(error).context(format!("{attempted}, {}", self.id));
        let until = Instant::now() + UNPLUG;
        loop {
            // A guest that is still starting may ignore the first request. A pending one is refused.
            let _ = machine.run(attempted, &self.id, "device_del", json!({ "id": self.id })).await;
            let again = Instant::now() + Duration::from_secs(6);
            while Instant::now() < again {
                if !self.is_there(machine).await.map_err(swapping)? {
                    return self.add(machine).await.map_err(swapping);
                }
                sleep(LOOK).await;
            }
            if Instant::now() >= until {
                let detail = format!("the guest does not give it up within {} s", UNPLUG.as_secs());
                return Err(Error::new(ErrorKind::Io, detail).context(format!("{attempted}, {}", self.id)));
            }
        }
    }

    async fn is_there(&self, machine: &Machine) -> crate::Result<bool> {
        let all = machine.query("qom-list", json!({ "path": "/machine/peripheral" })).await?;
        Ok(all.as_array().into_iter().flatten().any(|device| device["name"] == self.id.as_str()))
    }

    async fn add(&self, machine: &Machine) -> crate::Result<()> {
        let attempted = "adding a network device";
        let mac = fresh_mac();
        if self.device.trim_start().starts_with('{') {
            let mut device = parsed(&self.device);
            device["mac"] = Value::from(mac);
            return machine.run(attempted, &self.id, "device_add", device).await.map(drop);
        }
        let others = self.device.split(',').filter(|part| !part.starts_with("mac="));
        let device = others.chain([format!("mac={mac}").as_str()]).collect::<Vec<_>>().join(",");
        let said = monitor(machine, attempted, &format!("device_add {device}")).await?;
        match said.is_empty() {
            true => Ok(()),
            false => Err(crate::Error::new(crate::ErrorKind::Refused, attempted, &self.id, said)),
        }
    }
}

/// A MAC address that no manufacturer gives, of one station.
fn fresh_mac() -> String {
    let bytes = uuid::Uuid::new_v4().into_bytes();
    let [a, b, c, ..] = bytes;
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
}

/// Runs blocking work that has the engine's errors.
async fn blocking_engine<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let joined = tokio::task::spawn_blocking(work).await;
    joined.map_err(|error| Error::new(ErrorKind::Internal, "the work broke off").because(error))?
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device is swapped where it has an id and a root port of its own.
    #[test]
    fn swappable_networks_are_on_root_ports() {
        let command =
            |arguments: &[&str]| arguments.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
        let found = networks(&command(&[
            "qemu",
            "-device",
            "pcie-root-port,id=rp1,chassis=1",
            "-device",
            "virtio-net-pci,netdev=n0,id=nic0,bus=rp1,mac=52:54:00:00:00:01",
            "-device",
            "virtio-net-pci,netdev=n1,id=nic1",
            "-device",
            r#"{"driver":"virtio-net-pci","netdev":"n2","bus":"rp1"}"#,
        ]));
        let fixed: Vec<bool> = found.iter().map(|network| network.fixed.is_some()).collect();
        assert_eq!(fixed, [false, true, true]);
        assert!(found[0].require_swappable().is_ok());
        assert!(found[1].require_swappable().unwrap_err().to_string().contains("pcie-root-port"));
    }
}
