//! The memory image: a guest's RAM and device state, in one file that can be used in three ways.
//!
//! QEMU writes its stream into the file, at an offset. Around it this crate writes a small qcow2 image, whose
//! one internal snapshot has the stream as its VM state. So the same file serves
//!
//! 1. a revert in the running process ([`restore_in_place`], by `snapshot-load`);
//! 2. a cold start (`-incoming` and [`Image::incoming`]; or `-incoming defer` and [`restore_deferred`]);
//! 3. a look at it with `qemu-img`.
//!
//! ```text
//! 0        qcow2 header       written last, when all else is durable
//! 2 MiB    reference counts, tables, snapshot table
//! 14 MiB   record: length and checksums of the stream, the caller's metadata
//! 16 MiB   the stream, as QEMU wrote it
//! ```
//!
//! The record's cluster belongs to the snapshot (behind its VM state), so a check finds the image clean. No
//! process writes the image after it is sealed. For a revert QEMU writes into an overlay in memory instead
//! (`restore.rs`), so one image may be restored many times, by several machines at once.
//!
//! An image may be compressed instead ([`Packed`]), and is unpacked before it is loaded; [`Stored`] is
//! either.
//!
//! # Order of writing
//!
//! A [`Draft`] is `.NAME.part` beside its final name, with mode 0600 before its first byte is written.
//! [`Draft::seal`]: the tables and the record are written; all is flushed (the stream too); the header is
//! written; it is flushed; the file gets its name, which must be free; the directory is flushed. So a file
//! with the final name is complete, and any other is not an image. [`Draft::pack`]: `.NAME.packing` is
//! written; it is flushed; its record is written; it is flushed; it gets the name; the draft is removed; the
//! directory is flushed.

mod draft;
mod global_state;
mod image;
mod incoming;
mod packed;
mod record;
mod restore;
mod saved;
mod stored;

pub use draft::Draft;
pub use image::{Image, Incoming};
pub(crate) use image::{checksums, incoming_argument};
pub use incoming::{restore_deferred, restore_split};
pub use packed::{Packed, Packing};
pub(crate) use record::{LONGEST_METADATA, PART, Record};
pub(crate) use restore::memory_file;
pub use restore::{Restored, restore_in_place};
pub(crate) use saved::save;
pub use stored::Stored;
