//! The tasks behind a [`Qmp`](crate::Qmp): one that reads, one that writes, and the commands that wait for a
//! reply.
//!
//! A command is queued as one whole line, and the writer writes all of it or none. So a caller that gives up
//! cannot cut a line in half. The reader never waits for others: a reply goes to its caller or is dropped, an
//! event goes to the subscribers' rings. Both tasks end with the connection, and then no caller waits any
//! longer.

use std::{
    collections::HashMap,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use serde_json::Value;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, broadcast, mpsc, oneshot, watch},
    task::AbortHandle,
};

use crate::{
    error::{Error, ErrorKind, Reported, Result, shown},
    event::Event,
    line::{CHUNK, Line, MessageSplitter},
    message::{Ids, MAX_DEPTH, Message, parse},
    socket::{self, Stream},
};

/// Limit for commands that wait for a reply, including those that were given up: so a QEMU that hangs cannot
/// make this process grow.
const OUTSTANDING: usize = 256;

/// A command's reply, or the error in place of it.
pub(crate) type Outcome = Result<std::result::Result<Value, Reported>>;

/// A queued command, and the permits that it keeps until its reply comes.
#[derive(Debug)]
struct Pending {
    name: String,
    reply: oneshot::Sender<Outcome>,
    _place: OwnedSemaphorePermit,
    /// QEMU keeps only the last descriptor that it received: the next must wait until this one was consumed.
    _fd_turn: Option<OwnedSemaphorePermit>,
}

/// One line for the writer.
#[derive(Debug)]
struct Outgoing {
    number: u64,
    line: Vec<u8>,
    fd: Option<OwnedFd>,
    pending: Pending,
    sent: Arc<AtomicBool>,
}

/// State shared by the tasks and the handle.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) socket: PathBuf,
    pub(crate) ids: Ids,
    state: Mutex<State>,
    lost: watch::Sender<Option<Arc<str>>>,
    /// Counts events and commands that may have changed QEMU.
    epoch: AtomicU64,
}

/// Returns true if a command only queries.
fn only_asks(command: &str) -> bool {
    ["query-", "qom-get", "qom-list", "x-debug-query-", "device-list-properties"]
        .iter()
        .any(|asks| command.starts_with(asks))
}

#[derive(Debug)]
struct State {
    pending: HashMap<u64, Pending>,
    greeting: Option<oneshot::Sender<Result<Value>>>,
    /// `None` once the connection is gone.
    events: Option<broadcast::Sender<Event>>,
    noise: Noise,
}

/// Lines that were not understood: reported with a command that gets no reply.
#[derive(Debug, Default, Clone)]
struct Noise {
    lines: u64,
    last: String,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the reason why the connection is gone, if it is.
    pub(crate) fn lost(&self) -> Option<Arc<str>> {
        self.lost.borrow().clone()
    }

    fn lost_error(&self, attempted: &str, reason: &str) -> Error {
        Error::new(ErrorKind::Lost, attempted, &self.socket, reason)
            .advise("reconnect, and reconcile with QEMU's state")
    }

    /// Ends the connection: all current and later callers get an error.
    fn lose(&self, reason: &str) {
        let (pending, greeting) = {
            let mut state = self.state();
            let first = self.lost.send_if_modified(|lost| {
                let first = lost.is_none();
                if first {
                    *lost = Some(reason.into());
                }
                first
            });
            if first {
                tracing::debug!(socket = %self.socket.display(), reason, "the connection is gone");
            }
            state.events = None;
            (std::mem::take(&mut state.pending), state.greeting.take())
        };
        if let Some(greeting) = greeting {
            let error = Error::new(ErrorKind::Protocol, "waiting for the greeting", &self.socket, reason)
                .advise("check that this is a QMP socket (-qmp, or a monitor in mode control), and that QEMU runs");
            let _ = greeting.send(Err(error));
        }
        for pending in pending.into_values() {
            let error = self.lost_error(&pending.name, reason).sent(true);
            let _ = pending.reply.send(Err(error));
        }
    }

    fn noise(&self, what: String) {
        tracing::debug!(socket = %self.socket.display(), what, "a line was not understood");
        let mut state = self.state();
        state.noise.lines += 1;
        state.noise.last = what;
    }

    /// Returns the epoch; see [`crate::Qmp::epoch`].
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    fn turn(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    fn answer(&self, number: u64, outcome: impl FnOnce(&Pending) -> Outcome) -> bool {
        let Some(pending) = self.state().pending.remove(&number) else { return false };
        if !only_asks(&pending.name) {
            self.turn();
        }
        let outcome = outcome(&pending);
        // The caller may have given up: then the reply is dropped.
        let _ = pending.reply.send(outcome);
        true
    }

    fn line(&self, line: Line) {
        match line {
            Line::Whole(line) => match parse(&line, MAX_DEPTH) {
                Ok(value) => self.message(Message::from_value(value), &line),
                Err(wrong) => {
                    let what = format!("it {wrong}: {}", shown(&line));
                    self.unusable(&line, ErrorKind::Reply, what);
                }
            },
            Line::TooLong { length, ends } => {
                let what = format!("it is {length} bytes long: {}", shown(&ends));
                self.unusable(&ends, ErrorKind::TooLong, what);
            }
        }
    }

    /// Handles a line that cannot be read. If a command's id is in it, it is that command's reply.
    fn unusable(&self, bytes: &[u8], kind: ErrorKind, what: String) {
        let greeting = self.state().greeting.take();
        if let Some(greeting) = greeting {
            let error = Error::new(
                ErrorKind::Protocol,
                "waiting for the greeting",
                &self.socket,
                format!("the first line is not a QMP greeting, {what}"),
            );
            let _ = greeting
                .send(Err(error.advise("give the path of a QMP socket, not of another monitor or port")));
            return;
        }
        let answered = self.ids.find(bytes).is_some_and(|number| {
            self.answer(number, |pending| {
                Err(Error::new(
                    kind,
                    &pending.name,
                    &self.socket,
                    format!("the reply cannot be read, {what}"),
                )
                .sent(true)
                .advise("the connection is still usable; ask for less, or query the result"))
            })
        });
        if !answered {
            self.noise(what);
        }
    }

    fn message(&self, message: Message, line: &[u8]) {
        match message {
            Message::Event(event) => {
                self.turn();
                if let Some(events) = &self.state().events {
                    // Without a subscriber the event is dropped.
                    let _ = events.send(event);
                }
            }
            Message::Reply { id, outcome } => {
                let number = id.as_ref().and_then(|id| self.ids.number(id));
                if !number.is_some_and(|number| self.answer(number, |_| Ok(outcome))) {
                    self.noise(format!(
                        "a reply to nothing that was asked, or that was answered: {}",
                        shown(line)
                    ));
                }
            }
            Message::Greeting(greeting) => {
                let waiting = self.state().greeting.take();
                match waiting {
                    Some(waiting) => drop(waiting.send(Ok(greeting))),
                    None => self.noise("a second greeting".to_owned()),
                }
            }
            Message::Other => self.noise(format!("neither reply nor event: {}", shown(line))),
        }
    }

    /// Returns the note on lines that were not understood, for the message of a timeout.
    pub(crate) fn noise_note(&self, before: u64) -> String {
        let noise = self.state().noise.clone();
        match noise.lines.saturating_sub(before) {
            0 => String::new(),
            lines => format!("; meanwhile {lines} lines were not understood, the last: {}", noise.last),
        }
    }

    pub(crate) fn noise_lines(&self) -> u64 {
        self.state().noise.lines
    }
}

/// The owner of a connection: dropping the last one closes the socket.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) shared: Arc<Shared>,
    next: AtomicU64,
    places: Arc<Semaphore>,
    fd_turn: Arc<Semaphore>,
    outgoing: mpsc::UnboundedSender<Outgoing>,
    events: Mutex<Option<broadcast::Receiver<Event>>>,
    tasks: [AbortHandle; 2],
}

impl Drop for Handle {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Handle {
    /// Starts the tasks on an open stream. The receiver gets the greeting.
    pub(crate) fn start(
        stream: Stream,
        socket: PathBuf,
        line_cap: usize,
        event_ring: usize,
    ) -> (Self, oneshot::Receiver<Result<Value>>) {
        let (greeting_sender, greeting) = oneshot::channel();
        let (events, first_subscriber) = broadcast::channel(event_ring.max(1));
        let shared = Arc::new(Shared {
            socket,
            ids: Ids::new(),
            state: Mutex::new(State {
                pending: HashMap::new(),
                greeting: Some(greeting_sender),
                events: Some(events),
                noise: Noise::default(),
            }),
            lost: watch::Sender::new(None),
            epoch: AtomicU64::new(0),
        });
        let stream = Arc::new(stream);
        let (outgoing, queue) = mpsc::unbounded_channel();
        let reader = tokio::spawn(read(Arc::clone(&shared), Arc::clone(&stream), line_cap));
        let writer = tokio::spawn(write(Arc::clone(&shared), stream, queue));
        let handle = Self {
            shared,
            next: AtomicU64::new(1),
            places: Arc::new(Semaphore::new(OUTSTANDING)),
            fd_turn: Arc::new(Semaphore::new(1)),
            outgoing,
            events: Mutex::new(Some(first_subscriber)),
            tasks: [reader.abort_handle(), writer.abort_handle()],
        };
        (handle, greeting)
    }

    /// Makes a subscription; the first one also gets the events before it.
    pub(crate) fn subscribe(&self) -> broadcast::Receiver<Event> {
        let first = self.events.lock().unwrap_or_else(PoisonError::into_inner).take();
        first
            .or_else(|| self.shared.state().events.as_ref().map(broadcast::Sender::subscribe))
            .unwrap_or_else(
                // The connection is gone: return a ring without a sender.
                || broadcast::channel(1).1,
            )
    }

    /// Waits until the connection is gone.
    pub(crate) async fn closed(&self) {
        // The sender is part of `shared`, which outlives this call.
        let _ = self.shared.lost.subscribe().wait_for(Option::is_some).await;
    }

    /// Queues one command and waits for its outcome. `line` makes the command's line from its id. `sent`
    /// becomes true before the first byte is written. The future may be dropped at any point.
    pub(crate) async fn command(
        &self,
        name: &str,
        line: impl FnOnce(&str) -> Vec<u8>,
        fd: Option<OwnedFd>,
        sent: Arc<AtomicBool>,
    ) -> Outcome {
        let lost = || {
            let reason = self.shared.lost().unwrap_or_else(|| "the connection is closed".into());
            self.shared.lost_error(name, &reason)
        };
        let places = async {
            let fd_turn = match &fd {
                Some(_) => Some(Arc::clone(&self.fd_turn).acquire_owned().await),
                None => None,
            };
            (Arc::clone(&self.places).acquire_owned().await, fd_turn.transpose())
        };
        let (place, fd_turn) = tokio::select! {
            biased;
            () = self.closed() => return Err(lost()),
            places = places => places,
        };
        // The semaphores are never closed.
        let (Ok(place), Ok(fd_turn)) = (place, fd_turn) else { return Err(lost()) };
        if !only_asks(name) {
            self.shared.turn();
        }
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let (reply, receiver) = oneshot::channel();
        let pending = Pending { name: name.to_owned(), reply, _place: place, _fd_turn: fd_turn };
        let line = line(&self.shared.ids.id(number));
        if self.outgoing.send(Outgoing { number, line, fd, pending, sent }).is_err() {
            return Err(lost());
        }
        receiver.await.unwrap_or_else(|_| Err(lost()))
    }
}

async fn read(shared: Arc<Shared>, stream: Arc<Stream>, line_cap: usize) {
    let mut lines = MessageSplitter::new(line_cap);
    let mut buffer = vec![0; CHUNK];
    let reason = loop {
        match socket::read(&stream, &mut buffer).await {
            Ok(0) => break "the other side closed the connection".to_owned(),
            Ok(count) => {
                lines.push(buffer.get(..count).unwrap_or_default(), |line| shared.line(line));
                // A flood of input must not keep other tasks of this thread from running, timers among them.
                tokio::task::yield_now().await;
            }
            Err(error) => break format!("reading failed: {error}"),
        }
    };
    let reason = match lines.unfinished() {
        (0, _) => reason,
        (length, head) => format!("{reason} inside a line, after {length} bytes of it: {}", shown(head)),
    };
    shared.lose(&reason);
}

async fn write(shared: Arc<Shared>, stream: Arc<Stream>, mut queue: mpsc::UnboundedReceiver<Outgoing>) {
    let mut gone = shared.lost.subscribe();
    let mut broken = None::<String>;
    while let Some(Outgoing { number, line, fd, pending, sent }) = queue.recv().await {
        let reason = broken.clone().or_else(|| shared.lost().map(|reason| reason.to_string()));
        if let Some(reason) = reason {
            let error = shared.lost_error(&pending.name, &reason);
            let _ = pending.reply.send(Err(error));
            continue;
        }
        sent.store(true, Ordering::SeqCst);
        if pending.reply.is_closed() {
            // Given up before its first byte was written: it is not sent at all.
            continue;
        }
        {
            // Under the lock that `lose` takes: either `lose` finds this command, or this task finds that the
            // connection is gone.
            let mut state = shared.state();
            if let Some(reason) = shared.lost() {
                drop(state);
                let _ = pending.reply.send(Err(shared.lost_error(&pending.name, &reason)));
                continue;
            }
            state.pending.insert(number, pending);
        }
        let mut written = 0;
        let result = tokio::select! {
            result = socket::write_all(&stream, &line, fd, &mut written) => result,
            // `lose` notifies the callers that wait.
            _ = gone.wait_for(Option::is_some) => continue,
        };
        if let Err(error) = result {
            // Nothing more can be written; input from QEMU is still read to its end.
            let reason = format!("writing failed: {error}");
            shared.answer(number, |pending| {
                // Without its last brace and the line's end, it is not a command.
                let whole = written + 2 > line.len();
                Err(shared.lost_error(&pending.name, &reason).sent(whole).because(error))
            });
            broken = Some(reason);
        }
    }
}
