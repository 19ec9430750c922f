//! Deleting an external snapshot when there is nothing to move.

use std::time::Duration;

use anyhow::Result;

use crate::bench::Bench;
use crate::chain::{Chain, Shape};
use crate::child;
use crate::row::{OURS, Row, Target};

/// The rows of [`measure`].
pub const ROWS: &[&str] = &["nothing-delete", "nothing-delete-deep"];

/// A twentieth of 1.88 s, which virsh of libvirt 11.3 took.
const TWENTIETH: Duration = Duration::from_millis(94);

/// On a chain of one, and on one of 200.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let deep = if bench.quick { 20 } else { 198 };
    [(ROWS[0], 0), (ROWS[1], deep)].into_iter().map(|(name, below)| delete(bench, name, below)).collect()
}

fn delete(bench: &Bench, name: &'static str, below: u32) -> Result<Row> {
    let place = bench.place("nothing")?;
    let shape = Shape { snapshots: below, size: 4 << 30, extents: 4, extent: 256 << 10, orderly: false };
    let chain = Chain::make(bench, &place.path().join("ours"), shape)?;
    let what = format!("delete of an external snapshot, nothing written since, {below} snapshots below");
    let mut row = Row::new(name, what, &[Target::Under(TWENTIETH)]);
    let delete = || chain.delete(bench, &["extra".to_owned()]);
    bench.repeat(9, Duration::from_secs(20), |_| {
        child::run(&mut chain.create(bench, "extra"))?;
        bench.time(&mut row, OURS, &mut delete())
    })?;
    chain.check(chain.snapshots() as usize + 1, 2)?;
    child::run(&mut chain.create(bench, "extra"))?;
    row.flushes(OURS, child::flushes(&delete())?);
    row.note(
        "the peer, virsh, was not measured in this run: the target is a twentieth of the 1.88 s that libvirt 11.3 \
         took elsewhere; 200 deep it refuses",
    );
    Ok(row)
}
