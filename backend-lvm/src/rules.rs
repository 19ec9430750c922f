//! Limits that are not lvm's decision: the size of a snapshot's area, and the fill levels that stop new
//! points.

/// Default size of a thick snapshot's area, in percent of its origin.
pub const COW_PERCENT: u32 = 20;

/// Default limit for the data of a thin pool, in percent, above which no more points are taken.
pub const POOL_DATA_PERCENT: u32 = 95;

/// Default limit for the metadata of a thin pool, in percent, above which no more points are taken.
pub const POOL_METADATA_PERCENT: u32 = 90;

/// Fill level of a thick snapshot's area, in percent, from which there is a warning.
pub(crate) const WARN_PERCENT: u32 = 80;

/// Extents of a snapshot's area beyond its known data: for its own metadata.
const SLACK_EXTENTS: u64 = 2;

/// Chunks of data in a snapshot's area for each chunk of entries: lvm's default chunk has 4 KiB, an entry 16
/// bytes.
const CHUNKS_PER_TABLE: u64 = 256;

/// Bytes of the other chunks of a snapshot's area: its header, the last table, one that the kernel wants
/// free, and what rounding takes.
const OVERHEAD: u64 = 4 * 4096;

/// The rules of one backend.
#[derive(Debug, Clone)]
pub(crate) struct Rules {
    pub(crate) cow_percent: u32,
    pub(crate) pool_data_percent: u32,
    pub(crate) pool_metadata_percent: u32,
}

impl Default for Rules {
    fn default() -> Self {
        Self {
            cow_percent: COW_PERCENT,
            pool_data_percent: POOL_DATA_PERCENT,
            pool_metadata_percent: POOL_METADATA_PERCENT,
        }
    }
}

impl Rules {
    /// Returns the area for a point of a volume of `size` bytes, in whole extents. lvm makes it no larger
    /// than can ever be used. From 100 % on it has room for every chunk and its entry: it cannot overflow.
    pub(crate) fn cow_bytes(&self, size: u64, extent: u64) -> u64 {
        let share = u128::from(size) * u128::from(self.cow_percent) / 100;
        let tables = match self.cow_percent {
            ..100 => 0,
            100.. => u128::from(size / CHUNKS_PER_TABLE + OVERHEAD),
        };
        whole_extents(u64::try_from(share + tables).unwrap_or(u64::MAX), extent, 1)
    }

    /// Returns the area for data that is written once: `used` bytes.
    pub(crate) fn cow_for(&self, used: u64, extent: u64) -> u64 {
        // Each chunk has an entry of 16 bytes; a twentieth is far more.
        whole_extents(used.saturating_add(used / 20), extent, SLACK_EXTENTS)
    }
}

fn whole_extents(bytes: u64, extent: u64, more: u64) -> u64 {
    let extent = extent.max(1);
    bytes.div_ceil(extent).saturating_add(more).saturating_mul(extent)
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXTENT: u64 = 4 << 20;

    #[test]
    fn areas_are_a_share_of_the_origin_in_whole_extents() {
        let rules = Rules { cow_percent: 10, ..Rules::default() };
        assert_eq!(rules.cow_bytes(100 << 20, EXTENT), 16 << 20);
        assert_eq!(rules.cow_bytes(1, EXTENT), EXTENT);
        assert_eq!(rules.cow_for(0, EXTENT), 2 * EXTENT);
        assert_eq!(rules.cow_bytes(u64::MAX, EXTENT) % EXTENT, 0);
    }
}
