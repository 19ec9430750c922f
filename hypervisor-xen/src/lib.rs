//! XenDomain domains of Xen: the hypervisor driver for Xen that [`snapcore`] asks for ([`Xen`]).
//!
//! | module | subject |
//! |---|---|
//! | `xl` | the program: found once, run with a deadline and no shell |
//! | `list` | the existing domains, their states and configurations |
//! | `describe` | the description of a domain, and the server of each of its disks |
//! | `memory` | the memory image: xl's own save file, and beside it its checksums |
//! | `live` | [`snapcore::hypervisor::LiveDomain`]: a connection, and the place where each step is done |
//! | `disk` | [`snapcore::hypervisor::AttachedDisk`]: one disk of it |
//! | `cut` | the cut of a snapshot |
//! | `section` | detached sections: a domain that is destroyed for a revert and created again |
//! | `users` | the files that running domains have open: QEMU takes no locks for Xen |
//!
//! # Division of work
//!
//! Xen has no snapshots. It can save a domain's memory into a file while the domain is paused, destroy a
//! domain, and restore one from such a file. The disks are served by other programs. If that is a QEMU
//! (`qdisk`), [`hypervisor_qemu`] uses its QMP socket like that of any other machine. That QEMU puts overlays
//! on top, takes internal snapshots and merges, while the guest is paused here. Disks that dom0's kernel
//! serves (`phy`) are the work of their backends: logical volumes that of lvm's.
//!
//! Xen is not informed of any of this: a disk's configured path always is its active image.
#![forbid(unsafe_code)]

mod cut;
mod describe;
mod disk;
mod list;
mod live;
mod memory;
mod saver;
mod section;
mod users;
mod xl;

pub use list::domain_called;
pub use saver::{Xen, register};
