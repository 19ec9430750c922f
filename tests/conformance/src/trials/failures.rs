//! Steps that fail, are cancelled, or are done twice.

use anyhow::{Context, Result, ensure};
use snapcore::{ErrorKind, StepStatus};
use tokio_util::sync::CancellationToken;

use super::{Statement, trees_with_deletes};
use crate::house::{House, Op, Way};
use crate::strike::{How, Moment, Strike};
use crate::workshop::Workshop;

pub(super) const STATEMENTS: [Statement; 9] = [
    Statement::always("an undone create leaves the disk byte for byte", |shop, way| {
        failing(shop, way, |_| Op::Create("new".into()))
    }),
    Statement::always("an undone revert leaves the disk byte for byte", |shop, way| {
        failing(shop, way, |_| Op::Revert { to: "a".into(), save: None })
    }),
    Statement::with(
        "an undone revert that saves leaves the disk byte for byte",
        super::trees,
        |shop, way| failing(shop, way, |_| Op::Revert { to: "a".into(), save: Some("new".into()) }),
    ),
    Statement::with("a delete that fails half way is finished later", trees_with_deletes, |shop, way| {
        failing(shop, way, |house| {
            let all = &house.model.points;
            Op::Delete(all.keys().filter(|name| *name == "b" || *name == "new").cloned().collect())
        })
    }),
    Statement::always("an operation cancelled at any step happened whole or not at all", cancelled),
    Statement::always("apply twice is apply once, and undo twice is undo once", |shop, way| {
        let mut house = House::furnished(shop, way)?;
        house.process()?.strikes.do_twice();
        history(&mut house)?;
        for number in 1.. {
            let fail = Strike::new(&[Moment::AfterApply], number, How::Fail(ErrorKind::Io));
            if !undone(&mut house, fail)? {
                break;
            }
        }
        house.is_whole()
    }),
    Statement::always("status tells truthfully what is done and what is not", |shop, way| {
        let mut house = House::furnished(shop, way)?;
        house.process()?.strikes.watch();
        history(&mut house)?;
        for number in 1.. {
            let fail = Strike::new(&[Moment::AfterApply], number, How::Fail(ErrorKind::Io));
            if !undone(&mut house, fail)? {
                break;
            }
        }
        let strikes = house.process()?.strikes.clone();
        let lies = strikes.lies();
        ensure!(lies.is_empty(), "{}", lies.join("\n"));
        for status in [StepStatus::Done, StepStatus::NotDone] {
            ensure!(strikes.was_told(status), "no step was ever told to be {status:?}: that says nothing");
        }
        Ok(())
    }),
    Statement::always("a step that was never begun can be undone", |shop, way| {
        let mut house = House::furnished(shop, way)?;
        let fail = Strike::new(&[Moment::BeforeApply], 1, How::Fail(ErrorKind::Io));
        ensure!(undone(&mut house, fail)?, "a create has no step");
        house.is_whole()
    }),
    Statement::always("an undo that fails is done by the recovery", |shop, way| {
        let mut house = House::furnished(shop, way)?;
        for number in 1.. {
            let op = Op::Create("new".into());
            let strikes = vec![
                // The last step before the commit point is done, and its record fails: so all are undone.
                Strike::new(&[Moment::BeforeCommit], 2, How::Fail(ErrorKind::Io)),
                Strike::new(&[Moment::BeforeUndo, Moment::AfterUndo], number, How::Fail(ErrorKind::Io)),
            ];
            let Some(outcome) = house.run_struck(&op, strikes)? else { anyhow::bail!("nothing stops here") };
            let error = outcome.err().context("a commit failed, and the create succeeded")?;
            let stuck = error.kind() == ErrorKind::NeedsRecovery;
            house.recover().with_context(|| format!("undo moment {number}"))?;
            house.is_as_the_model().with_context(|| format!("undo moment {number}"))?;
            if !stuck {
                ensure!(number > 1, "nothing was undone: {error}");
                break;
            }
        }
        house.is_whole()
    }),
];

/// Everything there is, once.
fn history(house: &mut House<'_>) -> Result<()> {
    house.revert("a")?;
    house.is_as_the_model()?;
    if house.capabilities()?.snapshot_of_snapshot {
        house.write_somewhere()?;
        house.create("h")?;
        house.write_somewhere()?;
        house.run(&Op::Revert { to: "c".into(), save: Some("saved".into()) })?;
        house.is_as_the_model()?;
    }
    if house.capabilities()?.delete_in_chain {
        let gone: Vec<String> = house.model.points.keys().filter(|name| *name != "a").cloned().collect();
        if !gone.is_empty() {
            house.run(&Op::Delete(gone))?;
        }
    }
    house.is_as_the_model()
}

/// Whether a create was struck by `fail`, and so undone; otherwise it is deleted again.
fn undone(house: &mut House<'_>, fail: Strike) -> Result<bool> {
    let op = Op::Create("x".into());
    let at = format!("{fail:?}");
    let Some(outcome) = house.run_struck(&op, vec![fail])? else { anyhow::bail!("nothing stops here") };
    let struck = house.have_struck()?;
    house.recover().with_context(|| at.clone())?;
    if house.settle(&op)? {
        house.is_as_the_model().with_context(|| at.clone())?;
        house.delete(&["x"])?;
        house.is_as_the_model().with_context(|| at.clone())?;
        return Ok(struck);
    }
    ensure!(outcome.is_err(), "a create that did not happen succeeded");
    house.is_as_the_model().with_context(|| at)?;
    Ok(struck)
}

/// Fails an operation at each call to the backend and each record, one after the other, until it succeeds untouched.
fn failing(shop: &dyn Workshop, way: &Way, of: fn(&House<'_>) -> Op) -> Result<()> {
    let mut house = House::furnished(shop, way)?;
    for number in 1.. {
        let op = of(&house);
        let before = house.model.clone();
        let strike = Strike::new(&Moment::BETWEEN, number, How::Fail(ErrorKind::NoSpace));
        let Some(outcome) = house.run_struck(&op, vec![strike])? else { anyhow::bail!("nothing stops here") };
        let struck = house.have_struck()?;
        let at = || format!("{op:?}, which failed at moment {number}");
        let kind = outcome.as_ref().err().map(snapcore::Error::kind);
        if kind.is_some_and(|kind| kind != ErrorKind::NeedsRecovery) {
            house.is_as_the_model().with_context(at).context("an error that needs no recovery undid all")?;
        }
        house.recover().with_context(at)?;
        let happened = house.settle(&op).with_context(at)?;
        ensure!(happened || kind.is_some(), "{}: it succeeded, and did not happen", at());
        house.is_as_the_model().with_context(at)?;
        if !struck {
            ensure!(kind.is_none(), "{}: no fault struck, and it failed: {:?}", at(), outcome.err());
            return house.is_whole();
        }
        restore(&mut house, &before).with_context(at)?;
    }
    Ok(())
}

/// Cancels at each moment, inside steps too.
fn cancelled(shop: &dyn Workshop, way: &Way) -> Result<()> {
    let mut house = House::furnished(shop, way)?;
    let mut moments = Moment::BETWEEN.to_vec();
    moments.push(Moment::Progress);
    let trees = house.capabilities()?.snapshot_of_snapshot;
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
            let before = house.model.clone();
            let cancel = CancellationToken::new();
            let strike = Strike::new(&moments, number, How::Cancel(cancel.clone()));
            let Some(outcome) = house.run_cancellable(&op, vec![strike], &cancel)? else {
                anyhow::bail!("nothing stops here")
            };
            let struck = house.have_struck()?;
            let at = || format!("{op:?}, cancelled at moment {number}");
            let happened = house.settle(&op).with_context(at)?;
            match &outcome {
                Ok(_) => ensure!(happened, "{}: it succeeded, and did not happen", at()),
                Err(error) => {
                    ensure!(!happened, "{}: it happened, and says: {error}", at());
                    ensure!(error.kind() == ErrorKind::Cancelled, "{}: it says: {error}", at());
                }
            }
            house.is_as_the_model().with_context(at)?;
            if !struck {
                break;
            }
            // What was put off is done.
            house.recover().with_context(at)?;
            house.is_as_the_model().with_context(at)?;
            restore(&mut house, &before).with_context(at)?;
        }
    }
    house.is_whole()
}

/// Brings a furnished house near what it was: the same names, whatever they hold.
pub(super) fn restore(house: &mut House<'_>, before: &crate::Model) -> Result<()> {
    let extra: Vec<String> =
        house.model.points.keys().filter(|name| !before.points.contains_key(*name)).cloned().collect();
    if !extra.is_empty() {
        house.run(&Op::Delete(extra))?;
    }
    let lost: Vec<String> =
        before.points.keys().filter(|name| !house.model.points.contains_key(*name)).cloned().collect();
    for name in lost {
        house.write_somewhere()?;
        house.create(&name)?;
    }
    // So that the tree tells whether a revert to the first point happened.
    if house.model.current.as_deref() == Some("a") && house.model.points.contains_key("c") {
        house.revert("c")?;
    }
    house.write_somewhere()
}
