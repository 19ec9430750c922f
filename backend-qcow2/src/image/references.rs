//! The host clusters that the entries of an L2 table refer to. This is the inner loop of every snapshot
//! operation and check.

use super::error::{Error, Result};
use super::mapping::{COMPRESSED, COPIED, Geometry, OFFSET_MASK, compressed_extent};
use super::units::HostOffset;

/// The references of one L2 table, by entries. The value is reused for many tables, so that no table needs an
/// allocation.
#[derive(Default)]
pub(crate) struct References {
    /// Cluster numbers, in the order of the entries.
    pub clusters: Vec<u64>,
    /// The entry of each reference.
    pub slots: Vec<u32>,
}

impl References {
    /// Collects the references of `table`. Entries that `other` (if any) has alike at the same place are left
    /// out.
    ///
    /// # Errors
    /// [`super::ErrorKind::Corrupt`] for an offset that is not the start of a cluster.
    pub(crate) fn fill(&mut self, geometry: Geometry, table: &[u8], other: Option<&[u8]>) -> Result<()> {
        self.clusters.clear();
        self.slots.clear();
        match (geometry.extended_l2, other) {
            (false, None) => self.fill_as::<8, false>(geometry, table, &[]),
            (false, Some(other)) => self.fill_as::<8, true>(geometry, table, other),
            (true, None) => self.fill_as::<16, false>(geometry, table, &[]),
            (true, Some(other)) => self.fill_as::<16, true>(geometry, table, other),
        }
    }

    #[inline(always)]
    fn fill_as<const SIZE: usize, const OTHER: bool>(
        &mut self,
        geometry: Geometry,
        table: &[u8],
        other: &[u8],
    ) -> Result<()> {
        let bits = geometry.cluster_bits;
        let (shift, mask) = (bits.bits(), bits.mask());
        self.clusters.reserve(table.len() / SIZE);
        self.slots.reserve(table.len() / SIZE);
        for (slot, entry) in table.as_chunks::<SIZE>().0.iter().enumerate() {
            let d = descriptor(entry);
            if d == 0 {
                continue;
            }
            if OTHER {
                let same = other.as_chunks::<SIZE>().0.get(slot).map_or(0, |o| descriptor(o));
                if same_clusters(d, same) {
                    continue;
                }
            }
            if d & COMPRESSED == 0 {
                let offset = d & OFFSET_MASK;
                if offset & mask != 0 {
                    return Err(Error::corrupt(format!(
                        "L2 entry {slot} ({d:#018x}) points to {offset:#x}, which is not where a cluster starts"
                    )));
                }
                if offset != 0 {
                    self.clusters.push(offset >> shift);
                    self.slots.push(slot as u32);
                }
            } else {
                let extent = compressed_extent(bits, d)?;
                let last = HostOffset(extent.offset.0 + extent.length - 1);
                for cluster in bits.host_cluster(extent.offset).0..=bits.host_cluster(last).0 {
                    self.clusters.push(cluster);
                    self.slots.push(slot as u32);
                }
            }
        }
        Ok(())
    }
}

/// Returns true if two descriptors refer to the same clusters. Replacing one by the other then changes no
/// refcount.
#[inline(always)]
fn same_clusters(a: u64, b: u64) -> bool {
    if (a | b) & COMPRESSED == 0 { a & OFFSET_MASK == b & OFFSET_MASK } else { a & !COPIED == b & !COPIED }
}

#[inline(always)]
fn descriptor(entry: &[u8]) -> u64 {
    entry.first_chunk::<8>().map_or(0, |b| u64::from_be_bytes(*b))
}

/// Clears bit 63 in every entry. Returns true if an entry had it.
pub(crate) fn clear_copied(geometry: Geometry, table: &mut [u8]) -> bool {
    let mut any = 0;
    for entry in table.chunks_exact_mut(geometry.l2_entry_size()) {
        if let Some(first) = entry.first_mut() {
            any |= *first & 0x80;
            *first &= 0x7f;
        }
    }
    any != 0
}

/// Sets bit 63 of a standard entry that has a cluster. Returns true if it was clear.
pub(crate) fn set_copied(geometry: Geometry, table: &mut [u8], slot: u32) -> bool {
    let at = slot as usize * geometry.l2_entry_size();
    let Some(entry) = table.get_mut(at..at + 8) else { return false };
    let d = descriptor(entry);
    if d & (COMPRESSED | COPIED) != 0 || d & OFFSET_MASK == 0 {
        return false;
    }
    if let Some(first) = entry.first_mut() {
        *first |= 0x80;
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::units::ClusterBits;

    /// A compressed cluster refers to every host cluster that it touches.
    #[test]
    fn compressed_cluster_refers_to_all_it_touches() {
        let g = Geometry { cluster_bits: ClusterBits::new(9).unwrap(), extended_l2: false, zero_flag: true };
        let mut table = vec![0; 512];
        // Sector 0x400, three more sectors: clusters 2 to 5 of 512 bytes.
        let x = 62 - (9 - 8);
        table[8..16].copy_from_slice(&(COMPRESSED | 0x400 | 3u64 << x).to_be_bytes());
        table[16..24].copy_from_slice(&(COPIED | 0x1000).to_be_bytes());
        let mut r = References::default();
        assert!(r.fill(g, &table, None).is_ok() && r.clusters[r.clusters.len() - 1] == 8);
        assert_eq!(r.slots[r.slots.len() - 1], 2);
        let clear = table.clone();
        assert!(clear_copied(g, &mut table) && !clear_copied(g, &mut table));
        r.fill(g, &table, Some(&clear)).unwrap();
        assert!(r.clusters.is_empty(), "COPIED makes no difference to what is referred to");
        assert!(
            set_copied(g, &mut table, 2) && !set_copied(g, &mut table, 1) && !set_copied(g, &mut table, 0)
        );
    }
}
