//! Writing of one file of an export, from its first byte to its last, with its SHA-256.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use backend_qcow2::image::{self, Backing, NewImage, Sequential};
use camino::Utf8PathBuf;
use image_files::names::io_error;
use sha2::{Digest, Sha256};
use snapcore::backend::{PointImage, Progress};
use snapcore::{Error, ErrorKind, Result, Target};

/// Bytes of one read and one write.
const CHUNK: usize = 1 << 20;

/// Bytes of zeros that are left out of a file.
const HOLE: usize = 64 << 10;

/// Bytes after which the file is flushed while more is written, so that little is left to flush at its end.
const FLUSH_AFTER: u64 = 32 << 20;

/// Chunks that wait for the checksum.
const QUEUE: usize = 8;

/// Extents that are asked for at once.
const EXTENTS: usize = 1024;

/// A disk to export.
#[derive(Clone)]
pub struct DiskSource {
    /// The disk.
    pub target: Target,
    /// Its state.
    pub image: Arc<dyn PointImage>,
    /// The ranges that may differ from the parent export; absent: all data are exported.
    pub changed: Option<Vec<Range<u64>>>,
}

/// State of the machine to export, which is no disk: firmware variables, a TPM's state. It is exported whole,
/// as the file that it is.
#[derive(Clone)]
pub struct StateSource {
    /// Its name.
    pub target: Target,
    /// Its format.
    pub format: String,
    /// The name of the file that the machine uses.
    pub file_name: String,
    /// The state.
    pub image: Arc<dyn PointImage>,
}

/// A memory image to export.
#[derive(Debug, Clone)]
pub struct MemorySource {
    /// The file.
    pub path: Utf8PathBuf,
}

/// All that one export copies.
#[derive(Clone, Default)]
pub struct Sources {
    /// The disks.
    pub disks: Vec<DiskSource>,
    /// State of the machine.
    pub machine_state: Vec<StateSource>,
    /// The memory image.
    pub memory: Option<MemorySource>,
}

impl Sources {
    /// Bytes of the machine's state.
    pub fn state_bytes(&self) -> u64 {
        self.machine_state.iter().map(|state| state.image.size()).sum()
    }
}

/// The caller's side of a long copy.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// Receives the bytes that are done.
    pub progress: &'a dyn Progress,
    /// Returns true if the copy should stop.
    pub cancelled: &'a dyn Fn() -> bool,
}

impl Watch<'_> {
    pub(crate) fn require_wanted(&self) -> Result<()> {
        match (self.cancelled)() {
            false => Ok(()),
            true => Err(Error::new(ErrorKind::Cancelled, "the export was cancelled")),
        }
    }
}

/// Bytes done, of all files of an export.
pub(crate) struct Done<'a> {
    pub(crate) watch: Watch<'a>,
    pub(crate) done: u64,
    pub(crate) total: u64,
}

impl Done<'_> {
    pub(crate) fn add(&mut self, bytes: u64) -> Result<()> {
        self.done = self.done.saturating_add(bytes);
        self.watch.progress.bytes(self.done, self.total.max(self.done));
        self.watch.require_wanted()
    }
}

/// The layout of a disk's image.
pub(crate) struct Layout {
    pub(crate) virtual_size: u64,
    sequential: Sequential,
}

impl Layout {
    /// Reads what is to be exported of a disk, by metadata alone.
    pub(crate) fn of(source: &DiskSource, backing: Option<String>) -> Result<Self> {
        let size = source.image.size();
        let virtual_size = size.checked_next_multiple_of(512).ok_or_else(|| too_large(source))?;
        let mut new = NewImage::new(virtual_size);
        new.backing = backing.map(|file| Backing { file, format: Some("qcow2".to_owned()) });
        let is_overlay = new.backing.is_some();
        let mut sequential = Sequential::new(&new).map_err(Error::from)?;
        let all = 0..size;
        let changed = source.changed.as_deref().filter(|_| is_overlay);
        let ranges = changed.unwrap_or(std::slice::from_ref(&all));
        let cluster = sequential.cluster_size();
        let mut from = 0;
        for range in ranges {
            // Whole clusters, because the parent shows where the image has none.
            let start = (range.start / cluster * cluster).max(from);
            let end = range.end.div_ceil(cluster).saturating_mul(cluster).min(size);
            let mut at = start;
            while at < end {
                let extents = source.image.extents(at, end, EXTENTS)?;
                let Some(last) = extents.last().map(|extent| extent.end).filter(|last| *last > at) else {
                    sequential.map(at..end, false);
                    break;
                };
                for extent in extents {
                    // Without an image below, what has no mapping is zeros.
                    if is_overlay || !extent.zero {
                        sequential.map(extent.start..extent.end, extent.zero);
                    }
                }
                at = last;
            }
            from = from.max(end);
        }
        Ok(Self { virtual_size, sequential })
    }

    /// Bytes of the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.sequential.file_bytes()
    }

    /// Writes the image. Returns its SHA-256.
    pub(crate) fn write(
        &self,
        source: &DiskSource,
        file: &File,
        name: &str,
        done: &mut Done<'_>,
    ) -> Result<String> {
        pipeline(file, name, |sink| {
            let mut begun = Ok(());
            self.sequential
                .metadata(&mut |bytes| {
                    if begun.is_ok() {
                        begun = sink.data(bytes.to_vec()).and_then(|()| done.add(bytes.len() as u64));
                    }
                    match &begun {
                        Ok(()) => Ok(()),
                        // The error itself is returned below.
                        Err(_) => Err(image::Error::new(image::ErrorKind::Cancelled, "the write failed")),
                    }
                })
                .or_else(|error| begun.and(Err(Error::from(error))))?;
            for range in self.sequential.data() {
                copy_range(&*source.image, range.start..range.end, sink, done)?;
            }
            Ok(())
        })
    }
}

fn too_large(source: &DiskSource) -> Error {
    Error::new(ErrorKind::Unsupported, format!("{}: the disk is too large for an image", source.target))
}

/// Copies a file. Returns its length and its SHA-256.
pub(crate) fn copy_file(
    from: &mut File,
    from_name: &str,
    file: &File,
    name: &str,
    done: &mut Done<'_>,
) -> Result<(u64, String)> {
    let mut copied = 0u64;
    let sum = pipeline(file, name, |sink| {
        loop {
            let mut chunk = vec![0; CHUNK];
            let mut filled = 0;
            while let Some(rest) = chunk.get_mut(filled..).filter(|rest| !rest.is_empty()) {
                match from.read(rest) {
                    Ok(0) => break,
                    Ok(read) => filled += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(io_error(error, format!("cannot read {from_name}"))),
                }
            }
            if filled == 0 {
                return Ok(());
            }
            chunk.truncate(filled);
            copied += filled as u64;
            sink.data(chunk)?;
            done.add(filled as u64)?;
        }
    })?;
    Ok((copied, sum))
}

/// Writes state of the machine to a file, byte by byte as it is. Returns its length and its SHA-256.
pub(crate) fn copy_state(
    source: &StateSource,
    file: &File,
    name: &str,
    done: &mut Done<'_>,
) -> Result<(u64, String)> {
    let size = source.image.size();
    let sum = pipeline(file, name, |sink| copy_range(&*source.image, 0..size, sink, done))?;
    Ok((size, sum))
}

/// Reads a range of an image to its end.
fn copy_range(
    image: &dyn PointImage,
    range: Range<u64>,
    sink: &mut Sink<'_>,
    done: &mut Done<'_>,
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let length = (range.end - at).min(CHUNK as u64);
        let mut chunk = vec![0; length as usize];
        image.read_at(&mut chunk, at)?;
        sink.data(chunk)?;
        done.add(length)?;
        at += length;
    }
    Ok(())
}

/// Reads a file to its end. Returns its length and its SHA-256.
pub(crate) fn sum_of(file: &mut File, name: &str, done: &mut Done<'_>) -> Result<(u64, String)> {
    let (mut sum, mut length, mut chunk) = (Sha256::new(), 0u64, vec![0; CHUNK]);
    loop {
        match file.read(&mut chunk) {
            Ok(0) => return Ok((length, hex(sum))),
            Ok(read) => {
                sum.update(chunk.get(..read).unwrap_or_default());
                length += read as u64;
                done.add(read as u64)?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(io_error(error, format!("cannot read {name}"))),
        }
    }
}

fn hex(sum: Sha256) -> String {
    sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The end of the pipeline at which the file comes in, in order.
struct Sink<'a> {
    file: &'a File,
    name: &'a str,
    at: u64,
    flushed: u64,
    sums: SyncSender<Vec<u8>>,
    flushes: SyncSender<()>,
}

impl Sink<'_> {
    fn data(&mut self, bytes: Vec<u8>) -> Result<()> {
        let failed = |error| io_error(error, format!("cannot write {}", self.name));
        let mut pending: Option<Range<usize>> = None;
        let write = |range: Range<usize>| {
            let start = self.at + range.start as u64;
            self.file.write_all_at(bytes.get(range).unwrap_or_default(), start)
        };
        for (number, part) in bytes.chunks(HOLE).enumerate() {
            let start = number * HOLE;
            if is_zero(part) {
                if let Some(range) = pending.take() {
                    write(range).map_err(failed)?;
                }
                continue;
            }
            pending = Some(pending.map_or(start, |range| range.start)..start + part.len());
        }
        if let Some(range) = pending {
            write(range).map_err(failed)?;
        }
        self.at += bytes.len() as u64;
        if self.at - self.flushed >= FLUSH_AFTER {
            self.flushed = self.at;
            // If the last flush is not complete, the next one includes this.
            let _ = self.flushes.try_send(());
        }
        let gone = |_| Error::new(ErrorKind::Internal, "the thread of the checksum has ended");
        self.sums.send(bytes).map_err(gone)
    }
}

fn is_zero(bytes: &[u8]) -> bool {
    let (blocks, rest) = bytes.as_chunks::<16>();
    blocks.iter().all(|block| u128::from_ne_bytes(*block) == 0) && rest.iter().all(|byte| *byte == 0)
}

/// Runs `produce`, which gives the file's bytes in order. Meanwhile one thread makes the checksum, and one
/// flushes what is written. The file is durable when this returns.
fn pipeline(file: &File, name: &str, produce: impl FnOnce(&mut Sink<'_>) -> Result<()>) -> Result<String> {
    let failed = |error| io_error(error, format!("cannot make {name} durable"));
    std::thread::scope(|threads| {
        let (sums, summed): (_, Receiver<Vec<u8>>) = sync_channel(QUEUE);
        let (flushes, flushed) = sync_channel(1);
        let summing = threads.spawn(move || {
            let mut sum = Sha256::new();
            while let Ok(bytes) = summed.recv() {
                sum.update(&bytes);
            }
            hex(sum)
        });
        let flushing = threads.spawn(move || {
            while let Ok(()) = flushed.recv() {
                file.sync_data()?;
            }
            io::Result::Ok(())
        });
        let mut sink = Sink { file, name, at: 0, flushed: 0, sums, flushes };
        let produced = produce(&mut sink);
        let length = sink.at;
        drop(sink);
        let flushed = flushing.join();
        let sum = summing.join();
        produced?;
        let broken = || Error::new(ErrorKind::Internal, format!("a thread that writes {name} has ended"));
        // The kernel reports a failed write-back once: to the flush that comes first.
        flushed.map_err(|_| broken())?.map_err(failed)?;
        // What ends with zeros has no byte written there.
        file.set_len(length).map_err(|error| io_error(error, format!("cannot write {name}")))?;
        file.sync_all().map_err(failed)?;
        sum.map_err(|_| broken())
    })
}
