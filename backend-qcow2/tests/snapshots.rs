//! Internal snapshots, judged by qemu-img: every kind of image, in both directions.

mod judge;

use std::path::Path;

use backend_qcow2::image::{ErrorKind, Image, NewSnapshot, OpenOptions};
use judge::{Bench, clean, content, io, run, snapshot_names, text};

fn open(path: &Path) -> Image {
    Image::open(path, &OpenOptions::read_write()).unwrap()
}

fn create(path: &Path, name: &str) {
    open(path).create_snapshot(&NewSnapshot::new(name, 1_700_000_000, 5)).unwrap();
}

/// Our check and qemu-img's say the same: nothing.
fn sound(path: &Path) {
    let report = Image::open(path, &OpenOptions::read_only()).unwrap().check().unwrap();
    assert!(report.is_clean(), "{path:?}: {report:?}");
    clean(path);
}

/// Writes, creates, writes, applies back and forth, deletes; every state compared at every step.
fn round_trip(options: &str, compressed: bool) {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", options, "8M");
    let c = if compressed { "-c " } else { "" };
    // One whole cluster at most when compressed.
    io(&path, &["write -P 1 0 2M", &format!("write {c}-P 2 2M 64k"), "write -z 5M 128k"]);
    let one = content(&path, None);
    create(&path, "one");
    sound(&path);
    io(&path, &["write -P 3 1M 1M", "write -P 4 6M 100k", "discard 0 512k"]);
    let two = content(&path, None);
    create(&path, "two");
    sound(&path);
    io(&path, &["write -P 5 0 700k", &format!("write {c}-P 6 7M 64k")]);
    let now = content(&path, None);
    assert_eq!(snapshot_names(&path), ["one", "two"], "{options}");
    for (name, want) in [("one", &one), ("two", &two), ("one", &one)] {
        assert!(!open(&path).snapshot_matches_active(name).unwrap());
        open(&path).apply_snapshot(name).unwrap();
        sound(&path);
        assert!(open(&path).snapshot_matches_active(name).unwrap());
        assert!(&content(&path, None) == want, "{options}: active is not {name}");
        assert!(content(&path, Some("one")) == one && content(&path, Some("two")) == two, "{options}");
    }
    assert!(now != one);
    io(&path, &["write -P 7 3M 1M", "read -P 7 3M 1M"]);
    let after = content(&path, None);
    open(&path).delete_snapshots(&["one"]).unwrap();
    sound(&path);
    assert!(content(&path, Some("two")) == two && content(&path, None) == after, "{options}");
    let said = open(&path).sizes().unwrap().freed_by_deleting(&["two"], false).unwrap();
    let done = open(&path).delete_snapshots(&["two"]).unwrap();
    assert!(done.freed_bytes == said.inside, "{options}: {done:?}, and {said:?} was said");
    sound(&path);
    assert!(content(&path, None) == after, "{options}");
}

#[test]
fn all_cluster_sizes_go_back_and_forth() {
    for size in ["512", "1k", "4k", "32k", "64k", "256k", "2M"] {
        round_trip(&format!("cluster_size={size}"), false);
    }
}

#[test]
fn all_refcount_widths_go_back_and_forth() {
    for bits in [2, 4, 8, 16, 32, 64] {
        round_trip(&format!("cluster_size=4k,refcount_bits={bits}"), false);
    }
}

/// Snapshots of all versions, with extended L2 entries and compression, are applied back and forth.
#[test]
fn every_format_variant_goes_back_and_forth() {
    for options in
        ["compat=0.10", "compat=1.1", "extended_l2=on,cluster_size=16k", "extended_l2=on,cluster_size=128k"]
    {
        round_trip(options, false);
    }
    for options in
        ["compression_type=zlib", "compression_type=zstd", "compat=0.10", "extended_l2=on,cluster_size=64k"]
    {
        round_trip(options, true);
    }
}

/// A refcount of one bit refuses a snapshot of data, and changes nothing.
#[test]
fn one_bit_refcount_refuses_a_snapshot_of_data() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "refcount_bits=1", "1M");
    io(&path, &["write -P 1 0 64k"]);
    let before = std::fs::read(&path).unwrap();
    let e = open(&path).create_snapshot(&NewSnapshot::new("s", 1, 0)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::RefcountOverflow, "{e}");
    assert!(std::fs::read(&path).unwrap() == before);
    clean(&path);
}

/// Snapshots by QEMU are applied and deleted by domsnap, and the reverse.
#[test]
fn qemu_and_domsnap_use_each_others_snapshots() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=4k", "4M");
    let mut states = Vec::new();
    for n in 0..6 {
        io(&path, &[&format!("write -P {} {}k 300k", n + 1, n * 200)]);
        states.push(content(&path, None));
        let name = format!("s{n}");
        if n % 2 == 0 {
            create(&path, &name);
        } else {
            run("qemu-img", &["snapshot", "-c", &name, text(&path)]);
        }
        sound(&path);
    }
    for (n, state) in states.iter().enumerate() {
        let name = format!("s{n}");
        if n % 2 == 0 {
            run("qemu-img", &["snapshot", "-a", &name, text(&path)]);
        } else {
            open(&path).apply_snapshot(&name).unwrap();
        }
        sound(&path);
        assert!(&content(&path, None) == state && &content(&path, Some(&name)) == state);
    }
    run("qemu-img", &["snapshot", "-d", "s0", text(&path)]);
    open(&path).delete_snapshots(&["s1", "s4", "s2"]).unwrap();
    sound(&path);
    assert_eq!(snapshot_names(&path), ["s3", "s5"]);
    assert!(content(&path, Some("s3")) == states[3] && content(&path, Some("s5")) == states[5]);
    open(&path).delete_snapshots(&["s5", "s3"]).unwrap();
    sound(&path);
    assert!(content(&path, None) == states[5]);
}

/// An image that was resized between snapshots gets each size back.
#[test]
fn apply_restores_the_size_of_each_snapshot() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=4k", "4M");
    io(&path, &["write -P 1 0 4M"]);
    create(&path, "small");
    open(&path).set_virtual_size(16 << 20).unwrap();
    sound(&path);
    io(&path, &["read -P 0 4M 12M", "write -P 2 10M 6M"]);
    create(&path, "large");
    open(&path).set_virtual_size((3 << 20) + 512).unwrap();
    sound(&path);
    assert!(content(&path, None).iter().all(|b| *b == 1));
    open(&path).set_virtual_size(5 << 20).unwrap();
    io(&path, &["read -P 1 0 3145728", "read -P 0 3149824 1M"]);
    open(&path).apply_snapshot("large").unwrap();
    sound(&path);
    assert_eq!(content(&path, None).len(), 16 << 20);
    io(&path, &["read -P 1 0 4M", "read -P 0 4M 6M", "read -P 2 10M 6M"]);
    open(&path).apply_snapshot("small").unwrap();
    sound(&path);
    assert_eq!(content(&path, None).len(), 4 << 20);
    run("qemu-img", &["snapshot", "-a", "large", text(&path)]);
    io(&path, &["read -P 2 10M 6M"]);
}

/// Names are unique, and the error of an unknown one lists those that exist.
#[test]
fn names_are_unique_and_unknown_ones_are_listed() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=64k", "1M");
    create(&path, "a");
    let e = open(&path).create_snapshot(&NewSnapshot::new("a", 1, 0)).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::SnapshotExists);
    let e = open(&path).apply_snapshot("b").unwrap_err();
    assert_eq!(e.kind(), ErrorKind::SnapshotNotFound);
    assert!(e.to_string().contains("it has: a"), "{e}");
    let e = open(&path).delete_snapshots(&["a", "b"]).unwrap_err();
    assert_eq!(e.kind(), ErrorKind::SnapshotNotFound);
    assert_eq!(snapshot_names(&path), ["a"]);
    clean(&path);
}

#[test]
fn a_thousand_snapshots_come_and_go() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=64k", "1M");
    io(&path, &["write -P 9 0 1M"]);
    let mut image = open(&path);
    for n in 0..1000 {
        image.create_snapshot(&NewSnapshot::new(format!("s{n}"), n, 0)).unwrap();
    }
    drop(image);
    sound(&path);
    assert_eq!(snapshot_names(&path).len(), 1000);
    open(&path).delete_snapshots(&["s500"]).unwrap();
    sound(&path);
    let names: Vec<String> = (0..1000).filter(|n| *n != 500).map(|n| format!("s{n}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    assert_eq!(open(&path).delete_snapshots(&names).unwrap().snapshots, 999);
    sound(&path);
    io(&path, &["read -P 9 0 1M"]);
}

#[test]
fn vm_state_of_qemu_stays_with_its_snapshot() {
    let bench = Bench::new();
    let path = bench.qemu_image("a.qcow2", "cluster_size=4k", "4M");
    io(&path, &["write -P 1 0 1M"]);
    // What savevm does to the image: VM state behind the disk's end, then a snapshot that says so.
    let mut image = open(&path);
    image.create_snapshot(&NewSnapshot::new("disk", 1, 0)).unwrap();
    drop(image);
    io(&path, &["write -b -P 7 0 300k"]);
    let mut image = open(&path);
    let mut new = NewSnapshot::new("with-state", 2, 3);
    new.vm_state_size = 5 << 32;
    new.icount = Some(77);
    new.vm_clock_ns = 123_456_789;
    image.create_snapshot(&new).unwrap();
    drop(image);
    sound(&path);
    let info = judge::info(&path);
    let s = &info["snapshots"][1];
    assert_eq!(s["vm-state-size"].as_u64(), Some(5 << 32), "{s}");
    assert_eq!(s["icount"].as_u64(), Some(77), "{s}");
    assert_eq!((s["date-sec"].as_u64(), s["date-nsec"].as_u64()), (Some(2), Some(3)), "{s}");
    open(&path).apply_snapshot("disk").unwrap();
    sound(&path);
    open(&path).delete_snapshots(&["with-state", "disk"]).unwrap();
    sound(&path);
}
