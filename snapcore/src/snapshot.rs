//! Snapshots and the tree they form.

use std::collections::{HashMap, HashSet};

use camino::Utf8PathBuf;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::{DiskRecord, DiskState, Error, ErrorKind, LayerName, Result, SnapshotName, TagIdentity, Target};

/// The identity of a snapshot: survives renames, and is unique over all domains. Sorts by time of making.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct SnapshotId(#[schemars(with = "String")] pub Uuid);

impl SnapshotId {
    /// A new one.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }
}

impl std::fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// In which state the disks are at the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Consistency {
    /// As after a power failure.
    Crash,
    /// The guest's file systems were flushed and frozen.
    Filesystem,
    /// The domain was shut down. As clean as its shutdown was.
    Clean,
    /// Memory and disks are of one instant.
    Memory,
    /// Nobody recorded it: an imported point.
    Unknown,
}

/// Where a point lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PointKind {
    /// Inside an image, in its snapshot table.
    Internal,
    /// A frozen layer.
    External,
}

/// One state of one disk that can be returned to.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
pub struct Point {
    /// The layer that holds it.
    pub layer: LayerName,
    /// The name in the layer's own snapshot table; absent: the layer itself, frozen.
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

    /// Where it lives.
    pub fn kind(&self) -> PointKind {
        match self.tag {
            Some(_) => PointKind::Internal,
            None => PointKind::External,
        }
    }
}

/// A point of one disk as a member of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DiskPoint {
    /// Which disk.
    pub target: Target,
    /// Where its state is.
    #[serde(flatten)]
    pub point: Point,
    /// The disk's size at the point, in bytes.
    pub virtual_size: u64,
    /// Of an internal snapshot: what it was when it was taken. Absent in records of an older domsnap, and where the backend
    /// cannot say; then it is known by its name alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<TagIdentity>,
}

impl DiskPoint {
    /// A point of a disk, without an identity.
    pub fn new(target: Target, point: Point, virtual_size: u64) -> Self {
        Self { target, point, virtual_size, identity: None }
    }

    /// Says why what the disk has in the point's place is not what was recorded, if so: another program deleted the
    /// internal snapshot, and made one of the same name.
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
            layer.file
        ))
    }
}

/// Memory and devices as a member of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct MemoryPoint {
    /// The memory image, absolute.
    #[schemars(with = "String")]
    pub file: Utf8PathBuf,
    /// Its size, in bytes.
    pub bytes: u64,
    /// Of one that is compressed: its size when it is unpacked, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub full: Option<u64>,
    /// Whether the guest ran at the instant; it was paused otherwise.
    pub running: bool,
}

/// A disk that the domain had at the instant, and of which the snapshot holds nothing, because the user said so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct SkippedDisk {
    /// Which disk.
    pub target: Target,
    /// Its image, as it was named at the instant.
    pub image: String,
}

/// A snapshot of a domain: the points of its disks at one instant.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Snapshot {
    /// Its identity.
    pub id: SnapshotId,
    /// Its name, unique in the domain.
    pub name: SnapshotName,
    /// The snapshot that was current when it was taken.
    pub parent: Option<SnapshotId>,
    /// When its instant was.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// What the user wrote about it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// How consistent its disks are.
    pub consistency: Consistency,
    /// One point a disk; a disk that was skipped has none.
    pub disks: Vec<DiskPoint>,
    /// Memory of the same instant, where it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryPoint>,
    /// The machine that it was taken on ([`crate::Domain::machine`]); absent where the domain did not run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// Disks of the domain that were left out, as the user asked. Empty in snapshots of an older domsnap, which did not
    /// record them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub skipped: Vec<SkippedDisk>,
}

impl Snapshot {
    /// Says why the snapshot holds nothing of the disk `target`.
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

/// Snapshots of one disk that were found in its images, made by another tool. An image may have very many.
#[derive(Debug, Default)]
pub struct Found {
    snapshots: Vec<Snapshot>,
    names: FreeNames,
}

impl Found {
    /// Adds one, the child of the one added before it: oldest first. `wanted` is what it is called there.
    pub fn add(
        &mut self,
        record: &DiskRecord,
        wanted: &str,
        created: Timestamp,
        point: Point,
        virtual_size: u64,
    ) {
        let parent = self.snapshots.last();
        // A tree lists snapshots by time; clocks of images may disagree with the order of the chain, which is certain.
        let created = parent.map_or(created, |parent| created.max(parent.created));
        let parent = parent.map(|parent| parent.id);
        let snapshot = Snapshot {
            id: SnapshotId::fresh(),
            name: self.names.take(wanted),
            parent,
            created,
            description: String::new(),
            consistency: Consistency::Unknown,
            disks: vec![DiskPoint::new(record.disk.target.clone(), point, virtual_size)],
            memory: None,
            machine: None,
            skipped: Vec::new(),
        };
        self.snapshots.push(snapshot);
    }

    /// Says what tells the internal snapshot that was added last from others of its name.
    pub fn identify_last(&mut self, identity: Option<TagIdentity>) {
        if let Some(member) = self.snapshots.last_mut().and_then(|snapshot| snapshot.disks.first_mut()) {
            member.identity = identity;
        }
    }

    /// All of them, in the order in which they were added.
    pub fn into_snapshots(self) -> Vec<Snapshot> {
        self.snapshots
    }
}

/// Names for snapshots that were found, each given once.
#[derive(Debug, Default)]
pub struct FreeNames {
    taken: HashSet<SnapshotName>,
    /// The last number that was tried behind a name: thousands of one name do not each try all again.
    tried: HashMap<String, u64>,
}

impl FreeNames {
    /// A name as near to `wanted` as the rules allow, which was not given before.
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

/// All snapshots of a domain, with questions about their relations.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotTree {
    snapshots: Vec<Snapshot>,
    /// Where each is in them.
    places: HashMap<SnapshotId, usize>,
}

impl SnapshotTree {
    /// A tree of `snapshots`, which it keeps in the order of their making.
    pub fn new(mut snapshots: Vec<Snapshot>) -> Self {
        snapshots.sort_by_key(|snapshot| (snapshot.created, snapshot.id));
        let places = snapshots.iter().enumerate().map(|(place, snapshot)| (snapshot.id, place)).collect();
        Self { snapshots, places }
    }

    /// All, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = &Snapshot> {
        self.snapshots.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.snapshots.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.snapshots.is_empty()
    }

    /// The one with this identity.
    pub fn get(&self, id: SnapshotId) -> Option<&Snapshot> {
        self.places.get(&id).and_then(|place| self.snapshots.get(*place))
    }

    /// The one of this name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], with the nearest names there are.
    pub fn named(&self, name: &SnapshotName) -> Result<&Snapshot> {
        self.snapshots.iter().find(|snapshot| snapshot.name == *name).ok_or_else(|| {
            let known: Vec<&str> = self.snapshots.iter().rev().take(8).map(|s| s.name.as_str()).collect();
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

    /// All that derive from `ancestor`, without itself, oldest first.
    pub fn descendants(&self, ancestor: SnapshotId) -> Vec<&Snapshot> {
        let mut found = HashSet::from([ancestor]);
        // Parents are older than their children, so one pass in the order of making finds all; a second guards
        // against clocks that went backwards.
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
