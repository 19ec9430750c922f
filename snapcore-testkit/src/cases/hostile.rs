//! Names that are as nasty as they may be.

use anyhow::{Context, Result, ensure};
use snapcore::{ErrorKind, SnapshotName};

use super::TestCase;
use crate::fixture::{Fixture, Method};
use crate::test_backend::TestBackend;

pub(super) const CASES: [TestCase; 2] = [
    TestCase::always(
        "any_snapshot_name",
        "a snapshot of any legal name is what its name says",
        names_of_snapshots,
    ),
    TestCase::always(
        "hostile_disk_names",
        "a disk of a hostile name is served rightly, or refused before anything is done",
        names_of_disks,
    ),
];

fn names_of_snapshots(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let longest = "x".repeat(SnapshotName::MAX_BYTES);
    let names = [
        "1",
        "2026-11-22T10:00:00+01:00",
        "a:b",
        "a+b",
        "A",
        "a",
        "_",
        "+",
        "domain",
        "domain.json",
        "vda",
        "a..b",
        "current",
        "null",
        &longest,
    ];
    let mut fixture = Fixture::new(subject, method)?;
    let many = fixture.capabilities()?.snapshot_of_snapshot;
    for name in names {
        fixture.write_random()?;
        fixture.create(name).with_context(|| format!("a snapshot called {name:?}"))?;
        if !many {
            fixture.write_random()?;
            fixture.check_all()?;
            fixture.delete(&[name])?;
        }
    }
    fixture.write_random()?;
    fixture.check_all()?;
    if many && fixture.capabilities()?.delete_in_chain {
        fixture.delete(&["a", "domain", "+"])?;
        fixture.check_all()?;
    }
    Ok(())
}

fn names_of_disks(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let (mut served, mut refused) = (0, Vec::new());
    for name in subject.hostile_names() {
        let mut fixture = match Fixture::named(subject, method, &[&name]) {
            Ok(fixture) => fixture,
            Err(error) => {
                let Some(why) = error.downcast_ref::<snapcore::Error>() else { return Err(error) };
                let clean =
                    matches!(why.kind(), ErrorKind::Refused | ErrorKind::Usage | ErrorKind::Unsupported);
                ensure!(clean, "a disk called {name:?}: {why}");
                refused.push(format!("{name:?}: {why}"));
                continue;
            }
        };
        let tried = (|| {
            fixture.create("a")?;
            fixture.write_random()?;
            fixture.run(&crate::fixture::Op::Revert { to: "a".into(), save: None })?;
            fixture.write_random()?;
            fixture.check_all()?;
            fixture.delete(&["a"])?;
            fixture.check_current()
        })();
        tried.with_context(|| format!("a disk called {name:?}"))?;
        served += 1;
    }
    ensure!(served > 0, "no disk of a nasty name is served: {refused:?}");
    Ok(())
}
