//! Which backend serves which format: said explicitly, by whoever puts the program together.

use std::sync::Arc;

use crate::{DiskSnapshotter, Error, ErrorKind, Result};

/// The backends of a program, in the order of their registration. The first is the default: it serves images that
/// are given by their path alone.
#[derive(Clone, Default)]
pub struct Registry {
    backends: Vec<Arc<dyn DiskSnapshotter>>,
}

impl Registry {
    /// One that knows no format.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a backend.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where its format has one already.
    pub fn register(&mut self, backend: Arc<dyn DiskSnapshotter>) -> Result<()> {
        let format = backend.format();
        if self.backends.iter().any(|known| known.format() == format) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("a backend for the format {format:?} is registered already"),
            )
            .advise("register each format once"));
        }
        self.backends.push(backend);
        Ok(())
    }

    /// The backend that serves `format`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], listing the formats that are known.
    pub fn get(&self, format: &str) -> Result<Arc<dyn DiskSnapshotter>> {
        self.backends.iter().find(|backend| backend.format() == format).cloned().ok_or_else(|| {
            let known: Vec<&str> = self.iter().map(DiskSnapshotter::format).collect();
            let error = Error::new(ErrorKind::NotFound, format!("no backend serves the format {format:?}"));
            match known.is_empty() {
                true => error.advise("no backend is registered"),
                false => error.advise(format!("the formats known are: {}", known.join(", "))),
            }
        })
    }

    /// The format of images that are given by their path alone: the first that was registered.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where nothing is registered.
    pub fn default_format(&self) -> Result<&str> {
        self.backends.first().map(|backend| backend.format()).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "no backend is registered")
                .advise("register one before anything else")
        })
    }

    /// All backends, in the order of their registration.
    pub fn iter(&self) -> impl Iterator<Item = &dyn DiskSnapshotter> {
        self.backends.iter().map(Arc::as_ref)
    }
}
