//! The qcow2 backend of domsnap: disks at rest, with an image engine of its own.
//!
//! [`Qcow2`] is what a program registers. [`image`] is the engine below it: it reads and writes images, and knows
//! nothing of domains.

#![forbid(unsafe_code)]

mod attached;
mod backend;
mod backing_string;
mod below;
mod dependents;
mod discover;
pub mod image;
mod layers;
mod preflight;
mod refusal;
mod salvage;
mod steps;

use std::sync::Arc;

pub use backend::{DEFAULT_MAX_DEPTH, Qcow2};
pub use dependents::find_dependents;

/// Registers the backend with its usual limits.
///
/// # Errors
/// Where the registry has a backend for qcow2 already.
pub fn register(registry: &mut snapcore::Registry) -> snapcore::Result<()> {
    registry.register(Arc::new(Qcow2::new()))
}
