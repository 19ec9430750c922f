//! The behaviour kit on the example in Python: over the wire, in a process of its own.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use backend_plugin::Plugin;
use camino::Utf8Path;
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::{TestBackend, has_file};

struct Copies;

impl TestBackend for Copies {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/domsnap-backend-dir.py");
        Arc::new(Plugin::new("dir", program))
    }

    fn can_lose_power(&self) -> bool {
        false // the files are written by another process
    }

    fn is_saved(&self, dir: &Utf8Path, holds: &[u8]) -> Result<Option<bool>> {
        Ok(Some(has_file(dir, "rescued-", holds)?))
    }
}

fn main() -> ExitCode {
    snapcore_testkit::run(Copies)
}
