//! A running guest whose disk is a VHD that QEMU opens by itself: a fixed one as `raw` with a size, a
//! dynamic one by the driver `vpc`. It goes on under a qcow2 overlay, and its VHD is the base.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::status;
use domsnap_tests::live::crash::there;
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::seed;
use domsnap_tests::shim::{self, Counted};
use testguest::{GuestOptions, Version, Vhd};

const FOOTER: usize = 512;

/// A guest whose disk `vda` is such a VHD, and whose `vdb` is a qcow2 image.
fn guest(kind: Vhd, version: Version) -> Result<Live> {
    let options = GuestOptions::new().disk_mib(48).version(version).vhd(0, kind);
    Live::registered(options, &["--active-path=new"])
}

/// The last sector of a file, and its length.
fn end_of(file: &Path) -> Result<(Vec<u8>, usize)> {
    let bytes = fs::read(file)?;
    let footer = bytes.len().checked_sub(FOOTER).and_then(|at| bytes.get(at..)).context("no footer")?;
    Ok((footer.to_vec(), bytes.len()))
}

/// Ends the guest and boots it from what the domain's configuration must name now.
fn boot_from_overlays(live: &mut Live) -> Result<()> {
    live.guest.quit()?;
    let paths = live.paths()?;
    live.guest.restart_on(&[(0, "qcow2", &paths[0]), (1, "qcow2", &paths[1])])?;
    ensure!(live.guest.counters_at_boot().iter().all(Option::is_some), "a disk's counter is not whole");
    live.load()?;
    live.sound()
}

/// A fixed VHD has snapshots with memory, which are reverted to in place; overlays on it are merged while the
/// guest writes. The VHD itself is not written again, and its footer is never seen.
fn fixed(version: Version) -> Result<()> {
    let mut live = guest(Vhd::Fixed, version)?;
    let vhd = live.guest.disk(0);
    let (footer, length) = end_of(&vhd)?;
    let shown = live.domsnap().done(&["domain", "show", NAME])?.stdout;
    ensure!(shown.contains("vda.vhd (vhd)"), "{shown}");
    let first = live.create("first", &["--external"])?;
    ensure!(first.downtime_us.is_some(), "{first:?}");
    let frozen = fs::read(&vhd)?;
    live.create("second", &["--disk-only", "--external"])?;
    live.create("third", &["--external"])?;
    live.revert("first", &[])?;
    live.verify()?;
    live.create("fourth", &["--external"])?;
    live.revert("third", &[])?;
    live.delete(&["second"], &[])?;
    live.revert("fourth", &[])?;
    live.delete(&["fourth"], &[])?;
    if version == Version::New {
        boot_from_overlays(&mut live)?;
        live.create("fifth", &["--disk-only", "--external"])?;
        live.delete(&["fifth"], &[])?;
    }
    live.revert("first", &[])?;
    live.delete(&["first", "third"], &[])?;
    live.domsnap().done(&["check", NAME])?;
    ensure!(fs::read(&vhd)? == frozen, "the base was written");
    ensure!(end_of(&vhd)? == (footer, length), "the footer is another");
    live.finish()
}

#[test]
fn fixed_vhd_has_snapshots_with_memory() -> Result<()> {
    fixed(Version::New)
}

#[test]
fn fixed_vhd_has_snapshots_with_memory_under_an_older_qemu() -> Result<()> {
    fixed(Version::Old)
}

/// A dynamic VHD has snapshots of the disks alone: QEMU's driver keeps memory from being saved, and the
/// refusal says what to do.
fn dynamic(version: Version) -> Result<()> {
    let mut live = guest(Vhd::Dynamic, version)?;
    let vhd = live.guest.disk(0);
    let refused = live.domsnap().run(&["create", NAME, "memory", "--external"])?;
    ensure!(refused.status == Some(status::REFUSED), "{refused}");
    for word in ["vpc", "disk serve", "--disk-only"] {
        ensure!(refused.stderr.contains(word), "{word:?} is not in: {refused}");
    }
    ensure!(live.paths()?[0] == vhd, "the refusal has changed the path");
    live.create("first", &["--disk-only", "--external"])?;
    let frozen = fs::read(&vhd)?;
    live.create("second", &["--disk-only", "--external"])?;
    let refused = live.domsnap().run(&["create", NAME, "memory", "--external"])?;
    ensure!(refused.status == Some(status::REFUSED) && refused.stderr.contains("vpc"), "{refused}");
    live.create("third", &["--disk-only", "--external"])?;
    live.delete(&["second"], &[])?;
    live.revert("first", &[])?;
    live.verify()?;
    live.create("fourth", &["--disk-only", "--external"])?;
    if version == Version::New {
        boot_from_overlays(&mut live)?;
    }
    live.delete(&["third", "fourth", "first"], &[])?;
    live.domsnap().done(&["check", NAME])?;
    ensure!(fs::read(&vhd)? == frozen, "the base was written");
    live.finish()
}

#[test]
fn dynamic_vhd_has_snapshots_of_disks_alone() -> Result<()> {
    dynamic(Version::New)
}

#[test]
fn dynamic_vhd_has_snapshots_of_disks_alone_under_an_older_qemu() -> Result<()> {
    dynamic(Version::Old)
}

/// domsnap is killed at every `every`th step of the create that puts the overlay on the VHD, and at the
/// last; with `DOMSNAP_LIVE_EVERY=1` at all of them. `recover` gives the guest its VHD back, or completes the
/// snapshot.
fn killed(kind: Vhd, every: usize) -> Result<()> {
    let args = ["create", NAME, "x", "--disk-only", "--external"];
    let steps = {
        let live = guest(kind, Version::New)?;
        let (_outputs, file) = shim::outputs()?;
        let counting = shim::counting(shim::watching(live.domsnap(), live.guest.dir())?, &file);
        counting.done(&args)?;
        let all = shim::counted(&file)?.into_iter().filter(Counted::begins_a_step);
        all.map(|step| step.number).collect::<Vec<_>>()
    };
    ensure!(steps.len() >= 3, "the shim saw {} steps", steps.len());
    let mut live = guest(kind, Version::New)?;
    let vhd = live.guest.disk(0);
    let (mut undone, mut taken) = (0, 0);
    let every = if seed::tries_all_live() { 1 } else { every };
    let last = steps.len() - 1;
    let chosen = steps.iter().enumerate().filter(|(place, _)| place % every == 0 || *place == last);
    for (_, step) in chosen {
        let at = || format!("killed at operation {step} of {}", steps.len());
        let watched = shim::watching(live.domsnap(), live.guest.dir())?;
        shim::killing(watched, *step, false).run(&args)?;
        live.domsnap().done(&["recover", NAME]).with_context(at)?;
        live.wait_running().with_context(at)?;
        live.sound().with_context(at)?;
        if there(&live, "x")? {
            taken += 1;
            live.remember("x", (0, u64::MAX / 2))?;
            live.verify().with_context(at)?;
            live.revert("x", &[]).with_context(at)?;
            live.guest.quit()?;
            live = guest(kind, Version::New)?;
            continue;
        }
        undone += 1;
        let path = live.paths()?.swap_remove(0);
        ensure!(path.file_name() == vhd.file_name(), "{}: the disk is {}", at(), path.display());
        let left = fs::read_dir(live.guest.dir())?
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with("vda.ds-"));
        ensure!(left.is_none(), "{}: {left:?} is left", at());
        // QEMU writes the VHD again: what the guest flushes is in it.
        live.guest.sync()?;
        let format = if kind == Vhd::Fixed { "raw" } else { "vpc" };
        let mut read = Command::new("qemu-io");
        read.args(["-f", format, "-r", "-U", "-c", "read 0 512"]).arg(&path).stdout(Stdio::null());
        ensure!(read.status()?.success(), "{}: the VHD cannot be read", at());
    }
    ensure!(undone > 0 && taken > 0, "undone: {undone}, taken: {taken}");
    live.finish()
}

#[test]
fn domsnap_dies_in_a_create_on_a_fixed_vhd() -> Result<()> {
    killed(Vhd::Fixed, 5)
}

#[test]
fn domsnap_dies_in_a_create_on_a_dynamic_vhd() -> Result<()> {
    killed(Vhd::Dynamic, 6)
}
