//! The running side of a domain: who is connected to, and whether what runs is the domain that the catalogue means.

use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::Directory;

use super::Inner;
use super::identity::file_id;
use super::reference::configured_path;
use crate::catalogue::Entry;
use crate::plan::Alive;
use crate::{
    AttachedDisk, Control, DiskRecord, Domain, DomainStep, Error, ErrorKind, Hypervisor, LiveDomain,
    MemoryPlan, OpenChain, Plan, Request, Result, Seen,
};

/// A connection to a running domain.
pub(super) type Live = Arc<dyn LiveDomain>;

/// What runs at an address, and who would be asked.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Scanned {
    /// Its hypervisor.
    pub hypervisor: Hypervisor,
    /// How it is reached.
    pub control: Control,
    /// What it is.
    pub seen: Seen,
}

impl Inner {
    /// Connects to the domain where it runs.
    pub(super) async fn connect(&self, domain: &Domain) -> Result<Option<Live>> {
        if domain.hypervisor.is_none() {
            return Ok(None);
        }
        let saver = self.registry.hypervisor(&domain.hypervisor)?;
        saver
            .connect(domain)
            .await
            .map_err(|error| error.context(format!("connecting to domain {}", domain.name)))
    }

    /// Connects for those who only look: where that cannot be, they see the domain's own process as a stranger's.
    pub(super) async fn connect_to_look(&self, domain: &Domain) -> Option<Live> {
        self.connect(domain).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "looking at a domain without asking its hypervisor");
            None
        })
    }

    /// What runs at an address.
    pub(super) async fn look(&self, hypervisor: &Hypervisor, control: &Control) -> Result<Seen> {
        let control = self.read_control(hypervisor, control)?;
        let mut seen = self.registry.hypervisor(hypervisor)?.look(&control).await?;
        self.know_disks(&mut seen);
        Ok(seen)
    }

    /// How a domain is reached, in the one form that its hypervisor has for it.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where the hypervisor has no such address, or something is said that does not apply to its domains.
    pub(super) fn read_control(&self, hypervisor: &Hypervisor, control: &Control) -> Result<Control> {
        let saver = self.registry.hypervisor(hypervisor)?;
        let profile = saver.profile();
        let said = [
            (control.agent.is_some(), profile.agent, "agent"),
            (!control.start.is_empty(), profile.start, "start"),
            (control.compress.is_some_and(|level| level > 0), profile.compress, "compress"),
            (control.config.is_some(), profile.config, "config"),
        ];
        if let Some((.., what)) = said.into_iter().find(|(said, applies, _)| *said && !applies) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{what} does not apply to a domain of {}", profile.title),
            )
            .state("no changes made")
            .advise(format!("leave it out; what can be said is: {}", profile.keys().join(", "))));
        }
        let here = camino::absolute_utf8(".").map_err(|cause| {
            Error::new(ErrorKind::Io, "the current directory cannot be told").because(cause)
        })?;
        saver.read_control(control.clone(), &here)
    }

    pub(super) async fn scan(&self) -> Result<Vec<Scanned>> {
        let mut found = Vec::new();
        for saver in self.registry.hypervisors() {
            let hypervisor = saver.profile().name;
            for (control, mut seen) in saver.scan().await? {
                self.know_disks(&mut seen);
                found.push(Scanned { hypervisor: hypervisor.clone(), control, seen });
            }
        }
        Ok(found)
    }

    /// Says of each disk what the catalogue would: a hypervisor may know an active image by its permanent name, and a disk by
    /// the format that it opens it with.
    fn know_disks(&self, seen: &mut Seen) {
        for disk in &mut seen.disks {
            disk.path = configured_path(&disk.path);
            if let Some(backend) = self.registry.recognise(&disk.path, Some(&disk.format)) {
                disk.format = backend.to_owned();
            }
        }
    }

    /// The running domain as the planner must know it.
    pub(super) fn alive<'a>(&self, entry: &Entry, live: &'a Live, request: &Request) -> Result<Alive<'a>> {
        let (mut differs, mut media) = (Vec::new(), Vec::new());
        if let Request::Revert(revert) = request
            && let Ok(wanted) = entry.tree.named(&revert.name)
            && wanted.memory.is_some()
            && let Some(machine) = wanted.machine.as_deref().and_then(|id| entry.domain.machine(id))
        {
            differs = live.differences(&machine.record)?;
            media = live.media(&machine.record)?;
        }
        Ok(Alive {
            profile: self.registry.hypervisor(&entry.domain.hypervisor)?.profile(),
            seen: live.seen(),
            differs,
            media,
            memory_dir: self.memory_dir(&entry.domain)?,
            cannot_save_memory: live.cannot_save_memory(),
            cannot_detach: live.cannot_detach(),
        })
    }

    /// Where the domain's memory images go: where it is said, or beside its manifests.
    fn memory_dir(&self, domain: &Domain) -> Result<Utf8PathBuf> {
        match domain.control.as_ref().and_then(|control| control.memory_dir.clone()) {
            Some(directory) => Ok(directory),
            None => Ok(self.manifests_of(domain)?.directory().to_owned()),
        }
    }

    /// Whether the hypervisor has the disk open as its configured path names it.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where it has another image open, or the disk not at all: what is done to one would not be done to
    /// the other.
    pub(super) async fn is_attached(&self, live: &Live, record: &DiskRecord) -> Result<bool> {
        let path = &record.disk.path;
        let target = &record.disk.target;
        let Some(disk) = live.disk(target) else {
            let known: Vec<String> =
                live.seen().disks.iter().map(|disk| format!("{} ({})", disk.target, disk.path)).collect();
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{target}: {path} is not open in the running domain; what it has is: {}",
                    known.join(", ")
                ),
            )
            .state("no changes made")
            .advise("shut the domain down, or register it anew with the disks that it has"));
        };
        let open = disk.open_files().await?;
        let named = file_id(path);
        if named.is_some_and(|named| open.contains(&named)) {
            return Ok(true);
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!("{target}: the running domain has another image open than {path} names now"),
        )
        .state("no changes made")
        .advise("if a file was moved or replaced under the running domain, put it back, or shut the domain down first"))
    }

    /// Lets nothing that a crash left stand in a running domain.
    pub(super) async fn settle(&self, domain: &Domain, live: &Live) -> Result<Vec<String>> {
        live.settle(&self.chains_of(domain).await?).await
    }

    /// What the configured paths of a domain's disks open now.
    pub(super) async fn chains_of(&self, domain: &Domain) -> Result<Vec<OpenChain>> {
        let mut chains = Vec::new();
        for record in &domain.disks {
            let layers = self.registry.get(&record.disk.format)?.open_chain(record).await?;
            chains.push(OpenChain { target: record.disk.target.clone(), layers });
        }
        Ok(chains)
    }
}

/// The disk as its hypervisor has it.
pub(super) fn attached<'a>(live: &'a Option<Live>, record: &DiskRecord) -> Option<&'a dyn AttachedDisk> {
    live.as_ref()?.disk(&record.disk.target)
}

/// Makes the directory that the plan's memory image goes to, for its owner alone.
pub(super) fn prepare_memory_dir(plan: &Plan) -> Result<()> {
    let Some(directory) = memory_directory_of(plan) else { return Ok(()) };
    Directory::make_all(directory.as_std_path(), 0o700).map(|_| ()).map_err(|cause| {
        Error::new(ErrorKind::Io, format!("the directory {directory} for memory images cannot be made"))
            .because(cause)
            .state("no changes made")
            .advise("make it, or name another one with --memory-dir when the domain is registered")
    })
}

/// The directory of the memory image that a plan makes.
pub(super) fn memory_directory_of(plan: &Plan) -> Option<Utf8PathBuf> {
    let memory = plan.steps.iter().filter(|planned| planned.step.target.is_domain()).find_map(|planned| {
        match serde_json::from_value(planned.step.action.clone()) {
            Ok(DomainStep::Instant { memory: Some(MemoryPlan { file, .. }), .. }) => Some(file),
            _ => None,
        }
    });
    memory.as_ref().and_then(|file| file.parent()).map(Utf8Path::to_owned)
}
