//! Ranges in which two states of a disk differ, by metadata alone.
//!
//! Images have no record of changes, and need none. Two states map a range to the same cluster of the same
//! file only if no program has written it between them, because a writer copies a cluster that a snapshot
//! shares, and writes an overlay where the file below is frozen. So:
//!
//! 1. Layers at the bottom that both have, with the same L1 table, are left out.
//! 2. Where the L1 entries of the remaining layers are equal, the L2 tables are the same: nothing below them
//!    differs.
//! 3. Where only one table of one file stands against another, their entries are compared. Bit 63 says how
//!    often a cluster is referred to, and nothing of its content.
//! 4. Elsewhere the pieces of both states are compared.
//!
//! A cluster that was written again with the same bytes counts as a difference.

use std::ops::Range;
use std::sync::Arc;

use snapcore::backend::Ranges;

use super::error::{Context, Result};
use super::mapping::{COPIED, L2Entry, Mapping};
use super::units::HostOffset;
use super::view::{Content, Piece, RunLayer, View};

/// The data below the layers of both states.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Under {
    /// None: there are zeros.
    Nothing,
    /// The same image.
    Same,
    /// Different images, or one of the two has none.
    Different,
}

/// Returns the ranges in which two states may differ. Each is a run of layers, from the bottom up, that shows
/// a disk of so many bytes; without a layer it is the data below. All ranges are within the second one's
/// disk. If that is larger, the rest of it is one of them. The flag is true if there were so many that near
/// ones are given as one.
///
/// # Errors
/// [`super::ErrorKind::Corrupt`] for invalid tables, and the system's.
pub fn differences(
    (from, from_size): (&[RunLayer], u64),
    (to, to_size): (&[RunLayer], u64),
    under: Under,
) -> Result<(Vec<Range<u64>>, bool)> {
    let common = from.iter().zip(to).take_while(|(one, other)| one.is_same_state(other)).count();
    let rest = |run: &[RunLayer]| run.get(common..).unwrap_or_default().to_vec();
    let under = if common > 0 { Under::Same } else { under };
    let mut sides = [Side::new(rest(from))?, Side::new(rest(to))?];
    let mut ranges = Ranges::default();
    let end = from_size.min(to_size);
    let mut at = 0;
    while at < end {
        let next = sides.iter_mut().map(|side| side.look(at)).min().unwrap_or(end).min(end);
        let [one, other] = &mut sides;
        let is_known_below = under != Under::Different;
        if !(is_known_below && one.tables == other.tables) {
            match (&one.tables[..], &other.tables[..]) {
                ([Table::At(a)], [Table::At(b)]) if is_known_below && a.file == b.file => {
                    compare_tables(one, (a.offset, b.offset), at..next, under, &mut ranges)?;
                }
                _ => compare_pieces(one, other, at..next, under, &mut ranges)?,
            }
        }
        at = next;
    }
    ranges.add(end..to_size);
    let coarse = ranges.is_coarse();
    Ok((ranges.into_vec(), coarse))
}

/// An L2 table of a layer.
#[derive(PartialEq, Eq, Debug, Clone, Copy)]
struct Place {
    file: FileKey,
    offset: HostOffset,
}

/// Identity of an open file.
pub(super) type FileKey = (u64, u64);

/// A part of a state, as the L1 tables show it.
#[derive(PartialEq, Eq, Debug, Clone, Copy)]
enum Table {
    At(Place),
    /// The layer's disk ends before: there are zeros, whatever is below.
    PastEnd,
}

/// The layers of one state that the other does not have.
struct Side {
    run: Vec<RunLayer>,
    keys: Vec<FileKey>,
    view: Option<View>,
    /// For each layer, the first byte for which its L1 table has to be searched again.
    empty_to: Vec<u64>,
    /// The tables that show a range, from the top down.
    tables: Vec<Table>,
}

impl Side {
    fn new(run: Vec<RunLayer>) -> Result<Self> {
        let keys = run.iter().map(RunLayer::file_key).collect::<Result<Vec<_>>>()?;
        let view = if run.is_empty() { None } else { Some(View::new(run.clone())?) };
        Ok(Self { empty_to: vec![0; run.len()], tables: Vec::new(), run, keys, view })
    }

    /// Reads which tables show the range from `at` on. Returns its end.
    fn look(&mut self, at: u64) -> u64 {
        self.tables.clear();
        let mut end = u64::MAX;
        let layers = self.run.iter().zip(&self.keys).zip(&mut self.empty_to);
        for ((layer, key), empty_to) in layers.rev() {
            if at >= layer.size() {
                self.tables.push(Table::PastEnd);
                break;
            }
            end = end.min(layer.size());
            if at < *empty_to {
                end = end.min(*empty_to);
                continue;
            }
            match layer.table_at(at) {
                (Some(offset), next) => {
                    self.tables.push(Table::At(Place { file: *key, offset }));
                    end = end.min(next);
                }
                (None, next) => {
                    *empty_to = next;
                    end = end.min(next);
                }
            }
        }
        end
    }

    fn piece(&mut self, at: u64, end: u64) -> Result<Piece> {
        let unowned = Piece { start: at, end, layer: 0, content: Content::Unowned };
        let Some(view) = &mut self.view else { return Ok(unowned) };
        let mut piece = view.piece(at)?.unwrap_or(Piece { content: Content::PastEnd, ..unowned });
        piece.end = piece.end.min(end);
        Ok(piece)
    }
}

/// Compares two L2 tables of one file, of which no other layer hides or completes anything.
fn compare_tables(
    side: &Side,
    (one, other): (HostOffset, HostOffset),
    range: Range<u64>,
    under: Under,
    ranges: &mut Ranges,
) -> Result<()> {
    let of_file =
        |key: &FileKey| side.tables.iter().any(|table| matches!(table, Table::At(at) if at.file == *key));
    let Some((layer, _)) = side.run.iter().zip(&side.keys).find(|(_, key)| of_file(key)) else {
        return Ok(());
    };
    let (geometry, file) = (layer.geometry(), layer.shared_file());
    let (reach, bits) = (geometry.l2_reach(), geometry.cluster_bits.bits());
    let base = range.start / reach * reach;
    let mut tables = [vec![0; geometry.cluster_bits.bytes()], vec![0; geometry.cluster_bits.bytes()]];
    let [a, b] = &mut tables;
    file.read_at(a, one)?;
    file.read_at(b, other)?;
    let mut add = |entry: u64| {
        let start = (base + (entry << bits)).max(range.start);
        ranges.add(start..(base + ((entry + 1) << bits)).min(range.end));
    };
    let fields = a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0);
    let fields_per_entry = geometry.l2_entry_size() as u64 / 8;
    // A part of a table is written at a time, so most of two tables is equal.
    for (number, (x, y)) in fields.enumerate() {
        if x == y {
            continue;
        }
        let number = number as u64;
        let (x, y) = (u64::from_be_bytes(*x), u64::from_be_bytes(*y));
        let mask = if number.is_multiple_of(fields_per_entry) { !COPIED } else { u64::MAX };
        if (x ^ y) & mask == 0 {
            continue;
        }
        let entry = number / fields_per_entry;
        let place = base.saturating_add(entry << bits);
        if place >= range.end || place.saturating_add(1 << bits) <= range.start {
            continue;
        }
        let mapped = |table: &[u8]| {
            let at = usize::try_from(entry).unwrap_or(usize::MAX);
            L2Entry::read(geometry, table, at).mapping(geometry).context("read an L2 table of", file.path())
        };
        if !same_zeros(mapped(a)?, mapped(b)?, under) {
            add(entry);
        }
    }
    Ok(())
}

/// Returns true if both read as zeros, or both show what is below.
fn same_zeros(one: Mapping, other: Mapping, under: Under) -> bool {
    let zeros = |mapping: Mapping| match mapping {
        Mapping::Zero { .. } => true,
        Mapping::Unallocated => under == Under::Nothing,
        _ => false,
    };
    let unowned = |mapping: Mapping| mapping == Mapping::Unallocated && under == Under::Same;
    (zeros(one) && zeros(other)) || (unowned(one) && unowned(other))
}

/// Compares what two states show, piece by piece.
fn compare_pieces(
    one: &mut Side,
    other: &mut Side,
    range: Range<u64>,
    under: Under,
    ranges: &mut Ranges,
) -> Result<()> {
    let mut at = range.start;
    while at < range.end {
        let (a, b) = (one.piece(at, range.end)?, other.piece(at, range.end)?);
        let end = a.end.min(b.end);
        let zeros = |piece: &Piece| match piece.content {
            Content::Zero | Content::PastEnd => true,
            Content::Unowned => under == Under::Nothing,
            Content::Data(_) | Content::Compressed { .. } => false,
        };
        let same_place = || one.keys.get(a.layer) == other.keys.get(b.layer) && a.content == b.content;
        let same = match (a.content, b.content) {
            _ if zeros(&a) && zeros(&b) => true,
            (Content::Unowned, Content::Unowned) => under == Under::Same,
            (Content::Data(_), Content::Data(_))
            | (Content::Compressed { .. }, Content::Compressed { .. }) => same_place(),
            _ => false,
        };
        if !same {
            ranges.add(at..end);
        }
        at = end.max(at + 1);
    }
    Ok(())
}

impl RunLayer {
    /// Identity of its file. Storage that is no file is itself alone.
    pub(super) fn file_key(&self) -> Result<FileKey> {
        use std::os::unix::fs::MetadataExt;
        let file = self.shared_file();
        match file.file() {
            Some(opened) => {
                let about = opened.metadata().map_err(|e| {
                    super::error::Error::io("its metadata cannot be read", e).on("compare", file.path())
                })?;
                Ok((about.dev(), about.ino()))
            }
            None => Ok((u64::MAX, Arc::as_ptr(&file) as usize as u64)),
        }
    }

    /// Returns true if both show the same, whatever is below: one L1 table of one file.
    fn is_same_state(&self, other: &Self) -> bool {
        let same_file =
            || matches!((self.file_key(), other.file_key()), (Ok(one), Ok(other)) if one == other);
        self.size() == other.size() && same_file() && self.has_tables_of(other)
    }

    /// The L2 table that maps `at`, and the end of the range for which that holds.
    fn table_at(&self, at: u64) -> (Option<HostOffset>, u64) {
        let reach = self.geometry().l2_reach();
        let index = usize::try_from(at / reach).unwrap_or(usize::MAX);
        let place = |n: usize| (index as u64).saturating_add(n as u64).saturating_mul(reach);
        match self.next_table(index) {
            Some((0, offset)) => (Some(offset), place(1)),
            Some((n, _)) => (None, place(n)),
            None => (None, u64::MAX),
        }
    }
}
