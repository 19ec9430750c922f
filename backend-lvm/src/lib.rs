//! The LVM backend of domsnap: disks that are logical volumes, thin or thick.
//!
//! Everything is done by lvm2's own commands, and everything that is known is read from their JSON reports: nothing is kept beside
//! the volume group but a lock file.
//!
//! # The life of a volume
//!
//! The volume that a domain writes keeps its name, so its configured path never changes. A *point* is a snapshot volume with a
//! permanent name, `LV.ds-<8 hex>`, in the same group. It carries tags that tell of which snapshot it is, so that points can be taken in
//! again from the group alone.
//!
//! ```text
//! create         lvcreate -s                       in the cut
//! revert, thin   lvcreate -s LV.ds-X-new of the point; in the cut lvrename LV LV.ds-X-old, lvrename LV.ds-X-new LV;
//!                then lvremove LV.ds-X-old
//! revert, thick  in the cut lvcreate -s (a safety snapshot), lvconvert --merge of the point, and lvcreate -s of the point again,
//!                because a merge consumes it; then lvremove of the safety snapshot
//! delete         lvremove, all points in one call
//! ```
//!
//! # What is durable before what
//!
//! A command of lvm2 commits the group's metadata once, at once and durably; a crash leaves the state before or after it. Where a step has two
//! commands, its `status` tells by what exists which of them were done, and both repeating and undoing it start from there:
//!
//! * Between the two renames of a thin revert **the configured name is absent**, for the time of one command. A crash there leaves it
//!   absent until `domsnap recover`, which gives it to the former present (or, by hand: `lvrename VG LV.ds-X-old LV`).
//! * Between the merge of a thick revert and the making anew of its point, that point is held by the volume itself alone. A domain that is
//!   started there, before `domsnap recover`, changes it; recovery tells that, and keeps what the domain wrote.
//!
//! A child that a killed `domsnap` leaves goes on to its end: it is in a process group of its own, writes to files and not to pipes, and has
//! the volume's lock as its standard input. So a recovery begins after it has ended.

#![forbid(unsafe_code)]

mod backend;
mod check;
mod command;
mod device;
mod discover;
mod hold;
mod layers;
mod names;
mod plan;
mod report;
mod rules;
mod steps;
mod tags;

use std::sync::Arc;

pub use backend::Lvm;
pub use command::{Answer, Call, Commands, Runner};
pub use rules::{COW_PERCENT, POOL_DATA_PERCENT, POOL_METADATA_PERCENT};

/// Registers the backend with its usual rules.
///
/// # Errors
/// Where the registry has a backend for volumes already.
pub fn register(registry: &mut snapcore::Registry) -> snapcore::Result<()> {
    registry.register(Arc::new(Lvm::new()))
}
