//! [`DiskSnapshotter`] by copies.

use async_trait::async_trait;
use camino::Utf8Path;
use jiff::Timestamp;
use snapcore::backend::{
    Capabilities, DeleteCost, DiskPlan, DiskRequest, DiskSnapshotter, DiskState, Finding, Guard,
    InspectDepth, InternalPoint, Layer, Salvage, Severity, StepContext, StepStatus,
};
use snapcore::hypervisor::{AttachedDisk, OpenLayer};
use snapcore::manifest::{ManifestDirectory, ManifestStore};
use snapcore::{
    ActivePath, Disk, DiskAddress, DiskPoint, DiskRecord, Error, ErrorKind, FinishStep, LayerName, Point,
    PointKind, Result, Snapshot, SnapshotName, Step,
};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use crate::files::{failed, point, points};
use crate::lock::DiskLocks;
use crate::step::Action;

/// What the one layer of a disk is called.
const LAYER: &str = "disk";

/// Files whose points are copies. Work is done where it is asked for: whoever embeds it gives it a thread
/// that may wait.
#[derive(Default)]
pub struct Copies {
    locks: DiskLocks,
}

fn layer() -> LayerName {
    LayerName(LAYER.to_owned())
}

/// The file that the domain writes.
fn found(disk: &Utf8Path) -> Result<Metadata> {
    match disk.symlink_metadata() {
        Ok(found) if found.is_file() => Ok(found),
        Ok(_) => Err(Error::new(ErrorKind::Usage, format!("{disk} is no file"))),
        Err(cause) => Err(failed(format!("cannot look at {disk}"))(cause)),
    }
}

/// A disk's points: their names, and their files.
fn tags(disk: &Utf8Path) -> Result<Vec<(String, Metadata)>> {
    let directory = points(disk);
    let entries = match directory.read_dir_utf8() {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(format!("cannot read {directory}"))(error)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed(format!("cannot read {directory}")))?;
        let name = entry.file_name().to_owned();
        if name.len() == 8 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
            let copied = entry.metadata().map_err(failed(format!("cannot look at {}", entry.path())))?;
            all.push((name, copied));
        }
    }
    all.sort_by(|one, other| one.0.cmp(&other.0));
    Ok(all)
}

fn taken(copied: &Metadata) -> Timestamp {
    copied.modified().ok().and_then(|time| Timestamp::try_from(time).ok()).unwrap_or(Timestamp::UNIX_EPOCH)
}

fn step(disk: &Disk, action: Action, summary: String, bytes: u64) -> Step<Action> {
    Step::new(disk.target.clone(), action, summary).bytes(bytes)
}

#[async_trait]
impl DiskSnapshotter for Copies {
    type Action = Action;

    fn format(&self) -> &str {
        "dir"
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities::new(PointKind::Internal, 1)
    }

    async fn adopt(&self, disk: &Disk, _: ActivePath) -> Result<DiskRecord> {
        found(disk.path())?;
        if disk.path().file_name().is_none_or(|name| name.len() > 240) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{}: the name is too long for a directory beside it", disk.address),
            )
            .advise("rename it"));
        }
        Ok(DiskRecord::new(disk.clone(), layer()).owned(vec![layer()]))
    }

    async fn inspect(
        &self,
        record: &DiskRecord,
        _: InspectDepth,
        _: Option<&dyn AttachedDisk>,
    ) -> Result<DiskState> {
        let path = record.disk.path();
        let there = found(path)?;
        let internal = tags(path)?
            .into_iter()
            .map(|(tag, copied)| InternalPoint::new(tag, copied.len(), taken(&copied)));
        let only = Layer::new(layer(), record.disk.address.clone(), self.format(), there.len())
            .owned(true)
            .allocated(there.blocks() * 512)
            .internal(internal.collect());
        Ok(DiskState::new(record.disk.target.clone(), layer(), vec![only]))
    }

    async fn discover(&self, record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        for (tag, copied) in tags(record.disk.path())? {
            if known.iter().any(|point| point.tag.as_ref() == Some(&tag)) {
                continue;
            }
            all.push(Snapshot::new(
                SnapshotName::new(format!("found-{tag}"))?,
                taken(&copied),
                vec![DiskPoint::new(record.disk.target.clone(), Point::internal(layer(), tag), copied.len())],
            ));
        }
        all.sort_by_key(|snapshot| snapshot.created);
        Ok(all)
    }

    async fn plan(
        &self,
        record: &DiskRecord,
        _: &DiskState,
        active_path: ActivePath,
        request: &DiskRequest,
    ) -> Result<DiskPlan<Action>> {
        let (disk, path) = (&record.disk, record.disk.path());
        let there = tags(path)?;
        let mut plan = DiskPlan::default();
        if active_path != ActivePath::Keep {
            return Err(Error::new(ErrorKind::Unsupported, format!("{path} keeps its path"))
                .advise("leave --active-path out"));
        }
        match request {
            DiskRequest::Create { stamp, .. } => {
                let tag = new_tag(path, *stamp)?;
                let action = Action::Copy { tag: tag.clone() };
                let summary = format!("copy {path} as {tag}");
                plan.cut.push(step(disk, action, summary, found(path)?.len()));
                plan.point = Some(Point::internal(layer(), tag));
            }
            DiskRequest::Revert { to, save, stamp, .. } => {
                let known = there.iter().find(|(tag, _)| to.layer == layer() && to.tag.as_ref() == Some(tag));
                let Some((from, copied)) = known else {
                    return Err(Error::new(
                        ErrorKind::NotFound,
                        format!("{path} has no point {}", to.tag.as_deref().unwrap_or(to.layer.as_str())),
                    )
                    .advise("see `domsnap check`"));
                };
                let (from, previous) = (from.clone(), new_tag(path, *stamp)?);
                let next = format!("next-{previous}");
                let stage = Action::Stage { from: from.clone(), next: next.clone() };
                let summary = format!("copy {from} again");
                plan.prepare.push(step(disk, stage, summary, copied.len()));
                let exchange = Action::Exchange { from, next, previous: previous.clone() };
                let summary = format!("put that in the place of {path}");
                plan.cut.push(step(disk, exchange, summary, 0));
                match save {
                    Some(_) => plan.point = Some(Point::internal(layer(), previous)),
                    None => {
                        let action = Action::Drop { tags: vec![previous] };
                        let summary = "remove what was there before".to_owned();
                        plan.finish.push(FinishStep::new(step(disk, action, summary, 0)));
                    }
                }
            }
            DiskRequest::Delete { drop, keep, .. } => {
                let gone = gone(&there, drop, keep);
                let names: Vec<String> = gone.map(|(tag, _)| tag.clone()).collect();
                if !names.is_empty() {
                    let summary = format!("remove the copies {}", names.join(", "));
                    plan.finish.push(FinishStep::new(step(disk, Action::Drop { tags: names }, summary, 0)));
                }
            }
            other => {
                return Err(Error::new(ErrorKind::Unsupported, format!("copies cannot do this: {other:?}")));
            }
        }
        Ok(plan)
    }

    async fn lock(&self, record: &DiskRecord, _: Option<&dyn AttachedDisk>) -> Result<Guard> {
        Ok(Box::new(self.locks.begin(record.disk.path())?))
    }

    async fn open_chain(&self, record: &DiskRecord) -> Result<Vec<OpenLayer>> {
        Ok(vec![OpenLayer::new(record.disk.address.clone(), "raw")])
    }

    async fn apply(&self, step: &Step<Action>, context: StepContext<'_>) -> Result<()> {
        step.action.apply(context.disk.disk.path(), &self.locks, context)
    }

    async fn undo(&self, step: &Step<Action>, context: StepContext<'_>) -> Result<()> {
        step.action.undo(context.disk.disk.path(), &self.locks)
    }

    async fn salvage(&self, step: &Step<Action>, _: bool, context: StepContext<'_>) -> Result<Salvage> {
        let disk = &context.disk.disk;
        step.action.salvage(disk.target.as_str(), disk.path())
    }

    async fn status(&self, step: &Step<Action>, context: StepContext<'_>) -> Result<StepStatus> {
        Ok(step.action.status(context.disk.disk.path()))
    }

    async fn check(&self, record: &DiskRecord, _: &DiskState) -> Result<Vec<Finding>> {
        let directory = points(record.disk.path());
        let Ok(entries) = directory.read_dir_utf8() else { return Ok(Vec::new()) };
        let left = entries.filter_map(std::result::Result::ok).filter(|entry| {
            entry.file_name().starts_with("next-") || entry.path().extension() == Some("part")
        });
        Ok(left
            .map(|entry| {
                Finding::new(
                    Severity::Note,
                    entry.path().to_string(),
                    "what an operation left: it may be removed",
                )
            })
            .collect())
    }

    async fn cost_of_delete(
        &self,
        record: &DiskRecord,
        _: &DiskState,
        drop: &[Point],
        keep: &[Point],
    ) -> Result<DeleteCost> {
        let there = tags(record.disk.path())?;
        let frees = gone(&there, drop, keep).map(|(_, copied)| copied.blocks() * 512).sum();
        // Copies share no blocks.
        Ok(DeleteCost::new(frees, 0).exact())
    }

    fn manifests(&self, disk: &Disk) -> Arc<dyn ManifestStore> {
        Arc::new(ManifestDirectory::new(format!("{}.domsnap", disk.path())))
    }

    fn layer_address(&self, record: &DiskRecord, _: &LayerName) -> DiskAddress {
        record.disk.address.clone()
    }
}

fn new_tag(disk: &Utf8Path, stamp: u32) -> Result<String> {
    let tag = format!("{stamp:08x}");
    match point(disk, &tag).exists() {
        true => Err(Error::new(ErrorKind::Exists, format!("{} is there already", point(disk, &tag)))
            .advise("try again")),
        false => Ok(tag),
    }
}

/// The points that are there, are to go, and are of no other domain.
fn gone<'a>(
    there: &'a [(String, Metadata)],
    drop: &'a [Point],
    keep: &'a [Point],
) -> impl Iterator<Item = &'a (String, Metadata)> {
    let among = |points: &[Point], tag: &String| points.iter().any(|point| point.tag.as_ref() == Some(tag));
    there.iter().filter(move |(tag, _)| among(drop, tag) && !among(keep, tag))
}
