//! Each fuzz entry over images of many shapes, and over them with bytes changed, without a fuzzer.

#[path = "../../tests/fuzz/driver.rs"]
mod driver;
#[path = "../fuzz/entries.rs"]
mod entries;
mod support;

use support::{Dice, Maker, Trailing, relative};

fn seeds() -> Vec<Vec<u8>> {
    let mut dice = Dice::new(1);
    let base = Maker { block: 4096, ..Maker::new(3, 64 << 10) }
        .put(0, &dice.bytes(4096))
        .put(20480, &dice.bytes(512));
    let mut child =
        Maker::child(&base, "base.vhd").put(512, &dice.bytes(1024)).put(60 << 10, &dice.bytes(512));
    child.locators.push((*b"MacX", b"file:///a%20b.vhd".to_vec(), 1));
    let ours = Maker { creator: *b"dsnp", table_at: 4096, align: 4096, padding: 0xFF, ..base.clone() };
    vec![
        base.bytes(),
        child.bytes(),
        ours.bytes(),
        Maker { batmap: true, creator: *b"tap\0", creator_version: 0x0001_0003, ..base.clone() }.bytes(),
        Maker { trailing: Trailing::Short, ..base.clone() }.bytes(),
        Maker { trailing: Trailing::Tapdisk, ..base.clone() }.bytes(),
        Maker { locators: vec![(*b"W2ru", relative(".\\x.vhd"), 513)], ..child.clone() }.bytes(),
        Maker { kind: 2, ..Maker::new(2, 16 << 10) }.bytes(),
    ]
}

/// Changes of the three images of a chain, and notes of a server: what entries take that do not take a file.
fn changes() -> Vec<Vec<u8>> {
    let mut dice = Dice::new(3);
    let mut seeds = vec![vec![0], vec![1], vec![2]];
    for first in 0..12 {
        // Places of the BAT and of the bitmaps behind it, of the header, and of the footer at the end.
        let mut seed = vec![first * 17];
        for _ in 0..6 {
            let (file, place) = (dice.below(3) as u8, dice.below(2048) as u16);
            seed.extend([file | (dice.below(4) as u8) << 6]);
            seed.extend(place.to_be_bytes());
            seed.push(dice.next() as u8);
        }
        seeds.push(seed);
    }
    for (block, entry) in [(1u16, 80u16), (2, 90), (0, 4), (15, 60), (5, u16::MAX)] {
        let note = [block, entry, 3, 5].map(u16::to_be_bytes).concat();
        seeds.push([&[block as u8][..], &note, &note].concat());
    }
    seeds
}

/// Every fuzz entry accepts its seeds, and what they turn into.
#[test]
fn fuzz_entries_accept_seeds_and_mutations() {
    let (seeds, changes) = (seeds(), changes());
    if let Some(directory) = std::env::var_os("SEEDS") {
        std::fs::create_dir_all(&directory).unwrap();
        for (number, seed) in seeds.iter().chain(&changes).enumerate() {
            std::fs::write(std::path::Path::new(&directory).join(number.to_string()), seed).unwrap();
        }
    }
    for (name, entry) in entries::ENTRIES {
        match name {
            "image" | "resealed" => driver::run(name, entry, &seeds, 1500),
            "chain" | "merged" | "changed" | "notes" => driver::run(name, entry, &changes, 800),
            // Those of one structure take the first bytes of a file.
            _ => driver::run(name, entry, &seeds, 350),
        }
    }
}
