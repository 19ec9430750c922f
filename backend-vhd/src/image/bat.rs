//! The block allocation table (BAT): the sector at which each block is stored.

use std::collections::{BTreeSet, HashMap};

use image_files::engine::HostOffset;

use super::error::Result;
use super::file::ImageFile;
use super::header::Header;
use super::units::{PAGE, SECTOR};

/// The entry of a block that is not stored.
pub(super) const FREE: u32 = u32::MAX;
/// Entries in a part of the BAT that is read and written at once.
const PER_PAGE: u64 = PAGE / 4;
/// Pages that are read at once when the whole table is.
const PAGES_OF_A_RUN: u64 = 64;

/// The BAT of an image, read page by page when needed.
#[derive(Debug, Default)]
pub(super) struct Bat {
    at: u64,
    entries: u64,
    pages: HashMap<u64, Vec<u8>>,
    dirty: BTreeSet<u64>,
}

impl Bat {
    /// Makes the BAT of an image whose disk needs `entries` of it.
    pub(super) fn new(header: &Header, entries: u64) -> Self {
        Self { at: header.bat_offset().0, entries, ..Self::default() }
    }

    /// Entries that the disk needs.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    fn page(&mut self, file: &ImageFile, number: u64) -> Result<&mut Vec<u8>> {
        if !self.pages.contains_key(&number) {
            let first = number * PER_PAGE;
            let entries = self.entries.saturating_sub(first).min(PER_PAGE);
            let mut page = vec![0xFF; entries as usize * 4];
            file.read_at(&mut page, HostOffset(self.at + first * 4))?;
            self.pages.insert(number, page);
        }
        Ok(self.pages.entry(number).or_default())
    }

    /// The sector of a block, or [`FREE`].
    ///
    /// # Errors
    /// The system's.
    pub(super) fn get(&mut self, file: &ImageFile, block: u64) -> Result<u32> {
        if block >= self.entries {
            return Ok(FREE);
        }
        let at = (block % PER_PAGE) as usize * 4;
        let page = self.page(file, block / PER_PAGE)?;
        Ok(page.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(FREE, u32::from_be_bytes))
    }

    /// Sets the sector of a block in memory. [`Bat::write`] writes it.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn set(&mut self, file: &ImageFile, block: u64, sector: u32) -> Result<()> {
        let at = (block % PER_PAGE) as usize * 4;
        if let Some(bytes) = self.page(file, block / PER_PAGE)?.get_mut(at..at + 4) {
            bytes.copy_from_slice(&sector.to_be_bytes());
            self.dirty.insert(block / PER_PAGE);
        }
        Ok(())
    }

    /// Returns true if an entry was set and not written.
    pub(super) fn is_dirty(&self) -> bool {
        !self.dirty.is_empty()
    }

    /// Writes the pages that changed.
    ///
    /// # Errors
    /// The system's. What was not written stays to be written.
    pub(super) fn write(&mut self, file: &ImageFile) -> Result<()> {
        while let Some(number) = self.dirty.first().copied() {
            if let Some(page) = self.pages.get(&number) {
                file.write_at(page, HostOffset(self.at + number * PAGE))?;
            }
            self.dirty.remove(&number);
        }
        Ok(())
    }

    /// Calls `each` with every stored block and its sector, in the order of the disk. The table is read in
    /// long runs, and not kept: that of the largest disk has 4 MiB.
    ///
    /// # Errors
    /// The system's, and those of `each`.
    pub(super) fn for_each(
        &mut self,
        file: &ImageFile,
        mut each: impl FnMut(u64, u32) -> Result<()>,
    ) -> Result<()> {
        let pages = self.entries.div_ceil(PER_PAGE);
        // One buffer for all runs: memory that is touched for the first time costs more than a read.
        let mut run = Vec::new();
        let mut number = 0;
        while number < pages {
            let next = (number + PAGES_OF_A_RUN).min(pages);
            let first = number * PER_PAGE;
            let entries = (next * PER_PAGE).min(self.entries) - first;
            run.resize(entries as usize * 4, 0xFF);
            file.read_at(&mut run, HostOffset(self.at + first * 4))?;
            if run.iter().fold(0xFF, |all, byte| all & byte) == 0xFF && !self.is_known(number..next) {
                number = next;
                continue;
            }
            // Pages in memory may have entries that are not written yet.
            for (page, part) in (number..next).zip(run.chunks_mut(PAGE as usize)) {
                if let Some(known) = self.pages.get(&page).filter(|known| known.len() == part.len()) {
                    part.copy_from_slice(known);
                }
            }
            for (bytes, block) in run.chunks_exact(4).zip(first..) {
                let sector = bytes.try_into().map_or(FREE, u32::from_be_bytes);
                if sector != FREE {
                    each(block, sector)?;
                }
            }
            number = next;
        }
        Ok(())
    }

    /// Returns true if a page of these is in memory.
    fn is_known(&self, pages: std::ops::Range<u64>) -> bool {
        !self.pages.is_empty() && pages.into_iter().any(|page| self.pages.contains_key(&page))
    }

    /// Returns the first block from `block` on that is stored, looking at no more than one page.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn next_stored(&mut self, file: &ImageFile, block: u64) -> Result<u64> {
        let number = block / PER_PAGE;
        let skipped = (block % PER_PAGE) as usize;
        let page = self.page(file, number)?;
        let found = page.chunks_exact(4).skip(skipped).position(|bytes| bytes != FREE.to_be_bytes());
        Ok(match found {
            Some(n) => block + n as u64,
            None => (number + 1) * PER_PAGE,
        })
    }
}

/// The number of bytes of an empty BAT, padded to whole sectors. Each is 0xFF.
pub(super) fn bytes_of_empty(entries: u64) -> u64 {
    (entries * 4).next_multiple_of(SECTOR)
}
