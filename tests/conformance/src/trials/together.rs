//! Several at once.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use snapcore::ErrorKind;
use tokio_util::sync::CancellationToken;

use super::{Statement, trees_with_deletes};
use crate::house::{House, Op, Process, Way};
use crate::strike::{How, Moment, Strike};
use crate::workshop::Workshop;

fn path_stays(_: &snapcore::Capabilities, shop: &dyn Workshop) -> bool {
    shop.path_stays()
}

pub(super) const STATEMENTS: [Statement; 4] = [
    Statement::with("the configured path opens at every instant", path_stays, always_opens),
    Statement::always("two operations at once: one is refused as busy", two_at_once),
    Statement::always("a disk that is held is held against whoever comes, until it is given back", held),
    Statement::always("many domains at once do not see each other", many),
];

/// A domain may be started at any instant, by somebody who knows of nothing: he must find its disks.
fn always_opens(shop: &dyn Workshop, way: &Way) -> Result<()> {
    let mut house = House::furnished(shop, way)?;
    let deletes = trees_with_deletes(&house.capabilities()?, shop);
    for round in 0..5 {
        let mut ops = vec![Op::Revert { to: "a".into(), save: None }];
        if deletes {
            let name = format!("w{round}");
            ops.extend([Op::Create(name.clone()), Op::Delete(vec![name])]);
        }
        for op in ops {
            watched(&mut house, &op).with_context(|| format!("{op:?}, the {}th time", round + 1))?;
            house.write_somewhere()?;
        }
    }
    house.is_whole()
}

/// Does an operation while another thread opens the disks, again and again.
fn watched(house: &mut House<'_>, op: &Op) -> Result<()> {
    let paths: Vec<_> = house.records()?.into_iter().map(|record| record.disk.path).collect();
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| -> Result<()> {
            while !over.load(Ordering::Relaxed) {
                for path in &paths {
                    File::open(path).with_context(|| format!("opening {path} in the middle of it"))?;
                }
            }
            Ok(())
        });
        let done = house.run(op);
        over.store(true, Ordering::Relaxed);
        let seen = watcher.join().map_err(|_| anyhow!("the watcher panicked"))?;
        done?;
        seen
    })
}

/// The first one stops in the middle and stays there while a second process comes.
fn two_at_once(shop: &dyn Workshop, way: &Way) -> Result<()> {
    let mut house = House::furnished(shop, way)?;
    let first = Process::new(shop, &house.plot)?;
    first.strikes.arm(vec![Strike::new(&[Moment::AfterApply], 1, How::Stop)]);
    let op = Op::Revert { to: "a".into(), save: None };
    if first.run(&op, &CancellationToken::new())?.is_some() {
        bail!("the first operation did not stop");
    }
    let Some(second) = house.run_struck(&op, Vec::new())? else { bail!("nothing stops here") };
    let refused = second.err().context("both were let in")?;
    ensure!(refused.kind() == ErrorKind::Busy, "it was refused as {:?}: {refused}", refused.kind());
    drop(first);
    house.recover()?;
    house.settle(&op)?;
    house.is_whole()
}

fn held(shop: &dyn Workshop, way: &Way) -> Result<()> {
    let mut house = House::new(shop, way)?;
    let record = house.records()?.swap_remove(0);
    let other = Process::new(shop, &house.plot)?;
    let process = house.process()?;
    let ours = process.service.registry().get(&record.disk.format)?;
    let theirs = other.service.registry().get(&record.disk.format)?;
    let guard = process.wait(ours.hold(&record, None))?;
    for (who, refused) in [
        ("the same process", process.wait(ours.hold(&record, None)).err()),
        ("another process", other.wait(theirs.hold(&record, None)).err()),
    ] {
        let refused = refused.with_context(|| format!("{who} was let in"))?;
        ensure!(refused.kind() == ErrorKind::Busy, "{who} was refused as {:?}: {refused}", refused.kind());
    }
    drop(guard);
    // A guard that ends in another process may take a moment to be gone.
    let begun = std::time::Instant::now();
    loop {
        match other.wait(theirs.hold(&record, None)) {
            Ok(_) => break,
            Err(busy) if busy.kind() == ErrorKind::Busy && begun.elapsed().as_secs() < 10 => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Err(error) => return Err(error).context("it was given back, and is held still"),
        }
    }
    drop(other);
    house.create("a")?;
    house.is_whole()
}

fn many(shop: &dyn Workshop, way: &Way) -> Result<()> {
    std::thread::scope(|scope| {
        let lives: Vec<_> = (0..4)
            .map(|number| {
                scope.spawn(move || {
                    let mut house = House::new(shop, way)?;
                    house.dice = crate::seed::Seed::new(number);
                    house.write_somewhere()?;
                    house.create("a")?;
                    house.write_somewhere()?;
                    house.is_as_the_model()?;
                    house.revert("a")?;
                    house.is_whole()
                })
            })
            .collect();
        for life in lives {
            life.join().map_err(|_| anyhow::anyhow!("one panicked"))??;
        }
        Ok(())
    })
}
