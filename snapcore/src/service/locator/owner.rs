//! Owners of images, as recorded in the catalogue.

use super::Locator;
use crate::address::DiskAddress;
use crate::domain::{DiskRecord, Hypervisor};
use crate::error::{Error, ErrorKind, Result};
use crate::name::DomainName;
use crate::service::images::{identity_at, images_of};

impl Locator {
    /// The domain of the catalogue that is reached at an address.
    pub(in crate::service) async fn known_at(
        &self,
        hypervisor: &Hypervisor,
        address: &str,
    ) -> Result<Option<DomainName>> {
        let all = self.records.domains().await?;
        let known = all.into_iter().map(|entry| entry.domain).find(|domain| {
            domain.hypervisor == *hypervisor
                && domain.control.as_ref().is_some_and(|control| control.address == address)
        });
        Ok(known.map(|domain| domain.name))
    }

    /// The domain whose disks are exactly `paths`. The files of its machine's state may be missing among
    /// them.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where only a part of them, or of its, are the same.
    pub(in crate::service) async fn owner_of(&self, paths: &[DiskAddress]) -> Result<Option<DomainName>> {
        let owners = self.records.owners(paths).await?;
        let Some((path, owner)) = owners.first() else {
            self.refuse_layers(paths).await?;
            return Ok(None);
        };
        let Some(entry) = self.records.find(owner).await? else { return Ok(None) };
        let is_given = |record: &DiskRecord| paths.contains(&record.disk.address);
        let may_miss = |record: &DiskRecord| self.is_machine_state(&record.disk.format);
        let same = owners.len() == paths.len()
            && owners.iter().all(|(_, other)| other == owner)
            && entry.domain.disks.iter().all(|record| is_given(record) || may_miss(record));
        if same {
            return Ok(Some(owner.clone()));
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the image {path} is a disk of domain {owner}, and the images given are not exactly its disks"
            ),
        )
        .state("no changes made")
        .advise(format!("name the domain {owner}, or all its images: {}", images_of(&entry.domain))))
    }

    /// Refuses an image that is, under any name, a layer of a domain of the catalogue. Otherwise it would
    /// have two owners that do not know of each other.
    async fn refuse_layers(&self, paths: &[DiskAddress]) -> Result<()> {
        let mut given = Vec::new();
        for path in paths {
            given.extend(identity_at(&self.registry, path).await?.map(|identity| (path, identity)));
        }
        for known in self.records.domains().await? {
            let domain = known.domain;
            for record in &domain.disks {
                let Ok(backend) = self.registry.serving(&record.disk) else { continue };
                for layer in &record.owned {
                    let address = backend.layer_address(record, layer);
                    // Storage that has none of the given images is not asked: it may be out of reach.
                    let scheme = |address: &DiskAddress| address.named().map(|(scheme, _)| scheme.to_owned());
                    if !given.iter().any(|(path, _)| scheme(path) == scheme(&address)) {
                        continue;
                    }
                    let Some(id) = identity_at(&self.registry, &address).await? else { continue };
                    if let Some((path, _)) = given.iter().find(|(_, other)| *other == id) {
                        return Err(Error::new(
                            ErrorKind::Refused,
                            format!(
                                "the image {path} is a layer of disk {} of domain {}",
                                record.disk.target, domain.name
                            ),
                        )
                        .state("no changes made")
                        .advise(format!(
                            "name the domain {}, or its image {}",
                            domain.name, record.disk.address
                        )));
                    }
                }
            }
        }
        Ok(())
    }
}
