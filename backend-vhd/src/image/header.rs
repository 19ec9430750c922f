//! The header of a dynamic or differencing image: block size, place of the BAT, and the parent.

use image_files::engine::HostOffset;
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::error::{Error, ErrorKind, Result};
use super::file::ImageFile;
use super::finding::Finding;
use super::footer::{FOOTER, Footer};
use super::layout::{RawHeader, RawLocator, checksum};
use super::locator::{Locator, RELATIVE};
use super::units::{BlockSize, PAGE, SECTOR, TimeStamp, UniqueId};

/// First bytes of a header.
const COOKIE: [u8; 8] = *b"cxsparse";
/// Bytes of a header.
pub const HEADER: u64 = 1024;
/// The largest number of entries of a BAT that is read: 64 MiB of them. 512 KiB blocks need a quarter of that
/// for the largest disk.
pub const MAX_ENTRIES: u64 = 1 << 24;
/// The finding of a wrong checksum.
pub(super) const TORN_HEADER: &str =
    "the header's checksum is wrong: XenServer and Xen Orchestra refuse the image";
/// Place of the locator's text in a new image: behind the header, to the end of the first page.
pub(super) const LOCATOR_AT: u64 = FOOTER + HEADER;
/// Bytes for the locator's text in a new image.
pub(super) const LOCATOR_SPACE: u64 = PAGE - LOCATOR_AT;
/// Place of the BAT in a new image.
pub(super) const BAT_AT: u64 = PAGE;

/// A header that was read, or is to be written.
#[derive(Clone, PartialEq, Eq)]
pub struct Header {
    pub(super) raw: RawHeader,
    block: BlockSize,
}

impl std::fmt::Debug for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Header")
            .field("block", &self.block)
            .field("entries", &self.entries())
            .field("bat", &self.bat_offset())
            .field("parent", &self.parent_id())
            .finish()
    }
}

impl Header {
    /// Makes the header of a new image with a BAT at [`BAT_AT`] and exactly the entries that its size needs.
    pub(super) fn new(size: u64, block: BlockSize) -> Result<Self> {
        let entries = u32::try_from(block.blocks_for(size)).map_err(|_| {
            Error::new(ErrorKind::LimitExceeded, format!("a disk of {size} bytes is too large"))
        })?;
        let mut raw = RawHeader::new_zeroed();
        raw.cookie = COOKIE;
        raw.data_offset = u64::MAX.into();
        raw.table_offset = BAT_AT.into();
        raw.version = 0x0001_0000.into();
        raw.max_entries = entries.into();
        raw.block_size = (block.bytes() as u32).into();
        let mut header = Self { raw, block };
        header.seal();
        Ok(header)
    }

    /// Reads and checks the header that `footer` points to, in a file of `len` bytes. A wrong checksum is a
    /// finding, since programs that do not look at it have written such headers.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], [`ErrorKind::Unsupported`]; the system's.
    pub(super) fn read(
        file: &ImageFile,
        footer: &Footer,
        len: u64,
        findings: &mut Vec<Finding>,
    ) -> Result<Self> {
        let at = footer.header_offset();
        if !at.is_multiple_of(SECTOR) || at < FOOTER || at.checked_add(HEADER).is_none_or(|end| end > len) {
            return Err(Error::corrupt(format!(
                "the header is said to be at {at:#x}, which is not in the file"
            )));
        }
        let mut bytes = [0; HEADER as usize];
        file.read_at(&mut bytes, HostOffset(at))?;
        Self::parse(&bytes, footer.size(), len, findings)
    }

    /// Checks the bytes of a header of a disk of `size` bytes.
    ///
    /// # Errors
    /// As [`Header::read`].
    pub(super) fn parse(
        bytes: &[u8; HEADER as usize],
        size: u64,
        len: u64,
        findings: &mut Vec<Finding>,
    ) -> Result<Self> {
        let raw =
            *RawHeader::ref_from_bytes(bytes).map_err(|_| Error::corrupt("the header has not 1024 bytes"))?;
        if raw.cookie != COOKIE {
            return Err(Error::corrupt("there is no header where the footer points to"));
        }
        if raw.checksum.get() != checksum(bytes, raw.checksum) {
            findings.push(Finding::error(TORN_HEADER));
        }
        if raw.version.get() >> 16 != 1 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("header version {:#010x} is not supported", raw.version.get()),
            ));
        }
        if raw.data_offset.get() != u64::MAX {
            findings.push(Finding::note(format!(
                "the header's data offset is {:#x} and not 64 bits of ones: some programs refuse the image",
                raw.data_offset.get()
            )));
        }
        let block = BlockSize::new(raw.block_size.get()).ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!(
                    "blocks of {} bytes are not supported: they are powers of two from 512 bytes to 32 MiB",
                    raw.block_size.get()
                ),
            )
        })?;
        let (entries, needed) = (u64::from(raw.max_entries.get()), block.blocks_for(size));
        if entries < needed {
            return Err(Error::corrupt(format!(
                "the BAT has {entries} entries, and the disk of {size} bytes needs {needed}"
            )));
        }
        if needed > MAX_ENTRIES {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("a BAT of {needed} entries is not supported: the limit is {MAX_ENTRIES}"),
            ));
        }
        let at = raw.table_offset.get();
        if at % SECTOR != 0 || at < FOOTER || at.checked_add(entries * 4).is_none_or(|end| end > len) {
            return Err(Error::corrupt(format!(
                "the BAT of {entries} entries is said to be at {at:#x}, which is not in the file"
            )));
        }
        Ok(Self { raw, block })
    }

    /// Computes the checksum again, after a change.
    pub(super) fn seal(&mut self) {
        self.raw.checksum = checksum(self.raw.as_bytes(), self.raw.checksum).into();
    }

    /// The 1024 bytes.
    pub fn bytes(&self) -> &[u8] {
        self.raw.as_bytes()
    }

    /// The block size.
    pub fn block(&self) -> BlockSize {
        self.block
    }

    /// Entries of the BAT.
    pub fn entries(&self) -> u64 {
        u64::from(self.raw.max_entries.get())
    }

    /// Place of the BAT.
    pub fn bat_offset(&self) -> HostOffset {
        HostOffset(self.raw.table_offset.get())
    }

    /// First byte after the BAT, which is padded to whole sectors.
    pub(super) fn bat_end(&self) -> u64 {
        self.bat_offset().0 + (self.entries() * 4).next_multiple_of(SECTOR)
    }

    /// The parent's unique id; null for a raw parent.
    pub fn parent_id(&self) -> UniqueId {
        UniqueId(self.raw.parent_id)
    }

    /// The time stamp of the parent's last change, as the image states it.
    pub fn parent_time(&self) -> TimeStamp {
        TimeStamp(self.raw.parent_time.get())
    }

    /// The parent's file name, as the image states it.
    pub fn parent_name(&self) -> String {
        let units = self.raw.parent_name.chunks_exact(2).map(|unit| u16::from_be_bytes([unit[0], unit[1]]));
        let units: Vec<u16> = units.take_while(|unit| *unit != 0).collect();
        String::from_utf16_lossy(&units)
    }

    /// The table of locators.
    pub(super) fn locators(&self) -> &[RawLocator; 8] {
        &self.raw.locators
    }

    /// Sets the number of entries, after the BAT was made longer.
    pub(super) fn set_entries(&mut self, entries: u32) {
        self.raw.max_entries = entries.into();
        self.seal();
    }

    /// Removes everything that names a parent.
    pub(super) fn clear_parent(&mut self) {
        self.raw.parent_id = UniqueId::NULL.0;
        self.raw.parent_time = 0.into();
        self.raw.parent_name = [0; 512];
        self.raw.locators = [RawLocator::new_zeroed(); 8];
        self.seal();
    }

    /// Sets the parent and its only locator, whose text of `length` bytes is at `at`.
    pub(super) fn set_parent(&mut self, parent: &ParentName, at: u64, space: u64, length: u64) {
        self.raw.parent_id = parent.id.0;
        self.raw.parent_time = parent.time.0.into();
        self.raw.parent_name = name_field(&parent.name);
        self.raw.locators = [RawLocator::new_zeroed(); 8];
        self.raw.locators[0] = RawLocator {
            code: RELATIVE,
            data_space: (space as u32).into(),
            data_length: (length as u32).into(),
            reserved: 0.into(),
            data_offset: at.into(),
        };
        self.seal();
    }
}

/// The parent of a differencing image, as the image will state it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ParentName {
    /// Its unique id; null for a raw file.
    pub id: UniqueId,
    /// Its time stamp.
    pub time: TimeStamp,
    /// Its file name.
    pub name: String,
    /// Its path relative to the child's directory, with slashes.
    pub relative: String,
}

impl ParentName {
    /// Fails for a path that a new image has no space for.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`].
    pub fn require_short(&self) -> Result<()> {
        self.locator_text().map(drop)
    }

    /// The text of the relative locator, UTF-16 little-endian.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a path that does not fit into the space that a new image has.
    pub(super) fn locator_text(&self) -> Result<Vec<u8>> {
        let text = Locator::encode_relative(&self.relative);
        if text.len() as u64 > LOCATOR_SPACE {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("the path of the parent, {:?}, is too long for a VHD", self.relative),
            )
            .advise("use a shorter path, or put both images into one directory"));
        }
        Ok(text)
    }
}

/// The name field: UTF-16 big-endian, at most 255 units, cut at a whole character, filled with zeros.
fn name_field(name: &str) -> [u8; 512] {
    let mut field = [0; 512];
    let mut used = 0;
    for character in name.chars() {
        let mut units = [0; 2];
        let units = character.encode_utf16(&mut units);
        if used + units.len() > 255 {
            break;
        }
        for unit in units.iter() {
            field[used * 2..used * 2 + 2].copy_from_slice(&unit.to_be_bytes());
            used += 1;
        }
    }
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(change: impl Fn(&mut RawHeader)) -> (Result<Header>, Vec<Finding>) {
        let mut header = Header::new(64 << 20, BlockSize::DEFAULT).unwrap();
        change(&mut header.raw);
        header.seal();
        let mut findings = Vec::new();
        (Header::parse(header.bytes().try_into().unwrap(), 64 << 20, 8192, &mut findings), findings)
    }

    /// Contradictions are refused, each by name.
    #[test]
    fn contradictions_are_refused() {
        type Change = fn(&mut RawHeader);
        let cases: [(&str, Change); 6] = [
            ("no header", |raw| raw.cookie = *b"cxsparsf"),
            ("not supported", |raw| raw.block_size = (3 << 20).into()),
            ("needs 32", |raw| raw.max_entries = 31.into()),
            ("not in the file", |raw| raw.table_offset = 8192.into()),
            ("not in the file", |raw| raw.max_entries = u32::MAX.into()),
            ("version", |raw| raw.version = 0x0002_0000.into()),
        ];
        for (word, change) in cases {
            let error = parse(change).0.unwrap_err();
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        let (header, findings) = parse(|_| {});
        assert_eq!(header.unwrap().entries(), 32);
        assert_eq!(findings, []);
    }

    /// A name of any length fits, cut at a whole character.
    #[test]
    fn long_name_is_cut_at_a_character() {
        let name = "a".repeat(254) + "\u{1F600}";
        let field = name_field(&name);
        assert_eq!(&field[506..], [0, b'a', 0, 0, 0, 0]);
    }
}
