//! The contract of an image, and of the format that opens images.

use std::io;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};
use crate::merge::MergeWatch;

/// Kind of content of a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Content {
    /// Data, or nothing is known.
    Data,
    /// Reads as zeros, and space is reserved for it.
    Zero,
    /// Reads as zeros, and takes no space.
    Hole,
}

/// A range with the same kind of content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// Kind of content.
    pub content: Content,
}

/// How a range is made zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Zeroing {
    /// The space of the range may be given back.
    pub may_free: bool,
    /// Fail with `Unsupported` rather than write the zeros one by one.
    pub fast_only: bool,
}

/// The content of a disk. All offsets are within [`Image::size`], and multiples of [`Image::alignment`]:
/// the server checks that.
///
/// Several threads call it at once. Requests that overlap have no order among them.
pub trait Image: Send + Sync {
    /// Bytes of the disk. A constant.
    fn size(&self) -> u64;

    /// The smallest unit of reads and writes in bytes, a power of two up to 64 KiB. A constant.
    fn alignment(&self) -> u32 {
        1
    }

    /// Returns true if the image cannot be written. A constant.
    fn is_read_only(&self) -> bool {
        false
    }

    /// Fills `buf` with the bytes at `offset`.
    ///
    /// # Errors
    /// The system's, and those of a broken image.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes `buf` at `offset`. When it returns, the bytes survive the death of this process; after the next
    /// [`Image::flush`] they are durable.
    ///
    /// # Errors
    /// The system's. `StorageFull` becomes "no space" for the client.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a range read as zeros. As durable as a write.
    ///
    /// # Errors
    /// The system's; `Unsupported` where `how` asks for a fast method and there is none.
    fn zero(&self, offset: u64, length: u64, how: Zeroing) -> io::Result<()>;

    /// Gives back the space of a range, which the client does not need any more. May do nothing. Afterwards
    /// the range reads as before or as zeros.
    ///
    /// # Errors
    /// The system's.
    fn trim(&self, offset: u64, length: u64) -> io::Result<()>;

    /// Makes every write that has returned durable.
    ///
    /// # Errors
    /// The system's. Once it has failed, it must fail for ever: what was lost is unknown.
    fn flush(&self) -> io::Result<()>;

    /// Describes a range: at least one extent, `limit` at most. They begin at `offset`, follow one another,
    /// and may end before the range does.
    ///
    /// # Errors
    /// The system's, and those of a broken image.
    fn map(&self, offset: u64, length: u64, limit: usize) -> io::Result<Vec<Extent>>;
}

/// A file of an image's chain.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Layer {
    /// The path by which it was opened.
    pub file: Utf8PathBuf,
    /// Device of the file's identity.
    pub device: u64,
    /// Inode of the file's identity.
    pub inode: u64,
}

/// An opened image. It has its locks for as long as it exists.
#[derive(Clone)]
pub struct Served {
    /// The content.
    pub image: Arc<dyn Image>,
    /// The path that names it.
    pub path: Utf8PathBuf,
    /// Its format.
    pub format: String,
    /// The snapshot of the image that is served, if it is not the current state.
    pub snapshot: Option<String>,
    /// The files that it is read from, the top first. Never empty.
    pub layers: Vec<Layer>,
}

impl std::fmt::Debug for Served {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Served").field("path", &self.path).field("layers", &self.layers).finish()
    }
}

/// Opens images while the server runs. [`Format::prepare`] and [`Format::prepare_child`] are called while
/// requests use the disk, the others while none does.
pub trait Format: Send + Sync {
    /// Opens another image of the same format, with its locks.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another process has it; [`ErrorKind::Refused`]; the system's.
    fn open(&self, image: &Utf8Path) -> Result<Served>;

    /// Drops what it still has of the image that was served: its locks are to be given back.
    fn close(&self) {}

    /// Opens, locks and checks an image ahead of the exchange for it, as far as the format can. `None`:
    /// [`Format::open`] does all of it.
    ///
    /// # Errors
    /// As [`Format::open`].
    fn prepare(&self, current: &Served, image: &Utf8Path) -> Result<Option<Box<dyn Prepared>>> {
        let _ = (current, image);
        Ok(None)
    }

    /// Does the same with `child`, an image that is backed by the one that is served. Creates `child` if it
    /// does not exist. [`Prepared::serve`] freezes the image that is served.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a format without children.
    fn prepare_child(&self, current: &Served, child: &Utf8Path, id: &str) -> Result<Box<dyn Prepared>> {
        let _ = (child, id);
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} is a {} image, which has no children", current.path, current.format),
        )
        .advise("exchange the image with `swap`, or let QEMU put a qcow2 overlay on the disk"))
    }

    /// Prepares a merge of layers of the chain that is served. Everything that was acknowledged is durable,
    /// and no request uses the disk.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for a format without layers; [`ErrorKind::Refused`] for layers that are not
    /// in the chain, one on the other.
    fn merge(&self, current: &Served, request: &MergeRequest) -> Result<Box<dyn Merging>> {
        let _ = request;
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("{} is a {} image, which has no layers to merge", current.path, current.format),
        ))
    }
}

/// An image that is ready to be served. Dropped, it gives back what it has.
pub trait Prepared: Send {
    /// Makes it the image that is served. No request uses the disk, and everything that was acknowledged is
    /// durable in the previous image, which is the one that it was prepared for.
    ///
    /// # Errors
    /// The system's; [`ErrorKind::Refused`]. The previous image is still to be served.
    fn serve(self: Box<Self>) -> Result<Served>;
}

/// Layers that are to become one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MergeRequest {
    /// Their files, the bottom first.
    pub run: Vec<Utf8PathBuf>,
    /// The one that receives the data of the others: the first or the last.
    pub into: Utf8PathBuf,
}

/// A merge of layers of the chain that is served ([`Format::merge`]). Dropped before its end, it leaves a
/// chain that shows what it showed before.
pub trait Merging: Send {
    /// Moves the data, while the disk is used. Returns early if `watch` says that it is cancelled.
    ///
    /// # Errors
    /// The system's; those of the images.
    fn run(&mut self, watch: &MergeWatch) -> Result<()>;

    /// Returns true if the image that is served becomes another one. From the return of [`Merging::run`]
    /// until [`Merging::finish`], every write that is acknowledged is in both.
    fn pivots(&self) -> bool;

    /// Makes the images above the merged ones depend on the one that received the data, and opens the chain
    /// that is served afterwards. No request uses the disk.
    ///
    /// # Errors
    /// The system's; those of the images. The chain is the previous one.
    fn finish(&mut self) -> Result<Served>;
}
