//! Undo of reverts of a running guest: the process stays, memory and disks are of one instant, and an undo of
//! the undo brings back what there was.

use anyhow::{Result, ensure};
use domsnap_tests::domsnap::status;
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::report;
use serde_json::Value;

fn outcome(live: &Live, args: &[&str]) -> Result<Value> {
    let answer: Value = live.domsnap().done(&[args, &["--json"]].concat())?.json()?;
    Ok(answer["outcome"].clone())
}

/// With memory, the guest continues where the revert interrupted it, and again where the undo did.
fn with_memory(kind: &[&str]) -> Result<()> {
    let mut live = Live::new()?;
    live.create("s1", kind)?;
    let (pid, boots) = (live.guest.pid(), live.guest.boots());
    let mut then = live.guest.ticks()?;
    ensure!(live.revert("s1", &["--undo=memory"])?.kept, "nothing was kept");
    for number in 0..3 {
        let left = live.guest.last_tick().unwrap_or_default();
        ensure!(outcome(&live, &["undo", NAME])?["kept"] == true);
        ensure!(
            live.guest.pid() == pid && live.guest.boots() == boots,
            "it is not the same process and boot"
        );
        let now = live.guest.ticks()?;
        // Every second time it is in the past of the other's line.
        ensure!(
            (then..then + 2000).contains(&now),
            "undo {number}: the guest is at {now}, and left at {then}"
        );
        live.sound()?;
        then = left;
    }
    let kept = report::list(&live.domsnap(), NAME)?.previous;
    ensure!(kept.is_some_and(|kept| kept.memory.is_some() && kept.frees.is_some()), "no memory is kept");
    live.run(&["undo", NAME, "--forget"])?;
    live.domsnap().run(&["undo", NAME])?.expect_status(status::REFUSED)?;
    live.verify()?;
    live.delete(&["s1"], &[])?;
    live.finish()
}

/// Undo with memory, external snapshots.
#[test]
fn undo_with_memory_external() -> Result<()> {
    with_memory(&["--external"])
}

/// Undo with memory, internal snapshots.
#[test]
fn undo_with_memory_internal() -> Result<()> {
    with_memory(&["--internal"])
}

/// Without memory an undo resets the guest, which boots from disks of one instant: those that the revert
/// replaced.
fn disks_alone(kind: &[&str]) -> Result<()> {
    let mut live = Live::new()?;
    live.create("s1", kind)?;
    let pid = live.guest.pid();
    let later = live.guest.ticks()?;
    // By default, because it reserves nothing.
    ensure!(live.revert("s1", &["--undo=free"])?.kept, "nothing was kept");
    let boots = live.guest.boots();
    let undone = outcome(&live, &["undo", NAME])?;
    ensure!(undone["guest"] == "reset" && undone["kept"] == true, "{undone}");
    live.guest.wait_boots(boots + 1)?;
    let counters = live.guest.counters_at_boot();
    ensure!(
        counters.iter().all(|counter| counter.is_some_and(|counter| counter + 3 >= later)),
        "the disks are at {counters:?}, and the revert came after {later}"
    );
    ensure!(live.guest.pid() == pid, "the QEMU is another process");
    live.load()?;
    live.sound()?;
    // A create gives the state up, and the layers with it.
    live.create("s2", kind)?;
    ensure!(report::list(&live.domsnap(), NAME)?.previous.is_none());
    live.verify()?;
    live.delete(&["s1", "s2"], &[])?;
    live.finish()
}

/// Undo without memory, external snapshots.
#[test]
fn undo_of_disks_external() -> Result<()> {
    disks_alone(&["--external"])
}

/// Undo without memory, internal snapshots.
#[test]
fn undo_of_disks_internal() -> Result<()> {
    disks_alone(&["--internal"])
}

/// A snapshot is held while the guest runs, and is then not deleted.
#[test]
fn holds_on_a_running_domain() -> Result<()> {
    let mut live = Live::new()?;
    live.create("s1", &["--external"])?;
    live.run(&["hold", NAME, "s1", "--holder", "backup"])?;
    let refused = live.domsnap().run(&["delete", NAME, "s1"])?.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("held by backup"), "{refused}");
    live.run(&["delete", NAME, "s1", "--defer"])?;
    live.verify()?;
    live.run(&["release", NAME, "s1", "--holder", "backup"])?;
    ensure!(report::list(&live.domsnap(), NAME)?.snapshots.is_empty());
    live.forget("s1");
    live.sound()?;
    live.finish()
}
