//! Power loss at every write and every flush of every operation. Any part of what was not flushed may be
//! lost.
//!
//! After each crash the image must open and have no errors except leaks and clear COPIED bits. Every snapshot
//! must be intact. The state must be the one before or after the operation. [`Image::repair`] must leave
//! nothing to report.

use std::collections::BTreeMap;
use std::path::Path;

use super::compressed::decompress;
use super::create::{NewImage, create_in};
use super::header::{Backing, Compression};
use super::mapping::Mapping;
use super::open::Image;
use super::recorder::{Event, Recorder};
pub(super) use super::recorder::{Seeded, crashed};
use super::snapshot::NewSnapshot;
use super::tables::L1Table;
use super::units::{ClusterBits, GuestCluster};
use super::writer::{ActiveWriter, InPlace};

/// Everything that an image contains: the active state, the backing file, each snapshot.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct State {
    active: Vec<u8>,
    backing: Option<Backing>,
    snapshots: BTreeMap<String, Vec<u8>>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let sum =
            |b: &[u8]| b.iter().fold(b.len() as u64, |s, b| s.wrapping_mul(31).wrapping_add(u64::from(*b)));
        let snapshots: Vec<_> = self.snapshots.iter().map(|(n, b)| format!("{n} {:x}", sum(b))).collect();
        write!(f, "active {:x}, backing {:?}, {snapshots:?}", sum(&self.active), self.backing)
    }
}

fn read_all(image: &Image, l1: &L1Table, size: u64) -> Vec<u8> {
    let g = image.geometry();
    let cluster = g.cluster_bits.bytes();
    let mut out = vec![0; (size as usize).next_multiple_of(cluster)];
    let disk = g.l1_entries_for(size) as usize;
    image
        .for_each_l2(l1, 0..disk, |index, table| {
            for slot in 0..table.len() {
                let at = (index * table.len() + slot) * cluster;
                let Some(into) = out.get_mut(at..at + cluster) else { break };
                match table.mapping(slot)? {
                    Mapping::Unallocated | Mapping::Zero { .. } => {}
                    Mapping::Data(host) => image.file().read_at(into, host)?,
                    Mapping::Compressed(e) => {
                        let mut packed = vec![0; e.length as usize];
                        image.file().read_at(&mut packed, e.offset)?;
                        decompress(image.header().compression, &packed, into)?;
                    }
                    Mapping::Subclusters { .. } => panic!("no test makes them"),
                }
            }
            Ok(())
        })
        .unwrap();
    out.truncate(size as usize);
    out
}

pub(super) fn state(image: &Image) -> State {
    let snapshots = image.snapshots().unwrap().iter().map(|s| {
        let l1 = image.snapshot_l1(s).unwrap();
        (s.name().into_owned(), read_all(image, &l1, s.disk_size))
    });
    State {
        active: read_all(image, image.active_l1().unwrap(), image.virtual_size()),
        backing: image.header().backing.clone(),
        snapshots: snapshots.collect(),
    }
}

pub(super) fn open(bytes: &[u8], writable: bool) -> (Recorder, Image) {
    let recorder = Recorder::new(bytes.to_vec());
    let image = Image::from_file(recorder.open(writable)).unwrap();
    (recorder, image)
}

/// Crashes everywhere in `operation`. With `mixed`, the active state may be old in some clusters and new in
/// others.
fn crash_everywhere(
    base: &[u8],
    what: &str,
    mixed: bool,
    most_flushes: usize,
    operation: impl Fn(&mut Image),
) {
    let before = state(&open(base, false).1);
    let (recorder, mut image) = open(base, true);
    operation(&mut image);
    drop(image);
    let log = recorder.log();
    let flushes = log.iter().filter(|e| matches!(e, Event::Flush)).count();
    assert!(flushes <= most_flushes, "{what}: {flushes} flushes");
    assert!(!log.is_empty(), "{what} wrote nothing");
    let done = open(&recorder.bytes(), false).1;
    let after = state(&done);
    let report = done.check().unwrap();
    assert!(report.is_clean(), "{what}: not clean afterwards: {report:?}");
    let (mut saw_before, mut saw_after) = (false, false);
    for at in 0..=log.len() {
        for seed in 0..6u64 {
            // Besides the common seeds, one seed for this place.
            let seed = if seed < 2 { seed } else { seed + 7 * at as u64 + 2 };
            let bytes = crashed(base, &log, at, seed);
            let case = || format!("{what}, before event {at} of {}, seed {seed}", log.len());
            let image = open(&bytes, false).1;
            let report = image.check().unwrap_or_else(|e| panic!("{}: {e}", case()));
            assert!(report.is_sound(), "{}: {report:?}", case());
            let now = state(&image);
            saw_before |= now == before;
            saw_after |= now == after;
            if mixed {
                assert_eq!(now.snapshots, before.snapshots, "{}", case());
                let size = image.geometry().cluster_bits.bytes();
                for (n, cluster) in now.active.chunks(size).enumerate() {
                    let range = n * size..n * size + cluster.len();
                    assert!(
                        cluster == &before.active[range.clone()] || cluster == &after.active[range],
                        "{}: guest cluster {n} is neither old nor new",
                        case()
                    );
                }
            } else {
                assert!(now == before || now == after, "{}:\n{now:?}\n{before:?}\n{after:?}", case());
            }
            let (repaired, mut image) = open(&bytes, true);
            image.repair().unwrap_or_else(|e| panic!("{}: {e}", case()));
            drop(image);
            let repaired = open(&repaired.bytes(), false).1;
            assert!(repaired.check().unwrap().is_clean(), "{}: {:?}", case(), repaired.check());
            assert!(state(&repaired) == now, "{}: repair changed data", case());
            // qemu-img would look for the backing file.
            if at % 5 == 0 && seed < 2 && now.backing.is_none() {
                judged_by_qemu(&bytes, &case());
            }
        }
    }
    assert!(saw_before && saw_after, "{what}: the crashes did not reach both sides");
}

/// Checks that `qemu-img` repairs leaks and then finds the image clean.
fn judged_by_qemu(bytes: &[u8], what: &str) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("crashed.qcow2");
    std::fs::write(&path, bytes).unwrap();
    let check = |repair: &[&str]| {
        std::process::Command::new("qemu-img")
            .args(["check", "-f", "qcow2"])
            .args(repair)
            .arg(&path)
            .output()
            .expect("these tests need qemu-img (Debian: apt-get install qemu-utils)")
    };
    check(&["-r", "all"]);
    let out = check(&[]);
    assert!(out.status.success(), "{what}: qemu-img check says {}", String::from_utf8_lossy(&out.stdout));
}

/// Format of the base images.
pub(super) struct Kind {
    bits: u32,
    refcount_bits: u32,
}

pub(super) const KINDS: [Kind; 3] = [
    Kind { bits: 9, refcount_bits: 64 },
    Kind { bits: 12, refcount_bits: 16 },
    Kind { bits: 9, refcount_bits: 4 },
];

/// Makes an image of 256 clusters of disk with three snapshots, all different, and compressed clusters.
pub(super) fn base(kind: &Kind) -> Vec<u8> {
    let recorder = Recorder::default();
    let size = 1u64 << kind.bits;
    let mut new = NewImage::new(256 * size);
    new.cluster_bits = ClusterBits::new(kind.bits).unwrap();
    new.refcount_bits = kind.refcount_bits;
    create_in(Box::new(recorder.clone()), Path::new("/memory.qcow2"), &new).unwrap();
    let mut image = Image::from_file(recorder.open(true)).unwrap();
    let fill = |image: &mut Image, first: u64, count: u64, byte: u8| {
        let mut w = ActiveWriter::new(image, InPlace::Never).unwrap();
        w.write_data(GuestCluster(first), &vec![byte; (count * size) as usize]).unwrap();
        let packed =
            super::compressed::compress(Compression::Deflate, &vec![byte; size as usize]).unwrap().unwrap();
        w.write_compressed(GuestCluster(200 + u64::from(byte)), &packed).unwrap();
        w.write_compressed(GuestCluster(220), &packed).unwrap();
        w.finish().unwrap();
    };
    fill(&mut image, 0, 60, 1);
    for (n, name) in ["one", "two", "three"].iter().enumerate() {
        image.create_snapshot(&NewSnapshot::new(*name, n as u32, 0)).unwrap();
        fill(&mut image, 20 * n as u64, 30, n as u8 + 2);
    }
    drop(image);
    let bytes = recorder.bytes();
    let image = open(&bytes, false).1;
    assert!(image.check().unwrap().is_clean(), "{:?}", image.check());
    bytes
}

/// Makes an overlay of [`base`], larger than it, with data, zeros and compressed clusters.
pub(super) fn overlay(kind: &Kind) -> Vec<u8> {
    let recorder = Recorder::default();
    let size = 1u64 << kind.bits;
    let mut new = NewImage::new(300 * size);
    new.cluster_bits = ClusterBits::new(kind.bits).unwrap();
    new.refcount_bits = kind.refcount_bits;
    create_in(Box::new(recorder.clone()), Path::new("/memory.qcow2"), &new).unwrap();
    let mut image = Image::from_file(recorder.open(true)).unwrap();
    let mut w = ActiveWriter::new(&mut image, InPlace::Never).unwrap();
    w.write_data(GuestCluster(10), &vec![7; (40 * size) as usize]).unwrap();
    w.write_zeros(GuestCluster(45), 10).unwrap();
    let packed = super::compressed::compress(Compression::Deflate, &vec![8; size as usize]).unwrap().unwrap();
    w.write_compressed(GuestCluster(205), &packed).unwrap();
    w.write_data(GuestCluster(280), &vec![9; (10 * size) as usize]).unwrap();
    w.finish().unwrap();
    drop(image);
    recorder.bytes()
}

/// A crash while a snapshot is created leaves the state before or after.
#[test]
fn create_crash_leaves_before_or_after() {
    for kind in &KINDS {
        crash_everywhere(&base(kind), "create", false, 4, |image| {
            image.create_snapshot(&NewSnapshot::new("new", 9, 9)).unwrap();
        });
    }
}

/// A crash while a snapshot is applied leaves the state before or after.
#[test]
fn apply_crash_leaves_before_or_after() {
    for kind in &KINDS {
        for name in ["one", "three"] {
            crash_everywhere(&base(kind), name, false, 4, |image| image.apply_snapshot(name).unwrap());
        }
    }
}

/// A crash while snapshots are deleted leaves all or none of them.
#[test]
fn delete_crash_leaves_all_or_none() {
    for kind in &KINDS {
        for names in [&["two"][..], &["one", "three"], &["three", "two", "one"]] {
            crash_everywhere(&base(kind), &names.join(" "), false, 4, |image| {
                image.delete_snapshots(names).unwrap();
            });
        }
    }
}

/// A crash while the disk is resized leaves one size or the other.
#[test]
fn resize_crash_leaves_one_size_or_the_other() {
    for kind in &KINDS {
        let size = 1u64 << kind.bits;
        for clusters in [30, 300, 65536] {
            crash_everywhere(&base(kind), &format!("resize to {clusters}"), false, 4, |image| {
                image.set_virtual_size(clusters * size).unwrap();
            });
        }
    }
}

/// A crash while the backing file is changed leaves one or the other.
#[test]
fn backing_change_crash_leaves_old_or_new() {
    let backing = |file: &str, format: Option<&str>| {
        Some(Backing { file: file.into(), format: format.map(Into::into) })
    };
    for kind in &KINDS {
        let plain = base(kind);
        let steps = [
            backing("a.qcow2", Some("qcow2")),
            backing("a/long/way/to/another/image/that/needs/room.qcow2", Some("qcow2")),
            backing("raw", Some("raw")),
            backing("guess", None),
            None,
        ];
        let mut bytes = plain;
        for step in steps {
            let what = format!("backing {step:?}");
            crash_everywhere(&bytes, &what, false, 2, |image| image.set_backing(step.clone()).unwrap());
            let (recorder, mut image) = open(&bytes, true);
            image.set_backing(step.clone()).unwrap();
            drop(image);
            bytes = recorder.bytes();
        }
    }
}

/// A crash while clusters are written leaves each of them old or new.
#[test]
fn write_crash_leaves_each_cluster_old_or_new() {
    for kind in &KINDS {
        let size = 1usize << kind.bits;
        crash_everywhere(&base(kind), "write", true, 8, |image| {
            let mut w = ActiveWriter::new(image, InPlace::Never).unwrap();
            w.write_data(GuestCluster(10), &vec![99; size * 180]).unwrap();
            w.write_zeros(GuestCluster(0), 4).unwrap();
            w.discard(GuestCluster(5), 3).unwrap();
            w.finish().unwrap();
        });
    }
}

#[test]
fn the_refcount_table_moves_without_harm() {
    // 64 refcounts a block and 64 blocks a table cluster: 2 MiB of file, then the table must move.
    let kind = Kind { bits: 9, refcount_bits: 64 };
    let recorder = Recorder::new(base(&kind));
    let mut image = Image::from_file(recorder.open(true)).unwrap();
    image.set_virtual_size(4 << 20).unwrap();
    let mut w = ActiveWriter::new(&mut image, InPlace::Never).unwrap();
    w.write_data(GuestCluster(300), &vec![5; 3300 * 512]).unwrap();
    w.finish().unwrap();
    let place = image.header().reftable_offset;
    drop(image);
    crash_everywhere(&recorder.bytes(), "growth", true, 8, |image| {
        let mut w = ActiveWriter::new(image, InPlace::Never).unwrap();
        w.write_data(GuestCluster(4000), &vec![6; 1000 * 512]).unwrap();
        w.finish().unwrap();
        assert_ne!(image.header().reftable_offset, place, "the table did not move");
    });
}
