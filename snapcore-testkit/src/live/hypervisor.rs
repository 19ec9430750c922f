//! The test hypervisor: [`VmStateSaver`] and [`LiveDomain`] for one [`TestGuest`].

use std::collections::HashSet;
use std::sync::Arc;

use async_trait::async_trait;
use camino::Utf8Path;
use jiff::Timestamp;
use snapcore::backend::Progress;
use snapcore::hypervisor::{
    AttachedDisk, AttachedMerge, Control, DiskInstant, DomainContext, DomainInfo, DomainStep, GuestChange,
    HypervisorProfile, Inside, LiveDomain, Obstacle, OpenChain, PowerAfter, SeenDisk, StartFromMemory,
    StepOutcome, Taken, VmStateSaver,
};
use snapcore::{
    Consistency, DiskAddress, Domain, Error, ErrorKind, FileIdentity, Hypervisor, Result, Target,
};
use tokio_util::sync::CancellationToken;

use super::guest::TestGuest;
use crate::fault::{FaultInjector, Moment};

/// The name that its domain is recorded under.
pub(crate) const NAME: Hypervisor = Hypervisor::named("testkit");

/// A hypervisor with one domain. Its steps have moments at which faults are injected, like those of disks.
pub(crate) struct TestHypervisor {
    guest: Arc<TestGuest>,
    faults: Arc<FaultInjector>,
}

impl TestHypervisor {
    pub(crate) fn new(guest: Arc<TestGuest>, faults: Arc<FaultInjector>) -> Self {
        Self { guest, faults }
    }

    fn info(&self) -> Option<DomainInfo> {
        let running = self.guest.is_running()?;
        let disks = self.guest.disks().into_iter().map(|disk| {
            SeenDisk::new(disk.target.clone(), disk.address, disk.format)
                .guest_writes(true)
                .member(Some(disk.target))
        });
        let machine = serde_json::json!({ "testkit": "guest" });
        let info = DomainInfo::new(machine, running).disks(disks.collect());
        Some(info.summary("a guest of the test kit's test hypervisor".to_owned()))
    }
}

fn unsupported<T>(what: &str) -> Result<T> {
    Err(Error::new(ErrorKind::Unsupported, format!("the test kit's test hypervisor {what}")))
}

fn failed(error: anyhow::Error) -> Error {
    Error::new(ErrorKind::Io, format!("the guest: {error:#}"))
}

#[async_trait]
impl VmStateSaver for TestHypervisor {
    fn profile(&self) -> HypervisorProfile {
        HypervisorProfile::new(NAME, "the test hypervisor", "NAME")
    }

    fn read_control(&self, control: Control, _: &Utf8Path) -> Result<Control> {
        Ok(control)
    }

    async fn connect(&self, _: &Domain) -> Result<Option<Arc<dyn LiveDomain>>> {
        let Some(seen) = self.info() else { return Ok(None) };
        let disk = |seen: &SeenDisk| TestDisk { guest: self.guest.clone(), target: seen.target.clone() };
        let disks = seen.disks.iter().map(disk).collect();
        Ok(Some(Arc::new(TestLive { guest: self.guest.clone(), faults: self.faults.clone(), seen, disks })))
    }

    async fn look(&self, _: &Control) -> Result<DomainInfo> {
        self.info().ok_or_else(|| Error::new(ErrorKind::NotFound, "the guest is off"))
    }

    async fn scan(&self) -> Result<Vec<(Control, DomainInfo)>> {
        Ok(self.info().map(|info| (Control::at("guest"), info)).into_iter().collect())
    }

    async fn check_memory(&self, _: &DiskAddress, _: &dyn Progress) -> Result<()> {
        unsupported("has no memory images")
    }

    async fn start(&self, _: StartFromMemory<'_>) -> Result<StepOutcome> {
        unsupported("starts no domain")
    }

    async fn remove_memory(&self, _: &DiskAddress) -> Result<()> {
        unsupported("has no memory images")
    }
}

/// A connection to the guest.
struct TestLive {
    guest: Arc<TestGuest>,
    faults: Arc<FaultInjector>,
    seen: DomainInfo,
    disks: Vec<TestDisk>,
}

/// A disk of the guest.
struct TestDisk {
    guest: Arc<TestGuest>,
    target: Target,
}

impl TestLive {
    /// The instant of a snapshot. The guest writes until it is paused, and again before this returns.
    async fn take(
        &self,
        disks: &[(Target, DiskInstant)],
        then: Option<PowerAfter>,
        inside: &dyn Inside,
    ) -> Result<StepOutcome> {
        if disks.iter().any(|(_, instant)| *instant != DiskInstant::ByBackend) {
            return unsupported("takes no points itself");
        }
        let ran = self.guest.pause().map_err(failed)?;
        self.guest.note_instant();
        self.faults.pass(Moment::BeforeApply).await?;
        // If it fails, the engine undoes this step, which resumes the guest.
        inside.run(None).await?;
        self.faults.pass(Moment::AfterApply).await?;
        if then.map_or(ran, |power| power == PowerAfter::Running) {
            self.guest.resume().map_err(failed)?;
        }
        let taken = Taken::new(Timestamp::now(), Consistency::Crash, ran, "test hypervisor");
        Ok(StepOutcome::default().taken(Some(taken)))
    }

    async fn perform(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        let mut outcome = StepOutcome::default();
        match step {
            DomainStep::Instant { disks, then, memory: None, .. } => {
                return self.take(disks, *then, context.inside).await;
            }
            DomainStep::Detach { disks, .. } => {
                let ran = self.guest.pause().map_err(failed)?;
                self.guest.detach(disks, ran);
            }
            DomainStep::Attach { disks, .. } => {
                self.guest.attach(disks, &context.domain.disks, context.chains);
            }
            DomainStep::Continue { power: Some(PowerAfter::Off), .. }
            | DomainStep::Continue { memory: Some(_), .. }
            | DomainStep::Instant { memory: Some(_), .. } => return unsupported("does not do this"),
            DomainStep::Continue { memory: None, reset, power } => {
                // Without a section the guest goes on already: it was resumed before a crash.
                if let Some(ran) = self.guest.end_section(*reset) {
                    outcome.guest = reset.then_some(GuestChange::Reset);
                    if power.map_or(ran, |power| power == PowerAfter::Running) {
                        self.guest.resume().map_err(failed)?;
                    }
                }
            }
            DomainStep::ReopenByName { .. }
            | DomainStep::Media { .. }
            | DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => {}
            DomainStep::CheckMemory { .. }
            | DomainStep::SaveMemory { .. }
            | DomainStep::RemoveMemory { .. } => return unsupported("has no memory images"),
        }
        Ok(outcome)
    }

    async fn take_back(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
        match step {
            DomainStep::Instant { disks, running, .. } => {
                for (target, _) in disks {
                    context.inside.run(Some(target)).await?;
                }
                if *running {
                    self.guest.resume().map_err(failed)?;
                }
            }
            DomainStep::Detach { disks, running, .. } => {
                self.guest.attach(disks, &context.domain.disks, context.chains);
                self.guest.end_section(false);
                if *running {
                    self.guest.resume().map_err(failed)?;
                }
            }
            DomainStep::Attach { disks, .. } => self.guest.detach(disks, true),
            DomainStep::CheckMemory { .. }
            | DomainStep::SaveMemory { .. }
            | DomainStep::ReopenByName { .. }
            | DomainStep::Media { .. }
            | DomainStep::Continue { .. }
            | DomainStep::RemoveMemory { .. }
            | DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. }
            | DomainStep::CloneMemory { .. } => {}
        }
        Ok(())
    }
}

#[async_trait]
impl LiveDomain for TestLive {
    fn seen(&self) -> &DomainInfo {
        &self.seen
    }

    fn processes(&self) -> Vec<u32> {
        vec![std::process::id()]
    }

    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk> {
        self.disks.iter().find(|disk| disk.target == *target).map(|disk| disk as &dyn AttachedDisk)
    }

    fn differences(&self, _: &serde_json::Value) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn cannot_save_memory(&self) -> Option<Obstacle> {
        Some(Obstacle::new("the test hypervisor saves no memory", "take the disks alone"))
    }

    async fn resume(&self) -> Result<()> {
        self.guest.resume().map_err(failed)
    }

    fn limit(&self, _: u64) {}

    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome> {
        self.faults.pass(Moment::BeforeApply).await?;
        let outcome = self.perform(step, context).await?;
        self.faults.pass(Moment::AfterApply).await?;
        Ok(outcome)
    }

    async fn undo(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()> {
        self.faults.pass(Moment::BeforeUndo).await?;
        self.take_back(step, context).await?;
        self.faults.pass(Moment::AfterUndo).await
    }

    async fn clean_up(&self, _: &[OpenChain]) -> Result<Vec<String>> {
        Ok(Vec::new())
    }
}

#[async_trait]
impl AttachedDisk for TestDisk {
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        Ok(self.guest.open_files(&self.target).into_iter().collect())
    }

    async fn merge(
        &self,
        _: &AttachedMerge,
        _: &dyn Inside,
        _: &dyn Progress,
        _: &CancellationToken,
    ) -> Result<()> {
        unsupported("merges nothing")
    }

    async fn drop_internal(&self, _: &[String]) -> Result<()> {
        unsupported("has no internal snapshots")
    }
}
