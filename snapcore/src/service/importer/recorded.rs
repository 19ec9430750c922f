//! Matches snapshots that were found in images with another program's records of them.

use std::collections::{HashMap, HashSet};

use crate::address::DiskAddress;
use crate::name::SnapshotName;
use crate::service::RecordedSnapshot;
use crate::snapshot::{FreeNames, Snapshot, SnapshotId};
use crate::state::DiskState;

/// The records of an import, and the snapshots of disks that are theirs.
pub(super) struct Records<'a> {
    records: &'a [RecordedSnapshot],
    names: Vec<SnapshotName>,
    /// For snapshots of disks that a record describes, its place.
    described: HashMap<SnapshotId, usize>,
}

impl<'a> Records<'a> {
    pub(super) fn new(records: &'a [RecordedSnapshot]) -> Self {
        let mut free = FreeNames::default();
        let names = records.iter().map(|record| free.take(&record.name)).collect();
        Self { records, names, described: HashMap::new() }
    }

    /// Gives the snapshots of one disk the names that they are recorded by.
    pub(super) fn name(&mut self, found: &mut [Snapshot], state: &DiskState) {
        let mut done = HashSet::new();
        for (place, (record, name)) in self.records.iter().zip(&self.names).enumerate() {
            let is_free = |snapshot: &&mut Snapshot| !done.contains(&snapshot.id);
            let is_meant = |snapshot: &&mut Snapshot| describes(record, snapshot, state);
            // A disk may have several internal snapshots of one name.
            let distance = |snapshot: &&mut Snapshot| {
                record.created.map(|created| created.duration_since(snapshot.created).abs())
            };
            let all = found.iter_mut().filter(is_free).filter(is_meant);
            if let Some(snapshot) = all.min_by_key(distance) {
                snapshot.name = name.clone();
                done.insert(snapshot.id);
                self.described.insert(snapshot.id, place);
            }
        }
    }

    /// Gives the snapshots of all disks what the records say of them. `merged` has, for each snapshot of a
    /// disk, the one that it became a part of. Returns the current one, and notes.
    pub(super) fn complete(
        self,
        snapshots: &mut [Snapshot],
        merged: &HashMap<SnapshotId, SnapshotId>,
    ) -> (Option<SnapshotId>, Vec<String>) {
        if self.records.is_empty() {
            return (None, Vec::new());
        }
        let mut ids: HashMap<usize, SnapshotId> = HashMap::new();
        for (of_disk, place) in &self.described {
            ids.extend(merged.get(of_disk).map(|id| (*place, *id)));
        }
        let by_name: HashMap<&str, usize> =
            self.records.iter().enumerate().map(|(place, record)| (record.name.as_str(), place)).collect();
        let mut by_id: HashMap<SnapshotId, &mut Snapshot> =
            snapshots.iter_mut().map(|snapshot| (snapshot.id, snapshot)).collect();
        let (mut current, mut notes) = (None, Vec::new());
        for (place, (record, name)) in self.records.iter().zip(&self.names).enumerate() {
            let Some(snapshot) = ids.get(&place).and_then(|id| by_id.get_mut(id)) else {
                notes.push(format!("{name} is recorded, and no image has it: it is left out"));
                continue;
            };
            snapshot.created = record.created.unwrap_or(snapshot.created);
            if let Some(description) = &record.description {
                snapshot.description.clone_from(description);
            }
            snapshot.parent = self.parent(record, &by_name, &ids);
            if record.current {
                current = Some(snapshot.id);
            }
            if let Some(memory) = &record.memory {
                notes.push(format!("{name}: its memory is not imported: {memory}"));
            }
        }
        break_loops(snapshots);
        (current, notes)
    }

    /// The nearest recorded ancestor that an image has.
    fn parent(
        &self,
        record: &RecordedSnapshot,
        by_name: &HashMap<&str, usize>,
        ids: &HashMap<usize, SnapshotId>,
    ) -> Option<SnapshotId> {
        let mut next = record.parent.as_deref();
        // A record may name itself, or a descendant.
        for _ in 0..self.records.len() {
            let place = by_name.get(next?)?;
            if let Some(id) = ids.get(place) {
                return Some(*id);
            }
            next = self.records.get(*place)?.parent.as_deref();
        }
        None
    }
}

/// Returns true if a record is of this snapshot of a disk.
fn describes(record: &RecordedSnapshot, snapshot: &Snapshot, state: &DiskState) -> bool {
    let Some(point) = snapshot.disks.first().map(|member| &member.point) else { return false };
    if let Some(tag) = &point.tag {
        return record.tag.as_ref() == Some(tag);
    }
    let same = |one: &DiskAddress, file: &camino::Utf8PathBuf| {
        let other = DiskAddress::from(file.clone());
        *one == other || one.inode().is_some_and(|inode| other.inode() == Some(inode))
    };
    let is_frozen = |layer: &crate::state::Layer| record.frozen.iter().any(|file| same(&layer.address, file));
    let is_below = state
        .children(&point.layer)
        .any(|layer| record.overlays.iter().any(|file| same(&layer.address, file)));
    is_below || state.layer(&point.layer).is_some_and(is_frozen)
}

/// Makes roots of snapshots that would be their own ancestors. Each is visited once: an image may have very
/// many.
fn break_loops(snapshots: &mut [Snapshot]) {
    let mut parents: HashMap<SnapshotId, SnapshotId> =
        snapshots.iter().filter_map(|snapshot| Some((snapshot.id, snapshot.parent?))).collect();
    let mut safe = HashSet::new();
    for snapshot in snapshots {
        let mut way = HashSet::from([snapshot.id]);
        let mut next = parents.get(&snapshot.id);
        while let Some(parent) = next.filter(|parent| !safe.contains(*parent)) {
            if !way.insert(*parent) {
                snapshot.parent = None;
                break;
            }
            next = parents.get(parent);
        }
        if snapshot.parent.is_none() {
            parents.remove(&snapshot.id);
            safe.insert(snapshot.id);
        } else {
            safe.extend(way);
        }
    }
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::name::{LayerName, Target};
    use crate::snapshot::{DiskPoint, Point};

    fn internal(tag: &str, seconds: i64) -> Snapshot {
        let point = Point::internal(LayerName("disk.qcow2".to_owned()), tag);
        let disks = vec![DiskPoint::new(Target::new("vda").unwrap(), point, 1 << 20)];
        Snapshot::new(SnapshotName::new("x").unwrap(), Timestamp::from_second(seconds).unwrap(), disks)
    }

    fn state() -> DiskState {
        DiskState::new(Target::new("vda").unwrap(), LayerName("disk.qcow2".to_owned()), Vec::new())
    }

    fn completed(records: &[RecordedSnapshot], mut found: Vec<Snapshot>) -> (Vec<Snapshot>, Vec<String>) {
        let mut matched = Records::new(records);
        matched.name(&mut found, &state());
        let same = found.iter().map(|snapshot| (snapshot.id, snapshot.id)).collect();
        let (_, notes) = matched.complete(&mut found, &same);
        (found, notes)
    }

    #[test]
    fn nearest_of_one_tag_is_meant() {
        let at = Timestamp::from_second(100).ok();
        let records = [RecordedSnapshot::new("a b").tag(Some("t".to_owned())).created(at)];
        let (found, notes) = completed(&records, vec![internal("t", 10), internal("t", 99)]);
        assert_eq!(found.iter().map(|found| found.name.as_str()).collect::<Vec<_>>(), ["x", "a_b"]);
        assert_eq!(found[1].created, at.unwrap());
        assert!(notes.is_empty(), "{notes:?}");
    }

    #[test]
    fn records_in_a_loop_make_a_tree() {
        let record = |name: &str, parent: &str| {
            RecordedSnapshot::new(name).tag(Some(name.to_owned())).parent(Some(parent.to_owned()))
        };
        let records =
            [record("a", "c"), record("b", "a"), record("c", "b"), record("d", "d"), record("e", "gone")];
        let found = ["a", "b", "c", "d", "e"].iter().map(|tag| internal(tag, 1)).collect();
        let (found, _) = completed(&records, found);
        let parents: Vec<bool> = found.iter().map(|found| found.parent.is_some()).collect();
        assert_eq!(parents, [false, true, true, false, false]);
    }

    #[test]
    fn missing_snapshot_is_skipped_in_the_tree() {
        let record = |name: &str, parent: Option<&str>| {
            RecordedSnapshot::new(name).tag(Some(name.to_owned())).parent(parent.map(str::to_owned))
        };
        let records = [record("a", None), record("gone", Some("a")), record("b", Some("gone"))];
        let (found, notes) = completed(&records, vec![internal("a", 1), internal("b", 2)]);
        assert_eq!(found[1].parent, Some(found[0].id));
        assert!(notes.len() == 1 && notes[0].starts_with("gone"), "{notes:?}");
    }
}
