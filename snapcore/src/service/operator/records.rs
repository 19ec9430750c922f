//! Changes of records alone, and the removal of what such a change, or a revert, has made unneeded.

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::{Locked, Operator, outcome_of};
use crate::error::Result;
use crate::event::Event;
use crate::request::Request;
use crate::service::{Outcome, RecoveryReport};
use crate::snapshot::SnapshotRole;

impl Operator {
    /// Carries out a request that changes records alone ([`Request::is_of_records`]). No disk is locked or
    /// read, so that a snapshot can be held while a guest or a server uses its images.
    pub(super) async fn change_records(
        &self,
        mut locked: Locked,
        request: Request,
        cancel: &CancellationToken,
    ) -> Result<Outcome> {
        let recovered = self.recover_unfinished(&mut locked, cancel).await?;
        let entry = &locked.located.entry;
        let plan = crate::plan::records_only(&entry.domain, &entry.tree, &request, Timestamp::now())?;
        let shown = Box::new(plan.clone());
        self.events.report(Event::Planned { domain: entry.domain.name.clone(), plan: shown });
        // Order of durability: 1) a domain that is imported enters the catalogue; 2) the record changes, in
        // one transaction; 3) the manifests follow. A crash before 3) leaves manifests whose revision shows
        // that they are out of date.
        let prologue =
            if plan.commit.is_empty() { Vec::new() } else { self.record(&mut locked, &request).await? };
        let run = self.run_plan(&mut locked, None, None, &plan, prologue, cancel).await?;
        let entry = &locked.located.entry;
        let saver = self.registry.hypervisor(&entry.domain.hypervisor).ok();
        let mut outcome = outcome_of(entry, saver.as_deref(), plan, run);
        self.remove_due(&mut locked, &mut outcome, cancel).await;
        outcome.notes.splice(0..0, std::mem::take(&mut locked.located.notes));
        outcome.recovered = recovered;
        Ok(outcome)
    }

    /// Recovers a domain for a request that needs no disk of it: the domain is connected to only if an
    /// operation was interrupted, or a revert between its two operations. That operation may add a snapshot
    /// of the name that is meant, remove the one that has it, or merge one of its layers.
    pub(super) async fn recover_unfinished(
        &self,
        locked: &mut Locked,
        cancel: &CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        let mut recovered = Vec::new();
        if locked.located.catalogued {
            self.authority.require(&locked.manifests, &locked.located.entry).await?;
            let name = locked.located.entry.domain.name.clone();
            let left = !self.records.unfinished(&name).await?.is_empty();
            if left || self.records.is_before_revert(&name).await? {
                self.end_interrupted_start(&locked.located.entry.domain).await?;
                let mut live = self.locator.connect(&locked.located.entry.domain).await?;
                recovered = self.recover_entry(locked, &mut live, cancel).await?;
            }
        }
        match locked.located.unconfirmed.take() {
            Some(error) => Err(error),
            None => Ok(recovered),
        }
    }

    /// Removes states that are not needed any more: earlier previous states, and snapshots whose last hold
    /// has ended. The request itself has succeeded, so a failure is a note, and `recover` tries again.
    pub(super) async fn remove_due(
        &self,
        locked: &mut Locked,
        outcome: &mut Outcome,
        cancel: &CancellationToken,
    ) {
        let due = locked.located.entry.tree.due(Timestamp::now());
        let due: Vec<_> = due.map(|snapshot| (snapshot.id, snapshot.name.clone(), snapshot.role)).collect();
        if due.is_empty() || !locked.located.catalogued && locked.located.entry.tree.is_empty() {
            return;
        }
        let attempt = async {
            // The domain may have been started or ended by the operation.
            let live = self.locator.connect(&locked.located.entry.domain).await?;
            self.run(locked, live.as_ref(), &Request::Tidy, cancel).await
        };
        match attempt.await {
            Ok((plan, run)) => {
                outcome.notes.extend(plan.notes.into_iter().chain(run.warnings));
                outcome.postponed.extend(run.postponed);
            }
            Err(error) => outcome.notes.push(format!(
                "what is not needed any more stays for now, and `domsnap recover {}` removes it: {error}",
                outcome.domain
            )),
        }
        let tree = &locked.located.entry.tree;
        let gone =
            due.iter().filter(|(id, _, role)| *role == SnapshotRole::Snapshot && tree.get(*id).is_none());
        outcome
            .notes
            .extend(gone.map(|(_, name, _)| format!("snapshot {name} is deleted: its last hold ended")));
    }
}
