//! Adds disks to registered domains, and takes them out.

use tokio_util::sync::CancellationToken;

use super::Registrar;
use crate::catalogue::{Entry, Revision};
use crate::service::DomainRef;
use crate::service::images::{image_path, is_same_file};
use crate::service::locator::Located;
use crate::service::operator::Locked;
use crate::{Disk, Domain, Error, ErrorKind, Result, Target};

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
            // What only manifests tell is in the catalogue before they go.
            self.ledger.put(entry, Revision::ABSENT, false).await?;
            *catalogued = true;
        }
        let previous = entry.clone();
        entry.domain.disks.retain(|record| record.disk.target != target);
        if self.authority.manifests(&entry.domain)?.place() != before.place() {
            // Manifests lie beside the first disk. Those beside the former one go before the catalogue has the domain without it: a
            // crash in between leaves a domain without manifests, and its next change writes them. The other way round it
            // would leave manifests of a domain that the disk is not in any more, and nobody would look there again.
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
        let absolute = camino::absolute_utf8(&disk.path).map_err(|cause| {
            Error::new(ErrorKind::Usage, format!("the image path {:?} cannot be made absolute", disk.path))
                .because(cause)
        })?;
        let disk = Disk { path: image_path(&absolute)?, ..disk };
        if entry.domain.disk(&disk.target).is_some() {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("domain {name} has a disk {} already", disk.target),
            )
            .advise("give the new one another target"));
        }
        if let Some(owner) = self.locator.owner_of(std::slice::from_ref(&disk.path)).await? {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("the image {} is a disk of domain {owner} already", disk.path),
            )
            .advise(format!("take it out there first: `domsnap domain remove {owner}`")));
        }
        if let Some(same) = entry.domain.disks.iter().find(|known| is_same_file(&known.disk.path, &disk.path))
        {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("{} and disk {} of domain {name} are one file", disk.path, same.disk.target),
            )
            .advise("give each disk an image of its own"));
        }
        self.records.refuse_unfinished(entry).await?;
        let record = self.registry.get(&disk.format)?.adopt(&disk, entry.domain.active_path).await?;
        entry.domain.disks.push(record);
        self.put_changed(entry, *catalogued).await?;
        Ok(entry.domain.clone())
    }

    /// Records a domain whose disks are others now. Its manifests follow; where they cannot, that is reported and stops
    /// nothing.
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
