//! Holds the disk requests of a guest with I/O threads while the guest is being stopped.
//!
//! QEMU 10.0.2 loses interrupts if its guest is stopped while an I/O thread completes requests. This was seen
//! with `stop` and `cont` alone, without domsnap (docs/performance.md has the figures). By its source, since
//! 8.2 the thread defers its notifications to the end of its round. The stop removes the notifier as soon as
//! the requests are counted as done. The guest then waits for ever for a request that is complete, and so
//! does its saved memory.
//!
//! So each disk is drained before the stop. A mirror job that copies nothing (`sync=none`) to a node that
//! stores nothing is asked to end, and may not end yet (`auto-finalize=false`). Until it ends, QEMU takes no
//! requests from the guest, and earlier ones have been completed and notified. The job is ended by a cancel
//! that is not forced, and never by `job-complete`. So a user who finalises the job after a crash of ours
//! cannot put the empty node in the disk's place. A crash leaves the guest's requests waiting;
//! [`release_left`] ends that before anything else is done.
//!
//! A request that a thread takes from its queue while the drain begins waits in QEMU until the release, which
//! comes after the stop: the thread would complete it when the notifier is gone, and its interrupt would be
//! lost too (seen in one of 200 stops on a busy machine). Such a request is counted by its queue as taken and
//! not completed. Then the disks are released and drained again: the guest is stopped when no queue has one.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use qmp::{Job, JobStatus};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    error::Result,
    machine::Machine,
    name::{Name, is_ours},
};

/// The first QEMU whose I/O threads defer notifications.
const DEFERS: (u64, u64, u64) = (8, 2, 0);

/// Prefix of the names of these jobs.
const JOB: &str = "domsnap-hold-";

/// Prefix of the names of the nodes that store nothing.
const NODE: &str = "domsnap-hn-";

/// Time limit for each of the two states; after it the guest is stopped without a hold. Long, because a
/// machine on which these take seconds is the one that loses interrupts.
const PATIENCE: Duration = Duration::from_secs(30);

/// Time limit for the threads to become idle. A thread that other work keeps from sleeping for so
/// long ends its rounds all the same.
const IDLE: Duration = Duration::from_secs(10);

/// So often the disks are drained before the guest is stopped without a hold.
const ATTEMPTS: u32 = 20;

/// Time between two polls.
const LOOK: Duration = Duration::from_millis(1);

/// One disk whose requests wait.
#[derive(Debug)]
struct DrainedDisk {
    job: String,
    node: String,
}

/// The disks whose requests wait.
#[derive(Debug, Default)]
#[must_use = "the guest's requests wait until `release`"]
pub(crate) struct Drained(Vec<DrainedDisk>);

/// Returns true if a job is one of these.
pub(crate) fn is_drain_job(job: &str) -> bool {
    job.starts_with(JOB)
}

/// Returns true if a node is the target of such a job.
pub(crate) fn is_drain_node(node: &str) -> bool {
    node.starts_with(NODE)
}

/// Returns true if this QEMU may lose an interrupt when it stops its guest.
pub(crate) async fn is_needed(machine: &Machine) -> Result<bool> {
    if machine.qmp().greeting().version.is_some_and(|version| version < DEFERS) {
        return Ok(false);
    }
    let threads = machine.query("query-iothreads", Value::Null).await?;
    Ok(threads.as_array().is_some_and(|threads| !threads.is_empty()))
}

/// Holds the guest's requests on each disk where that is possible. It is not possible on a disk that another
/// program's job works on. Never fails: the guest can be stopped without it.
pub(crate) async fn drain(machine: &Machine) -> Drained {
    match machine.needs_drain().await {
        Ok(true) => {}
        _ => return Drained::default(),
    }
    for attempt in 1..=ATTEMPTS {
        let mut drained = Drained::default();
        let refused = match drain_all(machine, &mut drained).await {
            Ok(()) if !has_waiting_requests(machine).await => return drained,
            Ok(()) => None,
            Err(error) => Some(error),
        };
        release(machine, drained).await;
        if let Some(error) = refused {
            tracing::warn!(%error, "the guest's requests to its disks could not be held before it is paused");
            return Drained::default();
        }
        tracing::debug!(attempt, "a request was taken while the disks were drained");
    }
    tracing::warn!("the guest's disks were too busy to hold its requests before it is paused");
    Drained::default()
}

/// Returns true if a queue of a drained disk has a request that was taken from it and is not complete. False
/// where QEMU does not say: the command is not a stable one.
async fn has_waiting_requests(machine: &Machine) -> bool {
    let found = taken_requests(machine).await;
    if let Err(error) = &found {
        tracing::debug!(%error, "QEMU does not say which requests wait");
    }
    found.is_ok_and(|taken| taken > 0)
}

async fn taken_requests(machine: &Machine) -> Result<u64> {
    let devices = machine.query("x-query-virtio", Value::Null).await?;
    let mut taken = 0;
    for device in devices.as_array().into_iter().flatten() {
        if !matches!(device["name"].as_str(), Some("virtio-blk" | "virtio-scsi")) {
            continue;
        }
        let status = machine.query("x-query-virtio-status", json!({ "path": device["path"] })).await?;
        for queue in 0..status["num-vqs"].as_u64().unwrap_or_default() {
            let arguments = json!({ "path": device["path"], "queue": queue });
            // A queue that the guest's driver does not use is an error.
            if let Ok(status) = machine.query("x-query-virtio-queue-status", arguments).await {
                taken += status["inuse"].as_u64().unwrap_or_default();
            }
        }
    }
    Ok(taken)
}

async fn drain_all(machine: &Machine, drained: &mut Drained) -> Result<()> {
    let drives = machine.query("query-block", Value::Null).await?;
    for drive in drives.as_array().into_iter().flatten() {
        let inserted = &drive["inserted"];
        let has_device = drive["qdev"].as_str().is_some_and(|qdev| !qdev.is_empty());
        let (Some(node), Some(size)) =
            (inserted["node-name"].as_str(), inserted["image"]["virtual-size"].as_u64())
        else {
            continue;
        };
        if has_device && let Err(error) = begin(machine, node, size, drained).await {
            tracing::debug!(%error, node, "requests to this disk are not held");
        }
    }
    let names: Vec<String> = drained.0.iter().map(|disk| disk.job.clone()).collect();
    reach(machine, &names, &JobStatus::Ready).await?;
    for job in &names {
        let arguments = json!({ "device": job, "force": false });
        machine.run("holding the guest's requests", job, "block-job-cancel", arguments).await?;
    }
    reach(machine, &names, &JobStatus::Pending).await?;
    idle(machine).await
}

async fn begin(machine: &Machine, source: &str, size: u64, drained: &mut Drained) -> Result<()> {
    let attempted = "holding the guest's requests";
    let node = Name::fresh("hn").as_str().to_owned();
    let added = json!({ "driver": "null-co", "node-name": node, "size": size });
    machine.run(attempted, source, "blockdev-add", added).await?;
    let job = Name::fresh("hold").as_str().to_owned();
    let arguments = json!({
        "job-id": job, "device": source, "target": node, "sync": "none",
        "auto-finalize": false, "auto-dismiss": false,
    });
    match machine.run(attempted, source, "blockdev-mirror", arguments).await {
        Ok(_) => {
            drained.0.push(DrainedDisk { job, node });
            Ok(())
        }
        Err(error) => {
            let _ = machine.run(attempted, &node, "blockdev-del", json!({ "node-name": node })).await;
            Err(error)
        }
    }
}

async fn jobs(machine: &Machine) -> Result<Vec<Job>> {
    let jobs = machine.query("query-jobs", Value::Null).await?;
    Job::list(&jobs).ok_or_else(|| machine.odd("query-jobs", &jobs))
}

/// Waits until all of these jobs are in a state, or have ended.
async fn reach(machine: &Machine, names: &[String], state: &JobStatus) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let found = jobs(machine).await?;
        let is_there = |name: &String| {
            let job = found.iter().find(|job| job.id == *name);
            job.is_none_or(|job| job.status == *state || job.status == JobStatus::Concluded)
        };
        if names.iter().all(is_there) {
            return Ok(());
        }
        if Instant::now() >= until {
            let subject = machine.qmp().socket().display();
            let detail = format!("the disks' jobs do not come to {state:?}");
            let attempted = "holding the guest's requests";
            return Err(crate::Error::new(crate::ErrorKind::Timeout, attempted, subject, detail));
        }
        sleep(LOOK).await;
    }
}

/// Waits until each I/O thread was idle once: then it has ended the round in which it completed the last
/// request, and has sent the notification of each. Rounds after that one complete no request of the guest.
async fn idle(machine: &Machine) -> Result<()> {
    let threads = machine.query("query-iothreads", Value::Null).await?;
    let mut busy: Vec<u64> =
        threads.as_array().into_iter().flatten().filter_map(|thread| thread["thread-id"].as_u64()).collect();
    // A process that has none of the threads is not QEMU's: a supervisor's, if no more can be read.
    let has_one = |pid: &u32| busy.iter().any(|thread| task(*pid, *thread).exists());
    let Some(pid) = machine.pid().filter(has_one) else {
        sleep(Duration::from_millis(20)).await;
        return Ok(());
    };
    let until = Instant::now() + IDLE;
    loop {
        sleep(LOOK).await;
        busy.retain(|thread| !waits_for_events(pid, *thread));
        if busy.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            tracing::warn!(threads = ?busy, "I/O threads of QEMU were not idle before the guest is paused");
            return Ok(());
        }
    }
}

fn task(pid: u32, thread: u64) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/task/{thread}"))
}

/// Returns true if a thread sleeps in the wait for events. One that sleeps because another thread holds a
/// lock is in the middle of a round.
///
/// The answers are of three instants, and on a busy machine much can happen between them: a thread that slept
/// in front of a lock, and runs by the time it is asked where it sleeps, seems to wait for nothing. So it
/// counts only if it has slept from the first to the last.
fn waits_for_events(pid: u32, thread: u64) -> bool {
    let task = task(pid, thread);
    let status = || std::fs::read_to_string(task.join("status"));
    // A thread that has ended sends no notification.
    let Ok(before) = status() else { return true };
    // Other users may not read where it sleeps: then its state has to do.
    let place = std::fs::read_to_string(task.join("wchan")).unwrap_or_default();
    let Ok(after) = status() else { return true };
    let sleep = sleep_of(&before);
    sleep.is_some() && sleep == sleep_of(&after) && !place.contains("futex")
}

/// The number of a thread's sleep, from its `status`; `None` if it does not sleep.
fn sleep_of(status: &str) -> Option<u64> {
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        Some(line.trim_start_matches(':').trim())
    };
    // Each sleep begins with a switch to another thread.
    field("State")?.starts_with('S').then(|| field("voluntary_ctxt_switches")?.parse().ok())?
}

/// Releases the requests. Those of a stopped guest are served when it runs.
pub(crate) async fn release(machine: &Machine, drained: Drained) {
    for disk in &drained.0 {
        if let Err(error) = end(machine, &disk.job).await {
            tracing::warn!(%error, job = disk.job, "requests of the guest are still held");
        }
    }
    for disk in &drained.0 {
        let name = json!({ "node-name": disk.node });
        let _ = machine.run("deleting a node", &disk.node, "blockdev-del", name).await;
    }
}

async fn end(machine: &Machine, job: &str) -> Result<()> {
    let attempted = "letting the guest's requests go on";
    let id = json!({ "id": job });
    let ended = machine.run(attempted, job, "job-cancel", id.clone()).await;
    reach(machine, &[job.to_owned()], &JobStatus::Concluded).await?;
    // A job that ended by itself cannot be cancelled.
    machine.run(attempted, job, "job-dismiss", id).await.map(drop).or(ended.map(drop))
}

/// Releases requests that a crash of ours left waiting. Changes nothing if there are none. May be repeated.
///
/// # Errors
/// Errors of the connection, and what QEMU reported.
pub(crate) async fn release_left(machine: &Machine, jobs: &[Job]) -> Result<bool> {
    let left: Vec<&Job> = jobs.iter().filter(|job| is_ours(&job.id) && is_drain_job(&job.id)).collect();
    for job in &left {
        end(machine, &job.id).await?;
    }
    Ok(!left.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(state: &str, switches: u64) -> String {
        format!(
            "Name:\tIO d0\nState:\t{state}\nvoluntary_ctxt_switches:\t{switches}\nnonvoluntary_ctxt_switches:\t9\n"
        )
    }

    #[test]
    fn sleeps_are_distinguished() {
        assert_eq!(sleep_of(&status("S (sleeping)", 7)), Some(7));
        assert_ne!(sleep_of(&status("S (sleeping)", 7)), sleep_of(&status("S (sleeping)", 8)));
        for state in ["R (running)", "D (disk sleep)"] {
            assert_eq!(sleep_of(&status(state, 7)), None);
        }
        assert_eq!(sleep_of("State:\tS (sleeping)\n"), None);
        assert_eq!(sleep_of(""), None);
    }

    /// A thread of this process that waits for a message sleeps in front of a futex, and never counts; one
    /// that waits for bytes of a pipe does, as soon as it sleeps.
    #[test]
    fn who_waits_for_a_lock_is_not_idle() {
        use std::io::Read;
        let pid = std::process::id();
        let id = || -> u64 {
            let own = std::fs::read_link("/proc/thread-self").unwrap();
            own.file_name().unwrap().to_str().unwrap().parse().unwrap()
        };
        let (to, from) = std::sync::mpsc::channel::<()>();
        let (say, said) = std::sync::mpsc::channel();
        let other = say.clone();
        let waits = std::thread::spawn(move || {
            say.send(id()).unwrap();
            from.recv().ok()
        });
        let blocked = said.recv().unwrap();
        let (mut pipe, end) = std::io::pipe().unwrap();
        let reads = std::thread::spawn(move || {
            other.send(id()).unwrap();
            pipe.read(&mut [0]).unwrap()
        });
        let reader = said.recv().unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        while !waits_for_events(pid, reader) {
            assert!(Instant::now() < until, "the reader never sleeps");
        }
        // Where it sleeps is not shown to everybody.
        let place = std::fs::read_to_string(task(pid, blocked).join("wchan")).unwrap_or_default();
        if place.contains("futex") {
            for _ in 0..2000 {
                assert!(!waits_for_events(pid, blocked));
            }
        }
        drop((to, end));
        waits.join().unwrap();
        assert_eq!(reads.join().unwrap(), 0);
    }
}
