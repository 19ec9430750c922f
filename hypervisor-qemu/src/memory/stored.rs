//! [`Stored`]: a memory image in either form.

use std::path::PathBuf;

use super::{Image, Packed, packed::is_packed};
use crate::error::{Error, Result};

/// A memory image in either form.
#[derive(Debug)]
pub enum Stored {
    /// The form that QEMU loads.
    Plain(Image),
    /// Compressed.
    Packed(Packed),
}

impl Stored {
    /// Opens an image, and reads its record.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`]; [`crate::ErrorKind::Damaged`] if it is not one of ours or is incomplete.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let packed = confined_files::open_regular(&path, false).and_then(|file| is_packed(&file));
        match packed.map_err(|error| Error::io("opening a memory image", &path, error))? {
            true => Packed::open(path).map(Self::Packed),
            false => Image::open(path).map(Self::Plain),
        }
    }

    /// Returns the name of its internal snapshot.
    pub fn tag(&self) -> &str {
        match self {
            Self::Plain(image) => image.tag(),
            Self::Packed(packed) => packed.tag(),
        }
    }

    /// Returns the file's length, in bytes.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Io`].
    pub fn length(&self) -> Result<u64> {
        match self {
            Self::Plain(image) => image.length(),
            Self::Packed(packed) => packed.length(),
        }
    }

    /// Returns the length of the form that QEMU loads, in bytes, if it is stored in the other form.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Invalid`] if no image can have its stream or tag.
    pub fn full_length(&self) -> Result<Option<u64>> {
        match self {
            Self::Plain(_) => Ok(None),
            Self::Packed(packed) => packed.full_length().map(Some),
        }
    }

    /// Returns the image that QEMU can load: a compressed one is unpacked, and checked against its checksums.
    /// Blocks.
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
