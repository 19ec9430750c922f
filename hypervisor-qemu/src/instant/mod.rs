//! The cut: all disks, and the memory, at one instant.
//!
//! ```text
//! disk-only             pause - transaction - while_paused - resume
//! background snapshot   pause - transaction - migrate until the first page is out - while_paused - resume
//!                       memory is written while the guest runs
//! non-live              pause - transaction - migrate to its end - while_paused - resume
//! pre-copy              migrate ... QEMU pauses - transaction - migrate to its end - while_paused - resume
//! ```
//!
//! (For a guest that is paused already, memory is also saved by a background snapshot, or else by
//! `snapshot-save`: a migration would leave it `postmigrate`.)
//!
//! A background snapshot write-protects memory, so the length of the pause does not depend on its size nor on
//! how fast the guest dirties it. It needs a kernel, rights, memory and a QEMU that allow it
//! ([`crate::discover::Abilities::background_snapshot_holds`]). Without it, a live cut falls back to
//! pre-copy, or to non-live if this QEMU would lose writes in a pre-copy
//! ([`crate::discover::Abilities::emulation_marks_writes`]). The wait for the first page makes it correct:
//! only then does QEMU have the state of the devices, and the protection in place.
//!
//! `take` runs these steps in order, `disks` is the transaction and its undo. `saving` is the memory that is
//! still being written when the guest runs again, `clock` measures the guest's pause.

mod clock;
mod disks;
mod saving;
mod take;

pub use disks::DiskCut;
pub use saving::{SaveProgress, Saving, abandon};
pub use take::{Cut, CutMethod, CutOutcome, SaveMode};
