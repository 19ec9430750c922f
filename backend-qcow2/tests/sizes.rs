//! What the engine says that a delete frees, beside what `qemu-img snapshot -d` frees, and the engine itself:
//! random images of small and large clusters, with compressed clusters, zeros, discards, subclusters,
//! resizes, and snapshots that are applied. And what it says that a merge adds, beside the merge.

mod judge;

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use backend_qcow2::image::{Backing, Image, Moving, OpenOptions, RunBacking, RunLayer, merge, merge_growth};
use judge::{Bench, clean, content, run, text, try_run};
use snapcore_testkit::seed::Seed;

fn be(bytes: &[u8], at: usize, length: usize) -> u64 {
    bytes[at..at + length].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// Bytes of the clusters that are in use, by the refcounts of 16 bits alone, as the specification has them.
fn in_use(path: &Path) -> u64 {
    let bytes = std::fs::read(path).unwrap();
    let (cluster, table) = (1usize << be(&bytes, 20, 4), be(&bytes, 48, 8) as usize);
    assert!(be(&bytes, 4, 4) == 2 || be(&bytes, 96, 4) == 4, "refcounts of 16 bits");
    let entries = be(&bytes, 56, 4) as usize * cluster / 8;
    let mut used = 0;
    for entry in 0..entries {
        let block = be(&bytes, table + entry * 8, 8) as usize;
        if block != 0 {
            let counts = bytes[block..block + cluster].as_chunks::<2>().0;
            used += counts.iter().filter(|count| **count != [0, 0]).count() as u64;
        }
    }
    used * cluster as u64
}

fn on_disk(path: &Path) -> u64 {
    std::fs::File::open(path).unwrap().sync_all().unwrap();
    std::fs::metadata(path).unwrap().blocks() * 512
}

fn open(path: &Path) -> Image {
    Image::open(path, &OpenOptions::read_only()).unwrap()
}

/// A file in many pieces has blocks of ext4's own among those that are counted as its room.
fn is_same(said: u64, found: u64) -> bool {
    said.abs_diff(found) <= 4096
}

/// Some random changes by QEMU.
fn change(seed: &mut Seed, path: &Path, size: u64) {
    let mut commands = Vec::new();
    for _ in 0..=seed.below(10) {
        let kind = seed.pick(&["write", "write", "write", "write -c", "write -z", "write -zu", "discard"]);
        // QEMU compresses whole clusters alone; parts of the others make subclusters.
        let part = if kind == "write" { seed.pick(&[65_536, 65_536, 4096, 2048]) } else { 65_536 };
        let at = seed.below(size / 65_536) * 65_536 + if part < 65_536 { seed.below(8) * 4096 } else { 0 };
        let pattern = if kind.starts_with("write -z") || kind == "discard" {
            String::new()
        } else {
            format!("-P {} ", 1 + seed.below(250))
        };
        commands.push(format!("{kind} {pattern}{at} {part}"));
    }
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in &commands {
        args.extend(["-c", command]);
    }
    args.push(text(path));
    // What QEMU refuses, as a compressed write over a mapped cluster, is refused.
    try_run("qemu-io", &args);
}

/// What is said of a set is what QEMU frees by deleting it, and what the engine frees, inside the file and on
/// the file system; and what is said of each alone is not more than that.
#[test]
fn sizes_are_what_deletes_free() {
    let cases = std::env::var("DOMSNAP_PROPERTY_CASES").map_or(12, |cases| cases.parse().unwrap());
    let bench = Bench::new();
    for case in 0..cases {
        let mut seed = Seed::new(0x512e + case);
        let options = seed.pick(&[
            "cluster_size=4k",
            "cluster_size=64k",
            "cluster_size=64k,extended_l2=on",
            "cluster_size=16k,extended_l2=on",
            "cluster_size=64k,compat=0.10",
            "cluster_size=512",
        ]);
        let path = bench.qemu_image("image.qcow2", options, "24M");
        let mut tags: Vec<String> = Vec::new();
        for number in 0..4 + seed.below(4) {
            change(&mut seed, &path, 24 << 20);
            let tag = format!("s{number}");
            run("qemu-img", &["snapshot", "-c", &tag, text(&path)]);
            tags.push(tag);
            if tags.len() > 2 && seed.chance(30) {
                let tag = tags[seed.below(tags.len() as u64) as usize].clone();
                run("qemu-img", &["snapshot", "-a", &tag, text(&path)]);
            }
        }
        let set: Vec<&str> = tags.iter().filter(|_| seed.chance(50)).map(String::as_str).collect();
        let set = if set.is_empty() { vec![tags[0].as_str()] } else { set };
        let what = format!("case {case}, {options}: {set:?} of {tags:?}");
        let image = open(&path);
        let mut sizes = image.sizes().unwrap();
        let said = sizes.freed_by_deleting(&set, false).unwrap();
        for tag in &set {
            let alone = sizes.freed_by_deleting(&[tag], false).unwrap();
            let referenced = sizes.referenced(tag).unwrap();
            // The snapshot table becomes smaller by a cluster once at most.
            let table = 1 << be(&std::fs::read(&path).unwrap(), 20, 4);
            assert!(alone.inside <= said.inside + table, "{what}: {tag} alone: {alone:?} of {said:?}");
            assert!(alone.inside <= referenced + table, "{what}: {tag}: {alone:?} of {referenced}");
        }
        drop(image);
        let before = in_use(&path);
        let by_qemu = bench.path("by-qemu.qcow2");
        std::fs::copy(&path, &by_qemu).unwrap();
        for tag in &set {
            run("qemu-img", &["snapshot", "-d", tag, text(&by_qemu)]);
        }
        assert_eq!(said.inside, before - in_use(&by_qemu), "{what}: beside qemu-img");
        let had = on_disk(&path);
        let mut image = Image::open(&path, &OpenOptions::read_write()).unwrap();
        image.delete_snapshots(&set).unwrap();
        drop(image);
        assert_eq!(said.inside, before - in_use(&path), "{what}: inside the file");
        let freed = had - on_disk(&path);
        assert!(is_same(said.given_back, freed), "{what}: said {said:?}, and the file has {freed} less");
        clean(&path);
    }
}

/// A snapshot that equals the current state costs its own tables, and no L2 table is read for that: here all
/// of them are broken.
#[test]
fn shared_tables_are_not_read() {
    let bench = Bench::new();
    let path = bench.qemu_image("image.qcow2", "cluster_size=64k", "1G");
    judge::io(&path, &["write -P 1 0 64k", "write -P 1 600M 64k"]);
    run("qemu-img", &["snapshot", "-c", "same", text(&path)]);
    let mut bytes = std::fs::read(&path).unwrap();
    let l1 = be(&bytes, 40, 8) as usize;
    for index in 0..2 {
        let table = be(&bytes, l1 + index * 8, 8) as usize & 0x00ff_ffff_ffff_fe00;
        let broken = 0x1_0200u64.to_be_bytes();
        bytes[table..table + 65_536].as_chunks_mut::<8>().0.fill(broken);
    }
    std::fs::write(&path, bytes).unwrap();
    let image = open(&path);
    // Its L1 table, and the snapshot table.
    assert_eq!(image.sizes().unwrap().freed_by_deleting(&["same"], false).unwrap().inside, 2 * 65_536);
    assert!(image.sizes().unwrap().referenced("same").is_err(), "the tables are broken");
}

/// Refcounts that lie are reported, or believed, and never lead to more than there is.
#[test]
fn lying_refcounts_are_reported() {
    let bench = Bench::new();
    let path = bench.qemu_image("image.qcow2", "cluster_size=64k", "64M");
    judge::io(&path, &["write -P 1 0 1M"]);
    run("qemu-img", &["snapshot", "-c", "one", text(&path)]);
    judge::io(&path, &["write -P 2 0 1M"]);
    let good = std::fs::read(&path).unwrap();
    let block = be(&good, be(&good, 48, 8) as usize, 8) as usize;
    for value in [0u16, 1, 2, u16::MAX] {
        let mut bytes = good.clone();
        for cluster in 4..40 {
            bytes[block + cluster * 2..block + cluster * 2 + 2].copy_from_slice(&value.to_be_bytes());
        }
        std::fs::write(&path, &bytes).unwrap();
        match open(&path).sizes().unwrap().freed_by_deleting(&["one"], false) {
            Ok(freed) => assert!(freed.inside <= good.len() as u64, "{value}: {freed:?}"),
            Err(error) => assert!(error.to_string().contains("refcount of 0"), "{value}: {error}"),
        }
    }
    // Tables that refer to each other, and to themselves.
    let snapshots = be(&good, 64, 8) as usize;
    let l1 = be(&good, snapshots, 8) as usize;
    let table = be(&good, l1, 8) as usize & 0x00ff_ffff_ffff_fe00;
    let mut bytes = good.clone();
    for entry in 0..8192 {
        bytes[table + entry * 8..table + entry * 8 + 8].copy_from_slice(&(table as u64).to_be_bytes());
    }
    std::fs::write(&path, &bytes).unwrap();
    let error = open(&path).sizes().unwrap().freed_by_deleting(&["one"], false).unwrap_err();
    assert!(error.to_string().contains("references to it"), "{error}");
}

/// What is said that a merge adds to the file is what it adds, in both directions, over two layers and three.
#[test]
fn growth_is_what_a_merge_adds() {
    let cases = std::env::var("DOMSNAP_PROPERTY_CASES").map_or(8, |cases| cases.parse().unwrap());
    for case in 0..cases {
        let bench = Bench::new();
        let mut seed = Seed::new(0x6e07 + case);
        let options = seed.pick(&["cluster_size=64k", "cluster_size=4k", "cluster_size=64k,compat=0.10"]);
        let mut layers = vec![bench.qemu_image("l0.qcow2", options, "24M")];
        for number in 1..=1 + seed.below(2) {
            change_plain(&mut seed, layers.last().unwrap());
            let layer = bench.path(&format!("l{number}.qcow2"));
            let below = layers.last().unwrap();
            let args = [
                "create",
                "-q",
                "-f",
                "qcow2",
                "-F",
                "qcow2",
                "-o",
                options,
                "-b",
                text(below),
                text(&layer),
            ];
            run("qemu-img", &args);
            layers.push(layer);
        }
        change_plain(&mut seed, layers.last().unwrap());
        let shown = content(layers.last().unwrap(), None);
        // A backing file below the run, or none.
        let run_of = if layers.len() > 2 && seed.chance(50) { &layers[1..] } else { &layers[..] };
        let has_below = run_of.len() < layers.len();
        let target = seed.below(run_of.len() as u64) as usize;
        let of = |paths: &[std::path::PathBuf]| -> Vec<RunLayer> {
            paths.iter().map(|path| RunLayer::active(&open(path)).unwrap()).collect()
        };
        let what =
            format!("case {case}, {options}: {} of {} layers, below {has_below}", target, run_of.len());
        let (under, over) = (of(&run_of[..target]), of(&run_of[target + 1..]));
        let into = &run_of[target];
        let growth = merge_growth(under.clone(), &open(into), over.clone(), has_below).unwrap();
        let had = on_disk(into);
        let mut image = Image::open(into, &OpenOptions::read_write()).unwrap();
        let mut base = has_below.then(|| backend_qcow2::image::View::new(of(&layers[..1])).unwrap());
        let below = base.as_mut().map(|reader| RunBacking {
            backing: Backing { file: text(&layers[0]).to_owned(), format: Some("qcow2".to_owned()) },
            reader,
        });
        merge(under, &mut image, over, below, &Moving::quietly()).unwrap();
        drop(image);
        let found = on_disk(into) as i64 - had as i64;
        let said = growth.more as i64 - growth.less as i64;
        assert!(growth.is_exact, "{what}");
        assert!((said - found).abs() <= 4096, "{what}: said {growth:?}, and the file has {found} more");
        clean(into);
        if target + 1 == run_of.len() {
            assert!(content(into, None) == shown, "{what}");
        }
    }
}

/// Random changes without compressed clusters and parts of clusters.
fn change_plain(seed: &mut Seed, path: &Path) {
    let mut commands = Vec::new();
    for _ in 0..=3 + seed.below(12) {
        let kind = seed.pick(&["write", "write", "write", "write -z", "write -zu", "discard"]);
        let pattern = if kind == "write" { format!("-P {} ", 1 + seed.below(250)) } else { String::new() };
        let (at, count) = (seed.below(380) * 65_536, 1 + seed.below(3));
        commands.push(format!("{kind} {pattern}{at} {}k", count * 64));
    }
    let mut args = vec!["-f", "qcow2", "-d", "unmap"];
    for command in &commands {
        args.extend(["-c", command]);
    }
    args.push(text(path));
    run("qemu-io", &args);
}
