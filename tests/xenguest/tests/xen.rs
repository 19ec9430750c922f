//! What the machine with Xen itself must do, or no other test in it would show anything.
use std::process::ExitCode;

use anyhow::{Result, ensure};
use xenguest::{
    TestCase,
    inside::{Backend, DomU, program, xl},
};

const CASES: &[TestCase] = &[
    TestCase::new(
        // A guest of xen ticks and its memory and disks agree over a save and a restore.
        "guest_agrees_over_save_and_restore",
        saved_and_restored,
    ),
    // A guest whose disk was put back and its memory not says so.
    TestCase::new("reverted_disk_alone_is_noticed", wrong_disk_is_noticed),
];

fn main() -> ExitCode {
    xenguest::main(CASES)
}

fn saved_and_restored() -> Result<()> {
    let mut guest = DomU::start("saved", &[Backend::Qcow2, Backend::RawLoop])?;
    guest.expect_no_bad()?;
    let (save, before) = (guest.dir().join("save"), guest.ticks()?);
    let save = save.to_string_lossy();
    xl(&["save", "saved", &save])?;
    ensure!(guest.domid()?.is_none(), "a guest that was saved runs on");
    let saved_at = guest.last_tick().unwrap_or_default();
    let place = guest.place();
    xl(&["restore", &save])?;
    let first = guest.first_tick_since(place)?;
    ensure!(
        first > before && first.abs_diff(saved_at) <= 1,
        "it goes on at {first}, was saved at {saved_at}"
    );
    guest.expect_no_bad()
}

fn wrong_disk_is_noticed() -> Result<()> {
    let guest = DomU::start("wrong", &[Backend::Qcow2, Backend::Qcow2])?;
    guest.expect_no_bad()?;
    let (save, disk) = (guest.dir().join("save"), guest.disk(1).to_string_lossy().into_owned());
    let save = save.to_string_lossy();
    xl(&["save", "-p", "wrong", &save])?;
    program("/bin/cp", &[&disk, "/vm/wrong.kept"])?.ok()?;
    xl(&["unpause", "wrong"])?;
    guest.wait_ticks(5)?;
    xl(&["destroy", "wrong"])?;
    // One disk of the instant of the memory, and one that is older or newer.
    program("/bin/mv", &["/vm/wrong.kept", &disk])?.ok()?;
    let place = guest.place();
    xl(&["restore", &save])?;
    guest.first_tick_since(place)?;
    guest.wait_ticks(3)?;
    let bad = guest.bad();
    ensure!(bad.iter().any(|line| line.starts_with("BAD ")), "it did not notice: {bad:?}");
    Ok(())
}
