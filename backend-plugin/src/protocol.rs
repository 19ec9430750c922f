//! What is said between domsnap and a plug-in, version 1.
//!
//! Each frame is one JSON-RPC 2.0 document on one line. domsnap sends requests with numbers as `id`; the plug-in answers each with
//! `result` or `error`, in any order. It may send the notification `progress` of a request that is under way, and gets the
//! notification `cancel` of one. Nothing else may be on its standard output; what it writes to standard error is kept for
//! error messages.
//!
//! The methods are those of [`snapcore::DiskSnapshotter`], where each one's contract stands. Parameters and results are the types
//! here; [`schema`] has them all, and `docs/plugin-schema.json` is what it gives.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use snapcore::{
    ActivePath, Capabilities, ChainFile, DeleteCost, Disk, DiskPlan, DiskRecord, DiskRequest, DiskState,
    Edit, ErrorKind, Finding, InspectDepth, LayerName, Point, SnapshotName, Step, StepStatus,
};

/// The version of the protocol that this crate speaks.
pub const VERSION: u32 = 1;

/// The code of an error that a plug-in tells of; others are JSON-RPC's own.
pub const FAILED: i64 = 1;

/// JSON-RPC's code for a method that is not known.
pub const NO_METHOD: i64 = -32601;

/// Every method, by its name on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The first request: who are you.
    Hello,
    /// Takes in a disk.
    Adopt,
    /// A disk as it is.
    Inspect,
    /// Points that only the disk itself knows.
    Discover,
    /// The steps of a request.
    Plan,
    /// Locks a disk.
    Hold,
    /// Gives a lock back.
    Release,
    /// Lets a hypervisor open what is locked. May be unknown to a plug-in.
    YieldLocks,
    /// What the configured path opens.
    OpenChain,
    /// Does a step.
    Apply,
    /// Takes a step back.
    Undo,
    /// Makes safe what an undo would lose. May be unknown to a plug-in.
    Salvage,
    /// Whether a finish step must be done again. May be unknown to a plug-in.
    IsOvertaken,
    /// How far a step got.
    Status,
    /// Looks for damage.
    Check,
    /// What a delete would cost.
    CostOfDelete,
    /// Where manifests belong.
    ManifestDirectory,
    /// The file of a layer.
    LayerFile,
}

impl Method {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Adopt => "adopt",
            Self::Inspect => "inspect",
            Self::Discover => "discover",
            Self::Plan => "plan",
            Self::Hold => "hold",
            Self::Release => "release",
            Self::YieldLocks => "yield_locks",
            Self::OpenChain => "open_chain",
            Self::Apply => "apply",
            Self::Undo => "undo",
            Self::Salvage => "salvage",
            Self::IsOvertaken => "is_overtaken",
            Self::Status => "status",
            Self::Check => "check",
            Self::CostOfDelete => "cost_of_delete",
            Self::ManifestDirectory => "manifest_directory",
            Self::LayerFile => "layer_file",
        }
    }
}

/// Parameters of `hello`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HelloParams {
    /// The protocol that domsnap speaks.
    pub protocol: u32,
    /// The version of domsnap, for people.
    pub domsnap: String,
}

/// Result of `hello`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HelloResult {
    /// The protocol that the plug-in speaks: the same.
    pub protocol: u32,
    /// The format that it serves: the `NAME` of its file.
    pub format: String,
    /// What it can do.
    pub capabilities: Capabilities,
}

/// Parameters of `adopt`; its result is the disk's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AdoptParams {
    /// The disk.
    pub disk: Disk,
    /// Where active images go.
    pub active_path: ActivePath,
}

/// A file that a hypervisor has open: it is the hypervisor's to lock, and its content is the guest's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct OpenFile {
    /// Its device.
    pub device: u64,
    /// Its inode.
    pub inode: u64,
}

/// Parameters of `inspect`; its result is the disk's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct InspectParams {
    /// The disk.
    pub disk: DiskRecord,
    /// How much is read.
    pub depth: InspectDepth,
    /// What the disk's own hypervisor has open of it.
    pub open: Vec<OpenFile>,
}

/// Parameters of `discover`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiscoverParams {
    /// The disk.
    pub disk: DiskRecord,
    /// The points that are known already.
    pub known: Vec<Point>,
}

/// Result of `discover`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct DiscoverResult {
    /// Layers that become domsnap's to merge and to remove, beside those that are already.
    pub layers: Vec<LayerName>,
    /// The points, oldest first.
    pub points: Vec<FoundPoint>,
}

/// A point that only the disk itself knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FoundPoint {
    /// What a snapshot of it would be called.
    pub name: SnapshotName,
    /// Where it is.
    #[serde(flatten)]
    pub point: Point,
    /// Which of the points before it, counted from 0, it derives from.
    #[serde(default)]
    pub parent: Option<usize>,
    /// When it was taken.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// The disk's size at it, in bytes.
    pub virtual_size: u64,
}

/// Parameters of `plan`; its result is the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlanParams {
    /// The disk.
    pub disk: DiskRecord,
    /// What `inspect` told.
    pub state: DiskState,
    /// Where active images go.
    pub active_path: ActivePath,
    /// What is asked.
    pub request: DiskRequest,
}

/// Parameters of `hold`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct HoldParams {
    /// The disk.
    pub disk: DiskRecord,
    /// What the disk's own hypervisor has open of it.
    pub open: Vec<OpenFile>,
}

/// Result of `hold`, and parameters of `release`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Hold {
    /// What the plug-in calls it.
    pub hold: String,
}

/// Parameters of `open_chain` (its result is a list of files) and of `yield_locks` (its result is null).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskParams {
    /// The disk.
    pub disk: DiskRecord,
}

/// Parameters of `apply`, `undo` (their result is null), `is_overtaken` (true or false) and `status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StepParams {
    /// The step, as `plan` gave it.
    pub step: Step,
    /// The disk, as the catalogue has it.
    pub disk: DiskRecord,
    /// What the disk's own hypervisor has open of it.
    pub open: Vec<OpenFile>,
}

/// Parameters of `salvage`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SalvageParams {
    /// The step that will be undone.
    pub step: Step,
    /// Whether the journal has it as done.
    pub done: bool,
    /// The disk.
    pub disk: DiskRecord,
    /// What the disk's own hypervisor has open of it.
    pub open: Vec<OpenFile>,
}

/// Result of `salvage`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "salvage")]
pub enum SalvageResult {
    /// The undo loses nothing.
    Nothing,
    /// What it would lose is safe.
    PutAside {
        /// Where it is, for people.
        words: String,
    },
    /// The step must stay.
    Stays {
        /// What the catalogue learns.
        edits: Vec<Edit>,
        /// What that means, for people.
        words: String,
    },
}

/// Parameters of `check`; its result is a list of findings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckParams {
    /// The disk.
    pub disk: DiskRecord,
    /// What `inspect` told.
    pub state: DiskState,
}

/// Parameters of `cost_of_delete`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CostParams {
    /// The disk.
    pub disk: DiskRecord,
    /// What `inspect` told.
    pub state: DiskState,
    /// The points that would be deleted.
    pub drop: Vec<Point>,
    /// The points that would stay.
    pub keep: Vec<Point>,
}

/// Parameters of `manifest_directory`; its result is a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ManifestParams {
    /// The disk.
    pub disk: Disk,
}

/// Parameters of `layer_file`; its result is a path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LayerParams {
    /// The disk.
    pub disk: DiskRecord,
    /// The layer.
    pub layer: LayerName,
}

/// Parameters of the notification `progress`, from the plug-in. A call of which nothing is heard for too long, no answer and
/// no progress that is further than the one before, is taken to hang.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProgressParams {
    /// The request.
    pub id: u64,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Parameters of the notification `cancel`, to the plug-in. The request is answered all the same: with an error of the kind
/// `cancelled`, or as if nothing had been said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CancelParams {
    /// The request.
    pub id: u64,
}

/// The `error` of an answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Failure {
    /// [`FAILED`], or one of JSON-RPC's.
    pub code: i64,
    /// What was attempted, on what, what was expected and found: lower case, no full stop.
    pub message: String,
    /// More of it.
    #[serde(default)]
    pub data: Option<FailureData>,
}

/// What else there is to say of a failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FailureData {
    /// What sort of failure it is.
    pub kind: ErrorKind,
    /// What state things are in now.
    #[serde(default)]
    pub state: Option<String>,
    /// What the user can do.
    #[serde(default)]
    pub advice: Option<String>,
}

/// Every method with the types of its parameters and of its result: what [`schema`] is made from.
#[derive(JsonSchema)]
#[allow(dead_code, reason = "only its shape is used")]
#[schemars(rename = "domsnap backend protocol, version 1")]
struct Everything {
    hello: Call<HelloParams, HelloResult>,
    adopt: Call<AdoptParams, DiskRecord>,
    inspect: Call<InspectParams, DiskState>,
    discover: Call<DiscoverParams, DiscoverResult>,
    plan: Call<PlanParams, DiskPlan>,
    hold: Call<HoldParams, Hold>,
    release: Call<Hold, ()>,
    yield_locks: Call<DiskParams, ()>,
    open_chain: Call<DiskParams, Vec<ChainFile>>,
    apply: Call<StepParams, ()>,
    undo: Call<StepParams, ()>,
    salvage: Call<SalvageParams, SalvageResult>,
    is_overtaken: Call<StepParams, bool>,
    status: Call<StepParams, StepStatus>,
    check: Call<CheckParams, Vec<Finding>>,
    cost_of_delete: Call<CostParams, DeleteCost>,
    manifest_directory: Call<ManifestParams, PathText>,
    layer_file: Call<LayerParams, PathText>,
    /// Notification from the plug-in.
    progress: ProgressParams,
    /// Notification to the plug-in.
    cancel: CancelParams,
    /// The `error` of any answer.
    error: Failure,
}

/// One method.
#[derive(JsonSchema)]
#[allow(dead_code, reason = "only its shape is used")]
#[schemars(inline)]
struct Call<P, R> {
    params: P,
    result: R,
}

/// An absolute path.
#[derive(JsonSchema)]
#[schemars(inline)]
#[allow(dead_code, reason = "only its shape is used")]
struct PathText(#[schemars(with = "String")] Utf8PathBuf);

/// The protocol's JSON schema: an object with a property for each method and notification.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Everything).to_value()
}
