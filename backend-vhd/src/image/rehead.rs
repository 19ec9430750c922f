//! A change of a child's parent: its id, its name and the locator.
//!
//! # What is durable before what
//! In an image of our layout everything is in the first page, which is written at once. In others the text
//! of the locator is first written behind the end, with a footer behind it, and is durable before the
//! header refers to it. A header that is torn by a power loss has a wrong checksum; the same change, made
//! again, mends it, because no field that it needs is in what was written.

use image_files::engine::HostOffset;

use super::error::{Context, Error, ErrorKind, Result};
use super::footer::{CREATOR, DiskType, FOOTER};
use super::header::{BAT_AT, HEADER, Header, LOCATOR_AT, LOCATOR_SPACE, ParentName};
use super::open::Vhd;
use super::units::{PAGE, SECTOR};

impl Vhd {
    /// Names another parent, which shows the same as the previous one. The data of the image is not touched.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an image without a parent, or a path that is too long;
    /// [`ErrorKind::ReadOnly`], [`ErrorKind::Dirty`], [`ErrorKind::Corrupt`]; the system's.
    pub fn set_parent(&mut self, parent: &ParentName) -> Result<()> {
        let path = self.path().to_owned();
        self.name_parent(parent).context("change the parent of", &path)
    }

    fn name_parent(&mut self, parent: &ParentName) -> Result<()> {
        if self.disk_type() != DiskType::Differencing {
            return Err(Error::new(ErrorKind::InvalidInput, "it has no parent"));
        }
        self.require_writable()?;
        let Some(mut header) = self.header.clone() else { return Ok(()) };
        let text = parent.locator_text()?;
        if self.has_our_layout(&header) {
            header.set_parent(parent, LOCATOR_AT, LOCATOR_SPACE, text.len() as u64);
            self.write_first_page(&header, &text)?;
        } else {
            let space = (text.len() as u64).next_multiple_of(SECTOR);
            let at = self.end + FOOTER;
            // 1) The footer at the new end, and the text before it: nothing refers to it yet.
            self.file.write_at(self.footer.bytes(), HostOffset(at + space))?;
            self.end = at + space;
            let mut padded = text.clone();
            padded.resize(space as usize, 0);
            self.file.write_at(&padded, HostOffset(at))?;
            self.file.flush()?;
            // 2) The header, which refers to it.
            header.set_parent(parent, at, space, text.len() as u64);
            self.file.write_at(header.bytes(), HostOffset(self.footer.header_offset()))?;
            self.file.flush()?;
        }
        self.header = Some(header);
        Ok(())
    }

    /// Returns true if footer copy, header and locator are where this engine writes them.
    pub(super) fn has_our_layout(&self, header: &Header) -> bool {
        self.footer.raw.creator == CREATOR
            && self.footer.header_offset() == FOOTER
            && header.bat_offset().0 == BAT_AT
    }

    /// Writes the first page of an image of our layout, and makes it durable.
    pub(super) fn write_first_page(&mut self, header: &Header, text: &[u8]) -> Result<()> {
        let mut page = Vec::with_capacity(PAGE as usize);
        page.extend_from_slice(self.footer.bytes());
        page.extend_from_slice(header.bytes());
        page.extend_from_slice(text);
        page.resize(PAGE as usize, 0);
        debug_assert_eq!(FOOTER + HEADER, LOCATOR_AT);
        self.file.write_at(&page, HostOffset(0))?;
        self.file.flush()
    }

    /// The bytes of the first page from the locator's place on, as they are.
    pub(super) fn first_page_rest(&self) -> Result<Vec<u8>> {
        let mut rest = vec![0; LOCATOR_SPACE as usize];
        self.file.read_at(&mut rest, HostOffset(LOCATOR_AT))?;
        Ok(rest)
    }
}
