//! The task of one agent: it runs one exchange after another, never cuts one, and has the duty to thaw.
//!
//! The duty begins before the first byte of a freeze is written and ends when the agent has answered a thaw
//! after it. In between the task returns to it, whatever happens to the callers. If the task itself is
//! dropped (the runtime ends), its drop thaws.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    sync::{mpsc, oneshot, watch},
    time::{Instant, sleep_until},
};

use super::{
    AgentOptions, Freeze, Frozen, Thaw,
    link::{self, FREEZE, FREEZE_LIST, Link, STATUS, THAW},
};
use crate::error::{Error, ErrorKind, Reported, Result};

/// Time between two tries to thaw: at first, and at most.
const RETRY: Duration = Duration::from_millis(100);
const MAX_RETRY: Duration = Duration::from_secs(2);
/// If the socket is gone for this time, the guest does not exist any more.
const GONE: Duration = Duration::from_secs(10);
/// Longest delay of the runtime's end for a thaw.
const LAST_RESORT: Duration = Duration::from_secs(3);

/// A request to the task.
#[derive(Debug)]
pub(super) enum Request {
    Run {
        name: String,
        arguments: Value,
        deadline: Instant,
        sent: Arc<AtomicBool>,
        reply: oneshot::Sender<Result<Value>>,
    },
    Freeze {
        freeze: Freeze,
        deadline: Instant,
        sent: Arc<AtomicBool>,
        reply: oneshot::Sender<Result<Frozen>>,
    },
    Thaw {
        deadline: Instant,
        sent: Arc<AtomicBool>,
        reply: oneshot::Sender<Result<u64>>,
    },
    /// The end of a [`Frozen`].
    Release {
        number: u64,
        since: Instant,
        reply: Option<oneshot::Sender<Result<Thaw>>>,
    },
}

/// An outstanding thaw.
#[derive(Debug)]
struct Owed {
    /// Number of its freeze.
    number: u64,
    /// Time when it is due: the limit of a freeze that is held, or the next try.
    due: Instant,
    /// True if the freeze has no holder any more.
    overdue: bool,
    retry: Duration,
    /// Time since which the socket cannot be opened.
    gone_since: Option<Instant>,
}

/// The task's state.
#[derive(Debug)]
pub(super) struct Task {
    socket: Arc<PathBuf>,
    options: Arc<AgentOptions>,
    requests: mpsc::WeakUnboundedSender<Request>,
    link: Option<Link>,
    owed: Option<Owed>,
    owed_sender: watch::Sender<bool>,
    freezes: u64,
}

impl Task {
    pub(super) fn new(
        socket: Arc<PathBuf>,
        options: Arc<AgentOptions>,
        requests: mpsc::WeakUnboundedSender<Request>,
    ) -> (Self, watch::Receiver<bool>) {
        let (owed_sender, receiver) = watch::channel(false);
        (Self { socket, options, requests, link: None, owed: None, owed_sender, freezes: 0 }, receiver)
    }

    pub(super) async fn run(mut self, mut queue: mpsc::UnboundedReceiver<Request>) {
        let mut open = true;
        while open || self.owed.is_some() {
            let due = self.owed.as_ref().map(|owed| owed.due);
            tokio::select! {
                biased;
                () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {
                    self.due().await;
                }
                request = queue.recv(), if open => match request {
                    Some(request) => self.serve(request).await,
                    // No caller is left: an outstanding thaw is due at once.
                    None => {
                        open = false;
                        self.make_due();
                    }
                },
            }
        }
    }

    async fn serve(&mut self, request: Request) {
        match request {
            Request::Run { name, arguments, deadline, sent, reply } => {
                if !reply.is_closed() {
                    let outcome = self.run_command(&name, arguments, deadline, &sent).await;
                    let _ = reply.send(outcome);
                }
            }
            Request::Freeze { freeze, deadline, sent, reply } => {
                if !reply.is_closed() {
                    let outcome = self.freeze(freeze, deadline, &sent).await;
                    // If the caller is gone, this drops the `Frozen`, which releases it.
                    let _ = reply.send(outcome);
                }
            }
            Request::Thaw { deadline, sent, reply } => {
                let outcome = self.thaw_once(deadline, Some(&sent)).await.map(|(filesystems, _)| filesystems);
                let _ = reply.send(outcome);
            }
            Request::Release { number, since, reply } => {
                let outcome = self.release(number, since).await;
                if let Some(reply) = reply {
                    let _ = reply.send(outcome);
                }
            }
        }
    }

    async fn run_command(
        &mut self,
        name: &str,
        arguments: Value,
        deadline: Instant,
        sent: &AtomicBool,
    ) -> Result<Value> {
        // Not beyond the time at which a frozen guest must be thawed.
        let deadline = self.owed.as_ref().map_or(deadline, |owed| deadline.min(owed.due));
        self.in_time(name, deadline)?;
        self.sync(deadline).await?;
        sent.store(true, Ordering::SeqCst);
        self.exchange(name, arguments, deadline).await?.map_err(|reported| self.reported(name, reported))
    }

    async fn freeze(&mut self, freeze: Freeze, deadline: Instant, sent: &AtomicBool) -> Result<Frozen> {
        let socket = Arc::clone(&self.socket);
        let already = |detail: &str, advice: &str| {
            Err(Error::new(ErrorKind::Invalid, FREEZE, &socket, detail).advise(advice))
        };
        if self.owed.is_some() {
            let advice = "thaw it first; `Agent::wait_for_thaw` waits for an outstanding thaw";
            return already("this connection has frozen the guest already", advice);
        }
        self.in_time(FREEZE, deadline)?;
        self.sync(deadline).await?;
        if self.status(deadline).await?.as_deref() == Some("frozen") {
            let advice = "another tool holds it, or a freeze has outlived its tool: `Agent::thaw` ends it";
            return already("the guest is frozen already", advice);
        }
        let Some(requests) = self.requests.upgrade() else {
            return Err(Error::new(ErrorKind::Lost, FREEZE, &self.socket, "its caller has gone"));
        };
        self.freezes += 1;
        let number = self.freezes;
        let (name, arguments) = match freeze.mountpoints.as_slice() {
            [] => (FREEZE, Value::Null),
            mountpoints => (FREEZE_LIST, json!({ "mountpoints": mountpoints })),
        };
        sent.store(true, Ordering::SeqCst);
        // From here on a thaw is outstanding: due as soon as this exchange is over, unless it succeeds. It is
        // recorded before the first byte is written, so that no failure can leave a frozen guest without it.
        self.set_owed(Some(Owed {
            number,
            due: Instant::now(),
            overdue: true,
            retry: RETRY,
            gone_since: None,
        }));
        let advice = "the guest is being thawed, in case it froze; `Agent::wait_for_thaw` waits for it";
        let filesystems =
            match self.exchange(name, arguments, deadline).await.map_err(|e| e.advise(advice))? {
                Ok(reply) => reply.as_u64().unwrap_or_default(),
                Err(reported) => return Err(self.reported(name, reported).advise(advice)),
            };
        let since = Instant::now();
        let limit = since + freeze.limit;
        if let Some(owed) = &mut self.owed {
            (owed.due, owed.overdue) = (limit, false);
        }
        Ok(Frozen { number, filesystems, since, limit, requests: Some(requests), socket })
    }

    async fn release(&mut self, number: u64, since: Instant) -> Result<Thaw> {
        let Some(owed) = self.owed.as_ref().filter(|owed| owed.number == number) else {
            // The limit was over, and the thaw was answered.
            return Ok(Thaw { filesystems: 0, held: false, frozen_for: since.elapsed() });
        };
        let held = !owed.overdue;
        self.make_due();
        let deadline = Instant::now() + self.options.deadline;
        let thawed = self.thaw_once(deadline, None).await;
        self.tried(thawed.as_ref().err());
        let (filesystems, was_frozen) = thawed?;
        Ok(Thaw { filesystems, held: held && was_frozen, frozen_for: since.elapsed() })
    }

    /// Thaws when the limit of a freeze is over, or when the next try is due.
    async fn due(&mut self) {
        self.make_due();
        let deadline = Instant::now() + self.options.deadline;
        let thawed = self.thaw_once(deadline, None).await;
        self.tried(thawed.as_ref().err());
    }

    fn make_due(&mut self) {
        if let Some(owed) = &mut self.owed {
            (owed.due, owed.overdue) = (Instant::now(), true);
        }
    }

    /// Records a failed try to thaw; a successful one has cleared the outstanding thaw.
    fn tried(&mut self, failure: Option<&Error>) {
        let (Some(owed), Some(failure)) = (&mut self.owed, failure) else { return };
        tracing::warn!(error = %failure, "the guest may still be frozen; the thaw is tried again");
        let now = Instant::now();
        let gone_since = match failure.kind() {
            ErrorKind::Connect | ErrorKind::Lost => Some(*owed.gone_since.get_or_insert(now)),
            _ => None,
        };
        owed.gone_since = gone_since;
        if gone_since.is_some_and(|since| now.duration_since(since) >= GONE) {
            tracing::warn!(socket = %self.socket.display(), "the agent's socket is gone: nothing is left to thaw");
            self.set_owed(None);
            return;
        }
        owed.due = now + owed.retry;
        owed.retry = (owed.retry * 2).min(MAX_RETRY);
    }

    /// Tries to thaw once. Returns the number of file systems, and true if they were frozen until now.
    /// Success clears the outstanding thaw.
    async fn thaw_once(&mut self, deadline: Instant, sent: Option<&AtomicBool>) -> Result<(u64, bool)> {
        self.in_time(THAW, deadline)?;
        self.sync(deadline).await?;
        let was_frozen = self.status(deadline).await?.is_none_or(|status| status == "frozen");
        if let Some(sent) = sent {
            sent.store(true, Ordering::SeqCst);
        }
        let filesystems = match self.exchange(THAW, Value::Null, deadline).await? {
            Ok(reply) => reply.as_u64().unwrap_or_default(),
            Err(reported) => return Err(self.reported(THAW, reported).advise("it is tried again")),
        };
        if self.status(deadline).await?.as_deref() == Some("frozen") {
            let detail = "the agent reports a thaw, and that the guest is frozen";
            return Err(Error::new(ErrorKind::Reply, THAW, &self.socket, detail).sent(true));
        }
        self.set_owed(None);
        Ok((filesystems, was_frozen))
    }

    /// Asks the agent for its state: `thawed`, `frozen`; `None` if it does not report one.
    async fn status(&mut self, deadline: Instant) -> Result<Option<String>> {
        let reply = self.exchange(STATUS, Value::Null, deadline).await?;
        Ok(reply.ok().and_then(|status| status.as_str().map(str::to_owned)))
    }

    fn set_owed(&mut self, owed: Option<Owed>) {
        self.owed = owed;
        self.owed_sender.send_replace(self.owed.is_some());
    }

    fn in_time(&self, name: &str, deadline: Instant) -> Result<()> {
        if Instant::now() < deadline {
            return Ok(());
        }
        let detail = "the agent was busy until the deadline, or the guest is due to be thawed";
        Err(Error::new(ErrorKind::Timeout, name, &self.socket, detail))
    }

    async fn sync(&mut self, deadline: Instant) -> Result<()> {
        let deadline = deadline.min(Instant::now() + self.options.sync_deadline);
        let mut fresh = false;
        loop {
            let link = match &mut self.link {
                Some(link) => link,
                none => {
                    fresh = true;
                    none.insert(Link::open(&self.socket, self.options.line_cap, deadline).await?)
                }
            };
            let outcome = link.sync(&self.socket, deadline).await;
            if link.is_broken() {
                self.link = None;
                // The previous socket may have ended long ago: try once more on a new one.
                if outcome.is_err() && !fresh {
                    continue;
                }
            }
            return outcome;
        }
    }

    async fn exchange(
        &mut self,
        name: &str,
        arguments: Value,
        deadline: Instant,
    ) -> Result<std::result::Result<Value, Reported>> {
        let Some(link) = &mut self.link else {
            return Err(Error::new(ErrorKind::Lost, name, &self.socket, "the connection is closed"));
        };
        let outcome = link.exchange(name, arguments, &self.socket, deadline).await;
        if link.is_broken() {
            self.link = None;
        }
        outcome
    }

    fn reported(&self, name: &str, reported: Reported) -> Error {
        Error::reported(name, &self.socket, "the guest agent", reported)
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.owed.is_none() {
            return;
        }
        let thawed = match &self.link {
            Some(link) => link.thaw_blocking(LAST_RESORT),
            None => {
                link::open_blocking(&self.socket).and_then(|stream| link::thaw_blocking(stream, LAST_RESORT))
            }
        };
        match thawed {
            Ok(()) => {
                tracing::warn!(socket = %self.socket.display(), "thawed the guest as the runtime ended")
            }
            Err(error) => tracing::error!(
                socket = %self.socket.display(), %error,
                "the guest may still be frozen, and the runtime ends: thaw it by guest-fsfreeze-thaw"
            ),
        }
    }
}
