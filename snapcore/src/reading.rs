//! States of a disk that are read and compared: for `diff`, for exports.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;

/// The most ranges that a comparison keeps. Beyond it, ranges that are near each other become one.
const MAX_RANGES: usize = 1 << 20;

/// An open state of a disk. It stays readable while a running domain writes the disk's current state, and
/// while other points of the disk are taken and deleted.
///
/// All methods block, and may be called from several threads at once.
pub trait PointImage: Send + Sync {
    /// Bytes of the disk in this state.
    fn size(&self) -> u64;

    /// Fills `buf` with the guest's bytes from `offset`. Past the disk's end are zeros.
    ///
    /// # Errors
    /// Those of the image; the system's.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;

    /// Returns the extents from `offset` on, without gaps, `limit` at most (at least 1). The last one ends at
    /// `end` or before. No data is read, so data that consists of zeros counts as data.
    ///
    /// # Errors
    /// As [`PointImage::read_at`].
    fn extents(&self, offset: u64, end: u64, limit: usize) -> Result<Vec<PointExtent>>;

    /// Refuses a state that another program has deleted or replaced since it was opened: what was read of it
    /// may then be of another state. Call it after the last read, before the data is relied on.
    ///
    /// # Errors
    /// [`crate::ErrorKind::NotFound`], with advice; the system's.
    fn require_still(&self) -> Result<()>;
}

/// A range of a disk with one kind of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PointExtent {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
    /// True if it certainly reads as zeros.
    pub zero: bool,
}

/// Two states of a disk.
#[derive(Clone)]
#[non_exhaustive]
pub struct Differences {
    /// The first state.
    pub from: Arc<dyn PointImage>,
    /// The second state.
    pub to: Arc<dyn PointImage>,
    /// The ranges in which they may differ, ascending, without overlap, inside of the second one's disk.
    /// Outside of them both read the same.
    pub ranges: Vec<Range<u64>>,
    /// Remarks for the user on how exact they are.
    pub notes: Vec<String>,
}

impl std::fmt::Debug for Differences {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Differences").field("ranges", &self.ranges.len()).finish_non_exhaustive()
    }
}

impl Differences {
    /// Makes the differences of two states.
    pub fn new(from: Arc<dyn PointImage>, to: Arc<dyn PointImage>, ranges: Vec<Range<u64>>) -> Self {
        Self { from, to, ranges, notes: Vec::new() }
    }
}

/// Collects ranges in ascending order, adjacent ones as one. It never has more than about a million: then
/// ranges that are near each other become one, so that the result covers more than was added, and never less.
#[derive(Debug, Default)]
pub struct Ranges {
    found: Vec<Range<u64>>,
    /// Ranges with a gap of at most this many bytes are one.
    gap: u64,
}

impl Ranges {
    /// Adds a range that does not begin before the last one.
    pub fn add(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        match self.found.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(self.gap) => {
                last.end = last.end.max(range.end)
            }
            _ => self.found.push(range),
        }
        if self.found.len() >= MAX_RANGES {
            self.thin();
        }
    }

    /// True if ranges near each other were made one.
    pub fn is_coarse(&self) -> bool {
        self.gap > 0
    }

    /// The ranges.
    pub fn into_vec(self) -> Vec<Range<u64>> {
        self.found
    }

    fn thin(&mut self) {
        while self.found.len() >= MAX_RANGES / 2 {
            self.gap = (self.gap * 2).max(4096);
            let gap = self.gap;
            self.found.dedup_by(|next, last| {
                let joins = next.start <= last.end.saturating_add(gap);
                if joins {
                    last.end = last.end.max(next.end);
                }
                joins
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adjacent_ranges_are_one() {
        let mut ranges = Ranges::default();
        for range in [0..1, 1..2, 4..4, 5..9, 7..8] {
            ranges.add(range);
        }
        assert!(!ranges.is_coarse());
        assert_eq!(ranges.into_vec(), [0..2, 5..9]);
    }

    /// Ranges are bounded, and what was added stays covered.
    #[test]
    fn many_ranges_become_coarse() {
        let mut ranges = Ranges::default();
        let all = 3 * MAX_RANGES as u64;
        for at in 0..all {
            ranges.add(at * 512..at * 512 + 1);
        }
        assert!(ranges.is_coarse());
        let found = ranges.into_vec();
        assert!(found.len() < MAX_RANGES);
        assert!(found.iter().zip(found.iter().skip(1)).all(|(a, b)| a.end < b.start));
        let covered = |at: u64| {
            let place = found.partition_point(|range| range.end <= at);
            found.get(place).is_some_and(|range| range.contains(&at))
        };
        assert!((0..all).step_by(977).all(|at| covered(at * 512)));
    }
}
