//! Length of the guest's pause, as QEMU reports it.

use std::time::{Duration, Instant};

use qmp::{Events, Notice};
use tokio::time::timeout;

use crate::machine::Machine;

/// Events come before the reply to the command that caused them; this limit is only for a slow QEMU.
const LATE: Duration = Duration::from_millis(200);

/// Records STOP and RESUME from now on.
#[derive(Debug)]
pub(super) struct Clock {
    events: Events,
    /// The time when we began to stop it, if we did.
    pub(super) since: Option<Instant>,
}

impl Clock {
    pub(super) fn start(machine: &Machine) -> Self {
        Self { events: machine.qmp().events(), since: None }
    }

    /// Returns the time from the last STOP to the RESUME after it; measured by our own clock if QEMU did not
    /// report it.
    pub(super) async fn stopped_for(mut self) -> Duration {
        let (mut stop, now) = (None, Instant::now());
        while let Ok(Ok(notice)) = timeout(LATE, self.events.next()).await {
            let Notice::Event(event) = notice else { break };
            match (event.name.as_str(), event.time_us, stop) {
                ("STOP", time, _) => stop = time,
                ("RESUME", Some(resume), Some(stop)) => {
                    return Duration::from_micros(u64::try_from(resume - stop).unwrap_or_default());
                }
                _ => {}
            }
        }
        self.since.map(|since| now - since).unwrap_or_default()
    }
}
