//! The viewer: commands that only look. No lock, nothing made, nothing changed.

mod belonging;
mod check;
mod reading;
mod sizes;

use std::sync::Arc;

use super::authority::Authority;
use super::locator::{Located, Locator, attached};
use super::planning::{Planning, outside, shared};
use super::records::Records;
use super::{Details, DiskReport, DomainRef, Listing, Member, PastOperation, PreviousState, Unfinished};
use crate::backend::{Certainty, DeleteCost, InspectDepth};
use crate::catalogue::Entry;
use crate::domain::DiskRecord;
use crate::error::Result;
use crate::name::{LayerName, SnapshotName, Target};
use crate::operation::Operation;
use crate::plan::DiskInput;
use crate::registry::Registry;
use crate::snapshot::{Snapshot, SnapshotRole, SnapshotTree};
use crate::state::DiskState;

pub use belonging::Belonging;
pub use reading::{
    ComparedDisk, DiffExtent, DiffReport, DiffRequest, DiskDiff, OpenDisk, OpenSnapshot, OpenState,
};
pub use sizes::{DiskSize, SetSize, SizeReport, SnapshotSize};

/// Shows domains as they are.
#[derive(Clone)]
pub(super) struct Viewer {
    pub(super) records: Records,
    pub(super) registry: Arc<Registry>,
    pub(super) locator: Locator,
    pub(super) authority: Authority,
    pub(super) planning: Planning,
}

impl Viewer {
    async fn unfinished_of(&self, entry: &Entry) -> Result<Vec<Unfinished>> {
        let unfinished = self.records.unfinished(&entry.domain.name).await?;
        Ok(unfinished.into_iter().map(shown).collect())
    }

    pub(in crate::service) async fn list(&self, reference: &DomainRef) -> Result<Listing> {
        let Located { entry, catalogued, .. } = self.locator.locate(reference).await?;
        let unfinished = self.unfinished_of(&entry).await?;
        let snapshots = entry.tree.taken().cloned().collect();
        let previous = match entry.tree.previous() {
            None => None,
            Some(previous) => Some(self.previous(&entry, previous).await),
        };
        Ok(Listing { domain: entry.domain, catalogued, snapshots, previous, unfinished })
    }

    /// The state that the last revert replaced, with the space that it takes.
    async fn previous(&self, entry: &Entry, previous: &Snapshot) -> PreviousState {
        let disks = self.read_disks(entry).await;
        let DeleteCost { frees, certainty, .. } = self.set_size(entry, &disks, &[previous]).await.total;
        let frees = (certainty != Certainty::Unknown).then_some(frees);
        PreviousState { snapshot: previous.clone(), frees, certainty }
    }

    /// The last operations of a domain, oldest first.
    pub(in crate::service) async fn history(&self, reference: &DomainRef) -> Result<Vec<PastOperation>> {
        let Located { entry, .. } = self.locator.locate(reference).await?;
        let operations = self.records.operations(&entry.domain.name).await?;
        let past = |operation: Operation| PastOperation {
            id: operation.id,
            operation: operation.plan.operation,
            snapshots: operation.plan.snapshots,
            state: operation.state,
            started: operation.started,
            errors: operation.errors,
            group: operation.group.map(|group| group.id),
        };
        Ok(operations.into_iter().map(past).collect())
    }

    /// One snapshot in full, with sizes read from the images.
    pub(in crate::service) async fn show(
        &self,
        reference: &DomainRef,
        name: &SnapshotName,
    ) -> Result<Details> {
        let Located { entry, .. } = self.locator.locate(reference).await?;
        let tree = &entry.tree;
        let snapshot =
            tree.named(name).map_err(|error| error.context(format!("domain {}", entry.domain.name)))?.clone();
        let name_of = |id| tree.get(id).map(|snapshot| snapshot.name.clone());
        let disks = self.read_disks(&entry).await;
        let size = self.size_of(&entry, &disks, &snapshot).await;
        let members = self.members(&entry, &snapshot, &disks, &size.alone)?;
        let machine = snapshot.machine.as_deref().and_then(|id| entry.domain.machine(id));
        let record = machine.map(|machine| &machine.record);
        let memory_gone = match &snapshot.memory {
            // An image that cannot be looked at may well be there.
            Some(memory) => {
                matches!(self.registry.memory_size(&entry.domain, &memory.image).await, Ok(None))
            }
            None => false,
        };
        Ok(Details {
            memory_gone,
            outside: outside(&self.registry, &entry.domain, record, |target| {
                snapshot.point(target).is_some()
            }),
            shared: shared(&self.registry, &entry.domain, record),
            current: entry.domain.current == Some(snapshot.id),
            parent: snapshot.parent.and_then(name_of),
            children: tree
                .children(Some(snapshot.id))
                .filter(|child| child.role == SnapshotRole::Snapshot)
                .map(|child| child.name.clone())
                .collect(),
            machine: machine.map(|machine| machine.summary.clone()),
            domain: entry.domain.name.clone(),
            snapshot,
            members,
            size,
        })
    }

    /// The disks of a snapshot, as far as the domain still has them.
    fn members(
        &self,
        entry: &Entry,
        snapshot: &Snapshot,
        disks: &[(Target, Result<DiskInput>)],
        alone: &SetSize,
    ) -> Result<Vec<Member>> {
        let mut members = Vec::new();
        for member in &snapshot.disks {
            let Some(record) = entry.domain.disk(&member.target) else { continue };
            let backend = self.registry.serving(&record.disk)?;
            // Values that only the image has are left out if it cannot be read; `check` reports why.
            let read = disks.iter().find(|(target, _)| *target == member.target);
            let read = read.and_then(|(_, disk)| disk.as_ref().ok());
            let layer = read.and_then(|disk| disk.state.layer(&member.point.layer));
            let cost = alone.disks.iter().find(|part| part.target == member.target);
            members.push(Member {
                target: member.target.clone(),
                point: member.point.clone(),
                kind: member.point.kind(),
                address: match layer {
                    Some(layer) => layer.address.clone(),
                    None => backend.layer_address(record, &member.point.layer),
                },
                virtual_size: member.virtual_size,
                allocated: layer.map(|layer| layer.allocated),
                delete: read.and(cost).map(|part| part.delete.clone()),
            });
        }
        Ok(members)
    }

    pub(in crate::service) async fn inspect(&self, reference: &DomainRef) -> Result<Vec<DiskReport>> {
        let Located { entry, .. } = self.locator.locate(reference).await?;
        let live = self.locator.connect_to_look(&entry.domain).await;
        let mut reports = Vec::new();
        for record in entry.domain.disks {
            let backend = self.registry.serving(&record.disk)?;
            reports.push(
                match backend.inspect(&record, InspectDepth::Dependents, attached(&live, &record)).await {
                    Ok(state) => {
                        let orphans = orphans(&record, &state, &entry.tree);
                        DiskReport { record, state: Some(state), orphans, problem: None }
                    }
                    Err(error) => DiskReport {
                        record,
                        state: None,
                        orphans: Vec::new(),
                        problem: Some(error.to_string()),
                    },
                },
            );
        }
        Ok(reports)
    }
}

fn shown(operation: Operation) -> Unfinished {
    Unfinished {
        id: operation.id,
        operation: operation.plan.operation,
        snapshots: operation.plan.snapshots,
        state: operation.state,
        started: operation.started,
    }
}

/// The orphan layers: owned layers whose own state nothing needs. Such a layer is not the active one, is no
/// point itself, and no foreign image is backed by it.
fn orphans(record: &DiskRecord, state: &DiskState, tree: &SnapshotTree) -> Vec<LayerName> {
    state
        .layers
        .iter()
        .filter(|layer| {
            layer.owned
                && layer.name != state.active
                && layer.dependents.is_empty()
                && !tree.points(&record.disk.target).any(|p| p.tag.is_none() && p.layer == layer.name)
        })
        .map(|layer| layer.name.clone())
        .collect()
}
