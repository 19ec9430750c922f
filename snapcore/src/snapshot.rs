//! Snapshots, and the tree that they form.

use std::collections::{HashMap, HashSet};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::address::DiskAddress;
use crate::domain::DiskRecord;
use crate::error::{Error, ErrorKind, Result};
use crate::group::SnapshotGroup;
use crate::hold::Hold;
use crate::name::{LayerName, SnapshotName, Target};
use crate::policy::PolicyId;
use crate::state::{DiskState, TagIdentity};

/// The identity of a snapshot. It survives renames, is unique over all domains, and sorts by creation time.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct SnapshotId(#[schemars(with = "String")] pub Uuid);

impl SnapshotId {
    /// Makes a new identity.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }
}

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// State of the disks at the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Consistency {
    /// Like after a power failure.
    Crash,
    /// The guest's file systems were flushed and frozen.
    Filesystem,
    /// The domain was shut down. The disks are as clean as its shutdown was.
    Clean,
    /// Memory and disks are of the same instant.
    Memory,
    /// Unknown: an imported point, for which it was not recorded.
    Unknown,
}

/// Location of a point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PointKind {
    /// Inside an image, in its snapshot table.
    Internal,
    /// A frozen layer.
    External,
}

/// One state of one disk to which it can be reverted.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct Point {
    /// The layer that contains it.
    pub layer: LayerName,
    /// The name in the layer's own snapshot table; absent: the frozen layer itself.
    pub tag: Option<String>,
}

impl Point {
    /// The frozen `layer` itself.
    pub fn external(layer: LayerName) -> Self {
        Self { layer, tag: None }
    }

    /// The internal snapshot `tag` of `layer`.
    pub fn internal(layer: LayerName, tag: impl Into<String>) -> Self {
        Self { layer, tag: Some(tag.into()) }
    }

    /// The location of the point.
    pub fn kind(&self) -> PointKind {
        match self.tag {
            Some(_) => PointKind::Internal,
            None => PointKind::External,
        }
    }
}

/// A point of one disk as a member of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiskPoint {
    /// The disk.
    pub target: Target,
    /// The location of its state.
    #[serde(flatten)]
    pub point: Point,
    /// The disk's size at the point, in bytes.
    pub virtual_size: u64,
    /// Identity of an internal snapshot when it was created. Absent in records of an older domsnap, and if
    /// the backend does not provide one. Then only its name identifies it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<TagIdentity>,
}

setters!(DiskPoint {
    identity: Option<TagIdentity>,
});

impl DiskPoint {
    /// Makes a point of a disk without an identity.
    pub fn new(target: Target, point: Point, virtual_size: u64) -> Self {
        Self { target, point, virtual_size, identity: None }
    }

    /// Returns the reason if the internal snapshot at the point's place is not the recorded one: another
    /// program deleted that one and made another of the same name.
    pub fn replaced(&self, state: &DiskState) -> Option<String> {
        let (tag, recorded) = (self.point.tag.as_ref()?, self.identity.as_ref()?);
        let layer = state.layer(&self.point.layer)?;
        let mut same = layer.internal.iter().filter(|internal| internal.tag == *tag).peekable();
        let found = same.peek()?.identity.clone()?;
        if same.any(|internal| internal.identity.as_ref() == Some(recorded)) {
            return None;
        }
        Some(format!(
            "internal snapshot {tag} in {} is not the one that was taken: another program deleted that ({recorded}) and made \
             one of the same name ({found})",
            layer.address
        ))
    }
}

/// Memory and devices as a member of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct MemoryPoint {
    /// The address of the memory image; a path is absolute.
    #[serde(rename = "file")]
    #[schemars(with = "String")]
    pub image: DiskAddress,
    /// Its size, in bytes.
    pub bytes: u64,
    /// Uncompressed size of a compressed image, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full: Option<u64>,
    /// True if the guest ran at the instant; otherwise it was paused.
    pub running: bool,
}

impl MemoryPoint {
    /// Makes the memory of a snapshot, in an image that is not compressed.
    pub fn new(image: impl Into<DiskAddress>, bytes: u64, running: bool) -> Self {
        Self { image: image.into(), bytes, running, full: None }
    }
}

setters!(MemoryPoint {
    full: Option<u64>,
});

/// A disk of the domain that the user left out of the snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct SkippedDisk {
    /// The disk.
    pub target: Target,
    /// Its image, by the name that it had at the instant.
    pub image: String,
}

impl SkippedDisk {
    /// Makes the record of a disk that is left out.
    pub fn new(target: Target, image: impl Into<String>) -> Self {
        Self { target, image: image.into() }
    }
}

/// Purpose of a snapshot's record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotRole {
    /// A snapshot that a user took.
    #[default]
    Snapshot,
    /// The previous state: the one that the last revert replaced, and that an undo brings back. A domain has
    /// at most one.
    Previous,
    /// An earlier previous state, whose removal is not complete.
    Dropped,
}

impl SnapshotRole {
    /// Its word in records.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Previous => "previous",
            Self::Dropped => "dropped",
        }
    }

    fn is_snapshot(&self) -> bool {
        *self == Self::Snapshot
    }
}

/// A snapshot of a domain: the points of its disks at one instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Snapshot {
    /// Its identity.
    pub id: SnapshotId,
    /// Its name, unique in the domain.
    pub name: SnapshotName,
    /// The snapshot that was current when this one was created.
    pub parent: Option<SnapshotId>,
    /// Time of its instant.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// The user's description.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Consistency of its disks.
    pub consistency: Consistency,
    /// One point for each disk; none for a skipped disk.
    pub disks: Vec<DiskPoint>,
    /// Memory of the same instant, if it was saved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryPoint>,
    /// The machine on which it was created ([`crate::Domain::machine`]); absent if the domain did not
    /// run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// Disks of the domain that the user left out. Empty in snapshots of an older domsnap, which did not
    /// record them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<SkippedDisk>,
    /// Its purpose: a snapshot of the user's, or the state that a revert replaced.
    #[serde(default, skip_serializing_if = "SnapshotRole::is_snapshot")]
    pub role: SnapshotRole,
    /// References that keep it from being deleted. Some may have ended ([`Snapshot::active_holds`]).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub holds: Vec<Hold>,
    /// True if it is deleted when its last hold ends.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub deferred: bool,
    /// The time from which it may be deleted without a further question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub expires: Option<Timestamp>,
    /// The policy that took it; absent: a user did, or another program.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<PolicyId>,
    /// The group of snapshots of other domains that were taken at the same instant.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<SnapshotGroup>,
}

impl Snapshot {
    /// Makes a snapshot of disks alone, with a new identity, no parent, and an unknown consistency.
    pub fn new(name: SnapshotName, created: Timestamp, disks: Vec<DiskPoint>) -> Self {
        Self {
            name,
            created,
            disks,
            id: SnapshotId::fresh(),
            parent: None,
            description: String::new(),
            consistency: Consistency::Unknown,
            memory: None,
            machine: None,
            skipped: Vec::new(),
            role: SnapshotRole::Snapshot,
            holds: Vec::new(),
            deferred: false,
            expires: None,
            policy: None,
            group: None,
        }
    }
}

setters!(Snapshot {
    id: SnapshotId,
    parent: Option<SnapshotId>,
    description: String,
    consistency: Consistency,
    memory: Option<MemoryPoint>,
    machine: Option<String>,
    skipped: Vec<SkippedDisk>,
    role: SnapshotRole,
    holds: Vec<Hold>,
    deferred: bool,
    expires: Option<Timestamp>,
    policy: Option<PolicyId>,
    group: Option<SnapshotGroup>,
});

impl Snapshot {
    /// Explains why the snapshot has no point of the disk `target`.
    pub(crate) fn why_without(&self, target: &Target) -> String {
        match self.skipped.iter().any(|disk| disk.target == *target) {
            true => format!("skipped when snapshot {} was created", self.name),
            false => format!("not part of snapshot {}", self.name),
        }
    }

    /// The point of the disk `target`.
    pub fn point(&self, target: &Target) -> Option<&DiskPoint> {
        self.disks.iter().find(|point| point.target == *target)
    }
}

/// Snapshots by other tools that were found in the images of one disk. An image may have very many.
#[derive(Debug, Default)]
pub struct FoundSnapshots {
    snapshots: Vec<Snapshot>,
    names: FreeNames,
}

impl FoundSnapshots {
    /// Adds one snapshot as the child of the one added before it: oldest first. `wanted` is its name in the
    /// image.
    pub fn add(
        &mut self,
        record: &DiskRecord,
        wanted: &str,
        created: Timestamp,
        point: Point,
        virtual_size: u64,
    ) {
        let parent = self.snapshots.last();
        // A tree lists snapshots by time. The clocks of images may contradict the order of the chain, which
        // is certain.
        let created = parent.map_or(created, |parent| created.max(parent.created));
        let parent = parent.map(|parent| parent.id);
        let disks = vec![DiskPoint::new(record.disk.target.clone(), point, virtual_size)];
        let snapshot = Snapshot::new(self.names.take(wanted), created, disks).parent(parent);
        self.snapshots.push(snapshot);
    }

    /// Sets the identity of the snapshot that was added last, to distinguish it from others of its name.
    pub fn identify_last(&mut self, identity: Option<TagIdentity>) {
        if let Some(member) = self.snapshots.last_mut().and_then(|snapshot| snapshot.disks.first_mut()) {
            member.identity = identity;
        }
    }

    /// All snapshots, in the order in which they were added.
    pub fn into_snapshots(self) -> Vec<Snapshot> {
        self.snapshots
    }
}

/// Names for snapshots that were found, each used once.
#[derive(Debug, Default)]
pub struct FreeNames {
    taken: HashSet<SnapshotName>,
    /// The last number that was tried for a name, so that thousands of one name do not each try all again.
    tried: HashMap<String, u64>,
}

impl FreeNames {
    /// Returns a name as near to `wanted` as the rules allow, and not used before.
    pub fn take(&mut self, wanted: &str) -> SnapshotName {
        let allowed = |c: char| if c.is_ascii_alphanumeric() || "._-+:".contains(c) { c } else { '_' };
        let mut base: String = wanted.chars().map(allowed).take(240).collect();
        if base.is_empty() || base.starts_with(['.', '-']) {
            base.insert(0, '_');
        }
        let number = self.tried.entry(base.clone()).or_default();
        loop {
            *number += 1;
            let name = if *number == 1 { base.clone() } else { format!("{base}-{number}") };
            if let Ok(free) = SnapshotName::new(name)
                && self.taken.insert(free.clone())
            {
                return free;
            }
        }
    }
}

/// All snapshots of a domain, with queries about their relations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotTree {
    snapshots: Vec<Snapshot>,
    /// Index of each snapshot in them.
    places: HashMap<SnapshotId, usize>,
}

impl SnapshotTree {
    /// Makes a tree of `snapshots`, in the order of their creation.
    pub fn new(mut snapshots: Vec<Snapshot>) -> Self {
        snapshots.sort_by_key(|snapshot| (snapshot.created, snapshot.id));
        let places = snapshots.iter().enumerate().map(|(place, snapshot)| (snapshot.id, place)).collect();
        Self { snapshots, places }
    }

    /// All snapshots, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.iter()
    }

    /// The snapshots that users took, oldest first: without the states that reverts replaced.
    pub fn taken(&self) -> impl Iterator<Item = &Snapshot> {
        self.iter().filter(|snapshot| snapshot.role.is_snapshot())
    }

    /// The state that the last revert replaced, where it was kept.
    pub fn previous(&self) -> Option<&Snapshot> {
        // `Edit::apply` keeps at most one. Manifests may have more: the last one counts.
        self.snapshots.iter().filter(|snapshot| snapshot.role == SnapshotRole::Previous).max_by_key(|s| s.id)
    }

    /// Number of snapshots.
    pub fn len(&self) -> usize {
        self.snapshots.len()
    }

    /// Returns true if there are no snapshots.
    pub fn is_empty(&self) -> bool {
        self.snapshots.is_empty()
    }

    /// The snapshot with this identity.
    pub fn get(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.places.get(&id).and_then(|place| self.snapshots.get(*place))
    }

    /// The snapshot of this name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with the names of the newest snapshots.
    pub fn named(&self, name: &SnapshotName) -> Result<&Snapshot> {
        self.taken().find(|snapshot| snapshot.name == *name).ok_or_else(|| {
            let mut known: Vec<&str> = self.taken().map(|s| s.name.as_str()).collect();
            known.reverse();
            known.truncate(8);
            let error = Error::new(ErrorKind::NotFound, format!("there is no snapshot {name}"));
            match known.is_empty() {
                true => error.advise("the domain has no snapshots"),
                false => error.advise(format!("the newest are: {}", known.join(", "))),
            }
        })
    }

    /// The direct children of `parent` (`None`: the roots), oldest first.
    pub fn children(&self, parent: Option<SnapshotId>) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.iter().filter(move |snapshot| snapshot.parent == parent)
    }

    /// All descendants of `ancestor`, without itself, oldest first.
    pub fn descendants(&self, ancestor: SnapshotId) -> Vec<&Snapshot> {
        let mut found = HashSet::from([ancestor]);
        // Parents are older than their children, so one pass in the order of creation finds all. The loop
        // repeats it in case clocks went backwards.
        loop {
            let before = found.len();
            for snapshot in &self.snapshots {
                if snapshot.parent.is_some_and(|parent| found.contains(&parent)) {
                    found.insert(snapshot.id);
                }
            }
            if found.len() == before {
                break;
            }
        }
        self.snapshots.iter().filter(|s| s.id != ancestor && found.contains(&s.id)).collect()
    }

    /// Every point of the disk `target` in all snapshots.
    pub fn points<'a>(&'a self, target: &'a Target) -> impl Iterator<Item = &'a Point> {
        self.snapshots.iter().filter_map(move |snapshot| snapshot.point(target)).map(|member| &member.point)
    }
}
