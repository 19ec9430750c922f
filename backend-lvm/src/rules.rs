//! What is not lvm's to decide: how large a snapshot is made, and how full is too full.

/// How large the area of a thick snapshot is made, in percent of its origin, where nothing else is said.
pub const COW_PERCENT: u32 = 20;

/// How full the data of a thin pool may be, in percent, for another point to be taken.
pub const POOL_DATA_PERCENT: u32 = 95;

/// How full the metadata of a thin pool may be, in percent, for another point to be taken.
pub const POOL_METADATA_PERCENT: u32 = 90;

/// From how full a thick snapshot's area is warned of, in percent.
pub(crate) const WARN_PERCENT: u32 = 80;

/// Extents of a snapshot's area beyond what it is known to hold: for its own metadata.
const SLACK_EXTENTS: u64 = 2;

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
    /// The area for a point of a volume of `size` bytes, in whole extents. lvm makes it no larger than can ever be used.
    pub(crate) fn cow_bytes(&self, size: u64, extent: u64) -> u64 {
        let share = u128::from(size) * u128::from(self.cow_percent) / 100;
        whole_extents(u64::try_from(share).unwrap_or(u64::MAX), extent, 1)
    }

    /// The area for what is known to be written once: `used` bytes.
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
