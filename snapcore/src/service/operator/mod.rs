//! The operator: carries requests out on a domain, under its lock and with its disks locked. It recovers
//! interrupted operations first. It is the only room that runs plans.

mod abandon;
mod clone;
mod group;
mod lock;
mod records;
mod recover;
mod run;

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::authority::Authority;
use super::ledger::Ledger;
use super::locator::{Live, Locator};
use super::neighbours::Neighbours;
use super::planning::{Planning, Watcher};
use super::records::Records;
use super::{BoxFuture, DomainRef, Outcome};
use crate::catalogue::Entry;
use crate::domain::Domain;
use crate::engine::Run;
use crate::error::{ErrorKind, Result};
use crate::event::{Event, Events};
use crate::hypervisor::{PowerAfter, VmStateSaver};
use crate::registry::Registry;
use crate::request::Request;
use crate::shape::Plan;

pub(super) use lock::{Locked, Locks};

/// Carries requests out.
#[derive(Clone)]
pub(super) struct Operator {
    /// Read access to the catalogue.
    pub(super) records: Records,
    /// Write access to the catalogue.
    pub(super) ledger: Ledger,
    /// The backends and hypervisors that do the steps.
    pub(super) registry: Arc<Registry>,
    /// The receiver of progress.
    pub(super) events: Events,
    /// Locks domains.
    pub(super) locks: Locks,
    /// Connects to domains.
    pub(super) locator: Locator,
    /// Reads and writes manifests.
    pub(super) authority: Authority,
    /// Makes plans.
    pub(super) planning: Planning,
    /// Finds other users of files.
    pub(super) watcher: Watcher,
    /// Reads the bases of other domains' images.
    pub(super) neighbours: Neighbours,
}

impl Operator {
    /// Carries `request` out on the domain that `reference` names.
    pub(super) fn change(
        &self,
        reference: DomainRef,
        request: Request,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<Outcome>> {
        Box::pin(async move {
            let mut locked = self.locks.lock(&reference, &cancel).await?;
            if request.is_of_records() {
                return self.change_records(locked, request, &cancel).await;
            }
            if let Request::Clone(_) = request {
                return self.make_clones(locked, request, &cancel).await;
            }
            let mut recovered = Vec::new();
            self.end_interrupted_start(&locked.located.entry.domain).await?;
            let mut live = self.locator.connect(&locked.located.entry.domain).await?;
            if locked.located.catalogued {
                self.authority.require(&locked.manifests, &locked.located.entry).await?;
                recovered = self.recover_entry(&mut locked, &mut live, &cancel).await?;
            }
            let Entry { domain, tree, .. } = &locked.located.entry;
            let request = request.resolved(domain, tree, live.is_some())?;
            let mut outcome = match &live {
                Some(live) => self.change_alive(&mut locked, live, request, &cancel).await?,
                None => self.change_once(&mut locked, None, &request, &cancel).await?,
            };
            self.remove_due(&mut locked, &mut outcome, &cancel).await;
            outcome.notes.splice(0..0, std::mem::take(&mut locked.located.notes));
            outcome.recovered = recovered;
            Ok(outcome)
        })
    }

    /// Ends what an interrupted start of the domain has left, and reports it.
    async fn end_interrupted_start(&self, domain: &Domain) -> Result<()> {
        if let Some(message) = self.locator.end_interrupted_start(domain).await? {
            self.events.report(Event::Warning { domain: domain.name.clone(), message });
        }
        Ok(())
    }

    async fn change_once(
        &self,
        locked: &mut Locked,
        live: Option<&Live>,
        request: &Request,
        cancel: &CancellationToken,
    ) -> Result<Outcome> {
        let (plan, run) = self.run(locked, live, request, cancel).await?;
        let entry = &locked.located.entry;
        let saver = self.registry.hypervisor(&entry.domain.hypervisor).ok();
        Ok(outcome_of(entry, saver.as_deref(), plan, run))
    }

    /// Carries `request` out on a running domain: in two operations if the current state is to be saved.
    async fn change_alive(
        &self,
        locked: &mut Locked,
        live: &Live,
        request: Request,
        cancel: &CancellationToken,
    ) -> Result<Outcome> {
        let recreates =
            self.registry.hypervisor(&locked.located.entry.domain.hypervisor)?.profile().recreates;
        let in_two = match &request {
            Request::Revert(revert) => revert.in_two(recreates),
            _ => None,
        };
        let Some((save, mut revert)) = in_two else {
            return self.change_once(locked, Some(live), &request, cancel).await;
        };
        let ran = live.seen().running;
        // A refusal of the revert is found before anything is done.
        let mut tried = revert.clone();
        tried.saved = None;
        self.planning.plan_for(&locked.located.entry, Some(live), &Request::Revert(tried)).await?;
        let saved = self.change_once(locked, Some(live), &Request::Create(save), cancel).await?;
        let has_memory = revert.wanted(&locked.located.entry.tree)?.memory.is_some();
        if !has_memory && ran {
            revert.power = revert.power.or(Some(PowerAfter::Running));
        }
        let revert_saved = revert.saved.clone();
        let reverted = self.change_once(locked, Some(live), &Request::Revert(revert), cancel).await;
        match reverted {
            Ok(mut outcome) => {
                if revert_saved.is_none() {
                    outcome.snapshots.extend(saved.snapshots);
                }
                outcome.notes.splice(0..0, saved.notes);
                Ok(outcome)
            }
            Err(error) => {
                let left = match (ran, error.kind()) {
                    (true, ErrorKind::NeedsRecovery) | (false, _) => Ok(()),
                    (true, _) => live.resume().await,
                };
                let names: Vec<&str> = saved.snapshots.iter().map(|name| name.as_str()).collect();
                let kept = match revert_saved {
                    None => format!("the current state was saved as {}, which is kept", names.join(", ")),
                    Some(_) => "the copy of the current state is removed by the next change".to_owned(),
                };
                Err(match left {
                    Ok(()) => error.state(kept),
                    Err(second) => error.state(format!("{kept}; the guest is paused: {second}")),
                })
            }
        }
    }
}

fn outcome_of(entry: &Entry, saver: Option<&dyn VmStateSaver>, plan: Plan, run: Run) -> Outcome {
    let mut notes = plan.notes;
    notes.extend(run.warnings);
    let is_revert = matches!(plan.operation.as_str(), "revert" | "undo");
    let kept = is_revert && entry.tree.previous().is_some();
    Outcome {
        operation_id: run.operation,
        operation: plan.operation,
        domain: entry.domain.name.clone(),
        snapshots: plan.snapshots,
        bytes_moved: run.bytes_moved,
        postponed: run.postponed,
        notes,
        recovered: Vec::new(),
        downtime_us: run.downtime.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
        method: run.taken.map(|taken| taken.method),
        start: saver.map_or_else(Vec::new, |saver| saver.shown_command(&run.start)),
        guest: run.guest,
        started: run.started,
        kept,
        clones: Vec::new(),
    }
}
