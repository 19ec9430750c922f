//! Programs that the guest agent runs in the guest.

use std::time::{Duration, Instant};

use base64::{Engine, engine::general_purpose::STANDARD};
use qmp::Agent;
use serde_json::{Value, json};
use tokio::time::sleep;

use crate::error::{Error, ErrorKind, Result};

/// Characters of a program's output that are shown.
const SHOWN: usize = 400;

/// Time between two looks at a program that runs.
const LOOK: Duration = Duration::from_millis(50);

/// Runs a program, and waits until it ends. `environment` has `NAME=VALUE` each.
///
/// # Errors
/// [`ErrorKind::Failed`] if it ends with another status than 0, with the end of its output;
/// [`ErrorKind::Timeout`] if it does not end in time, and runs on; the agent's.
pub(crate) async fn run(
    agent: &Agent,
    program: &str,
    arguments: &[&str],
    environment: &[String],
    input: &[u8],
    limit: Duration,
) -> Result<()> {
    let attempted = format!("running {program} in the guest");
    let subject = agent.socket().display().to_string();
    let until = Instant::now() + limit;
    let mut ask = json!({ "path": program, "arg": arguments, "capture-output": true });
    if !environment.is_empty() {
        ask["env"] = json!(environment);
    }
    if !input.is_empty() {
        ask["input-data"] = Value::from(STANDARD.encode(input));
    }
    let begun = agent.execute_raw("guest-exec", ask).await;
    let begun = begun.map_err(|error| Error::qmp(&attempted, &subject, error))?;
    loop {
        let status = agent.execute_raw("guest-exec-status", json!({ "pid": begun["pid"] })).await;
        let status = status.map_err(|error| Error::qmp(&attempted, &subject, error))?;
        if status["exited"] == true {
            let code = status["exitcode"].as_i64();
            if code == Some(0) {
                return Ok(());
            }
            let ended = match (code, status["signal"].as_i64()) {
                (Some(code), _) => format!("it ended with the status {code}"),
                (None, Some(signal)) => format!("the signal {signal} ended it"),
                (None, None) => "it ended without a status".to_owned(),
            };
            let said = [&status["err-data"], &status["out-data"]].map(shown).join(" ");
            let detail = match said.trim() {
                "" => ended,
                said => format!("{ended}, and said: {said}"),
            };
            return Err(Error::new(ErrorKind::Failed, attempted, subject, detail));
        }
        if Instant::now() >= until {
            let detail = format!("it has not ended within {} s", limit.as_secs());
            return Err(Error::new(ErrorKind::Timeout, attempted, subject, detail));
        }
        sleep(LOOK).await;
    }
}

/// The end of an output, in one line. The guest decides it.
fn shown(data: &Value) -> String {
    let bytes = data.as_str().and_then(|text| STANDARD.decode(text).ok()).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let line: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let skipped = line.chars().count().saturating_sub(SHOWN);
    line.chars().skip(skipped).collect()
}
