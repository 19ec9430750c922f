//! The structures as they are in the file: big-endian, packed.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The footer, and its copy at the start of an image that is not fixed.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(super) struct RawFooter {
    pub cookie: [u8; 8],
    pub features: U32,
    pub version: U32,
    pub data_offset: U64,
    pub time_stamp: U32,
    pub creator: [u8; 4],
    pub creator_version: U32,
    pub creator_os: [u8; 4],
    pub original_size: U64,
    pub current_size: U64,
    pub cylinders: U16,
    pub heads: u8,
    pub sectors: u8,
    pub disk_type: U32,
    pub checksum: U32,
    pub unique_id: [u8; 16],
    pub saved_state: u8,
    /// blktap's mark of a frozen parent.
    pub hidden: u8,
    pub reserved: [u8; 426],
}

/// One entry of the header's table of parent locators.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(super) struct RawLocator {
    pub code: [u8; 4],
    /// Sectors by the specification, bytes in what other programs write.
    pub data_space: U32,
    pub data_length: U32,
    pub reserved: U32,
    pub data_offset: U64,
}

/// The header of a dynamic or differencing image.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(super) struct RawHeader {
    pub cookie: [u8; 8],
    pub data_offset: U64,
    pub table_offset: U64,
    pub version: U32,
    pub max_entries: U32,
    pub block_size: U32,
    pub checksum: U32,
    pub parent_id: [u8; 16],
    pub parent_time: U32,
    pub reserved1: U32,
    pub parent_name: [u8; 512],
    pub locators: [RawLocator; 8],
    pub reserved2: [u8; 256],
}

/// The header of blktap's batmap.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, PartialEq, Eq)]
#[repr(C)]
pub(super) struct RawBatmap {
    pub cookie: [u8; 8],
    pub offset: U64,
    /// Sectors.
    pub size: U32,
    pub version: U32,
    pub checksum: U32,
    pub marker: u8,
    pub key_hash: [u8; 36],
    pub reserved: [u8; 447],
}

const _: () = assert!(size_of::<RawFooter>() == 512);
const _: () = assert!(size_of::<RawLocator>() == 24);
const _: () = assert!(size_of::<RawHeader>() == 1024);
const _: () = assert!(size_of::<RawBatmap>() == 512);

/// The sum of all bytes.
pub(super) fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)))
}

/// The checksum of a structure: the ones' complement of the sum of its bytes without the checksum itself.
pub(super) fn checksum(bytes: &[u8], stored: U32) -> u32 {
    !sum(bytes).wrapping_sub(sum(stored.as_bytes()))
}
