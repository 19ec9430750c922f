//! Random histories.

use anyhow::{Context, Result, ensure};

use super::{TestCase, trees_with_deletes};
use crate::fault::{Fault, FaultKind, Moment};
use crate::fixture::{Fixture, Method, Op};
use crate::seed::{Seed, from_env};
use crate::test_backend::TestBackend;

pub(super) const CASES: [TestCase; 2] = [
    TestCase::with(
        "random_history",
        "a random history is as the model says",
        trees_with_deletes,
        |subject, method| history(subject, method, 0),
    ),
    TestCase::with(
        "random_history_with_crashes",
        "a random history full of crashes is as the model says",
        trees_with_deletes,
        |subject, method| history(subject, method, 40),
    ),
];

/// The most points that a random tree has, so that a backend of copies is not slow.
const POINTS: usize = 8;

fn history(subject: &dyn TestBackend, method: &Method, crashes: u64) -> Result<()> {
    let (seed, operations) = (from_env("TESTKIT_SEED", 1)?, from_env("TESTKIT_OPERATIONS", 24)?);
    let mut fixture = Fixture::new(subject, method)?;
    let mut random = Seed::new(seed);
    fixture.random = Seed::new(random.draw());
    let mut log = vec![format!("TESTKIT_SEED={seed} TESTKIT_OPERATIONS={operations}")];
    for number in 0..operations {
        let op = choose(&fixture, &mut random, number);
        let fault = random.chance(crashes).then(|| 1 + random.below(16));
        log.push(format!("{op:?}{}", fault.map_or(String::new(), |at| format!(", crash at {at}"))));
        step(&mut fixture, &op, fault, &mut random).with_context(|| log.join("\n"))?;
    }
    fixture.check_all().with_context(|| log.join("\n"))
}

fn choose(fixture: &Fixture<'_>, random: &mut Seed, number: u64) -> Op {
    let points: Vec<&String> = fixture.model.points.keys().collect();
    let name = format!("p{number}");
    if points.is_empty() || (points.len() < POINTS && random.chance(40)) {
        return Op::Create(name);
    }
    match random.below(10) {
        0..=4 => {
            let save = (points.len() < POINTS && random.chance(30)).then_some(name);
            // A revert to the current snapshot cannot be distinguished from none.
            let others: Vec<&&String> =
                points.iter().filter(|name| fixture.model.current.as_ref() != Some(**name)).collect();
            match others.is_empty() {
                true => Op::Tidy,
                false => Op::Revert { to: (*random.pick(&others)).clone(), save },
            }
        }
        5..=8 => {
            let chosen = random.pick(&points).clone();
            let names = if random.chance(30) { fixture.model.subtree(&chosen) } else { vec![chosen] };
            Op::Delete(names)
        }
        _ => Op::Tidy,
    }
}

fn step(fixture: &mut Fixture<'_>, op: &Op, fault: Option<u64>, random: &mut Seed) -> Result<()> {
    match fault {
        None => {
            fixture.run(op)?;
        }
        Some(number) => {
            let fault = Fault::new(&Moment::BETWEEN, number, FaultKind::Stop);
            match fixture.run_with_faults(op, vec![fault])? {
                None => {
                    fixture.recover()?;
                    let happened = fixture.sync_model(op)?;
                    ensure!(happened || !matches!(op, Op::Tidy), "a tidy is always as before and after");
                }
                Some(outcome) => {
                    outcome?;
                    fixture.process()?.faults.arm(Vec::new());
                    fixture.update_model(op);
                }
            }
        }
    }
    fixture.check_current()?;
    if random.chance(70) {
        fixture.write_random()?;
    }
    Ok(())
}
