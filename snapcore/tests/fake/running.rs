//! A hypervisor whose domain runs on rows of a table: it knows its disks by the names of rows, and has no
//! file open.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use async_trait::async_trait;
use camino::Utf8Path;
use snapcore::backend::Progress;
use snapcore::hypervisor::*;
use snapcore::*;
use tokio_util::sync::CancellationToken;

/// A hypervisor with one domain. Clones share it.
#[derive(Clone)]
pub struct RowMachine {
    disks: Vec<RowDisk>,
    running: Arc<AtomicBool>,
}

#[derive(Clone)]
struct RowDisk {
    target: Target,
    address: DiskAddress,
    attached: Arc<AtomicBool>,
}

impl RowMachine {
    pub const NAME: Hypervisor = Hypervisor::named("rows");

    pub fn new(disks: &[(&str, &str)]) -> Self {
        let disk = |(target, address): &(&str, &str)| RowDisk {
            target: Target::new(*target).unwrap(),
            address: DiskAddress::from(*address),
            attached: Arc::new(AtomicBool::new(true)),
        };
        let running = Arc::new(AtomicBool::new(true));
        Self { disks: disks.iter().map(disk).collect(), running }
    }

    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    fn set(&self, attached: bool) {
        self.disks.iter().for_each(|disk| disk.attached.store(attached, Ordering::SeqCst));
    }

    fn info(&self) -> DomainInfo {
        let disks = self.disks.iter().map(|disk| {
            SeenDisk::new(disk.target.clone(), disk.address.clone(), "table")
                .guest_writes(true)
                .member(Some(disk.target.clone()))
        });
        DomainInfo::new(serde_json::json!("rows"), self.is_running()).disks(disks.collect())
    }
}

fn no<T>() -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, "a machine on rows cannot do this"))
}

#[async_trait]
impl VmStateSaver for RowMachine {
    fn profile(&self) -> HypervisorProfile {
        HypervisorProfile::new(Self::NAME, "Rows", "NAME")
    }

    fn read_control(&self, control: Control, _: &Utf8Path) -> Result<Control> {
        Ok(control)
    }

    async fn connect(&self, _: &Domain) -> Result<Option<Arc<dyn LiveDomain>>> {
        Ok(Some(Arc::new(RowLive { info: self.info(), machine: self.clone() })))
    }

    async fn look(&self, _: &Control) -> Result<DomainInfo> {
        Ok(self.info())
    }

    async fn scan(&self) -> Result<Vec<(Control, DomainInfo)>> {
        Ok(Vec::new())
    }

    async fn check_memory(&self, _: &Utf8Path, _: &dyn Progress) -> Result<()> {
        no()
    }

    async fn start(&self, _: StartFromMemory<'_>) -> Result<StepOutcome> {
        no()
    }

    async fn remove_memory(&self, _: &Utf8Path) -> Result<()> {
        no()
    }
}

struct RowLive {
    info: DomainInfo,
    machine: RowMachine,
}

#[async_trait]
impl LiveDomain for RowLive {
    fn seen(&self) -> &DomainInfo {
        &self.info
    }

    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk> {
        self.machine.disks.iter().find(|disk| disk.target == *target).map(|disk| disk as &dyn AttachedDisk)
    }

    fn differences(&self, _: &serde_json::Value) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    async fn resume(&self) -> Result<()> {
        self.machine.running.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn limit(&self, _: u64) {}

    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        let run = |running| self.machine.running.store(running, Ordering::SeqCst);
        match step {
            DomainStep::Instant { memory: None, .. } => {
                run(false);
                context.inside.run(None).await?;
                run(true);
            }
            DomainStep::Detach { .. } => {
                run(false);
                self.machine.set(false);
            }
            DomainStep::Attach { .. } => self.machine.set(true),
            DomainStep::Continue { memory: None, .. } => run(true),
            _ => return no(),
        }
        Ok(StepOutcome::default())
    }

    async fn undo(&self, _: &DomainStep, context: DomainContext<'_>) -> Result<()> {
        context.inside.run(None).await?;
        self.machine.set(true);
        self.resume().await
    }

    async fn clean_up(&self, _: &[OpenChain]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl AttachedDisk for RowDisk {
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        Ok(HashSet::new())
    }

    async fn has_open(&self, image: &DiskIdentity) -> Result<bool> {
        let ours = DiskIdentity::Named(self.address.to_string());
        Ok(self.attached.load(Ordering::SeqCst) && *image == ours)
    }

    async fn merge(
        &self,
        _: &AttachedMerge,
        _: &dyn Inside,
        _: &dyn Progress,
        _: &CancellationToken,
    ) -> Result<()> {
        no()
    }

    async fn drop_internal(&self, _: &[String]) -> Result<()> {
        no()
    }
}
