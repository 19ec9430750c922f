//! The proof of domsnap: fixtures, a model, and the means to kill, cut the power of, and starve the real
//! binary.
//!
//! The suites under `tests/` run the `domsnap` that users run. What it left on disk is read with `qemu-img`
//! and `qemu-io`, never with domsnap's own engine, and compared with a [`model::Model`] kept beside it.
//!
//! - [`domsnap`]: running the binary, its output and its exit status
//! - [`report`]: the part of its JSON that the tests rely on
//! - [`qemu`]: the judge
//! - [`domain`]: a domain at rest in a directory of its own, and writing to it
//! - [`model`]: what each point of its tree must hold
//! - [`verify`]: comparing the two, and looking for what was left behind
//! - [`shim`]: running the binary under `faultfs`
//! - [`record`]: the shim's record of operations
//! - [`powerloss`]: what a directory may hold after the power went
//! - [`scenario`]: the operations that the crash suites interrupt
//! - [`crash`]: interrupting them everywhere; and the domain running before anything is healed
//! - [`idle`]: a QEMU without a guest system, for what needs none: it is there in a moment
//! - [`live`]: a running domain, its guest, and what each of its snapshots holds
//! - [`mounted`]: a file system of a certain kind
//! - [`place`]: where the files of a test lie
//! - [`seed`]: random choices that can be repeated
//! - [`served`]: a disk that `domsnap disk serve` serves, and a client of it

#![forbid(unsafe_code)]

pub mod crash;
pub mod domain;
pub mod domsnap;
pub mod idle;
pub mod live;
mod meanwhile;
pub mod model;
pub mod mounted;
pub mod place;
pub mod qemu;
pub mod report;
pub mod scenario;
pub mod seed;
pub mod served;
pub mod shim;
pub mod verify;

pub use snapcore_testkit::{powerloss, record};
