//! Names that are as nasty as they may be.

use anyhow::{Context, Result, ensure};
use snapcore::{ErrorKind, MAX_NAME_BYTES};

use super::Statement;
use crate::house::{House, Way};
use crate::workshop::Workshop;

pub(super) const STATEMENTS: [Statement; 2] = [
    Statement::always("a snapshot of any legal name is what its name says", names_of_snapshots),
    Statement::always(
        "a disk of a nasty name is served rightly, or refused before anything is done",
        names_of_disks,
    ),
];

fn names_of_snapshots(shop: &dyn Workshop, way: &Way) -> Result<()> {
    let longest = "x".repeat(MAX_NAME_BYTES);
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
    let mut house = House::new(shop, way)?;
    let many = house.capabilities()?.snapshot_of_snapshot;
    for name in names {
        house.write_somewhere()?;
        house.create(name).with_context(|| format!("a snapshot called {name:?}"))?;
        if !many {
            house.write_somewhere()?;
            house.is_whole()?;
            house.delete(&[name])?;
        }
    }
    house.write_somewhere()?;
    house.is_whole()?;
    if many && house.capabilities()?.delete_in_chain {
        house.delete(&["a", "domain", "+"])?;
        house.is_whole()?;
    }
    Ok(())
}

fn names_of_disks(shop: &dyn Workshop, way: &Way) -> Result<()> {
    let (mut served, mut refused) = (0, Vec::new());
    for name in shop.hostile_names() {
        let mut house = match House::named(shop, way, &[&name]) {
            Ok(house) => house,
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
            house.create("a")?;
            house.write_somewhere()?;
            house.run(&crate::house::Op::Revert { to: "a".into(), save: None })?;
            house.write_somewhere()?;
            house.is_whole()?;
            house.delete(&["a"])?;
            house.is_as_the_model()
        })();
        tried.with_context(|| format!("a disk called {name:?}"))?;
        served += 1;
    }
    ensure!(served > 0, "no disk of a nasty name is served: {refused:?}");
    Ok(())
}
