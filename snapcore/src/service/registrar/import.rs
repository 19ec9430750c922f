//! Imports domains: rebuilds the catalogue's records of them from manifests and images.

use tokio_util::sync::CancellationToken;

use super::Registrar;
use crate::catalogue::{Change, Entry, Lease, OperationState, Revision};
use crate::engine::commit_others;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::DomainStep;
use crate::name::DomainName;
use crate::service::images::real_images;
use crate::service::importer::{ImportSource, Imported};
use crate::service::records::require_no_address;
use crate::service::{DomainRef, ImportOptions, ImportReport};

/// A domain of the catalogue that is imported again, under its lock.
struct Known {
    entry: Entry,
    _lease: Lease,
    /// Set where the catalogue is not authoritative. Its records, and its journal, are of disks that no
    /// longer exist, and none of them may be resumed or written.
    outdated: bool,
}

impl Registrar {
    /// Imports a domain.
    pub(in crate::service) async fn import(
        &self,
        reference: DomainRef,
        options: ImportOptions,
        cancel: CancellationToken,
    ) -> Result<ImportReport> {
        options.name.as_ref().map_or(Ok(()), |name| require_no_address(&self.registry, name))?;
        let (source, owner) = self.source_of(&reference, &options).await?;
        let known = match owner {
            None => None,
            Some(owner) => self.known(&owner, &options, &cancel).await?,
        };
        let source = ImportSource { trust: options.trust, recorded: options.recorded, ..source };
        let mut imported = self.importer.import(source).await?;
        if let Some(error) = imported.unconfirmed.take() {
            return Err(error);
        }
        let domain = &mut imported.entry.domain;
        if let Some(Known { entry, .. }) = &known {
            domain.name = entry.domain.name.clone();
            domain.unregistered = entry.domain.unregistered;
        }
        if let Some(name) = options.name {
            domain.name = name;
            domain.unregistered = false;
        }
        match known {
            Some(Known { entry, outdated, _lease }) if entry.domain.name == domain.name => {
                self.enter(imported, entry.revision, outdated).await
            }
            known => self.enter_as_another(imported, known, &cancel).await,
        }
    }

    /// The domain of the catalogue that is to be replaced.
    async fn known(
        &self,
        owner: &DomainName,
        options: &ImportOptions,
        cancel: &CancellationToken,
    ) -> Result<Option<Known>> {
        let lease = self.ledger.lease(owner, cancel).await?;
        let Some(entry) = self.records.find(owner).await? else { return Ok(None) };
        let manifests = self.authority.manifests(&entry.domain)?;
        let outdated = self.authority.contradiction(&manifests, &entry).await?.is_some();
        if !outdated {
            self.records.refuse_unfinished(&entry).await?;
        }
        // The journal is dropped, and with it a decision about other domains: they learn it before.
        for operation in self.records.unfinished(owner).await? {
            for step in operation.plan.domain_steps() {
                if let (OperationState::Finishing, DomainStep::CommitOthers { members }) =
                    (operation.state, step)
                {
                    commit_others(self.ledger.catalogue(), members).await?;
                }
            }
        }
        if !entry.tree.is_empty() && !options.replace {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("the catalogue has domain {} with {} snapshots", entry.domain.name, entry.tree.len()),
            )
            .state("nothing was changed")
            .advise("to replace what it has by what manifests and images contain, say so with --replace"));
        }
        Ok(Some(Known { entry, _lease: lease, outdated }))
    }

    /// Records an imported domain under a name that the catalogue does not have, in place of its previous
    /// entry.
    async fn enter_as_another(
        &self,
        imported: Imported,
        known: Option<Known>,
        cancel: &CancellationToken,
    ) -> Result<ImportReport> {
        let name = &imported.entry.domain.name;
        let _lease = self.ledger.lease(name, cancel).await?;
        if self.records.find(name).await?.is_some() {
            return Err(Error::new(ErrorKind::Exists, format!("there is another domain {name} already"))
                .advise("give this one another name with --name"));
        }
        if let Some(Known { entry, outdated, .. }) = &known {
            if !outdated {
                // If this ends between the two transactions, the manifests bring the domain back.
                let manifests = self.authority.manifests(&entry.domain)?;
                self.authority.write(&manifests, entry).await?;
            }
            self.ledger.commit(&entry.domain.name, entry.revision, vec![Change::RemoveDomain]).await?;
        }
        self.enter(imported, Revision::ABSENT, false).await
    }

    /// Returns the source of an import, and the domain of the catalogue that it is already, if so.
    async fn source_of(
        &self,
        reference: &DomainRef,
        options: &ImportOptions,
    ) -> Result<(ImportSource, Option<DomainName>)> {
        let (source, owner) = match &*self.locator.understood(reference)? {
            DomainRef::Live { hypervisor, address } => {
                match self.locator.known_at(hypervisor, address).await? {
                    Some(name) => (ImportSource::of_entry(self.records.load(&name).await?), Some(name)),
                    None => {
                        let (source, _) = self.locator.source_of_running(hypervisor, address).await?;
                        let paths: Vec<_> = source.disks.iter().map(|disk| disk.address.clone()).collect();
                        let owner = self.locator.owner_of(&paths).await?;
                        (source, owner)
                    }
                }
            }
            DomainRef::Images(given) => {
                let (images, _) = real_images(&self.registry, given).await?;
                let paths: Vec<_> = images.iter().map(|image| image.address.clone()).collect();
                let owner = self.locator.owner_of(&paths).await?;
                if owner.is_none()
                    && let Some(moved) = self.moved_to(&paths).await?
                    && options.name.as_ref().is_none_or(|name| *name == moved.entry.domain.name)
                {
                    if !options.replace {
                        return Err(moved.unconfirmed());
                    }
                    let source = ImportSource { import: true, ..moved.source() };
                    return Ok((source, Some(moved.entry.domain.name)));
                }
                let source = self.locator.source_of_images(&images)?;
                let entry = match &owner {
                    Some(owner) => self.records.find(owner).await?,
                    None => None,
                };
                (entry.map_or(source, ImportSource::of_entry), owner)
            }
            DomainRef::Name(name) => {
                (ImportSource::of_entry(self.records.load(name).await?), Some(name.clone()))
            }
        };
        Ok((ImportSource { import: true, ..source }, owner))
    }
}
