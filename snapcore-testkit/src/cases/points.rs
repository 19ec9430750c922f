//! Snapshots and the current state, when nothing fails.

use anyhow::{Context, Result, ensure};
use snapcore::service::{CloneRequest, DomainRef};
use snapcore::{Domain, DomainName, ErrorKind, SnapshotName};
use tokio_util::sync::CancellationToken;

use super::{TestCase, trees, trees_with_deletes};
use crate::fixture::{Fixture, Method, Op, compare};
use crate::test_backend::TestBackend;

pub(super) const CASES: [TestCase; 13] = [
    TestCase::always(
        "create_keeps_current",
        "a create leaves the current state byte for byte",
        |subject, method| {
            let mut fixture = Fixture::new(subject, method)?;
            fixture.create("a")?;
            fixture.check_current()
        },
    ),
    TestCase::always(
        "later_writes_not_in_snapshot",
        "what is written after a snapshot is not in it",
        |subject, method| {
            let mut fixture = Fixture::new(subject, method)?;
            fixture.create("a")?;
            fixture.write_random()?;
            fixture.check_current()?;
            fixture.revert("a")?;
            fixture.check_current()
        },
    ),
    TestCase::always("revert_repeats", "a snapshot can be reverted to again and again", |subject, method| {
        let mut fixture = Fixture::new(subject, method)?;
        fixture.create("a")?;
        for _ in 0..4 {
            fixture.write_random()?;
            fixture.revert("a")?;
            fixture.check_current()?;
        }
        Ok(())
    }),
    TestCase::with(
        "revert_keeps_others",
        "a revert leaves every other snapshot as it was",
        trees,
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            for name in ["a", "c", "b", "c", "a"] {
                fixture.revert(name)?;
                fixture.check_current()?;
                fixture.write_random()?;
            }
            fixture.check_all()
        },
    ),
    TestCase::with(
        "branch_keeps_siblings",
        "a branch leaves its siblings as they were",
        trees,
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            for (from, name) in [("a", "a1"), ("b", "b1"), ("a1", "a2"), ("a", "a3")] {
                fixture.revert(from)?;
                fixture.write_random()?;
                fixture.create(name)?;
                fixture.write_random()?;
            }
            fixture.check_all()
        },
    ),
    TestCase::with(
        "saving_revert_loses_nothing",
        "a revert that saves the current state loses nothing",
        trees,
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            fixture.run(&Op::Revert { to: "a".into(), save: Some("saved".into()) })?;
            fixture.check_current()?;
            fixture.write_random()?;
            fixture.run(&Op::Revert { to: "saved".into(), save: Some("again".into()) })?;
            fixture.check_all()
        },
    ),
    TestCase::with(
        "delete_middle_keeps_others",
        "a delete of a middle snapshot keeps all others",
        trees_with_deletes,
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            fixture.delete(&["b"])?;
            fixture.check_all()
        },
    ),
    TestCase::with(
        "delete_root_keeps_descendants",
        "a delete of a root keeps its descendants",
        trees_with_deletes,
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            fixture.revert("a")?;
            fixture.write_random()?;
            fixture.create("a1")?;
            fixture.delete(&["a"])?;
            fixture.check_all()
        },
    ),
    TestCase::always(
        "clones_keep_their_snapshot",
        "clones of a snapshot show it, whatever becomes of the source and of each other",
        clones,
    ),
    TestCase::always(
        "delete_newest_keeps_current",
        "a delete of the newest snapshot keeps the current state",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let newest = fixture.model.current.clone().unwrap_or_default();
            fixture.delete(&[&newest])?;
            fixture.check_all()
        },
    ),
    TestCase::always(
        "delete_all_leaves_nothing",
        "after all snapshots are deleted nothing of them is left",
        |subject, method| {
            let mut fixture = Fixture::new(subject, method)?;
            let before = fixture.footprint()?;
            for name in ["a", "b"] {
                fixture.create(name)?;
                fixture.write_random()?;
                if !fixture.capabilities()?.snapshot_of_snapshot {
                    break;
                }
            }
            fixture.revert("a")?;
            fixture.write_random()?;
            let all: Vec<String> = fixture.model.points.keys().cloned().collect();
            fixture.run(&Op::Delete(all))?;
            fixture.check_current()?;
            let after = fixture.footprint()?;
            ensure!(before == after, "there was {before:?}, and there is {after:?}");
            Ok(())
        },
    ),
    TestCase::with(
        "undeclared_is_refused",
        "what the capabilities exclude is refused before anything is changed",
        trees_with_deletes,
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let declared = fixture.capabilities()?;
            let (mut one_point, mut no_middle) = (declared.clone(), declared);
            one_point.snapshot_of_snapshot = false;
            no_middle.delete_in_chain = false;
            fixture.process()?.faults.declare(one_point);
            for op in [Op::Create("d".into()), Op::Revert { to: "a".into(), save: Some("d".into()) }] {
                fixture.expect_refusal(&op, ErrorKind::Unsupported)?;
            }
            fixture.process()?.faults.declare(no_middle);
            fixture.expect_refusal(&Op::Delete(vec!["b".into()]), ErrorKind::Unsupported)?;
            fixture.expect_refusal(&Op::Delete(vec!["a".into(), "b".into()]), ErrorKind::Unsupported)?;
            fixture.delete(&["c"])?;
            fixture.delete(&["a", "b"])?;
            fixture.check_all()
        },
    ),
    TestCase::with(
        "import_after_lost_catalogue",
        "a lost catalogue is imported again from the manifests",
        |_, subject| !subject.has_bases(),
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let paths: Vec<_> =
                fixture.records()?.into_iter().map(|record| record.disk.path().to_owned()).collect();
            let capabilities = fixture.capabilities()?;
            let format = fixture.records()?[0].disk.format.clone();
            ensure!(capabilities.internal || capabilities.external, "it declares no kind of point");
            fixture.lose_catalogue()?;
            let images = snapcore::service::DomainRef::images(&paths)?.format(format);
            let process = fixture.process()?;
            let report = process.wait(process.service.import(&images, Default::default()))?;
            ensure!(report.notes.is_empty(), "the import reports {:?}", report.notes);
            fixture.check_all()
        },
    ),
];

/// Clones of the newest snapshot, while the source and one of them change. A backend that does not clone is
/// not tried. One whose disks are no files is not either: the kit does not know how to remove a clone's.
fn clones(subject: &dyn TestBackend, method: &Method) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    let snapshot = fixture.model.current.clone().unwrap_or_default();
    let wanted = fixture.model.points.get(&snapshot).context("the snapshot")?.disks.clone();
    if !fixture.records()?.iter().all(|record| record.disk.path().is_file()) {
        eprintln!("not tried: the disks are no files");
        return Ok(());
    }
    let names = [DomainName::new("one")?, DomainName::new("other")?];
    let request = CloneRequest::new(SnapshotName::new(&snapshot)?, names.to_vec());
    let reference = fixture.reference();
    let process = fixture.process()?;
    match process.wait(process.service.clone_domain(&reference, request, CancellationToken::new())) {
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            eprintln!("not tried: {error}");
            return Ok(());
        }
        Err(error) => return Err(error.into()),
    }
    fixture.check_current()?;
    let mut clones = Vec::new();
    for name in names {
        let process = fixture.process()?;
        clones.push(process.wait(process.service.resolve(&DomainRef::Name(name)))?);
    }
    let shown = |fixture: &Fixture<'_>, domain: &Domain| -> Result<()> {
        for record in &domain.disks {
            let target = record.disk.target.as_str();
            let wanted = wanted.get(target).context("a disk of the model")?;
            let found = fixture.subject().read(record)?;
            compare(&found, wanted).with_context(|| format!("clone {} on {target}", domain.name))?;
        }
        Ok(())
    };
    ensure!(clones.iter().all(|domain| domain.disks.len() == wanted.len()), "a clone lacks a disk");
    for domain in &clones {
        shown(&fixture, domain)?;
    }
    // Of what one writes, neither the other nor the source sees anything.
    if let [one, other] = &clones[..] {
        for record in &one.disks {
            fixture.subject().write(record, 0, &[0xa5; 4096])?;
        }
        shown(&fixture, other)?;
        fixture.check_all()?;
        // The source goes on, and gives up the snapshot.
        fixture.write_random()?;
        fixture.delete(&[&snapshot])?;
        shown(&fixture, other)?;
    }
    fixture.check_all()
}
