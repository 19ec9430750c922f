//! Moving data between the images of a chain: several layers become one.
//!
//! [`merge`] makes one image of a run show what the top of the run shows. If that image is the bottom of
//! the run, this is a coalesce. If it is the top, this is a rebase or a flatten. Each sector that the top
//! shows is moved once, however many layers there are. The other images are only read. The batmap is not
//! trusted: bitmaps decide.
//!
//! # What is durable before what
//! While the merge runs, the top read *through the run* shows the same at every point:
//!
//! * A sector of the target that an upper layer of the run hides may be overwritten: no reader sees it.
//! * A sector that only a lower layer has is written under its clear bit. The data is durable before the bit
//!   is, and then shows what the run shows there ([`Vhd::flush`]).
//! * The parent, or the kind of the image, changes after all of that is durable.
//!
//! So a merge can be repeated at any point, and the images above it never show anything else. A merge that
//! fails before its first entry is durable gives back the room that it took.

use image_files::engine::HostOffset;

use super::chain::{Chain, Layer};
use super::error::{Context, Error, ErrorKind, Result};
use super::footer::{DiskType, Footer};
use super::header::{Header, LOCATOR_SPACE, ParentName};
use super::open::{HALF_DONE, Vhd};
use super::transfer::{Copier, Copy, Joiner, Moving};
use super::units::SECTOR;

/// Data moved between two flushes.
const BATCH: u64 = 256 << 20;
/// Pieces in memory between two flushes.
const PIECES: usize = 1 << 18;

/// Returns the bytes of each layer of a run (bottom first) that are visible at its top.
///
/// # Errors
/// [`ErrorKind::Corrupt`]; the system's.
pub fn visible_bytes(run: &mut Chain) -> Result<Vec<u64>> {
    let mut bytes = vec![0; run.layers().len()];
    let mut at = 0;
    while let Some(piece) = run.piece(at)? {
        if let Some(count) = piece.data.and_then(|(layer, _)| bytes.get_mut(layer)) {
            *count += piece.end - piece.start;
        }
        at = piece.end;
    }
    Ok(bytes)
}

/// Bytes of a file system block.
const FILE_BLOCK: u64 = 4096;

/// Returns the bytes that a merge of the run into the layer `into` adds to its file on the file system.
/// Sectors of a stored block are overwritten in place. A new block takes its bitmap, and as many blocks of
/// the file system as sectors are written. Only reads.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a raw target; [`ErrorKind::Corrupt`]; the system's.
pub fn merge_growth(run: &mut Chain, into: usize) -> Result<u64> {
    let size = run.size();
    let (mut at, mut more, mut new) = (0, 0u64, None);
    // The last block of the file system that was counted, of a block that is not stored.
    let mut counted = None;
    while let Some(piece) = run.piece(at)? {
        let mut from = piece.start;
        let moved = piece.data.is_some_and(|(layer, _)| layer != into);
        while moved && from < piece.end {
            let target = run.vhd(into)?;
            let (block, end) = (target.block_of(from), target.block_end(from).min(piece.end));
            let end = if end > from { end } else { piece.end };
            let stored = match target.header.as_ref().map(|header| header.block().bytes()) {
                None => Some(HostOffset(from)),
                Some(_) if from >= target.size() => None,
                Some(bytes) => target.data_of(block)?.map(|data| HostOffset(data.0 + from % bytes)),
            };
            match stored {
                Some(place) => more = more.saturating_add(missing(target, place.0..place.0 + (end - from))?),
                None => {
                    if new != Some(block) {
                        more = more.saturating_add(FILE_BLOCK);
                        (new, counted) = (Some(block), None);
                    }
                    let (first, last) = (from / FILE_BLOCK, end.div_ceil(FILE_BLOCK));
                    let first = counted.map_or(first, |counted: u64| first.max(counted));
                    more = more.saturating_add(last.saturating_sub(first).saturating_mul(FILE_BLOCK));
                    counted = Some(last);
                }
            }
            from = end;
        }
        at = piece.end;
        if at >= size {
            break;
        }
    }
    // The footer behind the new blocks.
    Ok(if new.is_some() { more.saturating_add(FILE_BLOCK) } else { more })
}

/// Bytes of a range of the file for which the file system has no room yet.
fn missing(target: &Vhd, range: std::ops::Range<u64>) -> Result<u64> {
    let range = range.start / FILE_BLOCK * FILE_BLOCK..range.end.next_multiple_of(FILE_BLOCK);
    let length = range.end - range.start;
    let has = target.file.allocated_in(std::slice::from_ref(&range))?;
    Ok(has.map_or(0, |has| length.saturating_sub(has)))
}

/// A part of a move: from a layer of the run to a place of the disk.
struct Part {
    layer: usize,
    from: HostOffset,
    at: u64,
    end: u64,
}

/// Makes the layer `into` of `run` show what the run's top shows. With `into` above the bottom, its parent
/// becomes `below`, the parent of the run's bottom; `None` makes it an image without a parent. Returns the
/// bytes that were moved. To repeat an interrupted merge, open the target with [`Vhd::resume`].
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for a run of one or a raw target; [`ErrorKind::ReadOnly`],
/// [`ErrorKind::Dirty`], [`ErrorKind::Corrupt`], [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`]; the
/// system's. After each of them the top, read through the run, shows the same as before.
pub fn merge(run: &mut Chain, into: usize, below: Option<&ParentName>, moving: &Moving<'_>) -> Result<u64> {
    let size = run.size();
    if run.layers().len() < 2 {
        return Err(Error::new(ErrorKind::InvalidInput, "a merge needs at least two layers"));
    }
    let target = run.vhd(into)?;
    let (path, writes) = (target.path().to_owned(), target.file.writes());
    let merged = merge_run(run, into, size, below, moving).context("merge into", &path);
    merged.map_err(|error| match run.vhd(into).is_ok_and(|target| target.file.writes() == writes) {
        true => error,
        false => error.after_writes(HALF_DONE),
    })
}

fn merge_run(
    run: &mut Chain,
    into: usize,
    size: u64,
    below: Option<&ParentName>,
    moving: &Moving<'_>,
) -> Result<u64> {
    // A parent that cannot be named is refused before anything is moved.
    below.map(ParentName::locator_text).transpose()?;
    let target = run.vhd(into)?;
    target.require_writable()?;
    if target.size() < size {
        target.grow(size)?;
    }
    let (mut at, mut moved) = (0, 0);
    while at < size {
        let (parts, next) = next_batch(run, into, at)?;
        moved += move_batch(run, into, &parts, moving)?;
        at = next;
    }
    let target = run.vhd(into)?;
    if into > 0 {
        match below {
            Some(below) => target.set_parent(below)?,
            None => target.become_dynamic()?,
        }
    }
    Ok(moved)
}

/// Collects the parts to move from `at` on, and the place where the next batch begins.
fn next_batch(run: &mut Chain, into: usize, mut at: u64) -> Result<(Vec<Part>, u64)> {
    let (mut parts, mut bytes) = (Vec::new(), 0);
    while let Some(piece) = run.piece(at)? {
        if let Some((layer, from)) = piece.data.filter(|(layer, _)| *layer != into) {
            parts.push(Part { layer, from, at, end: piece.end });
            bytes += piece.end - at;
        }
        at = piece.end;
        if bytes >= BATCH || parts.len() >= PIECES {
            break;
        }
    }
    Ok((parts, at))
}

/// Moves one batch, and makes it durable with its bits.
fn move_batch(run: &mut Chain, into: usize, parts: &[Part], moving: &Moving<'_>) -> Result<u64> {
    if parts.is_empty() {
        return Ok(0);
    }
    let sources: Vec<_> = run.layers().iter().map(|layer| layer.file().clone()).collect();
    let target = run.vhd(into)?;
    let mark = target.mark_end();
    let copied = copy_parts(target, &sources, parts, moving);
    if copied.is_err() {
        target.give_up(mark);
    }
    let moved = copied?;
    target.flush()?;
    Ok(moved)
}

fn copy_parts(
    target: &mut Vhd,
    sources: &[std::sync::Arc<super::file::ImageFile>],
    parts: &[Part],
    moving: &Moving<'_>,
) -> Result<u64> {
    let mut blocks = Vec::new();
    if target.header.is_some() {
        for part in parts {
            blocks.extend(target.block_of(part.at)..=target.block_of(part.end - 1));
        }
        blocks.dedup();
    }
    target.allocate(&blocks)?;
    let (mut joiner, mut copier, mut moved) = (Joiner::default(), Copier::default(), 0);
    let file = target.file.clone();
    let mut copy = |copy: Copy| -> Result<()> {
        let Some(source) = sources.get(copy.source) else { return Ok(()) };
        copier.copy(source, &file, copy, &mut |bytes| {
            moved += bytes;
            (moving.progress)(bytes);
            match (moving.cancelled)() {
                true => Err(Error::new(ErrorKind::Cancelled, "it was cancelled")),
                false => Ok(()),
            }
        })
    };
    for part in parts {
        let mut at = part.at;
        while at < part.end {
            let end = target.block_end(at).min(part.end);
            let to = target.claim(at, end)?;
            let from = part.from.0 + (at - part.at);
            let next = Copy { source: part.layer, from, to: to.0, length: end - at };
            if let Some(ready) = joiner.push(next) {
                copy(ready)?;
            }
            at = end;
        }
    }
    if let Some(last) = joiner.take() {
        copy(last)?;
    }
    Ok(moved)
}

impl Chain {
    /// The VHD at a place of the chain.
    fn vhd(&mut self, number: usize) -> Result<&mut Vhd> {
        match self.layer_mut(number) {
            Some(Layer::Vhd(image)) => Ok(image),
            _ => Err(Error::new(ErrorKind::InvalidInput, "the target of a merge must be a VHD of the run")),
        }
    }
}

impl Vhd {
    /// Makes a differencing image, which has every sector that its parents showed, a dynamic one.
    ///
    /// Programs disagree about sectors with clear bits in a dynamic image: so they become zeros, and then all
    /// bits are set. Then the footer at the end says that there is no parent, and then the first page does.
    /// Between the two writes the footers differ, and the one at the end decides.
    pub(crate) fn become_dynamic(&mut self) -> Result<()> {
        let Some(mut header) = self.header.clone() else { return Ok(()) };
        if self.disk_type() == DiskType::Differencing {
            self.fill_blocks()?;
            let mut raw = self.footer.raw;
            raw.disk_type = 3.into();
            self.footer = Footer::sealed(raw);
            self.file.write_at(self.footer.bytes(), HostOffset(self.end))?;
            self.file.flush()?;
        } else if !self.torn && header.parent_id().is_null() {
            return Ok(());
        }
        header.clear_parent();
        if self.has_our_layout(&header) {
            self.write_first_page(&header, &[0; LOCATOR_SPACE as usize])?;
        } else {
            self.write_start(&header)?;
        }
        self.header = Some(header);
        Ok(())
    }

    /// Sets all bits of all stored blocks, over zeros.
    fn fill_blocks(&mut self) -> Result<()> {
        for block in 0..self.bat.entries() {
            self.fill_block(block)?;
        }
        match self.dirty.is_empty() {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Sets all bits of a block, over zeros, if it is stored. They are durable after the next [`Vhd::flush`].
    pub(crate) fn fill_block(&mut self, block: u64) -> Result<()> {
        let Some(size) = self.header.as_ref().map(Header::block) else { return Ok(()) };
        let Some(data) = self.data_of(block)? else { return Ok(()) };
        let mut at = 0;
        while at < size.sectors() {
            let (set, end) = self.bitmap(block, data)?.run(at, size.sectors());
            let (place, len) = (HostOffset(data.0 + at * SECTOR), (end - at) * SECTOR);
            if !set && !self.is_zero(place, len)? && !self.file.punch(place, len) {
                self.file.write_at(&vec![0; len as usize], place)?;
            }
            at = end;
        }
        if self.bitmap(block, data)?.set(0, size.sectors(), size.sectors()) {
            self.dirty.insert(block);
        }
        Ok(())
    }

    /// Entries of the BAT.
    pub(crate) fn blocks(&self) -> u64 {
        self.bat.entries()
    }
}
