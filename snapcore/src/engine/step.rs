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
use crate::backend::{Progress, Salvage, StepContext};
use crate::domain::{Disk, DiskRecord};
use crate::erased::AnyDiskSnapshotter;
use crate::error::{Error, ErrorKind, Result};
use crate::event::{Event, Events};
use crate::hypervisor::{
    DiskInstant, DomainContext, DomainStep, Inside, LiveDomain, OpenChain, PowerAfter, Rendezvous,
    StartFromMemory, StepOutcome,
};
use crate::name::Target;
use crate::operation::{OperationId, StepState};
use crate::shape::StepRef;
use crate::step::{Edit, Group, Step, StepStatus};

impl Running<'_> {
    /// The steps that are done as one with the step at `head`: itself, and those nested in it. A domain that
    /// does not run has no moment in which they could be nested, and needs none. Then they are steps like the
    /// others.
    pub(super) fn unit(&self, head: usize) -> Range<usize> {
        let unit = self.operation.plan.units().find(|unit| unit.contains(&head));
        match (self.engine.live, unit) {
            (Some(_), Some(unit)) => head..unit.end,
            (Some(_), None) | (None, _) => head..head + 1,
        }
    }

    /// Returns true if an earlier step does the step at `index`, nested in itself.
    pub(super) fn is_nested(&self, index: usize) -> bool {
        self.engine.live.is_some() && self.operation.placed(index).nested
    }

    /// Does a step and the steps nested in it.
    pub(super) async fn apply(&self, head: usize) -> Result<StepOutcome> {
        let placed = self.operation.placed(head);
        for index in self.unit(head) {
            let placed = self.operation.placed(index);
            self.report(Event::StepStarted {
                operation: self.operation.id,
                index: index as u64,
                group: placed.group,
                target: placed.target().cloned(),
                summary: placed.summary().to_owned(),
                bytes: placed.bytes(),
            });
        }
        let inside = Within { running: self, steps: head + 1..self.unit(head).end, back: false };
        let done = match placed.step {
            StepRef::Domain(step) => self.apply_to_domain(head, &step.action, &inside).await,
            StepRef::Disk(_) => self.apply_to_disk(head, &inside).await.map(|()| StepOutcome::default()),
        };
        done.map_err(|error| error.context(placed.summary()))
    }

    /// Does nested steps: those of one disk in their order, those of several disks side by side. The guest
    /// waits for the slowest disk, not for the sum.
    async fn apply_nested(&self, steps: Range<usize>, only: Option<&Target>) -> Result<()> {
        let disks = self.disks_of(steps, only);
        let works = disks.iter().map(|steps| self.apply_nested_of_one(steps));
        // All disks end before a failure is taken back: no step is abandoned in its middle.
        let ended = side_by_side(works.collect()).await;
        let begun = ended.iter().zip(&disks).flat_map(|((begun, _), steps)| &steps[..*begun]);
        let mut begun: Vec<usize> = begun.copied().collect();
        begun.sort_unstable();
        let Some(mut error) = ended.into_iter().find_map(|(_, result)| result.err()) else { return Ok(()) };
        let before_commit = begun.first().is_some_and(|&index| !self.is_after_commit(index));
        if before_commit && let Err(second) = self.undo_nested(begun).await {
            error =
                error.with_kind(ErrorKind::NeedsRecovery).state(format!("it could not be undone: {second}"));
        }
        Err(error)
    }

    /// Does the nested steps of one disk; returns the number of those that were begun.
    async fn apply_nested_of_one(&self, steps: &[usize]) -> (usize, Result<()>) {
        for (place, &index) in steps.iter().enumerate() {
            if let Err(error) = self.apply_to_disk(index, &()).await {
                return (place + 1, Err(error.context(self.operation.placed(index).summary())));
            }
        }
        (steps.len(), Ok(()))
    }

    /// Takes nested steps back, the last first.
    async fn undo_nested(&self, steps: Vec<usize>) -> Result<()> {
        for index in steps.into_iter().rev() {
            let (backend, step, work) = self.work(index)?;
            guarded(backend.undo(step, work.context(&work.never_cancelled, &()))).await?;
        }
        Ok(())
    }

    /// Nested steps by disk, each disk's in their order.
    fn disks_of(&self, steps: Range<usize>, only: Option<&Target>) -> Vec<Vec<usize>> {
        let mut disks: Vec<(&Target, Vec<usize>)> = Vec::new();
        for index in steps {
            let Some(target) = self.operation.placed(index).target() else { continue };
            if only.is_some_and(|only| only != target) {
                continue;
            }
            match disks.iter_mut().find(|(known, _)| *known == target) {
                Some((_, steps)) => steps.push(index),
                None => disks.push((target, vec![index])),
            }
        }
        disks.into_iter().map(|(_, steps)| steps).collect()
    }

    fn is_after_commit(&self, index: usize) -> bool {
        self.operation.placed(index).group == Group::Finish
    }

    async fn apply_to_disk(&self, index: usize, inside: &dyn Inside) -> Result<()> {
        let placed = self.operation.placed(index);
        let (backend, step, work) = self.work(index)?;
        // Finish steps that cannot be deferred must not stop half done: they do not get the token.
        let hears = placed.group != Group::Finish || placed.deferrable;
        let cancel = if hears { self.cancel } else { &work.never_cancelled };
        guarded(backend.apply(step, work.context(cancel, inside))).await
    }

    async fn apply_to_domain(
        &self,
        index: usize,
        step: &DomainStep,
        inside: &dyn Inside,
    ) -> Result<StepOutcome> {
        let progress = ProgressReporter::new(self.engine.events.clone(), self.operation.id, index);
        let domain = &self.entry.domain;
        let saver = || self.engine.registry.hypervisor(&domain.hypervisor);
        match step {
            DomainStep::CheckMemory { image } => {
                saver()?.check_memory(image, &progress).await?;
                return Ok(StepOutcome::default());
            }
            DomainStep::RemoveMemory { image } => {
                saver()?.remove_memory(image).await?;
                return Ok(StepOutcome::default());
            }
            DomainStep::CloneMemory { image, clones, shares } => {
                let notes = saver()?.clone_memory(image, clones, *shares).await?;
                return Ok(StepOutcome { notes, ..StepOutcome::default() });
            }
            DomainStep::Register { domains, snapshots } => return self.register(domains, snapshots).await,
            DomainStep::CommitOthers { members } => return self.commit_others(members).await,
            _ => {}
        }
        let Some(live) = self.engine.live else { return self.apply_at_rest(step).await };
        if matches!(step, DomainStep::Media { .. })
            && self.resumed
            && live.seen().running
            && self.guest.detached_since().is_none()
        {
            // The guest was resumed already, with the media that it has.
            return Ok(StepOutcome::default());
        }
        if self.came_back(step, live) {
            let note = "the domain runs already, on the disks of the snapshot: it went on just before the crash, or it was started \
                        it since; it was not stopped, reset or given other memory; revert again to have exactly the snapshot";
            return Ok(StepOutcome { notes: vec![note.to_owned()], ..StepOutcome::default() });
        }
        self.yield_locks().await?;
        let group = self.operation.placed(index).group;
        let chains = match step {
            DomainStep::Instant { .. } | DomainStep::SaveMemory { .. } | DomainStep::Continue { .. } => {
                Vec::new()
            }
            // The paths that the disks have from the commit on: new ones, where the disks do not keep their
            // paths.
            DomainStep::Attach { .. } if group == Group::Cut => {
                self.open_chains_of(&self.disks_committed()).await?
            }
            _ => self.open_chains().await?,
        };
        let never_cancelled = CancellationToken::new();
        let cancel = match group {
            Group::Finish => &never_cancelled,
            Group::Prepare | Group::Cut => self.cancel,
        };
        let together: &dyn Rendezvous = match &self.engine.seat {
            Some(seat) if group != Group::Finish || self.is_revert() => seat,
            Some(_) | None => &(),
        };
        let context =
            DomainContext { domain, chains: &chains, inside, progress: &progress, cancel, together };
        guarded(live.apply(step, context)).await
    }

    /// Makes the hypervisor do a step that is not in the plan.
    pub(super) async fn apply_live(&self, step: &DomainStep) -> Result<()> {
        let Some(live) = self.engine.live else { return Ok(()) };
        self.yield_locks().await?;
        let chains = self.open_chains().await?;
        let (progress, cancel) = (
            ProgressReporter::new(self.engine.events.clone(), self.operation.id, 0),
            CancellationToken::new(),
        );
        let context = DomainContext {
            domain: &self.entry.domain,
            chains: &chains,
            inside: &(),
            progress: &progress,
            cancel: &cancel,
            together: &(),
        };
        guarded(live.apply(step, context)).await.map(drop)
    }

    /// Returns true if the cut detaches the disks: the finish steps then resume the guest, for which those of
    /// a group wait for each other. A detached section in the finish steps of a delete is a domain's own.
    pub(super) fn is_revert(&self) -> bool {
        let mut cut = self.operation.of_group(Group::Cut);
        cut.any(|index| matches!(self.domain_step(index), Some(DomainStep::Detach { .. })))
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
            DomainStep::Continue { memory: Some(image), power, .. } if *power != Some(PowerAfter::Off) => {
                let domain = &self.entry.domain;
                let machine = self.entry.machine_with(image);
                self.yield_locks().await?;
                let chains = self.open_chains().await?;
                let start = StartFromMemory { domain, machine, image, chains: &chains, power: *power };
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
            | DomainStep::RemoveMemory { .. }
            | DomainStep::CloneMemory { .. }
            | DomainStep::Register { .. }
            | DomainStep::CommitOthers { .. } => Err(Error::new(
                ErrorKind::Internal,
                "a step was planned for a running domain, and nothing is connected to it",
            )),
        }
    }

    /// Takes a step back, with the steps nested in it. Returns the edits that the catalogue needs where it
    /// had to stay.
    pub(super) async fn undo_step(&mut self, head: usize) -> Result<Vec<Edit>> {
        let placed = self.operation.placed(head);
        let summary = placed.summary().to_owned();
        let undone = match placed.step {
            StepRef::Domain(step) => {
                let action = step.action.clone();
                self.undo_on_domain_and_note(head, &action).await.map(|()| Vec::new())
            }
            StepRef::Disk(_) => self.undo_on_disk(head).await,
        };
        undone.map_err(|error| error.context(format!("undoing: {summary}")))
    }

    async fn undo_on_domain_and_note(&mut self, head: usize, step: &DomainStep) -> Result<()> {
        let merged = self.overlays_in_use(step).await?;
        self.undo_on_domain(head, step).await?;
        // Only disks that an undone cut has merged are remembered: a step that is no cut adds none.
        if matches!(step, DomainStep::Instant { .. }) {
            self.guest = std::mem::replace(&mut self.guest, Guest::Running).after_undone_cut(merged);
        }
        Ok(())
    }

    /// The disks whose overlays, made by this instant, the domain has open. The undo of the instant
    /// merges the guest's writes to them. An overlay that no process has open may contain what the guest
    /// wrote before it was started on other images.
    async fn overlays_in_use(&self, step: &DomainStep) -> Result<Vec<Target>> {
        let (DomainStep::Instant { disks, .. }, Some(live)) = (step, self.engine.live) else {
            return Ok(Vec::new());
        };
        let mut in_use = Vec::new();
        for (target, instant) in disks {
            let (DiskInstant::Overlay { address, format }, Some(disk)) = (instant, live.disk(target)) else {
                continue;
            };
            let backend = self.engine.registry.serving(&self.record_of(target)?.disk)?;
            let overlay = Disk::new(target.clone(), address.clone(), format.clone());
            // It does not exist: nothing of it is left to be merged.
            let Some(identity) = backend.identity(&overlay).await? else { continue };
            if disk.has_open(&identity).await? {
                in_use.push(target.clone());
            }
        }
        Ok(in_use)
    }

    async fn undo_on_domain(&self, head: usize, step: &DomainStep) -> Result<()> {
        let domain = &self.entry.domain;
        match (step, self.engine.live) {
            (DomainStep::CheckMemory { image }, _) => {
                self.engine.registry.hypervisor(&domain.hypervisor)?.release_memory(image).await
            }
            (DomainStep::CloneMemory { clones, .. }, _) => {
                let saver = self.engine.registry.hypervisor(&domain.hypervisor)?;
                for image in clones {
                    saver.remove_memory(image).await?;
                }
                Ok(())
            }
            (DomainStep::SaveMemory { image, .. }, None) => {
                self.engine.registry.hypervisor(&domain.hypervisor)?.remove_memory(image).await
            }
            // No process has the disks open: their own steps undo them.
            (DomainStep::Instant { memory: Some(memory), .. }, None) => {
                self.engine.registry.hypervisor(&domain.hypervisor)?.remove_memory(&memory.image).await
            }
            (_, None) => Ok(()),
            (_, Some(live)) => {
                self.yield_locks().await?;
                let chains = self.open_chains().await?;
                let progress = ProgressReporter::new(self.engine.events.clone(), self.operation.id, head);
                let inside = Within { running: self, steps: head + 1..self.unit(head).end, back: true };
                let never_cancelled = CancellationToken::new();
                let context = DomainContext {
                    domain,
                    chains: &chains,
                    inside: &inside,
                    progress: &progress,
                    cancel: &never_cancelled,
                    together: &(),
                };
                guarded(live.undo(step, context)).await?;
                // The partial memory image goes, where the step that makes an image of it never began.
                match step {
                    DomainStep::Instant { memory: Some(memory), .. } => {
                        self.engine
                            .registry
                            .hypervisor(&domain.hypervisor)?
                            .remove_memory(&memory.image)
                            .await
                    }
                    _ => Ok(()),
                }
            }
        }
    }

    async fn undo_on_disk(&mut self, index: usize) -> Result<Vec<Edit>> {
        let (backend, step, work) = self.work(index)?;
        let context = work.context(&work.never_cancelled, &());
        // Merged data is in the image below by now, and the overlay is not needed.
        let salvage = match self.resumed && !self.guest.has_merged(&step.target) {
            true => {
                let done = self.operation.steps[index] == StepState::Done;
                guarded(backend.salvage(step, done, context)).await?
            }
            false => Salvage::Nothing,
        };
        let (edits, message) = match salvage {
            Salvage::Stays(edits, message) => (edits, Some(message)),
            Salvage::Saved(message) => {
                guarded(backend.undo(step, context)).await?;
                (Vec::new(), Some(message))
            }
            Salvage::Nothing => {
                guarded(backend.undo(step, context)).await?;
                (Vec::new(), None)
            }
        };
        if let Some(message) = message {
            self.report(Event::Warning { domain: self.entry.domain.name.clone(), message: message.clone() });
            self.run.warnings.push(message);
        }
        Ok(edits)
    }

    /// Returns true if a finished step was superseded by what the domain wrote since.
    pub(super) async fn is_superseded(&self, index: usize) -> Result<bool> {
        if let StepRef::Domain(_) = self.operation.placed(index).step {
            return Ok(false);
        }
        let (backend, step, work) = self.work(index)?;
        guarded(backend.is_superseded(step, work.context(&work.never_cancelled, &()))).await.map_err(
            |error| error.context(format!("what the domain wrote since the crash: {}", step.summary)),
        )
    }

    /// Returns the progress of a disk's step.
    pub(super) async fn status(&self, index: usize) -> Result<StepStatus> {
        let (backend, step, work) = self.work(index)?;
        guarded(backend.status(step, work.context(&work.never_cancelled, &()))).await
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
                Edit::SetPath { path, .. } => record.disk.address = path.clone(),
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
            let backend = self.engine.registry.serving(&record.disk)?;
            let layers = backend.open_chain(record).await?;
            chains.push(OpenChain { target: record.disk.target.clone(), layers });
        }
        Ok(chains)
    }

    /// Releases locks of our steps, so that a hypervisor can open their images.
    async fn yield_locks(&self) -> Result<()> {
        for record in &self.entry.domain.disks {
            self.engine.registry.serving(&record.disk)?.yield_locks(record).await?;
        }
        Ok(())
    }

    /// The action on the domain of the step at `index`; absent: it is a step of a disk.
    pub(super) fn domain_step(&self, index: usize) -> Option<&DomainStep> {
        match self.operation.placed(index).step {
            StepRef::Domain(step) => Some(&step.action),
            StepRef::Disk(_) => None,
        }
    }

    /// The step of a disk, its backend, and its context.
    fn work(&self, index: usize) -> Result<(Arc<AnyDiskSnapshotter>, &Step, Work<'_>)> {
        let StepRef::Disk(step) = self.operation.placed(index).step else {
            return Err(Error::new(ErrorKind::Internal, "a step of the domain is given to a disk's backend"));
        };
        let disk = self.record_of(&step.target)?;
        let work = Work {
            disk,
            progress: ProgressReporter::new(self.engine.events.clone(), self.operation.id, index),
            never_cancelled: CancellationToken::new(),
            live: self.engine.live,
            resumed: self.resumed,
        };
        Ok((self.engine.registry.serving(&disk.disk)?, step, work))
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

impl Within<'_, '_> {
    async fn undo(&self, only: Option<&Target>) -> Result<()> {
        let mut steps = self.running.disks_of(self.steps.clone(), only).concat();
        steps.sort_unstable();
        self.running.undo_nested(steps).await
    }
}

#[async_trait]
impl Inside for Within<'_, '_> {
    async fn run(&self, only: Option<&Target>) -> Result<()> {
        match self.back {
            true => self.undo(only).await,
            false => self.running.apply_nested(self.steps.clone(), only).await,
        }
    }

    async fn back(&self, only: Option<&Target>) -> Result<()> {
        match self.back {
            true => self.running.apply_nested(self.steps.clone(), only).await,
            false => self.undo(only).await,
        }
    }
}

/// The owner of the values that the context of a disk's step borrows.
struct Work<'a> {
    disk: &'a DiskRecord,
    progress: ProgressReporter,
    /// A token that is never cancelled.
    never_cancelled: CancellationToken,
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
                format!("the backend panicked: {}", message_of(&*payload)),
            )
            .advise("this is a defect of the backend; please report it"))),
        }
    })
    .await
}

/// Waits for all of these at once; returns their results in their order.
pub(crate) async fn side_by_side<T>(works: Vec<impl Future<Output = T> + Send>) -> Vec<T> {
    let mut works: Vec<_> = works.into_iter().map(|work| (Box::pin(work), None)).collect();
    std::future::poll_fn(|context| {
        for (work, done) in works.iter_mut().filter(|(_, done)| done.is_none()) {
            if let Poll::Ready(result) = work.as_mut().poll(context) {
                *done = Some(result);
            }
        }
        match works.iter().all(|(_, done)| done.is_some()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    })
    .await;
    works.into_iter().filter_map(|(_, done)| done).collect()
}

fn message_of(payload: &(dyn Any + Send)) -> &str {
    match (payload.downcast_ref::<&str>(), payload.downcast_ref::<String>()) {
        (Some(message), _) => message,
        (None, Some(message)) => message,
        (None, None) => "without a message",
    }
}

/// The shortest interval between two reports of a step's progress.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(50);

/// Reports a step's progress, at limited intervals.
struct ProgressReporter {
    events: Events,
    operation: OperationId,
    index: u64,
    begun: Instant,
    /// The time of the last report, in milliseconds since `begun`, plus one.
    reported: Arc<AtomicU64>,
}

impl ProgressReporter {
    fn new(events: Events, operation: OperationId, index: usize) -> Self {
        Self { events, operation, index: index as u64, begun: Instant::now(), reported: Arc::default() }
    }
}

impl Progress for ProgressReporter {
    fn bytes(&self, done: u64, total: u64) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        let reported = self.reported.load(Ordering::Relaxed);
        let due = reported == 0
            || done >= total
            || Duration::from_millis(now.saturating_sub(reported)) >= PROGRESS_INTERVAL;
        if due && self.reported.compare_exchange(reported, now, Ordering::Relaxed, Ordering::Relaxed).is_ok()
        {
            self.events.report(Event::Progress { operation: self.operation, index: self.index, done, total });
        }
    }
}
