//! Sizes of internal snapshots: what a delete of a set of them frees, and what each refers to.
//!
//! **A delete of a set** frees a cluster if all references to it come from the set. The refcount of an L2
//! table counts the L1 tables that refer to it. A table to which others refer too frees nothing below it,
//! because its references stay. So only the tables are read that the set alone has: for a snapshot that
//! equals the current state, none. In those, the references to each cluster are counted and compared with its
//! refcount. A compressed cluster refers to every host cluster that it touches.
//!
//! Counts are exact as far as the image's refcounts are. A cluster with more references than its refcount is
//! reported as damage. Nothing is written, and memory is bounded by named constants.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use super::error::{Context, Error, ErrorKind, Result};
use super::mapping::Geometry;
use super::open::Image;
use super::refcount::{FILE_BLOCK, Refcounts};
use super::references::References;
use super::snapshot_table::{self, Snapshot};
use super::tables::{self, L1Table};
use super::units::{ClusterIndex, HostOffset};

/// Most L2 tables that are distinguished: those of 2 PiB in clusters of 64 KiB.
const MAX_TABLES: usize = 4 << 20;
/// Clusters in one chunk of counters.
const CHUNK: u64 = 4096;
/// Most chunks of counters, of 16 KiB each. Together they count 4 TiB in clusters of 64 KiB.
const MAX_CHUNKS: usize = 16 << 10;

/// Bytes that a delete of internal snapshots frees.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct Freed {
    /// Clusters of the image that become free for its next writes.
    pub inside: u64,
    /// Of these, what the file system gets back if freed clusters are punched.
    pub given_back: u64,
}

/// Reads the sizes of the internal snapshots of one image. Refcounts are read once for all of them.
pub struct Sizes<'a> {
    image: &'a Image,
    refcounts: Refcounts,
    /// Clusters below each L2 table that was looked at.
    below: HashMap<u64, u32>,
}

impl Image {
    /// Begins to read sizes.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for an invalid refcount table; the system's.
    pub fn sizes(&self) -> Result<Sizes<'_>> {
        let mut refcounts = Refcounts::load(&self.file, &self.header).context("read", self.path())?;
        refcounts.read_only();
        Ok(Sizes { image: self, refcounts, below: HashMap::new() })
    }
}

impl std::fmt::Debug for Sizes<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sizes").field("image", &self.image).finish()
    }
}

impl Sizes<'_> {
    /// Returns the bytes that a delete of exactly these snapshots frees, all of them at once. With `leaves`,
    /// the active state is given up too, for that of another snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::SnapshotNotFound`]; [`ErrorKind::Corrupt`] for damaged tables, and where the set has more
    /// references to a cluster than its refcount says; [`ErrorKind::LimitExceeded`]; the system's.
    pub fn freed_by_deleting(&mut self, names: &[&str], leaves: bool) -> Result<Freed> {
        let path = self.image.path();
        let doomed = self.image.doomed(names);
        doomed.and_then(|doomed| self.freed(&doomed, leaves)).context("estimate a delete in", path)
    }

    /// Returns the bytes that a snapshot refers to in this image: its data, its VM state and its tables. A
    /// cluster with compressed data counts once for each table that refers to it.
    ///
    /// # Errors
    /// As [`Sizes::freed_by_deleting`].
    pub fn referenced(&mut self, name: &str) -> Result<u64> {
        let path = self.image.path();
        self.image.require_snapshot(name).and_then(|found| self.of_l1(found)).context("measure", path)
    }

    /// Returns the bytes that a new snapshot's tables add to the file on its file system: its L1 table, and a
    /// snapshot table that is not smaller than the current one.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; the system's.
    pub fn room_of_new_tables(&mut self) -> Result<u64> {
        let image = self.image;
        let bits = image.header.cluster_bits;
        let mut at = 0;
        let mut missing = 0u64;
        for bytes in [u64::from(image.header.l1_entries) * 8, image.snapshot_table()?.1.max(1) as u64] {
            let clusters = bits.clusters_for(bytes);
            let first = self.refcounts.first_free_run(&image.file, at, clusters)?;
            at = first.saturating_add(clusters);
            let from = first << bits.bits();
            let range =
                from / FILE_BLOCK * FILE_BLOCK..from.saturating_add(bytes).next_multiple_of(FILE_BLOCK);
            let Some(has) = image.file.allocated_in(std::slice::from_ref(&range))? else { return Ok(0) };
            missing = missing.saturating_add((range.end - range.start).saturating_sub(has));
        }
        Ok(missing)
    }

    fn of_l1(&mut self, snapshot: &Snapshot) -> Result<u64> {
        let (image, geometry) = (self.image, self.image.geometry());
        let bits = geometry.cluster_bits;
        let l1 = image.snapshot_l1(snapshot)?;
        let offsets: Vec<u64> = (0..l1.len()).filter_map(|n| l1.l2_offset(n)).map(|o| o.0).collect();
        let mut unknown: Vec<u64> =
            offsets.iter().copied().filter(|offset| !self.below.contains_key(offset)).collect();
        unknown.sort_unstable();
        unknown.dedup();
        if self.below.len().saturating_add(unknown.len()) > MAX_TABLES {
            return Err(too_many_tables());
        }
        let (mut references, below) = (References::default(), &mut self.below);
        tables::visit(&image.file, geometry, &unknown, |n, bytes| {
            references.fill(geometry, bytes, None)?;
            references.clusters.sort_unstable();
            references.clusters.dedup();
            let count = u32::try_from(references.clusters.len()).unwrap_or(u32::MAX);
            below.insert(unknown.get(n).copied().unwrap_or(0), count);
            Ok(false)
        })?;
        let tables = offsets.iter().map(|offset| 1 + u64::from(self.below.get(offset).copied().unwrap_or(0)));
        let clusters =
            tables.fold(bits.clusters_for(u64::from(snapshot.l1_entries) * 8), u64::saturating_add);
        Ok(clusters.saturating_mul(bits.size()))
    }

    fn freed(&mut self, doomed: &[Snapshot], leaves: bool) -> Result<Freed> {
        if doomed.is_empty() && !leaves {
            return Ok(Freed::default());
        }
        let (image, geometry) = (self.image, self.image.geometry());
        let bits = geometry.cluster_bits;
        // The new snapshot table is written first, so it is in none of the clusters that become free.
        let (old, old_bytes) = image.snapshot_table()?;
        let left: Vec<Snapshot> = old.iter().filter(|s| !doomed.contains(s)).cloned().collect();
        let new_bytes = if doomed.is_empty() { 0 } else { snapshot_table::encode(&left)?.len() as u64 };
        let new_clusters = bits.clusters_for(new_bytes);
        let new_table = match new_clusters {
            0 => 0..0,
            clusters => {
                let first = self.refcounts.first_free_run(&image.file, 0, clusters)? << bits.bits();
                first..first.saturating_add(new_bytes)
            }
        };
        let own = self.own_tables(doomed, leaves)?;
        let mut counters = Counters::default();
        let mut add = |offset: HostOffset, bytes: u64| -> Result<()> {
            let first = bits.host_cluster(offset).0;
            (first..first.saturating_add(bits.clusters_for(bytes))).try_for_each(|c| counters.add(c, 1))
        };
        if !doomed.is_empty() {
            add(image.header.snapshots_offset, *old_bytes as u64)?;
        }
        for s in doomed {
            add(s.l1_offset, u64::from(s.l1_entries) * 8)?;
        }
        let mut references = References::default();
        let offsets: Vec<u64> = own.iter().map(|(offset, _)| *offset).collect();
        tables::visit(&image.file, geometry, &offsets, |n, bytes| {
            let Some((offset, times)) = own.get(n).copied() else { return Ok(false) };
            references.fill(geometry, bytes, None)?;
            references.clusters.push(bits.host_cluster(HostOffset(offset)).0);
            references.clusters.iter().try_for_each(|cluster| counters.add(*cluster, times))?;
            Ok(false)
        })?;
        let runs = self.whole(counters)?;
        let clusters: u64 = runs.iter().map(|run| run.end - run.start).sum();
        let inside = clusters.saturating_sub(new_clusters).saturating_mul(bits.size());
        Ok(Freed { inside, given_back: self.given_back(&runs, new_table, geometry)? })
    }

    /// Lists the L2 tables to which only these snapshots refer, in the order of the file, with the number of
    /// references.
    fn own_tables(&mut self, doomed: &[Snapshot], leaves: bool) -> Result<Vec<(u64, u64)>> {
        let (image, bits) = (self.image, self.image.header.cluster_bits);
        let mut tables: HashMap<u64, u64> = HashMap::new();
        let mut add = |l1: &L1Table| -> Result<()> {
            for offset in (0..l1.len()).filter_map(|n| l1.l2_offset(n)) {
                *tables.entry(offset.0).or_default() += 1;
            }
            if tables.len() > MAX_TABLES { Err(too_many_tables()) } else { Ok(()) }
        };
        for s in doomed {
            add(&image.snapshot_l1(s)?)?;
        }
        // Its L1 table is replaced by another one of its size.
        if leaves {
            add(image.active_l1()?)?;
        }
        let mut all: Vec<(u64, u64)> = tables.into_iter().collect();
        all.sort_unstable();
        let mut own = Vec::new();
        for (offset, times) in all {
            let cluster = bits.host_cluster(HostOffset(offset));
            let count = self.refcounts.get(&image.file, cluster)?;
            if count < times {
                return Err(too_few(cluster.0, count, times));
            }
            if count == times {
                own.push((offset, times));
            }
        }
        Ok(own)
    }

    /// Returns the runs of clusters whose references are all counted.
    fn whole(&mut self, counters: Counters) -> Result<Vec<Range<u64>>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (chunk, counts) in counters.chunks {
            let counted = counts.iter().enumerate().filter(|(_, count)| **count > 0);
            for (n, count) in counted {
                let (cluster, counted) =
                    (chunk.saturating_mul(CHUNK).saturating_add(n as u64), u64::from(*count));
                let count = self.refcounts.get(&self.image.file, ClusterIndex(cluster))?;
                if count < counted {
                    return Err(too_few(cluster, count, counted));
                }
                if count > counted {
                    continue;
                }
                match runs.last_mut() {
                    Some(last) if last.end == cluster => last.end += 1,
                    _ => runs.push(cluster..cluster.saturating_add(1)),
                }
            }
        }
        Ok(runs)
    }

    /// Returns the bytes that the file system gets back from these clusters, which become free.
    fn given_back(&mut self, runs: &[Range<u64>], new_table: Range<u64>, geometry: Geometry) -> Result<u64> {
        let (bits, length) = (geometry.cluster_bits.bits(), self.image.file.len()?);
        let mut widened: Vec<Range<u64>> = Vec::with_capacity(runs.len());
        let taken = new_table.start >> bits..new_table.end.div_ceil(geometry.cluster_bits.size());
        for (number, run) in runs.iter().enumerate() {
            // A block has 8 clusters at most, so other runs in it are not far.
            let near = runs.get(number.saturating_sub(8)..(number + 8).min(runs.len())).unwrap_or_default();
            // Free afterwards, or in use afterwards, whatever its count says now.
            let known = |cluster: u64| {
                let becomes = near.iter().any(|run| run.contains(&cluster));
                if taken.contains(&cluster) { Some(false) } else { becomes.then_some(true) }
            };
            let run = self.refcounts.widened(&self.image.file, run.clone(), known)?;
            match widened.last_mut() {
                Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
                _ => widened.push(run),
            }
        }
        // A hole covers whole blocks; the last one of the file may be partial.
        let whole_blocks = |run: &Range<u64>| {
            let (from, to) = (run.start << bits, run.end << bits);
            let end =
                if to >= length { to.next_multiple_of(FILE_BLOCK) } else { to / FILE_BLOCK * FILE_BLOCK };
            from.next_multiple_of(FILE_BLOCK)..end
        };
        let freed: Vec<_> = widened.iter().map(whole_blocks).filter(|run| !run.is_empty()).collect();
        let Some(freed) = self.image.file.allocated_in(&freed)? else { return Ok(0) };
        // The new snapshot table adds blocks where the file has none yet.
        let table = new_table.start..new_table.end.next_multiple_of(FILE_BLOCK);
        let had = self.image.file.allocated_in(std::slice::from_ref(&table))?.unwrap_or(0);
        Ok(freed.saturating_sub((table.end - table.start).saturating_sub(had)))
    }
}

fn too_many_tables() -> Error {
    Error::new(ErrorKind::LimitExceeded, format!("the snapshots have more than {MAX_TABLES} L2 tables"))
        .advise("ask for fewer snapshots at once, or convert the image to larger clusters")
}

fn too_few(cluster: u64, count: u64, counted: u64) -> Error {
    Error::corrupt(format!(
        "cluster {cluster:#x} has a refcount of {count}, and the snapshots alone have {counted} references to it"
    ))
    .advise("the sizes cannot be known: run `domsnap check`, and repair a copy with `qemu-img check -r all`")
}

/// References to clusters, counted.
#[derive(Default)]
struct Counters {
    chunks: BTreeMap<u64, Box<[u32; CHUNK as usize]>>,
}

impl Counters {
    fn add(&mut self, cluster: u64, times: u64) -> Result<()> {
        let number = cluster / CHUNK;
        if self.chunks.len() >= MAX_CHUNKS && !self.chunks.contains_key(&number) {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!("the snapshots' clusters are in more than {MAX_CHUNKS} places of the file"),
            )
            .advise("ask for fewer snapshots at once, or convert the image to larger clusters"));
        }
        let chunk = self.chunks.entry(number).or_insert_with(|| Box::new([0; CHUNK as usize]));
        if let Some(count) = chunk.get_mut((cluster % CHUNK) as usize) {
            *count = count.saturating_add(u32::try_from(times).unwrap_or(u32::MAX));
        }
        Ok(())
    }
}
