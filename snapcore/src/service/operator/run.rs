//! Plans a request, and runs the plan.

use tokio_util::sync::CancellationToken;

use super::{Locked, Operator};
use crate::backend::Guard;
use crate::catalogue::Change;
use crate::domain::{ActivePath, Domain};
use crate::engine::{Engine, Run, Seat};
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::request::Request;
use crate::service::authority::Manifests;
use crate::service::locator::{Live, Located};
use crate::service::planning::{Watched, chains_of};
use crate::shape::Plan;

impl Operator {
    /// Plans a request, and carries the plan out.
    pub(super) async fn run(
        &self,
        locked: &mut Locked,
        live: Option<&Live>,
        request: &Request,
        cancel: &CancellationToken,
    ) -> Result<(Plan, Run)> {
        if let Some(error) = locked.located.unconfirmed.take() {
            return Err(error);
        }
        let _held = self.hold_disks(&locked.located.entry.domain, live).await?;
        let (plan, watched) = self.prepare(locked, live, request).await?;
        let has_work = plan.has_steps() || !plan.commit.is_empty();
        // Order of durability: a domain that is imported from manifests enters the catalogue, and the
        // manifests become this catalogue's, before the operation begins. A domain without manifests enters
        // with the operation. So manifests of snapshots that an operation deletes are known to be this
        // catalogue's own, also to a recovery.
        let prologue = if has_work { self.record(locked, request).await? } else { Vec::new() };
        self.ledger.record_neighbours().await;
        let mut run = self.run_plan(locked, live, Some(&watched), &plan, prologue, cancel).await?;
        self.follow_moved_disk(locked, &mut run.warnings).await;
        Ok((plan, run))
    }

    /// Carries a plan out, with what must be recorded in one transaction with its beginning. An error names
    /// the operation.
    pub(super) async fn run_plan(
        &self,
        locked: &mut Locked,
        live: Option<&Live>,
        watched: Option<&Watched>,
        plan: &Plan,
        prologue: Vec<Change>,
        cancel: &CancellationToken,
    ) -> Result<Run> {
        self.run_seated(locked, live, watched, plan, prologue, None, cancel).await
    }

    /// Carries a plan out like [`Operator::run_plan`]: with a seat, together with those of other domains.
    #[allow(clippy::too_many_arguments)]
    pub(super) async fn run_seated(
        &self,
        locked: &mut Locked,
        live: Option<&Live>,
        watched: Option<&Watched>,
        plan: &Plan,
        prologue: Vec<Change>,
        seat: Option<Seat<'_>>,
        cancel: &CancellationToken,
    ) -> Result<Run> {
        let engine = Engine {
            catalogue: self.ledger.catalogue(),
            registry: &self.registry,
            events: &self.events,
            manifests: &locked.manifests,
            live: live.map(|live| &**live),
            watched: watched.map(|watched| watched as _),
            seat,
        };
        let entry = &mut locked.located.entry;
        engine.run(entry, plan.clone(), prologue, cancel).await.map_err(|error| {
            let names: Vec<&str> = plan.snapshots.iter().map(|name| name.as_str()).collect();
            error.context(format!("{} {} of domain {}", plan.operation, names.join(" "), entry.domain.name))
        })
    }

    /// Locks the images of a domain's disks, and refuses those that another process has open. Those of a
    /// domain that does not run are borrowed from a program that serves them and has no client.
    pub(super) async fn hold_disks(&self, domain: &Domain, live: Option<&Live>) -> Result<Vec<Guard>> {
        let mut guards = Vec::new();
        for record in &domain.disks {
            let backend = self.registry.serving(&record.disk)?;
            if !backend.is_gone(record).await? {
                let attached = live.and_then(|live| live.disk(&record.disk.target));
                // The machine has its state, and it is not found there: no step changes it, or the plan is
                // refused.
                if live.is_some() && attached.is_none() && backend.capabilities().machine_state {
                    continue;
                }
                match backend.lock(record, attached).await {
                    Ok(guard) => guards.push(guard),
                    Err(busy)
                        if busy.kind() == ErrorKind::Busy
                            && live.is_none()
                            && domain.active_path == ActivePath::Keep =>
                    {
                        let Some(loan) = backend.borrow(record).await? else { return Err(busy) };
                        // Locks end before the loan: they are dropped in this order.
                        guards.push(backend.lock(record, attached).await?);
                        guards.push(loan);
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        self.watcher.refuse_open_elsewhere(domain, live).await?;
        Ok(guards)
    }

    /// Makes the plan, and tests its requirements before it begins.
    pub(super) async fn prepare(
        &self,
        locked: &Locked,
        live: Option<&Live>,
        request: &Request,
    ) -> Result<(Plan, Watched)> {
        let entry = &locked.located.entry;
        let mut plan = self.planning.plan_for(entry, live, request).await?;
        self.planning.preflight(&entry.domain, &locked.manifests, live, &plan, false).await?;
        if live.is_none() {
            self.planning.refuse_start(&plan, entry).await?;
        }
        let watched = self.watcher.watched(&entry.domain, live, Some(&plan)).await?;
        if plan.has_steps() {
            plan.notes.extend(watched.refuse_users().await?);
        }
        if let Some(live) = live {
            live.preflight(&plan, &chains_of(&self.registry, &entry.domain).await?, true).await?;
        }
        if let Some(memory) = self.planning.memory_made_by(&plan, &entry.domain)? {
            memory.prepare().await?;
        }
        if let (Some(live), Request::Delete(delete)) = (live, request) {
            live.limit(delete.limit);
        }
        let saver = self.registry.hypervisor(&entry.domain.hypervisor).ok();
        let shown = plan.clone().shown(saver.as_deref());
        self.events.report(Event::Planned { domain: entry.domain.name.clone(), plan: Box::new(shown) });
        Ok((plan, watched))
    }

    /// Brings catalogue and manifests up to date for the domain before its operation begins. Returns the
    /// changes that must be recorded in one transaction with the operation.
    pub(super) async fn record(&self, locked: &mut Locked, request: &Request) -> Result<Vec<Change>> {
        let Locked { located, manifests, .. } = locked;
        let Located { entry, catalogued, leftovers, .. } = located;
        if !*catalogued && entry.follows.is_none() && !leftovers.has_unused() {
            return Ok(self.ledger.changes_of(entry).await);
        }
        if !*catalogued {
            self.ledger.put(entry, entry.revision, false).await?;
            *catalogued = true;
            match self.authority.take_over(manifests, entry, leftovers).await {
                // The engine tries again at the end, and reports it.
                Err(_) if manifests.have_no_place() => {}
                done => done.map_err(|error| {
                    error.state(
                        "the catalogue has the domain as its manifests describe it; no image was touched",
                    )
                })?,
            }
        } else if let Err(error) = self.authority.write(manifests, entry).await {
            may_lag(request, manifests, error)?;
        }
        // Another tool may have given its images other bases since they were recorded.
        Ok(self.neighbours.record_bases(&entry.domain).await.into_iter().collect())
    }

    /// Writes manifests beside a disk that has another path now, such as a raw disk that got an overlay.
    /// Those beside the base stay, and name its domain to a user who finds it.
    pub(super) async fn follow_moved_disk(&self, locked: &mut Locked, warnings: &mut Vec<String>) {
        let entry = &locked.located.entry;
        let Ok(now) = self.authority.manifests(&entry.domain) else { return };
        if now.place() == locked.manifests.place() {
            return;
        }
        if let Err(error) = self.authority.write(&now, entry).await {
            warnings.push(error.to_string());
        }
        locked.manifests = now;
    }
}

/// Returns an error unless an operation may begin though manifests could not be brought up to date.
fn may_lag(request: &Request, manifests: &Manifests, error: Error) -> Result<()> {
    match request {
        // The engine tries again at the end, and reports it.
        Request::Create(_)
        | Request::Revert(_)
        | Request::Hold(_)
        | Request::Release(_)
        | Request::Amend(_)
        | Request::Clone(_) => Ok(()),
        Request::Undo(undo) if !undo.forget => Ok(()),
        // Manifests of deleted snapshots are removed before their data, which needs no space; the others
        // follow later.
        Request::Delete(_) | Request::Tidy | Request::Undo(_) if error.kind() == ErrorKind::NoSpace => Ok(()),
        // No manifest there is read, so none promises the data that is destroyed.
        Request::Delete(_) | Request::Tidy | Request::Undo(_) if manifests.have_no_place() => Ok(()),
        // The manifests would still promise the data that is destroyed.
        Request::Delete(_) | Request::Tidy | Request::Undo(_) => Err(error.state("no changes made")),
    }
}
