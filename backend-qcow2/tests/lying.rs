//! Images that lie: refused with a reason, or read as what they are; never a panic, never unbounded memory or
//! time.

mod judge;

use std::path::Path;

use backend_qcow2::image::{ActiveWriter, ErrorKind, GuestCluster, Image, InPlace, NewSnapshot, OpenOptions};
use judge::{Bench, io, run, text};

/// An image with two snapshots and its bytes.
fn honest(bench: &Bench, options: &str) -> (std::path::PathBuf, Vec<u8>) {
    let path = bench.qemu_image("honest.qcow2", options, "4M");
    io(&path, &["write -P 1 0 600k", "write -c -P 2 1M 64k"]);
    run("qemu-img", &["snapshot", "-c", "one", text(&path)]);
    io(&path, &["write -P 3 100k 600k"]);
    run("qemu-img", &["snapshot", "-c", "two", text(&path)]);
    io(&path, &["write -P 4 300k 600k"]);
    let bytes = std::fs::read(&path).unwrap();
    (path, bytes)
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

/// Everything that the engine does, on one image after the other; what it says.
fn everything(path: &Path, bytes: &[u8]) -> Vec<Result<(), backend_qcow2::image::Error>> {
    type Step = fn(&mut Image) -> Result<(), backend_qcow2::image::Error>;
    let steps: [Step; 11] = [
        |i| i.snapshots().map(|_| ()),
        |i| i.check().map(|_| ()),
        |i| i.sizes()?.freed_by_deleting(&["one", "two"], false).map(|_| ()),
        |i| i.sizes()?.referenced("one").map(|_| ()),
        |i| i.snapshot_matches_active("one").map(|_| ()),
        |i| i.create_snapshot(&NewSnapshot::new("three", 1, 0)),
        |i| i.apply_snapshot("one"),
        |i| i.delete_snapshots(&["one", "two"]).map(|_| ()),
        |i| i.repair().map(|_| ()),
        |i| i.set_virtual_size(3 << 20),
        |i| {
            let mut w = ActiveWriter::new(i, InPlace::Allowed)?;
            let size = w.image().geometry().cluster_bits.bytes();
            w.write_data(GuestCluster(30), &vec![9; 4 * size])?;
            w.finish()
        },
    ];
    steps
        .iter()
        .map(|step| {
            std::fs::write(path, bytes).unwrap();
            Image::open(path, &OpenOptions::read_write()).and_then(|mut i| step(&mut i))
        })
        .collect()
}

/// Tables that overlap are refused before any write.
#[test]
fn overlapping_tables_are_refused_before_any_write() {
    let bench = Bench::new();
    let (path, bytes) = honest(&bench, "cluster_size=4k");
    let (l1, reftable, snapshots) = (be64(&bytes, 40), be64(&bytes, 48), be64(&bytes, 64));
    let first_block = be64(&bytes, reftable as usize);
    let first_l2 = be64(&bytes, l1 as usize) & 0x00ff_ffff_ffff_fe00;
    type Lie = (&'static str, usize, u64);
    let lies: [Lie; 7] = [
        ("L1 table in the refcount table", 40, reftable),
        ("L1 table in the snapshot table", 40, snapshots),
        ("refcount table in a refcount block", 48, first_block),
        ("snapshot table in the L1 table", 64, l1),
        ("refcount block in the L1 table", reftable as usize, l1),
        ("L2 table in the snapshot table", l1 as usize, snapshots),
        ("L2 table twice", l1 as usize + 8, first_l2),
    ];
    for (what, at, value) in lies {
        let mut lying = bytes.clone();
        put64(&mut lying, at, value);
        std::fs::write(&path, &lying).unwrap();
        let mut image = Image::open(&path, &OpenOptions::read_write()).unwrap();
        let e = image.create_snapshot(&NewSnapshot::new("three", 1, 0)).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Corrupt, "{what}: {e}");
        drop(image);
        assert!(std::fs::read(&path).unwrap() == lying, "{what}: something was written");
    }
}

#[test]
fn refcounts_that_lie_never_hand_out_metadata() {
    let bench = Bench::new();
    let (path, mut bytes) = honest(&bench, "cluster_size=4k");
    // All is free, says the first refcount block.
    let block = be64(&bytes, be64(&bytes, 48) as usize) as usize;
    bytes[block..block + 4096].fill(0);
    let said = everything(&path, &bytes);
    // Cutting the disk's end off where nothing is takes no cluster; all else does.
    for (n, said) in said.iter().enumerate().skip(5).filter(|(n, _)| *n != 9) {
        assert_eq!(said.as_ref().unwrap_err().kind(), ErrorKind::Corrupt, "step {n}: {said:?}");
    }
}

#[test]
fn entries_that_point_nowhere_are_refused() {
    let bench = Bench::new();
    let (path, bytes) = honest(&bench, "cluster_size=4k");
    let (l1, snapshots) = (be64(&bytes, 40) as usize, be64(&bytes, 64) as usize);
    let l2 = (be64(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    for (what, at, value) in [
        ("L1 entry past the end", l1, 1u64 << 50),
        ("L1 entry unaligned", l1, 0x200),
        ("L2 entry past the end", l2, 1 << 55),
        ("L2 entry unaligned", l2, 0x5200),
        ("compressed entry past the end", l2, 1 << 62 | 1 << 48),
        ("compressed entry of lies", l2, u64::MAX >> 1),
        ("snapshot's L1 past the end", snapshots, 1 << 60),
        ("snapshot's L1 unaligned", snapshots, 0x1001),
        ("snapshot with a huge L1", snapshots + 8, u64::MAX),
        ("snapshot with huge extra data", snapshots + 32, 0xffff_ffff),
        ("snapshot of a huge disk", snapshots + 48, 1 << 63),
    ] {
        let mut lying = bytes.clone();
        put64(&mut lying, at, value);
        let said = everything(&path, &lying);
        assert!(
            said.iter().any(|s| s.as_ref().is_err_and(|e| e.kind() == ErrorKind::Corrupt)),
            "{what}: {said:?}"
        );
    }
}

/// Any bytes in the metadata do no harm to the program.
#[test]
fn any_metadata_does_no_harm_to_the_program() {
    let bench = Bench::new();
    for options in [
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=16k,extended_l2=on",
        "cluster_size=4k,compat=0.10",
    ] {
        let (path, bytes) = honest(&bench, options);
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        let l1 = be64(&bytes, 40);
        let places =
            [0, be64(&bytes, 48), be64(&bytes, 64), l1, be64(&bytes, l1 as usize) & 0x00ff_ffff_ffff_fe00];
        for round in 0..25 {
            let mut lying = bytes.clone();
            for _ in 0..=random(4) {
                let near = if round % 3 == 0 { 104 } else { 512 };
                let at = (places[random(places.len() as u64) as usize] + random(near)) as usize % lying.len();
                lying[at] = match random(4) {
                    0 => 0,
                    1 => 0xff,
                    2 => lying[at] ^ (1 << random(8)),
                    _ => random(256) as u8,
                };
            }
            everything(&path, &lying);
        }
        // Cut short anywhere.
        for _ in 0..6 {
            everything(&path, &bytes[..random(bytes.len() as u64) as usize]);
        }
        std::fs::remove_file(&path).unwrap();
    }
}
