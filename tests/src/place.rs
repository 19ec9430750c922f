//! Where the files of a test lie: on the disk, or in memory where the run says so.
//!
//! domsnap flushes at every step, and what the kernel does for that takes a quarter of the suites' processor
//! time. No test needs the disk to know whether a flush was missing: losses of power are made from a record
//! of the flushes ([`crate::powerloss`]). `make test-all` has everything on the disk.

use std::env;

use anyhow::{Context, Result};
use tempfile::{Builder, TempDir};

/// Names a directory in memory.
const IN_MEMORY: &str = "DOMSNAP_TEST_IN_MEMORY";

/// Makes a directory for the files of a test, which goes when this is dropped.
///
/// # Errors
/// The directory that `DOMSNAP_TEST_IN_MEMORY` names cannot be used, or else that for temporary files.
pub fn directory(prefix: &str) -> Result<TempDir> {
    let mut builder = Builder::new();
    builder.prefix(prefix);
    match env::var_os(IN_MEMORY).filter(|place| !place.is_empty()) {
        Some(place) => builder
            .tempdir_in(&place)
            .with_context(|| format!("{IN_MEMORY} names {}", place.to_string_lossy())),
        None => Ok(builder.tempdir()?),
    }
}
