//! Manifests: the catalogue's knowledge of a domain, kept beside its data, so that the catalogue can be lost.
//!
//! A [`ManifestStore`] keeps those of one domain: one of the domain itself, and one for each snapshot. Each
//! says which catalogue wrote it, and at which revision. A [`ManifestDirectory`] keeps them as files in a
//! directory beside the first disk. A backend whose disks are no files has a store of its own
//! ([`DiskSnapshotter::manifests`](crate::backend::DiskSnapshotter::manifests)).
//!
//! **Ownership.** A catalogue removes a manifest only of a snapshot that it deleted itself: one that it
//! wrote, and no longer has. Others stay; when a domain is imported, those that could not be used are saved
//! under another name ([`ManifestStore::move_aside`]). [`DomainManifest::is_known_to`] decides, before an
//! operation begins, if the domain's manifest may be overwritten.

mod directory;

use std::collections::HashMap;

use camino::Utf8Path;
use serde::{Deserialize, Serialize};

pub use directory::ManifestDirectory;

use crate::catalogue::{CatalogueId, Entry, Revision, Stamp};
use crate::domain::Domain;
use crate::error::Result;
use crate::snapshot::{Snapshot, SnapshotId};

/// The manifests of one domain.
///
/// All methods block. **Order:** the domain's manifest represents all of them, so it is written last, and
/// removed first. A method's writes and removals are durable when it returns. Nothing in a manifest is
/// authoritative: an implementation checks every name that it reads ([`Domain::check_names`],
/// [`Snapshot::check_names`]).
///
/// ```
/// use snapcore::manifest::{ManifestDirectory, ManifestStore};
///
/// let store = ManifestDirectory::new("/vm/web/root.img.domsnap");
/// assert_eq!(store.place(), "/vm/web/root.img.domsnap");
/// if store.domain().is_none() {
///     println!("no catalogue has written a sound manifest there");
/// }
/// ```
pub trait ManifestStore: Send + Sync + std::fmt::Debug {
    /// The place of the manifests, for people.
    fn place(&self) -> &str;

    /// The directory that they are in, where they are files of this machine.
    fn directory(&self) -> Option<&Utf8Path>;

    /// The place of one manifest, for people.
    fn shown(&self, item: Item) -> String;

    /// Returns true if there is a manifest of a snapshot, sound or not.
    fn has(&self, snapshot: SnapshotId) -> bool;

    /// Returns true if there is certainly no manifest of this domain, not even an unfinished one.
    fn is_empty(&self) -> bool;

    /// The domain's manifest, where there is a sound one: it says which catalogue wrote last, and which
    /// revision all of them represent.
    fn domain(&self) -> Option<DomainManifest>;

    /// Reads all manifests. One that is damaged is a problem of its own and stops nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io) where there are some that cannot be read.
    fn read(&self) -> Result<Found>;

    /// Makes the manifests say the same as `after` of `catalogue`. Where `before` is given, they are known to
    /// represent it, and only differences are written. Where nothing is left to say, all of them go.
    /// Manifests of snapshots that `catalogue` never knew stay.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io),
    /// [`ErrorKind::NoSpace`](crate::ErrorKind::NoSpace); they may then be half written, and are known
    /// as such.
    fn write(&self, catalogue: CatalogueId, before: Option<&Entry>, after: &Entry) -> Result<()>;

    /// Removes the manifests of `snapshots`.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    fn remove(&self, snapshots: &[SnapshotId]) -> Result<()>;

    /// Removes the manifests that `catalogue` wrote of `entry`, whose manifests are elsewhere from now on.
    /// Manifests of another catalogue stay.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    fn clear(&self, catalogue: CatalogueId, entry: &Entry) -> Result<()>;

    /// Gives manifests a name under which they are kept and not read again. A missing manifest is ignored.
    ///
    /// # Errors
    /// [`ErrorKind::Io`](crate::ErrorKind::Io).
    fn move_aside(&self, items: &[Item]) -> Result<()>;

    /// Returns true where no manifest can exist. None is read there either, so a delete need not wait for its
    /// removal.
    fn have_no_place(&self) -> bool;

    /// Returns true if the manifests say the same as `entry` of `catalogue`. A catalogue without an identity
    /// never wrote any.
    fn is_current(&self, catalogue: Option<CatalogueId>, entry: &Entry) -> bool {
        match self.domain() {
            Some(manifest) => {
                catalogue.is_some()
                    && manifest.stamp() == Stamp { catalogue, revision: entry.revision }
                    && manifest.domain.name == entry.domain.name
            }
            None => !entry.needs_manifests() && self.is_empty(),
        }
    }
}

/// The content of a domain's manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DomainManifest {
    /// The catalogue that wrote it; absent where an older domsnap did, whose catalogues had no identity.
    #[serde(default)]
    pub catalogue: Option<CatalogueId>,
    /// The catalogue's revision when it was written.
    pub revision: Revision,
    /// The number of the domain's snapshots: with fewer manifests, some are missing.
    #[serde(default)]
    pub snapshots: Option<u64>,
    /// The domain.
    #[serde(flatten)]
    pub domain: Domain,
}

impl DomainManifest {
    /// The manifest of `entry`, written by `catalogue`.
    pub fn of(catalogue: CatalogueId, entry: &Entry) -> Self {
        Self {
            catalogue: Some(catalogue),
            revision: entry.revision,
            snapshots: Some(entry.tree.len() as u64),
            // A policy has commands, and no manifest is an authority for what is run.
            domain: entry.domain.clone().policy(None),
        }
    }

    /// The catalogue that wrote it, and its revision then.
    pub fn stamp(&self) -> Stamp {
        Stamp { catalogue: self.catalogue, revision: self.revision }
    }

    /// Returns true if `entry` of `catalogue` has all that this manifest says. Then it was written from the
    /// entry as it is or as it was before, or the entry was imported from it. Otherwise the catalogue is
    /// stale, or the manifest belongs to another catalogue.
    pub fn is_known_to(&self, catalogue: CatalogueId, entry: &Entry) -> bool {
        let own = self.catalogue.is_none_or(|wrote| wrote == catalogue)
            && self.domain.name == entry.domain.name
            && self.revision <= entry.revision;
        own || entry
            .follows
            .is_some_and(|taken| taken.catalogue == self.catalogue && self.revision <= taken.revision)
    }
}

/// One manifest of a domain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Item {
    /// The domain's own.
    Domain,
    /// The manifest of a snapshot.
    Snapshot(SnapshotId),
}

/// A manifest that was refused.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Problem {
    /// The manifest; absent where all of them are refused together.
    pub item: Option<Item>,
    /// Its place, for people.
    pub place: String,
    /// The reason, as a message.
    pub why: String,
}

impl Problem {
    /// Makes a problem of all manifests.
    pub fn new(place: impl Into<String>, why: impl Into<String>) -> Self {
        Self { place: place.into(), why: why.into(), item: None }
    }
}

setters!(Problem {
    item: Option<Item>,
});

/// All manifests of a domain.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct Found {
    /// The domain; absent where there is no sound manifest of it.
    pub domain: Option<DomainManifest>,
    /// The snapshots of all sound manifests.
    pub snapshots: Vec<Snapshot>,
    /// The catalogue that wrote the manifest of a snapshot, where it says so.
    pub written: HashMap<SnapshotId, Stamp>,
    /// Manifests that were refused.
    pub problems: Vec<Problem>,
}

setters!(Found {
    domain: Option<DomainManifest>,
    snapshots: Vec<Snapshot>,
    written: HashMap<SnapshotId, Stamp>,
    problems: Vec<Problem>,
});

impl Found {
    /// Returns true if `catalogue`, which is at `revision` now, wrote the manifest of `snapshot`.
    pub fn is_by(&self, snapshot: SnapshotId, catalogue: CatalogueId, revision: Revision) -> bool {
        self.written
            .get(&snapshot)
            .is_some_and(|stamp| stamp.catalogue == Some(catalogue) && stamp.revision <= revision)
    }
}

impl Entry {
    /// Returns true if it has anything that the images themselves do not show, so that it needs manifests.
    pub fn needs_manifests(&self) -> bool {
        !self.tree.is_empty() || self.domain.disks.iter().any(|record| record.owned.len() > 1)
    }
}
