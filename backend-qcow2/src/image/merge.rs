//! Moving data between the layers of a chain: several layers become one.
//!
//! [`merge`] makes one layer of a run show what the top of the run shows. If that layer is the bottom of the
//! run, this is a commit. If it is the top, this is a stream or a safe rebase. If nothing is below the run,
//! this is a flatten. All cases between work too. Each cluster that the top shows is moved once, however many
//! layers there are. The other layers are only read.
//!
//! # Which clusters change
//! A cluster of the target changes if another layer of the run owns some range in it. It then gets everything
//! that the top shows there. In an image with subclusters, each subcluster is treated so. A range that no
//! layer owns stays unmapped, except in a cluster that must be mapped for another part of it. Only in this
//! case the data below the run is read.
//!
//! A layer whose disk ends before the top's disk owns zeros from there on. Zeros stay mappings without data.
//! Where nothing is below, they become no mapping at all. Version 2 has no such mapping and gets zeros
//! written where something is below.
//!
//! # What is durable before what
//! While the merge runs, the top read *through the run* shows the same at every point:
//!
//! * A cluster that only the target owns is overwritten in place, but only those of its bytes that another
//!   layer of the run hides. Whatever a crash leaves of such a write is not visible.
//! * Everything else goes to fresh clusters. Data and refcounts are durable before L2 entries refer to them.
//!   An entry's old clusters are freed after the entry is durable. A new entry shows what the run shows
//!   there, so it may become durable at any time.
//! * A longer L1 table is in place before. The header's size and backing file change in one sector, after all
//!   entries are durable. Before and after that write, the target owns every part of itself that the header
//!   could change.
//! * Mappings behind the end of a disk that became smaller are removed last.
//!
//! So a crash leaves leaked clusters at worst. A repeated merge finds what is done and does the rest. After a
//! crash, the caller must free the leaked clusters first ([`Image::repair`]). A cancelled merge keeps what it
//! has moved and leaks nothing. So does one that fails, if the failure allows it.

use std::sync::Arc;

use super::error::{Context, Error, ErrorKind, Result};
use super::file::ImageFile;
use super::header::{Backing, Compression};
use super::mapping::{Geometry, Mapping, SUBCLUSTERS};
use super::open::{HALF_DONE, Image};
use super::reserve;
use super::transfer::{Copier, Copy, Joiner, Moving};
use super::units::{GuestCluster, GuestOffset, HostOffset};
use super::view::{ChainReader, Content, Piece, RunLayer, View};
use super::writer::{ActiveWriter, InPlace};

/// Data moved between two flushes.
const BATCH: u64 = 512 << 20;
/// L2 tables in memory between two flushes.
const TABLES: usize = 32 << 20;
/// Data that is moved in one step, between two checks for cancellation.
const STEP: u64 = 16 << 20;

/// The backing file of the run.
pub struct RunBacking<'a> {
    /// The name and format that the target will store.
    pub backing: Backing,
    /// Its data. Read only where a cluster has to be filled up with it.
    pub reader: &'a mut (dyn ChainReader + 'a),
}

/// Result of a merge.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct MergeReport {
    /// Bytes of guest data that were moved. Compressed clusters count by their compressed size.
    pub bytes_moved: u64,
    /// Clusters that became zeros or unmapped.
    pub clusters_cleared: u64,
}

/// Makes `into` show what the top of the run `under`, `into`, `over` (each from the bottom up) shows, with
/// `below` under it.
///
/// `below` is the backing file of the lowest layer of the run. `into` must be open for writing.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a run of one, or for a `below` that contradicts the lowest layer.
/// [`ErrorKind::Unsupported`] for encrypted images, external data files, snapshots in `into` that read
/// through layers under it, and a version 2 image with snapshots whose size would change.
/// [`ErrorKind::Dirty`]; [`ErrorKind::Corrupt`]; [`ErrorKind::LimitExceeded`]; [`ErrorKind::Cancelled`]; the
/// system's.
///
/// After each of them the top read through the run shows the same as before. The merge can be repeated, with
/// the image opened again.
pub fn merge(
    under: Vec<RunLayer>,
    into: &mut Image,
    over: Vec<RunLayer>,
    below: Option<RunBacking<'_>>,
    moving: &Moving<'_>,
) -> Result<MergeReport> {
    let (path, writes) = (into.path().to_owned(), into.file().writes());
    merge_run(under, into, over, below, moving).context("merge into", &path).map_err(|error| {
        match into.file().writes() == writes {
            true => error,
            false => error.after_writes(HALF_DONE),
        }
    })
}

fn merge_run(
    under: Vec<RunLayer>,
    into: &mut Image,
    over: Vec<RunLayer>,
    below: Option<RunBacking<'_>>,
    moving: &Moving<'_>,
) -> Result<MergeReport> {
    let target = under.len();
    if under.is_empty() && over.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "a merge needs two layers at least"));
    }
    if under.is_empty() && into.header().backing.is_some() != below.is_some() {
        return Err(Error::new(
            ErrorKind::InvalidInput,
            "the lowest layer of the run is the target, and it and the caller disagree on whether anything is below",
        ));
    }
    let size = over.last().map_or(into.virtual_size(), RunLayer::size);
    refuse_for_snapshots(into, target > 0, size)?;
    let (backing, reader) = match below {
        Some(b) => (Some(b.backing), Some(b.reader)),
        None => (None, None),
    };
    let mut run = under;
    run.push(RunLayer::active(into)?);
    run.extend(over);
    let mut view = View::new(run)?;
    into.check_first(|image| {
        image.plan_head(backing.as_ref(), size)?;
        let touched = touched(&mut view, target, image, moving)?;
        image.check_touched(touched.into_iter())
    })?;
    // 1) The L1 table has room for every mapping, durably, before the first mapping is made.
    reserve::reserve(into, size)?;
    // If the target keeps a backing file, a cluster without mapping does not read as zeros.
    let zeros_needed = target > 0 || backing.is_some();
    // 2) All mappings become durable. The header still has the old size and backing file.
    let report = sweep(view, target, into, zeros_needed, reader, moving)?;
    // 3) One sector switches size and backing file. From here on the target alone shows what the top shows.
    into.guarded("merge into", |image| {
        image.switch_to(backing.as_ref(), size)?;
        image.flush_metadata()
    })?;
    // 4) Only now mappings behind the end are unused: before 3 the old size still covered them.
    reserve::trim(into)?;
    into.punch_freed()?;
    Ok(report)
}

/// Copies everything that `layer` maps into an empty image. Both have the same backing file.
pub(super) fn fill(image: &mut Image, layer: RunLayer, moving: &Moving<'_>) -> Result<MergeReport> {
    let zeros_needed = image.header().backing.is_some();
    let own = RunLayer::active(image)?;
    let report = sweep(View::new(vec![layer, own])?, 1, image, zeros_needed, None, moving)?;
    image.guarded("write", Image::flush_metadata)?;
    Ok(report)
}

/// Refuses a merge that would change what internal snapshots show. They read through the target's backing
/// file, and in version 2 they have no size of their own.
fn refuse_for_snapshots(into: &Image, backing_changes: bool, size: u64) -> Result<()> {
    let snapshots = into.snapshots()?;
    if snapshots.is_empty() {
        return Ok(());
    }
    if backing_changes {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("its {} internal snapshots read through the layers under it", snapshots.len()),
        )
        .advise("merge into the lowest layer instead, or delete the snapshots first"));
    }
    if size != into.virtual_size() && into.header().version < 3 {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "it is a version 2 image with internal snapshots, which have no size of their own, and its size would change",
        )
        .advise("delete the snapshots first, or upgrade the image with `qemu-img amend -o compat=1.1`"));
    }
    Ok(())
}

/// Lists the L1 indexes of the target at which a merge changes something: where another layer of the run
/// shows, and at and behind the disk's end, where [`reserve::trim`] works. Reads all mappings that the merge
/// will read.
fn touched(view: &mut View, target: usize, into: &Image, moving: &Moving<'_>) -> Result<Vec<usize>> {
    let (size, reach) = (view.size(), into.geometry().l2_reach());
    // Both are bounded by the L1 limit.
    let index = |at: u64| (at / reach) as usize;
    let mut found: Vec<usize> = Vec::new();
    let mut at = 0;
    loop {
        at = view.next_defined(at, target);
        let Some(piece) = view.piece(at)? else { break };
        if (moving.cancelled)() {
            return Err(cancelled());
        }
        if !stays(&piece, target) {
            let from = found.last().map_or(0, |last| last + 1).max(index(piece.start));
            found.extend(from..=index(piece.end - 1));
        }
        at = piece.end;
    }
    let behind = found.last().map_or(0, |last| last + 1).max(index(size));
    found.extend(behind..into.active_l1()?.len());
    Ok(found)
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "it was cancelled")
        .advise("nothing that the disk shows has changed, and it can be done later")
}

/// Returns true if the target already shows this by itself, or nothing in the run does.
fn stays(piece: &Piece, target: usize) -> bool {
    match piece.content {
        Content::Unowned => true,
        Content::PastEnd => false,
        Content::Zero | Content::Data(_) | Content::Compressed { .. } => piece.layer == target,
    }
}

/// Goes through the disk once. When this returns, all mappings are durable.
fn sweep<'b>(
    view: View,
    target: usize,
    into: &mut Image,
    zeros_needed: bool,
    below: Option<&'b mut (dyn ChainReader + 'b)>,
    moving: &Moving<'_>,
) -> Result<MergeReport> {
    let (geometry, compression, file) = (into.geometry(), into.header().compression, into.shared_file());
    let mut writer = ActiveWriter::new(into, InPlace::Allowed)?;
    writer.extend_to(view.size());
    let mut sweep = Sweep {
        view,
        target,
        writer,
        file,
        geometry,
        compression,
        zeros_needed,
        below,
        moving,
        joiner: Joiner::default(),
        copier: Copier::default(),
        since_flush: 0,
        report: MergeReport::default(),
        pieces: Vec::new(),
        buffer: Vec::new(),
    };
    match sweep.run() {
        Ok(()) => {
            sweep.writer.flush()?;
            Ok(sweep.report)
        }
        Err(e) if e.kind() == ErrorKind::Cancelled => {
            sweep.drain()?;
            sweep.writer.finish()?;
            Err(e)
        }
        Err(e) => {
            // The first error is the one to report.
            let _ = sweep.writer.abandon();
            Err(e)
        }
    }
}

struct Sweep<'a, 'b, 'i> {
    view: View,
    /// The target's number in the view.
    target: usize,
    writer: ActiveWriter<'i>,
    /// The target's file.
    file: Arc<ImageFile>,
    geometry: Geometry,
    compression: Compression,
    /// True if zeros need an explicit mapping.
    zeros_needed: bool,
    below: Option<&'b mut (dyn ChainReader + 'b)>,
    moving: &'a Moving<'a>,
    joiner: Joiner,
    copier: Copier,
    since_flush: u64,
    report: MergeReport,
    /// The pieces of one cluster.
    pieces: Vec<Piece>,
    /// One cluster.
    buffer: Vec<u8>,
}

impl Sweep<'_, '_, '_> {
    fn run(&mut self) -> Result<()> {
        let size = self.geometry.cluster_bits.size();
        let mut at = 0;
        loop {
            // Skips tables of the target where no other layer has anything.
            at = at.max(self.view.next_defined(at, self.target) / size * size);
            let Some(piece) = self.view.piece(at)? else { break };
            if (self.moving.cancelled)() {
                return Err(cancelled());
            }
            at = self.step(&piece)?;
            if self.since_flush >= BATCH || self.writer.pending_bytes() >= TABLES {
                self.drain()?;
                self.writer.commit()?;
                self.since_flush = 0;
            }
        }
        self.drain()
    }

    fn stays(&self, piece: &Piece) -> bool {
        stays(piece, self.target)
    }

    fn cluster_of(&self, at: u64) -> GuestCluster {
        self.geometry.cluster_bits.guest_cluster(GuestOffset(at))
    }

    /// Handles the start of a piece, which is the start of a cluster. Returns the offset to continue at.
    fn step(&mut self, piece: &Piece) -> Result<u64> {
        let size = self.geometry.cluster_bits.size();
        let at = piece.start;
        let ends_disk = piece.end == self.view.size();
        let whole = if ends_disk { (piece.end - at).div_ceil(size) } else { (piece.end - at) / size };
        if whole > 0 && self.stays(piece) {
            return Ok(at + whole * size);
        }
        match piece.content {
            _ if whole == 0 => self.gather(at)?,
            Content::Zero | Content::PastEnd => return self.zeros(piece, whole),
            Content::Data(from) if at + size <= piece.end => {
                let count = ((piece.end - at) / size).min((STEP / size).max(1));
                self.data(at, piece.layer, from, count)?;
                return Ok(at + count * size);
            }
            Content::Compressed { .. } if self.packed(piece)? => {}
            _ => self.gather(at)?,
        }
        Ok(at + size)
    }

    /// Moves whole clusters of data that are adjacent in their layer.
    fn data(&mut self, at: u64, layer: usize, from: HostOffset, count: u64) -> Result<()> {
        let size = self.geometry.cluster_bits.size();
        let first = self.cluster_of(at);
        for n in 0..count {
            let cluster = GuestCluster(first.0 + n);
            let to = match self.writer.reusable(cluster)? {
                Some(host) => {
                    if self.writer.mapping(cluster)? != Mapping::Data(host) {
                        self.writer.replace(cluster, Mapping::Data(host))?;
                    }
                    host
                }
                None => {
                    let host = self.writer.fresh(1)?;
                    self.writer.replace(cluster, Mapping::Data(host))?;
                    host
                }
            };
            let copy = Copy { source: layer, from: from.0.saturating_add(n * size), to: to.0, length: size };
            if let Some(ready) = self.joiner.push(copy) {
                self.copy(ready)?;
            }
        }
        Ok(())
    }

    fn copy(&mut self, copy: Copy) -> Result<()> {
        let Some(layer) = self.view.layer(copy.source) else { return Ok(()) };
        let (moving, moved) = (self.moving, &mut self.report.bytes_moved);
        self.copier.copy(layer.file(), &self.file, copy, &mut |n| {
            *moved += n;
            (moving.progress)(n);
            Ok(())
        })?;
        self.since_flush += copy.length;
        Ok(())
    }

    /// Performs the deferred copies.
    fn drain(&mut self) -> Result<()> {
        match self.joiner.take() {
            Some(ready) => self.copy(ready),
            None => Ok(()),
        }
    }

    fn moved(&mut self, bytes: u64) {
        self.report.bytes_moved += bytes;
        self.since_flush += bytes;
        (self.moving.progress)(bytes);
    }

    /// Moves a whole compressed cluster without decompressing it. Returns `false` if that is impossible.
    fn packed(&mut self, piece: &Piece) -> Result<bool> {
        let Content::Compressed { extent, cluster } = piece.content else { return Ok(false) };
        let Some(layer) = self.view.layer(piece.layer) else { return Ok(false) };
        let phase = extent.offset.0 % 512;
        let fits = phase + extent.length <= self.geometry.cluster_bits.size();
        if !fits || cluster != piece.start || !layer.packs_like(self.geometry, self.compression) {
            return Ok(false);
        }
        let mut raw = vec![0; usize::try_from(extent.length).unwrap_or(0)];
        layer.file().read_at(&mut raw, extent.offset)?;
        self.writer.write_packed(self.cluster_of(cluster), &raw, phase)?;
        self.moved(extent.length);
        Ok(true)
    }

    /// Handles clusters of zeros. Returns the offset to continue at.
    fn zeros(&mut self, piece: &Piece, whole: u64) -> Result<u64> {
        let (size, reach) = (self.geometry.cluster_bits.size(), self.geometry.l2_reach());
        let at = piece.start;
        let table_end = (at / reach + 1) * reach;
        let end = (at + whole * size).min(table_end);
        let index = usize::try_from(at / reach).unwrap_or(usize::MAX);
        if !self.zeros_needed && !self.writer.has_table(index)? {
            return Ok(end);
        }
        let mut from = at;
        while from < end {
            let to = (from + size).min(self.view.size());
            let done = match self.writer.mapping(self.cluster_of(from))? {
                Mapping::Zero { .. } => true,
                Mapping::Unallocated => !self.zeros_needed,
                _ => false,
            };
            if !done {
                self.pieces.clear();
                self.pieces.push(Piece { start: from, end: to, ..*piece });
                self.place(from)?;
            }
            from += size;
        }
        Ok(end)
    }

    /// Handles one cluster of several pieces.
    fn gather(&mut self, at: u64) -> Result<()> {
        let end = (at + self.geometry.cluster_bits.size()).min(self.view.size());
        self.pieces.clear();
        let mut from = at;
        while from < end
            && let Some(piece) = self.view.piece(from)?
        {
            let to = piece.end.min(end);
            self.pieces.push(Piece { end: to, ..piece });
            from = to;
        }
        if self.pieces.iter().all(|p| self.stays(p)) {
            return Ok(());
        }
        self.place(at)
    }

    /// Makes one cluster show `pieces`, which cover it: each subcluster by itself if there are any.
    fn place(&mut self, at: u64) -> Result<()> {
        let (size, cluster) = (self.geometry.cluster_bits.size(), self.cluster_of(at));
        let parts = if self.geometry.extended_l2 { SUBCLUSTERS } else { 1 };
        let part = self.geometry.subcluster_size();
        let old = Parts::of(self.writer.mapping(cluster)?, parts);
        let own = self.writer.reusable(cluster)?;
        let mut new = Parts::default();
        // Subclusters to be written whole, and those in which only hidden bytes may be overwritten.
        let (mut rewrite, mut patch) = (0u32, 0u32);
        for n in 0..parts {
            let (bit, from) = (1u32 << n, at + u64::from(n) * part);
            let mut pieces = self.pieces.iter().filter(|p| p.start < from + part && p.end > from).peekable();
            let behind_end = pieces.peek().is_none();
            let (mut changed, mut zero) = (false, true);
            for piece in pieces {
                changed |= !self.stays(piece);
                zero &= matches!(piece.content, Content::Zero | Content::PastEnd);
            }
            if behind_end {
                if own.is_some() {
                    new.data |= old.data & bit;
                    new.zero |= old.zero & bit;
                }
            } else if !changed {
                new.data |= old.data & bit;
                new.zero |= old.zero & bit;
                if own.is_none() {
                    rewrite |= old.data & bit;
                }
            } else if zero && !self.zeros_needed {
                // A cluster without mapping reads as zeros.
            } else if zero && (self.geometry.zero_flag || self.geometry.extended_l2) {
                new.zero |= bit;
            } else {
                new.data |= bit;
                if own.is_some() && old.data & bit != 0 {
                    patch |= bit;
                } else {
                    rewrite |= bit;
                }
            }
        }
        if new.data == 0 {
            self.report.clusters_cleared += 1;
            return self.writer.replace(cluster, new.mapping(None, parts));
        }
        let host = match own {
            Some(host) => host,
            None => self.writer.fresh(1)?,
        };
        self.write_parts(at, host, part, rewrite, patch)?;
        let mapping = new.mapping(Some(host), parts);
        if own.is_none() || self.writer.mapping(cluster)? != mapping {
            self.writer.replace(cluster, mapping)?;
        }
        debug_assert!(u64::from(parts) * part == size);
        Ok(())
    }

    /// Reads what the pieces show and writes it into the cluster at `host`: subclusters of `rewrite` whole,
    /// of `patch` only the pieces that are not the target's own.
    fn write_parts(&mut self, at: u64, host: HostOffset, part: u64, rewrite: u32, patch: u32) -> Result<()> {
        let length = self.geometry.cluster_bits.bytes();
        self.buffer.clear();
        self.buffer.resize(length, 0);
        let mut ranges: Vec<(u64, u64)> = Vec::new();
        let mut add = |from: u64, to: u64| match ranges.last_mut() {
            Some((_, end)) if *end == from => *end = to,
            _ => ranges.push((from, to)),
        };
        for n in 0..(length as u64 / part) {
            let bit = 1u32 << n;
            let from = at + n * part;
            let whole = rewrite & bit != 0;
            if !whole && patch & bit == 0 {
                continue;
            }
            if whole {
                add(from, from + part);
            }
            for piece in self.pieces.iter().filter(|p| p.start < from + part && p.end > from) {
                let stays = match piece.content {
                    Content::Unowned => true,
                    Content::PastEnd => false,
                    _ => piece.layer == self.target,
                };
                if !whole && stays {
                    continue;
                }
                let (start, end) = (piece.start.max(from), piece.end.min(from + part));
                let clipped =
                    Piece { start, end, content: piece.content.advanced(start - piece.start), ..*piece };
                let into =
                    self.buffer.get_mut((start - at) as usize..(end - at) as usize).unwrap_or_default();
                match &mut self.below {
                    Some(below) => self.view.read_piece(&clipped, into, Some(&mut **below))?,
                    None => self.view.read_piece(&clipped, into, None)?,
                }
                if !whole {
                    add(start, end);
                }
            }
        }
        let mut bytes = 0;
        for (from, to) in ranges {
            let data = self.buffer.get((from - at) as usize..(to - at) as usize).unwrap_or_default();
            self.file.write_at(data, HostOffset(host.0 + (from - at)))?;
            bytes += to - from;
        }
        self.moved(bytes);
        Ok(())
    }
}

/// State of a cluster, by subclusters. A cluster without subclusters counts as one.
#[derive(Clone, Copy, Default)]
struct Parts {
    data: u32,
    zero: u32,
}

impl Parts {
    fn of(mapping: Mapping, parts: u32) -> Self {
        let all = u32::MAX >> (32 - parts);
        match mapping {
            Mapping::Unallocated => Self::default(),
            Mapping::Zero { .. } => Self { data: 0, zero: all },
            Mapping::Data(_) | Mapping::Compressed(_) => Self { data: all, zero: 0 },
            Mapping::Subclusters { allocated, zero, .. } => Self { data: allocated, zero },
        }
    }

    fn mapping(self, host: Option<HostOffset>, parts: u32) -> Mapping {
        let all = u32::MAX >> (32 - parts);
        match host {
            Some(host) if self.data == all => Mapping::Data(host),
            _ if self.data == 0 && self.zero == all => Mapping::Zero { host },
            _ if self.data == 0 && self.zero == 0 => Mapping::Unallocated,
            host => Mapping::Subclusters { host, allocated: self.data, zero: self.zero },
        }
    }
}
