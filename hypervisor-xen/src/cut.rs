//! The cut of a snapshot: memory, and all disks, while the guest is paused.
//!
//! With memory: `xl save -p` writes memory and leaves the guest paused, so it executes nothing after that;
//! the disks are cut; `xl unpause`. Without: `xl pause`, cut, `xl unpause`. Overlays are opened before. After
//! any failure, a guest that ran is resumed.

use std::time::{Duration, Instant};

use camino::Utf8PathBuf;
use jiff::Timestamp;
use snapcore::hypervisor::{
    DiskInstant, DomainContext, DomainStep, MemoryPlan, PowerAfter, Quiesce, StepOutcome, Taken,
};
use snapcore::{Consistency, Error, ErrorKind, Result, Target};

use crate::{
    list::{self, Row},
    live::XenDomain,
    memory,
    saver::blocking,
    users,
    xl::{SOON, Xl, failed, micros},
};

/// Time limit for a save: this constant, and a second for each `SLOWEST_MIB`.
const SAVING: Duration = Duration::from_secs(300);
const SLOWEST_MIB: u64 = 10;

/// Time limit for an `xl save` whose domsnap was killed.
const ORPHAN: Duration = Duration::from_secs(600);

const LOOK: Duration = Duration::from_millis(100);

/// The cut, as its step describes it.
pub(crate) struct CutStep<'a> {
    pub(crate) disks: &'a [(Target, DiskInstant)],
    pub(crate) running: bool,
    pub(crate) memory: Option<&'a MemoryPlan>,
    pub(crate) quiesce: Quiesce,
    pub(crate) then: Option<PowerAfter>,
}

/// Refuses a cut that is not possible for this domain now.
pub(crate) fn refuse(step: &CutStep<'_>, row: &Row) -> Result<()> {
    refuse_suspended(row)?;
    if step.quiesce == Quiesce::Require {
        return Err(Error::new(
            ErrorKind::Unsupported,
            "Xen has no guest agent that could freeze file systems",
        )
        .context("the snapshot must be quiesced")
        .state("no changes made")
        .advise(
            "take it with memory, which has all that the guest has not written yet; or without --quiesce",
        ));
    }
    if step.memory.is_some() && row.flags.paused {
        return Err(Error::new(
            ErrorKind::Refused,
            "the guest is paused, and Xen saves only a guest that runs: it must answer",
        )
        .state("no changes made")
        .advise("unpause it (`xl unpause`), or take its disks alone with --disk-only"));
    }
    Ok(())
}

pub(crate) async fn take(
    live: &XenDomain,
    step: CutStep<'_>,
    context: DomainContext<'_>,
) -> Result<StepOutcome> {
    let mut facts = StepOutcome::default();
    let row = live.row().await?;
    refuse(&step, &row)?;
    let ran = !row.flags.paused;
    // A disk that was attached since the plan was made would be missing without a message.
    live.refuse_other_storage(row.domid).await?;
    if step.quiesce == Quiesce::Try && step.memory.is_none() {
        facts.notes.push(
            "the guest's file systems are not quiesced: Xen has no guest agent that could freeze them"
                .to_owned(),
        );
    }
    if context.cancel.is_cancelled() {
        return Err(Error::new(ErrorKind::Cancelled, "it was cancelled before the instant"));
    }
    // 1) Open the overlays while the guest runs: nothing is cut yet.
    if let Some(qemu) = live.qemu().await {
        qemu.prepare(&disks_alone(&step)).await?;
    }
    let since = Instant::now();
    tracing::debug!("the pause begins");
    // 2) Pause, by the save itself or by `xl pause`. A crash here leaves a paused guest, and perhaps a part
    //    of a save file: undo waits for the save, wakes the guest and removes the file.
    let method = match step.memory {
        Some(memory) => {
            save(live, memory).await?;
            "saved while the guest was paused"
        }
        None => {
            // Xen counts pauses: a second one would outlast the user's `xl unpause`.
            if ran {
                live.xl.must(&["pause", &live.name], SOON).await?;
            }
            "disks only, the guest paused"
        }
    };
    let stays = matches!(step.then, Some(PowerAfter::Paused | PowerAfter::Off)) || !ran;
    let at = Timestamp::now();
    // 3) Cut the disks before the guest runs: it has executed nothing since its memory was saved.
    if let Err(error) = cut(live, &step, context).await {
        if let Some(memory) = step.memory {
            memory::remove_file(&memory::part_of(memory.image.require_path()?))?;
        }
        return Err(match ran {
            true => resume_after(live, error).await,
            false => error,
        });
    }
    // 4) Resume only when all disks are cut and the paths are moved.
    if !stays || step.then == Some(PowerAfter::Running) {
        live.unpause().await?;
        facts.downtime = Some(since.elapsed());
        tracing::debug!(took_us = micros(since), "the pause ends");
    }
    if let Some(memory) = step.memory {
        if memory.live {
            facts.notes.push("Xen saves memory only while the guest is paused: it was not live".to_owned());
        }
        *live.saved_running.lock().await = Some(ran);
    }
    let consistency = if step.memory.is_some() { Consistency::Memory } else { Consistency::Crash };
    facts.taken = Some(Taken::new(at, consistency, ran, method));
    Ok(facts)
}

async fn save(live: &XenDomain, plan: &MemoryPlan) -> Result<()> {
    let file = plan.image.require_path()?.to_owned();
    let part = blocking(move || {
        if let Some(directory) = file.parent() {
            confined_files::Directory::make_all(directory.as_std_path(), 0o700).map_err(|cause| {
                Error::new(ErrorKind::Io, format!("the directory {directory} cannot be made")).because(cause)
            })?;
        }
        memory::draft(&file)
    })
    .await?;
    save_to(live, &part).await
}

/// Saves memory into an existing file; the guest is paused afterwards. After an error it is resumed, and the
/// file is removed.
pub(crate) async fn save_to(live: &XenDomain, file: &Utf8PathBuf) -> Result<()> {
    let args = ["save", "-p", live.name.as_str(), file.as_str()];
    let error = match live.xl.run(&args, saving(live).await).await {
        Ok(said) if said.ok => return Ok(()),
        Ok(said) => failed(&args, &said),
        Err(error) => error,
    };
    memory::remove_file(file)?;
    Err(resume_after(live, error.context("saving the guest's memory")).await)
}

/// Returns the time limit for a save.
async fn saving(live: &XenDomain) -> Duration {
    SAVING + Duration::from_secs(live.memory_mib().await / SLOWEST_MIB)
}

/// Resumes a guest after a failure.
async fn resume_after(live: &XenDomain, error: Error) -> Error {
    if let Err(second) = wake(live).await {
        return error.state(format!("it is not known if the guest runs, see `xl list`: {second}"));
    }
    let Ok(Some(row)) = list::row_of(&live.xl, &live.name).await else {
        return error.state("it is not known if the guest runs: see `xl list`");
    };
    if !row.flags.paused {
        return error;
    }
    match live.unpause().await {
        Ok(()) => error,
        Err(second) => error.state(format!("the guest is paused, and could not be resumed: {second}")),
    }
}

/// Cuts all disks. Those of QEMU are cut in one transaction. Inside of it the steps of the other disks run,
/// and the paths are moved.
async fn cut(live: &XenDomain, step: &CutStep<'_>, context: DomainContext<'_>) -> Result<()> {
    match live.qemu().await {
        Some(qemu) => qemu.apply(&disks_alone(step), context).await.map(drop),
        None => context.inside.run(None).await,
    }
}

/// Makes the step with which the disks' QEMU is asked for the cut.
pub(crate) fn disks_alone(step: &CutStep<'_>) -> DomainStep {
    DomainStep::Instant {
        disks: step.disks.to_vec(),
        running: true,
        memory: None,
        quiesce: Quiesce::No,
        quiesce_limit_ms: 0,
        then: None,
        for_revert: false,
    }
}

/// Undoes the cut, at whatever point it stopped: waits for an `xl save` that still runs, undoes the disks,
/// resumes the guest.
pub(crate) async fn undo(live: &XenDomain, step: CutStep<'_>, context: DomainContext<'_>) -> Result<()> {
    // 1) Wait for the save, then wake the guest: a killed save left it suspended. 2) Only then remove the
    //    file, which `xl` had open.
    if let Some(memory) = step.memory {
        let part = memory::part_of(memory.image.require_path()?);
        await_save(part.as_str()).await?;
        wake(live).await?;
        memory::remove_file(&part)?;
    }
    match live.qemu().await {
        Some(qemu) => qemu.undo(&disks_alone(&step), context).await?,
        None => context.inside.run(None).await?,
    }
    // 3) Resume when all disks are back: from then on the guest writes to them.
    if step.running && live.row().await?.flags.paused {
        live.unpause().await?;
    }
    Ok(())
}

/// Waits for an `xl` that saves into this file and outlived its caller. Ending it would leave the guest
/// suspended.
pub(crate) async fn await_save(file: &str) -> Result<()> {
    let until = Instant::now() + ORPHAN;
    while users::is_being_saved(file) {
        if Instant::now() > until {
            return Err(Error::new(ErrorKind::Busy, format!("an `xl save` still writes {file}"))
                .advise("look whether it makes progress; then run `domsnap recover`"));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

/// Returns true if a domain was suspended for a save, and no process saves it any more: its `xl save` was
/// killed.
pub(crate) async fn is_left_suspended(xl: &Xl, row: &Row) -> Result<bool> {
    Ok(users::save_of(&row.name, row.domid).is_none() && list::is_suspended(xl, row).await?)
}

/// Refuses a guest that a killed `xl save` left suspended: `recover` wakes it, and nothing else is done with
/// it.
pub(crate) fn refuse_suspended(row: &Row) -> Result<()> {
    match row.flags.shut {
        false => Ok(()),
        true => Err(list::busy(&row.name, "suspended, and no `xl save` of it runs: it was killed")
            .advise("if `domsnap recover` knows of no operation, wake it: `xl save -p DOMAIN /dev/null`, `xl unpause DOMAIN`")),
    }
}

/// Wakes a guest that a killed `xl save` left suspended; it is paused then, as after any save. Only a
/// complete save wakes it; the data is discarded.
pub(crate) async fn wake(live: &XenDomain) -> Result<()> {
    let row = live.row().await?;
    if !is_left_suspended(&live.xl, &row).await? {
        return Ok(());
    }
    let args = ["save", "-p", live.name.as_str(), "/dev/null"];
    live.xl.must(&args, saving(live).await).await.map(drop).map_err(|error| {
        error.context("waking the guest, which a killed `xl save` left suspended").advise(
            "all its memory is there yet: `xl list` shows it, do not destroy it; run `domsnap recover` again",
        )
    })
}
