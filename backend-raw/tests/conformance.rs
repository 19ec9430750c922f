//! The behaviour kit on raw files, which a guest writes as they are.

use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use backend_raw::Raw;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{DiskRecord, DiskSnapshotter};
use snapcore_testkit::TestBackend;

struct Files;

impl TestBackend for Files {
    fn backend(&self) -> Arc<dyn DiskSnapshotter> {
        Arc::new(Raw::new())
    }

    fn make(&self, dir: &Utf8Path, name: &str, bytes: &[u8]) -> Result<Utf8PathBuf> {
        let path = dir.join(format!("{name}.raw"));
        std::fs::write(&path, bytes)?;
        Ok(path)
    }

    fn read(&self, disk: &DiskRecord) -> Result<Vec<u8>> {
        Ok(std::fs::read(&disk.disk.path)?)
    }

    fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(std::fs::OpenOptions::new().write(true).open(&disk.disk.path)?.write_all_at(bytes, offset)?)
    }

    fn offers(&self, method: &str) -> bool {
        match method {
            "copy" => true,
            // Directories for temporary files mostly share no blocks; the suites of whole domains mount what
            // does.
            "reflink" | "external" => {
                let shares = backend_raw::can_reflink(
                    &Utf8PathBuf::from_path_buf(std::env::temp_dir()).unwrap_or_default().join("x"),
                );
                let shares = shares.unwrap_or(false);
                if !shares {
                    eprintln!(
                        "no {method} here: the file system of {} shares no blocks",
                        std::env::temp_dir().display()
                    );
                }
                shares
            }
            // Another format's disk from then on, and another path's.
            _ => false,
        }
    }

    fn is_saved(&self, dir: &Utf8Path, holds: &[u8]) -> Result<Option<bool>> {
        for entry in dir.read_dir_utf8()? {
            let entry = entry?;
            if entry.file_name().starts_with("rescued-") && std::fs::read(entry.path())? == holds {
                return Ok(Some(true));
            }
        }
        Ok(Some(false))
    }
}

fn main() -> ExitCode {
    snapcore_testkit::run(Files)
}
