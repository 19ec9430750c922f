//! A writer of small streams, and what must come of them: for tests.

use std::collections::BTreeMap;

use super::walk::{PAGE, Parts};

/// The block that is separated.
pub(super) const WANTED: &str = "pc.ram";

/// Writes a stream byte by byte, as QEMU does, or as it never would.
#[derive(Default, Clone)]
pub(super) struct Stream(pub(super) Vec<u8>);

impl Stream {
    pub(super) fn new() -> Self {
        let mut stream = Self(b"QEVM\0\0\0\x03".to_vec());
        stream.put(&[7, 0, 0, 0, 3]).put(b"q35");
        stream
    }

    pub(super) fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend(bytes);
        self
    }

    pub(super) fn word(&mut self, word: u64) -> &mut Self {
        self.put(&word.to_be_bytes())
    }

    pub(super) fn text(&mut self, text: &str) -> &mut Self {
        self.put(&[text.len() as u8]).put(text.as_bytes())
    }

    /// The begin of the memory's section, and the list of its blocks.
    pub(super) fn blocks(&mut self, blocks: &[(&str, u64)]) -> &mut Self {
        let total: u64 = blocks.iter().map(|(_, length)| length).sum();
        self.put(&[1, 0, 0, 0, 2]).text("ram").put(&[0, 0, 0, 0, 0, 0, 0, 4]).word(total | 4);
        for (name, length) in blocks {
            self.text(name).word(*length);
        }
        self
    }

    /// The begin of a further part of it, or of the last one.
    pub(super) fn part(&mut self, is_last: bool) -> &mut Self {
        self.put(&[if is_last { 3 } else { 2 }, 0, 0, 0, 2])
    }

    /// The end of a part.
    pub(super) fn end(&mut self) -> &mut Self {
        self.word(0x10).put(&[0x7e, 0, 0, 0, 2])
    }

    /// A page, of zeros if there is no byte to fill it with; without a name it continues.
    pub(super) fn page(&mut self, block: Option<&str>, address: u64, fill: Option<u8>) -> &mut Self {
        let flags = if block.is_none() { 0x20 } else { 0 } | if fill.is_some() { 8 } else { 2 };
        self.word(address | flags);
        if let Some(block) = block {
            self.text(block);
        }
        match fill {
            Some(byte) => self.put(&[byte; PAGE as usize]),
            None => self.put(&[0]),
        }
    }

    /// The states of devices, whatever they are.
    pub(super) fn devices(&mut self) -> &mut Self {
        self.put(&[4, 0, 0, 0, 9]).text("timer").put(&[0; 12]).put(&[0x7e, 0, 0, 0, 9, 0])
    }
}

/// What came of a stream, in memory.
#[derive(Default, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) length: u64,
    /// The pages that are not zeros, by their addresses.
    pub(super) pages: BTreeMap<u64, Vec<u8>>,
    pub(super) rest: Vec<u8>,
}

impl Parts for Kept {
    fn block(&mut self, length: u64) -> std::io::Result<()> {
        assert_eq!(self.length, 0, "a block is reported twice");
        self.length = length;
        Ok(())
    }

    fn page(&mut self, address: u64, bytes: &[u8; PAGE as usize]) -> std::io::Result<()> {
        assert!(address.is_multiple_of(PAGE) && address + PAGE <= self.length, "a page outside of its block");
        self.pages.insert(address, bytes.to_vec());
        Ok(())
    }

    fn zeros(&mut self, address: u64) -> std::io::Result<()> {
        assert!(address.is_multiple_of(PAGE) && address + PAGE <= self.length, "a page outside of its block");
        self.pages.remove(&address);
        Ok(())
    }

    fn rest(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.rest.extend(bytes);
        Ok(())
    }
}
