//! The behaviour kit on the example in Python: over the wire, in a process of its own.

use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use backend_plugin::Plugin;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{DiskRecord, DiskSnapshotter};
use snapcore_testkit::TestBackend;

struct Copies;

impl TestBackend for Copies {
    fn backend(&self) -> Arc<dyn DiskSnapshotter> {
        let program = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/domsnap-backend-dir.py");
        Arc::new(Plugin::new("dir", program))
    }

    fn make(&self, dir: &Utf8Path, name: &str, content: &[u8]) -> Result<Utf8PathBuf> {
        let path = dir.join(name);
        std::fs::write(&path, content)?;
        Ok(path)
    }

    fn read(&self, disk: &DiskRecord) -> Result<Vec<u8>> {
        Ok(std::fs::read(&disk.disk.path)?)
    }

    fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> Result<()> {
        let file = std::fs::File::options().write(true).open(&disk.disk.path)?;
        Ok(file.write_all_at(bytes, offset)?)
    }

    fn is_saved(&self, dir: &Utf8Path, holds: &[u8]) -> Result<Option<bool>> {
        for directory in dir.read_dir_utf8()? {
            let directory = directory?;
            if directory.path().extension() != Some("points") {
                continue;
            }
            for file in directory.path().read_dir_utf8()? {
                let file = file?;
                if file.file_name().starts_with("rescued-") && std::fs::read(file.path())? == holds {
                    return Ok(Some(true));
                }
            }
        }
        Ok(Some(false))
    }
}

fn main() -> ExitCode {
    snapcore_testkit::run(Copies)
}
