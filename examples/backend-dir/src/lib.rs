//! An example of a backend: points of a file are whole copies of it, in a directory beside it.
//!
//! ```text
//! /vm/web.img                        what the domain writes
//! /vm/web.img.points/TAG             a point: a whole copy
//! /vm/web.img.points/*.part, next-*  not yet anything: an undo removes them
//! /vm/web.img.points/rescued-TAG     what a domain wrote after a crash, and an undo would have lost
//! ```
//!
//! [`Copies`] is the backend (`backend.rs`), `step.rs` has what it does to the disk, step by step, `files.rs`
//! how files are made durable, `lock.rs` the lock. `docs/backend-authors.md` describes how it came to be.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod backend;
mod files;
mod lock;
mod step;

use std::sync::Arc;

pub use backend::Copies;

/// Makes a program know the format `dir`.
///
/// # Errors
/// Where the registry has a backend for it already.
pub fn register(registry: &mut snapcore::Registry) -> snapcore::Result<()> {
    registry.register(Arc::new(Copies::default()))
}
