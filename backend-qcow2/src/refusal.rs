//! The image engine's errors in the words of the core.

use snapcore::{Error, ErrorKind};

use crate::image;

impl From<image::Error> for Error {
    fn from(error: image::Error) -> Self {
        let kind = match error.kind() {
            image::ErrorKind::NotQcow2 | image::ErrorKind::Corrupt => ErrorKind::Corrupt,
            image::ErrorKind::Unsupported
            | image::ErrorKind::LimitExceeded
            | image::ErrorKind::RefcountOverflow => ErrorKind::Unsupported,
            image::ErrorKind::Dirty => ErrorKind::Refused,
            image::ErrorKind::Locked => ErrorKind::Busy,
            image::ErrorKind::SnapshotNotFound | image::ErrorKind::FileNotFound => ErrorKind::NotFound,
            image::ErrorKind::SnapshotExists | image::ErrorKind::FileExists => ErrorKind::Exists,
            image::ErrorKind::InvalidInput => ErrorKind::Usage,
            image::ErrorKind::NoSpace => ErrorKind::NoSpace,
            image::ErrorKind::ReadOnly | image::ErrorKind::Io => ErrorKind::Io,
            image::ErrorKind::Cancelled => ErrorKind::Cancelled,
        };
        // The engine's message has operation, path and detail, and ends with the advice.
        let message = error.to_string();
        match error.advice() {
            Some(advice) => {
                let without =
                    message.strip_suffix(advice).map_or(message.as_str(), |m| m.trim_end_matches("; "));
                Error::new(kind, without).advise(advice)
            }
            None => Error::new(kind, message),
        }
    }
}
