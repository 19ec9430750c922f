//! The same movements where the file system can share blocks: nothing should be copied.

use anyhow::Result;

use crate::bench::Bench;
use crate::chain::Shape;
use crate::place::LoopMount;
use crate::row::{Row, Target};
use crate::rows::merging::{self, Around};
use std::time::Duration;

/// The rows of [`xfs`].
pub const XFS: &[&str] = &["xfs-flatten", "xfs-merge-8"];
/// The rows of [`btrfs`].
pub const BTRFS: &[&str] = &["btrfs-flatten", "btrfs-merge-8"];

/// Metadata of file system and images that a movement without data may write.
const METADATA: u64 = 16 << 20;

/// On xfs.
pub fn xfs(bench: &Bench) -> Result<Vec<Row>> {
    on(bench, "xfs", XFS)
}

/// On btrfs.
pub fn btrfs(bench: &Bench) -> Result<Vec<Row>> {
    on(bench, "btrfs", BTRFS)
}

fn on(bench: &Bench, kind: &str, names: &[&'static str]) -> Result<Vec<Row>> {
    let place = bench.place(kind)?;
    let layer: u64 = if bench.quick { 16 << 20 } else { 128 << 20 };
    let shape = Shape { snapshots: 8, size: 4 << 30, extents: 8, extent: layer / 8, orderly: true };
    let targets = [Target::Faster(5.0), Target::Written(METADATA)];
    let mut flatten = Row::new(names[0], format!("{} ({kind})", merging::flatten_what(bench)), &targets);
    let what = format!(
        "delete of 8 external snapshots at once, {} MiB in one piece in each layer ({kind})",
        layer >> 20
    );
    let mut merge = Row::new(names[1], what, &targets);
    if !rustix::process::geteuid().is_root() {
        for row in [&mut flatten, &mut merge] {
            row.note("not measured: to mount a loop device takes root");
        }
        return Ok(vec![flatten, merge]);
    }
    let mount = LoopMount::make(place.path(), kind, 24 << 30)?;
    if bench.wants(names[0]) {
        let directory = mount.path().join("flatten");
        std::fs::create_dir(&directory)?;
        let mut before = 0;
        merging::flatten_on(bench, &mut flatten, &directory, |around| count(&mount, &mut before, around))?;
        std::fs::remove_dir_all(&directory)?;
    }
    if bench.wants(names[1]) {
        let mut before = 0;
        bench.repeat(3, Duration::from_secs(20), |repetition| {
            merging::merge_once(bench, &mut merge, mount.path(), shape, repetition, |around| {
                count(&mount, &mut before, around)
            })
        })?;
    }
    Ok(vec![flatten, merge])
}

/// What the device was written by one side, the file system's own writing included.
fn count(mount: &LoopMount, before: &mut u64, around: Around<'_>) -> Result<()> {
    match around {
        Around::Before => *before = mount.written()?,
        Around::After(row, label) => row.written(label, mount.written()? - *before),
    }
    Ok(())
}
