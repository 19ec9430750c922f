//! The check of everything that an operation on the active state will touch, before its first write.
//!
//! Resizing and merging lower refcounts of what they replace, and allocate what became free. In an image with
//! contradictory metadata that can fail in the middle, or allocate a cluster that contains metadata. So each
//! reference that the operation may remove is first removed from the refcounts in memory, and all metadata
//! counts as one reference of its own. A reference that cannot be removed is refused before anything is
//! written.

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
    /// Fails if the metadata, and everything that the L2 tables at these L1 indexes refer to, could not be
    /// freed.
    ///
    /// Reads only those tables, and the refcount blocks that count them and the metadata.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], and the system's.
    pub(super) fn check_touched(&mut self, indexes: impl Iterator<Item = usize>) -> Result<()> {
        bitmaps::list(self)?;
        let geometry = self.geometry();
        let mut refcounts = Refcounts::load(&self.file, &self.header)?;
        refcounts.dry_run();
        let metadata: Vec<u64> =
            overlap::metadata(self)?.iter().flat_map(overlap::MetadataRange::clusters).collect();
        let l1 = self.active_l1()?;
        let offsets: Vec<u64> = indexes.filter_map(|index| l1.l2_offset(index)).map(|o| o.0).collect();
        let mut references = References::default();
        let counted = refcounts.change(&self.file, &metadata, Change::Down(1), |_, _| {}).and_then(|()| {
            tables::visit(&self.file, geometry, &offsets, |n, bytes| {
                let at = HostOffset(offsets.get(n).copied().unwrap_or(0));
                let wrong = |error: Error| error.within(format!("the L2 table at {at}"));
                references.fill(geometry, bytes, None).map_err(wrong)?;
                // Without subclusters, and with zero mappings, `fill` has checked everything already.
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
            // The check needs more memory than an estimate may use. The operation then runs without it: an
            // error that it meets is its own, reported as one after the first write.
            Err(error) if error.kind() == ErrorKind::LimitExceeded => Ok(()),
            counted => counted,
        }
    }
}
