//! Objects of ours in a QEMU, after a crash of domsnap or the loss of the connection.

use qmp::{Job, JobStatus};
use serde_json::{Value, json};

use crate::{
    drain,
    error::Result,
    fdset,
    graph::{Edge, Graph, remove_layers},
    machine::Machine,
    migration,
    name::{is_mark, is_ours},
    run_state::RunState,
};

/// Objects of ours: those whose names begin with `domsnap-`.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Ours {
    /// Run state of the guest.
    pub state: RunState,
    /// Our jobs, and the state of each.
    pub jobs: Vec<Job>,
    /// Our nodes, and the users of each.
    pub nodes: Vec<OurNode>,
    /// Descriptors that we lent: set and purpose.
    pub lent: Vec<(i64, String)>,
    /// A migration that is under way. QEMU does not report its owner: it may be a memory image being written,
    /// or another program's.
    pub outgoing: Option<Outgoing>,
}

/// One node of ours.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OurNode {
    /// Its name.
    pub name: String,
    /// The file that it names.
    pub file: String,
    /// Its users: nodes above, devices, jobs. Empty: it was prepared and not put in place, or a merge left
    /// it.
    pub users: Vec<Edge>,
    /// True if it replaces the chain of a detached device: the guest must not run until the disk was
    /// attached.
    pub placeholder: bool,
}

/// A migration that is under way.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outgoing {
    /// QEMU's status word: `active`, `pre-switchover`, ...
    pub status: String,
    /// Bytes written.
    pub transferred: u64,
}

/// Lists the objects of ours. Changes nothing.
///
/// # Errors
/// Errors of the connection.
pub async fn reconcile(machine: &Machine) -> Result<Ours> {
    let state = machine.run_state().await?;
    let jobs = machine.query("query-jobs", Value::Null).await?;
    let jobs = Job::list(&jobs).ok_or_else(|| machine.odd("query-jobs", &jobs))?;
    let graph = machine.graph().await?;
    let sets = machine.query("query-fdsets", Value::Null).await?;
    let now = migration::status(machine).await?;
    let nodes = graph.nodes().iter().filter(|node| is_ours(&node.name));
    let nodes = nodes.map(|node| OurNode {
        name: node.name.clone(),
        file: node.file.clone(),
        users: graph.users(&node.name).cloned().collect(),
        placeholder: node.name.starts_with("domsnap-ph-"),
    });
    Ok(Ours {
        state,
        jobs: jobs.into_iter().filter(|job| is_ours(&job.id)).collect(),
        nodes: nodes.collect(),
        lent: fdset::ours(&sets),
        outgoing: now
            .under_way()
            .then(|| Outgoing { status: now.status.clone(), transferred: now.transferred }),
    })
}

/// Removes our objects that have no effect, except marks of detached sections: dismisses ended jobs, deletes
/// unused nodes, takes back unused descriptors. Running jobs, and nodes that a device depends on, are not
/// touched: the journal decides on those. May be repeated.
///
/// # Errors
/// Errors of the connection.
pub async fn sweep(machine: &Machine, ours: &Ours) -> Result<()> {
    let held = drain::release_left(machine, &ours.jobs).await?;
    for job in
        ours.jobs.iter().filter(|job| job.status == JobStatus::Concluded && !drain::is_drain_job(&job.id))
    {
        machine.run("dismissing a job", &job.id, "job-dismiss", json!({ "id": job.id })).await?;
    }
    // Each round frees the nodes below.
    let is_idle = |node: &&OurNode| !is_mark(&node.name) && node.users.is_empty();
    let rounds = if held || ours.nodes.iter().any(|node| is_idle(&node)) { ours.nodes.len() } else { 0 };
    for _ in 0..rounds {
        let graph = Graph::read(machine).await?;
        let idle = graph.nodes().iter().filter(|node| is_ours(&node.name));
        let idle = idle.filter(|node| !is_mark(&node.name) && graph.users(&node.name).next().is_none());
        let idle: Vec<_> = idle.collect();
        let idle: Vec<_> = idle.into_iter().map(|node| node.name.clone()).collect();
        if idle.is_empty() || remove_layers(machine, &idle).await?.len() >= idle.len() {
            break;
        }
    }
    if ours.lent.is_empty() {
        return Ok(());
    }
    let graph = Graph::read(machine).await?;
    let sets = machine.query("query-fdsets", Value::Null).await?;
    if migration::status(machine).await?.under_way() {
        return Ok(());
    }
    for (id, _) in fdset::ours(&sets) {
        let path = format!("/dev/fdset/{id}");
        if !graph.nodes().iter().any(|node| node.file.contains(&path)) {
            machine.query("remove-fd", json!({ "fdset-id": id })).await?;
        }
    }
    Ok(())
}
