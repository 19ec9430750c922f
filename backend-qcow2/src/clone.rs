//! Clones of qcow2 disks: overlays on frozen layers, and copies of internal snapshots.
//!
//! A backing file shows its active state alone, so an internal snapshot cannot be one: what its own tables
//! map is copied out. The copy has the same backing file, which is pinned.
//!
//! The source may be written meanwhile, by a program that this process does not know. A frozen layer is not.
//! An internal snapshot's tables and clusters have other references than the active state, so a writer copies
//! them before it changes them. What may change is the snapshot table: after a copy the snapshot is looked up
//! again.

use camino::Utf8Path;
use image_files::chain::{ChainStep, CloneContent, Tag};
use image_files::clones::{CloneFiles, SharedLayer, check_places, clone_plan, pins_of, require_room};
use image_files::names;
use snapcore::backend::{CloneDisk, ClonePlan, DiskState, Layer};
use snapcore::{DiskPoint, DiskRecord, Error, ErrorKind, LayerName, Point, Result, shown_size};

use crate::backing_string::{backing_string, check_backing_string};
use crate::image::{self, Backing, Image, NewImage, OpenOptions, RunLayer};
use crate::preflight::encrypted_in;
use crate::steps::{StepRunner, new_snapshot};
use crate::tags::{has_tag, require_tag};

/// Plans clones of a point.
pub(crate) fn plan(
    record: &DiskRecord,
    state: &DiskState,
    request: &CloneDisk,
    max_depth: u32,
) -> Result<ClonePlan<ChainStep>> {
    let target = &record.disk.target;
    let chain = chain_of(record, state, request)?;
    let Some(top) = chain.first() else { return Err(missing(record, request)) };
    check_places(&request.clones, record.disk.path())?;
    refuse_encrypted(record, top, max_depth)?;
    let tag = request.point.tag.as_deref().map(|tag| found_tag(record, top, tag)).transpose()?;
    let strings = backing_strings(&chain)?;
    // An internal snapshot's layer is copied out, and only what is below it is shared.
    let shared: Vec<SharedLayer<'_>> = match (request.full, &tag) {
        (true, _) => Vec::new(),
        (false, tag) => {
            let layers = chain
                .iter()
                .zip(&strings)
                .map(|(layer, named)| SharedLayer { file: layer.path(), named: named.as_deref() });
            layers.skip(usize::from(tag.is_some())).collect()
        }
    };
    let (pins, mut notes) = pins_of(target, &request.clones, &shared)?;
    let (content, bytes) = match (request.full, &tag) {
        (true, tag) => {
            let bytes = visible_bytes(record, &chain, tag.as_ref())?;
            (CloneContent::CopyOfAll { from: top.name.clone(), tag: tag.clone() }, bytes)
        }
        (false, Some(tag)) => {
            let bytes = visible_bytes(record, chain.get(..1).unwrap_or_default(), Some(tag))?;
            (CloneContent::CopyOfTag { from: top.name.clone(), tag: tag.clone() }, bytes)
        }
        (false, None) => {
            let on = match pins.first().and_then(|pin| pin.file_name()) {
                Some(name) => LayerName(name.to_owned()),
                None => LayerName(top.path().to_string()),
            };
            check_backing_string(record.disk.path(), &on)?;
            (CloneContent::Overlay { on, on_format: top.format.clone() }, 0)
        }
    };
    if bytes > 0 {
        require_room(target, &request.clones, bytes)?;
        if !request.full {
            notes.push(format!(
                "{target}: the point is an internal snapshot, which no image can be backed by: {} are copied for each clone",
                shown_size(bytes)
            ));
        }
    }
    let virtual_size = match (&tag, request.point.tag.as_deref()) {
        (Some(_), Some(tag)) => top
            .internal
            .iter()
            .find(|point| point.tag == tag)
            .map_or(top.virtual_size, |point| point.virtual_size),
        _ => top.virtual_size,
    };
    // A frozen layer is the point in the clone too. A copy gets an internal snapshot.
    let keep = request.keep.clone().filter(|_| !matches!(content, CloneContent::Overlay { .. }));
    let make = |files: CloneFiles| {
        let what = match &content {
            CloneContent::Overlay { on, .. } => format!("make {} on {on}", files.image),
            CloneContent::CopyOfTag { tag, .. } => {
                format!("copy internal snapshot {} into {}", tag.name, files.image)
            }
            CloneContent::CopyOfAll { .. } => {
                format!("copy all of {} into {}", request.point.layer, files.image)
            }
        };
        let (content, keep) = (content.clone(), keep.clone());
        (ChainStep::Clone { files, content, virtual_size, keep }, what)
    };
    let publish = |places| ChainStep::PublishClones { places };
    let mut made = clone_plan(record, request, &pins, bytes, make, publish)?;
    made.plan.notes = notes;
    // A base elsewhere that the source may have in its chain.
    let is_elsewhere = |layer: &&LayerName| is_in(&chain, layer) && layer.as_str().starts_with('/');
    for disk in &mut made.disks {
        disk.owned.extend(record.owned.iter().filter(is_elsewhere).cloned());
    }
    if request.keep.is_some() {
        let points = made.disks.iter().map(|disk| {
            let point = match (&content, &keep) {
                (CloneContent::Overlay { on, .. }, _) => Point::external(on.clone()),
                (_, tag) => Point::internal(disk.active.clone(), tag.clone().unwrap_or_default()),
            };
            DiskPoint::new(target.clone(), point, virtual_size)
        });
        made.points = points.collect();
    }
    Ok(made)
}

/// The layers of the point's chain, from the top down.
fn chain_of<'a>(record: &DiskRecord, state: &'a DiskState, request: &CloneDisk) -> Result<Vec<&'a Layer>> {
    let layer = &request.point.layer;
    if request.point.tag.is_none() && *layer == state.active {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("{}: {layer} is what the domain writes, and no point", record.disk.target),
        )
        .state("no changes made")
        .advise("run `domsnap check`"));
    }
    let chain = state.chain(layer);
    match chain.is_empty() {
        true => Err(missing(record, request)),
        false => Ok(chain),
    }
}

fn missing(record: &DiskRecord, request: &CloneDisk) -> Error {
    let layer = &request.point.layer;
    Error::new(ErrorKind::NotFound, format!("{}: layer {layer} does not exist", record.disk.target))
        .state("no changes made")
        .advise("run `domsnap check` to see what is missing")
}

fn is_in(chain: &[&Layer], name: &LayerName) -> bool {
    chain.iter().any(|layer| layer.name == *name)
}

fn found_tag(record: &DiskRecord, layer: &Layer, tag: &str) -> Result<Tag> {
    let image = Image::open(layer.path().as_std_path(), &OpenOptions::read_only().unlocked())?;
    image.require_plain_data()?;
    match image.find_snapshot(tag)? {
        Some(found) => Ok(Tag { name: tag.to_owned(), identity: Some(crate::tags::identity_of(found)) }),
        None => Err(Error::new(
            ErrorKind::NotFound,
            format!("{}: {} has no internal snapshot {tag}", record.disk.target, layer.address),
        )
        .state("no changes made")
        .advise("another program deleted it; delete the snapshot, which it was of")),
    }
}

/// For each layer of a chain, the string by which the layer above it names it.
fn backing_strings(chain: &[&Layer]) -> Result<Vec<Option<String>>> {
    let mut strings = vec![None];
    for layer in chain.iter().filter(|layer| layer.format == "qcow2") {
        let header = image::probe(layer.path().as_std_path())?;
        strings.push(header.and_then(|header| header.backing).map(|backing| backing.file));
    }
    strings.resize(chain.len(), None);
    Ok(strings)
}

/// The bytes that a copy of a chain moves.
fn visible_bytes(record: &DiskRecord, chain: &[&Layer], tag: Option<&Tag>) -> Result<u64> {
    Ok(image::visible_bytes(run_of(record, chain, tag)?)?.into_iter().fold(0, u64::saturating_add))
}

/// A chain as the run that a merge reads.
fn run_of(record: &DiskRecord, chain: &[&Layer], tag: Option<&Tag>) -> Result<Vec<RunLayer>> {
    let mut images = Vec::new();
    for layer in chain {
        if layer.format != "qcow2" {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: the chain ends at {}, of format {}, and domsnap does not copy such a one into a clone",
                    record.disk.target, layer.address, layer.format
                ),
            )
            .state("no changes made")
            .advise(
                "make clones that share it, without --full; or copy the disk of such a clone with `qemu-img convert`",
            ));
        }
        let image = Image::open(layer.path().as_std_path(), &OpenOptions::read_only().unlocked())?;
        image.require_plain_data()?;
        images.push(image);
    }
    run_of_images(&images, tag)
}

/// Images, the top first, as the run that a merge reads: from the bottom up. With a tag, the top shows that.
fn run_of_images(images: &[Image], tag: Option<&Tag>) -> Result<Vec<RunLayer>> {
    let mut run = Vec::new();
    for (number, image) in images.iter().enumerate() {
        run.push(match tag.filter(|_| number == 0) {
            Some(tag) => RunLayer::snapshot(image, image.require_snapshot(&tag.name)?)?,
            None => RunLayer::active(image)?,
        });
    }
    run.reverse();
    Ok(run)
}

fn refuse_encrypted(record: &DiskRecord, top: &Layer, max_depth: u32) -> Result<()> {
    if top.format != "qcow2" {
        return Ok(());
    }
    let Some((file, how)) = encrypted_in(top.path(), max_depth)? else { return Ok(()) };
    Err(Error::new(
        ErrorKind::Unsupported,
        format!(
            "{}: {file} {how}: a clone would hold what its guest writes in the clear",
            record.disk.target
        ),
    )
    .state("no changes made")
    .advise("copy the disk with the tools that have its key"))
}

impl StepRunner<'_> {
    /// Makes the image of a clone, with an internal snapshot `keep` of its content.
    pub(crate) fn clone_disk(
        &self,
        files: &CloneFiles,
        content: &CloneContent,
        size: u64,
        keep: Option<&str>,
    ) -> Result<()> {
        files.begin()?;
        match content {
            CloneContent::Overlay { on, on_format } => self.clone_on(files, on, on_format, size)?,
            CloneContent::CopyOfTag { from, tag } => {
                let source = self.reading(from)?;
                require_tag(&source, source_path(&source), tag)?;
                let file = files.unfinished_image();
                self.moving(|moving| image::materialise(&source, &tag.name, file.as_std_path(), moving))?;
                files.end()?;
                self.require_still(from, Some(tag))?;
            }
            CloneContent::CopyOfAll { from, tag } => {
                self.copy_all(files, from, tag.as_ref())?;
                self.require_still(from, tag.as_ref())?;
            }
        }
        if let Some(keep) = keep {
            let file = files.unfinished_image();
            let mut image = Image::open(file.as_std_path(), &OpenOptions::read_write().unlocked())?;
            image.create_snapshot(&new_snapshot(keep))?;
        }
        Ok(())
    }

    /// Makes an overlay on a pinned layer, or on a base that stays where it is.
    fn clone_on(&self, files: &CloneFiles, on: &LayerName, on_format: &str, size: u64) -> Result<()> {
        let file = files.unfinished_image();
        let base = files.place.unfinished.join(on.as_str());
        let string = backing_string(&file, on);
        let mut new = NewImage::new(size).on(Backing { file: string, format: Some(on_format.to_owned()) });
        if on_format == "qcow2" {
            let base = Image::open(base.as_std_path(), &OpenOptions::read_only().unlocked())?;
            new = new.like(base.header());
            // Only version 3 can mark a cluster above a backing file as zeros.
            new.version = 3;
        }
        names::write_new(&file, self.model(&base), |into, passing| {
            Ok::<_, Error>(image::write_into(into, passing.as_std_path(), &new)?)
        })
    }

    /// The file whose owner and mode a clone's image gets: a device has others than a file of its disk.
    fn model<'a>(&'a self, base: &'a Utf8Path) -> &'a Utf8Path {
        match base.metadata().is_ok_and(|about| about.is_file()) {
            true => base,
            false => self.files.record.disk.path(),
        }
    }

    /// Copies all that a point shows into one image.
    fn copy_all(&self, files: &CloneFiles, from: &LayerName, tag: Option<&Tag>) -> Result<()> {
        let record = self.files.record;
        let (mut layers, mut next) = (Vec::new(), Some(crate::layers::file_of(record, from)?));
        while let Some(path) = next.take() {
            if layers.len() > self.max_depth as usize {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("the chain under {from} is deeper than the limit"),
                ));
            }
            let image = Image::open(path.as_std_path(), &OpenOptions::read_only().unlocked())?;
            if let Some(backing) = &image.header().backing {
                next = Some(crate::backing_string::resolve_backing(&path, &backing.file)?);
            }
            layers.push(image);
        }
        if let (Some(tag), Some(top)) = (tag, layers.first()) {
            require_tag(top, source_path(top), tag)?;
        }
        let run = run_of_images(&layers, tag)?;
        let (Some(top), Some(size)) = (layers.first(), run.last().map(RunLayer::size)) else { return Ok(()) };
        let file = files.unfinished_image();
        let new = NewImage::new(size).like(top.header());
        let model = crate::layers::file_of(record, from)?;
        names::write_new(&file, &model, |into, passing| {
            Ok::<_, Error>(image::write_into(into, passing.as_std_path(), &new)?)
        })?;
        let mut made = Image::open(file.as_std_path(), &OpenOptions::read_write().unlocked())?;
        self.moving(|moving| image::merge(Vec::new(), &mut made, run, None, moving))?;
        Ok(())
    }

    /// Refuses a copy of an internal snapshot that another program has deleted meanwhile: its clusters may
    /// have been written since.
    fn require_still(&self, from: &LayerName, tag: Option<&Tag>) -> Result<()> {
        let Some(tag) = tag else { return Ok(()) };
        match has_tag(&self.reading(from)?, tag)? {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::NotFound,
                format!(
                    "another program deleted internal snapshot {} in {from} while it was copied",
                    tag.name
                ),
            )
            .advise("the snapshot is lost; delete it, or choose another one")),
        }
    }
}

fn source_path(image: &Image) -> &Utf8Path {
    Utf8Path::from_path(image.path()).unwrap_or(Utf8Path::new("the image"))
}
