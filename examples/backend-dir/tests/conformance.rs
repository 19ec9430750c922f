//! The behaviour kit on copies.

use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use backend_dir::Copies;
use camino::Utf8Path;
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::{TestBackend, has_file};

struct Files;

impl TestBackend for Files {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        AnyDiskSnapshotter::of(Arc::new(Copies::default()))
    }

    fn can_lose_power(&self) -> bool {
        false // the kit's model of a power loss has no rename across directories, and an exchange here is one
    }

    fn is_saved(&self, dir: &Utf8Path, holds: &[u8]) -> Result<Option<bool>> {
        Ok(Some(has_file(dir, "rescued-", holds)?))
    }
}

fn main() -> ExitCode {
    snapcore_testkit::run(Files)
}
