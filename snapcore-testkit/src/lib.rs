//! The behaviour kit: one suite that every [`snapcore::DiskSnapshotter`] runs, in process or not.
//!
//! An author says how disks are made, written and read without the backend ([`TestBackend`]). The kit asks
//! the backend for its [`snapcore::Capabilities`] and runs every test case that they call for. Each has a
//! short name, and a sentence: the promise that it tries to break. The real service, planner, engine, journal
//! and catalogue of snapcore drive the backend, in a state directory of its own. A [model](Model) of byte
//! vectors and a tree is kept beside it.
//!
//! The contracts of a [catalogue] and of a [hypervisor] have test cases too.
//!
//! ```no_run
//! # use std::{process::ExitCode, sync::Arc};
//! # use camino::{Utf8Path, Utf8PathBuf};
//! # use snapcore::{Disk, DiskRecord, DiskSnapshotter};
//! # fn my_backend() -> Arc<dyn DiskSnapshotter> { unimplemented!() }
//! use snapcore_testkit::TestBackend;
//!
//! struct Files;
//!
//! impl TestBackend for Files {
//!     fn backend(&self) -> Arc<dyn DiskSnapshotter> {
//!         my_backend()
//!     }
//!     fn make(&self, dir: &Utf8Path, name: &str, content: &[u8]) -> anyhow::Result<Utf8PathBuf> {
//!         std::fs::write(dir.join(name), content)?;
//!         Ok(dir.join(name))
//!     }
//!     fn read(&self, disk: &DiskRecord) -> anyhow::Result<Vec<u8>> {
//!         Ok(std::fs::read(&disk.disk.path)?)
//!     }
//!     fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> anyhow::Result<()> {
//!         use std::os::unix::fs::FileExt;
//!         Ok(std::fs::File::options().write(true).open(&disk.disk.path)?.write_all_at(bytes, offset)?)
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
//! | `TESTKIT_EVERY` | of pairs of a crash and a crash in its recovery, and of comparisons of every snapshot after a crash, one of so many is done; 4. Set 1 before you trust a backend |
//!
//! **Crashes.** Most are made in this process: the operation stops for ever at a call to the backend or to
//! the catalogue, before or after its effect, and all of it is dropped. The next "process" has a new backend,
//! catalogue and service. Others are real: the operation runs in a child, a copy of the test program, which
//! is killed there, or in the middle of a step where the step reports progress.

#![forbid(unsafe_code)]

mod cases;
pub mod catalogue;
mod child;
mod fault;
mod fixture;
pub mod hypervisor;
mod model;
mod seed;
mod suite;
mod test_backend;

pub use model::{Bytes, Model, Point};
pub use suite::run;
pub use test_backend::TestBackend;
