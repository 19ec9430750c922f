//! Whatever dies in the middle of an operation on a running domain, `recover` heals it: the guest runs,
//! memory and disks are of one instant, every snapshot holds what it held, and what was begun has happened or
//! has not.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::live::crash::{
    Operation, Victim, inject, kill_qemu, nothing, start_qemu, there, without_x,
};
use domsnap_tests::live::{Live, NAME};
use testguest::GuestOptions;

/// A tree: `outside` and `disks` are external, `inside` is internal, each with memory but `disks`.
fn tree() -> Result<Live> {
    let mut live = Live::of(GuestOptions::new().disk_mib(48))?;
    live.create("outside", &["--external"])?;
    live.create("inside", &["--internal"])?;
    live.create("disks", &["--disk-only", "--external"])?;
    Ok(live)
}

/// `x` is taken, so that the domain writes to an overlay on it.
fn on_x(live: &mut Live) -> Result<()> {
    match there(live, "x")? {
        true => Ok(()),
        false => live.create("x", &["--external", "--disk-only"]).map(drop),
    }
}

/// `x` is inside an image, and another snapshot depends on that.
fn under_y(live: &mut Live) -> Result<()> {
    if !there(live, "x")? {
        if there(live, "y")? {
            live.delete(&["y"], &[])?;
        }
        live.create("x", &["--internal", "--disk-only"])?;
        live.create("y", &["--external", "--disk-only"])?;
    }
    Ok(())
}

/// A revert has kept the state before it, with memory.
fn reverted(live: &mut Live) -> Result<()> {
    live.revert("outside", &["--undo=memory"]).map(drop)
}

const CREATE_EXTERNAL: Operation =
    Operation { args: &["create", "x", "--external"], takes: Some("x"), deletes: None, again: without_x };
const CREATE_COMPRESSED: Operation = Operation {
    args: &["create", "x", "--external", "--compress"],
    takes: Some("x"),
    deletes: None,
    again: without_x,
};
const CREATE_MIXED: Operation = Operation {
    args: &["create", "x", "--disk", "vda=internal", "--disk", "vdb=external"],
    takes: Some("x"),
    deletes: None,
    again: without_x,
};
const REVERT_OUTSIDE: Operation =
    Operation { args: &["revert", "outside"], takes: None, deletes: None, again: nothing };
const REVERT_INSIDE: Operation =
    Operation { args: &["revert", "inside"], takes: None, deletes: None, again: nothing };
const REVERT_DISKS: Operation =
    Operation { args: &["revert", "disks"], takes: None, deletes: None, again: nothing };
const REVERT_KEEPING: Operation =
    Operation { args: &["revert", "inside", "--undo=memory"], takes: None, deletes: None, again: nothing };
const REVERT_SAVING: Operation = Operation {
    args: &["revert", "disks", "--save-current=x"],
    takes: Some("x"),
    deletes: None,
    again: without_x,
};
const UNDO: Operation = Operation { args: &["undo"], takes: None, deletes: None, again: reverted };
const DELETE_ACTIVE: Operation =
    Operation { args: &["delete", "x"], takes: None, deletes: Some("x"), again: on_x };
const DELETE_FROZEN: Operation =
    Operation { args: &["delete", "x"], takes: None, deletes: Some("x"), again: under_y };

macro_rules! killed {
    ($($test:ident: $operation:ident, $victim:ident, $first:literal, $every:literal;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            let mut live = tree()?;
            inject(&mut live, &$operation, Victim::$victim, $first, $every)?;
            live.finish()
        }
    )*};
}

killed! {
    domsnap_dies_in_an_external_create: CREATE_EXTERNAL, Domsnap, 0, 1;
    domsnap_dies_in_a_create_that_compresses_memory: CREATE_COMPRESSED, Domsnap, 2, 2;
    domsnap_dies_in_a_mixed_create: CREATE_MIXED, Domsnap, 0, 2;
    domsnap_dies_in_a_revert_to_an_external_snapshot: REVERT_OUTSIDE, Domsnap, 0, 1;
    domsnap_dies_in_a_revert_to_an_internal_snapshot: REVERT_INSIDE, Domsnap, 0, 1;
    domsnap_dies_in_a_revert_without_memory: REVERT_DISKS, Domsnap, 1, 1;
    domsnap_dies_in_a_revert_that_keeps_memory: REVERT_KEEPING, Domsnap, 1, 1;
    domsnap_dies_in_a_revert_that_saves_the_current_state: REVERT_SAVING, Domsnap, 0, 1;
    domsnap_dies_in_an_undo: UNDO, Domsnap, 2, 1;
    domsnap_dies_in_a_merge_of_the_active_image: DELETE_ACTIVE, Domsnap, 0, 1;
    domsnap_dies_in_a_delete_inside_a_frozen_image: DELETE_FROZEN, Domsnap, 0, 1;
    qemu_dies_in_a_create: CREATE_EXTERNAL, Qemu, 0, 2;
    qemu_dies_in_a_revert: REVERT_OUTSIDE, Qemu, 1, 2;
    qemu_dies_in_an_undo: UNDO, Qemu, 1, 2;
    qemu_dies_in_a_merge_of_the_active_image: DELETE_ACTIVE, Qemu, 0, 2;
    qemu_dies_in_a_delete_inside_a_frozen_image: DELETE_FROZEN, Qemu, 1, 2;
    both_die_in_a_create: CREATE_EXTERNAL, Both, 1, 2;
    both_die_in_a_revert: REVERT_INSIDE, Both, 0, 2;
    both_die_in_a_merge_of_the_active_image: DELETE_ACTIVE, Both, 1, 2;
}

/// Under `--active-path=new` the configured paths keep naming what the guest no longer writes once the
/// instant has put overlays on it. Where domsnap and QEMU die before the commit point, what the guest wrote
/// in between is in those overlays alone.
#[test]
fn writes_in_unmergeable_overlays_are_saved() -> Result<()> {
    for raw in [false, true] {
        for started_again in [false, true] {
            written_overlays(raw, started_again)
                .with_context(|| format!("raw: {raw}, started before the recovery: {started_again}"))?;
        }
    }
    Ok(())
}

fn written_overlays(raw: bool, started_again: bool) -> Result<()> {
    let options = GuestOptions::new().disk_mib(48);
    let options = if raw { options.raw(&[0, 1]) } else { options };
    let live = Live::registered(options, &["--active-path=new"])?;
    let overlay = ["--disk", "vda=overlay", "--disk", "vdb=overlay"];
    // The hardest compression, so that the commit point is far from the instant.
    let args = [&["create", NAME, "x", "--compress=19"][..], if raw { &overlay } else { &["--external"] }];
    let mut child = live.domsnap().command(&args.concat()).stderr(Stdio::null()).spawn()?;
    // Only what QEMU flushed outlives its death: an overlay that has grown may map nothing yet.
    let until = Instant::now() + Duration::from_secs(240);
    while overlays(&live)?.iter().filter(|(file, _)| maps_data(file)).count() < 2 {
        ensure!(Instant::now() < until && child.try_wait()?.is_none(), "the guest wrote to no overlay");
        sleep(Duration::from_millis(1));
    }
    child.kill()?;
    child.wait()?;
    kill_qemu(&live)?;
    let written: Vec<u64> = overlays(&live)?.iter().map(|(_, about)| about.ino()).collect();
    if started_again {
        let boots = live.guest.boots();
        start_qemu(&live)?;
        live.guest.wait_boots(boots + 1)?;
    }
    let recovered = live.domsnap().done(&["recover", NAME])?;
    ensure!(!there(&live, "x")?, "the kill came too late: {recovered}");
    ensure!(recovered.stdout.contains("a snapshot that was not taken"), "it is not reported: {recovered}");
    let left = overlays(&live)?;
    for inode in written {
        let kept = left.iter().find(|(_, about)| about.ino() == inode);
        let (file, _) = kept.with_context(|| format!("what the guest wrote is gone: {recovered}"))?;
        ensure!(
            file.file_name().is_some_and(|name| name.to_string_lossy().starts_with("rescued-")),
            "{file:?}"
        );
    }
    Ok(())
}

/// Whether the overlay itself holds data, as its tables on disk say.
fn maps_data(overlay: &Path) -> bool {
    // It may be half made, or removed just now: then it holds nothing.
    let map = Command::new("qemu-img").args(["map", "-U", "--output=json"]).arg(overlay).output();
    let extents: Vec<serde_json::Value> =
        map.ok().and_then(|map| serde_json::from_slice(&map.stdout).ok()).unwrap_or_default();
    extents.iter().any(|extent| extent["depth"] == 0 && extent["data"] == true)
}

/// The overlays beside the guest's disks.
fn overlays(live: &Live) -> Result<Vec<(PathBuf, fs::Metadata)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(live.guest.dir())? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.contains(".ds-") && name.ends_with(".qcow2") {
            // It may be removed just now.
            found.extend(fs::metadata(&path).ok().map(|about| (path, about)));
        }
    }
    Ok(found)
}
