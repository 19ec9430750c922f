//! Several operations and domains at once.

use std::fs::File;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use snapcore::ErrorKind;
use tokio_util::sync::CancellationToken;

use super::{TestCase, trees_with_deletes};
use crate::fault::{Fault, FaultKind, Moment};
use crate::fixture::{Fixture, Method, Op, Process};
use crate::test_backend::TestBackend;

fn path_stays(_: &snapcore::backend::Capabilities, subject: &dyn TestBackend) -> bool {
    subject.path_stays()
}

pub(super) const CASES: [TestCase; 4] = [
    TestCase::with(
        "path_always_opens",
        "the configured path opens at every instant",
        path_stays,
        always_opens,
    ),
    TestCase::always(
        "second_operation_is_busy",
        "of two operations at once one is refused as busy",
        two_at_once,
    ),
    TestCase::always(
        "hold_excludes_all",
        "a disk that is held is held against every other process, until it is released",
        held,
    ),
    TestCase::always("domains_are_independent", "many domains at once do not affect each other", many),
];

/// A domain may be started at any instant by a program that knows nothing of domsnap: it must find its disks.
fn always_opens(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    let deletes = trees_with_deletes(&fixture.capabilities()?, subject);
    for round in 0..5 {
        let mut ops = vec![Op::Revert { to: "a".into(), save: None }];
        if deletes {
            let name = format!("w{round}");
            ops.extend([Op::Create(name.clone()), Op::Delete(vec![name])]);
        }
        for op in ops {
            watched(&mut fixture, &op).with_context(|| format!("{op:?}, the {}th time", round + 1))?;
            fixture.write_random()?;
        }
    }
    fixture.check_all()
}

/// Does an operation while another thread opens the disks, again and again.
fn watched(fixture: &mut Fixture<'_>, op: &Op) -> Result<()> {
    let paths: Vec<_> = fixture.records()?.into_iter().map(|record| record.disk.path().to_owned()).collect();
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
        let done = fixture.run(op);
        over.store(true, Ordering::Relaxed);
        let seen = watcher.join().map_err(|_| anyhow!("the watcher panicked"))?;
        done?;
        seen
    })
}

/// The first one stops in the middle and stays there while a second process comes.
fn two_at_once(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    let first = Process::new(subject, &fixture.test_domain)?;
    first.faults.arm(vec![Fault::new(&[Moment::AfterApply], 1, FaultKind::Stop)]);
    let op = Op::Revert { to: "a".into(), save: None };
    if first.run(&op, &CancellationToken::new())?.is_some() {
        bail!("the first operation did not stop");
    }
    let Some(second) = fixture.run_with_faults(&op, Vec::new())? else { bail!("nothing stops here") };
    let refused = second.err().context("both were let in")?;
    ensure!(refused.kind() == ErrorKind::Busy, "it was refused as {:?}: {refused}", refused.kind());
    drop(first);
    fixture.recover()?;
    fixture.sync_model(&op)?;
    fixture.check_all()
}

fn held(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let mut fixture = Fixture::new(subject, method)?;
    let record = fixture.records()?.swap_remove(0);
    let other = Process::new(subject, &fixture.test_domain)?;
    let process = fixture.process()?;
    let ours = process.service.registry().serving(&record.disk)?;
    let theirs = other.service.registry().serving(&record.disk)?;
    let guard = process.wait(ours.lock(&record, None))?;
    for (who, refused) in [
        ("the same process", process.wait(ours.lock(&record, None)).err()),
        ("another process", other.wait(theirs.lock(&record, None)).err()),
    ] {
        let refused = refused.with_context(|| format!("{who} was let in"))?;
        ensure!(refused.kind() == ErrorKind::Busy, "{who} was refused as {:?}: {refused}", refused.kind());
    }
    drop(guard);
    // A guard that ends in another process may take a moment to be gone.
    let begun = std::time::Instant::now();
    loop {
        match other.wait(theirs.lock(&record, None)) {
            Ok(_) => break,
            Err(busy) if busy.kind() == ErrorKind::Busy && begun.elapsed().as_secs() < 10 => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Err(error) => return Err(error).context("it was released, and is held still"),
        }
    }
    drop(other);
    fixture.create("a")?;
    fixture.check_all()
}

fn many(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    std::thread::scope(|scope| {
        let lives: Vec<_> = (0..4)
            .map(|number| {
                scope.spawn(move || {
                    let mut fixture = Fixture::new(subject, method)?;
                    fixture.random = crate::seed::Seed::new(number);
                    fixture.write_random()?;
                    fixture.create("a")?;
                    fixture.write_random()?;
                    fixture.check_current()?;
                    fixture.revert("a")?;
                    fixture.check_all()
                })
            })
            .collect();
        for life in lives {
            life.join().map_err(|_| anyhow::anyhow!("one panicked"))??;
        }
        Ok(())
    })
}
