//! A chain of images as one disk: reads, writes to the top, and the map of what is where.

use std::sync::Arc;

use image_files::engine::HostOffset;

use super::below::BelowMap;
use super::error::{Context, Error, ErrorKind, Result};
use super::file::ImageFile;
use super::open::Vhd;
use super::space::{Extent, next_extent};
use super::units::SECTOR;

/// A raw file at the bottom of a chain.
#[derive(Debug)]
pub struct RawLayer {
    file: Arc<ImageFile>,
    size: u64,
}

impl RawLayer {
    /// Makes a layer of a raw file or device.
    ///
    /// # Errors
    /// The system's.
    pub fn new(file: ImageFile) -> Result<Self> {
        let size = file.len()?;
        Ok(Self { file: Arc::new(file), size })
    }
}

/// One layer of a chain.
#[derive(Debug)]
pub enum Layer {
    /// A VHD.
    Vhd(Box<Vhd>),
    /// A raw file, at the bottom only.
    Raw(RawLayer),
}

impl Layer {
    /// Bytes of its disk.
    pub fn size(&self) -> u64 {
        match self {
            Self::Vhd(image) => image.size(),
            Self::Raw(raw) => raw.size,
        }
    }

    /// The file.
    pub fn file(&self) -> &Arc<ImageFile> {
        match self {
            Self::Vhd(image) => &image.file,
            Self::Raw(raw) => &raw.file,
        }
    }

    fn extent(&mut self, at: u64) -> Result<Extent> {
        match self {
            Self::Vhd(image) => image.extent(at),
            Self::Raw(raw) => next_extent(&raw.file, at, raw.size),
        }
    }
}

/// A range of the disk with one kind of content.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
    /// The layer that has the data (0 is the bottom) and its place there; `None` where no layer has data: the
    /// disk reads as zeros.
    pub data: Option<(usize, HostOffset)>,
}

/// A chain of images, open as one disk. The top is written; everything else is only read.
#[derive(Debug)]
pub struct Chain {
    /// Bottom first.
    layers: Vec<Layer>,
    /// What all but the last show.
    below: BelowMap,
}

/// The least layers below the top for which the map is faster than asking them.
const FLATTENED_FROM: usize = 3;

/// Returns the piece at `at` of what these layers show together, which ends at `end` or before.
fn piece_of(layers: &mut [Layer], at: u64, mut end: u64) -> Result<Piece> {
    for (number, layer) in layers.iter_mut().enumerate().rev() {
        // Beyond the end of a layer there are zeros, whatever is below it.
        if at >= layer.size() {
            break;
        }
        let extent = layer.extent(at)?;
        end = end.min(extent.end);
        if let Some(place) = extent.data {
            return Ok(Piece { start: at, end, data: Some((number, place)) });
        }
    }
    Ok(Piece { start: at, end, data: None })
}

impl Chain {
    /// Makes a chain of layers, the bottom first. Beyond the end of a layer, those above it show zeros,
    /// whatever is below: an interrupted merge leaves layers that are larger than the one above them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for no layer.
    pub fn new(layers: Vec<Layer>) -> Result<Self> {
        if layers.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "a chain has at least one layer"));
        }
        Ok(Self { layers, below: BelowMap::default() })
    }

    /// Refuses a layer that is larger than the one above it: programs disagree about what the upper one
    /// shows.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`], with both.
    pub(super) fn require_growing(&self) -> Result<()> {
        for pair in self.layers.windows(2) {
            if let [lower, upper] = pair
                && lower.size() > upper.size()
            {
                return Err(Error::corrupt(format!(
                    "the parent {} has {} bytes, more than the {} of its child",
                    lower.file().path().display(),
                    lower.size(),
                    upper.size()
                ))
                .on("use", upper.file().path()));
            }
        }
        Ok(())
    }

    /// Refuses a parent with errors that no repair corrects, as [`Vhd::require_sound`]. What a repair
    /// corrects may be what an interrupted merge has left, which is about to be repeated. Files that are
    /// known are not looked at.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; the system's.
    pub(crate) fn require_sound_parents(
        &mut self,
        is_known: impl Fn(&ImageFile) -> Result<bool>,
    ) -> Result<()> {
        for layer in self.layers.iter_mut().rev().skip(1) {
            let Layer::Vhd(image) = layer else { continue };
            if is_known(&image.file)? {
                continue;
            }
            let path = image.path().to_owned();
            match image.require_sound().context("use", &path) {
                Err(error) if error.kind() != ErrorKind::Dirty => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Bytes of the disk.
    pub fn size(&self) -> u64 {
        self.layers.last().map_or(0, Layer::size)
    }

    /// The layers, the bottom first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    pub(super) fn layer_mut(&mut self, number: usize) -> Option<&mut Layer> {
        self.below.clear();
        self.layers.get_mut(number)
    }

    /// Returns the layers with `image` on top of them, and leaves a chain without a layer, of which no byte
    /// is read. What was the top has the file `previous` from now on: the same one by another name.
    pub(crate) fn hand_on(&mut self, image: Vhd, previous: Arc<ImageFile>) -> Self {
        let mut layers = std::mem::take(&mut self.layers);
        self.below.clear();
        if let Some(Layer::Vhd(top)) = layers.last_mut() {
            top.file = previous;
        }
        layers.push(Layer::Vhd(Box::new(image)));
        Self { layers, below: BelowMap::default() }
    }

    /// The layers, taken apart.
    pub fn into_layers(self) -> Vec<Layer> {
        self.layers
    }

    fn top(&mut self) -> Result<&mut Vhd> {
        match self.layers.last_mut() {
            Some(Layer::Vhd(image)) => Ok(image),
            _ => Err(Error::new(ErrorKind::ReadOnly, "the top of the chain is not a VHD")),
        }
    }

    /// Returns the piece of the disk that begins at `at`; `None` at the end of the disk.
    ///
    /// # Errors
    /// [`ErrorKind::Corrupt`]; the system's.
    pub fn piece(&mut self, at: u64) -> Result<Option<Piece>> {
        let size = self.size();
        if at >= size {
            return Ok(None);
        }
        let Some((top, below)) = self.layers.split_last_mut() else { return Ok(None) };
        let extent = top.extent(at)?;
        let end = extent.end.min(size);
        if let Some(place) = extent.data {
            return Ok(Some(Piece { start: at, end, data: Some((below.len(), place)) }));
        }
        let mut piece = match below.len() < FLATTENED_FROM {
            true => piece_of(below, at, end)?,
            false => self.below.piece(at, size, |at| piece_of(below, at, size))?,
        };
        piece.end = piece.end.min(end);
        Ok(Some(piece))
    }

    /// Fills `buf` with the disk's bytes from `at`.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] beyond the end; [`ErrorKind::Corrupt`]; the system's.
    pub fn read_at(&mut self, buf: &mut [u8], at: u64) -> Result<()> {
        self.require_inside(at, buf.len() as u64)?;
        let mut done = 0;
        while done < buf.len() {
            let Some(piece) = self.piece(at + done as u64)? else { break };
            let n = (piece.end - piece.start).min((buf.len() - done) as u64) as usize;
            let part = buf.get_mut(done..done + n).unwrap_or_default();
            match piece.data {
                Some((layer, place)) => {
                    if let Some(layer) = self.layers.get(layer) {
                        layer.file().read_at(part, place)?;
                    }
                }
                None => part.fill(0),
            }
            done += n;
        }
        Ok(())
    }

    /// Writes to the top. The bytes are durable after [`Chain::flush`]; until then, other readers of the file
    /// may not see them.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] beyond the end; [`ErrorKind::ReadOnly`], [`ErrorKind::Dirty`],
    /// [`ErrorKind::NoSpace`]; the system's.
    pub fn write_at(&mut self, buf: &[u8], at: u64) -> Result<()> {
        self.require_inside(at, buf.len() as u64)?;
        if buf.is_empty() {
            return Ok(());
        }
        let end = at + buf.len() as u64;
        let (from, to) = (at / SECTOR * SECTOR, end.next_multiple_of(SECTOR));
        if (from, to) == (at, end) {
            return self.top()?.write_at(buf, at);
        }
        // Parts of sectors at the ends are completed with what the chain shows.
        let mut whole = vec![0; (to - from) as usize];
        self.read_at(&mut whole, from)?;
        let skipped = (at - from) as usize;
        if let Some(part) = whole.get_mut(skipped..skipped + buf.len()) {
            part.copy_from_slice(buf);
        }
        self.top()?.write_at(&whole, from)
    }

    /// Makes a range read as zeros. Only what the chain has data for is written; the space of the top's data
    /// is returned to the file system where that is supported.
    ///
    /// # Errors
    /// As [`Chain::write_at`].
    pub fn zero(&mut self, at: u64, len: u64) -> Result<()> {
        self.require_inside(at, len)?;
        let end = at + len;
        let (from, to) = (at.next_multiple_of(SECTOR).min(end), end / SECTOR * SECTOR);
        if from > at {
            self.write_at(&vec![0; (from - at) as usize], at)?;
        }
        if to > from {
            self.zero_sectors(from, to)?;
        }
        if end > to.max(from) {
            let rest = to.max(from);
            self.write_at(&vec![0; (end - rest) as usize], rest)?;
        }
        Ok(())
    }

    fn zero_sectors(&mut self, mut at: u64, end: u64) -> Result<()> {
        while at < end {
            let Some(piece) = self.piece(at)? else { break };
            let to = piece.end.min(end);
            if piece.data.is_some() {
                self.top()?.write_zeros(at, to)?;
            }
            at = to;
        }
        Ok(())
    }

    /// Returns the space of a range to the file system: it reads as zeros where the top has the data, and is
    /// unchanged elsewhere.
    ///
    /// # Errors
    /// As [`Chain::write_at`].
    pub fn trim(&mut self, at: u64, len: u64) -> Result<()> {
        self.require_inside(at, len)?;
        let (mut at, end) = (at.next_multiple_of(SECTOR), (at + len) / SECTOR * SECTOR);
        let top = self.layers.len() - 1;
        while at < end {
            let Some(piece) = self.piece(at)? else { break };
            let to = piece.end.min(end);
            if piece.data.is_some_and(|(layer, _)| layer == top) {
                self.top()?.write_zeros(at, to)?;
            }
            at = to;
        }
        Ok(())
    }

    /// Makes everything written durable.
    ///
    /// # Errors
    /// The system's. The chain must be opened again then.
    pub fn flush(&mut self) -> Result<()> {
        self.top()?.flush()
    }

    fn require_inside(&self, at: u64, len: u64) -> Result<()> {
        match at.checked_add(len).is_some_and(|end| end <= self.size()) {
            true => Ok(()),
            false => Err(Error::new(
                ErrorKind::InvalidInput,
                format!("{len} bytes at {at} are not inside of the disk of {} bytes", self.size()),
            )),
        }
    }
}
