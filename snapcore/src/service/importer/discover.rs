//! Discovers snapshots that only the images know.

use std::collections::{HashMap, HashSet};

use super::Importer;
use crate::domain::DiskRecord;
use crate::error::Result;
use crate::name::{LayerName, SnapshotName, Target};
use crate::snapshot::{Point, Snapshot, SnapshotId};

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
    /// The snapshots that the images know, and that are in neither `known` nor `orphans`. With `import`, the
    /// disks also get the layers that were found.
    pub(super) async fn discover(
        &self,
        records: &mut [DiskRecord],
        known: &[Snapshot],
        orphans: &[(Target, LayerName)],
        import: bool,
    ) -> Result<Vec<Snapshot>> {
        let mut merged = Merged::default();
        for record in records {
            let backend = self.registry.serving(&record.disk)?;
            let target = record.disk.target.clone();
            let members = known.iter().filter_map(|snapshot| snapshot.point(&target));
            let orphans = orphans.iter().filter(|(of, _)| *of == target);
            let points: Vec<Point> = members
                .map(|member| member.point.clone())
                .chain(orphans.map(|(_, layer)| Point::external(layer.clone())))
                .collect();
            let mut extended = record.clone();
            let found = backend.discover(&mut extended, &points).await?;
            if import {
                *record = extended;
            }
            let is_ours = |layer: &LayerName| *layer == record.active || record.owned.contains(layer);
            merged.add(&target, found, |snapshot| {
                import || snapshot.disks.iter().all(|m| m.point.tag.is_some() && is_ours(&m.point.layer))
            });
        }
        merged.snapshots.sort_by_key(|snapshot| (snapshot.created, snapshot.id));
        Ok(merged.snapshots)
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
