//! Groups of guests that talk to each other: no snapshot of a group has a message that its sender has not
//! sent; of snapshots that were taken one after the other some have.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::{qemu, report, seed, shim};
use serde_json::Value;
use testguest::{Guest, GuestOptions};

/// What precedes the last number that the receiver got, on its disk.
const MARK: &[u8] = b"RECEIVED-FROM-SENDER:";

/// Two guests in one catalogue. The sender's counter, which it has on its disks before it says it, is its
/// message; a thread brings the latest one to the receiver, which writes it to its disk.
struct Pair {
    sender: Guest,
    receiver: Guest,
    offset: u64,
    state: tempfile::TempDir,
}

impl Pair {
    fn new() -> Result<Self> {
        let options = || GuestOptions::new().deadline(Duration::from_secs(240));
        let (sender, receiver) = (options().start()?, options().start()?);
        let state = tempfile::Builder::new().prefix("domsnap-group-").tempdir()?;
        let offset = sender.counter_offset(0)?;
        let pair = Self { sender, receiver, offset, state };
        for (name, guest) in [("a", &pair.sender), ("b", &pair.receiver)] {
            let socket = guest.qmp_socket().display().to_string();
            pair.domsnap().done(&["domain", "add", name, "--qmp", &socket])?;
        }
        pair.deliver(0)?;
        Ok(pair)
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.state.path().join("state"))
    }

    /// Gives the receiver a number, which is on its disk when this returns.
    fn deliver(&self, number: u64) -> Result<()> {
        let mark = String::from_utf8_lossy(MARK);
        let line =
            format!("printf '{mark}%012d' {number} | dd of=/vda/received conv=fsync,notrunc 2>/dev/null");
        let done = self.receiver.shell(&line)?;
        ensure!(done.status == 0, "the receiver cannot write: {done:?}");
        Ok(())
    }

    /// Does `work` while messages go from the sender to the receiver; gives how many were delivered.
    fn talking<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(T, u64)> {
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let talk = scope.spawn(|| -> Result<u64> {
                let (mut last, mut count) = (0, 0);
                while !stop.load(Ordering::Relaxed) {
                    match self.sender.last_tick().filter(|tick| *tick != last) {
                        Some(tick) => {
                            self.deliver(tick)?;
                            (last, count) = (tick, count + 1);
                        }
                        None => std::thread::sleep(Duration::from_millis(2)),
                    }
                }
                Ok(count)
            });
            // Some are delivered before.
            std::thread::sleep(Duration::from_millis(300));
            let done = work();
            stop.store(true, Ordering::Relaxed);
            let count = talk.join().map_err(|_| anyhow::anyhow!("the messenger panicked"))?;
            Ok((done?, count?))
        })
    }

    /// What was sent and received by the instants of a snapshot of this name, by the disks alone.
    fn exchanged(&self, name: &str) -> Result<(u64, u64)> {
        let disk = |domain: &str| -> Result<Vec<u8>> {
            let list = report::list(&self.domsnap(), domain)?;
            let snapshot = list.snapshots.iter().find(|snapshot| snapshot.name == name);
            let point = snapshot.and_then(|found| found.points.iter().find(|point| point.target == "vda"));
            let point = point.with_context(|| format!("{domain} has no {name}"))?;
            qemu::read(&point.layer, point.tag.as_deref())
        };
        let sent = disk("a")?;
        let place = usize::try_from(self.offset)?;
        let ring = sent.get(place..place + testguest::COUNTER_BYTES).context("the disk is too short")?;
        // A tick writes one slot; a torn one shows no counter, and none was said of it.
        let sent = ring.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).max();
        let bytes = disk("b")?;
        let found =
            bytes.windows(MARK.len()).position(|part| part == MARK).context("nothing was received")?;
        let digits = bytes.get(found + MARK.len()..found + MARK.len() + 12).context("no number")?;
        let received = std::str::from_utf8(digits)?.parse().context("a number")?;
        Ok((sent.context("no counter")?, received))
    }

    fn sound(&self) -> Result<()> {
        for guest in [&self.sender, &self.receiver] {
            guest.expect_no_bad()?;
        }
        Ok(())
    }
}

/// The commands that both guests got come in this order: each of the first before all of the second.
fn in_order(file: &Path, names: [&str; 3]) -> Result<()> {
    let commands = std::fs::read_to_string(file)?;
    let of = |name: &str| -> Vec<usize> {
        let is = |(_, line): &(usize, &str)| line.split(' ').next_back() == Some(name);
        commands.lines().enumerate().filter(is).map(|(place, _)| place).collect()
    };
    let [first, second, third] = names.map(of);
    let apart = |before: &[usize], after: &[usize]| before.iter().max() < after.iter().min();
    ensure!(
        first.len() >= 2
            && second.len() >= 2
            && third.len() >= 2
            && apart(&first, &second)
            && apart(&second, &third),
        "{names:?} are at {first:?}, {second:?}, {third:?} of:\n{commands}"
    );
    Ok(())
}

/// In every snapshot of the group, what was received had been sent; without the group, it had not. Reverted
/// with memory, both guests go on, in their processes, with memory and disks of one instant.
#[test]
fn no_message_is_received_before_it_is_sent() -> Result<()> {
    let pair = Pair::new()?;
    let domsnap = pair.domsnap();
    let kinds = [
        ("disks-1", &["--disk-only", "--external"][..]),
        ("memory-1", &["--external"]),
        ("disks-2", &["--disk-only", "--internal"]),
        ("memory-2", &["--internal"]),
    ];
    let kinds = if seed::tries_all_live() { &kinds[..] } else { &kinds[..2] };
    for (name, more) in kinds {
        let args = [&["create", "b,a", name, "--group", "--json"], *more].concat();
        let (_outputs, file) = shim::outputs()?;
        let counting = shim::counting_commands(shim::preloaded(domsnap.clone()), &file);
        let (said, count) = pair.talking(|| counting.done(&args)?.json::<Value>())?;
        in_order(&file, ["stop", "transaction", "cont"])?;
        let domains = said["domains"].as_array().context("domains")?;
        let pauses: Vec<_> = domains.iter().filter_map(|d| d["outcome"]["downtime_us"].as_u64()).collect();
        let (sent, received) = pair.exchanged(name)?;
        println!("{name}: sent {sent}, received {received} ({count} messages); pauses {pauses:?} us");
        ensure!(count > 1 && received > 0, "too little was said: {count} messages, the last {received}");
        ensure!(received <= sent, "{name}: {received} was received, and {sent} is the last that was sent");
        pair.sound().context(*name)?;
    }

    // The control: the receiver's snapshot is taken after the sender's.
    let until = Instant::now() + Duration::from_secs(240);
    for number in 0.. {
        let name = format!("control-{number}");
        let one = |domain| domsnap.done(&["create", domain, &name, "--disk-only", "--internal"]);
        pair.talking(|| one("a").and_then(|_| one("b")))?;
        let (sent, received) = pair.exchanged(&name)?;
        println!("{name}: sent {sent}, received {received}");
        if received > sent {
            break;
        }
        ensure!(Instant::now() < until, "the test cannot see two instants");
    }

    let ids = (pair.sender.pid(), pair.receiver.pid());
    let before = (pair.sender.ticks()?, pair.receiver.ticks()?);
    let (_outputs, file) = shim::outputs()?;
    let counting = shim::counting_commands(shim::preloaded(domsnap.clone()), &file);
    let said: Value = counting.done(&["revert", "a,b", "memory-1", "--group", "--json"])?.json()?;
    in_order(&file, ["stop", "snapshot-load", "cont"])?;
    for member in said["domains"].as_array().context("domains")? {
        ensure!(member["outcome"]["guest"] == "restored" && member["power"] == "running", "{member}");
    }
    pair.sound().context("after the revert")?;
    ensure!(ids == (pair.sender.pid(), pair.receiver.pid()), "a process was started again");
    let after = (pair.sender.ticks()?, pair.receiver.ticks()?);
    ensure!(after.0 < before.0 && after.1 < before.1, "they are at {after:?}, and were at {before:?}");

    failing_member_leaves_both_running(&pair)?;
    domsnap.done(&["delete", "a,b", "disks-1", "--group"])?;
    pair.sound()?;
    ensure!(pair.exchanged("memory-1").is_ok_and(|(sent, received)| received <= sent));
    Ok(())
}

/// The path of one guest's disk cannot be moved in the pause: both go on, and neither has the snapshot.
fn failing_member_leaves_both_running(pair: &Pair) -> Result<()> {
    let domsnap = pair.domsnap();
    let args = ["create", "a,b", "failed", "--group", "--disk-only", "--external"];
    let watched: &Path = pair.receiver.dir();
    let (_outputs, file) = shim::outputs()?;
    shim::counting(shim::watching(domsnap.clone(), watched)?, &file).done(&args)?;
    domsnap.done(&["delete", "a,b", "failed", "--group"])?;
    let moves =
        |counted: &shim::Counted| counted.line.starts_with("rename ") && counted.line.contains("vda.qcow2");
    let operations = shim::counted(&file)?;
    let moved = operations.iter().find(|counted| moves(counted)).context("no path was moved")?;
    let failing =
        shim::failing(shim::watching(domsnap.clone(), watched)?, moved.number, "EIO", shim::Often::Once);
    let failed = failing.run(&args)?.expect_status(status::FAILED)?;
    ensure!(failed.stderr.contains("rolled back in all 2 domains of the group"), "{failed}");
    for name in ["a", "b"] {
        let list = report::list(&domsnap, name)?;
        ensure!(list.snapshots.iter().all(|snapshot| snapshot.name != "failed"), "{name} has it");
    }
    pair.sound().context("after a member failed")
}
