//! The error type of this crate and of every backend.

use std::fmt;

/// Result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Kinds of failure. The kind decides the exit status, and what a caller may do.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself is malformed: a bad name, options that exclude each other.
    Usage,
    /// A named domain, snapshot, disk, file or backend does not exist.
    NotFound,
    /// The object to be created exists already.
    Exists,
    /// The operation is impossible in this state; no changes were made.
    Refused,
    /// Another process uses the domain or an image: a running guest, another `domsnap`.
    Busy,
    /// The backend or the format does not support the operation.
    Unsupported,
    /// An image, a manifest or a record is inconsistent.
    Corrupt,
    /// The machine failed: I/O error, permission.
    Io,
    /// A file system is full.
    NoSpace,
    /// The caller cancelled, and the changes were rolled back.
    Cancelled,
    /// An operation was interrupted; `recover` must finish it before anything else.
    NeedsRecovery,
    /// A defect in domsnap itself or in a backend: one part broke the contract with another.
    Internal,
}

/// An error: the attempted operation, the object, the reason, the state now, and advice.
///
/// ```
/// use snapcore::{Error, ErrorKind};
///
/// let error = Error::new(ErrorKind::Refused, "the image /vm/web.qcow2 has no layer base.qcow2")
///     .context("deleting snapshot s1 of domain web")
///     .state("no changes made")
///     .advise("run `domsnap check web`");
/// assert_eq!(error.kind(), ErrorKind::Refused);
/// assert_eq!(error.advice(), Some("run `domsnap check web`"));
/// ```
#[derive(Debug)]
pub struct Error {
    kind: ErrorKind,
    message: String,
    context: Vec<String>,
    state: Option<String>,
    advice: Option<String>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// Makes an error of `kind`. `message` is lower case and has no full stop. It names the object, what was
    /// expected and what was found.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), context: Vec::new(), state: None, advice: None, source: None }
    }

    /// Adds the attempted operation, outermost last: "deleting snapshot s1 of domain web".
    #[must_use]
    pub fn context(mut self, attempted: impl Into<String>) -> Self {
        self.context.push(attempted.into());
        self
    }

    /// Sets the state that things are in now.
    #[must_use]
    pub fn state(mut self, state: impl Into<String>) -> Self {
        self.state = Some(state.into());
        self
    }

    /// Sets the advice for the user.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Sets the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Changes the kind, where an outer layer knows better what the failure means.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// The kind of failure.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// The message alone: without context, state and advice.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// Returns the failure on one line, without state and advice: `attempted: attempted: message: cause`.
    pub fn summary(&self) -> String {
        let mut line: String = self.attempted().map(|attempted| format!("{attempted}: ")).collect();
        let causes = line.len();
        line.push_str(&self.message);
        let mut source = std::error::Error::source(self);
        while let Some(cause) = source {
            let text = cause.to_string();
            // Many libraries repeat their cause in their own message.
            if !line.get(causes..).is_some_and(|said| said.contains(&text)) {
                line.push_str(": ");
                line.push_str(&text);
            }
            source = cause.source();
        }
        line
    }

    /// The attempted operations, outermost first.
    pub fn attempted(&self) -> impl Iterator<Item = &str> {
        self.context.iter().rev().map(String::as_str)
    }

    /// The state that things are in now, if set.
    pub fn state_now(&self) -> Option<&str> {
        self.state.as_deref()
    }

    /// The advice, if set.
    pub fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }
}

impl fmt::Display for Error {
    /// Formats `attempted: attempted: message: cause; state; advice` on one line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary())?;
        for part in [&self.state, &self.advice].into_iter().flatten() {
            write!(f, "; {part}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.source.as_deref().map(|source| source as _)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cause that repeats the message is printed once.
    #[test]
    fn repeated_cause_is_printed_once() {
        let cause = std::io::Error::other("no such thing");
        let error =
            Error::new(ErrorKind::Io, "it failed").because(Error::new(ErrorKind::Io, "inner").because(cause));
        assert_eq!(error.to_string(), "it failed: inner: no such thing");
        let twice = Error::new(ErrorKind::Io, "it failed: no such thing")
            .because(std::io::Error::other("no such thing"));
        assert_eq!(twice.to_string(), "it failed: no such thing");
    }

    #[test]
    fn summary_leaves_state_and_advice_out() {
        let error = Error::new(ErrorKind::Io, "it failed")
            .context("deleting s1")
            .because(std::io::Error::other("no such thing"))
            .state("s1 is there")
            .advise("try again");
        assert_eq!(error.summary(), "deleting s1: it failed: no such thing");
        assert_eq!(error.to_string(), "deleting s1: it failed: no such thing; s1 is there; try again");
        assert_eq!(
            std::error::Error::source(&error).map(ToString::to_string).as_deref(),
            Some("no such thing")
        );
    }
}
