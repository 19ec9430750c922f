//! A guest for tests of live machines: a small Linux in a real QEMU, which notices when its memory and its
//! disks are not of one instant.
//!
//! ```no_run
//! # fn example() -> anyhow::Result<()> {
//! let guest = testguest::Guest::new()?; // two disks of 64 MiB, QEMU 10.0; ready when this returns
//! guest.dirty(32, 100.0)?; // memory load: 32 MiB at 100 MiB/s
//! guest.blocks(256, 200.0)?; // disk load: 256 random blocks a disk, 200 writes a second
//! guest.forget_gap();
//! // ... the operation under test, on guest.qmp_socket() and guest.disk(0) ...
//! guest.expect_no_bad()?; // it runs on, and memory and disks are of one instant
//! println!("the guest was paused for {:?} at most", guest.largest_gap());
//! # Ok(())
//! # }
//! ```
//!
//! # What is inside
//!
//! Debian's cloud kernel, busybox, the QEMU guest agent and `witness` (`src-guest/witness.c`): a counter that
//! goes up in memory and on each disk at each tick, and whose last values are compared before. Each disk has
//! an ext4 file system, mounted at `/vda`, `/vdb` and so on. [`Guest::shell`] runs anything there.
//!
//! # How it comes to be
//!
//! The first test that wants one builds it below the target directory, from Debian packages that are
//! downloaded and unpacked, not installed; the first of each [`GuestOptions`] boots it and keeps its memory
//! and disks; the others begin there, in a fraction of a second. What is kept is tied to the sources of this
//! crate, the QEMU binary and the whole command line. Processes that want the same wait for each other.
//! `DOMSNAP_TEST_GUEST` names another directory for it.
//!
//! Nothing here is async: every call blocks, has a deadline, and may be made from a test with a runtime or
//! without. Inside of one, let it be `#[tokio::test(flavor = "multi_thread")]`: other tasks must be able to
//! go on meanwhile.
#![forbid(unsafe_code)]

mod build;
mod cache;
mod channel;
mod clone;
mod generic;
mod guest;
mod monitor;
mod options;
mod process;
mod qemu;
mod state;

/// What other guests of tests are made of too: a cache, packages, archives, kernels, and the consistency
/// program.
pub mod parts {
    pub use crate::build::{Archive, Root, WITNESS, compile, elf, uncompressed};
    pub use crate::cache::Built;
    pub use crate::process::{preferred, run};
    pub use crate::qemu::{FIRMWARE, program};
}

pub use channel::{COUNTER_BYTES, Status, counter};
pub use clone::GuestClone;
pub use guest::{Guest, ShellOutput};
pub use options::{GuestOptions, Version, Vhd};
pub use qemu::command as qemu_command;
