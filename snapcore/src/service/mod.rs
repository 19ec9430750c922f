//! The service: what a program that embeds domsnap calls, and the command line is made of.

mod reference;
mod report;

use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use tokio_util::sync::CancellationToken;

pub use reference::{DomainRef, DomainSpec};
pub use report::{
    Details, DiskReport, DomainSummary, ImportReport, Listing, Member, Outcome, Postponed, RecoveryEnd,
    RecoveryReport, Removal, Unfinished,
};

use crate::{
    CreateRequest, DeleteRequest, Domain, DomainName, Error, ErrorKind, EventStream, Events, Finding, Plan,
    Registry, Request, Result, RevertRequest, SnapshotName,
};

/// The directory where catalogue, journal and locks live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StateDir(Utf8PathBuf);

impl StateDir {
    /// `path`, which is made when something is first written.
    pub fn new(path: impl Into<Utf8PathBuf>) -> Self {
        Self(path.into())
    }

    /// Where it is.
    pub fn path(&self) -> &Utf8Path {
        &self.0
    }
}

/// How an import goes.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ImportOptions {
    /// The name that the domain is to have; absent: the one that its manifests tell, or one made of its first
    /// image's.
    pub name: Option<DomainName>,
    /// Replace what the catalogue has of the domain.
    pub replace: bool,
}

impl ImportOptions {
    /// Registers the domain under `name`.
    #[must_use]
    pub fn name(mut self, name: DomainName) -> Self {
        self.name = Some(name);
        self
    }

    /// Replaces what the catalogue has of the domain.
    #[must_use]
    pub fn replace(mut self) -> Self {
        self.replace = true;
        self
    }
}

/// Snapshots of domains. Cheap to clone; may be used from many tasks at once.
#[derive(Clone)]
pub struct Domsnap {
    inner: Arc<Inner>,
}

struct Inner {
    state: StateDir,
    registry: Registry,
    events: Events,
}

fn soon<T>() -> Result<T> {
    Err(Error::new(ErrorKind::Internal, "the service is being built"))
}

impl Domsnap {
    /// The service on a state directory. Nothing is read or made yet: a command that only reads works without a
    /// state directory, and makes none.
    pub fn open(state: StateDir, registry: Registry) -> Self {
        Self { inner: Arc::new(Inner { state, registry, events: Events::default() }) }
    }

    /// The backends that it was opened with.
    pub fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    /// The state directory that it was opened with.
    pub fn state_dir(&self) -> &StateDir {
        &self.inner.state
    }

    /// Everything that happens from now on.
    pub fn events(&self) -> EventStream {
        self.inner.events.subscribe()
    }

    /// A free name for a snapshot of `domain`, made from the time: `2026-11-22T10:00:00Z`.
    pub async fn default_name(&self, _domain: &DomainRef) -> Result<SnapshotName> {
        soon()
    }

    /// Registers a domain.
    pub async fn domain_add(&self, _spec: &DomainSpec) -> Result<ImportReport> {
        soon()
    }

    /// Takes a domain out of the catalogue. Its images, snapshots and manifests stay as they are, and an import
    /// brings it back.
    pub async fn domain_remove(&self, _domain: &DomainRef) -> Result<Removal> {
        soon()
    }

    /// All domains that the catalogue has.
    pub async fn domains(&self) -> Result<Vec<DomainSummary>> {
        soon()
    }

    /// The domain that is meant.
    pub async fn resolve(&self, _domain: &DomainRef) -> Result<Domain> {
        soon()
    }

    /// What `request` would do. Changes nothing and needs no lock.
    pub async fn plan(&self, _domain: &DomainRef, _request: &Request) -> Result<Plan> {
        soon()
    }

    /// Takes a snapshot.
    pub async fn create(
        &self,
        _domain: &DomainRef,
        _request: CreateRequest,
        _cancel: CancellationToken,
    ) -> Result<Outcome> {
        soon()
    }

    /// Returns to a snapshot.
    pub async fn revert(
        &self,
        _domain: &DomainRef,
        _request: RevertRequest,
        _cancel: CancellationToken,
    ) -> Result<Outcome> {
        soon()
    }

    /// Deletes snapshots.
    pub async fn delete(
        &self,
        _domain: &DomainRef,
        _request: DeleteRequest,
        _cancel: CancellationToken,
    ) -> Result<Outcome> {
        soon()
    }

    /// Merges and removes layers that nothing needs any more.
    pub async fn tidy(&self, _domain: &DomainRef, _cancel: CancellationToken) -> Result<Outcome> {
        soon()
    }

    /// The domain and its snapshots, from the catalogue alone where it has the domain.
    pub async fn list(&self, _domain: &DomainRef) -> Result<Listing> {
        soon()
    }

    /// One snapshot in full, with sizes read from the images.
    pub async fn show(&self, _domain: &DomainRef, _name: &SnapshotName) -> Result<Details> {
        soon()
    }

    /// Each disk as it is on the machine.
    pub async fn inspect(&self, _domain: &DomainRef) -> Result<Vec<DiskReport>> {
        soon()
    }

    /// Looks for damage: in the images, and between catalogue, manifests and images. Changes nothing.
    pub async fn check(&self, _domain: &DomainRef) -> Result<Vec<Finding>> {
        soon()
    }

    /// Finishes or undoes what stopped half way, in one domain or in all, and merges what was put off.
    pub async fn recover(
        &self,
        _domain: Option<&DomainRef>,
        _cancel: CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        soon()
    }

    /// Rebuilds the catalogue of a domain from the manifests beside its images, and adopts the snapshots that the
    /// images themselves know.
    pub async fn import(&self, _domain: &DomainRef, _options: ImportOptions) -> Result<ImportReport> {
        soon()
    }
}
