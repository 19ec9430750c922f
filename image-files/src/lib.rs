//! What backends of image files share, whatever the images' format.
//!
//! [`names`] gives files names and takes them away, each durable before it returns; [`lock`] is QEMU's way of locking an
//! image, and [`Holds`] keeps such locks for a whole operation; [`Attributes`] let those use a new file
//! who could use the one that it is made from.

#![deny(unsafe_code)]

mod blocking;
mod extents;
mod hold;
mod lock;
mod luks;
pub mod names;
mod size;

pub use blocking::{blocking, in_place};
pub use confined_files::{Attributes, Directory, FileName, Kind};
pub use extents::{allocated_in, unshared};
pub use hold::{Hold, Holds, is_held_by_others};
pub use lock::{LockError, LockMode, is_locked, lock};
pub use luks::is_luks;
pub use size::{size_at, size_of};
