//! Plans of clones: new domains that are made of a snapshot's disks.
//!
//! The source is only read. So its disks are not locked, and it may run: what a clone shares with it, the
//! clone has by a name of its own (a hard link, a thin volume), and the rule that a layer with further names
//! is never written or merged into keeps it as it is. So no hold on the snapshot is needed, and it may be
//! deleted while its clones exist.

use camino::{Utf8Path, Utf8PathBuf};

use super::merged::{Merged, of_domain};
use super::{DiskInput, Planner, require_single_tag, stamp};
use crate::backend::{CloneDisk, ClonePlace, ClonePlan};
use crate::domain::{DiskRecord, Domain};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::DomainStep;
use crate::name::DomainName;
use crate::request::CloneRequest;
use crate::shape::{FinishUnit, OF_CLONES, Plan};
use crate::snapshot::Snapshot;

impl Planner<'_> {
    pub(super) async fn clones(&self, request: &CloneRequest) -> Result<Plan> {
        let wanted = self.named(&request.snapshot)?;
        self.refuse_lost_memory(wanted, request)?;
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
                .active_path(self.domain.active_path);
            let ClonePlan { plan, disks: made } =
                disk.backend.plan_clone(&disk.record, &disk.state, &ask).await?;
            require_answer(disk, places.len(), &made)?;
            for (of_clone, record) in disks.iter_mut().zip(made) {
                of_clone.push(record);
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
        let domains: Vec<Domain> =
            places.iter().zip(disks).map(|(place, disks)| self.cloned(place, disks)).collect();
        let summary = match &request.clones[..] {
            [only] => format!("register domain {only}"),
            [first, .., last] => format!("register {} domains, {first} to {last}", domains.len()),
            [] => String::new(),
        };
        merged.finish.push(FinishUnit::Domain(of_domain(DomainStep::Register { domains }, summary)));
        merged.plan(OF_CLONES, vec![wanted.name.clone()])
    }

    /// The new domain: at rest, without snapshots. How it is reached when it runs is known when it does.
    fn cloned(&self, place: &ClonePlace, disks: Vec<DiskRecord>) -> Domain {
        Domain::new(place.domain.clone(), disks)
            .host(self.domain.host.clone())
            .active_path(self.domain.active_path)
    }

    /// The directory of the first disk that is a file.
    fn directory(&self, wanted: &Snapshot) -> Utf8PathBuf {
        let members = self.disks.iter().filter(|disk| wanted.point(disk.target()).is_some());
        let mut directories = members.filter_map(|disk| disk.record.disk.address.local()?.parent());
        let is_of_files = |directory: &&Utf8Path| !directory.starts_with("/dev");
        directories.find(is_of_files).unwrap_or(Utf8Path::new("/")).to_owned()
    }

    /// Refuses a clone that would silently be without the snapshot's memory.
    fn refuse_lost_memory(&self, wanted: &Snapshot, request: &CloneRequest) -> Result<()> {
        if wanted.memory.is_none() || request.disk_only {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "snapshot {} of domain {} has memory, and a clone gets disks alone",
                wanted.name, self.domain.name
            ),
        )
        .state("no changes made")
        .advise("say --disk-only: the clone then starts from disks as after a power failure"))
    }
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
