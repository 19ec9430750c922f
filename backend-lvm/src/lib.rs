//! The LVM backend of domsnap: disks that are logical volumes, thin or thick.
//!
//! lvm2's own commands do all the work, and all information is read from their JSON reports. Nothing is
//! stored beside the volume group but a lock file.
//!
//! # The life of a volume
//!
//! The volume that a domain writes keeps its name, so its configured path never changes. A *point* is a
//! snapshot volume with a permanent name, `LV.ds-<8 hex>`, in the same group. Its tags identify its snapshot,
//! so that points can be imported again from the group alone.
//!
//! ```text
//! create         lvcreate -s                       in the cut
//! revert, thin   lvcreate -s LV.ds-X-new of the point;
//!                in the cut lvrename LV LV.ds-X-old, lvrename LV.ds-X-new LV; then lvremove LV.ds-X-old
//! revert, thick  in the cut lvcreate -s (a safety snapshot), lvconvert --merge of the point,
//!                and lvcreate -s of the point again, because a merge consumes it;
//!                then lvremove of the safety snapshot
//! delete         lvremove, all points in one call
//! ```
//!
//! # Order of durability
//!
//! A command of lvm2 commits the group's metadata atomically and durably, and most commands do that once; a
//! crash leaves the state before or after the commit. If a step has several commits, its `status` shows by
//! the existing volumes which of them were done. Repeating and undoing both start from there:
//!
//! * `lvcreate -s` of a thick volume commits twice: first a plain volume with all tags, which is then zeroed;
//!   then its conversion to a snapshot. A failure or a crash between the two leaves the plain volume. So the
//!   tags do not show that a thick snapshot is complete; its kind and its origin do. A plain volume with the
//!   tags is never merged: it is removed, and the snapshot is taken again if it is needed.
//! * Between the two renames of a thin revert **the configured name is absent**, for the time of one command.
//!   A crash there leaves it absent until `domsnap recover`, which gives it to the previous volume (or, by
//!   hand: `lvrename VG LV.ds-X-old LV`).
//! * Between the merge of a thick revert and the new snapshot of its point, only the volume itself has the
//!   point's data. If a domain is started then, before `domsnap recover`, it changes that data; recovery
//!   reports this, and keeps what the domain wrote.
//!
//! A child that a killed `domsnap` leaves continues to its end: it is in its own process group, writes to
//! files and not to pipes, and has the volume's lock as its standard input. So a recovery begins after the
//! child has ended.

#![forbid(unsafe_code)]

mod backend;
mod check;
mod command;
mod device;
mod discover;
mod layers;
mod lock;
mod names;
mod plan;
mod report;
mod rules;
mod steps;
mod tags;

use std::sync::Arc;

pub use backend::Lvm;
pub use command::{Answer, Commands, Invocation, Runner};
pub use rules::{COW_PERCENT, POOL_DATA_PERCENT, POOL_METADATA_PERCENT};

/// Registers the backend with its usual rules.
///
/// # Errors
/// If the registry has a backend for volumes already.
pub fn register(registry: &mut snapcore::Registry) -> snapcore::Result<()> {
    registry.register(Arc::new(Lvm::new()))
}
