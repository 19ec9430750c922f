//! A plan as rows of a journal, one for each step.
//!
//! A row states its place by flags, and rows may be of another version, or damaged. So the way back is
//! checked: rows that are in no order which a plan can have are refused, and never read as another plan.

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::DomainStep;
use crate::name::Target;
use crate::shape::{CutUnit, FinishStep, FinishUnit, HypervisorStep, NestedStep, Plan, PlanStep, StepRef};
use crate::step::{Edit, Group, Step};

/// A step as a journal stores it. Its number is the number of the row.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct StepRow {
    /// The part of the plan.
    pub group: Group,
    /// True if it is nested in the nearest row before it that is not.
    pub nested: bool,
    /// The disk; absent: it is a step of the domain.
    pub target: Option<Target>,
    /// The action.
    pub action: Value,
    /// Description for people.
    pub summary: String,
    /// Bytes of data that it will move; 0 for a step of the domain.
    pub bytes: u64,
    /// Its changes of the catalogue; none before the commit point, and none of a step of the domain.
    pub edits: Vec<Edit>,
    /// True if it can be deferred.
    pub deferrable: bool,
}

impl StepRow {
    /// Makes the row of a step of the domain.
    pub fn new(group: Group, action: Value, summary: impl Into<String>) -> Self {
        Self {
            group,
            action,
            summary: summary.into(),
            nested: false,
            target: None,
            bytes: 0,
            edits: Vec::new(),
            deferrable: false,
        }
    }
}

setters!(StepRow {
    nested: bool,
    target: Option<Target>,
    bytes: u64,
    edits: Vec<Edit>,
    deferrable: bool,
});

impl Plan {
    /// The rows of all steps.
    ///
    /// # Errors
    /// [`ErrorKind::Internal`] where an action cannot be written as JSON.
    pub fn rows(&self) -> Result<Vec<StepRow>> {
        self.steps()
            .map(|placed| {
                let action = match placed.step {
                    StepRef::Disk(step) => step.action.clone(),
                    StepRef::Domain(step) => serde_json::to_value(&step.action).map_err(|cause| {
                        Error::new(ErrorKind::Internal, "a step of the domain cannot be recorded")
                            .because(cause)
                            .state("no changes made")
                    })?,
                };
                Ok(StepRow {
                    group: placed.group,
                    nested: placed.nested,
                    target: placed.target().cloned(),
                    action,
                    summary: placed.summary().to_owned(),
                    bytes: placed.bytes(),
                    edits: placed.edits.to_vec(),
                    deferrable: placed.deferrable,
                })
            })
            .collect()
    }

    /// Adds the step of the next row.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`] for a row that has no place there, or an action on the domain that is unknown.
    pub fn push_row(&mut self, row: StepRow) -> Result<()> {
        let (group, nested, summary) = (row.group, row.nested, row.summary.clone());
        let begun = match (self.finish.is_empty(), self.cut.is_empty()) {
            (false, _) => Group::Finish,
            (true, false) => Group::Cut,
            (true, true) => Group::Prepare,
        };
        let misplaced = || unreadable(format!("the journal has a step where no plan has one: {summary}"));
        if group < begun || (group != Group::Finish && (!row.edits.is_empty() || row.deferrable)) {
            return Err(misplaced());
        }
        let StepRow { target, action, summary, bytes, edits, deferrable, .. } = row;
        let step = match target {
            Some(target) => PlanStep::Disk(Step { target, action, summary, bytes }),
            None if edits.is_empty() && !deferrable => {
                PlanStep::Domain(HypervisorStep { action: domain_action(action)?, summary })
            }
            None => return Err(misplaced()),
        };
        match (group, nested, step) {
            (Group::Prepare, false, step) => self.prepare.push(step),
            (Group::Cut, false, PlanStep::Disk(step)) => self.cut.push(CutUnit::Disk(step)),
            (Group::Cut, false, PlanStep::Domain(step)) => {
                self.cut.push(CutUnit::Domain { step, nested: Vec::new() });
            }
            (Group::Cut, true, PlanStep::Disk(step)) => match self.cut.last_mut() {
                Some(CutUnit::Domain { nested, .. }) => nested.push(step),
                Some(CutUnit::Disk(_)) | None => return Err(misplaced()),
            },
            (Group::Finish, false, PlanStep::Disk(step)) => {
                self.finish.push(FinishUnit::Disk(FinishStep { edits, deferrable, ..FinishStep::new(step) }));
            }
            (Group::Finish, false, PlanStep::Domain(step)) => self.finish.push(FinishUnit::Domain(step)),
            (Group::Finish, true, PlanStep::Disk(step)) => match self.finish.last_mut() {
                Some(FinishUnit::Disk(head)) if head.step.target == step.target && !deferrable => {
                    head.nested.push(NestedStep { step, edits });
                }
                Some(FinishUnit::Disk(_) | FinishUnit::Domain(_)) | None => return Err(misplaced()),
            },
            (Group::Prepare, true, _) | (Group::Cut | Group::Finish, true, PlanStep::Domain(_)) => {
                return Err(misplaced());
            }
        }
        Ok(())
    }
}

fn domain_action(action: Value) -> Result<DomainStep> {
    let shown = action.to_string();
    serde_json::from_value(action).map_err(|cause| {
        unreadable(format!("the journal has a step of the domain that is not known: {shown}")).because(cause)
    })
}

fn unreadable(message: String) -> Error {
    Error::new(ErrorKind::Corrupt, message).advise(
        "if another version of domsnap wrote it, recover with that one; otherwise move the catalogue away, and let \
         `domsnap import` rebuild it from the manifests",
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn row() -> impl Strategy<Value = StepRow> {
        let group = prop_oneof![Just(Group::Prepare), Just(Group::Cut), Just(Group::Finish)];
        let target = prop_oneof![
            2 => prop_oneof![Just("vda"), Just("vdb"), Just("domain")].prop_map(Some),
            1 => Just(None),
        ];
        (group, any::<bool>(), target, 0..3_u64, 0..2_usize, any::<bool>()).prop_map(
            |(group, nested, target, bytes, edits, deferrable)| StepRow {
                group,
                nested,
                target: target.map(|name| Target::new(name).unwrap()),
                action: match target {
                    Some(_) => serde_json::json!({ "do": "it", "with": bytes }),
                    None => serde_json::json!({ "do": "remove-memory", "file": "/m" }),
                },
                summary: "does it".to_owned(),
                bytes: if target.is_some() { bytes } else { 0 },
                edits: vec![Edit::SetCurrent { id: None }; edits],
                deferrable,
            },
        )
    }

    fn read(rows: &[StepRow]) -> Result<Plan> {
        let mut plan = Plan::new("create", Vec::new());
        rows.iter().try_for_each(|row| plan.push_row(row.clone()))?;
        Ok(plan)
    }

    proptest! {
        /// Rows are read as the plan that has exactly these rows, or refused: never as another plan. Each
        /// refusal says what to do.
        #[test]
        fn rows_are_read_as_they_are_or_refused(
            mut rows in prop::collection::vec(row(), 0..8),
            sorted in any::<bool>(),
        ) {
            if sorted {
                rows.sort_by_key(|row| row.group);
            }
            match read(&rows) {
                Ok(plan) => {
                    prop_assert_eq!(plan.rows().unwrap(), rows);
                    prop_assert_eq!(plan.step_count(), plan.steps().count());
                    prop_assert_eq!(plan.units().last().map_or(0, |unit| unit.end), plan.step_count());
                    // As JSON it is the same plan too: so events and `--dry-run --json` have it.
                    let json = serde_json::to_value(&plan).unwrap();
                    prop_assert_eq!(serde_json::from_value::<Plan>(json).unwrap(), plan);
                }
                Err(error) => {
                    prop_assert_eq!(error.kind(), ErrorKind::Corrupt);
                    prop_assert!(error.advice().is_some_and(|advice| advice.contains("recover with that one")));
                }
            }
        }
    }

    /// Rows in an order that no plan has are refused: prepare after the cut, edits before the commit point, a
    /// nested step without one that it is nested in.
    #[test]
    fn rows_in_no_known_order_are_refused() {
        let row = |group, nested, target: Option<&str>| StepRow {
            group,
            nested,
            target: target.map(|name| Target::new(name).unwrap()),
            action: serde_json::json!({ "do": "remove-memory", "file": "/m" }),
            summary: "does it".to_owned(),
            bytes: 0,
            edits: Vec::new(),
            deferrable: false,
        };
        let (vda, vdb) = (Some("vda"), Some("vdb"));
        let good = [
            row(Group::Prepare, false, vda),
            row(Group::Cut, false, None),
            row(Group::Cut, true, vda),
            row(Group::Cut, true, vdb),
            row(Group::Finish, false, vda),
            row(Group::Finish, true, vda),
        ];
        assert_eq!(read(&good).unwrap().step_count(), 6);
        for (bad, why) in [
            (vec![row(Group::Cut, false, vda), row(Group::Prepare, false, vda)], "out of order"),
            (vec![row(Group::Finish, false, vda), row(Group::Cut, false, vda)], "a cut after the commit"),
            (vec![row(Group::Cut, true, vda)], "nested in nothing"),
            (vec![row(Group::Cut, false, vda), row(Group::Cut, true, vda)], "nested in a disk's cut"),
            (
                vec![row(Group::Prepare, false, vda), row(Group::Prepare, true, vda)],
                "nested in a preparation",
            ),
            (vec![row(Group::Finish, false, vda), row(Group::Finish, true, vdb)], "nested in another disk's"),
            (vec![row(Group::Finish, false, None), row(Group::Finish, true, vda)], "nested in the domain's"),
            (vec![StepRow { deferrable: true, ..row(Group::Cut, false, vda) }], "a cut that can be deferred"),
            (
                vec![StepRow {
                    edits: vec![Edit::SetCurrent { id: None }],
                    ..row(Group::Prepare, false, vda)
                }],
                "edits before the commit point",
            ),
            (
                vec![StepRow {
                    action: serde_json::json!({ "do": "split" }),
                    ..row(Group::Cut, false, None)
                }],
                "an action on the domain that is not known",
            ),
        ] {
            assert_eq!(read(&bad).expect_err(why).kind(), ErrorKind::Corrupt, "{why}");
        }
    }
}
