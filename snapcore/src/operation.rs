//! Operations, as recorded in the journal.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{Error, ErrorKind, Result};
use crate::group::OperationGroup;
use crate::shape::{PlacedStep, Plan};
use crate::step::Group;

/// The identity of one operation. Sorts by start time.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct OperationId(#[schemars(with = "String")] pub Uuid);

impl OperationId {
    /// Makes a new identity.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }
}

impl std::fmt::Display for OperationId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Progress of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OperationState {
    /// Planned, but not recorded.
    Planned,
    /// Recorded; prepare steps run.
    Preparing,
    /// The cut steps run.
    Cutting,
    /// Every step before the commit point is done, and the operation of another domain of the group decides
    /// if this one happens.
    Ready,
    /// Past the commit point: the operation took effect, and the rest is carried through.
    Finishing,
    /// All steps are done or deferred.
    Done,
    /// The operation failed or was cancelled; steps are being undone.
    Undoing,
    /// The operation had no effect, and nothing of it is left.
    Undone,
}

/// Events that change the state of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Transition {
    /// The operation and all its steps were recorded.
    Record,
    /// All prepare steps are done.
    Cut,
    /// All cut steps are done, and the group's decision is awaited.
    Vote,
    /// The catalogue records the outcome.
    Commit,
    /// All finish steps are done or deferred.
    Finish,
    /// A failure or a cancellation before the commit point.
    Undo,
    /// All steps are undone.
    Undone,
}

impl OperationState {
    /// Returns the state after `transition`. Only this function defines which transitions exist.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] for a transition that does not exist.
    pub(crate) fn after(self, transition: Transition) -> Result<Self> {
        use OperationState as S;
        use Transition as T;
        match (self, transition) {
            (S::Planned, T::Record) => Ok(S::Preparing),
            (S::Preparing, T::Cut) => Ok(S::Cutting),
            (S::Cutting, T::Vote) => Ok(S::Ready),
            (S::Cutting | S::Ready, T::Commit) => Ok(S::Finishing),
            (S::Finishing, T::Finish) => Ok(S::Done),
            (S::Preparing | S::Cutting | S::Ready | S::Undoing, T::Undo) => Ok(S::Undoing),
            (S::Undoing, T::Undone) => Ok(S::Undone),
            (
                state @ (S::Planned
                | S::Preparing
                | S::Cutting
                | S::Ready
                | S::Finishing
                | S::Done
                | S::Undoing
                | S::Undone),
                transition @ (T::Record | T::Cut | T::Vote | T::Commit | T::Finish | T::Undo | T::Undone),
            ) => Err(Error::new(
                ErrorKind::Internal,
                format!("an operation that is {state} has no transition {transition:?}"),
            )),
        }
    }

    /// Returns true if nothing is left to be done.
    pub fn is_final(self) -> bool {
        match self {
            Self::Done | Self::Undone => true,
            Self::Planned
            | Self::Preparing
            | Self::Cutting
            | Self::Ready
            | Self::Finishing
            | Self::Undoing => false,
        }
    }

    /// The name under which it is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Preparing => "preparing",
            Self::Cutting => "cutting",
            Self::Ready => "ready",
            Self::Finishing => "finishing",
            Self::Done => "done",
            Self::Undoing => "undoing",
            Self::Undone => "undone",
        }
    }

    /// The state of this name.
    pub fn from_word(word: &str) -> Option<Self> {
        [
            Self::Planned,
            Self::Preparing,
            Self::Cutting,
            Self::Ready,
            Self::Finishing,
            Self::Done,
            Self::Undoing,
            Self::Undone,
        ]
        .into_iter()
        .find(|state| state.as_str() == word)
    }
}

impl std::fmt::Display for OperationState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.as_str())
    }
}

/// What moves a step on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum StepTransition {
    /// It is about to be done, perhaps once more.
    Begin,
    /// It was done, durably.
    Complete,
    /// It is left to a later operation.
    Defer,
    /// It was taken back.
    Undo,
    /// It has to be done again, because a crash or the domain made it void.
    Repeat,
}

/// Progress of one step of an operation, as recorded in the journal. The disk may be ahead of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StepState {
    /// Not begun.
    Pending,
    /// Perhaps begun.
    Started,
    /// Done.
    Done,
    /// Deferred.
    Postponed,
    /// Undone.
    Undone,
}

impl StepState {
    /// The state after `transition`: the one place that says which there are.
    ///
    /// A step that runs nested in another goes with it. So it may be further than the other one, where a
    /// recovery at rest did it as a step of its own, and then begins or is deferred once more with the other.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] for a transition that does not exist.
    pub(crate) fn after(self, transition: StepTransition) -> Result<Self> {
        use StepState as S;
        use StepTransition as T;
        match (self, transition) {
            (S::Pending | S::Started | S::Done | S::Postponed, T::Begin) => Ok(S::Started),
            (S::Started, T::Complete) => Ok(S::Done),
            (S::Pending | S::Started | S::Done | S::Postponed, T::Defer) => Ok(S::Postponed),
            (S::Pending | S::Started | S::Done | S::Undone, T::Undo) => Ok(S::Undone),
            (S::Pending | S::Started | S::Done, T::Repeat) => Ok(S::Pending),
            (state @ S::Postponed, transition @ (T::Complete | T::Undo | T::Repeat))
            | (state @ S::Undone, transition @ (T::Begin | T::Complete | T::Defer | T::Repeat))
            | (state @ (S::Pending | S::Done), transition @ T::Complete) => Err(Error::new(
                ErrorKind::Internal,
                format!("a step that is {} cannot go the way {transition:?}", state.as_str()),
            )),
        }
    }

    /// Its word: the one that is stored and shown.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Started => "started",
            Self::Done => "done",
            Self::Postponed => "postponed",
            Self::Undone => "undone",
        }
    }

    /// The state of this name.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Pending, Self::Started, Self::Done, Self::Postponed, Self::Undone]
            .into_iter()
            .find(|state| state.as_str() == word)
    }
}

/// An operation, as recorded in the journal.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Operation {
    /// Its identity.
    pub id: OperationId,
    /// Its state.
    pub state: OperationState,
    /// Start time.
    pub started: Timestamp,
    /// Its plan.
    pub plan: Plan,
    /// State of each step of the plan, by the step's number.
    pub steps: Vec<StepState>,
    /// Its errors, in the order in which they happened.
    pub errors: Vec<String>,
    /// The group, if it is one with the operations of other domains.
    pub group: Option<OperationGroup>,
}

impl Operation {
    /// Makes an operation that is planned, without states of steps.
    pub fn new(id: OperationId, started: Timestamp, plan: Plan) -> Self {
        Self {
            id,
            started,
            plan,
            state: OperationState::Planned,
            steps: Vec::new(),
            errors: Vec::new(),
            group: None,
        }
    }
}

setters!(Operation {
    state: OperationState,
    steps: Vec<StepState>,
    errors: Vec<String>,
    group: Option<OperationGroup>,
});

impl Operation {
    /// The step of this number.
    ///
    /// # Panics
    /// If the plan has no such step. A number that counts [`Operation::steps`] has one.
    pub(crate) fn placed(&self, index: usize) -> PlacedStep<'_> {
        self.plan.steps().nth(index).expect("the plan has a step for each state")
    }

    /// The numbers of the steps of `group`, in running order.
    pub(crate) fn of_group(&self, group: Group) -> impl Iterator<Item = usize> + '_ {
        let steps = self.plan.steps().enumerate();
        steps.filter(move |(_, placed)| placed.group == group).map(|(index, _)| index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATES: [OperationState; 8] = [
        OperationState::Planned,
        OperationState::Preparing,
        OperationState::Cutting,
        OperationState::Ready,
        OperationState::Finishing,
        OperationState::Done,
        OperationState::Undoing,
        OperationState::Undone,
    ];

    const TRANSITIONS: [Transition; 7] = [
        Transition::Record,
        Transition::Cut,
        Transition::Vote,
        Transition::Commit,
        Transition::Finish,
        Transition::Undo,
        Transition::Undone,
    ];

    /// Nothing is undone past the commit point, and no transition leaves a final state.
    #[test]
    fn commit_and_final_states_have_no_way_back() {
        for state in STATES {
            for transition in TRANSITIONS {
                let after = state.after(transition);
                if state.is_final() {
                    assert_eq!(after.unwrap_err().kind(), ErrorKind::Internal);
                } else if state == OperationState::Finishing {
                    assert_eq!(after.is_ok(), transition == Transition::Finish);
                } else if transition == Transition::Commit {
                    let commits = matches!(state, OperationState::Cutting | OperationState::Ready);
                    assert_eq!(after.is_ok(), commits);
                }
            }
        }
    }

    /// What is undone stays so, and only what was begun gets done.
    #[test]
    fn steps_move_by_known_transitions() {
        use StepTransition as T;
        let transitions = [T::Begin, T::Complete, T::Defer, T::Undo, T::Repeat];
        let allowed = |state: StepState| transitions.map(|way| state.after(way).ok());
        let (pending, started, done) = (StepState::Pending, StepState::Started, StepState::Done);
        let (deferred, undone) = (StepState::Postponed, StepState::Undone);
        assert_eq!(allowed(pending), [Some(started), None, Some(deferred), Some(undone), Some(pending)]);
        assert_eq!(
            allowed(started),
            [Some(started), Some(done), Some(deferred), Some(undone), Some(pending)]
        );
        assert_eq!(allowed(done), [Some(started), None, Some(deferred), Some(undone), Some(pending)]);
        assert_eq!(allowed(deferred), [Some(started), None, Some(deferred), None, None]);
        assert_eq!(allowed(undone), [None, None, None, Some(undone), None]);
        assert_eq!(undone.after(T::Begin).unwrap_err().kind(), ErrorKind::Internal);
    }

    #[test]
    fn names_are_read_back() {
        for state in STATES {
            assert_eq!(OperationState::from_word(state.as_str()), Some(state));
            assert_eq!(serde_json::to_value(state).unwrap(), state.as_str());
        }
        assert_eq!(OperationState::from_word("gone"), None);
    }
}
