//! Carries plans out, so that a crash at any instant heals.
//!
//! **What is durable before what.**
//!
//! 1. The operation with all its steps, the first marked as started, before anything is done.
//! 2. Each step is done, durably, by its backend; then one transaction records it as done, with its edits, and the
//!    next as started.
//! 3. The commit point is the transaction that records the last cut step as done: it has the plan's commit edits and
//!    the state `finishing`. Before it, everything can be undone; after it, everything is carried through.
//! 4. Manifests of deleted snapshots are gone before the first finish step begins.
//!
//! Recovery reads the journal: an operation before its commit point is undone, one after it is finished. Both rest on
//! apply and undo being idempotent.
//!
//! **The domain may have run in between**, started by somebody who knows of no crash, and have written to whatever its
//! configured paths named. Two questions to the backend keep that. Before a step is undone: what would the undo lose
//! ([`Salvage`])? It is put aside, durably, before the undo begins, or the step stays. Before the rest is carried
//! through: was a step that is recorded as done overtaken, so that a later one would lose what it has not seen? It is
//! done again, and recorded, before the later ones. While an operation runs it holds its disks, so nobody writes, and
//! neither is asked.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use crate::catalogue::{Catalogue, Change, Entry, Revision, apply_edit};
use crate::manifest::Manifests;
use crate::service::Postponed;
use crate::{
    DiskRecord, Edit, Error, ErrorKind, Event, Events, Group, Operation, OperationId, OperationState, Plan,
    Progress, Registry, Result, Salvage, Snapshot, StepContext, StepState, Target, Transition,
    nothing_inside,
};

/// Carries plans out on one domain, whose lock and disks the caller holds.
pub struct Engine<'a> {
    /// Where domain and journal are recorded.
    pub catalogue: &'a dyn Catalogue,
    /// Who does the steps.
    pub registry: &'a Registry,
    /// Where progress is told.
    pub events: &'a Events,
    /// Where manifests are written.
    pub manifests: &'a Manifests,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Run {
    /// The operation; absent where the plan had nothing to do.
    pub operation: Option<OperationId>,
    /// Whether it happened. A run that was undone by recovery did not.
    pub happened: bool,
    /// Bytes of the steps that were done.
    pub bytes_moved: u64,
    /// Merges that were put off.
    pub postponed: Vec<Postponed>,
    /// What went wrong and stopped nothing.
    pub warnings: Vec<String>,
}

/// One operation in its run: the domain as the catalogue has it, and the operation as the journal has it.
struct Running<'a> {
    engine: &'a Engine<'a>,
    entry: &'a mut Entry,
    /// The domain that the manifests stand for; absent where they are known to be stale.
    told: Option<Entry>,
    operation: Operation,
    cancel: &'a CancellationToken,
    /// Whether it had stopped before: since then the domain may have run.
    resumed: bool,
    run: Run,
}

impl Engine<'_> {
    /// Carries `plan` out. `entry` is the domain that the plan was made from and is kept up to date; `prologue` is
    /// recorded with the operation, in one transaction.
    ///
    /// Where `cancel` is cancelled before the commit point, everything is undone; after it, only merges that can be
    /// put off stop.
    ///
    /// # Errors
    /// What failed, with everything undone; [`ErrorKind::Cancelled`]; or [`ErrorKind::NeedsRecovery`], with the
    /// state that things are in.
    pub async fn run(
        &self,
        entry: &mut Entry,
        plan: Plan,
        prologue: Vec<Change>,
        cancel: &CancellationToken,
    ) -> Result<Run> {
        if plan.steps.is_empty() && plan.commit.is_empty() {
            return Ok(Run::new(None));
        }
        if cancel.is_cancelled() {
            return Err(cancelled().state("nothing was touched"));
        }
        sorted(&plan)?;
        let steps = vec![StepState::Pending; plan.steps.len()];
        let operation = Operation {
            id: OperationId::fresh(),
            state: OperationState::Planned,
            started: Timestamp::now(),
            plan,
            steps,
            errors: Vec::new(),
        };
        let told = self.manifests.is_current(self.catalogue.identity().await?, entry).then(|| entry.clone());
        let run = Run::new(Some(operation.id));
        Running { engine: self, entry, told, operation, cancel, resumed: false, run }.begin(prologue).await
    }

    /// Finishes or undoes an operation that stopped half way.
    ///
    /// # Errors
    /// [`ErrorKind::NeedsRecovery`], with the state that things are in.
    pub async fn resume(
        &self,
        entry: &mut Entry,
        operation: Operation,
        cancel: &CancellationToken,
    ) -> Result<Run> {
        let run = Run::new(Some(operation.id));
        let mut running = Running { engine: self, entry, told: None, operation, cancel, resumed: true, run };
        match running.operation.state {
            OperationState::Planned
            | OperationState::Preparing
            | OperationState::Cutting
            | OperationState::Undoing => {
                running.undo("it had stopped before its commit point").await?;
                running.write_manifests().await;
                Ok(running.run)
            }
            OperationState::Finishing => {
                running.write_manifests_before_finish().await?;
                running.finish().await
            }
            OperationState::Done | OperationState::Undone => Ok(running.run),
        }
    }
}

impl Run {
    fn new(operation: Option<OperationId>) -> Self {
        Self { operation, happened: false, bytes_moved: 0, postponed: Vec::new(), warnings: Vec::new() }
    }
}

fn cancelled() -> Error {
    Error::new(ErrorKind::Cancelled, "it was cancelled")
}

/// The engine's promises rest on the order of groups: a plan that breaks it is a planner's defect.
fn sorted(plan: &Plan) -> Result<()> {
    if !plan.steps.is_sorted_by_key(|planned| planned.group) {
        return Err(Error::new(ErrorKind::Internal, "the plan's steps are not sorted by group"));
    }
    if let Some(planned) =
        plan.steps.iter().find(|planned| planned.group != Group::Finish && !planned.edits.is_empty())
    {
        return Err(Error::new(
            ErrorKind::Internal,
            format!("a step before the commit point has edits: {}", planned.step.summary),
        ));
    }
    Ok(())
}

impl Running<'_> {
    async fn begin(mut self, prologue: Vec<Change>) -> Result<Run> {
        // How far the operation goes in its first transaction: as far as there are no steps to do.
        let first = self.operation.plan.steps.first().map(|planned| planned.group);
        self.advance(Transition::Record)?;
        let mut at_once = Vec::new();
        if first != Some(Group::Prepare) {
            self.advance(Transition::Cut)?;
            if first != Some(Group::Cut) {
                at_once = self.commit_changes()?;
            }
        }
        if let Some(state) = self.operation.steps.first_mut() {
            *state = StepState::Started;
        }
        let mut changes = prologue;
        changes.push(Change::Begin(Box::new(self.operation.clone())));
        changes.extend(at_once);
        if let Err(failure) = self.record(changes).await {
            let found = self.engine.catalogue.operation(&self.entry.domain.name, self.operation.id).await;
            match found {
                Ok(None) => return Err(failure.state("nothing was touched")),
                // It was recorded although it failed. What was to happen at once has happened, and is carried through.
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
        self.tell(Event::Started {
            operation: self.operation.id,
            domain: self.entry.domain.name.clone(),
            kind: self.operation.plan.operation.clone(),
            snapshots: self.operation.plan.snapshots.clone(),
            steps: self.operation.plan.steps.len() as u64,
            bytes: self.operation.plan.bytes(),
        });
        if !self.is_committed()
            && let Err(failure) = self.until_committed().await
        {
            // The commit itself may have happened although it failed: the journal says.
            if !self.is_committed() || !self.committed_after_all().await? {
                return Err(self.give_up(failure).await);
            }
        }
        self.run.happened = true;
        self.tell(Event::Committed { operation: self.operation.id });
        self.write_manifests_before_finish().await?;
        self.finish().await
    }

    /// Does the prepare and cut steps, and commits.
    async fn until_committed(&mut self) -> Result<()> {
        let last = self.operation.plan.steps.iter().rposition(|planned| planned.group != Group::Finish);
        let Some(last) = last else {
            return Err(Error::new(
                ErrorKind::Internal,
                "an operation without prepare or cut did not commit",
            ));
        };
        for index in 0..=last {
            if self.cancel.is_cancelled() {
                return Err(cancelled());
            }
            self.apply(index).await?;
            let mut changes = vec![self.step(index, StepState::Done)];
            let next = self.operation.plan.steps.get(index + 1).map(|planned| planned.group);
            if index == last {
                if self.cancel.is_cancelled() {
                    return Err(cancelled());
                }
                if self.operation.state == OperationState::Preparing {
                    self.advance(Transition::Cut)?;
                }
                changes.extend(self.commit_changes()?);
                changes.push(Change::Operation(self.operation.id, self.operation.state, None));
            } else if self.operation.state == OperationState::Preparing && next == Some(Group::Cut) {
                self.advance(Transition::Cut)?;
                changes.push(Change::Operation(self.operation.id, self.operation.state, None));
            }
            if next.is_some() {
                changes.push(self.step(index + 1, StepState::Started));
            }
            self.record(changes).await?;
            self.tell(Event::StepDone { operation: self.operation.id, index: index as u64 });
        }
        Ok(())
    }

    /// The commit point's changes: the plan's edits; and where no finish step follows, the end.
    fn commit_changes(&mut self) -> Result<Vec<Change>> {
        self.advance(Transition::Commit)?;
        if self.operation.of_group(Group::Finish).next().is_none() {
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
            | OperationState::Undoing
            | OperationState::Undone => false,
        }
    }

    /// Whether a commit that failed is in the journal all the same.
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

    /// Does the finish steps that are not done, and ends the operation.
    async fn finish(mut self) -> Result<Run> {
        self.run.happened = true;
        let finish: Vec<usize> = self.operation.of_group(Group::Finish).collect();
        if self.resumed {
            self.look_for_overtaken(&finish).await.map_err(|error| self.left_unfinished(error))?;
        }
        let mut put_off: Vec<Target> = Vec::new();
        let mut pending: Vec<Change> = Vec::new();
        for index in finish {
            let planned = &self.operation.plan.steps[index];
            let (target, bytes, deferrable) =
                (planned.step.target.clone(), planned.step.bytes, planned.deferrable);
            match self.operation.steps[index] {
                StepState::Done => continue,
                StepState::Pending | StepState::Started | StepState::Postponed | StepState::Undone => {}
            }
            let mut reason = None;
            if put_off.contains(&target) || self.operation.steps[index] == StepState::Postponed {
                reason = Some("an earlier step of this disk was put off".to_owned());
            } else if deferrable && self.cancel.is_cancelled() {
                reason = Some("it was cancelled".to_owned());
            } else {
                if self.operation.steps[index] != StepState::Started {
                    // Rides on the transaction of the step before where there is one.
                    let started = self.step(index, StepState::Started);
                    pending.push(started);
                }
                if !pending.is_empty() {
                    let changes = std::mem::take(&mut pending);
                    self.record(changes).await.map_err(|error| self.left_unfinished(error))?;
                }
                match self.apply(index).await {
                    Ok(()) => {
                        self.run.bytes_moved = self.run.bytes_moved.saturating_add(bytes);
                        pending.push(self.step(index, StepState::Done));
                        pending
                            .extend(self.operation.plan.steps[index].edits.iter().cloned().map(Change::Edit));
                        self.tell(Event::StepDone { operation: self.operation.id, index: index as u64 });
                    }
                    Err(error) if deferrable && can_wait(&error) => reason = Some(error.to_string()),
                    Err(error) => {
                        let changes = vec![Change::Operation(
                            self.operation.id,
                            self.operation.state,
                            Some(error.to_string()),
                        )];
                        if let Err(second) = self.record(changes).await {
                            tracing::warn!(%second, "recording why an operation stopped");
                        }
                        return Err(self.left_unfinished(error));
                    }
                }
            }
            if let Some(reason) = reason {
                put_off.push(target.clone());
                pending.push(self.step(index, StepState::Postponed));
                self.put_off(&target, index, bytes, reason);
            }
        }
        if !self.operation.state.is_final() {
            self.advance(Transition::Finish)?;
            pending.push(Change::Operation(self.operation.id, self.operation.state, None));
            self.record(pending).await.map_err(|error| self.left_unfinished(error))?;
        }
        self.write_manifests().await;
        self.tell(Event::Finished { operation: self.operation.id, happened: true });
        Ok(self.run)
    }

    /// Finish steps that are done, but have not seen what the domain wrote since, are to be done again.
    async fn look_for_overtaken(&mut self, finish: &[usize]) -> Result<()> {
        for (place, &index) in finish.iter().enumerate() {
            let step = &self.operation.plan.steps[index].step;
            let later_ones_left = finish[place + 1..].iter().any(|&later| {
                self.operation.plan.steps[later].step.target == step.target
                    && self.operation.steps[later] != StepState::Done
            });
            if self.operation.steps[index] != StepState::Done || !later_ones_left {
                continue;
            }
            let record = self.record_of(&step.target)?;
            let backend = self.engine.registry.get(&record.disk.format)?;
            let progress = Teller::new(self.engine.events.clone(), self.operation.id, index);
            let deaf = CancellationToken::new();
            let context = StepContext {
                disk: record,
                progress: &progress,
                cancel: &deaf,
                attached: None,
                inside: &nothing_inside,
            };
            let overtaken = guarded(backend.is_overtaken(step, context)).await.map_err(|error| {
                error.context(format!("what the domain wrote since the crash: {}", step.summary))
            })?;
            if overtaken {
                let message = format!(
                    "{}: the domain may have run after the crash, so this is done once more: {}",
                    step.target, step.summary
                );
                tracing::info!(%message, "recovering");
                self.operation.steps[index] = StepState::Pending;
            }
        }
        Ok(())
    }

    fn put_off(&mut self, target: &Target, index: usize, bytes: u64, reason: String) {
        if let Some(known) = self.run.postponed.iter_mut().find(|postponed| postponed.target == *target) {
            known.steps += 1;
            known.bytes = known.bytes.saturating_add(bytes);
            return;
        }
        self.tell(Event::Postponed {
            operation: self.operation.id,
            target: target.clone(),
            reason: reason.clone(),
        });
        let step = self.operation.plan.steps[index].step.summary.clone();
        self.run.postponed.push(Postponed { target: target.clone(), step, steps: 1, bytes, reason });
    }

    /// A failure before the commit point: undoes, and makes the error that says so.
    async fn give_up(&mut self, failure: Error) -> Error {
        let reason = failure.to_string();
        match self.undo(&reason).await {
            Ok(()) => {
                self.write_manifests().await;
                match failure.state_now() {
                    Some(_) => failure,
                    None => failure.state("everything was undone"),
                }
            }
            Err(stuck) => stuck,
        }
    }

    /// Takes all begun steps back, the last first. Where one cannot be taken back, the earlier ones of its disk are
    /// left too, and the other disks are undone all the same.
    async fn undo(&mut self, reason: &str) -> Result<()> {
        self.tell(Event::Undoing { operation: self.operation.id, reason: reason.to_owned() });
        self.advance(Transition::Undo)?;
        let undoing = Change::Operation(self.operation.id, self.operation.state, Some(reason.to_owned()));
        // Undoing is right without this record: what is recorded still says that it did not happen.
        if let Err(error) = self.record(vec![undoing]).await {
            tracing::warn!(%error, "recording that an operation is being undone");
            if let Ok(Some(entry)) = self.engine.catalogue.load(&self.entry.domain.name).await {
                *self.entry = entry;
            }
        }
        let mut stuck: Vec<(Target, Error)> = Vec::new();
        let mut changes = Vec::new();
        for index in (0..self.operation.steps.len()).rev() {
            let planned = &self.operation.plan.steps[index];
            let target = planned.step.target.clone();
            let begun = match self.operation.steps[index] {
                StepState::Started | StepState::Done => planned.group != Group::Finish,
                StepState::Pending | StepState::Postponed | StepState::Undone => false,
            };
            if !begun || stuck.iter().any(|(known, _)| *known == target) {
                continue;
            }
            match self.undo_step(index).await {
                Ok(edits) => {
                    changes.extend(edits.into_iter().map(Change::Edit));
                    changes.push(self.step(index, StepState::Undone));
                }
                Err(error) => stuck.push((target, error)),
            }
        }
        if !stuck.is_empty() {
            let said: Vec<String> =
                stuck.iter().map(|(target, error)| format!("{target}: {error}")).collect();
            let said = said.join("; ");
            changes.push(Change::Operation(self.operation.id, self.operation.state, Some(said.clone())));
            if let Err(error) = self.record(changes).await {
                tracing::warn!(%error, "recording which steps could not be undone");
            }
            return Err(Error::new(
                ErrorKind::NeedsRecovery,
                format!("the {} failed ({reason}) and could not be undone whole: {said}", self.operation.plan.operation),
            )
            .state("it did not happen, and all earlier snapshots are whole; remains of it are on the disks named")
            .advise("mend what is named, then run `domsnap recover`"));
        }
        self.advance(Transition::Undone)?;
        changes.push(Change::Operation(self.operation.id, self.operation.state, None));
        if let Err(error) = self.record(changes).await {
            return Err(Error::new(
                ErrorKind::NeedsRecovery,
                format!(
                    "the {} failed ({reason}) and was undone, but that cannot be recorded",
                    self.operation.plan.operation
                ),
            )
            .because(error)
            .state("the disks are as before")
            .advise("when the state directory can be written again, run `domsnap recover`"));
        }
        self.tell(Event::Finished { operation: self.operation.id, happened: false });
        Ok(())
    }

    fn left_unfinished(&self, error: Error) -> Error {
        let left = self
            .operation
            .of_group(Group::Finish)
            .filter(|index| self.operation.steps[*index] != StepState::Done);
        Error::new(
            ErrorKind::NeedsRecovery,
            format!(
                "the {} happened, but {} of its steps are left",
                self.operation.plan.operation,
                left.count()
            ),
        )
        .because(error)
        .state("the domain's disks and all its snapshots are whole")
        .advise("mend what is named, then run `domsnap recover`: it does the rest")
    }

    async fn apply(&mut self, index: usize) -> Result<()> {
        let planned = &self.operation.plan.steps[index];
        self.tell(Event::StepStarted {
            operation: self.operation.id,
            index: index as u64,
            group: planned.group,
            target: planned.step.target.clone(),
            summary: planned.step.summary.clone(),
            bytes: planned.step.bytes,
        });
        let record = self.record_of(&planned.step.target)?;
        let backend = self.engine.registry.get(&record.disk.format)?;
        let progress = Teller::new(self.engine.events.clone(), self.operation.id, index);
        // Finish steps that cannot be put off must not stop half way: they do not see the token.
        let deaf = CancellationToken::new();
        let hears = planned.group != Group::Finish || planned.deferrable;
        let cancel = if hears { self.cancel } else { &deaf };
        let context = StepContext {
            disk: record,
            progress: &progress,
            cancel,
            attached: None,
            inside: &nothing_inside,
        };
        guarded(backend.apply(&planned.step, context))
            .await
            .map_err(|error| error.context(planned.step.summary.clone()))
    }

    /// Takes one step back; gives what the catalogue must learn where it had to stay.
    async fn undo_step(&mut self, index: usize) -> Result<Vec<Edit>> {
        let planned = &self.operation.plan.steps[index];
        let record = self.record_of(&planned.step.target)?;
        let backend = self.engine.registry.get(&record.disk.format)?;
        let progress = Teller::new(self.engine.events.clone(), self.operation.id, index);
        let deaf = CancellationToken::new();
        let context = StepContext {
            disk: record,
            progress: &progress,
            cancel: &deaf,
            attached: None,
            inside: &nothing_inside,
        };
        let undoing = |error: Error| error.context(format!("undoing: {}", planned.step.summary));
        let salvage = match self.resumed {
            true => {
                let done = self.operation.steps[index] == StepState::Done;
                guarded(backend.salvage(&planned.step, done, context)).await.map_err(undoing)?
            }
            false => Salvage::Nothing,
        };
        let (edits, words) = match salvage {
            Salvage::Stays(edits, words) => (edits, Some(words)),
            Salvage::PutAside(words) => {
                guarded(backend.undo(&planned.step, context)).await.map_err(undoing)?;
                (Vec::new(), Some(words))
            }
            Salvage::Nothing => {
                guarded(backend.undo(&planned.step, context)).await.map_err(undoing)?;
                (Vec::new(), None)
            }
        };
        if let Some(message) = words {
            self.tell(Event::Warning { domain: self.entry.domain.name.clone(), message: message.clone() });
            self.run.warnings.push(message);
        }
        Ok(edits)
    }

    fn record_of(&self, target: &Target) -> Result<&DiskRecord> {
        self.entry.domain.disk(target).ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!(
                    "the plan has a step for {target}, which domain {} does not have",
                    self.entry.domain.name
                ),
            )
        })
    }

    fn advance(&mut self, transition: Transition) -> Result<()> {
        self.operation.state = self.operation.state.after(transition)?;
        Ok(())
    }

    fn step(&mut self, index: usize, state: StepState) -> Change {
        if let Some(step) = self.operation.steps.get_mut(index) {
            *step = state;
        }
        Change::Step(self.operation.id, index, state)
    }

    /// Makes `changes` durable, and the entry what they make of it.
    async fn record(&mut self, changes: Vec<Change>) -> Result<()> {
        let edits: Vec<Edit> = changes
            .iter()
            .filter_map(|change| match change {
                Change::Edit(edit) => Some(edit.clone()),
                Change::PutDomain(..)
                | Change::Follow(_)
                | Change::RemoveDomain
                | Change::Begin(_)
                | Change::Operation(..)
                | Change::Step(..) => None,
            })
            .collect();
        let revision: Revision =
            self.engine.catalogue.commit(&self.entry.domain.name, self.entry.revision, changes).await?;
        self.entry.revision = revision;
        for edit in &edits {
            apply_edit(edit, &mut self.entry.domain, &mut self.entry.tree)?;
        }
        Ok(())
    }

    /// Manifests of deleted snapshots must be gone before their data is: where they cannot be, nothing is destroyed.
    async fn write_manifests_before_finish(&mut self) -> Result<()> {
        // A create or a revert deletes no snapshot, so its finish steps wait for no manifest.
        let deletes = self.operation.plan.steps.first().is_some_and(|first| first.group == Group::Finish);
        if !deletes {
            return Ok(());
        }
        let written = match &self.told {
            // The rest is brought up to date once, at the end.
            Some(told) => {
                let is_gone = |snapshot: &&Snapshot| self.entry.tree.get(snapshot.id).is_none();
                let gone: Vec<_> = told.tree.iter().filter(is_gone).map(|snapshot| snapshot.id).collect();
                let manifests = self.engine.manifests.clone();
                on_a_thread(move || manifests.remove(&gone)).await
            }
            None => self.try_manifests().await,
        };
        written.map_err(|error| self.left_unfinished(error))
    }

    /// Manifests follow the catalogue; where they cannot, that is told and stops nothing.
    async fn write_manifests(&mut self) {
        if let Err(error) = self.try_manifests().await {
            let message = error.to_string();
            self.tell(Event::Warning { domain: self.entry.domain.name.clone(), message: message.clone() });
            self.run.warnings.push(message);
        }
    }

    async fn try_manifests(&mut self) -> Result<()> {
        if self.told.as_ref().is_some_and(|told| told.revision == self.entry.revision) {
            return Ok(());
        }
        let catalogue = self.engine.catalogue.identity().await?.ok_or_else(|| {
            Error::new(ErrorKind::Internal, "the catalogue records an operation and has no identity")
        })?;
        let (manifests, told, entry) = (self.engine.manifests.clone(), self.told.take(), self.entry.clone());
        let write = move || manifests.write(catalogue, told.as_ref(), &entry).map(|()| entry);
        self.told = Some(on_a_thread(write).await?);
        Ok(())
    }

    fn tell(&self, event: Event) {
        self.engine.events.tell(event);
    }
}

async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|cause| Error::new(ErrorKind::Internal, "writing manifests ended early").because(cause))?
}

/// Whether a merge that failed so may be put off. A broken promise of the program's own parts may not: nobody knows
/// what it left.
fn can_wait(error: &Error) -> bool {
    error.kind() != ErrorKind::Internal
}

/// Makes a panic inside a backend an error.
async fn guarded<T>(mut step: Pin<Box<dyn Future<Output = Result<T>> + Send + '_>>) -> Result<T> {
    std::future::poll_fn(|context| {
        match std::panic::catch_unwind(AssertUnwindSafe(|| step.as_mut().poll(context))) {
            Ok(polled) => polled,
            Err(payload) => Poll::Ready(Err(Error::new(
                ErrorKind::Internal,
                format!("the backend panicked: {}", words_of(&*payload)),
            )
            .advise("this is a defect of the backend; please report it"))),
        }
    })
    .await
}

fn words_of(payload: &(dyn Any + Send)) -> &str {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(words), _) => words,
        (None, Some(words)) => words,
        (None, None) => "without words",
    }
}

/// How often a step's progress is told at most.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// Tells a step's progress, now and then.
struct Teller {
    events: Events,
    operation: OperationId,
    index: u64,
    begun: Instant,
    /// When it was last told, in milliseconds since `begun`, plus one.
    told: Arc<AtomicU64>,
}

impl Teller {
    fn new(events: Events, operation: OperationId, index: usize) -> Self {
        Self { events, operation, index: index as u64, begun: Instant::now(), told: Arc::default() }
    }
}

impl Progress for Teller {
    fn bytes(&self, done: u64, total: u64) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        let told = self.told.load(Ordering::Relaxed);
        let due = told == 0
            || done >= total
            || Duration::from_millis(now.saturating_sub(told)) >= PROGRESS_INTERVAL;
        if due && self.told.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.events.tell(Event::Progress { operation: self.operation, index: self.index, done, total });
        }
    }
}
