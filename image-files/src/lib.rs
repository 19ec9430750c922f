//! Parts that backends of image files share, for any format.
//!
//! [`names`] creates, moves and removes names of files, each durably before it returns. [`lock`] locks an
//! image like QEMU, and [`Holds`] keeps such locks for a whole operation. [`Attributes`] give a new file the
//! owner, mode and attributes of the file that it is made from.

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
