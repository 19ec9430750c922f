//! Records the policies of domains.

use tokio_util::sync::CancellationToken;

use super::{Registrar, not_catalogued};
use crate::catalogue::{Change, Entry, Lease};
use crate::error::{Error, ErrorKind, Result};
use crate::policy::{Policy, PolicyId, PolicySpec};
use crate::service::locator::Located;
use crate::service::{DomainRef, PolicyChange};
use crate::snapshot::Snapshot;

impl Registrar {
    /// Records the policy of a domain, or takes it away. Only records change. An operation that was
    /// interrupted does not matter: its plan has all that it needs.
    pub(in crate::service) async fn set_policy(
        &self,
        reference: DomainRef,
        spec: Option<PolicySpec>,
        adopt: bool,
        cancel: CancellationToken,
    ) -> Result<PolicyChange> {
        if let Some(spec) = &spec {
            spec.check()?;
        }
        let (_lease, located) = self.locks.lock_records(&reference, &cancel).await?;
        let Located { mut entry, catalogued, .. } = located;
        require_registered(&entry, catalogued, &reference)?;
        let before = entry.domain.policy.take();
        entry.domain.policy = spec.map(|spec| Policy::new(id_for(&entry, before.as_ref(), adopt), spec));
        if entry.domain.policy != before {
            let snapshots = entry.tree.iter().cloned().collect();
            let put = Change::PutDomain(Box::new(entry.domain.clone()), snapshots);
            entry.revision = self.ledger.commit(&entry.domain.name, entry.revision, vec![put]).await?;
            // The manifests do not have the policy, but they say of which revision they are.
            let manifests = self.authority.manifests(&entry.domain)?;
            if let Err(error) = self.authority.write(&manifests, &entry).await {
                self.warn(&entry, &error);
            }
        }
        let id = entry.domain.policy.as_ref().or(before.as_ref()).map(|policy| policy.id);
        let by_policy = |of: bool| {
            let by = entry.tree.taken().filter(move |one| one.policy.is_some() && (one.policy == id) == of);
            by.map(|snapshot| snapshot.name.clone()).collect()
        };
        let (own, others) = (by_policy(true), by_policy(false));
        Ok(PolicyChange {
            domain: entry.domain.name.clone(),
            policy: entry.domain.policy,
            before,
            own,
            others,
        })
    }

    /// Locks the runs of a domain's policy. A domain's name has no blanks, so no domain's lock has this name.
    pub(in crate::service) async fn policy_turn(&self, reference: &DomainRef) -> Result<Lease> {
        let Located { entry, catalogued, .. } = self.locator.locate(reference).await?;
        require_registered(&entry, catalogued, reference)?;
        self.ledger.lease_of_policy(&entry.domain.name).await
    }
}

fn require_registered(entry: &Entry, catalogued: bool, reference: &DomainRef) -> Result<()> {
    match (catalogued, entry.domain.unregistered) {
        (false, _) => Err(not_catalogued(reference)),
        (true, false) => Ok(()),
        (true, true) => Err(Error::new(
            ErrorKind::Refused,
            format!("domain {} was never registered: a policy needs a name that stays", entry.domain.name),
        )
        .state("no changes made")
        .advise("register it with `domsnap domain add NAME --disk TARGET=PATH`")),
    }
}

/// The identity of a policy that is recorded now.
fn id_for(entry: &Entry, before: Option<&Policy>, adopt: bool) -> PolicyId {
    let by_policy = |snapshot: &&Snapshot| snapshot.policy.is_some();
    let newest = entry.tree.taken().filter(by_policy).last().and_then(|snapshot| snapshot.policy);
    match (before, newest) {
        (Some(before), _) => before.id,
        (None, Some(newest)) if adopt => newest,
        (None, _) => PolicyId::fresh(),
    }
}
