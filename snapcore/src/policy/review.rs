//! What a run of a policy would do now: the rules applied to a domain as it is.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::period::is_due;
use super::retention::{Candidate, KeepReason, PruneReason, Verdict, decide};
use super::spec::{Policy, PolicyId, Span};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::name::{DomainName, SnapshotName};
use crate::plan::DiskInput;
use crate::shell::shell_command;
use crate::snapshot::{Snapshot, SnapshotId, SnapshotTree};

/// A snapshot, and what the policy does with it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct ReviewedSnapshot {
    /// Its identity.
    pub id: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
    /// Its time.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// Why it stays; empty where it is pruned.
    pub keep: Vec<KeepReason>,
    /// Why it is pruned; absent where it stays.
    pub prune: Option<PruneReason>,
}

/// What a run of the policy would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct PolicyReview {
    /// The domain.
    pub domain: DomainName,
    /// Its policy.
    pub policy: Policy,
    /// The snapshot because of which none is due: the newest of this period. Absent: one is due.
    pub has: Option<SnapshotName>,
    /// All snapshots of the domain, oldest first.
    pub snapshots: Vec<ReviewedSnapshot>,
    /// Snapshots of the policy that are dated in the future: the clock was set back.
    pub future: Vec<SnapshotName>,
    /// The name of the snapshot that would be taken before, where one is due and `snapshots` counts it. It
    /// is not among them.
    pub planned: Option<SnapshotName>,
}

impl PolicyReview {
    /// The snapshots that are pruned, oldest first.
    pub fn pruned(&self) -> impl Iterator<Item = &ReviewedSnapshot> {
        self.snapshots.iter().filter(|snapshot| snapshot.prune.is_some())
    }
}

/// The time at which a snapshot was made. That is the recorded one, except where that is dated in the
/// future: then its identity has the time that the clock showed.
fn made(snapshot: &Snapshot, now: Timestamp) -> Timestamp {
    let by_identity = snapshot.id.0.get_timestamp().and_then(|time| {
        let (seconds, nanoseconds) = time.to_unix();
        Timestamp::new(i64::try_from(seconds).ok()?, i32::try_from(nanoseconds).ok()?).ok()
    });
    match by_identity {
        Some(time) if snapshot.created > now => time,
        _ => snapshot.created,
    }
}

/// The snapshots that the policy `id` took, oldest first.
fn own(tree: &SnapshotTree, id: PolicyId) -> impl Iterator<Item = &Snapshot> {
    tree.taken().filter(move |snapshot| snapshot.policy == Some(id))
}

/// The policy of a domain.
///
/// # Errors
/// [`ErrorKind::NotFound`] where it has none.
pub(crate) fn policy_of(domain: &Domain) -> Result<&Policy> {
    domain.policy.as_ref().ok_or_else(|| {
        let install = ["domsnap", "policy", "install", domain.name.as_str(), "--file", "FILE"];
        Error::new(ErrorKind::NotFound, format!("domain {} has no policy", domain.name))
            .state("no changes made")
            .advise(format!("write [policy] into a domain file, and run `{}`", shell_command(install)))
    })
}

/// Returns `wanted`, or with a number after it where a snapshot has that name.
///
/// # Errors
/// [`ErrorKind::Exists`] where so many names are taken that none was found.
fn free_name(wanted: &SnapshotName, tree: &SnapshotTree) -> Result<SnapshotName> {
    let is_free = |name: &SnapshotName| !tree.iter().any(|snapshot| snapshot.name == *name);
    let numbered = (2..1000_u32).filter_map(|number| SnapshotName::new(format!("{wanted}-{number}")).ok());
    std::iter::once(wanted.clone()).chain(numbered).find(is_free).ok_or_else(|| {
        Error::new(ErrorKind::Exists, format!("there is a snapshot {wanted} already, and many like it"))
            .state("no changes made")
            .advise("give the policy another `name`")
    })
}

/// The snapshot of the policy `id` because of which none is due at `now`: the newest of this period.
///
/// # Errors
/// [`ErrorKind::Refused`] where the domain's policy is another one by now; the errors of a policy that this
/// machine cannot follow.
pub(crate) fn has_of_period(
    domain: &Domain,
    tree: &SnapshotTree,
    id: PolicyId,
    now: Timestamp,
) -> Result<Option<SnapshotName>> {
    let policy = policy_of(domain)?;
    if policy.id != id {
        return Err(Error::new(ErrorKind::Refused, format!("domain {} has another policy now", domain.name))
            .state("no changes made")
            .advise("run the policy again"));
    }
    let (every, zone) = (policy.spec.every()?, policy.spec.zone()?);
    let newest = own(tree, id).filter(|one| !is_due(every, &zone, now, [made(one, now)])).last();
    Ok(newest.map(|snapshot| snapshot.name.clone()))
}

/// The newest snapshot of the policy `id`.
pub(crate) fn newest_of(tree: &SnapshotTree, id: PolicyId) -> Option<&Snapshot> {
    own(tree, id).last()
}

/// Applies the policy of `domain`, whose disks are `disks`, at the time `now`. With `planned`, as if a
/// snapshot that is due had been taken before.
///
/// # Errors
/// [`ErrorKind::NotFound`] where it has none; the errors of a policy that this machine cannot follow.
pub(crate) fn review(
    domain: &Domain,
    tree: &SnapshotTree,
    disks: &[DiskInput],
    now: Timestamp,
    planned: bool,
) -> Result<PolicyReview> {
    let policy = policy_of(domain)?;
    let has = has_of_period(domain, tree, policy.id, now)?;
    let planned = match planned && has.is_none() {
        true => Some(free_name(&policy.name_at(now)?, tree)?),
        false => None,
    };
    let is_cloned = |snapshot: &Snapshot| {
        disks.iter().any(|disk| {
            let member = snapshot.point(&disk.record.disk.target);
            // The image of a clone is backed by a layer as a whole, never by a snapshot inside one.
            let layer = member.filter(|member| member.point.tag.is_none());
            layer
                .and_then(|member| disk.state.layer(&member.point.layer))
                .is_some_and(|layer| !layer.dependents.is_empty())
        })
    };
    let mut candidates: Vec<Candidate> = tree
        .taken()
        .map(|snapshot| {
            let own = snapshot.policy == Some(policy.id);
            Candidate::new(snapshot.id, snapshot.created)
                .own(own)
                .held(own && snapshot.active_holds(now).next().is_some())
                .cloned(own && is_cloned(snapshot))
                .current(planned.is_none() && domain.current == Some(snapshot.id))
                .expires(snapshot.expires)
        })
        .collect();
    if planned.is_some() {
        let newest = newest_of(tree, policy.id).map(|newest| Span::of_seconds(1).after(newest.created));
        let created = newest.map_or(now, |newest| newest.max(now));
        candidates.push(Candidate::new(SnapshotId::fresh(), created).own(true).current(true));
    }
    let verdicts = decide(&policy.spec.rules(), &policy.spec.zone()?, now, &candidates);
    let snapshots = tree.taken().zip(verdicts).map(|(snapshot, verdict)| {
        let (keep, prune) = match verdict {
            Verdict::Keep(reasons) => (reasons, None),
            Verdict::Prune(reason) => (Vec::new(), Some(reason)),
        };
        ReviewedSnapshot {
            id: snapshot.id,
            name: snapshot.name.clone(),
            created: snapshot.created,
            keep,
            prune,
        }
    });
    let future = own(tree, policy.id).filter(|snapshot| snapshot.created > now);
    Ok(PolicyReview {
        domain: domain.name.clone(),
        policy: policy.clone(),
        has,
        snapshots: snapshots.collect(),
        future: future.map(|snapshot| snapshot.name.clone()).collect(),
        planned,
    })
}
