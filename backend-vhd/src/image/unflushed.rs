//! Sectors that were written, and are in the image's metadata only in memory.
//!
//! A server acknowledges a write before [`Vhd::flush`], and must not lose it if it is killed. So it notes
//! those sectors elsewhere, in memory that outlives it. The next server gives the notes back to
//! [`Vhd::adopt`]. The data and the footer behind them are in the file; bits and BAT entries are not.

use super::bat::FREE;
use super::chain::{Chain, Layer};
use super::error::{Error, ErrorKind, Result};
use super::header::Header;
use super::open::Vhd;
use super::units::SECTOR;

/// Sectors of one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Unflushed {
    block: u32,
    /// The sector of the file at which the block is.
    entry: u32,
    first: u32,
    count: u32,
}

impl Unflushed {
    /// Bytes of a note.
    pub const BYTES: usize = 16;

    /// The bytes of the note.
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        let fields = [self.block, self.entry, self.first, self.count];
        for (place, field) in bytes.chunks_exact_mut(4).zip(fields) {
            place.copy_from_slice(&field.to_be_bytes());
        }
        bytes
    }

    /// Reads a note. It is checked by [`Vhd::adopt`].
    pub fn parse(bytes: [u8; Self::BYTES]) -> Self {
        let mut fields =
            bytes.chunks_exact(4).filter_map(|field| field.try_into().ok()).map(u32::from_be_bytes);
        let mut next = || fields.next().unwrap_or_default();
        Self { block: next(), entry: next(), first: next(), count: next() }
    }
}

impl Vhd {
    /// Returns the sectors of a range that belong to this image, and that a crash of the process would lose.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; the system's.
    pub fn unflushed(&mut self, at: u64, end: u64) -> Result<Vec<Unflushed>> {
        let Some(size) = self.header.as_ref().map(Header::block) else { return Ok(Vec::new()) };
        let (first, last) = (at / size.bytes(), end.div_ceil(size.bytes()));
        let mut notes = Vec::new();
        for block in self.dirty.range(first..last).copied().collect::<Vec<_>>() {
            let Some(data) = self.data_of(block)? else { continue };
            let start = block * size.bytes();
            let (from, to) = (at.max(start) - start, end.min(start + size.bytes()) - start);
            let (mut sector, to) = (from / SECTOR, to.div_ceil(SECTOR));
            let entry = (data.0 - size.bitmap_bytes()) / SECTOR;
            while sector < to {
                let (is_set, next) = self.bitmap(block, data)?.run(sector, to);
                if is_set {
                    // Blocks, sectors of a file and sectors of a block have 32 bits.
                    let (first, count) = (sector as u32, (next - sector) as u32);
                    notes.push(Unflushed { block: block as u32, entry: entry as u32, first, count });
                }
                sector = next;
            }
        }
        Ok(notes)
    }

    /// Sets, in memory, the entries and bits that a killed process had noted. The next [`Vhd::flush`] makes
    /// them durable, after the data.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for notes that contradict the image, which another program changed since then;
    /// as [`Vhd::require_writable`]; the system's. Nothing was written.
    pub fn adopt(&mut self, notes: &[Unflushed]) -> Result<()> {
        for note in notes {
            self.adopt_one(*note)?;
        }
        // Entries that overlap others, or lead out of the file, are found here.
        self.may_write = false;
        self.require_writable()
    }

    fn adopt_one(&mut self, note: Unflushed) -> Result<()> {
        let changed = || {
            Error::new(
                ErrorKind::Corrupt,
                "another program changed the image after its server was killed; what the server had acknowledged \
                 does not fit any more",
            )
        };
        let size = self.header.as_ref().map(Header::block).ok_or_else(changed)?;
        let (block, end) = (u64::from(note.block), u64::from(note.first) + u64::from(note.count));
        if block >= self.bat.entries() || end > size.sectors() || note.entry == FREE {
            return Err(changed());
        }
        match self.bat.get(&self.file, block)? {
            FREE => self.add_block(block, note.entry)?,
            entry if entry == note.entry => {}
            _ => return Err(changed()),
        }
        let data = self.data_of(block)?.ok_or_else(changed)?;
        if self.bitmap(block, data)?.set(note.first.into(), end, size.sectors()) {
            self.dirty.insert(block);
        }
        Ok(())
    }
}

impl Chain {
    /// As [`Vhd::unflushed`], of the top.
    ///
    /// # Errors
    /// As [`Vhd::unflushed`].
    pub fn unflushed(&mut self, at: u64, end: u64) -> Result<Vec<Unflushed>> {
        match self.top_mut() {
            Some(top) => top.unflushed(at, end),
            None => Ok(Vec::new()),
        }
    }

    /// The top, if it is a VHD.
    pub fn top_mut(&mut self) -> Option<&mut Vhd> {
        let top = self.layers().len().checked_sub(1)?;
        match self.layer_mut(top) {
            Some(Layer::Vhd(image)) => Some(image),
            _ => None,
        }
    }
}
