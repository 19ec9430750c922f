//! Flushes and freezes the guest's file systems for the instant of a snapshot: for a bounded time, and thawed
//! in every case.
//!
//! [`qmp::Agent`] guarantees the thaw: by the holder, by its drop, by a time limit of the host's, and after a
//! freeze that was not answered. A process that is killed cannot thaw: the next command calls
//! [`thaw_after_crash`].

use std::time::Duration;

use qmp::{Agent, Freeze, Frozen};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    error::{Error, ErrorKind, Result},
    machine::Machine,
};

/// Longest freeze of a guest, unless the user sets another limit.
pub const LIMIT: Duration = Duration::from_secs(10);

/// Consistency of a snapshot's disks without the guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Consistency {
    /// Like after a power failure.
    Crash {
        /// The reason why it is not better.
        because: String,
    },
    /// Flushed and frozen.
    Filesystem {
        /// Number of frozen file systems, as the agent reports it.
        filesystems: u64,
    },
}

/// A frozen guest. Dropping it thaws the guest, too.
#[derive(Debug)]
#[must_use = "the guest is thawed as soon as this is dropped"]
pub struct Quiesced {
    frozen: Frozen,
}

/// Flushes and freezes the guest's file systems. `limit` bounds both the time until the guest answers and the
/// time for which it stays frozen.
///
/// If QEMU reports that no agent has the port open in the guest, this does not wait. Not idempotent: freezing
/// a frozen guest is an error.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if there is no agent or it cannot freeze; [`ErrorKind::Timeout`] if it does not
/// answer; [`ErrorKind::Refused`] with its message; [`ErrorKind::Failed`] if it froze nothing. After any
/// error the guest is not frozen, or is being thawed.
pub async fn quiesce(machine: &Machine, agent: &Agent, limit: Duration) -> Result<Quiesced> {
    let attempted = "freezing the guest's file systems";
    let subject = agent.socket().display().to_string();
    if let Some(false) = is_agent_there(machine, agent).await? {
        return Err(Error::new(
            ErrorKind::Unsupported,
            attempted,
            subject,
            "no agent has the port open in the guest",
        )
        .advise("start qemu-guest-agent in the guest, or take the snapshot without --quiesce"));
    }
    let mut freeze = Freeze::default();
    freeze.deadline = limit;
    freeze.limit = limit;
    let frozen = agent.freeze(freeze).await.map_err(|error| Error::qmp(attempted, &subject, error))?;
    if frozen.filesystems() == 0 {
        // Best effort: dropping it thaws too.
        let _ = frozen.thaw().await;
        let detail = "the agent froze no file system";
        return Err(Error::new(ErrorKind::Failed, attempted, subject, detail));
    }
    Ok(Quiesced { frozen })
}

impl Quiesced {
    /// Returns the number of frozen file systems.
    pub fn filesystems(&self) -> u64 {
        self.frozen.filesystems()
    }

    /// Returns the time until the host thaws the guest by itself.
    pub fn left(&self) -> Duration {
        self.frozen.left()
    }

    /// Thaws the guest, and returns the consistency of disks that were cut meanwhile. They are quiesced only
    /// if the guest was frozen all the time.
    ///
    /// An error of the thaw is part of the result: then it is unknown whether the guest was frozen to the
    /// end, and the thaw is tried again in the background.
    pub async fn thaw(self) -> Consistency {
        let filesystems = self.frozen.filesystems();
        match self.frozen.thaw().await {
            Ok(thaw) if thaw.held => Consistency::Filesystem { filesystems },
            Ok(thaw) => Consistency::Crash {
                because: format!("the guest was thawed before the end, after {:?} at most", thaw.frozen_for),
            },
            Err(error) => {
                Consistency::Crash { because: format!("the guest did not answer the thaw: {error}") }
            }
        }
    }
}

/// Thaws a guest, whatever froze it: for the next command after one that was killed. Returns the number of
/// thawed file systems. Harmless if none was frozen, so it may be repeated.
///
/// # Errors
/// See [`quiesce`].
pub async fn thaw_after_crash(agent: &Agent) -> Result<u64> {
    let subject = agent.socket().display();
    agent.thaw().await.map_err(|error| Error::qmp("thawing the guest's file systems", subject, error))
}

/// Returns true if a process in the guest has the agent's port open. `None` if QEMU does not report which
/// port that is. (An agent that hangs has it open.)
pub(crate) async fn is_agent_there(machine: &Machine, agent: &Agent) -> Result<Option<bool>> {
    let devices = machine.query("query-chardev", Value::Null).await?;
    let socket = agent.socket().to_string_lossy().into_owned();
    let ours = devices.as_array().into_iter().flatten().find(|device| {
        let name = device["filename"].as_str().unwrap_or_default();
        let name = name.strip_prefix("disconnected:").unwrap_or(name);
        let place = name.split([',', ' ']).next();
        place == Some(&*socket)
            || name.strip_prefix("unix:").is_some_and(|name| name.split(',').next() == Some(&*socket))
    });
    Ok(ours.and_then(|device| device["frontend-open"].as_bool()))
}
