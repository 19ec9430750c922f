//! Checks of a disk's configured path before the disk is adopted.

use std::fs::Metadata;
use std::io;

use camino::Utf8Path;
use snapcore::{Error, ErrorKind, Result};

use crate::names::io_error;

/// Reads the metadata of the configured path of a disk, without following a link.
///
/// # Errors
/// [`ErrorKind::NotFound`]; the system's.
pub fn look_at_path(path: &Utf8Path) -> Result<Metadata> {
    std::fs::symlink_metadata(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Error::new(ErrorKind::NotFound, format!("the disk image {path} does not exist"))
                .advise("check the path, and whether its file system is mounted")
        }
        _ => io_error(error, format!("cannot look at {path}")),
    })
}

/// Makes the refusal of a configured path that is a symbolic link. `why` follows `is a symbolic link`.
pub fn refused_link(path: &Utf8Path, why: &str) -> Error {
    let to = path.canonicalize_utf8().map_or_else(|_| "its target".to_owned(), |to| to.to_string());
    Error::new(ErrorKind::Refused, format!("{path} is a symbolic link{why}"))
        .advise(format!("use the file itself: {to}"))
}
