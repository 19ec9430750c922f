//! The catalogue: the domains, their snapshots, and the journal of the operations on them.
//!
//! The engine only knows [`Catalogue`], and no store. The crate `catalogue-sqlite` implements it on one
//! machine. The contract is made so that a store of a cluster (etcd) can implement it too. It needs no more
//! than compare-and-set of one domain's keys in one transaction, watches on them, and leases.

mod edit;
mod row;

use std::any::Any;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use futures_core::Stream;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use row::StepRow;

pub use crate::operation::{Operation, OperationId, OperationState, StepState};

use crate::address::DiskAddress;
use crate::domain::Domain;
use crate::error::Result;
use crate::name::DomainName;
use crate::snapshot::{Snapshot, SnapshotTree};
use crate::step::Edit;

/// Counter of the changes of a domain's records. Each transaction on a domain increases it. It never
/// decreases, as far as a holder of an older value can see, even if the domain is removed and registered
/// again in between.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision of a domain that is not in the catalogue.
    pub const ABSENT: Self = Self(0);
}

/// Identity of a catalogue: random, made with it, and never changed. A copy of a catalogue, such as its
/// backup, has the same identity.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct CatalogueId(#[schemars(with = "String")] pub Uuid);

impl CatalogueId {
    /// Makes a new identity.
    pub fn fresh() -> Self {
        Self(Uuid::new_v4())
    }
}

impl std::fmt::Display for CatalogueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Origin and age of a record of a domain. Manifests are marked with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stamp {
    /// The catalogue; absent in manifests from before catalogues had identities.
    pub catalogue: Option<CatalogueId>,
    /// The domain's revision in it.
    pub revision: Revision,
}

impl Stamp {
    /// Makes a stamp.
    pub fn new(catalogue: Option<CatalogueId>, revision: Revision) -> Self {
        Self { catalogue, revision }
    }
}

/// A domain, its snapshots, and the revision at which they were read.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Entry {
    /// The domain.
    pub domain: Domain,
    /// Its snapshots.
    pub tree: SnapshotTree,
    /// The revision at which this was read.
    pub revision: Revision,
    /// The stamp of the manifests from which the domain was imported, if it was. Until our manifests
    /// overwrite them, these are the ones beside the data.
    pub follows: Option<Stamp>,
}

impl Entry {
    /// Makes an entry that follows no manifests.
    pub fn new(domain: Domain, tree: SnapshotTree, revision: Revision) -> Self {
        Self { domain, tree, revision, follows: None }
    }

    /// Returns the machine that was recorded with the snapshot whose memory is in `image`.
    pub(crate) fn machine_with(&self, image: &DiskAddress) -> Option<&serde_json::Value> {
        let has_it =
            |snapshot: &&Snapshot| snapshot.memory.as_ref().is_some_and(|memory| memory.image == *image);
        let machine = self.tree.iter().find(has_it)?.machine.as_deref()?;
        self.domain.machine(machine).map(|machine| &machine.record)
    }
}

setters!(Entry {
    follows: Option<Stamp>,
});

/// A domain in the list of all.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct EntrySummary {
    /// The domain.
    pub domain: Domain,
    /// Number of its snapshots.
    pub snapshots: u64,
    /// True if the journal has an operation of it that has not ended.
    pub unfinished: bool,
    /// Files outside its own layers that backed its images when it was last recorded; absent: not recorded.
    pub bases: Option<Vec<DiskAddress>>,
}

impl EntrySummary {
    /// Makes the summary of a domain whose operations have ended.
    pub fn new(domain: Domain, snapshots: u64) -> Self {
        Self { domain, snapshots, unfinished: false, bases: None }
    }
}

setters!(EntrySummary {
    unfinished: bool,
    bases: Option<Vec<DiskAddress>>,
});

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// Sets the domain and its snapshots to exactly this. Its journal is kept.
    PutDomain(Box<Domain>, Vec<Snapshot>),
    /// Records that the domain was imported from manifests of this stamp. The entry keeps the stamp, and the
    /// domain's revision becomes greater than the one in it.
    Follow(Stamp),
    /// Records the files outside the domain's own layers that back its images, so that they are known even if
    /// the images cannot be read.
    Bases(Vec<DiskAddress>),
    /// Removes the domain, its snapshots and its journal from the catalogue.
    RemoveDomain,
    /// Changes the domain or its snapshots.
    Edit(Edit),
    /// Records an operation with all its steps.
    Begin(Box<Operation>),
    /// Sets the state of an operation; `error`, if given, is added to its errors.
    Operation(OperationId, OperationState, Option<String>),
    /// Records that every step before the commit point of an operation is done: its state becomes
    /// [`OperationState::Ready`], and these are the edits of its commit point, as they became in its course.
    Ready(OperationId, Vec<Edit>),
    /// Sets the state of a step of an operation.
    Step(OperationId, usize, StepState),
}

/// A stream of a domain's revisions.
pub type Revisions = Pin<Box<dyn Stream<Item = Revision> + Send>>;

/// A lease on a name. It is released when it is dropped.
pub struct Lease {
    lost: CancellationToken,
    _guard: Box<dyn Any + Send + Sync>,
}

impl Lease {
    /// Makes a lease that `guard` keeps, and that is lost when `lost` is cancelled.
    pub fn new(guard: impl Any + Send + Sync, lost: CancellationToken) -> Self {
        Self { lost, _guard: Box::new(guard) }
    }

    /// Returns a token that is cancelled if the lease was lost before its release: its store was unreachable
    /// for longer than its time to live. The holder must then stop before the commit point, and change
    /// nothing more.
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }
}

/// The store of domains, snapshots and the journal.
///
/// Every implementation fulfils this contract:
///
/// * **One domain, one transaction.** [`Catalogue::commit`] applies all its changes or none. When it returns
///   they are durable: they survive a power failure. A transaction never spans domains.
/// * **Compare and set.** A transaction names the revision that it expects. If the domain has another one, it
///   changes nothing and fails with [`crate::ErrorKind::Busy`]. A success returns the new revision,
///   which is greater.
/// * **Identities belong to a domain.** Snapshots of two domains may have the same identity, because an older
///   domsnap imported copies of a directory so. A change to one domain's snapshot never affects the other's.
/// * **Revisions order old and new.** They are written beside the data, together with the catalogue's
///   [`Catalogue::identity`]. So the revision of a domain that follows manifests is greater than theirs
///   ([`Change::Follow`]). If two catalogues describe the same data, the one with the greater revision is
///   newer.
/// * **A failure may hide a success.** A commit that fails with any other error may still have happened. A
///   caller that must know reads again.
/// * **Reads are consistent.** The result of a read was true at one instant. A read creates and changes
///   nothing.
/// * **Leases exclude.** Of all processes, at most one has the lease of a name while its `lost` is not
///   cancelled.
///
/// ```no_run
/// use std::time::Duration;
///
/// use snapcore::catalogue::{Catalogue, Change};
/// use snapcore::{DomainName, Edit, Error, ErrorKind, Result};
///
/// /// Forgets from which snapshot the current state of a domain derives.
/// async fn forget_current(catalogue: &dyn Catalogue, name: &DomainName) -> Result<()> {
///     let _lease = catalogue.lease(name.as_str(), "an example", Duration::from_secs(30)).await?;
///     let Some(entry) = catalogue.load(name).await? else {
///         return Err(Error::new(ErrorKind::NotFound, format!("there is no domain {name}")));
///     };
///     let changes = vec![Change::Edit(Edit::SetCurrent { id: None })];
///     // Fails, and changes nothing, if another process has changed the domain since it was read.
///     catalogue.commit(name, entry.revision, changes).await?;
///     Ok(())
/// }
/// ```
#[async_trait]
pub trait Catalogue: Send + Sync {
    /// The identity of this catalogue; `None` if nothing was ever recorded in it. It never changes.
    async fn identity(&self) -> Result<Option<CatalogueId>>;

    /// All domains, by name.
    async fn domains(&self) -> Result<Vec<EntrySummary>>;

    /// The domain of this name.
    async fn load(&self, name: &DomainName) -> Result<Option<Entry>>;

    /// Returns which of the disks belong to which domain.
    async fn owners(&self, disks: &[DiskAddress]) -> Result<Vec<(DiskAddress, DomainName)>>;

    /// The operations of a domain that have not ended, oldest first.
    async fn unfinished(&self, name: &DomainName) -> Result<Vec<Operation>>;

    /// The operations of a domain that the journal still has, oldest first: the last ones at least, and all
    /// that have not ended.
    async fn operations(&self, name: &DomainName) -> Result<Vec<Operation>>;

    /// One operation of a domain.
    async fn operation(&self, name: &DomainName, id: OperationId) -> Result<Option<Operation>>;

    /// Changes a domain.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] if the domain's revision is not `expected`;
    /// [`crate::ErrorKind::Exists`] if a disk belongs to another domain, or a snapshot's name is in
    /// use. Nothing was changed then.
    async fn commit(&self, name: &DomainName, expected: Revision, changes: Vec<Change>) -> Result<Revision>;

    /// Streams the domain's revisions, the current one first. Some revisions may be left out, but never the
    /// last. The stream only ends with the catalogue.
    async fn watch(&self, name: &DomainName) -> Result<Revisions>;

    /// Takes the lease called `name` for `holder`, a text for people, until it is dropped. If the holder
    /// dies, the lease ends by itself after `time_to_live` at the latest.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`], with the name of the holder.
    async fn lease(&self, name: &str, holder: &str, time_to_live: Duration) -> Result<Lease>;
}
