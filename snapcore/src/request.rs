//! What a user can ask for.

use crate::{LayerName, PointKind, SnapshotName, Target};

/// What to do with one disk in a create.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CreateDisk {
    /// Take it in this way; for an external point, `path` may name the new overlay's file.
    Take(PointKind, Option<LayerName>),
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
}

impl CreateRequest {
    /// A snapshot called `name` of all disks, each in its backend's preferred way.
    pub fn new(name: SnapshotName) -> Self {
        Self { name, description: String::new(), kind: None, disks: Vec::new() }
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
}

impl RevertRequest {
    /// Back to `name`; the present is dropped.
    pub fn new(name: SnapshotName) -> Self {
        Self { name, save_current: None }
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
}

impl DeleteRequest {
    /// Deletes `names`, alone.
    pub fn new(names: Vec<SnapshotName>) -> Self {
        Self { names, scope: DeleteScope::Only }
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
