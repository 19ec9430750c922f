//! [`Machine`]: one live QEMU, and the run state of its guest.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use qmp::Qmp;
use serde_json::{Value, json};
use tokio::{sync::OnceCell, time::sleep};

use crate::{
    discover::Abilities,
    drain,
    error::{Error, ErrorKind, Result},
    graph::{Graph, NodeOptions},
    run_state::{Permits, Refusal, RunState},
};

/// Longest time until QEMU accepts `cont` after a migration.
const FINALIZED: Duration = Duration::from_secs(30);

/// One live QEMU: a connection to it, through which everything here is asked. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Machine {
    qmp: Qmp,
    /// Descriptor sets that were given back and that QEMU keeps until the guest runs (7.2 does so).
    kept: Arc<Mutex<Vec<i64>>>,
    abilities: Arc<OnceCell<Abilities>>,
    needs_drain: Arc<OnceCell<bool>>,
    graph: Arc<Mutex<Option<RecentGraph>>>,
    /// Options of our nodes by name: QEMU does not report all of them.
    options: Arc<Mutex<HashMap<String, NodeOptions>>>,
}

/// A block graph, and the time when it was read.
#[derive(Debug, Clone)]
struct RecentGraph {
    graph: Arc<Graph>,
    epoch: u64,
    until: Instant,
}

/// For how long a graph is used again: other clients of QEMU may change it.
const RECENT: Duration = Duration::from_millis(500);

/// The same, in multiples of the time that QEMU took to report it. Where that is long, other clients are as
/// slow, and reading it again would be what takes longest.
const RECENT_READS: u32 = 6;

/// A paused guest. Dropping it resumes nothing: [`Machine::resume`] does.
#[derive(Debug)]
#[must_use = "a guest that was paused by this stays so until `Machine::resume`"]
pub struct Paused {
    /// True if the guest ran before, so that we stopped it.
    ours: bool,
    since: Instant,
}

impl Paused {
    /// Returns true if the guest ran until this call stopped it.
    pub fn is_ours(&self) -> bool {
        self.ours
    }
}

impl Machine {
    /// Connects to a QMP socket.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if no QEMU is listening on it; [`ErrorKind::Timeout`] if another client is
    /// connected; [`ErrorKind::Protocol`] if it is not a QMP socket.
    pub async fn connect(socket: impl AsRef<Path>) -> Result<Self> {
        let socket = socket.as_ref();
        let qmp = Qmp::connect(socket).await;
        qmp.map(Self::new).map_err(|error| Error::qmp("connecting to QEMU", socket.display(), error))
    }

    /// Wraps an open connection.
    pub fn new(qmp: Qmp) -> Self {
        Self {
            qmp,
            kept: Arc::default(),
            abilities: Arc::default(),
            needs_drain: Arc::default(),
            graph: Arc::default(),
            options: Arc::default(),
        }
    }

    /// Returns the same machine with another deadline for each command.
    pub(crate) fn within(&self, deadline: Duration) -> Self {
        Self { qmp: self.qmp.within(deadline), ..self.clone() }
    }

    /// Records the options with which a node was opened.
    pub(crate) fn remember_options(&self, node: &str, options: &NodeOptions) {
        self.options.lock().unwrap_or_else(PoisonError::into_inner).insert(node.to_owned(), options.clone());
    }

    /// Returns the options with which a node was opened, if they are known.
    pub(crate) fn options_of(&self, node: &str) -> Option<NodeOptions> {
        self.options.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }

    /// Records a descriptor set that must be given back again when the guest runs.
    pub(crate) fn keep(&self, set: i64) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(set);
    }

    /// Returns the abilities of this QEMU, from its own schema. The schema is read once per connection,
    /// because no other query takes longer.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn abilities(&self) -> Result<&Abilities> {
        self.abilities.get_or_try_init(|| Abilities::read(self)).await
    }

    /// Returns true if everything that the guest writes while its memory is copied will be copied again.
    ///
    /// # Errors
    /// Those of the connection.
    pub(crate) async fn marks_writes(&self) -> Result<bool> {
        if self.abilities().await?.emulation_marks_writes() {
            return Ok(true);
        }
        let reply = self.query("query-kvm", Value::Null).await?;
        reply["enabled"].as_bool().ok_or_else(|| self.odd("query-kvm", &reply))
    }

    /// Returns true if the guest's requests must be held before it is stopped (see [`drain`]).
    pub(crate) async fn needs_drain(&self) -> Result<bool> {
        self.needs_drain.get_or_try_init(|| drain::is_needed(self)).await.copied()
    }

    /// Sets the abilities of this QEMU, if they were read from the same program before.
    pub(crate) fn know(&self, abilities: Abilities) {
        // Already set: the value is the same.
        let _ = self.abilities.set(abilities);
    }

    /// Returns the block graph that was read last, unless something has been done since that could have
    /// changed it. Otherwise reads it.
    pub(crate) async fn graph(&self) -> Result<Arc<Graph>> {
        let known = self.graph.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match known {
            Some(known) if known.epoch == self.qmp.epoch() && Instant::now() < known.until => Ok(known.graph),
            _ => self.read_graph().await,
        }
    }

    /// Reads the block graph.
    pub(crate) async fn read_graph(&self) -> Result<Arc<Graph>> {
        // A change during the read makes the result stale, so the epoch is taken first.
        let (epoch, read) = (self.qmp.epoch(), Instant::now());
        let graph = Arc::new(Graph::read(self).await?);
        let until = read + RECENT.max(read.elapsed() * RECENT_READS);
        let recent = RecentGraph { graph: Arc::clone(&graph), epoch, until };
        *self.graph.lock().unwrap_or_else(PoisonError::into_inner) = Some(recent);
        Ok(graph)
    }

    /// Returns the connection.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// Returns the process of this QEMU, if the system reports it.
    pub fn pid(&self) -> Option<u32> {
        self.qmp.peer().map(|peer| peer.pid)
    }

    /// Runs one command; `attempted` and `subject` go into the error.
    pub(crate) async fn run(
        &self,
        attempted: &str,
        subject: &str,
        command: &str,
        arguments: Value,
    ) -> Result<Value> {
        let reply = self.qmp.execute_raw(command, arguments).await;
        reply.map_err(|error| Error::qmp(attempted, subject, error))
    }

    /// Runs one query, whose subject is QEMU itself.
    pub(crate) async fn query(&self, command: &str, arguments: Value) -> Result<Value> {
        let socket = self.qmp.socket().display().to_string();
        self.run("asking QEMU", &socket, command, arguments).await
    }

    /// Makes the error for a reply that does not have the expected form.
    pub(crate) fn odd(&self, command: &str, reply: &Value) -> Error {
        let mut text = reply.to_string();
        if text.len() > 200 {
            text.truncate((0..=200).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0));
        }
        let subject = self.qmp.socket().display();
        Error::new(ErrorKind::Protocol, format!("reading the reply to {command}"), subject, text)
    }

    /// Returns the operations that a run state permits in this QEMU.
    pub(crate) async fn permits(&self, state: &RunState) -> Result<Permits> {
        Ok(state.permits(self.abilities().await?.keeps_suspended()))
    }

    /// Makes the error for an operation that a run state does not permit.
    pub(crate) fn refused(&self, attempted: &str, state: &RunState, refusal: Refusal) -> Error {
        let detail = format!("{} (QEMU's run state is {:?})", refusal.why, state.word);
        Error::new(ErrorKind::Invalid, attempted, self.qmp.socket().display(), detail).advise(refusal.advice)
    }

    /// Reads the run state.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn run_state(&self) -> Result<RunState> {
        let reply = self.query("query-status", Value::Null).await?;
        match (reply["running"].as_bool(), reply["status"].as_str()) {
            (Some(running), Some(word)) => Ok(RunState::new(running, word)),
            _ => Err(self.odd("query-status", &reply)),
        }
    }

    /// Stops the guest if it runs. When this returns, no processor runs and every disk request of the guest
    /// is complete. The call may be repeated. A guest that was paused before is not ours to resume.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the guest has not arrived yet, is being migrated, or is gone (`inmigrate`,
    /// `save-vm`, `postmigrate`, ...). Its disks are inactive then, and some QEMUs crash on an operation on
    /// them. Also errors of the connection. After an error the guest is as it was, unless the connection was
    /// lost.
    pub async fn pause(&self) -> Result<Paused> {
        let state = self.run_state().await?;
        let subject = self.qmp.socket().display();
        if let Err(refusal) = self.permits(&state).await?.disks {
            return Err(self.refused("pausing the guest", &state, refusal));
        }
        let since = Instant::now();
        let mut ours = state.running;
        if ours {
            // 1) Hold the requests before the stop: a guest whose I/O threads complete a request at that
            //    moment would wait for it for ever. 2) Release them whatever `stop` returned. A crash between
            //    the two leaves the requests waiting; `drain::release_left` ends that.
            let held = drain::drain(self).await;
            // Holding takes time. A `stop` of another client in between is its own, and ours has no effect
            // after it.
            let stopped_before = match self.run_state().await {
                Ok(state) => !state.running,
                Err(error) => {
                    drain::release(self, held).await;
                    return Err(error);
                }
            };
            let stopped = self.run("pausing the guest", &subject.to_string(), "stop", Value::Null).await;
            drain::release(self, held).await;
            if let Err(error) = stopped {
                return Err(self.not_paused(error).await);
            }
            // The guest may have panicked or switched itself off just before. Then we did not stop it, and
            // `cont` is not ours to send.
            ours = !stopped_before && !self.run_state().await?.stopped_by_itself();
        }
        Ok(Paused { ours, since })
    }

    /// Follows a `stop` that was not answered by a `cont`. QEMU may run the `stop` later, when no client
    /// waits for it; the `cont` is behind it in QEMU's queue. (QEMU drops its queue when the connection is
    /// closed, and with it a `stop` that has not begun.)
    async fn not_paused(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Timeout {
            return error;
        }
        match self.within(Duration::from_secs(1)).qmp.execute_raw("cont", Value::Null).await {
            Ok(_) => error.state("the guest was resumed"),
            Err(_) => error.state("the guest may still be paused; QEMU resumes it when it answers, if this connection stays open"),
        }
    }

    /// Resumes the guest if this pause stopped it. Returns the length of the pause.
    ///
    /// Tries again while QEMU finishes a migration ("Migration is not finalized yet").
    ///
    /// # Errors
    /// Errors of the connection, and what QEMU reported: the guest is paused then.
    pub async fn resume(&self, paused: Paused) -> Result<Duration> {
        if paused.ours {
            self.cont().await?;
        }
        Ok(paused.since.elapsed())
    }

    /// Resumes the guest, whatever paused it. Repeating it is harmless.
    ///
    /// # Errors
    /// See [`Machine::resume`].
    pub async fn cont(&self) -> Result<()> {
        let subject = self.qmp.socket().display().to_string();
        let until = Instant::now() + FINALIZED;
        loop {
            let error = match self.qmp.execute_raw("cont", Value::Null).await {
                Ok(_) => break,
                Err(error) => error,
            };
            let again = error.desc().is_some_and(|desc| desc.contains("not finalized"));
            if !again || Instant::now() >= until {
                let now = match error.kind() {
                    qmp::ErrorKind::Timeout => {
                        "the guest is paused; QEMU resumes it when it answers, if this connection stays open"
                    }
                    _ => "the guest is paused",
                };
                return Err(Error::qmp("resuming the guest", subject, error)
                    .state(now)
                    .advise("look into QEMU's log; `cont` over QMP resumes it"));
            }
            sleep(Duration::from_millis(2)).await;
        }
        let kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        for set in kept {
            // The set may be gone already.
            let _ = self.qmp.execute_raw("remove-fd", json!({ "fdset-id": set })).await;
        }
        Ok(())
    }

    /// Resumes a guest that is paused because of us. A guest that panicked, switched itself off or met a disk
    /// error just before the pause stays as it is: resuming it is not ours to do, and QEMU may refuse it.
    ///
    /// # Errors
    /// See [`Machine::resume`].
    pub(crate) async fn resume_unless_stopped(&self) -> Result<()> {
        match self.run_state().await?.stopped_by_itself() {
            true => Ok(()),
            false => self.cont().await,
        }
    }

    /// Makes the disks usable of a guest that was loaded and has not run since. QEMU keeps such disks
    /// inactive until the guest runs, and refuses every change of their chains. A QEMU without the command
    /// (before 10.0) runs the guest for a moment. Repeating it is harmless.
    ///
    /// # Errors
    /// Errors of the connection, and what QEMU reported.
    pub async fn activate_disks(&self) -> Result<()> {
        let subject = self.qmp.socket().display().to_string();
        let active = json!({ "active": true });
        match self.run("activating the disks", &subject, "blockdev-set-active", active).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.cont().await?;
                self.pause().await.map(drop)
            }
            other => other.map(drop),
        }
    }

    /// Resets the guest at once, as its reset button does, running or paused. Not idempotent.
    ///
    /// # Errors
    /// Errors of the connection.
    pub async fn reset(&self) -> Result<()> {
        let subject = self.qmp.socket().display().to_string();
        self.run("resetting the guest", &subject, "system_reset", json!({})).await.map(drop)
    }
}
