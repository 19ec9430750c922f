//! What the service answers: shapes that are shown to people and, as JSON, to programs.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    DeleteCost, DiskRecord, DiskState, Domain, DomainName, GuestChange, Layer, LayerName, OperationId,
    OperationState, Point, PointKind, Snapshot, SnapshotName, SnapshotTree, StartedDomain, Target,
};

/// What came of a changing request.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Outcome {
    /// The journal's identity of the operation; absent where there was nothing to do.
    pub operation_id: Option<OperationId>,
    /// What was done: "create", "revert", "delete", "tidy".
    pub operation: String,
    /// On which domain.
    pub domain: DomainName,
    /// The snapshots that the request named.
    pub snapshots: Vec<SnapshotName>,
    /// Bytes of data that the finished steps were to move.
    pub bytes_moved: u64,
    /// Merges that were put off, disk by disk: the layers stay as unnamed ones.
    pub postponed: Vec<Postponed>,
    /// What the user should know: the plan's notes, and warnings from the run.
    pub notes: Vec<String>,
    /// Unfinished operations of the domain that were recovered first.
    pub recovered: Vec<RecoveryReport>,
    /// How long the guest stood still, in microseconds; absent where it did not run, or does not go on.
    #[serde(default)]
    pub downtime_us: Option<u64>,
    /// Of a create on a running domain: the way that its instant was taken, in words (`background snapshot`).
    #[serde(default)]
    pub way: Option<String>,
    /// The command that starts the domain from the snapshot's memory, where the user must.
    #[serde(default)]
    pub start: Vec<String>,
    /// What was done to the guest, beyond pausing it.
    #[serde(default)]
    pub guest: Option<GuestChange>,
    /// What runs the domain now, where that was started.
    #[serde(default)]
    pub started: Option<StartedDomain>,
}

/// Merging of one disk that was put off.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Postponed {
    /// Which disk.
    pub target: Target,
    /// The first step that was put off, for people.
    pub step: String,
    /// How many steps were put off.
    pub steps: u64,
    /// Bytes that these steps would have moved.
    pub bytes: u64,
    /// Why.
    pub reason: String,
}

/// How an unfinished operation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RecoveryEnd {
    /// It did not happen: all was undone.
    Undone,
    /// It happened: the rest was done.
    Done,
    /// It was closed as it was, at the user's word.
    Abandoned,
}

/// What recovery did with one unfinished operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// Of which domain.
    pub domain: DomainName,
    /// The journal's identity of the operation.
    pub operation_id: OperationId,
    /// What it was: "create", "revert", "delete", "tidy".
    pub operation: String,
    /// The snapshots that it was about.
    pub snapshots: Vec<SnapshotName>,
    /// In which state it was found. A "tidy" that does merges which had been put off is found as planned.
    pub found: OperationState,
    /// How it ended.
    pub end: RecoveryEnd,
    /// Merges that are still put off.
    pub postponed: Vec<Postponed>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// An operation that stopped half way.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Unfinished {
    /// The journal's identity.
    pub id: OperationId,
    /// What it is.
    pub operation: String,
    /// The snapshots that it is about.
    pub snapshots: Vec<SnapshotName>,
    /// In which state it is.
    pub state: OperationState,
    /// When it was begun.
    #[schemars(with = "String")]
    pub started: Timestamp,
}

/// A domain and its snapshots.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Listing {
    /// The domain.
    pub domain: Domain,
    /// Whether the catalogue has it. Where not, this is what the images themselves and manifests beside them
    /// tell.
    pub catalogued: bool,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// Operations that stopped half way, or run just now.
    pub unfinished: Vec<Unfinished>,
}

impl Listing {
    /// The snapshots with questions about their relations.
    pub fn tree(&self) -> SnapshotTree {
        SnapshotTree::new(self.snapshots.clone())
    }
}

/// A domain in the list of all.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DomainSummary {
    /// The domain.
    pub domain: Domain,
    /// How many snapshots it has.
    pub snapshots: u64,
    /// Whether an operation stopped half way, or runs just now.
    pub unfinished: bool,
    /// Its disks whose images are not there: removed, or on a file system that is not mounted.
    #[serde(default)]
    pub missing: Vec<Target>,
}

/// One snapshot in full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Details {
    /// Of which domain.
    pub domain: DomainName,
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Whether the present derives from it.
    pub current: bool,
    /// The name of its parent.
    pub parent: Option<SnapshotName>,
    /// The names of its children, oldest first.
    pub children: Vec<SnapshotName>,
    /// What it holds of each disk.
    pub members: Vec<Member>,
    /// The machine that it was taken on, in a line; absent where the domain did not run.
    #[serde(default)]
    pub machine: Option<String>,
    /// What the guest can write and the snapshot does not hold, but in its memory: firmware variables, a TPM.
    #[serde(default)]
    pub outside: Vec<String>,
    /// What the guest can write and no snapshot holds at all: directories shared with the host, ...
    #[serde(default)]
    pub shared: Vec<String>,
}

/// What a snapshot holds of one disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Member {
    /// Which disk.
    pub target: Target,
    /// Where its state is.
    #[serde(flatten)]
    pub point: Point,
    /// Inside an image, or a frozen layer.
    pub kind: PointKind,
    /// The file that holds it.
    #[schemars(with = "String")]
    pub file: Utf8PathBuf,
    /// The disk's size at the point, in bytes.
    pub virtual_size: u64,
    /// Bytes on the disk of the whole file that holds it; absent where the file cannot be read.
    pub allocated: Option<u64>,
    /// What a delete of this snapshot alone would cost and give; absent where the disk cannot be read.
    pub delete: Option<DeleteCost>,
}

/// One disk as it is on the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiskReport {
    /// What the catalogue knows of it.
    pub record: DiskRecord,
    /// What was found; absent where `problem` says why.
    pub state: Option<DiskState>,
    /// Owned layers below the active one whose own state no snapshot needs: what merges were put off or
    /// cannot be done yet.
    pub unnamed: Vec<LayerName>,
    /// Why the disk could not be read.
    pub problem: Option<String>,
}

impl DiskReport {
    /// The unnamed layers with their sizes.
    pub fn unnamed_layers(&self) -> impl Iterator<Item = &Layer> {
        self.state.iter().flat_map(|state| self.unnamed.iter().filter_map(|name| state.layer(name)))
    }
}

/// What an import found and wrote.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct ImportReport {
    /// The domain as the catalogue now knows it.
    pub domain: Domain,
    /// Snapshots that came from manifests.
    pub restored: Vec<SnapshotName>,
    /// Snapshots that the images themselves told.
    pub adopted: Vec<SnapshotName>,
    /// What could not be taken, and why.
    pub notes: Vec<String>,
}

/// What the removal of a domain from the catalogue left.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Removal {
    /// The domain that the catalogue no longer knows.
    pub domain: DomainName,
    /// How many snapshots stay in the images.
    pub snapshots: u64,
    /// Where the manifests are that an import rebuilds them from.
    #[schemars(with = "String")]
    pub manifests: Utf8PathBuf,
}

/// The options of an import.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ImportOptions {
    /// The name that the domain is to have; absent: the one that its manifests tell, or one made of its first
    /// image's.
    pub name: Option<DomainName>,
    /// Replace what the catalogue has of the domain.
    pub replace: bool,
    /// Believe what manifests say of how the domain is reached and started, and of files outside of the
    /// disks' directories: the user has looked at it.
    pub trust: bool,
}

impl ImportOptions {
    /// Confirms what manifests say of how the domain is reached and started.
    #[must_use]
    pub fn trust(mut self) -> Self {
        self.trust = true;
        self
    }

    /// Registers the domain under `name`.
    #[must_use]
    pub fn name(mut self, name: DomainName) -> Self {
        self.name = Some(name);
        self
    }

    /// Replaces what the catalogue has of the domain.
    #[must_use]
    pub fn replace(mut self) -> Self {
        self.replace = true;
        self
    }
}
