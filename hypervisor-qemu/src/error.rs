//! The crate's one error: the operation, its subject, what was expected and found, the state now, and what to
//! do.

use std::{error::Error as StdError, fmt, io, path::Path};

/// The result of this crate's calls.
pub type Result<T> = std::result::Result<T, Error>;

/// An error of a caller's hook, of any kind.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// Kind of failure; the caller decides by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request cannot be carried out as it is; no changes made.
    Invalid,
    /// This QEMU, or this host, cannot do it; no changes made.
    Unsupported,
    /// QEMU answered with an error.
    Refused,
    /// A deadline passed.
    Timeout,
    /// The connection is gone: QEMU has ended, or its state is unknown.
    Lost,
    /// QEMU's reply does not have the expected form.
    Protocol,
    /// A job or a migration ended in an error, by QEMU's account.
    Failed,
    /// A job or a migration was cancelled.
    Cancelled,
    /// The caller's hook failed.
    Hook,
    /// A file could not be read or written.
    Io,
    /// A memory image is not one, is incomplete, or was changed.
    Damaged,
    /// QEMU has other images open than it names.
    NameMismatch,
}

/// An error of this crate.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    attempted: String,
    subject: String,
    detail: String,
    state: Option<String>,
    advice: Option<String>,
    source: Option<BoxError>,
}

impl Error {
    pub(crate) fn new(
        kind: ErrorKind,
        attempted: impl Into<String>,
        subject: impl fmt::Display,
        detail: impl Into<String>,
    ) -> Self {
        Self(Box::new(Inner {
            kind,
            attempted: attempted.into(),
            subject: subject.to_string(),
            detail: detail.into(),
            state: None,
            advice: None,
            source: None,
        }))
    }

    pub(crate) fn qmp(attempted: impl Into<String>, subject: impl fmt::Display, error: qmp::Error) -> Self {
        let kind = match error.kind() {
            qmp::ErrorKind::Refused => ErrorKind::Refused,
            qmp::ErrorKind::Unsupported => ErrorKind::Unsupported,
            qmp::ErrorKind::Timeout => ErrorKind::Timeout,
            qmp::ErrorKind::Lost | qmp::ErrorKind::Connect => ErrorKind::Lost,
            qmp::ErrorKind::Invalid => ErrorKind::Invalid,
            _ => ErrorKind::Protocol,
        };
        let detail = error.to_string();
        Self::new(kind, attempted, subject, detail).because(error)
    }

    pub(crate) fn io(attempted: impl Into<String>, path: &Path, error: impl Into<io::Error>) -> Self {
        let error = error.into();
        Self::new(ErrorKind::Io, attempted, path.display(), error.to_string()).because(error)
    }

    pub(crate) fn hook(attempted: impl Into<String>, subject: impl fmt::Display, error: BoxError) -> Self {
        let detail = format!("the nested step failed: {error}");
        Self::new(ErrorKind::Hook, attempted, subject, detail).because(error)
    }

    /// Sets the advice for the user.
    pub(crate) fn advise(mut self, advice: impl Into<String>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// Adds the state that things are in now, after any that was added before. Adds nothing if the connection
    /// is lost, because the state is unknown then.
    pub(crate) fn state(mut self, state: impl AsRef<str>) -> Self {
        if self.is_lost() {
            return self;
        }
        let state = state.as_ref();
        match &mut self.0.state {
            Some(before) => {
                before.push_str("; ");
                before.push_str(state);
            }
            none => *none = Some(state.to_owned()),
        }
        self
    }

    /// Sets the cause.
    pub(crate) fn because(mut self, source: impl Into<BoxError>) -> Self {
        self.0.source = Some(source.into());
        self
    }

    /// Returns the kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the operation that was attempted.
    pub fn attempted(&self) -> &str {
        &self.0.attempted
    }

    /// Returns the subject of the operation: a node, a job, a file, a socket.
    pub fn subject(&self) -> &str {
        &self.0.subject
    }

    /// Returns the state that QEMU was left in, if that differs from the state before. Always `None` if the
    /// connection was lost.
    pub fn state_now(&self) -> Option<&str> {
        self.0.state.as_deref()
    }

    pub(crate) fn detail(&self) -> &str {
        &self.0.detail
    }

    /// Returns the failure on one line, without state and advice.
    pub fn summary(&self) -> String {
        let inner = &self.0;
        format!("{}, {}: {}", inner.attempted, inner.subject, inner.detail)
    }

    /// Returns the advice, if set.
    pub fn advice(&self) -> Option<&str> {
        self.0.advice.as_deref()
    }

    /// Takes out the cause of the error.
    pub(crate) fn into_source(self) -> Option<BoxError> {
        self.0.source
    }

    /// Returns true if QEMU, or the connection to it, is gone.
    pub fn is_lost(&self) -> bool {
        self.kind() == ErrorKind::Lost
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary())?;
        if let Some(state) = self.state_now() {
            write!(f, "; now: {state}")?;
        }
        if let Some(advice) = self.advice() {
            write!(f, "; {advice}")?;
        }
        Ok(())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|source| source as _)
    }
}
