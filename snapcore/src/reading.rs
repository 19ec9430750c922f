//! States of a disk that are read and compared: for `diff`, for exports.

use std::ops::Range;
use std::sync::Arc;

use crate::error::Result;

/// The most ranges that a comparison keeps. Beyond it, ranges that are near each other become one.
const MAX_RANGES: usize = 1 << 20;

/// Bytes that are read at once from each of two states.
const STEP: u64 = 1 << 20;

/// Bytes of a disk that are compared at once, from a multiple of this on.
const BLOCK: u64 = 64 << 10;

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

    /// Adds the blocks of a range, of 64 KiB from a multiple of that on, in which the data of two points
    /// differ. Both have the range. Its data are read, 1 MiB at a time.
    ///
    /// # Errors
    /// Those of the points.
    pub fn add_differences(
        &mut self,
        from: &dyn PointImage,
        to: &dyn PointImage,
        range: Range<u64>,
    ) -> Result<()> {
        let most = range.end.saturating_sub(range.start).min(STEP) as usize;
        let (mut ours, mut theirs) = (vec![0; most], vec![0; most]);
        let mut at = range.start;
        while at < range.end {
            // Up to a multiple of the step, so that blocks are those of the disk.
            let end = range.end.min((at / STEP + 1) * STEP);
            let length = (end - at) as usize;
            let (Some(ours), Some(theirs)) = (ours.get_mut(..length), theirs.get_mut(..length)) else {
                break;
            };
            from.read_at(ours, at)?;
            to.read_at(theirs, at)?;
            while at < end {
                let stop = end.min((at / BLOCK + 1) * BLOCK);
                let part = length - (end - at) as usize..length - (end - stop) as usize;
                if ours.get(part.clone()) != theirs.get(part) {
                    self.add(at..stop);
                }
                at = stop;
            }
        }
        Ok(())
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

    struct Bytes(Vec<u8>);

    impl PointImage for Bytes {
        fn size(&self) -> u64 {
            self.0.len() as u64
        }
        fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
            let from = offset as usize;
            buf.copy_from_slice(&self.0[from..from + buf.len()]);
            Ok(())
        }
        fn extents(&self, start: u64, end: u64, _: usize) -> Result<Vec<PointExtent>> {
            Ok(vec![PointExtent { start, end, zero: false }])
        }
        fn require_still(&self) -> Result<()> {
            Ok(())
        }
    }

    /// The blocks with a byte that differs are found, over the bounds of a reading, and no others; the ends
    /// are those of the range.
    #[test]
    fn blocks_that_differ_are_found() {
        let from = Bytes(vec![0; 3 * STEP as usize]);
        let mut to = Bytes(from.0.clone());
        for at in [10, BLOCK, STEP - 1, STEP, 2 * STEP + 5 * BLOCK + 7] {
            to.0[at as usize] = 1;
        }
        let mut ranges = Ranges::default();
        ranges.add_differences(&from, &to, 5..2 * STEP + 5 * BLOCK + 8).unwrap();
        let last = 2 * STEP + 5 * BLOCK;
        assert_eq!(ranges.into_vec(), [5..2 * BLOCK, STEP - BLOCK..STEP + BLOCK, last..last + 8]);
        let mut none = Ranges::default();
        none.add_differences(&from, &to, 2 * BLOCK..2 * BLOCK).unwrap();
        assert_eq!(none.into_vec(), []);
    }

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
