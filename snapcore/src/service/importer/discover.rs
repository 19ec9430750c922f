//! Discovers snapshots that only the images know.

use std::collections::{HashMap, HashSet};

use super::adopt::Adopted;
use super::recorded::Records;
use super::{ImportSource, Importer};
use crate::error::Result;
use crate::name::{LayerName, SnapshotName, Target};
use crate::snapshot::{Point, Snapshot, SnapshotId};

/// Snapshots that only the images know.
pub(super) struct Discovered {
    /// The snapshots, the oldest first.
    pub(super) snapshots: Vec<Snapshot>,
    /// The one that another program's records call current.
    pub(super) current: Option<SnapshotId>,
    /// What of these records could not be used.
    pub(super) notes: Vec<String>,
}

/// What is known of the disks before their images are asked.
pub(super) struct Known<'a> {
    /// Snapshots, which are not found again.
    pub(super) snapshots: &'a [Snapshot],
    /// Layers that are no snapshot's.
    pub(super) orphans: &'a [(Target, LayerName)],
    /// Snapshots of an earlier import. They are found again, and keep their identities.
    pub(super) earlier: &'a [Snapshot],
}

/// Makes of snapshots of one disk what they were before: with their identities, descriptions and holds.
fn identify(earlier: &HashMap<(&Target, &Point), &Snapshot>, target: &Target, found: &mut [Snapshot]) {
    let mut had: HashMap<SnapshotId, SnapshotId> = HashMap::new();
    for snapshot in found {
        snapshot.parent = snapshot.parent.map(|parent| had.get(&parent).copied().unwrap_or(parent));
        let point = snapshot.disks.first().map(|member| &member.point);
        if let Some(was) = point.and_then(|point| earlier.get(&(target, point))) {
            had.insert(snapshot.id, was.id);
            let found = std::mem::replace(snapshot, (*was).clone());
            (snapshot.disks, snapshot.parent) = (found.disks, found.parent);
        }
    }
}

/// Snapshots of several disks: those of one name, each on another disk, are one.
#[derive(Default)]
struct Merged {
    snapshots: Vec<Snapshot>,
    /// For each snapshot of a disk, the one that it became a part of; for an ignored one, that of its parent.
    same: HashMap<SnapshotId, SnapshotId>,
}

impl Merged {
    /// Adds the snapshots of one more disk, the oldest first. Those that `is_wanted` declines are ignored.
    fn add(&mut self, target: &Target, found: Vec<Snapshot>, is_wanted: impl Fn(&Snapshot) -> bool) {
        let mut twins: HashMap<SnapshotName, Vec<usize>> = HashMap::new();
        for (place, other) in self.snapshots.iter().enumerate().rev() {
            if other.point(target).is_none() {
                twins.entry(other.name.clone()).or_default().push(place);
            }
        }
        for mut snapshot in found {
            snapshot.parent = snapshot.parent.and_then(|parent| self.same.get(&parent).copied());
            if !is_wanted(&snapshot) {
                // Its children take its place under its parent.
                if let Some(parent) = snapshot.parent {
                    self.same.insert(snapshot.id, parent);
                }
                continue;
            }
            let twin = twins.get_mut(&snapshot.name).and_then(Vec::pop);
            match twin.and_then(|place| self.snapshots.get_mut(place)) {
                Some(twin) => {
                    self.same.insert(snapshot.id, twin.id);
                    twin.disks.append(&mut snapshot.disks);
                }
                None => {
                    self.same.insert(snapshot.id, snapshot.id);
                    self.snapshots.push(snapshot);
                }
            }
        }
    }
}

impl Importer {
    /// The snapshots that the images have and that are not `known`. In an import, the disks also get the
    /// layers that were found. Another program's records name and describe them.
    pub(super) async fn discover(
        &self,
        adopted: &mut Adopted,
        known: &Known<'_>,
        source: &ImportSource,
    ) -> Result<Discovered> {
        let import = source.import;
        let mut merged = Merged::default();
        let mut recorded = Records::new(&source.recorded);
        let members = known.earlier.iter().flat_map(|was| was.disks.iter().map(move |member| (member, was)));
        let earlier: HashMap<(&Target, &Point), &Snapshot> =
            members.map(|(member, was)| ((&member.target, &member.point), was)).collect();
        let found_again: HashSet<(&Target, &LayerName)> =
            earlier.keys().map(|(target, point)| (*target, &point.layer)).collect();
        for (record, state) in adopted.records.iter_mut().zip(&adopted.states) {
            let backend = self.registry.serving(&record.disk)?;
            let target = record.disk.target.clone();
            let members = known.snapshots.iter().filter_map(|snapshot| snapshot.point(&target));
            let is_orphan =
                |(of, layer): &&(Target, LayerName)| *of == target && !found_again.contains(&(of, layer));
            let orphans = known.orphans.iter().filter(is_orphan);
            let points: Vec<Point> = members
                .map(|member| member.point.clone())
                .chain(orphans.map(|(_, layer)| Point::external(layer.clone())))
                .collect();
            let mut extended = record.clone();
            let mut found = backend.discover(&mut extended, &points).await?;
            identify(&earlier, &target, &mut found);
            recorded.name(&mut found, state);
            if import {
                *record = extended;
            }
            let is_ours = |layer: &LayerName| *layer == record.active || record.owned.contains(layer);
            merged.add(&target, found, |snapshot| {
                import || snapshot.disks.iter().all(|m| m.point.tag.is_some() && is_ours(&m.point.layer))
            });
        }
        let Merged { mut snapshots, same } = merged;
        // Two that were one, and are not now.
        let mut ids = HashSet::new();
        for snapshot in &mut snapshots {
            if !ids.insert(snapshot.id) {
                snapshot.id = SnapshotId::fresh();
            }
        }
        let (current, notes) = recorded.complete(&mut snapshots, &same);
        snapshots.sort_by_key(|snapshot| (snapshot.created, snapshot.id));
        Ok(Discovered { snapshots, current, notes })
    }
}

/// Adds discovered snapshots to those that are known, each under a free name. Returns these names.
pub(super) fn add(snapshots: &mut Vec<Snapshot>, found: Vec<Snapshot>) -> Result<Vec<SnapshotName>> {
    let mut names = Names::of(snapshots.iter());
    let mut adopted = Vec::new();
    for mut snapshot in found {
        snapshot.name = names.free(&snapshot.name)?;
        adopted.push(snapshot.name.clone());
        snapshots.push(snapshot);
    }
    let ids: HashSet<SnapshotId> = snapshots.iter().map(|snapshot| snapshot.id).collect();
    for snapshot in snapshots {
        snapshot.parent = snapshot.parent.filter(|parent| ids.contains(parent));
    }
    Ok(adopted)
}

/// Returns `wanted`, or with a number after it where that name is taken.
pub(in crate::service) fn free_name<'a>(
    wanted: &SnapshotName,
    taken: impl IntoIterator<Item = &'a Snapshot>,
) -> Result<SnapshotName> {
    Names::of(taken).free(wanted)
}

/// Names that are taken; an image can have thousands of snapshots of one name.
struct Names {
    taken: HashSet<SnapshotName>,
    /// The first number that may be free.
    next: HashMap<SnapshotName, u64>,
}

impl Names {
    fn of<'a>(snapshots: impl IntoIterator<Item = &'a Snapshot>) -> Self {
        let taken = snapshots.into_iter().map(|snapshot| snapshot.name.clone()).collect();
        Self { taken, next: HashMap::new() }
    }

    /// The name, or the first free one made of it, which is taken from now on.
    fn free(&mut self, wanted: &SnapshotName) -> Result<SnapshotName> {
        let mut name = wanted.clone();
        let number = self.next.entry(wanted.clone()).or_insert(2);
        while self.taken.contains(&name) {
            let suffix = format!("-{number}");
            let head: String = wanted.as_str().chars().take(SnapshotName::MAX_BYTES - suffix.len()).collect();
            name = SnapshotName::new(format!("{head}{suffix}"))?;
            *number += 1;
        }
        self.taken.insert(name.clone());
        Ok(name)
    }
}
