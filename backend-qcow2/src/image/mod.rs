//! The qcow2 image engine: reads, checks and changes qcow2 images by itself.
//!
//! The engine uses blocking, positioned I/O and knows nothing of domains or plans. The specification is
//! QEMU's `docs/interop/qcow2.rst`. Where QEMU has a limit of its own, this engine has the same limit, by the
//! same number.
//!
//! # Layout
//! * `units`, `layout`: the basic types. Errors and the image file are those of [`image_files::engine`].
//! * `header`, `mapping`, `tables`, `refcount`, `snapshot_table`, `bitmaps`, `compressed`: one on-disk
//!   structure each.
//! * `open`: [`Image`], which holds them together.
//! * `snapshot`, `create`, `resize`, `backing`, `check`, and [`ActiveWriter`] in `writer`: the operations
//!   that change an image.
//! * `sizes`, `growth`: what a delete of snapshots frees, and what a merge adds, without doing them.
//!
//! # What is durable before what
//! An operation takes effect with the write of the header sector (the first 512 bytes). Everything that the
//! new header refers to is durable before that write. What only the old header referred to is freed after
//! that write is durable. A refcount is raised before the reference exists and lowered after the reference is
//! gone.
//!
//! So a crash may happen at any point, and any part of what was not flushed may be lost. The image then shows
//! either the state before the operation or the state after it. At worst it has leaked clusters and clear
//! COPIED bits. [`Image::repair`] corrects both without touching data. The documentation of each operation
//! states its own order.
//!
//! # Images are attacks until parsed
//! Every number from an image is checked before use. Named constants bound memory. No content of an image
//! makes this code panic.

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
mod difference;
mod growth;
mod header;
mod layout;
mod mapping;
mod materialise;
mod merge;
#[cfg(test)]
mod merge_crash_tests;
mod open;
mod overlap;
mod point;
mod punch;
mod refcount;
mod references;
mod reserve;
mod resize;
mod sequential;
mod sizes;
mod snapshot;
mod snapshot_table;
mod tables;
mod touched;
mod units;
mod view;
mod writer;

pub use bitmaps::{Bitmap, list as list_bitmaps, parse_directory as parse_bitmap_directory};
pub use check::{CheckReport, Finding};
pub use compare::same_content;
pub use compressed::{compress, decompress};
pub use create::{NewImage, create, write_into};
#[cfg(test)]
use image_files::engine::recorder;
use image_files::engine::{error, file, transfer};

pub use difference::{Under, differences};
pub use error::{Context, Error, ErrorKind, Result};
pub use file::ImageFile;
pub use growth::{MergeGrowth, merge_growth};
pub use header::{Backing, BitmapsPointer, Compression, Encryption, Extension, Header, HeaderSummary};
pub use mapping::{CompressedExtent, Geometry, L2Entry, Mapping, SUBCLUSTERS};
pub use materialise::materialise;
pub use merge::{MergeReport, RunBacking, merge};
pub use open::{Image, OpenOptions, probe, stated_backing};
pub use point::{BottomReader, PointReader};
pub use refcount::{entry_of_block as refcount_of_block, parse_table as parse_reftable};
pub use sequential::Sequential;
pub use sizes::{Freed, Sizes};
pub use snapshot::{Deleted, NewSnapshot};
pub use snapshot_table::{Snapshot, encode as encode_snapshot_table, parse as parse_snapshot_table};
pub use tables::{L1Table, L2Table};
pub use transfer::Moving;
pub use units::{ClusterBits, ClusterIndex, GuestCluster, GuestOffset, HostOffset};
pub use view::{ChainReader, Content, Piece, RunLayer, View, visible_bytes};
pub use writer::{ActiveWriter, InPlace};
