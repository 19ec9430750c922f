//! Points that are read and compared: whole files, by their data.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use image_files::names::{io_error, open_image};
use image_files::{LockError, LockMode, lock, size_of};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use snapcore::backend::{Differences, DiskState, PointExtent, PointImage, Ranges};
use snapcore::{DiskRecord, Error, ErrorKind, Point, Result};

/// An open point, or the disk itself.
pub(crate) struct OpenPoint {
    file: File,
    path: Utf8PathBuf,
    size: u64,
}

/// Opens a copy, or the disk itself at rest, with a reader's lock.
pub(crate) fn open(record: &DiskRecord, state: &DiskState, point: &Point) -> Result<OpenPoint> {
    let layer = state.layer(&point.layer).filter(|_| point.tag.is_none()).ok_or_else(|| {
        let detail = format!("{}: {} does not exist", record.disk.target, point.layer);
        Error::new(ErrorKind::NotFound, detail)
            .state("no changes made")
            .advise("run `domsnap check` to see what is missing")
    })?;
    let path = layer.path().to_owned();
    let file = open_image(&path, false)?;
    lock(&file, LockMode::Read).map_err(|error| {
        let kind = if matches!(error, LockError::Held(_)) { ErrorKind::Busy } else { ErrorKind::Io };
        let advice = error.advice();
        Error::new(kind, format!("locking {path}: {error}")).because(error).advise(advice)
    })?;
    let size = size_of(&file).map_err(|error| io_error(error, format!("cannot look at {path}")))?;
    Ok(OpenPoint { file, path, size })
}

/// Finds the ranges in which two points differ, by their data. What is a hole in both is not read.
pub(crate) fn compare(from: OpenPoint, to: OpenPoint) -> Result<Differences> {
    let mut ranges = Ranges::default();
    let end = from.size.min(to.size);
    let mut at = 0;
    while at < end {
        let (a, b) = (from.extent(at, end)?, to.extent(at, end)?);
        let next = a.end.min(b.end).max(at + 1);
        if !(a.zero && b.zero) {
            ranges.add_differences(&from, &to, at..next)?;
        }
        at = next;
    }
    ranges.add(end..to.size);
    let mut found = Differences::new(Arc::new(from), Arc::new(to), ranges.into_vec());
    found.notes.push("raw images have no record of what is where: all data of both were read".to_owned());
    Ok(found)
}

impl OpenPoint {
    /// The extent at `at`, up to `end`. A file system without holes has data everywhere.
    fn extent(&self, at: u64, end: u64) -> Result<PointExtent> {
        let failed = |errno: Errno| io_error(errno.into(), format!("cannot look at {}", self.path));
        let data = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
            Ok(data) => data.min(end),
            Err(Errno::NXIO) => end,
            Err(Errno::INVAL | Errno::OPNOTSUPP | Errno::SPIPE) => at,
            Err(errno) => return Err(failed(errno)),
        };
        if data > at {
            return Ok(PointExtent { start: at, end: data, zero: true });
        }
        let hole = match rustix::fs::seek(&self.file, SeekFrom::Hole(at)) {
            Ok(hole) => hole.min(end),
            Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP | Errno::SPIPE) => end,
            Err(errno) => return Err(failed(errno)),
        };
        Ok(PointExtent { start: at, end: hole.max(at + 1), zero: false })
    }
}

impl PointImage for OpenPoint {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.file.read_at(rest, offset.saturating_add(done as u64)) {
                Ok(0) => {
                    rest.fill(0);
                    break;
                }
                Ok(read) => done += read,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed_read(error, &self.path)),
            }
        }
        Ok(())
    }

    fn extents(&self, offset: u64, end: u64, limit: usize) -> Result<Vec<PointExtent>> {
        let (mut at, end, mut extents) = (offset, end.min(self.size), Vec::new());
        while at < end && extents.len() < limit {
            let extent = self.extent(at, end)?;
            at = extent.end;
            extents.push(extent);
        }
        Ok(extents)
    }

    fn require_still(&self) -> Result<()> {
        // The file is locked against writers, and its content does not depend on its name.
        Ok(())
    }
}

fn failed_read(error: std::io::Error, path: &Utf8Path) -> Error {
    io_error(error, format!("cannot read {path}"))
}
