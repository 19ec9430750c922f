//! Clones of a domain that runs under QEMU: the guest notices nothing, each clone boots, and a delete on the
//! running domain leaves what its clones show.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::status;
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::{qemu, report, verify};

/// The image of a disk of the clone `name`.
fn image(place: &Path, name: &str, target: &str) -> PathBuf {
    place.join(name).join(format!("{name}-{target}.qcow2"))
}

/// What the disks of a snapshot hold, while QEMU has the images open.
fn held(live: &Live, snapshot: &str, place: &Path) -> Result<BTreeMap<String, Vec<u8>>> {
    let list = report::list(&live.domsnap(), NAME)?;
    let found = list.snapshots.iter().find(|found| found.name == snapshot).context("the snapshot")?;
    let (mut held, raw) = (BTreeMap::new(), place.join("held.raw"));
    for point in &found.points {
        let tag = point.tag.as_ref().map(|tag| format!("snapshot.name={tag}"));
        let mut args: Vec<&OsStr> = ["convert", "-U", "-f", "qcow2", "-O", "raw"].map(OsStr::new).to_vec();
        args.extend(tag.iter().flat_map(|tag| [OsStr::new("-l"), OsStr::new(tag)]));
        let layer = Path::new(&point.layer);
        qemu::img(&[&args[..], &[layer.as_os_str(), raw.as_os_str()]].concat())?;
        held.insert(point.target.clone(), std::fs::read(&raw)?);
    }
    std::fs::remove_file(raw)?;
    Ok(held)
}

fn clones_of_a_running_guest(kind: &[&str]) -> Result<()> {
    let mut live = Live::new()?;
    live.create("s1", kind)?;
    let place = live.guest.dir().join("clones");
    std::fs::create_dir(&place)?;
    let to = place.display().to_string();
    // It has memory, which is not left out in silence.
    let refused = live.domsnap().run(&["clone", NAME, "s1", "web", "--to", &to])?;
    ensure!(refused.stderr.contains("--disk-only"), "{refused}");
    refused.expect_status(status::REFUSED)?;
    let wanted = held(&live, "s1", &place)?;
    live.run(&["clone", NAME, "s1", "web", "--disk-only", "--count", "2", "--to", &to])?;
    live.verify()?;
    let as_wanted = || {
        for name in ["web-1", "web-2"] {
            for (target, bytes) in &wanted {
                let image = image(&place, name, target);
                ensure!(qemu::read(&image, None)? == *bytes, "{name} {target} holds something else");
                for layer in verify::chain(&image)? {
                    qemu::check(&layer)?;
                }
            }
        }
        Ok(())
    };
    as_wanted()?;
    // The layer of s1 stays, also where the delete of a running domain would merge into it.
    live.delete(&["s1"], &[])?;
    as_wanted().context("after the delete")?;
    live.sound()?;
    // A clone boots, from disks of one instant.
    let images: Vec<PathBuf> =
        live.guest.targets().iter().map(|target| image(&place, "web-1", target)).collect();
    let disks: Vec<(usize, &str, &Path)> =
        images.iter().enumerate().map(|(number, image)| (number, "qcow2", image.as_path())).collect();
    live.guest.restart_on(&disks)?;
    live.guest.wait_ticks(3)?;
    live.guest.expect_no_bad()?;
    // The guest writes its counter to one disk after the other, so one may be a tick behind.
    let counters: Vec<u64> = live.guest.counters_at_boot().into_iter().flatten().collect();
    let (least, most) = (counters.iter().min(), counters.iter().max());
    ensure!(
        counters.len() == disks.len() && least.zip(most).is_some_and(|(a, b)| b - a <= 1),
        "{counters:?}"
    );
    let other = qemu::read(&image(&place, "web-2", &live.guest.targets()[0]), None)?;
    ensure!(other == wanted[&live.guest.targets()[0]], "the other clone saw what this one wrote");
    Ok(())
}

/// External snapshots: the clones share frozen layers that QEMU has open.
#[test]
fn clones_of_a_running_guest_external() -> Result<()> {
    clones_of_a_running_guest(&["--external"])
}

/// Internal snapshots are copied out of images that QEMU writes.
#[test]
fn clones_of_a_running_guest_internal() -> Result<()> {
    clones_of_a_running_guest(&["--internal"])
}
