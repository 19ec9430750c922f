//! An open image: the tables that are read once and cached, and the checks before every writing operation.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use image_files::{LockMode, lock};

use super::error::{Context, Error, ErrorKind, Result, shown};
use super::file::ImageFile;
use super::header::{
    AUTOCLEAR_BITMAPS, AUTOCLEAR_KNOWN, Encryption, Header, HeaderSummary, MAX_BACKING_NAME, SECTOR,
};
use super::mapping::Geometry;
use super::overlap;
use super::refcount::Refcounts;
use super::snapshot_table::{self, Snapshot};
use super::tables::{self, L1Table, L2Table};
use super::units::HostOffset;

/// Advice of an error that comes after the first write. The write order has kept the image readable.
pub(super) const HALF_DONE: &str = "the operation had begun: the image shows what it did before or what it does after it, and clusters \
     may be leaked; run `domsnap check`, and repair a copy of it with `qemu-img check -r all`";

/// Options for opening an image.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct OpenOptions {
    /// True for reading and writing, false for reading only.
    pub writable: bool,
    /// Takes QEMU's locks. Turn it off only to look at an image that is known to be in use.
    pub lock: bool,
    /// Returns the space of freed clusters to the file system.
    pub punch: bool,
}

impl OpenOptions {
    /// Opens for reading, with the lock of a reader.
    pub fn read_only() -> Self {
        Self { writable: false, lock: true, punch: true }
    }

    /// Opens for reading and writing, with the lock of a writer.
    pub fn read_write() -> Self {
        Self { writable: true, lock: true, punch: true }
    }

    /// Opens without locks.
    #[must_use]
    pub fn unlocked(mut self) -> Self {
        self.lock = false;
        self
    }

    /// Leaves the space of freed clusters in the file, for the next writes.
    #[must_use]
    pub fn without_punching(mut self) -> Self {
        self.punch = false;
        self
    }
}

/// Progress of an image towards its first write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum State {
    /// Opened; the checks for writers were not done yet.
    Open,
    /// Everything that a writer needs was read and checked; nothing was written.
    Checked,
    /// Ready for writes.
    Writing,
    /// A write failed: memory may differ from the file.
    Failed,
}

/// An open qcow2 image.
pub struct Image {
    pub(crate) file: Arc<ImageFile>,
    pub(crate) header: Header,
    /// The first sector as it is in the file.
    pub(crate) sector: [u8; SECTOR],
    pub(crate) l1: OnceLock<L1Table>,
    pub(crate) snapshots: OnceLock<(Vec<Snapshot>, usize)>,
    pub(crate) refcounts: Option<Refcounts>,
    /// Places of the metadata, while they are known. Nothing is allocated there.
    pub(crate) protected: Option<Vec<overlap::MetadataRange>>,
    /// True if freed clusters are punched.
    pub(crate) punch: bool,
    state: State,
}

impl std::fmt::Debug for Image {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Image").field("path", &self.file.path()).field("state", &self.state).finish()
    }
}

/// Reads a file's header and nothing else, without any lock. Returns `None` if the file is not a qcow2 image.
///
/// # Errors
/// The system's, and [`Header::parse`]'s.
pub fn probe(path: &Path) -> Result<Option<HeaderSummary>> {
    let file = ImageFile::open(path, false)?;
    match Header::read(&file) {
        Ok((header, _)) => Ok(Some(header.summary())),
        Err(e) if e.kind() == ErrorKind::WrongFormat => Ok(None),
        Err(e) => Err(e),
    }
}

/// Returns the backing string of a file of any kind. `None` if it is not an image with a backing file, or if
/// its string is invalid for every reader. The known formats are qcow2, and of the others that QEMU writes
/// QED and VMDK.
///
/// Nothing else of the header is read. So this also works for an image that the engine cannot open, because
/// it is damaged or of a later version. (The first version of qcow has the fields in the same places.)
///
/// # Errors
/// The system's.
pub fn stated_backing(path: &Path) -> std::io::Result<Option<Vec<u8>>> {
    use std::os::unix::fs::{FileExt, OpenOptionsExt};
    // The open does not wait, whatever file the name leads to by now. Links are followed: their target may be
    // an image that is backed by one of ours, and only its backing string is learnt from it.
    let flags = rustix::fs::OFlags::NONBLOCK.bits();
    let file = std::fs::File::options().read(true).custom_flags(flags.cast_signed()).open(path)?;
    let kind = file.metadata()?.file_type();
    if !kind.is_file() && !std::os::unix::fs::FileTypeExt::is_block_device(&kind) {
        return Ok(None);
    }
    let read = |bytes: &mut [u8], at: u64| match file.read_exact_at(bytes, at) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    };
    let mut head = [0; 20];
    if !read(&mut head, 0)? {
        return Ok(None);
    }
    match head {
        [b'Q', b'E', b'D', 0, ..] => return qed_backing(read),
        [b'K', b'D', b'M', b'V', ..] => {
            // The sparse header has the offset of its descriptor, in sectors.
            let mut place = [0; 8];
            let sector = read(&mut place, 28)?.then_some(u64::from_le_bytes(place));
            let Some(at) = sector.and_then(|sector| sector.checked_mul(512)) else { return Ok(None) };
            return Ok(vmdk_parent(&text_at(&file, at)?));
        }
        [b'#', ..] if head.starts_with(b"# Disk DescriptorFil") => {
            return Ok(vmdk_parent(&text_at(&file, 0)?));
        }
        _ => {}
    }
    let [m0, m1, m2, m3, _, _, _, _, offset @ .., s0, s1, s2, s3] = head;
    let (offset, size) = (u64::from_be_bytes(offset), u32::from_be_bytes([s0, s1, s2, s3]));
    if [m0, m1, m2, m3] != *b"QFI\xfb" || offset == 0 || size == 0 || size > MAX_BACKING_NAME {
        return Ok(None);
    }
    let mut name = vec![0; size as usize];
    Ok(match offset.checked_add(u64::from(size)) {
        Some(end) if i64::try_from(end).is_ok() && read(&mut name, offset)? => {
            // Like in C, the string ends with the first NUL.
            name.truncate(name.iter().position(|byte| *byte == 0).unwrap_or(name.len()));
            Some(name)
        }
        _ => None,
    })
}

/// The backing string of a QED image (QEMU's `docs/interop/qed_spec.rst`).
fn qed_backing(read: impl Fn(&mut [u8], u64) -> std::io::Result<bool>) -> std::io::Result<Option<Vec<u8>>> {
    let mut features = [0; 8];
    let mut place = [0; 8];
    if !read(&mut features, 16)? || !read(&mut place, 56)? {
        return Ok(None);
    }
    let [o0, o1, o2, o3, s0, s1, s2, s3] = place;
    let (offset, size) = (u32::from_le_bytes([o0, o1, o2, o3]), u32::from_le_bytes([s0, s1, s2, s3]));
    // Feature bit 0: the image has a backing file.
    if u64::from_le_bytes(features) & 1 == 0 || size == 0 || size > MAX_BACKING_NAME {
        return Ok(None);
    }
    let mut name = vec![0; size as usize];
    Ok(read(&mut name, u64::from(offset))?.then_some(name))
}

/// Largest VMDK descriptor that is read: QEMU reads 20 sectors.
const MAX_DESCRIPTOR: u64 = 20 * 512;

fn text_at(file: &std::fs::File, at: u64) -> std::io::Result<Vec<u8>> {
    use std::io::{Read, Seek};
    let mut file = file;
    // No descriptor lies beyond the largest offset that the system accepts.
    if i64::try_from(at).is_err() {
        return Ok(Vec::new());
    }
    file.seek(std::io::SeekFrom::Start(at))?;
    let mut text = Vec::new();
    file.take(MAX_DESCRIPTOR).read_to_end(&mut text)?;
    Ok(text)
}

/// Finds the parent that a VMDK descriptor names.
fn vmdk_parent(descriptor: &[u8]) -> Option<Vec<u8>> {
    const HINT: &[u8] = b"parentFileNameHint=\"";
    let at = descriptor.windows(HINT.len()).position(|found| found == HINT)?;
    let name = descriptor.get(at + HINT.len()..)?;
    let end = name.iter().position(|byte| *byte == b'"')?;
    name.get(..end).filter(|name| !name.is_empty()).map(<[u8]>::to_vec)
}

fn marked_corrupt() -> Error {
    Error::corrupt("the image is marked as corrupt and must not be written").advise(
        "copy what is left of it with `qemu-img convert`, or repair a copy with `qemu-img check -r all`",
    )
}

impl Image {
    /// Opens an image with one read. Each table is read when it is first needed.
    ///
    /// # Errors
    /// The system's; [`ErrorKind::Locked`]; [`Header::parse`]'s; for writing, [`ErrorKind::Corrupt`] if the
    /// image is marked as corrupt.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let file = ImageFile::open(path, options.writable)?;
        if options.lock
            && let Some(f) = file.file()
        {
            let mode = if options.writable { LockMode::Write } else { LockMode::Read };
            lock(f, mode).map_err(Error::from).context("lock", path)?;
        }
        let mut image = Self::from_file(file)?;
        image.punch = options.punch;
        Ok(image)
    }

    pub(crate) fn from_file(file: ImageFile) -> Result<Self> {
        Self::of(Arc::new(file))
    }

    /// Reads an open file as an image, for reading.
    pub(crate) fn of(file: Arc<ImageFile>) -> Result<Self> {
        let (header, head) = Header::read(&file)?;
        let mut sector = [0; SECTOR];
        if let Some(first) = head.get(..SECTOR) {
            sector.copy_from_slice(first);
        }
        if file.is_writable() && header.is_corrupt() {
            return Err(marked_corrupt().on("open", file.path()));
        }
        Ok(Self {
            file,
            header,
            sector,
            l1: OnceLock::new(),
            snapshots: OnceLock::new(),
            refcounts: None,
            protected: None,
            punch: true,
            state: State::Open,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The path that the image was opened by.
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    /// The file, for reads of data clusters and for reflinks.
    pub fn file(&self) -> &ImageFile {
        &self.file
    }

    /// The file, for a reader that outlives a borrow of the image.
    pub(crate) fn shared_file(&self) -> Arc<ImageFile> {
        Arc::clone(&self.file)
    }

    /// Bytes of the guest's disk.
    pub fn virtual_size(&self) -> u64 {
        self.header.virtual_size
    }

    /// Layout of the tables.
    pub fn geometry(&self) -> Geometry {
        Geometry::of(&self.header)
    }

    /// Bytes that the file occupies on its file system.
    ///
    /// # Errors
    /// The system's.
    pub fn allocated_bytes(&self) -> Result<u64> {
        use std::os::unix::fs::MetadataExt;
        match self.file.file() {
            Some(f) => f
                .metadata()
                .map(|m| m.blocks() * 512)
                .map_err(|e| Error::io("the file's size cannot be read", e).on("read", self.path())),
            None => self.file.len(),
        }
    }

    /// Returns true if an overlay contains anything that it did not have when it was created: data, or an
    /// internal snapshot.
    ///
    /// # Errors
    /// As [`Image::active_l1`] and [`Image::snapshots`].
    pub fn is_written(&self) -> Result<bool> {
        let tables = self.active_l1()?;
        let mapped = (0..tables.len()).any(|index| tables.l2_offset(index).is_some());
        Ok(mapped || !self.snapshots()?.is_empty())
    }

    /// The internal snapshots, in the table's order.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an invalid table, and the system's.
    pub fn snapshots(&self) -> Result<&[Snapshot]> {
        Ok(&self.snapshot_table()?.0)
    }

    /// The snapshots and the bytes of their table.
    pub(crate) fn snapshot_table(&self) -> Result<&(Vec<Snapshot>, usize)> {
        if self.snapshots.get().is_none() {
            // If another thread was faster, it has read the same.
            let _ = self.snapshots.set(snapshot_table::read(&self.file, &self.header)?);
        }
        self.snapshots.get().ok_or_else(|| Error::new(ErrorKind::Io, "the snapshot table is not there"))
    }

    /// Returns the snapshot of this name, or `None`. If QEMU made several of one name, it is the first, as in
    /// QEMU.
    ///
    /// # Errors
    /// As [`Image::snapshots`].
    pub fn find_snapshot(&self, name: &str) -> Result<Option<&Snapshot>> {
        Ok(self.snapshots()?.iter().find(|s| s.name == name.as_bytes()))
    }

    /// Returns the only snapshot of this name. QEMU allows a name to be used twice; this engine then refuses
    /// instead of guessing.
    pub(crate) fn require_snapshot(&self, name: &str) -> Result<&Snapshot> {
        let same = self.snapshots()?.iter().filter(|s| s.name == name.as_bytes()).count();
        if same > 1 {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("the image has {same} internal snapshots called \"{name}\", and one has to be meant"),
            )
            .advise("delete all but one by their IDs: `qemu-img snapshot -l` shows them, `qemu-img snapshot -d ID` deletes"));
        }
        self.find_snapshot(name)?.ok_or_else(|| {
            let names: Vec<String> =
                self.snapshots().unwrap_or_default().iter().take(8).map(|s| shown(&s.name)).collect();
            Error::new(ErrorKind::SnapshotNotFound, format!("the image has no internal snapshot \"{name}\""))
                .advise(if names.is_empty() {
                    "it has none at all".to_owned()
                } else {
                    format!("it has: {}", names.join(", "))
                })
        })
    }

    /// The active L1 table.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an invalid table, and the system's.
    pub fn active_l1(&self) -> Result<&L1Table> {
        if self.l1.get().is_none() {
            let l1 =
                L1Table::read(&self.file, self.geometry(), self.header.l1_offset, self.header.l1_entries)?;
            let _ = self.l1.set(l1);
        }
        self.l1.get().ok_or_else(|| Error::new(ErrorKind::Io, "the L1 table is not there"))
    }

    /// A snapshot's L1 table. Its first `l1_entries_for(disk_size)` entries map the disk; VM state lies
    /// behind.
    ///
    /// # Errors
    /// As [`Image::active_l1`].
    pub fn snapshot_l1(&self, snapshot: &Snapshot) -> Result<L1Table> {
        L1Table::read(&self.file, self.geometry(), snapshot.l1_offset, snapshot.l1_entries)
    }

    /// Reads one L2 table into `buffer`.
    ///
    /// # Errors
    /// The system's.
    pub fn read_l2<'b>(&self, offset: HostOffset, buffer: &'b mut Vec<u8>) -> Result<L2Table<'b>> {
        buffer.resize(self.header.cluster_bits.bytes(), 0);
        self.file.read_at(buffer, offset)?;
        Ok(L2Table { geometry: self.geometry(), bytes: buffer })
    }

    /// Reads the L2 tables of the L1 entries `range`, in order and in large reads, and passes each to `each`
    /// with its L1 index. Entries without a table are skipped.
    ///
    /// # Errors
    /// The system's, and whatever `each` returns.
    pub fn for_each_l2<F>(&self, l1: &L1Table, range: std::ops::Range<usize>, mut each: F) -> Result<()>
    where
        F: FnMut(usize, L2Table<'_>) -> Result<()>,
    {
        let found: Vec<(usize, u64)> =
            range.filter_map(|index| l1.l2_offset(index).map(|o| (index, o.0))).collect();
        let offsets: Vec<u64> = found.iter().map(|(_, o)| *o).collect();
        let geometry = self.geometry();
        tables::visit(&self.file, geometry, &offsets, |n, bytes| {
            let index = found.get(n).map_or(0, |(index, _)| *index);
            each(index, L2Table { geometry, bytes }).map(|()| false)
        })
    }

    /// Refuses an operation that is impossible on images with an external data file.
    pub(crate) fn require_own_data(&self, what: &str) -> Result<()> {
        if !self.header.has_data_file() {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "the image keeps its data in an external data file (\"{}\"), and the format has no {what} for such images",
                shown(self.header.data_file().unwrap_or_default().as_bytes())
            ),
        )
        .advise("use an external snapshot (an overlay), or convert the image without `data_file`"))
    }

    /// Refuses an image that must not be written.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an image that QEMU has marked as corrupt.
    pub fn require_writable(&self) -> Result<()> {
        match self.header.is_corrupt() {
            true => Err(marked_corrupt().on("write to", self.path())),
            false => Ok(()),
        }
    }

    /// Refuses an operation that needs the guest's data unencrypted and in this file.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an encrypted image or one with an external data file.
    pub fn require_plain_data(&self) -> Result<()> {
        self.require_own_data("moving of data").context("move data of", self.path())?;
        let method = match self.header.encryption {
            Encryption::None => return Ok(()),
            Encryption::Aes => "AES",
            Encryption::Luks => "LUKS",
        };
        Err(Error::new(ErrorKind::Unsupported, format!("the image is encrypted with {method}"))
            .advise("its data can only be moved by a program that has the key: `qemu-img convert --object secret,...`")
            .on("move data of", self.path()))
    }

    /// Reads and checks what every writing operation needs, and writes nothing. It is done once for each open
    /// image. Tables that overlap are refused.
    ///
    /// # Errors
    /// [`ErrorKind::ReadOnly`]; [`ErrorKind::Corrupt`]; the system's.
    fn check_before_write(&mut self) -> Result<()> {
        match self.state {
            State::Writing | State::Checked => return Ok(()),
            State::Failed => {
                return Err(Error::new(ErrorKind::Io, "an earlier write to the image failed")
                    .advise("open it again: the file itself is as the write order promises")
                    .on("write", self.path()));
            }
            State::Open => {}
        }
        if !self.file.is_writable() {
            return Err(Error::new(ErrorKind::ReadOnly, "the image was opened for reading")
                .advise("open it for writing")
                .on("write", self.path()));
        }
        let path = self.path().to_owned();
        self.refcounts = Some(Refcounts::load(&self.file, &self.header).context("write", &path)?);
        overlap::check(self).context("write", &path)?;
        self.state = State::Checked;
        Ok(())
    }

    /// Prepares the image for writes. Every writing operation does this first.
    ///
    /// It is done once for each open image. Unknown autoclear features are cleared, durably, before anything
    /// else is written. A dirty image's refcounts are rebuilt.
    ///
    /// # Errors
    /// As [`Image::check_before_write`].
    pub(crate) fn begin_write(&mut self) -> Result<()> {
        self.check_before_write()?;
        if self.state == State::Writing {
            return Ok(());
        }
        let path = self.path().to_owned();
        // 1) Data of unknown features becomes stale with the next write. Their bits are durably clear before
        //    it, so no reader relies on that data after a crash.
        if self.header.autoclear & !AUTOCLEAR_KNOWN != 0 {
            self.header.autoclear &= AUTOCLEAR_KNOWN;
            self.write_header_sector()?;
            self.file.flush()?;
        }
        self.state = State::Writing;
        // 2) Until the refcounts are rebuilt, a cluster in use may count as free, so nothing may be
        //    allocated.
        if self.header.is_dirty() {
            self.rebuild_refcounts().context("rebuild the refcounts of", &path)?;
        }
        Ok(())
    }

    /// Runs an operation that writes, and marks the image as failed if it returns an error.
    pub(crate) fn guarded<T>(
        &mut self,
        operation: &'static str,
        run: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        self.checked(operation, |_| Ok(()), run)
    }

    /// Like [`Image::guarded`], with a check of everything that the operation will touch before its first
    /// write. `check` reads and refuses; a refusal has changed nothing. A dirty image's refcounts are rebuilt
    /// before the check, because they are unreliable until then.
    pub(crate) fn checked<T>(
        &mut self,
        operation: &'static str,
        check: impl FnOnce(&mut Self) -> Result<()>,
        run: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let path = self.path().to_owned();
        let writes = self.file.writes();
        let ready = self.check_first(check).and_then(|()| self.begin_write());
        let ran = ready.is_ok();
        let done = ready.and_then(|()| run(self)).context(operation, &path);
        done.map_err(|error| {
            let wrote = self.file.writes() != writes;
            // The changes that `run` made in memory are not in the file.
            if ran || wrote {
                self.state = State::Failed;
            }
            if wrote { error.after_writes(HALF_DONE) } else { error }
        })
    }

    /// Runs the checks of an operation that writes in several parts. Nothing is written before them except
    /// the refcounts of a dirty image.
    pub(crate) fn check_first(&mut self, check: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        self.check_before_write()?;
        if self.header.is_dirty() {
            self.begin_write()?;
        }
        check(self)
    }

    /// Runs the checks of an operation, and writes nothing. An image with outdated refcounts gets only the
    /// checks that do not need them; one that is marked as corrupt is refused.
    pub(crate) fn rehearse(
        &mut self,
        operation: &'static str,
        check: impl FnOnce(&mut Self) -> Result<()>,
    ) -> Result<()> {
        let path = self.path().to_owned();
        if self.header.is_corrupt() {
            return Err(marked_corrupt().on(operation, &path));
        }
        if self.header.is_dirty() {
            return Ok(());
        }
        let loaded = Refcounts::load(&self.file, &self.header).context(operation, &path)?;
        self.refcounts = Some(loaded);
        let done = overlap::check(self).and_then(|()| check(self)).context(operation, &path);
        self.refcounts = None;
        done
    }

    /// Repairs an image after a failed operation, where that is possible. Returns the image as it now is:
    /// clean, and in the state before the operation or after it. It is tried twice, so that one more failed
    /// system call does not decide.
    pub(crate) fn repaired(&self) -> Option<Self> {
        (0..2).find_map(|_| {
            let mut image = Self::of(Arc::clone(&self.file)).ok()?;
            image.punch = self.punch;
            image.repair().is_ok().then_some(image)
        })
    }

    /// Allocates `count` consecutive free clusters with a refcount of one. The change is in memory only until
    /// [`Image::flush_metadata`].
    pub(crate) fn allocate(&mut self, count: u64) -> Result<HostOffset> {
        if self.protected.is_none() {
            self.protected = Some(overlap::metadata(self)?);
        }
        let (file, refcounts, header) = self.parts()?;
        let bits = header.cluster_bits;
        let first = refcounts.allocate(file, count)?;
        overlap::check_fresh(self.protected.as_deref().unwrap_or_default(), first.0, count)?;
        bits.host_offset(first).ok_or_else(|| {
            Error::new(
                ErrorKind::LimitExceeded,
                "the image file cannot grow to where its next cluster would be",
            )
        })
    }

    /// Removes one reference from each cluster of the range, in memory.
    pub(crate) fn release(&mut self, at: HostOffset, bytes: u64) -> Result<()> {
        let bits = self.header.cluster_bits;
        let first = bits.host_cluster(at).0;
        let clusters: Vec<u64> = (first..first + bits.clusters_for(bytes)).collect();
        let (file, refcounts, _) = self.parts()?;
        refcounts.change(file, &clusters, super::refcount::Change::Down(1), |_, _| {})?;
        self.protected = None;
        Ok(())
    }

    /// Marks the image as failed after a failed write: nothing more is written through this value.
    pub(crate) fn mark_failed(&mut self) {
        self.state = State::Failed;
    }

    /// The file, its refcounts and the header, borrowed together.
    pub(crate) fn parts(&mut self) -> Result<(&ImageFile, &mut Refcounts, &mut Header)> {
        match &mut self.refcounts {
            Some(r) => Ok((&self.file, r, &mut self.header)),
            None => Err(Error::new(ErrorKind::ReadOnly, "the image is not ready for writes")),
        }
    }

    /// Writes the header's fields. It is one sector, so the write is atomic. It is not durable before the
    /// next flush.
    pub(crate) fn write_header_sector(&mut self) -> Result<()> {
        self.header.write_fields(&mut self.sector);
        self.file.write_at(&self.sector, HostOffset(0))
    }

    /// Makes everything that was written durable, refcounts included, and switches to a moved refcount table.
    pub(crate) fn flush_metadata(&mut self) -> Result<()> {
        let (file, refcounts, header) = self.parts()?;
        // The new refcount table is durable. The old one is freed only after the header names the new one
        // durably: a crash between leaves leaked clusters at worst.
        if refcounts.write_back(file, header)? {
            self.write_header_sector()?;
            self.file.flush()?;
            let (file, refcounts, _) = self.parts()?;
            refcounts.free_old_tables(file)?;
        }
        Ok(())
    }

    /// Like [`Image::flush_metadata`], then writes the header sector from memory and makes that durable.
    pub(crate) fn flush_and_switch(&mut self) -> Result<()> {
        let (file, refcounts, header) = self.parts()?;
        // 1) Everything that the new header refers to is durable. 2) The header sector switches to it.
        // 3) Then the old refcount table is unused and can be freed.
        let moved = refcounts.write_back(file, header)?;
        self.write_header_sector()?;
        self.file.flush()?;
        if moved {
            let (file, refcounts, _) = self.parts()?;
            refcounts.free_old_tables(file)?;
        }
        Ok(())
    }

    /// Returns true if the image has persistent bitmaps that are marked as consistent.
    pub(crate) fn has_valid_bitmaps(&self) -> bool {
        self.header.autoclear & AUTOCLEAR_BITMAPS != 0
    }
}
