//! Merging runs of random chains, judged by QEMU.

mod chain;

use std::path::Path;

use backend_qcow2::image::{
    Backing, ErrorKind, Image, MergeReport, Moving, OpenOptions, RunBacking, RunLayer, View, materialise,
    merge, visible_bytes,
};
use chain::{Dice, Made, Shape, assert_same, build, check, read, run, text};

fn open(path: &Path) -> Image {
    Image::open(path, &OpenOptions::read_only().unlocked()).unwrap()
}

fn layers(chain: &[Made]) -> Vec<RunLayer> {
    chain.iter().map(|made| RunLayer::active(&open(&made.path)).unwrap()).collect()
}

fn backing(made: &Made) -> Backing {
    Backing {
        file: made.path.file_name().unwrap().to_str().unwrap().to_owned(),
        format: Some("qcow2".to_owned()),
    }
}

/// Merges `chain[low..]` into `chain[into]`.
fn merge_chain(
    chain: &[Made],
    low: usize,
    into: usize,
    moving: &Moving<'_>,
) -> backend_qcow2::image::Result<MergeReport> {
    let mut image = Image::open(&chain[into].path, &OpenOptions::read_write()).unwrap();
    let mut reader = (low > 0).then(|| View::new(layers(&chain[..low])).unwrap());
    let below = reader.as_mut().map(|reader| RunBacking { backing: backing(&chain[low - 1]), reader });
    merge(layers(&chain[low..into]), &mut image, layers(&chain[into + 1..]), below, moving)
}

fn cases() -> u64 {
    std::env::var("MERGE_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(10)
}

fn first_case() -> u64 {
    std::env::var("MERGE_FIRST").ok().and_then(|n| n.parse().ok()).unwrap_or(0)
}

/// Builds chains, merges a run of each, and compares all that can be seen.
fn merge_random_chains(salt: u64, shape: Shape) {
    for seed in first_case()..first_case() + cases() {
        let mut dice = Dice::new(salt << 32 | seed);
        let dir = tempfile::tempdir().unwrap();
        let shape = Shape { depth: 2 + dice.below(shape.depth), ..shape };
        let chain = build(dir.path(), &mut dice, shape);
        let top = chain.len() - 1;
        let low = dice.below(top as u64) as usize;
        let into = low + dice.below((top - low + 1) as u64) as usize;
        let what = format!("case {seed}: merge {low}..={top} into {into} of {chain:#?}");
        println!("{what}");

        let expected = read(&chain[top].path, None);
        let tags: Vec<Vec<Vec<u8>>> = chain
            .iter()
            .map(|made| made.tags.iter().map(|tag| read(&made.path, Some(tag))).collect())
            .collect();
        let mut ours = vec![0; expected.len()];
        View::new(layers(&chain)).unwrap().read_at(&mut ours, 0, None).unwrap();
        assert_same(&ours, &expected, &format!("our reading before; {what}"));

        let merged = merge_chain(&chain, low, into, &Moving::quietly());
        let has_tags = !chain[into].tags.is_empty();
        let resized = chain[into].size != chain[top].size;
        if has_tags && (into > low || (chain[into].version == 2 && resized)) {
            assert_eq!(merged.unwrap_err().kind(), ErrorKind::Unsupported, "{what}");
            assert_same(&read(&chain[top].path, None), &expected, &format!("refused; {what}"));
            continue;
        }
        merged.unwrap_or_else(|e| panic!("{e:?}; {what}"));
        assert_same(&read(&chain[into].path, None), &expected, &format!("the merged layer; {what}"));
        assert_same(&read(&chain[top].path, None), &expected, &format!("the top; {what}"));
        let header = open(&chain[into].path).header().clone();
        assert_eq!(header.backing, (low > 0).then(|| backing(&chain[low - 1])), "{what}");
        for (n, (made, contents)) in chain.iter().zip(&tags).enumerate() {
            check(&made.path, false);
            if n > into {
                // Snapshots above read through the target. The caller of a merge must know that they are not
                // needed.
                continue;
            }
            for (tag, content) in made.tags.iter().zip(contents) {
                // QEMU shows a snapshot in the image's size of today.
                let now = read(&made.path, Some(tag));
                let common = now.len().min(content.len());
                assert_same(&now[..common], &content[..common], &format!("snapshot {tag}; {what}"));
            }
        }
        // Once more: there is nothing left to do.
        let again = merge_chain(&chain, low, into, &Moving::quietly()).unwrap();
        assert_same(&read(&chain[into].path, None), &expected, &format!("merged again; {what}"));
        check(&chain[into].path, false);
        if into == top {
            assert_eq!(again.bytes_moved, 0, "a finished stream moves nothing; {what}");
        }
    }
}

#[test]
fn chains_of_one_cluster_size_merge_into_any_layer() {
    merge_random_chains(
        1,
        Shape { depth: 5, cluster_bits: &[16], resized: false, snapshots: false, writes: 12 },
    );
}

/// Chains of small clusters with snapshots merge into any layer.
#[test]
fn small_clusters_with_snapshots_merge_anywhere() {
    merge_random_chains(
        2,
        Shape { depth: 4, cluster_bits: &[9], resized: false, snapshots: true, writes: 12 },
    );
}

/// Chains of all cluster sizes and disk sizes merge into any layer.
#[test]
fn all_cluster_and_disk_sizes_merge_anywhere() {
    merge_random_chains(
        3,
        Shape { depth: 5, cluster_bits: &[9, 10, 12, 14, 16], resized: true, snapshots: false, writes: 14 },
    );
}

#[test]
fn resized_chains_with_snapshots_merge_into_any_layer() {
    merge_random_chains(
        4,
        Shape { depth: 4, cluster_bits: &[10, 12, 14], resized: true, snapshots: true, writes: 14 },
    );
}

/// A snapshot copied out reads as before, and only occupies what it maps.
#[test]
fn copied_snapshot_reads_the_same_and_stays_small() {
    for seed in first_case()..first_case() + cases() {
        let mut dice = Dice::new(5 << 32 | seed);
        let dir = tempfile::tempdir().unwrap();
        let shape =
            Shape { depth: 2, cluster_bits: &[9, 12, 14, 16], resized: true, snapshots: true, writes: 12 };
        let chain = build(dir.path(), &mut dice, shape);
        for made in chain.iter().filter(|made| !made.tags.is_empty()) {
            let what = format!("case {seed}: {made:?}");
            let expected = read(&made.path, Some(&made.tags[0]));
            let before = std::fs::read(&made.path).unwrap();
            let out = dir.path().join("out.qcow2");
            let source = open(&made.path);
            let layer =
                RunLayer::snapshot(&source, source.find_snapshot(&made.tags[0]).unwrap().unwrap()).unwrap();
            let mapped: u64 = visible_bytes(vec![layer]).unwrap().iter().sum();
            let report = materialise(&source, &made.tags[0], &out, &Moving::quietly()).unwrap();
            assert!(report.bytes_moved <= mapped, "{} of {mapped} bytes; {what}", report.bytes_moved);
            assert_same(&read(&out, None), &expected, &what);
            check(&out, false);
            assert!(std::fs::read(&made.path).unwrap() == before, "the source changed; {what}");
            let header = open(&out).header().clone();
            assert_eq!(&header.backing, &source.header().backing, "{what}");
            assert_eq!(header.cluster_bits, source.header().cluster_bits, "{what}");
            let e = materialise(&source, &made.tags[0], &out, &Moving::quietly()).unwrap_err();
            assert_eq!(e.kind(), ErrorKind::FileExists, "{what}");
            assert_same(&read(&out, None), &expected, "an existing file is not touched");
            std::fs::remove_file(&out).unwrap();
        }
    }
}

#[test]
fn planner_knows_what_each_layer_would_move() {
    let dir = tempfile::tempdir().unwrap();
    let paths: Vec<_> = (0..3).map(|n| dir.path().join(format!("l{n}.qcow2"))).collect();
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&paths[0]), "1M"]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "l0.qcow2", "-F", "qcow2", text(&paths[1])]);
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "l1.qcow2", "-F", "qcow2", text(&paths[2])]);
    run("qemu-io", &["-c", "write 0 512k", text(&paths[0])]);
    run("qemu-io", &["-c", "write 128k 192k", "-c", "write -z 512k 64k", text(&paths[1])]);
    run("qemu-io", &["-c", "write 64k 128k", text(&paths[2])]);
    let run = paths.iter().map(|p| RunLayer::active(&open(p)).unwrap()).collect();
    assert_eq!(visible_bytes(run).unwrap(), [(64 + 192) << 10, 128 << 10, 128 << 10]);
}

/// A cancelled merge leaks nothing and can be repeated.
#[test]
fn cancelled_merge_leaks_nothing_and_can_repeat() {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice::new(77);
    let shape = Shape { depth: 4, cluster_bits: &[9], resized: false, snapshots: false, writes: 30 };
    let chain = build(dir.path(), &mut dice, shape);
    let expected = read(&chain[3].path, None);
    for stop_after in [0, 1, 5, 20] {
        let looks = std::cell::Cell::new(0);
        let cancelled = || {
            looks.set(looks.get() + 1);
            looks.get() > stop_after
        };
        let moving = Moving { progress: &|_| {}, cancelled: &cancelled };
        let e = merge_chain(&chain, 1, 1, &moving).unwrap_err();
        assert_eq!(e.kind(), ErrorKind::Cancelled);
        assert_same(&read(&chain[3].path, None), &expected, "the top after a cancel");
        check(&chain[1].path, false);
    }
    merge_chain(&chain, 1, 1, &Moving::quietly()).unwrap();
    assert_same(&read(&chain[1].path, None), &expected, "the merged layer");
    check(&chain[1].path, false);
}
