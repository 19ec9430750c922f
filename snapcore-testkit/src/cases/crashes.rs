//! Crashes: between any two calls, in the middle of a step, in a recovery; and what the domain writes before
//! it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::failures::restore;
use super::{TestCase, check_sampled, is_sampled, trees, trees_with_deletes};
use crate::fault::{Fault, FaultKind, Moment};
use crate::fixture::{Fixture, Method, Op};
use crate::test_backend::TestBackend;

fn revert_to_a() -> Op {
    Op::Revert { to: "a".into(), save: None }
}

fn can_be_killed(_: &snapcore::backend::Capabilities, subject: &dyn TestBackend) -> bool {
    subject.can_be_killed()
}

fn killed_in_trees(can: &snapcore::backend::Capabilities, subject: &dyn TestBackend) -> bool {
    trees_with_deletes(can, subject) && subject.can_be_killed()
}

pub(super) const CASES: [TestCase; 10] = [
    TestCase::always(
        "create_crash_is_atomic",
        "a create that crashes anywhere happened whole or not at all",
        |subject, method| crashing(subject, method, &Op::Create("new".into())),
    ),
    TestCase::always(
        "revert_crash_is_atomic",
        "a revert that crashes anywhere happened whole or not at all",
        |subject, method| crashing(subject, method, &revert_to_a()),
    ),
    TestCase::with(
        "saving_revert_crash_is_atomic",
        "a revert that saves and crashes anywhere happened whole or not at all",
        trees,
        |subject, method| crashing(subject, method, &Op::Revert { to: "a".into(), save: Some("new".into()) }),
    ),
    TestCase::with(
        "delete_crash_is_completed",
        "a delete that crashes anywhere is completed",
        trees_with_deletes,
        |subject, method| crashing(subject, method, &Op::Delete(vec!["b".into()])),
    ),
    TestCase::with(
        "delete_all_crash_is_completed",
        "a delete of all snapshots that crashes anywhere is completed",
        trees_with_deletes,
        |subject, method| crashing(subject, method, &Op::Delete(vec!["a".into(), "b".into(), "c".into()])),
    ),
    TestCase::with(
        "create_kill_is_atomic",
        "a process killed in a create leaves it whole or undone",
        can_be_killed,
        |subject, method| killed(subject, method, &Op::Create("new".into())),
    ),
    TestCase::with(
        "revert_kill_is_atomic",
        "a process killed in a revert leaves it whole or undone",
        can_be_killed,
        |subject, method| killed(subject, method, &revert_to_a()),
    ),
    TestCase::with(
        "delete_kill_is_completed",
        "a process killed in a delete leaves it to be completed",
        killed_in_trees,
        |subject, method| killed(subject, method, &Op::Delete(vec!["b".into()])),
    ),
    TestCase::always(
        "recovery_crash_is_recovered",
        "a recovery that crashes anywhere is done by the next",
        recovering,
    ),
    TestCase::always(
        "writes_before_recovery_kept",
        "what the domain writes between a crash and the recovery is not lost",
        started_meanwhile,
    ),
];

/// Stops an operation at each moment, one after the other, until it ends; recovers each time.
fn crashing(subject: &dyn TestBackend, method: &Method, op: &Op) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    for number in 1.. {
        let before = fixture.model.clone();
        let at = || format!("{op:?}, which crashed at moment {number}");
        if !crashed_at(&mut fixture, op, number).with_context(at)? {
            ensure!(number > 1, "it has no moment to crash at");
            return fixture.check_all();
        }
        after_a_crash(&mut fixture, op, &before, number).with_context(at)?;
    }
    Ok(())
}

/// Stops an operation at the moment `number`. Returns false if it ended before that: the model has it then.
fn crashed_at(fixture: &mut Fixture<'_>, op: &Op, number: u64) -> Result<bool> {
    let fault = Fault::new(&Moment::BETWEEN, number, FaultKind::Stop);
    let Some(outcome) = fixture.run_with_faults(op, vec![fault])? else { return Ok(true) };
    outcome?;
    fixture.update_model(op);
    Ok(false)
}

/// Recovers, and looks whether all is as before or as after.
fn after_a_crash(fixture: &mut Fixture<'_>, op: &Op, before: &crate::Model, number: u64) -> Result<()> {
    fixture.recover()?;
    fixture.sync_model(op)?;
    check_sampled(fixture, number)?;
    restore(fixture, before)
}

/// Kills a process in an operation at each moment, between steps and inside them.
fn killed(subject: &dyn TestBackend, method: &Method, op: &Op) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    for inside in [true, false] {
        for number in 1.. {
            let before = fixture.model.clone();
            let at_what = if inside { "progress" } else { "moment" };
            let at = || format!("{op:?}, killed at {at_what} {number}");
            if !fixture.kill_child(op, inside, number).with_context(at)? {
                fixture.update_model(op);
                fixture.check_all().with_context(at)?;
                restore(&mut fixture, &before).with_context(at)?;
                break;
            }
            after_a_crash(&mut fixture, op, &before, number).with_context(at)?;
        }
    }
    Ok(())
}

/// Crashes an operation, and then its recovery.
fn recovering(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    for op in [revert_to_a(), Op::Create("new".into())] {
        if matches!(op, Op::Create(_)) && !fixture.capabilities()?.snapshot_of_snapshot {
            continue;
        }
        // The test cases above crash it at every moment; this one at a sample of them.
        for number in 1.. {
            if !is_sampled(number)? {
                continue;
            }
            let before = fixture.model.clone();
            let at = || format!("{op:?}, which crashed at moment {number}");
            if !crashed_at(&mut fixture, &op, number).with_context(at)? {
                restore(&mut fixture, &before)?;
                break;
            }
            // Deeper into the recovery each time, until one ends.
            for deeper in 1.. {
                let process = fixture.process()?;
                process.faults.arm(vec![Fault::new(&Moment::BETWEEN, deeper, FaultKind::Stop)]);
                match process.recover() {
                    Some(done) => {
                        done.with_context(at).with_context(|| format!("recovery {deeper}"))?;
                        break;
                    }
                    None => fixture.crash(),
                }
            }
            fixture.recover().with_context(at)?;
            fixture.sync_model(&op).with_context(at)?;
            fixture.check_current().with_context(at)?;
            restore(&mut fixture, &before).with_context(at)?;
        }
    }
    fixture.check_all()
}

/// Crashes an operation; the domain starts and writes; then it is recovered.
fn started_meanwhile(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    let mut ops = vec![revert_to_a()];
    if trees_with_deletes(&fixture.capabilities()?, subject) {
        ops.extend([Op::Create("new".into()), Op::Delete(vec!["b".into(), "c".into()])]);
    }
    for op in ops {
        for number in 1.. {
            let before = fixture.model.clone();
            let at = || format!("{op:?}, which crashed at moment {number}");
            if !crashed_at(&mut fixture, &op, number).with_context(at)? {
                restore(&mut fixture, &before)?;
                break;
            }
            written_meanwhile(&mut fixture, &op).with_context(at)?;
            check_sampled(&mut fixture, number).with_context(at)?;
            restore(&mut fixture, &before).with_context(at)?;
        }
    }
    fixture.check_all()
}

fn written_meanwhile(fixture: &mut Fixture<'_>, op: &Op) -> Result<()> {
    let before = fixture.model.disks.clone();
    let mut imagined = fixture.model.clone();
    std::mem::swap(&mut fixture.model, &mut imagined);
    fixture.update_model(op);
    std::mem::swap(&mut fixture.model, &mut imagined);
    let after = imagined.disks;

    // The domain finds its disks as before or as after, and writes to them.
    let shown = fixture.read().context("the domain starts after the crash")?;
    for (target, bytes) in &shown {
        let whole = before.get(target).is_some_and(|wanted| **wanted == *bytes)
            || after.get(target).is_some_and(|wanted| **wanted == *bytes);
        ensure!(whole, "after the crash {target} shows what is neither as before nor as after");
        fixture.model.disks.insert(target.clone(), Arc::new(bytes.clone()));
    }
    fixture.write_random()?;
    let written = fixture.model.disks.clone();

    fixture.model.disks = before;
    let reports = fixture.recover()?;
    fixture.sync_model(op)?;
    let reported = reports.iter().any(|report| !report.notes.is_empty());
    for (target, found) in fixture.read()? {
        let Some(written) = written.get(&target) else { continue };
        if **written == found {
            fixture.model.disks.insert(target, written.clone());
            continue;
        }
        ensure!(
            reported,
            "what the domain wrote to {target} is not in the current state, and nothing was reported of it"
        );
        let saved = fixture.subject().is_saved(&fixture.dir(), written)?;
        ensure!(
            saved != Some(false),
            "what the domain wrote to {target} was reported as saved, and is not there"
        );
    }
    Ok(())
}
