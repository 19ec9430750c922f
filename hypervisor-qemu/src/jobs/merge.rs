//! Commit and stream.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use qmp::JobStatus;
use serde_json::json;

use super::run::{JobProgress, cancel, dismiss, reach};
use crate::{
    error::{BoxError, Error, ErrorKind, Result},
    graph::{Graph, remove_layers},
    machine::Machine,
    name::Name,
};

/// Longest time from a job's completion until it holds the guest's I/O, and then until it ends.
const HANDOVER: Duration = Duration::from_secs(300);

/// Merge of a device's active image into a layer below it, which becomes the active one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ActiveCommit {
    /// The job's name.
    pub job: Name,
    /// The active image's node.
    pub top: String,
    /// The node that becomes the active one.
    pub base: String,
    /// Bytes a second; 0 is unlimited.
    pub speed: u64,
}

impl ActiveCommit {
    /// Makes an unlimited commit under a fresh name.
    pub fn new(top: impl Into<String>, base: impl Into<String>) -> Self {
        Self { job: Name::job(), top: top.into(), base: base.into(), speed: 0 }
    }
}

/// Merge of layers in the middle of a chain into the lowest of them.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct LayerCommit {
    /// The job's name.
    pub job: Name,
    /// The device's active image.
    pub root: String,
    /// The topmost layer that is merged; not the active one.
    pub top: String,
    /// The layer that they are merged into.
    pub base: String,
    /// The backing string for the layer above `top`. (Without it QEMU writes an absolute path of its own.)
    pub backing_file: String,
    /// Bytes a second; 0 is unlimited.
    pub speed: u64,
}

impl LayerCommit {
    /// Makes an unlimited commit under a fresh name.
    pub fn new(
        root: impl Into<String>,
        top: impl Into<String>,
        base: impl Into<String>,
        backing_file: impl Into<String>,
    ) -> Self {
        let (root, top, base) = (root.into(), top.into(), base.into());
        Self { job: Name::job(), root, top, base, backing_file: backing_file.into(), speed: 0 }
    }
}

/// Copy of the layers below a node up into it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stream {
    /// The job's name.
    pub job: Name,
    /// The node that receives the data.
    pub into: String,
    /// Its backing node afterwards; `None`: it has none.
    pub base: Option<String>,
    /// Its backing string afterwards; required with a base.
    pub backing_file: Option<String>,
    /// Bytes a second; 0 is unlimited.
    pub speed: u64,
}

impl Stream {
    /// Copies all layers below a node, which then has no backing image.
    pub fn all(into: impl Into<String>) -> Self {
        Self { job: Name::job(), into: into.into(), base: None, backing_file: None, speed: 0 }
    }

    /// Copies only the layers above a base, which becomes the backing image, with that backing string.
    pub fn down_to(mut self, base: impl Into<String>, backing_file: impl Into<String>) -> Self {
        self.base = Some(base.into());
        self.backing_file = Some(backing_file.into());
        self
    }
}

/// Returns the names of the nodes from `top` to just above `base`, top first.
fn between(graph: &Graph, attempted: &str, top: &str, base: Option<&str>) -> Result<Vec<String>> {
    let chain: Vec<_> = graph.chain(top).iter().map(|node| node.name.clone()).collect();
    let Some(base) = base else { return Ok(chain) };
    match chain.iter().position(|name| name == base) {
        Some(end) if end > 0 => Ok(chain.get(..end).unwrap_or_default().to_vec()),
        _ => {
            let detail = format!("{base} is not below it; its chain is {}", chain.join(" > "));
            Err(Error::new(ErrorKind::Invalid, attempted, format!("node {top}"), detail))
        }
    }
}

/// Merges the active image into a layer below it, and pivots: that layer is then the active one.
///
/// The pivot must be in a journal: after it the old top still opens cleanly, with *old* data. So the job
/// waits before the pivot. `while_pending` runs while top and base are equal and the guest's I/O is held. It
/// records the pivot, makes the record durable, and moves the configured path; if it fails, it undoes its
/// changes. A kill of QEMU during it loses nothing, because top and base are equal.
///
/// The guest may run. Not idempotent. After a crash [`super::reconcile`] finds the job; [`drive_active`]
/// continues it, or [`cancel`] ends it. Afterwards the merged nodes are deleted from the graph; those that
/// are still in use are returned.
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Refused`] before it began. [`ErrorKind::Hook`]: the job was
/// cancelled. [`ErrorKind::Cancelled`], [`ErrorKind::Failed`] with QEMU's message. After all of these the
/// chain is as before. [`ErrorKind::Lost`], [`ErrorKind::Timeout`]: before the call of `while_pending` the
/// top has the data; after its return, the base.
pub async fn commit_active<T, F>(
    machine: &Machine,
    commit: &ActiveCommit,
    progress: impl FnMut(JobProgress),
    while_pending: impl FnOnce() -> F,
) -> Result<(T, Vec<String>)>
where
    F: Future<Output = std::result::Result<T, BoxError>>,
{
    let attempted = "merging the active image";
    let graph = Graph::read(machine).await?;
    let merged = between(&graph, attempted, &commit.top, Some(&commit.base))?;
    let arguments = json!({
        "job-id": commit.job.as_str(), "device": graph.top_of(&commit.top), "top-node": commit.top,
        "base-node": commit.base, "speed": commit.speed,
        "auto-finalize": false, "auto-dismiss": false,
    });
    let subject = format!("node {}", commit.top);
    machine.run(attempted, &subject, "block-commit", arguments).await?;
    let done = drive_active(machine, &commit.job, progress, while_pending).await?;
    Ok((done, remove_layers(machine, &merged).await?))
}

/// Drives an active commit from any state to its end. This is the second half of [`commit_active`], and it
/// finishes a commit that a crash of ours left. Deletes no nodes.
///
/// # Errors
/// See [`commit_active`].
pub async fn drive_active<T, F>(
    machine: &Machine,
    job: &Name,
    mut progress: impl FnMut(JobProgress),
    while_pending: impl FnOnce() -> F,
) -> Result<T>
where
    F: Future<Output = std::result::Result<T, BoxError>>,
{
    let attempted = "merging the active image";
    let id = json!({ "id": job.as_str() });
    let found = reach(machine, job, &[JobStatus::Ready, JobStatus::Pending], None, &mut progress).await?;
    if found.status == JobStatus::Ready {
        machine.run(attempted, job.as_str(), "job-complete", id.clone()).await?;
        let until = Some(Instant::now() + HANDOVER);
        let found = reach(machine, job, &[JobStatus::Pending], until, &mut progress).await?;
        if found.status == JobStatus::Concluded {
            return Err(ended_early(machine, job, found).await);
        }
    } else if found.status == JobStatus::Concluded {
        return Err(ended_early(machine, job, found).await);
    }
    let done = match while_pending().await {
        Ok(done) => done,
        Err(error) => {
            let error = Error::hook(attempted, job, error);
            let ended = match cancel(machine, job).await {
                Ok(()) => reach(machine, job, &[], Some(Instant::now() + HANDOVER), |_| {}).await,
                Err(second) => Err(second),
            };
            return Err(match ended {
                Ok(ended) => match dismiss(machine, job, ended).await {
                    Err(second) if second.kind() != ErrorKind::Cancelled => error.state(second.to_string()),
                    _ => error.state("the job was cancelled, the chain is as before"),
                },
                Err(second) => error.state(format!("the job may hold the guest's disk ({second})")),
            });
        }
    };
    machine.run(attempted, job.as_str(), "job-finalize", id).await.map_err(|error| {
        error.state("top and base are equal, and the guest's I/O is held until the job ends")
    })?;
    let ended = reach(machine, job, &[], Some(Instant::now() + HANDOVER), |_| {}).await?;
    dismiss(machine, job, ended).await?;
    Ok(done)
}

async fn ended_early(machine: &Machine, job: &Name, ended: qmp::Job) -> Error {
    match dismiss(machine, job, ended).await {
        Err(error) => error.state("the chain is as before"),
        Ok(()) => {
            let detail = "it ended early: another program finalized it";
            Error::new(ErrorKind::Failed, "merging the active image", job, detail)
                .state("the base is the active image")
        }
    }
}

/// Returns the name of the job that merges this overlay by [`fold`]. It is derived from the overlay's name,
/// so that after a crash the job of another disk is not mistaken for it.
pub(crate) fn fold_job(overlay: &str) -> Name {
    Name::of("f", overlay)
}

/// Merges an overlay into the node directly below it, without progress reports. Keeps the overlay's node.
pub(crate) async fn fold(machine: &Machine, overlay: &str, below: &str) -> Result<()> {
    let commit = ActiveCommit { job: fold_job(overlay), ..ActiveCommit::new(overlay, below) };
    let graph = machine.graph().await?;
    let arguments = json!({
        "job-id": commit.job.as_str(), "device": graph.top_of(overlay), "top-node": overlay, "base-node": below,
        "auto-finalize": false, "auto-dismiss": false,
    });
    machine.run("merging an overlay", overlay, "block-commit", arguments).await?;
    drive_active(machine, &commit.job, |_| {}, async || Ok(())).await
}

/// Merges layers in the middle of a chain into the lowest of them, which becomes the backing image of the
/// layer above. Deletes the merged nodes; returns those that are still in use.
///
/// The guest may run. If it is killed in the middle, the chain is as before: the base has some data that the
/// layers above it have too. Not idempotent, but it may be started again.
///
/// # Errors
/// See [`commit_active`], without a hook. After [`ErrorKind::Cancelled`] and [`ErrorKind::Failed`] the chain
/// is as before.
pub async fn commit_layers(
    machine: &Machine,
    commit: &LayerCommit,
    progress: impl FnMut(JobProgress),
) -> Result<Vec<String>> {
    let attempted = "merging layers";
    let graph = Graph::read(machine).await?;
    if commit.top == commit.root {
        let detail = "it is the active image, whose merge pivots";
        return Err(Error::new(ErrorKind::Invalid, attempted, &commit.top, detail)
            .advise("merge it as the active image"));
    }
    let merged = between(&graph, attempted, &commit.top, Some(&commit.base))?;
    let arguments = json!({
        "job-id": commit.job.as_str(), "device": graph.top_of(&commit.root), "top-node": commit.top,
        "base-node": commit.base, "backing-file": commit.backing_file, "speed": commit.speed, "auto-dismiss": false,
    });
    machine.run(attempted, &format!("node {}", commit.top), "block-commit", arguments).await?;
    let ended = reach(machine, &commit.job, &[], None, progress).await?;
    dismiss(machine, &commit.job, ended).await?;
    remove_layers(machine, &merged).await
}

/// Copies the data of layers below a node up into it; its backing image is then the base. Deletes the merged
/// nodes; returns those that are still in use.
///
/// The guest may run. If it is killed in the middle, the chain is as before, and the node has some data that
/// is below it too. Not idempotent, but it may be started again.
///
/// # Errors
/// See [`commit_layers`].
pub async fn stream(
    machine: &Machine,
    stream: &Stream,
    progress: impl FnMut(JobProgress),
) -> Result<Vec<String>> {
    let attempted = "pulling up layers";
    let graph = Graph::read(machine).await?;
    graph.expect(attempted, &stream.into)?;
    let mut merged = between(&graph, attempted, &stream.into, stream.base.as_deref())?;
    merged.retain(|name| *name != stream.into);
    let mut arguments = json!({
        "job-id": stream.job.as_str(), "device": stream.into, "speed": stream.speed, "auto-dismiss": false,
    });
    match (&stream.base, &stream.backing_file) {
        (Some(base), Some(backing_file)) => {
            arguments["base-node"] = json!(base);
            arguments["backing-file"] = json!(backing_file);
        }
        (None, None) => {}
        _ => {
            let detail = "a base needs a backing string, and a backing string a base";
            return Err(Error::new(ErrorKind::Invalid, attempted, &stream.into, detail));
        }
    }
    machine.run(attempted, &format!("node {}", stream.into), "block-stream", arguments).await?;
    let ended = reach(machine, &stream.job, &[], None, progress).await?;
    dismiss(machine, &stream.job, ended).await?;
    remove_layers(machine, &merged).await
}
