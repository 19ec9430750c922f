//! Run state of the guest at the end of a migration, as QEMU's stream has it.
//!
//! The section `globalstate` is among the states of devices, at the end of the stream:
//!
//! ```text
//! 0x04 | section (u32) | 11 "globalstate" | instance (u32) | version (u32) | word length (u32) | 100 bytes
//! ```
//!
//! A guest may be able to write the same bytes into the state of a device. It decides then no more than
//! whether it goes on itself.

use std::{fs::File, io, os::unix::fs::FileExt};

/// Bytes per read.
const PIECE: u64 = 256 << 10;

/// Bytes at the end of a stream in which the section is searched.
const FARTHEST: u64 = 16 << 20;

const NAME: &[u8] = b"\x0bglobalstate";

/// Bytes of the section from the name on, with its word.
const LENGTH: usize = NAME.len() + 8 + 4 + 100;

/// Reads the word from a stream that begins at `begin` of a file and goes to the file's end.
pub(super) fn read(file: &File, begin: u64) -> io::Result<Option<String>> {
    let length = file.metadata()?.len();
    let farthest = length.saturating_sub(FARTHEST).max(begin);
    let mut end = length;
    while end > farthest {
        let start = end.saturating_sub(PIECE).max(farthest);
        // A section that begins in this piece may end in the next one.
        let over = (end + LENGTH as u64).min(length);
        let mut piece = vec![0; usize::try_from(over - start).map_err(io::Error::other)?];
        file.read_exact_at(&mut piece, start)?;
        if let Some(word) = find(&piece) {
            return Ok(Some(word));
        }
        end = start;
    }
    Ok(None)
}

/// Finds the last section in a piece of a stream.
fn find(piece: &[u8]) -> Option<String> {
    let at = piece.windows(NAME.len()).rposition(|part| part == NAME)?;
    let body = piece.get(at + NAME.len() + 8..at + LENGTH)?;
    let (length, buffer) = body.split_first_chunk::<4>()?;
    let length = usize::try_from(u32::from_be_bytes(*length)).ok()?;
    let word = buffer.get(..length.checked_sub(1)?)?;
    let is_word = |byte: &u8| byte.is_ascii_lowercase() || *byte == b'-';
    let is_one = !word.is_empty() && word.iter().all(is_word);
    is_one.then(|| String::from_utf8_lossy(word).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(word: &str) -> Vec<u8> {
        let mut bytes = vec![4, 0, 0, 0, 2];
        bytes.extend(NAME);
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 1]);
        bytes.extend(u32::try_from(word.len() + 1).expect("short").to_be_bytes());
        bytes.extend(word.as_bytes());
        bytes.resize(5 + LENGTH, 0);
        bytes
    }

    fn read_from(bytes: &[u8], begin: u64) -> Option<String> {
        let file = tempfile::tempfile().expect("a file");
        file.write_all_at(bytes, 0).expect("written");
        read(&file, begin).expect("read")
    }

    /// The last section counts, wherever the pieces meet.
    #[test]
    fn last_section_is_found_in_every_place() {
        let piece = usize::try_from(PIECE).expect("short");
        for behind in [0, 1, 90, piece - LENGTH, piece - 20, piece - 1, piece, 3 * piece] {
            let stream = [section("running"), section("paused"), vec![0x0b; behind]].concat();
            assert_eq!(read_from(&stream, 0).as_deref(), Some("paused"), "{behind}");
        }
    }

    /// Data before the stream, and an invalid word, are not accepted.
    #[test]
    fn what_is_no_section_is_not_believed() {
        let stream = [section("running"), vec![0; 10]].concat();
        assert_eq!(read_from(&stream, u64::try_from(stream.len() - 10).expect("short")), None);
        assert_eq!(read_from(&section("Not one")[..], 0), None);
        assert_eq!(read_from(&section("running")[..60], 0), None);
        assert_eq!(read_from(&[], 0), None);
    }
}
