//! One state of a chain of images, read by several threads at once.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use super::error::Result;
use super::file::ImageFile;
use super::units::HostOffset;
use super::view::{ChainReader, Content, Piece, RunLayer, View};

/// Views that are kept for the next readers. Each has an L1 table and some slices of L2 tables a layer.
const KEPT: usize = 4;

/// Data below a run of layers, read by several threads at once. It reads as zeros past its end.
pub trait BottomReader: Send + Sync {
    /// Fills `buf` with the guest's bytes from `offset`.
    ///
    /// # Errors
    /// The system's, and those of broken images.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()>;
}

/// A raw image.
impl BottomReader for ImageFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        Self::read_at(self, buf, HostOffset(offset))
    }
}

/// A run of layers on an optional base image. The locks are those of the opened images.
pub struct PointReader {
    run: Vec<RunLayer>,
    bottom: Option<Box<dyn BottomReader>>,
    size: u64,
    idle: Mutex<Vec<View>>,
}

impl fmt::Debug for PointReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PointReader")
            .field("run", &self.run)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

struct Bottom<'a>(&'a dyn BottomReader);

impl ChainReader for Bottom<'_> {
    fn read_at(&mut self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.0.read_at(buf, offset)
    }
}

impl PointReader {
    /// Makes a reader of layers, the bottom first, on the base image `bottom`.
    ///
    /// # Errors
    /// [`super::ErrorKind::InvalidInput`] for an empty run.
    pub fn new(run: Vec<RunLayer>, bottom: Option<Box<dyn BottomReader>>) -> Result<Self> {
        let first = View::new(run.clone())?;
        Ok(Self { run, bottom, size: first.size(), idle: Mutex::new(vec![first]) })
    }

    /// Bytes of the disk in this state.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Fills `buf` with what the guest reads at `offset`. Past the disk's end are zeros.
    ///
    /// # Errors
    /// [`super::ErrorKind::Corrupt`] for invalid tables and clusters, and the system's.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.with_view(|view| {
            let mut bottom = self.bottom.as_deref().map(Bottom);
            view.read_at(buf, offset, bottom.as_mut().map(|bottom| bottom as &mut dyn ChainReader))
        })
    }

    /// Returns the pieces from `offset` on, `limit` at most. The last one ends at `end` or before. A piece
    /// that no layer defines is one of zeros where there is no base image below.
    ///
    /// # Errors
    /// As [`PointReader::read_at`].
    pub fn pieces(&self, offset: u64, end: u64, limit: usize) -> Result<Vec<Piece>> {
        self.with_view(|view| {
            let (mut at, mut pieces) = (offset, Vec::<Piece>::new());
            while at < end
                && let Some(mut piece) = view.piece(at)?
            {
                piece.end = piece.end.min(end);
                at = piece.end;
                if piece.content == Content::Unowned && self.bottom.is_none() {
                    piece.content = Content::PastEnd;
                }
                let is_full = pieces.len() == limit;
                match pieces.last_mut() {
                    Some(last) if continues(last, &piece) => last.end = piece.end,
                    _ if is_full => break,
                    _ => pieces.push(piece),
                }
            }
            Ok(pieces)
        })
    }

    /// Lends a view to one reader: a view remembers where it was.
    fn with_view<T>(&self, read: impl FnOnce(&mut View) -> Result<T>) -> Result<T> {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle().pop();
        let mut view = match kept {
            Some(view) => view,
            None => View::new(self.run.clone())?,
        };
        let done = read(&mut view);
        // A view that failed may remember half of something.
        if done.is_ok() && idle().len() < KEPT {
            idle().push(view);
        }
        done
    }
}

/// Returns true if both pieces have the same kind of content for a reader of the disk.
fn continues(last: &Piece, next: &Piece) -> bool {
    let is_data = |piece: &Piece| matches!(piece.content, Content::Data(_) | Content::Compressed { .. });
    last.content == next.content || (is_data(last) && is_data(next))
}
