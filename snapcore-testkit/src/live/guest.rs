//! The guest of a running domain: a thread that writes to the disks as long as it is not paused.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use snapcore::hypervisor::OpenChain;
use snapcore::{Disk, DiskAddress, DiskRecord, FileIdentity, LayerName, Target, file_identity};

use crate::fixture::compare;
use crate::model::Bytes;
use crate::test_backend::TestBackend;

/// The bytes of each disk, by target.
pub(crate) type Content = BTreeMap<String, Bytes>;

/// The guest writes this much at a place.
const BLOCK: usize = 4096;

/// The pause between two ticks, in which another thread may pause the guest.
const BETWEEN_TICKS: Duration = Duration::from_micros(500);

/// The longest wait for a tick of a running guest. Much longer than any machine needs.
const PATIENCE: Duration = Duration::from_secs(120);

/// A guest, and what its hypervisor knows of it. It outlives each process of domsnap that is made and dropped
/// in a test case, as a real one does.
///
/// It writes in ticks. At each it writes the tick's number to the first bytes of every disk, and a block of
/// other bytes somewhere on every disk, and notes what was acknowledged. A pause waits for the tick to end.
/// So whenever the guest is paused, all disks have the same number.
#[derive(Debug)]
pub(crate) struct TestGuest {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    power: Power,
    /// In a detached section: true if the guest ran before it.
    section: Option<bool>,
    disks: Vec<GuestDisk>,
    tick: u64,
    /// It reads its disks before it writes: it was reset.
    boots: bool,
    /// What it found on its disks at each boot.
    found: Vec<Content>,
    /// What was acknowledged when the guest was paused for the last instant.
    instant: Option<Content>,
    pauses: u64,
    failure: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Power {
    Off,
    Running,
    Paused,
    /// Its thread ends.
    Over,
}

#[derive(Debug)]
struct GuestDisk {
    record: DiskRecord,
    /// The files that the hypervisor has open; none in a detached section.
    open: Vec<FileIdentity>,
    attached: bool,
    /// What the guest has written, and what was there before.
    content: Bytes,
}

impl GuestDisk {
    fn target(&self) -> &Target {
        &self.record.disk.target
    }

    fn write(&mut self, subject: &dyn TestBackend, offset: usize, bytes: &[u8]) -> Result<()> {
        ensure!(self.attached, "the guest runs, and {} is detached", self.target());
        subject
            .write(&self.record, offset as u64, bytes)
            .with_context(|| format!("a write of the guest to {} failed", self.target()))?;
        Arc::make_mut(&mut self.content)[offset..offset + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }
}

impl TestGuest {
    /// A guest that is off, with these disks.
    pub(crate) fn new(disks: Vec<(Disk, Bytes)>) -> Self {
        let disks = disks.into_iter().map(|(disk, content)| {
            let open = identity(&disk.address).into_iter().collect();
            let active = LayerName(disk.address.to_string());
            GuestDisk { record: DiskRecord::new(disk, active), open, attached: true, content }
        });
        Self {
            state: Mutex::new(State {
                power: Power::Off,
                section: None,
                disks: disks.collect(),
                tick: 0,
                boots: false,
                found: Vec::new(),
                instant: None,
                pauses: 0,
                failure: None,
            }),
            changed: Condvar::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The body of the guest's thread. Returns when the guest is over.
    pub(crate) fn run(&self, subject: &dyn TestBackend) {
        let mut state = self.state();
        loop {
            state = match (state.power, &state.failure) {
                (Power::Over, _) => return,
                (Power::Running, None) => {
                    let ticked = catch_unwind(AssertUnwindSafe(|| state.tick(subject)));
                    let ticked = ticked.unwrap_or_else(|_| Err(anyhow!("the write of a guest panicked")));
                    state.failure = ticked.err().map(|error| format!("{error:#}"));
                    self.changed.notify_all();
                    let waited = self.changed.wait_timeout(state, BETWEEN_TICKS);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
                _ => self.changed.wait(state).unwrap_or_else(PoisonError::into_inner),
            };
        }
    }

    /// Ends its thread.
    pub(crate) fn end(&self) {
        self.state().power = Power::Over;
        self.changed.notify_all();
    }

    /// Starts it. Whether it writes is its thread's concern.
    pub(crate) fn power_on(&self) {
        self.state().power = Power::Running;
        self.changed.notify_all();
    }

    /// Returns `None` if it is off, and otherwise if its processors run.
    pub(crate) fn is_running(&self) -> Option<bool> {
        match self.state().power {
            Power::Off | Power::Over => None,
            Power::Running => Some(true),
            Power::Paused => Some(false),
        }
    }

    pub(crate) fn disks(&self) -> Vec<Disk> {
        self.state().disks.iter().map(|disk| disk.record.disk.clone()).collect()
    }

    pub(crate) fn open_files(&self, target: &Target) -> Vec<FileIdentity> {
        let state = self.state();
        state
            .disks
            .iter()
            .find(|disk| disk.target() == target)
            .map(|disk| disk.open.clone())
            .unwrap_or_default()
    }

    /// Waits until a running guest has written `ticks` times more.
    ///
    /// # Errors
    /// A write of the guest failed.
    pub(crate) fn write_on(&self, ticks: u64) -> Result<()> {
        let state = self.state();
        let until = state.tick + ticks;
        let waiting = |state: &mut State| {
            state.power == Power::Running && state.failure.is_none() && (state.tick < until || state.boots)
        };
        let (state, waited) =
            self.changed.wait_timeout_while(state, PATIENCE, waiting).unwrap_or_else(PoisonError::into_inner);
        ensure!(!waited.timed_out(), "the guest runs, and writes nothing");
        state.require_success()
    }

    /// Pauses it, once it has written as late as it can. Returns true if it ran.
    pub(crate) fn pause(&self) -> Result<bool> {
        self.write_on(1)?;
        let mut state = self.state();
        let ran = state.power == Power::Running;
        if ran {
            state.power = Power::Paused;
            state.pauses += 1;
        }
        Ok(ran)
    }

    /// Resumes it, and returns once it has written.
    pub(crate) fn resume(&self) -> Result<()> {
        {
            let mut state = self.state();
            if state.power == Power::Paused {
                state.power = Power::Running;
            }
        }
        self.changed.notify_all();
        self.write_on(1)
    }

    /// Notes the instant of a snapshot: what was acknowledged until now.
    pub(crate) fn note_instant(&self) {
        let mut state = self.state();
        state.instant = Some(state.content());
    }

    /// The last instant, which is forgotten by this.
    pub(crate) fn take_instant(&self) -> Option<Content> {
        self.state().instant.take()
    }

    /// What it found on its disks when it booted, for each boot. They are forgotten by this.
    pub(crate) fn take_boots(&self) -> Vec<Content> {
        std::mem::take(&mut self.state().found)
    }

    /// The number of times that it was paused.
    pub(crate) fn pauses(&self) -> u64 {
        self.state().pauses
    }

    /// Closes the disks of a paused guest, in a detached section that begins or goes on.
    pub(crate) fn detach(&self, targets: &[Target], ran: bool) {
        let mut state = self.state();
        state.section = state.section.or(Some(ran));
        for disk in state.disks.iter_mut().filter(|disk| targets.contains(disk.target())) {
            (disk.attached, disk.open) = (false, Vec::new());
        }
    }

    /// Opens for the disks what their paths name now.
    pub(crate) fn attach(&self, targets: &[Target], records: &[DiskRecord], chains: &[OpenChain]) {
        let mut state = self.state();
        for disk in state.disks.iter_mut().filter(|disk| targets.contains(disk.target())) {
            if let Some(record) = records.iter().find(|record| record.disk.target == *disk.target()) {
                disk.record = record.clone();
            }
            let chain = chains.iter().find(|chain| chain.target == *disk.target());
            let layers = chain.into_iter().flat_map(|chain| &chain.layers);
            disk.open = layers.filter_map(|layer| identity(&layer.address)).collect();
            disk.attached = true;
        }
    }

    /// Ends a detached section, if there is one; returns whether the guest ran before it.
    pub(crate) fn end_section(&self, reset: bool) -> Option<bool> {
        let mut state = self.state();
        let ran = state.section.take()?;
        state.boots |= reset;
        Some(ran)
    }

    /// The guest runs, no write of it failed, and its disks hold what was acknowledged.
    pub(crate) fn check(&self, subject: &dyn TestBackend) -> Result<()> {
        // It does not write meanwhile.
        let state = self.state();
        state.require_success()?;
        ensure!(state.power == Power::Running, "the guest is {:?} and should run", state.power);
        ensure!(state.section.is_none(), "the guest runs in a detached section");
        for disk in &state.disks {
            let found = subject.read(&disk.record)?;
            compare(&found, &disk.content)
                .with_context(|| format!("what the guest wrote to {} is not on it", disk.target()))?;
        }
        Ok(())
    }
}

impl State {
    fn require_success(&self) -> Result<()> {
        match &self.failure {
            Some(failure) => bail!("{failure}"),
            None => Ok(()),
        }
    }

    fn content(&self) -> Content {
        self.disks.iter().map(|disk| (disk.target().to_string(), disk.content.clone())).collect()
    }

    /// Writes once to each disk. A guest that was reset looks first at what it has.
    fn tick(&mut self, subject: &dyn TestBackend) -> Result<()> {
        if self.boots {
            for disk in &mut self.disks {
                let found = subject.read(&disk.record).context("the guest boots from its disks")?;
                disk.content = Arc::new(found);
            }
            let found = self.content();
            self.found.push(found);
            self.boots = false;
        }
        self.tick += 1;
        let number = self.tick;
        for (index, disk) in self.disks.iter_mut().enumerate() {
            // The last block is never written: a test case may look for damage there.
            let blocks = (disk.content.len() / BLOCK - 2) as u64;
            let block = 1 + (number * 7 + index as u64) % blocks;
            let word = (number << 8 | index as u64 | 1 << 63).to_le_bytes();
            disk.write(subject, block as usize * BLOCK, &word.repeat(BLOCK / word.len()))?;
            disk.write(subject, 0, &number.to_le_bytes().repeat(512 / 8))?;
        }
        Ok(())
    }
}

/// The file that an address names now, if it is one of this machine.
fn identity(address: &DiskAddress) -> Option<FileIdentity> {
    address.local()?.metadata().ok().map(|about| file_identity(&about))
}

/// The number of the last tick that a disk with this content has.
pub(crate) fn tick_of(content: &Bytes) -> Option<u64> {
    content.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
}
