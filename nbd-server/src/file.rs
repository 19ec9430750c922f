//! A raw file or a block device as an image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

use crate::image::{Content, Extent, Image, Zeroing};

/// Bytes of zeros that are written at a time, where the file system cannot make them.
const ZEROS: usize = 1 << 20;

/// A raw image: the bytes of the file are the bytes of the disk. Its size is that of the moment it was
/// opened. The caller has locked it.
#[derive(Debug)]
pub struct RawFile {
    file: File,
    size: u64,
    read_only: bool,
    /// A flush failed.
    failed: AtomicBool,
}

impl RawFile {
    /// Makes an image of an open file of `size` bytes.
    pub fn new(file: File, size: u64, read_only: bool) -> Self {
        Self { file, size, read_only, failed: AtomicBool::new(false) }
    }

    fn write_zeros(&self, offset: u64, length: u64) -> io::Result<()> {
        let zeros = vec![0; ZEROS.min(usize::try_from(length).unwrap_or(ZEROS))];
        let mut done = 0;
        while done < length {
            let part = usize::try_from(length - done).unwrap_or(ZEROS).min(zeros.len());
            self.file.write_all_at(zeros.get(..part).unwrap_or_default(), offset + done)?;
            done += part as u64;
        }
        Ok(())
    }
}

/// Errors that mean that the file system or device has no such method.
fn has_no_method(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL | Errno::NODEV)
}

impl Image for RawFile {
    fn size(&self) -> u64 {
        self.size
    }

    fn is_read_only(&self) -> bool {
        self.read_only
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn zero(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let keep = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        let methods: &[_] = if how.may_free { &[punch, keep] } else { &[keep] };
        for method in methods {
            match fallocate(&self.file, *method, offset, length) {
                Ok(()) => return Ok(()),
                Err(errno) if has_no_method(errno) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        match how.fast_only {
            true => Err(io::Error::from(io::ErrorKind::Unsupported)),
            false => self.write_zeros(offset, length),
        }
    }

    fn trim(&self, offset: u64, length: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length) {
            Ok(()) => Ok(()),
            // The client only gives advice.
            Err(errno) if has_no_method(errno) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        if self.failed.load(Ordering::Acquire) {
            return Err(io::Error::other("an earlier flush failed; what was lost then is unknown"));
        }
        // The kernel reports a failed write-back once, and may drop the pages. So the failure is kept.
        self.file.sync_data().inspect_err(|_| self.failed.store(true, Ordering::Release))
    }

    fn map(&self, offset: u64, length: u64, limit: usize) -> io::Result<Vec<Extent>> {
        let end = offset.saturating_add(length).min(self.size);
        let (mut at, mut extents) = (offset, Vec::new());
        while at < end && extents.len() < limit {
            let (until, content) = match seek(&self.file, SeekFrom::Data(at)) {
                Ok(data) if data > at => (data, Content::Hole),
                Ok(_) => match seek(&self.file, SeekFrom::Hole(at)) {
                    Ok(hole) if hole > at => (hole, Content::Data),
                    // The file changed in between.
                    Ok(_) | Err(Errno::NXIO) => (end, Content::Data),
                    Err(errno) => return Err(errno.into()),
                },
                Err(Errno::NXIO) => (end, Content::Hole),
                // Without holes, or a device: data everywhere.
                Err(errno) if has_no_method(errno) => (end, Content::Data),
                Err(errno) => return Err(errno.into()),
            };
            let until = until.min(end);
            extents.push(Extent { length: until - at, content });
            at = until;
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn raw(size: u64) -> RawFile {
        let file = tempfile::tempfile_in("/var/tmp").unwrap();
        file.set_len(size).unwrap();
        RawFile::new(file, size, false)
    }

    /// Zeros and trims change no byte outside their range, and the map shows data and holes.
    #[test]
    fn ranges_are_zeroed_and_mapped() {
        let image = raw(1 << 20);
        image.write_at(&[7; 256 << 10], 128 << 10).unwrap();
        let how = Zeroing { may_free: true, fast_only: false };
        image.zero(192 << 10, 64 << 10, how).unwrap();
        let mut bytes = vec![1; 1 << 20];
        image.read_at(&mut bytes, 0).unwrap();
        for (at, byte) in bytes.iter().enumerate() {
            let inside = (128 << 10..192 << 10).contains(&at) || (256 << 10..384 << 10).contains(&at);
            assert_eq!(*byte, if inside { 7 } else { 0 }, "{at}");
        }
        let map = image.map(0, 1 << 20, 100).unwrap();
        assert_eq!(map.iter().map(|extent| extent.length).sum::<u64>(), 1 << 20);
        assert_eq!(map.first().unwrap().content, Content::Hole);
        assert!(image.map(0, 1 << 20, 1).unwrap().len() == 1);
    }

    /// A file that became shorter is an error for its reader, never zeros.
    #[test]
    fn shortened_file_is_an_error() {
        let image = raw(8192);
        image.file.set_len(4096).unwrap();
        assert!(image.read_at(&mut [0; 8192], 0).is_err());
    }
}
