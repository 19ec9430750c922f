//! Steps after the commit point: they are carried through, deferred, or left for a recovery.

use std::sync::Arc;

use super::guest::Guest;
use super::{Run, Running};
use crate::backend::Leftover;
use crate::catalogue::Change;
use crate::domain::DiskRecord;
use crate::erased::AnyDiskSnapshotter;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::hypervisor::{DomainStep, PowerAfter, StepOutcome};
use crate::name::Target;
use crate::operation::StepState;
use crate::operation::{StepTransition, Transition};
use crate::service::Postponed;
use crate::shape::StepRef;
use crate::step::{Group, Step, StepStatus};

impl Running<'_> {
    /// Does the finish steps that are not done, and ends the operation.
    pub(super) async fn finish(mut self) -> Result<Run> {
        match self.carry_through().await {
            Ok(()) => Ok(self.run),
            Err(error) => Err(self.close_section(error).await),
        }
    }

    async fn carry_through(&mut self) -> Result<()> {
        self.run.happened = true;
        let mut finish: Vec<usize> =
            self.operation.of_group(Group::Finish).filter(|index| !self.is_nested(*index)).collect();
        if self.engine.live.is_none() {
            self.start_last(&mut finish);
        }
        // 1) In a recovery, before anything else is done: repeat steps that are recorded as done and were
        //    superseded. Such a merge lacks the domain's later writes. It is repeated before the path leaves
        //    the layer that has them.
        if self.resumed {
            self.reopen_section(&finish)?;
            self.look_for_superseded(&finish).await.map_err(|error| self.left_unfinished(error))?;
        }
        let mut deferred: Vec<Option<Target>> = Vec::new();
        let mut pending: Vec<Change> = Vec::new();
        for index in finish {
            let placed = self.operation.placed(index);
            let (target, bytes, deferrable) = (placed.target().cloned(), placed.bytes(), placed.deferrable);
            let unit = self.unit(index);
            let begun_before = match self.operation.steps[index] {
                StepState::Done => continue,
                StepState::Started => self.resumed,
                StepState::Pending | StepState::Postponed | StepState::Undone => false,
            };
            let mut reason = None;
            if deferred.contains(&target) || self.operation.steps[index] == StepState::Postponed {
                reason = Some("an earlier step of this disk was deferred".to_owned());
            } else if deferrable && self.cancel.is_cancelled() {
                reason = Some("it was cancelled".to_owned());
            } else {
                // 2) The step is recorded as started before it begins, in the transaction that records the
                //    previous step as done. So the previous step is never repeated after this one has taken
                //    away what it needs. A merge is durable and recorded before the path moves; the move is
                //    recorded before the merged layers are removed.
                if unit.clone().any(|step| self.operation.steps[step] != StepState::Started) {
                    pending.extend(self.steps(unit.clone(), StepTransition::Begin)?);
                }
                if !pending.is_empty() {
                    let changes = std::mem::take(&mut pending);
                    self.record(changes).await.map_err(|error| self.left_unfinished(error))?;
                }
                // 3) The step itself is durable when it returns. A crash in it leaves it started; it is
                //    idempotent, and is done again.
                let applied = match self.may_have_run_since(index, begun_before).await {
                    Some(note) => Ok(StepOutcome { notes: vec![note], ..StepOutcome::default() }),
                    None => self.apply(index).await,
                };
                match applied {
                    // 4) Its edits are recorded with it, in one transaction, which the start of the next step
                    //    shares. The catalogue forgets a layer only after its file is gone, so a crash leaves
                    //    no file that the catalogue does not know.
                    Ok(facts) => {
                        self.note(index, facts)?;
                        self.run.bytes_moved = self.run.bytes_moved.saturating_add(bytes);
                        pending.extend(self.steps(unit.clone(), StepTransition::Complete)?);
                        let edits = unit.clone().flat_map(|step| self.operation.placed(step).edits);
                        pending.extend(edits.cloned().map(Change::Edit));
                        self.report_done(unit.clone());
                    }
                    Err(error)
                        if (deferrable || self.is_left_whole(index, &error) || self.is_of_names(index))
                            && can_wait(&error)
                            && !self.has_moved_path(unit.clone()).await =>
                    {
                        reason = Some(error.to_string());
                        if let Some(Leftover::Stays(what)) = self.leftover(index) {
                            self.run.warnings.push(what);
                        }
                    }
                    Err(error) => {
                        if matches!(self.domain_step(index), Some(DomainStep::Detach { .. })) {
                            // It may have paused the guest before it failed, and closed some of the disks.
                            self.guest = Guest::Detached { since: index };
                        }
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
                // The names that a hypervisor uses for the images keep no other step from being done.
                if !self.is_of_names(index) {
                    deferred.push(target.clone());
                }
                pending.extend(self.steps(unit, StepTransition::Defer)?);
                self.defer(target, index, bytes, reason);
            }
        }
        // 5) The end is recorded with the last step. Manifests come after it. A crash may leave a manifest
        //    out of date: its revision shows that, and the next change writes it.
        if !self.operation.state.is_final() {
            self.advance(Transition::Finish)?;
            pending.push(Change::Operation(self.operation.id, self.operation.state, None));
            self.record(pending).await.map_err(|error| self.left_unfinished(error))?;
        }
        self.write_manifests().await;
        self.report(Event::Finished { operation: self.operation.id, happened: true });
        Ok(())
    }

    /// Moves the step that starts the domain from memory behind all others. The process that it starts opens
    /// and locks the images, and the other steps need images that no process has open. A process that is
    /// running already has the images open; then the guest is resumed first, because it is paused. A crash
    /// before the start leaves a domain that is off, and `recover` starts it.
    fn start_last(&self, finish: &mut [usize]) {
        let starts = |index: &usize| matches!(self.domain_step(*index), Some(DomainStep::Continue { .. }));
        if let Some(place) = finish.iter().position(starts) {
            finish[place..].rotate_left(1);
        }
    }

    /// For a step that was to resume a running guest and was begun before a crash, of a domain that is off
    /// now: returns a note. The guest may have run and written to its disks before it ended, and memory that
    /// is loaded over such disks destroys them.
    async fn may_have_run_since(&self, index: usize, begun_before: bool) -> Option<String> {
        let loads = matches!(
            self.domain_step(index),
            // A guest that stays paused has not run.
            Some(DomainStep::Continue { memory: Some(_), power, .. }) if *power != Some(PowerAfter::Paused)
        );
        if !(begun_before && loads && self.engine.live.is_none() && self.is_revert()) {
            return None;
        }
        let domain = &self.entry.domain;
        let known = match self.engine.registry.hypervisor(&domain.hypervisor) {
            Ok(saver) => saver.may_have_run_since(domain).await.unwrap_or(None),
            Err(_) => None,
        };
        // The snapshot stays, and can be reverted to again. The state that an undo restores does not: where
        // nothing is known, its only memory is used rather than lost.
        known.unwrap_or(self.operation.plan.operation != "undo").then(|| {
            "the revert was interrupted while it resumed the guest, and the domain is off now: the guest may have run and \
             written to its disks, so it is not started from the memory of the snapshot; it is off on these disks; \
             revert again to have exactly the snapshot"
                .to_owned()
        })
    }

    /// Marks the step that detaches the disks for repetition, where a crash has ended the detached section
    /// together with the hypervisor's process. The steps that are left of the section need it.
    fn reopen_section(&mut self, finish: &[usize]) -> Result<()> {
        let mut opened = None;
        for &index in finish {
            match self.domain_step(index) {
                Some(DomainStep::Detach { .. }) => opened = Some(index),
                Some(DomainStep::Attach { .. }) if self.operation.steps[index] != StepState::Done => {
                    if let Some(opened) = opened {
                        self.move_step(opened, StepTransition::Repeat)?;
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Resumes the guest after a failure in a detached section of the finish steps, so that it is not left
    /// paused. Its disks are whole after every step. In a section that the cut began, the guest stays paused.
    async fn close_section(&mut self, error: Error) -> Error {
        let Some(opened) = self.guest.detached_since() else { return error };
        let in_finish = self.operation.placed(opened).group == Group::Finish;
        if !in_finish {
            return error.state("the disks and all snapshots are whole; the guest is paused");
        }
        match self.undo_step(opened).await {
            Ok(_) => error.state("the guest is running, and all its disks and snapshots are whole"),
            Err(second) => error.state(format!("the guest is paused and could not be resumed: {second}")),
        }
    }

    /// Marks for repetition the finish steps that are recorded as done but lack what the domain wrote since.
    async fn look_for_superseded(&mut self, finish: &[usize]) -> Result<()> {
        for (place, &index) in finish.iter().enumerate() {
            let target = self.operation.placed(index).target();
            let later_ones_left = finish[place + 1..].iter().any(|&later| {
                self.operation.placed(later).target() == target
                    && self.operation.steps[later] != StepState::Done
            });
            if self.operation.steps[index] != StepState::Done || !later_ones_left {
                continue;
            }
            if self.is_superseded(index).await? {
                let placed = self.operation.placed(index);
                let message = format!(
                    "{}: the domain may have run after the crash, so this is done once more: {}",
                    placed.subject(),
                    placed.summary()
                );
                tracing::info!(%message, "recovering");
                self.move_step(index, StepTransition::Repeat)?;
            }
        }
        Ok(())
    }

    /// Returns true if the disk is whole without this step. Then a step that cannot be done (an immutable
    /// file, no permission, a full disk) does not block everything else of the domain.
    fn is_left_whole(&self, index: usize, error: &Error) -> bool {
        let for_ever =
            matches!(error.kind(), ErrorKind::Corrupt | ErrorKind::Refused | ErrorKind::Unsupported);
        match self.leftover(index) {
            None | Some(Leftover::Required) => false,
            Some(Leftover::PlannedAgain) => true,
            Some(Leftover::Stays(_)) => for_ever,
        }
    }

    /// The consequence for a disk whose step could not be done.
    fn leftover(&self, index: usize) -> Option<Leftover> {
        let (backend, record, step) = self.disk_step(index)?;
        Some(backend.leftover(record, step))
    }

    fn disk_step(&self, index: usize) -> Option<(Arc<AnyDiskSnapshotter>, &DiskRecord, &Step)> {
        let StepRef::Disk(step) = self.operation.placed(index).step else { return None };
        let record = self.entry.domain.disks.iter().find(|record| record.disk.target == step.target)?;
        Some((self.engine.registry.serving(&record.disk).ok()?, record, step))
    }

    /// Returns true if one of these steps has moved the configured path, or may have, though it failed (its
    /// directory could not be flushed). Such a step is not deferred, but repeated by `recover`. If it were
    /// deferred, the catalogue would still say that the path names the previous layer. Every operation would
    /// be refused, because the path does not.
    async fn has_moved_path(&self, unit: std::ops::Range<usize>) -> bool {
        for index in unit {
            let moves = self.disk_step(index).is_some_and(|(backend, record, step)| {
                // Only this step makes the path the name of another file.
                backend
                    .uses(record, step)
                    .makes
                    .iter()
                    .any(|made| Some(made.as_path()) == record.disk.local())
            });
            if moves && !matches!(self.status(index).await, Ok(StepStatus::NotDone)) {
                return true;
            }
        }
        false
    }

    /// Returns true for the step by which a hypervisor learns the new names of frozen images. The disks and
    /// all snapshots are whole without it. Each operation that needs the step checks whether it was done;
    /// `LiveDomain::clean_up` does it.
    fn is_of_names(&self, index: usize) -> bool {
        matches!(self.domain_step(index), Some(DomainStep::ReopenByName { .. }))
    }

    fn defer(&mut self, target: Option<Target>, index: usize, bytes: u64, reason: String) {
        if let Some(known) = self.run.postponed.iter_mut().find(|postponed| postponed.target == target) {
            known.steps += 1;
            known.bytes = known.bytes.saturating_add(bytes);
            return;
        }
        self.report(Event::Postponed {
            operation: self.operation.id,
            target: target.clone(),
            reason: reason.clone(),
        });
        let step = self.operation.placed(index).summary().to_owned();
        self.run.postponed.push(Postponed { target, step, steps: 1, bytes, reason });
    }

    pub(super) fn left_unfinished(&self, error: Error) -> Error {
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
        .advise(format!(
            "mend what is named, then run `domsnap recover`: it does the rest; where it cannot be mended, `domsnap recover \
             --abandon {}` closes the operation and leaves everything as it is",
            self.entry.domain.name
        ))
    }
}
/// Returns true if a merge that failed with this error may be deferred. After an internal error it may not:
/// what the step left on the disk is not known.
fn can_wait(error: &Error) -> bool {
    error.kind() != ErrorKind::Internal
}
