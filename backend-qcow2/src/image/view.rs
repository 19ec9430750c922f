//! The content of a run of layers: for each range of the guest's disk, the layer that owns it and the kind of
//! its content.
//!
//! A [`View`] is swept from the disk's start to its end. Each layer keeps one slice of one L2 table in memory
//! and one extent of it. So a view of 200 layers of 1 TiB uses some megabytes, and each table is read once. A
//! layer is one state of an image: its active state, or one of its internal snapshots. The layers of one run
//! may differ in everything.

use std::sync::Arc;

use super::compressed::decompress;
use super::error::{Context, Error, ErrorKind, Result};
use super::file::ImageFile;
use super::header::Compression;
use super::mapping::{CompressedExtent, Geometry, L2Entry, Mapping, SUBCLUSTERS};
use super::open::Image;
use super::snapshot_table::Snapshot;
use super::tables::L1Table;
use super::units::HostOffset;

/// The largest slice of an L2 table that a layer keeps in memory.
const SLICE: usize = 64 << 10;

/// Data below a run of layers: the backing file of the bottom layer. It reads as zeros past its end.
pub trait ChainReader {
    /// Fills `buf` with the guest's bytes from `offset`.
    ///
    /// # Errors
    /// The system's, and those of broken images.
    fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<()>;
}

/// One state of one image.
#[derive(Clone, Debug)]
pub struct RunLayer {
    file: Arc<ImageFile>,
    geometry: Geometry,
    compression: Compression,
    l1: L1Table,
    size: u64,
}

impl RunLayer {
    /// The active state of the image.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for encrypted images and external data files; [`ErrorKind::Corrupt`] for an
    /// image that is marked as corrupt or whose L1 table is invalid; the system's.
    pub fn active(image: &Image) -> Result<Self> {
        let l1 = image.active_l1()?.clone();
        Self::of(image, l1, image.virtual_size())
    }

    /// The state of an internal snapshot of the image, without its VM state.
    ///
    /// # Errors
    /// As [`RunLayer::active`].
    pub fn snapshot(image: &Image, snapshot: &Snapshot) -> Result<Self> {
        let l1 = image.snapshot_l1(snapshot)?;
        Self::of(image, l1, snapshot.disk_size)
    }

    fn of(image: &Image, mut l1: L1Table, size: u64) -> Result<Self> {
        image.require_plain_data()?;
        if image.header().is_corrupt() {
            return Err(Error::corrupt("the image is marked as corrupt; its data is not to be trusted")
                .on("read data of", image.path()));
        }
        if i64::try_from(size).is_err() {
            return Err(
                Error::corrupt(format!("invalid disk size: {size} bytes")).on("read data of", image.path())
            );
        }
        let geometry = image.geometry();
        // Behind the disk's end is VM state, or nothing.
        let needed = usize::try_from(geometry.l1_entries_for(size)).unwrap_or(usize::MAX);
        l1.entries.truncate(needed);
        Ok(Self { file: image.shared_file(), geometry, compression: image.header().compression, l1, size })
    }

    /// Bytes of the disk in this state.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The file that contains it.
    pub(crate) fn file(&self) -> &ImageFile {
        &self.file
    }

    /// The file, for a reader that outlives a borrow of the layer.
    pub(super) fn shared_file(&self) -> Arc<ImageFile> {
        Arc::clone(&self.file)
    }

    /// Layout of its tables.
    pub(super) fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Returns true if the L1 table of `other` has the same L2 tables.
    pub(super) fn has_tables_of(&self, other: &Self) -> bool {
        // Bit 63 of an entry changes with every snapshot that is taken or deleted.
        let tables = |layer: &Self, index| layer.l1.l2_offset(index);
        let length = self.l1.len().max(other.l1.len());
        self.geometry == other.geometry && (0..length).all(|at| tables(self, at) == tables(other, at))
    }

    /// The first L2 table at or after an L1 index: its distance from that, and its place.
    pub(super) fn next_table(&self, index: usize) -> Option<(usize, HostOffset)> {
        let rest = self.l1.entries.get(index..)?;
        let found = rest.iter().position(|entry| *entry != 0)?;
        Some((found, self.l1.l2_offset(index + found)?))
    }

    /// Returns true if compressed clusters of this layer can be used unchanged in an image with that geometry
    /// and method.
    pub(crate) fn packs_like(&self, geometry: Geometry, compression: Compression) -> bool {
        self.geometry.cluster_bits == geometry.cluster_bits && self.compression == compression
    }
}

/// Kind of content of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// No layer of the run defines it: the data below shows.
    Unowned,
    /// Zeros that the layer defines.
    Zero,
    /// Zeros, because the layer's disk ends before.
    PastEnd,
    /// Data, starting at this offset of the layer's file.
    Data(HostOffset),
    /// A part of a compressed cluster.
    Compressed {
        /// Place of the compressed cluster.
        extent: CompressedExtent,
        /// The guest offset at which its cluster starts.
        cluster: u64,
    },
}

impl Content {
    /// The same content, `by` bytes further on.
    pub(super) fn advanced(self, by: u64) -> Self {
        match self {
            Self::Data(at) => Self::Data(HostOffset(at.0.saturating_add(by))),
            other => other,
        }
    }
}

/// A range of the guest's disk with the same kind of content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
    /// The layer of the run that defines it; the bottom is 0. Without meaning for [`Content::Unowned`].
    pub layer: usize,
    /// Kind of content.
    pub content: Content,
}

/// One extent of one layer, and the part of a table that it came from.
#[derive(Debug)]
struct Cursor {
    layer: RunLayer,
    start: u64,
    end: u64,
    content: Content,
    slice: Vec<u8>,
    /// L1 index and first entry of the content of `slice`.
    loaded: Option<(usize, usize)>,
}

impl Cursor {
    fn new(layer: RunLayer) -> Self {
        Self { layer, start: 0, end: 0, content: Content::Unowned, slice: Vec::new(), loaded: None }
    }

    fn set(&mut self, start: u64, end: u64, content: Content) {
        (self.start, self.end, self.content) = (start, end, content);
    }

    /// Finds the extent that contains `at`.
    fn seek(&mut self, at: u64) -> Result<()> {
        if self.start <= at && at < self.end {
            return Ok(());
        }
        let (geometry, size) = (self.layer.geometry, self.layer.size);
        if at >= size {
            self.set(size, u64::MAX, Content::PastEnd);
            return Ok(());
        }
        let reach = geometry.l2_reach();
        let index = usize::try_from(at / reach).unwrap_or(usize::MAX);
        let Some(table) = self.layer.l1.l2_offset(index) else {
            let rest = self.layer.l1.entries.get(index..).unwrap_or_default();
            let end = match rest.iter().position(|e| *e != 0) {
                Some(n) => ((index + n) as u64).saturating_mul(reach).min(size),
                None => size,
            };
            self.set(at, end, Content::Unowned);
            return Ok(());
        };
        let per_slice = SLICE.min(geometry.cluster_bits.bytes()) / geometry.l2_entry_size();
        let bits = geometry.cluster_bits.bits();
        let entry = ((at % reach) >> bits) as usize;
        let first = entry / per_slice * per_slice;
        if self.loaded != Some((index, first)) {
            self.loaded = None;
            self.slice.resize(per_slice * geometry.l2_entry_size(), 0);
            let place = HostOffset(table.0.saturating_add((first * geometry.l2_entry_size()) as u64));
            self.layer.file.read_at(&mut self.slice, place)?;
            self.loaded = Some((index, first));
        }
        self.extend(at, index as u64 * reach, first, entry, per_slice)
    }

    /// Makes the extent at `at` as long as the slice allows.
    fn extend(&mut self, at: u64, base: u64, first: usize, entry: usize, per_slice: usize) -> Result<()> {
        let (geometry, size) = (self.layer.geometry, self.layer.size);
        let (bits, cluster) = (geometry.cluster_bits.bits(), geometry.cluster_bits.size());
        let place = |n: usize| base + ((n as u64) << bits);
        let mapping = |slice: &[u8], n: usize| L2Entry::read(geometry, slice, n - first).mapping(geometry);
        let found = mapping(&self.slice, entry).context("read an L2 table of", self.layer.file.path())?;
        let start = place(entry);
        if let Mapping::Compressed(extent) = found {
            self.set(start, (start + cluster).min(size), Content::Compressed { extent, cluster: start });
            return Ok(());
        }
        if let Mapping::Subclusters { host, allocated, zero } = found {
            let part = geometry.subcluster_size();
            let kind = |n: u32| (allocated >> n & 1, zero >> n & 1);
            let here = ((at - start) / part) as u32;
            let mut from = here;
            while from > 0 && kind(from - 1) == kind(here) {
                from -= 1;
            }
            let mut to = here + 1;
            while to < SUBCLUSTERS && kind(to) == kind(here) {
                to += 1;
            }
            let from_byte = u64::from(from) * part;
            let content = match (kind(here), host) {
                ((1, _), Some(host)) => Content::Data(HostOffset(host.0 + from_byte)),
                ((_, 1), _) => Content::Zero,
                _ => Content::Unowned,
            };
            self.set(start + from_byte, (start + u64::from(to) * part).min(size), content);
            return Ok(());
        }
        let mut to = entry + 1;
        let content = match found {
            Mapping::Data(host) => {
                // A broken entry ends the extent. The error is reported when reading reaches that entry.
                while to < first + per_slice
                    && mapping(&self.slice, to).is_ok_and(|m| {
                        m == Mapping::Data(HostOffset(host.0.saturating_add(((to - entry) as u64) << bits)))
                    })
                {
                    to += 1;
                }
                Content::Data(host)
            }
            Mapping::Zero { .. } => {
                while to < first + per_slice
                    && mapping(&self.slice, to).is_ok_and(|m| matches!(m, Mapping::Zero { .. }))
                {
                    to += 1;
                }
                Content::Zero
            }
            _ => {
                while to < first + per_slice
                    && mapping(&self.slice, to).is_ok_and(|m| m == Mapping::Unallocated)
                {
                    to += 1;
                }
                Content::Unowned
            }
        };
        self.set(start, place(to).min(size), content);
        Ok(())
    }
}

/// The content that the top of a run of layers shows.
#[derive(Debug)]
pub struct View {
    layers: Vec<Cursor>,
    size: u64,
    unpacked: Unpacked,
    /// A range in which, as [`View::next_defined`] has found, every byte may be defined by the run.
    defined: std::ops::Range<u64>,
}

impl View {
    /// Makes a view of layers, the bottom first. Layers below the run are not read.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for an empty run.
    pub fn new(run: Vec<RunLayer>) -> Result<Self> {
        let size = run
            .last()
            .map(RunLayer::size)
            .ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a run has one layer at least"))?;
        Ok(Self {
            layers: run.into_iter().map(Cursor::new).collect(),
            size,
            unpacked: Unpacked::default(),
            defined: 0..0,
        })
    }

    /// Bytes of the disk that the top layer shows.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// A layer of the run.
    pub(crate) fn layer(&self, number: usize) -> Option<&RunLayer> {
        self.layers.get(number).map(|c| &c.layer)
    }

    /// Finds the first byte at or after `at` at which the run may show something else than layer `but` does.
    /// Uses only the L1 tables and the sizes. Returns the disk's end if there is none.
    pub(super) fn next_defined(&mut self, at: u64, but: usize) -> u64 {
        if self.defined.contains(&at) {
            return at;
        }
        let mut next = self.size;
        for (number, cursor) in self.layers.iter().enumerate().rev() {
            let (l1, size, reach) = (&cursor.layer.l1, cursor.layer.size, cursor.layer.geometry.l2_reach());
            // A layer hides everything behind its own end.
            if at >= size {
                self.defined = at..u64::MAX;
                return at;
            }
            next = next.min(size);
            if number == but {
                continue;
            }
            let index = usize::try_from(at / reach).unwrap_or(usize::MAX);
            let place = |n: usize| (index.saturating_add(n) as u64).saturating_mul(reach);
            match l1.entries.get(index..).and_then(|rest| rest.iter().position(|entry| *entry != 0)) {
                Some(0) => {
                    self.defined = at..place(1);
                    return at;
                }
                Some(n) => next = next.min(place(n)),
                None => {}
            }
        }
        next
    }

    /// Returns the piece that starts at `at`, as far as one slice of the tables shows it: the next piece may
    /// be of the same kind. `None` at the disk's end.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for invalid tables, and the system's.
    pub fn piece(&mut self, at: u64) -> Result<Option<Piece>> {
        if at >= self.size {
            return Ok(None);
        }
        let mut end = self.size;
        for (layer, cursor) in self.layers.iter_mut().enumerate().rev() {
            cursor.seek(at)?;
            end = end.min(cursor.end);
            if cursor.content != Content::Unowned {
                let content = cursor.content.advanced(at - cursor.start);
                return Ok(Some(Piece { start: at, end, layer, content }));
            }
        }
        Ok(Some(Piece { start: at, end, layer: 0, content: Content::Unowned }))
    }

    /// Fills `buf` with the content of the piece; `buf` may be shorter than the piece. Unowned content comes
    /// from `below`, and is zero without one.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an invalid compressed cluster, and the system's.
    pub fn read_piece(
        &mut self,
        piece: &Piece,
        buf: &mut [u8],
        below: Option<&mut (dyn ChainReader + '_)>,
    ) -> Result<()> {
        match piece.content {
            Content::Zero | Content::PastEnd => buf.fill(0),
            Content::Unowned => match below {
                Some(below) => below.read_at(buf, piece.start)?,
                None => buf.fill(0),
            },
            Content::Data(host) => match self.layers.get(piece.layer) {
                Some(cursor) => cursor.layer.file.read_at(buf, host)?,
                None => buf.fill(0),
            },
            Content::Compressed { extent, cluster } => {
                let Some(cursor) = self.layers.get(piece.layer) else { return Ok(()) };
                let bytes = self.unpacked.get(piece.layer, &cursor.layer, extent)?;
                let from = usize::try_from(piece.start.saturating_sub(cluster)).unwrap_or(usize::MAX);
                match bytes.get(from..from.saturating_add(buf.len())) {
                    Some(part) => buf.copy_from_slice(part),
                    None => {
                        return Err(Error::new(
                            ErrorKind::InvalidInput,
                            "a piece ends after its compressed cluster",
                        ));
                    }
                }
            }
        }
        Ok(())
    }

    /// Fills `buf` with what the guest reads at `offset`. Past the disk's end are zeros.
    ///
    /// # Errors
    /// As [`View::piece`] and [`View::read_piece`].
    pub fn read_at(
        &mut self,
        buf: &mut [u8],
        offset: u64,
        mut below: Option<&mut (dyn ChainReader + '_)>,
    ) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            let at = offset.saturating_add(done as u64);
            let Some(piece) = self.piece(at)? else { break };
            let length = usize::try_from(piece.end - at).unwrap_or(usize::MAX).min(buf.len() - done);
            let part = buf.get_mut(done..done + length).unwrap_or_default();
            match &mut below {
                Some(below) => self.read_piece(&piece, part, Some(&mut **below))?,
                None => self.read_piece(&piece, part, None)?,
            }
            done += length;
        }
        if let Some(rest) = buf.get_mut(done..) {
            rest.fill(0);
        }
        Ok(())
    }
}

/// A whole chain can be the backing file of another run.
impl ChainReader for View {
    fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        View::read_at(self, buf, offset, None)
    }
}

/// A raw image at the bottom of a chain.
impl ChainReader for ImageFile {
    fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        ImageFile::read_at(self, buf, HostOffset(offset))
    }
}

/// The last compressed cluster that was read.
#[derive(Debug, Default)]
struct Unpacked {
    of: Option<(usize, CompressedExtent)>,
    raw: Vec<u8>,
    bytes: Vec<u8>,
}

impl Unpacked {
    fn get(&mut self, number: usize, layer: &RunLayer, extent: CompressedExtent) -> Result<&[u8]> {
        if self.of != Some((number, extent)) {
            self.of = None;
            // A descriptor's length is at most two clusters.
            self.raw.resize(usize::try_from(extent.length).unwrap_or(0), 0);
            layer.file.read_at(&mut self.raw, extent.offset)?;
            self.bytes.resize(layer.geometry.cluster_bits.bytes(), 0);
            decompress(layer.compression, &self.raw, &mut self.bytes)
                .context("read data of", layer.file.path())?;
            self.of = Some((number, extent));
        }
        Ok(&self.bytes)
    }
}

/// Counts, for each layer of a run, the bytes of its data that the top shows. A merge into another layer
/// would move them.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for invalid tables, and the system's.
pub fn visible_bytes(run: Vec<RunLayer>) -> Result<Vec<u64>> {
    let mut bytes = vec![0u64; run.len()];
    let mut view = View::new(run)?;
    let mut at = 0;
    while let Some(piece) = view.piece(at)? {
        if matches!(piece.content, Content::Data(_) | Content::Compressed { .. })
            && let Some(sum) = bytes.get_mut(piece.layer)
        {
            *sum += piece.end - piece.start;
        }
        at = piece.end;
    }
    Ok(bytes)
}
