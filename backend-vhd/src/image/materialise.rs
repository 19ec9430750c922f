//! Copies of what a chain shows: a fixed VHD, or the plain bytes.

use std::fs::File;
use std::path::Path;

use image_files::engine::HostOffset;

use super::chain::Chain;
use super::error::{Context, Error, ErrorKind, Result};
use super::file::{ImageFile, Storage};
use super::footer::{DiskType, Footer};
use super::transfer::Moving;
use super::transfer::{Copier, Copy, Joiner};
use super::units::{MAX_SIZE, SECTOR, TimeStamp, UniqueId};

/// Kind of a copy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Materialised {
    /// The bytes of the disk.
    Raw,
    /// A fixed VHD, whose size is rounded up to a multiple of this many bytes. Azure needs 1 MiB.
    Fixed {
        /// Bytes.
        align: u64,
    },
}

/// Writes what the chain shows into an empty file, and makes it durable. Holes stay holes. Returns the bytes
/// that were copied.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] for an alignment that is not whole sectors, [`ErrorKind::LimitExceeded`],
/// [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`], [`ErrorKind::Corrupt`]; the system's.
pub fn materialise(
    chain: &mut Chain,
    file: File,
    path: &Path,
    kind: Materialised,
    moving: &Moving<'_>,
) -> Result<u64> {
    copy_into(chain, Box::new(file), path, kind, moving).context("write", path)
}

fn copy_into(
    chain: &mut Chain,
    storage: Box<dyn Storage>,
    path: &Path,
    kind: Materialised,
    moving: &Moving<'_>,
) -> Result<u64> {
    let target = ImageFile::new(storage, path, true);
    let size = match kind {
        Materialised::Raw => chain.size(),
        Materialised::Fixed { align } if align > 0 && align % SECTOR == 0 => {
            chain.size().checked_next_multiple_of(align).unwrap_or(u64::MAX)
        }
        Materialised::Fixed { align } => {
            let text = format!("an alignment of {align} bytes is not a whole number of sectors");
            return Err(Error::new(ErrorKind::InvalidInput, text));
        }
    };
    if kind != Materialised::Raw && size > MAX_SIZE {
        let text = format!("a fixed VHD of {size} bytes would be larger than 2040 GiB");
        return Err(Error::new(ErrorKind::LimitExceeded, text));
    }
    target.set_len(size)?;
    let moved = copy_pieces(chain, &target, moving)?;
    if kind != Materialised::Raw {
        let footer = Footer::new(DiskType::Fixed, size, UniqueId::random(), TimeStamp::now());
        target.write_at(footer.bytes(), HostOffset(size))?;
    }
    target.flush()?;
    Ok(moved)
}

fn copy_pieces(chain: &mut Chain, target: &ImageFile, moving: &Moving<'_>) -> Result<u64> {
    let sources: Vec<_> = chain.layers().iter().map(|layer| layer.file().clone()).collect();
    let (mut joiner, mut copier, mut moved) = (Joiner::default(), Copier::default(), 0);
    let mut copy = |copy: Copy| -> Result<()> {
        let Some(source) = sources.get(copy.source) else { return Ok(()) };
        copier.copy(source, target, copy, &mut |bytes| {
            moved += bytes;
            (moving.progress)(bytes);
            match (moving.cancelled)() {
                true => Err(Error::new(ErrorKind::Cancelled, "it was cancelled")),
                false => Ok(()),
            }
        })
    };
    let mut at = 0;
    while let Some(piece) = chain.piece(at)? {
        let length = piece.end - piece.start;
        if let Some((source, from)) = piece.data
            && let Some(ready) = joiner.push(Copy { source, from: from.0, to: at, length })
        {
            copy(ready)?;
        }
        at = piece.end;
    }
    if let Some(last) = joiner.take() {
        copy(last)?;
    }
    Ok(moved)
}
