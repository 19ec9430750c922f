//! A guest whose memory is put back gets a fresh generation ID, and says so in its kernel's log: its random
//! numbers are others then. The log is in the memory, so it has no line of an earlier revert.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use domsnap_tests::live::crash::kill_qemu;
use domsnap_tests::live::{Changed, Live, NAME};
use domsnap_tests::{report, seed, shim};
use serde_json::{Value, json};
use testguest::{GuestOptions, Version};

const ID: &str = "324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87";

fn options(version: Version) -> GuestOptions {
    let device = format!("vmgenid,id=gen,guid={ID}");
    GuestOptions::new().version(version).generic_kernel().more(&["-device", &device])
}

/// How often the guest has seen another ID since it booted, and its next random numbers.
fn seen(live: &Live) -> Result<(usize, String)> {
    // It reads the ID in a handler of its own, a moment after it goes on.
    live.guest.wait_ticks(20)?;
    let said =
        live.guest.shell("dmesg | grep -c 'virtual machine fork'; head -c 8 /dev/urandom | od -An -tx1")?;
    let said = String::from_utf8(said.stdout)?;
    let (count, random) = said.trim().split_once('\n').context("two lines")?;
    Ok((count.trim().parse()?, random.trim().to_owned()))
}

fn about_id(changed: &Changed) -> Vec<&String> {
    changed.notes.iter().filter(|note| note.contains("vmgenid")).collect()
}

/// QEMU has no gdb stub of ours.
fn no_stub(live: &Live) -> Result<()> {
    let devices = live.guest.qmp("query-chardev", Value::Null)?;
    ensure!(!devices.to_string().contains("domsnap-gdb"), "a device of ours is left: {devices}");
    Ok(())
}

fn monitor(live: &Live, line: &str) -> Result<Value> {
    live.guest.qmp("human-monitor-command", json!({ "command-line": line }))
}

/// Every revert in place, and the undo of one, gives another ID, and every one other random numbers. With a
/// gdb stub in use it does not, and the revert says so: the guest has the ID that it had.
fn reverts_in_place(version: Version) -> Result<()> {
    let mut live = Live::of(options(version))?;
    ensure!(seen(&live)?.0 == 0, "the guest has seen another ID already");
    live.create("s", &["--external", "--memory"])?;
    let mut numbers = BTreeSet::new();
    for round in 0..3 {
        let changed = live.revert("s", &["--undo=memory"])?;
        ensure!(about_id(&changed).is_empty(), "{:?}", changed.notes);
        let (count, random) = seen(&live)?;
        ensure!(count == 1, "revert {round}: the guest has seen {count} other IDs");
        ensure!(numbers.insert(random), "revert {round}: the guest repeats its random numbers");
        no_stub(&live)?;
        println!("{version:?}: revert {round}: paused for {:?} us", changed.downtime_us);
    }
    // What was kept is a guest that had seen one, and sees another.
    live.run(&["undo", NAME])?;
    let (count, random) = seen(&live)?;
    ensure!(count == 2, "undo: the guest has seen {count} other IDs");
    ensure!(numbers.insert(random), "undo: the guest repeats its random numbers");

    let socket = live.guest.dir().join("gdb");
    monitor(&live, &format!("gdbserver unix:{},server=on,wait=off", socket.display()))?;
    let changed = live.revert("s", &["--undo=no"])?;
    ensure!(about_id(&changed).len() == 1, "{:?}", changed.notes);
    ensure!(about_id(&changed)[0].contains("gdb stub is in use"), "{:?}", changed.notes);
    ensure!(seen(&live)?.0 == 0, "nothing wrote another ID, and the guest has seen one");
    let devices = live.guest.qmp("query-chardev", Value::Null)?.to_string();
    ensure!(devices.contains("\"gdb\"") && socket.exists(), "the other stub is gone: {devices}");
    monitor(&live, "gdbserver none")?;
    let changed = live.revert("s", &["--undo=no"])?;
    ensure!(about_id(&changed).is_empty() && seen(&live)?.0 == 1, "{:?}", changed.notes);

    // The log has the time that it takes: all of it is a part of the guest's pause.
    let logged = live.domsnap().env("DOMSNAP_LOG", "hypervisor_qemu=debug");
    let logged = logged.done(&["revert", NAME, "s", "--undo=no"])?;
    let line = logged.stderr.lines().find(|line| line.contains("generation ID"));
    println!("{version:?}: {}", line.context("the log has no line of it")?);

    // A snapshot of a guest with a fresh ID.
    live.create("t", &["--internal", "--memory"])?;
    live.revert("t", &["--undo=no"])?;
    ensure!(seen(&live)?.0 == 2, "the second snapshot's guest has not seen another ID");
    live.run(&["delete", NAME, "t"])?;
    live.forget("t");
    live.finish()
}

#[test]
fn reverts_give_another_id() -> Result<()> {
    reverts_in_place(Version::New)
}

#[test]
fn reverts_give_another_id_qemu_7_2() -> Result<()> {
    reverts_in_place(Version::Old)
}

/// A stopped domain that is started from memory has another ID: by its own command, and by one of the user's
/// that domsnap cannot read.
#[test]
fn starts_from_memory_give_another_id() -> Result<()> {
    for version in Version::BOTH {
        let mut live = Live::of(options(version))?;
        live.create("s", &["--external", "--memory"])?;
        let started = |live: &Live| -> Result<()> {
            kill_qemu(live)?;
            live.domsnap().done(&["revert", NAME, "s", "--undo=no"])?;
            live.wait_running()?;
            live.sound()?;
            no_stub(live)
        };
        for round in 0..2 {
            started(&live)?;
            ensure!(seen(&live)?.0 == 1, "{version:?}, start {round}: the guest has not seen another ID");
            let now = live.guest.qmp("query-vm-generation-id", Value::Null)?["guid"].clone();
            ensure!(now != ID, "{version:?}, start {round}: its command has the ID that it had");
        }
        live.finish()?;

        // A command that domsnap cannot read.
        let mut live = Live::unregistered(options(version))?;
        let script = live.guest.dir().join("start");
        let quoted =
            |word: &std::ffi::OsString| format!("'{}'", word.to_string_lossy().replace('\'', r"'\''"));
        let command: Vec<String> = live.guest.command_line().iter().map(quoted).collect();
        std::fs::write(&script, format!("#!/bin/sh\nexec {} \"$@\"\n", command.join(" ")))?;
        let place = |path: &std::path::Path| path.display().to_string();
        let (qmp, agent) = (place(live.guest.qmp_socket()), place(live.guest.agent_socket()));
        let args =
            ["domain", "add", NAME, "--qmp", &qmp, "--agent", &agent, "--start", "/bin/sh", &place(&script)];
        live.domsnap().done(&args)?;
        live.create("s", &["--external", "--memory"])?;
        started(&live)?;
        let now = live.guest.qmp("query-vm-generation-id", Value::Null)?["guid"].clone();
        ensure!(now == ID, "{version:?}: the script was not used");
        ensure!(seen(&live)?.0 == 1, "{version:?}: the guest that a script starts has not seen another ID");
        live.finish()?;
    }
    Ok(())
}

/// Killed just after each command to QEMU of the write, a revert is carried through by a recovery: the guest
/// has another ID, and no stub is left. With `DOMSNAP_LIVE_EVERY=1` also before each.
#[test]
fn killed_reverts_leave_no_stub() -> Result<()> {
    let mut live = Live::of(options(Version::New))?;
    live.create("s", &["--external", "--memory"])?;
    let args = ["revert", NAME, "s", "--undo=no"];
    let (_outputs, file) = shim::outputs()?;
    shim::counting_commands(shim::preloaded(live.domsnap()), &file).done(&args)?;
    let commands: Vec<String> = std::fs::read_to_string(&file)?.lines().map(str::to_owned).collect();
    let of_the_write = |command: &str| {
        ["human-monitor-command", "getfd", "chardev-add", "chardev-remove"]
            .iter()
            .any(|word| command.contains(word))
    };
    let places: Vec<usize> = (0..commands.len()).filter(|&place| of_the_write(&commands[place])).collect();
    ensure!(places.len() >= 5, "the write has these commands: {commands:?}");
    let instants: &[bool] = if seed::tries_all_live() { &[false, true] } else { &[true] };
    for place in places {
        for &sent in instants {
            let killed = shim::killing_at_command(shim::preloaded(live.domsnap()), place as u64 + 1, sent);
            let outcome = killed.run(&args)?;
            let when = if sent { "just after" } else { "before" };
            let healed = (|| {
                ensure!(outcome.status.is_none(), "it was not killed: {outcome}");
                live.domsnap().done(&["recover"])?;
                live.sound()?;
                no_stub(&live)?;
                ensure!(seen(&live)?.0 == 1, "the guest has not seen another ID");
                let snapshots = report::list(&live.domsnap(), NAME)?.snapshots;
                ensure!(snapshots.iter().any(|snapshot| snapshot.name == "s"), "s is gone");
                Ok(())
            })();
            healed.with_context(|| format!("killed {when} {}", commands[place]))?;
        }
    }
    live.verify()?;
    live.finish()
}

/// A guest without the device gets no note, and no stub is opened for it.
#[test]
fn guest_without_an_id_is_left_alone() -> Result<()> {
    let mut live = Live::new()?;
    live.create("s", &["--external", "--memory"])?;
    let (_outputs, file) = shim::outputs()?;
    let args = ["revert", NAME, "s", "--undo=no", "--json"];
    let outcome = shim::counting_commands(shim::preloaded(live.domsnap()), &file).done(&args)?;
    ensure!(!outcome.stdout.contains("vmgenid"), "{outcome}");
    ensure!(!std::fs::read_to_string(&file)?.contains("chardev-add"), "a stub was opened");
    live.sound()?;
    live.finish()
}
