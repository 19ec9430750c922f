//! The guard of a frozen guest: dropping it thaws the guest.

use std::{path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use super::task::Request;
use crate::error::{Error, ErrorKind, Result};

/// Options of a freeze.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Freeze {
    /// Time limit for the freeze's answer: the guest first writes out its data. 10 s.
    pub deadline: Duration,
    /// Longest time for which the guest stays frozen: then the host thaws it, whatever the holder does. 10 s.
    pub limit: Duration,
    /// Only these mount points; all, if empty.
    pub mountpoints: Vec<String>,
}

impl Default for Freeze {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(10), limit: Duration::from_secs(10), mountpoints: Vec::new() }
    }
}

/// Result of a freeze.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Thaw {
    /// Number of thawed file systems, as the agent reports it.
    pub filesystems: u64,
    /// True if the guest was frozen until this thaw. False if the limit was over, or the guest thawed by
    /// itself (Windows does so after 10 s): then work done in between is not quiesced.
    pub held: bool,
    /// Time from the freeze's answer to the thaw's.
    pub frozen_for: Duration,
}

/// A frozen guest. Dropping it thaws the guest; [`Frozen::thaw`] also returns the result.
#[derive(Debug)]
#[must_use = "the guest is thawed as soon as this is dropped"]
pub struct Frozen {
    pub(super) number: u64,
    pub(super) filesystems: u64,
    pub(super) since: Instant,
    pub(super) limit: Instant,
    /// `None` once the release was requested.
    pub(super) requests: Option<mpsc::UnboundedSender<Request>>,
    pub(super) socket: Arc<PathBuf>,
}

impl Frozen {
    /// Returns the number of frozen file systems, as the agent reports it. With 0 nothing is quiesced.
    pub fn filesystems(&self) -> u64 {
        self.filesystems
    }

    /// Returns the time until the host thaws the guest by itself.
    pub fn left(&self) -> Duration {
        self.limit.saturating_duration_since(Instant::now())
    }

    /// Thaws the guest. The thaw is tried again after a failure, and after this call is dropped.
    ///
    /// # Errors
    /// See [`Agent::execute`](crate::Agent::execute): the guest may still be frozen then;
    /// [`Agent::wait_for_thaw`](crate::Agent::wait_for_thaw) waits for the thaw.
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
        // No deadline here: the task answers after one try, which has its own.
        receiver.await.map_err(|_| ended)?
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        if let Some(requests) = self.requests.take() {
            // If the task is gone, it thawed when it was dropped.
            let _ = requests.send(Request::Release { number: self.number, since: self.since, reply: None });
        }
    }
}
