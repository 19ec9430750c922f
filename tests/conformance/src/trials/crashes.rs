//! Crashes: between any two calls, in the middle of a step, in a recovery; and what the domain writes before it.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};

use super::failures::restore;
use super::{Statement, trees, trees_with_deletes};
use crate::house::{House, Op, Way};
use crate::strike::{How, Moment, Strike};
use crate::workshop::Workshop;

fn revert_to_a() -> Op {
    Op::Revert { to: "a".into(), save: None }
}

fn can_be_killed(_: &snapcore::Capabilities, shop: &dyn Workshop) -> bool {
    shop.can_be_killed()
}

fn killed_in_trees(can: &snapcore::Capabilities, shop: &dyn Workshop) -> bool {
    trees_with_deletes(can, shop) && shop.can_be_killed()
}

pub(super) const STATEMENTS: [Statement; 10] = [
    Statement::always("a create that crashes anywhere happened whole or not at all", |shop, way| {
        crashing(shop, way, &Op::Create("new".into()))
    }),
    Statement::always("a revert that crashes anywhere happened whole or not at all", |shop, way| {
        crashing(shop, way, &revert_to_a())
    }),
    Statement::with(
        "a revert that saves and crashes anywhere happened whole or not at all",
        trees,
        |shop, way| crashing(shop, way, &Op::Revert { to: "a".into(), save: Some("new".into()) }),
    ),
    Statement::with("a delete that crashes anywhere is carried through", trees_with_deletes, |shop, way| {
        crashing(shop, way, &Op::Delete(vec!["b".into()]))
    }),
    Statement::with(
        "a delete of all but the present that crashes anywhere is carried through",
        trees_with_deletes,
        |shop, way| crashing(shop, way, &Op::Delete(vec!["a".into(), "b".into(), "c".into()])),
    ),
    Statement::with("a process killed in a create leaves it whole or undone", can_be_killed, |shop, way| {
        killed(shop, way, &Op::Create("new".into()))
    }),
    Statement::with("a process killed in a revert leaves it whole or undone", can_be_killed, |shop, way| {
        killed(shop, way, &revert_to_a())
    }),
    Statement::with(
        "a process killed in a delete leaves it to be carried through",
        killed_in_trees,
        |shop, way| killed(shop, way, &Op::Delete(vec!["b".into()])),
    ),
    Statement::always("a recovery that crashes anywhere is done by the next", recovering),
    Statement::always(
        "what the domain writes between a crash and the recovery is not lost",
        started_meanwhile,
    ),
];

/// Stops an operation at each moment, one after the other, until it ends; recovers each time.
fn crashing(shop: &dyn Workshop, way: &Way, op: &Op) -> Result<()> {
    let mut house = House::furnished(shop, way)?;
    for number in 1.. {
        let before = house.model.clone();
        let strike = Strike::new(&Moment::BETWEEN, number, How::Stop);
        let at = || format!("{op:?}, which crashed at moment {number}");
        if let Some(outcome) = house.run_struck(op, vec![strike])? {
            ensure!(number > 1, "it has no moment to crash at");
            outcome.with_context(at)?;
            house.imagine(op);
            return house.is_whole();
        }
        after_a_crash(&mut house, op, &before).with_context(at)?;
    }
    Ok(())
}

/// Recovers, and looks whether all is as before or as after.
fn after_a_crash(house: &mut House<'_>, op: &Op, before: &crate::Model) -> Result<()> {
    house.recover()?;
    house.settle(op)?;
    house.is_whole()?;
    restore(house, before)
}

/// Kills a process in an operation at each moment, between steps and inside them.
fn killed(shop: &dyn Workshop, way: &Way, op: &Op) -> Result<()> {
    let mut house = House::furnished(shop, way)?;
    for inside in [true, false] {
        for number in 1.. {
            let before = house.model.clone();
            let place = if inside { "progress" } else { "moment" };
            let at = || format!("{op:?}, killed at {place} {number}");
            if !house.is_killed(op, inside, number).with_context(at)? {
                house.imagine(op);
                house.is_whole().with_context(at)?;
                restore(&mut house, &before).with_context(at)?;
                break;
            }
            after_a_crash(&mut house, op, &before).with_context(at)?;
        }
    }
    Ok(())
}

/// Crashes an operation, and then its recovery.
fn recovering(shop: &dyn Workshop, way: &Way) -> Result<()> {
    let mut house = House::furnished(shop, way)?;
    for op in [revert_to_a(), Op::Create("new".into())] {
        if matches!(op, Op::Create(_)) && !house.capabilities()?.snapshot_of_snapshot {
            continue;
        }
        for number in 1.. {
            let before = house.model.clone();
            let strike = Strike::new(&Moment::BETWEEN, number, How::Stop);
            let at = || format!("{op:?}, which crashed at moment {number}");
            if let Some(outcome) = house.run_struck(&op, vec![strike])? {
                outcome.with_context(at)?;
                house.imagine(&op);
                restore(&mut house, &before)?;
                break;
            }
            // Deeper into the recovery each time, until one ends.
            for deeper in 1.. {
                let process = house.process()?;
                process.strikes.arm(vec![Strike::new(&Moment::BETWEEN, deeper, How::Stop)]);
                match process.recover() {
                    Some(done) => {
                        done.with_context(at).with_context(|| format!("recovery {deeper}"))?;
                        break;
                    }
                    None => house.crash(),
                }
            }
            house.recover().with_context(at)?;
            house.settle(&op).with_context(at)?;
            house.is_as_the_model().with_context(at)?;
            restore(&mut house, &before).with_context(at)?;
        }
    }
    house.is_whole()
}

/// Crashes an operation; the domain starts and writes; then it is recovered.
fn started_meanwhile(shop: &dyn Workshop, way: &Way) -> Result<()> {
    let mut house = House::furnished(shop, way)?;
    let mut ops = vec![revert_to_a()];
    if trees_with_deletes(&house.capabilities()?, shop) {
        ops.extend([Op::Create("new".into()), Op::Delete(vec!["b".into(), "c".into()])]);
    }
    for op in ops {
        for number in 1.. {
            let before = house.model.clone();
            let strike = Strike::new(&Moment::BETWEEN, number, How::Stop);
            let at = || format!("{op:?}, which crashed at moment {number}");
            if let Some(outcome) = house.run_struck(&op, vec![strike])? {
                outcome.with_context(at)?;
                house.imagine(&op);
                restore(&mut house, &before)?;
                break;
            }
            written_meanwhile(&mut house, &op).with_context(at)?;
            house.is_whole().with_context(at)?;
            restore(&mut house, &before).with_context(at)?;
        }
    }
    Ok(())
}

fn written_meanwhile(house: &mut House<'_>, op: &Op) -> Result<()> {
    let before = house.model.present.clone();
    let mut imagined = house.model.clone();
    std::mem::swap(&mut house.model, &mut imagined);
    house.imagine(op);
    std::mem::swap(&mut house.model, &mut imagined);
    let after = imagined.present;

    // The domain finds its disks as before or as after, and writes to them.
    let shown = house.read().context("the domain starts after the crash")?;
    for (target, bytes) in &shown {
        let whole = before.get(target).is_some_and(|wanted| **wanted == *bytes)
            || after.get(target).is_some_and(|wanted| **wanted == *bytes);
        ensure!(whole, "after the crash {target} shows what is neither as before nor as after");
        house.model.present.insert(target.clone(), Arc::new(bytes.clone()));
    }
    house.write_somewhere()?;
    let written = house.model.present.clone();

    house.model.present = before;
    let reports = house.recover()?;
    house.settle(op)?;
    let told = reports.iter().any(|report| !report.notes.is_empty());
    for (target, found) in house.read()? {
        let Some(written) = written.get(&target) else { continue };
        if **written == found {
            house.model.present.insert(target, written.clone());
            continue;
        }
        ensure!(told, "what the domain wrote to {target} is not in the present, and nothing was told of it");
        let aside = house.shop().is_aside(&house.place(), written)?;
        ensure!(aside != Some(false), "what the domain wrote to {target} was put aside, and is not there");
    }
    Ok(())
}
