//! Running domains for the test cases: a guest that writes all the time, and the hypervisor that runs it.
//!
//! The kit can have no QEMU. Its hypervisor is a test hypervisor, and nothing else: it pauses and resumes a
//! thread, and has the disks open as far as it says so. It leaves each disk's point to the backend
//! ([`snapcore::hypervisor::DiskInstant::ByBackend`]). It puts no overlays on disks, takes no internal
//! snapshots, merges nothing, and saves no memory: those are a hypervisor's own work.

mod guest;
mod hypervisor;

pub(crate) use guest::{Content, TestGuest, tick_of};
pub(crate) use hypervisor::{NAME, TestHypervisor};
