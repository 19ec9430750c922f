//! Conversion of image engines' errors to those of the core.

use snapcore::{Error, ErrorKind};

use super::error as image;

impl From<image::Error> for Error {
    fn from(error: image::Error) -> Self {
        let kind = match error.kind() {
            image::ErrorKind::WrongFormat | image::ErrorKind::Corrupt => ErrorKind::Corrupt,
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
        let summary = error.summary();
        let core = Error::new(kind, summary);
        match error.advice() {
            Some(advice) => core.advise(advice.to_owned()),
            None => core,
        }
    }
}
