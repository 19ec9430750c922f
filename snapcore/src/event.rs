//! The stream of events from which progress bars, logs and metrics are made.

use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};

use futures_core::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use tokio_util::sync::ReusableBoxFuture;

use crate::name::{DomainName, SnapshotName, Target};
use crate::operation::OperationId;
use crate::service::RecoveryReport;
use crate::shape::Plan;
use crate::step::Group;

/// One event.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "event")]
#[non_exhaustive]
pub enum Event {
    /// A plan was made and will be carried out.
    Planned {
        /// The domain.
        domain: DomainName,
        /// The plan.
        plan: Box<Plan>,
    },
    /// The operation and all its steps are in the journal.
    Started {
        /// The operation.
        operation: OperationId,
        /// The domain.
        domain: DomainName,
        /// Its kind: "create", "revert", "delete", "tidy".
        kind: String,
        /// Its snapshots.
        snapshots: Vec<SnapshotName>,
        /// Number of its steps.
        steps: u64,
        /// Bytes of data that they will move.
        bytes: u64,
    },
    /// An interrupted operation was finished, or rolled back.
    Recovered {
        /// The result of the recovery.
        report: Box<RecoveryReport>,
    },
    /// A step begins.
    StepStarted {
        /// The operation.
        operation: OperationId,
        /// The step's index, from 0.
        index: u64,
        /// The part of the plan that it belongs to.
        group: Group,
        /// The disk; absent: it is a step of the domain.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        target: Option<Target>,
        /// Description for people.
        summary: String,
        /// Bytes of data that it will move, as far as known.
        bytes: u64,
    },
    /// A step makes progress. A slow listener loses these events first.
    Progress {
        /// The operation.
        operation: OperationId,
        /// The step's index.
        index: u64,
        /// Bytes done.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A step is done, and the journal has recorded it.
    StepDone {
        /// The operation.
        operation: OperationId,
        /// The step's index.
        index: u64,
    },
    /// The commit point: from here on the operation is carried through.
    Committed {
        /// The operation.
        operation: OperationId,
    },
    /// The operation failed or was cancelled: its steps are being undone.
    Undoing {
        /// The operation.
        operation: OperationId,
        /// The reason.
        reason: String,
    },
    /// A merge was deferred.
    Postponed {
        /// The operation.
        operation: OperationId,
        /// The disk; absent: it was a step of the domain.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        target: Option<Target>,
        /// The reason.
        reason: String,
    },
    /// A warning for the user that stopped nothing.
    Warning {
        /// The domain.
        domain: DomainName,
        /// The message.
        message: String,
    },
    /// The operation has ended.
    Finished {
        /// The operation.
        operation: OperationId,
        /// True if the operation was carried out.
        happened: bool,
    },
}

/// Number of events that a listener may be behind before it loses the oldest.
const BACKLOG: usize = 1024;

/// The sender of the engine's events. Sending never waits for a listener.
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
    /// Returns a stream of all events from now on.
    pub fn subscribe(&self) -> EventStream {
        EventStream { receiving: ReusableBoxFuture::new(receive(self.sender.subscribe())) }
    }

    pub(crate) fn report(&self, event: Event) {
        // An error means that there is no listener. That is not a failure.
        let _ = self.sender.send(event);
    }
}

type Received = (Result<Event, broadcast::error::RecvError>, broadcast::Receiver<Event>);

async fn receive(mut receiver: broadcast::Receiver<Event>) -> Received {
    (receiver.recv().await, receiver)
}

/// The events since the subscription, in order. A listener that falls far behind loses the oldest; the engine
/// never waits for it. The stream ends when the service is dropped.
pub struct EventStream {
    receiving: ReusableBoxFuture<'static, Received>,
}

impl EventStream {
    /// Waits for the next event; `None` once the service is dropped.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| Pin::new(&mut *self).poll_next(context)).await
    }

    /// Returns the next event, if one is there already.
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

    /// A slow listener loses the oldest events, and the sender never waits for it.
    #[tokio::test]
    async fn slow_listener_loses_oldest_sender_never_waits() {
        let events = Events::default();
        let mut stream = events.subscribe();
        assert_eq!(stream.try_next(), None);
        for number in 0..BACKLOG + 10 {
            events.report(warning(number));
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

    /// A waiting listener is woken.
    #[tokio::test]
    async fn waiting_listener_is_woken() {
        let events = Events::default();
        let mut stream = events.subscribe();
        let waiting = tokio::spawn(async move { stream.next().await });
        tokio::task::yield_now().await;
        events.report(warning(1));
        assert_eq!(waiting.await.unwrap(), Some(warning(1)));
    }
}
