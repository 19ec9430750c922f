//! Write access to the catalogue, for rooms that change it.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::neighbours::Neighbours;
use crate::catalogue::{Catalogue, Change, Entry, Lease, Revision};
use crate::error::Result;
use crate::name::DomainName;
use crate::snapshot::Snapshot;

/// The time for which a lease outlives a holder that died, where the catalogue cannot know that it died.
const LEASE_TIME: Duration = Duration::from_secs(30);

/// Takes leases and records changes.
#[derive(Clone)]
pub(super) struct Ledger {
    catalogue: Arc<dyn Catalogue>,
    neighbours: Neighbours,
}

impl Ledger {
    /// Write access to `catalogue`.
    pub(super) fn new(catalogue: Arc<dyn Catalogue>, neighbours: Neighbours) -> Self {
        Self { catalogue, neighbours }
    }

    /// The catalogue itself, for the engine's journal.
    pub(super) fn catalogue(&self) -> &dyn Catalogue {
        &*self.catalogue
    }

    /// Locks a domain. If the lease is lost, `cancel` is cancelled.
    pub(super) async fn lease(&self, name: &DomainName, cancel: &CancellationToken) -> Result<Lease> {
        let lease = self
            .lease_for_a_moment(name)
            .await
            .map_err(|error| error.context(format!("locking domain {name}")))?;
        let (lost, cancel) = (lease.lost().clone(), cancel.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = lost.cancelled() => cancel.cancel(),
                () = cancel.cancelled() => {}
            }
        });
        Ok(lease)
    }

    /// Locks a domain for one transaction.
    pub(super) async fn lease_for_a_moment(&self, name: &DomainName) -> Result<Lease> {
        let holder = format!("domsnap, process {}", std::process::id());
        self.catalogue.lease(name.as_str(), &holder, LEASE_TIME).await
    }

    /// Locks the runs of a domain's policy. The lock has a name that no domain can have.
    pub(super) async fn lease_of_policy(&self, name: &DomainName) -> Result<Lease> {
        let holder = format!("domsnap, process {}", std::process::id());
        self.catalogue.lease(&format!("the policy of {name}"), &holder, LEASE_TIME).await
    }

    /// Records changes of a domain that the catalogue has at `expected`.
    pub(super) async fn commit(
        &self,
        name: &DomainName,
        expected: Revision,
        changes: Vec<Change>,
    ) -> Result<Revision> {
        self.catalogue.commit(name, expected, changes).await
    }

    /// Puts an imported domain into the catalogue, which has it at `expected`. With `restart`, all earlier
    /// records of the domain are dropped, its journal too.
    pub(super) async fn put(&self, entry: &mut Entry, expected: Revision, restart: bool) -> Result<()> {
        let mut changes = if restart { vec![Change::RemoveDomain] } else { Vec::new() };
        changes.extend(self.changes_of(entry).await);
        entry.revision = self.commit(&entry.domain.name, expected, changes).await?;
        Ok(())
    }

    /// The changes that record an imported domain in the catalogue.
    pub(super) async fn changes_of(&self, entry: &Entry) -> Vec<Change> {
        let snapshots: Vec<Snapshot> = entry.tree.iter().cloned().collect();
        let mut changes = vec![Change::PutDomain(Box::new(entry.domain.clone()), snapshots)];
        changes.extend(entry.follows.map(Change::Follow));
        changes.extend(self.neighbours.record_bases(&entry.domain).await);
        changes
    }

    /// Records the bases that were read of other domains while a change was planned: they may be out of reach
    /// when the next one is. A domain in which another process works now records its bases by itself.
    pub(super) async fn record_neighbours(&self) {
        for (name, files) in self.neighbours.take_newer() {
            let recording = async {
                let _lease = self.lease_for_a_moment(&name).await?;
                match self.catalogue.load(&name).await? {
                    Some(entry) => {
                        let change = vec![Change::Bases(files)];
                        self.commit(&name, entry.revision, change).await.map(drop)
                    }
                    None => Ok(()),
                }
            };
            if let Err(error) = recording.await {
                tracing::debug!(%error, %name, "recording what a domain's images are backed by");
            }
        }
    }
}
