//! [`QemuDomain`]: a connection to one running domain.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use qmp::Agent;
use serde::Deserialize;
use serde_json::{Value, json};
use snapcore::hypervisor::{
    AttachedDisk, Control, DomainContext, DomainInfo, DomainStep, LiveDomain, Medium, Obstacle, OpenChain,
    StepOutcome,
};
use snapcore::{DiskAddress, Domain, Error, ErrorKind, FileIdentity, Plan, Result, Target};
use tokio::{sync::watch, time::timeout};

use super::{
    Connection, cut, describe,
    disk::{self, Disk, FileView},
    error::to_engine,
    mark::Mark,
    media, preflight, recorded, remove_memory, reopen, section, served,
    state::StateFile,
    unpacked::Unpacked,
};
use crate::{
    discover::{self, Abilities, BlockDevice, Discovery, ImageOptions, Process, compare},
    drain,
    fdset::refusal,
    gdb,
    graph::{self, Graph, Node},
    guest_clock::set_guest_clock,
    instant::Saving,
    machine::Machine,
    name::{is_mark, is_ours},
    quiesce,
};

/// Time limit for a guest agent in operations that the user did not ask for.
const AGENT: Duration = Duration::from_secs(2);

/// A running domain. Its memory of a step is only what would be lost with its process anyway.
pub(super) struct QemuDomain {
    _connection: Arc<Connection>,
    pub(super) machine: Machine,
    pub(super) seen: DomainInfo,
    discovery: Discovery,
    pub(super) agent: Option<Agent>,
    pub(super) disks: Vec<Disk>,
    /// The domain's disks that are files of the machine's state.
    state: Vec<StateFile>,
    /// The layers of the domain's disks that belong to the domain.
    owned: Vec<(Target, PathBuf)>,
    /// The files of those disks of the domain that the machine does not have.
    unplugged: HashSet<FileIdentity>,
    speed: Arc<watch::Sender<u64>>,
    /// The overlays that were opened ahead of a cut.
    open_overlays: Mutex<Vec<cut::OpenOverlay>>,
    /// The memory of the cut that is being written. The flag is true if the guest ran at the instant.
    saving: Mutex<Option<(Saving, bool)>>,
    /// Start of the current detached section.
    section_since: Mutex<Option<Instant>>,
    /// True once the guest was resumed after the cut. A later pause is another client's, and an undo leaves
    /// the guest paused.
    pub(super) resumed: AtomicBool,
    pub(super) unpacked: Unpacked,
}

impl QemuDomain {
    pub(super) async fn new(
        connection: Arc<Connection>,
        domain: &Domain,
        control: &Control,
        unpacked: Unpacked,
    ) -> crate::Result<Self> {
        let machine = connection.0.clone();
        recall(&machine, domain);
        let mut discovery = Discovery::read(&machine).await?;
        remember(&machine, &discovery);
        let graph = machine.graph().await?;
        let view = FileView::of(&machine);
        let found = StateFile::find(&machine, &discovery, &view, &graph).await?;
        let mut seen = describe::describe(&machine, &discovery, &view, &graph, &found).await?;
        let (speed, limits) = disk::speed();
        let (mut disks, mut unplugged) = (Vec::new(), HashSet::new());
        let mut state = Vec::new();
        for record in &domain.disks {
            if StateFile::is_format(&record.disk.format) {
                if let Some(found) = StateFile::of(record, &found) {
                    let target = &record.disk.target;
                    describe::is_state_member(&mut seen.disks, found, target);
                    state.push(StateFile { target: target.clone(), ..found.clone() });
                }
                continue;
            }
            let device = disk::device_of(record, &discovery.drives, &graph, &view);
            if device.is_none() {
                disk::refuse_hidden(record, &discovery.drives, &graph, &view)?;
                unplugged.extend(disk::files_of(record, &view));
            }
            if let Some(device) = device {
                let target = &record.disk.target;
                let path = record.disk.path().as_std_path();
                let now = view.identity(path);
                let is_it = |file: &Path| file == path || now.is_some() && view.identity(file) == now;
                let given = ImageOptions::of(&discovery.process, is_it);
                // An image on top since an earlier snapshot was opened by us.
                let server = device
                    .root()
                    .and_then(|root| disk::QemuChain::read(&graph, &view, root).server().cloned());
                let unknown = given.is_none()
                    && server.is_none()
                    && !discovery.process.command_line.is_empty()
                    && !view.is_of_xen()
                    && !device.root().is_some_and(is_ours);
                let given = given.or_else(|| plugged_in(&discovery, &view, &graph, device));
                let mut disk = Disk::new(&machine, &view, target, &device.target, limits.clone(), given);
                disk.options_unknown = unknown;
                disk.server = server;
                for layer in disk.open_in(&graph).layers {
                    machine.remember_options(&layer.node.name, &disk.like(&layer.node));
                }
                disks.push(disk);
                describe::is_member(&mut seen.disks, &discovery, &view, &graph, device, target);
            }
        }
        // The content of a drive that is one of the domain's disks is in its snapshots, not in the machine's
        // record.
        let is_disk = |target: &String| disks.iter().any(|disk| disk.device == *target);
        let mut is_recorded_so = true;
        for drive in &mut discovery.drives {
            if drive.removable && is_disk(&drive.target) {
                (drive.medium, drive.medium_format, is_recorded_so) = (None, None, false);
            }
        }
        if !is_recorded_so {
            seen.machine = describe::record(&discovery);
        }
        let mut owned = Vec::new();
        for record in &domain.disks {
            let directory =
                record.disk.path().parent().map(|parent| parent.as_std_path()).unwrap_or(Path::new(""));
            let layers = record.owned.iter().map(|layer| directory.join(layer.as_str()));
            owned.extend(layers.map(|layer| (record.disk.target.clone(), layer)));
        }
        let agent = control.agent.as_ref().or(seen.agent.as_ref());
        let agent = agent.map(|socket| Agent::new(PathBuf::from(socket.as_str())));
        let (open_overlays, saving, section_since) = (Mutex::default(), Mutex::default(), Mutex::default());
        Ok(Self {
            _connection: connection,
            machine,
            seen,
            discovery,
            agent,
            disks,
            state,
            owned,
            unplugged,
            speed,
            open_overlays,
            resumed: AtomicBool::default(),
            saving,
            section_since,
            unpacked,
        })
    }

    pub(super) fn disk_of(&self, target: &Target) -> Option<&Disk> {
        self.disks.iter().find(|disk| disk.target == *target)
    }

    /// Returns true if a file is a layer of the disk that belongs to the domain.
    pub(super) fn owns(&self, target: &Target, file: &Path) -> bool {
        self.owned.iter().any(|(of, layer)| of == target && layer == file)
    }

    pub(super) fn expect(&self, target: &Target) -> Result<&Disk> {
        self.disk_of(target).ok_or_else(|| {
            let detail = format!("the running domain has no device whose image is disk {target}'s");
            Error::new(ErrorKind::Refused, detail)
                .advise("start the domain with the disk's configured path, or look whether that was moved")
        })
    }

    pub(super) fn open_overlays(&self) -> MutexGuard<'_, Vec<cut::OpenOverlay>> {
        self.open_overlays.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn saving(&self) -> MutexGuard<'_, Option<(Saving, bool)>> {
        self.saving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn section_since(&self) -> MutexGuard<'_, Option<Instant>> {
        self.section_since.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Thaws the guest's file systems, if its agent answers soon; returns their number.
    pub(super) async fn thaw_all(&self) -> u64 {
        let Some(agent) = &self.agent else { return 0 };
        let answers = quiesce::is_agent_there(&self.machine, agent).await;
        if matches!(answers, Ok(Some(false)) | Err(_)) {
            return 0;
        }
        match timeout(AGENT, quiesce::thaw_after_crash(&agent.within(AGENT))).await {
            Ok(Ok(thawed)) => thawed,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the guest was not thawed");
                0
            }
            Err(_) => 0,
        }
    }

    /// Makes a note on disks of which options are lost when their images are reopened, or new ones are put on
    /// top.
    pub(super) fn lost_options<'a>(&self, targets: impl Iterator<Item = &'a Target>) -> Option<String> {
        let unknown = targets.filter(|target| self.disk_of(target).is_some_and(|disk| disk.options_unknown));
        let names: Vec<&str> = unknown.map(Target::as_str).collect();
        (!names.is_empty()).then(|| {
            format!(
                "{}: plugged in while QEMU ran, which does not report the options discard, aio, overlap-check and cache sizes \
                 of an image: images that are opened by this have discard=unmap, and QEMU's defaults of the others",
                names.join(", ")
            )
        })
    }

    /// Makes a note for each disk whose content was exchanged below a filter that saves overwritten data.
    async fn copies_left_behind(&self, targets: impl Iterator<Item = &Target>) -> Result<Vec<String>> {
        let graph = self.machine.graph().await.map_err(to_engine)?;
        let mut notes = Vec::new();
        for disk in targets.filter_map(|target| self.disk_of(target)) {
            let filters = graph.root(&disk.device).map(|root| graph.filters_on(root)).unwrap_or_default();
            for filter in filters.iter().filter(|filter| filter.driver == graph::COPY_BEFORE_WRITE) {
                notes.push(format!(
                    "{}: its {} filter {} did not copy the replaced content: a backup must not use its target",
                    disk.target, filter.driver, filter.name
                ));
            }
        }
        Ok(notes)
    }

    /// Makes a note for each disk whose active image has dirty bitmaps that are in no file: they are lost
    /// with its node.
    pub(super) async fn lost_bitmaps(&self, targets: impl Iterator<Item = &Target>) -> Result<Vec<String>> {
        let graph = self.machine.graph().await.map_err(to_engine)?;
        let mut notes = Vec::new();
        for disk in targets.filter_map(|target| self.disk_of(target)) {
            let active = graph.root(&disk.device).and_then(|root| graph.node(root));
            let Some(active) = active.filter(|node| !node.bitmaps.is_empty()) else { continue };
            notes.push(format!(
                "{}: its dirty bitmaps ({}) are not in its new active image: the next incremental backup of this disk \
                 must be a full one",
                disk.target,
                active.bitmaps.join(", ")
            ));
        }
        Ok(notes)
    }

    /// Sets the guest's clock after memory was loaded; returns a note for the user if it is not set.
    pub(super) async fn set_clock(&self) -> Option<String> {
        set_clock(&self.machine, self.agent.as_ref()).await
    }
}

/// Finds the options of an image that the command line does not name, as far as possible.
fn plugged_in(
    discovery: &Discovery,
    view: &FileView,
    graph: &Graph,
    device: &BlockDevice,
) -> Option<ImageOptions> {
    let open = disk::QemuChain::read(graph, view, device.root()?);
    let root = open.root()?;
    // Inactive images, after a migration, have no locks. A QEMU before 10.0 does not report if an image is
    // active.
    let is_active = root.node.active.unwrap_or(discovery.state.running);
    (is_active && view.is_open_unlocked(root.identity?)).then(ImageOptions::without_locks)
}

/// The abilities of a QEMU, by its program's build and its version.
type Known = (String, Option<(u64, u64, u64)>, Abilities);

/// The abilities that this process has read from QEMUs: their schema takes a while to read.
static KNOWN: Mutex<Vec<Known>> = Mutex::new(Vec::new());

fn known() -> MutexGuard<'static, Vec<Known>> {
    KNOWN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is recorded of the program that ran a machine: a part of a [`Discovery`], or all that another
/// hypervisor has recorded of the QEMU that serves its disks.
#[derive(Deserialize)]
struct Program {
    process: Build,
    version: Option<(u64, u64, u64)>,
    abilities: Abilities,
}

#[derive(Deserialize)]
struct Build {
    build: Option<String>,
}

impl Program {
    fn of(record: &Value) -> Option<Self> {
        Self::deserialize(record.get(PROGRAM).unwrap_or(record)).ok()
    }
}

/// The member of another hypervisor's record that has [`program_record`].
pub(super) const PROGRAM: &str = "qemu";

/// What of a machine's record shows the abilities of its QEMU, so that they need not be asked again.
pub(super) fn program_record(record: &Value) -> Value {
    json!({
        "process": { "build": record["process"]["build"] },
        "version": record["version"],
        "abilities": record["abilities"],
    })
}

/// Sets the abilities of this QEMU if they are known: read before, or recorded with the snapshots of a
/// machine that the same program ran.
fn recall(machine: &Machine, domain: &Domain) {
    let Some(build) = Process::read(machine).build else { return };
    let version = machine.qmp().greeting().version;
    let asked = known().iter().find(|known| (&known.0, known.1) == (&build, version)).cloned();
    let recorded = || {
        let mut records = domain.machines.iter().rev().filter_map(|known| Program::of(&known.record));
        let is_same =
            |known: &Program| known.process.build.as_ref() == Some(&build) && known.version == version;
        records.find(is_same).map(|known| known.abilities)
    };
    if let Some(abilities) = asked.map(|(_, _, abilities)| abilities).or_else(recorded) {
        machine.know(abilities);
    }
}

fn remember(machine: &Machine, discovery: &Discovery) {
    let Some(build) = &discovery.process.build else { return };
    let version = machine.qmp().greeting().version;
    let mut known = known();
    if !known.iter().any(|known| (&known.0, known.1) == (build, version)) {
        known.push((build.clone(), version, discovery.abilities.clone()));
    }
}

/// Sets a guest's clock through its agent, if that answers soon.
pub(super) async fn set_clock(machine: &Machine, agent: Option<&Agent>) -> Option<String> {
    let late = |why: String| Some(format!("the guest's clock is as old as its memory: {why}"));
    let Some(agent) = agent else { return late("no guest agent is known that could set it".to_owned()) };
    if let Ok(Some(false)) = quiesce::is_agent_there(machine, agent).await {
        return late("no agent runs in the guest that could set it".to_owned());
    }
    match timeout(AGENT, set_guest_clock(&agent.within(AGENT))).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => late(error.to_string()),
        Err(_) => late(format!("the agent does not answer within {} s", AGENT.as_secs())),
    }
}

fn needs_a_unix_socket(why: String) -> Obstacle {
    let advice = "give QEMU a Unix socket (-qmp unix:PATH,server=on,wait=off) and use that".to_owned();
    Obstacle::new(why, advice)
}

#[async_trait]
impl LiveDomain for QemuDomain {
    fn seen(&self) -> &DomainInfo {
        &self.seen
    }

    fn processes(&self) -> Vec<u32> {
        let servers = self.disks.iter().filter_map(|disk| disk.server.as_ref()?.info().ok());
        self.discovery.process.pid.into_iter().chain(servers.map(|info| info.pid)).collect()
    }

    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk> {
        let state = || self.state.iter().find(|state| state.target == *target);
        match self.disk_of(target) {
            Some(disk) => Some(disk),
            None => state().map(|state| state as &dyn AttachedDisk),
        }
    }

    fn differences(&self, record: &serde_json::Value) -> Result<Vec<String>> {
        let record = recorded(record)?;
        let mut differences: Vec<String> =
            compare(&record, &self.discovery).iter().map(ToString::to_string).collect();
        let view = FileView::of(&self.machine);
        for medium in discover::media(&record, &self.discovery) {
            if let Some(file) =
                medium.address.filter(|file| view.identity(&view.absolute(file.as_str())).is_none())
            {
                differences.push(format!(
                    "medium in drive {}: recorded {file}, which is gone: put the file back",
                    medium.drive
                ));
            }
        }
        Ok(differences)
    }

    fn media(&self, record: &serde_json::Value) -> Result<Vec<Medium>> {
        Ok(discover::media(&recorded(record)?, &self.discovery))
    }

    fn cannot_save_memory(&self) -> Option<Obstacle> {
        let why = refusal(&self.machine).or_else(|| {
            let by_name = self.discovery.abilities.file_migration || self.machine.qmp().passes_descriptors();
            let why = "this QEMU takes a memory image only as a descriptor, which cannot be passed over TCP";
            (!by_name).then(|| why.to_owned())
        });
        why.map(needs_a_unix_socket)
    }

    fn cannot_detach(&self) -> Option<Obstacle> {
        let why = "a detached disk is replaced by a descriptor, which cannot be passed over TCP";
        (!self.machine.qmp().passes_descriptors()).then(|| needs_a_unix_socket(why.to_owned()))
    }

    async fn resume(&self) -> Result<()> {
        for disk in &self.disks {
            if disk.open().await.map_err(to_engine)?.placeholder.is_some() {
                let detail = format!("disk {} is detached: the guest would read zeros", disk.target);
                return Err(Error::new(ErrorKind::Refused, detail).advise("run `domsnap recover`"));
            }
        }
        self.machine.cont().await.map_err(to_engine)?;
        // A cut may have left a mark for a revert that did not follow.
        Mark::close_section(&self.machine).await.map_err(to_engine)
    }

    async fn resume_left(&self) -> Result<bool> {
        // Only the QEMU that took the cut has the mark: another one was paused by whoever started it.
        let ran = Mark::SectionRan.is_there(&self.machine).await.map_err(to_engine)?;
        if ran {
            self.resume().await?;
        }
        Ok(ran)
    }

    fn limit(&self, bytes_per_second: u64) {
        self.speed.send_replace(bytes_per_second);
    }

    async fn preflight(&self, plan: &Plan, chains: &[OpenChain], probe: bool) -> Result<()> {
        preflight::check(self, plan, chains, probe).await
    }

    async fn tidy(&self) -> Result<()> {
        preflight::remove_left(self.owned.iter().map(|(_, file)| file.as_path()));
        let graph = self.machine.graph().await.map_err(to_engine)?;
        let is_left = |node: &Node| {
            node.name.starts_with(disk::PLACEHOLDER)
                || drain::is_drain_node(&node.name)
                || (is_ours(&node.name) && !is_mark(&node.name) && graph.users(&node.name).next().is_none())
        };
        // A program that unplugged a disk could not close its images if one of our nodes was backed by them.
        // Left open, they would be locked until QEMU ends. A device plugged in again with the old node would
        // write a frozen image.
        let view = FileView::of(&self.machine);
        for top in graph.nodes().iter().filter(|node| is_left(node)) {
            let chain = disk::QemuChain::read(&graph, &view, &top.name);
            if chain
                .layers
                .iter()
                .any(|layer| layer.identity.is_some_and(|file| self.unplugged.contains(&file)))
            {
                let names: Vec<String> =
                    graph.chain(&top.name).iter().map(|node| node.name.clone()).collect();
                graph::remove_layers(&self.machine, &names).await.map_err(to_engine)?;
            }
        }
        if graph.nodes().iter().any(is_left) {
            cut::sweep(self).await?;
            graph::close_detached_chains(&self.machine).await.map_err(to_engine)?;
        }
        served::forget(self).await?;
        // One that a process opened which was killed (`generation_id`).
        gdb::close(&self.machine).await.map_err(to_engine)?;
        // A guest that runs on its own disks is not in a detached section: it was not stopped yet, or was
        // resumed already. With a wrong mark, memory would be loaded over disks that were written since.
        let is_closed = |disk: &Disk| disk.server.is_some() && disk.open_in(&graph).placeholder.is_some();
        let is_detached = graph.nodes().iter().any(|node| node.name.starts_with(disk::PLACEHOLDER))
            || self.disks.iter().any(is_closed);
        if !is_detached
            && graph.nodes().iter().any(|node| is_mark(&node.name))
            && self.machine.run_state().await.map_err(to_engine)?.running
        {
            Mark::close_section(&self.machine).await.map_err(to_engine)?;
        }
        Ok(())
    }

    async fn prepare(&self, step: &DomainStep) -> Result<()> {
        match instant(step) {
            Some(step) => cut::open_overlays(self, step).await,
            None => Ok(()),
        }
    }

    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        match step {
            DomainStep::CheckMemory { image } => {
                self.unpacked.check(image.require_path()?, context.progress).await?;
            }
            DomainStep::Instant { .. } => {
                if let Some(step) = instant(step) {
                    return cut::take(self, step, context).await;
                }
            }
            DomainStep::SaveMemory { image, tag, compress } => {
                let file = image.require_path()?;
                return cut::save_memory(self, file, tag, *compress, context).await;
            }
            DomainStep::ReopenByName { disks } => {
                for target in disks {
                    let Some(chain) = context.chains.iter().find(|chain| chain.target == *target) else {
                        let detail = format!("no chain was given for disk {target}");
                        return Err(Error::new(ErrorKind::Internal, detail));
                    };
                    reopen::reopen_by_name(self.expect(target)?, chain).await?;
                }
            }
            DomainStep::Detach { disks, .. } => {
                let notes = self.lost_bitmaps(disks.iter()).await?;
                section::open(self, disks, context.together).await?;
                return Ok(StepOutcome::default().notes(notes));
            }
            DomainStep::Attach { disks, restart } => {
                section::attach(self, disks, context.chains).await?;
                let mut notes: Vec<String> = self.lost_options(disks.iter()).into_iter().collect();
                if restart.is_some() {
                    notes.extend(self.copies_left_behind(disks.iter()).await?);
                }
                return Ok(StepOutcome::default().notes(notes));
            }
            DomainStep::Media { media } => {
                media::put_back(&self.machine, media).await?;
            }
            DomainStep::Continue { memory, reset, power } => {
                let memory = memory.as_ref().map(DiskAddress::require_path).transpose()?;
                return section::finish(self, memory, *reset, *power, context).await;
            }
            DomainStep::RemoveMemory { image } => {
                remove_memory(image).await?;
            }
            // The engine's own.
            DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => {}
        }
        Ok(StepOutcome::default())
    }

    async fn undo(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
        match step {
            DomainStep::Instant { .. } => match instant(step) {
                Some(step) => cut::undo(self, step, context).await,
                None => Ok(()),
            },
            DomainStep::SaveMemory { image, .. } => cut::forget_memory(self, image).await,
            DomainStep::Detach { disks, .. } => section::undo_open(self, disks, context.chains).await,
            DomainStep::Attach { disks, .. } => section::undo_attach(self, disks).await,
            // There is nothing to undo in QEMU: a check changes nothing, and a node that was reopened by name
            // keeps its name.
            DomainStep::CheckMemory { image } => {
                self.unpacked.release(image.require_path()?);
                Ok(())
            }
            DomainStep::ReopenByName { .. }
            | DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => Ok(()),
            DomainStep::Continue { .. } | DomainStep::Media { .. } | DomainStep::RemoveMemory { .. } => {
                let detail = "a step that cannot be undone was to be undone";
                Err(Error::new(ErrorKind::Internal, detail))
            }
        }
    }

    async fn thaw(&self) -> Vec<String> {
        match self.thaw_all().await {
            0 => Vec::new(),
            1 => vec!["thawed a file system of the guest".to_owned()],
            several => vec![format!("thawed {several} file systems of the guest")],
        }
    }

    async fn clean_up(&self, chains: &[OpenChain]) -> Result<Vec<String>> {
        let mut done = self.thaw().await;
        cut::sweep(self).await?;
        for chain in chains {
            let Some(disk) = self.disk_of(&chain.target) else { continue };
            match reopen::reopen_by_name(disk, chain).await {
                Ok(0) => {}
                Ok(1) => {
                    done.push(format!("made a frozen image of disk {} known by its own name", chain.target))
                }
                Ok(several) => done.push(format!(
                    "made {several} frozen images of disk {} known by their own names",
                    chain.target
                )),
                Err(error) => done.push(format!("not done: {error}")),
            }
        }
        Ok(done)
    }
}

/// Returns the cut of a step, if it is one.
fn instant(step: &DomainStep) -> Option<cut::CutStep<'_>> {
    match step {
        DomainStep::Instant { disks, running, memory, quiesce, quiesce_limit_ms, then, for_revert } => {
            Some(cut::CutStep {
                disks,
                running: *running,
                memory: memory.as_ref(),
                quiesce: *quiesce,
                quiesce_limit: Duration::from_millis(*quiesce_limit_ms),
                then: *then,
                for_revert: *for_revert,
            })
        }
        _ => None,
    }
}
