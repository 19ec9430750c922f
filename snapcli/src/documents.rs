//! What `--json` prints: one document a command, each with the version of these shapes.
//!
//! A field is never renamed, dropped or given another meaning within a version; new ones may come. `docs/schema.json`
//! is made from these types.

use std::collections::HashMap;

use camino::Utf8PathBuf;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::Serialize;
use snapcore::service::{DiskReport, DomainSummary, Listing, Outcome, RecoveryReport, Removal, Unfinished};
use snapcore::{
    Capabilities, Consistency, Control, DeleteCost, Domain, DomainName, ErrorKind, Finding, GuestChange,
    Hypervisor, HypervisorProfile, MemoryPoint, Plan, PointKind, Registry, SeenDisk, SkippedDisk, Snapshot,
    SnapshotId, SnapshotName, Target,
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
    /// Which disk.
    pub target: Target,
    /// Inside an image, or a frozen layer.
    pub kind: PointKind,
    /// The file that holds it, absolute.
    #[schemars(with = "String")]
    pub layer: Utf8PathBuf,
    /// The internal snapshot's name in that image; null: the layer itself.
    pub tag: Option<String>,
    /// The disk's size at the point, in bytes.
    pub virtual_size: u64,
    /// Bytes on the disk of the layer, where the point is external; null where they are shared or cannot be read.
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
    /// Whether the present derives from it.
    pub current: bool,
    /// When its instant was.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// What the user wrote about it.
    pub description: String,
    /// How consistent its disks are.
    pub consistency: Consistency,
    /// One a disk; a disk that was left out has none.
    pub points: Vec<PointDoc>,
    /// Its memory image; null where it has none.
    pub memory: Option<MemoryPoint>,
    /// Disks that the domain had, and that were left out as the user asked; of older snapshots nothing is known.
    pub skipped: Vec<SkippedDisk>,
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
        }
    }

    /// How its points are taken, in a word.
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
            Some(registry.get(&record.disk.format).ok()?.layer_file(record, &member.point.layer))
        });
        // A disk that left the domain, or whose backend is not here: the layer's own name is all that is known.
        let layer = layer.unwrap_or_else(|| Utf8PathBuf::from(member.point.layer.as_str()));
        let allocated = match kind {
            PointKind::Internal => None,
            PointKind::External => allocated(&layer),
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

fn allocated(file: &Utf8PathBuf) -> Option<u64> {
    use std::os::unix::fs::MetadataExt;
    // st_blocks counts units of 512 bytes, whatever the file system's blocks are.
    Some(std::fs::metadata(file).ok()?.blocks().saturating_mul(512))
}

/// `list DOMAIN`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ListDoc {
    /// The domain.
    pub domain: DomainName,
    /// Whether the catalogue has it; where not, this is what images and manifests tell.
    pub catalogued: bool,
    /// The snapshot that the present derives from.
    pub current: Option<SnapshotName>,
    /// All snapshots, oldest first.
    pub snapshots: Vec<SnapshotDoc>,
    /// Operations that stopped half way, or run just now.
    pub unfinished: Vec<Unfinished>,
    /// Each disk as it is on the machine; only with `--disks`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub disks: Option<Vec<DiskReport>>,
}

impl ListDoc {
    /// What `listing` says.
    pub fn of(listing: &Listing, registry: &Registry) -> Self {
        let snapshots = SnapshotDoc::all(listing, registry);
        Self {
            domain: listing.domain.name.clone(),
            catalogued: listing.catalogued,
            current: snapshots.iter().find(|snapshot| snapshot.current).map(|current| current.name.clone()),
            snapshots,
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
    /// What a delete of it alone would free and move, disk by disk; null where the disk cannot be read.
    pub delete: Vec<DeleteDoc>,
    /// The machine that it was taken on, in a line; null where the domain did not run.
    pub machine: Option<String>,
    /// What the guest can write and the snapshot does not hold, but in its memory: firmware variables, a TPM, files of
    /// the host's that are memory to it.
    pub outside: Vec<String>,
    /// What the guest can write and no snapshot holds at all: directories shared with the host, devices of the host's.
    pub shared: Vec<String>,
}

/// What a delete would do to one disk.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DeleteDoc {
    /// Which disk.
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
    /// What was done.
    pub outcome: Outcome,
    /// What the domain does now; null where it did not run.
    pub power: Option<Power>,
}

/// `delete`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct ChangeDoc {
    /// The domain.
    pub domain: DomainName,
    /// What was done.
    pub outcome: Outcome,
}

/// `revert`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RevertDoc {
    /// The domain.
    pub domain: DomainName,
    /// What was done.
    pub outcome: Outcome,
    /// What the domain does now; null where no hypervisor runs it, or it cannot be told.
    pub power: Option<Power>,
}

/// What a domain does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Power {
    /// Its processors run.
    Running,
    /// It stands still.
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
    /// What is done first, as an operation of its own: the snapshot that keeps the current state of a running domain.
    pub first: Option<Plan>,
    /// The steps.
    pub plan: Plan,
    /// What is done to the guest, beyond pausing it.
    pub guest: Option<GuestChange>,
    /// What the domain does afterwards, where that is planned.
    pub power: Option<Power>,
}

/// `domain add`, `import`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DomainDoc {
    /// The domain as the catalogue now knows it.
    pub domain: Domain,
    /// Snapshots that came from manifests.
    pub restored: Vec<SnapshotName>,
    /// Snapshots that the images themselves told.
    pub adopted: Vec<SnapshotName>,
    /// What could not be taken, and why.
    pub notes: Vec<String>,
}

/// `domain remove`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RemovalDoc {
    /// What was removed, and what stays.
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
    /// What the catalogue has of it.
    #[serde(flatten)]
    pub summary: DomainSummary,
    /// What it does now; null where no hypervisor runs it, or none answers at once.
    pub power: Option<Power>,
}

/// `domain show`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DomainShowDoc {
    /// The domain.
    pub domain: Domain,
    /// Its disks as they are on the machine.
    pub disks: Vec<DiskReport>,
    /// Operations that stopped half way, or run just now.
    pub unfinished: Vec<Unfinished>,
    /// What it does now; null where no hypervisor runs it, or `problem` says why it cannot be told.
    pub power: Option<Power>,
    /// The machine that runs now, in a line.
    pub machine: Option<String>,
    /// Why it cannot be told what it does.
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
    /// How it is reached.
    pub control: Control,
    /// What its hypervisor calls it.
    pub name: Option<String>,
    /// Whether the guest's processors run; it is paused otherwise.
    pub running: bool,
    /// What it is, in a line.
    pub summary: String,
    /// Its drives, with why one takes no part in snapshots.
    pub disks: Vec<SeenDisk>,
    /// The domain that it is registered as.
    pub registered: Option<DomainName>,
    /// The command that registers it, word by word; none where it is registered, or `problem` says why it cannot be.
    pub register: Vec<String>,
    /// Why it cannot be registered as it is.
    pub problem: Option<String>,
}

/// `disk create`, `disk revert`, `disk delete`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskDoc {
    /// What was done: "create", "revert", "delete".
    pub operation: String,
    /// The image, absolute.
    #[schemars(with = "String")]
    pub image: Utf8PathBuf,
    /// The snapshots.
    pub names: Vec<String>,
    /// Where they live.
    pub kind: PointKind,
    /// Those of them that were damaged: they are out of the image's table, and their space is still in use.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub forgotten: Vec<String>,
}

/// `disk list`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskListDoc {
    /// The image, absolute.
    #[schemars(with = "String")]
    pub image: Utf8PathBuf,
    /// Its snapshots: first the internal ones in the order of its table, then the external ones, oldest first.
    pub snapshots: Vec<DiskSnapshotDoc>,
}

/// A snapshot of one image.
#[derive(Debug, Serialize, JsonSchema)]
pub struct DiskSnapshotDoc {
    /// Its name.
    pub name: String,
    /// Where it lives.
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

/// What a check found in one domain.
#[derive(Debug, Serialize, JsonSchema)]
pub struct CheckedDomain {
    /// The domain.
    pub domain: String,
    /// What was found; nothing: all is well.
    pub findings: Vec<Finding>,
}

/// `recover`.
#[derive(Debug, Serialize, JsonSchema)]
pub struct RecoverDoc {
    /// What was done, operation by operation; nothing: there was nothing to do.
    pub recovered: Vec<RecoveryReport>,
    /// What else was put right, or noticed, that no operation tells of: a guest that was still frozen, say.
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
    /// What looks like plug-ins and is not used.
    pub problems: Vec<BackendProblem>,
    /// The hypervisors whose domains can be reached.
    pub hypervisors: Vec<HypervisorProfile>,
}

/// A program that looks like a plug-in and is not used, or their directory.
#[derive(Debug, Serialize, JsonSchema)]
pub struct BackendProblem {
    /// Where it is.
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
    /// What it can do.
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
    /// What sort of failure it is.
    pub kind: ErrorKind,
    /// What went wrong, with what was attempted in front and the causes behind.
    pub message: String,
    /// What state things are in now, where that needs saying.
    pub state: Option<String>,
    /// What to do.
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
        "list": ListDoc, "list-all": ListAllDoc, "show": ShowDoc,
        "domain-add": DomainDoc, "domain-remove": RemovalDoc, "domain-list": DomainsDoc, "domain-show": DomainShowDoc,
        "domain-scan": ScanDoc,
        "disk": DiskDoc, "disk-list": DiskListDoc,
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
