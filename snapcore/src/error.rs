//! The one error type of this crate, and of every backend's answers to it.

use std::fmt;

/// What came of an operation of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What sort of failure it is: decides the exit status, and what a caller may do.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ErrorKind {
    /// The request itself is malformed: a bad name, options that exclude each other.
    Usage,
    /// A domain, snapshot, disk, file or backend that was named does not exist.
    NotFound,
    /// What was to be made exists already.
    Exists,
    /// It cannot be done in this state; no changes were made.
    Refused,
    /// Somebody else holds the domain or an image: a running guest, another `domsnap`.
    Busy,
    /// The backend or the format cannot do it.
    Unsupported,
    /// An image, a manifest or a record contradicts itself or what it should be.
    Corrupt,
    /// The machine failed: I/O error, permission.
    Io,
    /// A file system is full.
    NoSpace,
    /// The caller cancelled, and what was done was undone.
    Cancelled,
    /// An operation stopped half way; `recover` must finish it before anything else.
    NeedsRecovery,
    /// A defect in domsnap itself or in a backend: a broken promise between parts.
    Internal,
}

/// An error: what was attempted, on what, why it failed, what state things are in, what to do.
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
    /// An error of `kind`; `message` is lower case, has no full stop, and names the object, what was expected and
    /// what was found.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), context: Vec::new(), state: None, advice: None, source: None }
    }

    /// Adds what was attempted, outermost last: "deleting snapshot s1 of domain web".
    #[must_use]
    pub fn context(mut self, attempted: impl Into<String>) -> Self {
        self.context.push(attempted.into());
        self
    }

    /// Says what state things are in now.
    #[must_use]
    pub fn state(mut self, state: impl Into<String>) -> Self {
        self.state = Some(state.into());
        self
    }

    /// Says what the user can do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<String>) -> Self {
        self.advice = Some(advice.into());
        self
    }

    /// Keeps the cause.
    #[must_use]
    pub fn because(mut self, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// Same error, of another kind: where an outer layer knows better what it means.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> Self {
        self.kind = kind;
        self
    }

    /// What sort of failure it is.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    /// What went wrong, alone: without context, state and advice.
    pub fn message(&self) -> &str {
        &self.message
    }

    /// The failure on one line, without state and advice: `attempted: attempted: message: cause`.
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

    /// What was attempted, outermost first.
    pub fn attempted(&self) -> impl Iterator<Item = &str> {
        self.context.iter().rev().map(String::as_str)
    }

    /// What state things are in now, where it was said.
    pub fn state_now(&self) -> Option<&str> {
        self.state.as_deref()
    }

    /// What to do, where it was said.
    pub fn advice(&self) -> Option<&str> {
        self.advice.as_deref()
    }
}

impl fmt::Display for Error {
    /// `attempted: attempted: message: cause; state; advice` on one line.
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

    #[test]
    fn a_cause_that_repeats_is_said_once() {
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
