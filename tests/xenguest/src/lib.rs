//! A machine with Xen for tests that need a real one: Xen and a dom0 inside QEMU, where guests of Xen run
//! whose program notices when their memory and their disks are not of one instant.
//!
//! It needs neither KVM nor a Xen on this machine, and is slow: QEMU translates every instruction. So it is
//! booted once for all tests, whichever process asks first, and powers itself off when no process has asked
//! for a while.
//!
//! # Two sides
//!
//! A test of `harness = false` gives its cases to [`main`]. Outside, each case takes the machine for itself
//! ([`Machine`]), puts this very program and the `domsnap` under test into it, and runs it there with the
//! name of the case; what it says and how it ends is the case's result. Inside, [`main`] runs the case's
//! body in dom0, with [`inside::DomU`], `xl` and `domsnap`. So a case is ordinary Rust, and one result of
//! `cargo nextest`.
//!
//! `cargo run -p xenguest --example dom0 -- COMMAND` runs any command in the same machine.
#![forbid(unsafe_code)]

mod build;
mod harness;
pub mod inside;
mod machine;

pub use harness::{TestCase, main};
pub use machine::{Ended, Machine};
