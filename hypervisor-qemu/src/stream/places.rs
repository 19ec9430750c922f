//! The places of the guest's generation ID.
//!
//! The state of the device is among those of other devices, at the end of the stream:
//!
//! ```text
//! 0x04 | section (u32) | 7 "vmgenid" | instance 0 (u32) | version 1 (u32) | place (u64, little endian)
//! 0x7e | section (u32)
//! ```
//!
//! Sections have no lengths, so this one is searched. A guest, or a host that sent it a packet, may have the
//! same bytes in the state of another device. So there may be several places, and the caller must compare
//! what is there with what must be there.

use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes per read.
const PIECE: u64 = 1 << 20;

/// Bytes at the end of a stream in which sections are searched: the states of devices take less.
const FARTHEST: u64 = 16 << 20;

const NAME: &[u8; 8] = b"\x07vmgenid";

/// Bytes of a section before its name: its type and number.
const BEFORE: usize = 5;

/// Bytes of a section, with its footer.
const LENGTH: usize = BEFORE + NAME.len() + 4 + 4 + 8 + 5;

/// Maximum number of places: each is looked at while the guest waits.
const MOST: usize = 16;

/// Reads the places of the guest's generation ID from a stream of `length` bytes that begins at `begin` of a
/// file: guest-physical addresses, the last one in the stream first.
pub(crate) fn generation_ids(file: &File, begin: u64, length: u64) -> io::Result<Vec<u64>> {
    let stop = begin.checked_add(length).ok_or_else(|| io::Error::other("the stream is too long"))?;
    let farthest = stop.saturating_sub(FARTHEST).max(begin);
    let mut places = Vec::new();
    let mut end = stop;
    while end > farthest && places.len() < MOST {
        let start = end.saturating_sub(PIECE).max(farthest);
        // A section that begins in this piece may end in the next one.
        let over = (end + LENGTH as u64 - 1).min(stop);
        let mut piece = vec![0; usize::try_from(over - start).map_err(io::Error::other)?];
        file.read_exact_at(&mut piece, start)?;
        let mut found: Vec<u64> = find(&piece);
        found.reverse();
        for place in found {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        end = start;
    }
    places.truncate(MOST);
    Ok(places)
}

/// Finds the sections in a piece of a stream.
pub(super) fn find(piece: &[u8]) -> Vec<u64> {
    let mut places = Vec::new();
    // By the last byte of the name, which occurs once in it: most bytes are passed over eight at a time.
    let mut at = NAME.len() - 1;
    while let Some(byte) = piece.get(at) {
        match NAME.iter().rposition(|of| of == byte) {
            None => at += NAME.len(),
            Some(index) if index + 1 == NAME.len() => {
                places.extend((at + 1).checked_sub(BEFORE + NAME.len()).and_then(|from| place(piece, from)));
                at += 1;
            }
            Some(index) => at += NAME.len() - 1 - index,
        }
    }
    places
}

/// Parses the section that begins at an offset.
fn place(piece: &[u8], from: usize) -> Option<u64> {
    let section = piece.get(from..from.checked_add(LENGTH)?)?;
    let (head, rest) = section.split_at_checked(BEFORE)?;
    let (name, rest) = rest.split_first_chunk::<8>()?;
    let (instance, rest) = rest.split_first_chunk::<4>()?;
    let (version, rest) = rest.split_first_chunk::<4>()?;
    let (place, footer) = rest.split_first_chunk::<8>()?;
    let is_one = head.first() == Some(&4)
        && name == NAME
        && *instance == [0; 4]
        && *version == [0, 0, 0, 1]
        && footer.first() == Some(&0x7e)
        && head.get(1..) == footer.get(1..);
    // The firmware has not chosen one yet if it is 0. QEMU uses 32 bits of it.
    let place = u64::from(u32::try_from(u64::from_le_bytes(*place)).ok()?);
    (is_one && place != 0).then_some(place)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(place: u64) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 1, 2];
        bytes.extend(NAME);
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend(place.to_le_bytes());
        bytes.extend([0x7e, 0, 0, 1, 2]);
        assert_eq!(bytes.len(), LENGTH);
        bytes
    }

    fn read(bytes: &[u8], begin: u64) -> Vec<u64> {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(bytes, 0).expect("written");
        generation_ids(&file, begin, bytes.len() as u64 - begin).expect("read")
    }

    /// A section is found wherever the pieces meet, in any alignment.
    #[test]
    fn section_is_found_in_every_place() {
        let piece = usize::try_from(PIECE).expect("short");
        let behind = (0..40).chain(piece - 40..piece + 10).chain([3 * piece]);
        for behind in behind {
            for filling in [0, 7, b'd', b'v'] {
                let stream = [vec![filling; 9], section(0x0fff_f028), vec![filling; behind]].concat();
                assert_eq!(read(&stream, 0), [0x0fff_f028], "{behind} bytes of {filling}");
            }
        }
    }

    /// Several places are all reported, each once, the last first, and not without end.
    #[test]
    fn several_places_are_reported_but_not_all() {
        let stream = [section(1), section(2), section(1), section(3)].concat();
        assert_eq!(read(&stream, 0), [3, 1, 2]);
        let many: Vec<u8> = (1..1000).flat_map(section).collect();
        assert_eq!(read(&many, 0).len(), MOST);
    }

    /// A place of 0 or of more than 32 bits, another version or instance, and a wrong or missing footer are
    /// not accepted; nor is a section outside of the stream.
    #[test]
    fn what_is_no_section_is_not_believed() {
        assert!(read(&section(0), 0).is_empty());
        assert!(read(&section(1 << 32), 0).is_empty());
        assert!(read(&section(u64::MAX), 0).is_empty());
        let whole = section(0x1000);
        for at in (0..BEFORE).chain([BEFORE, BEFORE + 8, BEFORE + 12, BEFORE + 15]).chain(LENGTH - 5..LENGTH)
        {
            let mut changed = whole.clone();
            changed[at] ^= 0x10;
            assert!(read(&changed, 0).is_empty(), "byte {at}");
        }
        for length in 0..LENGTH {
            assert!(read(&whole[..length], 0).is_empty());
        }
        assert!(read(&[whole.clone(), vec![0; 10]].concat(), 1).is_empty());
    }
}
