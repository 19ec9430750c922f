//! The change of an image's size on the disk by a merge into it, without doing the merge.
//!
//! This follows [`super::merge`] cluster by cluster, with the same decisions: a cluster that the target owns
//! is overwritten in place, everything else goes to fresh clusters and tables, and what becomes zeros is
//! given back. Fresh clusters are allocated from a copy of the refcounts in memory, so new refcount blocks
//! are known, and free clusters that still have room on the file system.

use std::ops::Range;

use super::error::{Context, Result};
use super::mapping::{Geometry, L2Entry, Mapping};
use super::open::Image;
use super::refcount::{FILE_BLOCK, Refcounts};
use super::units::HostOffset;
use super::view::{Content, Piece, RunLayer, View};
use super::writer::host_of;

/// Ranges of the file that are collected before the file system is asked about them.
const RANGES: usize = 64 << 10;

/// Change of a file by a merge into it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[non_exhaustive]
pub struct MergeGrowth {
    /// Bytes that it takes more on the file system.
    pub more: u64,
    /// Bytes that the file system gets back, if freed clusters are punched.
    pub less: u64,
    /// False if the numbers are estimates: compressed clusters, subclusters, clusters smaller than a block of
    /// the file system, a disk that gets another size.
    pub is_exact: bool,
}

/// Returns how [`super::merge`] of the same run would change the file of `into`. `has_below` is true if the
/// run has a backing file. Only reads.
///
/// # Errors
/// As of the merge, as far as it reads.
pub fn merge_growth(
    under: Vec<RunLayer>,
    into: &Image,
    over: Vec<RunLayer>,
    has_below: bool,
) -> Result<MergeGrowth> {
    let path = into.path();
    let target = under.len();
    let run = || -> Result<MergeGrowth> {
        let mut run = under;
        run.push(RunLayer::active(into)?);
        run.extend(over);
        let geometry = into.geometry();
        let mut walk = Walk {
            view: View::new(run)?,
            target,
            into,
            geometry,
            zeros_needed: target > 0 || has_below,
            table: (None, Vec::new()),
            new_table: None,
            fresh: 0,
            overwritten: Places::default(),
            cleared: Places::default(),
            is_exact: !geometry.extended_l2 && geometry.cluster_bits.size() >= FILE_BLOCK,
        };
        walk.is_exact &= walk.view.size() == into.virtual_size();
        walk.run()?;
        walk.sum()
    };
    run().context("estimate a merge into", path)
}

/// Ranges of a file, and what of them has room on the file system.
#[derive(Default)]
struct Places {
    ranges: Vec<Range<u64>>,
    bytes: u64,
    allocated: u64,
}

impl Places {
    fn add(&mut self, image: &Image, from: u64, length: u64) -> Result<()> {
        match self.ranges.last_mut() {
            Some(last) if last.end == from => last.end = from.saturating_add(length),
            _ => self.ranges.push(from..from.saturating_add(length)),
        }
        if self.ranges.len() >= RANGES { self.count(image) } else { Ok(()) }
    }

    fn count(&mut self, image: &Image) -> Result<()> {
        let ranges = std::mem::take(&mut self.ranges);
        self.bytes = ranges.iter().map(|range| range.end - range.start).fold(self.bytes, u64::saturating_add);
        match image.file.allocated_in(&ranges)? {
            Some(allocated) => self.allocated = self.allocated.saturating_add(allocated),
            None => self.allocated = self.bytes,
        }
        Ok(())
    }
}

struct Walk<'a> {
    view: View,
    target: usize,
    into: &'a Image,
    geometry: Geometry,
    /// True if zeros need an explicit mapping.
    zeros_needed: bool,
    /// The L2 table of the target that was read last: its L1 index, and its bytes.
    table: (Option<usize>, Vec<u8>),
    /// The last L1 index that gets a table of its own.
    new_table: Option<usize>,
    /// Clusters that are allocated: of data, and of tables.
    fresh: u64,
    overwritten: Places,
    cleared: Places,
    is_exact: bool,
}

impl Walk<'_> {
    fn run(&mut self) -> Result<()> {
        let (size, reach) = (self.geometry.cluster_bits.size(), self.geometry.l2_reach());
        let disk = self.view.size();
        let mut at = 0;
        loop {
            at = at.max(self.view.next_defined(at, self.target) / size * size);
            let Some(piece) = self.view.piece(at)? else { return Ok(()) };
            let whole = match piece.end == disk {
                true => (piece.end - at).div_ceil(size),
                false => (piece.end - at) / size,
            };
            if whole > 0 && self.stays(&piece) {
                at += whole * size;
                continue;
            }
            match piece.content {
                _ if whole == 0 => {
                    self.mixed(at)?;
                    at += size;
                }
                Content::Zero | Content::PastEnd => {
                    let end = (at + whole * size).min((at / reach + 1) * reach);
                    self.zeros(at, end)?;
                    at = end;
                }
                Content::Data(_) if at + size <= piece.end => {
                    for _ in 0..(piece.end - at) / size {
                        self.data(at)?;
                        at += size;
                    }
                }
                Content::Compressed { .. } => {
                    self.is_exact = false;
                    self.data(at)?;
                    at += size;
                }
                _ => {
                    self.mixed(at)?;
                    at += size;
                }
            }
        }
    }

    fn stays(&self, piece: &Piece) -> bool {
        match piece.content {
            Content::Unowned => true,
            Content::PastEnd => false,
            Content::Zero | Content::Data(_) | Content::Compressed { .. } => piece.layer == self.target,
        }
    }

    fn index(&self, at: u64) -> usize {
        usize::try_from(at / self.geometry.l2_reach()).unwrap_or(usize::MAX)
    }

    /// The target's entry for the cluster at `at`, and the place that may be overwritten.
    fn entry(&mut self, at: u64) -> Result<(Mapping, Option<HostOffset>)> {
        let index = self.index(at);
        let l1 = self.into.active_l1()?;
        let Some(offset) = l1.l2_offset(index) else { return Ok((Mapping::Unallocated, None)) };
        if self.table.0 != Some(index) {
            self.table.0 = None;
            self.table.1.resize(self.geometry.cluster_bits.bytes(), 0);
            self.into.file.read_at(&mut self.table.1, offset)?;
            self.table.0 = Some(index);
        }
        let slot = (at % self.geometry.l2_reach()) >> self.geometry.cluster_bits.bits();
        let entry = L2Entry::read(self.geometry, &self.table.1, usize::try_from(slot).unwrap_or(usize::MAX));
        let mapping = entry.mapping(self.geometry)?;
        let own = host_of(mapping).filter(|_| l1.is_copied(index) && entry.is_copied());
        Ok((mapping, own))
    }

    /// An entry of this table changes: it is made, or copied from a shared one, once.
    fn change_table(&mut self, at: u64) -> Result<()> {
        let index = self.index(at);
        let l1 = self.into.active_l1()?;
        let is_own = l1.l2_offset(index).is_some() && l1.is_copied(index);
        if !is_own && self.new_table != Some(index) {
            self.new_table = Some(index);
            self.fresh += 1;
        }
        Ok(())
    }

    /// The cluster gets data.
    fn data(&mut self, at: u64) -> Result<()> {
        let size = self.geometry.cluster_bits.size();
        let (mapping, own) = self.entry(at)?;
        match own {
            Some(host) => self.overwritten.add(self.into, host.0, size)?,
            None => {
                // Whether the clusters of compressed data become free depends on what else they have.
                self.is_exact &= !matches!(mapping, Mapping::Compressed(_));
                self.fresh += 1;
                self.change_table(at)?;
            }
        }
        Ok(())
    }

    /// Whole clusters within one table become zeros.
    fn zeros(&mut self, from: u64, end: u64) -> Result<()> {
        let size = self.geometry.cluster_bits.size();
        if self.into.active_l1()?.l2_offset(self.index(from)).is_none() {
            return match self.zeros_needed {
                true if self.geometry.zero_flag || self.geometry.extended_l2 => self.change_table(from),
                true => (0..(end - from) / size).try_for_each(|n| self.data(from + n * size)),
                false => Ok(()),
            };
        }
        (0..(end - from) / size).try_for_each(|n| self.zero(from + n * size))
    }

    fn zero(&mut self, at: u64) -> Result<()> {
        let size = self.geometry.cluster_bits.size();
        let (mapping, own) = self.entry(at)?;
        match mapping {
            Mapping::Zero { .. } => return Ok(()),
            Mapping::Unallocated if !self.zeros_needed => return Ok(()),
            _ => {}
        }
        if self.zeros_needed && !self.geometry.zero_flag && !self.geometry.extended_l2 {
            return self.data(at);
        }
        self.is_exact &= !matches!(mapping, Mapping::Compressed(_));
        self.change_table(at)?;
        match own {
            Some(host) => self.cleared.add(self.into, host.0, size),
            None => Ok(()),
        }
    }

    /// One cluster of several pieces.
    fn mixed(&mut self, at: u64) -> Result<()> {
        let end = (at + self.geometry.cluster_bits.size()).min(self.view.size());
        let (mut from, mut changes, mut zero) = (at, false, true);
        while from < end
            && let Some(piece) = self.view.piece(from)?
        {
            changes |= !self.stays(&piece);
            zero &= matches!(piece.content, Content::Zero | Content::PastEnd);
            self.is_exact &= !matches!(piece.content, Content::Compressed { .. });
            from = piece.end.min(end);
        }
        match (changes, zero) {
            (false, _) => Ok(()),
            (true, true) => self.zero(at),
            (true, false) => self.data(at),
        }
    }

    fn sum(mut self) -> Result<MergeGrowth> {
        let size = self.geometry.cluster_bits.size();
        self.overwritten.count(self.into)?;
        self.cleared.count(self.into)?;
        let mut more = self.overwritten.bytes.saturating_sub(self.overwritten.allocated);
        // Free clusters of the file may still have room on the file system.
        let mut refcounts = Refcounts::load(&self.into.file, &self.into.header)?;
        refcounts.dry_run();
        let mut places = Places::default();
        for _ in 0..self.fresh {
            let at = refcounts.allocate(&self.into.file, 1)?;
            places.add(self.into, at.0.saturating_mul(size), size)?;
        }
        places.count(self.into)?;
        more = more.saturating_add(places.bytes.saturating_sub(places.allocated));
        more = more.saturating_add(refcounts.new_clusters().saturating_mul(size));
        Ok(MergeGrowth { more, less: self.cleared.allocated, is_exact: self.is_exact })
    }
}
