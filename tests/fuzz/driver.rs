//! Runs fuzz entries over changed inputs, without a fuzzer and always in the same order.
//!
//! | variable | meaning |
//! |---|---|
//! | `DOMSNAP_FUZZ_SECONDS` | how long each entry runs, in place of a number of inputs |
//! | `DOMSNAP_FUZZ_SEED` | which inputs: a number (1) |
//! | `DOMSNAP_FUZZ_TARGET` | the only entry that runs |
//! | `DOMSNAP_FUZZ_INPUT` | a file: the only input of that entry, for one that was found |
//!
//! The input that is being tried is in a file, so that it is known after an abort, an exhausted memory or a
//! hang too. That file stays if the entry does not return.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The longest time that one input may take, on a machine with much else to do.
const LONGEST: Duration = Duration::from_secs(20);
/// The most bytes of an input.
const MOST: usize = 256 << 10;

/// Numbers at which lengths, offsets and signs change.
const EDGES: [u64; 14] = [
    0,
    1,
    2,
    0x1ff,
    0x200,
    0xfff,
    0x1000,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    u32::MAX as u64,
    i64::MAX as u64,
    u64::MAX,
];

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// Runs `entry` on each seed and on what it turns into: `inputs` of them, or for the time that is asked for.
pub fn run(name: &str, entry: fn(&[u8]), seeds: &[Vec<u8>], inputs: u64) {
    if variable("DOMSNAP_FUZZ_TARGET").is_some_and(|only| only != name) {
        return;
    }
    if let Some(file) = variable("DOMSNAP_FUZZ_INPUT") {
        return entry(&std::fs::read(&file).unwrap_or_else(|error| panic!("{file}: {error}")));
    }
    let seconds = variable("DOMSNAP_FUZZ_SECONDS").map(|text| text.parse().expect("a number of seconds"));
    let seed = variable("DOMSNAP_FUZZ_SEED").map_or(1, |text| text.parse().expect("a number"));
    let kept = Kept::new(name);
    let mut dice = Dice::new(seed);
    let begun = Instant::now();
    let goes_on = |done: u64| match seconds {
        Some(seconds) => begun.elapsed() < Duration::from_secs(seconds),
        None => done < inputs,
    };
    seeds.iter().for_each(|seed| kept.tried(entry, seed));
    let mut done = 0;
    while goes_on(done) {
        let input = dice.changed(seeds);
        kept.tried(entry, &input);
        done += 1;
    }
    if seconds.is_some() {
        println!("{name}: {done} inputs in {:.0} s, none found", begun.elapsed().as_secs_f64());
    }
    std::fs::remove_file(&kept.path).expect("the file of the input");
}

/// The file of the input that is being tried.
struct Kept {
    file: std::fs::File,
    path: PathBuf,
}

impl Kept {
    fn new(name: &str) -> Self {
        let shared = Path::new("/dev/shm");
        let place = if shared.is_dir() { shared.to_owned() } else { std::env::temp_dir() };
        let path = place.join(format!("domsnap-fuzz-{name}-{}", std::process::id()));
        let file = std::fs::File::create(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { file, path }
    }

    fn tried(&self, entry: fn(&[u8]), input: &[u8]) {
        self.file.set_len(input.len() as u64).expect("the file of the input");
        self.file.write_all_at(input, 0).expect("the file of the input");
        let begun = Instant::now();
        let outcome = std::panic::catch_unwind(|| entry(input));
        if let Err(panic) = outcome {
            eprintln!("found: the input is in {}", self.path.display());
            std::panic::resume_unwind(panic);
        }
        let took = begun.elapsed();
        assert!(took < LONGEST, "an input took {took:?}: it is in {}", self.path.display());
    }
}

/// A small random generator, and changes to inputs.
struct Dice(u64);

impl Dice {
    fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() >> 11) as usize % end.max(1)
    }

    /// A place in `length` bytes. Structures are at the start and at the end more often than between.
    fn place(&mut self, length: usize) -> usize {
        match self.below(8) {
            0 => length.saturating_sub(1 + self.below(512.min(length))),
            1 => self.below(length),
            2 => self.below(length.min(64)),
            _ => self.below(length.min(6144)),
        }
    }

    fn changed(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut bytes = seeds.get(self.below(seeds.len())).cloned().unwrap_or_default();
        for _ in 0..=self.below(6) {
            self.change(&mut bytes, seeds);
        }
        bytes.truncate(MOST);
        bytes
    }

    /// One change.
    fn change(&mut self, bytes: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        if bytes.is_empty() {
            bytes.push(self.next() as u8);
        }
        let at = self.place(bytes.len());
        match self.below(10) {
            0 => bytes[at] ^= 1 << self.below(8),
            1 => bytes[at] = self.next() as u8,
            // A number of 2, 4 or 8 bytes: an edge, or near one.
            2..=4 => {
                let width = 2 << self.below(3);
                let near = [0, 1, u64::MAX][self.below(3)];
                let number = EDGES[self.below(EDGES.len())].wrapping_add(near).to_be_bytes();
                // Fields are aligned more often than not.
                let at = if self.below(4) == 0 { at } else { at / width * width };
                let end = (at + width).min(bytes.len());
                let width = end - at;
                bytes[at..end].copy_from_slice(&number[8 - width..]);
            }
            // A number that is a little different.
            5 => {
                let at = at / 4 * 4;
                if let Some(field) = bytes.get_mut(at..at + 4) {
                    let number = u32::from_be_bytes(field.try_into().expect("four bytes"));
                    let by = [1, 8, 16, 17, 4096][self.below(5)];
                    let number =
                        if self.below(2) == 0 { number.wrapping_add(by) } else { number.wrapping_sub(by) };
                    field.copy_from_slice(&number.to_be_bytes());
                }
            }
            // A piece of an input, copied to another place of this one.
            6 => {
                let from = seeds.get(self.below(seeds.len())).cloned().unwrap_or_default();
                let (start, length) = (self.place(from.len()), 1 + self.below(64));
                let piece = from.get(start..).unwrap_or_default();
                let length = length.min(piece.len()).min(bytes.len() - at);
                bytes[at..at + length].copy_from_slice(&piece[..length]);
            }
            7 => {
                let end = (at + 1 + self.below(32)).min(bytes.len());
                bytes[at..end].fill([0, 0xff, 0x80][self.below(3)]);
            }
            8 => {
                let length = 1 + self.below(16);
                let more: Vec<u8> = (0..length).map(|_| self.next() as u8).collect();
                bytes.splice(at..at, more);
            }
            _ => match self.below(3) {
                0 => bytes.truncate(at),
                _ => drop(bytes.drain(at..(at + 1 + self.below(16)).min(bytes.len()))),
            },
        }
    }
}
