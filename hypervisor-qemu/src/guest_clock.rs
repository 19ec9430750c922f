//! The guest's clock, which is as old as the memory after a revert.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use qmp::Agent;
use serde_json::json;

use crate::error::{Error, ErrorKind, Result};
use crate::guest_exec;

/// Time limit of the program that sets the clock.
const SETTING: Duration = Duration::from_secs(2);

/// Sets the guest's clock to the host's, through the guest agent. May be repeated.
///
/// Many agents also set the hardware clock, by a program that small guests lack (`hwclock`), and refuse then.
/// So where the agent refuses, it is asked to run `date`.
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
    let Err(error) = set else { return Ok(()) };
    let error = Error::qmp(attempted, subject, error);
    if !matches!(error.kind(), ErrorKind::Refused | ErrorKind::Unsupported) {
        return Err(error);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = format!("@{}", now.as_secs());
    // The agent's own refusal says more than that of a program which the guest does not have.
    guest_exec::run(agent, "date", &["-s", &seconds], &[], &[], SETTING).await.map_err(|_| error)
}
