//! Discovery of points that other tools made, for import as snapshots.

use std::collections::HashSet;

use crate::names::io_error;
use camino::Utf8Path;
use jiff::Timestamp;
use snapcore::backend::{FoundSnapshots, InspectDepth, Layer};
use snapcore::{DiskRecord, LayerName, Point, Result, Snapshot};

use crate::FileIds;
use crate::layers::{ChainFormat, Limits, inspect};

/// Finds points that `known` does not have, oldest first: the frozen layers of the active chain, and the tags
/// in its layers and in all other layers of ours. Layers in the disk's own directory become ours, unless a
/// foreign image is backed by them.
///
/// # Errors
/// Those of the images; the system's.
pub fn discover(
    format: &dyn ChainFormat,
    record: &mut DiskRecord,
    known: &[Point],
    limits: &Limits,
) -> Result<Vec<Snapshot>> {
    let before = inspect(format, record, InspectDepth::Dependents, limits, &FileIds::new())?;
    for layer in before.chain(&before.active) {
        let beside = !layer.name.as_str().contains('/');
        if beside
            && layer.format == format.name()
            && layer.dependents.is_empty()
            && !record.owned.contains(&layer.name)
        {
            record.owned.push(layer.name.clone());
        }
    }
    // Tags are only read in layers that are ours.
    let state = inspect(format, record, InspectDepth::Layers, limits, &FileIds::new())?;
    let mut found = FoundSnapshots::default();
    let known: HashSet<&Point> = known.iter().collect();
    let mut chain = state.chain(&state.active);
    chain.reverse();
    // A layer that a revert left is no longer in the active chain, but the tags in it are still snapshots. If
    // it has a tag that the chain also has, of the same time, it is a copy of that layer: files that were
    // copied without their hard links.
    let in_chain: HashSet<(&str, Timestamp)> =
        chain.iter().flat_map(|layer| &layer.internal).map(|tag| (tag.tag.as_str(), tag.created)).collect();
    let is_copy =
        |layer: &Layer| layer.internal.iter().any(|tag| in_chain.contains(&(tag.tag.as_str(), tag.created)));
    let is_left = |layer: &&Layer| layer.owned && chain.iter().all(|other| other.name != layer.name);
    for layer in state.layers.iter().filter(is_left).filter(|layer| !is_copy(layer)) {
        add_tags(&mut found, record, layer, &known);
    }
    for layer in chain {
        add_tags(&mut found, record, layer, &known);
        let point = Point::external(layer.name.clone());
        if layer.name != state.active && !known.contains(&point) {
            let created = frozen_at(layer)?;
            found.add(record, stem(&layer.name), created, point, layer.virtual_size);
        }
    }
    Ok(found.into_snapshots())
}

fn add_tags(found: &mut FoundSnapshots, record: &DiskRecord, layer: &Layer, known: &HashSet<&Point>) {
    let mut tags: Vec<_> = layer.internal.iter().collect();
    tags.sort_by_key(|tag| tag.created);
    for tag in tags {
        let point = Point::internal(layer.name.clone(), &tag.tag);
        if !known.contains(&point) {
            found.add(record, &tag.tag, tag.created, point, tag.virtual_size);
            found.identify_last(tag.identity.clone());
        }
    }
}

fn stem(layer: &LayerName) -> &str {
    Utf8Path::new(layer.as_str()).file_stem().unwrap_or("base")
}

fn frozen_at(layer: &Layer) -> Result<Timestamp> {
    let modified = std::fs::metadata(layer.path())
        .and_then(|metadata| metadata.modified())
        .map_err(|error| io_error(error, format!("cannot look at {}", layer.address)))?;
    Ok(Timestamp::try_from(modified).unwrap_or(Timestamp::UNIX_EPOCH))
}
