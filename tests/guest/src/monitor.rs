//! QMP and the guest agent, from code that is not async: each call has a thread and a runtime of its own, so
//! that it may be made inside of a runtime too, and leaves the socket free for the test.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context, Result, anyhow};
use qmp::{Agent, Options, Qmp};
use serde_json::Value;
use tokio::{runtime, time};

/// How long another client of a socket is waited for.
const GREETING: Duration = Duration::from_secs(240);

/// Runs `work` to its end.
pub(crate) fn block_on<T: Send>(work: impl AsyncFnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let run = || {
            let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(work())
        };
        scope.spawn(run).join().unwrap_or_else(|_| Err(anyhow!("the monitor's thread panicked")))
    })
}

/// A connection to a QEMU that may just be starting.
pub(crate) async fn connect(socket: &Path, deadline: Duration) -> Result<Qmp> {
    let mut options = Options::default();
    options.await_socket = true;
    options.connect_deadline = deadline;
    options.deadline = deadline;
    Ok(Qmp::connect_with(socket, options).await?)
}

/// One command.
pub(crate) fn execute(socket: &Path, deadline: Duration, name: &str, arguments: Value) -> Result<Value> {
    let busy = "the socket is free between two calls of a Guest: does the test hold it, or is the task that shall close it kept \
                waiting by this very call? (then: #[tokio::test(flavor = \"multi_thread\")])";
    block_on(async || {
        let qmp = connect(socket, deadline.min(GREETING)).await.context(busy)?;
        Ok(qmp.within(deadline).execute_raw(name, arguments).await?)
    })
}

/// One command for the guest agent.
pub(crate) fn agent(socket: &Path, deadline: Duration, name: &str, arguments: Value) -> Result<Value> {
    block_on(async || Ok(Agent::new(socket).within(deadline).execute_raw(name, arguments).await?))
}

/// Waits until the guest agent answers.
pub(crate) fn await_agent(socket: &Path, deadline: Duration) -> Result<()> {
    let wait = async || {
        let agent = Agent::new(socket);
        while agent.execute_raw("guest-ping", Value::Null).await.is_err() {
            time::sleep(Duration::from_millis(20)).await;
        }
    };
    block_on(async || {
        let waited = time::timeout(deadline, wait()).await;
        waited.with_context(|| format!("the guest agent did not answer within {deadline:?}"))
    })
}
