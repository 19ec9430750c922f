//! Makes VHD files of any shape, right or wrong, from the published format alone.

use std::collections::BTreeMap;
use std::path::Path;

pub const MIB: u64 = 1 << 20;
const NONE: u32 = u32::MAX;

/// What is at the end of the file.
#[derive(Clone, Copy, PartialEq)]
pub enum Trailing {
    Footer,
    Short,
    Nothing,
    Tapdisk,
    FooterAndZeros,
}

/// One image to be made. Every field may be changed.
#[derive(Clone)]
pub struct Maker {
    pub size: u64,
    pub original: u64,
    pub kind: u32,
    pub block: u64,
    pub id: [u8; 16],
    pub creator: [u8; 4],
    pub creator_version: u32,
    pub geometry: Option<(u16, u8, u8)>,
    pub parent_id: [u8; 16],
    pub parent_name: String,
    /// Code, text, data space field.
    pub locators: Vec<([u8; 4], Vec<u8>, u32)>,
    pub table_at: u64,
    pub entries: Option<u32>,
    pub padding: u8,
    pub align: u64,
    pub batmap: bool,
    pub trailing: Trailing,
    pub copy: bool,
    pub data: BTreeMap<u64, Vec<u8>>,
    pub bits: BTreeMap<u64, Vec<u8>>,
    pub bat: BTreeMap<u64, u32>,
    pub batmap_lies: Vec<u64>,
    /// Changes the header's bytes before their checksum is computed.
    pub header: fn(&mut [u8]),
    /// Changes the finished file.
    pub mangle: fn(&mut Vec<u8>),
}

fn up(n: u64, to: u64) -> u64 {
    n.div_ceil(to) * to
}

fn put(bytes: &mut [u8], at: usize, field: &[u8]) {
    bytes[at..at + field.len()].copy_from_slice(field);
}

fn seal(bytes: &mut [u8], at: usize) {
    put(bytes, at, &[0; 4]);
    let sum = bytes.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
    put(bytes, at, &(!sum).to_be_bytes());
}

/// UTF-16 little-endian, as in locators for Windows.
pub fn relative(text: &str) -> Vec<u8> {
    text.encode_utf16().flat_map(u16::to_le_bytes).collect()
}

/// The 512 bytes of a footer.
pub fn footer(maker: &Maker) -> Vec<u8> {
    let mut b = vec![0; 512];
    put(&mut b, 0, b"conectix");
    put(&mut b, 8, &2u32.to_be_bytes());
    put(&mut b, 12, &0x0001_0000u32.to_be_bytes());
    put(&mut b, 16, &if maker.kind == 2 { u64::MAX } else { 512 }.to_be_bytes());
    put(&mut b, 24, &600_000_000u32.to_be_bytes());
    put(&mut b, 28, &maker.creator);
    put(&mut b, 32, &maker.creator_version.to_be_bytes());
    put(&mut b, 36, b"Wi2k");
    put(&mut b, 40, &maker.original.to_be_bytes());
    put(&mut b, 48, &maker.size.to_be_bytes());
    let (c, h, s) = maker.geometry.unwrap_or((65535, 16, 255));
    put(&mut b, 56, &c.to_be_bytes());
    (b[58], b[59]) = (h, s);
    put(&mut b, 60, &maker.kind.to_be_bytes());
    put(&mut b, 68, &maker.id);
    seal(&mut b, 64);
    b
}

impl Maker {
    pub fn new(kind: u32, size: u64) -> Self {
        Self {
            size,
            original: size,
            kind,
            block: 2 * MIB,
            id: [kind as u8; 16],
            creator: *b"win ",
            creator_version: 0x0006_0003,
            geometry: None,
            parent_id: [0; 16],
            parent_name: String::new(),
            locators: Vec::new(),
            table_at: 1536,
            entries: None,
            padding: 0,
            align: 512,
            batmap: false,
            trailing: Trailing::Footer,
            copy: true,
            data: BTreeMap::new(),
            bits: BTreeMap::new(),
            bat: BTreeMap::new(),
            batmap_lies: Vec::new(),
            header: |_| {},
            mangle: |_| {},
        }
    }

    /// A child with the locators that Hyper-V writes.
    pub fn child(parent: &Maker, name: &str) -> Self {
        let mut child = Self::new(4, parent.size);
        child.id = parent.id;
        child.id[0] = child.id[0].wrapping_add(1);
        child.block = parent.block;
        child.parent_id = parent.id;
        child.parent_name = name.to_owned();
        child.locators = vec![
            (*b"W2ku", relative(&format!("C:\\vm\\{name}")), 512),
            (*b"W2ru", relative(&format!(".\\{name}")), 512),
        ];
        child
    }

    pub fn bitmap_bytes(&self) -> u64 {
        up((self.block / 512).div_ceil(8), 512)
    }

    /// Data at an offset of the disk, whole sectors; their bits are set.
    pub fn put(mut self, at: u64, data: &[u8]) -> Self {
        let mut done = 0;
        while done < data.len() as u64 {
            let (block, within) = ((at + done) / self.block, (at + done) % self.block);
            let n = (data.len() as u64 - done).min(self.block - within);
            self = self.under(at + done, &data[done as usize..(done + n) as usize]);
            let bits = self.bits.get_mut(&block).unwrap();
            for sector in within / 512..(within + n) / 512 {
                bits[(sector / 8) as usize] |= 0x80 >> (sector % 8);
            }
            done += n;
        }
        self
    }

    /// Data of one block whose bits are not set.
    pub fn under(mut self, at: u64, data: &[u8]) -> Self {
        let (block, within) = (at / self.block, at % self.block);
        let (size, bits) = (self.block as usize, self.bitmap_bytes() as usize);
        put(self.data.entry(block).or_insert_with(|| vec![0; size]), within as usize, data);
        self.bits.entry(block).or_insert_with(|| vec![0; bits]);
        self
    }

    fn header_bytes(&self, entries: u32, places: &[u64]) -> Vec<u8> {
        let mut h = vec![0; 1024];
        put(&mut h, 0, b"cxsparse");
        put(&mut h, 8, &u64::MAX.to_be_bytes());
        put(&mut h, 16, &self.table_at.to_be_bytes());
        put(&mut h, 24, &0x0001_0000u32.to_be_bytes());
        put(&mut h, 28, &entries.to_be_bytes());
        put(&mut h, 32, &(self.block as u32).to_be_bytes());
        put(&mut h, 40, &self.parent_id);
        let name: Vec<u8> = self.parent_name.encode_utf16().flat_map(u16::to_be_bytes).collect();
        put(&mut h, 64, &name);
        for (number, (code, text, space)) in self.locators.iter().enumerate() {
            let at = 576 + 24 * number;
            put(&mut h, at, code);
            put(&mut h, at + 4, &space.to_be_bytes());
            put(&mut h, at + 8, &(text.len() as u32).to_be_bytes());
            put(&mut h, at + 16, &places[number].to_be_bytes());
        }
        seal(&mut h, 36);
        (self.header)(&mut h);
        h
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> Vec<u8> {
        let foot = footer(self);
        let mut file = Vec::new();
        if self.kind == 2 {
            file.resize(self.size as usize, 0);
            for (block, data) in &self.data {
                let at = (block * self.block) as usize;
                let n = data.len().min(file.len() - at);
                put(&mut file, at, &data[..n]);
            }
            self.trail(&mut file, &foot);
            (self.mangle)(&mut file);
            return file;
        }
        let entries = self.entries.unwrap_or(self.size.div_ceil(self.block) as u32);
        let mut at = self.table_at + up(u64::from(entries) * 4, 512);
        let batmap_at = at;
        if self.batmap {
            at += 512 + up(u64::from(entries).div_ceil(8), 512);
        }
        let mut places = Vec::new();
        for (_, text, _) in &self.locators {
            places.push(at);
            at += up(text.len() as u64, 512);
        }
        let mut table = vec![NONE; entries as usize];
        let mut blocks = Vec::new();
        for (block, data) in &self.data {
            at = up(at + self.bitmap_bytes(), self.align) - self.bitmap_bytes();
            table[*block as usize] = (at / 512) as u32;
            blocks.push((at, [self.bits[block].as_slice(), data].concat()));
            at += self.bitmap_bytes() + self.block;
        }
        for (block, sector) in &self.bat {
            table[*block as usize] = *sector;
        }
        file.resize(at as usize, 0);
        if self.copy {
            put(&mut file, 0, &foot);
        }
        put(&mut file, 512, &self.header_bytes(entries, &places));
        let mut bat: Vec<u8> = table.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        bat.resize(up(bat.len() as u64, 512) as usize, self.padding);
        put(&mut file, self.table_at as usize, &bat);
        for ((_, text, _), place) in self.locators.iter().zip(&places) {
            put(&mut file, *place as usize, text);
        }
        if self.batmap {
            self.put_batmap(&mut file, batmap_at, entries);
        }
        for (place, data) in &blocks {
            put(&mut file, *place as usize, data);
        }
        self.trail(&mut file, &foot);
        (self.mangle)(&mut file);
        file
    }

    fn put_batmap(&self, file: &mut [u8], at: u64, entries: u32) {
        let mut map = vec![0u8; up(u64::from(entries).div_ceil(8), 512) as usize];
        let used = (self.block / 4096) as usize;
        let full = |block: &u64| self.bits[block][..used].iter().all(|byte| *byte == 0xFF);
        for block in self.data.keys().filter(|block| full(block)).chain(&self.batmap_lies) {
            map[(block / 8) as usize] |= 0x80 >> (block % 8);
        }
        let sum = map.iter().fold(0u32, |sum, byte| sum.wrapping_add(u32::from(*byte)));
        let mut head = vec![0; 512];
        put(&mut head, 0, b"tdbatmap");
        put(&mut head, 8, &(at + 512).to_be_bytes());
        put(&mut head, 16, &((map.len() / 512) as u32).to_be_bytes());
        put(&mut head, 20, &0x0001_0002u32.to_be_bytes());
        put(&mut head, 24, &(!sum).to_be_bytes());
        put(file, at as usize, &head);
        put(file, at as usize + 512, &map);
    }

    fn trail(&self, file: &mut Vec<u8>, foot: &[u8]) {
        match self.trailing {
            Trailing::Footer => file.extend_from_slice(foot),
            Trailing::Short => file.extend_from_slice(&foot[..511]),
            Trailing::Nothing => {}
            Trailing::Tapdisk => file.extend_from_slice(&[0xC7; 512]),
            Trailing::FooterAndZeros => {
                file.extend_from_slice(foot);
                file.extend_from_slice(&[0; 512]);
            }
        }
    }

    pub fn write(&self, path: &Path) {
        std::fs::write(path, self.bytes()).unwrap();
    }
}
