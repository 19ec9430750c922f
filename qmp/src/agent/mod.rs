//! The guest agent: another protocol than QMP, with an untrusted guest at the other end.
//!
//! No input from the agent is trusted, and no earlier command can be assumed to be over: an agent that hangs
//! runs queued commands later. So each command is preceded by a `guest-sync-delimited` with its own id. If
//! that is not answered, the command is not sent. If it is, all earlier commands are done and the next reply
//! is ours.
//!
//! `link` is one socket and the exchange on it, `task` runs the exchanges one after another and has the duty
//! to thaw, `freeze` is the guard of a frozen guest.

mod freeze;
mod link;
mod task;

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use qapi_qga::QgaCommand;
use serde_json::Value;
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, timeout_at},
};

pub use freeze::{Freeze, Frozen, Thaw};
use task::{Request, Task};

use crate::error::{Error, ErrorKind, Result};

/// Options of a connection to a guest agent.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AgentOptions {
    /// Time limit for a command, including the sync before it, unless [`Agent::within`] sets another. 10 s.
    pub deadline: Duration,
    /// Time limit for the sync: a running agent answers within a millisecond. 5 s.
    pub sync_deadline: Duration,
    /// Longest accepted line, in bytes. 1 MiB.
    pub line_cap: usize,
}

impl Default for AgentOptions {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(10), sync_deadline: Duration::from_secs(5), line_cap: 1 << 20 }
    }
}

/// A connection to one guest's agent. Clones share it; commands run one after another.
///
/// The first command opens the socket, and the next one after it was lost opens it again. Every call may be
/// dropped at any point.
#[derive(Debug, Clone)]
pub struct Agent {
    socket: Arc<PathBuf>,
    requests: mpsc::UnboundedSender<Request>,
    owed: watch::Receiver<bool>,
    deadline: Duration,
    options: Arc<AgentOptions>,
}

impl Agent {
    /// Makes a connection over the socket of the agent's chardev. Opens nothing yet. Must be called in a
    /// tokio runtime.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self::with(socket, AgentOptions::default())
    }

    /// Makes a connection with the given options.
    pub fn with(socket: impl Into<PathBuf>, options: AgentOptions) -> Self {
        let (socket, options) = (Arc::new(socket.into()), Arc::new(options));
        let (requests, queue) = mpsc::unbounded_channel();
        let (task, owed) = Task::new(Arc::clone(&socket), Arc::clone(&options), requests.downgrade());
        tokio::spawn(task.run(queue));
        Self { socket, requests, owed, deadline: options.deadline, options }
    }

    /// Returns the same connection with another deadline for each command.
    pub fn within(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// Runs a command of `qapi_qga`.
    ///
    /// # Errors
    /// [`ErrorKind::Connect`]; [`ErrorKind::Timeout`], with [`Error::may_have_run`] false if the agent did
    /// not even answer the sync; [`ErrorKind::Refused`] or [`ErrorKind::Unsupported`] with its message;
    /// [`ErrorKind::Reply`] or [`ErrorKind::TooLong`] for an unusable reply; [`ErrorKind::Invalid`] for a
    /// freeze: see [`Agent::freeze`].
    pub async fn execute<C: QgaCommand>(&self, command: C) -> Result<C::Ok> {
        let arguments = serde_json::to_value(&command).map_err(|error| {
            let detail = format!("the arguments cannot be written as JSON: {error}");
            Error::new(ErrorKind::Invalid, C::NAME, &self.socket, detail)
        })?;
        let reply = self.execute_raw(C::NAME, arguments).await?;
        serde_json::from_value(reply).map_err(|error| {
            let detail = format!("it ran, but its reply has a form that is not known here: {error}");
            Error::new(ErrorKind::Reply, C::NAME, &self.socket, detail)
                .advise("`execute_raw` gives the reply as it is")
        })
    }

    /// Runs a command by its name. Arguments are an object, or null for none. Commands that do not answer
    /// (`guest-shutdown`, `guest-suspend-*`) end in a timeout.
    ///
    /// # Errors
    /// See [`Agent::execute`].
    pub async fn execute_raw(&self, name: &str, arguments: Value) -> Result<Value> {
        if matches!(name, link::FREEZE | link::FREEZE_LIST) {
            let detail = "a freeze by its bare name has no owner that must thaw";
            return Err(
                Error::new(ErrorKind::Invalid, name, &self.socket, detail).advise("use `Agent::freeze`")
            );
        }
        if !(arguments.is_object() || arguments.is_null()) {
            let detail = format!("the arguments must be an object, found {arguments}");
            return Err(Error::new(ErrorKind::Invalid, name, &self.socket, detail));
        }
        let (deadline, sent) = (Instant::now() + self.deadline, Arc::new(AtomicBool::new(false)));
        let (reply, receiver) = oneshot::channel();
        let request =
            Request::Run { name: name.to_owned(), arguments, deadline, sent: Arc::clone(&sent), reply };
        self.ask(name, request, receiver, deadline, &sent).await
    }

    /// Flushes and freezes the guest's file systems, and returns the guard that thaws them.
    ///
    /// The guest is thawed by [`Frozen::thaw`], by dropping the [`Frozen`], when [`Freeze::limit`] is over,
    /// or when the runtime ends. A freeze that is not answered may happen later. Then the thaw is tried until
    /// the agent answers, or its socket is gone; [`Agent::wait_for_thaw`] waits for it. (A process that is
    /// killed cannot thaw: the next process calls [`Agent::thaw`].) Even a dropped call does not leave the
    /// guest frozen.
    ///
    /// # Errors
    /// See [`Agent::execute`]; [`ErrorKind::Invalid`] if the guest is frozen already. After any error the
    /// guest is not frozen, or is being thawed.
    pub async fn freeze(&self, freeze: Freeze) -> Result<Frozen> {
        let (deadline, sent) = (Instant::now() + freeze.deadline, Arc::new(AtomicBool::new(false)));
        let (reply, receiver) = oneshot::channel();
        let request = Request::Freeze { freeze, deadline, sent: Arc::clone(&sent), reply };
        self.ask(link::FREEZE, request, receiver, deadline, &sent).await
    }

    /// Thaws the guest, whatever froze it; harmless if it is not frozen. Returns the number of thawed file
    /// systems, as the agent reports it.
    ///
    /// # Errors
    /// See [`Agent::execute`].
    pub async fn thaw(&self) -> Result<u64> {
        let (deadline, sent) = (Instant::now() + self.deadline, Arc::new(AtomicBool::new(false)));
        let (reply, receiver) = oneshot::channel();
        let request = Request::Thaw { deadline, sent: Arc::clone(&sent), reply };
        self.ask(link::THAW, request, receiver, deadline, &sent).await
    }

    /// Waits until this connection has no outstanding thaw: at once, unless a freeze is held or was not
    /// answered.
    ///
    /// # Errors
    /// [`ErrorKind::Timeout`] if one is outstanding after `patience`; the thaw is still tried.
    pub async fn wait_for_thaw(&self, patience: Duration) -> Result<()> {
        let mut owed = self.owed.clone();
        let thawed = owed.wait_for(|owed| !owed);
        match timeout_at(Instant::now() + patience, thawed).await {
            Ok(_) => Ok(()),
            Err(_) => {
                let detail = format!("the guest may still be frozen after {} s", patience.as_secs_f64());
                Err(Error::new(ErrorKind::Timeout, link::THAW, &self.socket, detail)
                    .advise("the thaw is tried again; check whether the agent in the guest hangs"))
            }
        }
    }

    /// Returns the socket's path.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    async fn ask<T>(
        &self,
        name: &str,
        request: Request,
        reply: oneshot::Receiver<Result<T>>,
        deadline: Instant,
        sent: &AtomicBool,
    ) -> Result<T> {
        let ended =
            || Error::new(ErrorKind::Lost, name, &self.socket, "the runtime that served the agent has ended");
        self.requests.send(request).map_err(|_| ended())?;
        // The task checks the deadline itself; this is for the time in its queue.
        match timeout_at(deadline + self.options.sync_deadline / 10, reply).await {
            Ok(outcome) => outcome.map_err(|_| ended())?,
            Err(_) => {
                let detail = "the agent was busy with other commands until the deadline";
                let sent = sent.load(Ordering::SeqCst);
                Err(Error::new(ErrorKind::Timeout, name, &self.socket, detail).sent(sent))
            }
        }
    }
}
