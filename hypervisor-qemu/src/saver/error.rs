//! Converts this crate's errors to the engine's.

use std::io;

use snapcore::{Error, ErrorKind, Result};

use crate::error::ErrorKind as Kind;

/// Converts an error to the engine's. The error of a hook keeps its message.
pub(crate) fn to_engine(error: crate::Error) -> Error {
    let attempted = format!("{}, {}", error.attempted(), error.subject());
    let (detail, state) = (error.detail().to_owned(), error.state_now().map(str::to_owned));
    let advice = error.advice().map(str::to_owned);
    let kind = error.kind();
    let source = error.into_source();
    let source = match source.map(|source| source.downcast::<Error>()) {
        // The error is one of the engine's own hooks.
        Some(Ok(inner)) => return with(inner.context(attempted), state, None),
        Some(Err(other)) => Some(other),
        None => None,
    };
    let io = source.as_deref().and_then(|source| source.downcast_ref::<io::Error>()).map(io::Error::kind);
    let full = ["No space left", "Disk quota exceeded"].iter().any(|text| detail.contains(text));
    // QEMU has no class for it: `Failed to get "write" lock`, `Failed to get shared "write" lock`.
    let locked = detail.contains("Failed to get") && detail.contains("\" lock");
    let kind = match (kind, io) {
        (_, Some(io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)) => ErrorKind::NoSpace,
        (Kind::Refused | Kind::Failed | Kind::Io, _) if full => ErrorKind::NoSpace,
        (Kind::Refused | Kind::Failed, _) if locked => ErrorKind::Busy,
        (Kind::Io, Some(io::ErrorKind::NotFound)) => ErrorKind::NotFound,
        (Kind::Invalid, _) => ErrorKind::Refused,
        (Kind::Unsupported, _) => ErrorKind::Unsupported,
        (Kind::Cancelled, _) => ErrorKind::Cancelled,
        (Kind::Damaged | Kind::NameMismatch, _) => ErrorKind::Corrupt,
        (Kind::Hook, _) => ErrorKind::Internal,
        (Kind::Refused | Kind::Timeout | Kind::Lost | Kind::Protocol | Kind::Failed | Kind::Io, _) => {
            ErrorKind::Io
        }
    };
    let error = Error::new(kind, detail).context(attempted);
    let error = match source {
        Some(source) => error.because(source),
        None => error,
    };
    with(error, state, advice)
}

fn with(mut error: Error, state: Option<String>, advice: Option<String>) -> Error {
    if let Some(state) = state {
        error = error.state(state);
    }
    if let Some(advice) = advice {
        error = error.advise(advice);
    }
    error
}

/// Runs blocking work on a thread that may block.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> crate::Result<T> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done.map_err(to_engine),
        Err(error) => {
            Err(Error::new(ErrorKind::Internal, "a thread that works on a memory image ended").because(error))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// The error of a hook passes unchanged, and a full disk is recognised by its kind.
    #[test]
    fn hook_errors_pass_unchanged() {
        let inner = Error::new(ErrorKind::NoSpace, "no space for a link").advise("make some");
        let error = to_engine(crate::Error::hook("the cut", "q", Box::new(inner)).state("all is as before"));
        assert_eq!((error.kind(), error.message()), (ErrorKind::NoSpace, "no space for a link"));
        assert_eq!((error.state_now(), error.advice()), (Some("all is as before"), Some("make some")));

        let full = io::Error::from(io::ErrorKind::StorageFull);
        assert_eq!(to_engine(crate::Error::io("writing", Path::new("/x"), full)).kind(), ErrorKind::NoSpace);
        let said = "block job failed: No space left on device";
        assert_eq!(
            to_engine(crate::Error::new(Kind::Failed, "merging", "j", said)).kind(),
            ErrorKind::NoSpace
        );
        let said = "Failed to get shared \"write\" lock";
        let locked = to_engine(crate::Error::new(Kind::Refused, "opening", "n", said));
        assert_eq!(locked.kind(), ErrorKind::Busy);
        let gone = io::Error::from(io::ErrorKind::NotFound);
        let error = to_engine(crate::Error::io("opening a memory image", Path::new("/m"), gone));
        assert_eq!(error.kind(), ErrorKind::NotFound);
        assert!(error.to_string().contains("opening a memory image, /m"), "{error}");
    }
}
