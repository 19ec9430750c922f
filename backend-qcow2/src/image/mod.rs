//! The qcow2 image engine: reads, checks and changes qcow2 images by itself.
//!
//! It is blocking and positioned, and knows nothing of domains or plans. The specification is QEMU's
//! `docs/interop/qcow2.rst`; where QEMU has a limit of its own, so has this engine, by the same number.
//!
//! # Rooms
//! `units`, `error`, `layout` are the words; `file` the file; `header`, `mapping`, `tables`, `refcount`,
//! `snapshot_table`, `bitmaps`, `compressed` one on-disk structure each; [`Image`] in `open` holds them together;
//! `snapshot`, `create`, `resize`, `backing`, `check` and [`ActiveWriter`] in `writer` change it.
//!
//! # What is durable before what
//! The header sector (the first 512 bytes) is where an operation happens: everything that the new header names is
//! durable before it is written, and what only the old header named is given back after it is durable. Refcounts go
//! up before there is a reference and down after it is gone. So a crash at any instant, with any part of what was not
//! flushed lost, leaves an image that is wholly before or wholly after the operation, with leaked clusters and clear
//! COPIED bits at worst; [`Image::repair`] mends both without touching data. Each operation's page says its own order.
//!
//! # Images are attacks until parsed
//! Every number from an image is checked before use, memory is bounded by named constants, and nothing here panics on
//! what an image says.

mod backing;
mod bitmaps;
mod check;
mod compare;
mod compressed;
#[cfg(test)]
mod crash_tests;
mod create;
#[cfg(test)]
mod damage_tests;
mod error;
mod file;
mod header;
mod layout;
mod mapping;
mod materialise;
mod merge;
#[cfg(test)]
mod merge_crash_tests;
mod open;
mod overlap;
mod punch;
#[cfg(test)]
mod recorder;
mod refcount;
mod references;
mod reserve;
mod resize;
mod snapshot;
mod snapshot_table;
mod tables;
mod touched;
mod transfer;
mod units;
mod view;
mod writer;

pub use bitmaps::{Bitmap, list as list_bitmaps, parse_directory as parse_bitmap_directory};
pub use check::{CheckReport, Finding};
pub use compare::same_content;
pub use compressed::{compress, decompress};
pub use create::{NewImage, create, write_into};
pub use error::{Context, Error, ErrorKind, Result};
pub use file::ImageFile;
pub use header::{Backing, BitmapsPointer, Compression, Encryption, Extension, Header, HeaderSummary};
pub use mapping::{CompressedExtent, Geometry, L2Entry, Mapping, SUBCLUSTERS};
pub use materialise::materialise;
pub use merge::{Below, MergeReport, Moving, merge};
pub use open::{Image, OpenOptions, probe, stated_backing};
pub use refcount::{entry_of_block as refcount_of_block, parse_table as parse_reftable};
pub use snapshot::{Deleted, NewSnapshot};
pub use snapshot_table::{Snapshot, encode as encode_snapshot_table, parse as parse_snapshot_table};
pub use tables::{L1Table, L2Table};
pub use units::{ClusterBits, ClusterIndex, GuestCluster, GuestOffset, HostOffset};
pub use view::{ChainReader, Content, Layer, Piece, View, visible_bytes};
pub use writer::{ActiveWriter, InPlace};
