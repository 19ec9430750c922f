//! The footer: size, kind and identity of an image. It is at the end of the file. Dynamic and differencing
//! images have a copy of it at the start.
//!
//! The footer at the end decides. A fixed image has no copy: its first sector is the guest's, who can write
//! a whole false header there. So the start of the file is looked at only if the end has no footer, or one
//! that is not of a fixed image.

use image_files::engine::HostOffset;
use zerocopy::{FromBytes, IntoBytes};

use super::error::{Error, ErrorKind, Result, shown};
use super::file::ImageFile;
use super::finding::Finding;
use super::layout::{RawFooter, checksum};
use super::units::{MAX_SIZE, SECTOR, TimeStamp, UniqueId};

/// First bytes of a footer.
pub(super) const COOKIE: [u8; 8] = *b"conectix";
/// First bytes of an image that vhd-util has marked as dead.
const POISON: [u8; 8] = *b"v_poison";
/// Bytes of a footer.
pub const FOOTER: u64 = 512;
/// tapdisk writes this byte over the footer at the end while it has the image open.
const TAPDISK_OPEN: u8 = 0xC7;
/// The creator that this engine writes.
pub const CREATOR: [u8; 4] = *b"dsnp";

/// Kind of an image.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskType {
    /// The disk's bytes, followed by a footer.
    Fixed,
    /// Blocks that are allocated when written.
    Dynamic,
    /// A dynamic image whose missing sectors are those of its parent.
    Differencing,
}

/// Place of a footer that was read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FooterPlace {
    /// The last 512 bytes of the file.
    End,
    /// The last 511 bytes, as Virtual PC before 2004 wrote it.
    ShortEnd,
    /// The copy at the start.
    Start,
}

/// A valid footer.
#[derive(Clone, PartialEq, Eq)]
pub struct Footer {
    pub(super) raw: RawFooter,
}

impl std::fmt::Debug for Footer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Footer")
            .field("type", &self.disk_type())
            .field("size", &self.size())
            .field("id", &self.id())
            .finish()
    }
}

impl Footer {
    /// Makes the footer of a new image.
    pub fn new(kind: DiskType, size: u64, id: UniqueId, now: TimeStamp) -> Self {
        let mut raw = RawFooter {
            cookie: COOKIE,
            features: 2.into(),
            version: 0x0001_0000.into(),
            data_offset: if kind == DiskType::Fixed { u64::MAX } else { FOOTER }.into(),
            time_stamp: now.0.into(),
            creator: CREATOR,
            creator_version: 0x0001_0000.into(),
            creator_os: *b"Wi2k",
            original_size: size.into(),
            current_size: size.into(),
            cylinders: 0.into(),
            heads: 0,
            sectors: 0,
            disk_type: match kind {
                DiskType::Fixed => 2,
                DiskType::Dynamic => 3,
                DiskType::Differencing => 4,
            }
            .into(),
            checksum: 0.into(),
            unique_id: id.0,
            saved_state: 0,
            hidden: 0,
            reserved: [0; 426],
        };
        set_geometry(&mut raw, size);
        let mut footer = Self { raw };
        footer.seal();
        footer
    }

    /// Makes a footer of changed fields.
    pub(super) fn sealed(raw: RawFooter) -> Self {
        let mut footer = Self { raw };
        footer.seal();
        footer
    }

    /// Reads a footer from its 512 bytes. Returns `None` without the cookie or with a wrong checksum.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let raw = *RawFooter::ref_from_bytes(bytes).ok()?;
        let right = checksum(bytes, raw.checksum);
        // blktap before 1.2 did not sum the byte that it added later.
        let old_tap = raw.creator == *b"tap\0" && raw.creator_version.get() < 0x0001_0002 && raw.hidden != 0;
        let valid = raw.checksum.get() == right
            || (old_tap && raw.checksum.get() == right.wrapping_add(u32::from(raw.hidden)));
        (raw.cookie == COOKIE && valid).then_some(Self { raw })
    }

    /// The 512 bytes.
    pub fn bytes(&self) -> &[u8] {
        self.raw.as_bytes()
    }

    /// Computes the checksum again, after a change.
    fn seal(&mut self) {
        self.raw.checksum = checksum(self.raw.as_bytes(), self.raw.checksum).into();
    }

    /// Kind of the image; `None` for a number that has no meaning or is deprecated.
    pub fn disk_type(&self) -> Option<DiskType> {
        match self.raw.disk_type.get() {
            2 => Some(DiskType::Fixed),
            3 => Some(DiskType::Dynamic),
            4 => Some(DiskType::Differencing),
            _ => None,
        }
    }

    /// Bytes of the disk now.
    pub fn size(&self) -> u64 {
        self.raw.current_size.get()
    }

    /// Sets the bytes of the disk. The original size stays.
    pub fn set_size(&mut self, size: u64) {
        self.raw.current_size = size.into();
        set_geometry(&mut self.raw, size);
        self.seal();
    }

    /// The identity of the image.
    pub fn id(&self) -> UniqueId {
        UniqueId(self.raw.unique_id)
    }

    /// Offset of the header; without meaning in a fixed image.
    pub(super) fn header_offset(&self) -> u64 {
        self.raw.data_offset.get()
    }

    /// The program that made the image.
    pub fn creator(&self) -> String {
        shown(self.raw.creator.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    /// Version of the program that made the image.
    pub(super) fn creator_version(&self) -> u32 {
        self.raw.creator_version.get()
    }

    /// Time stamp of the image.
    pub fn time(&self) -> TimeStamp {
        TimeStamp(self.raw.time_stamp.get())
    }

    /// Bytes that QEMU takes for the disk's size, if that is not the size: its driver goes by the geometry
    /// for images of Virtual PC and of itself.
    pub fn size_by_geometry(&self) -> Option<u64> {
        let raw = &self.raw;
        let (c, h, s) = (raw.cylinders.get(), raw.heads, raw.sectors);
        let by_geometry = matches!(&raw.creator, b"vpc " | b"qemu") && (c, h, s) != (65535, 16, 255);
        let bytes = u64::from(c) * u64::from(h) * u64::from(s) * SECTOR;
        (by_geometry && bytes != self.size()).then_some(bytes)
    }

    /// Bytes of the disk that QEMU's driver shows. Absent: versions of QEMU differ. Those before 10.0 know
    /// the programs that set the size, and go by the geometry for every other; later ones know the programs
    /// that set the geometry alone.
    pub fn size_in_qemu(&self) -> Option<u64> {
        let raw = &self.raw;
        let (c, h, s) = (raw.cylinders.get(), raw.heads, raw.sectors);
        let by_geometry = u64::from(c) * u64::from(h) * u64::from(s) * SECTOR;
        let whole = self.size() / SECTOR * SECTOR;
        if (c, h, s) == (65535, 16, 255) {
            return Some(whole);
        }
        match &raw.creator {
            b"vpc " | b"qemu" => Some(by_geometry),
            b"win " | b"qem2" | b"d2v " | b"CTXS" => Some(whole),
            [b't', b'a', b'p', _] | [b'w', b'a', _, _] => Some(whole),
            _ => (by_geometry == whole).then_some(whole),
        }
    }

    /// Returns true if both say the same but for the time stamp.
    fn agrees(&self, other: &Self) -> bool {
        let without_time = |footer: &Self| {
            let mut raw = footer.raw;
            raw.time_stamp = 0.into();
            raw.checksum = 0.into();
            raw
        };
        without_time(self) == without_time(other)
    }

    /// Fails for what no footer of a readable image says.
    fn require_readable(&self) -> Result<()> {
        if self.raw.version.get() >> 16 != 1 {
            return Err(unsupported(format!("format version {:#010x}", self.raw.version.get())));
        }
        if self.disk_type().is_none() {
            return Err(unsupported(format!("disk type {}", self.raw.disk_type.get())));
        }
        match self.size() {
            0 => Err(Error::corrupt("the disk's size is 0")),
            size if size > MAX_SIZE => Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("the disk's size is {size} bytes, and a VHD has at most {MAX_SIZE} (2040 GiB)"),
            )),
            _ => Ok(()),
        }
    }
}

fn unsupported(what: String) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{what} is not supported"))
        .advise("convert the image with the program that made it")
}

/// Computes the geometry with the algorithm of the specification's appendix.
fn set_geometry(raw: &mut RawFooter, size: u64) {
    let total = (size / SECTOR).min(65535 * 16 * 255);
    let (sectors, heads, per_track);
    if total >= 65535 * 16 * 63 {
        (sectors, heads, per_track) = (255, 16, total / 255);
    } else {
        let tracks = total / 17;
        let wanted = tracks.div_ceil(1024).max(4);
        if tracks < wanted * 1024 && wanted <= 16 {
            (sectors, heads, per_track) = (17, wanted, tracks);
        } else if total / 31 < 16 * 1024 {
            (sectors, heads, per_track) = (31, 16, total / 31);
        } else {
            (sectors, heads, per_track) = (63, 16, total / 63);
        }
    }
    raw.cylinders = u16::try_from(per_track / heads).unwrap_or(u16::MAX).into();
    raw.heads = heads as u8;
    raw.sectors = sectors as u8;
}

/// The footer of a file, and the state of its places.
#[derive(Clone, Debug)]
pub(super) struct FoundFooter {
    /// The footer that decides.
    pub footer: Footer,
    /// Its place.
    pub place: FooterPlace,
    /// Findings about both places.
    pub findings: Vec<Finding>,
}

/// Reads the footer of a file of `len` bytes.
///
/// # Errors
/// [`ErrorKind::WrongFormat`] if there is none; [`ErrorKind::Unsupported`] for formats of similar names, dead
/// images, and deprecated kinds; [`ErrorKind::Corrupt`], [`ErrorKind::LimitExceeded`]; the system's.
pub(super) fn find(file: &ImageFile, len: u64) -> Result<FoundFooter> {
    let mut start = [0; FOOTER as usize];
    file.read_at(&mut start, HostOffset(0))?;
    let mut end = [0; FOOTER as usize];
    if let Some(at) = len.checked_sub(FOOTER) {
        file.read_at(&mut end, HostOffset(at))?;
    }
    let found = decide(&start, &end, len)?;
    found.footer.require_readable()?;
    Ok(found)
}

fn decide(start: &[u8; 512], end: &[u8; 512], len: u64) -> Result<FoundFooter> {
    let at_end = Footer::parse(end);
    if let Some(footer) = &at_end
        && footer.disk_type() == Some(DiskType::Fixed)
    {
        return Ok(FoundFooter { footer: footer.clone(), place: FooterPlace::End, findings: Vec::new() });
    }
    refuse_by_name(start, end)?;
    // Of a fixed image, the start is the guest's data, so a footer of that kind there is no footer.
    let at_start = Footer::parse(start).filter(|footer| footer.disk_type() != Some(DiskType::Fixed));
    match (at_end, at_start) {
        (Some(footer), Some(copy)) => {
            let mut findings = Vec::new();
            if !footer.agrees(&copy) {
                findings.push(Finding::error(difference(&footer, &copy)).repairable());
            }
            Ok(FoundFooter { footer, place: FooterPlace::End, findings })
        }
        (Some(footer), None) => {
            let text =
                "the copy of the footer at the start is missing or damaged: QEMU and 7-Zip refuse the image";
            let findings = vec![Finding::warning(text).repairable().blocking()];
            Ok(FoundFooter { footer, place: FooterPlace::End, findings })
        }
        (None, copy) => {
            let short = short_footer(end).filter(|_| len >= FOOTER - 1);
            if let Some(footer) = short {
                let text = "the footer at the end has 511 bytes, as Virtual PC wrote it before 2004: some programs refuse the \
                     image";
                let findings = vec![Finding::warning(text).repairable().blocking()];
                return Ok(FoundFooter { footer, place: FooterPlace::ShortEnd, findings });
            }
            let Some(footer) = copy else { return Err(no_footer(start, end)) };
            let text = match end.iter().all(|byte| *byte == TAPDISK_OPEN) {
                true => {
                    "the footer at the end is overwritten with 0xC7: a tapdisk has the image open, or ended without \
                     closing it; the copy at the start is used"
                }
                false => "the footer at the end is missing or damaged; the copy at the start is used",
            };
            let findings = vec![Finding::warning(text).repairable().blocking()];
            Ok(FoundFooter { footer, place: FooterPlace::Start, findings })
        }
    }
}

/// The footer of 511 bytes: the last byte of 512, which is reserved, is not there.
fn short_footer(end: &[u8; 512]) -> Option<Footer> {
    let mut bytes = [0; 512];
    bytes[..511].copy_from_slice(&end[1..]);
    Footer::parse(&bytes)
}

fn difference(footer: &Footer, copy: &Footer) -> String {
    let what = if footer.size() != copy.size() {
        format!("size {} at the end, {} at the start", footer.size(), copy.size())
    } else if footer.id() != copy.id() {
        format!("id {} at the end, {} at the start", footer.id(), copy.id())
    } else {
        "other fields".to_owned()
    };
    format!("the footer at the end and its copy at the start differ ({what}); the one at the end is used")
}

/// Refuses files of other formats by their names.
fn refuse_by_name(start: &[u8; 512], end: &[u8; 512]) -> Result<()> {
    if start.starts_with(b"vhdxfile") {
        return Err(Error::new(ErrorKind::Unsupported, "the file is a VHDX or AVHDX image, or a VHD set, and not a VHD")
            .advise("convert it with `qemu-img convert -f vhdx -O qcow2`; a differencing AVHDX must be merged in Hyper-V first"));
    }
    if start.starts_with(&POISON) || end.starts_with(&POISON) {
        return Err(Error::new(ErrorKind::Unsupported, "vhd-util has marked the image as dead (v_poison)")
            .advise("use the image that replaced it"));
    }
    Ok(())
}

fn no_footer(start: &[u8; 512], end: &[u8; 512]) -> Error {
    match start.starts_with(&COOKIE) || end.starts_with(&COOKIE) {
        true => Error::corrupt("neither the footer at the end nor its copy at the start is valid"),
        false => Error::new(ErrorKind::WrongFormat, "the file has no VHD footer"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn footer(kind: DiskType) -> Footer {
        Footer::new(kind, 64 << 20, UniqueId([7; 16]), TimeStamp(1))
    }

    fn bytes(footer: &Footer) -> [u8; 512] {
        footer.bytes().try_into().unwrap()
    }

    /// The end decides. A fixed image's first sector is never looked at.
    #[test]
    fn end_decides() {
        let (fixed, dynamic) = (footer(DiskType::Fixed), footer(DiskType::Dynamic));
        let found = decide(&bytes(&dynamic), &bytes(&fixed), 1 << 20).unwrap();
        assert_eq!(found.footer.disk_type(), Some(DiskType::Fixed));
        assert!(found.findings.is_empty());
        let mut grown = dynamic.clone();
        grown.set_size(65 << 20);
        let found = decide(&bytes(&dynamic), &bytes(&grown), 1 << 20).unwrap();
        assert_eq!(found.footer.size(), 65 << 20);
        assert!(found.findings[0].text.contains(&(64 << 20).to_string()), "{:?}", found.findings);
        assert!(found.findings[0].blocks_writing);
    }

    /// Without a footer at the end, the copy is used, but never that of a fixed image.
    #[test]
    fn copy_replaces_missing_end() {
        let (fixed, dynamic) = (footer(DiskType::Fixed), footer(DiskType::Dynamic));
        for end in [[0; 512], [0xC7; 512], [0xFF; 512]] {
            let found = decide(&bytes(&dynamic), &end, 1 << 20).unwrap();
            assert_eq!(found.place, FooterPlace::Start);
            assert!(found.findings[0].blocks_writing);
            decide(&bytes(&fixed), &end, 1 << 20).unwrap_err();
        }
        let mut short = [9; 512];
        short[1..].copy_from_slice(&dynamic.bytes()[..511]);
        assert_eq!(decide(&bytes(&dynamic), &short, 1 << 20).unwrap().place, FooterPlace::ShortEnd);
    }

    #[test]
    fn other_formats_are_refused_by_name() {
        for (cookie, word) in [(b"vhdxfile", "VHDX"), (b"v_poison", "vhd-util")] {
            let mut start = [0; 512];
            start[..8].copy_from_slice(cookie);
            let error = decide(&start, &[0; 512], 1 << 20).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }

    /// The geometry is the one that the specification's appendix computes.
    #[test]
    fn geometry_follows_the_specification() {
        for (mib, expected) in
            [(16, (481, 4, 17)), (64, (963, 8, 17)), (1024, (2080, 16, 63)), (2_088_960, (65535, 16, 255))]
        {
            let raw = Footer::new(DiskType::Dynamic, mib << 20, UniqueId::NULL, TimeStamp(0)).raw;
            assert_eq!((raw.cylinders.get(), raw.heads, raw.sectors), expected, "{mib} MiB");
        }
    }
}
