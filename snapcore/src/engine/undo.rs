//! An operation that is taken back: because something failed before its commit point, or because a crash
//! stopped it there.

use std::time::{Duration, Instant};

use tokio::time::sleep;

use super::Running;
use crate::catalogue::Change;
use crate::operation::StepTransition;
use crate::{
    DomainStep, Edit, Error, ErrorKind, Event, Group, PowerAfter, Result, StepState, StepStatus, Target,
    Transition,
};

/// How long an image that another program has locked is tried again while a guest waits for its disks.
const PATIENCE: Duration = Duration::from_secs(10);

/// Between two tries.
const BETWEEN_TRIES: Duration = Duration::from_millis(100);

impl Running<'_> {
    /// A failure before the commit point: undoes, and makes the error that says so.
    pub(super) async fn give_up(&mut self, failure: Error) -> Error {
        let reason = failure.to_string();
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
    /// disk are left too, and the other disks are undone all the same; but in a running domain everything
    /// earlier is left: the guest must not go on with some disks of another time.
    pub(super) async fn undo(&mut self, reason: &str) -> Result<()> {
        self.tell(Event::Undoing { operation: self.operation.id, reason: reason.to_owned() });
        self.advance(Transition::Undo)?;
        // 1) Undoing is right without this record: what is recorded still says that it did not happen. A
        //    crash before it leaves an operation before its commit point, which a recovery undoes all the
        //    same.
        let undoing = Change::Operation(self.operation.id, self.operation.state, Some(reason.to_owned()));
        if let Err(error) = self.record(vec![undoing]).await {
            tracing::warn!(%error, "recording that an operation is being undone");
            if let Ok(Some(entry)) = self.engine.catalogue.load(&self.entry.domain.name).await {
                *self.entry = entry;
            }
        }
        // 2) If disks were changed while they were detached, and the guest was started since, they are
        //    detached again before any of them changes: an image that a guest writes is not replaced under
        //    it.
        let mut stuck: Vec<(Target, Error)> = Vec::new();
        let mut changes = Vec::new();
        let window = match self.window_to_undo_in().await {
            Ok(window) => window,
            Err(error) => {
                stuck.push((Target::of_domain(), error));
                Window::None
            }
        };
        // 3) The last step first: the path goes back before the overlay that it named is removed, and the
        //    overlay goes before the second name of the file below it. A crash here leaves some steps undone
        //    and recorded as begun: to undo them again changes nothing.
        for index in (0..self.operation.steps.len()).rev() {
            let planned = &self.operation.plan.steps[index];
            let target = planned.step.target.clone();
            let begun = match self.operation.steps[index] {
                StepState::Started | StepState::Done => planned.group != Group::Finish,
                StepState::Pending | StepState::Postponed | StepState::Undone => false,
            };
            let left = match self.engine.live {
                Some(_) => !stuck.is_empty(),
                None => stuck.iter().any(|(known, _)| *known == target || known.is_domain()),
            };
            if !begun || left || self.is_inside(index) {
                continue;
            }
            let undone = match (&window, target.is_domain()) {
                (Window::Restart(opened), true) if index == *opened => self.end_new_window().await,
                (Window::Restart(_) | Window::NotNeeded, true) if self.is_window_step(index) => {
                    Ok(Vec::new())
                }
                _ => self.undo_patiently(index).await,
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
            let said: Vec<String> =
                stuck.iter().map(|(target, error)| format!("{target}: {error}")).collect();
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
        // 4) The end, and what had to stay, in one transaction after all disks are as before. A crash before
        //    it repeats the undo; after it nothing is left to do but the manifests.
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

    /// Undoes a step. In a detached section, where the guest waits for its disks, an image that another
    /// program has locked since is tried again: programs that look at an image lock it for a moment.
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

    /// Whether a window of this operation is open in the running domain, before its commit point.
    fn stands_still(&self) -> bool {
        let is_open = |index: usize| {
            matches!(self.operation.steps[index], StepState::Started | StepState::Done)
                && self.operation.plan.steps[index].step.target.is_domain()
                && matches!(self.domain_step(index), Ok(DomainStep::Detach { .. }))
        };
        self.engine.live.is_some() && self.operation.of_group(Group::Cut).any(is_open)
    }

    fn is_window_step(&self, index: usize) -> bool {
        let step = self.domain_step(index);
        matches!(step, Ok(DomainStep::Detach { .. } | DomainStep::Attach { .. }))
    }

    /// Disks that were worked on in a window are undone in one. Where the guest stands still it is there yet,
    /// or is opened again. A guest that runs was started anew since the crash: where its disks are not as
    /// before, they are taken from it, undone, and given back, and it is reset.
    async fn window_to_undo_in(&mut self) -> Result<Window> {
        let opened = self.operation.of_group(Group::Cut).find(|index| {
            self.operation.steps[*index] != StepState::Pending
                && self.operation.plan.steps[*index].step.target.is_domain()
                && matches!(self.domain_step(*index), Ok(DomainStep::Detach { .. }))
        });
        let (Some(opened), Some(live), true) = (opened, self.engine.live, self.resumed) else {
            return Ok(Window::None);
        };
        let worked_on: Vec<usize> = (opened + 1..self.operation.plan.steps.len())
            .filter(|index| {
                let planned = &self.operation.plan.steps[*index];
                self.operation.steps[*index] != StepState::Pending
                    && planned.group == Group::Cut
                    && !planned.step.target.is_domain()
            })
            .collect();
        if live.seen().running {
            let mut changed = false;
            for index in worked_on {
                changed |= self.status(index).await? != StepStatus::NotDone;
            }
            if !changed {
                return Ok(Window::NotNeeded);
            }
        } else if worked_on.is_empty() {
            // It may have been opened half way: it is closed from there.
            return Ok(Window::None);
        }
        self.apply(opened).await?;
        Ok(if live.seen().running { Window::Restart(opened) } else { Window::None })
    }

    /// The guest that was started on disks which are no more gets those that are, and starts again.
    async fn end_new_window(&mut self) -> Result<Vec<Edit>> {
        let disks = self.entry.domain.disks.iter().map(|record| record.disk.target.clone()).collect();
        let attach = DomainStep::Attach { disks, restart: None };
        let go_on = DomainStep::Continue { memory: None, reset: true, power: Some(PowerAfter::Running) };
        for step in [attach, go_on] {
            self.apply_live(&step).await?;
        }
        let message = "the domain was started after the crash, on disks of a revert that did not happen: it has its \
                       disks back as they were, and was reset";
        self.tell(Event::Warning { domain: self.entry.domain.name.clone(), message: message.to_owned() });
        self.run.warnings.push(message.to_owned());
        Ok(Vec::new())
    }
}

/// Where the disks of an operation that worked in a window are undone.
enum Window {
    /// The operation's own, where it had one.
    None,
    /// Its window was never needed, or is over: no disk has been changed in it.
    NotNeeded,
    /// One that was opened for it, because the guest was started anew; the step that stands for it.
    Restart(usize),
}
