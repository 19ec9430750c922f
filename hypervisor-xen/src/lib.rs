//! Live domains of Xen, as the hypervisor that [`snapcore`] asks for ([`Xen`]).
//!
//! | module | subject |
//! |---|---|
//! | `xl` | the program: found once, run with a deadline and no shell |
//! | `list` | which domains there are, in which state, and their configurations |
//! | `seen` | a domain as it is described; what serves each of its disks |
//! | `memory` | the memory image: xl's own save file, and beside it its checksums |
//! | `live` | [`snapcore::LiveDomain`]: a connection, and which step is done where |
//! | `disk` | [`snapcore::AttachedDisk`]: one disk of it |
//! | `instant` | the instant of a snapshot |
//! | `window` | a domain that is ended for a revert, and made anew |
//! | `users` | which files running domains have open: QEMU takes no locks for Xen |
//!
//! # Who does what
//!
//! Xen has no snapshots: it can save a domain's memory into a file while the domain stands still, end it, and make one from such a
//! file. The disks are served by others. Where that is a QEMU (`qdisk`), its QMP socket is spoken to by [`hypervisor_qemu`],
//! to which that QEMU is a machine as any other: it puts overlays on top, takes internal snapshots and merges, under a guest that
//! is paused here. Disks that dom0's kernel serves (`phy`) are their backends': of logical volumes lvm's.
//!
//! Xen learns nothing of any of this: a disk's configured path always is its active image.
#![forbid(unsafe_code)]

mod disk;
mod instant;
mod list;
mod live;
mod memory;
mod saver;
mod seen;
mod users;
mod window;
mod xl;

pub use saver::{Xen, register};
