//! A machine with device-mapper and lvm2, for tests that need real volume groups: Debian's cloud kernel and
//! lvm2 inside QEMU.
//!
//! It needs neither KVM nor device-mapper here, and is slow: QEMU translates every instruction, so that an
//! lvm command takes some 200 to 500 ms. It boots in some four seconds.
//!
//! # Two sides
//!
//! A test of `harness = false` gives its groups of cases to [`main`]. Outside, each group is one test: a
//! machine is booted with blank disks, and this very program runs in it, with `domsnap` and whatever else it
//! wants beside it. Inside, [`main`] runs the cases of the group one after the other, each on disks that
//! were wiped, and says of each what came of it. So one boot serves many cases, and one that does not
//! hold fails the group's test, by its name.
//!
//! [`Machine`] alone runs any program in such a machine, and gives its exit status, its output and its files.
#![forbid(unsafe_code)]

mod build;
mod harness;
pub mod inside;
mod machine;

pub use harness::{Group, TestCase, main};
pub use machine::{Ended, Machine};
