//! The check of what an operation on the active state will touch, before its first write.
//!
//! Resizing and merging lower refcounts of what they replace, and allocate what became free. In an image whose
//! metadata contradicts itself that can fail in the middle, or hand out a cluster that holds metadata. So each
//! reference that the operation may give back is taken from the refcounts in memory first, and all metadata counts
//! as one reference of its own. What cannot be taken is refused, and nothing was written.

use super::bitmaps;
use super::error::{Error, ErrorKind, Result};
use super::mapping::L2Entry;
use super::open::Image;
use super::overlap;
use super::refcount::{Change, Refcounts};
use super::references::References;
use super::tables;
use super::units::HostOffset;

impl Image {
    /// Refuses where the metadata, and all that the L2 tables at these L1 indexes refer to, could not be given back.
    ///
    /// Reads those tables, and the refcount blocks that count them and the metadata; no others.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], and the system's.
    pub(super) fn check_touched(&mut self, indexes: impl Iterator<Item = usize>) -> Result<()> {
        bitmaps::list(self)?;
        let geometry = self.geometry();
        let mut refcounts = Refcounts::load(&self.file, &self.header)?;
        refcounts.dry_run();
        let metadata: Vec<u64> = overlap::metadata(self)?.iter().flat_map(overlap::Piece::clusters).collect();
        let l1 = self.active_l1()?;
        let offsets: Vec<u64> = indexes.filter_map(|index| l1.l2_offset(index)).map(|o| o.0).collect();
        let mut references = References::default();
        let counted = refcounts.change(&self.file, &metadata, Change::Down(1), |_, _| {}).and_then(|()| {
            tables::visit(&self.file, geometry, &offsets, |n, bytes| {
                let at = HostOffset(offsets.get(n).copied().unwrap_or(0));
                let wrong = |error: Error| error.within(format!("the L2 table at {at}"));
                references.fill(geometry, bytes, None).map_err(wrong)?;
                // Without subclusters, and with zero mappings, `fill` has checked all that can be wrong.
                if geometry.extended_l2 || !geometry.zero_flag {
                    for slot in 0..geometry.l2_entries() as usize {
                        L2Entry::read(geometry, bytes, slot).mapping(geometry).map_err(wrong)?;
                    }
                }
                refcounts.change(&self.file, &references.clusters, Change::Down(1), |_, _| {})?;
                Ok(false)
            })
        });
        match counted {
            // More than an estimate may keep in memory. Then the operation goes on without: what it meets is an error
            // of its own, in the words of one that had begun.
            Err(error) if error.kind() == ErrorKind::LimitExceeded => Ok(()),
            counted => counted,
        }
    }
}
