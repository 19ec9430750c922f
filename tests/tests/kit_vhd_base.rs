//! The behaviour kit on qcow2 overlays whose base is a VHD, as a disk has it that QEMU read by itself: a
//! fixed and a dynamic one in turns. qemu-io is the guest's hands, and qemu-img its eyes.

use std::ffi::OsStr;
use std::process::{Command, ExitCode};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use backend_qcow2::Qcow2;
use backend_vhd::VhdBase;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::DiskRecord;
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::TestBackend;

/// Disks that were made.
#[derive(Default)]
struct Overlays(AtomicUsize);

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
    let node = serde_json::json!({"driver": "qcow2", "file": {"driver": "file", "filename": path}});
    format!("json:{node}")
}

fn content(path: &Utf8Path) -> Result<Vec<u8>> {
    let raw = tempfile::NamedTempFile::new()?;
    let image = node(path);
    let args: Vec<&OsStr> = ["convert", "-U", "-O", "raw"].map(OsStr::new).into();
    run("qemu-img", &[&args[..], &[OsStr::new(&image), raw.path().as_os_str()]].concat())?;
    Ok(std::fs::read(raw.path())?)
}

impl TestBackend for Overlays {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        AnyDiskSnapshotter::of(Arc::new(Qcow2::new().on_base(Arc::new(VhdBase))))
    }

    fn make(&self, dir: &Utf8Path, name: &str, bytes: &[u8]) -> Result<Utf8PathBuf> {
        let (path, base) = (dir.join(format!("{name}.qcow2")), dir.join(format!("{name}.base.vhd")));
        let (kind, format) = match self.0.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => ("fixed", "raw"),
            _ => ("dynamic", "vpc"),
        };
        let raw = tempfile::NamedTempFile::new()?;
        std::fs::write(raw.path(), bytes)?;
        // Made under plain names: qemu-img would take some names for protocols.
        let made = dir.join("made.tmp");
        let options = format!("force_size=on,subformat={kind}");
        let args = ["convert", "-f", "raw", "-O", "vpc", "-o", &options].map(OsStr::new);
        run("qemu-img", &[&args[..], &[raw.path().as_os_str(), made.as_os_str()]].concat())?;
        std::fs::rename(&made, &base)?;
        let (size, below) = (bytes.len().to_string(), format!("./{name}.base.vhd"));
        let args = ["create", "-q", "-u", "-f", "qcow2", "-F", format, "-b", &below].map(OsStr::new);
        run("qemu-img", &[&args[..], &[made.as_os_str(), OsStr::new(&size)]].concat())?;
        std::fs::rename(&made, &path)?;
        Ok(path)
    }

    fn read(&self, disk: &DiskRecord) -> Result<Vec<u8>> {
        content(disk.disk.path())
    }

    fn write(&self, disk: &DiskRecord, offset: u64, bytes: &[u8]) -> Result<()> {
        let pattern = tempfile::NamedTempFile::new()?;
        std::fs::write(pattern.path(), bytes)?;
        let write = format!("write -s {} {offset} {}", pattern.path().display(), bytes.len());
        let image = node(disk.disk.path());
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

    /// QEMU puts overlays on images. `tests/tests/live_vhd.rs` tries it.
    fn takes_live_points(&self, _: &str) -> bool {
        false
    }

    fn has_bases(&self) -> bool {
        true
    }

    fn offers(&self, method: &str) -> bool {
        if method == "internal" {
            eprintln!("no internal points here: they are in the overlay, and backend-qcow2 tries them");
        }
        method == "external"
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
    snapcore_testkit::run(Overlays::default())
}
