//! A window: disks set free and given back.
//!
//! Where the guest is to go on as it is (what changes frozen images), it is paused, and its QEMU closes the disks.
//!
//! Where its present is given up (a revert), the domain is ended, because Xen cannot give a domain that runs other memory:
//!
//! 1. its memory is saved beside its first disk, as NAME.domsnap-former (unless nobody wants that); the guest stands still;
//! 2. a note of that, NAME.domsnap-window, is durable: who the domain was, and whether it ran;
//! 3. it is destroyed, and its disks' QEMU is gone: nobody has the files open;
//! 4. the disks' own steps run, as at rest;
//! 5. the domain is made anew, and stands still: restored from the snapshot's memory, or created. What fails until here is undone:
//!    what was made is destroyed, the disks are as they were, and the former domain is restored from step 1;
//! 6. after the commit point the guest goes on, and note and former memory are removed.
//!
//! After a crash the note tells how far that got: a domain of the noted number is the former one, which was not ended yet; any other was
//! made by step 5, or by somebody else; and none is step 4.

use std::{
    fs,
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapcore::{
    Anew, Beginning, Control, Domain, DomainContext, DomainStep, Error, ErrorKind, Facts, PowerAfter, Result,
    Seen, SeenDisk,
};

use crate::{
    instant::{self, refuse_suspended},
    list,
    live::Live,
    memory,
    saver::blocking,
    users,
    xl::{MAKING, SOON, Xl, failed},
};

/// Within which a domain's QEMU must have ended after it.
const GONE: Duration = Duration::from_secs(60);

const LOOK: Duration = Duration::from_millis(20);

/// How often a restore is tried that ends by libxl's own time limit (`ERROR_TIMEDOUT`): it gives a new QEMU ten seconds, which are
/// not enough on a machine that is busy.
const TRIES: usize = 4;
const TIMED_OUT: &str = "rc=-9";

/// Where the note and the former memory are.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    pub(crate) note: Utf8PathBuf,
    pub(crate) former: Utf8PathBuf,
}

impl Places {
    pub(crate) fn of(domain: &Domain, control: &Control) -> Self {
        let beside =
            || domain.disks.first().and_then(|record| record.disk.path.parent()).map(Utf8Path::to_owned);
        let directory = control.memory_dir.clone().or_else(beside).unwrap_or_else(|| "/var/lib/xen".into());
        let name = domain.name.as_str();
        Self {
            note: directory.join(format!("{name}.domsnap-window")),
            former: directory.join(format!("{name}.domsnap-former")),
        }
    }

    fn remove(&self) -> Result<()> {
        memory::remove_file(&self.former)?;
        memory::remove_file(&self.note)?;
        memory::flush_directory(&self.note)
    }
}

/// A domain that was ended, or is about to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Note {
    domid: u32,
    running: bool,
    /// Whether its memory was saved.
    saved: bool,
    machine: Value,
    summary: String,
    disks: Vec<SeenDisk>,
    config: Option<Utf8PathBuf>,
}

impl Note {
    /// Whether a domain is not the one of the note, but one that took its place.
    pub(crate) fn is_another(&self, domid: u32) -> bool {
        self.domid != domid
    }

    /// The domain as it was.
    pub(crate) fn seen(&self, name: &str) -> Seen {
        Seen {
            name: Some(name.to_owned()),
            running: false,
            machine: self.machine.clone(),
            summary: self.summary.clone(),
            disks: self.disks.clone(),
            agent: None,
            config: self.config.clone(),
        }
    }
}

/// The note of a window, where one is open.
pub(crate) fn read(places: &Places) -> Result<Option<Note>> {
    let text = match fs::read(&places.note) {
        Ok(text) => text,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => {
            return Err(Error::new(ErrorKind::Io, format!("{} cannot be read", places.note)).because(cause));
        }
    };
    serde_json::from_slice(&text).map(Some).map_err(|cause| {
        Error::new(ErrorKind::Corrupt, format!("{} is no note of a domain that was ended", places.note))
            .because(cause)
    })
}

pub(crate) async fn open(live: &Live, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
    let DomainStep::OpenWindow { anew, .. } = step else { return Ok(()) };
    match anew {
        None => {
            let row = live.row().await?;
            refuse_suspended(&row)?;
            if !row.flags.paused {
                live.xl.must(&["pause", &live.name], SOON).await?;
            }
            match live.qemu().await {
                Some(qemu) => qemu.apply(step, context).await.map(drop),
                None => Ok(()),
            }
        }
        Some(anew) => end(live, anew).await,
    }
}

/// Ends the domain. One that is ended already stays so.
async fn end(live: &Live, anew: &Anew) -> Result<()> {
    *live.window.lock().await = Some(Instant::now());
    let row = list::row_of(&live.xl, &live.name).await?;
    let note = read(&live.places)?;
    let Some(row) = row else {
        return match note {
            Some(_) => live.forget_qemu().await,
            None => Err(Error::new(ErrorKind::NotFound, format!("domain {} of Xen is gone", live.name))),
        };
    };
    if note.is_none() {
        refuse_suspended(&row)?;
        refuse_without_beginning(live, anew)?;
        let running = !row.flags.paused;
        // A paused guest cannot be saved, and need not be: a snapshot was taken, or nothing can be.
        let saved = anew.safety && running;
        if anew.safety && !running {
            let detail = "the guest is paused, and Xen saves only one that runs: a revert that fails could not bring it back";
            return Err(Error::new(ErrorKind::Refused, detail)
                .state("nothing was touched")
                .advise("unpause it (`xl unpause`) first, or say --no-safety"));
        }
        if saved {
            let former = live.places.former.clone();
            blocking(move || memory::make_private(&former)).await?;
            instant::save_to(live, &live.places.former).await.map_err(|error| {
                error
                    .context("saving the present, which brings the domain back if the revert fails")
                    .advise("make room there, or do without it: --no-safety")
            })?;
        }
        let seen = &live.seen;
        let note = Note {
            domid: row.domid,
            running,
            saved,
            machine: seen.machine.clone(),
            summary: seen.summary.clone(),
            disks: seen.disks.clone(),
            config: live.config.clone(),
        };
        let places = live.places.clone();
        let noted = blocking(move || {
            if saved {
                let former = fs::File::open(&places.former).and_then(|file| file.sync_all());
                former.map_err(|cause| {
                    Error::new(ErrorKind::Io, format!("flushing {} failed", places.former)).because(cause)
                })?;
            }
            let text = serde_json::to_vec(&note).map_err(|cause| {
                Error::new(ErrorKind::Internal, "a note cannot be written as JSON").because(cause)
            })?;
            memory::write_durably(&places.note, &text)
        });
        if let Err(error) = noted.await {
            memory::remove_file(&live.places.former)?;
            if running {
                live.unpause().await?;
            }
            return Err(error);
        }
    }
    destroy(live, row.domid).await
}

/// A revert that nothing could follow is refused before anything is touched.
fn refuse_without_beginning(live: &Live, anew: &Anew) -> Result<()> {
    if let Some(config) = &anew.config
        && !config.is_file()
    {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no config file {config}"))
            .state("nothing was touched"));
    }
    match (&anew.from, anew.config.as_ref().or(live.config.as_ref())) {
        (Beginning::Boot, Some(config)) if !config.is_file() => {
            Err(Error::new(ErrorKind::NotFound, format!("the domain's config file {config} is gone"))
                .state("nothing was touched")
                .advise("name the one that it is to be created from: --config FILE"))
        }
        (Beginning::Boot, None) => Err(Error::new(
            ErrorKind::Refused,
            "the snapshot has no memory, and the config file that the domain would be created from is not known",
        )
        .state("nothing was touched")
        .advise("name it: --config FILE; or have the domain off afterwards: --off")),
        _ => Ok(()),
    }
}

/// Destroys a domain; when this returns nobody has its disks open.
async fn destroy(live: &Live, domid: u32) -> Result<()> {
    live.forget_qemu().await?;
    live.xl.must(&["destroy", &domid.to_string()], MAKING).await?;
    let until = Instant::now() + GONE;
    while users::has_qemu(domid) {
        if Instant::now() > until {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("the QEMU of domain {domid} has not ended with it"),
            ));
        }
        tokio::time::sleep(LOOK).await;
    }
    Ok(())
}

pub(crate) async fn attach(live: &Live, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
    let DomainStep::Attach { anew, .. } = step else { return Ok(()) };
    let Some(anew) = anew else {
        return match (live.qemu().await, read(&live.places)?) {
            (Some(qemu), None) => qemu.apply(step, context).await.map(drop),
            // A domain that is to be made anew.
            _ => Ok(()),
        };
    };
    if list::row_of(&live.xl, &live.name).await?.is_some() {
        // It was made before, by this step or by somebody else.
        return live.look_again().await;
    }
    match &anew.from {
        Beginning::Off => Ok(()),
        Beginning::Memory(file) => restore(live, file, anew.config.as_deref(), true).await,
        Beginning::Boot => create(live, anew.config.as_deref()).await,
    }
}

/// Makes the domain from a save file; it stands still or not.
async fn restore(live: &Live, file: &Utf8Path, config: Option<&Utf8Path>, paused: bool) -> Result<()> {
    restore_domain(&live.xl, file, config, paused).await?;
    live.look_again().await
}

/// The same where there is no connection.
pub(crate) async fn restore_domain(
    xl: &Xl,
    file: &Utf8Path,
    config: Option<&Utf8Path>,
    paused: bool,
) -> Result<()> {
    let mut words = vec!["restore"];
    words.extend(paused.then_some("-p"));
    words.extend(config.map(Utf8Path::as_str));
    words.push(file.as_str());
    let mut said = xl.run(&words, MAKING).await?;
    for _ in 1..TRIES {
        if said.ok || !said.err.contains(TIMED_OUT) {
            break;
        }
        tracing::debug!(said = said.err, "restoring once more");
        said = xl.run(&words, MAKING).await?;
    }
    match said.ok {
        true => Ok(()),
        false => Err(failed(&words, &said).context(format!("restoring the domain from {file}"))),
    }
}

/// Creates the domain, which stands still.
async fn create(live: &Live, config: Option<&Utf8Path>) -> Result<()> {
    let Some(config) = config.or(live.config.as_deref()) else {
        return Err(Error::new(ErrorKind::Refused, "the config file of the domain is not known"));
    };
    live.xl.must(&["create", "-q", "-p", config.as_str()], MAKING).await?;
    live.look_again().await
}

pub(crate) async fn undo_attach(live: &Live, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
    let DomainStep::Attach { anew, .. } = step else { return Ok(()) };
    if anew.is_none() {
        return match live.qemu().await {
            Some(qemu) => qemu.undo(step, context).await,
            None => Ok(()),
        };
    }
    match (list::row_of(&live.xl, &live.name).await?, read(&live.places)?) {
        (Some(row), Some(note)) if note.is_another(row.domid) => destroy(live, row.domid).await,
        _ => Ok(()),
    }
}

/// Brings the former domain back; one that was only paused goes on.
pub(crate) async fn undo_open(live: &Live, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
    let DomainStep::OpenWindow { anew, running, .. } = step else { return Ok(()) };
    *live.window.lock().await = None;
    let row = list::row_of(&live.xl, &live.name).await?;
    if anew.is_none() {
        if let Some(qemu) = live.qemu().await {
            qemu.undo(step, context).await?;
        }
        return match row {
            Some(row) if *running && row.flags.paused => live.unpause().await,
            _ => Ok(()),
        };
    }
    let note = read(&live.places)?;
    match (row, note) {
        // It was not ended yet, or not even noted; or somebody has started it anew, and may have paused it.
        (Some(row), note) => {
            let former = note.as_ref().is_none_or(|note| !note.is_another(row.domid));
            if former {
                instant::await_save(live.places.former.as_str()).await?;
                instant::wake(live).await?;
            }
            let paused = live.row().await?.flags.paused;
            if former && paused && note.map_or(*running, |note| note.running) {
                live.unpause().await?;
            }
            live.places.remove()
        }
        (None, Some(note)) if note.saved => {
            restore(live, &live.places.former, None, !note.running).await.map_err(|error| {
                error.context("bringing the former domain back").advise(format!(
                    "mend what is named and run `domsnap recover`; its memory is in {}",
                    live.places.former
                ))
            })?;
            live.places.remove()
        }
        (None, Some(_)) => {
            tracing::warn!(
                domain = live.name,
                "the domain is off: its memory was not saved before the revert"
            );
            live.places.remove()
        }
        (None, None) => Ok(()),
    }
}

/// The end of a window.
pub(crate) async fn go_on(live: &Live, step: &DomainStep, context: DomainContext<'_>) -> Result<Facts> {
    let DomainStep::Continue { memory, reset, power } = step else { return Ok(Facts::default()) };
    let mut facts = Facts::default();
    let row = list::row_of(&live.xl, &live.name).await?;
    if *power == Some(PowerAfter::Off) {
        if let Some(row) = row {
            destroy(live, row.domid).await?;
        }
        live.places.remove()?;
        return Ok(facts);
    }
    match (&row, memory, reset) {
        (Some(_), None, false) => {
            // Its disks were away for a while, and it goes on.
            if let Some(qemu) = live.qemu().await {
                let go_on =
                    DomainStep::Continue { memory: None, reset: false, power: Some(PowerAfter::Running) };
                qemu.apply(&go_on, context).await?;
            }
        }
        (Some(row), None, true) if read(&live.places)?.is_some_and(|note| !note.is_another(row.domid)) => {
            return Err(Error::new(ErrorKind::Internal, "the former domain was not ended"));
        }
        (Some(_), ..) => {}
        // It is gone since: this machine was started anew, or somebody has destroyed it.
        (None, Some(file), _) => restore(live, file, None, true).await?,
        (None, None, _) => create(live, None).await?,
    }
    if *power == Some(PowerAfter::Running) {
        if live.row().await?.flags.paused {
            live.unpause().await?;
        }
        facts.downtime = live.window.lock().await.map(|since| since.elapsed());
    }
    *live.window.lock().await = None;
    live.places.remove()?;
    Ok(facts)
}
