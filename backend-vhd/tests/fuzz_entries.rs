//! Each fuzz entry over images of many shapes, and over them with bytes changed, without a fuzzer.

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

/// Every fuzz entry accepts its seeds, and what they turn into.
#[test]
fn fuzz_entries_accept_seeds_and_mutations() {
    let seeds = seeds();
    if let Some(directory) = std::env::var_os("SEEDS") {
        std::fs::create_dir_all(&directory).unwrap();
        for (number, seed) in seeds.iter().enumerate() {
            std::fs::write(std::path::Path::new(&directory).join(number.to_string()), seed).unwrap();
        }
    }
    let mut dice = Dice::new(2);
    for (name, entry) in entries::ENTRIES {
        // Those of one structure take the first bytes of a seed.
        let mutations = if matches!(name, "image" | "resealed") { 200 } else { 40 };
        for seed in &seeds {
            entry(seed);
            for _ in 0..mutations {
                let mut bytes = seed.clone();
                for _ in 0..1 + dice.below(4) {
                    // Metadata is at the start and at the end.
                    let at = match dice.below(4) {
                        0 => bytes.len() - 1 - dice.below(512) as usize,
                        _ => dice.below(6144.min(bytes.len() as u64)) as usize,
                    };
                    bytes[at] = match dice.below(3) {
                        0 => 0xFF,
                        1 => 0,
                        _ => dice.next() as u8,
                    };
                }
                if dice.below(8) == 0 {
                    bytes.truncate(dice.below(bytes.len() as u64) as usize);
                }
                entry(&bytes);
            }
        }
    }
}
