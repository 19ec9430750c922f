//! Plans a request over all disks of a domain: a function of the current state, without a side effect.

mod capabilities;
mod clone;
mod held;
mod live;
mod merged;
mod scheduled;

use std::collections::BTreeSet;
use std::sync::Arc;

use jiff::Timestamp;
use uuid::Uuid;

use crate::backend::AdviceOn;
use crate::disk_plan::{DiskPlan, DiskRequest};
use crate::domain::{DiskRecord, Domain};
use crate::erased::AnyDiskSnapshotter;
use crate::error::{Error, ErrorKind, Result};
use crate::group::SnapshotGroup;
use crate::hypervisor::{Obstacle, PowerAfter, SeenDisk, VmStateSaver};
use crate::name::{SnapshotName, Target};
use crate::policy;
use crate::request::{
    CreateDisk, CreateRequest, DeleteRequest, DeleteScope, KeepPrevious, Request, RevertRequest, is_reserved,
    previous_name,
};
use crate::shape::Plan;
use crate::snapshot::{
    Consistency, DiskPoint, Point, PointKind, SkippedDisk, Snapshot, SnapshotId, SnapshotRole, SnapshotTree,
};
use crate::state::DiskState;
use crate::step::Edit;

use held::held_note;
use merged::Merged;

pub(crate) use held::records_only;

pub(crate) use live::RunningDomain;

/// One disk as the planner sees it.
#[derive(Clone)]
pub(crate) struct DiskInput {
    /// Its record in the catalogue.
    pub(crate) record: DiskRecord,
    /// Its state on the machine.
    pub(crate) state: DiskState,
    /// The backend that can change it.
    pub(crate) backend: Arc<AnyDiskSnapshotter>,
}

impl DiskInput {
    fn target(&self) -> &Target {
        &self.record.disk.target
    }

    async fn plan(&self, domain: &Domain, request: &DiskRequest) -> Result<DiskPlan> {
        self.backend.plan(&self.record, &self.state, domain.active_path, request).await
    }

    /// Returns true if it is a part of the machine, and no disk of the guest.
    fn is_machine_state(&self) -> bool {
        self.backend.capabilities().machine_state
    }

    fn size(&self) -> u64 {
        self.state.layer(&self.state.active).map_or(0, |layer| layer.virtual_size)
    }
}

/// Returns the plan that fulfils `request` on `domain`, whose snapshots are `tree` and whose disks are
/// `disks`, in the domain's order. `alive` is present where the domain runs, and `saver` where a
/// hypervisor runs it.
///
/// # Errors
/// An error in the request ([`ErrorKind::NotFound`], [`ErrorKind::Exists`], [`ErrorKind::Usage`]), or the
/// refusal of a backend. Nothing was touched.
pub(crate) async fn plan(
    domain: &Domain,
    tree: &SnapshotTree,
    disks: &[DiskInput],
    alive: Option<&RunningDomain<'_>>,
    saver: Option<&dyn VmStateSaver>,
    request: &Request,
) -> Result<Plan> {
    let planner = Planner { domain, tree, disks, alive };
    match request {
        Request::Create(create) => planner.create(create).await,
        Request::Revert(revert) => planner.revert(revert).await,
        Request::Delete(delete) => planner.delete(delete).await,
        Request::Tidy => planner.tidy().await,
        Request::Undo(undo) if undo.forget => planner.forget(undo.replaced_by).await,
        Request::Undo(undo) => planner.revert(&undo.as_revert(tree, alive.is_some())?).await,
        Request::Clone(clone) => planner.clones(clone, saver).await,
        Request::Hold(_) | Request::Release(_) | Request::Amend(_) => {
            records_only(domain, tree, request, Timestamp::now())
        }
    }
}

/// A number for the name of a new layer.
fn stamp() -> u32 {
    let bytes = Uuid::new_v4().into_bytes();
    u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

struct Planner<'a> {
    domain: &'a Domain,
    tree: &'a SnapshotTree,
    disks: &'a [DiskInput],
    alive: Option<&'a RunningDomain<'a>>,
}

impl Planner<'_> {
    async fn create(&self, request: &CreateRequest) -> Result<Plan> {
        if let Some(id) = request.policy
            && let Some(has) = policy::has_of_period(self.domain, self.tree, id, Timestamp::now())?
        {
            let note = format!("no snapshot is due: this period has {has}");
            return Ok(Plan::new("create", Vec::new()).notes(vec![note]));
        }
        match request.hidden {
            true => self.free_name(&request.name)?,
            false => self.new_name(&request.name)?,
        }
        let others = self.disks_of_others();
        for (index, (target, how)) in request.disks.iter().enumerate() {
            if request.disks.iter().take(index).any(|(other, _)| other == target) {
                return Err(Error::new(
                    ErrorKind::Usage,
                    format!("it is said twice how disk {target} is taken"),
                )
                .state("no changes made")
                .advise(format!("give --disk {target}=HOW once")));
            }
            let skipped = *how == CreateDisk::Skip && others.iter().any(|disk| disk.target == *target);
            if self.domain.disk(target).is_none() && !skipped {
                let known = self.domain.disks.iter().map(|d| d.disk.target.as_str());
                let known: Vec<&str> = known.chain(others.iter().map(|disk| disk.target.as_str())).collect();
                return Err(Error::new(
                    ErrorKind::NotFound,
                    format!("domain {} has no disk {target}", self.domain.name),
                )
                .advise(format!("its disks are: {}", known.join(", "))));
            }
        }
        self.refuse_lacking(request, &others)?;
        self.refuse_moved(|target| request.skips(target))?;
        self.refuse_unfit(|target| request.skips(target))?;
        self.with_memory(request)?;
        let mut merged = Merged::default();
        let mut points = Vec::new();
        let mut instants = Vec::new();
        let mut skipped: Vec<SkippedDisk> = others
            .iter()
            .filter(|disk| disk.guest_writes)
            .map(|disk| SkippedDisk { target: disk.target.clone(), image: disk.address.to_string() })
            .collect();
        for disk in self.disks {
            let said =
                request.disks.iter().rev().find(|(target, _)| target == disk.target()).map(|(_, how)| how);
            let (kind, method, overlay) = match said {
                Some(CreateDisk::Skip) => {
                    let image = disk.record.disk.address.to_string();
                    skipped.push(SkippedDisk { target: disk.target().clone(), image });
                    continue;
                }
                Some(CreateDisk::Take(kind, overlay)) => (Some(*kind), None, overlay.clone()),
                Some(CreateDisk::Method(method)) => (None, Some(method.clone()), None),
                // What is asked of the disks is not asked of a part of the machine.
                None => (request.kind.filter(|_| !disk.is_machine_state()), None, None),
            };
            self.require_kind(disk, kind, method.as_deref())?;
            self.require_live(disk)?;
            self.require_new_point(disk)?;
            let keep = self.tree.points(disk.target()).cloned().collect();
            let name = request.name.clone();
            let is_default = kind.is_none() && method.is_none();
            let mut ask = DiskRequest::Create { kind, method, name, overlay, keep, stamp: stamp() };
            let mut plan = disk.plan(self.domain, &ask).await?;
            if let Some(why) = self.seen(disk.target()).and_then(|seen| seen.no_internal.as_ref())
                && matches!(take_of(&plan), Some(crate::hypervisor::DiskInstant::Internal { .. }))
                && is_default
            {
                self.require_kind(disk, Some(PointKind::External), None)?;
                if let DiskRequest::Create { kind, .. } = &mut ask {
                    *kind = Some(PointKind::External);
                }
                plan = disk.plan(self.domain, &ask).await?;
                merged.notes.push(format!("{}: the snapshot is external: {why}", disk.target()));
            }
            points.push(self.member(disk, &plan)?);
            instants.extend(take_of(&plan).map(|take| (disk.target().clone(), take.clone())));
            merged.add(plan);
        }
        let is_of_a_disk = |point: &DiskPoint| {
            let disk = self.disks.iter().find(|disk| *disk.target() == point.target);
            disk.is_some_and(|disk| !disk.is_machine_state())
        };
        if !points.iter().any(is_of_a_disk) {
            return Err(Error::new(ErrorKind::Refused, "every disk is left out: there is nothing to take")
                .state("no changes made")
                .advise("leave at least one disk in"));
        }
        for disk in &skipped {
            merged.notes.push(format!(
                "{}: skipped as asked: the snapshot holds nothing of {}, and a revert leaves it as it is then",
                disk.target, disk.image
            ));
        }
        let mut snapshot = self.snapshot(request.name.clone(), request.description.clone(), points);
        snapshot.skipped = skipped;
        snapshot.expires = request.expires;
        snapshot.group = request.group.clone();
        if let Some(id) = request.policy {
            merged.notes.extend(self.date_after_last(&mut snapshot, id));
        }
        if request.hidden {
            snapshot.role = SnapshotRole::Dropped;
        }
        merged.notes.extend(self.replaced(&BTreeSet::new()));
        self.create_alive(request, instants, &mut snapshot, &mut merged)?;
        let id = snapshot.id;
        merged.commit.push(Edit::AddSnapshot { snapshot: Box::new(snapshot) });
        // The state that a revert is about to replace derives from what it did. It is the previous state from
        // the commit point of that revert on, and so is only then in the place of an earlier one.
        if !request.hidden {
            merged.commit.push(Edit::SetCurrent { id: Some(id) });
            if !(request.policy.is_some() && self.keeps_undo(Timestamp::now())) {
                merged.commit.extend(self.drop_previous());
            }
        }
        merged.plan("create", vec![request.name.clone()])
    }

    async fn revert(&self, request: &RevertRequest) -> Result<Plan> {
        let wanted = request
            .wanted(self.tree)
            .map_err(|error| error.context(format!("domain {}", self.domain.name)))?;
        self.require_options(request)?;
        if let Some(name) = &request.save_current {
            self.new_name(name)?;
        }
        let skips = |target: &Target| request.skip.contains(target);
        self.refuse_skips(wanted, request)?;
        let is_spared = |target: &Target| wanted.point(target).is_none() || skips(target);
        self.refuse_moved(is_spared)?;
        self.refuse_unfit(is_spared)?;
        let mut merged = Merged::default();
        let (save, plans) = self.revert_disks(wanted, request, &mut merged.notes).await?;
        for target in &request.skip {
            merged.notes.push(format!("{target}: skipped as asked: it keeps what it holds now"));
        }
        let is_without = |disk: &&DiskInput| wanted.point(disk.target()).is_none() && !skips(disk.target());
        // Memory brings the state of the machine.
        let is_restored = |disk: &&DiskInput| {
            disk.is_machine_state() && wanted.memory.is_some() && request.power != Some(PowerAfter::Off)
        };
        for disk in self.disks.iter().filter(is_without).filter(|disk| !is_restored(disk)) {
            merged.notes.push(format!(
                "{}: {}: it keeps what it holds now",
                disk.target(),
                wanted.why_without(disk.target())
            ));
        }
        for disk in self.disks_of_others().iter().filter(|disk| disk.guest_writes) {
            let why = wanted.why_without(&disk.target);
            merged
                .notes
                .push(format!("{} ({}): {why}: it keeps what it holds now", disk.target, disk.address));
        }
        if plans.is_empty() {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("no disk of domain {} is part of snapshot {}", self.domain.name, wanted.name),
            ));
        }
        let mut saved = Vec::new();
        for (disk, plan) in plans {
            if save.is_some() {
                saved.push(self.member(disk, &plan)?);
            }
            merged.add(plan);
        }
        saved.sort_by_key(|member| self.disks.iter().position(|disk| *disk.target() == member.target));
        let mut names = vec![wanted.name.clone()];
        if let Some(name) = &save {
            let mut snapshot =
                self.snapshot(name.clone(), format!("the state before a revert to {}", wanted.name), saved);
            let skipped = self.domain.disks.iter().filter(|record| skips(&record.disk.target));
            let skipped = skipped.map(|record| SkippedDisk {
                target: record.disk.target.clone(),
                image: record.disk.address.to_string(),
            });
            snapshot.skipped = skipped.collect();
            if request.save_current.is_none() {
                snapshot.role = SnapshotRole::Previous;
                // Of the guest's disks at the instant at which it was paused.
                if self.alive.is_some() {
                    snapshot.consistency = Consistency::Crash;
                    merged.notes.push(
                        "the replaced state is kept without the guest's memory: an undo resets the guest; --undo=memory \
                         keeps the memory too"
                            .to_owned(),
                    );
                }
            } else {
                names.push(name.clone());
            }
            merged.commit.push(Edit::AddSnapshot { snapshot: Box::new(snapshot) });
        }
        // At most one replaced state is kept: that of the last revert.
        let kept = match &request.saved {
            Some(name) => self.promote(name)?,
            None if save.is_some() && request.save_current.is_none() => None,
            None => self.drop_previous(),
        };
        merged.commit.extend(kept);
        // An undo brings also back what the current state derives from.
        let current = if request.undo { wanted.parent } else { Some(wanted.id) };
        merged.commit.push(Edit::SetCurrent { id: current });
        merged.notes.extend(self.replaced(&BTreeSet::new()));
        self.revert_alive(wanted, request, &mut merged)?;
        merged.plan(if request.undo { "undo" } else { "revert" }, names)
    }

    /// Plans the revert of each disk. Returns the name under which the current state is saved, if it is.
    async fn revert_disks<'a>(
        &'a self,
        wanted: &Snapshot,
        request: &RevertRequest,
        notes: &mut Vec<String>,
    ) -> Result<(Option<SnapshotName>, Vec<(&'a DiskInput, DiskPlan)>)> {
        let save = match (&request.save_current, request.keep) {
            (Some(name), _) => Some(name.clone()),
            (None, KeepPrevious::No) => None,
            (None, KeepPrevious::IfFree | KeepPrevious::Disks | KeepPrevious::Memory) => {
                Some(previous_name()?)
            }
        };
        if request.save_current.is_some() || request.keep != KeepPrevious::IfFree {
            let plans = self.revert_each(wanted, request, save.as_ref()).await?;
            return Ok((save, plans));
        }
        let why = match self.revert_each(wanted, request, save.as_ref()).await {
            Ok(plans) => match plans.iter().find_map(|(disk, plan)| Some((disk, plan.reserves.as_ref()?))) {
                None => return Ok((save, plans)),
                Some((disk, reserves)) => {
                    format!("{}: {reserves}; --undo=disks keeps it", disk.target())
                }
            },
            Err(error) => error.summary(),
        };
        let plans = self.revert_each(wanted, request, None).await?;
        notes.push(format!("the replaced state is not kept: {why}"));
        Ok((None, plans))
    }

    async fn revert_each<'a>(
        &'a self,
        wanted: &Snapshot,
        request: &RevertRequest,
        save: Option<&SnapshotName>,
    ) -> Result<Vec<(&'a DiskInput, DiskPlan)>> {
        let mut plans = Vec::new();
        for disk in self.disks.iter().filter(|disk| !request.skip.contains(disk.target())) {
            let Some(member) = wanted.point(disk.target()) else { continue };
            require_single_tag(disk, &member.point)?;
            self.refuse_replaced(wanted, disk, member)?;
            self.require_live(disk)?;
            if save.is_some() {
                self.require_new_point(disk)?;
            }
            if self.stays_open(disk, request) {
                if let Some(name) = save {
                    plans.push((disk, self.keep_open_state(disk, name).await?));
                }
                continue;
            }
            // Every disk's revert can be undone, also the last one's. Otherwise a crash between its cut and
            // the commit would leave it reverted and the others not. The domain's later writes could not be
            // attributed to either state.
            let plan = self.revert_disk(disk, &member.point, save).await?;
            if plan.consumes {
                wanted.refuse_held(self.domain.name.as_str(), "revert", Timestamp::now())?;
            }
            plans.push((disk, plan));
        }
        Ok(plans)
    }

    /// Returns true if a revert leaves the file of a machine's state to the running machine, which has it
    /// open: memory that is loaded brings the state, and the machine writes it to the file. Where there is no
    /// memory, the state stays as it is, which a note says.
    fn stays_open(&self, disk: &DiskInput, request: &RevertRequest) -> bool {
        disk.is_machine_state()
            && request.power != Some(PowerAfter::Off)
            && self.alive.is_some_and(|alive| !alive.profile.recreates)
    }

    /// Plans the point that keeps the current state of such a file. The guest is paused then, and all that it
    /// wrote is in the file, as at rest.
    async fn keep_open_state(&self, disk: &DiskInput, name: &SnapshotName) -> Result<DiskPlan> {
        let mut paused = disk.clone();
        paused.state.attached = false;
        let ask = DiskRequest::Create {
            kind: None,
            method: None,
            name: name.clone(),
            overlay: None,
            keep: self.tree.points(disk.target()).cloned().collect(),
            stamp: stamp(),
        };
        paused.plan(self.domain, &ask).await
    }

    /// Refuses to leave out a disk that does not exist. Refuses also a disk that the restored memory would
    /// find in another state.
    fn refuse_skips(&self, wanted: &Snapshot, request: &RevertRequest) -> Result<()> {
        if let Some(target) = request.skip.iter().find(|target| self.domain.disk(target).is_none()) {
            let known: Vec<&str> = self.domain.disks.iter().map(|d| d.disk.target.as_str()).collect();
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("domain {} has no disk {target}", self.domain.name),
            )
            .advise(format!("its disks are: {}", known.join(", "))));
        }
        let restores = wanted.memory.is_some() && request.power != Some(PowerAfter::Off);
        match request.skip.iter().find(|target| restores && wanted.point(target).is_some()) {
            None => Ok(()),
            Some(target) => Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "disk {target} cannot be skipped: snapshot {} has memory, which would meet the disk in another state",
                    wanted.name
                ),
            )
            .state("no changes made")
            .advise("revert the disks alone with --off, and start the domain then")),
        }
    }

    /// A disk as the hypervisor reports it; absent where the domain does not run.
    fn seen(&self, target: &Target) -> Option<&SeenDisk> {
        self.alive?.seen.disks.iter().find(|disk| disk.member.as_ref() == Some(target))
    }

    /// The drives of the running domain that are none of the domain's disks.
    fn disks_of_others(&self) -> Vec<&SeenDisk> {
        let seen = self.alive.map(|alive| alive.seen.disks.iter());
        seen.into_iter().flatten().filter(|disk| disk.member.is_none()).collect()
    }

    /// Refuses an action on a disk of which the running domain has other files open than their names lead to.
    /// The hypervisor would open the wrong file by such a name, and the guest would continue with it.
    fn refuse_moved(&self, is_spared: impl Fn(&Target) -> bool) -> Result<()> {
        let seen = self.alive.map(|alive| alive.seen.disks.iter()).into_iter().flatten();
        for disk in seen {
            let (Some(member), Some(Obstacle { why, advice })) = (&disk.member, &disk.replaced) else {
                continue;
            };
            if !is_spared(member) {
                let detail = format!("disk {member} of domain {}: {why}", self.domain.name);
                return Err(Error::new(ErrorKind::Refused, detail)
                    .state("no changes made")
                    .advise(advice.clone()));
            }
        }
        Ok(())
    }

    /// Refuses an action that a disk of the running domain does not allow as it is open now. Found out later,
    /// the failure would leave the guest without the disk.
    fn refuse_unfit(&self, is_spared: impl Fn(&Target) -> bool) -> Result<()> {
        let Some(alive) = self.alive else { return Ok(()) };
        for disk in &alive.seen.disks {
            let (Some(member), Some(why)) = (&disk.member, &disk.left_out) else { continue };
            if is_spared(member) {
                continue;
            }
            return Err(Error::new(
                ErrorKind::Refused,
                format!("disk {member} of domain {} ({}): {why}", self.domain.name, disk.address),
            )
            .state("no changes made")
            .advise(format!(
                "change that and try again, shut the domain down first, or leave the disk out of a snapshot with --disk \
                 {member}=skip"
            )));
        }
        Ok(())
    }

    /// Refuses a snapshot that would lack a disk which the guest writes, unless the user agreed for each.
    fn refuse_lacking(&self, request: &CreateRequest, others: &[&SeenDisk]) -> Result<()> {
        let lacking: Vec<&&SeenDisk> =
            others.iter().filter(|disk| disk.guest_writes && !request.skips(&disk.target)).collect();
        if lacking.is_empty() {
            return Ok(());
        }
        let each = lacking.iter().map(|disk| {
            let why = disk.left_out.as_deref().unwrap_or("it is not registered as a disk of the domain");
            format!("{} ({}): {why}", disk.target, disk.address)
        });
        let skips = lacking.iter().map(|disk| format!("--disk {}=skip", disk.target));
        let name = &self.domain.name;
        let add = lacking.iter().filter(|disk| disk.left_out.is_none()).map(|disk| {
            let SeenDisk { target, address, format, .. } = disk;
            format!(
                "register it with `domsnap domain disk add {name} {target}={address},format={format}`; or "
            )
        });
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the guest of domain {name} can write disks that the snapshot would not hold: {}",
                each.collect::<Vec<_>>().join("; ")
            ),
        )
        .state("no changes made")
        .advise(format!(
            "{}leave {} out of the snapshot with {}",
            add.collect::<String>(),
            if lacking.len() == 1 { "it" } else { "them" },
            skips.collect::<Vec<_>>().join(" ")
        )))
    }

    async fn revert_disk(
        &self,
        disk: &DiskInput,
        to: &Point,
        save: Option<&SnapshotName>,
    ) -> Result<DiskPlan> {
        let ask = DiskRequest::Revert {
            to: to.clone(),
            save: save.cloned(),
            keep: self.tree.points(disk.target()).cloned().collect(),
            stamp: stamp(),
        };
        disk.plan(self.domain, &ask).await
    }

    /// Refuses a revert to an internal snapshot that another program put in place of the recorded one. The
    /// guest would get other data without any message.
    fn refuse_replaced(&self, wanted: &Snapshot, disk: &DiskInput, member: &DiskPoint) -> Result<()> {
        let Some(why) = member.replaced(&disk.state) else { return Ok(()) };
        let (domain, snapshot) = (&self.domain.name, &wanted.name);
        let remove = crate::shell::shell_command(["domsnap", "delete", domain.as_str(), snapshot.as_str()]);
        let adopt = crate::shell::shell_command([
            "domsnap",
            "import",
            "--replace",
            disk.record.disk.address.as_str(),
        ]);
        Err(Error::new(ErrorKind::Refused, format!("{}: {why}", disk.target()))
            .state("no changes made")
            .advise(format!(
                "`{remove}` removes snapshot {snapshot} from the catalogue and leaves the internal snapshot in the image; \
                 `{adopt}` then imports that as a snapshot of its own"
            )))
    }

    /// Reports the internal snapshots, except the `doomed`, that another program replaced, as far as their
    /// layers were read.
    fn replaced(&self, doomed: &BTreeSet<SnapshotId>) -> Vec<String> {
        let mut notes = Vec::new();
        for snapshot in self.tree.iter().filter(|snapshot| !doomed.contains(&snapshot.id)) {
            for disk in self.disks {
                let why = snapshot.point(disk.target()).and_then(|member| member.replaced(&disk.state));
                notes.extend(why.map(|why| format!("snapshot {}: {}: {why}", snapshot.name, disk.target())));
            }
        }
        notes
    }

    /// The snapshot called `name`.
    fn named(&self, name: &SnapshotName) -> Result<&Snapshot> {
        self.tree.named(name).map_err(|error| error.context(format!("domain {}", self.domain.name)))
    }

    async fn delete(&self, request: &DeleteRequest) -> Result<Plan> {
        if request.limit > 0 && self.alive.is_none() {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("--limit does not apply: domain {} does not run", self.domain.name),
            )
            .state("no changes made")
            .advise("leave --limit out: only merges of a running domain are slowed down"));
        }
        let now = Timestamp::now();
        let mut doomed = BTreeSet::new();
        for name in &request.names {
            let snapshot = self.named(name)?;
            if request.scope != DeleteScope::ChildrenOnly {
                doomed.insert(snapshot.id);
            }
            if request.scope != DeleteScope::Only {
                let derived = self.tree.descendants(snapshot.id).into_iter();
                // The state that a revert replaced is no snapshot: it gets another parent, as now.
                let derived = derived.filter(|derived| derived.role == SnapshotRole::Snapshot);
                doomed.extend(derived.map(|derived| derived.id));
            }
        }
        if let Some(id) = request.prune {
            doomed.insert(self.require_pruned(id, now)?);
        }
        if request.expired {
            doomed.extend(self.expired(now).map(|snapshot| snapshot.id));
        }
        let deferred = match request.defer {
            true => self.defer_held(&mut doomed, now),
            false => Vec::new(),
        };
        for snapshot in self.tree.iter().filter(|snapshot| doomed.contains(&snapshot.id)) {
            snapshot.refuse_held(self.domain.name.as_str(), "delete", now)?;
        }
        let mut plan = self.drop_snapshots("delete", &doomed, request.force).await?;
        if !request.group {
            plan.notes.extend(self.broken_groups(&doomed));
        }
        for snapshot in deferred {
            plan.notes.push(held_note(&snapshot, now));
            plan.commit.push(Edit::Amend { snapshot: Box::new(snapshot) });
        }
        Ok(plan)
    }

    /// Notes on the groups that lose a snapshot which is deleted in this domain alone.
    fn broken_groups(&self, doomed: &BTreeSet<SnapshotId>) -> Vec<String> {
        let gone = self.tree.iter().filter(|snapshot| doomed.contains(&snapshot.id));
        let of_group = gone.filter_map(|snapshot| Some((&snapshot.name, snapshot.group.as_ref()?)));
        let note = |(name, group): (&SnapshotName, &SnapshotGroup)| {
            format!(
                "snapshot {name} was taken at one instant with those of {}: without it that group is not whole any more",
                group.others(&self.domain.name)
            )
        };
        of_group.map(note).collect()
    }

    async fn drop_snapshots(
        &self,
        operation: &str,
        doomed: &BTreeSet<SnapshotId>,
        force: bool,
    ) -> Result<Plan> {
        for snapshot in self.tree.iter().filter(|snapshot| doomed.contains(&snapshot.id)) {
            for disk in self.disks {
                snapshot
                    .point(disk.target())
                    .map_or(Ok(()), |member| require_single_tag(disk, &member.point))?;
            }
        }
        let has_points = |target: &Target| {
            self.tree.iter().any(|snapshot| doomed.contains(&snapshot.id) && snapshot.point(target).is_some())
        };
        self.refuse_moved(|target| !has_points(target))?;
        let mut merged = Merged::default();
        for disk in self.disks {
            self.require_last(disk, doomed)?;
            let (mut drop, keep) = split_points(self.tree, disk.target(), doomed);
            // An internal snapshot that another program made in its place is not ours to delete.
            for snapshot in self.tree.iter().filter(|snapshot| doomed.contains(&snapshot.id)) {
                let Some(member) = snapshot.point(disk.target()) else { continue };
                if let Some(why) = member.replaced(&disk.state) {
                    drop.retain(|point| *point != member.point);
                    let note = format!("{}: {why}; it stays in the image", disk.target());
                    if !merged.notes.contains(&note) {
                        merged.notes.push(note);
                    }
                }
            }
            let plan = disk.plan(self.domain, &DiskRequest::Delete { drop, keep, force }).await?;
            match self.require_live(disk) {
                // The user did not ask for this tidying: a step that has to wait for the domain's end waits.
                Err(_) if doomed.is_empty() => continue,
                refused if plan.steps().next().is_some() => refused?,
                _ => {}
            }
            merged.add(plan);
        }
        if !doomed.is_empty() {
            merged.notes.extend(self.replaced(doomed));
        }
        let mut names = Vec::new();
        let gone: Vec<&Snapshot> =
            self.tree.iter().filter(|snapshot| doomed.contains(&snapshot.id)).collect();
        self.delete_alive(&gone, &mut merged)?;
        for snapshot in gone {
            names.push(snapshot.name.clone());
            merged.commit.push(Edit::RemoveSnapshot { id: snapshot.id });
        }
        let survivor = self.surviving_ancestor(self.domain.current, doomed);
        if survivor != self.domain.current {
            merged.commit.push(Edit::SetCurrent { id: survivor });
        }
        merged.plan(operation, names)
    }

    fn surviving_ancestor(
        &self,
        from: Option<SnapshotId>,
        doomed: &BTreeSet<SnapshotId>,
    ) -> Option<SnapshotId> {
        let mut next = from;
        for _ in 0..=self.tree.len() {
            match next {
                Some(id) if doomed.contains(&id) => {
                    next = self.tree.get(id).and_then(|snapshot| snapshot.parent)
                }
                other => return other,
            }
        }
        None // the records form a loop: no ancestor is to be had
    }

    fn new_name(&self, name: &SnapshotName) -> Result<()> {
        refuse_reserved(name)?;
        self.free_name(name)
    }

    fn free_name(&self, name: &SnapshotName) -> Result<()> {
        refuse_taken(self.domain, self.tree, name)
    }

    fn member(&self, disk: &DiskInput, plan: &DiskPlan) -> Result<DiskPoint> {
        let point = plan.point.clone().ok_or_else(|| {
            Error::new(
                ErrorKind::Internal,
                format!("backend {} planned no point for {}", disk.backend.format(), disk.target()),
            )
        })?;
        Ok(DiskPoint::new(disk.target().clone(), point, disk.size()))
    }

    fn snapshot(&self, name: SnapshotName, description: String, disks: Vec<DiskPoint>) -> Snapshot {
        Snapshot::new(name, Timestamp::now(), disks)
            .parent(self.domain.current)
            .description(description)
            .consistency(Consistency::Clean)
    }
}

/// Returns the points of one disk that go with the snapshots `doomed`, and those that stay. A point that a
/// remaining snapshot shares stays.
pub(crate) fn split_points(
    tree: &SnapshotTree,
    target: &Target,
    doomed: &BTreeSet<SnapshotId>,
) -> (Vec<Point>, Vec<Point>) {
    let points_of = |wanted: bool| {
        tree.iter()
            .filter(move |snapshot| doomed.contains(&snapshot.id) == wanted)
            .filter_map(|snapshot| snapshot.point(target))
            .map(|member| member.point.clone())
    };
    let keep: Vec<Point> = points_of(false).collect();
    (points_of(true).filter(|point| !keep.contains(point)).collect(), keep)
}

/// Refuses a name that only domsnap gives.
fn refuse_reserved(name: &SnapshotName) -> Result<()> {
    match is_reserved(name) {
        true => Err(Error::new(
            ErrorKind::Usage,
            format!("{name}: names that begin so are those of replaced states"),
        )
        .state("no changes made")
        .advise("choose another name")),
        false => Ok(()),
    }
}

/// Refuses the name of a snapshot that exists.
fn refuse_taken(domain: &Domain, tree: &SnapshotTree, name: &SnapshotName) -> Result<()> {
    match tree.iter().any(|snapshot| snapshot.name == *name) {
        true => Err(Error::new(
            ErrorKind::Exists,
            format!("domain {} has a snapshot {name} already", domain.name),
        )
        .advise("choose another name, or delete that one first")),
        false => Ok(()),
    }
}

/// The hypervisor's part in the cut of a disk, if it has one.
fn take_of(plan: &DiskPlan) -> Option<&crate::hypervisor::DiskInstant> {
    plan.instant.as_ref().map(|instant| &instant.take)
}

/// Refuses a point whose tag is that of several internal snapshots of its image. Other tools can make such,
/// and a step that names the tag could change the wrong one.
///
/// The planner asks, not the backends: in a delete, two snapshots of one tag keep each other's point, so the
/// request to a backend has neither.
fn require_single_tag(disk: &DiskInput, Point { layer, tag }: &Point) -> Result<()> {
    let (Some(tag), Some(layer)) = (tag, disk.state.layer(layer)) else { return Ok(()) };
    let same = layer.internal.iter().filter(|internal| internal.tag == *tag).count();
    if same < 2 {
        return Ok(());
    }
    let delete = disk.backend.advice(&disk.record, AdviceOn::AmbiguousTag { layer, tag });
    let delete = delete.unwrap_or("delete all but one with the tool that made them".to_owned());
    let adopt =
        crate::shell::shell_command(["domsnap", "import", "--replace", disk.record.disk.address.as_str()]);
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "{}: {} has {same} internal snapshots called {tag}, and the name cannot say which is meant",
            disk.target(),
            layer.address
        ),
    )
    .state("no changes made")
    .advise(format!("{delete}, then run `{adopt}`")))
}

#[cfg(test)]
mod tests;
