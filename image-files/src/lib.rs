//! Parts that backends of image files share, for any format.
//!
//! [`names`] creates, moves and removes names of files, each durably before it returns. [`lock`] locks an
//! image like QEMU, and [`DiskLocks`] keeps such locks for a whole operation. [`Attributes`] give a new file
//! the owner, mode and attributes of the file that it is made from.
//!
//! # Layout
//!
//! | module | content |
//! |---|---|
//! | [`layer_name`] | names of layers' files |
//! | [`chain`] | the planner of disks that are chains of files |
//! | [`clones`] | the directories and shared layers of clones |
//! | [`engine`] | parts that image engines share: file, errors, copies; the recorder of crash tests |
//! | [`layers`] | the layers of a chain, read from its files |
//! | `base` | images of other formats at which a chain ends ([`BaseFormat`]) |
//! | `file_steps`, `salvage` | steps that are the same for every format: name, switch, remove ([`FileSteps`]) |
//! | `manifests` | the directory of manifests beside a disk |
//! | `removal`, `extents` | the space that the removal of files frees |
//! | [`names`], `disk_locks`, `lock` | names, and locks that every user of the format honours |

#![deny(unsafe_code)]

mod attached;
mod base;
mod blocking;
pub mod chain;
pub mod clones;
mod configured_path;
mod discover;
mod disk_locks;
pub mod engine;
mod extents;
mod file_steps;
pub mod layer_name;
pub mod layers;
mod lock;
mod luks;
mod manifests;
pub mod names;
mod removal;
mod salvage;
mod size;

pub use attached::{AttachedRun, merge_attached};
pub use base::{BaseFormat, BaseImage, Bases};
pub use blocking::{blocking, in_place};
pub use configured_path::{look_at_path, refused_link};
pub use confined_files::{Attributes, Directory, FileName, Kind};
pub use discover::discover;
pub use disk_locks::{DiskLoan, DiskLocks, ImageLocks, borrow_image, is_held_by_others};
pub use file_steps::{FileIds, FileSteps, RESCUED, kept_layer_message, kept_overlay_message, open_files};
pub use lock::{LockError, LockMode, is_locked, lock, lock_whole};
pub use luks::{LUKS, is_luks};
pub use manifests::manifests_beside;
pub use removal::freed_by_removing;
pub use size::{size_at, size_of};
