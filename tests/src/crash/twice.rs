//! A kill, the domain runs; the recovery is killed too, the domain runs again.

use anyhow::{Context, Result, ensure};

use super::{Bench, everywhere, is_distinguished, survey};
use crate::domsnap::status;
use crate::meanwhile::{self, Written};
use crate::model::Bytes;
use crate::scenario::Scenario;
use crate::{place, qemu, seed, shim};

/// SIGKILL before an operation, then the domain writes; SIGKILL before an operation of the recovery, then it
/// writes again. After another recovery all of both must be somewhere: in the current state, or saved where
/// that is of a revert. One of `DOMSNAP_TWICE_EVERY` pairs of instants is tried, by default of 36.
///
/// # Errors
/// The first pair of instants after which something is lost.
pub fn kill_twice_and_write(scenario: Scenario) -> Result<()> {
    let every = seed::from_env("DOMSNAP_TWICE_EVERY", 36).max(1);
    let count = |bench: &mut Bench| {
        let operations = survey(bench)?;
        let distinguished = (0..operations.len()).filter(|index| is_distinguished(&operations, *index));
        let instants: Vec<u64> = distinguished.map(|index| operations[index].number).collect();
        Ok((instants.len(), instants))
    };
    let kill = |bench: &mut Bench, instants: &Vec<u64>, index: usize| {
        let first = instants[index];
        bench.domain.restore_from(&bench.copy)?;
        let outcome = shim::killing(watched(bench)?, first, false).run(&bench.args())?;
        if outcome.status.is_some() {
            return Ok(()); // it needed an operation less than last time
        }
        let once = meanwhile::write(&bench.domain, &meanwhile::ONCE)?;
        let copies = place::directory("domsnap-copy-")?;
        let written = copies.path().join("written");
        bench.domain.save_to(&written)?;
        let (_outputs, file) = shim::outputs()?;
        shim::counting(watched(bench)?, &file).done(&["recover"])?;
        let recovery = shim::counted(&file)?;
        let distinguished = (0..recovery.len()).filter(|index| is_distinguished(&recovery, *index));
        for second in distinguished.map(|index| recovery[index].number) {
            if !(first * 7 + second).is_multiple_of(every) {
                continue;
            }
            bench.domain.restore_from(&written)?;
            let outcome = shim::killing(watched(bench)?, second, false).run(&["recover"])?;
            ensure!(
                matches!(outcome.status, None | Some(status::DONE)),
                "neither killed nor done: {outcome}"
            );
            look(bench, &once).with_context(|| {
                let so_far = recovery.iter().find(|o| o.number == second).map_or("", |o| o.line.as_str());
                format!("killed before operation {first}, and the recovery before {second}: {so_far}")
            })?;
        }
        Ok(())
    };
    everywhere(scenario, count, kill)
}

fn watched(bench: &Bench) -> Result<crate::domsnap::Domsnap> {
    shim::watching(bench.domain.domsnap(), bench.domain.root())
}

fn look(bench: &mut Bench, once: &[Written]) -> Result<()> {
    let twice = meanwhile::write(&bench.domain, &meanwhile::TWICE)?;
    bench.domain.domsnap().done(&["recover"]).context("recover")?;
    let (before, after) = (bench.before.clone(), bench.after.clone());
    for (once, twice) in once.iter().zip(&twice) {
        let target = &once.target;
        let (old, new) = (&before.present[target], &after.present[target]);
        let known = [old, new, &once.holds].contains(&&twice.shown);
        ensure!(
            known,
            "between the kills {target} was neither as before, nor as after, nor as it was written"
        );
        let present: Bytes = qemu::read(&bench.domain.path(target), None)?.into();
        let mut rest = Vec::new();
        if present != twice.holds {
            ensure!(
                old != new,
                "what the domain wrote to {target} the second time is not in the current state"
            );
            rest.push((&twice.holds, "the second time"));
        }
        if twice.shown != once.holds && present != once.holds {
            ensure!(
                old != new,
                "what the domain wrote to {target} the first time is not in the current state"
            );
            rest.push((&once.holds, "the first time"));
        }
        for (holds, when) in rest {
            meanwhile::aside(&bench.domain, holds)?
                .with_context(|| format!("what the domain wrote to {target} {when} is lost"))?;
        }
        let known = [old, new, &once.holds, &twice.holds].contains(&&present);
        ensure!(known, "the current state of {target} is nothing that it ever was");
        for model in [&mut bench.before, &mut bench.after] {
            model.present.insert(target.clone(), present.clone());
        }
    }
    meanwhile::clear(&bench.domain)?;
    let found = bench.heal_and_look();
    (bench.before, bench.after) = (before, after);
    found.map(|_| ())
}
