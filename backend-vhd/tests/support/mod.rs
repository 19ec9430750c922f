//! Test support: images of any shape, and readers to compare the engine with. Nothing here uses the engine.

#![allow(dead_code, unused_imports, reason = "each test uses a part")]

mod judge;
mod make;
mod reference;

pub use judge::{qemu_reads, seven_zip_reads};
pub use make::{MIB, Maker, Trailing, footer, relative};
pub use reference::Reference;

/// A small random generator that gives the same numbers every time.
pub struct Dice(u64);

impl Dice {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, end: u64) -> u64 {
        (self.next() >> 11) % end.max(1)
    }

    /// Bytes that are not zeros.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| (self.next() >> 24) as u8 | 1).collect()
    }
}
