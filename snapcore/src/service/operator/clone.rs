//! Makes new domains of a snapshot. The source's disks are neither locked nor changed, so it may run, also
//! without that this catalogue can reach it.
//!
//! **What is durable before what.** 1) The operation is in the source's journal before anything is made. 2)
//! The disks of all clones, in directories that no configuration names. 3) The directories get their names;
//! that is the cut. 4) The commit point, one transaction of the source: before it all clones are undone,
//! after it all are carried through. 5) Each clone enters the catalogue; then its manifests. 6) Clones with
//! memory are started, if that was asked for. The operation is complete by then: a clone that does not start
//! is registered like the others, at rest.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::{Locked, Operator, outcome_of};
use crate::catalogue::{Entry, Lease};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::hypervisor::{CloneNetwork, StartClone, StepOutcome, VmStateSaver};
use crate::name::DomainName;
use crate::request::{CloneRequest, Request};
use crate::service::{Outcome, StartedClone};
use crate::shell::shell_command;

impl Operator {
    /// Carries out a [`Request::Clone`].
    pub(super) async fn make_clones(
        &self,
        mut locked: Locked,
        request: Request,
        cancel: &CancellationToken,
    ) -> Result<Outcome> {
        let recovered = self.recover_unfinished(&mut locked, cancel).await?;
        let _names = self.reserve_names(&request, cancel).await?;
        let entry = &locked.located.entry;
        let plan = self.planning.plan_for(entry, None, &request).await?;
        self.planning.preflight(&entry.domain, &locked.manifests, None, &plan, false).await?;
        let saver = self.registry.hypervisor(&entry.domain.hypervisor).ok();
        let shown = Box::new(plan.clone().shown(saver.as_deref()));
        self.events.report(Event::Planned { domain: entry.domain.name.clone(), plan: shown });
        let prologue = self.record(&mut locked, &request).await?;
        let run = self.run_plan(&mut locked, None, None, &plan, prologue, cancel).await?;
        let mut outcome = outcome_of(&locked.located.entry, None, plan, run);
        outcome.notes.splice(0..0, std::mem::take(&mut locked.located.notes));
        outcome.recovered = recovered;
        if let (Request::Clone(CloneRequest { start: true, .. }), Some(saver)) = (&request, saver) {
            self.start_clones(&request, &saver, &mut outcome, cancel).await?;
        }
        Ok(outcome)
    }

    /// Starts the clones, whose names are locked, some at a time.
    async fn start_clones(
        &self,
        request: &Request,
        saver: &Arc<dyn VmStateSaver>,
        outcome: &mut Outcome,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let Request::Clone(clone) = request else { return Ok(()) };
        let hook = clone.hook.clone().map(Arc::<[u8]>::from);
        let at_once = std::thread::available_parallelism().map_or(1, std::num::NonZeroUsize::get);
        let turns = Arc::new(Semaphore::new(at_once));
        let mut starts = JoinSet::new();
        for (number, name) in clone.clones.iter().cloned().enumerate() {
            let entry = self.ledger.catalogue().load(&name).await?;
            let (saver, hook, turns, network) =
                (Arc::clone(saver), hook.clone(), Arc::clone(&turns), clone.network);
            let cancel = cancel.clone();
            starts.spawn(async move {
                let _turn = turns.acquire_owned().await;
                let started = match (entry, cancel.is_cancelled()) {
                    (None, _) => Err(Error::new(ErrorKind::NotFound, "it is not registered")),
                    (_, true) => Err(Error::new(ErrorKind::Cancelled, "cancelled")),
                    (Some(entry), false) => start_one(&entry, &*saver, network, hook.as_deref()).await,
                };
                (number, name, started)
            });
        }
        let mut ended = Vec::new();
        while let Some(start) = starts.join_next().await {
            ended.push(start.map_err(|cause| {
                Error::new(ErrorKind::Internal, "the start of a clone broke off").because(cause)
            })?);
        }
        ended.sort_by_key(|(number, ..)| *number);
        let (mut run, mut failed) = (Vec::new(), Vec::new());
        for (_, name, started) in ended {
            match started {
                Ok(facts) => {
                    let notes = facts.notes.iter().map(|note| format!("{name}: {note}"));
                    outcome.notes.extend(notes);
                    let mut started = facts.started.unwrap_or_default();
                    started.command = saver.shown_command(&started.command);
                    outcome.clones.push(StartedClone { name: name.clone(), started });
                    run.push(name);
                }
                Err(error) => failed.push((name, error)),
            }
        }
        match failed.first() {
            None => Ok(()),
            Some((first, error)) => Err(not_started(clone, &run, &failed, first, error.kind())),
        }
    }

    /// Locks the names of the new domains, which no domain may have.
    async fn reserve_names(&self, request: &Request, cancel: &CancellationToken) -> Result<Vec<Lease>> {
        let Request::Clone(clone) = request else {
            return Err(Error::new(ErrorKind::Internal, "the request makes no domains"));
        };
        self.records.require_new(&clone.clones).await?;
        let mut leases = Vec::new();
        for name in &clone.clones {
            leases.push(self.ledger.lease(name, cancel).await?);
        }
        // One may have been registered before it was locked.
        self.records.require_new(&clone.clones).await?;
        Ok(leases)
    }
}

/// Starts a clone from the memory of its first snapshot.
async fn start_one(
    entry: &Entry,
    saver: &dyn VmStateSaver,
    network: CloneNetwork,
    hook: Option<&[u8]>,
) -> Result<StepOutcome> {
    let domain = &entry.domain;
    let snapshot = entry.tree.iter().next();
    let memory = snapshot.and_then(|snapshot| snapshot.memory.as_ref());
    let machine = snapshot.and_then(|snapshot| domain.machine(snapshot.machine.as_deref()?));
    let (Some(memory), Some(machine)) = (memory, machine) else {
        return Err(Error::new(ErrorKind::Internal, "it is registered without the memory of its snapshot"));
    };
    let start = StartClone::new(domain, &machine.record, &memory.image).network(network).hook(hook);
    saver.start_clone(start).await
}

/// The error if clones do not run: it says which ones run, and how the others are started.
fn not_started(
    request: &CloneRequest,
    run: &[DomainName],
    failed: &[(DomainName, Error)],
    first: &DomainName,
    kind: ErrorKind,
) -> Error {
    let listed = |names: &[&DomainName]| {
        let names: Vec<&str> = names.iter().map(|name| name.as_str()).collect();
        names.join(", ")
    };
    let reasons: Vec<String> = failed.iter().map(|(name, error)| format!("{name}: {error}")).collect();
    let running = match run {
        [] => "none of them runs".to_owned(),
        run => format!("these run: {}", listed(&run.iter().collect::<Vec<_>>())),
    };
    let not = listed(&failed.iter().map(|(name, _)| name).collect::<Vec<_>>());
    let command = shell_command(["domsnap", "revert", first.as_str(), request.snapshot.as_str()]);
    let kind = if kind == ErrorKind::Cancelled { kind } else { ErrorKind::Io };
    Error::new(
        kind,
        format!(
            "{} of {} clones were not started: {}",
            failed.len(),
            request.clones.len(),
            reasons.join("; ")
        ),
    )
    .state(format!("all clones are made and registered; {running}; these do not: {not}"))
    .advise(format!("`{command}` starts one from the snapshot's memory"))
}
