//! The raw backend of domsnap. A raw file knows no snapshot of its own, so a point of it is another file.
//!
//! A point is taken in one of three *ways*, by what the file's place can do, or as the user asks:
//!
//! | way | what it is | where |
//! |---|---|---|
//! | `reflink` | a second file that shares the first one's blocks: instant, whatever its size | btrfs, xfs |
//! | `copy` | a sparse copy, with a checksum beside it | anywhere, and only where asked for: it takes time and room |
//! | `overlay` | the raw file is frozen, and a qcow2 overlay on it takes what is written from then on | only with `--active-path=new`: the disk has another path and format afterwards |
//!
//! With the first two the configured path stays the file that the domain writes; a point is `<stem>.ds-<8 hex>.<ext>`
//! beside it, and stands on nothing. After the third the disk is backend-qcow2's, on a raw base.
//!
//! That an image is raw is because it was said; nothing here looks into it.

#![forbid(unsafe_code)]

mod backend;
mod copy;
mod layers;
mod place;
mod plan;
mod steps;

use std::sync::Arc;

pub use backend::Raw;
pub use place::can_reflink;

/// Registers the backend.
///
/// # Errors
/// Where the registry has a backend for raw already.
pub fn register(registry: &mut snapcore::Registry) -> snapcore::Result<()> {
    registry.register(Arc::new(Raw::new()))
}
