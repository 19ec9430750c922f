//! Points that are read and compared: frozen layers of a chain, by block tables and sector bitmaps.

use std::sync::{Arc, Mutex, PoisonError};

use camino::Utf8Path;
use image_files::names::FileId;
use snapcore::backend::{Differences, DiskState, PointExtent, PointImage, Ranges};
use snapcore::{DiskRecord, Error, ErrorKind, Point, Result};

use crate::image::{Chain, ChainOptions, Piece};
use crate::layers::{Limits, file_of};
use crate::served;

/// An open point.
pub(crate) struct OpenPoint {
    chain: Mutex<Chain>,
    /// The files of its layers, bottom first.
    files: Vec<FileId>,
    size: u64,
}

/// Opens a frozen layer, or the active one of a disk at rest, with readers' locks.
pub(crate) fn open(
    record: &DiskRecord,
    state: &DiskState,
    point: &Point,
    limits: &Limits,
) -> Result<OpenPoint> {
    let target = &record.disk.target;
    if point.tag.is_some() || state.layer(&point.layer).is_none() {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{target}: layer {} does not exist", point.layer),
        )
        .state("no changes made")
        .advise("run `domsnap check` to see what is missing"));
    }
    open_file(&file_of(record, &point.layer)?, limits)
}

fn open_file(file: &Utf8Path, limits: &Limits) -> Result<OpenPoint> {
    let mut options = ChainOptions::read_only();
    options.allowed.extend(limits.allowed.iter().map(|directory| directory.as_std_path().to_owned()));
    let chain = Chain::open(file.as_std_path(), &options)?;
    served::require_complete_layers(chain.layers(), file)?;
    let mut files = Vec::new();
    for layer in chain.layers() {
        files.push(id_of(layer.file())?);
    }
    let size = chain.size();
    Ok(OpenPoint { chain: Mutex::new(chain), files, size })
}

fn id_of(file: &image_files::engine::file::ImageFile) -> Result<FileId> {
    use std::os::unix::fs::MetadataExt;
    let path = file.path().display();
    let about = file.file().map(std::fs::File::metadata).transpose();
    match about {
        Ok(Some(about)) => Ok((about.dev(), about.ino())),
        Ok(None) => Err(Error::new(ErrorKind::Unsupported, format!("{path} is no file"))),
        Err(cause) => Err(Error::new(ErrorKind::Io, format!("cannot look at {path}")).because(cause)),
    }
}

/// Finds the ranges in which two points differ: what is not of the same place of the same file.
pub(crate) fn compare(from: OpenPoint, to: OpenPoint) -> Result<Differences> {
    let mut ranges = Ranges::default();
    let end = from.size.min(to.size);
    {
        let (mut one, mut other) = (from.chain(), to.chain());
        let mut at = 0;
        while at < end {
            let (Some(a), Some(b)) = (one.piece(at)?, other.piece(at)?) else { break };
            let next = a.end.min(b.end).min(end).max(at + 1);
            let place = |point: &OpenPoint, piece: &Piece| {
                piece.data.map(|(layer, place)| (point.files.get(layer).copied(), place))
            };
            if place(&from, &a) != place(&to, &b) {
                ranges.add(at..next);
            }
            at = next;
        }
    }
    ranges.add(end..to.size);
    let is_coarse = ranges.is_coarse();
    let mut found = Differences::new(Arc::new(from), Arc::new(to), ranges.into_vec());
    if is_coarse {
        found
            .notes
            .push("there are very many differences: those near each other are given as one".to_owned());
    }
    Ok(found)
}

impl OpenPoint {
    fn chain(&self) -> std::sync::MutexGuard<'_, Chain> {
        self.chain.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PointImage for OpenPoint {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let inside = self.size.saturating_sub(offset).min(buf.len() as u64);
        let (data, past) = buf.split_at_mut(usize::try_from(inside).unwrap_or(0));
        past.fill(0);
        if data.is_empty() {
            return Ok(());
        }
        Ok(self.chain().read_at(data, offset)?)
    }

    fn extents(&self, offset: u64, end: u64, limit: usize) -> Result<Vec<PointExtent>> {
        let mut chain = self.chain();
        let (mut at, end, mut extents) = (offset, end.min(self.size), Vec::<PointExtent>::new());
        while at < end {
            let Some(piece) = chain.piece(at)? else { break };
            let (to, zero) = (piece.end.min(end), piece.data.is_none());
            let is_full = extents.len() >= limit;
            match extents.last_mut() {
                Some(last) if last.zero == zero => last.end = to,
                _ if is_full => break,
                _ => extents.push(PointExtent { start: at, end: to, zero }),
            }
            at = to.max(at + 1);
        }
        Ok(extents)
    }

    fn require_still(&self) -> Result<()> {
        // The files are locked against writers, and their content does not depend on their names.
        Ok(())
    }
}
