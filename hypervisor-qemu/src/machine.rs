//! [`Machine`]: one live QEMU, and whether its guest runs.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use qmp::Qmp;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::{sync::OnceCell, time::sleep};

use crate::{
    discover::Abilities,
    error::{Error, ErrorKind, Result},
    graph::Graph,
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
    graph: Arc<Mutex<Option<RecentGraph>>>,
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

/// `query-status`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunState {
    /// Whether the guest's processors run.
    pub running: bool,
    /// QEMU's word: `running`, `paused`, `postmigrate`, `restore-vm`, `shutdown`, ...
    pub word: String,
}

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
        Self { qmp, kept: Arc::default(), abilities: Arc::default(), graph: Arc::default() }
    }

    /// The same with another deadline for each command.
    pub(crate) fn within(&self, deadline: Duration) -> Self {
        Self { qmp: self.qmp.within(deadline), ..self.clone() }
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

    /// Whether the guest runs.
    ///
    /// # Errors
    /// Those of the connection.
    pub async fn run_state(&self) -> Result<RunState> {
        let reply = self.query("query-status", Value::Null).await?;
        match (reply["running"].as_bool(), reply["status"].as_str()) {
            (Some(running), Some(word)) => Ok(RunState { running, word: word.to_owned() }),
            _ => Err(self.odd("query-status", &reply)),
        }
    }

    /// Stops the guest if it runs. When this returns no processor runs, and every request of the guest's to its disks is
    /// done. May be repeated: a guest that was paused before is not ours to resume.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the guest is not there yet, on its way elsewhere, or gone (`inmigrate`, `save-vm`,
    /// `postmigrate`, ...; its disks are inactive then, and some QEMUs die of an operation on them); those of the connection. After an error the guest is as it was, save where the connection was lost.
    pub async fn pause(&self) -> Result<Paused> {
        let state = self.run_state().await?;
        let subject = self.qmp.socket().display();
        match state.word.as_str() {
            "inmigrate" | "save-vm" | "finish-migrate" | "colo" | "postmigrate" => {
                let detail = format!("it is in the run state {:?}", state.word);
                return Err(Error::new(ErrorKind::Invalid, "pausing the guest", subject, detail)
                    .advice("wait until it has arrived, or end what another program does with it; after a migration to a file, resume it"));
            }
            _ => {}
        }
        let since = Instant::now();
        // A guest that sleeps (S3) can wake at any time.
        let ours = state.running || state.word == "suspended";
        if ours {
            let stopped = self.run("pausing the guest", &subject.to_string(), "stop", Value::Null).await;
            if let Err(error) = stopped {
                return Err(self.not_paused(error).await);
            }
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
