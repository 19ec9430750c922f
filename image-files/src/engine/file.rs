//! The image as a file: positioned reads and writes that succeed whole or return an error.
//!
//! A read past the end of the file returns zeros there, as the format requires. Nothing is cached or ordered
//! here. Two writes without an [`ImageFile::flush`] between them may reach the disk in any order, or only one
//! of them may.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::error::{Error, Result};
use super::offset::HostOffset;
use crate::extents::allocated_in;

/// Storage below an [`ImageFile`]: a file, or a recorder in tests.
#[expect(clippy::len_without_is_empty, reason = "a length in bytes, not that of a collection")]
pub trait Storage: Send + Sync {
    /// Reads up to `buf.len()` bytes; 0 at the end.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize>;
    /// Writes up to `buf.len()` bytes.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize>;
    /// Bytes.
    fn len(&self) -> io::Result<u64>;
    /// Makes the file longer or shorter.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes everything written so far durable.
    fn flush(&self) -> io::Result<()>;
    /// Frees the space of a range, which then reads as zeros. Returns an error where that is not supported.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// The underlying file, for reflinks and the like.
    fn file(&self) -> Option<&File>;
}

impl Storage for File {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        FileExt::read_at(self, buf, offset)
    }
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        FileExt::write_at(self, buf, offset)
    }
    fn len(&self) -> io::Result<u64> {
        crate::size_of(self)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        File::set_len(self, len)
    }
    fn flush(&self) -> io::Result<()> {
        self.sync_data()
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        use rustix::fs::{FallocateFlags, fallocate};
        Ok(fallocate(self, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?)
    }
    fn file(&self) -> Option<&File> {
        Some(self)
    }
}

/// An open image file.
pub struct ImageFile {
    storage: Box<dyn Storage>,
    path: PathBuf,
    writable: bool,
    /// Writes begun through this value, changes of length included.
    writes: AtomicU64,
}

impl std::fmt::Debug for ImageFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageFile").field("path", &self.path).field("writable", &self.writable).finish()
    }
}

impl ImageFile {
    /// Makes an image file of any storage.
    pub fn new(storage: Box<dyn Storage>, path: &Path, writable: bool) -> Self {
        Self { storage, path: path.to_owned(), writable, writes: AtomicU64::new(0) }
    }

    /// Opens a regular file or block device. The open does not wait, and it follows no link that another user
    /// can put there.
    ///
    /// # Errors
    /// The system's.
    pub fn open(path: &Path, writable: bool) -> Result<Self> {
        let file = confined_files::open(path, writable, confined_files::Kind::RegularOrBlock)
            .map_err(|e| Error::io("the file does not open", e).on("open", path))?;
        Ok(Self::new(Box::new(file), path, writable))
    }

    /// The same open file, with its locks, by another of its names.
    ///
    /// # Errors
    /// The system's. Storage that is no file has no names.
    pub fn under(&self, path: &Path) -> Result<Self> {
        let failed = |e| Error::io("the file cannot be shared", e).on("open", &self.path);
        let file = self.file().ok_or_else(|| failed(io::ErrorKind::Unsupported.into()))?;
        Ok(Self::new(Box::new(file.try_clone().map_err(failed)?), path, self.writable))
    }

    /// The path it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Counts the writes that were begun, successful or not. A failing operation compares the number with the
    /// one at its start: if they are equal, the file is unchanged.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::Relaxed)
    }

    /// Returns true if it was opened for writing.
    pub fn is_writable(&self) -> bool {
        self.writable
    }

    /// The file, for reflinks and `copy_file_range`; `None` if it is not a file of the system's.
    pub fn file(&self) -> Option<&File> {
        self.storage.file()
    }

    /// Bytes in the file.
    ///
    /// # Errors
    /// The system's.
    pub fn len(&self) -> Result<u64> {
        self.storage.len().map_err(|e| Error::io("the file's size cannot be read", e).on("read", &self.path))
    }

    /// Returns true if the file is empty.
    ///
    /// # Errors
    /// The system's.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills `buf`. Bytes past the end of the file become zeros.
    ///
    /// # Errors
    /// The system's, with the offset.
    pub fn read_at(&self, buf: &mut [u8], offset: HostOffset) -> Result<()> {
        let mut done = 0;
        while done < buf.len() {
            // A position that no file can have is past every end.
            let at = match offset.0.checked_add(done as u64) {
                Some(at) if i64::try_from(at).is_ok() => at,
                _ => break,
            };
            match self.storage.read_at(&mut buf[done..], at) {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return Err(Error::io(
                        format!("{} bytes at offset {offset} cannot be read", buf.len()),
                        e,
                    )
                    .on("read", &self.path));
                }
            }
        }
        buf[done..].fill(0);
        Ok(())
    }

    /// Writes all of `buf`. The bytes are durable after the next [`ImageFile::flush`], and in no order before
    /// it.
    ///
    /// # Errors
    /// The system's, with the offset. A part of the bytes may have been written.
    pub fn write_at(&self, buf: &[u8], offset: HostOffset) -> Result<()> {
        let fail = |e| {
            Error::io(format!("{} bytes at offset {offset} cannot be written", buf.len()), e)
                .on("write", &self.path)
        };
        self.writes.fetch_add(1, Ordering::Relaxed);
        let mut done = 0;
        while done < buf.len() {
            let at = offset
                .0
                .checked_add(done as u64)
                .ok_or_else(|| fail(io::Error::from(io::ErrorKind::FileTooLarge)))?;
            match self.storage.write_at(&buf[done..], at) {
                Ok(0) => return Err(fail(io::Error::from(io::ErrorKind::WriteZero))),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(fail(e)),
            }
        }
        Ok(())
    }

    /// Makes everything written so far durable (`fdatasync`).
    ///
    /// # Errors
    /// The system's. Bytes written since the last flush may or may not be on the disk then, and a second
    /// flush does not show which. The image must be closed and read again.
    pub fn flush(&self) -> Result<()> {
        self.storage
            .flush()
            .map_err(|e| Error::io("what was written cannot be made durable", e).on("flush", &self.path))
    }

    /// Makes the file longer (it reads as zeros there) or shorter.
    ///
    /// # Errors
    /// The system's.
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.storage.set_len(len).map_err(|e| {
            Error::io(format!("the file's size cannot be made {len}"), e).on("resize", &self.path)
        })
    }

    /// Returns the bytes that ranges of the file occupy on the file system; `None` if it is in none.
    ///
    /// # Errors
    /// The system's.
    pub fn allocated_in(&self, ranges: &[Range<u64>]) -> Result<Option<u64>> {
        let Some(file) = self.storage.file() else { return Ok(None) };
        let counted = allocated_in(file, ranges);
        counted
            .map(Some)
            .map_err(|error| Error::io("what the file takes on its file system cannot be read", error))
    }

    /// Returns the space of a range to the file system. This is an optimisation: the result is `false` where
    /// it is not supported.
    pub fn punch(&self, offset: HostOffset, len: u64) -> bool {
        self.storage.punch(offset.0, len).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_past_the_end_gives_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        std::fs::write(&path, b"abc").unwrap();
        let f = ImageFile::open(&path, false).unwrap();
        let mut buf = [7; 6];
        f.read_at(&mut buf, HostOffset(1)).unwrap();
        assert_eq!(&buf, b"bc\0\0\0\0");
        f.read_at(&mut buf, HostOffset(u64::MAX - 2)).unwrap();
        assert_eq!(buf, [0; 6]);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let e = ImageFile::open(Path::new("/nonexistent/x.qcow2"), false).unwrap_err();
        assert_eq!(e.kind(), super::super::error::ErrorKind::FileNotFound);
        assert!(e.to_string().contains("/nonexistent/x.qcow2"), "{e}");
    }
}
