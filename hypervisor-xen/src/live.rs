//! [`XenDomain`]: a connection to one domain. The domain may be destroyed and created again meanwhile: its
//! number, its QEMU and that QEMU's socket then change.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use camino::Utf8PathBuf;
use hypervisor_qemu::Qemu as QemuSaver;
use serde_json::Value;
use snapcore::hypervisor::{
    AttachedDisk, Control, DomainContext, DomainInfo, DomainStep, LiveDomain, Obstacle, OpenChain,
    StepOutcome, VmStateSaver,
};
use snapcore::{CutUnit, Domain, Error, ErrorKind, FinishUnit, Plan, PlanStep, Result, Target};
use tokio::sync::{Mutex, RwLock};

use crate::{
    cut,
    describe::{self, Server, XenDisk},
    disk::{Disk, Qemu},
    list::{self, Row},
    memory,
    saver::{blocking, check_memory, remove_memory},
    section::{self, Fingerprint, NotePaths},
    users,
    xl::{SOON, Xl},
};

/// The sockets of a domain's QEMU, in the order in which they are tried: libxl itself does not use the first.
const SOCKETS: [&str; 2] = ["qmp-libxenstat", "qmp-libxl"];

/// Time limit for a socket that serves another client: libxl connects for moments.
const BUSY: Duration = Duration::from_secs(10);

pub(crate) struct XenDomain {
    pub(crate) xl: Xl,
    pub(crate) name: String,
    pub(crate) seen: DomainInfo,
    /// The file from which the domain is created.
    pub(crate) config: Option<Utf8PathBuf>,
    pub(crate) places: NotePaths,
    /// Fingerprints of its disks when the connection was made.
    pub(crate) found: Vec<Fingerprint>,
    pub(crate) domain: Domain,
    qemu_saver: QemuSaver,
    qemu: Qemu,
    disks: Vec<(Disk, Arc<RwLock<Option<Server>>>)>,
    /// libxl's configuration, while the domain exists.
    libxl: RwLock<Option<Value>>,
    /// Its line in `xl list` when the connection was made, until a step is carried out.
    found_as: std::sync::Mutex<Option<Row>>,
    speed: std::sync::Mutex<u64>,
    /// True if the guest ran at the instant whose memory is to be sealed.
    pub(crate) saved_running: Mutex<Option<bool>>,
    /// Start of the current detached section.
    pub(crate) section: Mutex<Option<Instant>>,
}

impl XenDomain {
    /// Connects to a domain that runs, with its number and its configuration as they were just read; or to
    /// one that a detached section of ours has destroyed.
    pub(crate) async fn new(
        xl: Xl,
        domain: &Domain,
        control: &Control,
        seen: DomainInfo,
        running: Option<(Row, Value)>,
    ) -> Result<Self> {
        let qemu: Qemu = Arc::default();
        let mut disks = Vec::new();
        for record in &domain.disks {
            let server = Arc::default();
            let disk = Disk {
                target: record.disk.target.clone(),
                path: record.disk.path().to_owned(),
                detached: AtomicBool::new(false),
                server: Arc::clone(&server),
                qemu: Arc::clone(&qemu),
            };
            disks.push((disk, server));
        }
        let mut live = Self {
            xl,
            name: control.address.clone(),
            config: control.config.clone().or_else(|| seen.config.clone()),
            places: NotePaths::of(domain, control),
            found: Fingerprint::of_all(domain),
            seen,
            domain: domain.clone(),
            qemu_saver: QemuSaver::disks_only(),
            qemu,
            disks,
            libxl: RwLock::default(),
            found_as: std::sync::Mutex::default(),
            speed: std::sync::Mutex::default(),
            saved_running: Mutex::default(),
            section: Mutex::default(),
        };
        let running_as = running.as_ref().map(|(row, _)| row.domid);
        if let Some((row, config)) = running {
            live.connect(row.domid, config).await?;
            live.found_as = std::sync::Mutex::new(Some(row));
        }
        let drives = live.xen_disks().await;
        describe::note_members(&mut live.seen, &drives, domain);
        let qemu = live.qemu().await;
        let served = running_as.map(users::served_devices).unwrap_or_default();
        describe::note_replaced(&mut live.seen, &drives, qemu.as_ref().map(|qemu| qemu.seen()), &served);
        if let Some(qemu) = qemu {
            QemuSaver::add_program(qemu.seen(), &mut live.seen.machine);
            live.seen.disks.extend(describe::unknown_to_libxl(qemu.seen(), &drives));
        }
        Ok(live)
    }

    /// Connects to the current domain.
    pub(crate) async fn refresh(&self) -> Result<()> {
        let row = self.row().await?;
        let config = list::config_of(&self.xl, row.domid).await?;
        self.connect(row.domid, config).await
    }

    /// Connects to the domain of this number and configuration.
    async fn connect(&self, domid: u32, config: Value) -> Result<()> {
        let drives = describe::disks(&config);
        for (disk, server) in &self.disks {
            let drive = drives.iter().find(|drive| drive.target == disk.target);
            disk.detached.store(drive.is_none(), Ordering::Relaxed);
            *server.write().await = drive.map(|drive| drive.server);
        }
        let qemu = match drives.iter().any(|drive| drive.server == Server::Qdisk) {
            true => Some(self.reach(domid).await?),
            false => None,
        };
        *self.qemu.write().await = qemu;
        *self.libxl.write().await = Some(config);
        Ok(())
    }

    /// Connects to the QEMU that serves the disks of a domain.
    async fn reach(&self, domid: u32) -> Result<Arc<dyn LiveDomain>> {
        let until = Instant::now() + BUSY;
        loop {
            let mut failure = None;
            for socket in SOCKETS {
                let address = format!("/run/xen/{socket}-{domid}");
                if !Path::new(&address).exists() {
                    continue;
                }
                let control = Control::at(address);
                let domain = self.domain.clone().hypervisor(hypervisor_qemu::NAME).control(Some(control));
                match self.qemu_saver.connect(&domain).await {
                    Ok(Some(qemu)) => {
                        qemu.limit(*self.speed.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
                        return Ok(qemu);
                    }
                    Ok(None) => {}
                    Err(error) => failure = Some(error),
                }
            }
            if Instant::now() > until {
                let detail =
                    format!("the QEMU that serves the disks of domain {} cannot be reached", self.name);
                return Err(failure.map_or_else(
                    || {
                        Error::new(ErrorKind::NotFound, detail.clone())
                            .advise(format!("look for /run/xen/qmp-*-{domid}, and whether that QEMU lives"))
                    },
                    |error| error.context(detail.clone()),
                ));
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
    }

    /// Returns the domain's QEMU, if it has one.
    pub(crate) async fn qemu(&self) -> Option<Arc<dyn LiveDomain>> {
        self.qemu.read().await.clone()
    }

    /// Closes the connection to QEMU: the domain is about to be destroyed, or is, and no process has its
    /// disks.
    pub(crate) async fn drop_qemu(&self) -> Result<()> {
        *self.qemu.write().await = None;
        *self.libxl.write().await = None;
        for (_, server) in &self.disks {
            *server.write().await = None;
        }
        Ok(())
    }

    /// Returns the domain's line in `xl list`.
    pub(crate) async fn row(&self) -> Result<Row> {
        list::row_of(&self.xl, &self.name).await?.ok_or_else(|| self.gone())
    }

    fn gone(&self) -> Error {
        Error::new(ErrorKind::NotFound, format!("domain {} of Xen is gone", self.name))
    }

    /// Returns its line as it was when the connection was made. What depends on the domain's state looks
    /// again when it is carried out ([`cut::take`], the sections): each question is a process of xl.
    async fn row_of_connection(&self) -> Result<Option<Row>> {
        let known = self.known_row().clone();
        match known {
            Some(row) => Ok(Some(row)),
            None => list::row_of(&self.xl, &self.name).await,
        }
    }

    fn known_row(&self) -> std::sync::MutexGuard<'_, Option<Row>> {
        self.found_as.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub(crate) async fn unpause(&self) -> Result<()> {
        self.xl.must(&["unpause", &self.name], SOON).await.map(drop)
    }

    /// Returns its disks, as libxl has them.
    pub(crate) async fn xen_disks(&self) -> Vec<XenDisk> {
        self.libxl.read().await.as_ref().map(describe::disks).unwrap_or_default()
    }

    /// Returns true if the running domain has each of the disks.
    pub(crate) async fn has_all_disks(&self) -> bool {
        let drives = self.xen_disks().await;
        let has =
            |disk: &Disk| drives.iter().any(|drive| drive.target == disk.target && drive.is_file(&disk.path));
        self.disks.iter().all(|(disk, _)| has(disk))
    }

    /// Refuses a domain whose storage has changed since the operation was planned.
    pub(crate) async fn refuse_other_storage(&self, domid: u32) -> Result<()> {
        let config = list::config_of(&self.xl, domid).await?;
        match self
            .libxl
            .read()
            .await
            .as_ref()
            .is_some_and(|planned| describe::is_same_storage(planned, &config))
        {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::Busy,
                format!("a disk of domain {} was attached or detached while the operation began", self.name),
            )
            .advise("run the command again")),
        }
    }

    pub(crate) async fn memory_mib(&self) -> u64 {
        let config = self.libxl.read().await;
        config.as_ref().and_then(|config| config["b_info"]["max_memkb"].as_u64()).unwrap_or(1 << 20) >> 10
    }
}

#[async_trait]
impl LiveDomain for XenDomain {
    fn seen(&self) -> &DomainInfo {
        &self.seen
    }

    /// The QEMU that serves the disks; what the kernel serves is no process's.
    fn processes(&self) -> Vec<u32> {
        let qemu = self.qemu.try_read().ok().and_then(|qemu| qemu.clone());
        qemu.map(|qemu| qemu.processes()).unwrap_or_default()
    }

    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk> {
        let mut disks = self.disks.iter().map(|(disk, _)| disk);
        let disk = disks.find(|disk| disk.target == *target)?;
        (!disk.detached.load(Ordering::Relaxed)).then_some(disk as _)
    }

    fn differences(&self, recorded: &Value) -> Result<Vec<String>> {
        Ok(describe::differences(recorded, &self.seen.machine))
    }

    fn cannot_save_memory(&self) -> Option<Obstacle> {
        describe::cannot_save(&self.seen.machine["xen"])
    }

    async fn resume(&self) -> Result<()> {
        *self.known_row() = None;
        match self.row().await?.flags.paused {
            true => self.unpause().await,
            false => Ok(()),
        }
    }

    fn limit(&self, bytes_per_second: u64) {
        *self.speed.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = bytes_per_second;
        if let Ok(qemu) = self.qemu.try_read()
            && let Some(qemu) = &*qemu
        {
            qemu.limit(bytes_per_second);
        }
    }

    async fn preflight(&self, plan: &Plan, chains: &[OpenChain], probe: bool) -> Result<()> {
        for step in plan.domain_steps() {
            // Questions to xl were answered when the plan was made; each one takes a while.
            if probe {
                break;
            }
            if let DomainStep::Detach { restart: Some(restart), .. } = step {
                // If the domain does not exist, a detached section of ours has destroyed it already.
                if let Some(row) = self.row_of_connection().await? {
                    section::refuse(self, restart, &row).await?;
                }
            }
            if let Some(step) = instant(step) {
                let row = self.row_of_connection().await?.ok_or_else(|| self.gone())?;
                cut::refuse(&step, &row)?;
            }
        }
        let of_disks = of_disks(plan);
        match self.qemu().await {
            // Detached sections and memory are xl's work. For the rest, QEMU knows which files it cannot
            // open.
            Some(qemu) => qemu.preflight(&of_disks, chains, probe).await,
            None => Ok(()),
        }
    }

    async fn tidy(&self) -> Result<()> {
        match self.qemu().await {
            Some(qemu) => qemu.tidy().await,
            None => Ok(()),
        }
    }

    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        *self.known_row() = None;
        match step {
            DomainStep::CheckMemory { image } => {
                check_memory(image, context.progress).await.map(|()| StepOutcome::default())
            }
            DomainStep::Instant { .. } => match instant(step) {
                Some(step) => cut::take(self, step, context).await,
                None => Ok(StepOutcome::default()),
            },
            DomainStep::SaveMemory { image, compress, .. } => {
                let path = image.require_path()?.to_owned();
                let running = self.saved_running.lock().await.take().unwrap_or(true);
                let bytes = blocking(move || memory::seal(&path, running, &Silent)).await?;
                context.progress.bytes(bytes, bytes);
                let mut facts = StepOutcome::default().memory_bytes(Some(bytes));
                if *compress > 0 {
                    facts.notes.push(
                        "the memory image is not compressed: this is not supported with Xen".to_owned(),
                    );
                }
                Ok(facts)
            }
            DomainStep::ReopenByName { .. } => match self.qemu().await {
                Some(qemu) => qemu.apply(step, context).await,
                None => Ok(StepOutcome::default()),
            },
            DomainStep::Detach { .. } => {
                section::open(self, step, context).await.map(|()| StepOutcome::default())
            }
            DomainStep::Attach { .. } => {
                section::attach(self, step, context).await.map(|()| StepOutcome::default())
            }
            DomainStep::Continue { .. } => section::finish(self, step, context).await,
            // A domain is created again with the media of its configuration.
            DomainStep::Media { .. } => Ok(StepOutcome::default()),
            DomainStep::RemoveMemory { image } => remove_memory(image).await.map(|()| StepOutcome::default()),
            // The engine's own.
            DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => Ok(StepOutcome::default()),
        }
    }

    async fn undo(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
        *self.known_row() = None;
        match step {
            DomainStep::Instant { .. } => match instant(step) {
                Some(step) => cut::undo(self, step, context).await,
                None => Ok(()),
            },
            DomainStep::SaveMemory { image, .. } => remove_memory(image).await,
            DomainStep::Detach { .. } => section::undo_open(self, step, context).await,
            DomainStep::Attach { .. } => section::undo_attach(self, step, context).await,
            // There is nothing to undo: a check changes nothing, and a node that was reopened by name keeps
            // its name.
            DomainStep::CheckMemory { .. }
            | DomainStep::ReopenByName { .. }
            | DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => Ok(()),
            DomainStep::Continue { .. } | DomainStep::Media { .. } | DomainStep::RemoveMemory { .. } => {
                Err(Error::new(ErrorKind::Internal, "a step that cannot be undone was to be undone"))
            }
        }
    }

    async fn clean_up(&self, chains: &[OpenChain]) -> Result<Vec<String>> {
        match self.qemu().await {
            Some(qemu) => qemu.clean_up(chains).await,
            None => Ok(Vec::new()),
        }
    }
}

/// Progress of work that is reported when it is complete.
pub(crate) struct Silent;

impl snapcore::backend::Progress for Silent {
    fn bytes(&self, _: u64, _: u64) {}
}

/// The part of a plan that the disks' QEMU has to do: their steps, and the cut of the disks alone.
fn of_disks(plan: &Plan) -> Plan {
    let mut of_disks = plan.clone();
    of_disks.prepare.retain(|step| matches!(step, PlanStep::Disk(_)));
    of_disks.finish.retain(|unit| matches!(unit, FinishUnit::Disk(_)));
    of_disks.cut.retain_mut(|unit| match unit {
        CutUnit::Disk(_) => true,
        CutUnit::Domain { step, .. } => {
            let alone = instant(&step.action).map(|cut| cut::disks_alone(&cut));
            let is_cut = alone.is_some();
            step.action = alone.unwrap_or_else(|| step.action.clone());
            is_cut
        }
    });
    of_disks
}

fn instant(step: &DomainStep) -> Option<cut::CutStep<'_>> {
    match step {
        DomainStep::Instant { disks, running, memory, quiesce, then, .. } => Some(cut::CutStep {
            disks,
            running: *running,
            memory: memory.as_ref(),
            quiesce: *quiesce,
            then: *then,
        }),
        _ => None,
    }
}
