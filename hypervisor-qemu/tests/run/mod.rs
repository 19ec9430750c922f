//! The environment of an engine around a running domain: its disks' layers and paths, nested steps, a
//! connection.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context, Result};
use async_trait::async_trait;
use camino::Utf8PathBuf;
use hypervisor_qemu::Qemu;
use snapcore::backend::Progress;
use snapcore::hypervisor::{
    AttachedMerge, Control, DiskInstant, DomainContext, DomainStep, Inside, LiveDomain, MemoryPlan,
    OpenChain, OpenLayer, Quiesce, StepOutcome, VmStateSaver,
};
use snapcore::{
    Disk, DiskAddress, DiskRecord, Domain, DomainName, Error, ErrorKind, FileIdentity, LayerName, Target,
};
use testguest::Guest;
use tokio_util::sync::CancellationToken;

use crate::kit;

pub struct Quiet;

impl Progress for Quiet {
    fn bytes(&self, _: u64, _: u64) {}
}

/// A nested step that fails instead of moving a path.
pub struct Fails;

#[async_trait]
impl Inside for Fails {
    async fn run(&self, _: Option<&Target>) -> snapcore::Result<()> {
        Err(Error::new(ErrorKind::NoSpace, "no space for a link"))
    }

    async fn back(&self, _: Option<&Target>) -> snapcore::Result<()> {
        Ok(())
    }
}

/// A nested step that a crash interrupts, before or after it has moved the paths.
pub struct Hangs {
    pub moves: Moves,
    pub after: bool,
}

#[async_trait]
impl Inside for Hangs {
    async fn run(&self, only: Option<&Target>) -> snapcore::Result<()> {
        if self.after {
            self.moves.run(only).await?;
        }
        std::future::pending().await
    }

    async fn back(&self, _: Option<&Target>) -> snapcore::Result<()> {
        Err(Error::new(ErrorKind::Internal, "whoever was to do this is gone"))
    }
}

/// Moves configured paths to layers, as the engine does inside of a step.
pub struct Moves(Vec<(Target, PathBuf, PathBuf)>);

#[async_trait]
impl Inside for Moves {
    async fn run(&self, only: Option<&Target>) -> snapcore::Result<()> {
        for (target, path, layer) in &self.0 {
            if only.is_none_or(|only| only == target) {
                move_path(path, layer).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
            }
        }
        Ok(())
    }

    async fn back(&self, _: Option<&Target>) -> snapcore::Result<()> {
        Err(Error::new(ErrorKind::Internal, "no pivot of these tests fails after its hook"))
    }
}

fn move_path(path: &Path, layer: &Path) -> std::io::Result<()> {
    if identity(path).ok() == identity(layer).ok() {
        return Ok(());
    }
    let new = path.with_extension("new");
    fs::hard_link(layer, &new)?;
    fs::rename(&new, path)?;
    fs::File::open(path.parent().expect("a directory"))?.sync_all()
}

pub fn identity(file: &Path) -> std::io::Result<FileIdentity> {
    let about = fs::metadata(file)?;
    Ok((about.dev(), about.ino()))
}

pub fn utf8(path: &Path) -> Utf8PathBuf {
    Utf8PathBuf::from_path_buf(path.to_owned()).expect("UTF-8")
}

/// Returns the address of a file.
pub fn address(path: &Path) -> DiskAddress {
    utf8(path).into()
}

/// Makes an image from a file name that ends in its format.
pub fn image(file: &Path) -> OpenLayer {
    let format = file.extension().expect("a layer's name ends in its format").to_string_lossy().into_owned();
    OpenLayer::new(utf8(file), format)
}

pub struct Run {
    pub guest: Guest,
    pub dir: PathBuf,
    pub saver: Qemu,
    pub domain: Domain,
    pub targets: Vec<Target>,
    /// The layers of each disk, by their permanent names, the active one first.
    pub layers: Vec<Vec<PathBuf>>,
    /// Number of overlays made so far.
    made: usize,
    live: Option<Arc<dyn LiveDomain>>,
}

impl Run {
    /// Connects to a guest whose disks have permanent names beside the configured paths.
    pub async fn new(guest: Guest) -> Result<Self> {
        let dir = guest.dir().to_owned();
        let (mut disks, mut layers, mut targets) = (Vec::new(), Vec::new(), Vec::new());
        for (target, path) in guest.targets().into_iter().zip(guest.disks()) {
            let format = path.extension().context("a disk's name ends in its format")?.to_string_lossy();
            let layer = dir.join(format!("{target}.ds-0.{format}"));
            fs::hard_link(&path, &layer)?;
            let target = Target::new(target)?;
            disks.push(DiskRecord::new(
                Disk::new(target.clone(), utf8(&path), format),
                LayerName(layer.file_name().context("a name")?.to_string_lossy().into_owned()),
            ));
            layers.push(vec![layer]);
            targets.push(target);
        }
        let control =
            Control::at(guest.qmp_socket().display().to_string()).agent(Some(utf8(guest.agent_socket())));
        let domain = Domain::new(DomainName::new("guest")?, disks)
            .hypervisor(hypervisor_qemu::NAME)
            .control(Some(control));
        let mut run = Self { guest, dir, saver: Qemu::new(), domain, targets, layers, made: 0, live: None };
        run.reconnect().await?;
        Ok(run)
    }

    pub fn live(&self) -> Result<Arc<dyn LiveDomain>> {
        self.live.clone().context("it is connected")
    }

    pub fn disconnect(&mut self) {
        self.live = None;
    }

    /// Connects again, as after a crash: no state is kept.
    pub async fn reconnect(&mut self) -> Result<()> {
        self.disconnect();
        self.live = Some(self.saver.connect(&self.domain).await?.context("it runs")?);
        Ok(())
    }

    /// Returns the chains for the hypervisor: the layers that the configured paths open now.
    pub fn chains(&self) -> Vec<OpenChain> {
        let chains = self.targets.iter().zip(&self.layers).zip(self.guest.disks());
        let chain = |((target, layers), path): ((&Target, &Vec<PathBuf>), PathBuf)| {
            let named = identity(&path).ok();
            let from = layers
                .iter()
                .position(|layer| identity(layer).ok() == named)
                .expect("the path names a layer");
            OpenChain::new(target.clone(), layers[from..].iter().map(|layer| image(layer)).collect())
        };
        chains.map(chain).collect()
    }

    /// Returns the files that the configured paths name.
    pub fn paths(&self) -> Vec<FileIdentity> {
        self.guest.disks().iter().map(|path| identity(path).expect("it is there")).collect()
    }

    /// Returns the files of a disk's layers.
    pub fn files(&self, disk: usize) -> HashSet<FileIdentity> {
        self.layers[disk].iter().map(|layer| identity(layer).expect("it is there")).collect()
    }

    pub async fn open_files(&self, disk: usize) -> Result<HashSet<FileIdentity>> {
        let live = self.live()?;
        Ok(live.disk(&self.targets[disk]).context("it is attached")?.open_files().await?)
    }

    /// Makes an overlay on a disk's active layer.
    fn overlay_file(&mut self, disk: usize) -> Result<PathBuf> {
        self.made += 1;
        let file = self.dir.join(format!("{}.ds-{}.qcow2", self.targets[disk], self.made));
        kit::make_overlay(&file, &self.layers[disk][0], 64)?;
        Ok(file)
    }

    /// Makes an overlay for a cut: the disk's active layer from then on.
    pub fn overlay(&mut self, disk: usize) -> Result<(Target, DiskInstant)> {
        let file = self.overlay_file(disk)?;
        self.layers[disk].insert(0, file.clone());
        Ok((
            self.targets[disk].clone(),
            DiskInstant::Overlay { address: utf8(&file).into(), format: "qcow2".to_owned() },
        ))
    }

    /// Makes another overlay on a disk's topmost layer, and moves the path to it, as at rest.
    pub fn grow(&mut self, disk: usize) -> Result<()> {
        let file = self.overlay_file(disk)?;
        move_path(&self.guest.disk(disk), &file)?;
        self.layers[disk].insert(0, file);
        Ok(())
    }

    pub fn instant(&self, disks: Vec<(Target, DiskInstant)>, memory: Option<&str>) -> DomainStep {
        DomainStep::Instant {
            disks,
            running: true,
            memory: memory.map(|name| {
                MemoryPlan::new(
                    address(&self.dir.join(name)),
                    true,
                    u64::try_from(kit::BUDGET.as_millis()).expect("small"),
                )
            }),
            quiesce: Quiesce::No,
            quiesce_limit_ms: 10_000,
            then: None,
            for_revert: false,
        }
    }

    /// Makes a nested step that moves the paths of some disks.
    pub fn moves(&self, to: &[(usize, PathBuf)]) -> Moves {
        let of = |(disk, layer): &(usize, PathBuf)| {
            (self.targets[*disk].clone(), self.guest.disk(*disk), layer.clone())
        };
        Moves(to.iter().map(of).collect())
    }

    /// Returns the disks of a cut that get overlays, and the layer at a position of their chains.
    fn layers_of(&self, step: &DomainStep, place: usize) -> Vec<(usize, PathBuf)> {
        let DomainStep::Instant { disks, .. } = step else { return Vec::new() };
        let overlays = disks.iter().filter(|(_, instant)| matches!(instant, DiskInstant::Overlay { .. }));
        let number = |target: &Target| self.targets.iter().position(|known| known == target).expect("known");
        overlays
            .map(|(target, _)| number(target))
            .map(|disk| (disk, self.layers[disk][place].clone()))
            .collect()
    }

    pub async fn take(&self, step: &DomainStep) -> snapcore::Result<StepOutcome> {
        self.take_with(step, &self.moves(&self.layers_of(step, 0))).await
    }

    pub async fn take_with(&self, step: &DomainStep, inside: &dyn Inside) -> snapcore::Result<StepOutcome> {
        self.within(inside, async |live, context| live.apply(step, context).await).await
    }

    pub async fn undo_instant(&self, step: &DomainStep) -> snapcore::Result<()> {
        self.undo_instant_with(step, &self.back(step)).await
    }

    /// Makes the nested step that moves the paths of a cut back.
    pub fn back(&self, step: &DomainStep) -> Moves {
        self.moves(&self.layers_of(step, 1))
    }

    pub async fn undo_instant_with(&self, step: &DomainStep, inside: &dyn Inside) -> snapcore::Result<()> {
        self.within(inside, async |live, context| live.undo(step, context).await).await
    }

    pub async fn apply(&self, step: &DomainStep) -> snapcore::Result<StepOutcome> {
        self.within(&(), async |live, context| live.apply(step, context).await).await
    }

    pub async fn undo(&self, step: &DomainStep) -> snapcore::Result<()> {
        self.within(&(), async |live, context| live.undo(step, context).await).await
    }

    async fn within<T>(
        &self,
        inside: &dyn Inside,
        work: impl AsyncFnOnce(&dyn LiveDomain, DomainContext<'_>) -> snapcore::Result<T>,
    ) -> snapcore::Result<T> {
        let chains = self.chains();
        let cancel = CancellationToken::new();
        let context = DomainContext::new(&self.domain, &chains, &Quiet, &cancel).inside(inside);
        let live = self.live.clone().expect("it is connected");
        work(&*live, context).await
    }

    pub async fn merge(&self, merge: &AttachedMerge, inside: &dyn Inside) -> snapcore::Result<()> {
        let live = self.live.clone().expect("it is connected");
        let disk = live.disk(&self.targets[0]).expect("it is attached");
        disk.merge(merge, inside, &Quiet, &CancellationToken::new()).await
    }

    /// Checks the conditions after each operation, over its own connection.
    pub async fn sound(&mut self) -> Result<()> {
        self.disconnect();
        let checked = kit::sound(&kit::machine(&self.guest).await?).await;
        self.reconnect().await?;
        checked
    }

    /// Abandons work in its middle, and connects again.
    pub async fn interrupt(&mut self, work: impl AsyncFnOnce(&Self) -> snapcore::Result<()>) -> Result<()> {
        let gone = tokio::time::timeout(std::time::Duration::from_secs(2), work(self)).await;
        anyhow::ensure!(gone.is_err(), "it came to its end: {gone:?}");
        self.reconnect().await
    }

    /// Returns the placeholders of detached disks.
    pub async fn placeholders(&mut self) -> Result<Vec<String>> {
        self.disconnect();
        let graph = hypervisor_qemu::graph::Graph::read(&kit::machine(&self.guest).await?).await?;
        self.reconnect().await?;
        let roots = self.targets.iter().map(|target| graph.root(target.as_str()).context("a root"));
        roots.map(|root| Ok(root?.to_owned())).collect()
    }

    /// Puts a placeholder on a disk's chain as a detach does, and stops there.
    pub async fn half_detach(&mut self, disk: usize, placeholder: &str) -> Result<()> {
        self.disconnect();
        let machine = kit::machine(&self.guest).await?;
        let graph = hypervisor_qemu::graph::Graph::read(&machine).await?;
        let root = graph.root(self.targets[disk].as_str()).context("a root")?;
        let file = self.dir.join("placeholder");
        kit::make_overlay(&file, &self.layers[disk][0], 64)?;
        let node = serde_json::json!({ "driver": "qcow2", "node-name": placeholder, "backing": null,
            "file": { "driver": "file", "filename": file, "node-name": format!("{placeholder}-f") } });
        machine.qmp().execute_raw("blockdev-add", node).await?;
        let put = serde_json::json!({ "node": root, "overlay": placeholder });
        machine.qmp().execute_raw("blockdev-snapshot", put).await?;
        drop(machine);
        self.reconnect().await
    }

    /// Starts a job of this name that copies a disk into nothing, at one byte a second.
    pub async fn copy_slowly(&mut self, disk: usize, job: &str) -> Result<()> {
        self.disconnect();
        let machine = kit::machine(&self.guest).await?;
        let graph = hypervisor_qemu::graph::Graph::read(&machine).await?;
        let root = graph.root(self.targets[disk].as_str()).context("a root")?;
        let size = 64 << 20;
        let nothing = serde_json::json!({ "driver": "null-co", "node-name": "nothing", "size": size });
        machine.qmp().execute_raw("blockdev-add", nothing).await?;
        let copy = serde_json::json!({ "job-id": job, "device": root, "target": "nothing", "sync": "full", "speed": 1 });
        machine.qmp().execute_raw("blockdev-mirror", copy).await?;
        drop(machine);
        self.reconnect().await
    }

    /// Ends a job that [`Self::copy_slowly`] started; returns true if it existed.
    pub async fn end_job(&mut self, job: &str) -> Result<bool> {
        self.disconnect();
        let machine = kit::machine(&self.guest).await?;
        let there = machine.qmp().execute_raw("job-cancel", serde_json::json!({ "id": job })).await.is_ok();
        kit::until(async || {
            let delete = serde_json::json!({ "node-name": "nothing" });
            Ok(machine.qmp().execute_raw("blockdev-del", delete).await.is_ok())
        })
        .await?;
        drop(machine);
        self.reconnect().await?;
        Ok(there)
    }

    /// Pauses the guest like its user.
    pub async fn pause(&mut self) -> Result<()> {
        self.disconnect();
        kit::machine(&self.guest).await?.qmp().execute_raw("stop", serde_json::Value::Null).await?;
        self.reconnect().await
    }

    /// Returns true if an agent has its port open in the guest.
    pub async fn agent_is_there(&self) -> Result<bool> {
        let agent = qmp::Agent::new(self.guest.agent_socket()).within(std::time::Duration::from_secs(1));
        Ok(agent.execute_raw("guest-ping", serde_json::Value::Null).await.is_ok())
    }
}
