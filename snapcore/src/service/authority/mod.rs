//! The authority: the manifests of a domain, and the decision between them and the catalogue.
//!
//! Manifests say which catalogue wrote them, at which revision, of which domain. They may be later than the
//! catalogue, or from another catalogue. Then the catalogue is an older copy of itself, or the same images
//! are used with a second one. Its layers may not be what it records, and nothing may be changed by its
//! records.
//!
//! A command asks for a domain's manifests once ([`Authority::manifests`]) and hands them on. So the domain's
//! own manifest is read once, and the command's writes are remembered ([`KnownManifests`]).

mod beside;
mod known;

use std::sync::Arc;

use super::images::images_of;
use super::records::Records;
use crate::catalogue::Entry;
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{Found, Item, ManifestStore};
use crate::name::DomainName;
use crate::registry::Registry;
use crate::snapshot::SnapshotId;

pub(super) use beside::{Beside, layer_among, records_at};
use known::KnownManifests;

/// The manifests of one domain, shared by the parts of one command.
pub(super) type Manifests = Arc<dyn ManifestStore>;

/// Manifests beside imported disks that the new entry's manifests do not replace.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Leftovers {
    /// Manifests that could not be used.
    pub left_out: Vec<Item>,
    /// Set where all of them together were refused.
    pub refused: bool,
    /// Snapshots that were imported under new identities.
    pub renamed: Vec<SnapshotId>,
}

impl Leftovers {
    /// Returns true if there were manifests that could not be used.
    pub(super) fn has_unused(&self) -> bool {
        self.refused || !self.left_out.is_empty()
    }
}

/// Reads and writes manifests, and decides if the catalogue is authoritative.
#[derive(Clone)]
pub(super) struct Authority {
    records: Records,
    registry: Arc<Registry>,
}

impl Authority {
    /// The authority on the domains of `records`.
    pub(super) fn new(records: Records, registry: Arc<Registry>) -> Self {
        Self { records, registry }
    }

    /// The manifests of a domain with these disks. Nothing is read yet.
    pub(super) fn manifests(&self, domain: &Domain) -> Result<Manifests> {
        let first = domain
            .disks
            .first()
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("domain {} has no disk", domain.name)))?;
        self.manifests_of_disk(&first.disk)
    }

    /// The manifests of a domain whose first disk is `disk`.
    pub(super) fn manifests_of_disk(&self, disk: &crate::domain::Disk) -> Result<Manifests> {
        Ok(Arc::new(KnownManifests::new(self.registry.serving(disk)?.manifests(disk))))
    }

    /// The reason why the catalogue is not authoritative for `entry`, if it is not.
    pub(super) async fn contradiction(&self, manifests: &Manifests, entry: &Entry) -> Result<Option<Error>> {
        let Some(catalogue) = self.records.identity().await? else { return Ok(None) };
        let reading = manifests.clone();
        let found = blocking(move || Ok(reading.domain())).await?;
        let Some(recorded) = found.filter(|recorded| !recorded.is_known_to(catalogue, entry)) else {
            return Ok(None);
        };
        let (name, place) = (&entry.domain.name, manifests.place());
        let message = if recorded.catalogue.is_some_and(|other| other != catalogue) {
            format!(
                "the manifests in {place} were written with another catalogue than this one: \
                 domain {name} was changed from another state directory"
            )
        } else if recorded.domain.name != *name {
            format!(
                "the manifests in {place} are of domain {}, and not of {name}: \
                 images of that domain were copied here",
                recorded.domain.name
            )
        } else {
            format!(
                "the manifests in {place} are of domain {name} at revision {}, and the catalogue knows it at \
                 revision {}: the catalogue is an older copy, as one brought back from a backup",
                recorded.revision.0, entry.revision.0
            )
        };
        Ok(Some(
            Error::new(ErrorKind::Refused, message)
                .state("its layers may not be what this catalogue takes them for; no changes made")
                .advise(format!(
                    "use the state directory that the domain was last changed from; or take what manifests and images \
                     contain in place of what this one has: `domsnap import --replace {}`",
                    images_of(&entry.domain)
                )),
        ))
    }

    /// Fails if the catalogue is not authoritative for `entry`.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], with what to do.
    pub(super) async fn require(&self, manifests: &Manifests, entry: &Entry) -> Result<()> {
        self.contradiction(manifests, entry).await?.map_or(Ok(()), Err)
    }

    /// Fails if the catalogue has the domain `name` and is not authoritative for it.
    ///
    /// # Errors
    /// The errors of [`Authority::require`].
    pub(super) async fn require_for(&self, name: &DomainName) -> Result<()> {
        match self.records.find(name).await? {
            Some(entry) => self.require(&self.manifests(&entry.domain)?, &entry).await,
            None => Ok(()),
        }
    }

    /// Reads all manifests of a domain.
    pub(super) async fn read(&self, manifests: &Manifests) -> Result<Found> {
        let manifests = manifests.clone();
        blocking(move || manifests.read()).await
    }

    /// Brings the manifests up to date where they are not. The caller knows that the catalogue is
    /// authoritative.
    pub(super) async fn write(&self, manifests: &Manifests, entry: &Entry) -> Result<()> {
        let catalogue = self.records.identity().await?;
        let (manifests, entry) = (manifests.clone(), entry.clone());
        blocking(move || {
            if manifests.is_current(catalogue, &entry) {
                return Ok(());
            }
            let catalogue = catalogue.ok_or_else(|| {
                Error::new(ErrorKind::Internal, "a catalogue without an identity has a domain")
            })?;
            manifests.write(catalogue, None, &entry)
        })
        .await
    }

    /// Makes the manifests that a domain was imported from this catalogue's own.
    pub(super) async fn take_over(
        &self,
        manifests: &Manifests,
        entry: &Entry,
        leftovers: &Leftovers,
    ) -> Result<()> {
        // 1) Those that could not be used get another name, so that writing does not lose their content.
        let (aside, items) = (manifests.clone(), leftovers.left_out.clone());
        blocking(move || aside.move_aside(&items)).await?;
        // 2) The domain's manifests are written, under the identities that its snapshots have now.
        self.write(manifests, entry).await?;
        // 3) Only then the manifests go whose snapshots have other identities: a crash before this leaves
        //    both, never neither.
        let (manifests, renamed) = (manifests.clone(), leftovers.renamed.clone());
        blocking(move || manifests.remove(&renamed)).await
    }

    /// Removes the manifests that this catalogue wrote of `entry`, whose manifests are in another place from
    /// now on.
    pub(super) async fn clear(&self, manifests: &Manifests, entry: Entry) -> Result<()> {
        let Some(catalogue) = self.records.identity().await? else { return Ok(()) };
        let manifests = manifests.clone();
        blocking(move || manifests.clear(catalogue, &entry)).await
    }
}

/// Runs work on manifests on a thread that may block.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|cause| {
        Error::new(ErrorKind::Internal, "the work on manifests ended early").because(cause)
    })?
}
