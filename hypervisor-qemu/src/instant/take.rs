//! [`Cut::take`]: performs the cut.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use qmp::{Events, Notice};
use serde_json::{Value, json};
use snapcore::hypervisor::{Meeting, Rendezvous};
use tokio::time::{sleep, timeout};

use super::{
    clock::Clock,
    disks::{DiskCut, Disks},
    saving::Saving,
};
use crate::{
    error::{BoxError, Error, ErrorKind, Result},
    machine::{Machine, Paused},
    memory::{self, Draft},
    migration::{self, Form, Settings, Writing},
    run_state::{RunState, SaveBy},
};

/// Time between two polls of a migration while the guest is paused.
const LOOK: Duration = Duration::from_micros(500);

/// Time limit for the first page, and for a migration that has paused the guest.
const PATIENCE: Duration = Duration::from_secs(60);

/// Time limit for each step of an undo, for a QEMU that did not answer before.
const HANGS: Duration = Duration::from_secs(5);

/// State of the guest while its memory is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum SaveMode {
    /// It runs. With pre-copy, the guest is paused after the budget if it dirties memory faster than that is
    /// written.
    Live {
        /// Longest time of pre-copy before the guest is paused.
        budget: Duration,
    },
    /// It is paused until its memory is written.
    Paused,
}

/// Method by which the cut was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum CutMethod {
    /// No memory.
    DiskOnly,
    /// Memory was write-protected, and is written while the guest runs.
    BackgroundSnapshot,
    /// Memory was written while the guest ran, and again where the guest dirtied it, until little was left.
    PreCopy {
        /// True if little was left within the budget; otherwise the guest was paused for the rest.
        converged: bool,
    },
    /// The guest was paused until its memory was written.
    NonLive,
}

/// A cut that is to be made.
#[derive(Debug, Default)]
#[must_use = "nothing is done until `take`"]
pub struct Cut {
    disks: Vec<DiskCut>,
    memory: Option<(Draft, SaveMode)>,
    avoid_background: bool,
    trust_marks: bool,
}

/// A cut that was made.
#[derive(Debug)]
#[non_exhaustive]
pub struct CutOutcome<T> {
    /// The method that was used.
    pub method: CutMethod,
    /// The reason why a better method was not used.
    pub why_not: Option<String>,
    /// Time from STOP to RESUME. Zero if the guest was paused before, and still is.
    pub stopped_for: Duration,
    /// True if the guest ran at the instant, and runs again.
    pub was_running: bool,
    /// The memory; still being written if the method is [`CutMethod::BackgroundSnapshot`].
    pub memory: Option<Saving>,
    /// The result of `while_paused`.
    pub done: T,
}

impl Cut {
    /// Makes a cut of nothing.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a disk.
    pub fn disk(mut self, disk: DiskCut) -> Self {
        self.disks.push(disk);
        self
    }

    /// Adds the memory.
    pub fn memory(mut self, draft: Draft, live: SaveMode) -> Self {
        self.memory = Some((draft, live));
        self
    }

    /// Never uses a background snapshot, even if it would be possible.
    pub fn without_background_snapshot(mut self) -> Self {
        self.avoid_background = true;
        self
    }

    /// Uses pre-copy even with a QEMU that loses writes in it ([`Abilities::emulation_marks_writes`][holds]).
    /// This is for tests of pre-copy without KVM, not for memory that is to be used.
    ///
    /// [holds]: crate::discover::Abilities::emulation_marks_writes
    pub fn trusting_pre_copy(mut self) -> Self {
        self.trust_marks = true;
        self
    }

    /// Cuts, and resumes the guest (only if it ran).
    ///
    /// `while_paused` runs when everything is of one instant and the guest is paused. It does all that must
    /// be done before the guest writes again: it moves configured paths and makes that durable. If it fails,
    /// it must have undone its changes.
    ///
    /// Drive this future to its end: dropping it between the pause and the resume leaves the guest paused.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`]: no changes made, overlays stay open. [`ErrorKind::Refused`],
    /// [`ErrorKind::Failed`], [`ErrorKind::Hook`]: the disks are as before and the overlays' nodes are
    /// closed. The migration is cancelled, its settings are restored, and the guest runs if it ran.
    /// [`Error::state_now`] names any part of this that failed. [`ErrorKind::Lost`], [`ErrorKind::Timeout`]:
    /// the same is tried, and steps that QEMU did not answer are undetermined.
    pub async fn take<T, F>(
        self,
        machine: &Machine,
        while_paused: impl FnOnce() -> F,
    ) -> Result<CutOutcome<T>>
    where
        F: Future<Output = std::result::Result<T, BoxError>>,
    {
        self.take_together(machine, &(), while_paused).await
    }

    /// Like [`Cut::take`], at one instant with the machines of other domains. It meets them before the pause
    /// and after it. The third meeting, before the guest is resumed, is the caller's in `while_paused`.
    ///
    /// A guest that a pre-copy has paused waits for the others: it meets them twice then.
    pub(crate) async fn take_together<T, F>(
        self,
        machine: &Machine,
        together: &dyn Rendezvous,
        while_paused: impl FnOnce() -> F,
    ) -> Result<CutOutcome<T>>
    where
        F: Future<Output = std::result::Result<T, BoxError>>,
    {
        let Self { disks, memory, avoid_background, trust_marks } = self;
        let disks = Disks::find(machine, disks).await?;
        let state = machine.run_state().await?;
        let permits = machine.permits(&state).await?;
        let attempted = "preparing the cut";
        permits.disks.map_err(|refusal| machine.refused(attempted, &state, refusal))?;
        let Some((draft, live)) = memory else {
            return paused_cut(machine, disks, Course::DiskOnly, together, while_paused).await;
        };
        let running = state.running;
        let save_by = permits.memory.map_err(|refusal| machine.refused(attempted, &state, refusal))?;
        // Saving a paused guest's memory by a plain migration would leave it `postmigrate`, from which
        // nothing leads back to `paused`.
        let holds = machine.abilities().await?.background_snapshot_holds;
        let background = match (save_by, avoid_background, holds) {
            (SaveBy::SnapshotSave, ..) => Err(unsupported(machine, &only_snapshot_save(&state))),
            (_, false, true) => Settings::apply(machine, Form::Background).await,
            (_, true, _) => Err(unsupported(machine, "a background snapshot is not wanted")),
            (_, false, false) => Err(unsupported(
                machine,
                "a background snapshot of this QEMU's resumes the guest by itself, and leaves it hanging where it fails",
            )),
        };
        let why_not = match (background, live) {
            (Ok(settings), live) => {
                let method = match live {
                    SaveMode::Live { .. } => CutMethod::BackgroundSnapshot,
                    SaveMode::Paused => CutMethod::NonLive,
                };
                let course =
                    Course::Memory { draft, settings, form: Form::Background, method, why_not: None };
                return paused_cut(machine, disks, course, together, while_paused).await;
            }
            (Err(error), _) => match error.kind() {
                ErrorKind::Refused | ErrorKind::Unsupported => error,
                _ => return Err(error),
            },
        };
        let mut why_not = why_not.to_string();
        let live = match live {
            SaveMode::Live { .. } if running && !trust_marks && !machine.marks_writes().await? => {
                why_not.push_str(
                    "; and while the guest runs, this QEMU would lose writes of it, for want of KVM",
                );
                SaveMode::Paused
            }
            live => live,
        };
        let why_not = Some(why_not);
        match live {
            _ if !running => {
                let settings = Settings::apply(machine, Form::Plain).await?;
                let course = Course::Saved { draft, settings, why_not };
                paused_cut(machine, disks, course, together, while_paused).await
            }
            SaveMode::Paused => {
                let settings = Settings::apply(machine, Form::Plain).await?;
                let course = Course::Memory {
                    draft,
                    settings,
                    form: Form::Plain,
                    method: CutMethod::NonLive,
                    why_not,
                };
                paused_cut(machine, disks, course, together, while_paused).await
            }
            SaveMode::Live { budget } => {
                let settings = Settings::apply(machine, Form::PreCopy).await?;
                let copied = copy(machine, &disks, &draft, settings, budget).await?;
                let Some((writing, ended)) = copied else {
                    // A migration to its end would leave it `postmigrate`.
                    let settings = Settings::apply(machine, Form::Plain).await?;
                    let course = Course::Saved { draft, settings, why_not };
                    return paused_cut(machine, disks, course, together, while_paused).await;
                };
                let copied = (writing, ended);
                switch_over(machine, disks, draft, copied, why_not, together, while_paused).await
            }
        }
    }
}

fn only_snapshot_save(state: &RunState) -> String {
    format!("QEMU cannot write memory beside a guest in the run state {:?}", state.word)
}

fn unsupported(machine: &Machine, detail: &str) -> Error {
    let subject = machine.qmp().socket().display();
    Error::new(ErrorKind::Unsupported, "preparing to save memory", subject, detail)
}

/// The course of a cut that begins with a pause.
enum Course {
    DiskOnly,
    Memory {
        draft: Draft,
        settings: Settings,
        form: Form,
        method: CutMethod,
        why_not: Option<String>,
    },
    /// Uses `snapshot-save`, for a guest that is paused already.
    Saved {
        draft: Draft,
        settings: Settings,
        why_not: Option<String>,
    },
}

/// The part of a cut that must be undone, as far as it has come.
struct Undo<'a> {
    machine: &'a Machine,
    disks: &'a Disks,
    settings: Option<Settings>,
    writing: Option<Writing>,
    paused: Option<Paused>,
    /// True if a plain migration has made the disks inactive: they cannot be changed before the guest runs.
    inactive: bool,
}

impl Undo<'_> {
    /// Replaces the applied settings by those of another form.
    async fn settings_for(&mut self, form: Form) -> Result<()> {
        if let Some(settings) = self.settings.take() {
            settings.restore(self.machine).await?;
        }
        self.settings = Some(Settings::apply(self.machine, form).await?);
        Ok(())
    }

    async fn all(self, mut error: Error) -> Error {
        if error.is_lost() {
            return error;
        }
        // 1) A QEMU that timed out once gets less time for each further step.
        let hangs = error.kind() == ErrorKind::Timeout;
        let machine = if hangs { self.machine.within(HANGS) } else { self.machine.clone() };
        // 2) End the migration before anything else: QEMU accepts the old settings only when it has ended.
        if let Some(writing) = self.writing {
            if let Err(second) = writing.cancel(&machine).await {
                error = error.state(second.to_string());
            }
        } else if let Some(settings) = self.settings
            && let Err(second) = settings.restore(&machine).await
        {
            error = error.state(second.to_string());
        }
        // 3) Undo the disks before the guest resumes: until then it has written nothing to the overlays, so
        //    the merge moves no data. If a plain migration has made the disks inactive, QEMU refuses this
        //    until the guest runs, so it follows the resume.
        if !self.inactive
            && let Err(wrong) = self.disks.undo(&machine).await
        {
            error = error.state(wrong);
        }
        if let Some(paused) = self.paused
            && let Err(second) = machine.resume(paused).await
        {
            error = error.state(second.to_string());
        }
        if self.inactive
            && let Err(wrong) = self.disks.undo(&machine).await
        {
            error = error.state(wrong);
        }
        error
    }
}

async fn paused_cut<T, F>(
    machine: &Machine,
    disks: Disks,
    course: Course,
    together: &dyn Rendezvous,
    while_paused: impl FnOnce() -> F,
) -> Result<CutOutcome<T>>
where
    F: Future<Output = std::result::Result<T, BoxError>>,
{
    let mut by_snapshot = matches!(course, Course::Saved { .. });
    let (memory, form, mut method, mut why_not) = match course {
        Course::DiskOnly => (None, Form::Plain, CutMethod::DiskOnly, None),
        Course::Saved { draft, settings, why_not } => {
            (Some((draft, settings)), Form::Plain, CutMethod::NonLive, why_not)
        }
        Course::Memory { draft, settings, form, method, why_not } => {
            (Some((draft, settings)), form, method, why_not)
        }
    };
    let (draft, settings) = match memory {
        Some((draft, settings)) => (Some(draft), Some(settings)),
        None => (None, None),
    };
    let mut undo = Undo { machine, disks: &disks, settings, writing: None, paused: None, inactive: false };
    let mut clock = Clock::start(machine);
    // 1) Pause: from here until the transaction nothing may change the disks. The guests of a group are
    //    paused when all of them can be, and none is cut before all are paused.
    if let Err(error) = meet(machine, together, Meeting::Ready).await {
        return Err(undo.all(error).await);
    }
    clock.since = Some(Instant::now());
    match machine.pause().await {
        Ok(paused) => undo.paused = Some(paused),
        Err(error) => return Err(undo.all(error).await),
    }
    let was_running = undo.paused.as_ref().is_some_and(Paused::is_ours);
    let mut events = machine.qmp().events();
    // The wait may be long: from before it on, a resume by another client is noticed.
    if let Err(error) = meet(machine, together, Meeting::Paused).await {
        return Err(undo.all(error).await);
    }
    if draft.is_some() && !was_running && !by_snapshot {
        // The state differs from the one planned for: the guest may have panicked, or switched itself off,
        // just before it was stopped.
        let state = match machine.run_state().await {
            Ok(state) => state,
            Err(error) => return Err(undo.all(error).await),
        };
        // A migration to its end would leave one that another client has paused `postmigrate`.
        if state.word != "paused" || form == Form::Plain {
            (by_snapshot, method) = (true, CutMethod::NonLive);
            why_not = Some(only_snapshot_save(&state));
            if let Err(error) = undo.settings_for(Form::Plain).await {
                return Err(undo.all(error).await);
            }
        }
    }
    // 2) Cut the disks while the guest is paused: this transaction is the instant.
    if let Err(error) = disks.cut(machine).await {
        return Err(undo.all(error).await);
    }
    // 3) Save the memory of the same instant, or wait until QEMU has its devices' state and has
    //    write-protected its pages. An earlier resume would mix later memory with the disks of the instant.
    if let (true, Some(draft)) = (by_snapshot, &draft) {
        if let Err(error) = memory::save(machine, draft).await {
            return Err(undo.all(error).await);
        }
    } else if let Some((draft, settings)) = draft.as_ref().zip(undo.settings.take()) {
        match Writing::start(machine, draft, settings).await {
            Ok(writing) => undo.writing = Some(writing),
            Err((error, settings)) => {
                undo.settings = Some(settings);
                return Err(undo.all(error).await);
            }
        }
        let to_the_end = method == CutMethod::NonLive;
        let written = wait_while_paused(machine, draft, to_the_end).await;
        undo.inactive = form == Form::Plain;
        if let Err(error) = written {
            return Err(undo.all(error).await);
        }
    }
    if let Err(error) = require_stayed_paused(machine, &mut events).await {
        return Err(undo.all(error).await);
    }
    // 4) The caller makes the cut durable (configured paths, journal) before the guest can write to the
    //    overlays. A crash before this leaves overlays that the journal does not commit: undo merges them
    //    back.
    let done = match while_paused().await {
        Ok(done) => done,
        Err(error) => {
            let subject = machine.qmp().socket().display();
            let error = Error::hook("the cut", subject, error);
            return Err(undo.all(error).await);
        }
    };
    let Undo { paused, writing, settings, .. } = undo;
    if let Some(settings) = settings {
        let restored = settings.restore(machine).await;
        restored.map_err(|error| error.state("the cut and its nested steps are complete"))?;
    }
    // 5) Resume: from here the cut cannot be undone without losing writes of the guest.
    if let Some(paused) = paused {
        machine
            .resume(paused)
            .await
            .map_err(|error| error.state("the cut and its nested steps are complete"))?;
    }
    let stopped_for = if was_running { clock.stopped_for().await } else { Duration::ZERO };
    let memory = draft.map(|draft| Saving { machine: machine.clone(), draft, writing });
    Ok(CutOutcome { method, why_not, stopped_for, was_running, memory, done })
}

/// Waits for the other domains of a group.
async fn meet(machine: &Machine, together: &dyn Rendezvous, meeting: Meeting) -> Result<()> {
    together.meet(meeting).await.map_err(|error| {
        let subject = machine.qmp().socket().display();
        Error::hook("waiting for the other domains of the group", subject, Box::new(error))
    })
}

/// Fails if another client has resumed the guest since the events are listened to: memory and disks are not
/// of one instant then.
async fn require_stayed_paused(machine: &Machine, events: &mut Events) -> Result<()> {
    while let Ok(Ok(notice)) = timeout(Duration::ZERO, events.next()).await {
        if matches!(notice, Notice::Event(event) if event.name == "RESUME") {
            let detail = "another client of QEMU resumed the guest in the middle of it";
            let subject = machine.qmp().socket().display();
            let error = Error::new(ErrorKind::Invalid, "keeping the guest paused", subject, detail);
            return Err(error.advise("take the snapshot again when no other client resumes the guest"));
        }
    }
    Ok(())
}

/// Waits until the first page is written, or all of them.
async fn wait_while_paused(machine: &Machine, draft: &Draft, to_the_end: bool) -> Result<()> {
    let attempted = "saving memory";
    let subject = draft.path().display().to_string();
    let (mut pages, mut moved) = (0, Instant::now());
    loop {
        let now = migration::status(machine).await?;
        now.check(attempted, &subject)?;
        if now.completed() || (!to_the_end && now.pages > 0) {
            return Ok(());
        }
        if now.pages != pages {
            (pages, moved) = (now.pages, Instant::now());
        }
        if moved.elapsed() > PATIENCE {
            let detail = format!("no page was written for {} s", PATIENCE.as_secs());
            return Err(Error::new(ErrorKind::Timeout, attempted, subject, detail));
        }
        sleep(LOOK).await;
    }
}

/// Returns true if another client has stopped the guest. Fails if the guest stopped by itself while its
/// memory was copied: the end of the migration would let it run.
async fn is_stopped_by_another(machine: &Machine, attempted: &str) -> Result<bool> {
    let state = machine.run_state().await?;
    if !state.stopped_by_itself() {
        return Ok(state.word == "paused");
    }
    let detail =
        format!("the guest stopped by itself (run state {:?}) while its memory was copied", state.word);
    let error = Error::new(ErrorKind::Invalid, attempted, machine.qmp().socket().display(), detail);
    Err(error.advise("take the snapshot again, with the guest as it is now"))
}

/// Returns true if an event reports that the guest stopped by itself.
fn stops(name: &str, data: &Value) -> bool {
    let action = data["action"].as_str();
    match name {
        "GUEST_PANICKED" | "WATCHDOG" => action == Some("pause"),
        "BLOCK_IO_ERROR" => action == Some("stop"),
        "SHUTDOWN" | "SUSPEND" => true,
        _ => false,
    }
}

/// Like [`is_stopped_by_another`], for the last moments, after which QEMU's run state shows only the
/// migration.
async fn ran_to_the_end(machine: &Machine, events: &mut Events, attempted: &str) -> Result<()> {
    // All events before the reply that said `pre-switchover` have been received already.
    while let Ok(Ok(notice)) = timeout(Duration::ZERO, events.next()).await {
        let Notice::Event(event) = notice else { continue };
        if stops(&event.name, &event.data) {
            let detail = format!("the guest stopped by itself ({}) while its memory was copied", event.name);
            let error = Error::new(ErrorKind::Invalid, attempted, machine.qmp().socket().display(), detail);
            return Err(error.advise("take the snapshot again, with the guest as it is now"));
        }
    }
    Ok(())
}

/// Stops a guest that stopped by itself and runs again. QEMU gives it its own state back when the migration
/// is cancelled, but forgets that state where its own stop for the migration came first. Either takes a
/// moment, so neither a guest that runs nor one that stands is believed at once.
async fn keep_stopped(machine: &Machine, error: Error) -> Error {
    let until = Instant::now() + Duration::from_millis(200);
    let mut runs = false;
    while Instant::now() < until {
        match machine.run_state().await {
            Ok(state) => runs = state.running,
            Err(_) => return error,
        }
        sleep(LOOK).await;
    }
    if !runs {
        return error;
    }
    let subject = machine.qmp().socket().display().to_string();
    match machine.run("keeping the guest stopped", &subject, "stop", Value::Null).await {
        Ok(_) => error.state("QEMU has forgotten why the guest stopped: it is paused"),
        Err(second) => error.state(format!("the guest runs again ({second})")),
    }
}

/// A copied memory of a running guest: QEMU has stopped the guest, and its migration waits.
struct Copied {
    clock: Clock,
    /// The guest, if we stopped it because the budget was over. `None` if QEMU stopped it because little was
    /// left.
    paused: Option<Paused>,
}

/// Copies the memory of a running guest until QEMU stops it, or until we stop it because the budget is over.
///
/// Returns `None` if another client stopped the guest meanwhile: nothing is copied then, and the guest stays
/// paused.
async fn copy(
    machine: &Machine,
    disks: &Disks,
    draft: &Draft,
    settings: Settings,
    budget: Duration,
) -> Result<Option<(Writing, Copied)>> {
    let attempted = "saving memory";
    let subject = draft.path().display().to_string();
    let clock = Clock::start(machine);
    let mut events = machine.qmp().events();
    let mut undo = Undo { machine, disks, settings: None, writing: None, paused: None, inactive: false };
    match Writing::start(machine, draft, settings).await {
        Ok(writing) => undo.writing = Some(writing),
        Err((error, settings)) => {
            undo.settings = Some(settings);
            return Err(undo.all(error).await);
        }
    }
    // QEMU pauses the guest by itself when little is left; a cancelled migration resumes it by itself.
    let begun = Instant::now();
    let stopped_by_another = loop {
        let now = match migration::status(machine)
            .await
            .and_then(|now| now.check(attempted, &subject).map(|()| now))
        {
            Ok(now) => now,
            Err(error) => return Err(undo.all(error).await),
        };
        if now.status == "pre-switchover" {
            break false;
        }
        if undo.paused.is_none() {
            match is_stopped_by_another(machine, attempted).await {
                Ok(true) => break true,
                Ok(false) => {}
                Err(error) => {
                    let error = undo.all(error).await;
                    return Err(keep_stopped(machine, error).await);
                }
            }
        }
        let waited = begun.elapsed();
        if undo.paused.is_none() && waited > budget {
            match machine.pause().await {
                Ok(paused) if paused.is_ours() => undo.paused = Some(paused),
                // The next poll finds the reason of the pause.
                Ok(_) => continue,
                // It may have converged just now.
                Err(error) if error.kind() == ErrorKind::Invalid => {}
                Err(error) => return Err(undo.all(error).await),
            }
        }
        if waited > budget + PATIENCE {
            let detail = format!("it does not come to an end ({})", now.status);
            let error = Error::new(ErrorKind::Timeout, attempted, &subject, detail);
            return Err(undo.all(error).await);
        }
        sleep(Duration::from_millis(if undo.paused.is_none() { 5 } else { 1 })).await;
    };
    if stopped_by_another {
        // QEMU leaves the guest of a cancelled migration as it was.
        return match undo.writing.take() {
            Some(writing) => match writing.cancel(machine).await {
                Ok(()) => Ok(None),
                Err(error) => Err(undo.all(error).await),
            },
            None => Ok(None),
        };
    }
    // The end of the migration would resume the guest. If it is cancelled, QEMU gives the guest its own state
    // back.
    if undo.paused.is_none()
        && let Err(error) = ran_to_the_end(machine, &mut events, attempted).await
    {
        let error = undo.all(error).await;
        return Err(keep_stopped(machine, error).await);
    }
    let Undo { writing, paused, .. } = undo;
    Ok(writing.map(|writing| (writing, Copied { clock, paused })))
}

/// Cuts the disks while a migration waits, lets it complete, and resumes the guest.
async fn switch_over<T, F>(
    machine: &Machine,
    disks: Disks,
    draft: Draft,
    (writing, copied): (Writing, Copied),
    why_not: Option<String>,
    together: &dyn Rendezvous,
    while_paused: impl FnOnce() -> F,
) -> Result<CutOutcome<T>>
where
    F: Future<Output = std::result::Result<T, BoxError>>,
{
    let attempted = "saving memory";
    let subject = draft.path().display().to_string();
    let Copied { clock, paused } = copied;
    let converged = paused.is_none();
    let mut undo =
        Undo { machine, disks: &disks, settings: None, writing: Some(writing), paused, inactive: false };
    // The guest is paused by QEMU (`pre-switchover`). Cut the disks before the last pages are written: the
    // transaction is the instant, and no page can change after it. A crash here leaves a migration that
    // waits, and overlays that undo merges back.
    let cut = async {
        meet(machine, together, Meeting::Ready).await?;
        meet(machine, together, Meeting::Paused).await?;
        disks.cut(machine).await?;
        let state = json!({ "state": "pre-switchover" });
        machine.run(attempted, &subject, "migrate-continue", state).await?;
        wait_while_paused(machine, &draft, true).await
    };
    let outcome = cut.await;
    undo.inactive = true;
    if let Err(error) = outcome {
        return Err(undo.all(error).await);
    }
    // Completed: the guest stays paused until `cont`. A `stop` of another client's between our last look and
    // QEMU's own shows in nothing but the stream.
    let stopped_by_another = match draft.run_state_at_the_end() {
        Ok(word) => converged && word.as_deref() == Some("paused"),
        Err(error) => return Err(undo.all(error).await),
    };
    let done = match while_paused().await {
        Ok(done) => done,
        Err(error) => {
            let error = Error::hook("the cut", &subject, error);
            if let Err(second) = resume_after_migration(machine, stopped_by_another).await {
                return Err(undo.all(error.state(second.to_string())).await);
            }
            undo.paused = None;
            return Err(undo.all(error).await);
        }
    };
    resume_after_migration(machine, stopped_by_another)
        .await
        .map_err(|error| error.state("the cut and its nested steps are complete"))?;
    let stopped_for = if stopped_by_another { Duration::ZERO } else { clock.stopped_for().await };
    let memory = Some(Saving { machine: machine.clone(), draft, writing: undo.writing });
    let (method, was_running) = (CutMethod::PreCopy { converged }, !stopped_by_another);
    Ok(CutOutcome { method, why_not, stopped_for, was_running, memory, done })
}

/// Resumes a guest after a complete migration. Only `cont` leads from `postmigrate`, so a guest that another
/// client has stopped runs for a moment, and is stopped again.
async fn resume_after_migration(machine: &Machine, stopped_by_another: bool) -> Result<()> {
    machine.cont().await?;
    if stopped_by_another {
        let _: Paused = machine.pause().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_of_a_guest_that_stops_are_known() {
        assert!(stops("GUEST_PANICKED", &json!({ "action": "pause" })));
        assert!(!stops("GUEST_PANICKED", &json!({ "action": "run" })));
        assert!(stops("BLOCK_IO_ERROR", &json!({ "action": "stop", "device": "vda" })));
        assert!(!stops("BLOCK_IO_ERROR", &json!({ "action": "report" })));
        assert!(stops("SHUTDOWN", &json!({ "guest": true, "reason": "guest-shutdown" })));
        assert!(!stops("STOP", &Value::Null) && !stops("WATCHDOG", &json!({ "action": "none" })));
    }
}
