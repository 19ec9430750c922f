//! A running domain of which a plug-in serves a disk: the example in Python, which copies the disk's file
//! while the guest is paused.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::live::{Live, NAME};
use tempfile::TempDir;
use testguest::GuestOptions;

const EXAMPLE: &str = include_str!("../../examples/domsnap-backend-dir.py");
const WIRE: &str = include_str!("../../examples/domsnap_backend.py");

/// A directory with the example, after `change`.
fn plugins(change: impl Fn(&str) -> String) -> Result<TempDir> {
    let directory = tempfile::tempdir()?;
    let program = directory.path().join("domsnap-backend-dir");
    fs::write(&program, change(EXAMPLE))?;
    fs::write(directory.path().join("domsnap_backend.py"), WIRE)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(directory)
}

/// The example, which dies at the steps that `marks/STEP` says, with no word.
fn mortal(marks: &Path) -> Result<TempDir> {
    let before = "action_of(params, *STEPS)\n        if action[\"do\"] == \"drop\":\n            wire.remove";
    let dies = format!(
        "action_of(params, *STEPS)\n        if os.path.exists({:?} + \"/\" + action[\"do\"]):\n            os._exit(9)\n{}",
        marks.display().to_string(),
        &before["action_of(params, *STEPS)\n".len()..]
    );
    ensure!(EXAMPLE.matches(before).count() == 1, "the example is written otherwise now");
    plugins(|example| example.replace(before, &dies))
}

fn guest() -> GuestOptions {
    GuestOptions::new().raw(&[1])
}

/// A plug ins disk is cut with a qcow2 disk and memory at one instant and reverted in place.
#[test]
fn plugin_disk_is_of_the_same_instant() -> Result<()> {
    let plugins = plugins(str::to_owned)?;
    let mut live = Live::served_by(guest(), &["qcow2", "dir"], plugins.path())?;
    live.create("memory", &[])?;
    live.create("disks", &["--disk-only"])?;
    live.create("mixed", &["--disk", "vda=external"])?;
    for name in ["memory", "mixed", "disks", "memory"] {
        live.revert(name, &[])?;
    }
    live.delete(&["disks"], &[])?;
    live.revert("mixed", &[])?;
    live.delete(&["memory", "mixed"], &[])?;

    // A domsnap that knows nothing of the guest: the example locks as QEMU does.
    let (other, path) = (tempfile::tempdir()?, live.guest.disk(1));
    let other = Domsnap::new(other.path()).env("DOMSNAP_BACKEND_DIR", plugins.path());
    other.done(&["domain", "add", "other", "--disk", &format!("vda={},format=dir", path.display())])?;
    let refused = other.run(&["create", "other", "s1"])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("is open in a QEMU"), "{refused}");
    live.sound()
}

/// A plug in that dies while the guest is paused does not leave it paused.
#[test]
fn dying_plugin_does_not_leave_guest_paused() -> Result<()> {
    let marks = tempfile::tempdir()?;
    let plugins = mortal(marks.path())?;
    let mut live = Live::served_by(guest(), &["qcow2", "dir"], plugins.path())?;
    live.create("s1", &[])?;
    for (mark, args) in [("copy", ["create", NAME, "s2"]), ("exchange", ["revert", NAME, "s1"])] {
        fs::write(marks.path().join(mark), "")?;
        let failed = live.domsnap().run(&args)?;
        fs::remove_file(marks.path().join(mark))?;
        ensure!(!failed.panicked() && failed.status != Some(status::DONE), "{failed}");
        ensure!(failed.stderr.contains("plug-in dir"), "{failed}");
        ensure!(failed.status == Some(status::NEEDS_RECOVERY), "no process is left to undo it: {failed}");
        // In the cut of a create the guest goes on by itself; of a revert it has no disks yet.
        let stands = failed.stderr.contains("the guest is paused");
        ensure!(stands == (mark == "exchange"), "{failed}");
        live.domsnap().done(&["recover", NAME])?;
        live.sound().with_context(|| format!("after {failed}"))?;
        live.verify()?;
    }
    live.create("s2", &[])?;
    live.revert("s1", &[])?;
    live.delete(&["s1", "s2"], &[])
}
