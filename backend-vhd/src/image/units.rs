//! Sizes and identities as types of their own.

use std::fmt;

/// Bytes in a sector: the unit of every position in a VHD.
pub const SECTOR: u64 = 512;
/// The largest disk that the format can address by its 32-bit sector numbers: 2040 GiB, like Windows and
/// XenServer.
pub const MAX_SIZE: u64 = 2040 << 30;
/// The page of the layout that this engine writes. Blocks start on a page boundary.
pub const PAGE: u64 = 4096;

/// The block size of a dynamic or differencing image: a power of two from 512 bytes to 32 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSize(u32);

impl BlockSize {
    /// 2 MiB, the only size that every reader knows.
    pub const DEFAULT: Self = Self(2 << 20);

    /// Returns `None` for a size that is not a power of two from 512 bytes to 32 MiB.
    pub fn new(bytes: u32) -> Option<Self> {
        (bytes.is_power_of_two() && (512..=32 << 20).contains(&bytes)).then_some(Self(bytes))
    }

    /// Bytes of data in a block.
    pub const fn bytes(self) -> u64 {
        self.0 as u64
    }

    /// Sectors of data in a block.
    pub const fn sectors(self) -> u64 {
        self.bytes() / SECTOR
    }

    /// Bytes of the bitmap in front of the data: one bit a sector, in whole sectors.
    pub const fn bitmap_bytes(self) -> u64 {
        let bytes = self.sectors().div_ceil(8);
        bytes.div_ceil(SECTOR) * SECTOR
    }

    /// Bytes of a block in the file: bitmap and data.
    pub const fn stored_bytes(self) -> u64 {
        self.bitmap_bytes() + self.bytes()
    }

    /// Number of blocks of a disk.
    pub const fn blocks_for(self, size: u64) -> u64 {
        size.div_ceil(self.bytes())
    }
}

/// The unique id of an image. The null id in a child means that its parent is a raw file.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UniqueId(pub [u8; 16]);

impl UniqueId {
    /// The id of no image.
    pub const NULL: Self = Self([0; 16]);

    /// Makes a new random id.
    pub fn random() -> Self {
        Self(uuid::Uuid::new_v4().into_bytes())
    }

    /// Returns true for the id of no image.
    pub fn is_null(self) -> bool {
        self == Self::NULL
    }
}

impl fmt::Display for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&uuid::Uuid::from_bytes(self.0), f)
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Seconds since the start of the year 2000 (UTC), the epoch of the format's time stamps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct TimeStamp(pub u32);

/// Start of the year 2000 in Unix time.
const EPOCH: i64 = 946_684_800;

impl TimeStamp {
    /// Converts from seconds of Unix time. Times that the format does not have become its first or last.
    pub fn from_unix(seconds: i64) -> Self {
        let since = seconds.saturating_sub(EPOCH).max(0);
        Self(u32::try_from(since).unwrap_or(u32::MAX))
    }

    /// Seconds of Unix time.
    pub fn to_unix(self) -> i64 {
        i64::from(self.0) + EPOCH
    }

    /// The current time.
    pub fn now() -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Self::from_unix(i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Block sizes are powers of two from 512 bytes to 32 MiB.
    #[test]
    fn block_sizes_are_powers_of_two() {
        for bytes in [512, 512 << 10, 2 << 20, 4 << 20, 32 << 20] {
            assert!(BlockSize::new(bytes).is_some(), "{bytes}");
        }
        for bytes in [0, 1, 256, 3 << 20, 64 << 20, 1 << 31, u32::MAX] {
            assert!(BlockSize::new(bytes).is_none(), "{bytes}");
        }
        assert_eq!(BlockSize::DEFAULT.bitmap_bytes(), 512);
        assert_eq!(BlockSize::new(32 << 20).unwrap().bitmap_bytes(), 8192);
        assert_eq!(BlockSize::new(512).unwrap().bitmap_bytes(), 512);
        assert_eq!(BlockSize::DEFAULT.blocks_for(MAX_SIZE), 1_044_480);
    }
}
