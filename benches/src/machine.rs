//! Running guests, registered with domsnap, and QEMU's own snapshots of the same guests.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use testguest::{Guest, GuestOptions};

use crate::bench::Bench;
use crate::chain::GUEST;
use crate::child::{self, Cost};

/// The name of QEMU's job.
const JOB: &str = "bench";

/// One guest.
pub struct Running<'a> {
    bench: &'a Bench,
    /// The guest.
    pub guest: Guest,
    state: PathBuf,
}

/// What a change took.
#[derive(Debug)]
pub struct Change {
    /// Of the process.
    pub cost: Cost,
    /// Time for which the guest was paused, by domsnap's own measure.
    pub downtime: Duration,
    /// The method of the instant, where it has one.
    pub method: Option<String>,
}

/// How long the guest rests between two ticks: its longest time without a tick is what a row reports as its
/// gap, and is never shorter than this.
pub const TICK_MS: u64 = 5;

impl<'a> Running<'a> {
    /// Starts it.
    pub fn start(bench: &'a Bench, options: GuestOptions) -> Result<Running<'a>> {
        let guest = options.tick_ms(TICK_MS).inside(bench.path()).start()?;
        let state = guest.dir().join("state");
        Ok(Running { bench, guest, state })
    }

    /// Registers it by that socket.
    pub fn register(&self, qmp: &Path) -> Result<()> {
        let mut add = self.domsnap(&["domain", "add", GUEST, "--qmp"]);
        add.arg(qmp).arg("--agent").arg(self.guest.agent_socket());
        child::run(&mut add).map(drop)
    }

    /// domsnap with its state directory.
    pub fn domsnap(&self, args: &[&str]) -> Command {
        self.bench.domsnap(&self.state, args)
    }

    /// Runs a change, which must leave the guest sound.
    pub fn change(&self, args: &[&str]) -> Result<Change> {
        let (cost, answer) = child::answered(self.domsnap(args).arg("--json"))?;
        let answer: Value = serde_json::from_str(&answer).context("domsnap's answer is no JSON")?;
        let outcome = &answer["outcome"];
        let downtime = outcome["downtime_us"].as_u64();
        let downtime = downtime.with_context(|| format!("domsnap's answer has no downtime: {answer}"))?;
        let method = outcome["method"].as_str().map(str::to_owned);
        self.sound().with_context(|| format!("after domsnap {}", args.join(" ")))?;
        Ok(Change { cost, downtime: Duration::from_micros(downtime), method })
    }

    /// Deletes a snapshot.
    pub fn delete(&self, name: &str) -> Result<()> {
        child::run(&mut self.domsnap(&["delete", GUEST, name])).map(drop)
    }

    /// The guest runs and found memory and disks of one instant at each tick.
    pub fn sound(&self) -> Result<()> {
        self.guest.expect_no_bad()
    }

    /// The longest time between two of the guest's ticks while `work` is done, and what that gave.
    pub fn stall<T>(&self, work: impl FnOnce() -> Result<T>) -> Result<(Duration, T)> {
        self.guest.wait_ticks(3)?;
        self.guest.forget_gap();
        let done = work()?;
        self.guest.wait_ticks(3)?;
        Ok((self.guest.largest_gap(), done))
    }

    /// QEMU's `snapshot-save` of memory and all disks.
    pub fn save(&self, tag: &str) -> Result<Duration> {
        let nodes = self.nodes()?;
        self.job("snapshot-save", json!({ "tag": tag, "vmstate": nodes.first(), "devices": nodes }))
    }

    /// QEMU's `snapshot-load` of the same, until the guest runs again.
    pub fn load(&self, tag: &str) -> Result<Duration> {
        let nodes = self.nodes()?;
        let start = Instant::now();
        self.job("snapshot-load", json!({ "tag": tag, "vmstate": nodes.first(), "devices": nodes }))?;
        if self.guest.qmp("query-status", Value::Null)?["running"] != true {
            self.guest.qmp("cont", Value::Null)?;
        }
        let wall = start.elapsed();
        self.sound().context("after snapshot-load").map(|()| wall)
    }

    /// QEMU's `snapshot-delete` of the same.
    pub fn forget(&self, tag: &str) -> Result<()> {
        self.job("snapshot-delete", json!({ "tag": tag, "devices": self.nodes()? })).map(drop)
    }

    /// The nodes that the guest's disks write now.
    fn nodes(&self) -> Result<Vec<String>> {
        let found = self.guest.qmp("query-block", Value::Null)?;
        let devices = found.as_array().context("query-block gives no list")?;
        let node = |target: &String| {
            let named = |device: &&Value| {
                device["qdev"].as_str().is_some_and(|path| path.split('/').any(|part| part == target))
            };
            let node = devices.iter().find(named).and_then(|device| device["inserted"]["node-name"].as_str());
            node.map(str::to_owned).with_context(|| format!("{target} has no node: {found}"))
        };
        self.guest.targets().iter().map(node).collect()
    }

    fn job(&self, command: &str, mut arguments: Value) -> Result<Duration> {
        arguments["job-id"] = JOB.into();
        let start = Instant::now();
        self.guest.qmp(command, arguments)?;
        let wall = loop {
            let jobs = self.guest.qmp("query-jobs", Value::Null)?;
            let job = jobs.as_array().and_then(|jobs| jobs.iter().find(|job| job["id"] == JOB));
            let job = job.with_context(|| format!("{command}: its job is gone"))?;
            if job["status"] == "concluded" {
                ensure!(job["error"].is_null(), "{command}: {}", job["error"]);
                break start.elapsed();
            }
            if start.elapsed() > Duration::from_secs(300) {
                bail!("{command} has not ended within five minutes: {job}");
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        self.guest.qmp("job-dismiss", json!({ "id": JOB }))?;
        Ok(wall)
    }
}
