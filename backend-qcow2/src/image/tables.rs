//! L1 and L2 tables as values, and reads of many L2 tables in few large reads.

use super::error::{Error, Result};
use super::file::ImageFile;
use super::mapping::{COPIED, Geometry, L2Entry, Mapping, OFFSET_MASK};
use super::units::HostOffset;

/// Adjacent L2 tables are read together up to this many bytes.
const READ_RUN: usize = 4 << 20;

/// A checked L1 table: every entry is 0 or refers to a cluster within the file.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct L1Table {
    pub(crate) entries: Vec<u64>,
}

impl L1Table {
    /// Parses and checks a table's bytes.
    ///
    /// # Errors
    /// [`super::ErrorKind::Corrupt`] for an entry that is not aligned to a cluster or lies past the file's
    /// end.
    pub fn parse(geometry: Geometry, raw: &[u8], file_len: u64) -> Result<Self> {
        let mut entries = Vec::with_capacity(raw.len() / 8);
        for (index, word) in raw.as_chunks::<8>().0.iter().enumerate() {
            let entry = u64::from_be_bytes(*word);
            let offset = entry & OFFSET_MASK;
            if offset & geometry.cluster_bits.mask() != 0 || offset >= file_len.max(1) {
                return Err(Error::corrupt(format!(
                    "L1 entry {index} ({entry:#018x}) is not a valid offset of an L2 table in a file of {file_len:#x} bytes"
                )));
            }
            // Bit 63 without an offset has no meaning.
            entries.push(if offset == 0 { 0 } else { entry & (OFFSET_MASK | COPIED) });
        }
        Ok(Self { entries })
    }

    /// Reads a table.
    ///
    /// # Errors
    /// As [`L1Table::parse`], and the system's.
    pub fn read(file: &ImageFile, geometry: Geometry, offset: HostOffset, entries: u32) -> Result<Self> {
        let file_len = file.len()?;
        let bytes = u64::from(entries) * 8;
        if entries > 0
            && offset.checked_add(bytes).is_none_or(|end| {
                offset.0 >= file_len || end.0 > file_len.saturating_add(geometry.cluster_bits.size())
            })
        {
            return Err(Error::corrupt(format!(
                "an L1 table of {entries} entries at offset {offset} lies past the end of the file at {file_len:#x}"
            ))
            .on("read", file.path()));
        }
        // At most 32 MiB: both places that state the number check it.
        let mut raw = vec![0; bytes as usize];
        file.read_at(&mut raw, offset)?;
        Self::parse(geometry, &raw, file_len).map_err(|e| e.on("read an L1 table of", file.path()))
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Returns true if it has no entry.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Offset of an entry's L2 table; `None` without one, or past the table's end.
    #[inline]
    pub fn l2_offset(&self, index: usize) -> Option<HostOffset> {
        self.entries.get(index).map(|e| e & OFFSET_MASK).filter(|o| *o != 0).map(HostOffset)
    }

    /// Returns true if the L2 table of an entry may be written in place, because its refcount is one.
    #[inline]
    pub fn is_copied(&self, index: usize) -> bool {
        self.entries.get(index).is_some_and(|e| e & COPIED != 0)
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.entries.iter().flat_map(|e| e.to_be_bytes()).collect()
    }
}

/// An L2 table's bytes.
#[derive(Clone, Copy)]
pub struct L2Table<'a> {
    pub(crate) geometry: Geometry,
    pub(crate) bytes: &'a [u8],
}

impl L2Table<'_> {
    /// Returns an entry as stored.
    #[inline]
    pub fn entry(&self, index: usize) -> L2Entry {
        L2Entry::read(self.geometry, self.bytes, index)
    }

    /// Decodes an entry.
    ///
    /// # Errors
    /// As [`L2Entry::mapping`].
    #[inline]
    pub fn mapping(&self, index: usize) -> Result<Mapping> {
        self.entry(index).mapping(self.geometry)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.geometry.l2_entries() as usize
    }

    /// Returns false: a table has at least 32 entries.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Reads the L2 tables at these offsets, in this order, adjacent ones together, and passes each to `each`
/// with its number in the list. If `each` returns true, it has changed the table, which is then written back,
/// adjacent ones together.
pub(crate) fn visit<F>(file: &ImageFile, geometry: Geometry, offsets: &[u64], mut each: F) -> Result<()>
where
    F: FnMut(usize, &mut [u8]) -> Result<bool>,
{
    let size = geometry.cluster_bits.bytes();
    let most = (READ_RUN / size).max(1);
    let mut buffer: Vec<u8> = Vec::new();
    let mut at = 0;
    while let Some(first) = offsets.get(at).copied() {
        let rest = offsets.get(at..).unwrap_or_default();
        let run = rest
            .iter()
            .take(most)
            .enumerate()
            .take_while(|(n, o)| first.checked_add((n * size) as u64) == Some(**o))
            .count();
        // Without clearing: the part that is read in full needs no zeroing.
        if buffer.len() < run * size {
            buffer.resize(run * size, 0);
        }
        let bytes = buffer.get_mut(..run * size).unwrap_or_default();
        file.read_at(bytes, HostOffset(first))?;
        let mut changed: Option<(usize, usize)> = None;
        let write = |bytes: &[u8], (from, to): (usize, usize)| {
            let part = bytes.get(from * size..to * size).unwrap_or_default();
            file.write_at(part, HostOffset(first + (from * size) as u64))
        };
        for n in 0..run {
            let table = bytes.get_mut(n * size..(n + 1) * size).unwrap_or_default();
            if each(at + n, table)? {
                changed = match changed {
                    Some((from, to)) if to == n => Some((from, n + 1)),
                    Some(done) => {
                        write(bytes, done)?;
                        Some((n, n + 1))
                    }
                    None => Some((n, n + 1)),
                };
            }
        }
        if let Some(done) = changed {
            write(bytes, done)?;
        }
        at += run;
    }
    Ok(())
}
