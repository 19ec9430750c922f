//! [`Split`]: a memory image taken apart.

use std::{
    fs::File,
    io::{self, BufReader, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    path::{Path, PathBuf},
};

use rustix::fs::SeekFrom;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::{
    half::{self, ATTEMPTED, Half},
    refusal::Refusal,
    walk::{LONGEST_BLOCK, PAGE, Parts, separate},
};
use crate::{
    discover::Abilities,
    error::{Error, ErrorKind, Result},
    memory::{Image, Incoming, PART, Record, checksums, incoming_argument},
    qcow2::CLUSTER,
};

/// Offset of the stream in the file of devices. The record is before it.
const STREAM: u64 = CLUSTER;

/// Bytes that are written at once.
const BATCH: usize = 1 << 20;

/// A memory image taken apart: a file with the content of one block of RAM, and a file with the stream
/// without that block's pages.
///
/// Many QEMUs may be started from one: each maps the RAM privately, so that they share what none of them has
/// written, and loads the stream, which is short. The file of RAM must not change or shrink as long as one of
/// them runs; its name may be removed.
#[derive(Debug)]
pub struct Split {
    ram: PathBuf,
    devices: PathBuf,
    device_file: File,
    record: Record,
    about: About,
}

/// The metadata of a record.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    block: String,
    /// Bytes of the block.
    length: u64,
    /// A checksum of each part of the file of RAM.
    checksums: Vec<u32>,
}

/// How a QEMU opens the file of RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Mapping {
    /// Read only: the guest's memory is a private copy, and QEMU cannot change the file.
    ReadOnly,
    /// A private copy of a file that QEMU opens for writing (as root: its mode is 0400), and could change:
    /// where the guest gives memory back (a balloon, virtio-mem, free page reporting), QEMU punches holes
    /// into the file, and every other QEMU that maps it is corrupted. Use it only for machines without such
    /// devices.
    Private,
}

impl Mapping {
    /// Returns the mapping for a QEMU.
    pub fn of(abilities: &Abilities) -> Self {
        if abilities.read_only_ram { Self::ReadOnly } else { Self::Private }
    }
}

impl Split {
    /// Takes an image apart: `block` is the name of the block of RAM, as `pc.ram`. Both files must not exist;
    /// they get the mode 0400. Blocks while it reads the image once. Call [`Image::verify`] before.
    ///
    /// The order of writing: both files are written as `.NAME.part`, made unwritable, and flushed; the RAM
    /// gets its name; the devices get theirs; the directories are flushed. So a file of devices with its name
    /// is complete, and so is its RAM. A crash leaves `.NAME.part`, or a file of RAM without devices;
    /// [`Split::remove`] removes each.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the image has a form that is not known here: start from the image itself
    /// then. [`ErrorKind::Damaged`] if it is not as QEMU writes it; [`ErrorKind::Invalid`] if a file exists,
    /// or another process is making it; [`ErrorKind::Io`]. No file is left after an error, except if only the
    /// flush of a directory failed.
    pub fn make(image: &Image, block: &str, ram: &Path, devices: &Path) -> Result<Self> {
        let (mut ram, mut devices) = (Half::create(ram)?, Half::create(devices)?);
        let mut writer = Writer::new(&ram, &devices);
        let stream = BufReader::with_capacity(BATCH, image.stream());
        let separated = separate(stream, image.stream_length(), block.as_bytes(), &mut writer)
            .and_then(|()| writer.finish().map_err(Refusal::Write));
        let half = if writer.is_in_devices { &devices } else { &ram };
        separated.map_err(|refusal| refused(refusal, image.path(), half))?;
        let (length, stream) = (writer.length, writer.rest_at);

        let sums = ram_checksums(ram.file(), length).map_err(|error| ram.failed(error))?;
        let about = About { block: block.to_owned(), length, checksums: sums };
        let metadata = serde_json::to_vec(&about).map_err(|error| devices.failed(error.into()))?;
        let sums = checksums(devices.file(), STREAM, stream).map_err(|error| devices.failed(error))?;
        let record = Record { stream, checksums: sums, metadata };
        let bytes = record.bytes();
        if bytes.len() as u64 > STREAM {
            return Err(devices.failed(io::Error::other("its record is too long")));
        }
        devices.file().write_all_at(&bytes, 0).map_err(|error| devices.failed(error))?;
        // 1) Both contents, before a name says that they are there.
        ram.seal()?;
        devices.seal()?;
        // 2) The RAM first: with the devices there is their RAM too. A crash between the two leaves RAM that
        //    no devices belong to, and that nothing uses.
        ram.name()?;
        devices.name().inspect_err(|_| ram.unname())?;
        // 3) The names.
        ram.flush_directory()?;
        devices.flush_directory()?;
        Self::open(ram.path(), devices.path())
    }

    /// Opens the two files.
    ///
    /// # Errors
    /// [`ErrorKind::Io`]; [`ErrorKind::Damaged`] if they are not two of ours, or not of one image by their
    /// lengths. [`Split::verify`] reads their content.
    pub fn open(ram: &Path, devices: &Path) -> Result<Self> {
        let attempted = "opening a memory image that was taken apart";
        let open = |path: &Path| {
            confined_files::open_regular(path, false).map_err(|error| Error::io(attempted, path, error))
        };
        let wrong = |path: &Path, detail: String| {
            Error::new(ErrorKind::Damaged, attempted, path.display(), detail).advise(
                "remove both files if no clone uses them; they can be made again from the memory image",
            )
        };
        let device_file = open(devices)?;
        let length = |file: &File, path: &Path| {
            file.metadata().map(|about| about.len()).map_err(|error| Error::io(attempted, path, error))
        };
        let found = length(&device_file, devices)?;
        let mut bytes = vec![0; usize::try_from(found.min(STREAM)).unwrap_or_default()];
        let read = device_file.read_exact_at(&mut bytes, 0);
        read.map_err(|error| Error::io(attempted, devices, error))?;
        let record = Record::parse(&bytes).map_err(|detail| wrong(devices, detail))?;
        if found != STREAM.saturating_add(record.stream) {
            return Err(wrong(devices, format!("it has {found} bytes, and its stream {}", record.stream)));
        }
        let about: About =
            serde_json::from_slice(&record.metadata).map_err(|error| wrong(devices, error.to_string()))?;
        let is_possible = (PAGE..=LONGEST_BLOCK).contains(&about.length)
            && about.checksums.len() as u64 == about.length.div_ceil(PART);
        if !is_possible {
            return Err(wrong(devices, format!("its block has {} bytes", about.length)));
        }
        let found = length(&open(ram)?, ram)?;
        if found != about.length {
            let detail = format!("it has {found} bytes, expected {}", about.length);
            return Err(wrong(ram, detail));
        }
        Ok(Self { ram: ram.to_owned(), devices: devices.to_owned(), device_file, record, about })
    }

    /// Reads both files and compares them with their checksums. Blocks.
    ///
    /// # Errors
    /// [`ErrorKind::Damaged`], naming the file and the place; [`ErrorKind::Io`].
    pub fn verify(&self) -> Result<()> {
        let attempted = "verifying a memory image that was taken apart";
        let failed = |path: &Path, error: io::Error| Error::io(attempted, path, error);
        let compare = |path: &Path, found: &[u32], expected: &[u32], begin: u64| {
            let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
            let Some(part) = wrong else { return Ok(()) };
            let from = begin + part as u64 * PART;
            let detail = format!("the {PART} bytes from {from} on do not match their checksum");
            Err(Error::new(ErrorKind::Damaged, attempted, path.display(), detail)
                .advise("do not start a clone from it: remove both files if no clone uses them"))
        };
        let sums = checksums(&self.device_file, STREAM, self.record.stream);
        let sums = sums.map_err(|error| failed(&self.devices, error))?;
        compare(&self.devices, &sums, &self.record.checksums, STREAM)?;
        let ram = confined_files::open_regular(&self.ram, false).map_err(|error| failed(&self.ram, error))?;
        let sums = ram_checksums(&ram, self.about.length).map_err(|error| failed(&self.ram, error))?;
        compare(&self.ram, &sums, &self.about.checksums, 0)
    }

    /// Removes the two files, complete or not; it is no error if there are none. A QEMU that maps
    /// the RAM goes on.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if another process is making them; [`ErrorKind::Io`].
    pub fn remove(ram: &Path, devices: &Path) -> Result<()> {
        // The devices first: without them the RAM counts for nothing.
        half::remove(devices)?;
        half::remove(ram).map(drop)
    }

    /// Returns the path of the file of RAM.
    pub fn ram(&self) -> &Path {
        &self.ram
    }

    /// Returns the path of the file of devices.
    pub fn devices(&self) -> &Path {
        &self.devices
    }

    /// Returns the name of the block.
    pub fn block(&self) -> &str {
        &self.about.block
    }

    /// Returns the length of the block, in bytes.
    pub fn length(&self) -> u64 {
        self.about.length
    }

    /// Returns the length of the stream without the block, in bytes.
    pub fn stream_length(&self) -> u64 {
        self.record.stream
    }

    /// Returns the arguments with which a QEMU maps the RAM. Its own command line must not have another
    /// `memory-backend`, and the same memory size.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the path of the RAM is not absolute or not UTF-8.
    pub fn arguments(&self, mapping: Mapping) -> Result<Vec<String>> {
        let path = self.ram.to_str().filter(|path| path.starts_with('/')).ok_or_else(|| {
            let detail = "its path is not absolute, or not UTF-8";
            Error::new(ErrorKind::Invalid, "naming RAM for QEMU", self.ram.display(), detail)
        })?;
        let mut object = json!({
            "qom-type": "memory-backend-file", "id": self.block(), "size": self.length(),
            "share": false, "mem-path": path,
        });
        if mapping == Mapping::ReadOnly {
            object["readonly"] = json!(true);
            object["rom"] = json!("off");
        }
        let machine = format!("memory-backend={}", self.block());
        Ok(vec!["-object".to_owned(), object.to_string(), "-machine".to_owned(), machine])
    }

    /// Returns the argument of `-incoming` for a QEMU with [`Split::arguments`]. See [`Image::incoming`].
    ///
    /// # Errors
    /// Those of [`Image::incoming`].
    pub fn incoming(&self, abilities: &Abilities) -> Result<Incoming> {
        incoming_argument(&self.devices, STREAM, abilities)
    }

    /// Opens the file of devices, to lend it.
    pub(crate) fn descriptor(&self) -> Result<(OwnedFd, u64)> {
        let path = format!("/proc/self/fd/{}", self.device_file.as_raw_fd());
        let opened =
            File::open(path).map_err(|error| Error::io("lending it to QEMU", &self.devices, error))?;
        Ok((opened.into(), STREAM))
    }
}

/// Makes the error for a stream that was not separated.
fn refused(refusal: Refusal, image: &Path, half: &Half) -> Error {
    let by_stream = "start from the memory image itself, which needs no splitting";
    match refusal {
        Refusal::Wrong { at, what } => {
            let detail = format!("its stream is not as QEMU writes it: at {at}, {what}");
            Error::new(ErrorKind::Damaged, ATTEMPTED, image.display(), detail)
                .advise("verify the snapshot (`domsnap check`)")
        }
        Refusal::Unknown { at, what } => {
            let detail = format!("its stream has something that cannot be taken apart: at {at}, {what}");
            Error::new(ErrorKind::Unsupported, ATTEMPTED, image.display(), detail).advise(by_stream)
        }
        Refusal::Read(error) => Error::io(ATTEMPTED, image, error),
        Refusal::Write(error) => half.failed(error),
    }
}

/// Writes the two files.
struct Writer<'a> {
    ram: &'a File,
    devices: &'a File,
    length: u64,
    /// Pages that follow each other, the address of the first one.
    run: Vec<u8>,
    run_at: u64,
    /// The pages that were written: a bit each.
    written: Vec<u64>,
    /// Bytes of devices that are not written yet, and the number of those that are.
    rest: Vec<u8>,
    rest_at: u64,
    /// True while the file of devices is written: an error is that file's then.
    is_in_devices: bool,
}

impl<'a> Writer<'a> {
    fn new(ram: &'a Half, devices: &'a Half) -> Self {
        Self {
            ram: ram.file(),
            devices: devices.file(),
            length: 0,
            run: Vec::with_capacity(BATCH),
            run_at: 0,
            written: Vec::new(),
            rest: Vec::with_capacity(BATCH),
            rest_at: 0,
            is_in_devices: false,
        }
    }

    /// The word and the bit of a page.
    fn bit(address: u64) -> (usize, u64) {
        let page = address / PAGE;
        (usize::try_from(page / 64).unwrap_or(usize::MAX), 1 << (page % 64))
    }

    fn put(&mut self, address: u64, bytes: &[u8; PAGE as usize]) -> io::Result<()> {
        let follows = self.run_at.checked_add(self.run.len() as u64) == Some(address);
        if !follows || self.run.len() + bytes.len() > BATCH {
            self.flush_run()?;
            self.run_at = address;
        }
        self.run.extend(bytes);
        Ok(())
    }

    fn flush_run(&mut self) -> io::Result<()> {
        self.ram.write_all_at(&self.run, self.run_at)?;
        self.run.clear();
        Ok(())
    }

    fn flush_rest(&mut self) -> io::Result<()> {
        self.is_in_devices = true;
        let at = STREAM.checked_add(self.rest_at).ok_or(io::ErrorKind::FileTooLarge)?;
        self.devices.write_all_at(&self.rest, at)?;
        self.is_in_devices = false;
        self.rest_at += self.rest.len() as u64;
        self.rest.clear();
        Ok(())
    }

    /// Writes all that is left.
    fn finish(&mut self) -> io::Result<()> {
        self.flush_run()?;
        self.flush_rest()
    }
}

impl Parts for Writer<'_> {
    fn block(&mut self, length: u64) -> io::Result<()> {
        self.length = length;
        self.written = vec![0; usize::try_from((length / PAGE).div_ceil(64)).map_err(io::Error::other)?];
        // Sparse: pages of zeros that were never others take no space.
        self.ram.set_len(length)
    }

    fn page(&mut self, address: u64, bytes: &[u8; PAGE as usize]) -> io::Result<()> {
        let (word, bit) = Self::bit(address);
        if let Some(word) = self.written.get_mut(word) {
            *word |= bit;
        }
        self.put(address, bytes)
    }

    fn zeros(&mut self, address: u64) -> io::Result<()> {
        // A page that had bytes before: the last one is valid.
        let (word, bit) = Self::bit(address);
        let had_bytes = self.written.get(word).is_some_and(|word| word & bit != 0);
        if had_bytes { self.put(address, &[0; PAGE as usize]) } else { Ok(()) }
    }

    fn rest(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.rest.extend(bytes);
        match self.rest.len() < BATCH {
            true => Ok(()),
            false => self.flush_rest(),
        }
    }
}

/// Computes the checksum of each part of a file of RAM. A part that is a hole is not read.
fn ram_checksums(file: &File, length: u64) -> io::Result<Vec<u32>> {
    let zeros = |length: u64| -> io::Result<u32> {
        let mut hasher = crc32fast::Hasher::new();
        let piece = [0; PAGE as usize];
        for _ in 0..length / PAGE {
            hasher.update(&piece);
        }
        Ok(hasher.finalize())
    };
    let whole = zeros(PART)?;
    let mut sums = Vec::new();
    let mut at = 0;
    while at < length {
        let part = PART.min(length - at);
        let is_hole = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data >= at + part,
            Err(rustix::io::Errno::NXIO) => true,
            // The file system does not say.
            Err(_) => false,
        };
        sums.push(match is_hole {
            true if part == PART => whole,
            true => zeros(part)?,
            false => checksums(file, at, part)?.first().copied().unwrap_or_default(),
        });
        at += part;
    }
    Ok(sums)
}

/// The bytes of a file from a place on.
pub(crate) struct BytesFrom<'a> {
    pub(crate) file: &'a File,
    pub(crate) at: u64,
}

impl Read for BytesFrom<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(buffer, self.at)?;
        self.at += read as u64;
        Ok(read)
    }
}
