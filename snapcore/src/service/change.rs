//! Commands that change a domain: each under its lock, with its disks held, after recovering what stopped half way.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::live::{Live, prepare_memory_dir};
use super::locate::{Leftovers, Located};
use super::{
    DomainRef, DomainSpec, ImportOptions, ImportReport, Inner, Outcome, RecoveryEnd, RecoveryReport, Removal,
};
use crate::catalogue::{Change, Entry, Lease, Revision};
use crate::engine::{Engine, Run};
use crate::manifest::Manifests;
use crate::plan::DiskInput;
use crate::service::locate::{Intake, followed, image_path, is_same_file, real_images};
use crate::{
    CreateDisk, Disk, Domain, DomainName, DomainStep, Edit, Error, ErrorKind, Event, Group, Guard,
    GuestChange, Hypervisor, InspectDepth, OperationState, Plan, PowerAfter, Request, Result, Snapshot,
    StepState, Target,
};

/// How long a lease outlives a holder that died, where the catalogue cannot know that it died.
const LEASE_TIME: Duration = Duration::from_secs(30);

/// Runs `work` to its end even when the caller goes away: then it is cancelled, so that it undoes and gives its locks
/// back, instead of stopping between two steps.
pub(super) async fn to_the_end<T: Send + 'static, F>(
    cancel: &CancellationToken,
    work: impl FnOnce(CancellationToken) -> F,
) -> Result<T>
where
    F: Future<Output = Result<T>> + Send + 'static,
{
    let cancel = cancel.child_token();
    let _cancelled_when_dropped = cancel.clone().drop_guard();
    tokio::spawn(work(cancel)).await.map_err(|cause| {
        Error::new(ErrorKind::Internal, "the operation ended before its end")
            .because(cause)
            .state("the journal knows how far it got")
            .advise("run `domsnap recover`, and please report it")
    })?
}

/// A domain whose lock is held.
struct Locked {
    _lease: Lease,
    located: Located,
}

impl Inner {
    /// The domain that is meant, locked, as it is under the lock.
    async fn lock(&self, reference: &DomainRef, cancel: &CancellationToken) -> Result<Locked> {
        let mut located = self.locate(reference).await?;
        let name = located.entry.domain.name.clone();
        let lease = self.lease(&name, cancel).await?;
        if located.catalogued {
            let Some(entry) = self.catalogue.load(&name).await? else {
                return Err(self.no_domain(&name).await?);
            };
            located.entry = entry;
        }
        Ok(Locked { _lease: lease, located })
    }

    async fn lease(&self, name: &DomainName, cancel: &CancellationToken) -> Result<Lease> {
        let holder = format!("domsnap, process {}", std::process::id());
        let lease = self
            .catalogue
            .lease(name.as_str(), &holder, LEASE_TIME)
            .await
            .map_err(|error| error.context(format!("locking domain {name}")))?;
        let (lost, cancel) = (lease.lost().clone(), cancel.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = lost.cancelled() => cancel.cancel(),
                () = cancel.cancelled() => {}
            }
        });
        Ok(lease)
    }

    async fn hold_disks(&self, domain: &Domain, live: Option<&Live>) -> Result<Vec<Guard>> {
        let mut guards = Vec::new();
        for record in &domain.disks {
            let backend = self.registry.get(&record.disk.format)?;
            if !backend.is_gone(record).await? {
                let attached = live.and_then(|live| live.disk(&record.disk.target));
                guards.push(backend.hold(record, attached).await?);
            }
        }
        self.refuse_open_elsewhere(domain, live).await?;
        Ok(guards)
    }

    /// The plan for `request` on the domain as it is on the machine.
    pub(super) async fn plan_for(
        &self,
        entry: &Entry,
        live: Option<&Live>,
        request: &Request,
    ) -> Result<Plan> {
        let depth = match request {
            Request::Create(_) => InspectDepth::Active,
            Request::Revert(_) | Request::Delete(_) | Request::Tidy => InspectDepth::Dependents,
        };
        let mut disks = Vec::new();
        let mut without = Vec::new();
        for record in &entry.domain.disks {
            let target = &record.disk.target;
            let skipped = match request {
                Request::Create(create) => {
                    let said = create.disks.iter().rev().find(|(known, _)| known == target);
                    matches!(said, Some((_, CreateDisk::Skip)))
                }
                Request::Revert(revert) => revert.skip.contains(target),
                Request::Delete(_) | Request::Tidy => false,
            };
            let backend = self.registry.get(&record.disk.format)?;
            let gone = backend.is_gone(record).await?;
            let unplugged = live.is_some_and(|live| live.disk(target).is_none());
            match request {
                Request::Create(_) if skipped && (gone || unplugged) => {
                    without.push(format!("{target}: left out, as asked"));
                    continue;
                }
                // The plan says it.
                Request::Revert(_) if skipped && (gone || unplugged) => continue,
                Request::Delete(_) | Request::Tidy if gone => {
                    without.push(format!(
                        "{target}: {} and all its layers are gone; `domsnap domain disk remove {} {target}` takes the disk out",
                        record.disk.path, entry.domain.name
                    ));
                    continue;
                }
                _ => {}
            }
            let mut state = backend
                .inspect(record, depth, live.and_then(|live| live.disk(&record.disk.target)))
                .await
                .map_err(|error| error.context(format!("reading disk {}", record.disk.target)))?;
            if let Some(live) = live {
                // A disk that the machine does not have any more is at rest: what a delete does to it is done as there.
                let at_rest = unplugged && matches!(request, Request::Delete(_) | Request::Tidy);
                state.attached = !at_rest && self.is_attached(live, record).await?;
            }
            disks.push(DiskInput { record: record.clone(), state, backend });
        }
        if depth == InspectDepth::Dependents {
            self.add_neighbours(&entry.domain.name, &mut disks).await?;
        }
        let alive = live.map(|live| self.alive(entry, live, request)).transpose()?;
        let mut plan = crate::plan::plan(&entry.domain, &entry.tree, &disks, alive.as_ref(), request).await?;
        plan.notes.extend(without);
        if let Some(live) = live {
            live.preflight(&plan, &[], false).await?;
        }
        plan.notes.extend(self.note_on_outside(entry, live, request, &plan));
        plan.notes.extend(self.note_on_shared(entry, live, request, &plan));
        Ok(plan)
    }

    /// What is to be said of what the guest can write and no snapshot holds but in its memory.
    fn note_on_outside(
        &self,
        entry: &Entry,
        live: Option<&Live>,
        request: &Request,
        plan: &Plan,
    ) -> Option<String> {
        let domain = &entry.domain;
        let note = match request {
            Request::Create(_) => {
                let memory = plan
                    .commit
                    .iter()
                    .any(|edit| matches!(edit, Edit::AddSnapshot { snapshot } if snapshot.memory.is_some()));
                match memory {
                    true => {
                        "only in the snapshot's memory: a revert without it (--off) leaves them in their later state"
                    }
                    false => "not in the snapshot: a revert leaves them in their later state",
                }
            }
            Request::Revert(_) if gets_memory(plan) => return None,
            Request::Revert(_) => "not reverted: they stay in their later state",
            Request::Delete(_) | Request::Tidy => return None,
        };
        let outside = self.outside(domain, live.map(|live| &live.seen().machine));
        (!outside.is_empty()).then(|| format!("{}: {note}", outside.join(", ")))
    }

    /// What is to be said of what the guest can write and no snapshot holds at all.
    fn note_on_shared(
        &self,
        entry: &Entry,
        live: Option<&Live>,
        request: &Request,
        plan: &Plan,
    ) -> Option<String> {
        let shared = self.shared(&entry.domain, live.map(|live| &live.seen().machine));
        let note = match request {
            _ if shared.is_empty() => return None,
            Request::Create(_) => "not in the snapshot: a revert leaves them as they are then",
            Request::Revert(_) if gets_memory(plan) => {
                "not reverted: the guest's memory goes on with what it knew of them; mount them again in the guest"
            }
            Request::Revert(_) => "not reverted: they stay as they are",
            Request::Delete(_) | Request::Tidy => return None,
        };
        Some(format!("{}: {note}", shared.join(", ")))
    }

    /// What the guest of a domain can write that no snapshot holds at all.
    pub(super) fn shared(&self, domain: &Domain, machine: Option<&serde_json::Value>) -> Vec<String> {
        match self.registry.hypervisor(&domain.hypervisor) {
            Ok(saver) => saver.shared(domain, machine),
            _ => Vec::new(),
        }
    }

    /// What the guest of a domain can write that no snapshot holds but in its memory.
    pub(super) fn outside(&self, domain: &Domain, machine: Option<&serde_json::Value>) -> Vec<String> {
        match self.registry.hypervisor(&domain.hypervisor) {
            Ok(saver) => saver.outside(domain, machine),
            _ => Vec::new(),
        }
    }

    /// Carries `request` out on the domain that is meant.
    pub(super) async fn change(
        self: Arc<Self>,
        reference: DomainRef,
        request: Request,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        let mut locked = self.lock(&reference, &cancel).await?;
        let located = &mut locked.located;
        let mut recovered = Vec::new();
        let mut live = self.connect(&located.entry.domain).await?;
        if located.catalogued {
            self.require_last_word(&located.entry).await?;
            recovered = self.recover_entry(&mut located.entry, &mut live, &cancel).await?;
        }
        let mut outcome = match &live {
            Some(live) => self.change_alive(located, live, request, &cancel).await?,
            None => self.change_once(located, None, &request, &cancel).await?,
        };
        outcome.notes.splice(0..0, std::mem::take(&mut located.notes));
        outcome.recovered = recovered;
        Ok(outcome)
    }

    async fn change_once(
        &self,
        located: &mut Located,
        live: Option<&Live>,
        request: &Request,
        cancel: &CancellationToken,
    ) -> Result<Outcome> {
        let (plan, run) = self.change_locked(located, live, request, cancel).await?;
        Ok(outcome_of(&located.entry, plan, run))
    }

    /// Carries `request` out on a running domain: in two operations where the current state is to be saved.
    async fn change_alive(
        &self,
        located: &mut Located,
        live: &Live,
        request: Request,
        cancel: &CancellationToken,
    ) -> Result<Outcome> {
        let recreates = self.registry.hypervisor(&located.entry.domain.hypervisor)?.profile().recreates;
        let in_two = match &request {
            Request::Revert(revert) => revert.in_two(recreates),
            _ => None,
        };
        let Some((save, mut revert)) = in_two else {
            return self.change_once(located, Some(live), &request, cancel).await;
        };
        let ran = live.seen().running;
        // What the revert is refused for is found before anything is done.
        self.plan_for(&located.entry, Some(live), &Request::Revert(revert.clone())).await?;
        let saved = self.change_once(located, Some(live), &Request::Create(save), cancel).await?;
        let has_memory = located.entry.tree.named(&revert.name)?.memory.is_some();
        if !has_memory && ran {
            revert.power = revert.power.or(Some(PowerAfter::Running));
        }
        let reverted = self.change_once(located, Some(live), &Request::Revert(revert), cancel).await;
        match reverted {
            Ok(mut outcome) => {
                outcome.snapshots.extend(saved.snapshots);
                outcome.notes.splice(0..0, saved.notes);
                Ok(outcome)
            }
            Err(error) => {
                let left = match (ran, error.kind()) {
                    (true, ErrorKind::NeedsRecovery) | (false, _) => Ok(()),
                    (true, _) => live.resume().await,
                };
                let names: Vec<&str> = saved.snapshots.iter().map(|name| name.as_str()).collect();
                let kept = format!("the current state was saved as {}, which is kept", names.join(", "));
                Err(match left {
                    Ok(()) => error.state(kept),
                    Err(second) => error.state(format!("{kept}; the guest is paused: {second}")),
                })
            }
        }
    }

    /// Plans and carries out.
    ///
    /// What is durable before what: a domain that is taken from manifests enters the catalogue, and the manifests become
    /// this catalogue's, before the operation begins; one of which nothing is told enters with it. So manifests of
    /// snapshots that an operation deletes are known to be this catalogue's own, also to a recovery.
    async fn change_locked(
        &self,
        located: &mut Located,
        live: Option<&Live>,
        request: &Request,
        cancel: &CancellationToken,
    ) -> Result<(Plan, Run)> {
        let Located { entry, catalogued, leftovers, unconfirmed, .. } = located;
        if let Some(error) = unconfirmed.take() {
            return Err(error);
        }
        let _held = self.hold_disks(&entry.domain, live).await?;
        let mut plan = self.plan_for(entry, live, request).await?;
        self.preflight(&entry.domain, live, &plan, false).await?;
        let watched = self.watched(&entry.domain, live, Some(&plan)).await?;
        if !plan.steps.is_empty() {
            plan.notes.extend(watched.refuse_users().await?);
        }
        if let Some(live) = live {
            live.preflight(&plan, &self.chains_of(&entry.domain).await?, true).await?;
        }
        prepare_memory_dir(&plan)?;
        if let (Some(live), Request::Delete(delete)) = (live, request) {
            live.limit(delete.limit);
        }
        self.events.tell(Event::Planned { domain: entry.domain.name.clone(), plan: Box::new(plan.shown()) });
        let mut prologue = Vec::new();
        if !plan.steps.is_empty() || !plan.commit.is_empty() {
            let told = entry.follows.is_some() || !leftovers.left_out.is_empty();
            if !*catalogued && told {
                self.put(entry, entry.revision, false).await?;
                *catalogued = true;
                match self.settle_manifests(entry, leftovers).await {
                    // The engine tries again at the end, and tells.
                    Err(_) if self.manifests_of(&entry.domain)?.have_no_place() => {}
                    settled => settled.map_err(|error| {
                        error.state(
                            "the catalogue has the domain as its manifests told it; no image was touched",
                        )
                    })?,
                }
            } else if !*catalogued {
                prologue = put_changes(entry);
                prologue.extend(self.record_bases(&entry.domain).await);
            } else if let Err(error) = self.write_manifests(entry).await {
                match request {
                    // Those of what is deleted are removed before it is, which needs no space; the others follow later.
                    Request::Delete(_) | Request::Tidy if error.kind() == ErrorKind::NoSpace => {}
                    // No manifest there is read, so none promises what is destroyed.
                    Request::Delete(_) | Request::Tidy
                        if self.manifests_of(&entry.domain)?.have_no_place() => {}
                    // They would still promise what is destroyed.
                    Request::Delete(_) | Request::Tidy => return Err(error.state("no changes made")),
                    // The engine tries again at the end, and tells.
                    Request::Create(_) | Request::Revert(_) => {}
                }
            }
        }
        if *catalogued && !(plan.steps.is_empty() && plan.commit.is_empty()) {
            // Another tool may have given its images other bases since they were recorded.
            prologue.extend(self.record_bases(&entry.domain).await);
        }
        self.record_neighbours().await;
        let manifests = self.manifests_of(&entry.domain)?;
        let engine = Engine {
            catalogue: &*self.catalogue,
            registry: &self.registry,
            events: &self.events,
            manifests: &manifests,
            live: live.map(|live| &**live),
            watched: Some(&watched),
        };
        let mut run = engine.run(entry, plan.clone(), prologue, cancel).await.map_err(|error| {
            let names: Vec<&str> = plan.snapshots.iter().map(|name| name.as_str()).collect();
            error.context(format!("{} {} of domain {}", plan.operation, names.join(" "), entry.domain.name))
        })?;
        self.follow_moved_disk(entry, &manifests, &mut run.warnings).await;
        Ok((plan, run))
    }

    /// A raw disk that got an overlay has another path now: manifests belong beside that too. Those beside the base stay, and tell
    /// whoever finds it whose it is.
    async fn follow_moved_disk(&self, entry: &Entry, before: &Manifests, warnings: &mut Vec<String>) {
        let moved = self.manifests_of(&entry.domain).is_ok_and(|now| now.directory() != before.directory());
        if moved && let Err(error) = self.write_manifests(entry).await {
            warnings.push(error.to_string());
        }
    }

    /// Finishes or undoes every operation of the domain that has not ended.
    async fn recover_entry(
        &self,
        entry: &mut Entry,
        live: &mut Option<Live>,
        cancel: &CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        let mut reports = Vec::new();
        match (&*live, self.registry.hypervisor(&entry.domain.hypervisor)) {
            (Some(live), _) => live.tidy().await?,
            (None, Ok(saver)) => saver.tidy_at_rest(&entry.domain),
            (None, Err(_)) => {}
        }
        for operation in self.catalogue.unfinished(&entry.domain.name).await? {
            let _held = self.hold_disks(&entry.domain, live.as_ref()).await?;
            self.watched(&entry.domain, live.as_ref(), Some(&operation.plan)).await?.refuse_users().await?;
            let manifests = self.manifests_of(&entry.domain)?;
            let engine = Engine {
                catalogue: &*self.catalogue,
                registry: &self.registry,
                events: &self.events,
                manifests: &manifests,
                live: live.as_deref(),
                watched: None,
            };
            let (id, found, plan) = (operation.id, operation.state, operation.plan.clone());
            let run = engine.resume(entry, operation, cancel).await.map_err(|error| {
                error.context(format!(
                    "recovering the unfinished {} of domain {}",
                    plan.operation, entry.domain.name
                ))
            })?;
            let mut notes = run.warnings;
            // An interrupted revert is finished here, and nothing else says what became of the guest.
            notes.extend(run.guest.map(|change| change.to_string()));
            let report = RecoveryReport {
                domain: entry.domain.name.clone(),
                operation_id: id,
                operation: plan.operation,
                snapshots: plan.snapshots,
                found,
                end: if run.happened { RecoveryEnd::Done } else { RecoveryEnd::Undone },
                postponed: run.postponed,
                notes,
            };
            self.events.tell(Event::Recovered { report: Box::new(report.clone()) });
            reports.push(report);
            // What was recovered may have started it, stopped it, or let it go on.
            *live = self.connect(&entry.domain).await?;
            if let Some(live) = &*live {
                live.tidy().await?;
            }
        }
        if let (Some(live), Some(last)) = (&live, reports.last_mut()) {
            last.notes.extend(self.settle(&entry.domain, live).await?);
        }
        Ok(reports)
    }

    /// Recovers one domain, merges what was put off, and brings stale manifests up to date.
    pub(super) async fn recover(
        self: Arc<Self>,
        reference: DomainRef,
        cancel: CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        let mut locked = self.lock(&reference, &cancel).await?;
        let located = &mut locked.located;
        if !located.catalogued {
            return Ok(Vec::new());
        }
        self.require_last_word(&located.entry).await?;
        let mut live = self.connect(&located.entry.domain).await?;
        let mut reports = self.recover_entry(&mut located.entry, &mut live, &cancel).await?;
        let settled = match &live {
            Some(live) if reports.is_empty() => self.settle(&located.entry.domain, live).await?,
            _ => Vec::new(),
        };
        for message in settled {
            self.events.tell(Event::Warning { domain: located.entry.domain.name.clone(), message });
        }
        let (plan, run) = self.change_locked(located, live.as_ref(), &Request::Tidy, &cancel).await?;
        let entry = &located.entry;
        if let Some(operation_id) = run.operation {
            reports.push(RecoveryReport {
                domain: entry.domain.name.clone(),
                operation_id,
                operation: plan.operation,
                snapshots: plan.snapshots,
                found: OperationState::Planned,
                end: RecoveryEnd::Done,
                postponed: run.postponed,
                notes: plan.notes.into_iter().chain(run.warnings).collect(),
            });
        }
        match self.write_manifests(entry).await {
            Err(error)
                if error.kind() == ErrorKind::NoSpace
                    || self.manifests_of(&entry.domain)?.have_no_place() =>
            {
                let (domain, message) = (entry.domain.name.clone(), error.to_string());
                self.events.tell(Event::Warning { domain, message });
            }
            written => written?,
        }
        Ok(reports)
    }

    pub(super) async fn abandon(
        self: Arc<Self>,
        reference: DomainRef,
        cancel: CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        let mut locked = self.lock(&reference, &cancel).await?;
        let Located { entry, catalogued, .. } = &mut locked.located;
        if !*catalogued {
            return Ok(Vec::new());
        }
        let name = entry.domain.name.clone();
        let live = self.connect(&entry.domain).await?;
        let mut reports = Vec::new();
        for operation in self.catalogue.unfinished(&name).await? {
            let is_step = |index: usize, wanted: fn(&DomainStep) -> bool| {
                let step = &operation.plan.steps[index].step;
                step.target.is_domain()
                    && serde_json::from_value(step.action.clone()).is_ok_and(|step| wanted(&step))
            };
            let mut window = false;
            for (index, state) in operation.steps.iter().enumerate() {
                if is_step(index, |step| matches!(step, DomainStep::OpenWindow { .. })) {
                    window = matches!(state, StepState::Started | StepState::Done);
                } else if is_step(index, |step| matches!(step, DomainStep::Continue { .. })) {
                    window &= *state != StepState::Done;
                }
            }
            if live.is_some() && window {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!(
                        "the guest of domain {name} is paused, and its disks were taken from it by the {}",
                        operation.plan.operation
                    ),
                )
                .state("nothing was changed")
                .advise("end its process first: the disks are whole; then abandon the operation"));
            }
            let happened = operation.state == OperationState::Finishing;
            let end = if happened { OperationState::Done } else { OperationState::Undone };
            let reason = "abandoned by the user".to_owned();
            let changes = vec![Change::Operation(operation.id, end, Some(reason))];
            entry.revision = self.catalogue.commit(&name, entry.revision, changes).await?;
            let left =
                operation.steps.iter().zip(&operation.plan.steps).filter(|(state, planned)| match happened {
                    true => planned.group == Group::Finish && **state != StepState::Done,
                    false => matches!(state, StepState::Started | StepState::Done),
                });
            let mut notes: Vec<String> = left
                .map(|(_, planned)| {
                    let what = if happened { "not done" } else { "not undone" };
                    format!("{}: {what}: {}", planned.step.target, planned.step.summary)
                })
                .collect();
            notes.extend(operation.errors.last().map(|error| format!("it had stopped because of: {error}")));
            notes.push(
                "no file was touched; `domsnap check` shows the state, and where the catalogue is wrong, `domsnap import \
                 --replace` takes the images in as they are"
                    .to_owned(),
            );
            reports.push(RecoveryReport {
                domain: name.clone(),
                operation_id: operation.id,
                operation: operation.plan.operation,
                snapshots: operation.plan.snapshots,
                found: operation.state,
                end: RecoveryEnd::Abandoned,
                postponed: Vec::new(),
                notes,
            });
        }
        Ok(reports)
    }

    pub(super) async fn disk_remove(
        self: Arc<Self>,
        reference: DomainRef,
        target: Target,
        cancel: CancellationToken,
    ) -> Result<Domain> {
        let mut locked = self.lock(&reference, &cancel).await?;
        let Located { entry, catalogued, .. } = &mut locked.located;
        let name = entry.domain.name.clone();
        if entry.domain.disk(&target).is_none() {
            return Err(Error::new(ErrorKind::NotFound, format!("domain {name} has no disk {target}"))
                .advise(format!("`domsnap domain show {name}` lists its disks")));
        }
        if entry.domain.disks.len() == 1 {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{target} is the only disk of domain {name}"),
            )
            .advise(format!("take the whole domain out with `domsnap domain remove {name}`")));
        }
        self.refuse_unfinished(entry).await?;
        if !*catalogued {
            // What only manifests tell is in the catalogue before they go.
            self.put(entry, Revision::ABSENT, false).await?;
            *catalogued = true;
        }
        let (before, former) = (self.manifests_of(&entry.domain)?, entry.clone());
        entry.domain.disks.retain(|record| record.disk.target != target);
        if self.manifests_of(&entry.domain)?.directory() != before.directory() {
            // Manifests lie beside the first disk. Those beside the former one go before the catalogue has the domain without it: a
            // crash in between leaves a domain without manifests, and its next change writes them. The other way round it
            // would leave manifests of a domain that the disk is not in any more, and nobody would look there again.
            self.clear_manifests(before, former).await;
        }
        self.put_changed(entry, *catalogued).await?;
        Ok(entry.domain.clone())
    }

    pub(super) async fn disk_add(
        self: Arc<Self>,
        reference: DomainRef,
        disk: Disk,
        cancel: CancellationToken,
    ) -> Result<Domain> {
        let mut locked = self.lock(&reference, &cancel).await?;
        let Located { entry, catalogued, .. } = &mut locked.located;
        let name = entry.domain.name.clone();
        let absolute = camino::absolute_utf8(&disk.path).map_err(|cause| {
            Error::new(ErrorKind::Usage, format!("the image path {:?} cannot be made absolute", disk.path))
                .because(cause)
        })?;
        let disk = Disk { path: image_path(&absolute)?, ..disk };
        if entry.domain.disk(&disk.target).is_some() {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("domain {name} has a disk {} already", disk.target),
            )
            .advise("give the new one another target"));
        }
        if let Some(owner) = self.owner_of(std::slice::from_ref(&disk.path)).await? {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("the image {} is a disk of domain {owner} already", disk.path),
            )
            .advise(format!("take it out there first: `domsnap domain remove {owner}`")));
        }
        if let Some(same) = entry.domain.disks.iter().find(|known| is_same_file(&known.disk.path, &disk.path))
        {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("{} and disk {} of domain {name} are one file", disk.path, same.disk.target),
            )
            .advise("give each disk an image of its own"));
        }
        self.refuse_unfinished(entry).await?;
        let record = self.registry.get(&disk.format)?.adopt(&disk, entry.domain.active_path).await?;
        entry.domain.disks.push(record);
        self.put_changed(entry, *catalogued).await?;
        Ok(entry.domain.clone())
    }

    /// Removes the manifests of a domain from a directory that is not theirs any more. Where that cannot be, it is told and stops
    /// nothing.
    async fn clear_manifests(&self, manifests: Manifests, entry: Entry) {
        let domain = entry.domain.name.clone();
        let cleared = match self.catalogue.identity().await {
            Ok(Some(catalogue)) => blocking(move || manifests.clear(catalogue, &entry)).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = cleared {
            self.events.tell(Event::Warning { domain, message: error.to_string() });
        }
    }

    /// Records a domain whose disks are others now. Its manifests follow; where they cannot, that is told and stops nothing.
    async fn put_changed(&self, entry: &mut Entry, catalogued: bool) -> Result<()> {
        let expected = if catalogued { entry.revision } else { Revision::ABSENT };
        self.put(entry, expected, false).await?;
        if let Err(error) = self.write_manifests(entry).await {
            let domain = entry.domain.name.clone();
            self.events.tell(Event::Warning { domain, message: error.to_string() });
        }
        Ok(())
    }

    /// Brings the manifests up to date where they are not. The caller knows that the catalogue has the last word.
    async fn write_manifests(&self, entry: &Entry) -> Result<()> {
        let manifests = self.manifests_of(&entry.domain)?;
        let catalogue = self.catalogue.identity().await?;
        if manifests.is_current(catalogue, entry) {
            return Ok(());
        }
        let catalogue = catalogue
            .ok_or_else(|| Error::new(ErrorKind::Internal, "a catalogue without an identity has a domain"))?;
        let entry = entry.clone();
        blocking(move || manifests.write(catalogue, None, &entry)).await
    }

    /// Makes the manifests that a domain was taken from this catalogue's: those that were left out are put aside, then
    /// the domain's are written, then those go whose snapshots have other identities now.
    async fn settle_manifests(&self, entry: &Entry, leftovers: &Leftovers) -> Result<()> {
        let manifests = self.manifests_of(&entry.domain)?;
        let (aside, files) = (manifests.clone(), leftovers.left_out.clone());
        blocking(move || aside.put_aside(&files)).await?;
        self.write_manifests(entry).await?;
        let renamed = leftovers.renamed.clone();
        blocking(move || manifests.remove(&renamed)).await
    }

    /// Puts a domain that was taken in into the catalogue, which has it at `expected`; `anew` where nothing of what it
    /// has is to stay, the journal neither.
    async fn put(&self, entry: &mut Entry, expected: Revision, anew: bool) -> Result<()> {
        let mut changes = if anew { vec![Change::RemoveDomain] } else { Vec::new() };
        changes.extend(put_changes(entry));
        changes.extend(self.record_bases(&entry.domain).await);
        entry.revision = self.catalogue.commit(&entry.domain.name, expected, changes).await?;
        Ok(())
    }

    /// Refuses a name by which a domain could not be called, because it begins as an address does.
    fn require_a_name(&self, name: &DomainName) -> Result<()> {
        let hypervisor = name.as_str().split_once(':').and_then(|(word, _)| Hypervisor::new(word).ok());
        match hypervisor.filter(|hypervisor| self.registry.hypervisor(hypervisor).is_ok()) {
            None => Ok(()),
            Some(hypervisor) => Err(Error::new(
                ErrorKind::Usage,
                format!("the name {name} begins with '{hypervisor}:', which says where a domain is reached"),
            )
            .state("no changes made")
            .advise("choose another name")),
        }
    }

    pub(super) async fn domain_add(
        self: Arc<Self>,
        spec: DomainSpec,
        cancel: CancellationToken,
    ) -> Result<ImportReport> {
        self.require_a_name(&spec.name)?;
        let control = match (&spec.control, spec.hypervisor.is_none()) {
            (Some(control), false) => Some(self.read_control(&spec.hypervisor, control)?),
            (control, _) => control.clone(),
        };
        let spec = DomainSpec { control, ..spec };
        let (disks, followed) = disks_of(&spec)?;
        let paths: Vec<_> = disks.iter().map(|disk| disk.path.clone()).collect();
        let _lease = self.lease(&spec.name, &cancel).await?;
        if self.catalogue.load(&spec.name).await?.is_some() {
            return Err(Error::new(ErrorKind::Exists, format!("there is a domain {} already", spec.name))
                .advise(format!(
                    "choose another name, or remove that one with `domsnap domain remove {}`",
                    spec.name
                )));
        }
        let former = match self.owner_of(&paths).await? {
            None => None,
            Some(owner) => Some(self.unregistered_for(&owner, &spec, &cancel).await?),
        };
        let taken = self
            .take_in(Intake {
                name: Some(spec.name.clone()),
                disks,
                hypervisor: spec.hypervisor,
                control: spec.control,
                active_path: spec.active_path,
                by_path: false,
                known_as: former.as_ref().map(|(entry, _)| entry.domain.name.clone()),
                import: false,
                trust: false,
                known: former.as_ref().map(|(entry, _)| entry.clone()),
            })
            .await?;
        if let Some(error) = taken.unconfirmed {
            return Err(error);
        }
        if let Some((entry, _)) = &former {
            // Its manifests are whole: should this end between the two transactions, they bring it back.
            self.catalogue.commit(&entry.domain.name, entry.revision, vec![Change::RemoveDomain]).await?;
        }
        let mut report = self.enter(taken, Revision::ABSENT, false).await?;
        report.notes.splice(0..0, followed);
        Ok(report)
    }

    /// The domain `owner` of the same images, which was never registered and now gets a name.
    async fn unregistered_for(
        &self,
        owner: &DomainName,
        spec: &DomainSpec,
        cancel: &CancellationToken,
    ) -> Result<(Entry, Lease)> {
        let lease = self.lease(owner, cancel).await?;
        let Some(entry) = self.catalogue.load(owner).await? else { return Err(self.no_domain(owner).await?) };
        if !entry.domain.unregistered {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("the images of domain {} belong to domain {owner} already", spec.name),
            )
            .advise(format!("use {owner}, or take it out first with `domsnap domain remove {owner}`")));
        }
        self.require_last_word(&entry).await?;
        self.refuse_unfinished(&entry).await?;
        self.write_manifests(&entry).await?;
        Ok((entry, lease))
    }

    async fn refuse_unfinished(&self, entry: &Entry) -> Result<()> {
        match self.catalogue.unfinished(&entry.domain.name).await?.first() {
            None => Ok(()),
            Some(operation) => Err(Error::new(
                ErrorKind::Refused,
                format!("a {} of domain {} stopped half way", operation.plan.operation, entry.domain.name),
            )
            .state("no changes made")
            .advise(format!("run `domsnap recover {}` first", entry.domain.name))),
        }
    }

    /// Writes a domain that was taken in, and its manifests. Where manifests cannot be written, that is told and stops
    /// nothing.
    async fn enter(
        &self,
        taken: super::locate::Taken,
        expected: Revision,
        anew: bool,
    ) -> Result<ImportReport> {
        let super::locate::Taken { mut entry, restored, adopted, mut notes, leftovers, unconfirmed: _ } =
            taken;
        self.put(&mut entry, expected, anew).await?;
        if let Err(error) = self.settle_manifests(&entry, &leftovers).await {
            let message = error.to_string();
            let domain = entry.domain.name.clone();
            self.events.tell(Event::Warning { domain, message: message.clone() });
            notes.push(message);
        }
        Ok(ImportReport { domain: entry.domain, restored, adopted, notes })
    }

    pub(super) async fn domain_remove(
        self: Arc<Self>,
        reference: DomainRef,
        cancel: CancellationToken,
    ) -> Result<Removal> {
        let locked = self.lock(&reference, &cancel).await?;
        let Located { entry, catalogued, .. } = &locked.located;
        let name = entry.domain.name.clone();
        if !catalogued {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("the catalogue has no domain of {reference}"),
            )
            .advise("`domsnap domain list` shows those that it has"));
        }
        // Where manifests tell more than the catalogue, or another's word, they stay as they are.
        if self.outdated(entry).await?.is_none() {
            self.refuse_unfinished(entry).await?;
            self.write_manifests(entry).await.map_err(|error| {
                error
                    .state("the domain stays in the catalogue: without manifests its snapshots would be lost")
            })?;
        }
        let manifests = self.manifests_of(&entry.domain)?;
        self.catalogue.commit(&name, entry.revision, vec![Change::RemoveDomain]).await?;
        Ok(Removal {
            domain: name,
            snapshots: entry.tree.len() as u64,
            manifests: manifests.directory().to_path_buf(),
        })
    }

    pub(super) async fn import(
        self: Arc<Self>,
        reference: DomainRef,
        options: ImportOptions,
        cancel: CancellationToken,
    ) -> Result<ImportReport> {
        options.name.as_ref().map_or(Ok(()), |name| self.require_a_name(name))?;
        let (intake, owner) = self.import_of(&reference).await?;
        let owner = match owner {
            None => None,
            Some(owner) => {
                let lease = self.lease(&owner, &cancel).await?;
                self.catalogue.load(&owner).await?.map(|entry| (entry, lease))
            }
        };
        // What an outdated catalogue has, its journal too, is of disks that are no more: nothing of it may be resumed.
        let outdated = match &owner {
            Some((entry, _)) => self.outdated(entry).await?.is_some(),
            None => false,
        };
        if let Some((entry, _)) = &owner {
            if !outdated {
                self.refuse_unfinished(entry).await?;
            }
            if !entry.tree.is_empty() && !options.replace {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!(
                        "the catalogue has domain {} with {} snapshots",
                        entry.domain.name,
                        entry.tree.len()
                    ),
                )
                .state("nothing was changed")
                .advise("to replace what it has by what manifests and images tell, say so with --replace"));
            }
        }
        let mut taken = self.take_in(Intake { trust: options.trust, ..intake }).await?;
        if let Some(error) = taken.unconfirmed.take() {
            return Err(error);
        }
        let domain = &mut taken.entry.domain;
        if let Some((entry, _)) = &owner {
            domain.name = entry.domain.name.clone();
            domain.unregistered = entry.domain.unregistered;
        }
        if let Some(name) = options.name {
            domain.name = name;
            domain.unregistered = false;
        }
        match owner {
            Some((entry, _lease)) if entry.domain.name == domain.name => {
                self.enter(taken, entry.revision, outdated).await
            }
            former => {
                let _lease = self.lease(&domain.name, &cancel).await?;
                if self.catalogue.load(&domain.name).await?.is_some() {
                    return Err(Error::new(
                        ErrorKind::Exists,
                        format!("there is another domain {} already", domain.name),
                    )
                    .advise("give this one another name with --name"));
                }
                if let Some((entry, _)) = &former {
                    if !outdated {
                        self.write_manifests(entry).await?;
                    }
                    self.catalogue
                        .commit(&entry.domain.name, entry.revision, vec![Change::RemoveDomain])
                        .await?;
                }
                self.enter(taken, Revision::ABSENT, false).await
            }
        }
    }

    /// What is to be imported, and the domain of the catalogue that it is already, if so.
    async fn import_of(&self, reference: &DomainRef) -> Result<(Intake, Option<DomainName>)> {
        match &*self.understood(reference)? {
            DomainRef::Live { hypervisor, address } => match self.known_at(hypervisor, address).await? {
                Some(name) => match self.intake_of_entry(&name).await? {
                    Some(intake) => Ok((intake, Some(name))),
                    None => Err(self.no_domain(&name).await?),
                },
                None => {
                    let (intake, _) = self.intake_of_running(hypervisor, address).await?;
                    let paths: Vec<_> = intake.disks.iter().map(|disk| disk.path.clone()).collect();
                    let owner = self.owner_of(&paths).await?;
                    Ok((Intake { import: true, ..intake }, owner))
                }
            },
            DomainRef::Images(given) => {
                let (images, _) = real_images(given)?;
                let paths: Vec<_> = images.iter().map(|image| image.path.clone()).collect();
                let owner = self.owner_of(&paths).await?;
                let intake = self.intake_of_images(&images)?;
                let intake = match &owner {
                    Some(owner) => self.intake_of_entry(owner).await?.unwrap_or(intake),
                    None => intake,
                };
                Ok((Intake { import: true, ..intake }, owner))
            }
            DomainRef::Name(name) => match self.intake_of_entry(name).await? {
                Some(intake) => Ok((intake, Some(name.clone()))),
                None => Err(self.no_domain(name).await?),
            },
        }
    }

    async fn intake_of_entry(&self, name: &DomainName) -> Result<Option<Intake>> {
        Ok(self.catalogue.load(name).await?.map(|entry| Intake {
            known: Some(entry.clone()),
            name: Some(entry.domain.name.clone()),
            known_as: Some(entry.domain.name),
            disks: entry.domain.disks.into_iter().map(|record| record.disk).collect(),
            hypervisor: entry.domain.hypervisor,
            control: entry.domain.control.clone(),
            active_path: entry.domain.active_path,
            by_path: false,
            import: true,
            trust: false,
        }))
    }
}

/// What makes the catalogue have a domain that was taken in.
fn put_changes(entry: &Entry) -> Vec<Change> {
    let snapshots: Vec<Snapshot> = entry.tree.iter().cloned().collect();
    let mut changes = vec![Change::PutDomain(Box::new(entry.domain.clone()), snapshots)];
    changes.extend(entry.follows.map(Change::Follow));
    changes
}

/// Runs work on manifests on a blocking thread.
async fn blocking(work: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|cause| Error::new(ErrorKind::Internal, "writing manifests ended early").because(cause))?
}

/// The disks of a new domain, by the paths that they are known by, and a sentence for each that was named by a link.
fn disks_of(spec: &DomainSpec) -> Result<(Vec<Disk>, Vec<String>)> {
    let mut disks: Vec<Disk> = Vec::new();
    let mut notes = Vec::new();
    for disk in &spec.disks {
        let absolute = camino::absolute_utf8(&disk.path).map_err(|cause| {
            Error::new(ErrorKind::Usage, format!("the image path {:?} cannot be made absolute", disk.path))
                .because(cause)
        })?;
        let path = image_path(&absolute).map_err(|error| error.context(format!("disk {}", disk.target)))?;
        let disk = Disk { path, ..disk.clone() };
        if let Err(cause) = disk.path.symlink_metadata()
            && cause.kind() == std::io::ErrorKind::NotFound
        {
            return Err(Error::new(ErrorKind::NotFound, format!("no such file: {}", disk.path))
                .context(format!("disk {}", disk.target)));
        }
        notes.extend(followed(&absolute, &disk.path));
        let is_same = |known: &&Disk| known.target == disk.target || is_same_file(&known.path, &disk.path);
        if let Some(same) = disks.iter().find(is_same) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "domain {} names a disk twice: {} at {}, and {} at {}",
                    spec.name, same.target, same.path, disk.target, disk.path
                ),
            )
            .advise("give each disk a target and an image of its own"));
        }
        disks.push(disk);
    }
    Ok((disks, notes))
}

fn outcome_of(entry: &Entry, plan: Plan, run: Run) -> Outcome {
    let mut notes = plan.notes;
    notes.extend(run.warnings);
    Outcome {
        operation_id: run.operation,
        operation: plan.operation,
        domain: entry.domain.name.clone(),
        snapshots: plan.snapshots,
        bytes_moved: run.bytes_moved,
        postponed: run.postponed,
        notes,
        recovered: Vec::new(),
        downtime_us: run.downtime.map(|time| u64::try_from(time.as_micros()).unwrap_or(u64::MAX)),
        way: run.taken.map(|taken| taken.way),
        start: run.start.iter().map(|word| crate::secrets::shown_word(word)).collect(),
        guest: run.guest,
        started: run.started,
    }
}

/// Whether the guest goes on with a snapshot's memory after a plan.
fn gets_memory(plan: &Plan) -> bool {
    let change = plan.guest().map(|(change, _)| change);
    matches!(change, Some(GuestChange::Restored | GuestChange::RecreatedFromMemory | GuestChange::Started))
}
