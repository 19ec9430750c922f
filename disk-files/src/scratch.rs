//! A disk of which writes are kept apart.

use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use camino::Utf8Path;
use rustix::fs::{Mode, OFlags};

use crate::Content;

/// The unit in which writes are kept.
const BLOCK: u64 = 4096;

/// A disk, and what was written over it.
pub(crate) struct Scratch {
    below: Box<dyn Content>,
    file: File,
    /// Numbers of the blocks that are in the file.
    written: Mutex<BTreeSet<u64>>,
}

impl Scratch {
    /// Nothing is written yet. The file is made in `directory` without a name.
    pub(crate) fn new(below: Box<dyn Content>, directory: &Utf8Path) -> io::Result<Self> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let file = File::from(rustix::fs::open(directory.as_std_path(), flags, Mode::RUSR | Mode::WUSR)?);
        Ok(Self { below, file, written: Mutex::default() })
    }

    pub(crate) fn size(&self) -> u64 {
        self.below.size()
    }

    fn written(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads up to `length` bytes; fewer at the end of the disk.
    pub(crate) fn read(&self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let end = offset.saturating_add(length).min(self.size());
        let length = usize::try_from(end.saturating_sub(offset)).map_err(io::Error::other)?;
        let mut buf = vec![0; length];
        if length == 0 {
            return Ok(buf);
        }
        self.below.read_at(&mut buf, offset)?;
        for block in self.written().range(offset / BLOCK..=(end - 1) / BLOCK) {
            let (from, to) = ((block * BLOCK).max(offset), ((block + 1) * BLOCK).min(end));
            let part = buf.get_mut((from - offset) as usize..(to - offset) as usize);
            self.file.read_exact_at(part.unwrap_or_default(), from)?;
        }
        Ok(buf)
    }

    /// Keeps what is written, within the disk.
    pub(crate) fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= self.size());
        let end = end.ok_or(io::ErrorKind::InvalidInput)?;
        if data.is_empty() {
            return Ok(());
        }
        // One write at a time: two that share a block would each keep the other's part as it was.
        let mut written = self.written();
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        for block in first..=last {
            let is_whole = block * BLOCK >= offset && (block + 1) * BLOCK <= end;
            if is_whole || written.contains(&block) {
                continue;
            }
            let mut whole = vec![0; (BLOCK.min(self.size() - block * BLOCK)) as usize];
            self.below.read_at(&mut whole, block * BLOCK)?;
            self.file.write_all_at(&whole, block * BLOCK)?;
        }
        self.file.write_all_at(data, offset)?;
        // Last: a write that failed leaves what was there.
        written.extend(first..=last);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A disk whose bytes tell their offset.
    struct Pattern(u64);

    fn byte(offset: u64) -> u8 {
        (offset % 251) as u8
    }

    impl Content for Pattern {
        fn size(&self) -> u64 {
            self.0
        }

        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            buf.iter_mut().zip(offset..).for_each(|(into, offset)| *into = byte(offset));
            Ok(())
        }
    }

    #[test]
    fn writes_are_read_back_over_the_disk() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        // Not a multiple of a block.
        let size = 10 * BLOCK + 512;
        let path = Utf8Path::from_path(dir.path()).unwrap_or(Utf8Path::new("/tmp"));
        let scratch = Scratch::new(Box::new(Pattern(size)), path)?;
        let mut wanted: Vec<u8> = (0..size).map(byte).collect();
        for (offset, length) in
            [(0, 1), (4095, 2), (8192, 4096), (100, 9000), (size - 5, 5), (20480, 8193), (7, 0)]
        {
            let data = vec![0xee; length];
            scratch.write(offset, &data)?;
            wanted[offset as usize..offset as usize + length].copy_from_slice(&data);
            assert!(scratch.read(0, size)? == wanted, "after a write of {length} at {offset}");
        }
        for (offset, length) in [(1, 5000), (size - 3, 100), (4096, 4096), (size, 10), (size + 9, 1)] {
            let end = (offset + length).min(size).max(offset);
            let part = wanted.get(offset as usize..end as usize).unwrap_or_default();
            assert!(scratch.read(offset, length)? == part, "{length} at {offset}");
        }
        assert_eq!(std::fs::read_dir(dir.path())?.count(), 0, "the scratch file has a name");
        Ok(())
    }

    #[test]
    fn writes_beyond_the_disk_are_errors() -> anyhow::Result<()> {
        let dir = tempfile::tempdir()?;
        let path = Utf8Path::from_path(dir.path()).unwrap_or(Utf8Path::new("/tmp"));
        let scratch = Scratch::new(Box::new(Pattern(BLOCK)), path)?;
        assert!(scratch.write(BLOCK - 1, &[1, 2]).is_err());
        assert!(scratch.write(u64::MAX, &[1]).is_err());
        assert!(
            scratch.read(0, BLOCK)? == (0..BLOCK).map(byte).collect::<Vec<_>>(),
            "a refused write was kept"
        );
        Ok(())
    }
}
