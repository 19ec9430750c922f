//! The crate's one error: the operation, its socket, what was found, and what to do.

use std::{fmt, io, path::Path};

use serde_json::Value;

/// The result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// Kind of failure; the caller decides by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The socket could not be opened.
    Connect,
    /// The other side does not speak the protocol: no greeting, or garbage in its place.
    Protocol,
    /// The deadline passed. The connection is still usable; a late reply is dropped.
    Timeout,
    /// The connection is gone. See [`Error::may_have_run`].
    Lost,
    /// QEMU, or the guest agent, answered with an error: [`Error::class`] and [`Error::desc`].
    Refused,
    /// This QEMU or agent does not have the command or the ability.
    Unsupported,
    /// The reply does not have the expected form (not JSON, or another shape than the command's type).
    Reply,
    /// The reply is longer than a line may be.
    TooLong,
    /// The request was wrong before it was sent.
    Invalid,
}

/// An error of a connection to QEMU or to a guest agent.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    attempted: String,
    socket: String,
    detail: String,
    reported: Option<Reported>,
    may_have_run: bool,
    advice: Option<String>,
    source: Option<io::Error>,
}

/// The error object of a reply, as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reported {
    pub(crate) class: String,
    pub(crate) desc: String,
}

impl Reported {
    /// Parses the value of `"error"`; a missing part is empty.
    pub(crate) fn from_value(error: &Value) -> Self {
        let text = |key| error.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        Self { class: text("class"), desc: text("desc") }
    }
}

impl Error {
    pub(crate) fn new(
        kind: ErrorKind,
        attempted: impl Into<String>,
        socket: &Path,
        detail: impl Into<String>,
    ) -> Self {
        Self(Box::new(Inner {
            kind,
            attempted: attempted.into(),
            socket: socket.display().to_string(),
            detail: detail.into(),
            reported: None,
            may_have_run: false,
            advice: None,
            source: None,
        }))
    }

    /// Makes the error of an error reply. A command that is not known (or was disabled) is
    /// [`ErrorKind::Unsupported`].
    pub(crate) fn reported(attempted: &str, socket: &Path, who: &str, reported: Reported) -> Self {
        let kind = match reported.class.as_str() {
            "CommandNotFound" => ErrorKind::Unsupported,
            _ => ErrorKind::Refused,
        };
        let class = if reported.class.is_empty() { "no class" } else { &reported.class };
        let desc = if reported.desc.is_empty() { "no description" } else { &reported.desc };
        let mut error = Self::new(kind, attempted, socket, format!("{who} refused it ({class}): {desc}"));
        error.0.reported = Some(reported);
        error
    }

    /// Sets the advice for the user.
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// Sets the cause.
    pub(crate) fn because(mut self, source: io::Error) -> Self {
        self.0.source = Some(source);
        self
    }

    pub(crate) fn sent(mut self, may_have_run: bool) -> Self {
        self.0.may_have_run = may_have_run;
        self
    }

    /// Returns the kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the operation: a command's name, or a step of the connection.
    pub fn attempted(&self) -> &str {
        &self.0.attempted
    }

    /// Returns the socket of the operation.
    pub fn socket(&self) -> &str {
        &self.0.socket
    }

    /// Returns the error class of an error reply (`GenericError`, `CommandNotFound`, ...), as it was
    /// received.
    pub fn class(&self) -> Option<&str> {
        self.0.reported.as_ref().map(|reported| reported.class.as_str())
    }

    /// Returns the description of an error reply, as it was received. It is for people: QEMU changes it
    /// between versions.
    pub fn desc(&self) -> Option<&str> {
        self.0.reported.as_ref().map(|reported| reported.desc.as_str())
    }

    /// Returns the failure on one line, without advice.
    pub fn summary(&self) -> String {
        let inner = &self.0;
        let sent = if inner.may_have_run { "; it was sent, and may have run" } else { "" };
        format!("{} on {}: {}{sent}", inner.attempted, inner.socket, inner.detail)
    }

    /// Returns the advice, if set.
    pub fn advice(&self) -> Option<&str> {
        self.0.advice.as_deref()
    }

    /// Returns true if the command was handed to the socket without a reply, so that it may have run, may be
    /// running, or may still run. False for an error reply: then its result is known.
    pub fn may_have_run(&self) -> bool {
        self.0.may_have_run
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary())?;
        if let Some(advice) = self.advice() {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|source| source as _)
    }
}

/// Returns the first bytes of received data in printable form.
pub(crate) fn shown(bytes: &[u8]) -> String {
    const SHOWN: usize = 120;
    let head = bytes.get(..SHOWN).unwrap_or(bytes);
    let more = if bytes.len() > SHOWN { "..." } else { "" };
    format!("\"{}{more}\"", head.escape_ascii())
}
