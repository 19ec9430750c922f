//! Points that other tools made: taken in as snapshots.

use camino::Utf8Path;
use image_files::names::io_error;
use jiff::Timestamp;
use snapcore::{
    Consistency, DiskPoint, DiskRecord, InspectDepth, Layer, LayerName, Point, Result, Snapshot, SnapshotId,
    SnapshotName,
};

use crate::attached::FileIds;
use crate::layers::{Limits, inspect};

/// The frozen layers of the active chain and the tags in every layer of it that `known` does not have, oldest first. The
/// layers in the disk's own directory on which no foreign image stands become ours.
pub(crate) fn discover(record: &mut DiskRecord, known: &[Point], limits: &Limits) -> Result<Vec<Snapshot>> {
    let before = inspect(record, InspectDepth::Dependents, limits, &FileIds::new())?;
    for layer in before.chain(&before.active) {
        let beside = !layer.name.as_str().contains('/');
        if beside
            && layer.format == "qcow2"
            && layer.dependents.is_empty()
            && !record.owned.contains(&layer.name)
        {
            record.owned.push(layer.name.clone());
        }
    }
    // Tags are read in layers that are ours.
    let state = inspect(record, InspectDepth::Layers, limits, &FileIds::new())?;
    let mut found: Vec<Snapshot> = Vec::new();
    let mut chain = state.chain(&state.active);
    chain.reverse();
    for layer in chain {
        let mut tags: Vec<_> = layer.internal.iter().collect();
        tags.sort_by_key(|tag| tag.created);
        for tag in tags {
            let point = Point::internal(layer.name.clone(), &tag.tag);
            if !known.contains(&point) {
                add(&mut found, record, &tag.tag, tag.created, point, tag.virtual_size);
            }
        }
        let point = Point::external(layer.name.clone());
        if layer.name != state.active && !known.contains(&point) {
            let created = frozen_at(layer)?;
            add(&mut found, record, stem(&layer.name), created, point, layer.virtual_size);
        }
    }
    Ok(found)
}

fn add(
    found: &mut Vec<Snapshot>,
    record: &DiskRecord,
    wanted: &str,
    created: Timestamp,
    point: Point,
    virtual_size: u64,
) {
    let parent = found.last();
    // A tree lists snapshots by time; clocks of images may disagree with the order of the chain, which is certain.
    let created = parent.map_or(created, |parent| created.max(parent.created));
    let name = free_name(found, wanted);
    let snapshot = Snapshot {
        id: SnapshotId::fresh(),
        name,
        parent: parent.map(|parent| parent.id),
        created,
        description: String::new(),
        consistency: Consistency::Unknown,
        disks: vec![DiskPoint { target: record.disk.target.clone(), point, virtual_size }],
        memory: None,
        machine: None,
    };
    found.push(snapshot);
}

/// A name as near to `wanted` as the rules allow, which no other has.
fn free_name(found: &[Snapshot], wanted: &str) -> SnapshotName {
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "._-+:".contains(c) { c } else { '_' };
    let mut base: String = wanted.chars().map(allowed).take(240).collect();
    if base.is_empty() || base.starts_with(['.', '-']) {
        base.insert(0, '_');
    }
    let mut name = base.clone();
    let mut number = 1;
    loop {
        match SnapshotName::new(name.clone()) {
            Ok(free) if found.iter().all(|other| other.name != free) => return free,
            _ => {
                number += 1;
                name = format!("{base}-{number}");
            }
        }
    }
}

fn stem(layer: &LayerName) -> &str {
    Utf8Path::new(layer.as_str()).file_stem().unwrap_or("base")
}

fn frozen_at(layer: &Layer) -> Result<Timestamp> {
    let modified = std::fs::metadata(&layer.file)
        .and_then(|metadata| metadata.modified())
        .map_err(|error| io_error(error, format!("cannot look at {}", layer.file)))?;
    Ok(Timestamp::try_from(modified).unwrap_or(Timestamp::UNIX_EPOCH))
}
