//! The engine's own consistency check, and the repair of what a crash may leave.
//!
//! The check counts all references in the tables and compares them with the stored refcounts. A stored
//! refcount that is too high is a leak: it costs space and nothing else. One that is too low, or a COPIED bit
//! over a cluster with several references, is an error: the next write could destroy what a snapshot needs. A
//! COPIED bit that is clear although it could be set only costs a copy.

use std::cell::Cell;
use std::collections::HashMap;

use super::bitmaps;
use super::error::{Context, Error, ErrorKind, Result, shown};
use super::header::INCOMPATIBLE_DIRTY;
use super::mapping::{COMPRESSED, COPIED, L2Entry, OFFSET_MASK};
use super::open::Image;
use super::refcount::Refcounts;
use super::references::{References, set_copied};
use super::tables::{self, L1Table};
use super::units::{ClusterIndex, HostOffset};

/// Findings that are reported one by one. All are counted.
const MAX_FINDINGS: usize = 100;
/// Clusters of one chunk of the count.
const CHUNK: u64 = 4096;

/// One inconsistency.
#[derive(Clone, PartialEq, Eq, Debug)]
#[non_exhaustive]
pub struct Finding {
    /// Description, in plain text.
    pub what: String,
}

/// Result of a check.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct CheckReport {
    /// The first hundred errors.
    pub findings: Vec<Finding>,
    /// Errors: a write to the image may destroy data.
    pub errors: u64,
    /// Clusters whose refcount is too high.
    pub leaked_clusters: u64,
    /// COPIED bits that are clear although they could be set.
    pub copied_clear: u64,
    /// Clusters with at least one reference.
    pub used_clusters: u64,
}

impl CheckReport {
    /// Returns true if there is no error. [`Image::repair`] corrects everything else without touching data.
    pub fn is_sound(&self) -> bool {
        self.errors == 0
    }

    /// Returns true if nothing was found.
    pub fn is_clean(&self) -> bool {
        self.errors == 0 && self.leaked_clusters == 0 && self.copied_clear == 0
    }

    fn error(&mut self, what: String) {
        self.errors += 1;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding { what });
        }
    }
}

/// References by cluster. Memory use follows the clusters that are referred to, not the size that the image
/// claims.
#[derive(Default)]
struct Counts {
    chunks: HashMap<u64, Box<[u32; CHUNK as usize]>>,
}

impl Counts {
    fn add(&mut self, cluster: u64, times: u64) {
        let chunk = self.chunks.entry(cluster / CHUNK).or_insert_with(|| Box::new([0; CHUNK as usize]));
        if let Some(n) = chunk.get_mut((cluster % CHUNK) as usize) {
            *n = n.saturating_add(u32::try_from(times).unwrap_or(u32::MAX));
        }
    }

    fn add_all(&mut self, clusters: &[u64], times: u64) {
        let mut at = 0;
        while let Some(first) = clusters.get(at) {
            let number = first / CHUNK;
            let chunk = self.chunks.entry(number).or_insert_with(|| Box::new([0; CHUNK as usize]));
            for cluster in clusters.get(at..).unwrap_or_default().iter().take_while(|c| *c / CHUNK == number)
            {
                if let Some(n) = chunk.get_mut((cluster % CHUNK) as usize) {
                    *n = n.saturating_add(u32::try_from(times).unwrap_or(u32::MAX));
                }
                at += 1;
            }
        }
    }

    fn get(&self, cluster: u64) -> u64 {
        let chunk = self.chunks.get(&(cluster / CHUNK));
        chunk.and_then(|c| c.get((cluster % CHUNK) as usize)).map_or(0, |n| u64::from(*n))
    }

    fn end(&self) -> u64 {
        self.chunks.keys().max().map_or(0, |n| (n + 1) * CHUNK)
    }
}

/// A stored refcount that differs from the counted references.
#[derive(Clone, Copy, Debug)]
struct Mismatch {
    cluster: u64,
    stored: u64,
    counted: u64,
}

impl Image {
    /// Counts all references and compares them with the refcounts. Changes nothing; works on an image opened
    /// for reading.
    ///
    /// # Errors
    /// The system's. [`ErrorKind::Corrupt`] only where the check cannot count at all, because the header's
    /// own tables are damaged. Everything else is in the report.
    pub fn check(&self) -> Result<CheckReport> {
        self.check_unguarded().map(|(report, _, _)| report).context("check", self.path())
    }

    fn check_unguarded(&self) -> Result<(CheckReport, Counts, Vec<Mismatch>)> {
        let mut report = CheckReport::default();
        let mut refcounts = Refcounts::load(&self.file, &self.header)?;
        let counts = self.count(&refcounts, &mut report)?;
        let mismatches = self.compare(&mut refcounts, &counts, &mut report)?;
        self.check_copied(&counts, &mut report)?;
        Ok((report, counts, mismatches))
    }

    fn count(&self, refcounts: &Refcounts, report: &mut CheckReport) -> Result<Counts> {
        let bits = self.header.cluster_bits;
        let geometry = self.geometry();
        let mut counts = Counts::default();
        let add = |counts: &mut Counts, offset: HostOffset, bytes: u64| {
            let first = bits.host_cluster(offset).0;
            (first..first.saturating_add(bits.clusters_for(bytes))).for_each(|c| counts.add(c, 1));
        };
        let header = &self.header;
        add(&mut counts, HostOffset(0), 1);
        add(&mut counts, header.l1_offset, u64::from(header.l1_entries) * 8);
        add(&mut counts, header.reftable_offset, u64::from(header.reftable_clusters) << bits.bits());
        refcounts.block_offsets().for_each(|o| add(&mut counts, o, 1));
        let (snapshots, table_bytes) = self.snapshot_table()?;
        if *table_bytes > 0 {
            add(&mut counts, header.snapshots_offset, *table_bytes as u64);
        }
        if let Some((offset, length)) = header.crypto_header()? {
            add(&mut counts, offset, length);
        }
        self.count_bitmaps(&mut counts, report)?;

        // Each L2 table is read once, however many snapshots share it.
        let mut l2: Vec<u64> = Vec::new();
        let take = |l1: &L1Table, l2: &mut Vec<u64>| {
            l2.extend((0..l1.len()).filter_map(|n| l1.l2_offset(n)).map(|o| o.0))
        };
        take(self.active_l1()?, &mut l2);
        for s in snapshots {
            add(&mut counts, s.l1_offset, u64::from(s.l1_entries) * 8);
            match self.snapshot_l1(s) {
                Ok(l1) => take(&l1, &mut l2),
                Err(e) if e.kind() == ErrorKind::Corrupt => {
                    report.error(format!("snapshot \"{}\": {}", shown(&s.name), e.detail()));
                }
                Err(e) => return Err(e),
            }
        }
        l2.sort_unstable();
        let mut offsets: Vec<u64> = Vec::new();
        let mut times: Vec<u64> = Vec::new();
        for offset in l2 {
            match (offsets.last(), times.last_mut()) {
                (Some(last), Some(n)) if *last == offset => *n += 1,
                _ => {
                    offsets.push(offset);
                    times.push(1);
                }
            }
        }
        let mut references = References::default();
        tables::visit(&self.file, geometry, &offsets, |n, bytes| {
            let (offset, times) = (offsets.get(n).copied().unwrap_or(0), times.get(n).copied().unwrap_or(1));
            counts.add(bits.host_cluster(HostOffset(offset)).0, times);
            // Data of an external file has no refcounts here.
            if header.has_data_file() {
                return Ok(false);
            }
            match references.fill(geometry, bytes, None) {
                Ok(()) => counts.add_all(&references.clusters, times),
                Err(e) => report.error(format!("the L2 table at {offset:#x}: {}", e.detail())),
            }
            for slot in 0..geometry.l2_entries() as usize {
                if geometry.extended_l2 || !geometry.zero_flag {
                    if let Err(e) = L2Entry::read(geometry, bytes, slot).mapping(geometry) {
                        report.error(format!("the L2 table at {offset:#x}, entry {slot}: {}", e.detail()));
                    }
                } else {
                    // Without subclusters, `fill` has checked everything already.
                    break;
                }
            }
            Ok(false)
        })?;
        Ok(counts)
    }

    fn count_bitmaps(&self, counts: &mut Counts, report: &mut CheckReport) -> Result<()> {
        let bits = self.header.cluster_bits;
        let list = match bitmaps::list(self) {
            Ok(list) => list,
            Err(e) if e.kind() == ErrorKind::Corrupt => {
                report.error(e.detail().to_owned());
                return Ok(());
            }
            Err(e) => return Err(e),
        };
        if list.is_empty() {
            return Ok(());
        }
        let mut add = |offset: HostOffset, bytes: u64| {
            let first = bits.host_cluster(offset).0;
            (first..first.saturating_add(bits.clusters_for(bytes))).for_each(|c| counts.add(c, 1));
        };
        if let Some(pointer) = self.header.bitmaps()? {
            add(pointer.directory_offset, pointer.directory_size);
        }
        let file_len = self.file.len()?;
        for bitmap in list {
            let bytes = u64::from(bitmap.table_entries) * 8;
            if bitmap
                .table_offset
                .checked_add(bytes)
                .is_none_or(|end| end.0 > file_len.saturating_add(bits.size()))
            {
                report.error(format!(
                    "the table of bitmap \"{}\" lies past the end of the file",
                    shown(bitmap.name.as_bytes())
                ));
                continue;
            }
            add(bitmap.table_offset, bytes);
            let mut table = vec![0; bytes as usize];
            self.file.read_at(&mut table, bitmap.table_offset)?;
            for word in table.as_chunks::<8>().0 {
                let offset = u64::from_be_bytes(*word) & OFFSET_MASK;
                if offset & bits.mask() != 0 {
                    report.error(format!(
                        "bitmap \"{}\" has data at {offset:#x}",
                        shown(bitmap.name.as_bytes())
                    ));
                } else if offset != 0 {
                    add(HostOffset(offset), 1);
                }
            }
        }
        Ok(())
    }

    fn compare(
        &self,
        refcounts: &mut Refcounts,
        counts: &Counts,
        report: &mut CheckReport,
    ) -> Result<Vec<Mismatch>> {
        let mut mismatches = Vec::new();
        let file_end = self.header.cluster_bits.clusters_for(self.file.len()?);
        // Only chunks in which something is counted or stored: an image may refer to clusters at any
        // distance.
        let mut chunks: Vec<u64> = counts.chunks.keys().copied().collect();
        for covered in refcounts.covered() {
            chunks.extend(covered.start / CHUNK..covered.end.div_ceil(CHUNK));
        }
        chunks.sort_unstable();
        chunks.dedup();
        for chunk in chunks {
            let clusters = chunk * CHUNK..(chunk + 1) * CHUNK;
            let counted = counts.chunks.contains_key(&chunk);
            for cluster in clusters {
                let counted = if counted { counts.get(cluster) } else { 0 };
                let stored = refcounts.get(&self.file, ClusterIndex(cluster))?;
                report.used_clusters += u64::from(counted > 0);
                // Like QEMU: the last cluster may be partial, but not missing.
                if counted > 0 && cluster > file_end {
                    report.error(format!(
                        "cluster {cluster:#x} is referred to, and lies past the end of the file"
                    ));
                }
                if stored == counted {
                    continue;
                }
                if stored > counted {
                    report.leaked_clusters += 1;
                } else {
                    report.error(format!(
                        "cluster {cluster:#x} has a refcount of {stored} and {counted} references"
                    ));
                }
                mismatches.push(Mismatch { cluster, stored, counted });
            }
        }
        Ok(mismatches)
    }

    fn check_copied(&self, counts: &Counts, report: &mut CheckReport) -> Result<()> {
        let l1 = self.active_l1()?;
        let bits = self.header.cluster_bits;
        let geometry = self.geometry();
        let mut judge = |what: &str, offset: u64, copied: bool, counted: u64| {
            if copied && counted != 1 {
                report.error(format!("{what} at {offset:#x} is marked COPIED and has {counted} references"));
            } else if !copied && counted == 1 {
                report.copied_clear += 1;
            }
        };
        for index in 0..l1.len() {
            if let Some(offset) = l1.l2_offset(index) {
                judge("the L2 table", offset.0, l1.is_copied(index), counts.get(bits.host_cluster(offset).0));
            }
        }
        if self.header.has_data_file() {
            return Ok(());
        }
        let offsets: Vec<u64> = (0..l1.len()).filter_map(|n| l1.l2_offset(n)).map(|o| o.0).collect();
        tables::visit(&self.file, geometry, &offsets, |_, bytes| {
            for entry in bytes.chunks_exact(geometry.l2_entry_size()) {
                let d = entry.first_chunk::<8>().map_or(0, |b| u64::from_be_bytes(*b));
                let offset = d & OFFSET_MASK;
                if d & COMPRESSED == 0 && offset != 0 {
                    judge("data", offset, d & COPIED != 0, counts.get(offset >> bits.bits()));
                }
            }
            Ok(false)
        })
    }

    /// Corrects what a crash may leave: frees leaked clusters and sets COPIED bits that could be set. No data
    /// and no mapping is touched. Returns what was found.
    ///
    /// Order: the corrections in any order, then one flush. Each single correction is valid by itself. After
    /// that the space of free clusters is returned to the file system, including space that an earlier crash
    /// left allocated.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] if the check finds errors; nothing is changed then. The system's.
    pub fn repair(&mut self) -> Result<CheckReport> {
        let found = Cell::new(None);
        let check = |image: &mut Self| {
            let (report, counts, mismatches) = image.check_unguarded()?;
            if let Some(first) = report.findings.first() {
                return Err(Error::corrupt(format!("{} errors, the first: {}", report.errors, first.what))
                    .advise("`qemu-img check -r all` on a copy may repair it"));
            }
            found.set(Some((report, counts, mismatches)));
            Ok(())
        };
        self.checked("repair", check, |image| {
            let Some((report, counts, mismatches)) = found.take() else { return Ok(CheckReport::default()) };
            if !report.is_clean() {
                image.correct(&counts, &mismatches)?;
            }
            image.punch_free()?;
            Ok(report)
        })
    }

    /// Rebuilds the refcounts of an image whose dirty bit is set, as QEMU does when it opens one.
    ///
    /// Order: raise refcounts that are too low, correct COPIED bits; flush; lower refcounts that are too
    /// high; flush; clear the dirty bit; flush. A crash before the last step leaves the bit set, and the next
    /// writer repeats everything.
    pub(crate) fn rebuild_refcounts(&mut self) -> Result<()> {
        let (report, counts, mismatches) = self.check_unguarded()?;
        let low = mismatches.iter().filter(|m| m.stored < m.counted).count() as u64;
        let copied = report.findings.iter().filter(|f| f.what.contains("marked COPIED")).count() as u64;
        if report.errors > low + copied && report.errors <= MAX_FINDINGS as u64 {
            let first = report
                .findings
                .iter()
                .find(|f| !f.what.contains("refcount of") && !f.what.contains("COPIED"));
            return Err(Error::corrupt(format!(
                "the image was not closed properly, and its tables are wrong too: {}",
                first.map_or("", |f| f.what.as_str())
            ))
            .advise("no changes made; `qemu-img check -r all` on a copy may repair it"));
        }
        let floor = counts.end().max(self.header.cluster_bits.clusters_for(self.file.len()?));
        let (file, refcounts, _) = self.parts()?;
        // A cluster that is free by these refcounts may be in use. So new refcount blocks go behind
        // everything.
        refcounts.allocate_from(ClusterIndex(floor));
        // 1) Raise what is too low. From here on no cluster in use counts as free.
        for m in mismatches.iter().filter(|m| m.counted > m.stored) {
            refcounts.force(file, ClusterIndex(m.cluster), m.counted)?;
        }
        self.flush_metadata()?;
        // 2) Lower what is too high, by a fresh count that includes the new refcount blocks.
        let (_, counts, mismatches) = self.check_unguarded()?;
        self.correct(&counts, &mismatches)?;
        // 3) Only now the refcounts are reliable. A crash before this flush leaves the dirty bit set.
        self.header.incompatible &= !INCOMPATIBLE_DIRTY;
        self.write_header_sector()?;
        self.file.flush()
    }

    /// Lowers refcounts that are too high, and sets each active COPIED bit to what the counts say.
    fn correct(&mut self, counts: &Counts, mismatches: &[Mismatch]) -> Result<()> {
        let geometry = self.geometry();
        let mut l1 = self.active_l1()?.clone();
        let (file, refcounts, header) = self.parts()?;
        let bits = header.cluster_bits;
        for m in mismatches.iter().filter(|m| m.stored > m.counted) {
            refcounts.set(file, ClusterIndex(m.cluster), m.counted)?;
        }
        let mut changed = false;
        for index in 0..l1.len() {
            let Some(offset) = l1.l2_offset(index) else { continue };
            let right = offset.0 | if counts.get(bits.host_cluster(offset).0) == 1 { COPIED } else { 0 };
            if let Some(entry) = l1.entries.get_mut(index) {
                changed |= *entry != right;
                *entry = right;
            }
        }
        let offsets: Vec<u64> = (0..l1.len()).filter_map(|n| l1.l2_offset(n)).map(|o| o.0).collect();
        tables::visit(file, geometry, &offsets, |_, bytes| {
            let mut changed = false;
            for slot in 0..geometry.l2_entries() as usize {
                let entry = L2Entry::read(geometry, bytes, slot);
                let offset = entry.descriptor & OFFSET_MASK;
                if entry.descriptor & COMPRESSED != 0 || offset == 0 {
                    continue;
                }
                if counts.get(offset >> bits.bits()) == 1 {
                    changed |= set_copied(geometry, bytes, slot as u32);
                } else if entry.is_copied() {
                    entry.with_copied(false).write(geometry, bytes, slot);
                    changed = true;
                }
            }
            Ok(changed)
        })?;
        if changed {
            file.write_at(&l1.to_bytes(), header.l1_offset)?;
        }
        self.l1 = std::sync::OnceLock::from(l1);
        self.protected = None;
        self.flush_metadata()
    }
}
