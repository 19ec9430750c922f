//! Sparse copies with a checksum.
//!
//! The checksum covers the blocks that are not all zeros, each with its number, so it does not depend on how
//! sparse a file is. It is stored in a file of its own beside the copy, `<copy>.crc32`, which is durable
//! before the copy gets its name.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::Directory;
use image_files::names::{self, io_error};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate};
use rustix::io::Errno;
use snapcore::backend::Progress;
use snapcore::{Error, ErrorKind, Result};
use tokio_util::sync::CancellationToken;

/// Bytes that are read, compared with zeros, summed and written at once. The checksum depends on this number.
const BLOCK: usize = 64 << 10;

/// Text before the number in a checksum's file.
const HEADING: &str = "domsnap raw crc32 ";

/// Bytes of a checksum's file that are read: more than any has.
const MAX_SUM_FILE: u64 = 64;

/// Progress and cancellation of a copy.
#[derive(Clone, Copy)]
pub(crate) struct Watch<'a> {
    pub(crate) progress: &'a dyn Progress,
    pub(crate) cancel: &'a CancellationToken,
    /// Planned bytes of data.
    pub(crate) bytes: u64,
}

/// Copies the non-zero blocks of `from` into the empty `to`, sets the length of `to` last, and returns the
/// checksum. So a copy that is as long as its source is complete, but not yet durable. With `reserve`, space
/// for all of it is reserved too.
///
/// # Errors
/// [`ErrorKind::Cancelled`], [`ErrorKind::NoSpace`], [`ErrorKind::Io`].
pub(crate) fn copy(
    from: &File,
    from_path: &Utf8Path,
    to: &File,
    to_path: &Utf8Path,
    reserve: bool,
    watch: Watch<'_>,
) -> Result<u32> {
    let writing = |error| io_error(error, format!("cannot write {to_path}"));
    let sum = read_blocks(from, from_path, watch, |at, block| to.write_all_at(block, at).map_err(writing))?;
    let length =
        from.metadata().map_err(|error| io_error(error, format!("cannot look at {from_path}")))?.len();
    if reserve {
        reserve_all(to, to_path, length)?;
    }
    to.set_len(length).map_err(writing)?;
    Ok(sum)
}

/// Reserves space for a file that is or will be `length` bytes long. Its length and data do not change.
pub(crate) fn reserve_all(file: &File, path: &Utf8Path, length: u64) -> Result<()> {
    match fallocate(file, FallocateFlags::KEEP_SIZE, 0, length.max(1)) {
        // On a file system that cannot reserve space, the source had none reserved.
        Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
        Err(errno) => Err(io_error(errno.into(), format!("cannot reserve {length} bytes for {path}"))),
    }
}

/// Returns true if the file occupies at least its length on the file system: its space was reserved, or it
/// was written in full.
pub(crate) fn is_reserved(path: &Utf8Path) -> bool {
    fs::metadata(path)
        .is_ok_and(|about| about.is_file() && about.len() > 0 && about.blocks() * 512 >= about.len())
}

/// Computes the checksum of a file.
pub(crate) fn sum(file: &File, path: &Utf8Path, watch: Watch<'_>) -> Result<u32> {
    read_blocks(file, path, watch, |_, _| Ok(()))
}

/// Passes each block that is not all zeros to `block`, with its offset, and computes their checksum.
fn read_blocks(
    file: &File,
    path: &Utf8Path,
    watch: Watch<'_>,
    mut block: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<u32> {
    let reading = |error| io_error(error, format!("cannot read {path}"));
    let mut sum = crc32fast::Hasher::new();
    let mut buffer = vec![0u8; BLOCK];
    let (mut at, mut done) = (0u64, 0u64);
    let step = BLOCK as u64;
    while let Some(data) = next_data(file, at).map_err(reading)? {
        at = data / step * step;
        if watch.cancel.is_cancelled() {
            return Err(Error::new(ErrorKind::Cancelled, format!("the copying of {path} was cancelled")));
        }
        let read = read_up_to(file, &mut buffer, at).map_err(reading)?;
        let Some(found) = buffer.get(..read).filter(|found| !found.is_empty()) else { break };
        if found.iter().any(|byte| *byte != 0) {
            sum.update(&(at / step).to_le_bytes());
            // The last block may be short. Trailing zeros are not part of the checksum.
            let end = found.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            sum.update(found.get(..end).unwrap_or(found));
            block(at, found)?;
        }
        done += read as u64;
        watch.progress.bytes(done, watch.bytes.max(done));
        at += step;
    }
    Ok(sum.finalize())
}

/// Returns the start of data at or after `at`.
fn next_data(file: &File, at: u64) -> io::Result<Option<u64>> {
    match rustix::fs::seek(file, SeekFrom::Data(at)) {
        Ok(data) => Ok(Some(data)),
        Err(Errno::NXIO) => Ok(None),
        // A file system without holes has data everywhere.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok((at < file.metadata()?.len()).then_some(at)),
        Err(errno) => Err(errno.into()),
    }
}

fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + filled as u64) {
            Ok(0) => break,
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

/// Returns true if two files have the same content.
pub(crate) fn same_content(one: &Utf8Path, other: &Utf8Path) -> Result<bool> {
    let open = |path: &Utf8Path| names::open_image(path, false);
    let (a, b) = (open(one)?, open(other)?);
    let length = |file: &File| file.metadata().map(|about| about.len());
    let looking = |error| io_error(error, format!("cannot look at {one} and {other}"));
    if length(&a).map_err(looking)? != length(&b).map_err(looking)? {
        return Ok(false);
    }
    let comparing = |error| io_error(error, format!("cannot compare {one} with {other}"));
    let (mut left, mut right) = (vec![0u8; BLOCK], vec![0u8; BLOCK]);
    let mut at = 0;
    loop {
        let next = [next_data(&a, at).map_err(comparing)?, next_data(&b, at).map_err(comparing)?];
        let Some(data) = next.into_iter().flatten().min() else { return Ok(true) };
        at = data / BLOCK as u64 * BLOCK as u64;
        let read = read_up_to(&a, &mut left, at).map_err(comparing)?;
        if read_up_to(&b, &mut right, at).map_err(comparing)? != read || left.get(..read) != right.get(..read)
        {
            return Ok(false);
        }
        if read == 0 {
            return Ok(true);
        }
        at += BLOCK as u64;
    }
}

/// The file with a copy's checksum.
pub(crate) fn sum_file(layer: &Utf8Path) -> Utf8PathBuf {
    Utf8PathBuf::from(format!("{layer}.crc32"))
}

/// Writes a copy's checksum. It is durable when this returns.
pub(crate) fn write_sum(layer: &Utf8Path, sum: u32) -> Result<()> {
    let file = sum_file(layer);
    let writing = |error| io_error(error, format!("cannot write {file}"));
    let passing = names::unfinished_name(&file);
    let write = || {
        let (directory, name) = Directory::of(passing.as_std_path())?;
        directory.remove(&name)?;
        let mut made = directory.create_new(&name, 0o600)?;
        made.write_all(format!("{HEADING}{sum:08x}\n").as_bytes())?;
        made.sync_all()?;
        let about = made.metadata()?;
        let (_, last) = Directory::of(file.as_std_path())?;
        directory.rename(&name, &last, Some((about.dev(), about.ino())))?;
        directory.sync()
    };
    write().map_err(writing)
}

/// Reads the checksum beside a layer; `None` if there is none, because the layer is not a copy but shares
/// blocks.
pub(crate) fn stated_sum(layer: &Utf8Path) -> Result<Option<u32>> {
    let file = sum_file(layer);
    let reading = |error| io_error(error, format!("cannot read {file}"));
    // Another user may have put anything there. So a FIFO is not waited for, a link is not followed, and no
    // more is read than a checksum has.
    let opened = match confined_files::open_regular(file.as_std_path(), false) {
        Ok(opened) => Some(opened),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) if confined_files::refusal(&error).is_some() => None,
        Err(error) => return Err(reading(error)),
    };
    let mut text = Vec::new();
    if let Some(opened) = opened {
        opened.take(MAX_SUM_FILE).read_to_end(&mut text).map_err(reading)?;
    }
    let text = String::from_utf8_lossy(&text);
    let number = text.trim_end().strip_prefix(HEADING).and_then(|hex| u32::from_str_radix(hex, 16).ok());
    match number {
        Some(sum) => Ok(Some(sum)),
        None => Err(Error::new(ErrorKind::Corrupt, format!("{file} is not a checksum by domsnap"))
            .state("the copy beside it was not touched")
            .advise("remove it, if the copy is to be used unchecked")),
    }
}

/// Compares a copy with its checksum, if it has one.
///
/// # Errors
/// [`ErrorKind::Corrupt`] if the content differs from what was copied.
pub(crate) fn verify(layer: &Utf8Path, watch: Watch<'_>) -> Result<()> {
    let Some(stated) = stated_sum(layer)? else { return Ok(()) };
    let file = names::open_own(layer, false)?;
    let found = sum(&file, layer, watch)?;
    if found == stated {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Corrupt,
        format!("{layer} is not what was copied into it: its checksum is {found:08x}, and {stated:08x} was recorded"),
    )
    .advise("another program wrote it, or the disk under it is failing: restore it from a backup"))
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Silent;

    impl Progress for Silent {
        fn bytes(&self, _: u64, _: u64) {}
    }

    fn directory() -> (tempfile::TempDir, Utf8PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(directory.path().to_owned()).unwrap();
        (directory, path)
    }

    /// Copies `from` to `to` as a step does, and states the checksum.
    fn copied(from: &Utf8Path, to: &Utf8Path, cancel: &CancellationToken) -> Result<u32> {
        let (source, made) = (File::open(from).unwrap(), File::create_new(to).unwrap());
        copy(&source, from, &made, to, false, Watch { progress: &Silent, cancel, bytes: 0 })
    }

    fn verified(layer: &Utf8Path) -> Result<()> {
        verify(layer, Watch { progress: &Silent, cancel: &CancellationToken::new(), bytes: 0 })
    }

    /// The checksum is of the content: written zeros and a hole are the same, another place of a block is
    /// not.
    #[test]
    fn sum_ignores_holes_but_not_places() {
        let (_keep, dir) = directory();
        let content = |name: &str, blocks: &[u8]| {
            let path = dir.join(name);
            let bytes: Vec<u8> = blocks.iter().flat_map(|byte| vec![*byte; BLOCK]).collect();
            fs::write(&path, bytes).unwrap();
            let cancel = CancellationToken::new();
            sum(&File::open(&path).unwrap(), &path, Watch { progress: &Silent, cancel: &cancel, bytes: 0 })
                .unwrap()
        };
        let written = content("written", &[1, 0, 2]);
        let hole = dir.join("hole");
        let file = File::create_new(&hole).unwrap();
        file.write_all_at(&[1; BLOCK], 0).unwrap();
        file.write_all_at(&[2; BLOCK], 2 * BLOCK as u64).unwrap();
        let cancel = CancellationToken::new();
        let watch = Watch { progress: &Silent, cancel: &cancel, bytes: 0 };
        assert_eq!(sum(&File::open(&hole).unwrap(), &hole, watch).unwrap(), written);
        assert_ne!(content("moved", &[1, 2, 0]), written);
    }

    /// A copy holds the same bytes, is as long, and has a hole for each block of zeros.
    #[test]
    fn copy_is_equal_and_sparse() {
        let (_keep, dir) = directory();
        let (from, to) = (dir.join("from"), dir.join("to"));
        let mut bytes = vec![0; 16 * BLOCK];
        bytes[5 * BLOCK] = 1;
        bytes.extend([7; 1000]); // not whole blocks
        fs::write(&from, &bytes).unwrap();
        copied(&from, &to, &CancellationToken::new()).unwrap();
        assert_eq!(fs::read(&to).unwrap(), bytes);
        assert!(same_content(&from, &to).unwrap());
        assert!(to.metadata().unwrap().blocks() * 512 < 4 * BLOCK as u64, "zeros were written");
    }

    /// A cancelled copy does not get its length, by which a whole copy is known.
    #[test]
    fn cancelled_copy_is_not_whole() {
        let (_keep, dir) = directory();
        let (from, to) = (dir.join("from"), dir.join("to"));
        fs::write(&from, vec![1; 4 * BLOCK]).unwrap();
        let cancel = CancellationToken::new();
        cancel.cancel();
        assert_eq!(copied(&from, &to, &cancel).unwrap_err().kind(), ErrorKind::Cancelled);
        assert!(to.metadata().unwrap().len() < 4 * BLOCK as u64);
    }

    /// A changed bit is found, and so is a checksum that is no number; a point without one is not judged.
    #[test]
    fn damage_of_a_point_is_found() {
        let (_keep, dir) = directory();
        let (from, to) = (dir.join("from"), dir.join("to"));
        fs::write(&from, vec![3; 2 * BLOCK]).unwrap();
        let stated = copied(&from, &to, &CancellationToken::new()).unwrap();
        assert_eq!(stated_sum(&to).unwrap(), None);
        verified(&to).unwrap();
        write_sum(&to, stated).unwrap();
        assert_eq!(stated_sum(&to).unwrap(), Some(stated));
        verified(&to).unwrap();
        File::options().write(true).open(&to).unwrap().write_all_at(&[2], BLOCK as u64 + 9).unwrap();
        assert_eq!(verified(&to).unwrap_err().kind(), ErrorKind::Corrupt);
        fs::write(sum_file(&to), "domsnap raw crc32 nothing\n").unwrap();
        assert_eq!(stated_sum(&to).unwrap_err().kind(), ErrorKind::Corrupt);
    }

    /// Files of different lengths, and of one different byte in the last block, are not the same.
    #[test]
    fn same_content_compares_every_byte() {
        let (_keep, dir) = directory();
        let (one, other) = (dir.join("one"), dir.join("other"));
        let mut bytes = vec![5; 3 * BLOCK + 17];
        fs::write(&one, &bytes).unwrap();
        fs::write(&other, &bytes[1..]).unwrap();
        assert!(!same_content(&one, &other).unwrap());
        *bytes.last_mut().unwrap() = 6;
        fs::write(&other, &bytes).unwrap();
        assert!(!same_content(&one, &other).unwrap());
    }
}
