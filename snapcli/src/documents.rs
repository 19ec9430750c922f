//! The output of `--json`: one document for each command, with the version of these shapes.
//!
//! A field is never renamed, dropped or given another meaning within a version; new ones may come.
//! `docs/schema.json` is made from these types.

use std::collections::HashMap;

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use snapcore::backend::{Capabilities, Certainty, DeleteCost, Finding};
use snapcore::hypervisor::{Control, GuestChange, HypervisorProfile, SeenDisk};
use snapcore::policy::{Policy, PolicyId, PolicySpec, ReviewedSnapshot};
use snapcore::service::{DiskReport, DomainSummary, Listing, Outcome, PastOperation};
use snapcore::service::{PreviousState, RecoveryReport, Removal, SnapshotSize, Unfinished};
use snapcore::{
    Consistency, DiskAddress, Domain, DomainName, ErrorKind, GroupId, Hold, Holder, Hypervisor, MemoryPoint,
    Plan, PointKind, Registry, SkippedDisk, Snapshot, SnapshotGroup, SnapshotId, SnapshotName, Target,
};

/// The version of all documents.
pub const SCHEMA: u32 = 1;

/// A document with its version in front.
#[derive(Debug, Serialize, JsonSchema)]
pub struct Versioned<T> {
    /// The version of this document's shape: 1.
    pub schema: u32,
    /// The document.
    #[serde(flatten)]
    pub document: T,
}

/// One state of one disk.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct PointDoc {
    /// The disk's target.
    pub target: Target,
    /// Inside an image, or a frozen layer.
    pub kind: PointKind,
    /// The file that holds it, absolute.
    #[schemars(with = "String")]
    pub layer: DiskAddress,
    /// The internal snapshot's name in that image; null: the layer itself.
    pub tag: Option<String>,
    /// The disk's size at the point, in bytes.
    pub virtual_size: u64,
    /// Bytes on the disk of the layer, where the point is external; null where they are shared or cannot be
    /// read.
    pub allocated: Option<u64>,
}

/// One snapshot of a domain.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct SnapshotDoc {
    /// Its name, unique in its domain.
    pub name: SnapshotName,
    /// Its identity, unique everywhere.
    pub id: SnapshotId,
    /// The name of the snapshot that it derives from.
    pub parent: Option<SnapshotName>,
    /// True if the current state derives from it.
    pub current: bool,
    /// When its instant was.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// The user's description.
    pub description: String,
    /// Consistency of its disks.
    pub consistency: Consistency,
    /// One a disk; a disk that was left out has none.
    pub points: Vec<PointDoc>,
    /// Its memory image; null where it has none.
    pub memory: Option<MemoryPoint>,
    /// Disks that the domain had, and that were left out as the user asked; of older snapshots nothing is
    /// known.
    pub skipped: Vec<SkippedDisk>,
    /// Holds that keep it from being deleted now.
    pub holds: Vec<Hold>,
    /// True if it is deleted when its last hold ends.
    pub deferred: bool,
    /// The time from which it may be deleted without a further question; null: never.
    #[schemars(with = "Option<String>")]
    pub expires: Option<Timestamp>,
    /// The policy that took it; null: a user did, or another program.
    pub policy: Option<PolicyId>,
    /// The group of snapshots of other domains that were taken at the same instant; null: there is none.
    pub group: Option<SnapshotGroup>,
}

impl SnapshotDoc {
    /// `snapshot` of the domain of `listing`.
    pub fn of(snapshot: &Snapshot, listing: &Listing, registry: &Registry) -> Self {
        Self::child_of(
            |id| listing.snapshots.iter().find(|other| other.id == id),
            snapshot,
            listing,
            registry,
        )
    }

    /// All of `listing`.
    fn all(listing: &Listing, registry: &Registry) -> Vec<Self> {
        // An image may have tens of thousands.
        let by_id: HashMap<SnapshotId, &Snapshot> =
            listing.snapshots.iter().map(|snapshot| (snapshot.id, snapshot)).collect();
        let find = |id| by_id.get(&id).copied();
        listing.snapshots.iter().map(|snapshot| Self::child_of(find, snapshot, listing, registry)).collect()
    }

    fn child_of<'a>(
        find: impl Fn(SnapshotId) -> Option<&'a Snapshot>,
        snapshot: &Snapshot,
        listing: &Listing,
        registry: &Registry,
    ) -> Self {
        let parent = snapshot.parent.and_then(find);
        Self {
            name: snapshot.name.clone(),
            id: snapshot.id,
            parent: parent.map(|parent| parent.name.clone()),
            current: listing.domain.current == Some(snapshot.id),
            created: snapshot.created,
            description: snapshot.description.clone(),
            consistency: snapshot.consistency,
            points: points(snapshot, &listing.domain, registry),
            memory: snapshot.memory.clone(),
            skipped: snapshot.skipped.clone(),
            holds: snapshot.active_holds(Timestamp::now()).cloned().collect(),
            deferred: snapshot.deferred,
            expires: snapshot.expires,
            policy: snapshot.policy,
            group: snapshot.group.clone(),
        }
    }

    /// Kind of its members, in a word.
    pub fn kind(&self) -> &'static str {
        let has = |kind| self.points.iter().any(|point| point.kind == kind);
        match (has(PointKind::Internal), has(PointKind::External)) {
            (true, true) => "mixed",
            (true, false) => "int",
            (false, true) => "ext",
            (false, false) => "none",
        }
    }

    /// Bytes on the disk of its frozen layers and its memory; `None` where it has none or one cannot be read.
    pub fn size(&self) -> Option<u64> {
        let external = self.points.iter().filter(|point| point.kind == PointKind::External);
        let files = external.map(|point| point.allocated);
        let mut all = files.chain(self.memory.iter().map(|memory| Some(memory.bytes))).peekable();
        all.peek()?;
        all.sum()
    }
}

fn points(snapshot: &Snapshot, domain: &Domain, registry: &Registry) -> Vec<PointDoc> {
    let member = |member: &snapcore::DiskPoint| {
        let kind = member.point.kind();
        let layer = domain.disk(&member.target).and_then(|record| {
            Some(registry.serving(&record.disk).ok()?.layer_address(record, &member.point.layer))
        });
        // A disk that left the domain, or whose backend is not here: the layer's own name is all that is
        // known.
        let layer = layer.unwrap_or_else(|| DiskAddress::from(member.point.layer.as_str()));
        let allocated = match kind {
            PointKind::Internal => None,
            PointKind::External => layer.local().and_then(allocated),
        };
        PointDoc {
            target: member.target.clone(),
            kind,
            layer,
            tag: member.point.tag.clone(),
            virtual_size: member.virtual_size,
            allocated,
        }
    };
    snapshot.disks.iter().map(member).collect()
}

fn allocated(file: &Utf8Path) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    // st_blocks counts units of 512 bytes, whatever the file system's blocks are.
    Some(std::fs::metadata(file).ok()?.blocks().saturating_mul(512))
}

/// The state that the last revert replaced.
#[derive(Debug, Clone, PartialEq, Serialize, JsonSchema)]
pub struct PreviousDoc {
    /// Its identity.
    pub id: SnapshotId,
    /// When it was replaced.
    #[schemars(with = "String")]
    pub replaced: Timestamp,
    /// The name of the snapshot that it derives from.
    pub parent: Option<SnapshotName>,
    /// One a disk that the revert changed.
    pub points: Vec<PointDoc>,
    /// Its memory image; null where it has none.
    pub memory: Option<MemoryPoint>,
    /// Bytes on the disk that are freed when it is given up; null where that is not known.
    pub frees: Option<u64>,
    /// Meaning of that number.
    pub certainty: Certainty,
}

impl PreviousDoc {
    fn of(previous: &PreviousState, listing: &Listing, registry: &Registry) -> Self {
        let SnapshotDoc { id, created, parent, points, memory, .. } =
            SnapshotDoc::of(&previous.snapshot, listing, registry);
        let PreviousState { frees, certainty, .. } = *previous;
        Self { id, replaced: created, parent, points, memory, frees, certainty }
    }
}

/// `history`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct HistoryDoc {
    /// The domain.
    pub domain: String,
    /// The last operations, oldest first.
    pub operations: Vec<PastOperation>,
}

/// `list DOMAIN`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ListDoc {
    /// The domain.
    pub domain: DomainName,
    /// True if the catalogue has it; otherwise this was read from images and manifests.
    pub catalogued: bool,
    /// The snapshot that the current state derives from.
    pub current: Option<SnapshotName>,
    /// All snapshots, oldest first.
    pub snapshots: Vec<SnapshotDoc>,
    /// The state that the last revert replaced; null where none is kept.
    pub previous: Option<PreviousDoc>,
    /// Operations that were interrupted, or that run now.
    pub unfinished: Vec<Unfinished>,
    /// Each disk as it is on the machine; only with `--disks`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskReport>>,
}

impl ListDoc {
    /// Builds the document from `listing`.
    pub fn of(listing: &Listing, registry: &Registry) -> Self {
        let snapshots = SnapshotDoc::all(listing, registry);
        Self {
            domain: listing.domain.name.clone(),
            catalogued: listing.catalogued,
            current: snapshots.iter().find(|snapshot| snapshot.current).map(|current| current.name.clone()),
            snapshots,
            previous: listing.previous.as_ref().map(|previous| PreviousDoc::of(previous, listing, registry)),
            unfinished: listing.unfinished.clone(),
            disks: None,
        }
    }
}

/// `list` of all domains.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ListAllDoc {
    /// One a domain, as `list DOMAIN` prints it.
    pub domains: Vec<ListDoc>,
}

/// `show`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ShowDoc {
    /// The domain.
    pub domain: DomainName,
    /// The snapshot.
    pub snapshot: SnapshotDoc,
    /// The names of the snapshots that derive from it directly, oldest first.
    pub children: Vec<SnapshotName>,
    /// Bytes that a delete of it alone would free and move, disk by disk; null if the disk cannot be read.
    pub delete: Vec<DeleteDoc>,
    /// The machine that it was taken on, in a line; null where the domain did not run.
    pub machine: Option<String>,
    /// Set if its memory image does not exist any more; shown as text only.
    #[serde(skip)]
    pub memory_gone: bool,
    /// State that the guest can write and that is only in the snapshot's memory: firmware variables, a TPM,
    /// files of the host's that are memory to it.
    pub outside: Vec<String>,
    /// State that the guest can write and that is in no snapshot: directories shared with the host, host
    /// devices.
    pub shared: Vec<String>,
    /// The space that it takes; `du` has the same.
    pub size: SnapshotSize,
}

/// Effect of a delete on one disk.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DeleteDoc {
    /// The disk's target.
    pub target: Target,
    /// Its cost, in bytes.
    pub cost: Option<DeleteCost>,
}

/// `create`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CreateDoc {
    /// The domain.
    pub domain: DomainName,
    /// The new snapshot.
    pub snapshot: SnapshotDoc,
    /// The outcome.
    pub outcome: Outcome,
    /// The domain's power state now; null if it did not run.
    pub power: Option<Power>,
}

/// `create`, `revert` and `delete` with `--group`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct GroupDoc {
    /// The group of the snapshots.
    pub group: GroupId,
    /// One a domain, in the order of their names.
    pub domains: Vec<GroupDomainDoc>,
}

/// One domain of a group.
#[derive(Debug, Serialize, JsonSchema)]
pub struct GroupDomainDoc {
    /// The domain.
    pub domain: DomainName,
    /// The new snapshot; null: none was created.
    pub snapshot: Option<SnapshotDoc>,
    /// The outcome.
    pub outcome: Outcome,
    /// The domain's power state now; null if it did not run, or was not asked.
    pub power: Option<Power>,
}

/// `--group` with `--dry-run`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct GroupPlanDoc {
    /// The plan of each domain, in the order of their names. The first one's decides about all.
    pub domains: Vec<PlanDoc>,
}

/// `delete`, `undo --forget`, `hold`, `release`, `rename`, `describe`, `expire`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChangeDoc {
    /// The domain.
    pub domain: DomainName,
    /// The outcome.
    pub outcome: Outcome,
}

/// `clone`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CloneDoc {
    /// The domain that was cloned.
    pub domain: DomainName,
    /// The snapshot that the clones are made of.
    pub snapshot: SnapshotName,
    /// The new domains.
    pub clones: Vec<Domain>,
    /// The outcome.
    pub outcome: Outcome,
}

/// One export.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ExportedDoc {
    /// The snapshot.
    pub snapshot: SnapshotName,
    /// The snapshot whose export it is an increment to; null: all data.
    pub since: Option<SnapshotName>,
    /// Bytes of its files.
    pub bytes: u64,
    /// The entry in the directory's manifest; null for a dry run.
    pub export: Option<export_directory::Export>,
}

/// `export`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ExportDoc {
    /// The domain.
    pub domain: DomainName,
    /// The directory.
    #[schemars(with = "String")]
    pub directory: Utf8PathBuf,
    /// True if nothing was written.
    pub dry_run: bool,
    /// The exports that were added.
    pub exports: Vec<ExportedDoc>,
    /// Messages for the user.
    pub notes: Vec<String>,
}

/// `revert`, `undo`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RevertDoc {
    /// The domain.
    pub domain: DomainName,
    /// The outcome.
    pub outcome: Outcome,
    /// The domain's power state now; null if no hypervisor runs it, or it is not known.
    pub power: Option<Power>,
}

/// A domain's power state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// Its processors run.
    Running,
    /// The guest is paused.
    Paused,
    /// Nothing runs.
    Off,
}

impl Power {
    /// Its word.
    pub fn word(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Off => "off",
        }
    }
}

/// `--dry-run`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PlanDoc {
    /// The domain.
    pub domain: String,
    /// Bytes of data that all steps move together.
    pub bytes: u64,
    /// Plan of the operation that comes first: the snapshot that saves the current state of a running domain.
    pub first: Option<Plan>,
    /// The steps.
    pub plan: Plan,
    /// Effect on the guest, other than a pause.
    pub guest: Option<GuestChange>,
    /// The domain's power state afterwards, if it is planned.
    pub power: Option<Power>,
}

/// `policy run`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PolicyRunDoc {
    /// The domain.
    pub domain: DomainName,
    /// True if nothing was changed: then `created` and `pruned` are what would be.
    pub dry_run: bool,
    /// The snapshot that was taken; null: none was due.
    pub created: Option<SnapshotName>,
    /// The snapshot of this period because of which none was due.
    pub has: Option<SnapshotName>,
    /// The snapshots that were pruned, oldest first.
    pub pruned: Vec<SnapshotName>,
    /// All snapshots of the domain before anything was pruned, oldest first, each with the reasons. Of a dry
    /// run, the one in `created` is counted and not listed.
    pub snapshots: Vec<ReviewedSnapshot>,
    /// True if the state that the last revert replaced was given up.
    pub gave_up_undo: bool,
    /// What the user should look at.
    pub warnings: Vec<String>,
    /// Messages for the user.
    pub notes: Vec<String>,
}

/// `policy install`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PolicyInstallDoc {
    /// The domain.
    pub domain: DomainName,
    /// True if nothing was changed.
    pub dry_run: bool,
    /// The policy that is recorded; of a dry run: if it is recorded already.
    pub policy: Option<Policy>,
    /// What it says.
    pub spec: PolicySpec,
    /// The units of systemd that were written.
    pub units: Vec<UnitDoc>,
    /// True if systemd was asked to run them.
    pub enabled: bool,
    /// The snapshots that are the policy's own.
    pub own: Vec<SnapshotName>,
    /// Snapshots that an earlier policy took, and that this one never prunes.
    pub others: Vec<SnapshotName>,
}

/// A unit of systemd.
#[derive(Debug, Serialize, JsonSchema)]
pub struct UnitDoc {
    /// Its file.
    #[schemars(with = "String")]
    pub path: Utf8PathBuf,
    /// Its text.
    pub text: String,
}

/// `policy remove`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PolicyRemoveDoc {
    /// The domain.
    pub domain: DomainName,
    /// True if nothing was changed.
    pub dry_run: bool,
    /// The policy that was removed; null: there was none.
    pub policy: Option<Policy>,
    /// The units of systemd that were removed.
    #[schemars(with = "Vec<String>")]
    pub units: Vec<Utf8PathBuf>,
    /// The snapshots that it took. They stay.
    pub snapshots: Vec<SnapshotName>,
}

/// `policy show`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct PolicyShowDoc {
    /// The domain.
    pub domain: DomainName,
    /// Its policy.
    pub policy: Policy,
    /// The snapshots that it took, oldest first.
    pub snapshots: Vec<SnapshotName>,
    /// The time of the newest of them.
    #[schemars(with = "Option<String>")]
    pub newest: Option<Timestamp>,
    /// The timer of systemd; null: there is none of ours.
    #[schemars(with = "Option<String>")]
    pub timer: Option<Utf8PathBuf>,
}

/// `domain add`, `import`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DomainDoc {
    /// The domain as the catalogue now knows it.
    pub domain: Domain,
    /// Snapshots that came from manifests.
    pub restored: Vec<SnapshotName>,
    /// Snapshots that were found in the images.
    pub adopted: Vec<SnapshotName>,
    /// What could not be imported, and why.
    pub notes: Vec<String>,
}

/// `domain remove`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RemovalDoc {
    /// The domain that was removed, and what stays.
    pub removed: Removal,
}

/// `domain list`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DomainsDoc {
    /// All domains of the catalogue.
    pub domains: Vec<ListedDomain>,
}

/// A domain in the list of all.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ListedDomain {
    /// The catalogue's record of it.
    #[serde(flatten)]
    pub summary: DomainSummary,
    /// Its power state now; null if no hypervisor runs it, or none answers at once.
    pub power: Option<Power>,
}

/// `domain show`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DomainShowDoc {
    /// The domain.
    pub domain: Domain,
    /// Its disks as they are on the machine.
    pub disks: Vec<DiskReport>,
    /// Operations that were interrupted, or that run now.
    pub unfinished: Vec<Unfinished>,
    /// Its power state now; null if no hypervisor runs it, or if `problem` says why it is not known.
    pub power: Option<Power>,
    /// The machine that runs now, in a line.
    pub machine: Option<String>,
    /// The reason why its power state is not known.
    pub problem: Option<String>,
}

/// `domain scan`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ScanDoc {
    /// The domains that run on this machine and can be reached.
    pub found: Vec<ScannedDoc>,
}

/// A running domain.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ScannedDoc {
    /// Its hypervisor.
    pub hypervisor: Hypervisor,
    /// Its address, as HYPERVISOR:ADDRESS.
    pub control: Control,
    /// Its name in the hypervisor.
    pub name: Option<String>,
    /// True if the guest's processors run; otherwise it is paused.
    pub running: bool,
    /// The machine, in a line.
    pub summary: String,
    /// Its drives, with why one takes no part in snapshots.
    pub disks: Vec<SeenDisk>,
    /// The domain that it is registered as.
    pub registered: Option<DomainName>,
    /// The command that registers it, word by word; none where it is registered, or `problem` says why it
    /// cannot be.
    pub register: Vec<String>,
    /// Why it cannot be registered as it is.
    pub problem: Option<String>,
}

/// `disk create`, `disk revert`, `disk delete`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskDoc {
    /// The operation: "create", "revert", "delete".
    pub operation: String,
    /// The image, absolute.
    #[schemars(with = "String")]
    pub image: Utf8PathBuf,
    /// The snapshots.
    pub names: Vec<String>,
    /// The image.
    pub kind: PointKind,
    /// Those of them that were damaged: they are out of the image's table, and their space is still in use.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forgotten: Vec<String>,
}

/// `disk check`, `disk materialise`, `disk relocate`, `disk resize`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskVhdDoc {
    /// The operation: "check", "materialise", "relocate", "resize".
    pub operation: String,
    /// The image, absolute.
    #[schemars(with = "String")]
    pub image: Utf8PathBuf,
    /// Findings of a check, the worst first.
    pub findings: Vec<Finding>,
    /// The changes that were made, as a message.
    pub done: Vec<String>,
}

/// `disk list`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskListDoc {
    /// The image, absolute.
    #[schemars(with = "String")]
    pub image: Utf8PathBuf,
    /// Its snapshots: first the internal ones in the order of its table, then the external ones, oldest
    /// first.
    pub snapshots: Vec<DiskSnapshotDoc>,
}

/// `disk serve`, printed when the sockets are there.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskServeDoc {
    /// The image, absolute.
    #[schemars(with = "String")]
    pub image: Utf8PathBuf,
    /// Its format.
    pub format: String,
    /// The snapshot that is served; absent: the current state.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// The size of the disk in bytes.
    pub virtual_size: u64,
    /// True if clients cannot write.
    pub read_only: bool,
    /// The socket of the disk.
    #[schemars(with = "String")]
    pub socket: Utf8PathBuf,
    /// The control socket.
    #[schemars(with = "String")]
    pub control: Utf8PathBuf,
}

/// A disk of a snapshot that is served.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ServedDiskDoc {
    /// The disk.
    pub target: Target,
    /// Its size in bytes.
    pub virtual_size: u64,
    /// Its socket.
    #[schemars(with = "String")]
    pub socket: Utf8PathBuf,
    /// The control socket.
    #[schemars(with = "String")]
    pub control: Utf8PathBuf,
}

/// `serve`, printed when the sockets are there.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ServeDoc {
    /// The domain.
    pub domain: DomainName,
    /// The snapshot.
    pub snapshot: SnapshotName,
    /// The holder of the snapshot's hold, which ends with the server.
    pub holder: Holder,
    /// The disks that are served.
    pub disks: Vec<ServedDiskDoc>,
    /// Remarks.
    pub notes: Vec<String>,
}

/// `mount`, printed when all is mounted.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MountDoc {
    /// The domain.
    pub domain: DomainName,
    /// The snapshot.
    pub snapshot: SnapshotName,
    /// The holder of the snapshot's hold, which ends with the command.
    pub holder: Holder,
    /// The file systems that are mounted.
    pub mounts: Vec<MountedDoc>,
    /// Remarks: what is on the disks and not mounted.
    pub notes: Vec<String>,
}

/// A file system that is mounted.
#[derive(Debug, Serialize, JsonSchema)]
pub struct MountedDoc {
    /// The disk.
    pub target: Target,
    /// The number of its partition; absent: the disk has no partitions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub partition: Option<u32>,
    /// The kind of file system, as `mount` names it.
    pub filesystem: String,
    /// Bytes of the disk or partition.
    pub bytes: u64,
    /// Where it is mounted.
    #[schemars(with = "String")]
    pub directory: Utf8PathBuf,
}

/// A snapshot of one image.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskSnapshotDoc {
    /// Its name.
    pub name: String,
    /// The image.
    pub kind: PointKind,
    /// When it was taken.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// The disk's size at the point, in bytes.
    pub virtual_size: u64,
    /// Bytes of VM state in it.
    pub vm_state_size: u64,
    /// The lower layer that it is in, absolute; absent: the image itself, or a snapshot that is a layer.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub layer: Option<Utf8PathBuf>,
}

/// `check`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CheckDoc {
    /// One a domain.
    pub domains: Vec<CheckedDomain>,
}

/// Findings of a check in one domain.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CheckedDomain {
    /// The domain.
    pub domain: String,
    /// The findings; empty if all is well.
    pub findings: Vec<Finding>,
    /// What `--repair` did before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub repaired: Option<String>,
}

/// `recover`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RecoverDoc {
    /// The recovered operations; empty if there was nothing to do.
    pub recovered: Vec<RecoveryReport>,
    /// Other repairs and observations that belong to no operation, such as a guest that was still frozen.
    pub notes: Vec<RecoverNote>,
}

/// Something that `recover` did or noticed beside all operations.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RecoverNote {
    /// The domain.
    pub domain: DomainName,
    /// What.
    pub message: String,
}

/// `backends`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BackendsDoc {
    /// One a format.
    pub backends: Vec<BackendDoc>,
    /// Programs that look like plug-ins and are not used.
    pub problems: Vec<BackendProblem>,
    /// The hypervisors whose domains can be reached.
    pub hypervisors: Vec<HypervisorProfile>,
}

/// A program that looks like a plug-in and is not used, or their directory.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BackendProblem {
    /// Its path.
    #[schemars(with = "String")]
    pub program: Utf8PathBuf,
    /// Why it is not used.
    pub message: String,
}

/// One backend.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BackendDoc {
    /// Its format.
    pub format: String,
    /// Its capabilities.
    pub capabilities: Capabilities,
    /// The program, where it is a plug-in.
    #[schemars(with = "Option<String>")]
    pub plugin: Option<Utf8PathBuf>,
}

/// Any command that failed.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ErrorDoc {
    /// The error.
    pub error: ErrorBody,
}

/// Why a command failed.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ErrorBody {
    /// The kind of failure.
    pub kind: ErrorKind,
    /// The failure: first what was attempted, then the causes.
    pub message: String,
    /// The state now, if it needs explanation.
    pub state: Option<String>,
    /// Advice: what to do next.
    pub advice: Option<String>,
    /// The exit status.
    pub exit: u8,
}

/// The JSON schema of all documents, by command.
pub fn schema() -> serde_json::Value {
    let mut generator = schemars::generate::SchemaSettings::draft2020_12().for_serialize().into_generator();
    let mut documents = serde_json::Map::new();
    macro_rules! document {
        ($($name:literal: $kind:ty),* $(,)?) => {
            $(documents.insert($name.to_owned(), generator.subschema_for::<Versioned<$kind>>().into());)*
        };
    }
    document! {
        "create": CreateDoc, "revert": RevertDoc, "delete": ChangeDoc, "dry-run": PlanDoc,
        "group": GroupDoc, "group-dry-run": GroupPlanDoc,
        "clone": CloneDoc, "diff": snapcore::service::DiffReport, "export": ExportDoc, "serve": ServeDoc, "mount": MountDoc, "undo": RevertDoc, "undo-forget": ChangeDoc, "hold": ChangeDoc, "release": ChangeDoc, "rename": ChangeDoc,
        "describe": ChangeDoc, "expire": ChangeDoc, "history": HistoryDoc, "du": snapcore::service::SizeReport,
        "policy-run": PolicyRunDoc, "policy-install": PolicyInstallDoc, "policy-remove": PolicyRemoveDoc,
        "policy-show": PolicyShowDoc,
        "list": ListDoc, "list-all": ListAllDoc, "show": ShowDoc,
        "domain-add": DomainDoc, "domain-remove": RemovalDoc, "domain-list": DomainsDoc, "domain-show": DomainShowDoc,
        "domain-scan": ScanDoc,
        "disk": DiskDoc, "disk-list": DiskListDoc, "disk-serve": DiskServeDoc,
        "disk-vhd": DiskVhdDoc,
        "check": CheckDoc, "recover": RecoverDoc, "import": DomainDoc, "backends": BackendsDoc,
        "error": ErrorDoc,
    }
    serde_json::json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "What domsnap prints with --json",
        "description": "One document a command, by the command's name. `properties` names the documents; no document has them all.",
        "version": SCHEMA,
        "properties": documents,
        "$defs": generator.take_definitions(true),
    })
}
