//! A state of a disk that is only read, as an image.

use std::io;

use nbd_server::{Extent, Image, Zeroing};

/// What is read of a state. The methods are those of [`Image`].
pub trait Readable: Send + Sync {
    fn size(&self) -> u64;
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    fn map(&self, offset: u64, length: u64, limit: usize) -> io::Result<Vec<Extent>>;
}

/// The image of a state.
pub struct ReadOnly<R>(pub R);

impl<R: Readable> Image for ReadOnly<R> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn is_read_only(&self) -> bool {
        true
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_at(buf, offset)
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn zero(&self, _: u64, _: u64, _: Zeroing) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn trim(&self, _: u64, _: u64) -> io::Result<()> {
        Err(io::ErrorKind::ReadOnlyFilesystem.into())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn map(&self, offset: u64, length: u64, limit: usize) -> io::Result<Vec<Extent>> {
        self.0.map(offset, length, limit)
    }
}
