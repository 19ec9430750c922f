//! The requests of a user.

use std::time::Duration;

use camino::Utf8PathBuf;
use jiff::Timestamp;
use uuid::Uuid;

use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::group::SnapshotGroup;
use crate::hold::{Holder, HoldingProcess};
use crate::hypervisor::{CloneNetwork, PowerAfter, Quiesce};
use crate::name::{DomainName, LayerName, SnapshotName, Target};
use crate::policy::PolicyId;
use crate::snapshot::{PointKind, Snapshot, SnapshotId, SnapshotTree};

/// Action for one disk in a create.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CreateDisk {
    /// Take a point of this kind. For an external point, a name may be given to the new overlay's file.
    Take(PointKind, Option<LayerName>),
    /// Take a point by a method of the backend ([`crate::backend::Capabilities::methods`]).
    Method(String),
    /// Leave the disk out of the snapshot.
    Skip,
}

/// A request to create a snapshot.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CreateRequest {
    /// Name of the snapshot.
    pub name: SnapshotName,
    /// The user's description.
    pub description: String,
    /// Kind of point for disks that are not in `disks`; absent: the kind that the backend prefers.
    pub kind: Option<PointKind>,
    /// Actions for single disks.
    pub disks: Vec<(Target, CreateDisk)>,
    /// True to save memory too; absent: if the domain runs or is paused.
    pub memory: Option<bool>,
    /// True to let the guest run while its memory is saved; absent: if its hypervisor supports that.
    pub live: Option<bool>,
    /// Time limit of pre-copy, after which the guest is paused; absent: a minute. It applies where the
    /// hypervisor must repeatedly copy the pages that the guest changes.
    pub budget: Option<Duration>,
    /// Compression level of the memory image, 1 to 19; 0: none; absent: the domain's setting.
    pub compress: Option<u8>,
    /// Freezing of the guest's file systems during the cut. It is not needed if memory is saved.
    pub quiesce: Quiesce,
    /// Time limit of the freeze.
    pub quiesce_limit: Duration,
    /// Power state of the domain afterwards; absent: the same as before.
    pub then: Option<PowerAfter>,
    /// The time from which the snapshot may be deleted without a further question.
    pub expires: Option<Timestamp>,
    /// The policy that asks for it. Then a snapshot is taken only if this period has none of that policy.
    pub policy: Option<PolicyId>,
    /// True if the snapshot saves the state that a revert is going to replace. It is no user's snapshot.
    pub(crate) hidden: bool,
    /// True if a revert follows, for which the guest is left paused.
    pub(crate) for_revert: bool,
    /// The group of snapshots of other domains that are taken with it.
    pub(crate) group: Option<SnapshotGroup>,
}

/// Default time limit of pre-copy.
pub(crate) const BUDGET: Duration = Duration::from_secs(60);

/// Default time limit of the freeze.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);

impl CreateRequest {
    /// Requests a snapshot called `name` of all disks, each by its backend's preferred method.
    pub fn new(name: SnapshotName) -> Self {
        Self {
            name,
            description: String::new(),
            kind: None,
            disks: Vec::new(),
            memory: None,
            live: None,
            budget: None,
            compress: None,
            quiesce: Quiesce::No,
            quiesce_limit: QUIESCE_LIMIT,
            then: None,
            expires: None,
            policy: None,
            hidden: false,
            for_revert: false,
            group: None,
        }
    }

    /// Sets whether memory is saved too.
    #[must_use]
    pub fn memory(mut self, taken: bool) -> Self {
        self.memory = Some(taken);
        self
    }

    /// Sets whether the guest runs while its memory is saved.
    #[must_use]
    pub fn live(mut self, live: bool) -> Self {
        self.live = Some(live);
        self
    }

    /// Sets the time limit of pre-copy.
    #[must_use]
    pub fn budget(mut self, budget: Duration) -> Self {
        self.budget = Some(budget);
        self
    }

    /// Sets the compression level of the memory image, 1 to 19; 0: none.
    #[must_use]
    pub fn compress(mut self, level: u8) -> Self {
        self.compress = Some(level);
        self
    }

    /// Freezes the guest's file systems during the cut, for `limit` at most.
    #[must_use]
    pub fn quiesce(mut self, quiesce: Quiesce, limit: Duration) -> Self {
        self.quiesce = quiesce;
        self.quiesce_limit = limit;
        self
    }

    /// Sets the power state of the domain afterwards.
    #[must_use]
    pub fn then(mut self, power: PowerAfter) -> Self {
        self.then = Some(power);
        self
    }

    /// Sets the kind of point for all disks without an action of their own.
    #[must_use]
    pub fn kind(mut self, kind: PointKind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// Sets the action for one disk.
    #[must_use]
    pub fn disk(mut self, target: Target, how: CreateDisk) -> Self {
        self.disks.push((target, how));
        self
    }

    /// Returns true if the user leaves the disk `target` out.
    pub(crate) fn skips(&self, target: &Target) -> bool {
        self.disks.iter().any(|(named, how)| named == target && *how == CreateDisk::Skip)
    }

    /// Permits the deletion from `time` on without a further question.
    #[must_use]
    pub fn expires(mut self, time: Timestamp) -> Self {
        self.expires = Some(time);
        self
    }

    /// Takes it for a policy, if this period has none of that policy.
    #[must_use]
    pub fn policy(mut self, policy: PolicyId) -> Self {
        self.policy = Some(policy);
        self
    }

    /// Sets the description.
    #[must_use]
    pub fn description(mut self, text: impl Into<String>) -> Self {
        self.description = text.into();
        self
    }
}

/// The way in which a revert keeps the state that it replaces, so that an undo brings it back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum KeepPrevious {
    /// The replaced state is discarded.
    #[default]
    No,
    /// The disks are kept if no disk reserves space for that. Otherwise nothing is kept, with a note.
    IfFree,
    /// The disks are kept.
    Disks,
    /// The disks are kept, and the guest's memory if the domain runs.
    Memory,
}

/// A request to revert to a snapshot.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RevertRequest {
    /// Name of the snapshot.
    pub name: SnapshotName,
    /// If given, the current state is saved as a snapshot of this name first.
    pub save_current: Option<SnapshotName>,
    /// Power state of the domain afterwards; absent: with memory the state at the snapshot, without memory
    /// the state now.
    pub power: Option<PowerAfter>,
    /// True to keep the current memory until the revert is certain, if the hypervisor must end the domain for
    /// it.
    pub safety: bool,
    /// The file that the domain is created from instead of its own, if its hypervisor uses one.
    pub config: Option<Utf8PathBuf>,
    /// Disks that are not reverted.
    pub skip: Vec<Target>,
    /// The way in which the replaced state is kept for an undo.
    pub keep: KeepPrevious,
    /// True if the "snapshot" is the state that the last revert replaced.
    pub(crate) undo: bool,
    /// The hidden snapshot that has the current state, with memory, already.
    pub(crate) saved: Option<SnapshotName>,
    /// The snapshot, hidden or not, that has the state which is replaced: it was taken just before, and the
    /// guest has been paused since.
    pub(crate) state_before: Option<SnapshotName>,
}

impl RevertRequest {
    /// Requests a revert to `name` that discards the current state.
    pub fn new(name: SnapshotName) -> Self {
        Self {
            name,
            save_current: None,
            power: None,
            safety: true,
            config: None,
            skip: Vec::new(),
            keep: KeepPrevious::No,
            undo: false,
            saved: None,
            state_before: None,
        }
    }

    /// Splits a revert that saves the current state of a running domain: returns the create that saves it,
    /// and the revert. A state that is kept for an undo is a hidden snapshot, and becomes the previous state
    /// at the commit point of the revert.
    ///
    /// The create saves a snapshot with memory and leaves the guest paused until the revert. So nothing that
    /// the guest does in between is lost.
    pub(crate) fn in_two(&self, recreates: bool) -> Option<(CreateRequest, Self)> {
        let (name, hidden) = match (&self.save_current, self.keep) {
            (Some(name), _) => (name.clone(), false),
            (None, KeepPrevious::Memory) => (previous_name().ok()?, true),
            (None, KeepPrevious::No | KeepPrevious::IfFree | KeepPrevious::Disks) => return None,
        };
        let mut save = CreateRequest::new(name.clone())
            .description(format!("the state before a revert to {}", self.name))
            .then(PowerAfter::Paused);
        save.hidden = hidden;
        save.for_revert = true;
        save.disks.extend(self.skip.iter().map(|target| (target.clone(), CreateDisk::Skip)));
        // The saved snapshot already provides all the safety that is possible: a revert that fails restores
        // the guest from its memory.
        let safety = self.safety && !recreates;
        let (keep, state_before) = (KeepPrevious::No, Some(name.clone()));
        let saved = hidden.then_some(name);
        Some((save, Self { save_current: None, safety, keep, saved, state_before, ..self.clone() }))
    }

    /// The snapshot of `tree` that the domain is reverted to.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`].
    pub(crate) fn wanted<'a>(&self, tree: &'a SnapshotTree) -> Result<&'a Snapshot> {
        match self.undo {
            true => tree.iter().find(|snapshot| snapshot.name == self.name).ok_or_else(nothing_to_undo),
            false => tree.named(&self.name),
        }
    }

    /// Keeps the state that is replaced, for an undo.
    #[must_use]
    pub fn keep(mut self, keep: KeepPrevious) -> Self {
        self.keep = keep;
        self
    }

    /// Does not keep the memory that could restore the previous guest.
    #[must_use]
    pub fn without_safety(mut self) -> Self {
        self.safety = false;
        self
    }

    /// Creates the domain from this file.
    #[must_use]
    pub fn config(mut self, file: impl Into<Utf8PathBuf>) -> Self {
        self.config = Some(file.into());
        self
    }

    /// Leaves a disk as it is, for example one that no longer exists. Memory is not restored over such a
    /// disk.
    #[must_use]
    pub fn skip(mut self, target: Target) -> Self {
        self.skip.push(target);
        self
    }

    /// Sets the power state of the domain afterwards.
    #[must_use]
    pub fn power(mut self, power: PowerAfter) -> Self {
        self.power = Some(power);
        self
    }

    /// Saves the current state as a snapshot first.
    #[must_use]
    pub fn save_current(mut self, name: SnapshotName) -> Self {
        self.save_current = Some(name);
        self
    }
}

/// The part of the tree that a delete removes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeleteScope {
    /// The named snapshots only; their children become children of their parents.
    #[default]
    Only,
    /// The named snapshots and all their descendants.
    WithChildren,
    /// All descendants of the named snapshots, which are kept.
    ChildrenOnly,
}

/// A request to delete snapshots.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeleteRequest {
    /// Names of the snapshots.
    pub names: Vec<SnapshotName>,
    /// The part of the tree to delete.
    pub scope: DeleteScope,
    /// Limit of merges on a running domain, in bytes per second; 0: no limit.
    pub limit: u64,
    /// True to forget damaged points, if the backend can: their space stays in use.
    pub force: bool,
    /// True if snapshots that are held are deleted when their last holds end.
    pub defer: bool,
    /// True if all snapshots that have expired and are not held are deleted too.
    pub expired: bool,
    /// A snapshot that the domain's policy prunes. It is deleted only if the policy still does when the
    /// domain is locked.
    pub prune: Option<SnapshotId>,
    /// True if the snapshots of the other domains of their groups are deleted too.
    pub(crate) group: bool,
}

impl DeleteRequest {
    /// Requests the deletion of `names` only.
    pub fn new(names: Vec<SnapshotName>) -> Self {
        Self {
            names,
            scope: DeleteScope::Only,
            limit: 0,
            force: false,
            defer: false,
            expired: false,
            prune: None,
            group: false,
        }
    }

    /// Requests the deletion of the snapshot `id`, which the domain's policy prunes.
    pub fn pruning(id: SnapshotId) -> Self {
        Self { prune: Some(id), ..Self::new(Vec::new()) }
    }

    /// Limits merges on a running domain, in bytes per second.
    #[must_use]
    pub fn limit(mut self, bytes_per_second: u64) -> Self {
        self.limit = bytes_per_second;
        self
    }

    /// Forgets damaged points.
    #[must_use]
    pub fn force(mut self, force: bool) -> Self {
        self.force = force;
        self
    }

    /// Defers the deletion of snapshots that are held until their last holds end.
    #[must_use]
    pub fn defer(mut self, defer: bool) -> Self {
        self.defer = defer;
        self
    }

    /// Also deletes all snapshots that have expired and are not held.
    #[must_use]
    pub fn expired(mut self, expired: bool) -> Self {
        self.expired = expired;
        self
    }

    /// Sets the part of the tree to delete.
    #[must_use]
    pub fn scope(mut self, scope: DeleteScope) -> Self {
        self.scope = scope;
        self
    }
}

/// A request to bring the state back that the last revert replaced, or to give it up.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct UndoRequest {
    /// True if the state is removed instead.
    pub forget: bool,
    /// If the state is removed: only if the revert that replaced it was at this time or before.
    pub replaced_by: Option<Timestamp>,
    /// The power state of the guest afterwards; absent: as it is, or as it was where memory is restored.
    pub power: Option<PowerAfter>,
}

impl UndoRequest {
    /// Brings the state back.
    pub fn new() -> Self {
        Self::default()
    }

    /// Removes the state instead.
    #[must_use]
    pub fn forget(mut self, forget: bool) -> Self {
        self.forget = forget;
        self
    }

    /// Removes the state if it was replaced at this time or before.
    #[must_use]
    pub fn forget_before(mut self, time: Timestamp) -> Self {
        self.forget = true;
        self.replaced_by = Some(time);
        self
    }

    /// Chooses the power state of the guest afterwards.
    #[must_use]
    pub fn power(mut self, power: PowerAfter) -> Self {
        self.power = Some(power);
        self
    }

    /// The undo of a domain with these snapshots as a revert. `runs`: the domain runs, so its memory can be
    /// kept. An undo of the undo brings back what this one replaces: with memory, if this one has memory.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where nothing was kept.
    pub(crate) fn as_revert(&self, tree: &SnapshotTree, runs: bool) -> Result<RevertRequest> {
        let previous = tree.previous().ok_or_else(nothing_to_undo)?;
        let keep = match runs && previous.memory.is_some() {
            true => KeepPrevious::Memory,
            false => KeepPrevious::Disks,
        };
        let mut revert = RevertRequest::new(previous.name.clone()).keep(keep);
        revert.undo = true;
        revert.power = self.power;
        Ok(revert)
    }
}

fn nothing_to_undo() -> Error {
    Error::new(ErrorKind::NotFound, "there is no revert to undo")
        .state("no changes made")
        .advise("a revert keeps the replaced state until the next snapshot is created")
}

/// Names of states that reverts replaced begin so. No user's snapshot may.
const PREVIOUS: &str = "undo:";

/// Returns true for a name that only domsnap gives.
pub(crate) fn is_reserved(name: &SnapshotName) -> bool {
    name.as_str().starts_with(PREVIOUS)
}

/// A name for the state that a revert replaces.
pub(crate) fn previous_name() -> Result<SnapshotName> {
    let number = Uuid::new_v4().simple().to_string();
    SnapshotName::new(format!("{PREVIOUS}{}", &number[..12]))
}

/// A request to hold a snapshot, so that it is not deleted.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct HoldRequest {
    /// The snapshot.
    pub name: SnapshotName,
    /// The holder.
    pub holder: Holder,
    /// The user's reason.
    pub reason: String,
    /// The time at which the hold ends by itself.
    pub until: Option<Timestamp>,
    /// The process with which the hold ends. Only a holder that domsnap itself gives has one.
    pub process: Option<HoldingProcess>,
}

impl HoldRequest {
    /// Holds `name` for `holder` until it is released.
    pub fn new(name: SnapshotName, holder: Holder) -> Self {
        Self { name, holder, reason: String::new(), until: None, process: None }
    }
}

setters!(HoldRequest {
    reason: String,
    until: Option<Timestamp>,
    process: Option<HoldingProcess>,
});

/// A request to end a hold. If it was the last one of a snapshot whose deletion was deferred, the snapshot is
/// deleted.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ReleaseRequest {
    /// The snapshot.
    pub name: SnapshotName,
    /// The holder.
    pub holder: Holder,
    /// True if the hold may be one that domsnap itself gave.
    pub force: bool,
}

impl ReleaseRequest {
    /// Ends the hold of `holder` on `name`.
    pub fn new(name: SnapshotName, holder: Holder) -> Self {
        Self { name, holder, force: false }
    }
}

setters!(ReleaseRequest { force: bool });

/// A request to change what is recorded of a snapshot for people. Its content stays.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AmendRequest {
    /// The snapshot.
    pub name: SnapshotName,
    /// Its new name.
    pub rename: Option<SnapshotName>,
    /// Its new description.
    pub description: Option<String>,
    /// The time from which it may be deleted without a further question; `Some(None)`: never.
    pub expires: Option<Option<Timestamp>>,
}

impl AmendRequest {
    /// Changes nothing of `name` yet.
    pub fn new(name: SnapshotName) -> Self {
        Self { name, rename: None, description: None, expires: None }
    }
}

setters!(AmendRequest {
    rename: Option<SnapshotName>,
    description: Option<String>,
    expires: Option<Option<Timestamp>>,
});

/// The most clones of one request.
const MOST_CLONES: u32 = 10_000;

/// A request to make new domains of a snapshot. All of them are made, or none.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CloneRequest {
    /// The snapshot.
    pub snapshot: SnapshotName,
    /// The names of the new domains.
    pub clones: Vec<DomainName>,
    /// True if the clones share no data with the source.
    pub full: bool,
    /// True to make clones of the disks alone.
    pub disk_only: bool,
    /// True to make clones that continue from the snapshot's memory. A snapshot with memory needs one of the
    /// two.
    pub memory: bool,
    /// True to start the clones, which have memory.
    pub start: bool,
    /// The network of clones that are started.
    pub network: CloneNetwork,
    /// A shell script that the guest of each clone that is started runs once, before its links go up.
    pub hook: Option<Vec<u8>>,
    /// The directory in which each clone gets a directory of its own; absent: that of the source's first disk
    /// that is a file, or the one above if that has the source's name.
    pub directory: Option<Utf8PathBuf>,
}

impl CloneRequest {
    /// Requests clones of these names.
    pub fn new(snapshot: SnapshotName, clones: Vec<DomainName>) -> Self {
        Self {
            snapshot,
            clones,
            full: false,
            disk_only: false,
            memory: false,
            start: false,
            network: CloneNetwork::Off,
            hook: None,
            directory: None,
        }
    }

    /// The names of `count` clones: `NAME-1` to `NAME-count`.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for no clone, for more than 10,000, and for a name that gets too long.
    pub fn numbered(name: &DomainName, count: u32) -> Result<Vec<DomainName>> {
        if !(1..=MOST_CLONES).contains(&count) {
            return Err(Error::new(ErrorKind::Usage, format!("{count} clones cannot be made at once"))
                .advise(format!("make 1 to {MOST_CLONES}")));
        }
        (1..=count).map(|number| DomainName::new(format!("{name}-{number}"))).collect()
    }
}

setters!(CloneRequest {
    full: bool,
    disk_only: bool,
    memory: bool,
    start: bool,
    network: CloneNetwork,
    hook: Option<Vec<u8>>,
    directory: Option<Utf8PathBuf>,
});

/// One request on one domain.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Request {
    /// Create a snapshot.
    Create(CreateRequest),
    /// Revert to a snapshot.
    Revert(RevertRequest),
    /// Delete snapshots.
    Delete(DeleteRequest),
    /// Merge and remove layers that are no longer needed: leftovers of a cancelled or failed merge.
    Tidy,
    /// Bring the state back that the last revert replaced, or give it up.
    Undo(UndoRequest),
    /// Hold a snapshot, so that it is not deleted.
    Hold(HoldRequest),
    /// End a hold.
    Release(ReleaseRequest),
    /// Change what is recorded of a snapshot for people.
    Amend(AmendRequest),
    /// Make new domains of a snapshot.
    Clone(CloneRequest),
}

impl Request {
    /// Returns true if only records are changed: no disk is read or written, and the domain may run or not.
    pub(crate) fn is_of_records(&self) -> bool {
        match self {
            Self::Hold(_) | Self::Release(_) | Self::Amend(_) => true,
            Self::Create(_)
            | Self::Revert(_)
            | Self::Delete(_)
            | Self::Tidy
            | Self::Undo(_)
            | Self::Clone(_) => false,
        }
    }

    /// The request as it is carried out on a domain: an undo is a revert to the state that is kept. `runs`:
    /// the domain runs.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where nothing was kept.
    pub(crate) fn resolved(self, domain: &Domain, tree: &SnapshotTree, runs: bool) -> Result<Self> {
        match self {
            Self::Undo(undo) if !undo.forget => {
                let revert = undo.as_revert(tree, runs);
                revert.map(Self::Revert).map_err(|error| error.context(format!("domain {}", domain.name)))
            }
            request => Ok(request),
        }
    }
}
