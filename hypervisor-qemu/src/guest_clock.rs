//! The guest's clock, which is as old as the memory after a revert.

use std::time::{SystemTime, UNIX_EPOCH};

use qmp::Agent;
use serde_json::json;

use crate::error::{Error, Result};

/// Sets the guest's clock to the host's, through the guest agent. May be repeated.
///
/// # Errors
/// [`crate::ErrorKind::Lost`] and [`crate::ErrorKind::Timeout`] if no agent answers;
/// [`crate::ErrorKind::Unsupported`] and [`crate::ErrorKind::Refused`] with its message. The system clock may
/// then be set and the hardware clock not (an agent sets both).
pub async fn set_guest_clock(agent: &Agent) -> Result<()> {
    let attempted = "setting the guest's clock";
    let subject = agent.socket().display();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let nanoseconds = i64::try_from(now.as_nanos()).unwrap_or(i64::MAX);
    let set = agent.execute_raw("guest-set-time", json!({ "time": nanoseconds })).await;
    set.map(drop).map_err(|error| Error::qmp(attempted, subject, error))
}
