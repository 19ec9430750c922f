//! Points that are read and compared, also while a running domain writes the image.
//!
//! An internal snapshot of an image that a hypervisor has open is read without a lock. Its tables and
//! clusters have other references than the active state, so a writer copies them before it changes them. Only
//! bit 63 of a shared entry may change, which says nothing of the content. What moves is the snapshot table.
//! So it is read between two reads of the header, and again if that has changed. After the last read of data
//! the snapshot is looked up once more: if another program has deleted it meanwhile, its clusters may have
//! been written. It is looked up in the open file: a create of an external snapshot gives the path to another
//! image meanwhile.
//!
//! A frozen layer gets a reader's lock, which refuses writers.

use std::sync::Arc;
use std::time::Duration;

use camino::Utf8Path;
use image_files::chain::Tag;
use image_files::names::{FileId, file_id};
use image_files::{BaseImage, Bases, LockMode, lock};
use snapcore::backend::{Differences, DiskState, PointExtent, PointImage};
use snapcore::{DiskRecord, Error, ErrorKind, Point, Result};

use crate::image::{
    self, BottomReader, Content, Image, ImageFile, OpenOptions, PointReader, RunLayer, Under, differences,
};
use crate::tags::{has_tag, identity_of};

/// How often the snapshot table is read while another program changes it.
const TABLE_READS: u32 = 20;

/// Time between two of these reads.
const TABLE_PAUSE: Duration = Duration::from_millis(20);

/// An open point.
pub(crate) struct OpenPoint {
    shown: Shown,
    size: u64,
    /// The qcow2 layers, from the bottom up.
    run: Vec<RunLayer>,
    /// The image below them.
    base: Option<FileId>,
    /// The internal snapshot that it is, and its file.
    tag: Option<(Arc<ImageFile>, Tag)>,
}

enum Shown {
    Chain(PointReader),
    Base(Box<dyn BottomReader>),
}

/// A base image that another crate reads.
struct Base(Arc<dyn BaseImage>);

impl BottomReader for Base {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> image::Result<()> {
        let failed = |error: Error| image::Error::new(image::ErrorKind::InvalidInput, error.to_string());
        self.0.read_at(buf, offset).map_err(failed)
    }
}

/// Opens a point of a disk.
pub(crate) fn open(
    record: &DiskRecord,
    state: &DiskState,
    point: &Point,
    bases: &Bases,
) -> Result<OpenPoint> {
    let target = &record.disk.target;
    let chain = state.chain(&point.layer);
    let Some(top) = chain.first() else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{target}: layer {} does not exist", point.layer),
        )
        .state("no changes made")
        .advise("run `domsnap check` to see what is missing"));
    };
    let (mut run, mut base, mut tag) = (Vec::new(), None, None);
    for (number, layer) in chain.iter().enumerate() {
        let file = layer.path();
        if layer.format != "qcow2" {
            base = Some((open_base(file, &layer.format, bases)?, required_id(file)?, layer.virtual_size));
            break;
        }
        match point.tag.as_deref().filter(|_| number == 0) {
            Some(name) => {
                let file = Arc::new(ImageFile::open(file.as_std_path(), false)?);
                let (layer, found) = open_tag(&file, name)?;
                run.push(layer);
                tag = Some((file, found));
            }
            None => run.push(RunLayer::active(&Image::open(file.as_std_path(), &OpenOptions::read_only())?)?),
        }
    }
    run.reverse();
    let size = run.last().map_or(top.virtual_size, RunLayer::size);
    let id = base.as_ref().map(|(_, id, _)| *id);
    let shown = match (run.is_empty(), base) {
        (true, Some((base, _, _))) => Shown::Base(base),
        (_, base) => Shown::Chain(PointReader::new(run.clone(), base.map(|(base, _, _)| base))?),
    };
    Ok(OpenPoint { shown, size, run, base: id, tag })
}

/// Opens the state of an internal snapshot. Another program may change the snapshot table meanwhile.
fn open_tag(file: &Arc<ImageFile>, name: &str) -> Result<(RunLayer, Tag)> {
    let path = file.path().display();
    let attempt = || -> Result<Option<(RunLayer, Tag)>> {
        let image = Image::of(Arc::clone(file))?;
        let table = (image.header().snapshots_offset, image.header().snapshot_count);
        let found = image.require_snapshot(name)?;
        let tag = Tag { name: name.to_owned(), identity: Some(identity_of(found)) };
        let layer = RunLayer::snapshot(&image, found)?;
        let again = Image::of(Arc::clone(file))?;
        let unchanged = (again.header().snapshots_offset, again.header().snapshot_count) == table;
        Ok((unchanged && has_tag(&again, &tag)?).then_some((layer, tag)))
    };
    let mut last = None;
    for number in 0..TABLE_READS {
        if number > 0 {
            std::thread::sleep(TABLE_PAUSE);
        }
        // A table that was replaced while it was read may look broken, or lack the snapshot.
        match attempt() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => {}
            Err(error) if error.kind() == ErrorKind::Io => return Err(error),
            Err(error) => {
                let same = last.as_ref().is_some_and(|last: &Error| last.to_string() == error.to_string());
                last = Some(error);
                if same {
                    break;
                }
            }
        }
    }
    Err(last.unwrap_or_else(|| {
        Error::new(
            ErrorKind::Busy,
            format!("another program changes the snapshot table of {path} all the time"),
        )
        .state("no changes made")
        .advise("try again when its snapshots are not taken and deleted")
    }))
}

fn required_id(file: &Utf8Path) -> Result<FileId> {
    file_id(file)?.ok_or_else(|| Error::new(ErrorKind::NotFound, format!("{file} does not exist")))
}

fn open_base(file: &Utf8Path, format: &str, bases: &Bases) -> Result<Box<dyn BottomReader>> {
    if let Some(base) = bases.open(file, format, true)? {
        return Ok(Box::new(Base(base)));
    }
    if format != "raw" {
        return Err(Error::new(ErrorKind::Unsupported, format!("{file} has the format {format}"))
            .state("no changes made")
            .advise("points on qcow2, raw and VHD (vpc) images can be read"));
    }
    let opened = ImageFile::open(file.as_std_path(), false)?;
    if let Some(file) = opened.file() {
        lock(file, LockMode::Read).map_err(image::Error::from)?;
    }
    Ok(Box::new(opened))
}

/// Finds the ranges in which two points differ.
pub(crate) fn compare(from: OpenPoint, to: OpenPoint) -> Result<Differences> {
    let under = match (from.base, to.base) {
        (None, None) => Under::Nothing,
        (Some(one), Some(other)) if one == other => Under::Same,
        _ => Under::Different,
    };
    let (ranges, is_coarse) = differences((&from.run, from.size), (&to.run, to.size), under)?;
    let mut found = Differences::new(Arc::new(from), Arc::new(to), ranges);
    if under == Under::Different {
        found.notes.push(
            "the two have different images at the bottom of their chains: what those show counts as different"
                .to_owned(),
        );
    }
    if is_coarse {
        found
            .notes
            .push("there are very many differences: those near each other are given as one".to_owned());
    }
    Ok(found)
}

impl PointImage for OpenPoint {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        match &self.shown {
            Shown::Chain(reader) => Ok(reader.read_at(buf, offset)?),
            Shown::Base(base) => {
                let inside = self.size.saturating_sub(offset).min(buf.len() as u64);
                let (data, past) = buf.split_at_mut(usize::try_from(inside).unwrap_or(0));
                past.fill(0);
                Ok(base.read_at(data, offset)?)
            }
        }
    }

    fn extents(&self, offset: u64, end: u64, limit: usize) -> Result<Vec<PointExtent>> {
        let end = end.min(self.size);
        match &self.shown {
            Shown::Chain(reader) => {
                let pieces = reader.pieces(offset, end, limit)?;
                let zero = |content| matches!(content, Content::Zero | Content::PastEnd);
                let extents = pieces.into_iter().map(|piece| PointExtent {
                    start: piece.start,
                    end: piece.end,
                    zero: zero(piece.content),
                });
                Ok(extents.collect())
            }
            Shown::Base(_) if offset >= end => Ok(Vec::new()),
            Shown::Base(_) => Ok(vec![PointExtent { start: offset, end, zero: false }]),
        }
    }

    fn require_still(&self) -> Result<()> {
        let Some((file, tag)) = &self.tag else { return Ok(()) };
        let (_, found) = open_tag(file, &tag.name)?;
        if found.identity == tag.identity {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NotFound,
            format!(
                "another program deleted internal snapshot {} in {} while it was read",
                tag.name,
                file.path().display()
            ),
        )
        .advise("the snapshot is lost: `domsnap check` lists it; choose another one"))
    }
}
