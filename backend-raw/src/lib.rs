//! The raw backend of domsnap. A raw file has no snapshots of its own, so a point of it is another file.
//!
//! A point is taken by one of three *methods*, by what the file's place supports, or as the user requests:
//!
//! | method | what it is | where |
//! |---|---|---|
//! | `reflink` | a second file that shares the blocks of the first: instant at any size | btrfs, xfs |
//! | `copy` | a sparse copy, with a checksum beside it | anywhere, on request: it takes time and space |
//! | `overlay` | the raw file is frozen, and a qcow2 overlay on it receives all later writes | with `--active-path=new` |
//!
//! With the first two the configured path stays the file that the domain writes. A point is `<stem>.ds-<8
//! hex>.<ext>` beside it, and has no backing file. After the third the disk has another path and format, and
//! belongs to backend-qcow2, on a raw base.
//!
//! Files of a machine's state (`state.rs`) are raw files too, of formats of their own: `nvram`, `tpm`.
//!
//! An image is raw because the user stated it. This crate never probes the content.

#![forbid(unsafe_code)]

mod backend;
mod copy;
mod layers;
mod place;
mod plan;
mod reading;
mod state;
mod steps;

use std::sync::Arc;

pub use backend::Raw;
pub use place::can_reflink;

/// Registers the backends of raw disks, of firmware variables, and of the state of TPMs.
///
/// # Errors
/// If the registry has a backend for one of these already.
pub fn register(registry: &mut snapcore::Registry) -> snapcore::Result<()> {
    registry.register(Arc::new(Raw::new()))?;
    registry.register(Arc::new(Raw::firmware_variables()))?;
    registry.register(Arc::new(Raw::tpm()))
}
