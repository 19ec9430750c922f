//! Creation of images.

use std::fs::File;
use std::path::Path;

use image_files::engine::HostOffset;

use super::bat;
use super::error::{Context, Error, ErrorKind, Result};
use super::file::{ImageFile, Storage};
use super::footer::{DiskType, FOOTER, Footer};
use super::header::{BAT_AT, HEADER, Header, LOCATOR_AT, LOCATOR_SPACE, ParentName};
use super::units::{BlockSize, MAX_SIZE, PAGE, SECTOR, TimeStamp, UniqueId};

/// Bytes of the BAT that are written at once.
const PIECE: u64 = 256 << 10;

/// A new image.
#[derive(Clone, Debug)]
pub struct NewImage {
    size: u64,
    id: UniqueId,
    time: TimeStamp,
    parent: Option<ParentName>,
}

impl NewImage {
    /// An empty dynamic image of a disk of `size` bytes, with a random id.
    pub fn new(size: u64) -> Self {
        Self { size, id: UniqueId::random(), time: TimeStamp::now(), parent: None }
    }

    /// Makes it a differencing image.
    #[must_use]
    pub fn on(mut self, parent: ParentName) -> Self {
        self.parent = Some(parent);
        self
    }

    /// Sets the id.
    #[must_use]
    pub fn id(mut self, id: UniqueId) -> Self {
        self.id = id;
        self
    }

    /// Calls `put` with the parts of the file, in their order, and their places: the first page with footer,
    /// header and locator; the BAT; the footer. Small images are one part. The BAT of a large one, up to 4
    /// MiB of one byte, is given piece by piece from one buffer: memory that is touched for the first time
    /// costs more than a write.
    fn write(&self, mut put: impl FnMut(&[u8], HostOffset) -> Result<()>) -> Result<()> {
        require_size(self.size)?;
        let kind = if self.parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
        let footer = Footer::new(kind, self.size, self.id, self.time);
        let mut header = Header::new(self.size, BlockSize::DEFAULT)?;
        let mut text = Vec::new();
        if let Some(parent) = &self.parent {
            text = parent.locator_text()?;
            header.set_parent(parent, LOCATOR_AT, LOCATOR_SPACE, text.len() as u64);
        }
        debug_assert_eq!(LOCATOR_AT, FOOTER + HEADER);
        let mut left = bat::bytes_of_empty(header.entries());
        let mut bytes = Vec::with_capacity((PAGE + left.min(PIECE) + FOOTER) as usize);
        bytes.extend_from_slice(footer.bytes());
        bytes.extend_from_slice(header.bytes());
        bytes.extend_from_slice(&text);
        bytes.resize(PAGE as usize, 0);
        let mut at = 0;
        loop {
            let now = left.min(PIECE);
            bytes.resize(bytes.len() + now as usize, 0xFF);
            left -= now;
            if left == 0 {
                bytes.extend_from_slice(footer.bytes());
                return put(&bytes, HostOffset(at));
            }
            put(&bytes, HostOffset(at))?;
            at += bytes.len() as u64;
            bytes.clear();
        }
    }
}

/// Bytes of the file of a new image of a disk of this size.
pub fn bytes_of_new(size: u64) -> u64 {
    let table = BlockSize::DEFAULT.blocks_for(size).saturating_mul(4);
    table.next_multiple_of(SECTOR).saturating_add(BAT_AT + FOOTER)
}

/// Fails for a size that a VHD cannot have.
pub(super) fn require_size(size: u64) -> Result<()> {
    if size == 0 || !size.is_multiple_of(SECTOR) {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            format!("a VHD cannot have {size} bytes: its size is a whole number of sectors of 512 bytes"),
        ));
    }
    if size > MAX_SIZE {
        return Err(Error::new(
            ErrorKind::LimitExceeded,
            format!("a VHD cannot have {size} bytes: the format ends at {MAX_SIZE} (2040 GiB)"),
        )
        .advise("use qcow2 for a larger disk"));
    }
    Ok(())
}

/// Writes a new image into an empty file, and makes it durable, with one flush. The file's name is the
/// caller's to make durable, so no order of the writes is needed.
///
/// # Errors
/// [`ErrorKind::InvalidInput`], [`ErrorKind::LimitExceeded`], [`ErrorKind::NoSpace`]; the system's.
pub fn write_into(file: File, path: &Path, new: &NewImage) -> Result<()> {
    create_in(Box::new(file), path, new)
}

pub(super) fn create_in(storage: Box<dyn Storage>, path: &Path, new: &NewImage) -> Result<()> {
    let file = ImageFile::new(storage, path, true);
    new.write(|bytes, at| file.write_at(bytes, at)).context("create", path)?;
    file.flush()
}

#[cfg(test)]
mod tests {
    use image_files::engine::recorder::{Event, Recorder};

    use super::*;
    use crate::image::Vhd;

    /// An image of 2040 GiB is one flush, and writes no byte twice; its last sector is written and read. A
    /// larger one is refused.
    #[test]
    fn largest_image_is_one_flush() {
        let recorder = Recorder::new(Vec::new());
        create_in(Box::new(recorder.clone()), Path::new("/large.vhd"), &NewImage::new(MAX_SIZE)).unwrap();
        let mut end = 0;
        let log = recorder.log();
        for event in &log[..log.len() - 1] {
            let Event::Write(at, bytes) = event else { panic!("{event:?}") };
            assert_eq!(*at, end);
            end += bytes.len() as u64;
        }
        assert!(matches!(log.last(), Some(Event::Flush)));
        assert_eq!(end, bytes_of_new(MAX_SIZE));
        let mut image = Vhd::from_file(recorder.open(true)).unwrap();
        assert_eq!(image.check(false).unwrap(), []);
        image.write_at(&[7; 512], MAX_SIZE - SECTOR).unwrap();
        image.flush().unwrap();
        // The entries that changed, and not the whole BAT, are written.
        let written: usize = recorder.log()[log.len()..]
            .iter()
            .map(|event| if let Event::Write(_, bytes) = event { bytes.len() } else { 0 })
            .sum();
        assert!(written < 16 << 10, "{written} bytes");
        let mut image = Vhd::from_file(recorder.open(false)).unwrap();
        assert!(image.extent(MAX_SIZE - SECTOR).unwrap().data.is_some());
        assert_eq!(require_size(MAX_SIZE + SECTOR).unwrap_err().kind(), ErrorKind::LimitExceeded);
        assert_eq!(require_size(1000).unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}
