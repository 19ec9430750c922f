//! [`Machine`]: one live QEMU, and whether its guest runs.

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
    error::{Error, ErrorKind, Result},
    graph::{Graph, NodeOptions},
    hold,
    run_state::{Permits, Refusal, RunState},
};

/// How long QEMU may take to be ready for `cont` after a migration.
const FINALIZED: Duration = Duration::from_secs(30);

/// One live QEMU: a connection to it, and what everything else here is asked through. Clones share the connection.
#[derive(Debug, Clone)]
pub struct Machine {
    qmp: Qmp,
    /// Descriptor sets that were given back and that QEMU keeps until the guest runs (7.2 does).
    kept: Arc<Mutex<Vec<i64>>>,
    abilities: Arc<OnceCell<Abilities>>,
    needs_hold: Arc<OnceCell<bool>>,
    graph: Arc<Mutex<Option<RecentGraph>>>,
    /// How nodes of ours were opened, by name: QEMU does not report all of it.
    options: Arc<Mutex<HashMap<String, NodeOptions>>>,
}

/// A block graph that was read, and when.
#[derive(Debug, Clone)]
struct RecentGraph {
    graph: Arc<Graph>,
    epoch: u64,
    read: Instant,
}

/// How long a graph is believed at most: other clients of QEMU may change it.
const RECENT: Duration = Duration::from_millis(500);

/// A guest that stands still. Resumes nothing by itself: [`Machine::resume`] does.
#[derive(Debug)]
#[must_use = "a guest that was paused by this stays so until `Machine::resume`"]
pub struct Paused {
    /// Whether it ran before, and so was stopped by us.
    ours: bool,
    since: Instant,
}

impl Paused {
    /// Whether the guest ran until this stopped it.
    pub fn is_ours(&self) -> bool {
        self.ours
    }
}

impl Machine {
    /// Connects to a QMP socket.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] where nobody serves it; [`ErrorKind::Timeout`] where another client is served;
    /// [`ErrorKind::Protocol`] where it is no QMP socket.
    pub async fn connect(socket: impl AsRef<Path>) -> Result<Self> {
        let socket = socket.as_ref();
        let qmp = Qmp::connect(socket).await;
        qmp.map(Self::new).map_err(|error| Error::qmp("connecting to QEMU", socket.display(), error))
    }

    /// The machine at the end of a connection.
    pub fn new(qmp: Qmp) -> Self {
        Self {
            qmp,
            kept: Arc::default(),
            abilities: Arc::default(),
            needs_hold: Arc::default(),
            graph: Arc::default(),
            options: Arc::default(),
        }
    }

    /// The same with another deadline for each command.
    pub(crate) fn within(&self, deadline: Duration) -> Self {
        Self { qmp: self.qmp.within(deadline), ..self.clone() }
    }

    /// Notes how a node was opened.
    pub(crate) fn remember_options(&self, node: &str, options: &NodeOptions) {
        self.options.lock().unwrap_or_else(PoisonError::into_inner).insert(node.to_owned(), options.clone());
    }

    /// How a node was opened, if that is known.
    pub(crate) fn options_of(&self, node: &str) -> Option<NodeOptions> {
        self.options.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }

    /// Notes a descriptor set that must be given back again when the guest runs.
    pub(crate) fn keep(&self, set: i64) {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).push(set);
    }

    /// What this QEMU can do, by its own schema, which is asked for once a connection: it takes longer than anything else.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn abilities(&self) -> Result<&Abilities> {
        self.abilities.get_or_try_init(|| Abilities::read(self)).await
    }

    /// Whether whatever the guest writes while its memory is copied will be copied again.
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

    /// Whether its guest's requests must be held before it is stopped ([`hold`]).
    pub(crate) async fn needs_hold(&self) -> Result<bool> {
        self.needs_hold.get_or_try_init(|| hold::is_needed(self)).await.copied()
    }

    /// Says what this QEMU can do, where that was asked of the same program before.
    pub(crate) fn know(&self, abilities: Abilities) {
        // Asked already: it is the same.
        let _ = self.abilities.set(abilities);
    }

    /// The block graph as it was read last, if nothing has been done since that could have changed it; else it is read.
    pub(crate) async fn graph(&self) -> Result<Arc<Graph>> {
        let known = self.graph.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match known {
            Some(known) if known.epoch == self.qmp.epoch() && known.read.elapsed() < RECENT => {
                Ok(known.graph)
            }
            _ => self.read_graph().await,
        }
    }

    /// Reads the block graph.
    pub(crate) async fn read_graph(&self) -> Result<Arc<Graph>> {
        // What happens while it is read makes it stale.
        let (epoch, read) = (self.qmp.epoch(), Instant::now());
        let graph = Arc::new(Graph::read(self).await?);
        let recent = RecentGraph { graph: Arc::clone(&graph), epoch, read };
        *self.graph.lock().unwrap_or_else(PoisonError::into_inner) = Some(recent);
        Ok(graph)
    }

    /// The connection.
    pub fn qmp(&self) -> &Qmp {
        &self.qmp
    }

    /// The process of this QEMU, where the system tells.
    pub fn pid(&self) -> Option<u32> {
        self.qmp.peer().map(|peer| peer.pid)
    }

    /// Runs one command; `attempted` and `subject` are for the error.
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

    /// Runs one query, which has no subject but QEMU itself.
    pub(crate) async fn query(&self, command: &str, arguments: Value) -> Result<Value> {
        let socket = self.qmp.socket().display().to_string();
        self.run("asking QEMU", &socket, command, arguments).await
    }

    /// A reply that has not the form that it should have.
    pub(crate) fn odd(&self, command: &str, reply: &Value) -> Error {
        let mut text = reply.to_string();
        if text.len() > 200 {
            text.truncate((0..=200).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0));
        }
        let subject = self.qmp.socket().display();
        Error::new(ErrorKind::Protocol, format!("reading the reply to {command}"), subject, text)
    }

    /// What can be done in a run state of this QEMU.
    pub(crate) async fn permits(&self, state: &RunState) -> Result<Permits> {
        Ok(state.permits(self.abilities().await?.keeps_suspended()))
    }

    /// What a run state does not permit.
    pub(crate) fn refused(&self, attempted: &str, state: &RunState, refusal: Refusal) -> Error {
        let detail = format!("{} (QEMU's run state is {:?})", refusal.why, state.word);
        Error::new(ErrorKind::Invalid, attempted, self.qmp.socket().display(), detail).advice(refusal.advice)
    }

    /// The run state.
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

    /// Stops the guest if it runs. When this returns no processor runs, and every request of the guest's to its disks is
    /// done. May be repeated: a guest that was paused before is not ours to resume.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the guest is not there yet, on its way elsewhere, or gone (`inmigrate`, `save-vm`,
    /// `postmigrate`, ...; its disks are inactive then, and some QEMUs die of an operation on them); those of
    /// the connection. After an error the guest is as it was, save where the connection was lost.
    pub async fn pause(&self) -> Result<Paused> {
        let state = self.run_state().await?;
        let subject = self.qmp.socket().display();
        if let Err(refusal) = self.permits(&state).await?.disks {
            return Err(self.refused("pausing the guest", &state, refusal));
        }
        let since = Instant::now();
        let mut ours = state.running;
        if ours {
            // A guest whose I/O threads complete a request just then would wait for it for ever.
            let held = hold::hold(self).await;
            let stopped = self.run("pausing the guest", &subject.to_string(), "stop", Value::Null).await;
            hold::release(self, held).await;
            if let Err(error) = stopped {
                return Err(self.not_paused(error).await);
            }
            // It may have panicked, or switched itself off, just before: then it did not stop by us, and
            // `cont` is not ours.
            ours = !self.run_state().await?.stopped_by_itself();
        }
        Ok(Paused { ours, since })
    }

    /// A `stop` that was not answered may come later, when nobody waits: then a `cont` stands behind it in QEMU's queue. (QEMU
    /// drops its queue when the connection is closed: a `stop` that was not begun by then too.)
    async fn not_paused(&self, error: Error) -> Error {
        if error.kind() != ErrorKind::Timeout {
            return error;
        }
        match self.within(Duration::from_secs(1)).qmp.execute_raw("cont", Value::Null).await {
            Ok(_) => error.now("the guest was resumed"),
            Err(_) => error.now("the guest may be paused yet; QEMU was told to resume it then, and does if this connection is open still"),
        }
    }

    /// Lets the guest go on if this pause stopped it; gives how long it stood still.
    ///
    /// Tries again while QEMU finishes a migration ("Migration is not finalized yet").
    ///
    /// # Errors
    /// Those of the connection, and what QEMU said: the guest is paused then.
    pub async fn resume(&self, paused: Paused) -> Result<Duration> {
        if paused.ours {
            self.cont().await?;
        }
        Ok(paused.since.elapsed())
    }

    /// Lets the guest run, whoever paused it. Repeating it is harmless.
    ///
    /// # Errors
    /// As [`Machine::resume`].
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
                        "the guest is paused; QEMU resumes it when it answers again, if this connection is open still"
                    }
                    _ => "the guest is paused",
                };
                return Err(Error::qmp("resuming the guest", subject, error)
                    .now(now)
                    .advice("look into QEMU's log; `cont` over QMP resumes it"));
            }
            sleep(Duration::from_millis(2)).await;
        }
        let kept = std::mem::take(&mut *self.kept.lock().unwrap_or_else(PoisonError::into_inner));
        for set in kept {
            // It may be gone by itself.
            let _ = self.qmp.execute_raw("remove-fd", json!({ "fdset-id": set })).await;
        }
        Ok(())
    }

    /// Lets a guest go on that stands still because of us. One that panicked, switched itself off or met a
    /// disk's error just before we stopped it stays as it is: to go on is not ours to tell it, and QEMU may
    /// refuse it.
    ///
    /// # Errors
    /// As [`Machine::resume`].
    pub(crate) async fn let_go_on(&self) -> Result<()> {
        match self.run_state().await?.stopped_by_itself() {
            true => Ok(()),
            false => self.cont().await,
        }
    }

    /// Makes the disks of a guest usable that was loaded and has not run since: QEMU keeps them inactive until it runs, and refuses
    /// every change of their chains. A QEMU that cannot be told so (before 10.0) lets the guest run for a moment. Repeating it is
    /// harmless.
    ///
    /// # Errors
    /// Those of the connection; what QEMU said.
    pub async fn activate_disks(&self) -> Result<()> {
        let subject = self.qmp.socket().display().to_string();
        let active = json!({ "active": true });
        match self.run("activating the disks", &subject, "blockdev-set-active", active).await {
            Err(error) if error.kind() == ErrorKind::Unsupported => {
                self.cont().await?;
                self.pause().await.map(drop)
            }
            told => told.map(drop),
        }
    }

    /// Resets the guest, as its reset button does: at once, whether it runs or not. Not idempotent.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn reset(&self) -> Result<()> {
        let subject = self.qmp.socket().display().to_string();
        self.run("resetting the guest", &subject, "system_reset", json!({})).await.map(drop)
    }
}
