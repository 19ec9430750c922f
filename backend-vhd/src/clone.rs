//! Clones of VHD disks: differencing children of frozen layers, and fixed copies.

use camino::Utf8Path;
use image_files::chain::{ChainStep, CloneContent};
use image_files::clones::{CloneFiles, SharedLayer, check_places, clone_plan, pins_of, require_room};
use image_files::names;
use snapcore::backend::{CloneDisk, ClonePlan, DiskState, Layer};
use snapcore::{DiskRecord, Error, ErrorKind, LayerName, Result};

use crate::image::{self, Chain, ChainOptions, Materialised, Moving, NewImage, SECTOR};
use crate::layers::{Limits, file_of};
use crate::steps::{StepRunner, parent_name, write_child};

/// Plans clones of a point.
pub(crate) fn plan(
    record: &DiskRecord,
    state: &DiskState,
    request: &CloneDisk,
    limits: &Limits,
) -> Result<ClonePlan<ChainStep>> {
    let (target, layer) = (&record.disk.target, &request.point.layer);
    let chain = state.chain(layer);
    let top = match chain.first() {
        Some(top) if request.point.tag.is_none() && *layer != state.active => *top,
        _ => {
            let detail = format!("{target}: {layer} is no frozen layer of the disk");
            return Err(Error::new(ErrorKind::NotFound, detail)
                .state("no changes made")
                .advise("run `domsnap check` to see what is missing"));
        }
    };
    check_places(&request.clones, record.disk.path())?;
    let (shared, bytes) = match request.full {
        true => (Vec::new(), visible_bytes(top, limits)?),
        false => (shared(&chain), 0),
    };
    require_room(target, &request.clones, bytes)?;
    let layers: Vec<SharedLayer<'_>> =
        shared.iter().map(|(file, named)| SharedLayer { file, named: named.as_deref() }).collect();
    let (pins, notes) = pins_of(target, &request.clones, &layers)?;
    let content = match (request.full, pins.first().and_then(|pin| pin.file_name())) {
        (false, Some(name)) => {
            CloneContent::Overlay { on: LayerName(name.to_owned()), on_format: top.format.clone() }
        }
        (false, None) | (true, _) => CloneContent::CopyOfAll { from: top.name.clone(), tag: None },
    };
    let make = |files: CloneFiles| {
        let what = match &content {
            CloneContent::Overlay { on, .. } => format!("make {} as a child of {on}", files.image),
            _ => format!("copy all of {} into {}", top.name, files.image),
        };
        let (content, virtual_size) = (content.clone(), top.virtual_size);
        (ChainStep::Clone { files, content, virtual_size, keep: None }, what)
    };
    let publish = |places| ChainStep::PublishClones { places };
    let mut made = clone_plan(record, request, &pins, bytes, make, publish)?;
    made.plan.notes = notes;
    Ok(made)
}

/// The layers of a chain, each with the name by which the one above finds it: a parent in another directory
/// is found from the child's own alone.
fn shared<'a>(chain: &[&'a Layer]) -> Vec<(&'a Utf8Path, Option<String>)> {
    let mut shared = Vec::new();
    let mut above: Option<&Utf8Path> = None;
    for layer in chain {
        let file = layer.path();
        let named = above.map(|child| match child.parent() == file.parent() {
            true => file.file_name().unwrap_or_default().to_owned(),
            false => format!("another directory's {}", file.as_str().trim_start_matches('/')),
        });
        shared.push((file, named));
        above = Some(file);
    }
    shared
}

fn open(file: &Utf8Path, limits: &Limits) -> Result<Chain> {
    let mut options = ChainOptions::read_only();
    options.allowed.extend(limits.allowed.iter().map(|directory| directory.as_std_path().to_owned()));
    Ok(Chain::open(file.as_std_path(), &options)?)
}

/// The bytes that a copy of a chain moves.
fn visible_bytes(top: &Layer, limits: &Limits) -> Result<u64> {
    let mut chain = open(top.path(), limits)?;
    Ok(image::visible_bytes(&mut chain)?.into_iter().fold(0, u64::saturating_add))
}

impl StepRunner<'_> {
    /// Makes the image of a clone.
    pub(crate) fn clone_disk(&self, files: &CloneFiles, content: &CloneContent, size: u64) -> Result<()> {
        files.begin()?;
        let file = files.unfinished_image();
        match content {
            CloneContent::Overlay { on, on_format } => {
                let base = files.place.unfinished.join(on.as_str());
                let parent = parent_name(&file, &base, on, on_format == "raw")?;
                write_child(&file, &base, &NewImage::new(size).on(parent))?;
            }
            CloneContent::CopyOfAll { from, .. } => {
                let source = file_of(self.files.record, from)?;
                let mut chain = open(&source, self.limits)?;
                names::write_new(&file, &source, |into, passing| {
                    let copy = |moving: &Moving<'_>| {
                        image::materialise(
                            &mut chain,
                            into,
                            passing.as_std_path(),
                            Materialised::Fixed { align: SECTOR },
                            moving,
                        )
                    };
                    Ok::<_, Error>(Moving::reported(
                        self.progress,
                        self.bytes,
                        &|| self.cancel.is_cancelled(),
                        copy,
                    )?)
                })?;
            }
            CloneContent::CopyOfTag { .. } => {
                return Err(Error::new(ErrorKind::Internal, "VHD has no internal snapshots to copy"));
            }
        }
        Ok(())
    }
}
