//! Ranges of data and holes in plain files: fixed images and raw parents.

use image_files::engine::HostOffset;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::error::Result;
use super::file::ImageFile;

/// A range of a disk, from a place that the caller knows to `end`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// First byte after the range.
    pub end: u64,
    /// Place of its first byte in the file; `None` if the image has no data there.
    pub data: Option<HostOffset>,
}

/// Returns the range of data or of a hole at `at`, in a file whose disk has `size` bytes. A file system that
/// reports no holes has data everywhere.
///
/// # Errors
/// The system's.
pub(super) fn next_extent(file: &ImageFile, at: u64, size: u64) -> Result<Extent> {
    let everything = Extent { end: size, data: Some(HostOffset(at)) };
    let Some(opened) = file.file() else { return Ok(everything) };
    // Holes may end in the middle of a sector, so a range of data is made larger, never a hole.
    let sector = super::units::SECTOR;
    match seek(opened, SeekFrom::Data(at)) {
        Ok(data) if data / sector * sector > at => {
            Ok(Extent { end: (data / sector * sector).min(size), data: None })
        }
        Ok(_) => match seek(opened, SeekFrom::Hole(at)) {
            Ok(hole) if hole > at => {
                Ok(Extent { end: hole.next_multiple_of(sector).min(size), data: Some(HostOffset(at)) })
            }
            _ => Ok(everything),
        },
        // No data to the end of the file.
        Err(Errno::NXIO) => Ok(Extent { end: size, data: None }),
        Err(_) => Ok(everything),
    }
}
