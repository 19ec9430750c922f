//! Repair: footers and the batmap. Blocks, bitmaps and the BAT are never changed.

use image_files::engine::HostOffset;

use super::error::{Context, Error, ErrorKind, Result};
use super::footer::{CREATOR, DiskType, FOOTER, FooterPlace};
use super::header::{Header, TORN_HEADER};
use super::open::Vhd;
use super::units::SECTOR;

impl Vhd {
    /// Accepts what an interrupted operation of this engine has left, because the operation is about to be
    /// repeated: footers are repaired, and a torn header may be written again.
    ///
    /// # Errors
    /// As [`Vhd::repair`].
    pub fn resume(mut self) -> Result<Self> {
        self.accept_torn_header();
        if !self.can_be_repaired()? {
            return Ok(self);
        }
        self.repair()?;
        let path = self.path().to_owned();
        let mut repaired = Self::parse(self.file.clone()).context("open", &path)?;
        repaired.accept_torn_header();
        Ok(repaired)
    }

    fn accept_torn_header(&mut self) {
        let found = self.findings.len();
        self.findings.retain(|finding| finding.text != TORN_HEADER);
        self.torn = self.findings.len() < found;
    }

    /// Returns true if the image has findings that keep it from being written, and a repair corrects all of
    /// them.
    ///
    /// # Errors
    /// The system's.
    pub fn can_be_repaired(&mut self) -> Result<bool> {
        let mut found = self.findings.clone();
        self.check_places(&mut found)?;
        let blocking: Vec<bool> =
            found.iter().filter(|finding| finding.blocks_writing).map(|finding| finding.repairable).collect();
        Ok(!blocking.is_empty() && blocking.iter().all(|repairable| *repairable))
    }

    /// Corrects what [`Vhd::check`] calls repairable, and returns what was done. The image must be opened
    /// again.
    ///
    /// The footer that decides is written at the end, made durable, and then written at the start. A crash
    /// leaves one of them valid.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the image has errors that cannot be repaired; nothing is written then.
    /// [`ErrorKind::ReadOnly`]; the system's.
    pub fn repair(&mut self) -> Result<Vec<String>> {
        let path = self.path().to_owned();
        self.repair_parts().context("repair", &path)
    }

    fn repair_parts(&mut self) -> Result<Vec<String>> {
        if !self.file.is_writable() {
            return Err(Error::new(ErrorKind::ReadOnly, "it was opened for reading"));
        }
        let found = self.check(false)?;
        if let Some(finding) = found.iter().find(|finding| finding.blocks_writing && !finding.repairable) {
            return Err(Error::corrupt(finding.text.clone()));
        }
        let mut done = Vec::new();
        if self.findings.iter().any(|finding| finding.repairable) {
            self.repair_footers(&mut done)?;
        }
        if found.iter().any(|finding| finding.repairable && finding.text.contains("batmap")) {
            self.repair_batmap(&mut done)?;
        }
        self.failed = true;
        Ok(done)
    }

    fn repair_footers(&mut self, done: &mut Vec<String>) -> Result<()> {
        let len = self.file.len()?;
        if self.place != FooterPlace::End {
            let at = self.place_for_footer(len)?;
            self.file.write_at(self.footer.bytes(), HostOffset(at))?;
            self.file.flush()?;
            if at + FOOTER < len {
                self.file.set_len(at + FOOTER)?;
                self.file.flush()?;
            }
            done.push(format!("wrote the footer at the end, at {at}"));
        }
        if self.disk_type() != DiskType::Fixed {
            let mut start = [0; FOOTER as usize];
            self.file.read_at(&mut start, HostOffset(0))?;
            if start != self.footer.bytes() {
                self.file.write_at(self.footer.bytes(), HostOffset(0))?;
                self.file.flush()?;
                done.push("wrote the copy of the footer at the start".to_owned());
            }
        }
        Ok(())
    }

    /// The place for a footer that is missing at the end.
    fn place_for_footer(&mut self, len: u64) -> Result<u64> {
        if self.place == FooterPlace::ShortEnd {
            return Ok(len - (FOOTER - 1));
        }
        let used = self.used_end()?.next_multiple_of(SECTOR);
        // Behind the last block of an image of ours is only what a crash has left: QEMU would take it for a
        // new block's data. What other programs keep there is not known.
        if self.footer.raw.creator == CREATOR {
            return Ok(used);
        }
        Ok(match len.is_multiple_of(SECTOR) && len.saturating_sub(FOOTER) >= used {
            true => len - FOOTER,
            false => len.max(used).next_multiple_of(SECTOR),
        })
    }

    /// First byte behind everything that the image's structures use.
    fn used_end(&mut self) -> Result<u64> {
        let Some(header) = self.header.clone() else { return Ok(self.size()) };
        let mut end = self.parts_end(&header)?;
        let stored = header.block().stored_bytes();
        self.bat.for_each(&self.file, |_, sector| {
            end = end.max(u64::from(sector) * SECTOR + stored);
            Ok(())
        })?;
        Ok(end)
    }

    fn repair_batmap(&mut self, done: &mut Vec<String>) -> Result<()> {
        let (Some(batmap), Some(size)) = (self.batmap()?, self.header.as_ref().map(Header::block)) else {
            return Ok(());
        };
        let mut full = Vec::new();
        for block in 0..self.bat.entries() {
            let is_full = match self.data_of(block)? {
                Some(place) => self.bitmap(block, place)?.count(size.sectors()) == size.sectors(),
                None => false,
            };
            full.push(is_full);
        }
        batmap.rewrite(&self.file, |block| full.get(block as usize).copied().unwrap_or(false))?;
        done.push("wrote the batmap again, from the bitmaps".to_owned());
        Ok(())
    }
}
