//! File work in directories that others may own.
//!
//! domsnap runs as root on directories that QEMU's user or a tenant owns. The owner of a directory can put a
//! symbolic link, a FIFO or another file under any name in it, at any moment. So a [`Directory`] is opened
//! once, and all work goes through its descriptor with [`FileName`]s: single components that cannot lead out
//! of it.
//!
//! | rule | where |
//! |---|---|
//! | a name is one component: no `/`, not `.` or `..`, no NUL, 255 bytes at most | [`FileName::new`] |
//! | the way to a directory follows symbolic links of trusted users in trusted places alone | [`Directory::open`] |
//! | a file is opened without following a link and without waiting, and is then asked what it is | [`Directory::open_file`] |
//! | a new file is one that this process made (`O_EXCL`) | [`Directory::create_new`], [`Directory::create_like`] |
//! | owner, mode and attributes are set on descriptors, never by name | [`copy_attributes`] |
//! | what gets another name is the file that was looked at before | [`Directory::link`], [`Directory::rename_new`] |
//!
//! *Trusted* users are root, the user who runs this process, and the owner of `/` (who is root where a user
//! namespace does not map it).

#![forbid(unsafe_code)]

mod access;
mod attributes;
mod directory;
mod name;
mod trust;

pub use attributes::{Attributes, copy_attributes};
pub use directory::{
    Directory, DirectoryLock, Kind, Look, create_private, is_trusted_link, open, open_regular, open_to_write,
    refusal, refused, remove, rename, sync_directory_of,
};
pub use name::{BadName, FileName};
pub use trust::{Writers, foreign_place, foreign_writers, is_trusted};
