//! Recovers a domain: finishes or undoes interrupted operations.

use tokio_util::sync::CancellationToken;

use super::{Locked, Operator};
use crate::catalogue::Entry;
use crate::domain::Domain;
use crate::engine::{Engine, Run};
use crate::error::{ErrorKind, Result};
use crate::event::Event;
use crate::hypervisor::{DomainStep, Quiesce};
use crate::operation::{Operation, OperationState};
use crate::request::Request;
use crate::service::authority::Manifests;
use crate::service::locator::Live;
use crate::service::planning::chains_of;
use crate::service::{BoxFuture, DomainRef, RecoveryEnd, RecoveryReport};

/// Returns true if a step freezes the guest's file systems.
fn freezes(step: &DomainStep) -> bool {
    matches!(step, DomainStep::Instant { quiesce: Quiesce::Try | Quiesce::Require, .. })
}

impl Operator {
    /// Finishes or undoes every operation of the domain that has not ended.
    pub(super) async fn recover_entry(
        &self,
        locked: &mut Locked,
        live: &mut Option<Live>,
        cancel: &CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        let Locked { located, manifests, .. } = locked;
        let entry = &mut located.entry;
        let mut reports = Vec::new();
        match (&*live, self.registry.hypervisor(&entry.domain.hypervisor)) {
            (Some(live), _) => live.tidy().await?,
            (None, Ok(saver)) => saver.tidy_at_rest(&entry.domain),
            (None, Err(_)) => {}
        }
        let unfinished = self.records.unfinished(&entry.domain.name).await?;
        let mut thawed = Vec::new();
        if let Some(live) = &*live
            && unfinished.iter().flat_map(|operation| operation.plan.domain_steps()).any(freezes)
        {
            thawed = live.thaw().await;
        }
        for operation in unfinished {
            // 1) The disks are locked, and no other process uses them: the domain may run without our
            //    knowing.
            //    An operation that leaves the disks as they are needs neither: its clones are its own.
            let leaves_disks = operation.plan.leaves_disks();
            let mut _held = Vec::new();
            if !leaves_disks {
                _held = self.hold_disks(&entry.domain, live.as_ref()).await?;
                let watched =
                    self.watcher.watched(&entry.domain, live.as_ref(), Some(&operation.plan)).await?;
                watched.refuse_users().await?;
            }
            // 2) The journal says if the operation is undone or finished, and how far it got.
            let used = live.as_ref().filter(|_| !leaves_disks);
            let report = self.resume(entry, manifests, used, operation, cancel).await?;
            self.events.report(Event::Recovered { report: Box::new(report.clone()) });
            reports.push(report);
            // 3) The recovered operation may have started the domain, stopped it, or resumed it.
            *live = self.locator.connect(&entry.domain).await?;
            if let Some(live) = &*live {
                live.tidy().await?;
            }
        }
        if let Some(live) = &*live
            && !live.seen().running
            && self.records.is_before_revert(&entry.domain.name).await?
        {
            let message = match live.resume_left().await {
                Ok(false) => None,
                Ok(true) => Some(
                    "a revert was interrupted after it had saved the current state: the guest was paused for it, and \
                     is resumed"
                        .to_owned(),
                ),
                // It keeps no other work from being done.
                Err(error) => Some(format!("the guest is paused for a revert that was interrupted: {error}")),
            };
            if let Some(message) = message {
                self.events.report(Event::Warning { domain: entry.domain.name.clone(), message });
            }
        }
        if !reports.is_empty() {
            // A disk may have another path now.
            *manifests = self.authority.manifests(&entry.domain)?;
        }
        if let (Some(live), Some(last)) = (&live, reports.last_mut()) {
            last.notes.extend(thawed);
            last.notes.extend(self.clean_up(&entry.domain, live).await?);
        }
        Ok(reports)
    }

    /// Resumes one operation.
    async fn resume(
        &self,
        entry: &mut Entry,
        manifests: &Manifests,
        live: Option<&Live>,
        operation: Operation,
        cancel: &CancellationToken,
    ) -> Result<RecoveryReport> {
        let engine = Engine {
            catalogue: self.ledger.catalogue(),
            registry: &self.registry,
            events: &self.events,
            manifests,
            live: live.map(|live| &**live),
            watched: None,
            seat: None,
        };
        let (id, found, plan) = (operation.id, operation.state, operation.plan.clone());
        let verdict = self.verdict(&entry.domain.name, &operation).await?;
        let run = engine.resume(entry, operation, verdict, cancel).await.map_err(|error| {
            error.context(format!(
                "recovering the unfinished {} of domain {}",
                plan.operation, entry.domain.name
            ))
        })?;
        let Run { happened, postponed, warnings: mut notes, guest, .. } = run;
        // An interrupted revert is finished here, and no other message says what happened to the guest.
        notes.extend(guest.map(|change| change.to_string()));
        Ok(RecoveryReport {
            domain: entry.domain.name.clone(),
            operation_id: id,
            operation: plan.operation,
            snapshots: plan.snapshots,
            found,
            end: if happened { RecoveryEnd::Done } else { RecoveryEnd::Undone },
            postponed,
            notes,
        })
    }

    /// Cleans up what a crash left in a running domain. Returns messages for the user.
    async fn clean_up(&self, domain: &Domain, live: &Live) -> Result<Vec<String>> {
        live.clean_up(&chains_of(&self.registry, domain).await?).await
    }

    /// Recovers one domain, does deferred merges, and brings stale manifests up to date.
    pub(in crate::service) fn recover(
        &self,
        reference: DomainRef,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<Vec<RecoveryReport>>> {
        Box::pin(async move {
            let mut locked = self.locks.lock(&reference, &cancel).await?;
            if !locked.located.catalogued {
                return Ok(Vec::new());
            }
            self.authority.require(&locked.manifests, &locked.located.entry).await?;
            let name = locked.located.entry.domain.name.clone();
            self.end_interrupted_start(&locked.located.entry.domain).await?;
            let mut live = self.locator.connect(&locked.located.entry.domain).await?;
            let mut reports = self.recover_entry(&mut locked, &mut live, &cancel).await?;
            let left = match &live {
                Some(live) if reports.is_empty() => self.clean_up(&locked.located.entry.domain, live).await?,
                _ => Vec::new(),
            };
            for message in left {
                self.events.report(Event::Warning { domain: name.clone(), message });
            }
            let (plan, run) = self.run(&mut locked, live.as_ref(), &Request::Tidy, &cancel).await?;
            if let Some(operation_id) = run.operation {
                reports.push(RecoveryReport {
                    domain: name.clone(),
                    operation_id,
                    operation: plan.operation,
                    snapshots: plan.snapshots,
                    found: OperationState::Planned,
                    end: RecoveryEnd::Done,
                    postponed: run.postponed,
                    notes: plan.notes.into_iter().chain(run.warnings).collect(),
                });
            }
            match self.authority.write(&locked.manifests, &locked.located.entry).await {
                Err(error) if error.kind() == ErrorKind::NoSpace || locked.manifests.have_no_place() => {
                    self.events.report(Event::Warning { domain: name, message: error.to_string() });
                }
                written => written?,
            }
            Ok(reports)
        })
    }
}
