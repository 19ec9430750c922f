//! The crate's one error: what was attempted, on what socket, what came back, and what to do.

use std::{fmt, io, path::Path};

use serde_json::Value;

/// The result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// What kind of thing went wrong: what a caller decides by.
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
    /// The reply came, but it is not what it should be (not JSON, or another shape than the command's type).
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

/// The error object of a reply, as it was sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reported {
    pub(crate) class: String,
    pub(crate) desc: String,
}

impl Reported {
    /// Reads the value of `"error"`; what is missing reads as empty.
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

    /// An error reply. A command that is not known (or was disabled) is [`ErrorKind::Unsupported`].
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

    pub(crate) fn advice(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    pub(crate) fn source(mut self, source: io::Error) -> Self {
        self.0.source = Some(source);
        self
    }

    pub(crate) fn sent(mut self, may_have_run: bool) -> Self {
        self.0.may_have_run = may_have_run;
        self
    }

    /// What kind of thing went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was attempted: a command's name, or a step of the connection.
    pub fn attempted(&self) -> &str {
        &self.0.attempted
    }

    /// The socket that it was attempted on.
    pub fn socket(&self) -> &str {
        &self.0.socket
    }

    /// The error class of an error reply (`GenericError`, `CommandNotFound`, ...), as it was sent.
    pub fn class(&self) -> Option<&str> {
        self.0.reported.as_ref().map(|reported| reported.class.as_str())
    }

    /// The description of an error reply, as it was sent: for people, QEMU changes it between versions.
    pub fn desc(&self) -> Option<&str> {
        self.0.reported.as_ref().map(|reported| reported.desc.as_str())
    }

    /// Whether the command was handed to the socket, and so may have run, may be running, or may yet run, though there is
    /// no reply. False for an error reply: then it is known.
    pub fn may_have_run(&self) -> bool {
        self.0.may_have_run
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        write!(f, "{} on {}: {}", inner.attempted, inner.socket, inner.detail)?;
        if inner.may_have_run {
            f.write_str("; it was sent, and may have run")?;
        }
        if let Some(advice) = &inner.advice {
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

/// The first bytes of what came, fit to be shown: they may be anything.
pub(crate) fn shown(bytes: &[u8]) -> String {
    const SHOWN: usize = 120;
    let head = bytes.get(..SHOWN).unwrap_or(bytes);
    let more = if bytes.len() > SHOWN { "..." } else { "" };
    format!("\"{}{more}\"", head.escape_ascii())
}
