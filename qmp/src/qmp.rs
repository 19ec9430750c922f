//! [`Qmp`]: a connection to one QEMU.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use qapi_qmp::QmpCommand;
use serde_json::{Value, json};
use tokio::{
    net::UnixStream,
    sync::OnceCell,
    time::{Instant, timeout_at},
};

use crate::{
    connection::Handle,
    error::{Error, ErrorKind, Result},
    event::Events,
    message::command,
    reconcile::Reconciled,
    schema::Schema,
    socket::{self, Other, Patience, Peer, Stream},
};

/// How a connection behaves.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Within which a command must be answered, unless [`Qmp::within`] says otherwise. 30 s.
    pub deadline: Duration,
    /// Within which the socket must open, greet, and agree on capabilities. 10 s.
    pub connect_deadline: Duration,
    /// Whether a socket that is not there yet, or that nobody serves yet, is waited for within `connect_deadline`: for a
    /// QEMU that is being started. No.
    pub await_socket: bool,
    /// The longest line that is read, in bytes. 64 MiB. (Ask `query-named-block-nodes` with `flat`: without it, its reply
    /// grows with the square of a chain's length, to megabytes at sixty layers.)
    pub line_cap: usize,
    /// How many events are kept for a subscriber that does not take them. 1024.
    pub event_ring: usize,
    /// Whether out-of-band commands are asked for where QEMU offers them. Yes.
    pub oob: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            deadline: Duration::from_secs(30),
            connect_deadline: Duration::from_secs(10),
            await_socket: false,
            line_cap: 64 << 20,
            event_ring: 1024,
            oob: true,
        }
    }
}

/// What QEMU said when the connection opened.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Greeting {
    /// Major, minor, micro; to be shown. What QEMU can do, [`Qmp::schema`] tells.
    pub version: Option<(u64, u64, u64)>,
    /// The capabilities that it offered.
    pub capabilities: Vec<String>,
    /// The value of `"QMP"`, whole.
    pub raw: Value,
}

impl Greeting {
    fn from_value(raw: Value) -> Self {
        let version = raw.pointer("/version/qemu").and_then(|qemu| {
            let part = |key| qemu.get(key).and_then(Value::as_u64);
            Some((part("major")?, part("minor")?, part("micro")?))
        });
        let capabilities =
            raw.get("capabilities").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        let capabilities = capabilities.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        Self { version, capabilities, raw }
    }
}

/// A connection to one QEMU. Clones share it; the last one dropped closes it.
///
/// Every call may be dropped at any point (or raced, or put under a timeout of its own): the reply is then dropped when it
/// comes, and the connection stays usable. A command that was given up before it was written is not sent.
#[derive(Debug, Clone)]
pub struct Qmp {
    handle: Arc<Handle>,
    about: Arc<About>,
    deadline: Duration,
}

#[derive(Debug)]
struct About {
    options: Options,
    greeting: Greeting,
    oob: bool,
    peer: Option<Peer>,
    passes_descriptors: bool,
    schema: OnceCell<Arc<Schema>>,
}

impl Qmp {
    /// Connects to the QMP socket at a path, or to `tcp:HOST:PORT` of the loopback interface.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] where the address is not one of these;
    /// [`ErrorKind::Connect`] where the socket cannot be opened; [`ErrorKind::Protocol`] where it is no QMP socket;
    /// [`ErrorKind::Timeout`] where no greeting comes: QEMU serves one client of a socket at a time.
    pub async fn connect(socket: impl AsRef<Path>) -> Result<Self> {
        Self::connect_with(socket, Options::default()).await
    }

    /// Connects with other options than the default ones.
    ///
    /// # Errors
    /// As [`Qmp::connect`].
    pub async fn connect_with(socket: impl AsRef<Path>, options: Options) -> Result<Self> {
        let deadline = Instant::now() + options.connect_deadline;
        let patience = if options.await_socket { Patience::Absent } else { Patience::Busy };
        let stream = socket::open(socket.as_ref(), patience, deadline).await?;
        Self::greet(stream, socket.as_ref().to_owned(), options, deadline).await
    }

    /// Takes a stream that is open already, and has read nothing yet; `name` stands for its path in errors.
    ///
    /// # Errors
    /// As [`Qmp::connect`], but never [`ErrorKind::Connect`].
    pub async fn from_stream(stream: UnixStream, name: impl Into<PathBuf>, options: Options) -> Result<Self> {
        let deadline = Instant::now() + options.connect_deadline;
        Self::greet(Stream::Unix(stream), name.into(), options, deadline).await
    }

    async fn greet(stream: Stream, socket: PathBuf, options: Options, deadline: Instant) -> Result<Self> {
        let (other, passes_descriptors) = (Other::of(&stream), stream.passes_descriptors());
        let (handle, greeting) = Handle::start(stream, socket.clone(), options.line_cap, options.event_ring);
        let attempted = "waiting for the greeting";
        let greeting = match timeout_at(deadline, greeting).await {
            Ok(Ok(greeting)) => Greeting::from_value(greeting?),
            Ok(Err(_)) => {
                return Err(Error::new(ErrorKind::Lost, attempted, &socket, "the connection is closed"));
            }
            Err(_) => {
                let seconds = options.connect_deadline.as_secs_f64();
                let detail = format!("none within {seconds} s{}", handle.shared.noise_note(0));
                return Err(Error::new(ErrorKind::Timeout, attempted, &socket, detail).advice(
                    "QEMU serves one client of a QMP socket at a time: close the other one, or give QEMU a second socket; \
                     or it hangs, or this is a guest agent's socket",
                ));
            }
        };
        let oob = options.oob && greeting.capabilities.iter().any(|capability| capability == "oob");
        let left = deadline.saturating_duration_since(Instant::now());
        let peer = other.peer();
        let about = About { options, greeting, oob, peer, passes_descriptors, schema: OnceCell::new() };
        let qmp = Self { handle: Arc::new(handle), deadline: left, about: Arc::new(about) };
        let enable = if oob { json!({ "enable": ["oob"] }) } else { Value::Null };
        qmp.execute_raw("qmp_capabilities", enable).await?;
        Ok(qmp.within(qmp.about.options.deadline))
    }

    /// The same connection with another deadline for each command.
    pub fn within(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// Runs a command of `qapi_qmp`'s.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] or [`ErrorKind::Unsupported`] with what QEMU said; [`ErrorKind::Timeout`];
    /// [`ErrorKind::Lost`]; [`ErrorKind::Reply`] where the reply has a form that the type does not know: the command has
    /// run then, and [`Qmp::execute_raw`] gives the reply as it is.
    pub async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok> {
        let reply = self.run(C::NAME, self.arguments(&command)?, false, None).await?;
        self.typed::<C>(reply)
    }

    /// Runs a command by its name. Arguments are an object, or null for none.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_raw(&self, name: &str, arguments: Value) -> Result<Value> {
        self.run(name, arguments, false, None).await
    }

    /// Runs a command out of band: at once, even while another one is being carried out.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; [`ErrorKind::Unsupported`] where out-of-band was not agreed on. QEMU refuses it for most
    /// commands.
    pub async fn execute_oob<C: QmpCommand>(&self, command: C) -> Result<C::Ok> {
        let reply = self.execute_oob_raw(C::NAME, self.arguments(&command)?).await?;
        self.typed::<C>(reply)
    }

    /// Runs a command out of band, by its name.
    ///
    /// # Errors
    /// As [`Qmp::execute_oob`].
    pub async fn execute_oob_raw(&self, name: &str, arguments: Value) -> Result<Value> {
        if !self.about.oob {
            let detail = "out-of-band commands were not agreed on when the connection opened";
            return Err(Error::new(ErrorKind::Unsupported, name, self.socket(), detail)
                .advice("run it in band, or connect with `Options::oob` to a QEMU that offers them"));
        }
        self.run(name, arguments, true, None).await
    }

    /// Runs a command that takes a file descriptor (`getfd`, `add-fd`). The descriptor is duplicated; QEMU gets one of its
    /// own. Commands with descriptors go one at a time: QEMU keeps only the last descriptor that came.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; [`ErrorKind::Invalid`] where the descriptor cannot be duplicated;
    /// [`ErrorKind::Unsupported`] over TCP.
    pub async fn execute_with_fd(&self, name: &str, arguments: Value, fd: impl AsFd) -> Result<Value> {
        if !self.passes_descriptors() {
            let detail = "file descriptors cannot be passed over TCP";
            return Err(Error::new(ErrorKind::Unsupported, name, self.socket(), detail)
                .advice("give QEMU a Unix socket too (-qmp unix:PATH,server=on,wait=off)"));
        }
        let fd = fd.as_fd().try_clone_to_owned().map_err(|error| {
            Error::new(ErrorKind::Invalid, name, self.socket(), "the file descriptor cannot be duplicated")
                .source(error)
        })?;
        self.run(name, arguments, false, Some(fd)).await
    }

    /// Gives QEMU a descriptor under a name, for commands that take such a name (`fd:NAME` of a migration).
    ///
    /// # Errors
    /// As [`Qmp::execute_with_fd`].
    pub async fn get_fd(&self, name: &str, fd: impl AsFd) -> Result<()> {
        self.execute_with_fd("getfd", json!({ "fdname": name }), fd).await.map(drop)
    }

    /// Adds a descriptor to a set of QEMU's, a new one by default. `/dev/fdset/ID` then opens it.
    ///
    /// The set keeps its descriptors, and with them their image locks, until `remove-fd`.
    ///
    /// # Errors
    /// As [`Qmp::execute_with_fd`].
    pub async fn add_fd(
        &self,
        set: Option<i64>,
        opaque: Option<&str>,
        fd: impl AsFd,
    ) -> Result<qapi_qmp::AddfdInfo> {
        let command = qapi_qmp::add_fd { fdset_id: set, opaque: opaque.map(str::to_owned) };
        let reply = self.execute_with_fd("add-fd", self.arguments(&command)?, fd).await?;
        self.typed::<qapi_qmp::add_fd>(reply)
    }

    /// Subscribes to events. The first subscription of a connection has those since the greeting, later ones begin here.
    pub fn events(&self) -> Events {
        Events::new(self.handle.subscribe(), self.socket().to_owned(), Arc::clone(&self.handle))
    }

    /// A number that grows whenever a command that does more than ask was sent or answered, and with each event. As long as it
    /// is the same, nothing is known here to have changed QEMU; another client of it still may have.
    pub fn epoch(&self) -> u64 {
        self.handle.shared.epoch()
    }

    /// What this QEMU can do, by its own account. Asked for once a connection.
    ///
    /// # Errors
    /// As [`Qmp::execute`]; a failure is not kept, the next call asks again.
    pub async fn schema(&self) -> Result<Arc<Schema>> {
        let schema = self.about.schema.get_or_try_init(|| async {
            let reply = self.execute_raw("query-qmp-schema", Value::Null).await?;
            Schema::from_value(&reply).map(Arc::new).map_err(|wrong| {
                Error::new(ErrorKind::Reply, "query-qmp-schema", self.socket(), wrong).sent(true)
            })
        });
        schema.await.cloned()
    }

    /// What QEMU is doing now: run state, jobs, drives.
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn reconcile(&self) -> Result<Reconciled> {
        Reconciled::read(self).await
    }

    /// Connects anew to the same socket, waiting up to `patience` for it to be served, and reads what QEMU is doing now:
    /// commands that were under way when the connection was lost may have run, events may have been missed, and it may be
    /// another QEMU ([`Reconciled::same_process`]).
    ///
    /// # Errors
    /// As [`Qmp::connect`] and [`Qmp::reconcile`].
    pub async fn reconnect(&self, patience: Duration) -> Result<(Self, Reconciled)> {
        let deadline = Instant::now() + patience;
        loop {
            let (qmp, mut reconciled) = match self.connect_again(deadline).await {
                Ok(both) => both,
                // It accepted, and then ended: it is being started again.
                Err(error)
                    if matches!(error.kind(), ErrorKind::Lost | ErrorKind::Protocol)
                        && Instant::now() < deadline =>
                {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
                Err(error) => return Err(error),
            };
            reconciled.same_process = match (self.peer(), qmp.peer()) {
                (Some(before), Some(now)) => Some(before == now),
                _ => None,
            };
            return Ok((qmp, reconciled));
        }
    }

    async fn connect_again(&self, deadline: Instant) -> Result<(Self, Reconciled)> {
        let stream = socket::open(self.socket(), Patience::Absent, deadline).await?;
        let options = self.about.options.clone();
        let greeted = deadline.max(Instant::now() + options.connect_deadline);
        let qmp =
            Self::greet(stream, self.socket().to_owned(), options, greeted).await?.within(self.deadline);
        let reconciled = qmp.reconcile().await?;
        Ok((qmp, reconciled))
    }

    /// What QEMU said when the connection opened.
    pub fn greeting(&self) -> &Greeting {
        &self.about.greeting
    }

    /// Returns true if descriptors can be passed: over a Unix socket, not over TCP.
    pub fn passes_descriptors(&self) -> bool {
        self.about.passes_descriptors
    }

    /// Whether out-of-band commands were agreed on.
    pub fn has_oob(&self) -> bool {
        self.about.oob
    }

    /// The process at the other end, where the system tells.
    pub fn peer(&self) -> Option<Peer> {
        self.about.peer
    }

    /// The socket's address: its path, or `tcp:HOST:PORT`.
    pub fn socket(&self) -> &Path {
        &self.handle.shared.socket
    }

    /// Whether the connection is gone.
    pub fn is_closed(&self) -> bool {
        self.handle.shared.lost().is_some()
    }

    /// Waits until the connection is gone: after `quit`, until QEMU has closed it.
    pub async fn closed(&self) {
        self.handle.closed().await;
    }

    async fn run(&self, name: &str, arguments: Value, oob: bool, fd: Option<OwnedFd>) -> Result<Value> {
        if !(arguments.is_object() || arguments.is_null()) {
            let detail = format!("the arguments must be an object, found {arguments}");
            return Err(Error::new(ErrorKind::Invalid, name, self.socket(), detail));
        }
        let sent = Arc::new(AtomicBool::new(false));
        let noise = self.handle.shared.noise_lines();
        let begun = Instant::now();
        let line = |id: &str| command(oob, name, arguments, Some(id));
        match timeout_at(begun + self.deadline, self.handle.command(name, line, fd, Arc::clone(&sent))).await
        {
            Ok(outcome) => {
                let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                tracing::debug!(asked = name, took_us, "QEMU answered");
                outcome?.map_err(|reported| Error::reported(name, self.socket(), "QEMU", reported))
            }
            Err(_) => {
                // The future that waited is gone by now: the writer that finds this not set will not send it.
                let sent = sent.load(Ordering::SeqCst);
                let how = if sent { "no reply" } else { "it could not even be sent" };
                let detail = format!(
                    "{how} within {} s{}",
                    self.deadline.as_secs_f64(),
                    self.handle.shared.noise_note(noise)
                );
                Err(Error::new(ErrorKind::Timeout, name, self.socket(), detail).sent(sent).advice(
                    "QEMU is busy or hangs; the connection is still usable: wait longer, or query what came of it",
                ))
            }
        }
    }

    fn arguments<C: QmpCommand>(&self, command: &C) -> Result<Value> {
        serde_json::to_value(command).map_err(|error| {
            let detail = format!("the arguments cannot be written as JSON: {error}");
            Error::new(ErrorKind::Invalid, C::NAME, self.socket(), detail)
        })
    }

    fn typed<C: QmpCommand>(&self, reply: Value) -> Result<C::Ok> {
        serde_json::from_value(reply).map_err(|error| {
            let detail = format!("it ran, but its reply has a form that is not known here: {error}");
            Error::new(ErrorKind::Reply, C::NAME, self.socket(), detail)
                .advice("the connection is still usable; `execute_raw` gives the reply as it is")
        })
    }
}
