//! Finds points that the catalogue does not have: by their tags, and snapshots that other tools took of the
//! volume.

use jiff::Timestamp;
use snapcore::backend::FreeNames;
use snapcore::{DiskPoint, DiskRecord, Point, Snapshot};

use crate::names::Volume;
use crate::report::{Row, VolumeGroup, VolumeKind, sort_points};

/// Returns snapshots of the points that `known` does not have, oldest first. They become ours.
pub(crate) fn discover(
    record: &mut DiskRecord,
    known: &[Point],
    volume: &Volume,
    group: &VolumeGroup,
) -> Vec<Snapshot> {
    let ours =
        |row: &Row| row.parsed_tags().ours && volume.is_point(&row.name) && group.is_made_for(row, volume);
    let foreign = |row: &Row| {
        row.origin.as_deref() == Some(volume.name.as_str())
            // A thin snapshot is inactive unless it is in use, for example as another machine's disk.
            && (row.kind == VolumeKind::ThickSnapshot || (row.kind == VolumeKind::Thin && !row.active))
            && !row.parsed_tags().ours
            && !row.merging
    };
    let mut rows: Vec<&Row> = group
        .rows
        .iter()
        .filter(|row| (ours(row) || foreign(row)) && !row.invalid)
        .filter(|row| !known.contains(&Point::external(row.layer())))
        .collect();
    let taken = |row: &Row| row.parsed_tags().taken.unwrap_or(row.time);
    sort_points(&mut rows, taken);
    let mut found: Vec<Snapshot> = Vec::new();
    let mut names = FreeNames::default();
    for row in rows {
        let tags = row.parsed_tags();
        let parent = tags.parent.and_then(|parent| {
            let is_it =
                |snapshot: &&Snapshot| snapshot.disks.iter().any(|member| member.point.layer == parent);
            found.iter().find(is_it).map(|snapshot| snapshot.id)
        });
        let name = names.take(tags.name.as_deref().unwrap_or(&row.name));
        found.push(
            Snapshot::new(
                name,
                Timestamp::from_second(taken(row)).unwrap_or(Timestamp::UNIX_EPOCH),
                vec![DiskPoint::new(
                    record.disk.target.clone(),
                    Point::external(row.layer()),
                    row.visible_size(),
                )],
            )
            .parent(parent),
        );
        if !record.owned.contains(&row.layer()) {
            record.owned.push(row.layer());
        }
    }
    found
}
