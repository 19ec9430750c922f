//! Writes to one image.
//!
//! # What is durable before what
//! * *A new block* is allocated behind the footer at the end. The footer is first written at the new end, and
//!   the new bitmap never lies over the old footer. So at every point the copy at the start is valid, and the
//!   footer at the end is, or is missing.
//! * Data and the bitmaps of new blocks, then a flush, then bitmaps of older blocks and BAT entries, then a
//!   flush ([`Vhd::flush`]). A sector whose bit is durable has its data. After a crash, a sector is the old
//!   or the new one, and no entry leads out of the file.
//! * Of a dynamic image all bits are set at allocation, as other programs do it. The bytes of the new block
//!   are a hole, and zeros is what the disk showed there.

use std::collections::BTreeSet;

use image_files::engine::HostOffset;

use super::bat::FREE;
use super::bitmap::Bitmap;
use super::error::{Error, ErrorKind, Result};
use super::footer::{DiskType, FOOTER};
use super::header::Header;
use super::open::Vhd;
use super::units::{PAGE, SECTOR};

/// A state of the end of the file, to which a failed operation goes back.
#[derive(Clone, Copy, Debug)]
pub(super) struct EndMark(u64);

impl Vhd {
    /// Remembers the end of the file.
    pub(super) fn mark_end(&self) -> EndMark {
        EndMark(self.end)
    }

    /// Gives up the blocks that were allocated since `mark` and are in no entry of the file. The footer at
    /// the old end is still there, because no block lies over it.
    pub(super) fn give_up(&mut self, mark: EndMark) {
        if self.end > mark.0 && self.file.set_len(mark.0 + FOOTER).is_ok() {
            self.end = mark.0;
        }
        self.failed = true;
    }

    /// Writes the footer at the end of room for `blocks` more blocks, and returns the place of the first
    /// one's data and the distance between two.
    fn reserve(&mut self, blocks: u64) -> Result<(u64, u64)> {
        let Some(size) = self.header.as_ref().map(Header::block) else {
            return Err(Error::new(ErrorKind::InvalidInput, "a fixed image has no blocks"));
        };
        let bitmap = size.bitmap_bytes();
        let first = (self.end + FOOTER + bitmap).next_multiple_of(PAGE);
        let distance = (bitmap + size.bytes()).next_multiple_of(PAGE);
        let last = blocks.saturating_sub(1).checked_mul(distance).and_then(|n| n.checked_add(first));
        let end = last.and_then(|last| last.checked_add(size.bytes()));
        let Some(end) = end.filter(|end| (end - bitmap) / SECTOR < u64::from(FREE)) else {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "the file would be larger than its 32-bit sector numbers reach",
            )
            .advise(
                "copy the disk to a new image with `domsnap disk materialise`, which leaves out unused space",
            ));
        };
        // 1) The footer at the new end. It makes the file longer; the rest is a hole.
        self.file.write_at(self.footer.bytes(), HostOffset(end))?;
        self.end = end;
        Ok((first, distance))
    }

    /// Makes sure that `blocks`, in ascending order, are stored. Those that are new have clear bits in a
    /// differencing image and set bits in a dynamic one. Nothing refers to them in the file before
    /// [`Vhd::flush`].
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`], and as [`Vhd::require_writable`]; the system's.
    pub(super) fn allocate(&mut self, blocks: &[u64]) -> Result<()> {
        self.require_writable()?;
        if self.header.is_none() {
            return Ok(()); // A fixed image has all of its space.
        }
        let mut new = Vec::new();
        for block in blocks {
            if self.data_of(*block)?.is_none() {
                new.push(*block);
            }
        }
        if new.is_empty() {
            return Ok(());
        }
        let (first, distance) = self.reserve(new.len() as u64)?;
        let Some(size) = self.header.as_ref().map(Header::block) else { return Ok(()) };
        for (number, block) in new.into_iter().enumerate() {
            let data = first + number as u64 * distance;
            let sector = u32::try_from((data - size.bitmap_bytes()) / SECTOR)
                .map_err(|_| Error::new(ErrorKind::NoSpace, "the file is too large"))?;
            self.add_block(block, sector)?;
        }
        Ok(())
    }

    /// Adds a block, in memory, at a sector of the file: with clear bits in a differencing image, and with
    /// set bits in a dynamic one.
    pub(super) fn add_block(&mut self, block: u64, sector: u32) -> Result<()> {
        let Some(size) = self.header.as_ref().map(Header::block) else { return Ok(()) };
        self.bat.set(&self.file, block, sector)?;
        let bitmap = match self.disk_type() {
            DiskType::Differencing => Bitmap::Bits(vec![0; size.bitmap_bytes() as usize].into()),
            DiskType::Dynamic | DiskType::Fixed => Bitmap::Full,
        };
        self.bitmaps.insert(block, bitmap);
        self.dirty.insert(block);
        self.fresh.insert(block);
        Ok(())
    }

    /// Returns the place of a range of sectors of one block, which is stored; the range's bits are set in
    /// memory.
    pub(super) fn claim(&mut self, at: u64, end: u64) -> Result<HostOffset> {
        let Some(size) = self.header.as_ref().map(Header::block) else { return Ok(HostOffset(at)) };
        let (block, within) = (at / size.bytes(), at % size.bytes());
        let Some(data) = self.data_of(block)? else {
            return Err(Error::corrupt(format!("block {block} is not stored")));
        };
        let (from, to) = (within / SECTOR, (within + (end - at)).div_ceil(SECTOR));
        if self.bitmap(block, data)?.set(from, to, size.sectors()) {
            self.dirty.insert(block);
        }
        Ok(HostOffset(data.0 + within))
    }

    /// End of the block that contains `at`, or of the disk.
    pub(super) fn block_end(&self, at: u64) -> u64 {
        match self.header.as_ref().map(Header::block) {
            Some(size) => ((at / size.bytes() + 1) * size.bytes()).min(self.size()),
            None => self.size(),
        }
    }

    /// Number of the block that contains `at`.
    pub(super) fn block_of(&self, at: u64) -> u64 {
        self.header.as_ref().map_or(0, |header| at / header.block().bytes())
    }

    /// Writes whole sectors. They are durable, and visible to other readers, after the next [`Vhd::flush`].
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for parts of sectors and beyond the end; as [`Vhd::require_writable`];
    /// [`ErrorKind::NoSpace`]; the system's.
    pub fn write_at(&mut self, buf: &[u8], at: u64) -> Result<()> {
        self.require_writable()?;
        self.require_sectors(at, buf.len() as u64)?;
        let (mut at, mut left) = (at, buf);
        while !left.is_empty() {
            let n = (self.block_end(at) - at).min(left.len() as u64);
            let (part, rest) = left.split_at(n as usize);
            self.allocate(&[self.block_of(at)])?;
            // The data before its bits, also in memory: a failed write leaves them clear.
            let place = self.place_of(at)?;
            self.file.write_at(part, place)?;
            self.claim(at, at + n)?;
            (at, left) = (at + n, rest);
        }
        Ok(())
    }

    /// The place of a byte in a stored block, whatever its bit.
    fn place_of(&mut self, at: u64) -> Result<HostOffset> {
        let Some(size) = self.header.as_ref().map(Header::block) else { return Ok(HostOffset(at)) };
        match self.data_of(at / size.bytes())? {
            Some(data) => Ok(HostOffset(data.0 + at % size.bytes())),
            None => Err(Error::corrupt("a block is not stored")),
        }
    }

    /// Makes whole sectors zeros that belong to this image.
    ///
    /// # Errors
    /// As [`Vhd::write_at`].
    pub(super) fn write_zeros(&mut self, at: u64, end: u64) -> Result<()> {
        self.require_writable()?;
        self.require_sectors(at, end - at)?;
        let mut at = at;
        while at < end {
            let to = self.block_end(at).min(end);
            let block = self.block_of(at);
            let is_new = self.header.is_some() && self.data_of(block)?.is_none();
            self.allocate(&[block])?;
            let place = self.place_of(at)?;
            // A new block is a hole.
            if !is_new && !self.file.punch(place, to - at) {
                let zeros = vec![0; (to - at).min(1 << 20) as usize];
                let mut done = 0;
                while done < to - at {
                    let n = (to - at - done).min(zeros.len() as u64);
                    self.file.write_at(&zeros[..n as usize], HostOffset(place.0 + done))?;
                    done += n;
                }
            }
            self.claim(at, to)?;
            at = to;
        }
        Ok(())
    }

    fn require_sectors(&self, at: u64, len: u64) -> Result<()> {
        let is_inside = at.checked_add(len).is_some_and(|end| end <= self.size());
        match is_inside && at.is_multiple_of(SECTOR) && len.is_multiple_of(SECTOR) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{len} bytes at {at} are not whole sectors of the disk of {} bytes", self.size()),
            )),
        }
    }

    /// Makes everything written so far durable: one flush, or two if sectors or blocks are new.
    ///
    /// # Errors
    /// The system's. The image must be opened again then.
    pub fn flush(&mut self) -> Result<()> {
        if self.failed {
            return Err(Error::new(ErrorKind::Io, "an earlier write of it failed").advise("open it again"));
        }
        let written = self.flush_in_order();
        self.failed |= written.is_err();
        written
    }

    fn flush_in_order(&mut self) -> Result<()> {
        // 2) Data, and the bitmaps of blocks to which no entry refers yet.
        let fresh = std::mem::take(&mut self.fresh);
        self.dirty.retain(|block| !fresh.contains(block));
        self.write_bitmaps(fresh)?;
        self.file.flush()?;
        if self.dirty.is_empty() && !self.bat.is_dirty() {
            return Ok(());
        }
        // 3) What refers to them.
        let dirty = std::mem::take(&mut self.dirty);
        self.write_bitmaps(dirty)?;
        self.bat.write(&self.file)?;
        self.file.flush()
    }

    fn write_bitmaps(&mut self, blocks: BTreeSet<u64>) -> Result<()> {
        let Some(size) = self.header.as_ref().map(Header::block) else { return Ok(()) };
        for block in blocks {
            if let (Some(data), Some(bitmap)) = (self.data_of(block)?, self.bitmaps.get(&block)) {
                let bytes = bitmap.to_bytes(size.bitmap_bytes());
                self.file.write_at(&bytes, HostOffset(data.0 - size.bitmap_bytes()))?;
            }
        }
        Ok(())
    }
}
