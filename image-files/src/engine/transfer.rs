//! Copying bytes from one image file to another in large pieces, by the cheapest method that the file systems
//! have.
//!
//! `copy_file_range` shares the blocks where the file system supports that (btrfs, xfs), and copies within
//! the kernel elsewhere. Between file systems, or where the call is not supported, it is a read and a write
//! of 1 MiB.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use snapcore::backend::Progress;

use super::error::{Error, Result};
use super::file::ImageFile;
use super::offset::HostOffset;

/// Bytes in one read or write.
const CHUNK: usize = 1 << 20;
/// Adjacent copies are joined up to this many bytes.
const JOIN: u64 = 64 << 20;

/// The caller's side of an operation that moves data.
#[derive(Clone, Copy)]
pub struct Moving<'a> {
    /// Receives the bytes of each move: not a sum.
    pub progress: &'a dyn Fn(u64),
    /// Returns true if the operation should stop.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl Moving<'static> {
    /// Runs to the end without reports.
    pub fn quietly() -> Self {
        Self { progress: &|_| {}, cancelled: &|| false }
    }
}

impl Moving<'_> {
    /// Runs `work`, and reports the sum of what it moves. `planned` are the bytes that it is expected to
    /// move.
    pub fn reported<T>(
        progress: &dyn Progress,
        planned: u64,
        cancelled: &dyn Fn() -> bool,
        work: impl FnOnce(&Moving<'_>) -> T,
    ) -> T {
        let moved = AtomicU64::new(0);
        let report = |bytes: u64| {
            let done = moved.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes);
            progress.bytes(done, planned.max(done));
        };
        work(&Moving { progress: &report, cancelled })
    }
}

/// One copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Copy {
    /// Source: any number that identifies one file.
    pub source: usize,
    /// Offset in the source.
    pub from: u64,
    /// Offset in the target.
    pub to: u64,
    /// Bytes.
    pub length: u64,
}

/// Joins adjacent copies.
#[derive(Debug, Default)]
pub struct Joiner {
    pending: Option<Copy>,
}

impl Joiner {
    /// Adds one copy. Returns the previous one if the new one does not continue it.
    pub fn push(&mut self, next: Copy) -> Option<Copy> {
        if let Some(last) = &mut self.pending
            && last.source == next.source
            && last.from.checked_add(last.length) == Some(next.from)
            && last.to.checked_add(last.length) == Some(next.to)
            && last.length < JOIN
        {
            last.length += next.length;
            return None;
        }
        self.pending.replace(next)
    }

    /// Returns the remaining copy.
    pub fn take(&mut self) -> Option<Copy> {
        self.pending.take()
    }
}

/// Performs copies, and remembers what the file systems do not support.
#[derive(Debug, Default)]
pub struct Copier {
    buffer: Vec<u8>,
    /// Sources for which the kernel does not copy.
    by_hand: Vec<usize>,
}

impl Copier {
    /// Copies. Calls `step` with the bytes done after about each megabyte; an error from it stops the copy.
    ///
    /// # Errors
    /// The system's, and those of `step`.
    pub fn copy(
        &mut self,
        source: &ImageFile,
        target: &ImageFile,
        copy: Copy,
        step: &mut dyn FnMut(u64) -> Result<()>,
    ) -> Result<()> {
        let mut done = 0;
        while done < copy.length {
            let left = copy.length - done;
            let (from, to) = (copy.from + done, copy.to + done);
            let n = match self.in_kernel(source, target, Copy { from, to, length: left, ..copy })? {
                Some(n) => n,
                None => {
                    let n = usize::try_from(left).unwrap_or(usize::MAX).min(CHUNK);
                    if self.buffer.len() < n {
                        self.buffer.resize(n, 0);
                    }
                    let part = self.buffer.get_mut(..n).unwrap_or_default();
                    source.read_at(part, HostOffset(from))?;
                    target.write_at(part, HostOffset(to))?;
                    n as u64
                }
            };
            step(n)?;
            done += n;
        }
        Ok(())
    }

    /// Lets the kernel copy, and returns the number of bytes. `None` if read and write must be used.
    fn in_kernel(&mut self, source: &ImageFile, target: &ImageFile, copy: Copy) -> Result<Option<u64>> {
        let (Some(from), Some(to)) = (source.file(), target.file()) else { return Ok(None) };
        if self.by_hand.contains(&copy.source) {
            return Ok(None);
        }
        let (mut at, mut place) = (copy.from, copy.to);
        // In pieces, so that cancellation works on file systems that really copy.
        let length = usize::try_from(copy.length.min(16 << 20)).unwrap_or(CHUNK);
        loop {
            return match rustix::fs::copy_file_range(from, Some(&mut at), to, Some(&mut place), length) {
                // The source file ends here; zeros are written instead.
                Ok(0) => Ok(None),
                Ok(n) => Ok(Some(n as u64)),
                Err(rustix::io::Errno::INTR) => continue,
                Err(full @ (rustix::io::Errno::NOSPC | rustix::io::Errno::DQUOT)) => Err(Error::io(
                    format!("{} bytes cannot be copied to offset {:#x}", copy.length, copy.to),
                    io::Error::from(full),
                )
                .on("write", target.path())),
                // Another file system, a device, or no such call: read and write. A real error will appear
                // there.
                Err(_) => {
                    self.by_hand.push(copy.source);
                    Ok(None)
                }
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copy(from: u64, to: u64, length: u64) -> Copy {
        Copy { source: 0, from, to, length }
    }

    #[test]
    fn only_copies_that_touch_on_both_sides_are_joined() {
        let mut j = Joiner::default();
        assert_eq!(j.push(copy(0, 100, 10)), None);
        assert_eq!(j.push(copy(10, 110, 10)), None);
        assert_eq!(j.push(copy(20, 130, 10)), Some(copy(0, 100, 20)));
        assert_eq!(j.push(copy(40, 140, 10)), Some(copy(20, 130, 10)));
        assert_eq!(j.push(Copy { source: 1, ..copy(50, 150, 10) }), Some(copy(40, 140, 10)));
        assert_eq!(j.take(), Some(Copy { source: 1, ..copy(50, 150, 10) }));
        assert_eq!(j.take(), None);
    }

    /// A range past the end of the source is copied as zeros.
    #[test]
    fn range_past_the_source_end_is_copied_as_zeros() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        std::fs::write(&a, vec![7; 3000]).unwrap();
        std::fs::write(&b, vec![9; 8192]).unwrap();
        let (source, target) = (ImageFile::open(&a, false).unwrap(), ImageFile::open(&b, true).unwrap());
        let mut moved = 0;
        Copier::default()
            .copy(&source, &target, copy(1000, 4000, 3000), &mut |n| {
                moved += n;
                Ok(())
            })
            .unwrap();
        assert_eq!(moved, 3000);
        let bytes = std::fs::read(&b).unwrap();
        assert!(bytes[..4000].iter().all(|x| *x == 9));
        assert!(bytes[4000..6000].iter().all(|x| *x == 7));
        assert!(bytes[6000..7000].iter().all(|x| *x == 0));
        assert!(bytes[7000..].iter().all(|x| *x == 9));
    }
}
