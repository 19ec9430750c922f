//! The cut of a snapshot, and the memory that is written after it.

use std::{
    mem,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use camino::Utf8Path;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snapcore::hypervisor::{
    DiskInstant, DomainContext, Meeting, MemoryPlan, OpenLayer, PowerAfter, Quiesce, StepOutcome, Taken,
};
use snapcore::{Consistency, DiskAddress, Error, ErrorKind, Result, Target};

use super::{
    disk::{Disk, identity, layer},
    error::{blocking, to_engine},
    live::QemuDomain,
    mark::Mark,
    merge,
    preflight::cannot_freeze,
    reopen, served,
};
use crate::{
    BoxError,
    graph::{self, Graph, remove_layers},
    instant::{self, Cut, CutMethod, DiskCut, SaveMode},
    jobs,
    machine::Paused,
    memory::{Draft, LONGEST_METADATA, Packing, Stored},
    migration,
    name::Name,
    quiesce::{self, Quiesced},
};

/// Metadata of a memory image.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct MemoryMetadata {
    /// True if the guest ran at the instant: QEMU's stream has the state of the moment when it was written.
    pub(super) running: bool,
    /// The machine, as it is recorded with the snapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) machine: Option<serde_json::Value>,
}

/// The cut, as its step describes it.
#[derive(Clone, Copy)]
pub(super) struct CutStep<'a> {
    pub(super) disks: &'a [(Target, DiskInstant)],
    /// True if the guest ran when the snapshot was planned.
    pub(super) running: bool,
    pub(super) memory: Option<&'a MemoryPlan>,
    pub(super) quiesce: Quiesce,
    pub(super) quiesce_limit: Duration,
    pub(super) then: Option<PowerAfter>,
    /// True if a revert follows, for which the guest is left paused.
    pub(super) for_revert: bool,
}

/// Performs the cut. After an error QEMU is as it was before, unless the error names a difference, which the
/// undo repairs.
///
/// Only after the cut is it known if the guest stayed frozen. If quiescing was required and the guest did not
/// stay frozen, this is an error, and the undo discards the cut.
pub(super) async fn take(
    live: &QemuDomain,
    step: CutStep<'_>,
    context: DomainContext<'_>,
) -> Result<StepOutcome> {
    let machine = &live.machine;
    let mut facts = StepOutcome::default();
    live.resumed.store(false, Ordering::Relaxed);
    let before = machine.run_state().await.map_err(to_engine)?;
    let ran = before.running;
    let bitmaps = live.lost_bitmaps(overlaid(step)).await?;
    let switches = served::switches(live, step, context.domain)?;
    let mut cut = Cut::new();
    // 1) Open the overlays and create the draft while the guest runs: neither changes the disks. A crash here
    //    leaves unused nodes and a draft, which `sweep` and `remove_stale` remove.
    let mut opened: Vec<String> = Vec::new();
    let prepared = prepare(live, step, &mut opened).await;
    let disks = match prepared {
        Ok(disks) => disks,
        Err(error) => return Err(close(live, error, &opened).await),
    };
    for disk in disks {
        cut = cut.disk(disk);
    }
    if let Some(memory) = step.memory {
        let draft = draft(&memory.image).await;
        let draft = match draft {
            Ok(draft) => draft,
            Err(error) => return Err(close(live, error, &opened).await),
        };
        let mode = match memory.live {
            true => SaveMode::Live { budget: Duration::from_millis(memory.budget_ms) },
            false => SaveMode::Paused,
        };
        cut = cut.memory(draft, mode);
    }
    // 2) Freeze as late as possible: the guest blocks from here on. A crash leaves it frozen until the next
    //    command thaws it (`clean_up`).
    let frozen = match freeze(live, step, ran, &mut facts).await {
        Ok(frozen) => frozen,
        Err(error) => return Err(close(live, error, &opened).await),
    };
    let stays = matches!(step.then, Some(PowerAfter::Paused | PowerAfter::Off));
    // 3) Last point to cancel: nothing has been cut.
    if context.cancel.is_cancelled() {
        let error = Error::new(ErrorKind::Cancelled, "it was cancelled before the instant");
        return Err(close(live, error, &opened).await);
    }
    // 4) Pause at once if the guest is to stay paused. A frozen guest must run once more, or its agent could
    //    not thaw it.
    let mut paused_before = None;
    if stays && frozen.is_none() {
        if let Err(error) = context.together.meet(Meeting::Ready).await {
            return Err(close(live, error, &opened).await);
        }
        // The section of the revert begins here: its mark records that the guest ran, also where domsnap is
        // killed before the revert begins, and to an undo of the revert.
        let paused = match step.for_revert {
            true => Mark::open_section(machine).await,
            false => machine.pause().await,
        };
        match paused {
            Ok(paused) => paused_before = Some(paused),
            Err(error) => return Err(close(live, to_engine(error), &opened).await),
        }
    }
    let ran = ran && paused_before.as_ref().is_none_or(Paused::is_ours);

    let required = step.quiesce == Quiesce::Require;
    // 5) Runs inside of the cut, with the guest paused: disks served by others are cut here, paths are moved
    //    and made durable. If it fails, the cut undoes its own part; a crash in it is undone from the
    //    journal.
    let hook = async || -> Result<Timestamp, BoxError> {
        let over = frozen.as_ref().is_some_and(|frozen| frozen.left().is_zero());
        if required && over {
            let detail = "the guest had to be thawed before the instant: the limit was over";
            return Err(Error::new(ErrorKind::Refused, detail).advise("raise the limit").into());
        }
        let at = Timestamp::now();
        served::switch(&switches).await?;
        if let Err(error) = context.inside.run(None).await {
            return Err(served::switch_back(&switches, error).await.into());
        }
        // The guest goes on when all guests of the group can.
        let switched = match served::require_switched(&switches) {
            Ok(()) => context.together.meet(Meeting::Cut).await,
            Err(error) => Err(error),
        };
        if let Err(error) = switched {
            let error = match context.inside.back(None).await {
                Ok(()) => error,
                Err(second) => error.state(format!("paths were not moved back: {second}")),
            };
            return Err(served::switch_back(&switches, error).await.into());
        }
        Ok(at)
    };
    let taken = match cut.take_together(machine, context.together, hook).await {
        Ok(taken) => taken,
        Err(error) => {
            let whole = error.state_now().is_none() && !error.is_lost();
            let error = close(live, to_engine(error), &opened).await;
            if whole {
                if let Some(paused) = paused_before {
                    let resumed = machine.resume(paused).await;
                    resumed.map_err(|second| to_engine(second).context(error.to_string()))?;
                }
                close_section(live, step).await?;
                live.resumed.store(true, Ordering::Relaxed);
            }
            return Err(error);
        }
    };
    // A guest that stopped by itself just before the instant, or was stopped by another client, did not run
    // at it.
    let ran = ran && (paused_before.is_some() || step.memory.is_none() || taken.was_running);
    let paused_before = paused_before.is_some();
    if !stays {
        live.resumed.store(true, Ordering::Relaxed);
    }
    *live.saving() = taken.memory.map(|saving| (saving, ran));
    if before.running && !paused_before && !taken.was_running {
        let state = machine.run_state().await.map_err(to_engine)?;
        if state.word == "paused" {
            facts.notes.push(
                "another client of QEMU stopped the guest meanwhile: it stays paused, and was so at the instant"
                    .to_owned(),
            );
        }
    }
    if step.memory.is_some() && !ran {
        let state = machine.run_state().await.map_err(to_engine)?;
        if let Some(remark) = state.remark() {
            let word = state.word;
            facts.notes.push(format!("{remark} (run state {word:?}): a revert restores it paused"));
        }
    }

    // 6) Thaw before any other work: the guest's writers are blocked. Only now is the consistency known.
    let consistency = match frozen {
        Some(frozen) => thawed(frozen, step, &mut facts).await?,
        None if step.memory.is_some() => Consistency::Memory,
        None => Consistency::Crash,
    };
    if stays && !paused_before && ran {
        let _: Paused = machine.pause().await.map_err(to_engine)?;
        facts
            .notes
            .push("the guest ran a moment after the instant, to be thawed, before it was paused".to_owned());
    }
    // 7) The power state that the user asked for comes last, when everything else of the cut is done.
    match step.then {
        Some(PowerAfter::Running) => machine.cont().await.map_err(to_engine)?,
        Some(PowerAfter::Paused | PowerAfter::Off) | None => {}
    }
    if ran && !stays {
        facts.downtime = Some(taken.stopped_for);
    }
    if let Some(why) = taken.why_not.filter(|_| before.running) {
        facts.notes.push(format!("memory was not saved by the best method: {why}"));
    }
    facts.notes.extend(live.lost_options(overlaid(step)));
    facts.notes.extend(bitmaps);
    facts.taken = Some(Taken::new(taken.done, consistency, ran, method_name(taken.method)));
    Ok(facts)
}

/// Returns the disks that get an overlay.
fn overlaid(step: CutStep<'_>) -> impl Iterator<Item = &Target> {
    step.disks
        .iter()
        .filter(|(_, instant)| matches!(instant, DiskInstant::Overlay { .. }))
        .map(|(target, _)| target)
}

fn method_name(method: CutMethod) -> &'static str {
    match method {
        CutMethod::DiskOnly => "disks only",
        CutMethod::BackgroundSnapshot => "background snapshot",
        CutMethod::PreCopy { converged: true } => "pre-copy",
        CutMethod::PreCopy { converged: false } => "pre-copy, with the guest paused when its time was over",
        CutMethod::NonLive => "paused",
    }
}

/// An overlay that is open in QEMU and not used yet.
#[derive(Debug)]
pub(super) struct OpenOverlay {
    address: DiskAddress,
    node: Name,
}

/// Opens the overlays ahead of the cut, which takes most of the cut's time.
pub(super) async fn open_overlays(live: &QemuDomain, step: CutStep<'_>) -> Result<()> {
    let mut opened = Vec::new();
    let cuts = match prepare(live, step, &mut opened).await {
        Ok(cuts) => cuts,
        Err(error) => return Err(close(live, error, &opened).await),
    };
    let overlays = step.disks.iter().filter_map(|(target, instant)| match instant {
        DiskInstant::Overlay { .. } if live.disk_of(target).is_some_and(|disk| disk.server.is_some()) => None,
        DiskInstant::Overlay { address, .. } => Some(address.clone()),
        DiskInstant::Internal { .. } | DiskInstant::ByBackend => None,
    });
    let nodes = cuts.into_iter().filter_map(|cut| match cut {
        DiskCut::Overlay { overlay, .. } => Some(overlay),
        DiskCut::Internal { .. } => None,
    });
    *live.open_overlays() =
        overlays.zip(nodes).map(|(address, node)| OpenOverlay { address, node }).collect();
    Ok(())
}

/// Opens the overlays that are not open yet; returns the cuts of all disks.
async fn prepare(live: &QemuDomain, step: CutStep<'_>, opened: &mut Vec<String>) -> Result<Vec<DiskCut>> {
    let mut cuts = Vec::new();
    let mut overlays = mem::take(&mut *live.open_overlays());
    served::prepare(live, step.disks).await?;
    let graph = live.machine.graph().await.map_err(to_engine)?;
    for (target, instant) in step.disks {
        if *instant == DiskInstant::ByBackend && live.disk_of(target).is_none() {
            // Another server has it: dom0's kernel, if this is the QEMU of a Xen domain.
            continue;
        }
        let disk = live.expect(target)?;
        let open = disk.open_in(&graph);
        if let Some(filter) = &open.filter {
            let detail =
                format!("disk {target} has a {filter} filter on top, under which nothing can be put");
            return Err(Error::new(ErrorKind::Unsupported, detail));
        }
        let Some(root) = open.root().filter(|_| open.placeholder.is_none()) else {
            return Err(Error::new(ErrorKind::Refused, format!("disk {target} is detached")));
        };
        let device = disk.device.clone();
        cuts.push(match instant {
            DiskInstant::ByBackend => continue,
            // The server has opened it, and exchanges the images with the guest paused.
            DiskInstant::Overlay { .. } if disk.server.is_some() => continue,
            DiskInstant::Internal { tag } => DiskCut::Internal { device, tag: tag.clone() },
            DiskInstant::Overlay { address, format } => {
                let overlay = match overlays.iter().position(|overlay| overlay.address == *address) {
                    Some(place) => overlays.swap_remove(place).node,
                    None => {
                        let file = OpenLayer::new(address.clone(), format.clone());
                        let overlay = layer(&file, Name::node(), disk.like(&root.node));
                        graph::add_overlay(&live.machine, &overlay).await.map_err(to_engine)?;
                        overlay.name
                    }
                };
                opened.push(overlay.to_string());
                DiskCut::Overlay { device, overlay }
            }
        });
    }
    Ok(cuts)
}

/// Closes the unused ones of the given overlays, and adds to the error any that are left.
async fn close(live: &QemuDomain, error: Error, opened: &[String]) -> Error {
    let error = match served::forget(live).await {
        Ok(()) => error,
        Err(second) => error.state(format!("overlays may still be open in a server ({second})")),
    };
    match Graph::read(&live.machine).await {
        Ok(graph) => {
            let idle = opened.iter().filter(|name| graph.users(name).next().is_none());
            let idle: Vec<String> = idle.cloned().collect();
            if let Err(second) = remove_layers(&live.machine, &idle).await {
                return error.state(format!("overlays may still be open in QEMU ({second})"));
            }
            error
        }
        Err(second) => error.state(format!("overlays may still be open in QEMU ({second})")),
    }
}

async fn draft(image: &DiskAddress) -> Result<Draft> {
    let file = image.require_path()?.to_owned();
    blocking(move || {
        if let Some(directory) = file.parent() {
            confined_files::Directory::make_all(directory.as_std_path(), 0o700).map_err(|error| {
                crate::Error::io("making the directory of memory images", directory.as_std_path(), error)
            })?;
        }
        Draft::create(file.as_std_path())
    })
    .await
}

/// Freezes the guest's file systems, if the user asked for it.
async fn freeze(
    live: &QemuDomain,
    step: CutStep<'_>,
    ran: bool,
    facts: &mut StepOutcome,
) -> Result<Option<Quiesced>> {
    let why = match (step.quiesce, step.memory, &live.agent, cannot_freeze(live, ran)) {
        (Quiesce::No, ..) => return Ok(None),
        (_, Some(_), ..) => {
            let note = "the file systems were not frozen: memory is saved, with all that they hold";
            facts.notes.push(note.to_owned());
            return Ok(None);
        }
        (.., Some(error)) => error,
        (_, _, None, None) => return Ok(None),
        (_, _, Some(agent), None) => match quiesce::quiesce(&live.machine, agent, step.quiesce_limit).await {
            Ok(frozen) => return Ok(Some(frozen)),
            Err(error) => to_engine(error),
        },
    };
    if step.quiesce == Quiesce::Require {
        return Err(why.context("the snapshot must be quiesced"));
    }
    facts.notes.push(format!("the guest's file systems are not quiesced: {why}"));
    Ok(None)
}

async fn thawed(frozen: Quiesced, step: CutStep<'_>, facts: &mut StepOutcome) -> Result<Consistency> {
    match frozen.thaw().await {
        quiesce::Consistency::Filesystem { .. } => Ok(Consistency::Filesystem),
        quiesce::Consistency::Crash { because } if step.quiesce == Quiesce::Require => {
            Err(Error::new(ErrorKind::Refused, format!("the guest was not frozen to the end: {because}"))
                .context("the snapshot must be quiesced")
                .advise("raise the limit, or take the snapshot without --quiesce"))
        }
        quiesce::Consistency::Crash { because } => {
            facts.notes.push(format!("the guest's file systems are not quiesced: {because}"));
            Ok(Consistency::Crash)
        }
    }
}

/// Undoes the cut, at whatever point it stopped.
///
/// 1. It ends the memory save; a guest that a migration left with inactive disks is resumed first.
/// 2. It undoes disk by disk. If the guest writes to the overlay, the image below it first gets a node of its
///    permanent name: its own node has the configured path, which is the overlay's by now, and the merge
///    would write to that file. Then the overlay is merged down, and at the pivot the path is moved back. If
///    the guest does not write to the overlay, only the path is moved back. Tags are deleted.
/// 3. It resumes the guest, if that ran before the cut, and thaws it.
pub(super) async fn undo(live: &QemuDomain, step: CutStep<'_>, context: DomainContext<'_>) -> Result<()> {
    let machine = &live.machine;
    // 1) End the save first: a migration that ran to its end left the disks inactive, and only a running
    //    guest activates them.
    end_saving(live, step.memory.is_some()).await?;
    let state = machine.run_state().await.map_err(to_engine)?;
    if state.word == "postmigrate" && step.memory.is_some() {
        machine.cont().await.map_err(to_engine)?;
    }
    // 2) Close unused overlays: an overlay that never was put on top must not be found as one.
    sweep(live).await?;
    for (target, instant) in step.disks {
        let taking = |error: Error| error.context(format!("undoing the cut of disk {target}"));
        let Some(disk) = live.disk_of(target) else {
            // No part of it is in QEMU.
            context.inside.run(Some(target)).await.map_err(taking)?;
            continue;
        };
        match instant {
            DiskInstant::Overlay { address, .. } => match &disk.server {
                Some(server) => served::take_off(disk, server, address.path(), context).await,
                None => take_off(disk, address.path(), context).await,
            }
            .map_err(taking)?,
            DiskInstant::Internal { tag } => {
                graph::delete_internal(machine, &disk.device, tag)
                    .await
                    .map_err(to_engine)
                    .map_err(taking)?;
                context.inside.run(Some(target)).await.map_err(taking)?;
            }
            DiskInstant::ByBackend => context.inside.run(Some(target)).await.map_err(taking)?,
        }
    }
    sweep(live).await?;
    // 3) Resume only when all disks are back: from then on the guest writes to them. A guest that had resumed
    //    after the instant and is paused now was stopped by another client.
    if step.running && !live.resumed.load(Ordering::Relaxed) {
        machine.resume_unless_stopped().await.map_err(to_engine)?;
    }
    close_section(live, step).await?;
    if step.quiesce != Quiesce::No {
        live.thaw_all().await;
    }
    Ok(())
}

/// Removes the mark of a cut that a revert was to follow. The guest runs again, or did not run before.
async fn close_section(live: &QemuDomain, step: CutStep<'_>) -> Result<()> {
    match step.for_revert {
        true => Mark::close_section(&live.machine).await.map_err(to_engine),
        false => Ok(()),
    }
}

async fn take_off(disk: &Disk, file: &Utf8Path, context: DomainContext<'_>) -> Result<()> {
    let open = disk.open().await.map_err(to_engine)?;
    let is_it = |layer: &super::disk::QemuLayer| match identity(file.as_std_path()) {
        Some(overlay) => layer.identity == Some(overlay),
        None => layer.file.as_deref() == Some(file.as_std_path()),
    };
    if !open.root().is_some_and(is_it) {
        // A frozen image that still has the configured path as its name would match the overlay's file too.
        // So a match further down proves nothing by itself.
        let by_name = |layer: &super::disk::QemuLayer| layer.file.as_deref() == Some(file.as_std_path());
        if open.layers.iter().skip(1).any(by_name) {
            let detail = format!("another program put an image on top of {file}");
            return Err(Error::new(ErrorKind::Refused, detail)
                .advise("merge that one down first (block-commit), then run `domsnap recover`"));
        }
        return context.inside.run(Some(&disk.target)).await;
    }
    // Reopen by name before the merge: QEMU opens the base for writing by the name that its node has.
    if let Some(chain) = context.chains.iter().find(|chain| chain.target == disk.target) {
        reopen::reopen_by_name(disk, chain).await?;
    }
    let open = disk.open().await.map_err(to_engine)?;
    let overlay = open.root().and_then(|root| root.identity);
    if open.layers.get(1).is_some_and(|below| below.identity == overlay) {
        let detail = format!("the image below {file} is known to QEMU by a name that is the overlay's");
        return Err(
            Error::new(ErrorKind::Corrupt, detail).advise("shut the domain down, then run `domsnap recover`")
        );
    }
    merge::fold_active(disk, &open, context.inside, context.progress).await
}

/// Ends a memory save: ours, or that of a run that crashed.
async fn end_saving(live: &QemuDomain, is_ours: bool) -> Result<()> {
    let saving = live.saving().take();
    if let Some((saving, _)) = saving {
        saving.cancel().await.map_err(to_engine)?;
    }
    if is_ours && migration::is_left(&live.machine).await.map_err(to_engine)? {
        instant::abandon(&live.machine).await.map_err(to_engine)?;
    }
    Ok(())
}

/// Closes our unused nodes.
pub(super) async fn sweep(live: &QemuDomain) -> Result<()> {
    live.open_overlays().clear();
    served::forget(live).await?;
    let ours = jobs::reconcile(&live.machine).await.map_err(to_engine)?;
    jobs::sweep(&live.machine, &ours).await.map_err(to_engine)
}

/// Waits until memory is written, and makes it an image, which is durable when this returns.
pub(super) async fn save_memory(
    live: &QemuDomain,
    file: &Utf8Path,
    tag: &str,
    compress: u8,
    context: DomainContext<'_>,
) -> Result<StepOutcome> {
    let begun = Instant::now();
    let saving = live.saving().take();
    let Some((saving, ran)) = saving else {
        let path = file.to_owned();
        let whole = blocking(move || {
            let image = Stored::open(path.as_std_path())?;
            // A compressed image gets its name before its draft is removed, so a draft may be left.
            Draft::remove_stale(path.as_std_path())?;
            Ok((image.tag().to_owned(), image.length()?, image.full_length()?))
        });
        return match whole.await {
            Ok((found, length, full)) if found == tag => {
                Ok(StepOutcome::default().memory_bytes(Some(length)).memory_full(full))
            }
            _ => {
                let detail = "the memory of the snapshot is lost: the process that wrote it has ended";
                Err(Error::new(ErrorKind::Refused, detail).context(format!("saving memory into {file}")))
            }
        };
    };
    let progress = context.progress;
    let each =
        |now: instant::SaveProgress| progress.bytes(now.written, now.written.saturating_add(now.remaining));
    let draft = saving.wait_unless(context.cancel.cancelled(), each).await.map_err(to_engine)?;
    let tag = tag.to_owned();
    // Metadata for a user who has only the image. If the machine is too long for it, the catalogue still has
    // that.
    let about = |machine| serde_json::to_vec(&MemoryMetadata { running: ran, machine }).unwrap_or_default();
    let mut metadata = about(Some(live.seen.machine.clone()));
    if metadata.len() > LONGEST_METADATA {
        metadata = about(None);
    }
    let mut facts = StepOutcome::default();
    let draft = match compress {
        0 => draft,
        level => match packed(draft, &tag, &metadata, level, context, &mut facts).await? {
            Some(draft) => draft,
            None => {
                tracing::debug!(elapsed = ?begun.elapsed(), "memory is saved, and compressed");
                return Ok(facts);
            }
        },
    };
    let length = blocking(move || draft.seal(&tag, &metadata)?.length()).await?;
    tracing::debug!(elapsed = ?begun.elapsed(), length, "memory is saved");
    Ok(facts.memory_bytes(Some(length)))
}

/// Time between two polls of the compression's progress.
const LOOK: Duration = Duration::from_millis(50);

/// Compresses written memory. If that fails, returns the draft, which is then kept uncompressed.
async fn packed(
    draft: Draft,
    tag: &str,
    metadata: &[u8],
    level: u8,
    context: DomainContext<'_>,
    facts: &mut StepOutcome,
) -> Result<Option<Draft>> {
    let (tag, metadata, total) = (tag.to_owned(), metadata.to_vec(), draft.written().map_err(to_engine)?);
    let packing = Arc::new(Packing::default());
    let theirs = Arc::clone(&packing);
    let mut work = std::pin::pin!(blocking(move || {
        Ok(match draft.pack(&tag, &metadata, level, &theirs) {
            Ok(packed) => Ok((packed.length()?, packed.full_length()?)),
            Err(error) => Err(error),
        })
    }));
    let done = loop {
        match tokio::time::timeout(LOOK, &mut work).await {
            Ok(done) => break done?,
            Err(_) if context.cancel.is_cancelled() => packing.stop(),
            Err(_) => context.progress.bytes(packing.done(), total),
        }
    };
    match done {
        Ok((length, full)) => {
            facts.memory_bytes = Some(length);
            facts.memory_full = Some(full);
            Ok(None)
        }
        Err((error, _)) if error.kind() == crate::ErrorKind::Cancelled => Err(to_engine(error)),
        Err((error, draft)) => {
            facts.notes.push(format!("the memory image is not compressed: {}", to_engine(error)));
            Ok(Some(draft))
        }
    }
}

/// Ends the memory save, and removes its files.
pub(super) async fn forget_memory(live: &QemuDomain, image: &DiskAddress) -> Result<()> {
    end_saving(live, true).await?;
    super::remove_memory(image).await
}
