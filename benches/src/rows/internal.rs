//! Internal snapshots: create, apply and delete on one image.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::bench::Bench;
use crate::child;
use crate::image::{self, Extent};
use crate::row::{OURS, Row, Target};

/// The rows of [`huge`].
pub const HUGE: &[&str] = &["huge-create", "huge-apply", "huge-delete"];
/// The rows of [`quarter`].
pub const QUARTER: &[&str] = &["quarter-create", "quarter-apply", "quarter-delete"];

const CLUSTER: u64 = 64 << 10;
const TAG: &str = "point";

/// An image of 1 TiB whose every cluster is allocated.
pub fn huge(bench: &Bench) -> Result<Vec<Row>> {
    let size: u64 = if bench.quick { 64 << 30 } else { 1 << 40 };
    let place = bench.place("huge")?;
    let (ours, theirs) = (place.path().join("ours.qcow2"), place.path().join("theirs.qcow2"));
    image::create(&theirs, size, "cluster_size=65536,preallocation=metadata")?;
    image::copy(&theirs, &ours)?;
    let targets = [Target::Faster(20.0), Target::Memory(300 << 20), Target::Flushes(4)];
    let what = format!("{} GiB, every cluster allocated, 64 KiB clusters", size >> 30);
    let mut rows = cycle_rows(HUGE, &what, &targets);
    cycles(bench, &mut rows, &ours, &theirs, (3, Duration::from_secs(90)))?;
    // 8 bytes of L2 table and 2 of refcount a cluster: every one changes at create (its COPIED bit goes) and
    // delete.
    let tables = size / CLUSTER * 10;
    bench.rewrite_limit(&mut rows[0], tables, 3)?;
    bench.rewrite_limit(&mut rows[2], tables, 3)?;
    // At apply the tables that differ, here one, and the L1 table.
    bench.rewrite_limit(&mut rows[1], size / CLUSTER / 8192 * 8 + 2 * CLUSTER, 3)?;
    rows[0].note("limit: read and rewrite of all L2 tables and refcount blocks as one file, 3 flushes");
    rows[1].note("limit: the L1 table and the one L2 table that differs, 3 flushes");
    Ok(rows)
}

/// An image of 2 GiB, a quarter of it allocated.
pub fn quarter(bench: &Bench) -> Result<Vec<Row>> {
    let size: u64 = 2 << 30;
    let place = bench.place("quarter")?;
    let (ours, theirs) = (place.path().join("ours.qcow2"), place.path().join("theirs.qcow2"));
    image::create(&theirs, size, "cluster_size=65536")?;
    let extents: Vec<_> = (0..256).map(|n| Extent { offset: n * (8 << 20), length: 2 << 20 }).collect();
    image::write(&theirs, &extents, 7)?;
    image::copy(&theirs, &ours)?;
    let what = "2 GiB, a quarter allocated, 64 KiB clusters";
    let mut rows = cycle_rows(QUARTER, what, &[Target::Faster(1.0)]);
    cycles(bench, &mut rows, &ours, &theirs, (15, Duration::from_secs(10)))?;
    for row in &mut rows {
        // 4 L2 tables, the refcount block, L1, header, snapshot table.
        bench.rewrite_limit(row, 8 * CLUSTER, 3)?;
    }
    rows[0].note("limit: read and rewrite of 8 clusters of metadata, 3 flushes");
    Ok(rows)
}

fn cycle_rows(names: &[&'static str], what: &str, targets: &[Target]) -> Vec<Row> {
    let verbs = ["create", "apply", "delete"];
    names.iter().zip(verbs).map(|(name, verb)| Row::new(name, format!("{verb}: {what}"), targets)).collect()
}

/// Create, a write of one cluster, apply, delete, again and again, on two equal images.
fn cycles(
    bench: &Bench,
    rows: &mut [Row],
    ours: &Path,
    theirs: &Path,
    (most, budget): (usize, Duration),
) -> Result<()> {
    let state = ours.with_extension("state");
    let args = ["create", "revert", "delete"];
    let domsnap = |operation: usize| {
        let mut command = bench.domsnap(&state, &["disk", args[operation]]);
        command.arg(ours).arg(TAG);
        command
    };
    let qemu = |operation: usize| image::qemu_img(&["snapshot", ["-c", "-a", "-d"][operation], TAG], theirs);
    let between = |operation: usize, file: &Path| match operation {
        0 => image::write(file, &[Extent { offset: 0, length: CLUSTER }], 9),
        _ => Ok(()),
    };
    bench.repeat(most, budget, |repetition| {
        for (operation, row) in rows.iter_mut().enumerate() {
            bench.alternate(
                row,
                repetition,
                [(OURS, domsnap(operation)), ("qemu-img snapshot", qemu(operation))],
            )?;
            if repetition == 0 {
                check(operation, ours)?;
            }
            between(operation, ours)?;
            between(operation, theirs)?;
        }
        Ok(())
    })?;
    image::compare(ours, theirs)?;
    for (operation, row) in rows.iter_mut().enumerate() {
        row.flushes(OURS, child::flushes(&domsnap(operation))?);
        check(operation, ours)?;
        between(operation, ours)?;
    }
    count_theirs(bench, rows, theirs, qemu)
}

fn check(operation: usize, file: &Path) -> Result<()> {
    image::check(file)?;
    match operation {
        2 => image::has_snapshots(file, 0, None, Some(TAG)),
        _ => image::has_snapshots(file, 1, Some(TAG), None),
    }
}

/// Where that takes no minutes.
fn count_theirs(
    bench: &Bench,
    rows: &mut [Row],
    theirs: &Path,
    qemu: impl Fn(usize) -> Command,
) -> Result<()> {
    let slow = rows.iter().filter_map(Row::best_peer).any(|series| series.median() > 5.0);
    if slow && !bench.quick {
        rows[0].note("qemu-img's flushes are not counted here: one more cycle would take too long");
        return Ok(());
    }
    for (operation, row) in rows.iter_mut().enumerate() {
        row.flushes("qemu-img snapshot", child::flushes(&qemu(operation))?);
    }
    image::has_snapshots(theirs, 0, None, None)
}
