//! The behaviour kit on VHD. The engine writes for the domain; the reference reader reads, along the chain
//! that the engine has found.

mod support;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use backend_vhd::VhdFiles;
use backend_vhd::image::{Chain, ChainOptions, NewImage, write_into};
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::DiskRecord;
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::TestBackend;
use support::Reference;

struct Images;

/// The files of an image's chain, the top first.
fn chain(path: &Utf8Path) -> Result<Vec<std::path::PathBuf>> {
    let options = ChainOptions::read_only().unlocked();
    let mut files: Vec<_> = Chain::open(path.as_std_path(), &options)?
        .layers()
        .iter()
        .map(|l| l.file().path().to_owned())
        .collect();
    files.reverse();
    Ok(files)
}

fn content(path: &Utf8Path) -> Result<Vec<u8>> {
    let files = chain(path)?;
    let paths: Vec<_> = files.iter().map(std::path::PathBuf::as_path).collect();
    Ok(Reference::open(&paths).read())
}

impl TestBackend for Images {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        AnyDiskSnapshotter::of(Arc::new(VhdFiles::new()))
    }

    fn make(&self, dir: &Utf8Path, name: &str, bytes: &[u8]) -> Result<Utf8PathBuf> {
        let path = dir.join(format!("{name}.vhd"));
        let made = std::fs::File::options().read(true).write(true).create_new(true).open(&path)?;
        write_into(made, path.as_std_path(), &NewImage::new(bytes.len() as u64))?;
        let mut chain = Chain::open(path.as_std_path(), &ChainOptions::read_write())?;
        chain.write_at(bytes, 0)?;
        chain.flush()?;
        Ok(path)
    }

    fn read(&self, disk: &DiskRecord) -> Result<Vec<u8>> {
        content(disk.disk.path())
    }

    fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> Result<()> {
        let begun = Instant::now();
        loop {
            match Chain::open(disk.disk.path().as_std_path(), &ChainOptions::read_write()) {
                // A child that another test case starts just then has our lock for a moment longer than we.
                Err(error)
                    if error.kind() == backend_vhd::image::ErrorKind::Locked
                        && begun.elapsed().as_secs() < 10 =>
                {
                    std::thread::sleep(Duration::from_millis(20));
                }
                opened => {
                    let mut chain = opened?;
                    chain.write_at(bytes, offset)?;
                    chain.flush()?;
                    return Ok(());
                }
            }
        }
    }

    fn offers(&self, method: &str) -> bool {
        // Another format's disk from then on, and another path's.
        method != "overlay"
    }

    /// The server of an image that a running domain uses puts overlays on it. `tests/tests/live_served.rs`
    /// tries it.
    fn takes_live_points(&self, _: &str) -> bool {
        false
    }

    fn is_saved(&self, dir: &Utf8Path, holds: &[u8]) -> Result<Option<bool>> {
        for entry in dir.read_dir_utf8()? {
            let entry = entry?;
            let is_saved = entry.file_type()?.is_file() && entry.file_name().starts_with("rescued-");
            if is_saved && content(entry.path())? == holds {
                return Ok(Some(true));
            }
        }
        Ok(Some(false))
    }
}

fn main() -> ExitCode {
    snapcore_testkit::run(Images)
}
