//! The VHD backend of domsnap, with an image engine of its own.
//!
//! A program registers [`VhdFiles`]. [`image`] is the engine below it: it reads and writes images and chains
//! of them, and knows nothing of domains.

#![forbid(unsafe_code)]

mod attached;
mod backend;
mod base;
mod clone;
pub mod image;
mod layers;
mod reading;
mod refusal;
mod salvage;
mod served;
mod steps;
mod under_qcow2;

pub use backend::{VhdFiles, register};
pub use base::VhdBase;
pub use layers::find_children;
pub use served::{ServedChain, ServedChild, ServedMerge, ServedOptions, notes_of, require_complete};
pub use steps::{parent_name_for, write_child};
