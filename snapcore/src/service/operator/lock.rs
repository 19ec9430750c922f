//! Locks domains.

use tokio_util::sync::CancellationToken;

use crate::catalogue::Lease;
use crate::error::Result;
use crate::service::DomainRef;
use crate::service::authority::{Authority, Manifests};
use crate::service::ledger::Ledger;
use crate::service::locator::{Located, Locator};
use crate::service::records::Records;

/// A domain with its lock.
pub(in crate::service) struct Locked {
    _lease: Lease,
    /// The domain as it is under the lock.
    pub(in crate::service) located: Located,
    /// Its manifests: the single value of them in this command.
    pub(in crate::service) manifests: Manifests,
}

/// Locks domains.
#[derive(Clone)]
pub(in crate::service) struct Locks {
    records: Records,
    ledger: Ledger,
    locator: Locator,
    authority: Authority,
}

impl Locks {
    /// The locks of a catalogue's domains.
    pub(in crate::service) fn new(
        records: Records,
        ledger: Ledger,
        locator: Locator,
        authority: Authority,
    ) -> Self {
        Self { records, ledger, locator, authority }
    }

    /// Locks the domain that a reference names, and returns it as it is under the lock.
    pub(in crate::service) async fn lock(
        &self,
        reference: &DomainRef,
        cancel: &CancellationToken,
    ) -> Result<Locked> {
        let (lease, located) = self.lock_records(reference, cancel).await?;
        let manifests = self.authority.manifests(&located.entry.domain)?;
        Ok(Locked { _lease: lease, located, manifests })
    }

    /// Locks like [`Locks::lock`], for commands that need no manifests: a domain whose backends are missing
    /// can be locked too.
    pub(in crate::service) async fn lock_records(
        &self,
        reference: &DomainRef,
        cancel: &CancellationToken,
    ) -> Result<(Lease, Located)> {
        let mut located = self.locator.locate(reference).await?;
        let name = located.entry.domain.name.clone();
        let lease = self.ledger.lease(&name, cancel).await?;
        if located.catalogued {
            // It may have changed before the lock was taken.
            located.entry = self.records.load(&name).await?;
        }
        Ok((lease, located))
    }
}
