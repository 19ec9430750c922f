//! A running guest: how long it stands still, how fast it is back, and what of a create is our own time.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use testguest::{Guest, GuestOptions};

use crate::bench::Bench;
use crate::child::Cost;
use crate::proxy::Proxy;
use crate::row::{OURS, Row, Target};

/// The rows of [`measure`].
pub const ROWS: &[&str] =
    &["live-stall-128", "live-stall-512", "live-stall-2048", "live-revert", "live-window-8", "live-own-8"];

/// QEMU's own way, as the peers' labels have it.
const SAVE: &str = "QEMU snapshot-save";
const LOAD: &str = "QEMU snapshot-load";

/// All rows.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, mib, dirty, rate) in
        [(ROWS[0], 128, 40, 100.0), (ROWS[1], 512, 300, 100.0), (ROWS[2], 2048, 300, 100.0)]
    {
        if bench.wants(name) && !(bench.quick && mib > 512) {
            rows.push(stall(bench, name, mib, dirty, rate)?);
        }
    }
    if bench.wants(ROWS[3]) {
        rows.push(revert(bench)?);
    }
    if bench.wants(ROWS[4]) || bench.wants(ROWS[5]) {
        rows.extend(eight(bench)?);
    }
    Ok(rows)
}

/// A guest that is registered.
struct Running<'a> {
    bench: &'a Bench,
    guest: Guest,
}

impl<'a> Running<'a> {
    fn new(bench: &'a Bench, options: GuestOptions) -> Result<Running<'a>> {
        let guest = options.inside(bench.path()).deadline(Duration::from_secs(120)).start()?;
        let running = Running { bench, guest };
        let socket = running.guest.qmp_socket().to_owned();
        running.run(&["domain", "add", "live", "--qmp", &socket.to_string_lossy()])?;
        Ok(running)
    }

    /// Runs domsnap; gives its JSON and how long it took.
    fn run(&self, words: &[&str]) -> Result<(Value, Duration)> {
        let mut command = self.bench.domsnap(&self.guest.dir().join("state"), words);
        command.arg("--json");
        let begun = Instant::now();
        let output = command.output()?;
        let (took, text) = (begun.elapsed(), String::from_utf8_lossy(&output.stdout));
        ensure!(output.status.success(), "domsnap {} ended with {}: {text}", words.join(" "), output.status);
        Ok((serde_json::from_str(&text)?, took))
    }

    fn downtime(answer: &Value) -> Result<Duration> {
        let time = answer["outcome"]["downtime_us"].as_u64();
        time.map(Duration::from_micros).with_context(|| format!("no downtime in {answer}"))
    }

    /// The nodes on top of its disks.
    fn nodes(&self) -> Result<Vec<String>> {
        let drives = self.guest.qmp("query-block", Value::Null)?;
        let nodes = drives.as_array().into_iter().flatten();
        let nodes: Vec<String> =
            nodes.filter_map(|drive| drive["inserted"]["node-name"].as_str()).map(str::to_owned).collect();
        ensure!(!nodes.is_empty(), "QEMU tells no drive: {drives}");
        Ok(nodes)
    }

    /// One of QEMU's snapshot jobs, to its end.
    fn job(&self, command: &str, tag: &str) -> Result<()> {
        let nodes = self.nodes()?;
        let mut arguments = json!({ "job-id": "bench", "tag": tag, "devices": nodes });
        if command != "snapshot-delete" {
            arguments["vmstate"] = json!(nodes[0]);
        }
        self.guest.qmp(command, arguments)?;
        loop {
            let jobs = self.guest.qmp("query-jobs", Value::Null)?;
            let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == "bench");
            let job = job.with_context(|| format!("{command}: the job is gone"))?;
            if job["status"] == "concluded" {
                let error = job["error"].as_str().map(str::to_owned);
                self.guest.qmp("job-dismiss", json!({ "id": "bench" }))?;
                return error.map_or(Ok(()), |error| bail!("{command}: {error}"));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

fn sample(row: &mut Row, label: &str, wall: Duration) {
    row.sample(label, Cost { wall, peak: 0 });
}

/// The guest's largest stall, by its own ticks.
fn stall(bench: &Bench, name: &'static str, mib: u64, dirty: u64, rate: f64) -> Result<Row> {
    let what = format!(
        "largest stall of a guest of {mib} MiB, {dirty} MiB of it dirtied at {rate} MiB/s, at a live create with memory"
    );
    let mut row = Row::new(name, what, &[Target::Faster(2.0)]);
    let running = Running::new(bench, GuestOptions::new().memory_mib(mib))?;
    let guest = &running.guest;
    guest.dirty(dirty, rate)?;
    // All of it is written once before it counts.
    std::thread::sleep(Duration::from_secs_f64(dirty as f64 / rate + 1.0));
    let mut way = String::new();
    bench.repeat(if bench.quick { 1 } else { 5 }, Duration::from_secs(90), |_| {
        guest.wait_ticks(20)?;
        guest.forget_gap();
        let (answer, _) = running.run(&["create", "live", "ours", "--internal"])?;
        guest.wait_ticks(5)?;
        sample(&mut row, OURS, guest.largest_gap());
        way = answer["outcome"]["way"].as_str().unwrap_or_default().to_owned();
        running.run(&["delete", "live", "ours"])?;
        guest.wait_ticks(20)?;
        guest.forget_gap();
        running.job("snapshot-save", "theirs")?;
        guest.wait_ticks(5)?;
        sample(&mut row, SAVE, guest.largest_gap());
        running.job("snapshot-delete", "theirs")
    })?;
    guest.forget_gap();
    guest.wait_ticks(100)?;
    row.note(format!(
        "ours by {way}; without any snapshot the longest time between two ticks of this guest was {} ms",
        guest.largest_gap().as_millis()
    ));
    guest.expect_no_bad()?;
    Ok(row)
}

/// Back to memory and disks, in place.
fn revert(bench: &Bench) -> Result<Row> {
    let what = "revert in place of a guest of 512 MiB, 300 MiB of it dirtied at 100 MiB/s, whole process";
    let mut row = Row::new(ROWS[3], what, &[]);
    let running = Running::new(bench, GuestOptions::new().memory_mib(512))?;
    let guest = &running.guest;
    guest.dirty(300, 100.0)?;
    std::thread::sleep(Duration::from_secs(4));
    running.run(&["create", "live", "ours", "--internal"])?;
    guest.wait_ticks(10)?;
    bench.repeat(if bench.quick { 1 } else { 5 }, Duration::from_secs(60), |_| {
        let (answer, wall) = running.run(&["revert", "live", "ours"])?;
        sample(&mut row, OURS, wall);
        sample(&mut row, "domsnap, the guest's downtime", Running::downtime(&answer)?);
        guest.wait_ticks(10)
    })?;
    running.run(&["delete", "live", "ours"])?;
    running.job("snapshot-save", "theirs")?;
    bench.repeat(if bench.quick { 1 } else { 5 }, Duration::from_secs(60), |_| {
        guest.qmp("stop", Value::Null)?;
        let begun = Instant::now();
        running.job("snapshot-load", "theirs")?;
        guest.qmp("cont", Value::Null)?;
        sample(&mut row, LOAD, begun.elapsed());
        guest.wait_ticks(10)
    })?;
    guest.expect_no_bad()?;
    row.note(
        "QEMU's own load checks no memory image, and its snapshot is in the disks; the aim, 5 times faster than virsh \
         snapshot-revert, was not measured where virsh is not installed",
    );
    Ok(row)
}

/// Eight disks, no memory.
fn eight(bench: &Bench) -> Result<Vec<Row>> {
    let mut window = Row::new(
        ROWS[4],
        "from STOP to RESUME of a create of eight disks without memory",
        &[Target::Under(Duration::from_millis(50))],
    );
    let mut own = Row::new(
        ROWS[5],
        "our own part of that create: the process's time less the time that QEMU took to answer",
        &[Target::Under(Duration::from_millis(20))],
    );
    let running = Running::new(bench, GuestOptions::new().disks(8).disk_mib(16))?;
    bench.repeat(if bench.quick { 1 } else { 9 }, Duration::from_secs(60), |_| {
        let (answer, _) = running.run(&["create", "live", "x", "--disk-only", "--external"])?;
        sample(&mut window, OURS, Running::downtime(&answer)?);
        running.run(&["delete", "live", "x"]).map(drop)
    })?;
    running.run(&["domain", "remove", "live"])?;
    let proxy = Proxy::start(running.guest.qmp_socket())?;
    running.run(&["domain", "add", "live", "--qmp", &proxy.socket().to_string_lossy()])?;
    bench.repeat(if bench.quick { 1 } else { 9 }, Duration::from_secs(60), |_| {
        proxy.forget();
        let (_, wall) = running.run(&["create", "live", "x", "--disk-only", "--external"])?;
        let (answered, commands) = proxy.answered();
        sample(&mut own, OURS, wall.saturating_sub(answered));
        sample(&mut own, "QEMU's answers", answered);
        own.count("commands to QEMU", commands);
        running.run(&["delete", "live", "x"]).map(drop)
    })?;
    running.guest.expect_no_bad()?;
    Ok(vec![window, own])
}
