//! The requests of a user.

use std::time::Duration;

use camino::Utf8PathBuf;

use crate::hypervisor::{PowerAfter, Quiesce};
use crate::name::{LayerName, SnapshotName, Target};
use crate::snapshot::PointKind;

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

    /// Sets the description.
    #[must_use]
    pub fn description(mut self, text: impl Into<String>) -> Self {
        self.description = text.into();
        self
    }
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
}

impl RevertRequest {
    /// Requests a revert to `name` that discards the current state.
    pub fn new(name: SnapshotName) -> Self {
        Self { name, save_current: None, power: None, safety: true, config: None, skip: Vec::new() }
    }

    /// Splits a revert that saves the current state of a running domain: returns the create that saves it,
    /// and the revert.
    ///
    /// The create saves a snapshot with memory and leaves the guest paused until the revert. So nothing that
    /// the guest does in between is lost.
    pub(crate) fn in_two(&self, recreates: bool) -> Option<(CreateRequest, Self)> {
        let name = self.save_current.clone()?;
        let mut save = CreateRequest::new(name)
            .description(format!("the state before a revert to {}", self.name))
            .then(PowerAfter::Paused);
        save.disks.extend(self.skip.iter().map(|target| (target.clone(), CreateDisk::Skip)));
        // The saved snapshot already provides all the safety that is possible.
        let safety = self.safety && !recreates;
        Some((save, Self { save_current: None, safety, ..self.clone() }))
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
}

impl DeleteRequest {
    /// Requests the deletion of `names` only.
    pub fn new(names: Vec<SnapshotName>) -> Self {
        Self { names, scope: DeleteScope::Only, limit: 0, force: false }
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

    /// Sets the part of the tree to delete.
    #[must_use]
    pub fn scope(mut self, scope: DeleteScope) -> Self {
        self.scope = scope;
        self
    }
}

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
}
