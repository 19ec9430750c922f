//! What befalls a running domain in the middle of things: a QEMU that hangs, a guest that ends itself, an
//! interrupt, a full disk, a damaged memory image, a second domsnap. What was begun is undone or carried
//! through, the guest goes on, and every snapshot holds what it held.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Outcome, status};
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::mounted::Mounted;
use domsnap_tests::report;
use serde_json::{Value, json};
use testguest::{GuestOptions, Version};

fn signal(pid: u32, name: &str) -> Result<()> {
    let status = Command::new("kill").args([format!("-{name}"), pid.to_string()]).status()?;
    ensure!(status.success(), "kill -{name} {pid} failed");
    Ok(())
}

/// A domsnap at work beside the test.
struct Beside(Child, String);

impl Beside {
    fn start(live: &Live, args: &[&str]) -> Result<Self> {
        let mut command = live.domsnap().command(args);
        let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        Ok(Self(child, args.join(" ")))
    }

    fn end(self) -> Result<Outcome> {
        let output = self.0.wait_with_output()?;
        let outcome = Outcome {
            command: format!("domsnap {}", self.1),
            status: output.status.code(),
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        };
        ensure!(!outcome.panicked(), "it panicked: {outcome}");
        Ok(outcome)
    }
}

/// Whether a snapshot is there.
fn is_listed(live: &Live, name: &str) -> Result<bool> {
    let list = report::list(&live.domsnap(), NAME)?;
    Ok(list.snapshots.iter().any(|snapshot| snapshot.name == name))
}

/// The memory image of a snapshot.
fn memory_of(live: &Live, name: &str) -> Result<PathBuf> {
    let list = report::list(&live.domsnap(), NAME)?;
    let found = list.snapshots.into_iter().find(|snapshot| snapshot.name == name);
    Ok(found.and_then(|snapshot| snapshot.memory).context("it has memory")?.file)
}

/// After a create that may have been done or undone: heals, looks that all is sound, and remembers what there
/// is.
fn check_and_prepare(live: &mut Live, name: &str, outcome: &Outcome, before: u64) -> Result<()> {
    live.domsnap().done(&["recover"]).with_context(|| outcome.to_string())?;
    live.sound().with_context(|| outcome.to_string())?;
    let there = is_listed(live, name)?;
    match outcome.status {
        Some(status::DONE) => ensure!(there, "it was said to be done: {outcome}"),
        Some(status::FAILED | status::REFUSED) => ensure!(!there, "it was said to be undone: {outcome}"),
        Some(status::NEEDS_RECOVERY) => {}
        _ => anyhow::bail!("{outcome}"),
    }
    if there {
        let after = live.guest.last_tick().unwrap_or_default();
        live.remember(name, (before, after))?;
    }
    live.verify()
}

/// A qemu that hangs before a command is reported as such and nothing is touched.
#[test]
fn hanging_qemu_is_reported() -> Result<()> {
    let mut live = Live::new()?;
    live.create("s1", &[])?;
    let pid = live.guest.pid().context("it runs")?;
    signal(pid, "STOP")?;
    let outcomes = [&["create", NAME, "s2"][..], &["revert", NAME, "s1"], &["delete", NAME, "s1"]]
        .map(|args| live.domsnap().run(args));
    let looked = live.domsnap().run(&["list", NAME]);
    signal(pid, "CONT")?;
    for outcome in outcomes {
        let outcome = outcome?;
        ensure!(matches!(outcome.status, Some(status::FAILED | status::REFUSED)), "{outcome}");
        ensure!(outcome.stderr.contains("hangs"), "what is wrong is not said: {outcome}");
    }
    ensure!(looked?.status == Some(status::DONE), "a list needs no QEMU that answers");
    live.sound()?;
    live.verify()?;
    live.create("s2", &[])?;
    live.revert("s1", &[])?;
    Ok(())
}

/// A qemu that hangs in the middle of a create leaves what recover heals when it goes on.
#[test]
fn qemu_hanging_in_a_create_is_recovered() -> Result<()> {
    let mut live = Live::new()?;
    live.create("s1", &["--disk", "vda=external"])?;
    for (number, after) in [60, 160].into_iter().enumerate() {
        let name = format!("h{number}");
        let before = live.guest.last_tick().unwrap_or_default();
        let pid = live.guest.pid().context("it runs")?;
        let beside = Beside::start(&live, &["create", NAME, &name, "--external"])?;
        sleep(Duration::from_millis(after));
        signal(pid, "STOP")?;
        let outcome = beside.end();
        signal(pid, "CONT")?;
        let outcome = outcome?;
        // A reply that was not waited for may still be on its way.
        live.wait_running().or_else(|_| live.domsnap().done(&["recover"]).map(drop))?;
        check_and_prepare(&mut live, &name, &outcome, before)?;
    }
    live.revert("s1", &[])?;
    Ok(())
}

/// A guest that ends itself in the middle of a create loses nothing.
#[test]
fn guest_that_ends_in_a_create_loses_nothing() -> Result<()> {
    for (number, after) in [0, 80, 250].into_iter().enumerate() {
        let mut live = Live::new()?;
        live.create("s1", &["--disk", "vdb=external"])?;
        let name = format!("e{number}");
        let before = live.guest.last_tick().unwrap_or_default();
        let beside = Beside::start(&live, &["create", NAME, &name, "--external"])?;
        sleep(Duration::from_millis(after));
        // As QEMU ends when the guest switches itself off. It may be gone before it answers.
        let _ = live.guest.qmp("quit", Value::Null);
        let outcome = beside.end()?;
        live.guest.wait_end()?;
        live.domsnap().done(&["recover"]).with_context(|| outcome.to_string())?;
        let there = is_listed(&live, &name)?;
        ensure!(there || outcome.status != Some(status::DONE), "it was said to be done: {outcome}");
        if there {
            live.remember(&name, (before, u64::MAX >> 1))?;
        }
        live.verify()?;
        live.guest.restart()?;
        live.wait_running()?;
        live.guest.expect_no_bad()?;
        live.domsnap().done(&["revert", NAME, "s1"])?;
        live.sound()?;
    }
    Ok(())
}

/// An interrupt at any moment undoes or carries through.
#[test]
fn interrupt_undoes_or_completes() -> Result<()> {
    let mut live = Live::new()?;
    live.create("s1", &["--disk", "vda=external"])?;
    for (number, after) in [5, 40, 90, 150, 220, 320, 500].into_iter().enumerate() {
        let name = format!("i{number}");
        let before = live.guest.last_tick().unwrap_or_default();
        let beside = Beside::start(&live, &["create", NAME, &name, "--disk", "vdb=external"])?;
        sleep(Duration::from_millis(after));
        signal(beside.0.id(), "INT").or_else(|_| Ok::<_, anyhow::Error>(()))?;
        let outcome = beside.end()?;
        // Before it listens for it, an interrupt ends it as any other process.
        if outcome.status.is_some() {
            check_and_prepare(&mut live, &name, &outcome, before)?;
        } else {
            live.domsnap().done(&["recover"])?;
            ensure!(!is_listed(&live, &name)?, "a process that was ended before it began has done something");
            live.sound()?;
        }
    }
    for after in [30, 120, 300, 600] {
        let beside = Beside::start(&live, &["revert", NAME, "s1"])?;
        sleep(Duration::from_millis(after));
        signal(beside.0.id(), "INT").or_else(|_| Ok::<_, anyhow::Error>(()))?;
        let outcome = beside.end()?;
        live.domsnap().done(&["recover"]).with_context(|| outcome.to_string())?;
        live.sound().with_context(|| outcome.to_string())?;
        live.verify()?;
    }
    Ok(())
}

/// A disk that fills up while memory is written undoes the snapshot and the guest goes on.
#[test]
fn full_disk_in_a_memory_save_is_undone() -> Result<()> {
    // Of the newer QEMU the guest's pages are looked at before; the older one does not tell where they are,
    // so the save begins.
    for (version, status, says) in [
        (Version::New, status::REFUSED, "the guest's memory needs at least"),
        (Version::Old, status::FAILED, "rolled back"),
    ] {
        let small = Mounted::make("ext4", 48 << 20)?;
        let mut live = Live::unregistered(GuestOptions::new().version(version))?;
        let (socket, dir) = (live.guest.qmp_socket().to_owned(), small.path().to_owned());
        let args = ["domain", "add", NAME, "--qmp"].map(|word| word.as_ref());
        live.domsnap()
            .done(&[&args[..], &[socket.as_os_str(), "--memory-dir".as_ref(), dir.as_os_str()]].concat())?;
        live.create("disks", &["--disk-only"])?;
        for kind in ["--internal", "--external"] {
            let outcome = live.domsnap().run(&["create", NAME, "full", kind])?.expect_status(status)?;
            ensure!(outcome.stderr.contains(says), "{outcome}");
            live.sound()?;
            live.verify()?;
            let left: Vec<_> = fs::read_dir(&dir)?.flatten().map(|entry| entry.file_name()).collect();
            ensure!(left.iter().all(|name| name == "lost+found"), "memory was left behind: {left:?}");
        }
        live.revert("disks", &[])?;
    }
    Ok(())
}

/// A memory image that is damaged cut off or gone is refused before anything is touched.
#[test]
fn damaged_memory_is_refused_first() -> Result<()> {
    let mut live = Live::new()?;
    live.create("s1", &["--disk", "vda=external"])?;
    let file = memory_of(&live, "s1")?;
    let whole = fs::read(&file)?;
    let mut damaged = whole.clone();
    let middle = damaged.len() / 2;
    damaged[middle] ^= 0x40;
    let cases = [Some(damaged), Some(whole[..whole.len() - 70_000].to_vec()), Some(Vec::new()), None];
    for (number, case) in cases.into_iter().enumerate() {
        match &case {
            Some(bytes) => fs::write(&file, bytes)?,
            None => fs::remove_file(&file)?,
        }
        let before = live.guest.ticks()?;
        let outcome = live.domsnap().run(&["revert", NAME, "s1"])?;
        ensure!(
            matches!(outcome.status, Some(status::FAILED | status::REFUSED)),
            "case {number} was not refused: {outcome}"
        );
        ensure!(outcome.stderr.contains(file.to_str().context("text")?), "the file is not named: {outcome}");
        ensure!(live.guest.ticks()? >= before, "the guest went back");
        live.sound().with_context(|| format!("case {number}: {outcome}"))?;
    }
    fs::write(&file, &whole)?;
    live.revert("s1", &[])?;
    Ok(())
}

/// Of two domsnap on one domain both end well or one is refused, with the other's process.
#[test]
fn second_domsnap_waits_or_is_refused() -> Result<()> {
    let mut live = Live::new()?;
    for round in 0..3 {
        let names = [format!("a{round}"), format!("b{round}")];
        let before = live.guest.last_tick().unwrap_or_default();
        let both: Vec<_> = names
            .iter()
            .map(|name| Beside::start(&live, &["create", NAME, name, "--external"]))
            .collect::<Result<_>>()?;
        let mut done = 0;
        for (beside, name) in both.into_iter().zip(&names) {
            let outcome = beside.end()?;
            let there = is_listed(&live, name)?;
            match outcome.status {
                Some(status::DONE) => {
                    ensure!(there, "{outcome}");
                    done += 1;
                    let after = live.guest.last_tick().unwrap_or_default();
                    live.remember(name, (before, after))?;
                }
                _ => ensure!(!there && outcome.stderr.contains("being worked on"), "{outcome}"),
            }
        }
        ensure!(done > 0, "neither was done");
        live.sound()?;
        live.verify()?;
    }
    Ok(())
}

/// A disk that was unplugged is named and nothing is touched.
#[test]
fn unplugged_disk_is_named() -> Result<()> {
    // On this machine's bus a disk can be unplugged.
    let mut live = Live::of(GuestOptions::new().machine("pc"))?;
    live.create("s1", &["--disk-only"])?;
    // The guest does not use it any more, or it would not let go of it.
    live.guest.qmp("device_del", json!({ "id": "vdb" }))?;
    let gone = |live: &Live| -> Result<bool> {
        let found = live.guest.qmp("query-block", Value::Null)?;
        Ok(!found
            .as_array()
            .into_iter()
            .flatten()
            .any(|drive| drive["qdev"].as_str().is_some_and(|qdev| qdev.contains("/vdb/"))))
    };
    for _ in 0..200 {
        if gone(&live)? {
            break;
        }
        sleep(Duration::from_millis(50));
    }
    ensure!(gone(&live)?, "the guest keeps its disk");
    for args in [&["create", NAME, "s2"][..], &["revert", NAME, "s1"], &["delete", NAME, "s1"]] {
        let outcome = live.domsnap().run(args)?.expect_status(status::REFUSED)?;
        ensure!(outcome.stderr.contains("vdb"), "the disk is not named: {outcome}");
    }
    ensure!(is_listed(&live, "s1")?, "the snapshot is there");
    // The others of a running domain can be taken without it.
    live.guest.quit()?;
    live.domsnap().done(&["revert", NAME, "s1"])?;
    Ok(())
}

/// Under new paths a running guest writes the overlay that the message names.
#[test]
fn new_path_of_a_running_guest_is_named() -> Result<()> {
    let live = Live::unregistered(GuestOptions::new())?;
    let socket = live.guest.qmp_socket().to_owned();
    let args = ["domain", "add", NAME, "--active-path", "new", "--qmp"].map(|word| word.as_ref());
    live.domsnap().done(&[&args[..], &[socket.as_os_str()]].concat())?;
    let first = live.guest.disk(0);
    let before = fs::metadata(&first)?.modified()?;
    live.domsnap().done(&["create", NAME, "s1", "--external"])?;
    let now = |live: &Live| -> Result<PathBuf> {
        let reported: Value = live.domsnap().done(&["domain", "show", NAME, "--json"])?.json()?;
        let path = reported["domain"]["disks"][0]["path"].as_str().context("a path")?.to_owned();
        Ok(path.into())
    };
    let second = now(&live)?;
    ensure!(second != first && second.exists(), "the disk has the path that it had");
    live.guest.wait_ticks(20)?;
    live.guest.expect_no_bad()?;
    let frozen = fs::metadata(&first)?.modified()?;
    live.guest.wait_ticks(20)?;
    ensure!(fs::metadata(&first)?.modified()? == frozen && frozen >= before, "the frozen image is written");
    ensure!(fs::metadata(&second)?.len() > 200_000, "nothing is written to the overlay");
    live.domsnap().done(&["create", NAME, "s2", "--external"])?;
    let ticks = live.guest.ticks()?;
    live.domsnap().done(&["revert", NAME, "s1"])?;
    ensure!(live.guest.ticks()? < ticks + 100, "the guest goes on where it was");
    live.guest.wait_ticks(5)?;
    live.guest.expect_no_bad()?;
    live.guest.verify_blocks()?;
    live.domsnap().done(&["delete", NAME, "s2"])?;
    live.domsnap().done(&["delete", NAME, "s1"])?;
    live.guest.wait_ticks(5)?;
    live.guest.expect_no_bad()?;
    live.guest.verify_blocks()?;
    Ok(())
}
