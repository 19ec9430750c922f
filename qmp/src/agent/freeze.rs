//! What the holder of a frozen guest has: a guard whose end is a thaw.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::task::Request;
use crate::error::{Error, ErrorKind, Result};

/// How to freeze.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Freeze {
    /// Within which the freeze must be answered: the guest writes out what it holds first. 10 s.
    pub deadline: Duration,
    /// How long the guest stays frozen at most: then the host thaws it, whatever its holder does. 10 s.
    pub limit: Duration,
    /// Only these mount points; all, if empty.
    pub mountpoints: Vec<String>,
}

impl Default for Freeze {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(10), limit: Duration::from_secs(10), mountpoints: Vec::new() }
    }
}

/// How a freeze ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Thaw {
    /// How many file systems the agent says it thawed.
    pub filesystems: u64,
    /// Whether the guest was frozen until this thaw. False where the limit was over, or the guest thawed by itself (Windows
    /// does after 10 s): then what was done in between is not quiesced.
    pub held: bool,
    /// From the freeze's answer to the thaw's.
    pub frozen_for: Duration,
}

/// A guest whose file systems are frozen. Thaws when dropped; call [`Frozen::thaw`] to know how it went.
#[derive(Debug)]
#[must_use = "the guest is thawed as soon as this is dropped"]
pub struct Frozen {
    pub(super) number: u64,
    pub(super) filesystems: u64,
    pub(super) since: Instant,
    pub(super) limit: Instant,
    /// None once the release was asked for.
    pub(super) requests: Option<mpsc::UnboundedSender<Request>>,
    pub(super) socket: Arc<PathBuf>,
}

impl Frozen {
    /// How many file systems the agent says it froze. With 0 nothing is quiesced.
    pub fn filesystems(&self) -> u64 {
        self.filesystems
    }

    /// How long it is until the host thaws the guest by itself.
    pub fn left(&self) -> Duration {
        self.limit.saturating_duration_since(Instant::now())
    }

    /// Thaws the guest. Trying goes on after a failure, and after this call is dropped.
    ///
    /// # Errors
    /// As [`Agent::execute`](crate::Agent::execute): the guest may still be frozen then;
    /// [`Agent::settle`](crate::Agent::settle) waits for the thaw.
    pub async fn thaw(mut self) -> Result<Thaw> {
        let (reply, receiver) = oneshot::channel();
        let ended = Error::new(
            ErrorKind::Lost,
            super::link::THAW,
            &self.socket,
            "the runtime that served the agent has ended; it thawed the guest as it ended, if the agent answered",
        );
        let request = Request::Release { number: self.number, since: self.since, reply: Some(reply) };
        let Some(requests) = self.requests.take() else { return Err(ended) };
        if requests.send(request).is_err() {
            return Err(ended);
        }
        // No deadline here: the task answers after one try, which has one.
        receiver.await.map_err(|_| ended)?
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(requests) = self.requests.take() {
            // Where the task is gone, it thawed as it went.
            let _ = requests.send(Request::Release { number: self.number, since: self.since, reply: None });
        }
    }
}
