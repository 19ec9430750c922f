//! Writing to the active state of an image: the basis of merging, flattening and materialising.
//!
//! Everything is done in whole clusters. [`ActiveWriter::flush`] keeps this order, also when it runs by
//! itself because much is pending:
//!
//! 1. Data, refcounts of allocated clusters, and new L2 tables become durable: one flush, one more if the
//!    refcount table got a new block, one more if it had to move.
//! 2. Then L2 entries in existing tables, and L1 entries, are written and become durable.
//! 3. Only then references to what was replaced are removed, in memory. That reaches the disk with the next
//!    flush, and with [`ActiveWriter::finish`].
//!
//! A crash at any point leaves each guest cluster with its old or its new mapping, and leaked clusters at
//! worst. There is one exception, on request only: a cluster that only this image owns is overwritten in
//! place ([`InPlace::Allowed`]). A crash may leave it half written. That is safe where another image still
//! hides it (commit into a backing file).

use std::collections::BTreeMap;

use super::bitmaps;
use super::error::{Context, Error, ErrorKind, Result};
use super::mapping::{
    COPIED, CompressedExtent, Geometry, L2Entry, Mapping, OFFSET_MASK, max_compressed_offset,
};
use super::open::Image;
use super::refcount::Change;
use super::references::clear_copied;
use super::units::{GuestCluster, HostOffset};

/// Limit of changed L2 tables in memory, beyond which the writer flushes by itself.
const MAX_PENDING_BYTES: usize = 64 << 20;

/// Permission to overwrite clusters that only this image owns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum InPlace {
    /// Allowed: the guest does not see this image's content there until the whole operation is done.
    Allowed,
    /// Every write goes to a fresh cluster.
    Never,
}

/// An L2 table in memory.
struct Table {
    bytes: Vec<u8>,
    /// Offset to which it will be written.
    offset: HostOffset,
    /// True if it is not in the file yet. It may be written before the clusters that it refers to are
    /// durable, because nothing refers to it.
    fresh: bool,
    dirty: bool,
}

/// Writes to an image's active state, for as long as it borrows the image.
pub struct ActiveWriter<'a> {
    image: &'a mut Image,
    geometry: Geometry,
    in_place: InPlace,
    tables: BTreeMap<usize, Table>,
    /// L1 entries to write, by index.
    l1: BTreeMap<usize, u64>,
    /// Clusters that lose a reference once the new mappings are durable.
    dropped: Vec<u64>,
    /// References added since the last flush, for [`ActiveWriter::abandon`].
    added: Vec<u64>,
    /// Number of guest clusters that may be mapped: those of the disk, or of its future size.
    end: u64,
    /// Offset at which the next compressed cluster may start, and the end of the space allocated for it.
    packed: Option<(u64, u64)>,
    failed: bool,
}

impl std::fmt::Debug for ActiveWriter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ActiveWriter")
            .field("image", &self.image.path())
            .field("tables", &self.tables.len())
            .finish()
    }
}

impl<'a> ActiveWriter<'a> {
    /// Begins to write. Marks persistent bitmaps as in use, because their record of the guest's data becomes
    /// wrong.
    ///
    /// # Errors
    /// [`Image`]'s refusals of writes; [`ErrorKind::Unsupported`] for encrypted images and external data
    /// files.
    pub fn new(image: &'a mut Image, in_place: InPlace) -> Result<Self> {
        image.require_plain_data()?;
        image.guarded("write to", |image| {
            image.active_l1()?;
            if bitmaps::mark_in_use(image)? {
                image.file.flush()?;
            }
            Ok(())
        })?;
        let geometry = image.geometry();
        let end = geometry.cluster_bits.clusters_for(image.virtual_size());
        Ok(Self {
            image,
            geometry,
            in_place,
            tables: BTreeMap::new(),
            l1: BTreeMap::new(),
            dropped: Vec::new(),
            added: Vec::new(),
            end,
            packed: None,
            failed: false,
        })
    }

    /// Allows mappings up to the future end of the disk. The L1 table must have room for them.
    pub(crate) fn extend_to(&mut self, virtual_size: u64) {
        let room = u64::from(self.image.header.l1_entries).saturating_mul(self.geometry.l2_entries());
        self.end = self.geometry.cluster_bits.clusters_for(virtual_size).min(room).max(self.end);
    }

    /// The image. It does not contain the pending changes yet.
    pub fn image(&self) -> &Image {
        self.image
    }

    /// The mapping of a guest cluster, pending changes included.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] past the disk's end, [`ErrorKind::Corrupt`], and the system's.
    pub fn mapping(&mut self, cluster: GuestCluster) -> Result<Mapping> {
        self.entry(cluster)?.mapping(self.geometry)
    }

    pub(crate) fn entry(&mut self, cluster: GuestCluster) -> Result<L2Entry> {
        let (index, slot) = self.place(cluster)?;
        if let Some(table) = self.tables.get(&index) {
            return Ok(L2Entry::read(self.geometry, &table.bytes, slot));
        }
        match self.image.active_l1()?.l2_offset(index) {
            None => Ok(L2Entry::default()),
            Some(offset) => {
                self.load(index, offset)?;
                Ok(self
                    .tables
                    .get(&index)
                    .map_or(L2Entry::default(), |t| L2Entry::read(self.geometry, &t.bytes, slot)))
            }
        }
    }

    /// L1 index and L2 index of a guest cluster.
    fn place(&self, cluster: GuestCluster) -> Result<(usize, usize)> {
        let end = self.end;
        if cluster.0 >= end {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("guest cluster {cluster} is past the disk's end at {end:#x}"),
            )
            .on("write to", self.image.path()));
        }
        let entries = self.geometry.l2_entries();
        // The L1 table has 4194304 entries at most, so both fit.
        Ok(((cluster.0 / entries) as usize, (cluster.0 % entries) as usize))
    }

    fn load(&mut self, index: usize, offset: HostOffset) -> Result<()> {
        let mut bytes = Vec::new();
        self.image.read_l2(offset, &mut bytes)?;
        self.tables.insert(index, Table { bytes, offset, fresh: false, dirty: false });
        Ok(())
    }

    /// Makes the table of an L1 entry ready for changes: creates it if there is none, copies it if it is
    /// shared.
    fn own_table(&mut self, index: usize) -> Result<()> {
        if self.tables.get(&index).is_some_and(|t| t.dirty) {
            return Ok(());
        }
        if self.tables.len() * self.geometry.cluster_bits.bytes() > MAX_PENDING_BYTES {
            self.flush()?;
            self.tables.clear();
        }
        let l1 = self.image.active_l1()?;
        let (old, mut copied) = (l1.l2_offset(index), l1.is_copied(index));
        if let (Some(offset), false) = (old, copied) {
            // After a crash bit 63 may be clear although it could be set. The refcount decides.
            let cluster = self.geometry.cluster_bits.host_cluster(offset);
            let (file, refcounts, _) = self.image.parts()?;
            if refcounts.get(file, cluster)? == 1 {
                copied = true;
                self.l1.insert(index, offset.0 | COPIED);
            }
        }
        match old {
            Some(offset) if copied => {
                if !self.tables.contains_key(&index) {
                    self.load(index, offset)?;
                }
                if let Some(t) = self.tables.get_mut(&index) {
                    t.dirty = true;
                }
            }
            _ => {
                if let Some(offset) = old
                    && !self.tables.contains_key(&index)
                {
                    self.load(index, offset)?;
                }
                let size = self.geometry.cluster_bits.bytes();
                let mut bytes = self.tables.remove(&index).map_or_else(|| vec![0; size], |t| t.bytes);
                // Data below a shared table has two references or more.
                clear_copied(self.geometry, &mut bytes);
                let offset = self.fresh(1)?;
                self.tables.insert(index, Table { bytes, offset, fresh: true, dirty: true });
                self.l1.insert(index, offset.0 | COPIED);
                if let Some(old) = old {
                    self.dropped.push(self.geometry.cluster_bits.host_cluster(old).0);
                }
            }
        }
        Ok(())
    }

    /// Replaces the mapping of a guest cluster. Its old clusters lose their reference after the next flush.
    pub(crate) fn replace(&mut self, cluster: GuestCluster, new: Mapping) -> Result<()> {
        let (index, slot) = self.place(cluster)?;
        self.own_table(index)?;
        let geometry = self.geometry;
        let Some(table) = self.tables.get_mut(&index) else { return Ok(()) };
        let old = L2Entry::read(geometry, &table.bytes, slot);
        let kept = matches!(
            (host_of(old.mapping(geometry)?), host_of(new)),
            (Some(a), Some(b)) if a == b
        );
        L2Entry::new(geometry, new, true).write(geometry, &mut table.bytes, slot);
        if !kept {
            drop_references(geometry, old, &mut self.dropped)?;
        }
        Ok(())
    }

    /// Allocates consecutive free clusters.
    pub(crate) fn fresh(&mut self, count: u64) -> Result<HostOffset> {
        let at = self.image.allocate(count)?;
        let first = self.geometry.cluster_bits.host_cluster(at).0;
        self.added.extend(first..first + count);
        Ok(at)
    }

    /// Returns the place where a whole cluster may be overwritten, without a fresh one.
    pub(crate) fn reusable(&mut self, cluster: GuestCluster) -> Result<Option<HostOffset>> {
        if self.in_place == InPlace::Never {
            return Ok(None);
        }
        let (index, _) = self.place(cluster)?;
        // A shared table does not show which image owns the data.
        let owned = self.l1.contains_key(&index) || self.image.active_l1()?.is_copied(index);
        let entry = self.entry(cluster)?;
        if !owned || !entry.is_copied() {
            return Ok(None);
        }
        Ok(host_of(entry.mapping(self.geometry)?))
    }

    /// Writes whole clusters of data, `data.len() / cluster size` of them from `first`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for a part of a cluster or past the disk's end; the system's. After an
    /// error the writer refuses to continue.
    pub fn write_data(&mut self, first: GuestCluster, data: &[u8]) -> Result<()> {
        let size = self.geometry.cluster_bits.bytes();
        if !data.len().is_multiple_of(size) {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{} bytes are not whole clusters of {size}", data.len()),
            )
            .on("write to", self.image.path()));
        }
        self.guarded(|w| {
            let mut at = 0;
            for (place, count) in w.place_data(first, (data.len() / size) as u64)? {
                let bytes = count as usize * size;
                w.image.file.write_at(data.get(at..at + bytes).unwrap_or_default(), place)?;
                at += bytes;
            }
            Ok(())
        })
    }

    /// Maps whole clusters for data that the caller writes into the file itself (by reflink or
    /// `copy_file_range`) before the next [`ActiveWriter::flush`]. Returns the places, in order, each with
    /// its number of clusters.
    ///
    /// # Errors
    /// As [`ActiveWriter::write_data`].
    pub fn allocate_data(&mut self, first: GuestCluster, count: u64) -> Result<Vec<(HostOffset, u64)>> {
        self.guarded(|w| w.place_data(first, count))
    }

    fn place_data(&mut self, first: GuestCluster, count: u64) -> Result<Vec<(HostOffset, u64)>> {
        let size = self.geometry.cluster_bits.size();
        let mut places: Vec<(HostOffset, u64)> = Vec::new();
        let mut n = 0;
        while n < count {
            let cluster = GuestCluster(first.0.saturating_add(n));
            let (at, run) = match self.reusable(cluster)? {
                Some(host) => (host, 1),
                None => {
                    let mut run = 1;
                    while n + run < count && self.reusable(GuestCluster(cluster.0 + run))?.is_none() {
                        run += 1;
                    }
                    (self.fresh(run)?, run)
                }
            };
            for k in 0..run {
                let host = HostOffset(at.0 + k * size);
                self.replace(GuestCluster(cluster.0 + k), Mapping::Data(host))?;
            }
            match places.last_mut() {
                Some((last, clusters)) if last.0 + *clusters * size == at.0 => *clusters += run,
                _ => places.push((at, run)),
            }
            n += run;
        }
        Ok(places)
    }

    /// Writes one cluster that the caller has compressed by the image's own method.
    ///
    /// # Errors
    /// As [`ActiveWriter::write_data`]; [`ErrorKind::InvalidInput`] for no bytes, or for more than a cluster.
    pub fn write_compressed(&mut self, cluster: GuestCluster, compressed: &[u8]) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let (size, length) = (bits.size(), compressed.len() as u64);
        if length == 0 || length >= size {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                format!("a compressed cluster of {length} bytes does not fit in clusters of {size}"),
            )
            .on("write to", self.image.path()));
        }
        self.pack(cluster, compressed, None)
    }

    /// Writes one cluster that another image has compressed. `raw` contains its bytes up to the end of a
    /// sector, and `phase` is its start within its first sector. It gets the same phase, so that its length
    /// in sectors stays the same.
    pub(crate) fn write_packed(&mut self, cluster: GuestCluster, raw: &[u8], phase: u64) -> Result<()> {
        self.pack(cluster, raw, Some(phase))
    }

    fn pack(&mut self, cluster: GuestCluster, compressed: &[u8], phase: Option<u64>) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let (size, length) = (bits.size(), compressed.len() as u64);
        self.guarded(|w| {
            let placed = |at: u64| phase.map_or(at, |phase| at.next_multiple_of(512) + phase);
            let packed = w.packed;
            let at = match packed {
                Some((at, end)) if placed(at) + length <= end && w.share(placed(at))? => placed(at),
                _ => {
                    let at = w.fresh(1)?.0;
                    w.packed = Some((at, at + size));
                    placed(at)
                }
            };
            if at + length > max_compressed_offset(bits) {
                return Err(Error::new(
                    ErrorKind::LimitExceeded,
                    format!("a compressed cluster cannot lie at offset {at:#x} of an image with clusters of {size}"),
                ));
            }
            w.image.file.write_at(compressed, HostOffset(at))?;
            if let Some((next, _)) = &mut w.packed {
                *next = at + length;
            }
            w.replace(cluster, Mapping::Compressed(CompressedExtent { offset: HostOffset(at), length }))
        })
    }

    /// Adds a reference to the cluster that contains `at`. Returns `false` if its refcount is at the maximum.
    fn share(&mut self, at: u64) -> Result<bool> {
        let cluster = self.geometry.cluster_bits.host_cluster(HostOffset(at));
        let (file, refcounts, _) = self.image.parts()?;
        if refcounts.get(file, cluster)? >= refcounts.max() {
            return Ok(false);
        }
        refcounts.change(file, &[cluster.0], Change::Up(1), |_, _| {})?;
        self.added.push(cluster.0);
        Ok(true)
    }

    /// Makes guest clusters read as zeros. Version 2 has no such mapping, so there zeros are written.
    ///
    /// # Errors
    /// As [`ActiveWriter::write_data`].
    pub fn write_zeros(&mut self, first: GuestCluster, count: u64) -> Result<()> {
        self.guarded(|w| {
            let version_2 = !w.geometry.zero_flag && !w.geometry.extended_l2;
            let has_backing = w.image.header.backing.is_some();
            let zeros =
                if version_2 && has_backing { vec![0; w.geometry.cluster_bits.bytes()] } else { Vec::new() };
            for n in 0..count {
                let cluster = GuestCluster(first.0.saturating_add(n));
                if !version_2 {
                    w.replace(cluster, Mapping::Zero { host: None })?;
                } else if !has_backing {
                    w.unmap(cluster)?;
                } else {
                    for (place, _) in w.place_data(cluster, 1)? {
                        w.image.file.write_at(&zeros, place)?;
                    }
                }
            }
            Ok(())
        })
    }

    /// Removes the mappings of guest clusters: they then read from the backing file, or as zeros without one.
    ///
    /// # Errors
    /// As [`ActiveWriter::write_data`].
    pub fn discard(&mut self, first: GuestCluster, count: u64) -> Result<()> {
        self.guarded(|w| (0..count).try_for_each(|n| w.unmap(GuestCluster(first.0.saturating_add(n)))))
    }

    fn unmap(&mut self, cluster: GuestCluster) -> Result<()> {
        // A cluster without mapping needs no table.
        if self.entry(cluster)? == L2Entry::default() {
            return Ok(());
        }
        self.replace(cluster, Mapping::Unallocated)
    }

    /// Maps one cluster of an extended-L2 image by subclusters. Those in `allocated` have the data of the
    /// same place in `data` (one whole cluster), those in `zero` read as zeros, the others from the backing
    /// file.
    ///
    /// # Errors
    /// As [`ActiveWriter::write_data`]; [`ErrorKind::InvalidInput`] without extended L2, or for a subcluster
    /// in both.
    pub fn write_subclusters(
        &mut self,
        cluster: GuestCluster,
        data: &[u8],
        allocated: u32,
        zero: u32,
    ) -> Result<()> {
        let size = self.geometry.cluster_bits.bytes();
        if !self.geometry.extended_l2 || allocated & zero != 0 || data.len() != size {
            return Err(Error::new(
                ErrorKind::InvalidInput,
                "subclusters are for extended L2, one whole cluster, and each is data or zero",
            )
            .on("write to", self.image.path()));
        }
        self.guarded(|w| {
            let host = if allocated == 0 { None } else { Some(w.fresh(1)?) };
            if let Some(host) = host {
                w.image.file.write_at(data, host)?;
            }
            w.replace(cluster, Mapping::Subclusters { host, allocated, zero })
        })
    }

    /// Makes everything that was written durable, in the module's order.
    ///
    /// # Errors
    /// The system's.
    pub fn flush(&mut self) -> Result<()> {
        self.guarded(|w| {
            // 1) New tables first: nothing refers to them yet. `flush_metadata` makes them durable, with all
            //    data and refcounts.
            for table in w.tables.values().filter(|t| t.fresh && t.dirty) {
                w.image.file.write_at(&table.bytes, table.offset)?;
            }
            w.image.flush_metadata()?;
            // 2) Entries that make the new clusters visible. A crash before the flush below leaves each one
            //    old or new.
            let mut visible = false;
            for table in w.tables.values_mut().filter(|t| t.dirty) {
                if !table.fresh {
                    w.image.file.write_at(&table.bytes, table.offset)?;
                    visible = true;
                }
                (table.fresh, table.dirty) = (false, false);
            }
            if !w.l1.is_empty() {
                visible = true;
                w.write_l1()?;
            }
            if visible {
                w.image.file.flush()?;
            }
            // 3) The old mappings are durably gone, so their clusters may be freed. A crash here leaks them.
            w.packed = None;
            w.added.clear();
            let mut dropped = std::mem::take(&mut w.dropped);
            if !dropped.is_empty() {
                dropped.sort_unstable();
                let (file, refcounts, _) = w.image.parts()?;
                refcounts.change(file, &dropped, Change::Down(1), |_, _| {})?;
                w.image.protected = None;
            }
            Ok(())
        })
    }

    /// Writes the changed L1 entries in place, neighbours together.
    fn write_l1(&mut self) -> Result<()> {
        let changes = std::mem::take(&mut self.l1);
        let at = self.image.header.l1_offset;
        let mut l1 = self.image.l1.take().unwrap_or_default();
        for (index, entry) in &changes {
            if let Some(e) = l1.entries.get_mut(*index) {
                *e = *entry;
            }
        }
        let mut run: Option<(usize, usize)> = None;
        let write = |(from, to): (usize, usize)| {
            let bytes: Vec<u8> =
                l1.entries.get(from..to).unwrap_or_default().iter().flat_map(|e| e.to_be_bytes()).collect();
            self.image.file.write_at(&bytes, HostOffset(at.0 + from as u64 * 8))
        };
        for index in changes.keys().copied() {
            run = match run {
                Some((from, to)) if to == index => Some((from, index + 1)),
                Some(done) => {
                    write(done)?;
                    Some((index, index + 1))
                }
                None => Some((index, index + 1)),
            };
        }
        if let Some(done) = run {
            write(done)?;
        }
        self.image.l1 = std::sync::OnceLock::from(l1);
        Ok(())
    }

    /// Makes everything durable, including the release of replaced clusters.
    ///
    /// # Errors
    /// The system's.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        self.guarded(|w| w.image.flush_metadata())
    }

    /// Returns true if an L1 entry has an L2 table, pending ones included.
    pub(crate) fn has_table(&self, index: usize) -> Result<bool> {
        Ok(self.tables.contains_key(&index) || self.image.active_l1()?.l2_offset(index).is_some())
    }

    /// Bytes of L2 tables in memory. At 64 MiB the writer flushes by itself. A caller that fills clusters
    /// later must call [`ActiveWriter::commit`] before that.
    pub(crate) fn pending_bytes(&self) -> usize {
        self.tables.len() * self.geometry.cluster_bits.bytes()
    }

    /// Like [`ActiveWriter::flush`], and drops the tables.
    pub(crate) fn commit(&mut self) -> Result<()> {
        self.flush()?;
        self.tables.clear();
        Ok(())
    }

    /// Discards everything since the last flush. No mapping of it reaches the file, its clusters are free
    /// again, and their space is returned. Changes that were flushed before stay.
    ///
    /// # Errors
    /// The system's; the image then has leaked clusters at worst.
    pub(crate) fn abandon(mut self) -> Result<()> {
        if self.failed {
            return Ok(());
        }
        self.tables.clear();
        self.l1.clear();
        self.dropped.clear();
        let added = std::mem::take(&mut self.added);
        self.guarded(|w| {
            let (file, refcounts, header) = w.image.parts()?;
            let bits = header.cluster_bits;
            let mut free: Vec<u64> = Vec::new();
            refcounts.change(file, &added, Change::Down(1), |n, left| {
                if left == 0 {
                    free.extend(added.get(n));
                }
            })?;
            free.sort_unstable();
            for run in free.chunk_by(|a, b| a + 1 == *b) {
                if let Some(first) = run.first() {
                    file.punch(HostOffset(first << bits.bits()), (run.len() as u64) << bits.bits());
                }
            }
            w.image.protected = None;
            w.image.flush_metadata()
        })
    }

    fn guarded<T>(&mut self, run: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        if self.failed {
            return Err(Error::new(ErrorKind::Io, "an earlier write to the image failed")
                .advise("open it again: the file itself is as the write order promises")
                .on("write to", self.image.path()));
        }
        let path = self.image.path().to_owned();
        let done = run(self).context("write to", &path);
        if done.is_err() {
            self.failed = true;
            self.image.mark_failed();
        }
        done
    }
}

/// The host cluster of a mapping that is not compressed.
pub(crate) fn host_of(mapping: Mapping) -> Option<HostOffset> {
    match mapping {
        Mapping::Unallocated | Mapping::Compressed(_) => None,
        Mapping::Data(host) => Some(host),
        Mapping::Zero { host } | Mapping::Subclusters { host, .. } => host,
    }
}

/// Adds the host clusters that an entry refers to.
pub(crate) fn drop_references(geometry: Geometry, entry: L2Entry, into: &mut Vec<u64>) -> Result<()> {
    let bits = geometry.cluster_bits;
    match entry.mapping(geometry)? {
        Mapping::Compressed(extent) => {
            let last = HostOffset(extent.offset.0 + extent.length - 1);
            into.extend(bits.host_cluster(extent.offset).0..=bits.host_cluster(last).0);
        }
        other => into.extend(host_of(other).map(|h| bits.host_cluster(h).0)),
    }
    Ok(())
}

const _: () = assert!(COPIED & OFFSET_MASK == 0);
