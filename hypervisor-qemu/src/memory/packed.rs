//! [`Packed`]: a compressed memory image.
//!
//! It is not an image that QEMU can load. It is first unpacked ([`Packed::unpack`]) into a file that has no
//! name, so that nothing of that is left after a crash. Each part of the stream is one frame of zstd, and the
//! frames follow each other to the file's end. So several threads pack and unpack parts, and
//! `tail | zstd -dc` extracts the stream too.
//!
//! All numbers are big endian: magic (8 bytes), version, flags (4 bytes each; 0), length of the stream, bytes
//! of a part (8 bytes each), number of parts, length of the tag, of the metadata (4 bytes each), the checksum
//! of each unpacked part, the length of each frame (4 bytes each), the tag, the metadata, and a checksum of
//! all before it. Checksums are CRC-32 (IEEE). The first frame begins at the next multiple of 4096.

use std::{
    fs::File,
    io,
    ops::{Range, RangeInclusive},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    thread,
};

use rustix::fs::{Mode, OFlags};

use super::{
    image::{Image, damaged, read_up_to},
    record::{LONGEST_METADATA, PART, Record},
};
use crate::{
    error::{Error, ErrorKind, Result},
    qcow2::{self, LONGEST, STREAM},
};

const MAGIC: &[u8; 8] = b"DOMSNAPZ";
const VERSION: u32 = 1;
const HEAD: usize = 44;
const ALIGN: u64 = 4096;

/// Maximum number of threads that pack or unpack: each has two parts in memory.
const THREADS: usize = 8;

/// Size of a piece: pieces of zeros are not written.
const PIECE: usize = 64 << 10;

/// The levels of compression.
pub(super) const LEVELS: RangeInclusive<u8> = 1..=snapcore::hypervisor::Control::MAX_COMPRESSION;

/// Progress of packing, and the request to stop it. Shared by the threads that pack and those that watch.
#[derive(Debug, Default)]
pub struct Packing {
    done: AtomicU64,
    stop: AtomicBool,
}

impl Packing {
    /// Returns the number of bytes of the stream that are packed.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Stops packing soon.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    fn check_stop(&self) -> io::Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(()),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Head {
    stream: u64,
    checksums: Vec<u32>,
    frames: Vec<u32>,
    tag: String,
    metadata: Vec<u8>,
}

impl Head {
    fn length(parts: usize, tag: usize, metadata: usize) -> usize {
        HEAD + 8 * parts + tag + metadata + 4
    }

    /// Returns the offset of the frames.
    fn begin(&self) -> u64 {
        let length = Self::length(self.checksums.len(), self.tag.len(), self.metadata.len());
        (length as u64).next_multiple_of(ALIGN)
    }

    fn bytes(&self) -> Vec<u8> {
        let word = |length: usize| u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes();
        let mut bytes = Vec::new();
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend(0u32.to_be_bytes());
        bytes.extend(self.stream.to_be_bytes());
        bytes.extend(PART.to_be_bytes());
        for length in [self.checksums.len(), self.tag.len(), self.metadata.len()] {
            bytes.extend(word(length));
        }
        for number in self.checksums.iter().chain(&self.frames) {
            bytes.extend(number.to_be_bytes());
        }
        bytes.extend(self.tag.as_bytes());
        bytes.extend(&self.metadata);
        bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
        bytes
    }

    /// Reads a head; the inner error describes a damaged one.
    fn read(file: &File) -> io::Result<std::result::Result<Self, String>> {
        let mut head = [0; HEAD];
        let read = read_up_to(file, &mut head, 0)?;
        let word = |bytes: &[u8], at: usize| -> Option<u32> {
            Some(u32::from_be_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
        };
        let long = |at: usize| Some(u64::from(word(&head, at)?) << 32 | u64::from(word(&head, at + 4)?));
        let size = |at: usize| word(&head, at).and_then(|size| usize::try_from(size).ok());
        let all = (long(16), long(24), size(32), size(36), size(40));
        let (Some(stream), Some(part), Some(parts), Some(tag), Some(metadata)) = all else {
            return Ok(Err("its record is cut off".to_owned()));
        };
        if read != HEAD || !head.starts_with(MAGIC) {
            return Ok(Err("it has no record of domsnap's".to_owned()));
        }
        let (version, flags) = (word(&head, 8), word(&head, 12));
        if (version, flags) != (Some(VERSION), Some(0)) {
            let detail = format!("its record has the version {version:?} and the flags {flags:?}");
            return Ok(Err(format!("{detail}, which a later domsnap wrote")));
        }
        let fits = tag < 256 && metadata <= LONGEST_METADATA;
        if !fits || stream == 0 || stream > LONGEST || part != PART || parts as u64 != stream.div_ceil(PART) {
            return Ok(Err(format!(
                "its record counts {parts} parts of {part} bytes in a stream of {stream}"
            )));
        }
        let mut bytes = vec![0; Self::length(parts, tag, metadata)];
        let body = bytes.len() - 4;
        let whole = read_up_to(file, &mut bytes, 0)? == bytes.len();
        let checked = bytes.get(..body).unwrap_or_default();
        if !whole || word(&bytes, body) != Some(crc32fast::hash(checked)) {
            return Ok(Err("its record does not match its own checksum".to_owned()));
        }
        let numbers = |range: Range<usize>| -> Vec<u32> {
            let bytes = checked.get(range).unwrap_or_default();
            bytes.as_chunks::<4>().0.iter().map(|bytes| u32::from_be_bytes(*bytes)).collect()
        };
        let (frames, names) = (HEAD + 4 * parts, HEAD + 8 * parts);
        let Ok(name) = String::from_utf8(checked.get(names..names + tag).unwrap_or_default().to_vec()) else {
            return Ok(Err("its tag is not valid text".to_owned()));
        };
        Ok(Ok(Self {
            stream,
            checksums: numbers(HEAD..frames),
            frames: numbers(frames..names),
            tag: name,
            metadata: checked.get(names + tag..).unwrap_or_default().to_vec(),
        }))
    }
}

/// A compressed memory image that is complete according to its record; [`Packed::verify`] reads all of it.
#[derive(Debug)]
pub struct Packed {
    path: PathBuf,
    file: File,
    head: Head,
}

/// Returns true if a file begins like a compressed memory image.
pub(super) fn is_packed(file: &File) -> io::Result<bool> {
    let mut magic = [0; MAGIC.len()];
    Ok(read_up_to(file, &mut magic, 0)? == magic.len() && &magic == MAGIC)
}

impl Packed {
    /// Opens a compressed image, and reads its record.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Damaged`] if it is not one or is incomplete.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let attempted = "opening a compressed memory image";
        let failed = |error: io::Error| Error::io(attempted, &path, error);
        let file = confined_files::open_regular(&path, false).map_err(failed)?;
        let head = Head::read(&file).map_err(failed)?.map_err(|wrong| damaged(attempted, &path, wrong))?;
        let length = file.metadata().map_err(failed)?.len();
        let expected = head.begin() + head.frames.iter().map(|frame| u64::from(*frame)).sum::<u64>();
        if length != expected {
            let detail = format!("it has {length} bytes, expected {expected}: it was cut off, or written to");
            return Err(damaged(attempted, &path, detail));
        }
        Ok(Self { path, file, head })
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the name that its internal snapshot has when it is unpacked.
    pub fn tag(&self) -> &str {
        &self.head.tag
    }

    /// Returns the metadata that the caller passed to [`super::Draft::pack`].
    pub fn metadata(&self) -> &[u8] {
        &self.head.metadata
    }

    /// Returns the length of QEMU's stream, in bytes.
    pub fn stream_length(&self) -> u64 {
        self.head.stream
    }

    /// Returns the length of the unpacked image, in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if no image can have such a stream or tag.
    pub fn full_length(&self) -> Result<u64> {
        Ok(qcow2::wrapper(self.head.stream, &self.head.tag, 0)?.length)
    }

    /// Returns the file's length, in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn length(&self) -> Result<u64> {
        let about = self.file.metadata();
        Ok(about.map_err(|error| Error::io("reading a memory image", &self.path, error))?.len())
    }

    /// Reads and unpacks the whole image, and checks it against its checksums. Writes nothing. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`], naming the first damaged place; [`ErrorKind::Io`].
    pub fn verify(&self) -> Result<()> {
        self.unpack_to(None)
    }

    /// Unpacks it into a file without a name in the same directory, and checks it against its checksums. The
    /// kernel removes that file when the process ends. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`], naming the first damaged place; [`ErrorKind::Io`], also if the file system is
    /// too full. Nothing is left.
    pub fn unpack(&self) -> Result<Image> {
        let attempted = "unpacking a memory image";
        let failed = |error: io::Error| Error::io(attempted, &self.path, error);
        let wrapper = qcow2::wrapper(self.head.stream, &self.head.tag, 0)?;
        let target = nameless_file(&self.path).map_err(failed)?;
        let room = rustix::fs::fstatvfs(&target).map_err(|error| failed(error.into()))?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        let record = Record {
            stream: self.head.stream,
            checksums: self.head.checksums.clone(),
            metadata: self.head.metadata.clone(),
        };
        let record = record.bytes();
        let tables = wrapper.tables.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() + record.len();
        let needed = self.head.stream + (tables + wrapper.header.len()) as u64;
        if free < needed {
            let detail = format!(
                "No space left beside it: unpacking needs {needed} bytes temporarily, and {free} are free"
            );
            return Err(Error::new(ErrorKind::Io, attempted, self.path.display(), detail)
                .advise("make room there, or revert the disks without memory"));
        }
        target.set_len(wrapper.length).map_err(failed)?;
        self.unpack_to(Some(&target))?;
        for (at, bytes) in &wrapper.tables {
            target.write_all_at(bytes, *at).map_err(failed)?;
        }
        target.write_all_at(&record, qcow2::RECORD).map_err(failed)?;
        target.write_all_at(&wrapper.header, 0).map_err(failed)?;
        Image::nameless(&self.path, target)
    }

    /// Returns the argument of `-incoming` for a QEMU that is started by hand. It runs a shell, which needs
    /// the program `zstd`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the path is not absolute or not UTF-8.
    pub fn incoming(&self) -> Result<String> {
        let path = self.path.to_str().filter(|path| path.starts_with('/'));
        let path = path.ok_or_else(|| {
            let detail = "its path is not absolute, or not UTF-8";
            Error::new(ErrorKind::Invalid, "naming a memory image for QEMU", self.path.display(), detail)
        })?;
        let quoted = path.replace('\'', r"'\''");
        // `tail` counts bytes from 1.
        Ok(format!("exec:tail -c +{} '{quoted}' | zstd -dc", self.head.begin() + 1))
    }

    fn unpack_to(&self, target: Option<&File>) -> Result<()> {
        let attempted = "unpacking a memory image";
        let head = &self.head;
        let mut at = head.begin();
        let places: Vec<u64> = head
            .frames
            .iter()
            .map(|frame| {
                let place = at;
                at += u64::from(*frame);
                place
            })
            .collect();
        // The first damaged part.
        let wrong = AtomicUsize::new(usize::MAX);
        let work = |next: &AtomicUsize, failed: &AtomicBool| -> io::Result<()> {
            let mut unpacker = zstd::bulk::Decompressor::new()?;
            let (mut frame, mut part) = (Vec::new(), Vec::new());
            while !failed.load(Ordering::Relaxed) {
                let number = next.fetch_add(1, Ordering::Relaxed);
                let of = (places.get(number), head.frames.get(number), head.checksums.get(number));
                let (Some(place), Some(length), Some(checksum)) = of else { return Ok(()) };
                let range = part_range(head.stream, number);
                frame.resize(usize::try_from(*length).map_err(io::Error::other)?, 0);
                self.file.read_exact_at(&mut frame, *place)?;
                part.clear();
                part.reserve(size(&range)?);
                let unpacked = unpacker.decompress_to_buffer(&frame, &mut part);
                let whole = matches!(unpacked, Ok(length) if length as u64 == range.end - range.start);
                if !whole || crc32fast::hash(&part) != *checksum {
                    wrong.fetch_min(number, Ordering::Relaxed);
                    return Ok(());
                }
                let Some(target) = target else { continue };
                for (index, piece) in part.chunks(PIECE).enumerate() {
                    if piece.iter().any(|byte| *byte != 0) {
                        target.write_all_at(piece, STREAM + range.start + (index * PIECE) as u64)?;
                    }
                }
            }
            Ok(())
        };
        in_threads(head.frames.len(), work).map_err(|error| Error::io(attempted, &self.path, error))?;
        match wrong.into_inner() {
            usize::MAX => Ok(()),
            part => {
                let place = places.get(part).copied().unwrap_or_default();
                let detail = format!("part {part}, which is at {place}, does not match its checksum");
                Err(damaged(attempted, &self.path, detail))
            }
        }
    }
}

/// Returns the range of a part in the stream.
fn part_range(stream: u64, number: usize) -> Range<u64> {
    let begin = number as u64 * PART;
    begin..stream.min(begin + PART)
}

fn size(range: &Range<u64>) -> io::Result<usize> {
    usize::try_from(range.end - range.start).map_err(io::Error::other)
}

/// Runs work that takes numbers from a counter, in several threads, until one fails.
fn in_threads(
    parts: usize,
    work: impl Fn(&AtomicUsize, &AtomicBool) -> io::Result<()> + Sync,
) -> io::Result<()> {
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let threads = thread::available_parallelism().map_or(1, usize::from).clamp(1, THREADS).min(parts.max(1));
    thread::scope(|scope| {
        let one = || work(&next, &failed).inspect_err(|_| failed.store(true, Ordering::Relaxed));
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(one)).collect();
        let mut outcome = Ok(());
        for thread in running {
            let done = thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")));
            outcome = outcome.and(done);
        }
        outcome
    })
}

/// Creates a private file without a name, in the directory of another file.
fn nameless_file(beside: &Path) -> io::Result<File> {
    let directory = match beside.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    match rustix::fs::open(directory, flags, Mode::RUSR | Mode::WUSR) {
        Ok(file) => return Ok(file.into()),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR | rustix::io::Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let path = directory.join(format!(".{}.scratch", uuid::Uuid::new_v4().simple()));
    let file = confined_files::create_private(&path)?;
    confined_files::remove(&path)?;
    Ok(file)
}

/// Packs the stream of a draft into a file, frame by frame, and writes its record when all else is durable.
/// The file is complete and durable when this returns.
pub(super) fn pack(
    source: &File,
    target: &File,
    stream: u64,
    about: (&str, &[u8]),
    level: u8,
    packing: &Packing,
) -> io::Result<()> {
    let parts = usize::try_from(stream.div_ceil(PART)).map_err(io::Error::other)?;
    let (tag, metadata) = (about.0.to_owned(), about.1.to_vec());
    let mut head = Head { stream, checksums: vec![0; parts], frames: vec![0; parts], tag, metadata };
    /// The frames follow in the order of their parts: a thread waits until all frames before its own have
    /// their offsets.
    struct Order {
        next: usize,
        place: u64,
        done: Vec<(u32, u32)>,
    }
    let order = Mutex::new(Order { next: 0, place: head.begin(), done: Vec::with_capacity(parts) });
    let (moved, ended) = (Condvar::new(), AtomicBool::new(false));
    let work = |next: &AtomicUsize, failed: &AtomicBool| -> io::Result<()> {
        let mut packer = zstd::bulk::Compressor::new(i32::from(level))?;
        let mut part = Vec::new();
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= parts || failed.load(Ordering::Relaxed) {
                return Ok(());
            }
            packing.check_stop()?;
            let range = part_range(stream, number);
            part.resize(size(&range)?, 0);
            source.read_exact_at(&mut part, STREAM + range.start)?;
            let frame = packer.compress(&part)?;
            let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
            let place = {
                let turn = order.lock().unwrap_or_else(PoisonError::into_inner);
                let not_yet = |order: &mut Order| order.next != number && !ended.load(Ordering::Relaxed);
                let mut turn = moved.wait_while(turn, not_yet).unwrap_or_else(PoisonError::into_inner);
                if turn.next != number {
                    return Ok(());
                }
                let place = turn.place;
                turn.place += u64::from(length);
                turn.next += 1;
                turn.done.push((crc32fast::hash(&part), length));
                moved.notify_all();
                place
            };
            target.write_all_at(&frame, place)?;
            packing.done.fetch_add(range.end - range.start, Ordering::Relaxed);
        }
    };
    // A thread that fails wakes those that wait for its frame.
    let work = |next: &AtomicUsize, failed: &AtomicBool| {
        work(next, failed).inspect_err(|_| {
            let _turn = order.lock().unwrap_or_else(PoisonError::into_inner);
            ended.store(true, Ordering::Relaxed);
            moved.notify_all();
        })
    };
    in_threads(parts, work)?;
    let order = order.into_inner().unwrap_or_else(PoisonError::into_inner);
    if order.done.len() != parts {
        return Err(io::Error::other("not all parts were packed"));
    }
    (head.checksums, head.frames) = order.done.into_iter().unzip();
    // 1) Frames durable, 2) then the record that names them, 3) then that durable. A crash before the end of
    //    2) leaves a file that `Packed::open` rejects.
    target.sync_all()?;
    target.write_all_at(&head.bytes(), 0)?;
    target.sync_all()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use super::{super::Draft, *};

    /// A stream of three parts, half of it zeros.
    fn stream() -> Vec<u8> {
        let mut stream: Vec<u8> = (0..(40 << 20) + 77).map(|at: u64| ((at * at) >> 9) as u8).collect();
        stream[5 << 20..25 << 20].fill(0);
        stream[..8].copy_from_slice(b"QEVM\0\0\0\x03");
        stream
    }

    fn draft(path: &Path, stream: &[u8]) -> Draft {
        let draft = Draft::create(path).expect("a draft");
        File::from(draft.writable().expect("a descriptor")).write_all_at(stream, STREAM).expect("written");
        draft
    }

    /// A packed image unpacks to the original; any change of a byte and a cut are detected.
    #[test]
    fn packed_image_unpacks_unchanged() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("it's memory");
        let stream = stream();
        let packing = Packing::default();
        let packed = draft(&path, &stream).pack("a tag", b"about it", 1, &packing).expect("packed");
        assert_eq!(packing.done(), stream.len() as u64);
        assert_eq!((packed.tag(), packed.metadata()), ("a tag", &b"about it"[..]));
        assert!(packed.length().expect("it is there") < stream.len() as u64);
        packed.verify().expect("whole");
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1, "nothing else is left");

        let image = packed.unpack().expect("unpacked");
        image.verify().expect("whole");
        assert_eq!((image.tag(), image.metadata()), ("a tag", &b"about it"[..]));
        assert_eq!(image.length().expect("a length"), packed.full_length().expect("a length"));
        let file = File::from(image.descriptor().expect("a descriptor"));
        let about = file.metadata().expect("it is open");
        assert_eq!((about.nlink(), about.permissions().mode() & 0o777), (0, 0o600), "it has no name");
        assert!(about.blocks() * 512 < 30 << 20, "zeros take no room: {} blocks", about.blocks());
        let mut found = vec![0; stream.len()];
        file.read_exact_at(&mut found, STREAM).expect("read");
        assert!(found == stream, "the stream is as it was");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1, "nothing else is there");

        let file = File::options().read(true).write(true).open(&path).expect("open");
        let length = packed.length().expect("it is there");
        for at in [0, 9, 13, 20, 35, 37, 45, 60, 70, 80, 4096, 4100, length / 2, length - 1] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[byte[0] ^ 1], at).expect("written");
            let changed = Packed::open(&path).and_then(|packed| packed.verify());
            assert_eq!(changed.expect_err("changed").kind(), ErrorKind::Damaged, "at {at}");
            let changed = Packed::open(&path).and_then(|packed| packed.unpack());
            assert_eq!(changed.expect_err("changed").kind(), ErrorKind::Damaged, "at {at}");
            file.write_all_at(&byte, at).expect("written");
        }
        Packed::open(&path).and_then(|packed| packed.verify()).expect("whole again");
        file.set_len(length - 1).expect("cut off");
        assert!(Packed::open(&path).expect_err("cut off").to_string().contains("cut off"));
    }

    /// Stopped packing returns the complete draft, and leaves nothing else.
    #[test]
    fn stopped_packing_returns_the_draft() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("memory");
        let packing = Packing::default();
        packing.stop();
        let (error, draft) = draft(&path, &stream()).pack("t", b"", 1, &packing).expect_err("stopped");
        assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1, "the draft alone");
        draft.seal("t", b"").expect("it is whole").verify().expect("whole");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
    }

    /// A file that a crash left while packing is not an image, and is removed.
    #[test]
    fn crash_while_packing_leaves_no_image() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("memory");
        std::mem::forget(draft(&path, &stream()));
        // Frames without a record, as before the last write.
        let half = dir.path().join(".memory.packing");
        fs::write(&half, vec![0; 8192]).expect("written");
        assert_eq!(Packed::open(&half).expect_err("no record").kind(), ErrorKind::Damaged);
        Draft::remove_stale(&path).expect("removed");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);
    }

    #[test]
    fn a_shell_unpacks_the_stream_too() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("it's memory");
        let stream = stream();
        let packed = draft(&path, &stream).pack("t", b"", 3, &Packing::default()).expect("packed");
        let incoming = packed.incoming().expect("a command");
        let command = incoming.strip_prefix("exec:").expect("a command");
        // The frames are read by this crate's own zstd, as the program may not be there.
        let tail = command.strip_suffix(" | zstd -dc").expect("a pipe into zstd");
        let output = std::process::Command::new("sh").args(["-c", tail]).output().expect("a shell");
        assert!(zstd::stream::decode_all(&*output.stdout).expect("frames") == stream);
    }
}
