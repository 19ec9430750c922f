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

    /// The whole file: the first page with footer, header and locator; the BAT; the footer.
    fn bytes(&self) -> Result<Vec<u8>> {
        require_size(self.size)?;
        let kind = if self.parent.is_some() { DiskType::Differencing } else { DiskType::Dynamic };
        let footer = Footer::new(kind, self.size, self.id, self.time);
        let mut header = Header::new(self.size, BlockSize::DEFAULT)?;
        let mut text = Vec::new();
        if let Some(parent) = &self.parent {
            text = parent.locator_text()?;
            header.set_parent(parent, LOCATOR_AT, LOCATOR_SPACE, text.len() as u64);
        }
        let table = bat::empty(header.entries());
        let mut bytes = Vec::with_capacity(BAT_AT as usize + table.len() + FOOTER as usize);
        bytes.extend_from_slice(footer.bytes());
        bytes.extend_from_slice(header.bytes());
        bytes.extend_from_slice(&text);
        bytes.resize(PAGE as usize, 0);
        bytes.extend_from_slice(&table);
        bytes.extend_from_slice(footer.bytes());
        debug_assert_eq!(LOCATOR_AT, FOOTER + HEADER);
        Ok(bytes)
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

/// Writes a new image into an empty file, in one write, and makes it durable. The file's name is the caller's
/// to make durable.
///
/// # Errors
/// [`ErrorKind::InvalidInput`], [`ErrorKind::LimitExceeded`], [`ErrorKind::NoSpace`]; the system's.
pub fn write_into(file: File, path: &Path, new: &NewImage) -> Result<()> {
    create_in(Box::new(file), path, new)
}

pub(super) fn create_in(storage: Box<dyn Storage>, path: &Path, new: &NewImage) -> Result<()> {
    let bytes = new.bytes().context("create", path)?;
    let file = ImageFile::new(storage, path, true);
    file.write_at(&bytes, HostOffset(0))?;
    file.flush()
}

#[cfg(test)]
mod tests {
    use image_files::engine::recorder::{Event, Recorder};

    use super::*;
    use crate::image::Vhd;

    /// An image of 2040 GiB is one write and one flush; its last sector is written and read. A larger one is
    /// refused.
    #[test]
    fn largest_image_is_one_write() {
        let recorder = Recorder::new(Vec::new());
        create_in(Box::new(recorder.clone()), Path::new("/large.vhd"), &NewImage::new(MAX_SIZE)).unwrap();
        assert!(matches!(recorder.log().as_slice(), [Event::Write(0, _), Event::Flush]));
        let mut image = Vhd::from_file(recorder.open(true)).unwrap();
        assert_eq!(image.check(false).unwrap(), []);
        image.write_at(&[7; 512], MAX_SIZE - SECTOR).unwrap();
        image.flush().unwrap();
        // The entries that changed, and not the whole BAT, are written.
        let written: usize = recorder.log()[2..]
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
