//! One running plug-in: its process, and the calls that wait for its answers.

use std::collections::{HashMap, HashSet};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use serde::Serialize;
use serde_json::{Map, Value};
use snapcore::{Error, ErrorKind, Result};
use tokio::sync::Notify;

use crate::checks;
use crate::protocol::{CancelParams, Failure, Method, ProgressParams};
use crate::stderr::StderrTail;

/// Limits enforced on a plug-in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Time limit for its start and its greeting.
    pub start: Duration,
    /// Time limit without news of a call: no answer, and no progress beyond the previous one.
    pub silence: Duration,
    /// The longest frame, in bytes.
    pub frame: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { start: Duration::from_secs(10), silence: Duration::from_secs(60), frame: 8 << 20 }
    }
}

impl Limits {
    /// Sets the time limit without news, and limits the start to it.
    #[must_use]
    pub fn silence(mut self, time: Duration) -> Self {
        self.silence = time;
        self.start = self.start.min(time);
        self
    }

    /// Sets the longest frame, in bytes.
    #[must_use]
    pub fn frame(mut self, bytes: usize) -> Self {
        self.frame = bytes;
        self
    }
}

/// Variables that every plug-in gets, if domsnap has them.
const VARIABLES: [&str; 5] = ["PATH", "HOME", "TMPDIR", "TZ", "LANG"];

/// Selects the environment of the plug-in `name` from `all` variables of domsnap: what a program needs to
/// run, and what the user set for this plug-in. Others are left out, because they may contain tokens for
/// other programs.
fn environment(
    name: &str,
    all: impl Iterator<Item = (OsString, OsString)>,
) -> impl Iterator<Item = (OsString, OsString)> {
    let own = format!("DOMSNAP_PLUGIN_{}_", name.to_ascii_uppercase().replace('-', "_"));
    all.filter(move |(variable, _)| {
        let is_own = variable.as_bytes().starts_with(own.as_bytes());
        is_own || VARIABLES.iter().any(|known| variable == known)
    })
    .chain([("LC_ALL".into(), "C".into())])
}

/// Number of requests that may wait for a plug-in to read them.
const QUEUE: usize = 64;

/// Bytes of a bad frame that an error shows.
const SHOWN: usize = 120;

/// One call that waits for its answer.
#[derive(Debug, Default)]
pub(crate) struct Call {
    updates: Mutex<Updates>,
    changed: Notify,
    changed_blocking: Condvar,
}

#[derive(Debug, Default)]
struct Updates {
    answer: Option<std::result::Result<Value, Broken>>,
    failure: Option<Failure>,
    progress: Option<(u64, u64)>,
}

/// Updates of a call.
#[derive(Debug)]
pub(crate) enum News {
    /// Nothing new.
    Nothing,
    /// Progress.
    Progress(u64, u64),
    /// The call succeeded.
    Answer(Value),
    /// The call failed, as the plug-in reported.
    Failure(Failure),
    /// The connection to the plug-in has ended.
    Broken(Broken),
}

impl Call {
    fn update(&self, change: impl FnOnce(&mut Updates)) {
        change(&mut self.updates.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_one();
        self.changed_blocking.notify_all();
    }

    /// Takes the latest news.
    pub(crate) fn news(&self) -> News {
        let mut updates = self.updates.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(failure) = updates.failure.take() {
            return News::Failure(failure);
        }
        match (updates.answer.take(), updates.progress.take()) {
            (Some(Ok(answer)), _) => News::Answer(answer),
            (Some(Err(broken)), _) => News::Broken(broken),
            (None, Some((done, total))) => News::Progress(done, total),
            (None, None) => News::Nothing,
        }
    }

    /// Waits until there may be news.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits on this thread until the call ends. Returns [`News::Nothing`] if it does not end in time.
    fn ended(&self, time: Duration) -> News {
        let begun = Instant::now();
        loop {
            match self.news() {
                News::Nothing | News::Progress(..) => {}
                ended => return ended,
            }
            let left = time.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return News::Nothing;
            }
            let updates = self.updates.lock().unwrap_or_else(PoisonError::into_inner);
            if updates.answer.is_none() && updates.failure.is_none() {
                let _ = self.changed_blocking.wait_timeout(updates, left);
            }
        }
    }
}

/// The reason for which a connection has ended.
#[derive(Debug, Clone)]
pub(crate) struct Broken {
    kind: ErrorKind,
    message: String,
}

impl Broken {
    /// Converts it to the error of a call.
    pub(crate) fn error(&self) -> Error {
        Error::new(self.kind, self.message.clone())
    }
}

#[derive(Default)]
struct Calls {
    next: u64,
    waiting: HashMap<u64, Arc<Call>>,
    /// Calls that no caller waits for any more, and that are still to be answered.
    given_up: HashSet<u64>,
    broken: Option<Broken>,
}

/// State shared by the connection and its reader.
struct Shared {
    name: String,
    program: Utf8PathBuf,
    calls: Mutex<Calls>,
    child: Mutex<Child>,
    stderr: Arc<StderrTail>,
    /// Locked while the connection is being ended.
    breaking: Mutex<()>,
}

/// A running plug-in. It is killed when this is dropped.
pub(crate) struct Connection {
    shared: Arc<Shared>,
    requests: Option<SyncSender<Vec<u8>>>,
    limits: Limits,
}

impl Connection {
    /// Starts the program. The caller must greet it before any other call.
    ///
    /// # Errors
    /// If the program cannot be run.
    pub(crate) fn start(name: &str, program: &Utf8Path, limits: Limits) -> Result<Self> {
        let failed = |cause: std::io::Error| {
            Error::new(ErrorKind::Io, format!("the plug-in {name} ({program}) cannot be started"))
                .because(cause)
        };
        // The plug-in gets a process group of its own. So an interrupt at the terminal only reaches domsnap,
        // and the children of the plug-in end with it.
        let mut child = Command::new(program)
            .env_clear()
            .envs(environment(name, std::env::vars_os()))
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let (Some(stdin), Some(stdout), Some(stderr)) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            return Err(Error::new(ErrorKind::Internal, "a child without the pipes that were asked for"));
        };
        let stderr = StderrTail::of(stderr).map_err(failed)?;
        let shared = Arc::new(Shared {
            name: name.to_owned(),
            program: program.to_owned(),
            calls: Mutex::default(),
            child: Mutex::new(child),
            breaking: Mutex::default(),
            stderr,
        });
        let requests = write_on_a_thread(stdin).map_err(failed)?;
        let reader = shared.clone();
        std::thread::Builder::new()
            .name("plug-in's answers".to_owned())
            .spawn(move || reader.read(BufReader::new(stdout), limits.frame))
            .map_err(failed)?;
        Ok(Self { shared, requests: Some(requests), limits })
    }

    /// The plug-in's process, which leads a group of its own.
    pub(crate) fn process(&self) -> u32 {
        self.shared.child.lock().unwrap_or_else(std::sync::PoisonError::into_inner).id()
    }

    /// The limits of this plug-in.
    pub(crate) fn limits(&self) -> Limits {
        self.limits
    }

    /// The reason for which the connection has ended, if it has.
    pub(crate) fn broken(&self) -> Option<Broken> {
        self.shared.calls().broken.clone()
    }

    /// Sends a request.
    pub(crate) fn send(&self, method: Method, params: &impl Serialize) -> Result<(u64, Arc<Call>)> {
        let call = Arc::new(Call::default());
        let id = {
            let mut calls = self.shared.calls();
            if let Some(broken) = &calls.broken {
                return Err(broken.error());
            }
            calls.next += 1;
            let id = calls.next;
            calls.waiting.insert(id, call.clone());
            id
        };
        let sent = self.write(method.name(), Some(id), params);
        if let Err(error) = sent {
            self.shared.calls().waiting.remove(&id);
            return Err(error);
        }
        Ok((id, call))
    }

    /// Requests the cancellation of a call.
    pub(crate) fn cancel(&self, id: u64) {
        if let Err(error) = self.write("cancel", None, &CancelParams { id }) {
            tracing::warn!(%error, "cancelling a call to a plug-in");
        }
    }

    /// Drops a call that no caller waits for any more.
    pub(crate) fn forget(&self, id: u64) {
        let mut calls = self.shared.calls();
        if calls.waiting.remove(&id).is_some() && calls.broken.is_none() {
            calls.given_up.insert(id);
            drop(calls);
            self.cancel(id);
        }
    }

    /// Sends a request and waits for its answer on this thread.
    pub(crate) fn call_blocking(
        &self,
        method: Method,
        params: &impl Serialize,
        time: Duration,
    ) -> Result<Value> {
        let (_, call) = self.send(method, params)?;
        match call.ended(time) {
            News::Answer(answer) => Ok(answer),
            News::Failure(failure) => Err(self.shared.error_of(failure, false)),
            News::Broken(broken) => Err(broken.error()),
            News::Nothing | News::Progress(..) => Err(self.give_up(method, time).error()),
        }
    }

    /// Converts a failure that the plug-in reported to an error.
    pub(crate) fn error_of(&self, failure: Failure, cancelled: bool) -> Error {
        self.shared.error_of(failure, cancelled)
    }

    /// Kills a plug-in that sent no news in time.
    pub(crate) fn give_up(&self, method: Method, time: Duration) -> Broken {
        let message = format!(
            "sent no answer to '{}' and no progress for {} seconds, and was killed",
            method.name(),
            time.as_secs_f64()
        );
        self.shared.break_off(ErrorKind::Io, &message)
    }

    /// Kills a plug-in that sent an invalid answer.
    pub(crate) fn reject(&self, method: Method, what: &str) -> Error {
        let message = format!("answered '{}' with an invalid value, and was killed: {what}", method.name());
        self.shared.break_off(ErrorKind::Internal, &message).error().advise(
            "this is a defect of the plug-in: report it to its author; `domsnap backends` shows where it is",
        )
    }

    fn write(&self, method: &str, id: Option<u64>, params: &impl Serialize) -> Result<()> {
        let broken = |what: &str, cause: Box<dyn std::error::Error + Send + Sync>| {
            Error::new(ErrorKind::Internal, format!("'{method}' {what}")).because(cause)
        };
        let params = serde_json::to_value(params)
            .map_err(|cause| broken("cannot be written as JSON", cause.into()))?;
        let mut frame = Map::new();
        frame.insert("jsonrpc".to_owned(), "2.0".into());
        if let Some(id) = id {
            frame.insert("id".to_owned(), id.into());
        }
        frame.insert("method".to_owned(), method.into());
        frame.insert("params".to_owned(), params);
        let mut line =
            serde_json::to_vec(&frame).map_err(|cause| broken("cannot be written as JSON", cause.into()))?;
        line.push(b'\n');
        let Some(requests) = &self.requests else {
            return Err(Error::new(ErrorKind::Internal, "a plug-in that ends is asked something"));
        };
        match requests.try_send(line) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => {
                Err(self.shared.break_off(ErrorKind::Io, "reads no requests, and was killed").error())
            }
            // The plug-in has closed its end of the pipe. The reader reports the reason.
            Err(TrySendError::Disconnected(_)) => {
                Err(self.shared.break_off(ErrorKind::Io, "closed its standard input").error())
            }
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.requests = None;
        self.shared.end();
    }
}

impl Shared {
    fn calls(&self) -> MutexGuard<'_, Calls> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Ends the process and its children. Returns how it ended.
    fn end(&self) -> String {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        if matches!(child.try_wait(), Ok(None)) {
            let group = rustix::process::Pid::from_child(&child);
            let killed = rustix::process::kill_process_group(group, rustix::process::Signal::KILL);
            if let Err(error) = killed {
                tracing::warn!(%error, "killing the process group of a plug-in");
                // An error means that it has ended meanwhile.
                let _ = child.kill();
            }
        }
        match child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }

    /// Ends the connection. The first reason is the one that counts.
    fn break_off(&self, kind: ErrorKind, what: &str) -> Broken {
        // The kill below makes the reader see the end of the output. The reader waits here, so that the
        // reason for the kill is recorded before "ended by SIGKILL".
        let _breaking = self.breaking.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(broken) = &self.calls().broken {
            return broken.clone();
        }
        self.end();
        let last = match self.stderr.text() {
            Some(text) => format!("; its last output on standard error: {text}"),
            None => String::new(),
        };
        let message = format!("the plug-in {} ({}) {what}{last}", self.name, self.program);
        let mut calls = self.calls();
        let broken = calls.broken.get_or_insert(Broken { kind, message }).clone();
        let waiting = std::mem::take(&mut calls.waiting);
        drop(calls);
        for call in waiting.into_values() {
            call.update(|updates| updates.answer = Some(Err(broken.clone())));
        }
        broken
    }

    /// Reads frames until the end, or until one is invalid.
    fn read(&self, mut stdout: impl BufRead, cap: usize) {
        loop {
            let frame = match read_frame(&mut stdout, cap) {
                Ok(Some(frame)) => frame,
                Ok(None) => {
                    // The process may not have ended yet.
                    std::thread::sleep(Duration::from_millis(20));
                    let status = self.end();
                    self.break_off(ErrorKind::Io, &format!("ended ({status})"));
                    return;
                }
                Err(what) => {
                    self.break_off(ErrorKind::Internal, &format!("{what}, and was killed"));
                    return;
                }
            };
            if let Err(what) = self.take(&frame) {
                let shown: String =
                    String::from_utf8_lossy(&frame[..frame.len().min(SHOWN)]).escape_debug().collect();
                self.break_off(ErrorKind::Internal, &format!("{what}, and was killed; it sent: {shown}"));
                return;
            }
        }
    }

    fn take(&self, frame: &[u8]) -> std::result::Result<(), String> {
        let frame: Map<String, Value> =
            serde_json::from_slice(frame).map_err(|error| format!("did not send JSON-RPC ({error})"))?;
        if frame.get("jsonrpc").and_then(Value::as_str) != Some("2.0") {
            return Err("did not send JSON-RPC 2.0".to_owned());
        }
        if let Some(method) = frame.get("method") {
            let (Some("progress"), None) = (method.as_str(), frame.get("id")) else {
                return Err("sent a request: only the notification 'progress' is allowed".to_owned());
            };
            let params = frame.get("params").cloned().unwrap_or_default();
            let progress: ProgressParams =
                serde_json::from_value(params).map_err(|error| format!("sent invalid progress ({error})"))?;
            // Progress of a call that has ended meanwhile is ignored.
            if let Some(call) = self.calls().waiting.get(&progress.id) {
                call.update(|updates| updates.progress = Some((progress.done, progress.total)));
            }
            return Ok(());
        }
        let Some(id) = frame.get("id").and_then(Value::as_u64) else {
            return Err("answered without a number".to_owned());
        };
        let call = {
            let mut calls = self.calls();
            match calls.waiting.remove(&id) {
                Some(call) => call,
                None if calls.given_up.remove(&id) => return Ok(()),
                None => return Err(format!("answered request {id}, which was never sent")),
            }
        };
        let failure = match (frame.get("result"), frame.get("error")) {
            (Some(result), None) => {
                call.update(|updates| updates.answer = Some(Ok(result.clone())));
                return Ok(());
            }
            (None, Some(error)) => serde_json::from_value(error.clone())
                .map_err(|cause| format!("sent an invalid error ({cause})")),
            _ => Err("answered with neither a result nor an error".to_owned()),
        };
        match failure {
            Ok(failure) => {
                call.update(|updates| updates.failure = Some(failure));
                Ok(())
            }
            Err(what) => {
                // Put back, so that its caller learns of the end too.
                self.calls().waiting.insert(id, call);
                Err(what)
            }
        }
    }

    fn error_of(&self, failure: Failure, cancelled: bool) -> Error {
        let plain = |text: &str| checks::plain(&text.chars().take(4096).collect::<String>());
        let kind = match failure.data.as_ref().map(|data| data.kind) {
            // Only a cancelled call may fail as cancelled, and only the engine knows what needs recovery.
            Some(ErrorKind::Cancelled) if !cancelled => ErrorKind::Io,
            Some(ErrorKind::NeedsRecovery) => ErrorKind::Io,
            Some(kind) => kind,
            None if failure.code == crate::protocol::NO_METHOD => ErrorKind::Unsupported,
            None if failure.code == crate::protocol::FAILED => ErrorKind::Io,
            None => ErrorKind::Internal,
        };
        let message = plain(&failure.message);
        let mut error = Error::new(kind, format!("the plug-in {} says: {message}", self.name));
        if let Some(data) = failure.data {
            if let Some(state) = data.state {
                error = error.state(plain(&state));
            }
            if let Some(advice) = data.advice {
                error = error.advise(plain(&advice));
            }
        }
        error
    }
}

/// Writes requests on a thread of its own, so that a plug-in that does not read blocks no caller. The
/// plug-in's standard input ends with the sender.
fn write_on_a_thread(mut stdin: ChildStdin) -> std::io::Result<SyncSender<Vec<u8>>> {
    let (sender, receiver) = sync_channel::<Vec<u8>>(QUEUE);
    std::thread::Builder::new().name("plug-in's requests".to_owned()).spawn(move || {
        while let Ok(line) = receiver.recv() {
            if stdin.write_all(&line).is_err() {
                break;
            }
        }
    })?;
    Ok(sender)
}

/// Reads one line, without its end; `None` at the end of the stream.
fn read_frame(stdout: &mut impl BufRead, cap: usize) -> std::result::Result<Option<Vec<u8>>, String> {
    let mut frame = Vec::new();
    let limit = u64::try_from(cap).unwrap_or(u64::MAX).saturating_add(1);
    match stdout.by_ref().take(limit).read_until(b'\n', &mut frame) {
        Ok(0) => return Ok(None),
        Ok(_) => {}
        Err(error) => return Err(format!("cannot be read ({error})")),
    }
    if frame.last() == Some(&b'\n') {
        frame.pop();
        return Ok(Some(frame));
    }
    if frame.len() > cap {
        return Err(format!("sent more than {cap} bytes without an end of line"));
    }
    Ok(None) // it ended in the middle of a line
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A plug-in only gets its own variables.
    #[test]
    fn a_plug_in_gets_its_own_variables_alone() {
        let all = [
            "PATH",
            "HOME",
            "LD_PRELOAD",
            "AWS_SECRET_ACCESS_KEY",
            "PYTHONPATH",
            "DOMSNAP_STATE_DIR",
            "DOMSNAP_PLUGIN_ZFS_POOL",
            "DOMSNAP_PLUGIN_ZFS_2_POOL",
            "DOMSNAP_PLUGIN_ZFSX_POOL",
            "DOMSNAP_PLUGIN_ZFS",
            "LC_ALL",
        ];
        let given = |plugin| {
            let all = all.into_iter().map(|name| (name.into(), "value".into()));
            environment(plugin, all).collect::<Vec<(OsString, OsString)>>()
        };
        let names = |plugin| -> Vec<String> {
            given(plugin).into_iter().map(|(name, _)| name.into_string().unwrap()).collect()
        };
        assert_eq!(
            names("zfs"),
            ["PATH", "HOME", "DOMSNAP_PLUGIN_ZFS_POOL", "DOMSNAP_PLUGIN_ZFS_2_POOL", "LC_ALL"]
        );
        assert_eq!(names("zfs-2"), ["PATH", "HOME", "DOMSNAP_PLUGIN_ZFS_2_POOL", "LC_ALL"]);
        assert_eq!(given("zfs").last(), Some(&("LC_ALL".into(), "C".into())));
    }

    #[test]
    fn frames_end_at_lines_and_at_the_cap() {
        let mut said: &[u8] = b"one\n\ntwo\nhalf";
        let mut next = || read_frame(&mut said, 5);
        assert_eq!(next(), Ok(Some(b"one".to_vec())));
        assert_eq!(next(), Ok(Some(Vec::new())));
        assert_eq!(next(), Ok(Some(b"two".to_vec())));
        assert_eq!(next(), Ok(None));
        let mut said: &[u8] = b"sixsix\n";
        assert!(read_frame(&mut said, 5).unwrap_err().contains("more than 5 bytes"));
        let mut said: &[u8] = b"five5\n";
        assert_eq!(read_frame(&mut said, 5), Ok(Some(b"five5".to_vec())));
    }
}
