//! Reads a stream from its begin to its end, and nothing outside of it.

use std::io::{self, Read};

use super::refusal::Refusal;

/// A stream that is read once. Its length is known, so that no length in it is believed that is longer.
pub(super) struct Input<R> {
    reader: R,
    at: u64,
    length: u64,
}

/// The name of a block of memory or of a section: 1 to 255 bytes.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Text(Vec<u8>);

impl Text {
    pub(super) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl std::fmt::Display for Text {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}", self.0.escape_ascii().to_string())
    }
}

impl<R: Read> Input<R> {
    pub(super) fn new(reader: R, length: u64) -> Self {
        Self { reader, at: 0, length }
    }

    /// Offset of the next byte.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Number of bytes that are left.
    pub(super) fn left(&self) -> u64 {
        self.length - self.at
    }

    /// Reads bytes into a buffer.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Refusal> {
        let wanted = buffer.len() as u64;
        if wanted > self.left() {
            return Err(Refusal::wrong(self.length, "it ends in the middle of something"));
        }
        self.reader.read_exact(buffer).map_err(Refusal::Read)?;
        self.at += wanted;
        Ok(())
    }

    pub(super) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], Refusal> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    pub(super) fn byte(&mut self) -> Result<u8, Refusal> {
        self.bytes().map(|[byte]| byte)
    }

    pub(super) fn u16(&mut self) -> Result<u16, Refusal> {
        self.bytes().map(u16::from_be_bytes)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Refusal> {
        self.bytes().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, Refusal> {
        self.bytes().map(u64::from_be_bytes)
    }

    /// Reads a name: its length in a byte, then its bytes.
    pub(super) fn text(&mut self) -> Result<Text, Refusal> {
        let begin = self.at;
        let length = self.byte()?;
        if length == 0 {
            return Err(Refusal::wrong(begin, "a name is empty"));
        }
        let mut bytes = vec![0; usize::from(length)];
        self.fill(&mut bytes)?;
        Ok(Text(bytes))
    }

    /// Copies all that is left; returns its length.
    pub(super) fn rest(&mut self, mut to: impl FnMut(&[u8]) -> io::Result<()>) -> Result<u64, Refusal> {
        let length = self.left();
        let mut piece = vec![0; 1 << 16];
        while self.left() > 0 {
            let wanted = usize::try_from(self.left()).unwrap_or(usize::MAX).min(piece.len());
            let Some(part) = piece.get_mut(..wanted) else { break };
            self.fill(part)?;
            to(part).map_err(Refusal::Write)?;
        }
        Ok(length)
    }
}
