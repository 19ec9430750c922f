//! The protocol between domsnap and a plug-in, version 1.
//!
//! Each frame is one JSON-RPC 2.0 document on one line. domsnap sends requests with numbers as `id`. The
//! plug-in answers each with `result` or `error`, in any order. It may send the notification `progress` of a
//! running request, and gets the notification `cancel` of one. Its standard output must have nothing else.
//! Its standard error is recorded for error messages.
//!
//! The methods are those of [`snapcore::backend::DiskSnapshotter`], which documents the contract of each.
//! Parameters and results are the types in this module. [`schema`] describes all of them;
//! `docs/plugin-schema.json` is its output.

use camino::Utf8PathBuf;
use jiff::Timestamp;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use snapcore::backend::{
    Capabilities, DeleteCost, DiskPlan, DiskRequest, DiskState, Finding, InspectDepth, StepStatus,
};
use snapcore::hypervisor::OpenLayer;
use snapcore::{ActivePath, Disk, DiskRecord, Edit, ErrorKind, LayerName, Point, SnapshotName, Step};

/// The version of the protocol that this crate speaks.
pub const VERSION: u32 = 1;

/// The code of an error that a plug-in reports. Others are JSON-RPC's own.
pub const FAILED: i64 = 1;

/// JSON-RPC's code for an unknown method.
pub const NO_METHOD: i64 = -32601;

/// Every method, by its name on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// The first request: asks for identity and capabilities.
    Hello,
    /// Adopts a disk.
    Adopt,
    /// Reads the state of a disk.
    Inspect,
    /// Finds points that only the disk itself knows.
    Discover,
    /// Plans the steps of a request.
    Plan,
    /// Locks a disk.
    Lock,
    /// Releases a lock.
    Release,
    /// Lets a hypervisor open what is locked. A plug-in need not implement it.
    YieldLocks,
    /// Returns the files that the configured path opens.
    OpenChain,
    /// Performs a step.
    Apply,
    /// Undoes a step.
    Undo,
    /// Saves what an undo would lose. A plug-in need not implement it.
    Salvage,
    /// Returns true if a finish step must be done again. A plug-in need not implement it.
    IsSuperseded,
    /// Returns how far a step got.
    Status,
    /// Looks for damage.
    Check,
    /// Estimates the cost of a delete.
    CostOfDelete,
    /// Returns the directory of manifests.
    ManifestDirectory,
    /// Returns the file of a layer.
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
            Self::Lock => "lock",
            Self::Release => "release",
            Self::YieldLocks => "yield_locks",
            Self::OpenChain => "open_chain",
            Self::Apply => "apply",
            Self::Undo => "undo",
            Self::Salvage => "salvage",
            Self::IsSuperseded => "is_superseded",
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
    /// The capabilities of the plug-in.
    pub capabilities: Capabilities,
}

/// Parameters of `adopt`; its result is the disk's record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AdoptParams {
    /// The disk.
    pub disk: Disk,
    /// The rule for paths of active images.
    pub active_path: ActivePath,
}

/// A file that a hypervisor has open. The hypervisor has it locked, and its content is the guest's.
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
    /// The amount of information to read.
    pub depth: InspectDepth,
    /// The files of the disk that its own hypervisor has open.
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
    /// Layers, other than the ones already owned, that domsnap may merge and remove from now on.
    pub layers: Vec<LayerName>,
    /// The points, oldest first.
    pub points: Vec<FoundPoint>,
}

/// A point that only the disk itself knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FoundPoint {
    /// The name for a snapshot of it.
    pub name: SnapshotName,
    /// The location of the point.
    #[serde(flatten)]
    pub point: Point,
    /// The parent: the index of one of the previous points, counted from 0.
    #[serde(default)]
    pub parent: Option<usize>,
    /// Time of the point.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// The disk's size at the point, in bytes.
    pub virtual_size: u64,
}

/// Parameters of `plan`; its result is the plan.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PlanParams {
    /// The disk.
    pub disk: DiskRecord,
    /// The result of `inspect`.
    pub state: DiskState,
    /// The rule for paths of active images.
    pub active_path: ActivePath,
    /// The request.
    pub request: DiskRequest,
}

/// Parameters of `lock`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct LockParams {
    /// The disk.
    pub disk: DiskRecord,
    /// The files of the disk that its own hypervisor has open.
    pub open: Vec<OpenFile>,
}

/// Result of `lock`, and parameters of `release`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Lock {
    /// The plug-in's name for it.
    pub lock: String,
}

/// Parameters of `open_chain` (its result is a list of files) and of `yield_locks` (its result is null).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskParams {
    /// The disk.
    pub disk: DiskRecord,
}

/// Parameters of `apply`, `undo` (their result is null), `is_superseded` (true or false) and `status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct StepParams {
    /// The step, as `plan` returned it.
    pub step: Step,
    /// The disk, as recorded in the catalogue.
    pub disk: DiskRecord,
    /// The files of the disk that its own hypervisor has open.
    pub open: Vec<OpenFile>,
}

/// Parameters of `salvage`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct SalvageParams {
    /// The step that will be undone.
    pub step: Step,
    /// True if the journal has recorded it as done.
    pub done: bool,
    /// The disk.
    pub disk: DiskRecord,
    /// The files of the disk that its own hypervisor has open.
    pub open: Vec<OpenFile>,
}

/// Result of `salvage`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "salvage")]
pub enum SalvageResult {
    /// The undo loses nothing.
    Nothing,
    /// The loss is prevented: the data is saved.
    Saved {
        /// Place of the saved data, for people.
        message: String,
    },
    /// The step must not be undone.
    Stays {
        /// The changes of the catalogue.
        edits: Vec<Edit>,
        /// The consequence, for people.
        message: String,
    },
}

/// Parameters of `check`; its result is a list of findings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CheckParams {
    /// The disk.
    pub disk: DiskRecord,
    /// The result of `inspect`.
    pub state: DiskState,
}

/// Parameters of `cost_of_delete`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CostParams {
    /// The disk.
    pub disk: DiskRecord,
    /// The result of `inspect`.
    pub state: DiskState,
    /// The points that would be deleted.
    pub drop: Vec<Point>,
    /// The points that would be kept.
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

/// Parameters of the notification `progress`, from the plug-in. A call hangs if it sends no news for too
/// long: no answer, and no progress beyond the previous one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ProgressParams {
    /// The request.
    pub id: u64,
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// Parameters of the notification `cancel`, to the plug-in. The request is still answered: with an error of
/// the kind `cancelled`, or as if it had not been cancelled.
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
    /// The attempted operation, the object, what was expected and what was found: lower case, no full stop.
    pub message: String,
    /// Further details.
    #[serde(default)]
    pub data: Option<FailureData>,
}

/// Further details of a failure.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct FailureData {
    /// The kind of failure.
    pub kind: ErrorKind,
    /// The state that things are in now.
    #[serde(default)]
    pub state: Option<String>,
    /// Advice for the user.
    #[serde(default)]
    pub advice: Option<String>,
}

/// Every method with the types of its parameters and of its result, from which [`schema`] is made.
#[derive(JsonSchema)]
#[allow(dead_code, reason = "only its shape is used")]
#[schemars(rename = "domsnap backend protocol, version 1")]
struct Everything {
    hello: Call<HelloParams, HelloResult>,
    adopt: Call<AdoptParams, DiskRecord>,
    inspect: Call<InspectParams, DiskState>,
    discover: Call<DiscoverParams, DiscoverResult>,
    plan: Call<PlanParams, DiskPlan>,
    lock: Call<LockParams, Lock>,
    release: Call<Lock, ()>,
    yield_locks: Call<DiskParams, ()>,
    open_chain: Call<DiskParams, Vec<OpenLayer>>,
    apply: Call<StepParams, ()>,
    undo: Call<StepParams, ()>,
    salvage: Call<SalvageParams, SalvageResult>,
    is_superseded: Call<StepParams, bool>,
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

/// Returns the protocol's JSON schema: an object with a property for each method and notification.
pub fn schema() -> serde_json::Value {
    schemars::schema_for!(Everything).to_value()
}
