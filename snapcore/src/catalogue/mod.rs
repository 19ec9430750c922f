//! The catalogue: which domains there are, which snapshots they have, and the journal of what is being done to them.
//!
//! The engine knows [`Catalogue`] alone, and no store. The crate `catalogue-sqlite` fulfils it on one machine; the contract
//! is made so that a store of a cluster (etcd) can: it asks for no more than compare-and-set of one domain's keys in one
//! transaction, watching them, and leases.

mod edit;

use std::any::Any;
use std::pin::Pin;
use std::time::Duration;

use async_trait::async_trait;
use camino::Utf8PathBuf;
use futures_core::Stream;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub use edit::apply_edit;

use crate::{
    Domain, DomainName, Edit, Operation, OperationId, OperationState, Result, Snapshot, SnapshotTree,
    StepState,
};

/// How often a domain's records have changed. Each transaction on a domain makes it greater; it never goes back, not
/// even when the domain is removed and registered again in between, as far as a holder of the old value can see.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct Revision(pub u64);

impl Revision {
    /// The revision of a domain that the catalogue does not have.
    pub const ABSENT: Self = Self(0);
}

/// Which catalogue it is: random, made with it, and never changed. A copy of a catalogue, as a backup of it, has the
/// same one.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct CatalogueId(#[schemars(with = "String")] pub Uuid);

impl CatalogueId {
    /// A new one.
    pub fn fresh() -> Self {
        Self(Uuid::new_v4())
    }
}

impl std::fmt::Display for CatalogueId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Who said something about a domain, and when: what manifests are marked with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stamp {
    /// The catalogue; absent in manifests from before catalogues had identities.
    pub catalogue: Option<CatalogueId>,
    /// The domain's revision in it.
    pub revision: Revision,
}

/// A domain, its snapshots, and the revision at which they were read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The domain.
    pub domain: Domain,
    /// Its snapshots.
    pub tree: SnapshotTree,
    /// When this was so.
    pub revision: Revision,
    /// The manifests that the domain was taken from when it entered the catalogue, where it was: until ours are
    /// written over them, these are the ones beside the data.
    pub follows: Option<Stamp>,
}

/// A domain in the list of all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EntrySummary {
    /// The domain.
    pub domain: Domain,
    /// How many snapshots it has.
    pub snapshots: u64,
    /// Whether the journal has an operation of it that has not ended.
    pub unfinished: bool,
    /// What its images were backed by beside its own layers when it was recorded last; absent: not recorded.
    pub bases: Option<Vec<Utf8PathBuf>>,
}

/// One change of a transaction.
#[derive(Debug, Clone, PartialEq)]
pub enum Change {
    /// The domain is exactly this, with exactly these snapshots. Its journal stays.
    PutDomain(Box<Domain>, Vec<Snapshot>),
    /// The domain was taken from manifests of this stamp: it is the entry's from now on, and the domain's revision
    /// becomes greater than the one in it.
    Follow(Stamp),
    /// The domain's images are backed by these files beside its own layers: known also where the images cannot be read.
    Bases(Vec<Utf8PathBuf>),
    /// The catalogue forgets the domain, its snapshots and its journal.
    RemoveDomain,
    /// The domain or its snapshots change.
    Edit(Edit),
    /// An operation and all its steps are recorded.
    Begin(Box<Operation>),
    /// An operation is in this state; `error`, where given, is added to its errors.
    Operation(OperationId, OperationState, Option<String>),
    /// A step of an operation is in this state.
    Step(OperationId, usize, StepState),
}

/// A stream of a domain's revisions.
pub type Revisions = Pin<Box<dyn Stream<Item = Revision> + Send>>;

/// A lease that is held: given back when it is dropped.
pub struct Lease {
    lost: CancellationToken,
    _guard: Box<dyn Any + Send + Sync>,
}

impl Lease {
    /// A lease that `guard` keeps, and that is lost when `lost` is cancelled.
    pub fn new(guard: impl Any + Send + Sync, lost: CancellationToken) -> Self {
        Self { lost, _guard: Box::new(guard) }
    }

    /// Is cancelled when the lease was lost before it was given back: its store could not be reached for longer than
    /// its time to live. Whoever holds it must then stop before the commit point, and change nothing more.
    pub fn lost(&self) -> &CancellationToken {
        &self.lost
    }
}

/// Where domains, snapshots and the journal are kept.
///
/// The contract that every implementation fulfils:
///
/// * **One domain, one transaction.** [`Catalogue::commit`] applies all its changes or none, and when it returns
///   they are durable: they outlive a power failure. A transaction never spans domains.
/// * **Compare and set.** It names the revision that it expects. Where the domain's is another it changes nothing
///   and fails with [`crate::ErrorKind::Busy`]. A success gives the new revision, which is greater.
/// * **Identities are of a domain.** Snapshots of two domains may have one identity, as where an older domsnap took in
///   a copy of a directory: what is done to one domain's never touches the other's.
/// * **Revisions tell old from new.** Together with the catalogue's [`Catalogue::identity`] they are written beside the
///   data. So the revision of a domain that follows manifests is greater than theirs ([`Change::Follow`]): of two
///   catalogues that tell of the same data, the greater revision is the later word.
/// * **A failure may hide a success.** A commit that fails with any other error may still have happened; whoever
///   must know reads again.
/// * **Reads are whole.** What a read returns was true at one instant, and makes or changes nothing.
/// * **Leases exclude.** Of all processes, one at most holds the lease of a name, as long as its `lost` is not
///   cancelled.
#[async_trait]
pub trait Catalogue: Send + Sync {
    /// Which catalogue this is; nothing where nothing was ever recorded in it. Once it has one it keeps it.
    async fn identity(&self) -> Result<Option<CatalogueId>>;

    /// All domains, by name.
    async fn domains(&self) -> Result<Vec<EntrySummary>>;

    /// The domain of this name.
    async fn load(&self, name: &DomainName) -> Result<Option<Entry>>;

    /// Which of the disk paths belong to which domain.
    async fn owners(&self, paths: &[Utf8PathBuf]) -> Result<Vec<(Utf8PathBuf, DomainName)>>;

    /// The operations of a domain that have not ended, oldest first.
    async fn unfinished(&self, name: &DomainName) -> Result<Vec<Operation>>;

    /// One operation of a domain.
    async fn operation(&self, name: &DomainName, id: OperationId) -> Result<Option<Operation>>;

    /// Changes a domain.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`] where the domain's revision is not `expected`; [`crate::ErrorKind::Exists`] where
    /// a disk belongs to another domain, or a snapshot's name is taken. Nothing was changed then.
    async fn commit(&self, name: &DomainName, expected: Revision, changes: Vec<Change>) -> Result<Revision>;

    /// The domain's revisions from now on. Revisions may be left out, the last one never; the present one comes
    /// first. Ends only with the catalogue.
    async fn watch(&self, name: &DomainName) -> Result<Revisions>;

    /// Takes the lease called `name` for `holder`, a text for people, and keeps it until it is dropped. Where the
    /// holder dies it ends by itself: after `time_to_live` at the latest.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`], naming who holds it.
    async fn lease(&self, name: &str, holder: &str, time_to_live: Duration) -> Result<Lease>;
}
