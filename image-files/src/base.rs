//! Images of other formats at which a chain of layers ends.
//!
//! The lowest layer of a chain may have a backing file of another format: qcow2 overlays on a raw file, or
//! on a VHD. That image is only read. A format of which this crate knows nothing is read by a [`BaseFormat`]
//! that the program gives to the backend of the chain.

use std::fmt;
use std::sync::Arc;

use camino::Utf8Path;
use snapcore::Result;
use snapcore::backend::Finding;

/// An open base image.
pub trait BaseImage: Send + Sync {
    /// Bytes of the disk.
    fn size(&self) -> u64;

    /// Fills `buf` with what the disk shows at `offset`, and with zeros past its end.
    ///
    /// # Errors
    /// Those of the image; the system's.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

/// Reads base images of one more format.
pub trait BaseFormat: fmt::Debug + Send + Sync {
    /// Returns the bytes of the disk that the image shows, or nothing if it is not of this format. `format`
    /// is the one that the layers above state, and `above` has their sizes in bytes. A `raw` image may be of
    /// this format only if those sizes agree: what a guest writes to its disk must not decide it.
    ///
    /// # Errors
    /// [`snapcore::ErrorKind::Refused`] if programs that open the chain would not show what the image holds;
    /// those of the image.
    fn size(&self, file: &Utf8Path, format: &str, above: &[u64]) -> Result<Option<u64>>;

    /// Opens the image for reading, with a reader's lock if `locked`. Returns nothing if `format` is not one
    /// that this reads.
    ///
    /// # Errors
    /// As [`BaseFormat::size`]; [`snapcore::ErrorKind::Busy`] if it is locked.
    fn open(&self, file: &Utf8Path, format: &str, locked: bool) -> Result<Option<Arc<dyn BaseImage>>>;

    /// Checks the image's structures, if `format` is one that this reads. `above` as in [`BaseFormat::size`].
    ///
    /// # Errors
    /// Those of the image that prevent reading it; the system's.
    fn check(&self, file: &Utf8Path, format: &str, above: &[u64]) -> Result<Vec<Finding>>;
}

/// The base images that a backend can read besides raw ones.
#[derive(Debug, Clone, Default)]
pub struct Bases(Vec<Arc<dyn BaseFormat>>);

impl Bases {
    /// Adds a format.
    pub fn add(&mut self, format: Arc<dyn BaseFormat>) {
        self.0.push(format);
    }

    /// As [`BaseFormat::size`], of the first format that knows the image.
    ///
    /// # Errors
    /// As there.
    pub fn size(&self, file: &Utf8Path, format: &str, above: &[u64]) -> Result<Option<u64>> {
        self.0.iter().find_map(|base| base.size(file, format, above).transpose()).transpose()
    }

    /// As [`BaseFormat::open`].
    ///
    /// # Errors
    /// As there.
    pub fn open(&self, file: &Utf8Path, format: &str, locked: bool) -> Result<Option<Arc<dyn BaseImage>>> {
        self.0.iter().find_map(|base| base.open(file, format, locked).transpose()).transpose()
    }

    /// As [`BaseFormat::check`].
    ///
    /// # Errors
    /// As there.
    pub fn check(&self, file: &Utf8Path, format: &str, above: &[u64]) -> Result<Vec<Finding>> {
        let mut all = Vec::new();
        for base in &self.0 {
            all.extend(base.check(file, format, above)?);
        }
        Ok(all)
    }
}
