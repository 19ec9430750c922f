//! Files that a user names on the command line, read with a limit.

use std::fs::File;
use std::io::Read;

use camino::Utf8Path;
use snapcore::{Error, ErrorKind, Result};

/// Reads a regular file, and one byte more than `most` at most: the caller refuses what is longer. `None` for
/// anything else: a pipe would wait for ever.
///
/// # Errors
/// The system's.
pub fn read(path: &Utf8Path, most: u64) -> Result<Option<Vec<u8>>> {
    let failed = |cause| Error::new(ErrorKind::Io, format!("cannot read {path}")).because(cause);
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes)).map_err(failed)?;
    Ok(Some(bytes))
}
