//! The error type of an image engine.
//!
//! A parser makes an [`Error`] of kind and detail. Code that knows the file adds operation and path with
//! [`Context::context`]. Strings from images are cut, because any of them may be long.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::LockError;

/// Kinds of error, as far as a caller may want to decide by them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file has not the format of the engine.
    WrongFormat,
    /// The image uses something that this engine, or this operation, does not support.
    Unsupported,
    /// The image contradicts itself or the format.
    Corrupt,
    /// The image is marked as, or known to be, not up to date: it must be repaired before it is written.
    Dirty,
    /// Another process has the image open.
    Locked,
    /// The named snapshot is not in the image.
    SnapshotNotFound,
    /// A snapshot of that name is already in the image.
    SnapshotExists,
    /// The file to be created is already there.
    FileExists,
    /// The file is not there.
    FileNotFound,
    /// The image was opened for reading, or the file may not be written.
    ReadOnly,
    /// The caller's request is invalid.
    InvalidInput,
    /// A limit of the format, or of QEMU, would be exceeded.
    LimitExceeded,
    /// A refcount would not fit its width.
    RefcountOverflow,
    /// The file system is full.
    NoSpace,
    /// The caller requested cancellation.
    Cancelled,
    /// Any other failed system call.
    Io,
}

/// A failed operation: its name, the file, the detail, and advice.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: Cow<'static, str>,
    path: PathBuf,
    detail: Cow<'static, str>,
    advice: Option<Cow<'static, str>>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// True if something was written before the error.
    half_done: bool,
}

/// Advice of an error that comes before the first write.
const UNCHANGED: &str = "no changes made; look at the image with `domsnap check`, and work on a copy of it";
/// Result type of an engine.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Makes an error without a file. [`Error::on`] adds it.
    pub fn new(kind: ErrorKind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            operation: Cow::Borrowed(""),
            path: PathBuf::new(),
            detail: detail.into(),
            advice: None,
            source: None,
            half_done: false,
        }))
    }

    /// Makes the error of an image that contradicts itself, with advice.
    pub fn corrupt(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Corrupt, detail).advise(UNCHANGED)
    }

    /// Adds the part of the image that the detail is about.
    #[must_use]
    pub fn within(mut self, part: impl fmt::Display) -> Self {
        self.0.detail = Cow::Owned(format!("{part}: {}", self.0.detail));
        self
    }

    /// Returns true if the error came after the first write of its operation.
    pub fn is_half_done(&self) -> bool {
        self.0.half_done
    }

    /// Marks the operation as rolled back, because the image was repaired after the error.
    #[must_use]
    pub fn rolled_back(mut self) -> Self {
        self.0.half_done = false;
        self.0.advice = Some(Cow::Borrowed("the operation was rolled back, and the image is clean"));
        self
    }

    /// Marks the error as coming after a write, and corrects advice which says that nothing was changed.
    /// `advice` says in what state the engine's write order has left the image.
    #[must_use]
    pub fn after_writes(mut self, advice: &'static str) -> Self {
        self.0.half_done = true;
        if self.0.advice.as_deref() == Some(UNCHANGED) {
            self.0.advice = Some(Cow::Borrowed(advice));
        }
        self
    }

    /// Makes the error of a failed system call.
    pub fn io(doing: impl Into<Cow<'static, str>>, source: io::Error) -> Self {
        let kind = match source.kind() {
            io::ErrorKind::NotFound => ErrorKind::FileNotFound,
            io::ErrorKind::AlreadyExists => ErrorKind::FileExists,
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
            io::ErrorKind::ReadOnlyFilesystem => ErrorKind::ReadOnly,
            _ => ErrorKind::Io,
        };
        let mut e = Self::new(kind, doing);
        e.0.source = Some(Box::new(source));
        e
    }

    /// Sets the advice.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<Cow<'static, str>>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// Sets operation and path, unless an inner caller has set them.
    #[must_use]
    pub fn on(mut self, operation: impl Into<Cow<'static, str>>, path: &Path) -> Self {
        if self.0.operation.is_empty() {
            self.0.operation = operation.into();
        }
        if self.0.path.as_os_str().is_empty() {
            self.0.path = path.to_owned();
        }
        self
    }

    /// The kind, for decisions.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The attempted operation; empty if not set.
    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    /// The image; empty if not set.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Description of what was found.
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// Advice for the user.
    pub fn advice(&self) -> Option<&str> {
        self.0.advice.as_deref()
    }

    /// The failure on one line, without the advice: operation, path, detail and cause.
    pub fn summary(&self) -> String {
        let e = &*self.0;
        let path = match e.path.as_os_str().is_empty() {
            true => String::new(),
            false => format!("{:?}", e.path),
        };
        let attempted = match (e.operation.as_ref(), path.as_str()) {
            ("", "") => String::new(),
            ("", path) => format!("{path}: "),
            (operation, "") => format!("cannot {operation}: "),
            (operation, path) => format!("cannot {operation} {path}: "),
        };
        let cause = e.source.as_ref().map(|source| format!(": {source}")).unwrap_or_default();
        format!("{attempted}{}{cause}", e.detail)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.summary())?;
        match &self.0.advice {
            Some(advice) => write!(f, "; {advice}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {self}", self.0.kind)
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source.as_ref().map(|s| &**s as _)
    }
}

/// Adds operation and path to an error that is passed on.
pub trait Context<T> {
    /// See [`Error::on`].
    fn context(self, operation: &'static str, path: &Path) -> Result<T>;
}

impl<T> Context<T> for Result<T> {
    fn context(self, operation: &'static str, path: &Path) -> Result<T> {
        self.map_err(|e| e.on(operation, path))
    }
}

impl From<LockError> for Error {
    fn from(error: LockError) -> Self {
        let (advice, text) = (error.advice(), error.to_string());
        match error {
            LockError::Held(_) => Self::new(ErrorKind::Locked, text),
            LockError::System { source, .. } => Self::io(text, source),
        }
        .advise(advice)
    }
}

/// Makes a string from an image fit for a message: printable, and at most 64 characters.
pub fn shown(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut out: String = text.chars().take(64).flat_map(char::escape_debug).collect();
    if text.chars().nth(64).is_some() {
        out.push('…');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An error names operation, path, detail and advice.
    #[test]
    fn an_error_says_operation_path_detail_and_advice() {
        let e = Error::new(ErrorKind::Locked, "it is open elsewhere")
            .advise("shut the domain down")
            .on("open", Path::new("/a.qcow2"));
        assert_eq!(e.to_string(), "cannot open \"/a.qcow2\": it is open elsewhere; shut the domain down");
        assert_eq!(e.kind(), ErrorKind::Locked);
    }

    #[test]
    fn the_innermost_operation_is_kept() {
        let e = Error::corrupt("x").on("read", Path::new("/a")).on("apply", Path::new("/b"));
        assert_eq!(e.operation(), "read");
        assert_eq!(e.path(), Path::new("/a"));
    }

    #[test]
    fn strings_from_images_are_cut_and_escaped() {
        assert_eq!(shown(b"a\x1b[0m"), "a\\u{1b}[0m");
        assert_eq!(shown(&[b'x'; 100]).chars().count(), 65);
    }
}
