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
    peer::{Other, Peer},
    reconcile::Reconciled,
    schema::Schema,
    socket::{self, Patience, Stream},
};

/// Options of a connection.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Options {
    /// Time limit for a command, unless [`Qmp::within`] sets another. 30 s.
    pub deadline: Duration,
    /// Time limit for opening the socket, the greeting, and the capabilities. 10 s.
    pub connect_deadline: Duration,
    /// True if a missing socket, or one without a listener, is awaited within `connect_deadline`: for a QEMU
    /// that is being started. Default: false.
    pub await_socket: bool,
    /// Longest accepted line, in bytes. 64 MiB. (Use `query-named-block-nodes` with `flat`: without it, its
    /// reply grows with the square of a chain's length, to megabytes at sixty layers.)
    pub line_cap: usize,
    /// Number of events kept for a subscriber that does not read them. 1024.
    pub event_ring: usize,
    /// True if out-of-band commands are requested from a QEMU that offers them. Default: true.
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

/// QEMU's greeting.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Greeting {
    /// Major, minor, micro; for display only. [`Qmp::schema`] has QEMU's abilities.
    pub version: Option<(u64, u64, u64)>,
    /// The capabilities that QEMU offers.
    pub capabilities: Vec<String>,
    /// The whole value of `"QMP"`.
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

/// A connection to one QEMU. Clones share it; dropping the last one closes it.
///
/// Every call may be dropped at any point (or raced, or put under its own timeout). Its reply is then dropped
/// when it comes, and the connection stays usable. A command that was given up before it was written is not
/// sent.
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
    /// Connects to the QMP socket at a path, or to `tcp:HOST:PORT` on the loopback interface.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the address is neither; [`ErrorKind::Connect`] if the socket cannot be
    /// opened; [`ErrorKind::Protocol`] if it is not a QMP socket; [`ErrorKind::Timeout`] if no greeting
    /// comes: QEMU serves one client of a socket at a time.
    pub async fn connect(socket: impl AsRef<Path>) -> Result<Self> {
        Self::connect_with(socket, Options::default()).await
    }

    /// Connects with the given options.
    ///
    /// # Errors
    /// See [`Qmp::connect`].
    pub async fn connect_with(socket: impl AsRef<Path>, options: Options) -> Result<Self> {
        let deadline = Instant::now() + options.connect_deadline;
        let patience = if options.await_socket { Patience::Absent } else { Patience::Busy };
        let stream = socket::open(socket.as_ref(), patience, deadline).await?;
        Self::greet(stream, socket.as_ref().to_owned(), options, deadline).await
    }

    /// Uses a stream that is open already, and that has read nothing yet; `name` replaces its path in errors.
    ///
    /// # Errors
    /// See [`Qmp::connect`], but never [`ErrorKind::Connect`].
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
                return Err(Error::new(ErrorKind::Timeout, attempted, &socket, detail).advise(
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

    /// Returns the same connection with another deadline for each command.
    pub fn within(&self, deadline: Duration) -> Self {
        Self { deadline, ..self.clone() }
    }

    /// Runs a command of `qapi_qmp`.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] or [`ErrorKind::Unsupported`] with QEMU's message; [`ErrorKind::Timeout`];
    /// [`ErrorKind::Lost`]; [`ErrorKind::Reply`] if the reply does not fit the command's type. The command
    /// has run then, and [`Qmp::execute_raw`] returns its reply unparsed.
    pub async fn execute<C: QmpCommand>(&self, command: C) -> Result<C::Ok> {
        let reply = self.run(C::NAME, self.arguments(&command)?, false, None).await?;
        self.typed::<C>(reply)
    }

    /// Runs a command by its name. Arguments are an object, or null for none.
    ///
    /// # Errors
    /// See [`Qmp::execute`].
    pub async fn execute_raw(&self, name: &str, arguments: Value) -> Result<Value> {
        self.run(name, arguments, false, None).await
    }

    /// Runs a command out of band: at once, even while another one runs.
    ///
    /// # Errors
    /// See [`Qmp::execute`]; [`ErrorKind::Unsupported`] if out-of-band was not negotiated. QEMU refuses it
    /// for most commands.
    pub async fn execute_oob<C: QmpCommand>(&self, command: C) -> Result<C::Ok> {
        let reply = self.execute_oob_raw(C::NAME, self.arguments(&command)?).await?;
        self.typed::<C>(reply)
    }

    /// Runs a command out of band, by its name.
    ///
    /// # Errors
    /// See [`Qmp::execute_oob`].
    pub async fn execute_oob_raw(&self, name: &str, arguments: Value) -> Result<Value> {
        if !self.about.oob {
            let detail = "out-of-band commands were not agreed on when the connection opened";
            return Err(Error::new(ErrorKind::Unsupported, name, self.socket(), detail)
                .advise("run it in band, or connect with `Options::oob` to a QEMU that offers them"));
        }
        self.run(name, arguments, true, None).await
    }

    /// Runs a command that takes a file descriptor (`getfd`, `add-fd`). The descriptor is duplicated; QEMU
    /// gets its own. Commands with descriptors are sent one at a time, because QEMU keeps only the last
    /// descriptor that came.
    ///
    /// # Errors
    /// See [`Qmp::execute`]; [`ErrorKind::Invalid`] if the descriptor cannot be duplicated;
    /// [`ErrorKind::Unsupported`] over TCP.
    pub async fn execute_with_fd(&self, name: &str, arguments: Value, fd: impl AsFd) -> Result<Value> {
        if !self.passes_descriptors() {
            let detail = "file descriptors cannot be passed over TCP";
            return Err(Error::new(ErrorKind::Unsupported, name, self.socket(), detail)
                .advise("give QEMU a Unix socket too (-qmp unix:PATH,server=on,wait=off)"));
        }
        let fd = fd.as_fd().try_clone_to_owned().map_err(|error| {
            Error::new(ErrorKind::Invalid, name, self.socket(), "the file descriptor cannot be duplicated")
                .because(error)
        })?;
        self.run(name, arguments, false, Some(fd)).await
    }

    /// Passes QEMU a descriptor under a name, for commands that take such a name (`fd:NAME` of a migration).
    ///
    /// # Errors
    /// See [`Qmp::execute_with_fd`].
    pub async fn get_fd(&self, name: &str, fd: impl AsFd) -> Result<()> {
        self.execute_with_fd("getfd", json!({ "fdname": name }), fd).await.map(drop)
    }

    /// Adds a descriptor to a set in QEMU, a new one by default. `/dev/fdset/ID` then opens it.
    ///
    /// The set keeps its descriptors, and with them their image locks, until `remove-fd`.
    ///
    /// # Errors
    /// See [`Qmp::execute_with_fd`].
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

    /// Subscribes to events. The first subscription of a connection gets those since the greeting; later ones
    /// begin at the call.
    pub fn events(&self) -> Events {
        Events::new(self.handle.subscribe(), self.socket().to_owned(), Arc::clone(&self.handle))
    }

    /// Returns a number that grows with each event, and whenever a command that is not a mere query was sent
    /// or answered. As long as it is the same, nothing known here has changed QEMU; another client may still
    /// have.
    pub fn epoch(&self) -> u64 {
        self.handle.shared.epoch()
    }

    /// Returns QEMU's own schema, which is read once per connection.
    ///
    /// # Errors
    /// See [`Qmp::execute`]; a failure is not cached, the next call asks again.
    pub async fn schema(&self) -> Result<Arc<Schema>> {
        let schema = self.about.schema.get_or_try_init(|| async {
            let reply = self.execute_raw("query-qmp-schema", Value::Null).await?;
            Schema::from_value(&reply).map(Arc::new).map_err(|wrong| {
                Error::new(ErrorKind::Reply, "query-qmp-schema", self.socket(), wrong).sent(true)
            })
        });
        schema.await.cloned()
    }

    /// Reads QEMU's current state: run state, jobs, drives.
    ///
    /// # Errors
    /// See [`Qmp::execute`].
    pub async fn reconcile(&self) -> Result<Reconciled> {
        Reconciled::read(self).await
    }

    /// Connects to the same socket again, waiting up to `patience` for a listener, and reads QEMU's current
    /// state. Commands that ran when the connection was lost may have completed, events may have been missed,
    /// and it may be another QEMU ([`Reconciled::same_process`]).
    ///
    /// # Errors
    /// See [`Qmp::connect`] and [`Qmp::reconcile`].
    pub async fn reconnect(&self, patience: Duration) -> Result<(Self, Reconciled)> {
        let deadline = Instant::now() + patience;
        loop {
            let (qmp, mut reconciled) = match self.connect_again(deadline).await {
                Ok(both) => both,
                // The listener accepted the connection and ended: QEMU is being restarted.
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

    /// Returns QEMU's greeting.
    pub fn greeting(&self) -> &Greeting {
        &self.about.greeting
    }

    /// Returns true if descriptors can be passed: over a Unix socket, not over TCP.
    pub fn passes_descriptors(&self) -> bool {
        self.about.passes_descriptors
    }

    /// Returns true if out-of-band commands were negotiated.
    pub fn has_oob(&self) -> bool {
        self.about.oob
    }

    /// Returns the process at the other end, if the system reports it.
    pub fn peer(&self) -> Option<Peer> {
        self.about.peer
    }

    /// Returns the socket's address: its path, or `tcp:HOST:PORT`.
    pub fn socket(&self) -> &Path {
        &self.handle.shared.socket
    }

    /// Returns true if the connection is gone.
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
                // The future that waited is dropped by now: a writer that finds this not set will not send
                // the command.
                let sent = sent.load(Ordering::SeqCst);
                let how = if sent { "no reply" } else { "it could not be sent" };
                let detail = format!(
                    "{how} within {} s{}",
                    self.deadline.as_secs_f64(),
                    self.handle.shared.noise_note(noise)
                );
                Err(Error::new(ErrorKind::Timeout, name, self.socket(), detail).sent(sent).advise(
                    "QEMU is busy or hangs; the connection is still usable: wait longer, or query the result",
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
                .advise("the connection is still usable; `execute_raw` gives the reply as it is")
        })
    }
}
