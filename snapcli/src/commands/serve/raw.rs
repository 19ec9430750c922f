//! Raw images and block devices, read and written.

use std::sync::Arc;

use camino::Utf8Path;
use image_files::names::open_image;
use image_files::{LockError, LockMode, lock, size_of};
use nbd_server::{Format, RawFile, Served};
use snapcore::{Error, ErrorKind, Result};

use super::{layer, of_backend, served};

/// Opens and locks the raw image at `path`.
pub fn open(path: &Utf8Path, read_only: bool) -> Result<Served> {
    let file = open_image(path, !read_only)?;
    let mode = if read_only { LockMode::Read } else { LockMode::Write };
    lock(&file, mode).map_err(|error| {
        let kind = if matches!(error, LockError::Held(_)) { ErrorKind::Busy } else { ErrorKind::Io };
        let advice = error.advice();
        Error::new(kind, format!("locking {path}: {error}")).because(error).advise(advice)
    })?;
    let size = size_of(&file)
        .map_err(|cause| Error::new(ErrorKind::Io, format!("cannot look at {path}")).because(cause))?;
    let layers = vec![layer(path, &file)?];
    Ok(served(Arc::new(RawFile::new(file, size, read_only)), path, "raw", layers))
}

/// Opens the images that the control socket names.
pub struct Swapped {
    /// True if the disk is served read-only.
    pub read_only: bool,
    /// The format of the first image.
    pub format: String,
}

impl Format for Swapped {
    fn open(&self, image: &Utf8Path) -> nbd_server::Result<Served> {
        if self.format != "raw" {
            return Err(nbd_server::Error::new(
                nbd_server::ErrorKind::Unsupported,
                format!("a {} image is served read-only and is not exchanged", self.format),
            ));
        }
        open(image, self.read_only).map_err(|error| of_backend(&error))
    }
}
