//! The behaviour kit on qcow2, with qemu-io as the guest's hands and qemu-img as its eyes.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use backend_qcow2::Qcow2;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::DiskRecord;
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::TestBackend;

struct Images;

fn run(program: &str, args: &[&OsStr]) -> Result<String> {
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .with_context(|| format!("{program} must be installed (package qemu-utils)"))?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{program} {args:?}: {out}{err}");
    Ok(out.into_owned())
}

/// The option that opens exactly this file, whatever its name: a bare name may be taken for a protocol.
fn node(path: &Utf8Path) -> String {
    serde_json::json!({"driver": "qcow2", "file": {"driver": "file", "filename": path}}).to_string()
}

/// All bytes of an image, or of a snapshot in it.
fn content(path: &Utf8Path, tag: Option<&str>) -> Result<Vec<u8>> {
    let raw = tempfile::NamedTempFile::new()?;
    let image = format!("json:{}", node(path));
    let selector = tag.map(|tag| format!("snapshot.name={tag}"));
    let mut args: Vec<&OsStr> = ["convert", "-U", "-O", "raw"].map(OsStr::new).into();
    if let Some(selector) = &selector {
        args.extend([OsStr::new("-l"), OsStr::new(selector)]);
    }
    args.extend([OsStr::new(&image), raw.path().as_os_str()]);
    run("qemu-img", &args)?;
    Ok(std::fs::read(raw.path())?)
}

impl TestBackend for Images {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        AnyDiskSnapshotter::of(Arc::new(Qcow2::new()))
    }

    fn make(&self, dir: &Utf8Path, name: &str, bytes: &[u8]) -> Result<Utf8PathBuf> {
        let path = dir.join(format!("{name}.qcow2"));
        let raw = tempfile::NamedTempFile::new()?;
        std::fs::write(raw.path(), bytes)?;
        // Made under a plain name: qemu-img would take some names for protocols.
        let made = dir.join("made.tmp");
        let args: Vec<&OsStr> = vec![
            "convert".as_ref(),
            "-f".as_ref(),
            "raw".as_ref(),
            "-O".as_ref(),
            "qcow2".as_ref(),
            raw.path().as_os_str(),
            made.as_os_str(),
        ];
        run("qemu-img", &args)?;
        std::fs::rename(&made, &path)?;
        Ok(path)
    }

    fn read(&self, disk: &DiskRecord) -> Result<Vec<u8>> {
        content(disk.disk.path(), None)
    }

    fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> Result<()> {
        let pattern = tempfile::NamedTempFile::new()?;
        std::fs::write(pattern.path(), bytes)?;
        let write = format!("write -s {} {offset} {}", pattern.path().display(), bytes.len());
        let image = format!("json:{}", node(disk.disk.path()));
        let args: Vec<&OsStr> = vec!["-c".as_ref(), write.as_ref(), image.as_ref()];
        let begun = Instant::now();
        loop {
            match run("qemu-io", &args) {
                // A child that another test case starts just then has our lock for a moment longer than we.
                Err(locked) if format!("{locked:#}").contains("lock") && begun.elapsed().as_secs() < 10 => {
                    std::thread::sleep(Duration::from_millis(20));
                }
                said => {
                    let said = said?;
                    ensure!(said.contains("wrote"), "qemu-io said: {said}");
                    return Ok(());
                }
            }
        }
    }

    /// QEMU puts overlays on images and takes internal snapshots in them. `hypervisor-qemu`'s tests try it.
    fn takes_live_points(&self, _: &str) -> bool {
        false
    }

    fn is_saved(&self, dir: &Utf8Path, holds: &[u8]) -> Result<Option<bool>> {
        for entry in dir.read_dir_utf8()? {
            let entry = entry?;
            let path = entry.path();
            if !entry.file_type()?.is_file() {
                continue;
            }
            if entry.file_name().starts_with("rescued-") && content(path, None)? == holds {
                return Ok(Some(true));
            }
            for tag in rescued_tags(path.as_std_path())? {
                if content(path, Some(&tag))? == holds {
                    return Ok(Some(true));
                }
            }
        }
        Ok(Some(false))
    }
}

/// The internal snapshots of an image in which data was saved.
fn rescued_tags(image: &Path) -> Result<Vec<String>> {
    let args = ["info", "-U", "-f", "qcow2", "--output=json"].map(OsStr::new);
    let reported = run("qemu-img", &[&args[..], &[image.as_os_str()]].concat())?;
    let reported: serde_json::Value = serde_json::from_str(&reported)?;
    let snapshots = reported["snapshots"].as_array().cloned().unwrap_or_default();
    let names = snapshots.iter().filter_map(|snapshot| snapshot["name"].as_str());
    Ok(names.filter(|name| name.starts_with("rescued-")).map(str::to_owned).collect())
}

fn main() -> ExitCode {
    snapcore_testkit::run(Images)
}
