//! The errors of this crate.

use std::io;

/// Kinds of error.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// Another process has the socket, the disk or the hold.
    Busy,
    /// The request is valid, and this disk does not support it.
    Unsupported,
    /// The request is refused: what it names is not what it should be.
    Refused,
    /// The request is not valid.
    Invalid,
    /// A hold or a wait is over its limit.
    Expired,
    /// The caller cancelled it.
    Cancelled,
    /// The system's error.
    Io,
}

/// An error of the server, with the object that it is about in its message.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    kind: ErrorKind,
    message: String,
    advice: Option<String>,
    source: Option<io::Error>,
}

/// A result with this crate's error.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Makes an error.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), advice: None, source: None }
    }

    /// Makes the error for a failed system call. The message ends with the system's.
    pub fn io(message: impl std::fmt::Display, source: io::Error) -> Self {
        let message = format!("{message}: {source}");
        Self { kind: ErrorKind::Io, message, advice: None, source: Some(source) }
    }

    /// Adds what the user can do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// The kind.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What the user can do.
    pub fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }
}
