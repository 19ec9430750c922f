//! The cut: all disks, and the memory, at one instant.
//!
//! ```text
//! disk-only             pause - transaction - while_paused - resume
//! background snapshot   pause - transaction - migrate until the first page is out - while_paused - resume ... memory is written
//! non-live              pause - transaction - migrate to its end - while_paused - resume
//! pre-copy              migrate ... QEMU pauses - transaction - migrate to its end - while_paused - resume
//! ```
//!
//! (Of a guest that is paused already, memory is saved by a background snapshot too, or else by `snapshot-save`: a migration
//! would leave it `postmigrate`.)
//!
//! A background snapshot write-protects memory, so the pause does not depend on its size nor on how fast the guest dirties
//! it; it needs a kernel, rights, memory and a QEMU that allow it
//! ([`crate::discover::Abilities::background_snapshot_holds`]), and where it cannot be had a live cut falls back to pre-copy,
//! or, where a QEMU would lose writes in that ([`crate::discover::Abilities::emulation_marks_writes`]), to non-live.
//! Waiting for the first page is what makes it right: only then does QEMU have the state of the devices, and the protection
//! in place.
//!
//! `take` is the order of the above, `disks` the transaction and how it is undone, `saving` the memory that is still being
//! written when the guest runs again, `clock` how long the guest stood still.

mod clock;
mod disks;
mod saving;
mod take;

pub use disks::DiskCut;
pub use saving::{Progress, Saving, abandon};
pub use take::{Cut, Live, Taken, Way};
