//! Events, as they were received, and a subscription to them.

use std::{path::PathBuf, sync::Arc};

use serde_json::{Map, Value};
use tokio::sync::broadcast;

use crate::{
    connection::Handle,
    error::{Error, ErrorKind, Result},
};

/// One event. Its name and data need not be known here.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Event {
    /// `STOP`, `JOB_STATUS_CHANGE`, ...
    pub name: String,
    /// The value of `"data"`; null if there is none.
    pub data: Value,
    /// Time of the event by the host's clock, in microseconds since 1970; `None` if QEMU did not report it.
    pub time_us: Option<i64>,
    /// All other members of the event's object.
    pub rest: Map<String, Value>,
}

impl Event {
    pub(crate) fn from_object(name: String, mut rest: Map<String, Value>) -> Self {
        let data = rest.remove("data").unwrap_or_default();
        let time_us = rest.remove("timestamp").and_then(|timestamp| {
            let part = |key| timestamp.get(key)?.as_i64().filter(|&part| part >= 0);
            part("seconds")?.checked_mul(1_000_000)?.checked_add(part("microseconds")?)
        });
        Self { name, data, time_us, rest }
    }

    /// Converts the event to one of `qapi_qmp`'s types; `None` if it is an event of another name.
    ///
    /// Fails if the data does not fit that type: a newer QEMU may send more. [`Event::data`] has all of it.
    pub fn typed<E: qapi_spec::Event>(&self) -> Option<serde_json::Result<E>> {
        (self.name == E::NAME).then(|| match &self.data {
            Value::Null => E::deserialize(Value::Object(Map::new())),
            data => E::deserialize(data),
        })
    }
}

/// Result of a subscription.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Notice {
    /// The next event.
    Event(Event),
    /// Number of events that were lost because they were not read in time: read the state again, by
    /// [`Qmp::reconcile`](crate::Qmp::reconcile) or another query.
    Missed(u64),
}

/// A subscription to the events of a connection, beginning at [`Qmp::events`](crate::Qmp::events). A
/// subscriber that does not read loses the oldest events, gets their number, and delays no other. A
/// subscription keeps the connection open.
#[derive(Debug)]
pub struct Events {
    receiver: broadcast::Receiver<Event>,
    socket: PathBuf,
    handle: Arc<Handle>,
}

impl Events {
    pub(crate) fn new(receiver: broadcast::Receiver<Event>, socket: PathBuf, handle: Arc<Handle>) -> Self {
        Self { receiver, socket, handle }
    }

    /// Returns the next event, or the number of missed ones. Waits for ever: call it with a deadline. A
    /// dropped call loses nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Lost`] if the connection is gone and all its events were read.
    pub async fn next(&mut self) -> Result<Notice> {
        match self.receiver.recv().await {
            Ok(event) => Ok(Notice::Event(event)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Ok(Notice::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => {
                let reason = self.handle.shared.lost().unwrap_or_else(|| "the connection is closed".into());
                Err(Error::new(ErrorKind::Lost, "waiting for events", &self.socket, &*reason)
                    .advise("reconnect, and reconcile: events may have been missed"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn event(value: Value) -> Event {
        match crate::message::Message::from_value(value) {
            crate::message::Message::Event(event) => event,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn an_unknown_event_with_unknown_fields_is_data() {
        let event = event(json!({"event": "NEW", "data": [1, {"x": null}], "extra": 5, "timestamp": "noon"}));
        assert_eq!((event.name.as_str(), &event.data), ("NEW", &json!([1, {"x": null}])));
        assert_eq!((event.time_us, event.rest.get("extra")), (None, Some(&json!(5))));
    }

    /// A timestamp that QEMU could not determine is none.
    #[test]
    fn missing_timestamp_is_none() {
        let time = |timestamp: Value| event(json!({"event": "E", "timestamp": timestamp})).time_us;
        assert_eq!(time(json!({"seconds": 3, "microseconds": 4})), Some(3_000_004));
        assert_eq!(time(json!({"seconds": -1, "microseconds": -1})), None);
        assert_eq!(time(json!({"seconds": i64::MAX, "microseconds": 0})), None);
    }

    /// A typed event needs its name, and unknown values are an error.
    #[test]
    fn typed_event_needs_its_name() {
        use qapi_qmp::{JOB_STATUS_CHANGE, STOP};
        let stop = event(json!({"event": "STOP"}));
        assert!(stop.typed::<STOP>().expect("its name").is_ok());
        assert!(stop.typed::<JOB_STATUS_CHANGE>().is_none());
        let job = event(json!({"event": "JOB_STATUS_CHANGE", "data": {"id": "j", "status": "levitating"}}));
        assert!(job.typed::<JOB_STATUS_CHANGE>().expect("its name").is_err());
    }
}
