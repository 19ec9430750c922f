//! Offsets, indices and sizes as types of their own, so that a guest offset cannot be passed for a host
//! offset.

use std::fmt;

pub use image_files::engine::HostOffset;

/// Smallest cluster size is 512 bytes (`docs/interop/qcow2.rst`, "Header").
pub const MIN_CLUSTER_BITS: u32 = 9;
/// Largest cluster size that QEMU opens is 2 MiB.
pub const MAX_CLUSTER_BITS: u32 = 21;

/// A byte offset in the disk that the guest sees.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestOffset(pub u64);

/// The number of a cluster of the image file: its host offset divided by the cluster size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct ClusterIndex(pub u64);

/// The number of a cluster of the guest's disk: its guest offset divided by the cluster size.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct GuestCluster(pub u64);

macro_rules! show {
    ($($t:ident: $word:literal),*) => {$(
        impl fmt::Debug for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($word, " {:#x}"), self.0)
            }
        }
        impl fmt::Display for $t {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}
show!(GuestOffset: "guest", ClusterIndex: "cluster", GuestCluster: "guest cluster");

/// The cluster size of an image as a power of two: 9 (512 bytes) to 21 (2 MiB).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ClusterBits(u8);

impl ClusterBits {
    /// 64 KiB, QEMU's default.
    pub const DEFAULT: Self = Self(16);

    /// Returns `None` outside of 9 to 21.
    pub fn new(bits: u32) -> Option<Self> {
        (MIN_CLUSTER_BITS..=MAX_CLUSTER_BITS).contains(&bits).then_some(Self(bits as u8))
    }

    /// The exponent.
    #[inline]
    pub const fn bits(self) -> u32 {
        self.0 as u32
    }

    /// Bytes in a cluster.
    #[inline]
    pub const fn size(self) -> u64 {
        1 << self.0
    }

    /// Bytes in a cluster, for buffers.
    #[inline]
    pub const fn bytes(self) -> usize {
        1 << self.0
    }

    /// Mask of the lowest bits of an offset, which are its position in its cluster.
    #[inline]
    pub const fn mask(self) -> u64 {
        self.size() - 1
    }

    /// The cluster that contains a host offset.
    #[inline]
    pub const fn host_cluster(self, offset: HostOffset) -> ClusterIndex {
        ClusterIndex(offset.0 >> self.0)
    }

    /// The start of a cluster of the file; `None` past 2^64.
    #[inline]
    pub fn host_offset(self, cluster: ClusterIndex) -> Option<HostOffset> {
        cluster.0.checked_mul(self.size()).map(HostOffset)
    }

    /// The cluster that contains a guest offset.
    #[inline]
    pub const fn guest_cluster(self, offset: GuestOffset) -> GuestCluster {
        GuestCluster(offset.0 >> self.0)
    }

    /// Number of clusters that `bytes` need.
    #[inline]
    pub const fn clusters_for(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.size())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cluster_bits_are_9_to_21() {
        assert!(ClusterBits::new(8).is_none());
        assert!(ClusterBits::new(22).is_none());
        assert_eq!(ClusterBits::new(9).map(ClusterBits::size), Some(512));
        assert_eq!(ClusterBits::new(21).map(ClusterBits::size), Some(2 << 20));
    }

    #[test]
    fn clusters_for_the_largest_number_do_not_overflow() {
        assert_eq!(ClusterBits::DEFAULT.clusters_for(u64::MAX), 1 << 48);
        assert_eq!(ClusterBits::DEFAULT.clusters_for(1), 1);
        assert_eq!(ClusterBits::DEFAULT.clusters_for(0), 0);
    }
}
