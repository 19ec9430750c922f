//! Adds disks to registered domains, and removes them.

use tokio_util::sync::CancellationToken;

use super::Registrar;
use crate::catalogue::{Entry, Revision};
use crate::domain::{Disk, DiskRecord, Domain};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Target;
use crate::service::DomainRef;
use crate::service::images::{absolute, identity_of, known_address};
use crate::service::locator::Located;
use crate::service::operator::Locked;

impl Registrar {
    pub(in crate::service) async fn disk_remove(
        &self,
        reference: DomainRef,
        target: Target,
        cancel: CancellationToken,
    ) -> Result<Domain> {
        let mut locked = self.locks.lock(&reference, &cancel).await?;
        let Locked { located: Located { entry, catalogued, .. }, manifests: before, .. } = &mut locked;
        let name = entry.domain.name.clone();
        if entry.domain.disk(&target).is_none() {
            return Err(Error::new(ErrorKind::NotFound, format!("domain {name} has no disk {target}"))
                .advise(format!("`domsnap domain show {name}` lists its disks")));
        }
        if entry.domain.disks.len() == 1 {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{target} is the only disk of domain {name}"),
            )
            .advise(format!("take the whole domain out with `domsnap domain remove {name}`")));
        }
        self.records.refuse_unfinished(entry).await?;
        if !*catalogued {
            // Content that only manifests have enters the catalogue before they are removed.
            self.ledger.put(entry, Revision::ABSENT, false).await?;
            *catalogued = true;
        }
        let previous = entry.clone();
        entry.domain.disks.retain(|record| record.disk.target != target);
        if self.authority.manifests(&entry.domain)?.place() != before.place() {
            // Manifests lie beside the first disk. Those beside the previous one go before the catalogue has
            // the domain without it. A crash in between leaves a domain without manifests, and its next
            // change writes them. In the other order it would leave manifests of a domain that no longer has
            // the disk, and no command would look there again.
            if let Err(error) = self.authority.clear(before, previous).await {
                self.warn(entry, &error);
            }
        }
        self.put_changed(entry, *catalogued).await?;
        Ok(entry.domain.clone())
    }

    pub(in crate::service) async fn disk_add(
        &self,
        reference: DomainRef,
        disk: Disk,
        cancel: CancellationToken,
    ) -> Result<Domain> {
        let mut locked = self.locks.lock(&reference, &cancel).await?;
        let Located { entry, catalogued, .. } = &mut locked.located;
        let name = entry.domain.name.clone();
        let given = absolute(&self.registry, &disk.address)?;
        let disk = Disk { address: known_address(&self.registry, &given).await?, ..disk };
        if entry.domain.disk(&disk.target).is_some() {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("domain {name} has a disk {} already", disk.target),
            )
            .advise("give the new one another target"));
        }
        if let Some(owner) = self.locator.owner_of(std::slice::from_ref(&disk.address)).await? {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("the image {} is a disk of domain {owner} already", disk.address),
            )
            .advise(format!("take it out there first: `domsnap domain remove {owner}`")));
        }
        if let Some(same) = self.same_disk(&entry.domain, &disk).await? {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("{} and disk {} of domain {name} are one file", disk.address, same.disk.target),
            )
            .advise("give each disk an image of its own"));
        }
        self.records.refuse_unfinished(entry).await?;
        let record = self.registry.serving(&disk)?.adopt(&disk, entry.domain.active_path).await?;
        entry.domain.disks.push(record);
        self.put_changed(entry, *catalogued).await?;
        Ok(entry.domain.clone())
    }

    /// Returns the disk of a domain that is the same as `disk`, by another address.
    async fn same_disk<'d>(&self, domain: &'d Domain, disk: &Disk) -> Result<Option<&'d DiskRecord>> {
        let wanted = identity_of(&self.registry, disk).await?;
        for known in &domain.disks {
            let identity = identity_of(&self.registry, &known.disk).await?;
            if known.disk.address == disk.address || (identity.is_some() && identity == wanted) {
                return Ok(Some(known));
            }
        }
        Ok(None)
    }

    /// Records a domain whose disks have changed, and writes its manifests. If they cannot be written, that
    /// is reported and stops nothing.
    async fn put_changed(&self, entry: &mut Entry, catalogued: bool) -> Result<()> {
        let expected = if catalogued { entry.revision } else { Revision::ABSENT };
        self.ledger.put(entry, expected, false).await?;
        let manifests = self.authority.manifests(&entry.domain)?;
        if let Err(error) = self.authority.write(&manifests, entry).await {
            self.warn(entry, &error);
        }
        Ok(())
    }
}
