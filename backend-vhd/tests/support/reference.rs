//! A small reference reader of chains, written from the format's description: sector bits decide. Parents are
//! given by the caller.

use std::path::Path;

/// An image in memory, with its parent.
pub struct Reference {
    bytes: Vec<u8>,
    kind: u32,
    size: u64,
    table: u64,
    block: u64,
    parent: Option<Box<Reference>>,
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

impl Reference {
    /// Opens a chain of files, the top first. A last one without a footer is raw.
    pub fn open(paths: &[&Path]) -> Self {
        let parent = (paths.len() > 1).then(|| Box::new(Self::open(&paths[1..])));
        Self::new(std::fs::read(paths[0]).unwrap(), parent)
    }

    /// Reads an image in memory. The footer at the end decides, then the one of 511 bytes, then the copy.
    pub fn new(bytes: Vec<u8>, parent: Option<Box<Reference>>) -> Self {
        let n = bytes.len();
        let places = [n.wrapping_sub(512), n.wrapping_sub(511), 0];
        let is_footer = |at: &usize| bytes.get(*at..at.wrapping_add(8)).is_some_and(|c| c == b"conectix");
        let Some(foot) = places.into_iter().find(is_footer) else {
            return Self { size: n as u64, bytes, kind: 0, table: 0, block: 0, parent: None };
        };
        let (kind, size) = (u32_at(&bytes, foot + 60), u64_at(&bytes, foot + 48));
        let head = u64_at(&bytes, foot + 16);
        let (mut table, mut block) = (0, 0);
        if kind != 2 {
            let head = head as usize;
            (table, block) = (u64_at(&bytes, head + 16), u64::from(u32_at(&bytes, head + 32)));
        }
        Self { bytes, kind, size, table, block, parent }
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    fn sector(&self, at: u64) -> Option<[u8; 512]> {
        if at >= self.size {
            return Some([0; 512]);
        }
        if self.kind == 2 || self.kind == 0 {
            let mut sector = [0; 512];
            let end = (at as usize + 512).min(self.bytes.len());
            sector[..end - at as usize].copy_from_slice(&self.bytes[at as usize..end]);
            return Some(sector);
        }
        let entry = u32_at(&self.bytes, (self.table + at / self.block * 4) as usize);
        let bitmap = ((self.block / 512).div_ceil(8)).div_ceil(512) * 512;
        let (place, n) = (u64::from(entry) * 512, at % self.block / 512);
        let is_set = entry != u32::MAX && self.bytes[(place + n / 8) as usize] & (0x80 >> (n % 8)) != 0;
        let from = (place + bitmap + n * 512) as usize;
        match (is_set, &self.parent) {
            (true, _) => Some(self.bytes[from..from + 512].try_into().unwrap()),
            (false, Some(parent)) => parent.sector(at),
            (false, None) => Some([0; 512]),
        }
    }

    /// Everything that the disk shows.
    pub fn read(&self) -> Vec<u8> {
        (0..self.size.div_ceil(512)).flat_map(|n| self.sector(n * 512).unwrap()).collect()
    }
}
