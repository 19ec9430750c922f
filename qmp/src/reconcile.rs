//! The current state of a QEMU in one value, for use after a connection was lost and events were missed.

use serde_json::Value;

use crate::{
    error::{Error, ErrorKind, Result, shown},
    qmp::Qmp,
};

/// The state of a QEMU, as its own queries report it. Unknown words are kept, not refused.
///
/// The queries run one after another; a running guest, or a job, may change state between them.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Reconciled {
    /// True if this is the same process as that of the previous connection. `None` if that is not known, or
    /// there was no previous one.
    pub same_process: Option<bool>,
    /// True if the guest runs.
    pub running: bool,
    /// `query-status`: `running`, `paused`, `postmigrate`, `restore-vm`, ...
    pub run_state: String,
    /// `query-jobs`: jobs that run, and those that have ended and were not dismissed.
    pub jobs: Vec<Job>,
    /// `query-block`: the drives of the guest's devices, empty ones too.
    pub drives: Vec<Drive>,
}

/// One job.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Job {
    /// Its id.
    pub id: String,
    /// `commit`, `stream`, `snapshot-save`, ...
    pub kind: String,
    /// Its state.
    pub status: JobStatus,
    /// Progress, in the job's own units (bytes for most).
    pub current: u64,
    /// Value of `current` at the end; it may change.
    pub total: u64,
    /// The reason of its failure, if it failed.
    pub error: Option<String>,
    /// The entry as it was received.
    pub raw: Value,
}

/// The state of a job (QAPI `JobStatus`).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the words are QEMU's")]
pub enum JobStatus {
    Created,
    Running,
    Paused,
    Ready,
    Standby,
    Waiting,
    Pending,
    Aborting,
    Concluded,
    Null,
    /// An unknown word.
    Other(String),
}

impl JobStatus {
    /// Parses QEMU's word, also that of an event.
    pub fn from_word(word: &str) -> Self {
        match word {
            "created" => Self::Created,
            "running" => Self::Running,
            "paused" => Self::Paused,
            "ready" => Self::Ready,
            "standby" => Self::Standby,
            "waiting" => Self::Waiting,
            "pending" => Self::Pending,
            "aborting" => Self::Aborting,
            "concluded" => Self::Concluded,
            "null" => Self::Null,
            other => Self::Other(other.to_owned()),
        }
    }
}

/// One drive of the guest.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Drive {
    /// The drive's name; empty if it was made by `-blockdev`.
    pub device: String,
    /// The device's id or its path in QOM.
    pub qdev: Option<String>,
    /// True if its medium is removable.
    pub removable: bool,
    /// The medium; `None` in an empty drive.
    pub inserted: Option<Inserted>,
    /// The entry as it was received.
    pub raw: Value,
}

/// The medium of a drive: its topmost node.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Inserted {
    /// The node's name.
    pub node: Option<String>,
    /// `qcow2`, `raw`, ...
    pub driver: String,
    /// QEMU's name of its file; may be a `json:` string.
    pub file: String,
    /// QEMU's name of the backing file.
    pub backing_file: Option<String>,
    /// True if the guest cannot write it.
    pub read_only: bool,
}

impl Reconciled {
    pub(crate) async fn read(qmp: &Qmp) -> Result<Self> {
        let status = qmp.execute_raw("query-status", Value::Null).await?;
        let jobs = qmp.execute_raw("query-jobs", Value::Null).await?;
        let drives = qmp.execute_raw("query-block", Value::Null).await?;
        let wrong = |command, value: &Value| {
            let detail = format!(
                "the reply has not the form of this command's: {}",
                shown(value.to_string().as_bytes())
            );
            Error::new(ErrorKind::Reply, command, qmp.socket(), detail).sent(true)
        };
        Ok(Self {
            same_process: None,
            running: flag(&status, "running").ok_or_else(|| wrong("query-status", &status))?,
            run_state: text(&status, "status").ok_or_else(|| wrong("query-status", &status))?,
            jobs: Job::list(&jobs).ok_or_else(|| wrong("query-jobs", &jobs))?,
            drives: all(&drives, Drive::from_value).ok_or_else(|| wrong("query-block", &drives))?,
        })
    }

    /// Finds a job by its id.
    pub fn job(&self, id: &str) -> Option<&Job> {
        self.jobs.iter().find(|job| job.id == id)
    }
}

impl Job {
    /// Parses a reply to `query-jobs`; `None` if one of the jobs cannot be read.
    pub fn list(reply: &Value) -> Option<Vec<Self>> {
        all(reply, Self::from_value)
    }

    fn from_value(value: &Value) -> Option<Self> {
        // The protocol has signed values; one that is out of range becomes 0.
        let count = |key| value.get(key).and_then(Value::as_u64).unwrap_or_default();
        Some(Self {
            id: text(value, "id")?,
            kind: text(value, "type")?,
            status: JobStatus::from_word(&text(value, "status")?),
            current: count("current-progress"),
            total: count("total-progress"),
            error: text(value, "error"),
            raw: value.clone(),
        })
    }
}

impl Drive {
    fn from_value(value: &Value) -> Option<Self> {
        let inserted = match value.get("inserted") {
            None | Some(Value::Null) => None,
            Some(inserted) => Some(Inserted {
                node: text(inserted, "node-name"),
                driver: text(inserted, "drv")?,
                file: text(inserted, "file")?,
                backing_file: text(inserted, "backing_file"),
                read_only: flag(inserted, "ro")?,
            }),
        };
        Some(Self {
            device: text(value, "device")?,
            qdev: text(value, "qdev"),
            removable: flag(value, "removable")?,
            inserted,
            raw: value.clone(),
        })
    }
}

fn text(value: &Value, key: &str) -> Option<String> {
    value.get(key)?.as_str().map(str::to_owned)
}

fn flag(value: &Value, key: &str) -> Option<bool> {
    value.get(key)?.as_bool()
}

/// Reads all entries of a list; none if one of them cannot be read, because skipping a job would be worse.
fn all<T>(value: &Value, each: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(each).collect()
}
