//! Reading changes nothing.

use std::collections::HashSet;

use anyhow::{Context, ensure};
use snapcore::backend::{Certainty, DeleteCost, PointImage, StepContext};
use snapcore::service::{DeleteRequest, DiffRequest, Request, RevertRequest};
use snapcore::{Error, LayerName, Point, SnapshotName};
use tokio_util::sync::CancellationToken;

use super::TestCase;
use crate::fixture::{Fixture, TARGETS, refusal};

struct Silent;

impl snapcore::backend::Progress for Silent {
    fn bytes(&self, _: u64, _: u64) {}
}

/// The extents of a state have no gaps, and what they say to be zeros is.
fn zeros_are_zeros(image: &dyn PointImage, wanted: &[u8]) -> anyhow::Result<()> {
    let (size, mut at) = (image.size(), 0);
    while at < size {
        let extents = image.extents(at, size, 2)?;
        ensure!(!extents.is_empty() && extents.len() <= 2, "{} extents at {at}", extents.len());
        for extent in extents {
            ensure!(extent.start == at && extent.end > at && extent.end <= size, "{extent:?} at {at}");
            let bytes = &wanted[extent.start as usize..extent.end as usize];
            ensure!(!extent.zero || bytes.iter().all(|byte| *byte == 0), "{extent:?} has data");
            at = extent.end;
        }
    }
    Ok(())
}

pub(super) const CASES: [TestCase; 7] = [
    TestCase::always(
        "reads_change_nothing",
        "listing, inspecting and planning change nothing",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let before = fixture.footprint()?;
            let reference = fixture.reference();
            let process = fixture.process()?;
            let service = &process.service;
            process.wait(async {
                let name = SnapshotName::new("a")?;
                let requests = [
                    Request::Create(method.create(SnapshotName::new("new")?, &TARGETS)?),
                    Request::Revert(RevertRequest::new(name.clone())),
                    Request::Delete(DeleteRequest::new(vec![name.clone()])),
                    Request::Tidy,
                ];
                for request in &requests {
                    service.plan(&reference, request).await?;
                }
                service.show(&reference, &name).await?;
                service.inspect(&reference).await?;
                service.check(&reference).await?;
                Ok::<_, Error>(())
            })?;
            let after = fixture.footprint()?;
            ensure!(before == after, "there was {before:?}, and there is {after:?}");
            fixture.check_all()
        },
    ),
    TestCase::always(
        "state_is_one_tree",
        "a disk's state is one tree of layers with the active one",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let reference = fixture.reference();
            let process = fixture.process()?;
            for report in process.wait(process.service.inspect(&reference))? {
                let state =
                    report.state.with_context(|| format!("it could not be read: {:?}", report.problem))?;
                ensure!(state.target == report.record.disk.target, "the state is of {}", state.target);
                ensure!(
                    state.active == report.record.active,
                    "the state's active layer is {}, the catalogue's {}",
                    state.active,
                    report.record.active
                );
                let names: HashSet<_> = state.layers.iter().map(|layer| &layer.name).collect();
                ensure!(names.len() == state.layers.len(), "two layers have one name: {names:?}");
                ensure!(names.contains(&state.active), "the active layer is none of {names:?}");
                for layer in &state.layers {
                    ensure!(
                        layer.backing.as_ref().is_none_or(|below| names.contains(below)),
                        "{} is backed by {:?}, which is no layer",
                        layer.name,
                        layer.backing
                    );
                    ensure!(layer.virtual_size > 0, "{} has no size", layer.name);
                }
                let chain = state.chain(&state.active);
                ensure!(chain.len() <= state.layers.len(), "the active chain is a loop");
            }
            Ok(())
        },
    ),
    TestCase::with(
        "points_are_read_and_compared",
        "what is read of a point is what was saved, and no difference is outside of what a comparison finds",
        |can, _| can.reads_points,
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let reference = fixture.reference();
            let points = fixture.model.points.clone();
            let process = fixture.process()?;
            let service = &process.service;
            for (name, saved) in &points {
                let opened = process.wait(service.open_snapshot(
                    &reference,
                    &SnapshotName::new(name.clone())?,
                    &[],
                ))?;
                ensure!(opened.disks.len() == saved.disks.len(), "{name} is open with {:?}", opened.left_out);
                for disk in &opened.disks {
                    let wanted = &saved.disks[disk.target.as_str()];
                    let mut found = vec![1; wanted.len()];
                    disk.image.read_at(&mut found, 0)?;
                    ensure!(
                        disk.image.size() == wanted.len() as u64 && found == **wanted,
                        "{name} reads otherwise on {}",
                        disk.target
                    );
                    zeros_are_zeros(&*disk.image, wanted)
                        .with_context(|| format!("{name} on {}", disk.target))?;
                    disk.image.require_still()?;
                }
                for (other, then) in &points {
                    let request = DiffRequest::new(SnapshotName::new(name.clone())?)
                        .to(Some(SnapshotName::new(other.clone())?));
                    for disk in process.wait(service.differences(&reference, &request))? {
                        let target = disk.target.as_str();
                        let (from, to) = (&saved.disks[target], &then.disks[target]);
                        let ranges = &disk.differences.ranges;
                        ensure!(name != other || ranges.is_empty(), "{name} differs from itself: {ranges:?}");
                        let inside = |at: usize| ranges.iter().any(|range| range.contains(&(at as u64)));
                        let missed = (0..to.len()).find(|at| from.get(*at) != to.get(*at) && !inside(*at));
                        ensure!(
                            missed.is_none(),
                            "{name}, {other}, {target}: {missed:?} is not in {ranges:?}"
                        );
                    }
                }
            }
            fixture.check_all()
        },
    ),
    TestCase::always(
        "delete_cost_is_reported",
        "the cost of a delete is reported, and reporting it changes nothing",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let reference = fixture.reference();
            let names: Vec<String> = fixture.model.points.keys().cloned().collect();
            let process = fixture.process()?;
            for name in names {
                let details =
                    process.wait(process.service.show(&reference, &SnapshotName::new(name.clone())?))?;
                for member in &details.members {
                    let known = |cost: &DeleteCost| cost.certainty != Certainty::Unknown;
                    ensure!(
                        member.delete.as_ref().is_some_and(known),
                        "of {name} on {} it is not reported: {:?}",
                        member.target,
                        member.delete
                    );
                }
            }
            fixture.check_all()
        },
    ),
    TestCase::with(
        "delete_cost_is_not_always_zero",
        "of snapshots that differ, at least one frees or moves bytes when it is deleted",
        |_, subject| subject.knows_cost(),
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let reference = fixture.reference();
            let names: Vec<String> = fixture.model.points.keys().cloned().collect();
            let process = fixture.process()?;
            let mut bytes = 0;
            for name in &names {
                let details =
                    process.wait(process.service.show(&reference, &SnapshotName::new(name.clone())?))?;
                for cost in details.members.iter().filter_map(|member| member.delete.as_ref()) {
                    bytes += cost.freed() + cost.moves;
                }
            }
            ensure!(
                bytes > 0,
                "the guest wrote after each of {names:?}, and to delete any frees and moves nothing"
            );
            Ok(())
        },
    ),
    TestCase::always(
        "absent_disk_is_refused",
        "a disk that is not there is refused by name",
        |subject, method| {
            let mut fixture = Fixture::new(subject, method)?;
            let records = fixture.records()?;
            let process = fixture.process()?;
            let backend = process.service.registry().get(&records[0].disk.format)?;
            let mut disk = records[0].disk.clone();
            disk.address = disk.path().with_file_name("there-is-no-such-disk").into();
            let refused = refusal(process.wait(backend.adopt(&disk, subject.active_path())), "adopting it")?;
            ensure!(refused.to_string().contains("there-is-no-such-disk"), "it is not named: {refused}");
            fixture.check_current()
        },
    ),
    TestCase::always(
        "unknown_point_and_step_are_errors",
        "an unknown point and an unknown step are errors that change nothing",
        |subject, method| {
            let mut fixture = Fixture::with_snapshots(subject, method)?;
            let record = fixture.records()?.swap_remove(0);
            let before = fixture.footprint()?;
            let process = fixture.process()?;
            let backend = process.service.registry().serving(&record.disk)?;
            process.wait(async {
                let state =
                    backend.inspect(&record, snapcore::backend::InspectDepth::Dependents, None).await?;
                let nowhere =
                    Point { layer: LayerName("no-such-layer".into()), tag: Some("no-such-tag".into()) };
                let here = Point { layer: record.active.clone(), tag: Some("no-such-tag".into()) };
                for to in [nowhere, here] {
                    let request = snapcore::backend::DiskRequest::Revert {
                        to: to.clone(),
                        save: None,
                        keep: vec![to],
                        stamp: 7,
                    };
                    if let Ok(plan) = backend.plan(&record, &state, subject.active_path(), &request).await {
                        anyhow::bail!("a revert to a point that is not there was planned: {plan:?}");
                    }
                }
                let _held = backend.lock(&record, None).await?;
                let cancel = CancellationToken::new();
                let context = StepContext::new(&record, &Silent, &cancel);
                let junk = [
                    serde_json::json!(null),
                    serde_json::json!({"do": "an unknown step"}),
                    serde_json::json!([1, 2]),
                ];
                for action in junk {
                    let step = snapcore::Step::new(record.disk.target.clone(), action, "junk");
                    let said = [
                        backend.apply(&step, context).await.err(),
                        backend.undo(&step, context).await.err(),
                        backend.status(&step, context).await.err(),
                    ];
                    ensure!(said.iter().all(Option::is_some), "junk was taken for a step: {said:?}");
                }
                Ok(())
            })?;
            let after = fixture.footprint()?;
            ensure!(before == after, "there was {before:?}, and there is {after:?}");
            fixture.check_all()?;
            Ok(())
        },
    ),
];
