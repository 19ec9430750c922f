//! The on-disk structures as they lie in the file: big-endian, unaligned, unchecked. Only parsers and
//! encoders of this engine use them.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// `QFI\xfb`.
pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// Length of a version 2 header.
pub(crate) const V2_LENGTH: usize = 72;
/// Least length of a version 3 header.
pub(crate) const V3_LENGTH: usize = 104;

/// The header's fields in both versions.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawHeaderV2 {
    pub magic: U32,
    pub version: U32,
    pub backing_file_offset: U64,
    pub backing_file_size: U32,
    pub cluster_bits: U32,
    pub size: U64,
    pub crypt_method: U32,
    pub l1_size: U32,
    pub l1_table_offset: U64,
    pub refcount_table_offset: U64,
    pub refcount_table_clusters: U32,
    pub nb_snapshots: U32,
    pub snapshots_offset: U64,
}

/// The fields that version 3 adds.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawHeaderV3 {
    pub incompatible_features: U64,
    pub compatible_features: U64,
    pub autoclear_features: U64,
    pub refcount_order: U32,
    pub header_length: U32,
}

/// The head of a header extension; its data and padding to 8 bytes follow.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawExtension {
    pub magic: U32,
    pub length: U32,
}

/// The fixed part of a snapshot table entry; extra data, id, name and padding to 8 bytes follow.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawSnapshot {
    pub l1_table_offset: U64,
    pub l1_size: U32,
    pub id_size: U16,
    pub name_size: U16,
    pub date_seconds: U32,
    pub date_nanoseconds: U32,
    pub vm_clock_ns: U64,
    pub vm_state_size: U32,
    pub extra_data_size: U32,
}

/// The bitmaps header extension.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawBitmapsExtension {
    pub count: U32,
    pub reserved: U32,
    pub directory_size: U64,
    pub directory_offset: U64,
}

/// The fixed part of a bitmap directory entry; extra data, name and padding to 8 bytes follow.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawBitmap {
    pub table_offset: U64,
    pub table_size: U32,
    pub flags: U32,
    pub kind: u8,
    pub granularity_bits: u8,
    pub name_size: U16,
    pub extra_data_size: U32,
}

/// The full disk encryption header pointer extension.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct RawCryptoPointer {
    pub offset: U64,
    pub length: U64,
}

const _: () = {
    assert!(size_of::<RawHeaderV2>() == V2_LENGTH);
    assert!(size_of::<RawHeaderV2>() + size_of::<RawHeaderV3>() == V3_LENGTH);
    assert!(size_of::<RawExtension>() == 8);
    assert!(size_of::<RawSnapshot>() == 40);
    assert!(size_of::<RawBitmapsExtension>() == 24);
    assert!(size_of::<RawBitmap>() == 24);
    assert!(size_of::<RawCryptoPointer>() == 16);
};
