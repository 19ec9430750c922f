//! Groups: operations of several domains that happen in all of them, or in none.

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::name::DomainName;
use crate::operation::OperationId;

/// The most domains of one group.
pub(crate) const MOST_DOMAINS: usize = 256;

/// The identity of a group of snapshots that were taken at one instant.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct GroupId(#[schemars(with = "String")] pub Uuid);

impl GroupId {
    /// Makes a new identity.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }
}

impl std::fmt::Display for GroupId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// The group to which a snapshot belongs, as recorded with the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct SnapshotGroup {
    /// Its identity: the same in the snapshot of each domain.
    pub id: GroupId,
    /// The domains that were part of it, by the names that they had then.
    pub domains: Vec<DomainName>,
}

impl SnapshotGroup {
    /// Makes a group of these domains.
    pub fn new(id: GroupId, domains: Vec<DomainName>) -> Self {
        Self { id, domains }
    }

    /// The other domains of the group, for people.
    pub(crate) fn others(&self, own: &DomainName) -> String {
        let others = self.domains.iter().filter(|name| *name != own).map(DomainName::as_str);
        others.collect::<Vec<_>>().join(", ")
    }
}

/// The operation of one domain in an operation of a group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct GroupMember {
    /// The domain.
    pub domain: DomainName,
    /// Its operation, in its own journal.
    pub operation: OperationId,
}

impl GroupMember {
    /// Makes a member.
    pub fn new(domain: DomainName, operation: OperationId) -> Self {
        Self { domain, operation }
    }
}

/// The group of an operation, as recorded with the operation of each domain.
///
/// One domain's operation decides: the group's operation has happened if, and only if, that operation is past
/// its commit point. It ends only when all others know it. So an operation that is
/// [`crate::catalogue::OperationState::Ready`], and whose decider is not in the journal any more, was not
/// committed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct OperationGroup {
    /// The identity.
    pub id: GroupId,
    /// The domain whose operation decides.
    pub decider: GroupMember,
}

impl OperationGroup {
    /// Makes the group of an operation.
    pub fn new(id: GroupId, decider: GroupMember) -> Self {
        Self { id, decider }
    }
}
