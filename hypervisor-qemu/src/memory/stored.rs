//! [`Stored`]: a memory image in either form.

use std::path::PathBuf;

use super::{Image, Packed, packed::is_packed};
use crate::error::{Error, Result};

/// A memory image as it is stored.
#[derive(Debug)]
pub enum Stored {
    /// As QEMU loads it.
    Plain(Image),
    /// Compressed.
    Packed(Packed),
}

impl Stored {
    /// Opens one, and reads its record.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`]; [`crate::ErrorKind::Damaged`] where it is not one of ours or is not whole.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let packed = confined_files::open_regular(&path, false).and_then(|file| is_packed(&file));
        match packed.map_err(|error| Error::io("opening a memory image", &path, error))? {
            true => Packed::open(path).map(Self::Packed),
            false => Image::open(path).map(Self::Plain),
        }
    }

    /// The name of its internal snapshot.
    pub fn tag(&self) -> &str {
        match self {
            Self::Plain(image) => image.tag(),
            Self::Packed(packed) => packed.tag(),
        }
    }

    /// The file's length, in bytes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn length(&self) -> Result<u64> {
        match self {
            Self::Plain(image) => image.length(),
            Self::Packed(packed) => packed.length(),
        }
    }

    /// How long it is as QEMU loads it, in bytes, where it is stored in another form.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] where no image has its stream or tag.
    pub fn full_length(&self) -> Result<Option<u64>> {
        match self {
            Self::Plain(_) => Ok(None),
            Self::Packed(packed) => packed.full_length().map(Some),
        }
    }

    /// The image that QEMU can load: a compressed one is unpacked, and compared with its checksums. Blocks.
    ///
    /// # Errors
    /// Those of [`Packed::unpack`].
    pub fn ready(self) -> Result<Image> {
        match self {
            Self::Plain(image) => Ok(image),
            Self::Packed(packed) => packed.unpack(),
        }
    }
}
