//! A detached section: disks closed and reopened.
//!
//! If the guest continues afterwards (a change of frozen images), it is paused, and its QEMU closes the
//! disks.
//!
//! If its current state is discarded (a revert), the domain is destroyed, because Xen cannot load other
//! memory into a running domain:
//!
//! 1. its memory is saved beside its first disk, as NAME.domsnap-previous (unless the user declined); the
//!    guest is paused;
//! 2. a note of that, NAME.domsnap-revert, is made durable: the domain's identity, and whether it ran;
//! 3. the domain is destroyed, and its disks' QEMU has ended: no process has the files open;
//! 4. the disks' own steps run, as at rest;
//! 5. the domain is created again, and is paused: restored from the snapshot's memory, or created. A failure
//!    up to here is undone: the new domain is destroyed, the disks are restored, and the previous domain is
//!    restored from step 1;
//! 6. after the commit point the guest is resumed, and the note and the previous memory are removed.
//!
//! After a crash the note shows the progress. A domain with the noted number is the previous one, which was
//! not destroyed yet. A domain with another number that never ran was created by step 5. A domain with
//! another number that ran belongs to another program, and only that may destroy it. If there is no domain,
//! the crash was in step 4.

use std::{
    fs,
    io::Read,
    os::unix::fs::{FileTypeExt, MetadataExt},
    time::{Duration, Instant},
};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use snapcore::hypervisor::{
    Control, DomainContext, DomainInfo, DomainStep, GuestChange, PowerAfter, Restart, RestartSource,
    SeenDisk, StartedDomain, StepOutcome,
};
use snapcore::{DiskAddress, Domain, Error, ErrorKind, FileIdentity, Result, file_identity};

use crate::{
    cut::{self, refuse_suspended},
    describe,
    list::{self, Row},
    live::XenDomain,
    memory,
    saver::blocking,
    users,
    xl::{MAKING, SOON, Xl, failed},
};

/// Time limit for a domain's QEMU to end after the domain.
const GONE: Duration = Duration::from_secs(60);

const LOOK: Duration = Duration::from_millis(20);

/// Number of tries for a restore that ends by libxl's own time limit (`ERROR_TIMEDOUT`). libxl gives a new
/// QEMU ten seconds, which are not enough on a busy machine.
const TRIES: usize = 4;
const TIMED_OUT: &str = "rc=-9";

/// Paths of the note and of the previous memory.
#[derive(Debug, Clone)]
pub(crate) struct NotePaths {
    pub(crate) note: Utf8PathBuf,
    pub(crate) previous: Utf8PathBuf,
}

impl NotePaths {
    pub(crate) fn of(domain: &Domain, control: &Control) -> Self {
        let beside =
            || domain.disks.first().and_then(|record| record.disk.path().parent()).map(Utf8Path::to_owned);
        let named = control.memory_dir.as_ref().and_then(DiskAddress::local).map(Utf8Path::to_owned);
        let directory = named.or_else(beside).unwrap_or_else(|| "/var/lib/xen".into());
        let name = domain.name.as_str();
        Self {
            note: directory.join(format!("{name}.domsnap-revert")),
            previous: directory.join(format!("{name}.domsnap-previous")),
        }
    }

    fn remove(&self) -> Result<()> {
        memory::remove_file(&self.previous)?;
        memory::remove_file(&self.note)?;
        memory::flush_directory(&self.note)
    }
}

/// Record of a domain that was destroyed, or is about to be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Note {
    domid: u32,
    running: bool,
    /// True if its memory was saved.
    saved: bool,
    machine: Value,
    summary: String,
    disks: Vec<SeenDisk>,
    config: Option<Utf8PathBuf>,
    /// Fingerprints of its disks when it was destroyed; empty before that.
    #[serde(default)]
    left: Vec<Fingerprint>,
}

/// Fingerprint that shows that a disk was not written to: its identity, and the modification time of a file,
/// or the sectors written to a block device since it exists.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Fingerprint {
    path: Utf8PathBuf,
    disk: FileIdentity,
    written: (i64, i64),
}

impl Fingerprint {
    /// Takes the fingerprints of a domain's disks.
    pub(crate) fn of_all(domain: &Domain) -> Vec<Self> {
        let mark = |path: &Utf8Path| {
            let about = fs::metadata(path).ok()?;
            let written = match about.file_type().is_block_device() {
                true => (sectors_written(about.rdev())?, 0),
                false => (about.mtime(), about.mtime_nsec()),
            };
            Some(Self { path: path.to_owned(), disk: file_identity(&about), written })
        };
        domain.disks.iter().filter_map(|record| mark(record.disk.path())).collect()
    }
}

/// Documentation/ABI/stable/sysfs-block of the kernel: the seventh field of `stat`.
fn sectors_written(device: u64) -> Option<i64> {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let stat = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/stat")).ok()?;
    stat.split_whitespace().nth(6)?.parse().ok()
}

impl Note {
    /// Finds a disk that another program has written to or replaced since the domain was destroyed: the
    /// previous memory does not fit it any more. Writes between `found` and now are those of our own undo,
    /// which restores the previous content.
    fn written_by_others(&self, found: &[Fingerprint], now: &[Fingerprint]) -> Option<&Utf8Path> {
        let by_others = |left: &&Fingerprint| {
            let of = |marks: &[Fingerprint]| marks.iter().find(|mark| mark.path == left.path).cloned();
            of(now).as_ref() != Some(*left) && of(now) == of(found)
        };
        self.left.iter().find(by_others).map(|mark| mark.path.as_path())
    }

    /// Returns true if a domain is not the one of the note, but a later one.
    pub(crate) fn is_another(&self, domid: u32) -> bool {
        self.domid != domid
    }

    /// Describes the previous domain.
    pub(crate) fn seen(&self, name: &str) -> DomainInfo {
        DomainInfo::new(self.machine.clone(), false)
            .name(Some(name.to_owned()))
            .summary(self.summary.clone())
            .disks(self.disks.clone())
            .config(self.config.clone())
    }
}

/// Longest accepted note: it has a domain's configuration.
const LONGEST_NOTE: u64 = 32 << 20;

/// Reads the note of a detached section, if one is open.
pub(crate) fn read(places: &NotePaths) -> Result<Option<Note>> {
    let read = || {
        let mut text = Vec::new();
        let file = confined_files::open_regular(places.note.as_std_path(), false)?;
        let about = file.metadata()?;
        // A domain is created from the note. So a user who can only create files beside the images must not
        // be able to forge it.
        if !confined_files::is_trusted(about.uid()) || about.nlink() != 1 {
            return Err(confined_files::refused(format!("it belongs to user {}", about.uid())));
        }
        file.take(LONGEST_NOTE).read_to_end(&mut text)?;
        Ok(text)
    };
    let text = match read() {
        Ok(text) => text,
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => {
            return Err(Error::new(ErrorKind::Io, format!("{} cannot be read", places.note)).because(cause));
        }
    };
    serde_json::from_slice(&text).map(Some).map_err(|cause| {
        Error::new(ErrorKind::Corrupt, format!("{} is not the note of a destroyed domain", places.note))
            .because(cause)
    })
}

fn write(places: &NotePaths, note: &Note) -> Result<()> {
    let text = serde_json::to_vec(note).map_err(|cause| {
        Error::new(ErrorKind::Internal, "a note cannot be written as JSON").because(cause)
    })?;
    memory::write_durably(&places.note, &text)
}

pub(crate) async fn open(live: &XenDomain, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
    let DomainStep::Detach { restart, .. } = step else { return Ok(()) };
    match restart {
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
        Some(restart) => end(live, restart).await,
    }
}

/// Destroys the domain. If it is destroyed already, does nothing.
async fn end(live: &XenDomain, restart: &Restart) -> Result<()> {
    *live.section.lock().await = Some(Instant::now());
    let row = list::row_of(&live.xl, &live.name).await?;
    let note = read(&live.places)?;
    let Some(row) = row else {
        return match note {
            Some(_) => live.drop_qemu().await,
            None => Err(Error::new(ErrorKind::NotFound, format!("domain {} of Xen is gone", live.name))),
        };
    };
    // 1) Save the memory, 2) make it durable, 3) then the note durable: a note that names saved memory is
    //    never without it. A crash before 4) leaves the domain suspended or paused: undo wakes and resumes
    //    it, with or without a note.
    if note.is_none() {
        refuse(live, restart, &row).await?;
        let running = !row.flags.paused;
        // A paused guest cannot be saved, and need not be: a snapshot was taken, or none is possible.
        let saved = restart.safety && running;
        if saved {
            let previous = live.places.previous.clone();
            blocking(move || memory::make_private(&previous)).await?;
            cut::save_to(live, &live.places.previous).await.map_err(|error| {
                error
                    .context("saving the current memory, which brings the domain back if the revert fails")
                    .advise("make room there, or do without it: --no-safety")
            })?;
        }
        // The state was saved just before, and the guest has been paused since: that memory is kept by a
        // second name, which outlives the snapshot.
        let kept = match restart.kept.as_ref().filter(|_| !running) {
            Some(image) => keep(live, image.require_path()?).await?,
            None => false,
        };
        let seen = &live.seen;
        let note = Note {
            domid: row.domid,
            // Xen saves only guests that run.
            running: running || kept,
            saved: saved || kept,
            machine: seen.machine.clone(),
            summary: seen.summary.clone(),
            disks: seen.disks.clone(),
            config: live.config.clone(),
            left: Vec::new(),
        };
        let places = live.places.clone();
        let noted = blocking(move || {
            if saved {
                let previous = fs::File::open(&places.previous).and_then(|file| file.sync_all());
                previous.map_err(|cause| {
                    Error::new(ErrorKind::Io, format!("flushing {} failed", places.previous)).because(cause)
                })?;
            }
            write(&places, &note)
        });
        if let Err(error) = noted.await {
            memory::remove_file(&live.places.previous)?;
            if running {
                live.unpause().await?;
            }
            return Err(error);
        }
    }
    // 4) Destroy only when the note is durable: otherwise nothing would bring the domain back.
    destroy(live, row.domid).await?;
    // 5) The fingerprints, only now: QEMU wrote to the disks until its end.
    let (places, left) = (live.places.clone(), Fingerprint::of_all(&live.domain));
    blocking(move || match read(&places)? {
        Some(note) => write(&places, &Note { left, ..note }),
        None => Ok(()),
    })
    .await
}

/// Gives a memory image a second name, as the previous domain's. Returns false if it can have none there:
/// then a revert that fails cannot restore the guest.
async fn keep(live: &XenDomain, image: &Utf8Path) -> Result<bool> {
    let (image, previous, name) = (image.to_owned(), live.places.previous.clone(), live.name.clone());
    blocking(move || {
        memory::remove_file(&previous)?;
        match fs::hard_link(&image, &previous) {
            Ok(()) => Ok(true),
            Err(error) => {
                tracing::warn!(
                    domain = name,
                    "a revert that fails could not restore the guest: {image} cannot also be called {previous}: {error}"
                );
                Ok(false)
            }
        }
    })
    .await
}

/// Refuses to destroy a domain that could not be created afterwards, or that a failed revert could not
/// restore.
pub(crate) async fn refuse(live: &XenDomain, restart: &Restart, row: &Row) -> Result<()> {
    refuse_suspended(row)?;
    refuse_without_beginning(live, restart).await?;
    if restart.safety && row.flags.paused {
        let detail = "the guest is paused, and Xen saves only one that runs: a revert that fails could not bring it back";
        return Err(Error::new(ErrorKind::Refused, detail)
            .state("no changes made")
            .advise("unpause it (`xl unpause`) first, or say --no-safety"));
    }
    Ok(())
}

async fn refuse_without_beginning(live: &XenDomain, restart: &Restart) -> Result<()> {
    match (&restart.from, restart.config.as_ref().or(live.config.as_ref())) {
        (RestartSource::Boot, None) => Err(Error::new(
            ErrorKind::Refused,
            "the snapshot has no memory, and the config file that the domain would be created from is not known",
        )
        .advise("name it: --config FILE; or have the domain off afterwards: --off")),
        (RestartSource::Boot, Some(config)) => refuse_other_config(live, config).await,
        (RestartSource::Memory(_), _) => match &restart.config {
            Some(config) => refuse_other_config(live, config).await,
            None => Ok(()),
        },
        (RestartSource::Off, _) => Ok(()),
    }
    .map_err(|error| error.state("no changes made"))
}

/// Checks that a config is that of this domain. One with another name would create a second domain with the
/// same disks.
async fn refuse_other_config(live: &XenDomain, path: &Utf8Path) -> Result<()> {
    let advice = "name the file that the domain is to be created from: --config FILE";
    if !path.is_file() {
        let detail = format!("there is no config file {path}");
        return Err(Error::new(ErrorKind::NotFound, detail).advise(advice));
    }
    let text = live.xl.must(&["create", "-q", "-n", path.as_str()], SOON).await?;
    let config: Value = serde_json::from_str(&text).map_err(|cause| {
        Error::new(ErrorKind::Io, format!("the output of `xl create -n {path}` is not understood"))
            .because(cause)
    })?;
    let refuse = |detail: String| {
        Err(Error::new(ErrorKind::Refused, format!("the config file {path} {detail}")).advise(advice))
    };
    let name = config["c_info"]["name"].as_str().unwrap_or_default();
    if name != live.name {
        return refuse(format!("is that of a domain {name}, not of {}", live.name));
    }
    let disks = describe::disks(&config);
    for disk in live.xen_disks().await.into_iter().filter(|disk| disk.writable && !disk.removable) {
        match disks.iter().find(|other| other.target == disk.target) {
            None => return refuse(format!("has no disk {}", disk.target)),
            Some(other) if !other.is_file(&disk.path) => {
                return refuse(format!("has {} as disk {}, which is {}", other.path, disk.target, disk.path));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// Destroys a domain; when this returns, no process has its disks open.
async fn destroy(live: &XenDomain, domid: u32) -> Result<()> {
    live.drop_qemu().await?;
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

pub(crate) async fn attach(live: &XenDomain, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
    let DomainStep::Attach { restart, .. } = step else { return Ok(()) };
    let Some(restart) = restart else {
        return match (live.qemu().await, read(&live.places)?) {
            (Some(qemu), None) => qemu.apply(step, context).await.map(drop),
            // A domain that is to be created again.
            _ => Ok(()),
        };
    };
    if let Some(row) = list::row_of(&live.xl, &live.name).await? {
        if row.has_run {
            return Err(name_taken(live, row.domid));
        }
        // It was created before, by this step.
        live.refresh().await?;
        return match live.has_all_disks().await {
            true => Ok(()),
            false => Err(name_taken(live, row.domid)),
        };
    }
    match &restart.from {
        RestartSource::Off => Ok(()),
        RestartSource::Memory(image) => {
            restore(live, image.require_path()?, restart.config.as_deref(), true).await
        }
        RestartSource::Boot => create(live, restart.config.as_deref()).await,
    }
}

/// Makes the error for a domain of this name that another program created meanwhile. It may hold valuable
/// data: only its owner may end it.
pub(crate) fn name_taken(live: &XenDomain, domid: u32) -> Error {
    let name = &live.name;
    let detail =
        format!("another domain {name} (number {domid}) was created while it was destroyed for a revert");
    Error::new(ErrorKind::Busy, detail).advise(format!(
        "shut that one down (`xl shutdown {name}`; what it wrote to these disks is given up), then run `domsnap recover`"
    ))
}

/// Restores the domain from a save file, paused or not.
async fn restore(live: &XenDomain, file: &Utf8Path, config: Option<&Utf8Path>, paused: bool) -> Result<()> {
    restore_domain(&live.xl, file, config, paused).await?;
    live.refresh().await
}

/// Restores a domain without a connection.
pub(crate) async fn restore_domain(
    xl: &Xl,
    file: &Utf8Path,
    config: Option<&Utf8Path>,
    paused: bool,
) -> Result<()> {
    let mut args = vec!["restore"];
    args.extend(paused.then_some("-p"));
    args.extend(config.map(Utf8Path::as_str));
    args.push(file.as_str());
    let mut said = xl.run(&args, MAKING).await?;
    for _ in 1..TRIES {
        if said.ok || !said.err.contains(TIMED_OUT) {
            break;
        }
        tracing::debug!(said = said.err, "restoring once more");
        said = xl.run(&args, MAKING).await?;
    }
    match said.ok {
        true => Ok(()),
        false => Err(failed(&args, &said).context(format!("restoring the domain from {file}"))),
    }
}

/// Creates the domain, which is paused.
async fn create(live: &XenDomain, config: Option<&Utf8Path>) -> Result<()> {
    let Some(config) = config.or(live.config.as_deref()) else {
        return Err(Error::new(ErrorKind::Refused, "the config file of the domain is not known"));
    };
    live.xl.must(&["create", "-q", "-p", config.as_str()], MAKING).await?;
    live.refresh().await
}

pub(crate) async fn undo_attach(
    live: &XenDomain,
    step: &DomainStep,
    context: DomainContext<'_>,
) -> Result<()> {
    let DomainStep::Attach { restart, .. } = step else { return Ok(()) };
    if restart.is_none() {
        return match live.qemu().await {
            Some(qemu) => qemu.undo(step, context).await,
            None => Ok(()),
        };
    }
    match (list::row_of(&live.xl, &live.name).await?, read(&live.places)?) {
        (Some(row), Some(note)) if note.is_another(row.domid) => {
            // Only what this step created is destroyed: it has never run, and it has the disks.
            live.refresh().await?;
            match !row.has_run && live.has_all_disks().await {
                true => destroy(live, row.domid).await,
                false => Err(name_taken(live, row.domid)),
            }
        }
        _ => Ok(()),
    }
}

/// Restores the previous domain; one that was only paused is resumed.
pub(crate) async fn undo_open(live: &XenDomain, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
    let DomainStep::Detach { restart, running, .. } = step else { return Ok(()) };
    *live.section.lock().await = None;
    let row = list::row_of(&live.xl, &live.name).await?;
    if restart.is_none() {
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
        // It was not destroyed yet, or not even noted; or another program has started it again, and may have
        // paused it.
        (Some(row), note) => {
            let previous = note.as_ref().is_none_or(|note| !note.is_another(row.domid));
            if !previous {
                live.refresh().await?;
                if !live.has_all_disks().await {
                    return Err(name_taken(live, row.domid));
                }
                tracing::warn!(
                    domain = live.name,
                    "the domain was started again: its memory from before the revert is discarded"
                );
            }
            if previous {
                cut::await_save(live.places.previous.as_str()).await?;
                cut::wake(live).await?;
            }
            let paused = live.row().await?.flags.paused;
            if previous && paused && note.map_or(*running, |note| note.running) {
                live.unpause().await?;
            }
            live.places.remove()
        }
        (None, Some(note)) if note.saved => {
            if let Some(path) = note.written_by_others(&live.found, &Fingerprint::of_all(&live.domain)) {
                let previous = &live.places.previous;
                tracing::warn!(
                    domain = live.name,
                    "the domain is off, start it: {path} was written since the revert destroyed the domain, so its previous \
                     memory does not fit its disks any more; remove {previous} when it is not needed"
                );
                memory::remove_file(&live.places.note)?;
                return memory::flush_directory(&live.places.note);
            }
            restore(live, &live.places.previous, None, !note.running).await.map_err(|error| {
                error.context("restoring the previous domain").advise(format!(
                    "fix the cause, then run `domsnap recover`; its memory is in {}",
                    live.places.previous
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

/// Ends a detached section.
pub(crate) async fn finish(
    live: &XenDomain,
    step: &DomainStep,
    context: DomainContext<'_>,
) -> Result<StepOutcome> {
    let DomainStep::Continue { memory, reset, power } = step else { return Ok(StepOutcome::default()) };
    let mut facts = StepOutcome::default();
    let row = list::row_of(&live.xl, &live.name).await?;
    if *power == Some(PowerAfter::Off) {
        if let Some(row) = row {
            destroy(live, row.domid).await?;
        }
        live.places.remove()?;
        facts.guest = Some(GuestChange::Ended);
        return Ok(facts);
    }
    match (&row, memory, reset) {
        (Some(_), None, false) => {
            // Its disks were detached for a while, and it continues.
            if let Some(qemu) = live.qemu().await {
                let go_on =
                    DomainStep::Continue { memory: None, reset: false, power: Some(PowerAfter::Running) };
                qemu.apply(&go_on, context).await?;
            }
        }
        (Some(row), None, true) if read(&live.places)?.is_some_and(|note| !note.is_another(row.domid)) => {
            return Err(Error::new(ErrorKind::Internal, "the previous domain was not destroyed"));
        }
        (Some(_), ..) => {}
        // It is gone since: the host was restarted, or another program has destroyed it.
        (None, Some(image), _) => restore(live, image.require_path()?, None, true).await?,
        (None, None, _) => create(live, None).await?,
    }
    if *power == Some(PowerAfter::Running) {
        if live.row().await?.flags.paused {
            live.unpause().await?;
        }
        facts.downtime = live.section.lock().await.map(|since| since.elapsed());
    }
    facts.guest = match (memory, reset) {
        (Some(_), _) => Some(GuestChange::RecreatedFromMemory),
        (None, true) => Some(GuestChange::Recreated),
        (None, false) => None,
    };
    if facts.guest.is_some() {
        facts.started = Some(StartedDomain::number(live.row().await?.domid));
    }
    // The note and the previous memory go last: until here a repeated call, or an undo, needs them.
    *live.section.lock().await = None;
    live.places.remove()?;
    Ok(facts)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(inode: u64, written: i64) -> Fingerprint {
        Fingerprint { path: "/srv/a.qcow2".into(), disk: (1, inode), written: (written, 0) }
    }

    /// A disk written by another program is distinguished from one that the undo wrote.
    #[test]
    fn foreign_writes_differ_from_undo_writes() {
        let note = Note {
            domid: 1,
            running: true,
            saved: true,
            machine: Value::Null,
            summary: String::new(),
            disks: Vec::new(),
            config: None,
            left: vec![mark(1, 1)],
        };
        let others =
            |found: &[Fingerprint], now: &[Fingerprint]| note.written_by_others(found, now).is_some();
        // No other program wrote; a revert to another file was undone; the undo wrote.
        assert!(!others(&[mark(1, 1)], &[mark(1, 1)]));
        assert!(!others(&[mark(2, 5)], &[mark(1, 1)]));
        assert!(!others(&[mark(1, 5)], &[mark(1, 9)]));
        // It was written, replaced, or removed, and not by the undo.
        assert!(others(&[mark(1, 5)], &[mark(1, 5)]));
        assert!(others(&[mark(2, 5)], &[mark(2, 5)]));
        assert!(others(&[], &[]));
    }
}
