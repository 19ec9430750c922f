//! Operations of several domains as one: all of them commit, or none.
//!
//! **What is durable before what.** Each domain has an operation of its own in its own journal, because a
//! transaction never spans domains. One of them decides.
//!
//! 1. Every other operation records that it is ready, with all that its commit point will record. From then
//!    on it does not decide by itself any more.
//! 2. When all are ready, the deciding operation commits. That one transaction is the commit point of all.
//! 3. The others commit, each in its own journal.
//! 4. The deciding operation ends only when all others have committed (`DomainStep::CommitOthers`).
//!
//! A crash before 2) leaves a deciding operation that has not committed: its recovery undoes it, and those of
//! the others read that, or do not find it any more, and undo theirs. A crash after 2) leaves one that has
//! committed and, because of 4), has not ended: so it is in the journal for whoever asks. A recovery of
//! another domain never guesses: where the deciding operation has not committed, it marks it as being undone
//! before it undoes its own.

use async_trait::async_trait;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{Running, cancelled};
use crate::catalogue::{Catalogue, Change};
use crate::error::{Error, ErrorKind, Result};
use crate::group::{GroupMember, OperationGroup};
use crate::hypervisor::{Meeting, Rendezvous, StepOutcome};
use crate::operation::{OperationId, OperationState};

/// The tries of a transaction on a domain in which another process works.
const TRIES: usize = 20;

/// The decision about the operations of a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// They have happened.
    Committed,
    /// They have not happened, and are undone.
    Undone,
    /// The journal of the deciding operation cannot be read: a recovery will know.
    Unknown,
}

/// How far the operation of one domain has come in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Begun,
    /// The guest can be paused.
    Ready,
    /// The guest is paused.
    Paused,
    /// The disks are cut, and the guest could go on.
    Cut,
    /// The operation waits for the decision.
    Voted,
    /// The operation has committed.
    Committed,
    /// The guest could go on after a revert.
    Loaded,
    /// The operation has ended, well or badly.
    Ended,
}

impl From<Meeting> for Stage {
    fn from(meeting: Meeting) -> Self {
        match meeting {
            Meeting::Ready => Self::Ready,
            Meeting::Paused => Self::Paused,
            Meeting::Cut => Self::Cut,
            Meeting::Loaded => Self::Loaded,
        }
    }
}

/// The operations of a group in this process.
#[derive(Debug)]
struct State {
    stages: Vec<Stage>,
    /// Operations that know the decision and could not record it.
    lost: usize,
    verdict: Option<Verdict>,
    /// The first member that failed before the decision.
    failed: Option<usize>,
}

/// The operations of a group, carried out side by side in this process.
#[derive(Debug)]
pub(crate) struct GroupRun {
    state: watch::Sender<State>,
    members: Vec<GroupMember>,
    group: OperationGroup,
    cancel: CancellationToken,
}

impl GroupRun {
    /// A run of these operations, of which the first one decides. `cancel` is cancelled when one fails before
    /// the decision.
    pub(crate) fn new(group: OperationGroup, members: Vec<GroupMember>, cancel: CancellationToken) -> Self {
        let state = State { stages: vec![Stage::Begun; members.len()], lost: 0, verdict: None, failed: None };
        Self { state: watch::Sender::new(state), members, group, cancel }
    }

    /// The part of the member `index` in it.
    pub(crate) fn seat(&self, index: usize) -> Seat<'_> {
        Seat { run: self, index }
    }

    /// The first member that failed before the decision.
    pub(crate) fn failed(&self) -> Option<usize> {
        self.state.borrow().failed
    }
}

/// The part of one domain in the run of a group.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seat<'a> {
    run: &'a GroupRun,
    index: usize,
}

impl Seat<'_> {
    /// The identity of its operation.
    pub(super) fn operation(&self) -> OperationId {
        self.run.members[self.index].operation
    }

    /// The group.
    pub(super) fn group(&self) -> OperationGroup {
        self.run.group.clone()
    }

    /// Returns true if its operation decides.
    fn decides(&self) -> bool {
        self.index == 0
    }

    fn reach(&self, stage: Stage) {
        self.run.state.send_modify(|state| {
            let own = &mut state.stages[self.index];
            *own = (*own).max(stage);
        });
    }

    /// Waits until every operation has come this far. Returns false if one failed before.
    async fn wait_for(&self, stage: Stage) -> bool {
        let mut changes = self.run.state.subscribe();
        let met = |state: &State| state.failed.is_some() || state.stages.iter().all(|own| *own >= stage);
        // The sender lives as long as the run.
        let state = changes.wait_for(met).await;
        state.is_ok_and(|state| state.failed.is_none())
    }

    /// Reports that the operation failed before the decision: no other one commits, and all are undone.
    pub(crate) fn fail(&self) {
        let mut first = false;
        self.run.state.send_modify(|state| {
            if state.verdict.is_none() {
                state.failed.get_or_insert(self.index);
                state.verdict = self.decides().then_some(Verdict::Undone);
                first = true;
            }
        });
        if first {
            self.run.cancel.cancel();
        }
    }

    /// Records the end of the operation's run, with or without a failure.
    pub(crate) fn end(&self) {
        let voted = self.run.state.borrow().stages[self.index] >= Stage::Voted;
        match (voted, self.decides()) {
            (false, _) => self.fail(),
            // All are ready, and it is neither known to be committed nor to be undone.
            (true, true) => self.run.state.send_modify(|state| {
                state.verdict.get_or_insert(Verdict::Unknown);
            }),
            (true, false) => {}
        }
        self.run.state.send_modify(|state| {
            if state.stages[self.index] < Stage::Committed {
                state.lost += 1;
            }
            state.stages[self.index] = Stage::Ended;
        });
    }

    /// Records that the operation has committed.
    pub(super) fn committed(&self) {
        if self.decides() {
            self.run.state.send_modify(|state| state.verdict = Some(Verdict::Committed));
        }
        self.reach(Stage::Committed);
    }

    /// Waits until all others are ready.
    async fn all_voted(&self) -> Result<()> {
        self.reach(Stage::Voted);
        tokio::select! {
            biased;
            () = self.run.cancel.cancelled() => Err(cancelled()),
            met = self.wait_for(Stage::Voted) => if met { Ok(()) } else { Err(other_failed()) },
        }
    }

    /// Waits for the decision.
    async fn verdict(&self) -> Verdict {
        self.reach(Stage::Voted);
        let mut changes = self.run.state.subscribe();
        let decided = changes.wait_for(|state| state.verdict.is_some()).await;
        decided.ok().and_then(|state| state.verdict).unwrap_or(Verdict::Unknown)
    }

    /// Waits until all others have committed.
    async fn all_committed(&self) -> Result<()> {
        let mut changes = self.run.state.subscribe();
        let all_have = |state: &State| state.stages.iter().all(|own| *own >= Stage::Committed);
        let lost = changes.wait_for(all_have).await.map_or(1, |state| state.lost);
        match lost {
            0 => Ok(()),
            lost => Err(Error::new(
                ErrorKind::NeedsRecovery,
                format!("{lost} of the group's domains could not record that it has happened"),
            )),
        }
    }
}

#[async_trait]
impl Rendezvous for Seat<'_> {
    async fn meet(&self, meeting: Meeting) -> Result<()> {
        let stage = Stage::from(meeting);
        self.reach(stage);
        match (self.wait_for(stage).await, meeting) {
            // After the decision each guest goes on, whatever another one does.
            (_, Meeting::Loaded) | (true, _) => Ok(()),
            (false, Meeting::Ready | Meeting::Paused | Meeting::Cut) => Err(other_failed()),
        }
    }
}

/// The error of an operation that is undone because of another one.
fn other_failed() -> Error {
    Error::new(ErrorKind::Cancelled, "another domain of the group failed")
}

impl Running<'_> {
    /// Brings the operation to its commit point together with the others of its group. Returns what its
    /// commit must record beside its own changes.
    pub(super) async fn agree(&mut self, mut changes: Vec<Change>) -> Result<Vec<Change>> {
        let Some(seat) = self.engine.seat else { return Ok(changes) };
        if seat.decides() {
            seat.all_voted().await?;
            return Ok(changes);
        }
        // 1) Ready, with all that the commit point will record. From here on only the deciding operation
        //    says if this one has happened, also after a crash.
        let edits = self.operation.plan.commit.clone();
        self.advance(crate::operation::Transition::Vote)?;
        changes.push(Change::Ready(self.operation.id, edits));
        self.record(changes).await?;
        self.bound = true;
        // 2) The decision. It is durable in the journal of the deciding domain before it is known here.
        match seat.verdict().await {
            Verdict::Committed => Ok(Vec::new()),
            Verdict::Undone => {
                self.bound = false;
                Err(other_failed())
            }
            Verdict::Unknown => Err(Error::new(
                ErrorKind::NeedsRecovery,
                format!(
                    "whether the group's operation has happened is not known: domain {} decides, and its records \
                     cannot be read",
                    seat.run.group.decider.domain
                ),
            )),
        }
    }

    /// The error of an operation that is ready and must neither be committed nor undone by itself.
    pub(super) fn left_to_the_group(&self, failure: Error) -> Error {
        failure
            .with_kind(ErrorKind::NeedsRecovery)
            .state("its disks are ready for both, and nothing is lost")
            .advise(format!(
                "when the state directory can be used again, run `domsnap recover {}`",
                self.entry.domain.name
            ))
    }

    /// Makes sure that all other operations of the group have committed.
    pub(super) async fn commit_others(&self, members: &[GroupMember]) -> Result<StepOutcome> {
        match self.engine.seat {
            Some(seat) => seat.all_committed().await?,
            None => commit_others(self.engine.catalogue, members).await?,
        }
        Ok(StepOutcome::default())
    }

    /// Commits an operation that is ready, after the deciding operation has committed.
    pub(super) async fn commit_ready(&mut self) -> Result<()> {
        let mut changes = self.commit_changes()?;
        changes.push(Change::Operation(self.operation.id, self.operation.state, None));
        self.record(changes).await.map_err(|error| self.left_to_the_group(error))
    }
}

/// Commits those of the operations that are still ready. No lock of their domains is needed: each is one
/// transaction, which names the revision that it was made from. Another process that works in such a domain
/// has found the same decision.
///
/// # Errors
/// Those of the catalogue.
pub(crate) async fn commit_others(catalogue: &dyn Catalogue, members: &[GroupMember]) -> Result<()> {
    for member in members {
        let mut tries = TRIES;
        loop {
            let Some(entry) = catalogue.load(&member.domain).await? else { break };
            let Some(operation) = catalogue.operation(&member.domain, member.operation).await? else { break };
            if operation.state != OperationState::Ready {
                break;
            }
            let ended = if operation.plan.finish.is_empty() {
                OperationState::Done
            } else {
                OperationState::Finishing
            };
            let mut changes: Vec<Change> = operation.plan.commit.into_iter().map(Change::Edit).collect();
            changes.push(Change::Operation(operation.id, ended, None));
            match catalogue.commit(&member.domain, entry.revision, changes).await {
                Ok(_) => break,
                Err(error) if error.kind() == ErrorKind::Busy && tries > 0 => tries -= 1,
                Err(error) => {
                    return Err(
                        error.context(format!("recording in domain {} what has happened", member.domain))
                    );
                }
            }
        }
    }
    Ok(())
}
