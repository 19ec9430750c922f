//! Connects to running domains, and describes them.

use std::sync::Arc;

use super::Locator;
use crate::address::DiskAddress;
use crate::domain::{ActivePath, Disk, DiskRecord, Domain, Hypervisor};
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::hypervisor::{AttachedDisk, Control, DomainInfo, LiveDomain, SeenDisk};
use crate::service::images::known_address;

/// A connection to a running domain.
pub(in crate::service) type Live = Arc<dyn LiveDomain>;

/// A running domain that was found, and its connection.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Scanned {
    /// Its hypervisor.
    pub hypervisor: Hypervisor,
    /// Its connection.
    pub control: Control,
    /// Its description.
    pub seen: DomainInfo,
}

impl Locator {
    /// Connects to the domain where it runs.
    pub(in crate::service) async fn connect(&self, domain: &Domain) -> Result<Option<Live>> {
        if domain.hypervisor.is_none() {
            // The host is not asked for. It says where a hypervisor runs a domain, and nothing runs this one.
            // It does not say where the disks' paths are valid: a path may be one of a shared file system,
            // which any host may work on, and a host that was installed again still has its images. What a
            // path names here is found by reading it: the chain, the identities of points, and the catalogue
            // and revision in the manifests beside it are compared with the records. An image that is another
            // one is refused by those.
            return Ok(None);
        }
        self.require_here(domain)?;
        let saver = self.registry.hypervisor(&domain.hypervisor)?;
        saver
            .connect(domain)
            .await
            .map_err(|error| error.context(format!("connecting to domain {}", domain.name)))
    }

    /// Ends what a start of the domain that was interrupted has left, before it is connected to. Returns a
    /// message. The caller has the domain's lock.
    pub(in crate::service) async fn end_interrupted_start(&self, domain: &Domain) -> Result<Option<String>> {
        if domain.hypervisor.is_none() || self.require_here(domain).is_err() {
            return Ok(None);
        }
        // A domain whose hypervisor this program does not have can be locked too.
        let Ok(saver) = self.registry.hypervisor(&domain.hypervisor) else { return Ok(None) };
        saver
            .end_interrupted_start(domain)
            .await
            .map_err(|error| error.context(format!("ending the interrupted start of domain {}", domain.name)))
    }

    /// Refuses a domain that runs on another machine. Its address may be that of another domain here, and its
    /// disks may be in use there.
    fn require_here(&self, domain: &Domain) -> Result<()> {
        let (Some(there), Some(here)) = (&domain.host, &self.host) else { return Ok(()) };
        if Host::is_here(Some(there), Some(here)) {
            return Ok(());
        }
        let name = &domain.name;
        Err(Error::new(
            ErrorKind::Refused,
            format!("domain {name} runs on host {there}, and this is host {here}"),
        )
        .state("no changes made")
        .advise(format!(
            "run the command there; if the domain does not run there any more, or this machine got another machine ID, \
             take it over: `domsnap recover --take-over {name}`"
        )))
    }

    /// Connects for commands that only look. Without a connection they report the domain's own process as
    /// another process.
    pub(in crate::service) async fn connect_to_look(&self, domain: &Domain) -> Option<Live> {
        self.connect(domain).await.unwrap_or_else(|error| {
            tracing::debug!(%error, "looking at a domain without asking its hypervisor");
            None
        })
    }

    /// Describes the domain that runs at an address.
    pub(in crate::service) async fn look(
        &self,
        hypervisor: &Hypervisor,
        control: &Control,
    ) -> Result<DomainInfo> {
        let control = self.read_control(hypervisor, control)?;
        let mut seen = self.registry.hypervisor(hypervisor)?.look(&control).await?;
        self.know_disks(&mut seen).await;
        Ok(seen)
    }

    /// Returns the connection to a domain, in the one form that its hypervisor has for it.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where the hypervisor has no such address, or an option does not apply to its
    /// domains.
    pub(in crate::service) fn read_control(
        &self,
        hypervisor: &Hypervisor,
        control: &Control,
    ) -> Result<Control> {
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
        let here = camino::absolute_utf8(".")
            .map_err(|cause| Error::new(ErrorKind::Io, "the current directory is unknown").because(cause))?;
        saver.read_control(control.clone(), &here)
    }

    pub(in crate::service) async fn scan(&self) -> Result<Vec<Scanned>> {
        let mut found = Vec::new();
        for saver in self.registry.hypervisors() {
            let hypervisor = saver.profile().name;
            for (control, mut seen) in saver.scan().await? {
                self.know_disks(&mut seen).await;
                found.push(Scanned { hypervisor: hypervisor.clone(), control, seen });
            }
        }
        Ok(found)
    }

    /// Corrects each disk's description to the catalogue's. A hypervisor may know an active image by its
    /// permanent name, and a disk by the format that it opens it with.
    async fn know_disks(&self, seen: &mut DomainInfo) {
        for disk in &mut seen.disks {
            disk.address = self.registry.configured_address(&disk.target, &disk.address).await;
            if disk.part.is_some() {
                self.know_part(disk).await;
                continue;
            }
            if let Some(backend) = self.registry.recognise(&disk.address, Some(&disk.format)) {
                disk.format = backend.to_owned();
            }
        }
        self.leave_unfit_state_out(seen).await;
    }

    /// Returns true if disks of a format are parts of a machine.
    pub(super) fn is_machine_state(&self, format: &str) -> bool {
        self.registry.get(format).is_ok_and(|backend| backend.capabilities().machine_state)
    }

    /// Leaves the files of a machine's state out, with the reason, of which no points can be taken, and those
    /// that are not of the domain to which its disks belong. They are no reason to refuse the domain: it has
    /// snapshots without them.
    async fn leave_unfit_state_out(&self, seen: &mut DomainInfo) {
        let is_taken = |disk: &&SeenDisk| disk.left_out.is_none();
        let (state, disks): (Vec<&SeenDisk>, Vec<&SeenDisk>) =
            seen.disks.iter().filter(is_taken).partition(|disk| self.is_machine_state(&disk.format));
        if state.is_empty() {
            return;
        }
        let addresses: Vec<DiskAddress> = disks.iter().map(|disk| disk.address.clone()).collect();
        let owners = self.records.owners(&addresses).await.unwrap_or_default();
        let owner = owners.first().map(|(_, owner)| owner.clone());
        let mut unfit = Vec::new();
        for file in state {
            let address = known_address(&self.registry, &file.address).await;
            let address = address.unwrap_or_else(|_| file.address.clone());
            let of = self.records.owners(std::slice::from_ref(&address)).await.unwrap_or_default();
            let of = of.first().map(|(_, owner)| owner);
            let why = match (of, &owner) {
                (Some(of), owner) if owner.as_ref() != Some(of) => {
                    format!("it is a disk of domain {of}")
                }
                (None, Some(owner)) => format!(
                    "domain {owner} was registered without it; `domsnap domain disk add {owner} {}={},format={}` adds it",
                    file.target, file.address, file.format
                ),
                _ => {
                    let disk = Disk::new(file.target.clone(), address, file.format.as_str());
                    let adopted = match self.registry.serving(&disk) {
                        Ok(backend) => backend.adopt(&disk, ActivePath::Keep).await.map(drop),
                        Err(error) => Err(error),
                    };
                    match adopted {
                        Ok(()) => continue,
                        Err(error) => error.summary(),
                    }
                }
            };
            unfit.push((file.target.clone(), why));
        }
        for (target, why) in unfit {
            let disk = seen.disks.iter_mut().find(|disk| disk.target == target);
            if let Some(disk) = disk {
                disk.left_out = Some(why);
            }
        }
    }

    /// Finds the backend of a disk of which the hypervisor shows a part of a file. A disk that none knows is
    /// left out.
    async fn know_part(&self, disk: &mut SeenDisk) {
        for backend in self.registry.iter() {
            if backend.scheme().is_none() && backend.require_shown(&disk.address, disk).await.is_ok() {
                disk.format = backend.format().to_owned();
                return;
            }
        }
        let error = disk.only_a_part();
        let advice = error.advice().map(|advice| format!("; {advice}")).unwrap_or_default();
        disk.left_out
            .get_or_insert_with(|| format!("its node is a slice of a file (offset or size){advice}"));
    }
}

/// The disk as its hypervisor has it.
pub(in crate::service) fn attached<'a>(
    live: &'a Option<Live>,
    record: &DiskRecord,
) -> Option<&'a dyn AttachedDisk> {
    live.as_ref()?.disk(&record.disk.target)
}
