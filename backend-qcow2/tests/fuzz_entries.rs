//! Each fuzz entry over its seeds, and over the seeds with bytes changed, without a fuzzer.

#[path = "../fuzz/entries.rs"]
mod entries;

use std::process::Command;

/// Every fuzz entry accepts its seeds, and what they turn into.
#[test]
fn fuzz_entries_accept_their_seeds_and_mutations() {
    let dir = tempfile::tempdir().unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz/make-seeds");
    let out = Command::new("python3").arg(script).arg(dir.path()).output().expect("this test needs python3");
    assert!(out.status.success(), "make-seeds: {}", String::from_utf8_lossy(&out.stderr));
    let mut random = 0x2545_f491_4f6c_dd1du64;
    for (name, entry) in entries::ENTRIES {
        let seeds =
            std::fs::read_dir(dir.path().join(name)).unwrap_or_else(|e| panic!("no seeds for {name}: {e}"));
        let mut count = 0;
        for seed in seeds {
            let bytes = std::fs::read(seed.unwrap().path()).unwrap();
            entry(&bytes);
            count += 1;
            for _ in 0..200 {
                let mut bytes = bytes.clone();
                for _ in 0..4 {
                    random ^= random << 13;
                    random ^= random >> 7;
                    random ^= random << 17;
                    let at = random as usize % bytes.len().clamp(1, 512);
                    bytes[at] = (random >> 32) as u8;
                }
                bytes.truncate(bytes.len() - (random >> 40) as usize % bytes.len().min(8));
                entry(&bytes);
            }
        }
        assert!(count >= 5, "{name} has {count} seeds");
    }
}
