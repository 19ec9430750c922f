//! Steps that fail, are cancelled, or are done twice.

use anyhow::{Context, Result, ensure};
use snapcore::ErrorKind;
use snapcore::backend::StepStatus;
use tokio_util::sync::CancellationToken;

use super::{TestCase, trees_with_deletes};
use crate::fault::{Fault, FaultKind, Moment};
use crate::fixture::{Fixture, Method, Op};
use crate::test_backend::TestBackend;

pub(super) const CASES: [TestCase; 9] = [
    TestCase::always(
        "create_undo_keeps_disk",
        "an undone create leaves the disk byte for byte",
        |subject, method| failing(subject, method, |_| Op::Create("new".into())),
    ),
    TestCase::always(
        "revert_undo_keeps_disk",
        "an undone revert leaves the disk byte for byte",
        |subject, method| failing(subject, method, |_| Op::Revert { to: "a".into(), save: None }),
    ),
    TestCase::with(
        "saving_revert_undo_keeps_disk",
        "an undone revert that saves leaves the disk byte for byte",
        super::trees,
        |subject, method| {
            failing(subject, method, |_| Op::Revert { to: "a".into(), save: Some("new".into()) })
        },
    ),
    TestCase::with(
        "failed_delete_is_completed",
        "a delete that fails half way is completed later",
        trees_with_deletes,
        |subject, method| {
            failing(subject, method, |fixture| {
                let all = &fixture.model.points;
                Op::Delete(all.keys().filter(|name| *name == "b" || *name == "new").cloned().collect())
            })
        },
    ),
    TestCase::always(
        "cancel_is_atomic",
        "an operation cancelled at any step happened whole or not at all",
        cancelled,
    ),
    TestCase::always(
        "apply_and_undo_are_idempotent",
        "apply twice is apply once, and undo twice is undo once",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            fixture.process()?.faults.do_twice();
            history(&mut fixture)?;
            for number in 1.. {
                let fail = Fault::new(&[Moment::AfterApply], number, FaultKind::Fail(ErrorKind::Io));
                if !undone(&mut fixture, fail)? {
                    break;
                }
            }
            fixture.check_all()
        },
    ),
    TestCase::always(
        "status_is_true",
        "status reports truthfully what is done and what is not",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            fixture.process()?.faults.watch();
            history(&mut fixture)?;
            for number in 1.. {
                let fail = Fault::new(&[Moment::AfterApply], number, FaultKind::Fail(ErrorKind::Io));
                if !undone(&mut fixture, fail)? {
                    break;
                }
            }
            let faults = fixture.process()?.faults.clone();
            let wrong_statuses = faults.wrong_statuses();
            ensure!(wrong_statuses.is_empty(), "{}", wrong_statuses.join("\n"));
            for status in [StepStatus::Done, StepStatus::NotDone] {
                ensure!(
                    faults.was_reported(status),
                    "no step was ever reported as {status:?}: that shows nothing"
                );
            }
            Ok(())
        },
    ),
    TestCase::always(
        "undo_of_unbegun_step",
        "a step that was never begun can be undone",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let fail = Fault::new(&[Moment::BeforeApply], 1, FaultKind::Fail(ErrorKind::Io));
            ensure!(undone(&mut fixture, fail)?, "a create has no step");
            fixture.check_all()
        },
    ),
    TestCase::always(
        "failed_undo_is_recovered",
        "an undo that fails is done by the recovery",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            for number in 1.. {
                let op = Op::Create("new".into());
                let faults = vec![
                    // The last step before the commit point is done, and its record fails: so all are undone.
                    Fault::new(&[Moment::BeforeCommit], 2, FaultKind::Fail(ErrorKind::Io)),
                    Fault::new(
                        &[Moment::BeforeUndo, Moment::AfterUndo],
                        number,
                        FaultKind::Fail(ErrorKind::Io),
                    ),
                ];
                let Some(outcome) = fixture.run_with_faults(&op, faults)? else {
                    anyhow::bail!("nothing stops here")
                };
                let error = outcome.err().context("a commit failed, and the create succeeded")?;
                let stuck = error.kind() == ErrorKind::NeedsRecovery;
                fixture.recover().with_context(|| format!("undo moment {number}"))?;
                fixture.check_current().with_context(|| format!("undo moment {number}"))?;
                if !stuck {
                    ensure!(number > 1, "nothing was undone: {error}");
                    break;
                }
            }
            fixture.check_all()
        },
    ),
];

/// Everything there is, once.
fn history(fixture: &mut Fixture<'_>) -> Result<()> {
    fixture.revert("a")?;
    fixture.check_current()?;
    if fixture.capabilities()?.snapshot_of_snapshot {
        fixture.write_random()?;
        fixture.create("h")?;
        fixture.write_random()?;
        fixture.run(&Op::Revert { to: "c".into(), save: Some("saved".into()) })?;
        fixture.check_current()?;
    }
    if fixture.capabilities()?.delete_in_chain {
        let gone: Vec<String> = fixture.model.points.keys().filter(|name| *name != "a").cloned().collect();
        if !gone.is_empty() {
            fixture.run(&Op::Delete(gone))?;
        }
    }
    fixture.check_current()
}

/// Returns true if a create was stopped by `fail`, and so undone; otherwise it is deleted again.
fn undone(fixture: &mut Fixture<'_>, fail: Fault) -> Result<bool> {
    let op = Op::Create("x".into());
    let at = format!("{fail:?}");
    let Some(outcome) = fixture.run_with_faults(&op, vec![fail])? else {
        anyhow::bail!("nothing stops here")
    };
    let fired = fixture.has_fired()?;
    fixture.recover().with_context(|| at.clone())?;
    if fixture.sync_model(&op)? {
        fixture.check_current().with_context(|| at.clone())?;
        fixture.delete(&["x"])?;
        fixture.check_current().with_context(|| at.clone())?;
        return Ok(fired);
    }
    ensure!(outcome.is_err(), "a create that did not happen succeeded");
    fixture.check_current().with_context(|| at)?;
    Ok(fired)
}

/// Fails an operation at each call to the backend and each record, one after the other, until it succeeds
/// untouched.
fn failing(subject: &dyn TestBackend, method: &Method, of: fn(&Fixture<'_>) -> Op) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    for number in 1.. {
        let op = of(&fixture);
        let before = fixture.model.clone();
        let fault = Fault::new(&Moment::BETWEEN, number, FaultKind::Fail(ErrorKind::NoSpace));
        let Some(outcome) = fixture.run_with_faults(&op, vec![fault])? else {
            anyhow::bail!("nothing stops here")
        };
        let fired = fixture.has_fired()?;
        let at = || format!("{op:?}, which failed at moment {number}");
        let kind = outcome.as_ref().err().map(snapcore::Error::kind);
        if kind.is_some_and(|kind| kind != ErrorKind::NeedsRecovery) {
            fixture.check_current().with_context(at).context("an error that needs no recovery undid all")?;
        }
        fixture.recover().with_context(at)?;
        let happened = fixture.sync_model(&op).with_context(at)?;
        ensure!(happened || kind.is_some(), "{}: it succeeded, and did not happen", at());
        fixture.check_current().with_context(at)?;
        if !fired {
            ensure!(kind.is_none(), "{}: no fault fired, and it failed: {:?}", at(), outcome.err());
            return fixture.check_all();
        }
        restore(&mut fixture, &before).with_context(at)?;
    }
    Ok(())
}

/// Cancels at each moment, inside steps too.
fn cancelled(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    let mut moments = Moment::BETWEEN.to_vec();
    moments.push(Moment::Progress);
    let trees = fixture.capabilities()?.snapshot_of_snapshot;
    let ops = match trees {
        true => vec![
            Op::Create("new".into()),
            Op::Revert { to: "a".into(), save: None },
            Op::Delete(vec!["b".into()]),
        ],
        false => vec![Op::Revert { to: "a".into(), save: None }],
    };
    for op in ops {
        for number in 1.. {
            let before = fixture.model.clone();
            let cancel = CancellationToken::new();
            let fault = Fault::new(&moments, number, FaultKind::Cancel(cancel.clone()));
            let Some(outcome) = fixture.run_cancellable(&op, vec![fault], &cancel)? else {
                anyhow::bail!("nothing stops here")
            };
            let fired = fixture.has_fired()?;
            let at = || format!("{op:?}, cancelled at moment {number}");
            let happened = fixture.sync_model(&op).with_context(at)?;
            match &outcome {
                Ok(_) => ensure!(happened, "{}: it succeeded, and did not happen", at()),
                Err(error) => {
                    ensure!(!happened, "{}: it happened, and says: {error}", at());
                    ensure!(error.kind() == ErrorKind::Cancelled, "{}: it says: {error}", at());
                }
            }
            fixture.check_current().with_context(at)?;
            if !fired {
                break;
            }
            // Deferred steps are done by the recovery.
            fixture.recover().with_context(at)?;
            fixture.check_current().with_context(at)?;
            restore(&mut fixture, &before).with_context(at)?;
        }
    }
    fixture.check_all()
}

/// Brings a with_snapshots fixture near what it was: the same names, whatever they hold.
pub(super) fn restore(fixture: &mut Fixture<'_>, before: &crate::Model) -> Result<()> {
    let extra: Vec<String> =
        fixture.model.points.keys().filter(|name| !before.points.contains_key(*name)).cloned().collect();
    if !extra.is_empty() {
        fixture.run(&Op::Delete(extra))?;
    }
    let lost: Vec<String> =
        before.points.keys().filter(|name| !fixture.model.points.contains_key(*name)).cloned().collect();
    for name in lost {
        fixture.write_random()?;
        fixture.create(&name)?;
    }
    // So that the tree shows if a revert to the first snapshot happened.
    if fixture.model.current.as_deref() == Some("a") && fixture.model.points.contains_key("c") {
        fixture.revert("c")?;
    }
    fixture.write_random()
}
