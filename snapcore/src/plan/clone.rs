//! Plans of clones: new domains that are made of a snapshot's disks.
//!
//! The source is only read. So its disks are not locked, and it may run: what a clone shares with it, the
//! clone has by a name of its own (a hard link, a thin volume), and the rule that a layer with further names
//! is never written or merged into keeps it as it is. So no hold on the snapshot is needed, and it may be
//! deleted while its clones exist.

use camino::{Utf8Path, Utf8PathBuf};

use super::merged::{Merged, of_domain};
use super::{DiskInput, Planner, require_single_tag, stamp};
use crate::address::{DiskAddress, is_among_devices};
use crate::backend::{CloneDisk, ClonePlace, ClonePlan};
use crate::domain::{DiskRecord, Domain, Machine};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{
    CloneMachines, CloneNetwork, ClonedMachines, Control, DomainStep, MachinePlace, VmStateSaver,
};
use crate::name::DomainName;
use crate::request::CloneRequest;
use crate::shape::{FinishUnit, OF_CLONES, Plan, PlanStep};
use crate::snapshot::{DiskPoint, MemoryPoint, Snapshot};

impl Planner<'_> {
    pub(super) async fn clones(
        &self,
        request: &CloneRequest,
        saver: Option<&dyn VmStateSaver>,
    ) -> Result<Plan> {
        let wanted = self.named(&request.snapshot)?;
        self.refuse_lost_memory(wanted, request)?;
        refuse_start_options(request)?;
        let memory = self.memory_to_clone(wanted, request, saver)?;
        refuse_twice(&request.clones)?;
        let stamp = stamp();
        let parent = match &request.directory {
            Some(directory) => directory.clone(),
            None => self.directory(wanted),
        };
        let places: Vec<ClonePlace> =
            request.clones.iter().map(|name| ClonePlace::new(name.clone(), &parent, stamp)).collect();
        let mut merged = Merged::default();
        let mut disks: Vec<Vec<DiskRecord>> = vec![Vec::new(); places.len()];
        let mut points: Vec<Vec<DiskPoint>> = vec![Vec::new(); places.len()];
        for disk in self.disks {
            let Some(member) = wanted.point(disk.target()) else {
                let (target, why) = (disk.target(), wanted.why_without(disk.target()));
                merged.notes.push(format!("{target}: {why}: the clone does not have it"));
                continue;
            };
            self.refuse_replaced(wanted, disk, member)?;
            require_single_tag(disk, &member.point)?;
            let ask = CloneDisk::new(member.point.clone(), places.clone(), stamp)
                .full(request.full)
                .keep(memory.as_ref().map(|_| wanted.name.to_string()))
                .active_path(self.domain.active_path);
            let ClonePlan { plan, disks: made, points: kept } =
                disk.backend.plan_clone(&disk.record, &disk.state, &ask).await?;
            require_answer(disk, places.len(), &made)?;
            if memory.is_some() && kept.len() != places.len() {
                return Err(no_point_kept(disk));
            }
            for (of_clone, record) in disks.iter_mut().zip(made) {
                of_clone.push(record);
            }
            for (of_clone, point) in points.iter_mut().zip(kept) {
                of_clone.push(point);
            }
            merged.add(plan);
        }
        for member in &wanted.disks {
            if self.domain.disk(&member.target).is_none() {
                let target = &member.target;
                merged
                    .notes
                    .push(format!("{target}: the domain does not have the disk any more: the clone neither"));
            }
        }
        if merged.prepare.is_empty() {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("no disk of domain {} is part of snapshot {}", self.domain.name, wanted.name),
            )
            .state("no changes made"));
        }
        let mut domains: Vec<Domain> =
            places.iter().zip(disks).map(|(place, disks)| self.cloned(place, disks)).collect();
        let mut snapshots = Vec::new();
        if let Some(memory) = memory {
            let machines = self.machines(&memory, &places, &domains, request).await?;
            merged.notes.extend(machines.notes.iter().cloned());
            let unfinished = (domains
                .iter_mut()
                .zip(&places)
                .zip(points)
                .zip(machines.controls.into_iter().zip(machines.records)))
            .map(|(((domain, place), points), (control, record))| {
                let snapshot = memory.given_to(domain, place, points, control, record);
                let image = memory_name(&snapshot);
                snapshots.push(snapshot);
                DiskAddress::from(place.unfinished.join(image))
            });
            let clones: Vec<DiskAddress> = unfinished.collect();
            let summary = match machines.shares {
                true => "take the memory apart once, and give it to each clone",
                false => "give the memory to each clone",
            };
            let step = DomainStep::CloneMemory {
                image: memory.point.image.clone(),
                clones,
                shares: machines.shares,
            };
            merged.prepare.push(PlanStep::Domain(of_domain(step, summary)));
        }
        let summary = match &request.clones[..] {
            [only] => format!("register domain {only}"),
            [first, .., last] => format!("register {} domains, {first} to {last}", domains.len()),
            [] => String::new(),
        };
        merged
            .finish
            .push(FinishUnit::Domain(of_domain(DomainStep::Register { domains, snapshots }, summary)));
        merged.plan(OF_CLONES, vec![wanted.name.clone()])
    }

    /// The new domain: at rest, without snapshots. How it is reached when it runs is known when it does.
    fn cloned(&self, place: &ClonePlace, disks: Vec<DiskRecord>) -> Domain {
        Domain::new(place.domain.clone(), disks)
            .host(self.domain.host.clone())
            .active_path(self.domain.active_path)
    }

    /// The directory of the first disk that is a file. If that is the domain's own, with its name, as a clone
    /// has one: the directory above. So a clone of a clone is beside it, and is not removed with it.
    fn directory(&self, wanted: &Snapshot) -> Utf8PathBuf {
        let members = self.disks.iter().filter(|disk| wanted.point(disk.target()).is_some());
        let mut directories = members.filter_map(|disk| disk.record.disk.address.local()?.parent());
        let is_of_files = |directory: &&Utf8Path| !is_among_devices(directory);
        let directory = directories.find(is_of_files).unwrap_or(Utf8Path::new("/"));
        let is_own = directory.file_name() == Some(self.domain.name.as_str());
        match directory.parent() {
            // The root directory is no place for images.
            Some(above) if is_own && above.parent().is_some() => above.to_owned(),
            _ => directory.to_owned(),
        }
    }

    /// Refuses a clone that would silently be with or without the snapshot's memory.
    fn refuse_lost_memory(&self, wanted: &Snapshot, request: &CloneRequest) -> Result<()> {
        let refused = |what: String, advice: &str| {
            Err(Error::new(ErrorKind::Refused, what).state("no changes made").advise(advice))
        };
        let of = format!("snapshot {} of domain {}", wanted.name, self.domain.name);
        match (&wanted.memory, request.memory, request.disk_only) {
            (_, true, true) => {
                Err(Error::new(ErrorKind::Usage, "a clone has memory, or is of the disks alone: not both")
                    .state("no changes made")
                    .advise("say --memory or --disk-only"))
            }
            (Some(_), false, false) => refused(
                format!("{of} has memory, and it is not said if the clone gets it"),
                "say --memory: the clone continues where the snapshot was taken; or --disk-only: it starts \
                 from its disks as after a power failure",
            ),
            (None, true, _) => refused(
                format!("{of} has no memory"),
                "clone its disks, without --memory; or clone a snapshot that has memory (`domsnap list` shows \
                 which have)",
            ),
            (Some(_), true, false) | (Some(_), false, true) | (None, false, _) => Ok(()),
        }
    }

    /// The memory that clones are to have.
    fn memory_to_clone<'a>(
        &'a self,
        wanted: &'a Snapshot,
        request: &CloneRequest,
        saver: Option<&'a dyn VmStateSaver>,
    ) -> Result<Option<Memory<'a>>> {
        let Some(point) = wanted.memory.as_ref().filter(|_| request.memory) else { return Ok(None) };
        let machine = wanted.machine.as_deref().and_then(|id| self.domain.machine(id));
        let (Some(saver), Some(machine)) = (saver, machine) else {
            let what = match saver {
                None => format!("domain {} is registered without a hypervisor", self.domain.name),
                Some(_) => format!("the machine of snapshot {} is not recorded", wanted.name),
            };
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{what}, so that no clone can continue from its memory"),
            )
            .state("no changes made")
            .advise("clone the disks alone, with --disk-only"));
        };
        Ok(Some(Memory { point, machine, snapshot: wanted, source: self.domain, saver }))
    }

    /// The machines of the clones, of which `domains` have the disks.
    async fn machines(
        &self,
        memory: &Memory<'_>,
        places: &[ClonePlace],
        domains: &[Domain],
        request: &CloneRequest,
    ) -> Result<ClonedMachines> {
        let of_disk = |record: &DiskRecord| {
            let source = self.domain.disk(&record.disk.target)?;
            Some((source.disk.address.clone(), record.disk.address.clone()))
        };
        let machines: Vec<MachinePlace> = places
            .iter()
            .zip(domains)
            .map(|(place, domain)| {
                let disks = domain.disks.iter().filter_map(of_disk).collect();
                MachinePlace::new(place.domain.clone(), place.directory.clone(), disks)
            })
            .collect();
        let ask = CloneMachines::new(self.domain, &memory.machine.record, &memory.point.image, &machines)
            .network(request.network)
            .hook(request.hook.is_some());
        let made = memory.saver.plan_clone(ask).await?;
        match made.controls.len() == places.len() && made.records.len() == places.len() {
            true => Ok(made),
            false => Err(Error::new(
                ErrorKind::Internal,
                format!("the hypervisor planned other machines than those of {} clones", places.len()),
            )
            .state("no changes made")
            .advise("this is a defect of the hypervisor's driver; please report it")),
        }
    }
}

/// The memory that clones are to have.
struct Memory<'a> {
    point: &'a MemoryPoint,
    machine: &'a Machine,
    snapshot: &'a Snapshot,
    source: &'a Domain,
    saver: &'a dyn VmStateSaver,
}

impl Memory<'_> {
    /// Gives a clone its machine; returns its first snapshot, which it continues from. A clone is a domain
    /// with that snapshot: so a revert to it, as often as the user wants, never combines the memory with
    /// disks that were written since.
    fn given_to(
        &self,
        domain: &mut Domain,
        place: &ClonePlace,
        points: Vec<DiskPoint>,
        control: Control,
        record: serde_json::Value,
    ) -> Snapshot {
        let machine = Machine::new(record, self.machine.summary.clone());
        let wanted = self.snapshot;
        let snapshot = Snapshot::new(wanted.name.clone(), wanted.created, points)
            .description(wanted.description.clone())
            .consistency(wanted.consistency)
            .machine(Some(machine.id.clone()));
        let image = place.directory.join(memory_name(&snapshot));
        let point = MemoryPoint { image: image.into(), ..self.point.clone() };
        domain.hypervisor = self.source.hypervisor.clone();
        // Everything of the clone is in its directory.
        domain.control = Some(control.memory_dir(Some(place.directory.clone().into())));
        domain.machines = vec![machine];
        domain.current = Some(snapshot.id);
        snapshot.memory(Some(point))
    }
}

/// The file name of the memory of a clone's first snapshot.
fn memory_name(snapshot: &Snapshot) -> String {
    format!("{}.memory", snapshot.id)
}

/// Refuses options of a start without a start.
fn refuse_start_options(request: &CloneRequest) -> Result<()> {
    let option = match request {
        CloneRequest { start: true, memory: false, .. } => "--start needs --memory",
        CloneRequest { start: false, hook: Some(_), .. } => "--run needs --start",
        CloneRequest { start: false, network: CloneNetwork::Same | CloneNetwork::Swap, .. } => {
            "--network needs --start"
        }
        _ => return Ok(()),
    };
    Err(Error::new(ErrorKind::Usage, option).state("no changes made").advise(
        "a clone of disks alone is started as any domain is; one with memory by --start, or by a revert to its snapshot",
    ))
}

/// The refusal of a disk whose clone would not have the point.
fn no_point_kept(disk: &DiskInput) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "{}: a clone of a disk of the format {} does not keep the snapshot, and could not be reverted to its memory",
            disk.target(),
            disk.backend.format()
        ),
    )
    .state("no changes made")
    .advise("clone the disks alone, with --disk-only; or give the domain qcow2 disks")
}

fn refuse_twice(names: &[DomainName]) -> Result<()> {
    let twice =
        names.iter().enumerate().find(|(index, name)| names.iter().take(*index).any(|other| other == *name));
    match twice {
        Some((_, name)) => Err(Error::new(ErrorKind::Usage, format!("the name {name} is given twice"))
            .state("no changes made")
            .advise("give each clone a name of its own")),
        None => Ok(()),
    }
}

/// Refuses an answer of a backend that is not one disk of this target for each clone.
fn require_answer(disk: &DiskInput, wanted: usize, made: &[DiskRecord]) -> Result<()> {
    let target = disk.target();
    match made.len() == wanted && made.iter().all(|record| record.disk.target == *target) {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Internal,
            format!(
                "{target}: the backend {} planned other disks than those that were asked for",
                disk.backend.format()
            ),
        )
        .state("no changes made")
        .advise("this is a defect of the backend; please report it")),
    }
}
