//! What the layers below the top of a chain show, flattened: for each unit of the disk, which layer has which
//! bytes. A read asks the top and this map, however deep the chain is.
//!
//! The layers below the top do not change while the chain is open, as far as a reader of the disk can see: a
//! merge among them moves bytes, and leaves them also where they were. What is written goes to the top,
//! which is asked first. So an entry stays right until the chain gets another top.

use std::collections::HashMap;

use image_files::engine::HostOffset;

use super::chain::Piece;
use super::error::Result;

/// Bytes of a unit: a block of most images.
const UNIT: u64 = 2 << 20;

/// The most pieces that are kept, of 24 bytes each.
const MOST: usize = 256 << 10;

/// A part of a unit with one kind of content.
#[derive(Clone, Copy, Debug)]
struct Part {
    /// End of it, from the beginning of its unit.
    end: u32,
    layer: u32,
    /// Place of the unit's byte 0, if it were stored in one with this part. Nothing: zeros.
    place: Option<i64>,
}

/// The map, as far as it was asked.
#[derive(Debug, Default)]
pub(super) struct BelowMap {
    units: HashMap<u64, Box<[Part]>>,
    parts: usize,
}

impl BelowMap {
    /// Returns the piece at `at`, which ends at `size` or before. `find` finds pieces without the map.
    ///
    /// # Errors
    /// Those of `find` at this place.
    pub(super) fn piece(
        &mut self,
        at: u64,
        size: u64,
        mut find: impl FnMut(u64) -> Result<Piece>,
    ) -> Result<Piece> {
        let (unit, start) = (at / UNIT, at / UNIT * UNIT);
        if let Some(parts) = self.units.get(&unit) {
            return Ok(at_place(parts, start, at, size));
        }
        let Some(parts) = flattened(start, size, &mut find) else {
            // Something else of the unit cannot be read, and this may be whole.
            return find(at);
        };
        if self.parts.saturating_add(parts.len()) > MOST {
            *self = Self::default();
        }
        self.parts += parts.len();
        let piece = at_place(&parts, start, at, size);
        self.units.insert(unit, parts);
        Ok(piece)
    }

    /// Forgets all: the layers are others.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

/// All pieces of the unit that begins at `start`.
fn flattened(start: u64, size: u64, find: &mut impl FnMut(u64) -> Result<Piece>) -> Option<Box<[Part]>> {
    let end = (start + UNIT).min(size);
    let (mut parts, mut at) = (Vec::new(), start);
    while at < end {
        let piece = find(at).ok()?;
        let stop = piece.end.min(end);
        if stop <= at {
            return None;
        }
        let (layer, place) = match piece.data {
            Some((layer, place)) => {
                let first = i64::try_from(place.0).ok()? - i64::try_from(at - start).ok()?;
                (u32::try_from(layer).ok()?, Some(first))
            }
            None => (0, None),
        };
        parts.push(Part { end: u32::try_from(stop - start).ok()?, layer, place });
        at = stop;
    }
    Some(parts.into())
}

fn at_place(parts: &[Part], start: u64, at: u64, size: u64) -> Piece {
    let within = (at - start) as u32;
    let found = parts.get(parts.partition_point(|part| part.end <= within));
    let end = found.map_or(start + UNIT, |part| start + u64::from(part.end)).min(size);
    let data = found.and_then(|part| {
        let place = u64::try_from(part.place? + i64::from(within)).ok()?;
        Some((part.layer as usize, HostOffset(place)))
    });
    Piece { start: at, end, data }
}
