//! Every row of the lists for running domains, on a real guest under load: after each the guest runs on,
//! found memory and disks of one instant at every tick, and every snapshot holds what it held.

use anyhow::{Result, ensure};
use domsnap_tests::domsnap::{product, status};
use domsnap_tests::live::{Live, NAME};
use testguest::{GuestOptions, Version};

/// Snapshots of a kind, one on the other, and reverts from each to each.
fn there_and_back(live: &mut Live, kind: &[&str]) -> Result<()> {
    live.create("one", kind)?;
    live.create("two", kind)?;
    live.create("three", &[kind, &["--no-live"]].concat())?;
    for name in ["one", "three", "two", "one"] {
        live.revert(name, &[])?;
    }
    // A branch beside the others.
    live.create("four", kind)?;
    for name in ["three", "four"] {
        live.revert(name, &[])?;
    }
    live.verify()?;
    live.delete(&["two"], &[])?;
    live.revert("four", &[])?;
    live.delete(&["one", "three"], &[])?;
    live.delete(&["four"], &[])?;
    // One image a disk is left, which QEMU knows by its permanent name.
    ensure!(live.layers()? <= 2, "{} layers are left when all snapshots are deleted", live.layers()?);
    Ok(())
}

/// External snapshots with memory are taken reverted to in place and deleted.
#[test]
fn external_with_memory_in_place() -> Result<()> {
    let mut live = Live::new()?;
    there_and_back(&mut live, &["--external"])?;
    live.finish()
}

/// Internal snapshots with memory are taken reverted to in place and deleted.
#[test]
fn internal_with_memory_in_place() -> Result<()> {
    let mut live = Live::new()?;
    there_and_back(&mut live, &["--internal"])?;
    live.finish()
}

/// Disks may be internal and external in one snapshot and in one tree.
#[test]
fn kinds_mix_in_one_snapshot_and_tree() -> Result<()> {
    let mut live = Live::new()?;
    there_and_back(&mut live, &["--disk", "vda=internal", "--disk", "vdb=external"])?;
    live.create("int", &["--internal"])?;
    live.create("ext", &["--external"])?;
    live.create("mixed", &["--disk", "vda=external", "--disk", "vdb=internal"])?;
    for name in ["ext", "int", "mixed", "int", "ext"] {
        live.revert(name, &[])?;
    }
    live.delete(&["int"], &[])?;
    live.revert("mixed", &[])?;
    live.delete(&["mixed", "ext"], &[])?;
    live.finish()
}

/// Disks alone are taken and the guest boots from them after a revert.
#[test]
fn disk_only_revert_boots() -> Result<()> {
    let mut live = Live::new()?;
    live.create("ext", &["--disk-only", "--external"])?;
    live.create("int", &["--disk-only", "--internal"])?;
    let quiesced = live.create("quiet", &["--disk-only", "--external", "--quiesce=require"])?;
    ensure!(quiesced.downtime_us.is_some(), "{quiesced:?}");
    let listed = live.domsnap().done(&["list", NAME, "--json"])?.stdout;
    ensure!(listed.contains("\"filesystem\"") && listed.contains("\"crash\""), "{listed}");
    for name in ["ext", "quiet", "int"] {
        live.revert(name, &[])?;
    }
    live.create("memory", &[])?;
    live.revert("ext", &[])?;
    live.revert("memory", &[])?;
    live.delete(&["int", "ext"], &[])?;
    live.revert("quiet", &[])?;
    live.delete(&["quiet"], &["--children"])?;
    live.finish()
}

/// A running domain can be forgotten and registered again.
#[test]
fn running_domain_registers_again() -> Result<()> {
    let mut live = Live::new()?;
    for _ in 0..2 {
        live.create("x", &["--disk-only", "--external"])?;
        live.delete(&["x"], &[])?;
        live.run(&["domain", "remove", NAME])?;
        let socket = live.guest.qmp_socket().display().to_string();
        live.run(&["domain", "add", NAME, "--qmp", &socket])?;
    }
    live.create("kept", &["--external"])?;
    live.create("inside", &["--internal"])?;
    live.run(&["domain", "remove", NAME])?;
    let socket = live.guest.qmp_socket().display().to_string();
    live.run(&["domain", "add", NAME, "--qmp", &socket])?;
    live.verify()?;
    live.revert("kept", &[])?;
    live.revert("inside", &[])?;
    live.delete(&["kept", "inside"], &[])?;
    live.finish()
}

#[test]
fn eight_disks_are_of_one_instant() -> Result<()> {
    let mut live = Live::of(GuestOptions::new().disks(8).disk_mib(16))?;
    live.create("disks", &["--disk-only", "--external"])?;
    live.create("memory", &["--external"])?;
    live.revert("disks", &[])?;
    live.revert("memory", &[])?;
    live.delete(&["disks", "memory"], &[])?;
    live.finish()
}

#[test]
fn a_guest_of_drives_and_an_old_qemu_can_do_the_same() -> Result<()> {
    for options in [GuestOptions::new().drive(), GuestOptions::new().version(Version::Old)] {
        let mut live = Live::of(options)?;
        live.create("memory", &["--external"])?;
        live.create("inside", &["--internal"])?;
        live.create("disks", &["--disk-only", "--external"])?;
        for name in ["inside", "disks", "memory"] {
            live.revert(name, &[])?;
        }
        live.delete(&["inside"], &[])?;
        live.revert("disks", &[])?;
        live.delete(&["memory", "disks"], &[])?;
        live.finish()?;
    }
    Ok(())
}

/// A guest can be left paused or off and what was paused stays so.
#[test]
fn guest_is_left_paused_or_off() -> Result<()> {
    let mut live = Live::new()?;
    live.create("one", &["--external"])?;
    live.domsnap().done(&["create", NAME, "held", "--then", "pause"])?;
    let running =
        || live.guest.qmp("query-status", serde_json::Value::Null).map(|status| status["running"] == true);
    ensure!(!running()?, "the guest runs after --then pause");
    live.domsnap().done(&["create", NAME, "standing"])?;
    ensure!(!running()?, "a guest that was paused runs after a create");
    live.domsnap().done(&["revert", NAME, "one", "--paused"])?;
    ensure!(!running()?, "the guest runs after --paused");
    live.guest.qmp("cont", serde_json::Value::Null)?;
    live.sound()?;
    live.domsnap().done(&["revert", NAME, "standing"])?;
    ensure!(!running()?, "a guest that was paused at the instant runs after the revert");
    live.domsnap().done(&["revert", NAME, "one", "--running"])?;
    live.sound()?;
    live.domsnap().done(&["revert", NAME, "held", "--off"])?;
    ensure!(live.guest.processes().is_empty(), "the guest's process is there after --off");
    Ok(())
}

/// A domain that is off is started from a snapshot with memory.
#[test]
fn domain_that_is_off_starts_from_memory() -> Result<()> {
    let mut live = Live::new()?;
    live.create("one", &["--external"])?;
    live.create("two", &["--internal"])?;
    let boots = live.guest.boots();
    for name in ["one", "two"] {
        live.guest.quit()?;
        live.domsnap().done(&["revert", NAME, name])?;
        live.wait_running()?;
        live.sound()?;
        ensure!(live.guest.boots() == boots, "the guest booted instead of going on");
    }
    live.verify()
}

/// A domain that was paused is started paused and can be worked on as it stands.
#[test]
fn paused_domain_starts_paused() -> Result<()> {
    for version in Version::BOTH {
        let mut live = Live::of(GuestOptions::new().version(version))?;
        live.guest.qmp("stop", serde_json::Value::Null)?;
        live.domsnap().done(&["create", NAME, "standing", "--external"])?;
        live.guest.qmp("quit", serde_json::Value::Null)?;
        live.guest.wait_end()?;
        live.domsnap().done(&["revert", NAME, "standing"])?;
        live.domsnap().done(&["create", NAME, "more", "--disk-only", "--external"])?;
        live.domsnap().done(&["revert", NAME, "standing"])?;
        live.domsnap().done(&["delete", NAME, "more"])?;
        live.guest.qmp("cont", serde_json::Value::Null)?;
        live.sound()?;
    }
    Ok(())
}

/// The current state is saved with its memory before a revert.
#[test]
fn revert_saves_current_with_memory() -> Result<()> {
    let mut live = Live::new()?;
    live.create("one", &["--external"])?;
    let before = live.guest.ticks()?;
    live.domsnap().done(&["revert", NAME, "one", "--save-current=present"])?;
    live.sound()?;
    live.domsnap().done(&["revert", NAME, "present"])?;
    live.sound()?;
    ensure!(live.guest.ticks()? >= before, "the current state that was saved is an older one");
    Ok(())
}

/// With nothing registered a farm reverts in place again and again.
#[test]
fn unregistered_domain_reverts_repeatedly() -> Result<()> {
    let live = Live::unregistered(GuestOptions::new())?;
    let pid = live.guest.pid();
    let example = product("DOMSNAP_REVERT_LOOP", "examples/revert_loop", "snapcli --example revert_loop");
    let count = live.guest.ticks()?;
    let output = std::process::Command::new(example)
        .args([live.guest.qmp_socket().as_os_str(), "3".as_ref(), "sleep 1".as_ref()])
        .env("DOMSNAP_STATE_DIR", live.guest.dir().join("state"))
        .env("DOMSNAP_UNDO", "no")
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(
        output.status.success() && said.lines().count() == 3,
        "{said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    ensure!(live.guest.pid() == pid && live.guest.boots() == 0, "the guest was booted again");
    live.sound()?;
    ensure!(live.guest.ticks()? < count + 400, "it did not go back");
    ensure!(live.layers()? <= 2, "{} layers are left when all snapshots are deleted", live.layers()?);
    live.finish()
}

/// What would not fit is refused before anything is touched.
#[test]
fn too_little_space_is_refused_first() -> Result<()> {
    let mut live = Live::new()?;
    live.create("one", &["--external"])?;
    let refuse = |args: &[&str], says: &str| -> Result<()> {
        let outcome = live.domsnap().run(args)?.expect_status(status::REFUSED)?;
        ensure!(outcome.stderr.contains(says), "{outcome}");
        live.sound()
    };
    refuse(&["create", NAME, "one"], "already")?;
    refuse(&["create", NAME, "x", "--disk", "vda=skip", "--disk", "vdb=skip"], "nothing to take")?;
    // An image at the configured path that QEMU does not have open.
    let path = live.guest.disk(0);
    let aside = path.with_extension("aside");
    std::fs::rename(&path, &aside)?;
    std::fs::copy(&aside, &path)?;
    let outcome = live.domsnap().run(&["create", NAME, "x"])?.expect_status(status::REFUSED)?;
    ensure!(outcome.stderr.contains("vda"), "{outcome}");
    std::fs::rename(&aside, &path)?;
    live.sound()?;
    live.revert("one", &[])?;
    live.verify()
}
