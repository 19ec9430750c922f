//! The registrar: registers domains, imports them, and removes them from the catalogue. It runs no plans and
//! touches no image.

mod disks;
mod import;
mod moved;
mod policy;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::authority::Authority;
use super::images::disks_of;
use super::importer::{ImportSource, Imported, Importer};
use super::ledger::Ledger;
use super::locator::{Located, Locator};
use super::operator::Locks;
use super::records::{Records, require_no_address};
use super::{DomainRef, DomainSpec, ImportReport, Removal};
use crate::catalogue::{Change, Entry, Lease, Revision};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Events};
use crate::host::Host;
use crate::name::DomainName;
use crate::policy::{Policy, PolicyId};
use crate::registry::Registry;

fn not_catalogued(reference: &DomainRef) -> Error {
    Error::new(ErrorKind::NotFound, format!("the catalogue has no domain of {reference}"))
        .advise("`domsnap domain list` shows those that it has")
}

/// Adds domains to the catalogue, and removes them.
#[derive(Clone)]
pub(super) struct Registrar {
    /// Read access to the catalogue.
    pub(super) records: Records,
    /// Write access to the catalogue.
    pub(super) ledger: Ledger,
    /// The backends and hypervisors.
    pub(super) registry: Arc<Registry>,
    /// The receiver of warnings.
    pub(super) events: Events,
    /// Locks domains.
    pub(super) locks: Locks,
    /// Finds domains.
    pub(super) locator: Locator,
    /// Makes domains of disks.
    pub(super) importer: Importer,
    /// Reads and writes manifests.
    pub(super) authority: Authority,
    /// The machine that this service is on.
    pub(super) host: Option<Host>,
}

impl Registrar {
    /// Registers a domain.
    pub(super) async fn add(&self, spec: DomainSpec, cancel: CancellationToken) -> Result<ImportReport> {
        require_no_address(&self.registry, &spec.name)?;
        let control = match (&spec.control, spec.hypervisor.is_none()) {
            (Some(control), false) => Some(self.locator.read_control(&spec.hypervisor, control)?),
            (control, _) => control.clone(),
        };
        let spec = DomainSpec { control, ..spec };
        let (disks, followed) = disks_of(&self.registry, &spec).await?;
        let paths: Vec<_> = disks.iter().map(|disk| disk.address.clone()).collect();
        let _lease = self.ledger.lease(&spec.name, &cancel).await?;
        if self.records.find(&spec.name).await?.is_some() {
            return Err(Error::new(ErrorKind::Exists, format!("there is a domain {} already", spec.name))
                .advise(format!(
                    "choose another name, or remove that one with `domsnap domain remove {}`",
                    spec.name
                )));
        }
        let before = match self.locator.owner_of(&paths).await? {
            None => None,
            Some(owner) => Some(self.unregistered_for(&owner, &spec, &cancel).await?),
        };
        let before = before.as_ref().map(|(entry, _lease)| entry);
        if let Some(policy) = &spec.policy {
            policy.check()?;
        }
        let mut imported = self
            .importer
            .import(ImportSource {
                name: Some(spec.name.clone()),
                hypervisor: spec.hypervisor,
                control: spec.control,
                active_path: spec.active_path,
                by_path: false,
                known_as: before.map(|entry| entry.domain.name.clone()),
                known: before.cloned(),
                ..ImportSource::of_images(disks)
            })
            .await?;
        if let Some(error) = imported.unconfirmed {
            return Err(error);
        }
        if let Some(entry) = before {
            // Its manifests are whole: if this ends between the two transactions, they bring it back.
            self.ledger.commit(&entry.domain.name, entry.revision, vec![Change::RemoveDomain]).await?;
        }
        imported.entry.domain.policy = spec.policy.map(|policy| Policy::new(PolicyId::fresh(), policy));
        let mut report = self.enter(imported, Revision::ABSENT, false).await?;
        report.notes.splice(0..0, followed);
        Ok(report)
    }

    /// Removes a domain from the catalogue.
    pub(super) async fn remove(&self, reference: DomainRef, cancel: CancellationToken) -> Result<Removal> {
        let locked = self.locks.lock(&reference, &cancel).await?;
        let (Located { entry, catalogued, .. }, manifests) = (&locked.located, &locked.manifests);
        let name = entry.domain.name.clone();
        if !catalogued {
            return Err(not_catalogued(&reference));
        }
        if entry.domain.policy.is_some() {
            // Its timer would run on, and fail each time.
            return Err(Error::new(ErrorKind::Refused, format!("domain {name} has a policy"))
                .state("no changes made")
                .advise(format!("remove that first: `domsnap policy remove {name}`")));
        }
        // Nothing would end it without the domain.
        if let Some(message) = self.locator.end_interrupted_start(&entry.domain).await? {
            self.events.report(Event::Warning { domain: name.clone(), message });
        }
        // If the manifests have more than the catalogue, or another catalogue's content, they stay as they
        // are.
        if self.authority.contradiction(manifests, entry).await?.is_none() {
            self.records.refuse_unfinished(entry).await?;
            self.authority.write(manifests, entry).await.map_err(|error| {
                error
                    .state("the domain stays in the catalogue: without manifests its snapshots would be lost")
            })?;
        }
        self.ledger.commit(&name, entry.revision, vec![Change::RemoveDomain]).await?;
        Ok(Removal { domain: name, snapshots: entry.tree.len() as u64, manifests: manifests.place().into() })
    }

    /// Records that a domain runs on this machine. Its journal stays: a recovery reads it next.
    pub(super) async fn take_over(
        &self,
        reference: DomainRef,
        cancel: CancellationToken,
    ) -> Result<Option<Host>> {
        let (_lease, located) = self.locks.lock_records(&reference, &cancel).await?;
        let Located { mut entry, catalogued, .. } = located;
        if !catalogued {
            return Err(not_catalogued(&reference));
        }
        let before = std::mem::replace(&mut entry.domain.host, self.host.clone());
        let snapshots = entry.tree.iter().cloned().collect();
        let put = Change::PutDomain(Box::new(entry.domain.clone()), snapshots);
        self.ledger.commit(&entry.domain.name, entry.revision, vec![put]).await?;
        Ok(before)
    }

    /// The domain `owner` of the same images, which was never registered and now gets a name.
    async fn unregistered_for(
        &self,
        owner: &DomainName,
        spec: &DomainSpec,
        cancel: &CancellationToken,
    ) -> Result<(Entry, Lease)> {
        let lease = self.ledger.lease(owner, cancel).await?;
        let entry = self.records.load(owner).await?;
        if !entry.domain.unregistered {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("the images of domain {} belong to domain {owner} already", spec.name),
            )
            .advise(format!("use {owner}, or take it out first with `domsnap domain remove {owner}`")));
        }
        let manifests = self.authority.manifests(&entry.domain)?;
        self.authority.require(&manifests, &entry).await?;
        self.records.refuse_unfinished(&entry).await?;
        self.authority.write(&manifests, &entry).await?;
        Ok((entry, lease))
    }

    /// Records an imported domain, and writes its manifests. If they cannot be written, that is reported and
    /// stops nothing.
    async fn enter(&self, imported: Imported, expected: Revision, restart: bool) -> Result<ImportReport> {
        let Imported { mut entry, restored, adopted, mut notes, leftovers, unconfirmed: _ } = imported;
        self.ledger.put(&mut entry, expected, restart).await?;
        let manifests = self.authority.manifests(&entry.domain)?;
        if let Err(error) = self.authority.take_over(&manifests, &entry, &leftovers).await {
            notes.push(error.to_string());
            self.warn(&entry, &error);
        }
        Ok(ImportReport { domain: entry.domain, restored, adopted, notes })
    }

    /// Reports a failure that stops nothing.
    fn warn(&self, entry: &Entry, error: &Error) {
        self.events.report(Event::Warning { domain: entry.domain.name.clone(), message: error.to_string() });
    }
}
