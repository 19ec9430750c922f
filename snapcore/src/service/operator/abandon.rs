//! Closes operations that were interrupted and cannot be recovered. No file is touched.

use tokio_util::sync::CancellationToken;

use super::Operator;
use crate::catalogue::Change;
use crate::engine::{Verdict, commit_others};
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::DomainStep;
use crate::operation::{Operation, OperationState, StepState};
use crate::service::locator::Located;
use crate::service::{DomainRef, RecoveryEnd, RecoveryReport};
use crate::shape::StepRef;
use crate::step::Group;

impl Operator {
    /// Closes the operations of a domain that have not ended.
    pub(in crate::service) async fn abandon(
        &self,
        reference: DomainRef,
        cancel: CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        let (_lease, located) = self.locks.lock_records(&reference, &cancel).await?;
        let Located { mut entry, catalogued, .. } = located;
        if !catalogued {
            return Ok(Vec::new());
        }
        let name = entry.domain.name.clone();
        self.end_interrupted_start(&entry.domain).await?;
        let live = self.locator.connect(&entry.domain).await?;
        let mut reports = Vec::new();
        for operation in self.records.unfinished(&name).await? {
            if live.is_some() && has_detached(&operation) {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!(
                        "the guest of domain {name} is paused, and its disks were taken from it by the {}",
                        operation.plan.operation
                    ),
                )
                .state("nothing was changed")
                .advise("end its process first: the disks are whole; then abandon the operation"));
            }
            // Records alone change, also where the decision of a group is carried out: what this operation
            // decided is known to the other domains before it is closed.
            let verdict = self.verdict(&name, &operation).await?;
            let happened = operation.state == OperationState::Finishing || verdict == Verdict::Committed;
            let end = if happened { OperationState::Done } else { OperationState::Undone };
            let reason = "abandoned by the user".to_owned();
            let mut changes = Vec::new();
            if operation.state == OperationState::Ready && happened {
                changes.extend(operation.plan.commit.iter().cloned().map(Change::Edit));
            }
            if happened {
                for step in operation.plan.domain_steps() {
                    if let DomainStep::CommitOthers { members } = step {
                        commit_others(self.ledger.catalogue(), members).await?;
                    }
                }
            }
            changes.push(Change::Operation(operation.id, end, Some(reason)));
            entry.revision = self.ledger.commit(&name, entry.revision, changes).await?;
            let notes = left_of(&operation, happened);
            reports.push(RecoveryReport {
                domain: name.clone(),
                operation_id: operation.id,
                operation: operation.plan.operation,
                snapshots: operation.plan.snapshots,
                found: operation.state,
                end: RecoveryEnd::Abandoned,
                postponed: Vec::new(),
                notes,
            });
        }
        Ok(reports)
    }
}

/// Returns true if the operation has detached the disks from the running guest and not attached them again.
fn has_detached(operation: &Operation) -> bool {
    let mut detached = false;
    for (state, placed) in operation.steps.iter().zip(operation.plan.steps()) {
        let StepRef::Domain(step) = placed.step else { continue };
        match step.action {
            DomainStep::Detach { .. } => {
                detached = matches!(state, StepState::Started | StepState::Done);
            }
            DomainStep::Continue { .. } => detached &= *state != StepState::Done,
            _ => {}
        }
    }
    detached
}

/// Messages: the remains of an abandoned operation.
fn left_of(operation: &Operation, happened: bool) -> Vec<String> {
    let steps = operation.steps.iter().zip(operation.plan.steps());
    let left = steps.filter(|(state, placed)| match happened {
        true => placed.group == Group::Finish && **state != StepState::Done,
        false => matches!(state, StepState::Started | StepState::Done),
    });
    let mut notes: Vec<String> = left
        .map(|(_, placed)| {
            let what = if happened { "not done" } else { "not undone" };
            format!("{}: {what}: {}", placed.subject(), placed.summary())
        })
        .collect();
    notes.extend(operation.errors.last().map(|error| format!("it had stopped because of: {error}")));
    notes.push(
        "no file was touched; `domsnap check` shows the state, and where the catalogue is wrong, `domsnap import \
         --replace` takes the images in as they are"
            .to_owned(),
    );
    notes
}
