//! The VHD image engine: reads, checks and changes VHD images and chains of them by itself.
//!
//! The engine uses blocking, positioned I/O and knows nothing of domains or plans. The specification is
//! Microsoft's "Virtual Hard Disk Image Format Specification" of 2006. Where programs disagree about it, the
//! module of the structure says what this engine does and why.
//!
//! # Layout
//! * `units`, `layout`: the basic types. Errors and the image file are those of [`image_files::engine`].
//! * `footer`, `header`, `locator`, `bat`, `bitmap`, `batmap`: one on-disk structure each.
//! * `open`: [`Vhd`], which holds them together; `space`: holes of fixed images.
//! * `unflushed`: what a server notes of writes that are not durable.
//! * `writer`, `create`, `check`: what changes and checks one image.
//! * `rehead`, `resize`, `repair`: changes of an image's parent and size, and of what a crash has left.
//! * `chain`: [`Chain`], several images as one disk; `parent` finds them; `merge` and `materialise` move
//!   data.
//!
//! # The file of a new image
//! ```text
//! 0     copy of the footer   \
//! 512   header                > one page, written at once: identity, parent and locator change together
//! 1536  locator (W2ru)       /
//! 4096  BAT
//!       blocks: bitmap in the last sector of a page, data from the next page on
//! end   footer
//! ```
//! Nothing is between the BAT and the first block, because QEMU's first allocation would overwrite it.
//!
//! # Images are attacks until parsed
//! Every number from an image is checked before use. Named constants bound memory. No content of an image
//! makes this code panic.

mod bat;
mod batmap;
mod below;
mod bitmap;
mod chain;
mod check;
#[cfg(test)]
mod crash_tests;
mod create;
mod finding;
mod footer;
mod header;
mod layout;
mod locator;
mod materialise;
mod merge;
mod open;
mod parent;
mod rehead;
mod repair;
mod resize;
mod space;
#[cfg(test)]
#[path = "../../tests/support/mod.rs"]
mod support;
mod unflushed;
mod units;
mod writer;

use image_files::engine::{error, file, transfer};

pub use chain::{Chain, Layer, Piece, RawLayer};
pub use create::{NewImage, bytes_of_new, write_into};
pub use error::{Context, Error, ErrorKind, Result};
pub use file::ImageFile;
pub use finding::{Finding, Severity};
pub use footer::{CREATOR, DiskType, Footer, FooterPlace};
pub use header::{Header, ParentName};
pub use locator::Locator;
pub use materialise::{Materialised, materialise};
pub use merge::{merge, merge_growth, visible_bytes};
pub use open::{OpenOptions, Vhd};
pub use parent::{ChainOptions, DEFAULT_DEPTH, FoundBy, Parent, find_copies, find_parent};
pub use space::Extent;
pub use transfer::Moving;
pub use unflushed::Unflushed;
pub use units::{BlockSize, MAX_SIZE, SECTOR, TimeStamp, UniqueId};
