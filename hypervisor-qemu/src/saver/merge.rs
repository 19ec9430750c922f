//! Merges layers of an open chain into one.

use std::{
    pin::pin,
    sync::atomic::{AtomicBool, Ordering},
};

use snapcore::backend::Progress;
use snapcore::hypervisor::{AttachedMerge, Inside};
use snapcore::{DiskAddress, Error, ErrorKind, FileIdentity, Result, Target};
use tokio_util::sync::CancellationToken;

use super::{
    disk::{Disk, QemuChain, identity},
    error::to_engine,
    served,
};
use crate::{
    BoxError,
    graph::{Graph, remove_layers},
    jobs::{self, ActiveCommit, LayerCommit, Stream},
    machine::Machine,
    name::Name,
};

/// Direction of a merge.
enum Direction {
    /// Into the first layer, beginning with the active image.
    Pivot { top: String, base: String },
    /// Into the first layer, with layers above.
    Down { top: String, base: String },
    /// Into the last layer.
    Up { into: String, base: Option<String> },
}

/// Performs a merge, or the remaining part of it.
///
/// The part done before is read from QEMU. If a job of this merge's name exists, the merge continues with it.
/// If the other layers are no longer in any chain, the job has ended, and only its leftover nodes are closed.
pub(super) async fn merge(
    disk: &Disk,
    merge: &AttachedMerge,
    inside: &dyn Inside,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<()> {
    if let Some(server) = &disk.server {
        return served::merge(disk, server, merge, inside, progress, cancel).await;
    }
    let machine = &disk.machine;
    let shown = |layer: &DiskAddress| layer.name().to_owned();
    let attempted = || {
        let run: Vec<String> = merge.run.iter().map(shown).collect();
        format!("merging {} of disk {} into {}", run.join(", "), disk.target, shown(&merge.into))
    };
    let refuse = |detail: &str| Error::new(ErrorKind::Refused, detail.to_owned()).context(attempted());
    let job = job(merge);
    jobs::dismiss_ended(machine, &job).await.map_err(to_engine)?;
    let running = jobs::status(machine, &job).await.map_err(to_engine)?.is_some();

    let graph = Graph::read(machine).await.map_err(to_engine)?;
    let open = disk.open_in(&graph);
    let merged = merge.run.iter().filter(|layer| **layer != merge.into);
    let identities: Vec<FileIdentity> = merged.filter_map(inode).collect();
    if open.placeholder.is_some() {
        return Err(refuse("the disk is detached: recover the operation that detached it"));
    }
    if !running && !identities.iter().any(|file| open.position(*file).is_some()) {
        let into = inode(&merge.into);
        if into.and_then(|into| open.position(into)).is_none() {
            return Err(refuse("none of its layers is in the chain that QEMU has open"));
        }
        // The merge was done before. The hook is idempotent: a crash may have come between the pivot and its
        // record.
        inside.run(None).await?;
        return close(machine, &graph, disk, &identities).await;
    }
    let direction = direction(&open, merge).map_err(|detail| refuse(&detail))?;
    if cancel.is_cancelled() && !running {
        return Err(Error::new(ErrorKind::Cancelled, "it was cancelled").context(attempted()));
    }

    let (cancelled, pivoting) = (AtomicBool::new(false), AtomicBool::new(false));
    let hook = async || -> Result<(), BoxError> {
        // 1) From here the merge cannot be cancelled: the path will name the base while QEMU pivots to it. A
        //    crash in the hook is harmless, because top and base are equal while the job is pending.
        if cancelled.load(Ordering::SeqCst) {
            return Err(Error::new(ErrorKind::Cancelled, "it was cancelled").into());
        }
        pivoting.store(true, Ordering::SeqCst);
        inside.run(None).await.map_err(BoxError::from)
    };
    let each = |now: jobs::JobProgress| progress.bytes(now.current, now.total);
    let speed = *disk.speed.borrow();
    let work = async {
        match (&direction, running) {
            (Direction::Pivot { .. }, true) => jobs::drive_active(machine, &job, each, hook).await,
            (_, true) => jobs::finish(machine, &job, each).await,
            (Direction::Pivot { top, base }, false) => {
                let (top, base) = (top.clone(), base.clone());
                let commit = ActiveCommit { job: job.clone(), top, base, speed };
                jobs::commit_active(machine, &commit, each, hook).await.map(drop)
            }
            (Direction::Down { top, base }, false) => {
                let root = open.root().map(|root| root.node.name.clone()).unwrap_or_default();
                let backing_file = merge.string.clone().unwrap_or_default();
                let (top, base) = (top.clone(), base.clone());
                let commit = LayerCommit { job: job.clone(), root, top, base, backing_file, speed };
                jobs::commit_layers(machine, &commit, each).await.map(drop)
            }
            (Direction::Up { into, base }, false) => {
                let (into, base) = (into.clone(), base.clone());
                let backing_file = merge.string.clone();
                let stream = Stream { job: job.clone(), into, base, backing_file, speed };
                jobs::stream(machine, &stream, each).await.map(drop)
            }
        }
    };
    let mut work = pin!(work);
    let mut limits = disk.speed.clone();
    limits.mark_unchanged();
    let mut asked_to_end = false;
    let ended = loop {
        // While a command of these branches waits for its answer, the work is not polled. So the hook cannot
        // begin meanwhile, and a cancel cannot cross a pivot.
        tokio::select! {
            ended = &mut work => break ended,
            () = cancel.cancelled(), if !asked_to_end && !pivoting.load(Ordering::SeqCst) => {
                asked_to_end = true;
                cancelled.store(true, Ordering::SeqCst);
                jobs::cancel(machine, &job).await.map_err(to_engine)?;
            }
            Ok(()) = limits.changed() => {
                let speed = *limits.borrow_and_update();
                if let Err(error) = jobs::set_speed(machine, &job, speed).await {
                    tracing::debug!(%error, "a job was not limited");
                }
            }
        }
    };
    if let Err(error) = ended {
        let top = merge.run.last().filter(|top| **top != merge.into);
        let error = match (pivoting.load(Ordering::SeqCst), top) {
            (true, Some(top)) => {
                not_pivoted(disk, &job, top.path().as_std_path(), inside, None, to_engine(error)).await
            }
            _ => to_engine(error),
        };
        return Err(error.context(attempted()));
    }
    let graph = Graph::read(machine).await.map_err(to_engine)?;
    close(machine, &graph, disk, &identities).await
}

/// Merges the active image into the one below it, or continues such a merge.
pub(super) async fn fold_active(
    disk: &Disk,
    open: &QemuChain,
    inside: &dyn Inside,
    progress: &dyn Progress,
) -> Result<()> {
    let [top, base, ..] = &open.layers[..] else {
        let detail = format!("the active image of disk {} has no backing image", disk.target);
        return Err(Error::new(ErrorKind::Corrupt, detail));
    };
    let machine = &disk.machine;
    let job = Name::of("u", disk.target.as_str());
    let target: &Target = &disk.target;
    let hook = async || inside.run(Some(target)).await.map_err(BoxError::from);
    let each = |now: jobs::JobProgress| progress.bytes(now.current, now.total);
    let running = jobs::status(machine, &job).await.map_err(to_engine)?.is_some();
    let done = match running {
        true => jobs::drive_active(machine, &job, each, hook).await,
        false => {
            let (top, base) = (top.node.name.clone(), base.node.name.clone());
            let commit = ActiveCommit { job: job.clone(), top, base, speed: 0 };
            jobs::commit_active(machine, &commit, each, hook).await.map(drop)
        }
    };
    if let Err(error) = done {
        let file = top.file.clone().unwrap_or_default();
        return Err(not_pivoted(disk, &job, &file, inside, Some(target), to_engine(error)).await);
    }
    let graph = Graph::read(machine).await.map_err(to_engine)?;
    let merged: Vec<FileIdentity> = top.identity.into_iter().collect();
    close(machine, &graph, disk, &merged).await
}

/// Handles a failed merge of the active image after its hook may have run. If QEMU reports that the job is
/// gone and that the guest writes to the upper image, the hook's changes are undone. Otherwise the path would
/// name an image that is not written.
async fn not_pivoted(
    disk: &Disk,
    job: &Name,
    top: &std::path::Path,
    inside: &dyn Inside,
    only: Option<&Target>,
    error: Error,
) -> Error {
    let gone = jobs::status(&disk.machine, job).await.map(|job| job.is_none());
    let writes_top = disk.open().await.map(|open| {
        identity(top).is_some_and(|top| open.root().is_some_and(|root| root.identity == Some(top)))
    });
    match (gone, writes_top) {
        (Ok(true), Ok(true)) => match inside.back(only).await {
            Ok(()) => error,
            Err(second) => error.state(format!(
                "the guest writes {}, and its configured path could not be given back to that: {second}",
                top.display()
            )),
        },
        _ => error,
    }
}

/// Returns the inode of a layer that is a file.
fn inode(layer: &DiskAddress) -> Option<FileIdentity> {
    layer.local().and_then(|file| identity(file.as_std_path()))
}

/// Returns the name of a merge's job, which is the same each time.
fn job(merge: &AttachedMerge) -> Name {
    let run: Vec<&str> = merge.run.iter().map(DiskAddress::as_str).collect();
    Name::of("m", &format!("{}\0\0{}", run.join("\0"), merge.into))
}

/// Closes the leftover nodes of merged layers: nodes of their files that are not a backing image.
async fn close(machine: &Machine, graph: &Graph, disk: &Disk, merged: &[FileIdentity]) -> Result<()> {
    let idle = graph.nodes().iter().filter(|node| {
        graph.file(&node.name).is_some() && graph.users(&node.name).next().is_none() && {
            let open = QemuChain::read(graph, &disk.view, &node.name);
            open.root().and_then(|root| root.identity).is_some_and(|file| merged.contains(&file))
        }
    });
    let idle: Vec<String> = idle.map(|node| node.name.clone()).collect();
    remove_layers(machine, &idle).await.map(drop).map_err(to_engine)
}

fn direction(open: &QemuChain, merge: &AttachedMerge) -> Result<Direction, String> {
    let position = |layer: &DiskAddress| {
        let place = inode(layer).and_then(|file| open.position(file));
        place.ok_or_else(|| format!("{layer} is not in the chain that QEMU has open"))
    };
    let (Some(first), Some(last)) = (merge.run.first(), merge.run.last()) else {
        return Err("there is nothing to merge".to_owned());
    };
    let (bottom, top) = (position(first)?, position(last)?);
    let files: Vec<Option<FileIdentity>> = merge.run.iter().map(inode).collect();
    let between: Vec<_> = open.layers.get(top..=bottom).unwrap_or_default().iter().rev().collect();
    if between.len() != files.len() || between.iter().zip(&files).any(|(layer, file)| layer.identity != *file)
    {
        return Err("QEMU has another chain open than these layers, one on the other".to_owned());
    }
    let node = |place: usize| open.layers.get(place).map(|layer| layer.node.name.clone()).unwrap_or_default();
    if merge.into == *first {
        return match top {
            0 => Ok(Direction::Pivot { top: node(top), base: node(bottom) }),
            _ if merge.string.is_none() => {
                Err("the image above the merged ones needs a backing string".to_owned())
            }
            _ => Ok(Direction::Down { top: node(top), base: node(bottom) }),
        };
    }
    if merge.into != *last {
        return Err("layers are merged into the first or the last of them".to_owned());
    }
    let base = merge.below.as_ref().map(position).transpose()?;
    if base.is_some_and(|base| base != bottom + 1) || (base.is_none() && open.layers.len() > bottom + 1) {
        return Err("the layers have another backing image than expected".to_owned());
    }
    Ok(Direction::Up { into: node(top), base: base.map(node) })
}
