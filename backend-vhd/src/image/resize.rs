//! Making the disk of an image larger.
//!
//! # What is durable before what
//! The longer BAT may need the place of blocks, or of the footer. Each such block is copied to the end and
//! is durable there before its entry says so; the entry is durable before the place is used. Then the new
//! entries are written and are durable. Then the first page states the new size; then the footer at the end
//! does, which decides. So at every point the image is valid and has the old or the new size. Between the
//! last two writes the footers differ: a repair takes the old size back, and the operation can be repeated.

use image_files::engine::HostOffset;

use super::bat::Bat;
use super::create::require_size;
use super::error::{Context, Error, ErrorKind, Result};
use super::footer::FOOTER;
use super::header::{HEADER, Header};
use super::open::{HALF_DONE, Vhd};
use super::units::{PAGE, SECTOR};

/// Bytes of one copy.
const CHUNK: usize = 1 << 20;

impl Vhd {
    /// Makes the disk `size` bytes large. It reads as zeros beyond the previous end.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a smaller size, [`ErrorKind::LimitExceeded`] beyond 2040 GiB,
    /// [`ErrorKind::Unsupported`] if another structure lies behind the BAT; as [`Vhd::require_writable`]; the
    /// system's.
    pub fn grow(&mut self, size: u64) -> Result<()> {
        let path = self.path().to_owned();
        let writes = self.file.writes();
        self.grow_to(size).context("resize", &path).map_err(|error| match self.file.writes() == writes {
            true => error,
            false => error.after_writes(HALF_DONE),
        })
    }

    fn grow_to(&mut self, size: u64) -> Result<()> {
        require_size(size)?;
        if size < self.size() {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the disk has {} bytes, and a VHD is not made smaller", self.size()),
            )
            .advise("copy it to a smaller image inside the guest"));
        }
        self.require_writable()?;
        if size == self.size() {
            return Ok(());
        }
        match self.header.clone() {
            None => self.grow_fixed(size),
            Some(header) => self.grow_blocks(header, size),
        }
    }

    /// The footer at the new end is durable before the old one becomes zeros of the disk. A crash between the
    /// two leaves the old footer's bytes behind the previous end, where the guest had nothing.
    fn grow_fixed(&mut self, size: u64) -> Result<()> {
        let old = self.end;
        let mut footer = self.footer.clone();
        footer.set_size(size);
        let end = size.max(old);
        self.file.write_at(footer.bytes(), HostOffset(end))?;
        self.file.flush()?;
        if end >= old + FOOTER {
            self.file.write_at(&[0; FOOTER as usize], HostOffset(old))?;
            self.file.flush()?;
        }
        (self.footer, self.end) = (footer, end);
        Ok(())
    }

    fn grow_blocks(&mut self, mut header: Header, size: u64) -> Result<()> {
        let needed = header.block().blocks_for(size);
        let entries = u32::try_from(needed)
            .map_err(|_| Error::new(ErrorKind::LimitExceeded, format!("{size} bytes are too many")))?;
        if needed > header.entries() {
            let old_end = header.bat_offset().0 + header.entries() * 4;
            let new_end = header.bat_offset().0 + (needed * 4).next_multiple_of(SECTOR);
            self.make_room(&header, new_end)?;
            self.file.write_at(&vec![0xFF; (new_end - old_end) as usize], HostOffset(old_end))?;
            self.file.flush()?;
            header.set_entries(entries);
        } else {
            // Entries that the smaller disk did not need may have anything in them.
            let old = header.block().blocks_for(self.size());
            let at = header.bat_offset().0 + old * 4;
            let spare = vec![0xFF; ((needed - old) * 4) as usize];
            self.file.write_at(&spare, HostOffset(at))?;
            self.file.flush()?;
        }
        self.clear_tail()?;
        self.footer.set_size(size);
        self.write_start(&header)?;
        self.file.write_at(self.footer.bytes(), HostOffset(self.end))?;
        self.file.flush()?;
        self.bat = Bat::new(&header, needed);
        self.header = Some(header);
        Ok(())
    }

    /// Makes what the last block has behind the end of the disk zeros, if it is stored: it becomes a part of
    /// the disk. Its bits may stay, since the parent has nothing there.
    fn clear_tail(&mut self) -> Result<()> {
        let Some(block) = self.header.as_ref().map(Header::block) else { return Ok(()) };
        let within = self.size() % block.bytes();
        if within == 0 {
            return Ok(());
        }
        let Some(data) = self.data_of(self.size() / block.bytes())? else { return Ok(()) };
        let (at, len) = (HostOffset(data.0 + within), block.bytes() - within);
        if !self.is_zero(at, len)? && !self.file.punch(at, len) {
            self.file.write_at(&vec![0; len as usize], at)?;
        }
        self.file.flush()
    }

    /// Moves what lies where the longer BAT will be.
    fn make_room(&mut self, header: &Header, new_end: u64) -> Result<()> {
        let bat_end = header.bat_end();
        if let Some(batmap) = self.batmap()? {
            return Err(in_the_way("a batmap of blktap", batmap.start()));
        }
        for locator in self.locators()? {
            if locator.at < new_end && locator.at + locator.space > bat_end {
                return Err(in_the_way("a parent locator", locator.at));
            }
        }
        let at = self.footer.header_offset();
        if at < new_end && at + HEADER > bat_end {
            return Err(in_the_way("the header", at));
        }
        let mut moving = Vec::new();
        self.bat.for_each(&self.file, |block, sector| {
            if u64::from(sector) * SECTOR < new_end {
                moving.push((block, sector));
            }
            Ok(())
        })?;
        for (block, sector) in moving {
            self.move_to_end(header, block, sector)?;
        }
        if self.end < new_end {
            // The footer itself is in the way.
            self.file.write_at(self.footer.bytes(), HostOffset(new_end))?;
            self.end = new_end;
            self.file.flush()?;
        }
        Ok(())
    }

    fn move_to_end(&mut self, header: &Header, block: u64, sector: u32) -> Result<()> {
        let (bitmap, stored) = (header.block().bitmap_bytes(), header.block().stored_bytes());
        let data = (self.end + FOOTER + bitmap).next_multiple_of(PAGE);
        let place = data - bitmap;
        let number = u32::try_from(place / SECTOR).ok().filter(|number| *number != super::bat::FREE);
        let number = number.ok_or_else(|| Error::new(ErrorKind::NoSpace, "the file is too large"))?;
        self.file.write_at(self.footer.bytes(), HostOffset(place + stored))?;
        self.end = place + stored;
        let mut buffer = vec![0; CHUNK];
        let mut done = 0;
        while done < stored {
            let n = (stored - done).min(CHUNK as u64);
            let part = buffer.get_mut(..n as usize).unwrap_or_default();
            self.file.read_at(part, HostOffset(u64::from(sector) * SECTOR + done))?;
            self.file.write_at(part, HostOffset(place + done))?;
            done += n;
        }
        self.file.flush()?;
        self.bat.set(&self.file, block, number)?;
        self.bat.write(&self.file)?;
        self.file.flush()
    }

    /// Writes the copy of the footer and the header, and makes both durable.
    pub(super) fn write_start(&mut self, header: &Header) -> Result<()> {
        if self.has_our_layout(header) {
            let rest = self.first_page_rest()?;
            return self.write_first_page(header, &rest);
        }
        self.file.write_at(header.bytes(), HostOffset(self.footer.header_offset()))?;
        self.file.flush()?;
        self.file.write_at(self.footer.bytes(), HostOffset(0))?;
        self.file.flush()
    }
}

fn in_the_way(what: &str, at: u64) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{what}, at {at:#x}, lies where the longer BAT would be"))
        .advise("copy the disk to a new image with `domsnap disk materialise`; no changes made")
}
