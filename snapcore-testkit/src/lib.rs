//! The behaviour kit: one suite that every [`snapcore::backend::DiskSnapshotter`] runs, in process or not.
//!
//! An author says how disks are made, written and read without the backend ([`TestBackend`]). The kit asks
//! the backend for its [`snapcore::backend::Capabilities`] and runs every test case that they call for. Each
//! has a short name, and a sentence: the promise that it tries to break. The real service, planner, engine,
//! journal and catalogue of snapcore drive the backend, in a state directory of its own. A [model](Model) of
//! byte vectors and a tree is kept beside it.
//!
//! The contracts of a [catalogue] and of a [hypervisor] have test cases too.
//!
//! ```no_run
//! # use std::{process::ExitCode, sync::Arc};
//! # use snapcore::backend::AnyDiskSnapshotter;
//! # fn my_backend() -> Arc<AnyDiskSnapshotter> { unimplemented!() }
//! use snapcore_testkit::TestBackend;
//!
//! struct Files;
//!
//! // Disks that are plain files; others say how they are made, read and written.
//! impl TestBackend for Files {
//!     fn backend(&self) -> Arc<AnyDiskSnapshotter> {
//!         my_backend()
//!     }
//! }
//!
//! fn main() -> ExitCode {
//!     snapcore_testkit::run(Files)
//! }
//! ```
//!
//! It belongs into a test of its own with `harness = false`. Its arguments are those of every Rust test
//! program. A test case that the capabilities exclude is printed to standard error, with the reason.
//!
//! | variable | meaning |
//! |---|---|
//! | `TESTKIT_SEED` | the seed of the random test cases and of samples; 1 |
//! | `TESTKIT_OPERATIONS` | operations of a random history; 24 |
//! | `TESTKIT_EVERY` | of pairs of a crash and a crash in its recovery, and of comparisons of every snapshot after a crash, one of so many is done; 6. Set 1 before you trust a backend |
//!
//! **Crashes.** Most are made in this process: the operation stops for ever at a call to the backend or to
//! the catalogue, before or after its effect, and all of it is dropped. The next "process" has a new backend,
//! catalogue and service. Others are real: the operation runs in a child, a copy of the test program, which
//! is killed there, or in the middle of a step where the step reports progress.
//!
//! **Power losses** need disks that are files, which this process writes through libc. A child does the
//! operation with `libfaultfs.so` preloaded (`cargo build -p faultfs`; beside the test program, or where
//! `TESTKIT_FAULTFS` says), which records its file operations. From the record [`powerloss`] builds what the
//! power loss leaves: writes and names that were not flushed are there or not. `TESTKIT_POWER_CASES` (12) is
//! the number of losses for each operation.

//! **Running domains.** A backend that declares `live` runs test cases on a domain with a guest. The kit
//! cannot have a QEMU, so it has a test hypervisor and a guest of its own. The guest is a thread that writes
//! with [`TestBackend::write`] until each pause, and again before each resume is done. What it wrote until
//! the instant is what the point must hold. The test hypervisor leaves the points to the backend. Where a
//! hypervisor takes them ([`TestBackend::takes_live_points`] is false), the kit looks only at the plan. The
//! rest is what that hypervisor does: overlays, internal snapshots, merges of open chains.

#![forbid(unsafe_code)]

mod cases;
pub mod catalogue;
mod child;
mod fault;
mod fixture;
pub mod hypervisor;
mod live;
mod model;
pub mod powerloss;
pub mod record;
pub mod seed;
mod suite;
mod test_backend;
#[doc(hidden)]
pub mod wrong;

pub use model::{Bytes, Model, Point};
pub use suite::run;
pub use test_backend::{TestBackend, has_file};
