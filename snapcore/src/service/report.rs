//! The service's answers: shapes that are shown to people and, as JSON, to programs.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::address::DiskAddress;
use crate::backend::{Certainty, DeleteCost};
use crate::domain::{DiskRecord, Domain};
use crate::group::GroupId;
use crate::hypervisor::{GuestChange, StartedDomain};
use crate::name::{DomainName, LayerName, SnapshotName, Target};
use crate::operation::{OperationId, OperationState};
use crate::policy::Policy;
use crate::service::RecordedSnapshot;
use crate::service::viewer::SnapshotSize;
use crate::shape::subject;
use crate::snapshot::{Point, PointKind, Snapshot, SnapshotTree};
use crate::state::{DiskState, Layer};

/// The outcome of a request that changes a domain.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Outcome {
    /// The journal's identity of the operation; absent where there was nothing to do.
    pub operation_id: Option<OperationId>,
    /// The operation: "create", "revert", "delete", "tidy".
    pub operation: String,
    /// The domain.
    pub domain: DomainName,
    /// The snapshots that the request named.
    pub snapshots: Vec<SnapshotName>,
    /// Bytes of data that the finished steps were to move.
    pub bytes_moved: u64,
    /// Deferred merges, disk by disk: their layers stay as orphan layers.
    pub postponed: Vec<Postponed>,
    /// Messages for the user: the plan's notes, and warnings from the run.
    pub notes: Vec<String>,
    /// Unfinished operations of the domain that were recovered first.
    pub recovered: Vec<RecoveryReport>,
    /// The time for which the guest was paused, in microseconds; absent where it did not run, or does not
    /// continue.
    #[serde(default)]
    pub downtime_us: Option<u64>,
    /// For a create on a running domain: the method of its instant, for people (`background snapshot`).
    #[serde(default)]
    pub method: Option<String>,
    /// The command that starts the domain from the snapshot's memory, where the user must.
    #[serde(default)]
    pub start: Vec<String>,
    /// The change to the guest, beyond pausing it.
    #[serde(default)]
    pub guest: Option<GuestChange>,
    /// The process that runs the domain now, where it was started.
    #[serde(default)]
    pub started: Option<StartedDomain>,
    /// For a revert or an undo: true if the replaced state is kept, so that an undo brings it back.
    #[serde(default)]
    pub kept: bool,
    /// The clones that were started, in the order of their names in the request.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clones: Vec<StartedClone>,
}

/// The outcome of a request that changes several domains as one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct GroupOutcome {
    /// The group of the snapshots.
    pub group: GroupId,
    /// The outcome in each domain, in the order of their names.
    pub outcomes: Vec<Outcome>,
}

/// A clone that was started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct StartedClone {
    /// Its name.
    pub name: DomainName,
    /// The process that runs it.
    pub started: StartedDomain,
}

/// Deferred steps of one disk, or of the domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Postponed {
    /// The disk; absent: the domain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target: Option<Target>,
    /// The first deferred step, for people.
    pub step: String,
    /// The number of deferred steps.
    pub steps: u64,
    /// Bytes that these steps would have moved.
    pub bytes: u64,
    /// The reason.
    pub reason: String,
}

impl Postponed {
    /// The disk, or `domain`, for people.
    pub fn subject(&self) -> &str {
        subject(self.target.as_ref())
    }
}

/// The end of an unfinished operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum RecoveryEnd {
    /// It did not happen: all was undone.
    Undone,
    /// It happened: the rest was done.
    Done,
    /// It was closed as it was, at the user's request.
    Abandoned,
}

/// The result of the recovery of one unfinished operation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct RecoveryReport {
    /// The domain.
    pub domain: DomainName,
    /// The journal's identity of the operation.
    pub operation_id: OperationId,
    /// The operation: "create", "revert", "delete", "tidy".
    pub operation: String,
    /// The snapshots that it concerns.
    pub snapshots: Vec<SnapshotName>,
    /// The state in which it was found. A "tidy" that does deferred merges is found as planned.
    pub found: OperationState,
    /// Its end.
    pub end: RecoveryEnd,
    /// Merges that are still deferred.
    pub postponed: Vec<Postponed>,
    /// Messages for the user.
    pub notes: Vec<String>,
}

/// An operation that was interrupted, or runs just now.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Unfinished {
    /// The journal's identity.
    pub id: OperationId,
    /// The operation.
    pub operation: String,
    /// The snapshots that it concerns.
    pub snapshots: Vec<SnapshotName>,
    /// Its state.
    pub state: OperationState,
    /// The time of its start.
    #[schemars(with = "String")]
    pub started: Timestamp,
}

/// An operation that the journal has, ended or not.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct PastOperation {
    /// The journal's identity.
    pub id: OperationId,
    /// The operation: "create", "revert", "undo", "delete", "forget", "tidy", "hold", "release", "amend".
    pub operation: String,
    /// The snapshots that it concerned, by the names that they had then.
    pub snapshots: Vec<SnapshotName>,
    /// Its state: `done`, `undone`, or the one in which it is.
    pub state: OperationState,
    /// The time of its start.
    #[schemars(with = "String")]
    pub started: Timestamp,
    /// The errors in its course.
    pub errors: Vec<String>,
    /// The group of operations of other domains that it was one with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupId>,
}

/// The state that the last revert replaced.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct PreviousState {
    /// Its record. `created` is the time of the revert.
    pub snapshot: Snapshot,
    /// Bytes on the disk that are freed when it is given up; absent where they are not known.
    pub frees: Option<u64>,
    /// Meaning of that number.
    #[serde(default)]
    pub certainty: Certainty,
}

/// A domain and its snapshots.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Listing {
    /// The domain.
    pub domain: Domain,
    /// Set if the catalogue has it. Otherwise the report comes from the images themselves and manifests
    /// beside them.
    pub catalogued: bool,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Snapshot>,
    /// The state that the last revert replaced, where it is kept.
    #[serde(default)]
    pub previous: Option<PreviousState>,
    /// Operations that were interrupted, or run just now.
    pub unfinished: Vec<Unfinished>,
}

impl Listing {
    /// Returns the snapshots as a tree, for questions about their relations.
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
    /// The number of its snapshots.
    pub snapshots: u64,
    /// Set if an operation was interrupted, or runs just now.
    pub unfinished: bool,
    /// Its disks whose images do not exist: removed, or on a file system that is not mounted.
    #[serde(default)]
    pub missing: Vec<Target>,
}

/// One snapshot in full.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Details {
    /// The domain.
    pub domain: DomainName,
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Set if the current state derives from it.
    pub current: bool,
    /// The name of its parent.
    pub parent: Option<SnapshotName>,
    /// The names of its children, oldest first.
    pub children: Vec<SnapshotName>,
    /// Its content, disk by disk.
    pub members: Vec<Member>,
    /// The machine that it was taken on, in a line; absent where the domain did not run.
    #[serde(default)]
    pub machine: Option<String>,
    /// True if its memory image does not exist any more.
    #[serde(default)]
    pub memory_gone: bool,
    /// State that the guest can write and that only the snapshot's memory contains: firmware variables, a
    /// TPM.
    #[serde(default)]
    pub outside: Vec<String>,
    /// State that the guest can write and that no snapshot contains at all: directories shared with the host,
    /// ...
    #[serde(default)]
    pub shared: Vec<String>,
    /// The space that it takes.
    pub size: SnapshotSize,
}

/// A snapshot's content of one disk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Member {
    /// The disk.
    pub target: Target,
    /// The place of its state.
    #[serde(flatten)]
    pub point: Point,
    /// The kind: inside an image, or a frozen layer.
    pub kind: PointKind,
    /// The image that contains it.
    #[serde(rename = "file")]
    #[schemars(with = "String")]
    pub address: DiskAddress,
    /// The disk's size at the point, in bytes.
    pub virtual_size: u64,
    /// Bytes on the disk of the whole file that contains it; absent where the file cannot be read.
    pub allocated: Option<u64>,
    /// The cost and gain of a delete of this snapshot alone; absent where the disk cannot be read.
    pub delete: Option<DeleteCost>,
}

/// One disk as it is on the machine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiskReport {
    /// Its record in the catalogue.
    pub record: DiskRecord,
    /// Its state; absent where `problem` gives the reason.
    pub state: Option<DiskState>,
    /// Orphan layers: owned layers below the active one whose own state no snapshot needs. Their merges were
    /// deferred, or cannot be done yet.
    pub orphans: Vec<LayerName>,
    /// The reason why the disk could not be read.
    pub problem: Option<String>,
}

impl DiskReport {
    /// Returns the orphan layers with their sizes.
    pub fn orphan_layers(&self) -> impl Iterator<Item = &Layer> {
        self.state.iter().flat_map(|state| self.orphans.iter().filter_map(|name| state.layer(name)))
    }
}

/// The findings and records of an import.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct ImportReport {
    /// The domain as the catalogue now knows it.
    pub domain: Domain,
    /// Snapshots that came from manifests.
    pub restored: Vec<SnapshotName>,
    /// Snapshots that came from the images themselves.
    pub adopted: Vec<SnapshotName>,
    /// Messages: the parts that could not be imported, and why.
    pub notes: Vec<String>,
}

/// The result of a change of a domain's policy.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct PolicyChange {
    /// The domain.
    pub domain: DomainName,
    /// Its policy now.
    pub policy: Option<Policy>,
    /// Its policy before.
    pub before: Option<Policy>,
    /// Snapshots that the policy took: of the policy now, or else of the one before.
    pub own: Vec<SnapshotName>,
    /// Snapshots that an earlier policy took, and that no policy prunes.
    pub others: Vec<SnapshotName>,
}

/// The result of the removal of a domain from the catalogue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Removal {
    /// The domain that the catalogue no longer knows.
    pub domain: DomainName,
    /// The number of snapshots that stay in the images.
    pub snapshots: u64,
    /// The place of the manifests from which an import rebuilds them.
    #[schemars(with = "String")]
    pub manifests: Utf8PathBuf,
}

/// The options of an import.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ImportOptions {
    /// The name for the domain; absent: the one in its manifests, or one made of its first image's.
    pub name: Option<DomainName>,
    /// Set to replace the catalogue's records of the domain.
    pub replace: bool,
    /// Set to accept the claims of manifests about how the domain is reached and started, and about files
    /// outside of the disks' directories. The user has examined them.
    pub trust: bool,
    /// Another program's records of the snapshots in the images.
    pub recorded: Vec<RecordedSnapshot>,
}

impl ImportOptions {
    /// Confirms the claims of manifests about how the domain is reached and started, and about files outside
    /// of the disks' directories.
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

    /// Names and describes the snapshots in the images as another program recorded them.
    #[must_use]
    pub fn recorded(mut self, recorded: Vec<RecordedSnapshot>) -> Self {
        self.recorded = recorded;
        self
    }

    /// Replaces the catalogue's records of the domain.
    #[must_use]
    pub fn replace(mut self) -> Self {
        self.replace = true;
        self
    }
}
