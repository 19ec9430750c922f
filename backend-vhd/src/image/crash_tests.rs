//! Power loss at every write and every flush of every operation. Any sectors of what was not flushed may be
//! lost.
//!
//! After each crash the image must open, at least one footer must be valid, and every finding must be one
//! that a repair corrects. What the chain shows must be the old or the new state, by sectors. Repeating the
//! operation must complete it and leave nothing to report.

use image_files::engine::recorder::{Event, Recorder, crashed};

use super::chain::{Chain, Layer};
use super::finding::Severity;
use super::header::ParentName;
use super::merge::merge;
use super::open::Vhd;
use super::support::{Dice, Maker, Reference};
use super::transfer::Moving;
use super::units::{TimeStamp, UniqueId};

const BLOCK: u64 = 16 << 10;
const SIZE: u64 = 20 * BLOCK + 512;

/// An image as this engine lays it out, but for the size of its blocks.
fn maker(kind: u32, id: u8, size: u64) -> Maker {
    Maker {
        creator: *b"dsnp",
        creator_version: 0x0001_0000,
        block: BLOCK,
        table_at: 4096,
        align: 4096,
        padding: 0xFF,
        id: [id; 16],
        ..Maker::new(kind, size)
    }
}

/// A chain of images with random sectors, the bottom first. Parents are named, but never looked for.
fn chain(dice: &mut Dice, depth: u8, foreign: bool) -> Vec<Vec<u8>> {
    (0..depth)
        .map(|n| {
            let kind = if n == 0 { 3 } else { 4 };
            let size = SIZE + u64::from(n) * 1024;
            let mut image = maker(kind, n + 1, size);
            if foreign {
                (image.creator, image.table_at, image.align) = (*b"win ", 1536, 512);
            }
            if n > 0 {
                image.parent_id = [n; 16];
                image.parent_name = format!("{n}.vhd");
                let text = super::support::relative(&format!(".\\{n}.vhd"));
                image.locators = if foreign { vec![(*b"W2ru", text, 512)] } else { Vec::new() };
            }
            for _ in 0..4 + dice.below(6) {
                let at = dice.below(size / 512 - 9) * 512;
                let len = 512 * (1 + dice.below(8) as usize);
                image = image.put(at, &dice.bytes(len));
            }
            if kind == 3 {
                let full = image.bits.values_mut();
                full.for_each(|bits| bits[..(BLOCK / 4096) as usize].fill(0xFF));
            }
            image.bytes()
        })
        .collect()
}

fn image(recorder: &Recorder, writable: bool) -> Layer {
    Layer::Vhd(Box::new(Vhd::from_file(recorder.open(writable)).unwrap()))
}

/// The chain with the image `target` from a recorder.
fn open(layers: &[Vec<u8>], target: usize, recorder: &Recorder) -> Chain {
    let layers = layers.iter().enumerate().map(|(n, bytes)| match n == target {
        true => Layer::Vhd(Box::new(vhd(recorder, true).resume().unwrap())),
        false => image(&Recorder::new(bytes.clone()), false),
    });
    Chain::new(layers.collect()).unwrap()
}

fn show(chain: &mut Chain) -> Vec<u8> {
    let mut bytes = vec![0; chain.size() as usize];
    chain.read_at(&mut bytes, 0).unwrap();
    bytes
}

/// What a chain of images in memory shows.
fn shown(layers: &[Vec<u8>]) -> Vec<u8> {
    let layers = layers.iter().map(|bytes| image(&Recorder::new(bytes.clone()), false));
    show(&mut Chain::new(layers.collect()).unwrap())
}

fn reference(layers: &[Vec<u8>]) -> Vec<u8> {
    let mut below = None;
    for bytes in layers {
        below = Some(Box::new(Reference::new(bytes.clone(), below)));
    }
    below.unwrap().read()
}

fn vhd(recorder: &Recorder, writable: bool) -> Vhd {
    Vhd::from_file(recorder.open(writable)).unwrap()
}

/// Repairs what a crash has left, as an operation that is repeated does.
fn mend(recorder: &Recorder, what: &str) {
    let mut found = vhd(recorder, true);
    if found.can_be_repaired().unwrap() {
        found.repair().unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

/// Fails if the check finds anything but notes.
fn assert_clean(recorder: &Recorder, what: &str) {
    let found = vhd(recorder, false).check(true).unwrap();
    let bad: Vec<_> = found.iter().filter(|f| f.severity > Severity::Note).collect();
    assert!(bad.is_empty(), "{what}: {bad:?}");
}

/// Calls `judge` for every crash of the recorded calls.
fn each_crash(base: &[u8], log: &[Event], judge: impl Fn(Recorder, &str)) {
    assert!(!log.is_empty(), "nothing was written");
    for at in 0..=log.len() {
        for seed in [0, 1, 5 + 7 * at as u64, 8 + 7 * at as u64] {
            let what = format!("before event {at} of {}, loss {seed}", log.len());
            judge(Recorder::new(crashed(base, log, at, seed)), &what);
        }
    }
}

fn flushes(log: &[Event]) -> usize {
    log.iter().filter(|event| matches!(event, Event::Flush)).count()
}

fn parent(n: usize) -> ParentName {
    let name = format!("{n}.vhd");
    ParentName { id: UniqueId([n as u8; 16]), time: TimeStamp(1), relative: name.clone(), name }
}

/// A crash in a merge, in any direction, changes nothing that the top shows; repeated, it completes.
#[test]
fn merge_crash_changes_nothing_visible() {
    for seed in 0..9 {
        let mut dice = Dice::new(100 + seed);
        let layers = chain(&mut dice, 4, seed % 3 == 2);
        let low = dice.below(3) as usize;
        let into = low + dice.below(4 - low as u64) as usize;
        let expected = reference(&layers);
        let below = (low > 0).then(|| parent(low));
        let run = |recorder: &Recorder| open(&layers[low..], into - low, recorder);
        let whole = |recorder: &Recorder| {
            let mut seen = layers.clone();
            seen[into] = recorder.bytes();
            shown(&seen)
        };
        let recorder = Recorder::new(layers[into].clone());
        merge(&mut run(&recorder), into - low, below.as_ref(), &Moving::quietly()).unwrap();
        let log = recorder.log();
        let case = format!("case {seed}: {low}..=3 into {into}");
        each_crash(&layers[into], &log, |recorder, crash| {
            let what = format!("{case}, {crash}");
            assert!(whole(&recorder) == expected, "{what}: the top shows something else");
            merge(&mut run(&recorder), into - low, below.as_ref(), &Moving::quietly())
                .unwrap_or_else(|error| panic!("{what}: {error}"));
            let mut merged: Vec<Vec<u8>> = layers[..low].to_vec();
            merged.push(recorder.bytes());
            assert!(reference(&merged) == expected, "{what}: the result, by the reference reader");
            assert_clean(&recorder, &what);
        });
    }
}

/// A crash while sectors are written leaves each of them old or new, and what was flushed is there.
#[test]
fn write_crash_leaves_old_or_new_sectors() {
    for seed in 0..12 {
        let mut dice = Dice::new(200 + seed);
        let depth = 1 + dice.below(3) as u8;
        let layers = chain(&mut dice, depth, seed % 2 == 1);
        let top = layers.len() - 1;
        let before = reference(&layers);
        let recorder = Recorder::new(layers[top].clone());
        let mut written = open(&layers, top, &recorder);
        let mut states = vec![before.clone()];
        let mut flushed = vec![0];
        for _ in 0..3 {
            for _ in 0..3 {
                let len = 1 + dice.below(3 * BLOCK);
                let at = dice.below(before.len() as u64 - len);
                let mut now = states.last().unwrap().clone();
                let range = at as usize..(at + len) as usize;
                if dice.below(3) == 0 {
                    written.zero(at, len).unwrap();
                    now[range].fill(0);
                } else {
                    let data = dice.bytes(len as usize);
                    written.write_at(&data, at).unwrap();
                    now[range].copy_from_slice(&data);
                }
                states.push(now);
            }
            let so_far = flushes(&recorder.log());
            written.flush().unwrap();
            assert!(flushes(&recorder.log()) - so_far <= 2, "more than 2 flushes");
            flushed.push(states.len() - 1);
            assert!(show(&mut written) == *states.last().unwrap());
        }
        drop(written);
        let log = recorder.log();
        let ends: Vec<usize> =
            log.iter().enumerate().filter(|(_, e)| matches!(e, Event::Flush)).map(|(n, _)| n + 1).collect();
        assert_clean(&recorder, "at the end");
        for at in 0..=log.len() {
            // Of two flushes in a row the second one makes the bits durable.
            let durable = ends.iter().filter(|end| **end <= at).count() / 2;
            let least = flushed[durable.min(flushed.len() - 1)];
            for loss in [0, 1, 5 + 7 * at as u64] {
                let what = format!("case {seed}, before event {at} of {}, loss {loss}", log.len());
                let recorder = Recorder::new(crashed(&layers[top], &log, at, loss));
                let now = show(&mut open(&layers, top, &recorder));
                for (n, sector) in now.chunks(512).enumerate() {
                    let range = n * 512..n * 512 + sector.len();
                    let known = states[least..].iter().any(|state| sector == &state[range.clone()]);
                    assert!(known, "{what}: sector {n} is neither old nor new");
                }
                mend(&recorder, &what);
                assert!(show(&mut open(&layers, top, &recorder)) == now, "{what}: the repair changed data");
                let found = vhd(&recorder, false).check(false).unwrap();
                assert!(found.iter().all(|f| f.severity == Severity::Note), "{what}: {found:?}");
            }
        }
    }
}

/// A crash while a child gets another parent leaves it with one of the two, and the change can be repeated.
#[test]
fn rehead_crash_leaves_one_of_two_parents() {
    for (seed, foreign) in [(1, false), (2, true)] {
        let mut dice = Dice::new(300 + seed);
        let layers = chain(&mut dice, 2, foreign);
        let recorder = Recorder::new(layers[1].clone());
        vhd(&recorder, true).set_parent(&parent(9)).unwrap();
        let log = recorder.log();
        assert_eq!(flushes(&log), if foreign { 2 } else { 1 });
        each_crash(&layers[1], &log, |recorder, what| {
            let found = vhd(&recorder, false);
            let id = found.parent_id().unwrap();
            assert!(id == UniqueId([1; 16]) || id == UniqueId([9; 16]), "{what}: {id}");
            vhd(&recorder, true).resume().unwrap().set_parent(&parent(9)).unwrap();
            let found = vhd(&recorder, false);
            assert_eq!(found.parent_id(), Some(UniqueId([9; 16])));
            assert_eq!(found.header().unwrap().parent_name(), "9.vhd");
            assert_eq!(found.locators().unwrap()[0].path.as_deref(), Ok("./9.vhd"));
            assert_clean(&recorder, what);
            let now = [layers[0].clone(), recorder.bytes()];
            assert!(reference(&now) == reference(&layers), "{what}: the data changed");
        });
    }
}

/// A crash while a disk is made larger leaves the old or the new size, and never a block that is not whole.
#[test]
fn resize_crash_leaves_old_or_new_size() {
    // The second size needs the place of the first blocks for its BAT, the third that of the footer.
    for (seed, size, empty) in [(1, SIZE + BLOCK, false), (2, 400 * BLOCK, false), (3, 400 * BLOCK, true)] {
        let mut dice = Dice::new(400 + seed);
        let mut layers = chain(&mut dice, 1, false);
        if empty {
            layers[0] = maker(3, 1, SIZE).bytes();
        }
        let before = reference(&layers);
        let recorder = Recorder::new(layers[0].clone());
        vhd(&recorder, true).grow(size).unwrap();
        let mut after = before.clone();
        after.resize(size as usize, 0);
        assert!(reference(&[recorder.bytes()]) == after);
        assert_clean(&recorder, "grown");
        let log = recorder.log();
        each_crash(&layers[0], &log, |recorder, what| {
            let mut chain = Chain::new(vec![image(&recorder, false)]).unwrap();
            let now = show(&mut chain);
            assert!(now == before || now == after, "{what}: {} bytes", now.len());
            mend(&recorder, what);
            vhd(&recorder, true).grow(size).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert!(reference(&[recorder.bytes()]) == after, "{what}: repeated");
            assert_clean(&recorder, what);
        });
    }
}

/// A crash in a repair leaves something that a repair corrects.
#[test]
fn repair_crash_leaves_a_valid_footer() {
    let mut dice = Dice::new(500);
    let good = chain(&mut dice, 1, true);
    let expected = reference(&good);
    let end = good[0].len() - 512;
    let breaks: [fn(&mut Vec<u8>, usize); 3] =
        [|b, end| b.truncate(end), |b, end| b[end + 64] ^= 1, |b, _| b[0] ^= 1];
    for damage in breaks {
        let mut bytes = good[0].clone();
        damage(&mut bytes, end);
        let recorder = Recorder::new(bytes.clone());
        vhd(&recorder, true).repair().unwrap();
        assert_clean(&recorder, "repaired");
        each_crash(&bytes, &recorder.log(), |recorder, what| {
            mend(&recorder, what);
            assert_clean(&recorder, what);
            assert!(reference(&[recorder.bytes()]) == expected, "{what}");
        });
    }
}

/// An error of any write or flush of a merge leaves the chain as it was, and the room that was taken is given
/// back.
#[test]
fn failed_merge_changes_nothing_visible() {
    let mut dice = Dice::new(600);
    let layers = chain(&mut dice, 3, false);
    let expected = reference(&layers);
    for into in 0..3 {
        for calls in 0.. {
            let recorder = Recorder::new(layers[into].clone());
            let mut run = open(&layers, into, &recorder);
            recorder.fail_after(calls);
            let merged = merge(&mut run, into, None, &Moving::quietly());
            drop(run);
            assert!(show(&mut open(&layers, into, &recorder)) == expected, "into {into}, call {calls}");
            if !recorder.has_failed() {
                merged.unwrap();
                break;
            }
            merged.unwrap_err();
            merge(&mut open(&layers, into, &recorder), into, None, &Moving::quietly()).unwrap();
            assert!(reference(&[recorder.bytes()]) == expected, "into {into}, call {calls}: repeated");
        }
    }
}
