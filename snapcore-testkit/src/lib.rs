//! The behaviour kit: one suite that every [`snapcore::DiskSnapshotter`] runs, in process or not.
//!
//! An author says how disks are made, written and read without the backend ([`TestBackend`]); the kit asks the backend what it
//! can do ([`snapcore::Capabilities`]) and runs every trial that this calls for. A trial's name is the statement that it
//! tries to break. The backend is driven by the real service, planner, engine, journal and catalogue of snapcore, in a state
//! directory of its own; beside it goes a [model](Model) of byte vectors and a tree.
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
//! It belongs into a test of its own with `harness = false`. Words on the command line are those of every Rust test program;
//! the random trials start from the seed in `TESTKIT_SEED` and do `TESTKIT_OPERATIONS` operations.
//!
//! **Crashes.** Most are of this process's own making: the operation stops for ever at a call to the backend or to the
//! catalogue, before or after its effect, and everything of it is dropped; the next "process" has a new backend, catalogue and
//! service. Others are real: the operation runs in a child, a copy of the test program, that is killed there or in the
//! middle of a step, where the step tells its progress.

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
