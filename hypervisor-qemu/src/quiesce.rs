//! The guest's file systems flushed and frozen for the instant of a snapshot: for a bounded time, and thawed whatever happens.
//!
//! The thaw is [`qmp::Agent`]'s promise: by the holder, by its drop, by a limit of the host's, and after a freeze that was not
//! answered. A process that is killed cannot thaw: whoever comes after calls [`thaw_after_crash`].

use std::time::Duration;

use qmp::{Agent, Freeze, Frozen};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    error::{Error, ErrorKind, Result},
    machine::Machine,
};

/// How long a guest stays frozen at most, unless it is said otherwise.
pub const LIMIT: Duration = Duration::from_secs(10);

/// What a snapshot's disks are when nobody knows what the guest had in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Consistency {
    /// As after a power failure.
    Crash {
        /// Why not better.
        because: String,
    },
    /// Flushed and frozen.
    Filesystem {
        /// How many file systems the agent says.
        filesystems: u64,
    },
}

/// A guest that is frozen. Dropping it thaws, too.
#[derive(Debug)]
#[must_use = "the guest is thawed as soon as this is dropped"]
pub struct Quiesced {
    frozen: Frozen,
}

/// Flushes and freezes the guest's file systems. `limit` bounds both: how long the guest may take to answer, and how long it
/// stays frozen.
///
/// Where QEMU says that no agent has the port open in the guest, it is not waited for. Not idempotent: a guest that is
/// frozen already is an error.
///
/// # Errors
/// [`ErrorKind::Unsupported`] where no agent is there, or it cannot freeze; [`ErrorKind::Timeout`] where it does not answer;
/// [`ErrorKind::Refused`] with what it said; [`ErrorKind::Failed`] where it froze nothing. After any error the guest is not
/// frozen, or is being thawed.
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
        .advice("start qemu-guest-agent in the guest, or take the snapshot without --quiesce"));
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
    /// How many file systems are frozen.
    pub fn filesystems(&self) -> u64 {
        self.frozen.filesystems()
    }

    /// How long it is until the host thaws by itself.
    pub fn left(&self) -> Duration {
        self.frozen.left()
    }

    /// Thaws, and says what the disks are that were cut meanwhile: quiesced, only if the guest was frozen all the time.
    ///
    /// An error of the thaw is in it as well: then nobody knows whether the guest was frozen to the end, and thawing goes on
    /// being tried.
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

/// Thaws a guest, whoever froze it: for the next command after one that was killed. Gives how many file systems were thawed;
/// harmless where none was frozen, so it may be repeated.
///
/// # Errors
/// As [`quiesce`].
pub async fn thaw_after_crash(agent: &Agent) -> Result<u64> {
    let subject = agent.socket().display();
    agent.thaw().await.map_err(|error| Error::qmp("thawing the guest's file systems", subject, error))
}

/// Whether something in the guest has the agent's port open; none where QEMU does not tell which port that is. (An agent that
/// hangs has it open.)
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
