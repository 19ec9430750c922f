//! Exports of a guest that writes all the time, while other snapshots come and go.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::served::Server;
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

/// Runs a command until no other one has the domain's lock: an export takes it for moments too.
fn done_in_turn(domsnap: &Domsnap, args: &[&str]) -> Result<()> {
    for _ in 0..200 {
        let outcome = domsnap.run(args)?;
        if outcome.status == Some(status::REFUSED) && outcome.stderr.contains("is being worked on") {
            std::thread::sleep(Duration::from_millis(100));
            continue;
        }
        ensure!(outcome.status == Some(status::DONE), "{outcome}");
        return Ok(());
    }
    bail!("the domain was always locked")
}

/// Snapshots are served while the guest writes, and while the paths of its images lead to others.
fn served(live: &mut Live) -> Result<()> {
    let targets = live.guest.targets();
    let first = targets.first().context("a disk")?.clone();
    let raw = live.guest.dir().join("served.raw");
    let dirs = ["s1", "s2"].map(|name| (name, live.guest.dir().join(format!("n-{name}"))));
    let mut servers = Vec::new();
    for (name, dir) in &dirs {
        servers.push((*name, Server::of_snapshot(&live.domsnap(), &[NAME, name], dir, &first)?));
    }
    for round in 0..2 {
        for (name, server) in &servers {
            for target in &targets {
                let same = server.copy(target, &raw)? == held(live, name, target)?;
                ensure!(same, "round {round}: {name} {target} is served with other content");
            }
            let refused = live.domsnap().run(&["delete", NAME, name])?.expect_status(status::REFUSED)?;
            ensure!(refused.stderr.contains("serve:"), "{refused}");
        }
        if round == 0 {
            live.create("s4", &["--external", "--disk-only"])?;
            live.delete(&["s4"], &[])?;
        }
    }
    std::fs::remove_file(raw)?;
    for (name, mut server) in servers {
        match name {
            "s1" => server.stop()?,
            _ => server.kill()?,
        }
    }
    for (_, dir) in dirs {
        let _ = std::fs::remove_dir_all(dir);
    }
    Ok(())
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
            done_in_turn(&domsnap, &["create", NAME, &name, "--internal", "--disk-only"])?;
            done_in_turn(&domsnap, &["delete", NAME, &name])?;
        }
        Ok(())
    });
    done_in_turn(&live.domsnap(), &["export", NAME, "s1", "--to", &to])?;
    others.join().map_err(|_| anyhow::anyhow!("the other snapshots"))??;
    live.create("s2", &["--external", "--disk-only"])?;
    live.create("s3", &["--internal", "--disk-only"])?;
    for (name, since) in [("s2", "s1"), ("s3", "s2")] {
        live.domsnap().done(&["export", NAME, name, "--since", since, "--to", &to])?;
    }
    served(&mut live)?;
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
