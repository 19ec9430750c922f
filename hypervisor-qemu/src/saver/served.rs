//! Disks that a server of ours serves to QEMU: the server's part in each step.
//!
//! | step | QEMU's own images | a served disk |
//! |---|---|---|
//! | before a cut | nodes of the overlays are added | the server opens, locks and checks the overlay |
//! | cut | a transaction puts overlays on top | the server goes on in the overlay, before the paths move |
//! | undo of a cut | the overlay is committed | the server merges it down |
//! | detached section | a placeholder replaces the chain | the server closes the chain; the node stays |
//! | merge | a block job | the server merges |
//!
//! The guest is paused, or the server's merge waits, at the same moments. So what is durable before what is
//! the same too. A server that is restarted opens what the configured path names at that moment. Until the
//! guest resumes, both sides of a move of the path show the same; before it resumes, the server is asked
//! whether it serves what the path names by then.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use nbd_server::{ControlInfo, MergeInfo, MergePhase, MergeRequest};
use snapcore::backend::Progress;
use snapcore::hypervisor::{AttachedMerge, DiskInstant, DomainContext, Inside, OpenChain};
use snapcore::{DiskAddress, Domain, Error, ErrorKind, FileIdentity, Result, Target};
use tokio_util::sync::CancellationToken;

use super::{
    cut::CutStep,
    disk::{Disk, identity},
    live::QemuDomain,
};
use crate::server::{DiskServer, files};

/// Time between two looks at a merge.
const LOOK: Duration = Duration::from_millis(20);

/// The overlay of a served disk in a cut.
pub(super) struct Switch<'a> {
    target: &'a Target,
    server: &'a DiskServer,
    from: PathBuf,
    to: PathBuf,
}

/// Returns the part of the servers in a cut. Refuses a server that is not in the state for it. Changes
/// nothing.
pub(super) fn switches<'a>(
    live: &'a QemuDomain,
    step: CutStep<'a>,
    domain: &Domain,
) -> Result<Vec<Switch<'a>>> {
    let mut all = Vec::new();
    for served in overlays(live, step.disks) {
        let ServedOverlay { target, server, address, info } = served?;
        // The permanent name: the configured path names the overlay soon.
        let record = domain.disk(target);
        let directory = record.and_then(|record| record.disk.path().parent());
        let active = record.zip(directory).map(|(record, directory)| directory.join(record.active.as_str()));
        let from = active.map(Utf8PathBuf::into_std_path_buf).unwrap_or_default();
        require_top(target, &info, &from)?;
        all.push(Switch { target, server, from, to: address.path().as_std_path().to_owned() });
    }
    Ok(all)
}

/// Refuses overlays of another format than the server of their disk writes.
pub(super) fn refuse_formats(live: &QemuDomain, disks: &[(Target, DiskInstant)]) -> Result<()> {
    overlays(live, disks).try_for_each(|served| served.map(drop))
}

/// A served disk that gets an overlay, and the state of its server.
struct ServedOverlay<'a> {
    target: &'a Target,
    server: &'a DiskServer,
    address: &'a DiskAddress,
    info: ControlInfo,
}

/// Asks the server of each served disk that gets an overlay. It is refused if it is not in the state for
/// that, or writes another format.
fn overlays<'a>(
    live: &'a QemuDomain,
    disks: &'a [(Target, DiskInstant)],
) -> impl Iterator<Item = Result<ServedOverlay<'a>>> {
    disks.iter().filter_map(|(target, instant)| {
        let DiskInstant::Overlay { address, format } = instant else { return None };
        let disk = live.disk_of(target)?;
        let server = disk.server.as_ref()?;
        Some(require_in_use(disk, server).and_then(|info| match info.format == *format {
            true => Ok(ServedOverlay { target, server, address, info }),
            false => Err(wrong_format(target, &info, format)),
        }))
    })
}

/// Makes the servers open the overlays of a cut ahead of it, so that they only exchange images while the
/// guest is paused. Changes nothing of the disks. An earlier server opens them in the cut.
pub(super) async fn prepare(live: &QemuDomain, disks: &[(Target, DiskInstant)]) -> Result<()> {
    for served in overlays(live, disks) {
        let ServedOverlay { target, server, address, info } = served?;
        // It may be open since the start of a cut of several domains.
        if info.prepares && info.prepared.as_deref() != Some(address.path()) {
            let preparing = |error: Error| error.context(format!("opening the overlay of disk {target}"));
            server.prepare(address.path().as_std_path()).await.map_err(preparing)?;
        }
    }
    Ok(())
}

/// Makes the servers close overlays that are not used: they are locked, and are to be removed.
pub(super) async fn forget(live: &QemuDomain) -> Result<()> {
    for disk in &live.disks {
        let Some(server) = &disk.server else { continue };
        // A server that was restarted has nothing open that it does not serve, and one that is gone neither.
        if server.info().is_ok_and(|info| info.prepared.is_some()) {
            server.forget().await?;
        }
    }
    Ok(())
}

/// Makes the servers go on in the overlays. The guest is paused. A failure switches all back.
pub(super) async fn switch(all: &[Switch<'_>]) -> Result<()> {
    for (number, one) in all.iter().enumerate() {
        if let Err(error) = one.server.swap(&one.to).await {
            let error = error.context(format!("putting an overlay on disk {}", one.target));
            // The last one may have been switched all the same.
            return Err(switch_back(all.get(..=number).unwrap_or_default(), error).await);
        }
    }
    Ok(())
}

/// Makes the servers go on in the previous images: nothing was written to the overlays. Adds a failure to
/// `error`; the undo of the cut then merges the overlay.
pub(super) async fn switch_back(all: &[Switch<'_>], mut error: Error) -> Error {
    for one in all {
        // The server may know the image by the configured path, which may name another one by now.
        if let Err(second) = one.server.swap(&one.from).await {
            error = error.state(format!("disk {} may be served from its overlay: {second}", one.target));
        }
    }
    error
}

/// Refuses to go on if a server does not serve the overlay: it was restarted before the path was moved.
pub(super) fn require_switched(all: &[Switch<'_>]) -> Result<()> {
    all.iter().try_for_each(|one| require_top(one.target, &one.server.info()?, &one.to))
}

/// Refuses a served disk that is detached or only read.
fn require_in_use(disk: &Disk, server: &DiskServer) -> Result<ControlInfo> {
    let info =
        server.info().map_err(|error| error.context(format!("asking the server of disk {}", disk.target)))?;
    let refused = |why: &str| Error::new(ErrorKind::Refused, format!("disk {}: {why}", disk.target));
    match (&info.detached, info.read_only) {
        (Some(_), _) => {
            Err(refused("its server has closed the images, for an operation that was interrupted")
                .advise("run `domsnap recover`"))
        }
        (None, true) => Err(refused("its server serves it read-only")),
        (None, false) => Ok(info),
    }
}

fn wrong_format(target: &Target, info: &ControlInfo, format: &str) -> Error {
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "disk {target}: its server serves format {} and cannot go on in an overlay of format {format}",
            info.format
        ),
    )
    .advise(format!(
        "take a copy of it, if the format has that (--disk {target}=copy), or leave it out with --disk {target}=skip"
    ))
}

fn top(info: &ControlInfo) -> Option<FileIdentity> {
    files(info).first().map(|(_, identity)| *identity)
}

fn require_top(target: &Target, info: &ControlInfo, expected: &Path) -> Result<()> {
    match top(info).is_some_and(|top| identity(expected) == Some(top)) {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the server of disk {target} serves {}, and not {}",
                info.layers.first().map_or("nothing", |layer| layer.file.as_str()),
                expected.display()
            ),
        )
        .advise("restart the server with the disk's configured path, then run `domsnap recover`")),
    }
}

/// Checks before anything begins that a served disk is in the state for a plan.
pub(super) fn preflight(disk: &Disk, server: &DiskServer, chain: &OpenChain, merges: bool) -> Result<()> {
    let info = require_in_use(disk, server)?;
    if merges {
        // It goes on with a merge that an earlier process began.
        return Ok(());
    }
    if let Some(merge) = info.merge.as_ref().filter(|merge| is_active(merge)) {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("layers of disk {} are being merged into {}", disk.target, merge.request.into),
        )
        .advise("wait for the merge, or run `domsnap recover`"));
    }
    match is_served(&info, chain) {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Refused,
            format!("the server of disk {} has other images open than its path names", disk.target),
        )
        .advise("restart the server with the disk's configured path")),
    }
}

/// Returns true if a server has this chain open.
fn is_served(info: &ControlInfo, chain: &OpenChain) -> bool {
    let named = chain.layers.iter().map(|layer| identity(layer.address.path().as_std_path()));
    let open: Vec<Option<FileIdentity>> =
        files(info).into_iter().map(|(_, identity)| Some(identity)).collect();
    !open.is_empty() && open == named.collect::<Vec<_>>()
}

/// Closes the chain of a served disk. The guest is paused.
pub(super) async fn close(disk: &Disk, server: &DiskServer) -> Result<()> {
    // A merge that a stopped process began would go on in the middle of the section.
    server.cancel_merge().await?;
    server.detach(disk.placeholder().as_str()).await
}

/// Opens the chain of a disk whose server has closed it.
pub(super) async fn attach(disk: &Disk, server: &DiskServer, chain: &OpenChain) -> Result<()> {
    let Some(active) = chain.layers.first() else {
        return Err(Error::new(ErrorKind::Internal, format!("disk {} has no layer", disk.target)));
    };
    let active = active.address.path();
    if server.info()?.detached.is_some() {
        server.attach(active.as_std_path()).await?;
    }
    // A server that was restarted meanwhile has opened what the path named then.
    let info = server.info()?;
    if top(&info).is_none_or(|top| identity(active.as_std_path()) != Some(top)) {
        server.swap(active.as_std_path()).await?;
    }
    let info = server.info()?;
    match is_served(&info, chain) {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::Refused,
            format!("the server of disk {} has another chain open than the one of {active}", disk.target),
        )
        .advise("restart the server with the disk's configured path, then run `domsnap recover`")),
    }
}

/// Undoes the cut of a served disk: merges its overlay down if the server is in that. The path is moved back
/// at the pivot.
pub(super) async fn take_off(
    disk: &Disk,
    server: &DiskServer,
    overlay: &Utf8Path,
    context: DomainContext<'_>,
) -> Result<()> {
    let info = require_in_use(disk, server)?;
    let open = files(&info);
    let wanted = identity(overlay.as_std_path());
    let place = open.iter().position(|(_, identity)| wanted == Some(*identity));
    let below = match place {
        // It was not switched, or was merged before; the path may have been moved.
        None => return context.inside.run(Some(&disk.target)).await,
        Some(0) => open.get(1).map(|(file, _)| file.clone()),
        Some(_) => {
            let detail = format!("the server of disk {} serves an image on top of {overlay}", disk.target);
            return Err(Error::new(ErrorKind::Refused, detail)
                .advise("restart the server with the disk's configured path, then run `domsnap recover`"));
        }
    };
    let below = below.and_then(|below| Utf8PathBuf::from_path_buf(below).ok()).ok_or_else(|| {
        let detail = format!("the overlay {overlay} of disk {} has no backing file", disk.target);
        Error::new(ErrorKind::Corrupt, detail)
    })?;
    let request = MergeRequest { run: vec![below.clone(), overlay.to_owned()], into: below };
    let never = CancellationToken::new();
    carry_out(disk, server, &request, Some(&disk.target), context.inside, context.progress, &never).await
}

/// Merges layers of a served chain, or does what is left of that.
pub(super) async fn merge(
    disk: &Disk,
    server: &DiskServer,
    merge: &AttachedMerge,
    inside: &dyn Inside,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<()> {
    let file = |layer: &DiskAddress| layer.require_path().map(Utf8Path::to_owned);
    let run = merge.run.iter().map(file).collect::<Result<_>>()?;
    let request = MergeRequest { run, into: file(&merge.into)? };
    let shown = |layer: &DiskAddress| layer.name().to_owned();
    let run: Vec<String> = merge.run.iter().map(shown).collect();
    carry_out(disk, server, &request, None, inside, progress, cancel).await.map_err(|error| {
        let into = shown(&merge.into);
        error.context(format!("merging {} of disk {} into {into}", run.join(", "), disk.target))
    })
}

fn is_active(merge: &MergeInfo) -> bool {
    matches!(merge.phase, MergePhase::Moving | MergePhase::Ready)
}

async fn carry_out(
    disk: &Disk,
    server: &DiskServer,
    request: &MergeRequest,
    only: Option<&Target>,
    inside: &dyn Inside,
    progress: &dyn Progress,
    cancel: &CancellationToken,
) -> Result<()> {
    let info = require_in_use(disk, server)?;
    let is_ours = |info: &ControlInfo| {
        info.merge.as_ref().is_some_and(|merge| is_active(merge) && merge.request == *request)
    };
    // 1) Go on with a merge that a process began which has stopped. Otherwise look what is open: the server
    //    may have done it, and only the record of that is missing.
    let mut limits = disk.speed.clone();
    if is_ours(&info) {
        // It has the limit of the process that began it.
        limits.mark_changed();
    } else {
        let open: Vec<FileIdentity> = files(&info).into_iter().map(|(_, identity)| identity).collect();
        let is_open = |file: &Utf8Path| identity(file.as_std_path()).is_some_and(|file| open.contains(&file));
        let left = request.run.iter().any(|file| *file != request.into && is_open(file));
        if !left {
            if !is_open(&request.into) {
                let detail = "none of its layers is in the chain that the server has open";
                return Err(Error::new(ErrorKind::Refused, detail));
            }
            // The hook is idempotent: a crash may have come between the pivot and its record.
            return inside.run(only).await;
        }
        if cancel.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, "it was cancelled"));
        }
        let rate = *limits.borrow_and_update();
        server.begin_merge(request, rate).await?;
    }
    loop {
        let info = server.info()?;
        let Some(merge) = info.merge.filter(|merge| merge.request == *request) else {
            let detail = "the server was restarted in the middle of the merge";
            return Err(
                Error::new(ErrorKind::Io, detail).advise("run `domsnap recover`, which repeats the merge")
            );
        };
        progress.bytes(merge.done, merge.total.max(merge.done));
        match merge.phase {
            MergePhase::Done => return Ok(()),
            MergePhase::Ready => break,
            MergePhase::Moving => {}
            _ => {
                let why = merge.error.unwrap_or_else(|| "the server gives no reason".to_owned());
                let error = Error::new(ErrorKind::Io, why);
                return Err(match merge.advice {
                    Some(advice) => error.advise(advice),
                    None => error,
                });
            }
        }
        if limits.has_changed().unwrap_or(false) {
            let rate = *limits.borrow_and_update();
            if let Err(error) = server.limit_merge(rate).await {
                tracing::debug!(%error, "a merge was not limited");
            }
        }
        if cancel.is_cancelled() {
            server.cancel_merge().await?;
            // It may have ended just before.
            match server.info()?.merge {
                Some(merge) if merge.request == *request && merge.phase == MergePhase::Done => return Ok(()),
                _ => return Err(Error::new(ErrorKind::Cancelled, "it was cancelled")),
            }
        }
        tokio::time::sleep(LOOK).await;
    }
    // 2) Both images show the same, and each write goes to both. So the path may name either of them,
    //    whatever stops now.
    inside.run(only).await?;
    // 3) From here on the merge cannot be cancelled.
    let Err(error) = server.pivot().await else { return Ok(()) };
    // The server still writes to both, so the path can be moved back.
    let goes_on = server.info().is_ok_and(|info| is_ours(&info));
    match goes_on {
        true => match inside.back(only).await {
            Ok(()) => {
                let _ = server.cancel_merge().await;
                Err(error)
            }
            Err(second) => Err(error.state(format!("the configured path could not be given back: {second}"))),
        },
        false => Err(error),
    }
}
