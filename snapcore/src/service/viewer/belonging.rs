//! Finds the domain of a file.

use camino::Utf8Path;

use super::Viewer;
use crate::address::DiskAddress;
use crate::error::Result;
use crate::name::{LayerName, Target};
use crate::service::authority::{Manifests, layer_among};
use crate::service::images::file_id;
use crate::service::locator::Located;
use crate::service::{DomainRef, Listing};

/// The domain that has an image as a layer, from the catalogue, or else from the manifests beside the image.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Belonging {
    /// The domain, with its disks where the image is: manifests in a directory that was copied describe the
    /// copy. Its snapshots include states that reverts replaced, because an image may have these too.
    pub listing: Listing,
    /// The disk of the layer.
    pub target: Target,
    /// The layer.
    pub layer: LayerName,
}

impl Belonging {
    /// Returns true if the image is the one that the domain writes.
    pub fn is_active(&self) -> bool {
        self.listing.domain.disk(&self.target).is_some_and(|record| record.active == self.layer)
    }
}

impl Viewer {
    /// Lists a domain with all its records of snapshots, also those of states that reverts replaced.
    async fn list_all(&self, reference: &DomainRef) -> Result<Listing> {
        let Located { entry, catalogued, .. } = self.locator.locate(reference).await?;
        let unfinished = self.unfinished_of(&entry).await?;
        let snapshots = entry.tree.iter().cloned().collect();
        Ok(Listing { domain: entry.domain, catalogued, snapshots, previous: None, unfinished })
    }

    /// The domain that has `image` as a layer.
    pub(in crate::service) async fn belonging(&self, image: &Utf8Path) -> Result<Option<Belonging>> {
        if file_id(image).is_none() {
            return Ok(None);
        }
        let directory = image.parent().and_then(|parent| parent.canonicalize_utf8().ok());
        let address: &DiskAddress = &match (directory, image.file_name()) {
            (Some(directory), Some(name)) => directory.join(name).into(),
            _ => image.into(),
        };
        for summary in self.records.domains().await? {
            if let Some((record, layer)) = layer_among(&self.registry, address, &summary.domain.disks) {
                let target = record.disk.target.clone();
                let listing = self.list_all(&DomainRef::Name(summary.domain.name.clone())).await?;
                // A domain without snapshots is read again from its images, which may give the active layer
                // another name than the catalogue has.
                let is_active = layer == record.active;
                let now = listing.domain.disk(&target).filter(|_| is_active);
                let layer = now.map_or(layer, |now| now.active.clone());
                return Ok(Some(Belonging { listing, target, layer }));
            }
        }
        let Some(directory) = address.directory() else { return Ok(None) };
        for beside in self.authority.beside(directory).await? {
            let claimed = layer_among(&self.registry, address, &beside.records);
            let Some((record, layer)) = claimed else { continue };
            let target = record.disk.target.clone();
            let manifests: Manifests = std::sync::Arc::new(beside.manifests.clone());
            let found = self.authority.read(&manifests).await?;
            let mut domain = beside.manifest.domain;
            domain.disks = beside.records;
            let listing = Listing {
                domain,
                catalogued: false,
                snapshots: found.snapshots,
                previous: None,
                unfinished: Vec::new(),
            };
            return Ok(Some(Belonging { listing, target, layer }));
        }
        Ok(None)
    }
}
