//! Histories that nobody thought of.

use anyhow::{Context, Result, ensure};

use super::{Statement, trees_with_deletes};
use crate::house::{House, Op, Way};
use crate::seed::{Seed, from_env};
use crate::strike::{How, Moment, Strike};
use crate::workshop::Workshop;

pub(super) const STATEMENTS: [Statement; 2] = [
    Statement::with("a random history is as the model says", trees_with_deletes, |shop, way| {
        history(shop, way, 0)
    }),
    Statement::with(
        "a random history full of crashes is as the model says",
        trees_with_deletes,
        |shop, way| history(shop, way, 40),
    ),
];

/// The most points that a random tree has, so that a backend of copies is not slow.
const POINTS: usize = 8;

fn history(shop: &dyn Workshop, way: &Way, crashes: u64) -> Result<()> {
    let (seed, operations) = (from_env("CONFORMANCE_SEED", 1)?, from_env("CONFORMANCE_OPERATIONS", 24)?);
    let mut house = House::new(shop, way)?;
    let mut dice = Seed::new(seed);
    house.dice = Seed::new(dice.draw());
    let mut told = vec![format!("CONFORMANCE_SEED={seed} CONFORMANCE_OPERATIONS={operations}")];
    for number in 0..operations {
        let op = choose(&house, &mut dice, number);
        let strike = dice.chance(crashes).then(|| 1 + dice.below(16));
        told.push(format!("{op:?}{}", strike.map_or(String::new(), |at| format!(", crash at {at}"))));
        step(&mut house, &op, strike, &mut dice).with_context(|| told.join("\n"))?;
    }
    house.is_whole().with_context(|| told.join("\n"))
}

fn choose(house: &House<'_>, dice: &mut Seed, number: u64) -> Op {
    let points: Vec<&String> = house.model.points.keys().collect();
    let name = format!("p{number}");
    if points.is_empty() || (points.len() < POINTS && dice.chance(40)) {
        return Op::Create(name);
    }
    match dice.below(10) {
        0..=4 => {
            let save = (points.len() < POINTS && dice.chance(30)).then_some(name);
            // A revert to where it is already cannot be told from none.
            let others: Vec<&&String> =
                points.iter().filter(|name| house.model.current.as_ref() != Some(**name)).collect();
            match others.is_empty() {
                true => Op::Tidy,
                false => Op::Revert { to: (**dice.pick(&others)).clone(), save },
            }
        }
        5..=8 => {
            let chosen = (*dice.pick(&points)).clone();
            let names = if dice.chance(30) { house.model.subtree(&chosen) } else { vec![chosen] };
            Op::Delete(names)
        }
        _ => Op::Tidy,
    }
}

fn step(house: &mut House<'_>, op: &Op, strike: Option<u64>, dice: &mut Seed) -> Result<()> {
    match strike {
        None => {
            house.run(op)?;
        }
        Some(number) => {
            let strike = Strike::new(&Moment::BETWEEN, number, How::Stop);
            match house.run_struck(op, vec![strike])? {
                None => {
                    house.recover()?;
                    let happened = house.settle(op)?;
                    ensure!(happened || !matches!(op, Op::Tidy), "a tidy is always as before and after");
                }
                Some(outcome) => {
                    outcome?;
                    house.process()?.strikes.arm(Vec::new());
                    house.imagine(op);
                }
            }
        }
    }
    house.is_as_the_model()?;
    if dice.chance(70) {
        house.write_somewhere()?;
    }
    Ok(())
}
