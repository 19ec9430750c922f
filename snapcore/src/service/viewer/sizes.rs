//! The space that snapshots take, and what a delete of them frees. Nothing is locked or changed.
//!
//! Sizes of snapshots do not add up: what two of them share, neither frees alone. So the question is always
//! one about a set, and it is asked of the same code that plans a delete.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::Viewer;
use crate::backend::{Certainty, DeleteCost};
use crate::catalogue::Entry;
use crate::error::{Error, Result};
use crate::name::{DomainName, SnapshotName, Target};
use crate::plan::{DiskInput, split_points};
use crate::service::DomainRef;
use crate::service::locator::Located;
use crate::snapshot::{Snapshot, SnapshotId};

/// The sizes of a domain's snapshots.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct SizeReport {
    /// The domain.
    pub domain: DomainName,
    /// The snapshots that were asked for, oldest first.
    pub snapshots: Vec<SnapshotSize>,
    /// The state that the last revert replaced, where it is kept and all were asked for.
    pub previous: Option<SnapshotSize>,
    /// What a delete of all these snapshots together frees. The previous state stays.
    pub together: SetSize,
}

/// The size of one snapshot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct SnapshotSize {
    /// Its name.
    pub name: SnapshotName,
    /// Its identity.
    pub id: SnapshotId,
    /// Bytes that it refers to, on all disks and as memory; absent where a disk does not tell.
    pub referenced: Option<u64>,
    /// Bytes of these that other snapshots, the current state, clones or other images refer to as well;
    /// absent where that is not known.
    pub shared: Option<u64>,
    /// What a delete of it alone frees: what it refers to exclusively.
    pub alone: SetSize,
}

/// What a delete of a set of snapshots frees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct SetSize {
    /// All parts together.
    pub total: DeleteCost,
    /// Disk by disk.
    pub disks: Vec<DiskSize>,
    /// Memory images; absent where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<DeleteCost>,
}

/// A set's part on one disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiskSize {
    /// The disk.
    pub target: Target,
    /// What a delete frees of it, and moves.
    pub delete: DeleteCost,
}

/// A disk as it was read, or the reason why it was not.
type ReadDisk = (Target, Result<DiskInput>);

impl Viewer {
    /// The sizes of these snapshots; of all if there is none in the list.
    pub(in crate::service) async fn sizes(
        &self,
        reference: &DomainRef,
        names: &[SnapshotName],
    ) -> Result<SizeReport> {
        let Located { entry, .. } = self.locator.locate(reference).await?;
        let tree = &entry.tree;
        let mut chosen = BTreeSet::new();
        for name in names {
            let found = tree.named(name).map_err(|error| in_domain(error, &entry))?;
            chosen.insert(found.id);
        }
        let wanted: Vec<&Snapshot> =
            tree.taken().filter(|snapshot| names.is_empty() || chosen.contains(&snapshot.id)).collect();
        let disks = self.read_disks(&entry).await;
        let mut snapshots = Vec::new();
        for snapshot in &wanted {
            snapshots.push(self.size_of(&entry, &disks, snapshot).await);
        }
        let previous = match tree.previous().filter(|_| names.is_empty()) {
            Some(previous) => Some(self.size_of(&entry, &disks, previous).await),
            None => None,
        };
        let together = match (&snapshots[..], wanted.len()) {
            // It is known already.
            ([one], 1) => one.alone.clone(),
            _ => self.set_size(&entry, &disks, &wanted).await,
        };
        Ok(SizeReport { domain: entry.domain.name.clone(), snapshots, previous, together })
    }

    /// Reads the disks as a delete would find them.
    pub(super) async fn read_disks(&self, entry: &Entry) -> Vec<ReadDisk> {
        let live = self.locator.connect_to_look(&entry.domain).await;
        self.planning.read_each(entry, live.as_ref()).await
    }

    pub(super) async fn size_of(
        &self,
        entry: &Entry,
        disks: &[ReadDisk],
        snapshot: &Snapshot,
    ) -> SnapshotSize {
        let alone = self.set_size(entry, disks, &[snapshot]).await;
        let mut referenced = Some(0u64);
        for member in &snapshot.disks {
            let disk = disks.iter().find(|(target, _)| *target == member.target);
            let bytes = match disk {
                Some((_, Ok(disk))) => {
                    let read = disk.backend.referenced(&disk.record, &disk.state, &member.point).await;
                    read.unwrap_or_default()
                }
                // It left the domain, and takes no part in a delete.
                None => Some(0),
                Some((_, Err(_))) => None,
            };
            referenced = referenced.zip(bytes).map(|(sum, bytes)| sum.saturating_add(bytes));
        }
        let memory = alone.memory.as_ref().zip(snapshot.memory.as_ref());
        let memory =
            memory.map_or(0, |(freed, memory)| if freed.frees > 0 { freed.frees } else { memory.bytes });
        let referenced = referenced.map(|bytes| bytes.saturating_add(memory));
        // Where it frees at most something, the rest is shared at least, which says little.
        let known = matches!(alone.total.certainty, Certainty::Exact | Certainty::Estimate);
        let shared = referenced.filter(|_| known).map(|bytes| bytes.saturating_sub(alone.total.freed()));
        SnapshotSize { name: snapshot.name.clone(), id: snapshot.id, referenced, shared, alone }
    }

    /// What a delete of exactly these snapshots frees.
    pub(super) async fn set_size(&self, entry: &Entry, disks: &[ReadDisk], set: &[&Snapshot]) -> SetSize {
        let doomed: BTreeSet<SnapshotId> = set.iter().map(|snapshot| snapshot.id).collect();
        let mut parts = Vec::new();
        for (target, disk) in disks {
            if !set.iter().any(|snapshot| snapshot.point(target).is_some()) {
                continue;
            }
            let delete = match disk {
                Ok(disk) => {
                    let (drop, keep) = split_points(&entry.tree, target, &doomed);
                    disk.backend.cost_of_delete(&disk.record, &disk.state, &drop, &keep).await
                }
                Err(error) => Err(Error::new(error.kind(), error.to_string())),
            };
            let delete = delete.unwrap_or_else(|error| {
                DeleteCost::default().but(Certainty::Unknown, format!("{target}: {}", error.summary()))
            });
            parts.push(DiskSize { target: target.clone(), delete });
        }
        let mut images = Vec::new();
        for memory in set.iter().filter_map(|snapshot| snapshot.memory.as_ref()) {
            images.push(match self.registry.memory_freed(&entry.domain, &memory.image).await {
                Ok(freed) => freed.unwrap_or_else(|| DeleteCost::default().exact()),
                Err(error) => DeleteCost::default().but(Certainty::Unknown, error.summary()),
            });
        }
        let memory = (!images.is_empty()).then(|| DeleteCost::sum(images));
        let all = parts.iter().map(|part| part.delete.clone()).chain(memory.clone());
        SetSize { total: DeleteCost::sum(all), disks: parts, memory }
    }
}

fn in_domain(error: Error, entry: &Entry) -> Error {
    error.context(format!("domain {}", entry.domain.name))
}
