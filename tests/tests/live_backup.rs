//! Exports of a guest that writes all the time, while other snapshots come and go.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::status;
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::{qemu, report};
use serde_json::Value;

/// What a disk of a snapshot holds, by QEMU's own reader, while the images are open elsewhere.
fn held(live: &Live, snapshot: &str, target: &str) -> Result<Vec<u8>> {
    let list = report::list(&live.domsnap(), NAME)?;
    let found = list.snapshots.iter().find(|found| found.name == snapshot).context("the snapshot")?;
    let point = found.points.iter().find(|point| point.target == target).context("the disk")?;
    let raw = live.guest.dir().join("held.raw");
    let tag = point.tag.as_ref().map(|tag| format!("snapshot.name={tag}"));
    let mut args: Vec<&OsStr> = ["convert", "-U", "-f", "qcow2", "-O", "raw"].map(OsStr::new).to_vec();
    args.extend(tag.iter().flat_map(|tag| [OsStr::new("-l"), OsStr::new(tag)]));
    let layer = Path::new(&point.layer);
    qemu::img(&[&args[..], &[layer.as_os_str(), raw.as_os_str()]].concat())?;
    let bytes = std::fs::read(&raw)?;
    std::fs::remove_file(raw)?;
    Ok(bytes)
}

/// Internal and external snapshots with memory and without are exported while the guest writes: each file
/// holds what the snapshot holds, the guest notices nothing, and it boots from an export.
#[test]
fn exports_of_a_running_guest() -> Result<()> {
    let mut live = Live::new()?;
    let dir = live.guest.dir().join("exports");
    let to = dir.display().to_string();
    live.create("s1", &["--internal"])?;
    // Other snapshots come and go meanwhile.
    let domsnap = live.domsnap();
    let others = std::thread::spawn(move || -> Result<()> {
        for number in 0..3 {
            let name = format!("other{number}");
            domsnap.done(&["create", NAME, &name, "--internal", "--disk-only"])?;
            domsnap.done(&["delete", NAME, &name])?;
        }
        Ok(())
    });
    // The other commands take the domain's lock for moments.
    let exported = (0..20).find_map(|_| {
        let outcome = live.domsnap().run(&["export", NAME, "s1", "--to", &to]);
        match outcome {
            Ok(outcome) if outcome.status == Some(status::REFUSED) && outcome.stderr.contains("lock") => None,
            other => Some(other),
        }
    });
    let exported = exported.context("it was always locked")??;
    ensure!(exported.status == Some(status::DONE), "{exported}");
    others.join().map_err(|_| anyhow::anyhow!("the other snapshots"))??;
    live.create("s2", &["--external", "--disk-only"])?;
    live.create("s3", &["--internal", "--disk-only"])?;
    for (name, since) in [("s2", "s1"), ("s3", "s2")] {
        live.domsnap().done(&["export", NAME, name, "--since", since, "--to", &to])?;
    }
    // The current state of a running domain is no snapshot.
    let running = live.domsnap().run(&["diff", NAME, "s1"])?.expect_status(status::REFUSED)?;
    ensure!(running.stderr.contains("the domain runs"), "{running}");
    let diff: Value = live.domsnap().done(&["diff", NAME, "s1", "s3", "--json"])?.json()?;
    ensure!(diff["disks"].as_array().into_iter().flatten().all(|disk| disk["changed"] != 0), "{diff}");
    live.verify()?;
    live.sound()?;
    let targets = live.guest.targets();
    for name in ["s1", "s2", "s3"] {
        for target in &targets {
            let image = dir.join(format!("{target}.{name}.qcow2"));
            qemu::check(&image)?;
            ensure!(qemu::read(&image, None)? == held(&live, name, target)?, "{name} {target}");
        }
    }
    ensure!(dir.join("s1.memory").exists() && !dir.join("s2.memory").exists());
    // An overlay on an export boots.
    let mut images: Vec<PathBuf> = Vec::new();
    for target in &targets {
        let (overlay, base) = (dir.join(format!("{target}.boot")), dir.join(format!("{target}.s3.qcow2")));
        let base = base.as_os_str();
        let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"].map(OsStr::new);
        qemu::img(&[&create[..], &[base, overlay.as_os_str()]].concat())?;
        images.push(overlay);
    }
    let disks: Vec<(usize, &str, &Path)> =
        images.iter().enumerate().map(|(number, image)| (number, "qcow2", image.as_path())).collect();
    live.guest.restart_on(&disks)?;
    live.guest.wait_ticks(3)?;
    live.guest.expect_no_bad()
}
