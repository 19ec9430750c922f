//! Directories of exported snapshots.
//!
//! An export is a copy of a snapshot that any QEMU restores without domsnap: a qcow2 image for each disk,
//! and the memory image, firmware variables and a TPM's state as they are. The image of the first export of
//! a disk has all of its data. A later one can have only what changed since another export; it then is an
//! overlay on that one's image. So the directory grows by what changes, and what is in it does not change:
//! file-wise backup programs copy each file once.
//!
//! ```text
//! DIR/manifest.json               all exports: snapshot, files, sizes, SHA-256, parent
//!     vda.monday.qcow2            a full image
//!     vda.tuesday.qcow2           an overlay on ./vda.monday.qcow2
//!     tuesday.memory              the memory image of the hypervisor
//!     pflash1.tuesday.nvram       firmware variables, as the file that QEMU uses
//!     .domsnap-0.part             a file that is being written
//!     .domsnap-pending.json       exports whose files are complete and are getting their names
//! ```
//!
//! # What is durable before what
//! 1. Each file is written as `.domsnap-N.part`, and flushed. A crash leaves such files. The next work on the
//!    directory removes them.
//! 2. `.domsnap-pending.json` is written, flushed and renamed. It has the next manifest, and for each file
//!    the name that it has and the one that it gets. This is the commit point: a crash after it is completed
//!    by the next work on the directory.
//! 3. The files get their names; the directory is flushed.
//! 4. `manifest.json` is replaced, durably. Then the pending one is removed.
//!
//! So every export in `manifest.json` is whole. A process that works on the directory has a lock on it.
//!
//! # Nothing in the directory is trusted
//! It may have been copied from anywhere. All work goes through its descriptor, no link is followed, names
//! are compared with those that the snapshot and the disk give, sizes and checksums are verified before
//! anything is used ([`Manifest`], [`restore`]).

#![forbid(unsafe_code)]

mod copy;
mod manifest;
mod place;
pub mod restore;

pub use copy::{DiskSource, MemorySource, Sources, StateSource, Watch};
pub use manifest::{Export, ExportId, ExportedDisk, ExportedFile, ExportedSnapshot, ExportedState, Manifest};
pub use place::{ExportPlace, NewExport, Planned, image_bytes, write_raw};
