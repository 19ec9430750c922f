//! The importer: makes a domain of disks that the catalogue does not have, from manifests beside them and
//! from the images themselves. It changes nothing: the result is an entry that the caller may record.
//!
//! It works in this order: *read* the manifests and match them with the disks; *identify* the domain (name,
//! hypervisor); *adopt* the disks; *restore* the snapshots that manifests describe; *discover* those that
//! only the images know; *assemble*.

mod adopt;
mod discover;
mod read;
mod recorded;
mod restore;

use std::sync::Arc;

use super::authority::{Authority, Leftovers, Manifests};
use super::images::images_of;
use super::records::Records;
use super::{BoxFuture, RecordedSnapshot};
use crate::address::DiskAddress;
use crate::catalogue::{Entry, Revision};
use crate::domain::{ActivePath, Disk, Domain, Hypervisor};
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::hypervisor::{Control, MemoryStore};
use crate::manifest::DomainManifest;
use crate::name::{DomainName, LayerName, SnapshotName};
use crate::registry::Registry;
use crate::snapshot::{SnapshotId, SnapshotTree};

pub(super) use discover::free_name;
pub(super) use read::name_of_images;
pub(super) use restore::point_problem;

use adopt::Adopted;
use read::{Identity, Matched};
use restore::Restored;

/// The outcome of an import.
pub(super) struct Imported {
    /// The domain as it would enter the catalogue.
    pub entry: Entry,
    /// Snapshots that came from manifests.
    pub restored: Vec<SnapshotName>,
    /// Snapshots that came from the images themselves.
    pub adopted: Vec<SnapshotName>,
    /// Messages: the parts that could not be imported, and why.
    pub notes: Vec<String>,
    /// Manifests that the caller must deal with.
    pub leftovers: Leftovers,
    /// The reason why the domain may be shown and not changed: manifests name files that only the user can
    /// confirm.
    pub unconfirmed: Option<Error>,
}

/// Disks to import, and the caller's knowledge of their domain.
pub(super) struct ImportSource {
    /// The domain's name; absent: its manifest's, or one made of its images' paths.
    pub name: Option<DomainName>,
    /// The domain's disks, with canonical paths.
    pub disks: Vec<Disk>,
    /// The hypervisor, where no manifest is used.
    pub hypervisor: Hypervisor,
    /// The connection to the domain, where no manifest is used.
    pub control: Option<Control>,
    /// The placement of active images, where no manifest is used.
    pub active_path: ActivePath,
    /// Set where the disks were only given by their paths, so that a manifest may give their targets and the
    /// domain's name.
    pub by_path: bool,
    /// The domain of the catalogue that has these disks: its snapshots keep their identities.
    pub known_as: Option<DomainName>,
    /// Set where layers and snapshots that other tools made become the domain's own, and a part of a
    /// manifest's disks stands for all of them. Otherwise only tags in the active images are imported.
    pub import: bool,
    /// Set where the user confirms the claims of manifests beyond the disks' own directory. These are how the
    /// domain is reached and started, and the places of its memory images and layers.
    pub trust: bool,
    /// The catalogue's entry of the domain: its content was confirmed before.
    pub known: Option<Entry>,
    /// Another program's records of snapshots.
    pub recorded: Vec<RecordedSnapshot>,
}

impl ImportSource {
    /// Images at rest of which nothing else is known.
    pub(super) fn of_images(disks: Vec<Disk>) -> Self {
        Self {
            name: None,
            disks,
            hypervisor: Hypervisor::NONE,
            control: None,
            active_path: ActivePath::Keep,
            by_path: true,
            known_as: None,
            import: false,
            trust: false,
            known: None,
            recorded: Vec::new(),
        }
    }

    /// The disks of a domain of the catalogue.
    pub(super) fn of_entry(entry: Entry) -> Self {
        let domain = entry.domain.clone();
        Self {
            name: Some(domain.name.clone()),
            disks: domain.disks.into_iter().map(|record| record.disk).collect(),
            hypervisor: domain.hypervisor,
            control: domain.control,
            active_path: domain.active_path,
            by_path: false,
            known_as: Some(domain.name),
            import: false,
            trust: false,
            known: Some(entry),
            recorded: Vec::new(),
        }
    }

    /// Returns true if the catalogue has the layer as the domain's own.
    fn owns(&self, address: &DiskAddress, layer: &LayerName) -> bool {
        self.known
            .iter()
            .flat_map(|entry| &entry.domain.disks)
            .any(|record| record.disk.address == *address && record.owned.contains(layer))
    }

    /// Returns true if the catalogue has the memory image as the snapshot's.
    fn has_memory(&self, snapshot: SnapshotId, image: &DiskAddress) -> bool {
        let known = self.known.as_ref().and_then(|entry| entry.tree.get(snapshot)?.memory.as_ref());
        known.is_some_and(|memory| memory.image == *image)
    }
}

/// Messages and leftovers of an import, gathered by its parts.
#[derive(Default)]
struct Report {
    notes: Vec<String>,
    leftovers: Leftovers,
    /// Memory images that only the user can confirm.
    unconfirmed: Vec<String>,
}

/// Makes a domain of disks.
#[derive(Clone)]
pub(super) struct Importer {
    records: Records,
    registry: Arc<Registry>,
    authority: Authority,
    /// The machine that imported domains are recorded for.
    host: Option<Host>,
}

impl Importer {
    /// The importer of a catalogue's service.
    pub(super) fn new(
        records: Records,
        registry: Arc<Registry>,
        authority: Authority,
        host: Option<Host>,
    ) -> Self {
        Self { records, registry, authority, host }
    }

    /// Imports disks: from the manifests beside them, and from the images themselves. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for images that manifests beside them call layers of a domain, or disks of
    /// another.
    pub(super) fn import(&self, source: ImportSource) -> BoxFuture<'_, Result<Imported>> {
        Box::pin(async move {
            let mut report = Report::default();
            let matched = self.read(source, &mut report).await?;
            let identity = self.identify(&matched, &mut report).await?;
            let adopted = self.adopt(&matched, &identity, &mut report).await?;
            let restored = self.restore(&matched, &identity, &adopted, &mut report).await?;
            self.assemble(matched, identity, adopted, restored, report).await
        })
    }

    /// Puts the parts together, with the snapshots that only the images know.
    async fn assemble(
        &self,
        matched: Matched,
        identity: Identity,
        mut adopted: Adopted,
        mut restored: Restored,
        report: Report,
    ) -> Result<Imported> {
        let Report { mut notes, mut leftovers, unconfirmed } = report;
        let orphans = matched.orphans(restored.names.len(), &leftovers);
        let earlier = match matched.source.recorded.is_empty() {
            true => Vec::new(),
            false => restored.take_imported(),
        };
        let Restored { mut snapshots, names: restored, current, machines } = restored;
        let known = discover::Known { snapshots: &snapshots, orphans: &orphans, earlier: &earlier };
        let found = self.discover(&mut adopted, &known, &matched.source).await?;
        notes.extend(found.notes);
        let newest = found.current.or(found.snapshots.last().map(|snapshot| snapshot.id));
        let discovered = discover::add(&mut snapshots, found.snapshots)?;
        let tree = SnapshotTree::new(snapshots);
        leftovers.renamed.extend(earlier.iter().map(|was| was.id).filter(|id| tree.get(*id).is_none()));
        let current = current.filter(|id| tree.get(*id).is_some());
        let current = current.or(if restored.is_empty() { newest } else { None });
        let Identity { name, unregistered, hypervisor, control, active_path, memory } = identity;
        let domain = Domain {
            name,
            unregistered,
            hypervisor,
            host: self.host.clone(),
            control,
            active_path,
            disks: adopted.records,
            current,
            machines,
            policy: matched.source.known.as_ref().and_then(|entry| entry.domain.policy.clone()),
        };
        let follows = matched.manifest().map(DomainManifest::stamp);
        let entry = Entry { domain, tree, revision: Revision::ABSENT, follows };
        let unconfirmed = (!unconfirmed.is_empty())
            .then(|| not_confirmed(&entry.domain, &matched.manifests, memory.as_deref(), &unconfirmed));
        Ok(Imported { entry, restored, adopted: discovered, notes, leftovers, unconfirmed })
    }
}

/// The refusal to change a domain whose manifests name memory images elsewhere.
fn not_confirmed(
    domain: &Domain,
    manifests: &Manifests,
    memory: Option<&dyn MemoryStore>,
    files: &[String],
) -> Error {
    let (place, images) = (manifests.place(), images_of(domain));
    let memory_place = memory.map_or(place, MemoryStore::place);
    let is_directory = memory.is_none_or(|memory| memory.directory().is_some());
    let kind = if is_directory { "directory" } else { "place" };
    Error::new(
        ErrorKind::Refused,
        format!(
            "the manifests in {place} say that memory images are outside of {memory_place}, the domain's {kind} \
             for them: {}",
            files.join(", ")
        ),
    )
    .state("no changes made")
    .advise(format!(
        "where that is so, confirm it: `domsnap import --trust {images}`; the manifests were written by whoever owns \
         the directory"
    ))
}
