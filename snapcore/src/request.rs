//! What a user can ask for.

use std::time::Duration;

use camino::Utf8PathBuf;

use crate::{LayerName, PointKind, PowerAfter, Quiesce, SnapshotName, Target};

/// What to do with one disk in a create.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CreateDisk {
    /// Take it in this way; for an external point, `path` may name the new overlay's file.
    Take(PointKind, Option<LayerName>),
    /// Take it in a way that its backend has a name for ([`crate::Capabilities::ways`]).
    Way(String),
    /// Leave it out of the snapshot.
    Skip,
}

/// A snapshot to take.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct CreateRequest {
    /// Its name.
    pub name: SnapshotName,
    /// What the user writes about it.
    pub description: String,
    /// How disks are taken that are not named in `disks`; absent: the way that the backend prefers.
    pub kind: Option<PointKind>,
    /// Disk by disk.
    pub disks: Vec<(Target, CreateDisk)>,
    /// Whether memory is taken too; absent: where the domain runs or is paused.
    pub memory: Option<bool>,
    /// Whether the guest runs while its memory is written; absent: where its hypervisor can.
    pub live: Option<bool>,
    /// How long the writing of memory may go on before the guest is paused, where the hypervisor must write what the guest
    /// dirties again and again; absent: a minute.
    pub budget: Option<Duration>,
    /// How strongly its memory image is compressed, 1 to 19; 0: it is not; absent: as it is said of the domain.
    pub compress: Option<u8>,
    /// Whether the guest's file systems are frozen for the instant. They need not be where memory is taken.
    pub quiesce: Quiesce,
    /// How long they may stay frozen.
    pub quiesce_limit: Duration,
    /// What the domain does afterwards; absent: what it did before.
    pub then: Option<PowerAfter>,
}

/// How long pre-copy may go on, where nothing else is said.
pub(crate) const BUDGET: Duration = Duration::from_secs(60);

/// How long a guest may stay frozen, where nothing else is said.
const QUIESCE_LIMIT: Duration = Duration::from_secs(10);

impl CreateRequest {
    /// A snapshot called `name` of all disks, each in its backend's preferred way.
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

    /// Takes memory, or disks only.
    #[must_use]
    pub fn memory(mut self, taken: bool) -> Self {
        self.memory = Some(taken);
        self
    }

    /// Lets the guest run while its memory is written, or not.
    #[must_use]
    pub fn live(mut self, live: bool) -> Self {
        self.live = Some(live);
        self
    }

    /// How long pre-copy may go on before the guest is paused.
    #[must_use]
    pub fn budget(mut self, budget: Duration) -> Self {
        self.budget = Some(budget);
        self
    }

    /// Compresses the memory image, at a level of 1 to 19; 0: not.
    #[must_use]
    pub fn compress(mut self, level: u8) -> Self {
        self.compress = Some(level);
        self
    }

    /// Freezes the guest's file systems for the instant, for `limit` at most.
    #[must_use]
    pub fn quiesce(mut self, quiesce: Quiesce, limit: Duration) -> Self {
        self.quiesce = quiesce;
        self.quiesce_limit = limit;
        self
    }

    /// What the domain does afterwards.
    #[must_use]
    pub fn then(mut self, power: PowerAfter) -> Self {
        self.then = Some(power);
        self
    }

    /// Takes all disks in this way that are not said otherwise.
    #[must_use]
    pub fn kind(mut self, kind: PointKind) -> Self {
        self.kind = Some(kind);
        self
    }

    /// Says what to do with one disk.
    #[must_use]
    pub fn disk(mut self, target: Target, how: CreateDisk) -> Self {
        self.disks.push((target, how));
        self
    }

    /// Returns true if the user leaves the disk `target` out.
    pub(crate) fn skips(&self, target: &Target) -> bool {
        self.disks.iter().any(|(named, how)| named == target && *how == CreateDisk::Skip)
    }

    /// Describes it.
    #[must_use]
    pub fn description(mut self, text: impl Into<String>) -> Self {
        self.description = text.into();
        self
    }
}

/// A snapshot to return to.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RevertRequest {
    /// Which.
    pub name: SnapshotName,
    /// Where given, the present is kept as a snapshot of this name first.
    pub save_current: Option<SnapshotName>,
    /// What the domain does afterwards; absent: with memory what it did at the snapshot, without what it does now.
    pub power: Option<PowerAfter>,
    /// Whether the present's memory is kept until the revert is certain, by a hypervisor that must end the domain for it.
    pub safety: bool,
    /// The file that the domain is made from, in the place of its own, where its hypervisor has one.
    pub config: Option<Utf8PathBuf>,
    /// Disks that are left as they are.
    pub skip: Vec<Target>,
}

impl RevertRequest {
    /// Back to `name`; the present is dropped.
    pub fn new(name: SnapshotName) -> Self {
        Self { name, save_current: None, power: None, safety: true, config: None, skip: Vec::new() }
    }

    /// On a running domain, what saves the current state first, and the revert itself.
    ///
    /// The current state is saved by a snapshot of its own, with memory, which leaves the guest paused until the revert: so
    /// nothing that it does in between is lost.
    pub(crate) fn in_two(&self, recreates: bool) -> Option<(CreateRequest, Self)> {
        let name = self.save_current.clone()?;
        let mut save = CreateRequest::new(name)
            .description(format!("the state before a revert to {}", self.name))
            .then(PowerAfter::Paused);
        save.disks.extend(self.skip.iter().map(|target| (target.clone(), CreateDisk::Skip)));
        // What is saved first is all the safety that there can be.
        let safety = self.safety && !recreates;
        Some((save, Self { save_current: None, safety, ..self.clone() }))
    }

    /// Does without what would bring the former guest back.
    #[must_use]
    pub fn without_safety(mut self) -> Self {
        self.safety = false;
        self
    }

    /// Makes the domain from this file.
    #[must_use]
    pub fn config(mut self, file: impl Into<Utf8PathBuf>) -> Self {
        self.config = Some(file.into());
        self
    }

    /// Leaves a disk as it is: one that is gone, for example. Memory is not restored over such a disk.
    #[must_use]
    pub fn skip(mut self, target: Target) -> Self {
        self.skip.push(target);
        self
    }

    /// What the domain does afterwards.
    #[must_use]
    pub fn power(mut self, power: PowerAfter) -> Self {
        self.power = Some(power);
        self
    }

    /// Keeps the present as a snapshot first.
    #[must_use]
    pub fn save_current(mut self, name: SnapshotName) -> Self {
        self.save_current = Some(name);
        self
    }
}

/// How much of the tree a delete takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeleteScope {
    /// The named snapshots alone; their children become their parents' children.
    #[default]
    Only,
    /// The named ones and all that derive from them.
    WithChildren,
    /// All that derive from the named ones, which stay.
    ChildrenOnly,
}

/// Snapshots to delete.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DeleteRequest {
    /// Which.
    pub names: Vec<SnapshotName>,
    /// How far.
    pub scope: DeleteScope,
    /// What merges on a running domain may move, in bytes a second; 0: as fast as they can.
    pub limit: u64,
    /// Whether points that are damaged are forgotten, where a backend can: their space stays in use.
    pub force: bool,
}

impl DeleteRequest {
    /// Deletes `names`, alone.
    pub fn new(names: Vec<SnapshotName>) -> Self {
        Self { names, scope: DeleteScope::Only, limit: 0, force: false }
    }

    /// Limits merges on a running domain, in bytes a second.
    #[must_use]
    pub fn limit(mut self, bytes_per_second: u64) -> Self {
        self.limit = bytes_per_second;
        self
    }

    /// Forgets points that are damaged.
    #[must_use]
    pub fn force(mut self, force: bool) -> Self {
        self.force = force;
        self
    }

    /// Says how far.
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
    /// Take a snapshot.
    Create(CreateRequest),
    /// Return to one.
    Revert(RevertRequest),
    /// Delete some.
    Delete(DeleteRequest),
    /// Merge and remove layers that nothing needs any more: what a cancelled or failed merge left.
    Tidy,
}
