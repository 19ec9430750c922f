//! [`Image`]: a complete memory image.

use std::{
    fs::File,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
};

use super::record::{PART, Record};
use crate::{
    discover::Abilities,
    error::{Error, ErrorKind, Result},
    fdset::reopen_read_only,
    qcow2::{CLUSTER, RECORD, STREAM, wrapper},
    stream::{self, BytesFrom},
};

/// First bytes of a stream of QEMU: its magic and version.
const STREAM_HEAD: [u8; 8] = *b"QEVM\0\0\0\x03";

/// Bytes per read.
const READ: usize = 1 << 20;

/// Maximum number of reading threads: more do not increase the memory bandwidth.
const THREADS: usize = 4;

/// A memory image that is complete according to its record; [`Image::verify`] reads all of it.
#[derive(Debug)]
pub struct Image {
    path: PathBuf,
    file: File,
    tag: String,
    seconds: u32,
    record: Record,
    /// True if the file has no name: its path is that of the compressed image that it was unpacked from.
    nameless: bool,
}

/// The argument with which QEMU is started from a memory image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Incoming {
    /// The argument of `-incoming`: a file.
    File(String),
    /// The argument of `-incoming`: a command, for a QEMU that cannot read a file itself. It runs a shell.
    Command(String),
}

impl Incoming {
    /// Returns the argument.
    pub fn argument(&self) -> &str {
        match self {
            Self::File(argument) | Self::Command(argument) => argument,
        }
    }
}

impl Image {
    /// Opens an image, and reads its record.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Damaged`] if it is not one of ours or its record is incomplete.
    pub fn open(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        let attempted = "opening a memory image";
        let file =
            confined_files::open_regular(&path, false).map_err(|error| Error::io(attempted, &path, error))?;
        Self::read(path, file, false)
    }

    /// Wraps an image without a name, which was unpacked from another file.
    pub(super) fn nameless(of: &Path, file: File) -> Result<Self> {
        Self::read(of.to_owned(), file, true)
    }

    fn read(path: PathBuf, file: File, nameless: bool) -> Result<Self> {
        let attempted = "opening a memory image";
        let mut bytes = vec![0; usize::try_from(CLUSTER).unwrap_or_default()];
        let read =
            read_up_to(&file, &mut bytes, RECORD).map_err(|error| Error::io(attempted, &path, error))?;
        bytes.truncate(read);
        let record = Record::parse(&bytes).map_err(|wrong| damaged(attempted, &path, wrong))?;
        let snapshot = snapshot(&file).map_err(|error| Error::io(attempted, &path, error))?;
        let (tag, seconds) = snapshot
            .ok_or_else(|| damaged(attempted, &path, "its snapshot table cannot be read".to_owned()))?;
        Ok(Self { path, file, tag, seconds, record, nameless })
    }

    /// Reads the whole image and checks it: the tables against their expected content, the stream against its
    /// checksums. Blocks, with several threads, so call it from a thread that may block. Call it before a
    /// revert changes anything.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`], naming the first damaged place; [`ErrorKind::Io`].
    pub fn verify(&self) -> Result<()> {
        let attempted = "verifying a memory image";
        let failed = |error: io::Error| Error::io(attempted, &self.path, error);
        let expected = wrapper(self.record.stream, &self.tag, self.seconds)?;
        let length = self.file.metadata().map_err(failed)?.len();
        if length < expected.length {
            let detail = format!("it has {length} bytes, expected {}: it was cut off", expected.length);
            return Err(damaged(attempted, &self.path, detail));
        }
        for (at, bytes) in expected.tables.iter().chain([&(0, expected.header)]) {
            let mut found = vec![0; bytes.len()];
            let read = read_up_to(&self.file, &mut found, *at).map_err(failed)?;
            if read != bytes.len() || &found != bytes {
                let detail = format!(
                    "its tables at {at} are not as domsnap wrote them: another program changed the file"
                );
                return Err(damaged(attempted, &self.path, detail));
            }
        }
        expect_stream(&self.path, &self.file, self.record.stream)?;
        let found = checksums(&self.file, STREAM, self.record.stream).map_err(failed)?;
        let wrong = found.iter().zip(&self.record.checksums).position(|(found, expected)| found != expected);
        match wrong {
            None => Ok(()),
            Some(part) => {
                let begin = STREAM + part as u64 * PART;
                let detail = format!("the {PART} bytes from {begin} on do not match their checksum");
                Err(damaged(attempted, &self.path, detail))
            }
        }
    }

    /// Returns its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the name of its internal snapshot.
    pub fn tag(&self) -> &str {
        &self.tag
    }

    /// Returns the length of QEMU's stream, in bytes.
    pub fn stream_length(&self) -> u64 {
        self.record.stream
    }

    /// Returns the metadata that the caller passed to [`super::Draft::seal`].
    pub fn metadata(&self) -> &[u8] {
        &self.record.metadata
    }

    /// Reads the places in the guest's memory that may have its generation ID: guest-physical addresses. The
    /// guest decides in part which these are, so the caller must check what is there. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn generation_ids(&self) -> Result<Vec<u64>> {
        stream::generation_ids(&self.file, STREAM, self.record.stream)
            .map_err(|error| Error::io("reading a memory image", &self.path, error))
    }

    /// Returns the file's length, in bytes.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn length(&self) -> Result<u64> {
        let about = self.file.metadata();
        Ok(about.map_err(|error| Error::io("reading a memory image", &self.path, error))?.len())
    }

    /// Returns a descriptor to lend.
    pub(super) fn descriptor(&self) -> Result<OwnedFd> {
        let opened = match self.nameless {
            true => reopen_read_only(&self.file),
            false => confined_files::open_regular(&self.path, false).map(OwnedFd::from),
        };
        opened.map_err(|error| Error::io("opening a memory image", &self.path, error))
    }

    /// Returns the argument of `-incoming` for a QEMU that is to be started from this image.
    ///
    /// The guest then runs as soon as it is loaded, unless `-S` is given too. The argument of an unpacked
    /// image is valid only as long as this value exists.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the path is not absolute or not UTF-8, or has a comma and QEMU must read the
    /// file itself.
    pub fn incoming(&self, abilities: &Abilities) -> Result<Incoming> {
        let own = match self.nameless {
            true => PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())),
            false => self.path.clone(),
        };
        incoming_argument(&own, STREAM, abilities)
    }

    /// Returns the stream, to be read once.
    pub(crate) fn stream(&self) -> BytesFrom<'_> {
        BytesFrom { file: &self.file, at: STREAM }
    }
}

/// Returns the argument of `-incoming` for a stream that begins at `begin` of a file.
pub(crate) fn incoming_argument(own: &Path, begin: u64, abilities: &Abilities) -> Result<Incoming> {
    let invalid = |detail: &str| {
        Err(Error::new(ErrorKind::Invalid, "naming a memory image for QEMU", own.display(), detail)
            .advise("give the memory image a name without it"))
    };
    let Some(path) = own.to_str() else { return invalid("its path is not UTF-8") };
    if !path.starts_with('/') {
        return invalid("its path is not absolute");
    }
    if abilities.file_migration {
        if path.contains(',') {
            return invalid("its path has a comma");
        }
        return Ok(Incoming::File(format!("file:{path},offset={begin}")));
    }
    // `tail` counts bytes from 1.
    let quoted = path.replace('\'', r"'\''");
    Ok(Incoming::Command(format!("exec:tail -c +{} '{quoted}'", begin + 1)))
}

pub(super) fn damaged(attempted: &str, path: &Path, detail: String) -> Error {
    Error::new(ErrorKind::Damaged, attempted, path.display(), detail)
        .advise("the memory of this snapshot cannot be used; its disks can (revert without memory)")
}

/// Reads the name and date of the image's one snapshot.
fn snapshot(file: &File) -> io::Result<Option<(String, u32)>> {
    let mut bytes = vec![0; 512];
    let read = read_up_to(file, &mut bytes, 6 * CLUSTER)?;
    let parse = || {
        let bytes = bytes.get(..read)?;
        let short =
            |at: usize| Some(usize::from(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?)));
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (id, name, more) = (short(12)?, short(14)?, usize::try_from(word(36)?).ok()?);
        let begin = 40usize.checked_add(more)?.checked_add(id)?;
        let name = bytes.get(begin..begin.checked_add(name)?)?;
        Some((String::from_utf8(name.to_vec()).ok()?, word(16)?))
    };
    Ok(parse())
}

/// Checks that the stream exists and is one of QEMU.
pub(super) fn expect_stream(path: &Path, file: &File, stream: u64) -> Result<()> {
    let attempted = "reading a memory image";
    let mut head = [0; STREAM_HEAD.len()];
    let read = read_up_to(file, &mut head, STREAM).map_err(|error| Error::io(attempted, path, error))?;
    if stream == 0 || read != head.len() || head != STREAM_HEAD {
        let detail = format!("it has no stream of QEMU: it begins with {}", head.escape_ascii());
        return Err(damaged(attempted, path, detail));
    }
    Ok(())
}

/// Computes the checksum of each part of `length` bytes of a file, in several threads.
pub(crate) fn checksums(file: &File, begin: u64, length: u64) -> io::Result<Vec<u32>> {
    let parts = usize::try_from(length.div_ceil(PART)).map_err(io::Error::other)?;
    let (next, failed) = (AtomicUsize::new(0), AtomicBool::new(false));
    let work = || -> io::Result<Vec<(usize, u32)>> {
        let (mut done, mut buffer) = (Vec::new(), vec![0; READ]);
        loop {
            let part = next.fetch_add(1, Ordering::Relaxed);
            if part >= parts || failed.load(Ordering::Relaxed) {
                return Ok(done);
            }
            let mut at = part as u64 * PART;
            let end = length.min(at + PART);
            let mut hasher = crc32fast::Hasher::new();
            while at < end {
                let want = usize::try_from(end - at).unwrap_or(READ).min(READ);
                let piece = buffer.get_mut(..want).ok_or_else(|| io::Error::other("no buffer"))?;
                if let Err(error) = file.read_exact_at(piece, begin + at) {
                    failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
                hasher.update(piece);
                at += want as u64;
            }
            done.push((part, hasher.finalize()));
        }
    };
    let threads = thread::available_parallelism().map_or(1, usize::from).clamp(1, THREADS).min(parts.max(1));
    let mut all = vec![0; parts];
    thread::scope(|scope| -> io::Result<()> {
        let running: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        for thread in running {
            let done = thread.join().map_err(|_| io::Error::other("a thread panicked"))??;
            for (part, checksum) in done {
                if let Some(place) = all.get_mut(part) {
                    *place = checksum;
                }
            }
        }
        Ok(())
    })?;
    Ok(all)
}

pub(super) fn read_up_to(file: &File, buffer: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while let Some(rest) = buffer.get_mut(read..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + read as u64) {
            Ok(0) => break,
            Ok(count) => read += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::{super::Draft, *};

    fn draft(path: &Path, stream: &[u8]) -> Draft {
        let draft = Draft::create(path).expect("a draft");
        File::from(draft.writable().expect("a descriptor")).write_all_at(stream, STREAM).expect("written");
        draft
    }

    fn stream(length: usize) -> Vec<u8> {
        let mut stream: Vec<u8> = (0..length).map(|at| (at * 7 + at / 251) as u8).collect();
        stream[..8].copy_from_slice(&STREAM_HEAD);
        stream
    }

    /// A sealed image verifies; any change of a byte and a cut are detected.
    #[test]
    fn sealed_image_verifies_until_changed() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("memory");
        let stream = stream(20 << 20);
        let image = draft(&path, &stream).seal("a tag", b"about it").expect("sealed");
        image.verify().expect("whole");
        assert_eq!(
            (image.tag(), image.metadata(), image.stream_length()),
            ("a tag", &b"about it"[..], 20 << 20)
        );
        assert_eq!(fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1, "nothing else is left");
        let file = File::options().read(true).write(true).open(&path).expect("open");
        for at in [3, CLUSTER, 2 * CLUSTER, 5 * CLUSTER + 8, 6 * CLUSTER + 3, STREAM, STREAM + (17 << 20)] {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).expect("read");
            file.write_all_at(&[byte[0] ^ 1], at).expect("written");
            let error = Image::open(&path).and_then(|image| image.verify()).expect_err("changed");
            assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
            file.write_all_at(&byte, at).expect("written");
            Image::open(&path).and_then(|image| image.verify()).expect("whole again");
        }
        file.set_len(STREAM + (19 << 20)).expect("cut off");
        let error = Image::open(&path).and_then(|image| image.verify()).expect_err("cut off");
        assert!(error.to_string().contains("cut off"), "{error}");
    }

    /// A draft that is dropped, or that has no stream, leaves nothing; a name that is taken is refused.
    #[test]
    fn failed_draft_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("memory");
        drop(draft(&path, &stream(100)));
        let error = draft(&path, b"something else").seal("t", b"").expect_err("no stream");
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
        let error = Draft::create(&path).expect("a draft").seal("t", b"").expect_err("nothing in it");
        assert_eq!(error.kind(), ErrorKind::Damaged, "{error}");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 0);

        let draft = draft(&path, &stream(100));
        fs::write(&path, b"mine").expect("written");
        assert_eq!(draft.seal("t", b"").expect_err("taken").kind(), ErrorKind::Invalid);
        assert_eq!(Draft::create(&path).expect_err("taken").kind(), ErrorKind::Invalid);
        assert_eq!(fs::read(&path).expect("it is there"), b"mine");
        assert_eq!(fs::read_dir(dir.path()).expect("a directory").count(), 1);
    }

    #[test]
    fn a_path_with_quotes_reaches_the_shell_whole() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("it's $HOME memory");
        let image = draft(&path, &stream(5000)).seal("t", b"").expect("sealed");
        let incoming = image.incoming(&Abilities::default()).expect("a command");
        let command = incoming.argument().strip_prefix("exec:").expect("a command");
        let output = std::process::Command::new("sh").args(["-c", command]).output().expect("a shell");
        assert_eq!(output.stdout[..5000], stream(5000));
        let file = Abilities { file_migration: true, ..Abilities::default() };
        let argument = image.incoming(&file).expect("a file");
        assert_eq!(argument.argument(), format!("file:{},offset=16777216", path.display()));
    }
}
