//! Power loss at every write and every flush of a merge. Any part of what was not flushed may be lost. The
//! top of the run reads the same, the target's snapshots are intact, and the merge can be repeated.

#[path = "../../tests/chain/mod.rs"]
mod chain;

use std::path::Path;

use super::crash_tests::crashed;
use super::header::Backing;
use super::merge::{RunBacking, merge};
use super::open::{Image, OpenOptions};
use super::recorder::Recorder;
use super::transfer::Moving;
use super::view::{RunLayer, View};
use chain::{Dice, Made, Shape, assert_same, build};

fn layer(made: &Made) -> RunLayer {
    RunLayer::active(&Image::open(&made.path, &OpenOptions::read_only().unlocked()).unwrap()).unwrap()
}

fn layers(chain: &[Made]) -> Vec<RunLayer> {
    chain.iter().map(layer).collect()
}

fn read(run: Vec<RunLayer>) -> Vec<u8> {
    let mut view = View::new(run).unwrap();
    let mut bytes = vec![0; view.size() as usize];
    view.read_at(&mut bytes, 0, None).unwrap();
    bytes
}

fn tags(image: &Image, under: &[RunLayer]) -> Vec<Vec<u8>> {
    let of = |s| {
        let mut run = under.to_vec();
        run.push(RunLayer::snapshot(image, s).unwrap());
        read(run)
    };
    image.snapshots().unwrap().iter().map(of).collect()
}

fn do_merge(chain: &[Made], low: usize, into: usize, image: &mut Image) {
    let name = |made: &Made| made.path.file_name().unwrap().to_str().unwrap().to_owned();
    let mut reader = (low > 0).then(|| View::new(layers(&chain[..low])).unwrap());
    let below = reader.as_mut().map(|reader| RunBacking {
        backing: Backing { file: name(&chain[low - 1]), format: Some("qcow2".to_owned()) },
        reader,
    });
    merge(layers(&chain[low..into]), image, layers(&chain[into + 1..]), below, &Moving::quietly()).unwrap();
}

fn crash_in_merges(salt: u64, cases: u64, shape: Shape) {
    let (mut switched, mut not_switched) = (0, 0);
    for seed in 0..cases {
        let mut dice = Dice::new(salt << 32 | seed);
        let dir = tempfile::tempdir().unwrap();
        let chain = build(dir.path(), &mut dice, shape);
        let top = chain.len() - 1;
        let low = dice.below(top as u64) as usize;
        let free = chain[low].tags.is_empty() && chain.iter().all(|made| made.tags.is_empty());
        let into = if free { low + dice.below((top - low + 1) as u64) as usize } else { low };
        if !chain[into].tags.is_empty() && chain[into].version == 2 && chain[into].size != chain[top].size {
            continue;
        }
        let expected = read(layers(&chain));
        let base = std::fs::read(&chain[into].path).unwrap();
        let before = Image::open(&chain[into].path, &OpenOptions::read_only().unlocked()).unwrap();
        let under = layers(&chain[..low]);
        let tagged = tags(&before, &under);

        let recorder = Recorder::new(base.clone());
        let mut image = Image::from_file(recorder.open(true)).unwrap();
        do_merge(&chain, low, into, &mut image);
        let new_backing = image.header().backing.clone();
        drop(image);
        let log = recorder.log();
        assert!(!log.is_empty(), "case {seed} wrote nothing");
        // Long logs are tested at about 30 places, different ones for each case.
        let stride = (log.len() / 30).max(1);
        for at in (seed as usize % stride..=log.len()).step_by(stride) {
            for loss in [0, 1, 9 + at as u64 * 7] {
                let what = format!(
                    "case {seed}: {low}..={top} into {into}, before event {at} of {}, loss {loss}",
                    log.len()
                );
                let bytes = crashed(&base, &log, at, loss);
                let again = Recorder::new(bytes);
                let mut image = Image::from_file(again.open(true)).unwrap();
                let own = RunLayer::active(&image).unwrap();
                let report = image.check().unwrap();
                assert!(report.is_sound(), "{what}: {report:?}");
                let mut run = layers(&chain[..low]);
                if into > low && image.header().backing == new_backing {
                    switched += 1;
                    let mut alone = run.clone();
                    alone.push(own.clone());
                    assert_same(&read(alone), &expected, &format!("the target by itself; {what}"));
                } else {
                    not_switched += 1;
                    run.extend(layers(&chain[low..into]));
                }
                run.push(own);
                run.extend(layers(&chain[into + 1..]));
                assert_same(&read(run), &expected, &format!("the top; {what}"));
                if into == low {
                    for (now, then) in tags(&image, &under).iter().zip(&tagged) {
                        assert_same(now, then, &format!("a snapshot; {what}"));
                    }
                }
                do_merge(&chain, low, into, &mut image);
                drop(image);
                let image = Image::from_file(again.open(false)).unwrap();
                let mut run = layers(&chain[..low]);
                run.push(RunLayer::active(&image).unwrap());
                assert_same(&read(run), &expected, &format!("merged again; {what}"));
                assert_eq!(image.header().backing, new_backing, "{what}");
                assert!(image.check().unwrap().is_sound(), "{what}: after merging again");
            }
        }
        assert!(chain[into].path.starts_with(Path::new(dir.path())));
    }
    assert!(not_switched > 0 && (switched > 0 || shape.snapshots), "the crashes did not reach both sides");
}

/// A crash in a merge of plain layers changes nothing that the guest sees.
#[test]
fn merge_crash_changes_nothing_visible() {
    crash_in_merges(
        11,
        4,
        Shape { depth: 4, cluster_bits: &[9, 12, 14], resized: true, snapshots: false, writes: 10 },
    );
}

/// A crash in a merge into a layer with snapshots leaves the snapshots intact.
#[test]
fn merge_crash_leaves_snapshots_intact() {
    crash_in_merges(
        12,
        4,
        Shape { depth: 3, cluster_bits: &[9, 10], resized: false, snapshots: true, writes: 10 },
    );
}
