//! One step carried out, or taken back: by its disk's backend or by the domain's hypervisor, with what runs
//! inside it.

use std::any::Any;
use std::future::Future;
use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::Running;
use super::guest::Guest;
use crate::{
    AnyDiskSnapshotter, DiskInstant, DiskRecord, DomainContext, DomainStep, Edit, Error, ErrorKind, Event,
    Events, Group, Inside, LiveDomain, NothingInside, OpenChain, OperationId, PowerAfter, Progress, Result,
    Salvage, StartFromMemory, StepContext, StepOutcome, StepState, StepStatus, Target, file_identity,
};

impl Running<'_> {
    /// The steps that run inside the step at `head`.
    fn inside_of(&self, head: usize) -> Range<usize> {
        let steps = &self.operation.plan.steps;
        let end = (head + 1..steps.len()).find(|index| !steps[*index].inside).unwrap_or(steps.len());
        head + 1..end
    }

    /// The steps that are done as one with the step at `head`: itself, and those nested in it. A domain that
    /// does not run has no moment in which they could be nested, and needs none. Then they are steps like the
    /// others.
    pub(super) fn unit(&self, head: usize) -> Range<usize> {
        match self.engine.live {
            Some(_) => head..self.inside_of(head).end,
            None => head..head + 1,
        }
    }

    /// Returns true if an earlier step does the step at `index`, nested in itself.
    pub(super) fn is_inside(&self, index: usize) -> bool {
        self.engine.live.is_some() && self.operation.plan.steps[index].inside
    }

    /// Does a step and the steps nested in it.
    pub(super) async fn apply(&self, head: usize) -> Result<StepOutcome> {
        let planned = &self.operation.plan.steps[head];
        for index in self.unit(head) {
            let planned = &self.operation.plan.steps[index];
            self.tell(Event::StepStarted {
                operation: self.operation.id,
                index: index as u64,
                group: planned.group,
                target: planned.step.target.clone(),
                summary: planned.step.summary.clone(),
                bytes: planned.step.bytes,
            });
        }
        let inside = Within { running: self, steps: head + 1..self.unit(head).end, back: false };
        let done = match planned.step.target.is_domain() {
            true => self.apply_to_domain(head, &inside).await,
            false => self.apply_to_disk(head, &inside).await.map(|()| StepOutcome::default()),
        };
        done.map_err(|error| error.context(planned.step.summary.clone()))
    }

    async fn apply_inside(&self, range: Range<usize>, only: Option<&Target>) -> Result<()> {
        for index in range.clone() {
            let planned = &self.operation.plan.steps[index];
            if only.is_some_and(|only| *only != planned.step.target) {
                continue;
            }
            let Err(error) = self.apply_to_disk(index, &NothingInside).await else { continue };
            let mut error = error.context(planned.step.summary.clone());
            if planned.group != Group::Finish
                && let Err(second) = self.undo_inside(range.start..index + 1, only).await
            {
                error = error
                    .with_kind(ErrorKind::NeedsRecovery)
                    .state(format!("it could not be undone: {second}"));
            }
            return Err(error);
        }
        Ok(())
    }

    async fn undo_inside(&self, range: Range<usize>, only: Option<&Target>) -> Result<()> {
        for index in range.rev() {
            let planned = &self.operation.plan.steps[index];
            if only.is_none_or(|only| *only == planned.step.target) {
                let (backend, work) = self.work(index)?;
                let context = work.context(&work.deaf, &NothingInside);
                guarded(backend.undo(&planned.step, context)).await?;
            }
        }
        Ok(())
    }

    async fn apply_to_disk(&self, index: usize, inside: &dyn Inside) -> Result<()> {
        let planned = &self.operation.plan.steps[index];
        let (backend, work) = self.work(index)?;
        // Finish steps that cannot be deferred must not stop half done: they do not get the token.
        let hears = planned.group != Group::Finish || planned.deferrable;
        let cancel = if hears { self.cancel } else { &work.deaf };
        guarded(backend.apply(&planned.step, work.context(cancel, inside))).await
    }

    async fn apply_to_domain(&self, index: usize, inside: &dyn Inside) -> Result<StepOutcome> {
        let step = self.domain_step(index)?;
        let progress = Teller::new(self.engine.events.clone(), self.operation.id, index);
        let domain = &self.entry.domain;
        let saver = || self.engine.registry.hypervisor(&domain.hypervisor);
        match &step {
            DomainStep::CheckMemory { file } => {
                saver()?.check_memory(file, &progress).await?;
                return Ok(StepOutcome::default());
            }
            DomainStep::RemoveMemory { file } => {
                saver()?.remove_memory(file).await?;
                return Ok(StepOutcome::default());
            }
            _ => {}
        }
        let Some(live) = self.engine.live else { return self.apply_at_rest(&step).await };
        if matches!(step, DomainStep::Media { .. })
            && self.resumed
            && live.seen().running
            && self.guest.detached_since().is_none()
        {
            // The guest was resumed already, with the media that it has.
            return Ok(StepOutcome::default());
        }
        if self.came_back(&step, live) {
            let note = "the domain runs already, on the disks of the snapshot: it went on just before the crash, or it was started \
                        it since; it was not stopped, reset or given other memory; revert again to have exactly the snapshot";
            return Ok(StepOutcome { notes: vec![note.to_owned()], ..StepOutcome::default() });
        }
        self.yield_locks().await?;
        let chains = match &step {
            DomainStep::Instant { .. } | DomainStep::SaveMemory { .. } | DomainStep::Continue { .. } => {
                Vec::new()
            }
            // The paths that the disks have from the commit on: new ones, where the disks do not keep their
            // paths.
            DomainStep::Attach { .. } if self.operation.plan.steps[index].group == Group::Cut => {
                self.open_chains_of(&self.disks_committed()).await?
            }
            _ => self.open_chains().await?,
        };
        let deaf = CancellationToken::new();
        let cancel = match self.operation.plan.steps[index].group {
            Group::Finish => &deaf,
            Group::Prepare | Group::Cut => self.cancel,
        };
        let context = DomainContext { domain, chains: &chains, inside, progress: &progress, cancel };
        guarded(live.apply(&step, context)).await
    }

    /// Makes the hypervisor do a step that is not in the plan.
    pub(super) async fn apply_live(&self, step: &DomainStep) -> Result<()> {
        let Some(live) = self.engine.live else { return Ok(()) };
        self.yield_locks().await?;
        let chains = self.open_chains().await?;
        let (progress, cancel) =
            (Teller::new(self.engine.events.clone(), self.operation.id, 0), CancellationToken::new());
        let context = DomainContext {
            domain: &self.entry.domain,
            chains: &chains,
            inside: &NothingInside,
            progress: &progress,
            cancel: &cancel,
        };
        guarded(live.apply(step, context)).await.map(drop)
    }

    /// Returns true if the guest that a recovery was to resume runs already: it was started again meanwhile.
    fn came_back(&self, step: &DomainStep, live: &dyn LiveDomain) -> bool {
        matches!(step, DomainStep::Continue { .. })
            && self.resumed
            && live.seen().running
            && self.guest.detached_since().is_none()
    }

    /// Carries a step out for a domain that no process runs any more.
    async fn apply_at_rest(&self, step: &DomainStep) -> Result<StepOutcome> {
        match step {
            DomainStep::Continue { memory: Some(file), power, .. } if *power != Some(PowerAfter::Off) => {
                let domain = &self.entry.domain;
                let snapshot = self
                    .entry
                    .tree
                    .iter()
                    .find(|snapshot| snapshot.memory.as_ref().is_some_and(|memory| memory.file == *file));
                let machine = snapshot
                    .and_then(|snapshot| snapshot.machine.as_deref())
                    .and_then(|id| domain.machine(id))
                    .map(|machine| &machine.record);
                self.yield_locks().await?;
                let chains = self.open_chains().await?;
                let start = StartFromMemory { domain, machine, file, chains: &chains, power: *power };
                self.engine.registry.hypervisor(&domain.hypervisor)?.start(start).await
            }
            DomainStep::Continue { .. }
            | DomainStep::Media { .. }
            | DomainStep::ReopenByName { .. }
            | DomainStep::Detach { .. }
            | DomainStep::Attach { .. } => Ok(StepOutcome::default()),
            DomainStep::Instant { .. }
            | DomainStep::SaveMemory { .. }
            | DomainStep::CheckMemory { .. }
            | DomainStep::RemoveMemory { .. } => Err(Error::new(
                ErrorKind::Internal,
                "a step was planned for a running domain, and nothing is connected to it",
            )),
        }
    }

    /// Takes a step back, with the steps nested in it. Returns the edits that the catalogue needs where it
    /// had to stay.
    pub(super) async fn undo_step(&mut self, head: usize) -> Result<Vec<Edit>> {
        let summary = self.operation.plan.steps[head].step.summary.clone();
        let undone = match self.operation.plan.steps[head].step.target.is_domain() {
            true => self.undo_on_domain_and_note(head).await.map(|()| Vec::new()),
            false => self.undo_on_disk(head).await,
        };
        undone.map_err(|error| error.context(format!("undoing: {summary}")))
    }

    async fn undo_on_domain_and_note(&mut self, head: usize) -> Result<()> {
        let merged = self.overlays_in_use(head).await?;
        self.undo_on_domain(head).await?;
        // Only disks that an undone cut has merged are remembered: a step that is no cut adds none.
        if matches!(self.domain_step(head)?, DomainStep::Instant { .. }) {
            self.guest = std::mem::replace(&mut self.guest, Guest::Running).after_undone_cut(merged);
        }
        Ok(())
    }

    /// The disks whose overlays, made by the instant at `head`, the domain has open. The undo of the instant
    /// merges the guest's writes to them. An overlay that no process has open may contain what the guest
    /// wrote before it was started on other images.
    async fn overlays_in_use(&self, head: usize) -> Result<Vec<Target>> {
        let (DomainStep::Instant { disks, .. }, Some(live)) = (self.domain_step(head)?, self.engine.live)
        else {
            return Ok(Vec::new());
        };
        let mut in_use = Vec::new();
        for (target, instant) in disks {
            let (DiskInstant::Overlay { file, .. }, Some(disk)) = (instant, live.disk(&target)) else {
                continue;
            };
            // The file does not exist: nothing of it is left to be merged.
            let Ok(found) = file.metadata() else { continue };
            if disk.open_files().await?.contains(&file_identity(&found)) {
                in_use.push(target);
            }
        }
        Ok(in_use)
    }

    async fn undo_on_domain(&self, head: usize) -> Result<()> {
        let step = self.domain_step(head)?;
        let domain = &self.entry.domain;
        match (&step, self.engine.live) {
            (DomainStep::CheckMemory { file }, _) => {
                self.engine.registry.hypervisor(&domain.hypervisor)?.release_memory(file).await
            }
            (DomainStep::SaveMemory { file, .. }, None) => {
                self.engine.registry.hypervisor(&domain.hypervisor)?.remove_memory(file).await
            }
            // No process has the disks open: their own steps undo them.
            (DomainStep::Instant { memory: Some(memory), .. }, None) => {
                self.engine.registry.hypervisor(&domain.hypervisor)?.remove_memory(&memory.file).await
            }
            (_, None) => Ok(()),
            (_, Some(live)) => {
                self.yield_locks().await?;
                let chains = self.open_chains().await?;
                let progress = Teller::new(self.engine.events.clone(), self.operation.id, head);
                let inside = Within { running: self, steps: head + 1..self.unit(head).end, back: true };
                let deaf = CancellationToken::new();
                let context = DomainContext {
                    domain,
                    chains: &chains,
                    inside: &inside,
                    progress: &progress,
                    cancel: &deaf,
                };
                guarded(live.undo(&step, context)).await?;
                // The partial memory file goes, where the step that makes an image of it never began.
                match &step {
                    DomainStep::Instant { memory: Some(memory), .. } => {
                        self.engine.registry.hypervisor(&domain.hypervisor)?.remove_memory(&memory.file).await
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    async fn undo_on_disk(&mut self, index: usize) -> Result<Vec<Edit>> {
        let (backend, work) = self.work(index)?;
        let planned = &self.operation.plan.steps[index];
        let context = work.context(&work.deaf, &NothingInside);
        // Merged data is in the image below by now, and the overlay is not needed.
        let salvage = match self.resumed && !self.guest.has_merged(&planned.step.target) {
            true => {
                let done = self.operation.steps[index] == StepState::Done;
                guarded(backend.salvage(&planned.step, done, context)).await?
            }
            false => Salvage::Nothing,
        };
        let (edits, words) = match salvage {
            Salvage::Stays(edits, words) => (edits, Some(words)),
            Salvage::PutAside(words) => {
                guarded(backend.undo(&planned.step, context)).await?;
                (Vec::new(), Some(words))
            }
            Salvage::Nothing => {
                guarded(backend.undo(&planned.step, context)).await?;
                (Vec::new(), None)
            }
        };
        if let Some(message) = words {
            self.tell(Event::Warning { domain: self.entry.domain.name.clone(), message: message.clone() });
            self.run.warnings.push(message);
        }
        Ok(edits)
    }

    /// Returns true if a finished step was superseded by what the domain wrote since.
    pub(super) async fn is_superseded(&self, index: usize) -> Result<bool> {
        let step = &self.operation.plan.steps[index].step;
        if step.target.is_domain() {
            return Ok(false);
        }
        let (backend, work) = self.work(index)?;
        guarded(backend.is_superseded(step, work.context(&work.deaf, &NothingInside))).await.map_err(
            |error| error.context(format!("what the domain wrote since the crash: {}", step.summary)),
        )
    }

    /// Returns the progress of a disk's step.
    pub(super) async fn status(&self, index: usize) -> Result<StepStatus> {
        let (backend, work) = self.work(index)?;
        let step = &self.operation.plan.steps[index].step;
        guarded(backend.status(step, work.context(&work.deaf, &NothingInside))).await
    }

    /// The disks as the catalogue has them once the plan is committed.
    fn disks_committed(&self) -> Vec<DiskRecord> {
        let mut disks = self.entry.domain.disks.clone();
        for edit in &self.operation.plan.commit {
            let (Edit::SetActive { target, .. }
            | Edit::SetPath { target, .. }
            | Edit::SetFormat { target, .. }) = edit
            else {
                continue;
            };
            let Some(record) = disks.iter_mut().find(|record| record.disk.target == *target) else {
                continue;
            };
            match edit {
                Edit::SetActive { layer, .. } => record.active = layer.clone(),
                Edit::SetPath { path, .. } => record.disk.path = path.clone(),
                Edit::SetFormat { format, .. } => record.disk.format = format.clone(),
                _ => {}
            }
        }
        disks
    }

    /// The chains that the configured paths of all disks open now.
    pub(super) async fn open_chains(&self) -> Result<Vec<OpenChain>> {
        self.open_chains_of(&self.entry.domain.disks).await
    }

    async fn open_chains_of(&self, disks: &[DiskRecord]) -> Result<Vec<OpenChain>> {
        let mut chains = Vec::new();
        for record in disks {
            let backend = self.engine.registry.get(&record.disk.format)?;
            let layers = backend.open_chain(record).await?;
            chains.push(OpenChain { target: record.disk.target.clone(), layers });
        }
        Ok(chains)
    }

    /// Releases locks of our steps, so that a hypervisor can open their images.
    async fn yield_locks(&self) -> Result<()> {
        for record in &self.entry.domain.disks {
            self.engine.registry.get(&record.disk.format)?.yield_locks(record).await?;
        }
        Ok(())
    }

    pub(super) fn domain_step(&self, index: usize) -> Result<DomainStep> {
        let action = &self.operation.plan.steps[index].step.action;
        serde_json::from_value(action.clone()).map_err(|cause| {
            Error::new(
                ErrorKind::Internal,
                format!("the journal has a step of the domain that is not known: {action}"),
            )
            .because(cause)
            .advise("it was written by another version of domsnap: recover with that one")
        })
    }

    /// The backend and the context for a disk's step.
    fn work(&self, index: usize) -> Result<(Arc<AnyDiskSnapshotter>, Work<'_>)> {
        let target = &self.operation.plan.steps[index].step.target;
        let disk = self.record_of(target)?;
        let work = Work {
            disk,
            progress: Teller::new(self.engine.events.clone(), self.operation.id, index),
            deaf: CancellationToken::new(),
            live: self.engine.live,
            resumed: self.resumed,
        };
        Ok((self.engine.registry.get(&disk.disk.format)?, work))
    }

    fn record_of(&self, target: &Target) -> Result<&DiskRecord> {
        self.entry.domain.disk(target).ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!(
                    "the plan has a step for {target}, which domain {} does not have",
                    self.entry.domain.name
                ),
            )
        })
    }
}

/// The steps inside another, done or undone.
struct Within<'a, 'b> {
    running: &'a Running<'b>,
    steps: Range<usize>,
    /// Set if they are undone.
    back: bool,
}

#[async_trait]
impl Inside for Within<'_, '_> {
    async fn run(&self, only: Option<&Target>) -> Result<()> {
        match self.back {
            true => self.running.undo_inside(self.steps.clone(), only).await,
            false => self.running.apply_inside(self.steps.clone(), only).await,
        }
    }

    async fn back(&self, only: Option<&Target>) -> Result<()> {
        match self.back {
            true => self.running.apply_inside(self.steps.clone(), only).await,
            false => self.running.undo_inside(self.steps.clone(), only).await,
        }
    }
}

/// The owner of the values that the context of a disk's step borrows.
struct Work<'a> {
    disk: &'a DiskRecord,
    progress: Teller,
    /// A token that is never cancelled.
    deaf: CancellationToken,
    live: Option<&'a dyn LiveDomain>,
    resumed: bool,
}

impl Work<'_> {
    fn context<'b>(&'b self, cancel: &'b CancellationToken, inside: &'b dyn Inside) -> StepContext<'b> {
        StepContext {
            disk: self.disk,
            progress: &self.progress,
            cancel,
            attached: self.live.and_then(|live| live.disk(&self.disk.disk.target)),
            inside,
            resumed: self.resumed,
        }
    }
}

/// Turns a panic inside a backend into an error.
async fn guarded<T>(mut step: Pin<Box<dyn Future<Output = Result<T>> + Send + '_>>) -> Result<T> {
    std::future::poll_fn(|context| {
        match std::panic::catch_unwind(AssertUnwindSafe(|| step.as_mut().poll(context))) {
            Ok(polled) => polled,
            Err(payload) => Poll::Ready(Err(Error::new(
                ErrorKind::Internal,
                format!("the backend panicked: {}", words_of(&*payload)),
            )
            .advise("this is a defect of the backend; please report it"))),
        }
    })
    .await
}

fn words_of(payload: &(dyn Any + Send)) -> &str {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(words), _) => words,
        (None, Some(words)) => words,
        (None, None) => "without words",
    }
}

/// The shortest interval between two reports of a step's progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// Reports a step's progress, at limited intervals.
struct Teller {
    events: Events,
    operation: OperationId,
    index: u64,
    begun: Instant,
    /// The time of the last report, in milliseconds since `begun`, plus one.
    told: Arc<AtomicU64>,
}

impl Teller {
    fn new(events: Events, operation: OperationId, index: usize) -> Self {
        Self { events, operation, index: index as u64, begun: Instant::now(), told: Arc::default() }
    }
}

impl Progress for Teller {
    fn bytes(&self, done: u64, total: u64) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        let told = self.told.load(Ordering::Relaxed);
        let due = told == 0
            || done >= total
            || Duration::from_millis(now.saturating_sub(told)) >= PROGRESS_INTERVAL;
        if due && self.told.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            self.events.tell(Event::Progress { operation: self.operation, index: self.index, done, total });
        }
    }
}
