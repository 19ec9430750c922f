//! The hypervisor driver for Xen.

use std::{collections::HashSet, sync::Arc};

use async_trait::async_trait;
use camino::Utf8Path;
use snapcore::backend::Progress;
use snapcore::hypervisor::{
    Control, DomainInfo, GuestChange, HypervisorProfile, LiveDomain, MemoryDirectory, PowerAfter,
    StartFromMemory, StartedDomain, StepOutcome, VmStateSaver,
};
use snapcore::{DiskAddress, DiskIdentity, Domain, Error, ErrorKind, Hypervisor, Registry, Result};

use crate::{
    cut, describe, list,
    live::{Silent, XenDomain},
    memory, section,
    users::{self, Save},
    xl::Xl,
};

/// Xen, through xl.
#[derive(Debug, Clone, Copy, Default)]
pub struct Xen;

impl Xen {
    /// Makes the driver for the Xen of this machine.
    pub fn new() -> Self {
        Self
    }
}

/// Registers Xen with a program.
pub fn register(registry: &mut Registry) {
    registry.register_hypervisor(Arc::new(Xen::new()));
}

#[async_trait]
impl VmStateSaver for Xen {
    fn profile(&self) -> HypervisorProfile {
        HypervisorProfile::new(Hypervisor::named("xen"), "Xen", "NAME").config().recreates()
    }

    fn read_control(&self, control: Control, directory: &Utf8Path) -> Result<Control> {
        let name = &control.address;
        if name.is_empty() || name.starts_with('-') || name.contains(char::is_control) {
            return Err(Error::new(ErrorKind::Usage, format!("{name:?} is not a name of a Xen domain"))
                .advise("give the name that `xl list` shows after 'xen:'"));
        }
        let memory_dir = control.memory_dir.as_ref();
        let memory_dir = memory_dir.map(|named| MemoryDirectory::read(named, directory)).transpose()?;
        let config = control.config.as_ref().map(|path| directory.join(path));
        Ok(control.memory_dir(memory_dir).config(config))
    }

    async fn connect(&self, domain: &Domain) -> Result<Option<Arc<dyn LiveDomain>>> {
        let Some(control) = &domain.control else { return Ok(None) };
        let xl = Xl::expect()?;
        let places = section::NotePaths::of(domain, control);
        let note = section::read(&places)?;
        let mut row = list::row_of(&xl, &control.address).await?;
        if let Some(saved) = &row
            && saved.flags.shut
            && let Some(Save::Ours(file)) = users::save_of(&saved.name, saved.domid)
        {
            // The domsnap that began this save was killed, and its xl still runs.
            cut::await_save(&file).await?;
            row = list::row_of(&xl, &control.address).await?;
        }
        let live = |info, running| XenDomain::new(xl.clone(), domain, control, info, running);
        let Some(row) = row else {
            // A detached section of ours may have destroyed it.
            let Some(note) = note else { return Ok(None) };
            return Ok(Some(Arc::new(live(note.seen(&control.address), None).await?)));
        };
        if let Some(doing) = list::in_transition(&row)
            && !cut::is_left_suspended(&xl, &row).await?
        {
            return Err(list::busy(&row.name, doing));
        }
        match (list::config_when_made(&xl, &row).await?, note) {
            (Some(config), note) => {
                let (domid, info) = (row.domid, describe::seen(&row, &config));
                let live = live(info, Some((row, config))).await?;
                if note.is_some_and(|note| note.is_another(domid)) && !live.has_all_disks().await {
                    return Err(section::name_taken(&live, domid));
                }
                Ok(Some(Arc::new(live)))
            }
            // It was created in a detached section of ours, whose xl was killed as well.
            (None, Some(note)) if note.is_another(row.domid) => {
                Ok(Some(Arc::new(live(note.seen(&control.address), None).await?)))
            }
            (None, _) => Err(Error::new(
                ErrorKind::Busy,
                format!("domain {} of Xen is half created, and no xl continues it", row.name),
            )
            .state("no changes made")
            .advise(format!("remove it (`xl destroy {}`), then try again", row.domid))),
        }
    }

    async fn look(&self, control: &Control) -> Result<DomainInfo> {
        let xl = Xl::expect()?;
        let Some(row) = list::row_of(&xl, &control.address).await? else {
            return Err(Error::new(ErrorKind::NotFound, format!("Xen runs no domain {}", control.address))
                .advise("`xl list` shows those that it runs, and `domsnap domain scan` those that can be registered"));
        };
        if let Some(doing) = list::in_transition(&row) {
            return Err(list::busy(&row.name, doing));
        }
        Ok(describe::seen(&row, &list::config_of(&xl, row.domid).await?))
    }

    async fn scan(&self) -> Result<Vec<(Control, DomainInfo)>> {
        let Some(xl) = Xl::find() else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for row in list::rows(&xl).await? {
            if list::in_transition(&row).is_some() || row.name == "(null)" || row.name.contains("--") {
                continue;
            }
            let Ok(config) = list::config_of(&xl, row.domid).await else { continue };
            let seen = describe::seen(&row, &config);
            let control = Control::at(row.name).config(seen.config.clone());
            found.push((control, seen));
        }
        Ok(found)
    }

    async fn check_memory(&self, image: &DiskAddress, progress: &dyn Progress) -> Result<()> {
        check_memory(image, progress).await
    }

    async fn start(&self, start: StartFromMemory<'_>) -> Result<StepOutcome> {
        let xl = Xl::expect()?;
        let file = start.image.require_path()?;
        let running = memory::read_record(file)?.running;
        let goes_on = start.power.map_or(running, |power| power == PowerAfter::Running);
        section::restore_domain(&xl, file, None, !goes_on).await?;
        let name = start.domain.control.as_ref().map(|control| control.address.as_str()).unwrap_or_default();
        // The domain is started: a failure to read its number is no error.
        let row = list::row_of(&xl, name).await.ok().flatten();
        let started = row.map(|row| StartedDomain::number(row.domid));
        Ok(StepOutcome::default().guest(Some(GuestChange::Started)).started(started))
    }

    /// Nothing of a record is run: xl restores a domain from its memory image, or creates it from the config
    /// that is registered. The abilities of its QEMU are taken from a record of ours alone.
    fn kept_machine(&self, machine: &serde_json::Value, trusted: bool) -> serde_json::Value {
        let mut kept = machine.clone();
        if !trusted {
            hypervisor_qemu::Qemu::remove_program(&mut kept);
        }
        kept
    }

    fn outside(&self, domain: &Domain, machine: Option<&serde_json::Value>) -> Vec<String> {
        let machine = machine.or_else(|| domain.machines.last().map(|machine| &machine.record));
        let has_tpm = machine.is_some_and(|machine| {
            machine
                .pointer("/xen/vtpms")
                .and_then(serde_json::Value::as_array)
                .is_some_and(|vtpms| !vtpms.is_empty())
        });
        has_tpm.then(|| "TPM state".to_owned()).into_iter().collect()
    }

    fn tidy_at_rest(&self, domain: &Domain) {
        hypervisor_qemu::Qemu::new().tidy_at_rest(domain);
    }

    async fn remove_memory(&self, image: &DiskAddress) -> Result<()> {
        remove_memory(image).await
    }

    async fn open_without_lock(&self, images: &HashSet<DiskIdentity>) -> Result<Vec<(DiskIdentity, String)>> {
        if Xl::find().is_none() {
            return Ok(Vec::new());
        }
        // The files of this machine are all that is found in tables of its kernel.
        let files = images.iter().filter_map(|image| match image {
            DiskIdentity::Inode(file) => Some(*file),
            _ => None,
        });
        let files: HashSet<_> = files.collect();
        let found = blocking(move || Ok(users::open_without_lock(&files))).await?;
        Ok(found.into_iter().map(|(file, user)| (DiskIdentity::Inode(file), user)).collect())
    }
}

pub(crate) async fn check_memory(image: &DiskAddress, progress: &dyn Progress) -> Result<()> {
    let file = image.require_path()?;
    let path = file.to_owned();
    blocking(move || memory::check(&path, &Silent)).await?;
    let length = std::fs::metadata(file).map_or(0, |about| about.len());
    progress.bytes(length, length);
    Ok(())
}

pub(crate) async fn remove_memory(image: &DiskAddress) -> Result<()> {
    let path = image.require_path()?.to_owned();
    blocking(move || memory::remove(&path)).await
}

/// Runs blocking work on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(cause) => {
            Err(Error::new(ErrorKind::Internal, "a thread that works on files ended").because(cause))
        }
    }
}
