//! Carries plans out, so that the domain recovers from a crash at any time.
//!
//! **What is durable before what.**
//!
//! 1. The operation with all its steps, the first marked as started, before anything is done.
//! 2. Each step is done, durably, by its backend. Then one transaction records it as done, with its edits,
//!    and the next step as started.
//! 3. The commit point is the transaction that records the last cut step as done. It has the plan's commit
//!    edits and the state `finishing`. Before it, everything can be undone; after it, everything is carried
//!    through.
//! 4. Manifests of deleted snapshots are gone before the first finish step begins.
//!
//! Recovery reads the journal: an operation before its commit point is undone, one after it is finished. Both
//! depend on apply and undo being idempotent.
//!
//! **The domain may have run in between**, started by a user or a program that knows of no crash. It may have
//! written to whatever its configured paths named. Two questions to the backend protect these writes:
//!
//! - Before a step is undone: what would the undo lose ([`crate::backend::Salvage`])? That is saved, durably,
//!   before the undo begins, or the step stays.
//! - Before the rest is carried through: was a step that is recorded as done superseded? Then a later step
//!   would lose writes that the earlier one did not process. The earlier step is repeated, and recorded,
//!   before the later ones.
//!
//! While an operation runs it has its disks locked, so no other process writes, and neither question is
//! asked.

mod finish;
mod group;
mod guest;
mod register;
mod step;
mod undo;

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

pub(crate) use self::group::{GroupRun, Seat, Verdict, commit_others};
use self::guest::Guest;
pub(crate) use self::step::side_by_side;
use crate::catalogue::{Catalogue, Change, Entry, Revision};
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Events};
use crate::hypervisor::{GuestChange, LiveDomain, StartedDomain, StepOutcome, Taken};
use crate::manifest::ManifestStore;
use crate::operation::{Operation, OperationId, OperationState, StepState};
use crate::operation::{StepTransition, Transition};
use crate::registry::Registry;
use crate::service::Postponed;
use crate::shape::{Plan, StepRef};
use crate::snapshot::Snapshot;
use crate::step::Edit;

/// Carries plans out on one domain, whose lock and disks the caller has.
pub(crate) struct Engine<'a> {
    /// The catalogue that records domain and journal.
    pub(crate) catalogue: &'a dyn Catalogue,
    /// The backends and hypervisors that do the steps.
    pub(crate) registry: &'a Registry,
    /// The receiver of progress.
    pub(crate) events: &'a Events,
    /// The store of the manifests.
    pub(crate) manifests: &'a Arc<dyn ManifestStore>,
    /// The connection to the domain; absent where it does not run.
    pub(crate) live: Option<&'a dyn LiveDomain>,
    /// The files that no other process may use: checked again before the cut.
    pub(crate) watched: Option<&'a dyn Watch>,
    /// The place in the run of a group, where the operation is one with those of other domains.
    pub(crate) seat: Option<Seat<'a>>,
}

/// Files that no other process may use while an operation runs.
#[async_trait]
pub(crate) trait Watch: Send + Sync {
    /// Checks again that no other process uses one of them.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming the file and its user.
    async fn ask_again(&self) -> Result<()>;
}

/// The outcome of a run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub(crate) struct Run {
    /// The operation; absent where the plan had nothing to do.
    pub(crate) operation: Option<OperationId>,
    /// Set if the operation happened. A run that was undone by recovery did not.
    pub(crate) happened: bool,
    /// Bytes of the steps that were done.
    pub(crate) bytes_moved: u64,
    /// Merges that were deferred.
    pub(crate) postponed: Vec<Postponed>,
    /// Problems that stopped nothing, and other messages for the user.
    pub(crate) warnings: Vec<String>,
    /// The time for which the guest was paused; absent: it did not run, or does not continue.
    pub(crate) downtime: Option<Duration>,
    /// For a create on a running domain: the properties of its instant.
    pub(crate) taken: Option<Taken>,
    /// The command that starts the domain, where the user must.
    pub(crate) start: Vec<String>,
    /// The change to the guest.
    pub(crate) guest: Option<GuestChange>,
    /// The process that runs the domain, where it was started.
    pub(crate) started: Option<StartedDomain>,
}

/// One operation in its run: the domain as the catalogue has it, and the operation as the journal has it.
struct Running<'a> {
    engine: &'a Engine<'a>,
    entry: &'a mut Entry,
    /// The domain that the manifests describe; absent where they are known to be stale.
    recorded: Option<Entry>,
    operation: Operation,
    cancel: &'a CancellationToken,
    /// Set if the operation was interrupted before this run: since then the domain may have run.
    resumed: bool,
    /// Set if the operation is ready and its group's decision is not known to be against it: then it must not
    /// be undone.
    bound: bool,
    /// The effect of this run on the guest.
    guest: Guest,
    run: Run,
}

impl Engine<'_> {
    /// Carries `plan` out. `entry` is the domain that the plan was made from and is kept up to date;
    /// `prologue` is recorded with the operation, in one transaction.
    ///
    /// If `cancel` is cancelled before the commit point, everything is undone. After it, only merges that can
    /// be deferred stop.
    ///
    /// # Errors
    /// The failure, with everything undone; [`ErrorKind::Cancelled`]; or [`ErrorKind::NeedsRecovery`], with
    /// the state that things are in.
    pub(crate) async fn run(
        &self,
        entry: &mut Entry,
        plan: Plan,
        prologue: Vec<Change>,
        cancel: &CancellationToken,
    ) -> Result<Run> {
        if !plan.has_steps() && plan.commit.is_empty() {
            return Ok(Run::new(None));
        }
        if cancel.is_cancelled() {
            return Err(cancelled().state("no changes made"));
        }
        let steps = vec![StepState::Pending; plan.step_count()];
        let operation = Operation {
            id: self.seat.map_or_else(OperationId::fresh, |seat| seat.operation()),
            state: OperationState::Planned,
            started: Timestamp::now(),
            plan,
            steps,
            errors: Vec::new(),
            group: self.seat.map(|seat| seat.group()),
        };
        let recorded =
            self.manifests.is_current(self.catalogue.identity().await?, entry).then(|| entry.clone());
        let run = Run::new(Some(operation.id));
        let running = Running {
            engine: self,
            entry,
            recorded,
            operation,
            cancel,
            resumed: false,
            bound: false,
            guest: Guest::Running,
            run,
        };
        running.begin(prologue).await
    }

    /// Finishes or undoes an operation that was interrupted. `verdict` is the decision about an operation
    /// that is ready, which the deciding operation's journal has.
    ///
    /// # Errors
    /// [`ErrorKind::NeedsRecovery`], with the state that things are in.
    pub(crate) async fn resume(
        &self,
        entry: &mut Entry,
        operation: Operation,
        verdict: Verdict,
        cancel: &CancellationToken,
    ) -> Result<Run> {
        let run = Run::new(Some(operation.id));
        let mut running = Running {
            engine: self,
            entry,
            recorded: None,
            operation,
            cancel,
            resumed: true,
            bound: false,
            guest: Guest::Running,
            run,
        };
        if running.operation.state == OperationState::Ready {
            match verdict {
                Verdict::Committed => running.commit_ready().await?,
                Verdict::Undone => {}
                Verdict::Unknown => {
                    return Err(Error::new(
                        ErrorKind::Internal,
                        "an operation of a group is recovered without the group's decision",
                    ));
                }
            }
        }
        match running.operation.state {
            OperationState::Planned
            | OperationState::Preparing
            | OperationState::Cutting
            | OperationState::Ready
            | OperationState::Undoing => {
                running.undo("it had stopped before its commit point").await?;
                running.write_manifests().await;
                Ok(running.run)
            }
            OperationState::Finishing => {
                running.write_manifests_before_finish().await?;
                running.finish().await
            }
            // One that was ready, and committed now, has nothing left to be done.
            OperationState::Done => {
                running.run.happened = true;
                running.write_manifests().await;
                Ok(running.run)
            }
            OperationState::Undone => Ok(running.run),
        }
    }
}

impl Run {
    fn new(operation: Option<OperationId>) -> Self {
        Self {
            operation,
            happened: false,
            bytes_moved: 0,
            postponed: Vec::new(),
            warnings: Vec::new(),
            downtime: None,
            taken: None,
            start: Vec::new(),
            guest: None,
            started: None,
        }
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "it was cancelled")
}

impl Running<'_> {
    async fn begin(mut self, prologue: Vec<Change>) -> Result<Run> {
        // The first transaction takes the operation as far as there are no steps to do.
        let plan = &self.operation.plan;
        let (prepares, cuts) = (!plan.prepare.is_empty(), !plan.cut.is_empty());
        self.advance(Transition::Record)?;
        let mut at_once = Vec::new();
        if !prepares {
            self.advance(Transition::Cut)?;
            // In a group, the other domains must be ready before.
            if !cuts && self.engine.seat.is_none() {
                at_once = self.commit_changes()?;
            }
        }
        for index in self.starting(0) {
            self.move_step(index, StepTransition::Begin)?;
        }
        let mut changes = prologue;
        changes.push(Change::Begin(Box::new(self.operation.clone())));
        changes.extend(at_once);
        if let Err(failure) = self.record(changes).await {
            let found = self.engine.catalogue.operation(&self.entry.domain.name, self.operation.id).await;
            match found {
                Ok(None) => return Err(failure.state("no changes made")),
                // The commit was recorded although it reported a failure. Changes without steps have
                // happened, and the rest is carried through.
                Ok(Some(_)) if self.is_committed() && self.committed_after_all().await? => {}
                Ok(Some(_)) => return Err(self.give_up(failure).await),
                Err(_) => {
                    return Err(failure
                        .with_kind(ErrorKind::NeedsRecovery)
                        .state("whether it is recorded is not known; no disk was touched")
                        .advise("when the state directory can be used again, run `domsnap recover`"));
                }
            }
        }
        self.report(Event::Started {
            operation: self.operation.id,
            domain: self.entry.domain.name.clone(),
            kind: self.operation.plan.operation.clone(),
            snapshots: self.operation.plan.snapshots.clone(),
            steps: self.operation.plan.step_count() as u64,
            bytes: self.operation.plan.bytes(),
        });
        if !self.is_committed()
            && let Err(failure) = self.until_committed().await
        {
            // The commit itself may have happened although it reported a failure: the journal decides.
            let happened = self.is_committed() && self.committed_after_all().await?;
            if !happened && self.bound {
                return Err(self.left_to_the_group(failure));
            }
            if !happened {
                return Err(self.give_up(failure).await);
            }
        }
        if let Some(seat) = self.engine.seat {
            seat.committed();
        }
        self.run.happened = true;
        self.report(Event::Committed { operation: self.operation.id });
        self.write_manifests_before_finish().await?;
        self.finish().await
    }

    /// Does the prepare and cut steps, and commits.
    ///
    /// Each turn does the steps that the journal has as started. It then records them as done, together with
    /// the steps that are started next. So a crash finds in the journal every step that may have been begun,
    /// and undoes it.
    async fn until_committed(&mut self) -> Result<()> {
        let prepared = self.operation.plan.prepare.len();
        let last = self.operation.plan.before_commit();
        if last == 0 && self.engine.seat.is_some() {
            return self.commit(Vec::new()).await;
        }
        if last == 0 {
            return Err(Error::new(
                ErrorKind::Internal,
                "an operation without prepare or cut did not commit",
            ));
        }
        let mut begun = 0;
        while begun < last {
            let turn = self.starting(begun);
            // 1) Before the first cut step: preparing takes time, and another program may have opened an
            //    image meanwhile. A refusal here has nothing but new files to undo.
            if let Some(watched) = self.engine.watched
                && begun == prepared
            {
                watched.ask_again().await?;
            }
            // 2) The steps, each with the steps nested in it. They are recorded as started already: by the
            //    transaction that began the operation, or by the turn before. A crash here leaves steps that
            //    are done completely or in part. Undo is idempotent and looks at the disk, so it takes back
            //    either.
            let mut index = turn.start;
            while index < turn.end {
                if self.cancel.is_cancelled() {
                    return Err(cancelled());
                }
                let facts = self.apply(index).await?;
                self.note(index, facts)?;
                self.report_done(self.unit(index));
                index = self.unit(index).end;
            }
            begun = turn.end;
            let mut changes = self.steps(turn, StepTransition::Complete)?;
            if begun >= last {
                // 3) The last moment at which a cancel undoes everything: nothing was recorded as having
                //    happened.
                if self.cancel.is_cancelled() {
                    return Err(cancelled());
                }
                if self.operation.state == OperationState::Preparing {
                    self.advance(Transition::Cut)?;
                }
                // 4) Before the commit, because the identity that distinguishes a tag from others of its name
                //    is recorded with the snapshot.
                self.identify().await;
                // 5) The commit point.
                return self.commit(changes).await;
            } else if self.operation.state == OperationState::Preparing {
                self.advance(Transition::Cut)?;
                changes.push(Change::Operation(self.operation.id, self.operation.state, None));
            }
            // 6) The next steps are recorded as started before they begin, in the same transaction: one flush
            //    a turn. A step that began without a record would not be undone.
            changes.extend(self.steps(self.starting(begun), StepTransition::Begin)?);
            self.record(changes).await?;
        }
        Ok(())
    }

    /// The commit point: one transaction has `changes`, which record the last steps as done, the plan's
    /// edits, and the state `finishing`. A crash before it undoes, and a crash after it carries through.
    /// There is no state between, in which the catalogue knows a snapshot whose layers an undo removes.
    async fn commit(&mut self, changes: Vec<Change>) -> Result<()> {
        let mut changes = self.agree(changes).await?;
        changes.extend(self.commit_changes()?);
        changes.push(Change::Operation(self.operation.id, self.operation.state, None));
        let first = self.starting(self.operation.plan.before_commit());
        changes.extend(self.steps(first, StepTransition::Begin)?);
        self.record(changes).await
    }

    /// The steps that are begun together with the one at `index`. All prepare steps begin together: nothing
    /// names their results before the cut, so none must be recorded as done before the next begins. Of the
    /// others, the steps of one unit begin together.
    fn starting(&self, index: usize) -> Range<usize> {
        let prepared = self.operation.plan.prepare.len();
        match index {
            index if index < prepared => index..prepared,
            index if index >= self.operation.steps.len() => index..index,
            index => self.unit(index),
        }
    }

    /// Applies the outcome of a domain step: the snapshot to be recorded gets the properties of its instant.
    fn note(&mut self, index: usize, facts: StepOutcome) -> Result<()> {
        if let StepRef::Domain(step) = self.operation.placed(index).step {
            self.guest = std::mem::replace(&mut self.guest, Guest::Running).after(&step.action, index);
        }
        let snapshot = self.operation.plan.commit.iter_mut().find_map(|edit| match edit {
            Edit::AddSnapshot { snapshot } => Some(snapshot),
            _ => None,
        });
        if let Some(snapshot) = snapshot {
            if let Some(taken) = &facts.taken {
                // A policy's snapshot may be dated after the one before it (`Planner::date_after_last`).
                snapshot.created = match snapshot.policy {
                    Some(_) => taken.at.max(snapshot.created),
                    None => taken.at,
                };
                snapshot.consistency = taken.consistency;
                if let Some(memory) = &mut snapshot.memory {
                    memory.running = taken.running;
                }
            }
            if let (Some(bytes), Some(memory)) = (facts.memory_bytes, &mut snapshot.memory) {
                memory.bytes = bytes;
                memory.full = facts.memory_full;
            }
        }
        self.run.warnings.extend(facts.notes);
        self.run.downtime = facts.downtime.or(self.run.downtime);
        self.run.taken = facts.taken.or(self.run.taken.take());
        self.run.start.extend(facts.start);
        self.run.guest = facts.guest.or(self.run.guest);
        self.run.started = facts.started.or(self.run.started.take());
        Ok(())
    }

    fn report_done(&self, unit: Range<usize>) {
        for index in unit {
            self.report(Event::StepDone { operation: self.operation.id, index: index as u64 });
        }
    }

    /// Adds to the new internal snapshots the identity that distinguishes them from others of their names.
    /// Where that cannot be read they are known by their names alone.
    async fn identify(&mut self) {
        let disks = &self.entry.domain.disks;
        let added = self.operation.plan.commit.iter_mut().filter_map(|edit| match edit {
            Edit::AddSnapshot { snapshot } => Some(snapshot),
            _ => None,
        });
        for member in added.flat_map(|snapshot| &mut snapshot.disks) {
            let record = disks.iter().find(|record| record.disk.target == member.target);
            let (Some(record), true) = (record, member.point.tag.is_some()) else { continue };
            let Ok(backend) = self.engine.registry.serving(&record.disk) else { continue };
            member.identity = backend.identify(record, &member.point).await.unwrap_or_default();
        }
    }

    /// The commit point's changes: the plan's edits; and where no finish step follows, the end.
    fn commit_changes(&mut self) -> Result<Vec<Change>> {
        self.advance(Transition::Commit)?;
        if self.operation.plan.finish.is_empty() {
            self.advance(Transition::Finish)?;
        }
        Ok(self.operation.plan.commit.iter().cloned().map(Change::Edit).collect())
    }

    fn is_committed(&self) -> bool {
        match self.operation.state {
            OperationState::Finishing | OperationState::Done => true,
            OperationState::Planned
            | OperationState::Preparing
            | OperationState::Cutting
            | OperationState::Ready
            | OperationState::Undoing
            | OperationState::Undone => false,
        }
    }

    /// Returns true if a commit that reported a failure is in the journal all the same.
    async fn committed_after_all(&mut self) -> Result<bool> {
        let name = self.entry.domain.name.clone();
        let unknown = |cause: Error| {
            Error::new(
                ErrorKind::NeedsRecovery,
                "whether the operation is recorded as having happened is not known",
            )
            .because(cause)
            .state("its disks are ready for both, and nothing is lost")
            .advise("when the state directory can be used again, run `domsnap recover`")
        };
        let found = self.engine.catalogue.operation(&name, self.operation.id).await.map_err(unknown)?;
        let entry = self.engine.catalogue.load(&name).await.map_err(unknown)?;
        let (Some(found), Some(entry)) = (found, entry) else {
            return Err(unknown(Error::new(ErrorKind::Corrupt, "the journal no longer has the operation")));
        };
        *self.entry = entry;
        self.operation = found;
        Ok(self.is_committed())
    }

    fn advance(&mut self, transition: Transition) -> Result<()> {
        self.operation.state = self.operation.state.after(transition)?;
        Ok(())
    }

    /// Moves steps on; returns the changes that record it.
    fn steps(&mut self, indices: Range<usize>, transition: StepTransition) -> Result<Vec<Change>> {
        let id = self.operation.id;
        indices.map(|index| Ok(Change::Step(id, index, self.move_step(index, transition)?))).collect()
    }

    /// Moves a step on in memory alone.
    fn move_step(&mut self, index: usize, transition: StepTransition) -> Result<StepState> {
        let state = self.operation.steps[index].after(transition)?;
        self.operation.steps[index] = state;
        Ok(state)
    }

    /// Makes `changes` durable, and applies them to the entry.
    async fn record(&mut self, changes: Vec<Change>) -> Result<()> {
        let edits: Vec<Edit> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Edit(edit) => Some(edit.clone()),
                Change::PutDomain(..)
                | Change::Follow(_)
                | Change::Bases(_)
                | Change::RemoveDomain
                | Change::Begin(_)
                | Change::Operation(..)
                | Change::Ready(..)
                | Change::Step(..) => None,
            })
            .collect();
        let revision: Revision =
            self.engine.catalogue.commit(&self.entry.domain.name, self.entry.revision, changes).await?;
        self.entry.revision = revision;
        for edit in &edits {
            edit.apply(&mut self.entry.domain, &mut self.entry.tree)?;
        }
        Ok(())
    }

    /// Brings manifests up to date before the first finish step. Manifests of deleted snapshots must be gone
    /// before their data is. Where they cannot be removed, nothing is destroyed.
    async fn write_manifests_before_finish(&mut self) -> Result<()> {
        // A create or a revert deletes no snapshot, so its finish steps wait for no manifest.
        let plan = &self.operation.plan;
        let deletes = plan.before_commit() == 0 && !plan.finish.is_empty();
        if !deletes {
            return Ok(());
        }
        let written = match &self.recorded {
            // The rest is brought up to date once, at the end.
            Some(recorded) => {
                let is_gone = |snapshot: &&Snapshot| self.entry.tree.get(snapshot.id).is_none();
                let gone: Vec<_> = recorded.tree.iter().filter(is_gone).map(|snapshot| snapshot.id).collect();
                let manifests = self.engine.manifests.clone();
                on_a_thread(move || manifests.remove(&gone)).await
            }
            None => match self.try_manifests().await {
                // A delete gives space back, so it must not need any: the other manifests lag until they can
                // be written. Where no manifest can be, none promises the data that is destroyed.
                Err(error) if error.kind() == ErrorKind::NoSpace || self.engine.manifests.have_no_place() => {
                    let doomed = self.operation.plan.commit.iter().filter_map(|edit| match edit {
                        Edit::RemoveSnapshot { id } => Some(*id),
                        _ => None,
                    });
                    let (manifests, doomed) = (self.engine.manifests.clone(), doomed.collect::<Vec<_>>());
                    on_a_thread(move || manifests.remove(&doomed)).await
                }
                written => written,
            },
        };
        written.map_err(|error| self.left_unfinished(error))
    }

    /// Writes the manifests as the catalogue is. A failure is reported and stops nothing.
    async fn write_manifests(&mut self) {
        if let Err(error) = self.try_manifests().await {
            let message = error.to_string();
            self.report(Event::Warning { domain: self.entry.domain.name.clone(), message: message.clone() });
            self.run.warnings.push(message);
        }
    }

    async fn try_manifests(&mut self) -> Result<()> {
        if self.recorded.as_ref().is_some_and(|recorded| recorded.revision == self.entry.revision) {
            return Ok(());
        }
        let catalogue = self.engine.catalogue.identity().await?.ok_or_else(|| {
            Error::new(ErrorKind::Internal, "the catalogue records an operation and has no identity")
        })?;
        let (manifests, recorded, entry) =
            (self.engine.manifests.clone(), self.recorded.take(), self.entry.clone());
        let write = move || manifests.write(catalogue, recorded.as_ref(), &entry).map(|()| entry);
        self.recorded = Some(on_a_thread(write).await?);
        Ok(())
    }

    fn report(&self, event: Event) {
        self.engine.events.report(event);
    }
}

async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|cause| Error::new(ErrorKind::Internal, "writing manifests ended early").because(cause))?
}

#[cfg(test)]
mod tests;
