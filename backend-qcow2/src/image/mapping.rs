//! L1 and L2 entries: the mapping from guest clusters to host clusters.

use super::error::{Error, Result};
use super::header::Header;
use super::units::{ClusterBits, HostOffset};

/// Bit 63: this table or cluster has a refcount of exactly one and may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: a compressed cluster.
pub(crate) const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of a standard L2 entry: reads as zeros.
pub(crate) const ZERO: u64 = 1;
/// Bits 9 to 55: the host offset.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Subclusters of an extended L2 entry.
pub const SUBCLUSTERS: u32 = 32;
/// Unit of a compressed cluster's length.
const COMPRESSED_SECTOR: u64 = 512;

/// Layout of the tables of one image: everything that is needed to read its L1 and L2 entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// The cluster size.
    pub cluster_bits: ClusterBits,
    /// True if L2 entries are 16 bytes with a bitmap of subclusters.
    pub extended_l2: bool,
    /// True if bit 0 of an entry means "zero" (version 3 without extended L2).
    pub zero_flag: bool,
}

impl Geometry {
    /// The geometry of this header.
    pub fn of(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            extended_l2: header.has_extended_l2(),
            zero_flag: header.version >= 3 && !header.has_extended_l2(),
        }
    }

    /// Bytes of an L2 entry.
    #[inline]
    pub const fn l2_entry_size(self) -> usize {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    #[inline]
    pub const fn l2_entries(self) -> u64 {
        self.cluster_bits.size() / self.l2_entry_size() as u64
    }

    /// Bytes of the guest's disk that one L2 table maps.
    #[inline]
    pub const fn l2_reach(self) -> u64 {
        self.l2_entries() << self.cluster_bits.bits()
    }

    /// L1 entries that a disk of this size needs.
    #[inline]
    pub const fn l1_entries_for(self, virtual_size: u64) -> u64 {
        virtual_size.div_ceil(self.l2_reach())
    }

    /// Bytes of one subcluster, or of the cluster if it has none.
    #[inline]
    pub const fn subcluster_size(self) -> u64 {
        if self.extended_l2 {
            self.cluster_bits.size() / SUBCLUSTERS as u64
        } else {
            self.cluster_bits.size()
        }
    }
}

/// One L2 entry, checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mapping {
    /// No mapping: reads from the backing file, or as zeros without one.
    Unallocated,
    /// Reads as zeros, whatever the backing file contains. A host cluster may be allocated for it.
    Zero {
        /// The preallocated cluster. Its content has no meaning.
        host: Option<HostOffset>,
    },
    /// A cluster of data.
    Data(HostOffset),
    /// A compressed cluster.
    Compressed(CompressedExtent),
    /// An extended entry whose subclusters differ. It only occurs with extended L2.
    Subclusters {
        /// The host cluster, if there is one; subcluster *n* lies at its *n*-th 32nd.
        host: Option<HostOffset>,
        /// Bit *n*: subcluster *n* has data in the host cluster.
        allocated: u32,
        /// Bit *n*: subcluster *n* reads as zeros. With neither bit it reads from the backing file.
        zero: u32,
    },
}

/// Place of a compressed cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CompressedExtent {
    /// The first byte; not aligned to anything.
    pub offset: HostOffset,
    /// Bytes up to the end of the last 512-byte sector that it uses. The compressed data may be shorter.
    pub length: u64,
}

/// An L2 entry as it lies in the table.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct L2Entry {
    /// Descriptor and flags.
    pub descriptor: u64,
    /// The subcluster bitmap; 0 without extended L2.
    pub bitmap: u64,
}

impl L2Entry {
    /// Reads an entry from a table's bytes. Entries past its end read as unallocated.
    #[inline]
    pub fn read(geometry: Geometry, table: &[u8], index: usize) -> Self {
        let size = geometry.l2_entry_size();
        let word =
            |at: usize| table.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes);
        Self {
            descriptor: word(index * size),
            bitmap: if geometry.extended_l2 { word(index * size + 8) } else { 0 },
        }
    }

    /// Writes the entry into a table's bytes. An index past its end is ignored.
    #[inline]
    pub fn write(self, geometry: Geometry, table: &mut [u8], index: usize) {
        let at = index * geometry.l2_entry_size();
        if let Some(b) = table.get_mut(at..at + 8) {
            b.copy_from_slice(&self.descriptor.to_be_bytes());
        }
        if geometry.extended_l2
            && let Some(b) = table.get_mut(at + 8..at + 16)
        {
            b.copy_from_slice(&self.bitmap.to_be_bytes());
        }
    }

    /// Returns true if the active tables mark the cluster's refcount as one.
    #[inline]
    pub const fn is_copied(self) -> bool {
        self.descriptor & COPIED != 0
    }

    /// This entry with bit 63 set or clear. Compressed entries and entries without a cluster never have it.
    #[inline]
    #[must_use]
    pub const fn with_copied(self, copied: bool) -> Self {
        let may = self.descriptor & COMPRESSED == 0 && self.descriptor & OFFSET_MASK != 0;
        let d = self.descriptor & !COPIED;
        Self { descriptor: if copied && may { d | COPIED } else { d }, bitmap: self.bitmap }
    }

    /// Decodes and checks the entry.
    ///
    /// # Errors
    /// [`super::ErrorKind::Corrupt`] for: an unaligned or too large offset; a zero flag in a version without
    /// one; a subcluster that is both data and zero; data without a cluster.
    pub fn mapping(self, geometry: Geometry) -> Result<Mapping> {
        let d = self.descriptor;
        if d & COMPRESSED != 0 {
            return Ok(Mapping::Compressed(compressed_extent(geometry.cluster_bits, d)?));
        }
        let offset = d & OFFSET_MASK;
        if offset & geometry.cluster_bits.mask() != 0 {
            return Err(Error::corrupt(format!(
                "an L2 entry ({d:#018x}) points to {offset:#x}, which is not where a cluster starts"
            )));
        }
        let host = (offset != 0).then_some(HostOffset(offset));
        if geometry.extended_l2 {
            let (allocated, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
            if allocated & zero != 0 {
                return Err(Error::corrupt(format!(
                    "an extended L2 entry says of subclusters {:#x} both that they are data and that they are zero",
                    allocated & zero
                )));
            }
            if allocated != 0 && host.is_none() {
                return Err(Error::corrupt(
                    "an extended L2 entry has subclusters of data but no host cluster",
                ));
            }
            return Ok(match (host, allocated, zero) {
                (None, 0, 0) => Mapping::Unallocated,
                (host, 0, u32::MAX) => Mapping::Zero { host },
                (Some(host), u32::MAX, 0) => Mapping::Data(host),
                (host, allocated, zero) => Mapping::Subclusters { host, allocated, zero },
            });
        }
        if d & ZERO != 0 {
            if !geometry.zero_flag {
                return Err(Error::corrupt(format!(
                    "an L2 entry ({d:#018x}) has the zero flag, which version 2 images do not have"
                )));
            }
            return Ok(Mapping::Zero { host });
        }
        Ok(host.map_or(Mapping::Unallocated, Mapping::Data))
    }

    /// Encodes a mapping. `copied` is ignored where the bit is not allowed.
    pub fn new(geometry: Geometry, mapping: Mapping, copied: bool) -> Self {
        let entry = match mapping {
            Mapping::Unallocated => Self::default(),
            Mapping::Zero { host } => {
                let at = host.map_or(0, |h| h.0);
                if geometry.extended_l2 {
                    Self { descriptor: at, bitmap: u64::from(u32::MAX) << 32 }
                } else {
                    Self { descriptor: at | ZERO, bitmap: 0 }
                }
            }
            Mapping::Data(host) => Self {
                descriptor: host.0,
                bitmap: if geometry.extended_l2 { u64::from(u32::MAX) } else { 0 },
            },
            Mapping::Compressed(extent) => {
                Self { descriptor: compressed_descriptor(geometry.cluster_bits, extent), bitmap: 0 }
            }
            Mapping::Subclusters { host, allocated, zero } => Self {
                descriptor: host.map_or(0, |h| h.0),
                bitmap: u64::from(allocated) | u64::from(zero) << 32,
            },
        };
        entry.with_copied(copied)
    }
}

/// Width of the offset in a compressed descriptor: `62 - (cluster_bits - 8)`.
#[inline]
const fn compressed_offset_bits(bits: ClusterBits) -> u32 {
    62 - (bits.bits() - 8)
}

/// The largest host offset that a compressed descriptor can name.
#[inline]
pub(crate) const fn max_compressed_offset(bits: ClusterBits) -> u64 {
    let width = compressed_offset_bits(bits);
    (1 << if width > 56 { 56 } else { width }) - 1
}

#[inline]
pub(crate) fn compressed_extent(bits: ClusterBits, descriptor: u64) -> Result<CompressedExtent> {
    let x = compressed_offset_bits(bits);
    let offset = descriptor & ((1 << x) - 1);
    if offset >> 56 != 0 {
        return Err(Error::corrupt(format!(
            "a compressed L2 entry ({descriptor:#018x}) points past 64 PiB, which no image can have"
        )));
    }
    let sectors = (descriptor & !(COPIED | COMPRESSED)) >> x;
    let length = (sectors + 1) * COMPRESSED_SECTOR - offset % COMPRESSED_SECTOR;
    Ok(CompressedExtent { offset: HostOffset(offset), length })
}

#[inline]
fn compressed_descriptor(bits: ClusterBits, extent: CompressedExtent) -> u64 {
    let offset = extent.offset.0;
    let sectors = (offset % COMPRESSED_SECTOR + extent.length.max(1)).div_ceil(COMPRESSED_SECTOR) - 1;
    COMPRESSED | offset | sectors << compressed_offset_bits(bits)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry(bits: u32, extended_l2: bool) -> Geometry {
        Geometry { cluster_bits: ClusterBits::new(bits).unwrap(), extended_l2, zero_flag: !extended_l2 }
    }

    #[test]
    fn l2_reach_of_the_default_image_is_512_mib() {
        assert_eq!(geometry(16, false).l2_reach(), 512 << 20);
        assert_eq!(geometry(16, true).l2_reach(), 256 << 20);
        assert_eq!(geometry(16, false).l1_entries_for((512 << 20) + 1), 2);
    }

    #[test]
    fn a_compressed_descriptor_counts_additional_sectors() {
        let g = geometry(16, false);
        let extent = CompressedExtent { offset: HostOffset(0x5_0100), length: 0x100 };
        let e = L2Entry::new(g, Mapping::Compressed(extent), true);
        assert_eq!(e.descriptor, COMPRESSED | 0x5_0100);
        assert_eq!(e.mapping(g).unwrap(), Mapping::Compressed(extent));
    }

    #[test]
    fn contradictions_are_refused() {
        let g = geometry(16, false);
        assert!(L2Entry { descriptor: 0x1_0200, bitmap: 0 }.mapping(g).is_err());
        let v2 = Geometry { zero_flag: false, ..g };
        assert!(L2Entry { descriptor: ZERO, bitmap: 0 }.mapping(v2).is_err());
        let x = geometry(16, true);
        assert!(L2Entry { descriptor: 0x1_0000, bitmap: 1 | 1 << 32 }.mapping(x).is_err());
        assert!(L2Entry { descriptor: 0, bitmap: 1 }.mapping(x).is_err());
    }

    proptest! {
        /// Any entry parses or is refused, and an entry that parses is encoded the same.
        #[test]
        fn any_entry_is_refused_or_survives_a_round_trip(bits in 9u32..=21, x: bool, d: u64, bitmap: u64) {
            let g = geometry(bits, x && bits >= 14);
            let entry = L2Entry { descriptor: d, bitmap: if g.extended_l2 { bitmap } else { 0 } };
            if let Ok(mapping) = entry.mapping(g) {
                let again = L2Entry::new(g, mapping, entry.is_copied());
                prop_assert_eq!(again.mapping(g).unwrap(), mapping);
                let mut table = vec![0; g.cluster_bits.bytes()];
                again.write(g, &mut table, 3);
                prop_assert_eq!(L2Entry::read(g, &table, 3), again);
            }
        }
    }
}
