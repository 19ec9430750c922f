//! Takes an operation back: because a step failed before its commit point, or because a crash stopped it
//! there.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::Running;
use crate::catalogue::Change;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::hypervisor::{DomainStep, PowerAfter};
use crate::name::Target;
use crate::operation::StepState;
use crate::operation::{StepTransition, Transition};
use crate::shape::subject;
use crate::step::{Edit, Group, StepStatus};

/// The time for which an image locked by another program is tried again while a guest waits for its disks.
const PATIENCE: Duration = Duration::from_secs(10);

/// The pause between two tries.
const BETWEEN_TRIES: Duration = Duration::from_millis(100);

impl Running<'_> {
    /// Undoes after a failure before the commit point, and returns the error that reports it.
    pub(super) async fn give_up(&mut self, failure: Error) -> Error {
        let reason = failure.to_string();
        if let Some(seat) = self.engine.seat {
            seat.fail();
        }
        match self.undo(&reason).await {
            Ok(()) => {
                self.write_manifests().await;
                match failure.state_now() {
                    Some(_) => failure,
                    None => failure.state("rolled back"),
                }
            }
            Err(stuck) => stuck,
        }
    }

    /// Takes all begun steps back, the last first. Where one cannot be taken back, the earlier ones of its
    /// disk are left too, and the other disks are undone all the same. In a running domain everything earlier
    /// is left: the guest must not be resumed with some disks of another time.
    pub(super) async fn undo(&mut self, reason: &str) -> Result<()> {
        self.report(Event::Undoing { operation: self.operation.id, reason: reason.to_owned() });
        self.advance(Transition::Undo)?;
        // 1) Undoing is right without this record: the record that exists still says that the operation did
        //    not happen. A crash before this record leaves an operation before its commit point, which a
        //    recovery undoes all the same.
        let undoing = Change::Operation(self.operation.id, self.operation.state, Some(reason.to_owned()));
        if let Err(error) = self.record(vec![undoing]).await {
            tracing::warn!(%error, "recording that an operation is being undone");
            if let Ok(Some(entry)) = self.engine.catalogue.load(&self.entry.domain.name).await {
                *self.entry = entry;
            }
        }
        // 2) Disks may have been changed while they were detached, and the guest may have been started since.
        //    Then they are detached again before any of them changes, so that no image is replaced while a
        //    guest writes it.
        let mut stuck: Vec<(Option<Target>, Error)> = Vec::new();
        let mut changes = Vec::new();
        let section = match self.section_to_undo_in().await {
            Ok(section) => section,
            Err(error) => {
                stuck.push((None, error));
                Section::None
            }
        };
        // 3) The last step first. The path goes back before the overlay that it named is removed. The overlay
        //    goes before the second name of the file below it. A crash here leaves some steps undone and
        //    recorded as begun: to undo them again changes nothing.
        for index in (0..self.operation.steps.len()).rev() {
            let placed = self.operation.placed(index);
            let (group, target) = (placed.group, placed.target().cloned());
            let begun = match self.operation.steps[index] {
                StepState::Started | StepState::Done => group != Group::Finish,
                StepState::Pending | StepState::Postponed | StepState::Undone => false,
            };
            let left = match self.engine.live {
                Some(_) => !stuck.is_empty(),
                None => stuck.iter().any(|(known, _)| known.is_none() || *known == target),
            };
            if !begun || left || self.is_nested(index) {
                continue;
            }
            let undone = match &section {
                Section::Restart(opened) if index == *opened => self.end_new_section().await,
                Section::Restart(_) | Section::NotNeeded if self.is_section_step(index) => Ok(Vec::new()),
                Section::None | Section::NotNeeded | Section::Restart(_) => self.undo_patiently(index).await,
            };
            let undone =
                undone.and_then(|edits| Ok((edits, self.steps(self.unit(index), StepTransition::Undo)?)));
            match undone {
                Ok((edits, states)) => {
                    changes.extend(edits.into_iter().map(Change::Edit));
                    changes.extend(states);
                }
                Err(error) => stuck.push((target, error)),
            }
        }
        if !stuck.is_empty() {
            let said: Vec<String> = stuck
                .iter()
                .map(|(target, error)| format!("{}: {error}", subject(target.as_ref())))
                .collect();
            let said = said.join("; ");
            changes.push(Change::Operation(self.operation.id, self.operation.state, Some(said.clone())));
            if let Err(error) = self.record(changes).await {
                tracing::warn!(%error, "recording which steps could not be undone");
            }
            let stands = match self.stands_still() {
                true => "; the guest is paused, with its disks detached, until that has been done",
                false => "",
            };
            return Err(Error::new(
                ErrorKind::NeedsRecovery,
                format!("the {} failed ({reason}) and could not be undone whole: {said}", self.operation.plan.operation),
            )
            .state("it did not happen, and all earlier snapshots are whole; remains of it are on the disks named")
            .advise(format!(
                "mend what is named, then run `domsnap recover`{stands}; where it cannot be mended, `domsnap recover --abandon \
                 {}` closes the operation and leaves everything as it is",
                self.entry.domain.name
            )));
        }
        // 4) The end is recorded after all disks are as before, in one transaction with the edits for data
        //    that had to stay. A crash before it repeats the undo; after it nothing is left to do but the
        //    manifests.
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
        self.report(Event::Finished { operation: self.operation.id, happened: false });
        Ok(())
    }

    /// Undoes a step. In a detached section, where the guest waits for its disks, a step is tried again if
    /// another program has locked an image since. Programs that inspect an image lock it for a moment.
    async fn undo_patiently(&mut self, index: usize) -> Result<Vec<Edit>> {
        let until = Instant::now() + PATIENCE;
        loop {
            let error = match self.undo_step(index).await {
                Ok(edits) => return Ok(edits),
                Err(error) => error,
            };
            if error.kind() != ErrorKind::Busy || !self.stands_still() || Instant::now() >= until {
                return Err(error);
            }
            sleep(BETWEEN_TRIES).await;
        }
    }

    /// Returns true if the running domain is in a detached section of this operation, before its commit
    /// point.
    fn stands_still(&self) -> bool {
        let is_open = |index: usize| {
            matches!(self.operation.steps[index], StepState::Started | StepState::Done)
                && matches!(self.domain_step(index), Some(DomainStep::Detach { .. }))
        };
        self.engine.live.is_some() && self.operation.of_group(Group::Cut).any(is_open)
    }

    fn is_section_step(&self, index: usize) -> bool {
        let step = self.domain_step(index);
        matches!(step, Some(DomainStep::Detach { .. } | DomainStep::Attach { .. }))
    }

    /// Prepares the detached section in which disks are undone that were changed in one. If the guest is
    /// paused, the section still exists, or is entered again. A guest that runs was started again since the
    /// crash. If its disks are not as before, they are detached, undone and attached again, and the guest is
    /// reset.
    async fn section_to_undo_in(&mut self) -> Result<Section> {
        let opened = self.operation.of_group(Group::Cut).find(|index| {
            self.operation.steps[*index] != StepState::Pending
                && matches!(self.domain_step(*index), Some(DomainStep::Detach { .. }))
        });
        let (Some(opened), Some(live), true) = (opened, self.engine.live, self.resumed) else {
            return Ok(Section::None);
        };
        let worked_on: Vec<usize> = (opened + 1..self.operation.plan.before_commit())
            .filter(|index| {
                self.operation.steps[*index] != StepState::Pending && self.domain_step(*index).is_none()
            })
            .collect();
        if live.seen().running {
            let mut changed = false;
            for index in worked_on {
                changed |= self.status(index).await? != StepStatus::NotDone;
            }
            if !changed {
                return Ok(Section::NotNeeded);
            }
        } else if worked_on.is_empty() {
            // The detach may have been interrupted: its own undo ends the section from there.
            return Ok(Section::None);
        }
        self.apply(opened).await?;
        Ok(if live.seen().running { Section::Restart(opened) } else { Section::None })
    }

    /// Gives the guest, which was started on disks that no longer exist, the disks that do, and resets it.
    async fn end_new_section(&mut self) -> Result<Vec<Edit>> {
        let disks = self.entry.domain.disks.iter().map(|record| record.disk.target.clone()).collect();
        let attach = DomainStep::Attach { disks, restart: None };
        let go_on = DomainStep::Continue { memory: None, reset: true, power: Some(PowerAfter::Running) };
        for step in [attach, go_on] {
            self.apply_live(&step).await?;
        }
        let message = "the domain was started after the crash, on disks of a revert that did not happen: it has its \
                       disks back as they were, and was reset";
        self.report(Event::Warning { domain: self.entry.domain.name.clone(), message: message.to_owned() });
        self.run.warnings.push(message.to_owned());
        Ok(Vec::new())
    }
}

/// The detached section in which the disks of such an operation are undone.
enum Section {
    /// The operation's own, if it had one.
    None,
    /// Its section was never needed, or is over: no disk has been changed in it.
    NotNeeded,
    /// One that was entered for the undo, because the guest was started again; the index of the step that
    /// detached the disks.
    Restart(usize),
}
