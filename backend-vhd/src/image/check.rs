//! The check of one image: its structures, and that no two of them share a place in the file.

use image_files::engine::HostOffset;

use super::bat::FREE;
use super::error::Result;
use super::finding::Finding;
use super::footer::{DiskType, FOOTER};
use super::header::{HEADER, Header};
use super::open::Vhd;
use super::space::next_extent;
use super::units::{PAGE, SECTOR, TimeStamp};

/// Findings of one kind that are named one by one.
const NAMED: usize = 8;

/// A part of the file that one structure occupies.
struct Part {
    start: u64,
    end: u64,
    name: &'static str,
}

impl Vhd {
    /// Checks the structures of the image by itself. With `data`, the bytes that no bit belongs to are read
    /// too.
    ///
    /// # Errors
    /// The system's. Contradictions in the image are findings.
    pub fn check(&mut self, data: bool) -> Result<Vec<Finding>> {
        let mut found = self.findings.clone();
        self.check_fields(&mut found);
        if self.header.is_some() {
            self.check_places(&mut found)?;
            if found.iter().all(|finding| !finding.blocks_writing || finding.repairable) {
                self.check_bitmaps(&mut found, data)?;
            }
            self.check_locators(&mut found)?;
        }
        found.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Ok(found)
    }

    fn check_fields(&self, found: &mut Vec<Finding>) {
        let footer = &self.footer;
        if let Some(bytes) = footer.size_by_geometry() {
            found.push(Finding::note(format!(
                "QEMU's driver vpc takes {bytes} bytes for the disk's size, by the geometry, because the creator is {:?}; it is {}",
                footer.creator(),
                footer.size()
            )));
        }
        if footer.time().0 > TimeStamp::now().0.saturating_add(1800) {
            found.push(Finding::note("the time stamp is in the future"));
        }
        if footer.raw.reserved.iter().any(|byte| *byte != 0) || footer.raw.hidden != 0 {
            found.push(Finding::note("reserved bytes of the footer are in use: 7-Zip refuses the image"));
        }
        if footer.id().is_null() {
            found.push(Finding::warning("the unique id is null: no child can name this image as its parent"));
        }
    }

    /// The parts of the file that are no blocks.
    fn parts(&self, header: &Header) -> Result<Vec<Part>> {
        let at = self.footer.header_offset();
        let mut parts = vec![
            Part { start: 0, end: FOOTER, name: "the copy of the footer" },
            Part { start: at, end: at + HEADER, name: "the header" },
            Part { start: header.bat_offset().0, end: header.bat_end(), name: "the BAT" },
        ];
        if self.has_our_layout(header) {
            parts.push(Part { start: 0, end: PAGE, name: "the first page" });
        }
        for locator in self.locators()? {
            if locator.path.is_ok() {
                parts.push(Part { start: locator.at, end: locator.at + locator.length, name: "a locator" });
            }
        }
        if let Some(batmap) = self.batmap()? {
            parts.push(Part { start: batmap.start(), end: batmap.end(), name: "the batmap" });
        }
        Ok(parts)
    }

    /// First byte behind all structures that are no blocks.
    pub(super) fn parts_end(&self, header: &Header) -> Result<u64> {
        Ok(self.parts(header)?.iter().map(|part| part.end).max().unwrap_or(0))
    }

    /// Finds blocks that lie outside of the file, over each other, or over another structure, in one pass
    /// over the sorted places.
    pub(super) fn check_places(&mut self, found: &mut Vec<Finding>) -> Result<()> {
        let Some(header) = self.header.clone() else { return Ok(()) };
        let stored = header.block().stored_bytes();
        let mut places: Vec<(u32, u32)> = Vec::new();
        self.bat.for_each(&self.file, |block, sector| {
            places.push((sector, block as u32));
            Ok(())
        })?;
        places.sort_unstable();
        let mut errors = Vec::new();
        let parts = self.parts(&header)?;
        let mut covered = 0;
        for (sector, block) in &places {
            let start = u64::from(*sector) * SECTOR;
            let end = start + stored;
            let over = parts.iter().find(|part| start < part.end && part.start < end);
            if end > self.end {
                errors.push(format!(
                    "block {block}, at sector {sector}, ends behind the end of the file's data"
                ));
            } else if let Some(part) = over {
                errors.push(format!("block {block}, at sector {sector}, lies over {}", part.name));
            } else if start < covered {
                errors.push(format!("block {block}, at sector {sector}, lies over another block"));
            }
            covered = covered.max(end);
        }
        let more = errors.len().saturating_sub(NAMED);
        found.extend(errors.into_iter().take(NAMED).map(Finding::error));
        if more > 0 {
            found.push(Finding::error(format!("and {more} more such blocks")));
        }
        self.check_batmap_of_free_blocks(found)?;
        self.note_layout(&header, &places, covered, found);
        Ok(())
    }

    /// A set bit of a block that is not stored becomes a lie with the block's first write.
    fn check_batmap_of_free_blocks(&mut self, found: &mut Vec<Finding>) -> Result<()> {
        let Some(batmap) = self.batmap()? else { return Ok(()) };
        for block in 0..self.bat.entries() {
            if batmap.is_set(block) && self.bat.get(&self.file, block)? == FREE {
                let text = format!("the batmap says that block {block} is full, and it is not stored");
                found.push(Finding::error(text).repairable());
                break;
            }
        }
        Ok(())
    }

    fn note_layout(&self, header: &Header, places: &[(u32, u32)], covered: u64, found: &mut Vec<Finding>) {
        let bitmap = header.block().bitmap_bytes();
        let unaligned = places
            .iter()
            .filter(|(sector, _)| !(u64::from(*sector) * SECTOR + bitmap).is_multiple_of(PAGE))
            .count();
        if unaligned > 0 {
            found.push(Finding::note(format!(
                "{unaligned} blocks of {} are not aligned to 4 KiB: they are slower to read and to write",
                places.len()
            )));
        }
        let covered = covered.max(header.bat_end());
        if self.end > covered && !places.is_empty() {
            let text = format!("{} bytes before the footer belong to nothing", self.end - covered);
            found.push(Finding::note(text));
        }
    }

    /// Finds bits beyond the disk's end, data that no bit belongs to, and a batmap that is not true.
    fn check_bitmaps(&mut self, found: &mut Vec<Finding>, data: bool) -> Result<()> {
        let Some(size) = self.header.as_ref().map(Header::block) else { return Ok(()) };
        let batmap = self.batmap()?;
        let (mut beyond, mut lying, mut hidden, mut partial) = (0u64, 0u64, 0u64, 0u64);
        for block in 0..self.bat.entries() {
            let Some(place) = self.data_of(block)? else { continue };
            let sectors = size.sectors();
            let used = (self.size() - block * size.bytes()).div_ceil(SECTOR).min(sectors);
            let bitmap = self.bitmap(block, place)?;
            let is_full = bitmap.count(used) == used;
            // All ones in the last block is what other programs write at its allocation.
            beyond += u64::from(used < sectors && !is_full && bitmap.count(sectors) != bitmap.count(used));
            partial += u64::from(!is_full);
            lying += u64::from(!is_full && batmap.as_ref().is_some_and(|batmap| batmap.is_set(block)));
            if data && !is_full {
                let bitmap = bitmap.clone();
                let mut at = 0;
                while at < used {
                    let (set, end) = bitmap.run(at, used);
                    if !set && !self.is_zero(HostOffset(place.0 + at * SECTOR), (end - at) * SECTOR)? {
                        hidden += 1;
                        break;
                    }
                    at = end;
                }
            }
        }
        if beyond > 0 {
            found.push(Finding::error("the last block's bitmap has bits beyond the end of the disk"));
        }
        if lying > 0 {
            let text = format!(
                "the batmap says that {lying} blocks are full which are not: a merge with vhd-util would \
                 destroy data"
            );
            found.push(Finding::error(text).repairable());
        } else if batmap.as_ref().is_some_and(|batmap| !batmap.is_valid(self.bat.entries())) {
            let text = "the batmap's checksum or length is wrong: vhd-util cannot write the image";
            found.push(Finding::warning(text).repairable());
        } else if batmap.is_none()
            && self.footer.raw.creator == *b"tap\0"
            && self.footer.creator_version() >= 0x0001_0002
        {
            let text = "the creator is blktap, and there is no batmap: vhd-util cannot write the image";
            found.push(Finding::warning(text));
        }
        if hidden > 0 {
            let text =
                format!("{hidden} blocks have data in sectors that are not in use: some programs show it");
            found.push(Finding::warning(text));
        }
        if partial > 0 && self.disk_type() == DiskType::Differencing {
            let text = format!(
                "{partial} blocks are partly the parent's: Xen Orchestra's own merge loses such sectors"
            );
            found.push(Finding::note(text));
        }
        Ok(())
    }

    /// Returns true if a range of the file is zeros. Holes are not read.
    pub(super) fn is_zero(&self, at: HostOffset, len: u64) -> Result<bool> {
        let mut buffer = vec![0; len.min(1 << 20) as usize];
        let (mut at, end) = (at.0, at.0 + len);
        while at < end {
            let extent = next_extent(&self.file, at, end)?;
            let to = extent.end.clamp(at + 1, end);
            while extent.data.is_some() && at < to {
                let n = (to - at).min(buffer.len() as u64) as usize;
                let part = buffer.get_mut(..n).unwrap_or_default();
                self.file.read_at(part, HostOffset(at))?;
                if part.iter().any(|byte| *byte != 0) {
                    return Ok(false);
                }
                at += n as u64;
            }
            at = to;
        }
        Ok(true)
    }

    fn check_locators(&self, found: &mut Vec<Finding>) -> Result<()> {
        for locator in self.locators()? {
            if let Err(why) = &locator.path {
                let text = format!("the parent locator {:?} says nothing: {why}", locator.code);
                found.push(Finding::warning(text));
            }
        }
        Ok(())
    }
}
