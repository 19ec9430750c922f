//! What happens while it happens: the stream that progress bars, logs and metrics are drawn from.

use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use futures_core::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use tokio_util::sync::ReusableBoxFuture;

use crate::service::RecoveryReport;
use crate::{DomainName, Group, OperationId, Plan, SnapshotName, Target};

/// One thing that happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "event")]
#[non_exhaustive]
pub enum Event {
    /// A plan was made and will be carried out.
    Planned {
        /// On which domain.
        domain: DomainName,
        /// What will be done.
        plan: Box<Plan>,
    },
    /// The operation and all its steps are in the journal.
    Started {
        /// The operation.
        operation: OperationId,
        /// On which domain.
        domain: DomainName,
        /// What it is: "create", "revert", "delete", "tidy".
        kind: String,
        /// The snapshots that it is about.
        snapshots: Vec<SnapshotName>,
        /// How many steps it has.
        steps: u64,
        /// Bytes of data that they will move.
        bytes: u64,
    },
    /// An operation that had stopped half way was finished, or undone.
    Recovered {
        /// What was done.
        report: Box<RecoveryReport>,
    },
    /// A step begins.
    StepStarted {
        /// The operation.
        operation: OperationId,
        /// Which step, from 0.
        index: u64,
        /// When it runs.
        group: Group,
        /// Which disk.
        target: Target,
        /// What it does, for people.
        summary: String,
        /// Bytes of data that it will move, as far as can be told.
        bytes: u64,
    },
    /// A step is under way. A slow listener loses these first.
    Progress {
        /// The operation.
        operation: OperationId,
        /// Which step.
        index: u64,
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A step is done, and the journal knows it.
    StepDone {
        /// The operation.
        operation: OperationId,
        /// Which step.
        index: u64,
    },
    /// The commit point: from here on it happened.
    Committed {
        /// The operation.
        operation: OperationId,
    },
    /// It did not happen: steps are being taken back.
    Undoing {
        /// The operation.
        operation: OperationId,
        /// Why.
        reason: String,
    },
    /// A merge was put off.
    Postponed {
        /// The operation.
        operation: OperationId,
        /// Which disk.
        target: Target,
        /// Why.
        reason: String,
    },
    /// Something that the user should know and that stopped nothing.
    Warning {
        /// On which domain.
        domain: DomainName,
        /// What.
        message: String,
    },
    /// The operation has ended.
    Finished {
        /// The operation.
        operation: OperationId,
        /// Whether it happened.
        happened: bool,
    },
}

/// How many events a listener may be behind before it loses the oldest.
const BACKLOG: usize = 1024;

/// Where the engine tells what happens. Telling never waits for a listener.
#[derive(Debug, Clone)]
pub struct Events {
    sender: broadcast::Sender<Event>,
}

impl Default for Events {
    fn default() -> Self {
        Self { sender: broadcast::Sender::new(BACKLOG) }
    }
}

impl Events {
    /// A stream of all events from now on.
    pub fn subscribe(&self) -> EventStream {
        EventStream { receiving: ReusableBoxFuture::new(receive(self.sender.subscribe())) }
    }

    pub(crate) fn tell(&self, event: Event) {
        // An error means that nobody listens, which is no error.
        let _ = self.sender.send(event);
    }
}

type Received = (Result<Event, broadcast::error::RecvError>, broadcast::Receiver<Event>);

async fn receive(mut receiver: broadcast::Receiver<Event>) -> Received {
    (receiver.recv().await, receiver)
}

/// The events since the subscription, in order. A listener that falls far behind loses the oldest; the engine never
/// waits for it. It ends when the service is gone.
pub struct EventStream {
    receiving: ReusableBoxFuture<'static, Received>,
}

impl EventStream {
    /// The next event; `None` once the service is gone.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    /// The next event, if one is there already.
    pub fn try_next(&mut self) -> Option<Event> {
        match Pin::new(self).poll_next(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(event) => event,
            Poll::Pending => None,
        }
    }
}

impl Stream for EventStream {
    type Item = Event;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        loop {
            let (received, receiver) = ready!(self.receiving.poll(context));
            self.receiving.set(receive(receiver));
            match received {
                Ok(event) => return Poll::Ready(Some(event)),
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => return Poll::Ready(None),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warning(number: usize) -> Event {
        Event::Warning { domain: DomainName::new("web").unwrap(), message: number.to_string() }
    }

    #[tokio::test]
    async fn a_listener_that_falls_behind_loses_the_oldest_and_the_teller_never_waits() {
        let events = Events::default();
        let mut stream = events.subscribe();
        assert_eq!(stream.try_next(), None);
        for number in 0..BACKLOG + 10 {
            events.tell(warning(number));
        }
        assert_eq!(stream.next().await, Some(warning(10)));
        assert_eq!(stream.try_next(), Some(warning(11)));
        drop(events);
        let mut last = None;
        while let Some(event) = stream.next().await {
            last = Some(event);
        }
        assert_eq!(last, Some(warning(BACKLOG + 9)));
    }

    #[tokio::test]
    async fn a_listener_that_waits_is_woken() {
        let events = Events::default();
        let mut stream = events.subscribe();
        let waiting = tokio::spawn(async move { stream.next().await });
        tokio::task::yield_now().await;
        events.tell(warning(1));
        assert_eq!(waiting.await.unwrap(), Some(warning(1)));
    }
}
