//! The one error of the image engine.
//!
//! A parser makes an [`Error`] of kind and detail; whoever knows the file adds operation and path with
//! [`Context::context`]. Nothing in an error's text is trusted to be short: strings from images are cut.

use std::borrow::Cow;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use image_files::LockError;

/// What went wrong, as far as a caller may want to decide by it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file does not start with a qcow2 header.
    NotQcow2,
    /// The image uses something that this engine, or this operation, does not do.
    Unsupported,
    /// The image contradicts itself or the format.
    Corrupt,
    /// The image's refcounts are marked as out of date (incompatible feature bit 0).
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
    /// The caller asked for something that cannot be.
    InvalidInput,
    /// A limit of the format, or of QEMU, would be passed.
    LimitExceeded,
    /// A refcount would not fit its width.
    RefcountOverflow,
    /// The file system is full.
    NoSpace,
    /// The caller asked to stop.
    Cancelled,
    /// Any other failed system call.
    Io,
}

/// What was attempted, on what, what was found, and what to do.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: Cow<'static, str>,
    path: PathBuf,
    detail: Cow<'static, str>,
    advice: Option<Cow<'static, str>>,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
    /// Something was written before it.
    half_way: bool,
}

/// The advice of an error that comes before the first write.
const UNCHANGED: &str = "no changes made; look at the image with `domsnap check`, and work on a copy of it";
/// The advice of an error that comes after the first write, where the write order has kept the image
/// readable.
const HALF_WAY: &str = "the operation had begun: the image shows what it did before or what it does after it, and clusters \
     may be leaked; run `domsnap check`, and mend a copy of it with `qemu-img check -r all`";

/// The result of everything here.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// An error that does not know yet which file it is about.
    pub fn new(kind: ErrorKind, detail: impl Into<Cow<'static, str>>) -> Self {
        Self(Box::new(Inner {
            kind,
            operation: Cow::Borrowed(""),
            path: PathBuf::new(),
            detail: detail.into(),
            advice: None,
            source: None,
            half_way: false,
        }))
    }

    /// The image contradicts itself: says so, and what to do about it.
    pub fn corrupt(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(ErrorKind::Corrupt, detail).advise(UNCHANGED)
    }

    /// Names the part of the image that the detail is about.
    #[must_use]
    pub(crate) fn within(mut self, part: impl fmt::Display) -> Self {
        self.0.detail = Cow::Owned(format!("{part}: {}", self.0.detail));
        self
    }

    /// Returns true if the error came after the first write of its operation.
    pub fn is_half_way(&self) -> bool {
        self.0.half_way
    }

    /// The error of an operation of which nothing is left, because the image was mended after it.
    #[must_use]
    pub(crate) fn rolled_back(mut self) -> Self {
        self.0.half_way = false;
        if self.0.advice.as_deref() == Some(HALF_WAY) || self.0.advice.is_none() {
            self.0.advice = Some(Cow::Borrowed("the operation was rolled back, and the image is clean"));
        }
        self
    }

    /// Corrects the advice of an error that says that nothing was changed, where something was written before
    /// it.
    #[must_use]
    pub(crate) fn after_writes(mut self) -> Self {
        self.0.half_way = true;
        if self.0.advice.as_deref() == Some(UNCHANGED) {
            self.0.advice = Some(Cow::Borrowed(HALF_WAY));
        }
        self
    }

    /// A failed system call.
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

    /// Says what to do.
    #[must_use]
    pub fn advise(mut self, advice: impl Into<Cow<'static, str>>) -> Self {
        self.0.advice = Some(advice.into());
        self
    }

    /// Says what was attempted on which file; an earlier, inner word stays.
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

    /// What to decide by.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// What was attempted; empty if nobody said.
    pub fn operation(&self) -> &str {
        &self.0.operation
    }

    /// The image; empty if nobody said.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// What was found.
    pub fn detail(&self) -> &str {
        &self.0.detail
    }

    /// What to do.
    pub fn advice(&self) -> Option<&str> {
        self.0.advice.as_deref()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let e = &*self.0;
        if !e.operation.is_empty() {
            write!(f, "cannot {}", e.operation)?;
            if !e.path.as_os_str().is_empty() {
                write!(f, " {:?}", e.path)?;
            }
            write!(f, ": ")?;
        } else if !e.path.as_os_str().is_empty() {
            write!(f, "{:?}: ", e.path)?;
        }
        write!(f, "{}", e.detail)?;
        if let Some(source) = &e.source {
            write!(f, ": {source}")?;
        }
        if let Some(advice) = &e.advice {
            write!(f, "; {advice}")?;
        }
        Ok(())
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

/// Adds operation and path to an error on its way out.
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

/// A string from an image, made fit for a message: printable, and at most 64 characters.
pub(crate) fn shown(bytes: &[u8]) -> String {
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
