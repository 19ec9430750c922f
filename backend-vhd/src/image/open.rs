//! One open image: its structures, and the place of each range of its disk.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;

use image_files::engine::HostOffset;
use image_files::{LockMode, lock};

use super::bat::{Bat, FREE};
use super::batmap::Batmap;
use super::bitmap::Bitmap;
use super::error::{Context, Error, ErrorKind, Result};
use super::file::ImageFile;
use super::finding::{Finding, Severity};
use super::footer::{self, DiskType, FOOTER, Footer, FooterPlace};
use super::header::Header;
use super::locator::Locator;
use super::space::{Extent, next_extent};
use super::units::{SECTOR, UniqueId};

/// Bytes of bitmaps that an image keeps in memory.
const BITMAP_CACHE: usize = 8 << 20;
/// Advice of an error that comes after the first write.
pub(super) const HALF_DONE: &str = "the operation had begun: the image shows what it did before or what it does after it; \
     run `domsnap disk check`, and repeat the operation";

/// Options of [`Vhd::open`].
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    writable: bool,
    lock: Option<LockMode>,
}

impl OpenOptions {
    /// Reads; writers are refused meanwhile.
    pub fn read_only() -> Self {
        Self { writable: false, lock: Some(LockMode::Read) }
    }

    /// Reads and writes; every other user is refused meanwhile.
    pub fn read_write() -> Self {
        Self { writable: true, lock: Some(LockMode::Write) }
    }

    /// Takes no lock, because the caller has it.
    #[must_use]
    pub fn unlocked(mut self) -> Self {
        self.lock = None;
        self
    }
}

/// An open VHD image.
pub struct Vhd {
    pub(crate) file: Arc<ImageFile>,
    pub(super) footer: Footer,
    pub(super) place: FooterPlace,
    pub(super) header: Option<Header>,
    pub(super) bat: Bat,
    pub(super) bitmaps: HashMap<u64, Bitmap>,
    bitmap_bytes: usize,
    /// Blocks whose bitmap in memory differs from the file.
    pub(super) dirty: BTreeSet<u64>,
    /// Blocks that are allocated, and in no entry of the file yet.
    pub(super) fresh: BTreeSet<u64>,
    pub(super) findings: Vec<Finding>,
    /// Place of the footer at the end: the first byte that no block has.
    pub(super) end: u64,
    /// True once the image is known to be fit for writing.
    pub(super) may_write: bool,
    /// True if an interrupted change of the header is to be made again.
    pub(super) torn: bool,
    /// True after a failed write of metadata: memory and file may differ.
    pub(super) failed: bool,
    /// True if bitmaps are not looked at.
    by_blocks: bool,
}

impl std::fmt::Debug for Vhd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vhd")
            .field("path", &self.path())
            .field("footer", &self.footer)
            .field("header", &self.header)
            .finish_non_exhaustive()
    }
}

impl Vhd {
    /// Opens an image. One that needs a repair opens too; [`Vhd::findings`] has the reasons, and a write to
    /// it fails.
    ///
    /// # Errors
    /// [`ErrorKind::WrongFormat`], [`ErrorKind::Unsupported`], [`ErrorKind::Corrupt`],
    /// [`ErrorKind::LimitExceeded`], [`ErrorKind::Locked`]; the system's.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("vhds")) {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "the file is a VHD set of Hyper-V, and not a VHD",
            )
            .advise("use the VHDX image that the set names, converted with `qemu-img convert`")
            .on("open", path));
        }
        let file = ImageFile::open(path, options.writable)?;
        if let (Some(mode), Some(opened)) = (options.lock, file.file()) {
            lock(opened, mode).map_err(|error| Error::from(error).on("open", path))?;
        }
        Self::from_file(file)
    }

    /// Opens an image in a file that is open already.
    ///
    /// # Errors
    /// As [`Vhd::open`].
    pub fn from_file(file: ImageFile) -> Result<Self> {
        let path = file.path().to_owned();
        Self::parse(Arc::new(file)).context("open", &path)
    }

    pub(super) fn parse(file: Arc<ImageFile>) -> Result<Self> {
        let len = file.len()?;
        let found = footer::find(&file, len)?;
        let (footer, mut findings) = (found.footer, found.findings);
        let mut header = None;
        let mut bat = Bat::default();
        let end = match found.place {
            FooterPlace::End => len.saturating_sub(FOOTER),
            FooterPlace::ShortEnd => len.saturating_sub(FOOTER - 1),
            FooterPlace::Start => len,
        };
        if footer.disk_type() == Some(DiskType::Fixed) {
            if footer.size() > end {
                return Err(Error::corrupt(format!(
                    "the disk's size is {} bytes, and the file has {end} before its footer",
                    footer.size()
                )));
            }
        } else {
            let read = Header::read(&file, &footer, len, &mut findings)?;
            bat = Bat::new(&read, read.block().blocks_for(footer.size()));
            header = Some(read);
        }
        if footer.size() % SECTOR != 0 {
            let text = format!("the disk's size, {} bytes, is not a whole number of sectors", footer.size());
            findings.push(Finding::warning(text).blocking());
        }
        Ok(Self {
            file,
            footer,
            place: found.place,
            header,
            bat,
            bitmaps: HashMap::new(),
            bitmap_bytes: 0,
            dirty: BTreeSet::new(),
            fresh: BTreeSet::new(),
            findings,
            end,
            may_write: false,
            torn: false,
            failed: false,
            by_blocks: false,
        })
    }

    /// The path by which it was opened.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file.
    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    /// The footer that decides.
    pub fn footer(&self) -> &Footer {
        &self.footer
    }

    /// The header; a fixed image has none.
    pub fn header(&self) -> Option<&Header> {
        self.header.as_ref()
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.footer.size()
    }

    /// The identity of the image.
    pub fn id(&self) -> UniqueId {
        self.footer.id()
    }

    /// Kind of the image.
    pub fn disk_type(&self) -> DiskType {
        self.footer.disk_type().unwrap_or(DiskType::Fixed)
    }

    /// The place of the footer that decides.
    pub fn footer_place(&self) -> FooterPlace {
        self.place
    }

    /// The parent's identity, if there is a parent. The null id means a raw file.
    pub fn parent_id(&self) -> Option<UniqueId> {
        let header = self.header.as_ref().filter(|_| self.disk_type() == DiskType::Differencing);
        header.map(Header::parent_id)
    }

    /// What opening the image has found.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The locators of the parent, in the order of the search.
    ///
    /// # Errors
    /// The system's.
    pub fn locators(&self) -> Result<Vec<Locator>> {
        match (&self.header, self.parent_id()) {
            (Some(header), Some(_)) => Locator::read_all(&self.file, header, self.file.len()?),
            _ => Ok(Vec::new()),
        }
    }

    /// Reads the batmap of blktap, if there is one.
    pub(super) fn batmap(&self) -> Result<Option<Batmap>> {
        match &self.header {
            Some(header) => Batmap::read(&self.file, &self.footer, header, self.file.len()?),
            None => Ok(None),
        }
    }

    /// Returns the place of the data of a stored block; `None` if the block is not stored.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an entry that leads out of the file or into the first sector.
    pub(super) fn data_of(&mut self, block: u64) -> Result<Option<HostOffset>> {
        let Some(header) = &self.header else { return Ok(None) };
        let size = header.block();
        let sector = self.bat.get(&self.file, block)?;
        if sector == FREE {
            return Ok(None);
        }
        let data = u64::from(sector) * SECTOR + size.bitmap_bytes();
        let used = size.bytes().min(self.footer.size().saturating_sub(block * size.bytes()));
        if sector == 0 || data + used > self.end {
            return Err(Error::corrupt(format!(
                "block {block} is said to be at sector {sector}, which is not in the file"
            )));
        }
        Ok(Some(HostOffset(data)))
    }

    /// Returns the bitmap of the stored block whose data is at `data`.
    pub(super) fn bitmap(&mut self, block: u64, data: HostOffset) -> Result<&mut Bitmap> {
        let Some(size) = self.header.as_ref().map(Header::block) else {
            return Err(Error::corrupt("a fixed image has no bitmaps"));
        };
        if !self.bitmaps.contains_key(&block) {
            if self.bitmap_bytes > BITMAP_CACHE {
                self.bitmaps.retain(|block, _| self.dirty.contains(block));
                self.bitmap_bytes = 0;
            }
            let mut bytes = vec![0; size.bitmap_bytes() as usize];
            self.file.read_at(&mut bytes, HostOffset(data.0 - size.bitmap_bytes()))?;
            let bitmap = Bitmap::parse(&bytes, size.sectors());
            self.bitmap_bytes += match &bitmap {
                Bitmap::Full => 16,
                Bitmap::Bits(bits) => bits.len() + 16,
            };
            self.bitmaps.insert(block, bitmap);
        }
        Ok(self.bitmaps.entry(block).or_insert(Bitmap::Full))
    }

    /// Takes each stored block as whole, as QEMU does, for reading.
    #[must_use]
    pub fn by_blocks(mut self) -> Self {
        self.by_blocks = true;
        self
    }

    /// Returns the range with one kind of content that begins at `at`, which must be inside of the disk. It
    /// may continue after its end.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; the system's.
    pub fn extent(&mut self, at: u64) -> Result<Extent> {
        let size = self.size();
        let Some(block_size) = self.header.as_ref().map(Header::block) else {
            return next_extent(&self.file, at, size);
        };
        let (block, within) = (at / block_size.bytes(), at % block_size.bytes());
        let Some(data) = self.data_of(block)? else {
            let next = self.bat.next_stored(&self.file, block)?;
            let end = next.saturating_mul(block_size.bytes()).min(size);
            return Ok(Extent { end, data: None });
        };
        if self.by_blocks {
            let end = (block + 1).saturating_mul(block_size.bytes()).min(size);
            return Ok(Extent { end, data: Some(HostOffset(data.0 + within)) });
        }
        let (is_set, end) = self.bitmap(block, data)?.run(within / SECTOR, block_size.sectors());
        let end = (block * block_size.bytes() + end * SECTOR).min(size);
        Ok(Extent { end, data: is_set.then_some(HostOffset(data.0 + within)) })
    }

    /// Fails unless the image may be written: it is open for that, needs no repair, and its BAT is sound.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`], [`ErrorKind::Dirty`], [`ErrorKind::Corrupt`]; the system's.
    pub fn require_writable(&mut self) -> Result<()> {
        if self.failed {
            return Err(Error::new(ErrorKind::Io, "an earlier write of it failed").advise("open it again"));
        }
        if self.may_write {
            return Ok(());
        }
        if !self.file.is_writable() {
            return Err(Error::new(ErrorKind::ReadOnly, "it was opened for reading"));
        }
        self.require_sound()?;
        self.may_write = true;
        Ok(())
    }

    /// Fails if the image must not be written, or be frozen under a child: it needs a repair, or blocks lie
    /// over each other, over other structures or outside of the file.
    ///
    /// # Errors
    /// [`ErrorKind::Dirty`], [`ErrorKind::Corrupt`]; the system's.
    pub fn require_sound(&mut self) -> Result<()> {
        let mut found = self.findings.clone();
        self.check_places(&mut found)?;
        if let Some(finding) = found.iter().find(|finding| finding.blocks_writing) {
            let (kind, advice) = match finding.repairable {
                true => (ErrorKind::Dirty, "`domsnap disk check --repair` mends it; no changes made"),
                false => (
                    ErrorKind::Corrupt,
                    "copy the disk to a new image with `domsnap disk materialise`; no changes made",
                ),
            };
            return Err(Error::new(kind, finding.text.clone()).advise(advice));
        }
        Ok(())
    }

    /// Returns true if any block is stored, or the image is fixed.
    ///
    /// # Errors
    /// The system's.
    pub fn is_written(&mut self) -> Result<bool> {
        let mut stored = self.header.is_none();
        self.bat.for_each(&self.file, |_, _| {
            stored = true;
            Ok(())
        })?;
        Ok(stored)
    }

    /// Bytes of the disk that the image itself has, counted by sectors.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; the system's.
    pub fn data_bytes(&mut self) -> Result<u64> {
        let (mut at, mut bytes) = (0, 0);
        while at < self.size() {
            let extent = self.extent(at)?;
            bytes += if extent.data.is_some() { extent.end - at } else { 0 };
            at = extent.end;
        }
        Ok(bytes)
    }

    /// The worst severity of what opening the image has found.
    pub fn severity(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }
}
