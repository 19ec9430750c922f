//! One job: its state, waiting for it, cancelling it.

use std::time::{Duration, Instant};

use qmp::{Job, JobStatus};
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::{
    error::{Error, ErrorKind, Result},
    machine::Machine,
    name::{Name, is_ours},
};

/// Time between two polls: at first, and at most.
const LOOK: [Duration; 2] = [Duration::from_millis(2), Duration::from_millis(50)];

/// JobProgress of a job.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct JobProgress {
    /// State of the job.
    pub status: JobStatus,
    /// Bytes done.
    pub current: u64,
    /// Bytes in all; grows while the guest writes.
    pub total: u64,
}

/// Returns a job as QEMU lists it; `None` if there is none, or it was dismissed.
///
/// # Errors
/// Errors of the connection.
pub async fn status(machine: &Machine, job: &Name) -> Result<Option<Job>> {
    let jobs = machine.query("query-jobs", Value::Null).await?;
    let all = qmp::Job::list(&jobs).ok_or_else(|| machine.odd("query-jobs", &jobs))?;
    Ok(all.into_iter().find(|found| found.id == job.as_str()))
}

/// Waits until a job is in one of some states, or has ended.
pub(super) async fn reach(
    machine: &Machine,
    job: &Name,
    states: &[JobStatus],
    until: Option<Instant>,
    mut each: impl FnMut(JobProgress),
) -> Result<Job> {
    let attempted = "waiting for a job";
    let [mut pause, longest] = LOOK;
    let mut before = None;
    loop {
        let Some(found) = status(machine, job).await? else {
            return Err(Error::new(ErrorKind::Invalid, attempted, job, "QEMU has no such job (any more)")
                .advise("another program dismissed it; check the disks' backing chains"));
        };
        let progress =
            JobProgress { status: found.status.clone(), current: found.current, total: found.total };
        if before.as_ref() != Some(&progress) {
            each(progress.clone());
            before = Some(progress);
        }
        if states.contains(&found.status) || found.status == JobStatus::Concluded {
            return Ok(found);
        }
        if until.is_some_and(|until| Instant::now() >= until) {
            let detail = format!("it is still {:?}, expected {states:?}", found.status);
            return Err(
                Error::new(ErrorKind::Timeout, attempted, job, detail).state("the job is still running")
            );
        }
        sleep(pause).await;
        pause = (pause * 2).min(longest);
    }
}

/// Waits until a job has ended, dismisses it, and returns its result.
pub(crate) async fn concluded(machine: &Machine, job: &Name, deadline: Duration) -> Result<()> {
    let ended = reach(machine, job, &[], Some(Instant::now() + deadline), |_| {}).await?;
    dismiss(machine, job, ended).await
}

/// Waits for a job that ends by itself, which a crash of ours may have left. Dismisses it and returns its
/// result.
pub(crate) async fn finish(machine: &Machine, job: &Name, each: impl FnMut(JobProgress)) -> Result<()> {
    let ended = reach(machine, job, &[], None, each).await?;
    dismiss(machine, job, ended).await
}

/// Dismisses a job that has ended, if there is one. Its effect is in the chains; nothing else is known of it.
pub(crate) async fn dismiss_ended(machine: &Machine, job: &Name) -> Result<()> {
    match status(machine, job).await? {
        Some(found) if found.status == JobStatus::Concluded => {
            let id = json!({ "id": job.as_str() });
            machine.run("dismissing a job", job.as_str(), "job-dismiss", id).await.map(drop)
        }
        _ => Ok(()),
    }
}

/// Dismisses our stream jobs that have ended. QEMU 10.0 crashes (segmentation fault) if its nodes are queried
/// while there is one.
///
/// # Errors
/// [`ErrorKind::Invalid`] if another program has one, which only that program may dismiss; errors of the
/// connection.
pub(crate) async fn dismiss_streams(machine: &Machine) -> Result<()> {
    let jobs = machine.query("query-jobs", Value::Null).await?;
    let jobs = Job::list(&jobs).ok_or_else(|| machine.odd("query-jobs", &jobs))?;
    for job in jobs.iter().filter(|job| job.status == JobStatus::Concluded && job.kind == "stream") {
        if !is_ours(&job.id) {
            let detail = "it has ended and was not dismissed by the program that began it: QEMU may end by a \
                          segmentation fault when it is asked for its nodes";
            return Err(Error::new(
                ErrorKind::Invalid,
                "reading the block graph",
                format!("job {}", job.id),
                detail,
            )
            .advise("dismiss it (`job-dismiss`), or have that program do it"));
        }
        let id = json!({ "id": job.id });
        machine.run("dismissing a job", &job.id, "job-dismiss", id).await?;
    }
    Ok(())
}

/// Dismisses a job that has ended, and returns its result.
pub(super) async fn dismiss(machine: &Machine, job: &Name, ended: Job) -> Result<()> {
    let subject = job.as_str();
    machine.run("dismissing a job", subject, "job-dismiss", json!({ "id": subject })).await?;
    match ended.error {
        None => Ok(()),
        Some(text) if text == "Operation canceled" => {
            Err(Error::new(ErrorKind::Cancelled, "running a job", subject, "it was cancelled"))
        }
        Some(text) => {
            Err(Error::new(ErrorKind::Failed, "running a job", format!("{} {subject}", ended.kind), text))
        }
    }
}

/// Limits a job's speed, in bytes a second; 0 is unlimited. May be called at any time, also from another
/// task. May be repeated.
///
/// # Errors
/// [`ErrorKind::Refused`] if there is no such job, or it is not a block job.
pub async fn set_speed(machine: &Machine, job: &Name, bytes_per_second: u64) -> Result<()> {
    let arguments = json!({ "device": job.as_str(), "speed": bytes_per_second });
    machine.run("limiting a job", job.as_str(), "block-job-set-speed", arguments).await.map(drop)
}

/// Asks a job to end without its effect; the task that waits for it gets [`ErrorKind::Cancelled`]. The chain
/// is as before. Does nothing if the job has ended, or is gone.
///
/// # Errors
/// [`ErrorKind::Refused`] if it can no longer be cancelled.
pub async fn cancel(machine: &Machine, job: &Name) -> Result<()> {
    match status(machine, job).await? {
        None => return Ok(()),
        Some(found) if matches!(found.status, JobStatus::Concluded | JobStatus::Aborting) => return Ok(()),
        Some(_) => {}
    }
    machine.run("cancelling a job", job.as_str(), "job-cancel", json!({ "id": job.as_str() })).await.map(drop)
}
