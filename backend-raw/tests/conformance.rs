//! The behaviour kit on raw files, which a guest writes as they are.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use backend_raw::Raw;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::{TestBackend, has_file};

/// On a disk, wherever the temporary files of this run are: holes and extents are its file system's.
const GROUND: &str = env!("CARGO_TARGET_TMPDIR");

struct Files;

impl TestBackend for Files {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        AnyDiskSnapshotter::of(Arc::new(Raw::new()))
    }

    fn offers(&self, method: &str) -> bool {
        match method {
            "copy" => true,
            // Most file systems share no blocks; the suites of whole domains mount what does.
            "reflink" | "external" => {
                let shares = backend_raw::can_reflink(&Utf8Path::new(GROUND).join("x")).unwrap_or(false);
                if !shares {
                    eprintln!("no {method} here: the file system of {GROUND} shares no blocks");
                }
                shares
            }
            // Another format's disk from then on, and another path's.
            _ => false,
        }
    }

    fn ground(&self) -> Option<Utf8PathBuf> {
        Some(GROUND.into())
    }

    fn is_saved(&self, dir: &Utf8Path, holds: &[u8]) -> Result<Option<bool>> {
        Ok(Some(has_file(dir, "rescued-", holds)?))
    }
}

fn main() -> ExitCode {
    snapcore_testkit::run(Files)
}
