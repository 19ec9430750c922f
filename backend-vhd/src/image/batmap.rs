//! The batmap of blktap: one bit for each block, set if the block's bitmap is full. Programs of XenServer
//! trust it when they merge, so a bit that is set wrongly destroys data. This engine never sets a bit, never
//! clears a bit of a sector bitmap, and so keeps a true batmap true.

use image_files::engine::HostOffset;
use zerocopy::FromBytes;
use zerocopy::IntoBytes;

use super::error::Result;
use super::file::ImageFile;
use super::footer::Footer;
use super::header::Header;
use super::layout::{RawBatmap, sum};
use super::units::SECTOR;

const COOKIE: [u8; 8] = *b"tdbatmap";
/// The largest batmap that is read: the bits of the largest BAT.
const LARGEST: u64 = super::header::MAX_ENTRIES / 8;

/// A batmap that was read.
pub(super) struct Batmap {
    /// Place of its header.
    header_at: u64,
    raw: RawBatmap,
    bits: Vec<u8>,
    /// Bytes that the checksum covers, as libvhd counts them.
    covered: usize,
}

impl Batmap {
    /// Reads the batmap behind the BAT, from a file of `len` bytes. Returns `None` if there is none.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn read(file: &ImageFile, footer: &Footer, header: &Header, len: u64) -> Result<Option<Self>> {
        let header_at = header.bat_end();
        let mut bytes = [0; SECTOR as usize];
        file.read_at(&mut bytes, HostOffset(header_at))?;
        let Ok(raw) = RawBatmap::read_from_bytes(&bytes) else { return Ok(None) };
        if raw.cookie != COOKIE {
            return Ok(None);
        }
        let (at, size) = (raw.offset.get(), u64::from(raw.size.get()) * SECTOR);
        let is_inside = at.checked_add(size).is_some_and(|end| end <= len) && at >= header_at;
        let mut bits = vec![0; if is_inside { size.min(LARGEST) as usize } else { 0 }];
        file.read_at(&mut bits, HostOffset(at))?;
        let covered = (footer.size() >> 24).next_multiple_of(SECTOR).max(SECTOR) as usize;
        Ok(Some(Self { header_at, raw, bits, covered }))
    }

    /// First byte after the batmap.
    pub(super) fn end(&self) -> u64 {
        self.raw.offset.get().saturating_add(u64::from(self.raw.size.get()) * SECTOR)
    }

    /// Place of its header.
    pub(super) fn start(&self) -> u64 {
        self.header_at
    }

    /// Returns true if the bit of a block is set.
    pub(super) fn is_set(&self, block: u64) -> bool {
        self.bits.get((block / 8) as usize).is_some_and(|byte| byte & (0x80 >> (block % 8)) != 0)
    }

    /// Returns true if it has a bit for every block and the right checksum.
    pub(super) fn is_valid(&self, blocks: u64) -> bool {
        let covered = self.bits.get(..self.covered.min(self.bits.len())).unwrap_or_default();
        self.bits.len() as u64 * 8 >= blocks && self.raw.checksum.get() == !sum(covered)
    }

    /// Writes the batmap with other bits. Bits are cleared in the file before the checksum says so: every
    /// state between has a bit less than the truth.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn rewrite(mut self, file: &ImageFile, is_full: impl Fn(u64) -> bool) -> Result<()> {
        for (index, byte) in self.bits.iter_mut().enumerate() {
            let first = index as u64 * 8;
            *byte = (0..8).filter(|bit| is_full(first + bit)).fold(0, |byte, bit| byte | (0x80 >> bit));
        }
        let covered = self.bits.get(..self.covered.min(self.bits.len())).unwrap_or_default();
        self.raw.checksum = (!sum(covered)).into();
        file.write_at(&self.bits, HostOffset(self.raw.offset.get()))?;
        file.write_at(self.raw.as_bytes(), HostOffset(self.header_at))?;
        file.flush()
    }
}
