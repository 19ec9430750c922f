//! Failed calls and damaged images.
//!
//! A call that fails once leaves the image clean, and in the state before or after the operation. An
//! operation on an image with damaged metadata ends without a panic. If it reports that nothing was changed,
//! no byte differs.

use super::crash_tests::{KINDS, Seeded, base, open, overlay, state};
use super::error::{ErrorKind, Result};
use super::header::Backing;
use super::merge::merge;
use super::open::Image;
use super::recorder::Recorder;
use super::snapshot::NewSnapshot;
use super::transfer::Moving;
use super::view::RunLayer;

type Operation = (&'static str, fn(&mut Image) -> Result<()>);

const OPERATIONS: [Operation; 9] = [
    ("create", |image| image.create_snapshot(&NewSnapshot::new("new", 9, 9))),
    ("apply", |image| image.apply_snapshot("one")),
    ("delete one", |image| image.delete_snapshots(&["two"]).map(|_| ())),
    ("delete all", |image| image.delete_snapshots(&["three", "two", "one"]).map(|_| ())),
    ("forget", |image| image.forget_snapshots(&["two"]).map(|_| ())),
    ("repair", |image| image.repair().map(|_| ())),
    ("grow", |image| image.set_virtual_size(image.virtual_size() * 300)),
    ("shrink", |image| image.set_virtual_size(image.virtual_size() / 8)),
    ("set the backing file", |image| {
        let backing = Backing { file: "another.qcow2".to_owned(), format: Some("qcow2".to_owned()) };
        image.set_backing(Some(backing))
    }),
];

#[test]
fn a_call_that_fails_once_leaves_the_image_clean() {
    for kind in &KINDS {
        let base = base(kind);
        let before = state(&open(&base, false).1);
        for (name, operation) in &OPERATIONS[..4] {
            let (done, mut image) = open(&base, true);
            operation(&mut image).unwrap();
            let after = state(&open(&done.bytes(), false).1);
            for calls in 0.. {
                let (recorder, mut image) = open(&base, true);
                recorder.fail_after(calls);
                let outcome = operation(&mut image);
                if !recorder.has_failed() {
                    assert!(calls > 3, "{name}: it wrote nothing");
                    break;
                }
                let left = open(&recorder.bytes(), false).1;
                let report = left.check().unwrap();
                assert!(report.is_clean(), "{name}, call {calls} failed: {report:?}");
                let now = state(&left);
                match outcome {
                    Ok(()) => assert!(now == after, "{name}, call {calls}: done, and it is not"),
                    Err(error) => {
                        assert!(now == before, "{name}, call {calls}: {error}: it is not as before");
                        assert!(!error.is_half_done(), "{name}, call {calls}: {error}");
                    }
                }
            }
        }
    }
}

/// Places of the metadata of an image, which the mutations change.
fn metadata(bytes: &[u8]) -> Vec<std::ops::Range<usize>> {
    let image = open(bytes, false).1;
    let header = image.header();
    let cluster = header.cluster_bits.bytes();
    let at = |offset: u64, length: usize| offset as usize..(offset as usize + length).min(bytes.len());
    let mut places = vec![
        0..112,
        at(header.l1_offset.0, header.l1_entries as usize * 8),
        at(header.reftable_offset.0, 64),
        at(header.snapshots_offset.0, 240),
    ];
    let table = header.reftable_offset.0 as usize;
    for entry in bytes[table..table + cluster].as_chunks::<8>().0 {
        let block = u64::from_be_bytes(*entry);
        if block != 0 {
            places.push(at(block, cluster));
        }
    }
    let mut tables = vec![image.active_l1().unwrap().clone()];
    for snapshot in image.snapshots().unwrap() {
        places.push(at(snapshot.l1_offset.0, snapshot.l1_entries as usize * 8));
        tables.push(image.snapshot_l1(snapshot).unwrap());
    }
    for l1 in tables {
        for index in 0..l1.len() {
            places.extend(l1.l2_offset(index).map(|offset| at(offset.0, cluster)));
        }
    }
    places
}

/// Changes one to three words of metadata.
fn damage(bytes: &mut [u8], places: &[std::ops::Range<usize>], random: &mut Seeded) {
    for _ in 0..=random.next() % 3 {
        let place = places[random.next() as usize % places.len()].clone();
        let at = place.start + random.next() as usize % place.len().max(1);
        match random.next() % 4 {
            0 => bytes[at] ^= 1 << (random.next() % 8),
            1 => bytes[at] = 0xff,
            _ => {
                let at = (at & !7).min(bytes.len() - 8);
                let word = match random.next() % 5 {
                    0 => 0,
                    1 => u64::MAX,
                    2 => random.next() % bytes.len() as u64,
                    3 => 1 << 63 | (random.next() % bytes.len() as u64) & !0xfff,
                    _ => random.next(),
                };
                bytes[at..at + 8].copy_from_slice(&word.to_be_bytes());
            }
        }
    }
}

/// Number of outcomes of operations on damaged images.
#[derive(Debug, Default)]
struct Tally {
    refused: u64,
    half_done: u64,
}

impl Tally {
    /// Checks a failed operation by its message and by the bytes before and after it.
    fn judge(&mut self, error: &super::error::Error, before: &[u8], after: &[u8], what: &str) {
        let text = error.to_string();
        if error.is_half_done() {
            self.half_done += 1;
            assert!(!text.contains("no changes made"), "{what}: {text}");
        } else {
            self.refused += 1;
            let same = before == after;
            assert!(same || text.contains("rolled back"), "{what}: something was written before: {text}");
        }
    }
}

fn rounds() -> u64 {
    std::env::var("DAMAGE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(400)
}

fn dice(seed: u64, number: usize) -> Seeded {
    let mut random = Seeded((seed + 1u64).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ number as u64);
    let _ = (0..4).map(|_| random.next()).last();
    random
}

#[test]
fn a_refusal_of_a_damaged_image_changes_no_byte() {
    let mut tally = Tally::default();
    for (number, kind) in KINDS.iter().enumerate() {
        let whole = base(kind);
        let places = metadata(&whole);
        for seed in 0..rounds() {
            let mut bytes = whole.clone();
            damage(&mut bytes, &places, &mut dice(seed, number));
            for (name, operation) in &OPERATIONS {
                let recorder = Recorder::new(bytes.clone());
                let Ok(mut image) = Image::from_file(recorder.open(true)) else { continue };
                let Err(error) = operation(&mut image) else { continue };
                let what = format!("kind {number}, seed {seed}, {name}");
                tally.judge(&error, &bytes, &recorder.bytes(), &what);
            }
        }
    }
    println!("{tally:?}");
    assert!(tally.refused > rounds() / 4, "the mutations hit nothing");
    assert!(tally.half_done * 50 < tally.refused, "too many failures came after the first write: {tally:?}");
}

#[test]
fn a_refused_merge_of_damaged_layers_changes_no_byte() {
    let mut tally = Tally::default();
    let mut unpacked = 0;
    for (number, kind) in KINDS.iter().enumerate() {
        let whole = [base(kind), overlay(kind)];
        let places = [metadata(&whole[0]), metadata(&whole[1])];
        for seed in 0..rounds() {
            let mut random = dice(seed, number);
            let mut bytes = whole.clone();
            let hit = random.next() as usize % 2;
            damage(&mut bytes[hit], &places[hit], &mut random);
            // Into the lower layer, and into the upper one.
            for into in 0..2 {
                let recorder = Recorder::new(bytes[into].clone());
                let other = Recorder::new(bytes[1 - into].clone());
                let Ok(mut target) = Image::from_file(recorder.open(true)) else { continue };
                let Ok(source) = Image::from_file(other.open(false)) else { continue };
                let Ok(source) = RunLayer::active(&source) else { continue };
                let (under, over) = match into {
                    0 => (vec![], vec![source]),
                    _ => (vec![source], vec![]),
                };
                let Err(error) = merge(under, &mut target, over, None, &Moving::quietly()) else { continue };
                let what = format!("kind {number}, seed {seed}, {hit} damaged, into {into}");
                tally.judge(&error, &bytes[into], &recorder.bytes(), &what);
                assert!(other.bytes() == bytes[1 - into], "{what}: the other layer was written");
                // Damaged compressed data is found where it is decompressed, which is while data is moved.
                unpacked += u64::from(error.is_half_done() && error.to_string().contains("ompressed"));
                assert_ne!(error.kind(), ErrorKind::Io, "{what}: {error}");
            }
        }
    }
    println!("{tally:?}, {unpacked} of them met damaged data");
    assert!(tally.refused > rounds() / 4, "the mutations hit nothing");
    assert!((tally.half_done - unpacked) * 50 < tally.refused, "{tally:?}, {unpacked} met damaged data");
}
