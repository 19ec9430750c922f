//! Moving data: many layers made one, and a point copied out whole.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Result;

use crate::bench::{self, Bench};
use crate::chain::{self, Chain, GUEST, Shape};
use crate::child::{self, Cost};
use crate::image::{self, Extent};
use crate::row::{OURS, Row, Target};

/// The rows of [`merge`].
pub const MERGE: &[&str] = &["merge-8", "merge-32", "merge-128"];
/// The row of [`flatten`].
pub const FLATTEN: &[&str] = &["flatten"];

pub(super) const CP: &str = "cp + sync";

/// All snapshots of a domain deleted at once.
pub fn merge(bench: &Bench) -> Result<Vec<Row>> {
    let targets = [Target::Faster(1.0), Target::Within(1.3, CP)];
    let shapes = [(8, 64u32), (32, 64), (128, 40)];
    MERGE
        .iter()
        .zip(shapes)
        .filter(|(name, (snapshots, _))| bench.wants(name) && !(bench.quick && *snapshots > 32))
        .map(|(name, (snapshots, extents))| {
            let shape = Shape { snapshots, size: 4 << 30, extents, extent: 256 << 10, orderly: false };
            let what = format!(
                "delete of {snapshots} external snapshots at once, {} MiB scattered in each layer",
                (u64::from(extents) * shape.extent) >> 20
            );
            let mut row = Row::new(name, what, &targets);
            let place = bench.place(name)?;
            bench.repeat(3, Duration::from_secs(45), |repetition| {
                merge_once(bench, &mut row, place.path(), shape, repetition, |_| Ok(()))
            })?;
            row.note("cp + sync: a file of as many bytes as domsnap moved");
            Ok(row)
        })
        .collect()
}

/// One chain made, merged by each side. `between` is called with the label before and after each side.
pub fn merge_once(
    bench: &Bench,
    row: &mut Row,
    place: &Path,
    shape: Shape,
    repetition: usize,
    mut around: impl FnMut(Around<'_>) -> Result<()>,
) -> Result<()> {
    let root = place.join(format!("ours{repetition}"));
    let chain = Chain::make(bench, &root, shape)?;
    let commit = |directory: &str, args: &[&str]| -> Result<(Command, std::path::PathBuf)> {
        let top = chain.copy_images(&place.join(format!("{directory}{repetition}")))?;
        let base = image::chain(&top)?.pop().unwrap_or_else(|| top.clone());
        let mut command = child::command("qemu-img", &["commit", "-q", "-d"]);
        command.args(args).arg("-b").arg(&base).arg(&top);
        Ok((command, base))
    };
    let (plain, base) = commit("theirs", &[])?;
    let (direct, _) = commit("direct", &["-t", "none"])?;
    let before = chain.allocated()?;
    let names: Vec<String> = (1..=chain.snapshots()).map(chain::name).collect();
    let mut sides = [
        (OURS, chain.delete(bench, &names)),
        ("qemu-img commit -d -b", plain),
        ("qemu-img commit -d -t none -b", direct),
    ];
    sides.rotate_left(repetition % 3);
    for (label, mut command) in sides {
        around(Around::Before)?;
        bench.time(row, label, &mut command)?;
        around(Around::After(row, label))?;
    }
    if repetition == 0 {
        chain.check(1, 1)?;
        image::check(&base)?;
        image::compare(&chain.disk(), &base)?;
    }
    let moved = chain.moved(&before)?;
    copy_and_sync(row, &place.join("copied"), moved)?;
    for directory in ["ours", "theirs", "direct"] {
        std::fs::remove_dir_all(place.join(format!("{directory}{repetition}")))?;
    }
    image::flush(place)
}

/// When [`merge_once`] reports a side.
pub enum Around<'a> {
    /// It is about to run.
    Before,
    /// It ran.
    After(&'a mut Row, &'a str),
}

/// A sample of what `cp` and `sync` of so many bytes take.
pub(super) fn copy_and_sync(row: &mut Row, file: &Path, bytes: u64) -> Result<()> {
    let copy = file.with_extension("copy");
    bench::fill(file, bytes)?;
    image::flush(file)?;
    let mut cp = child::command("cp", &["--reflink=never", "--sparse=never"]);
    let cost = sum(child::run(cp.arg(file).arg(&copy))?, child::run(&mut child::command("sync", &[&copy]))?);
    row.sample(CP, cost);
    std::fs::remove_file(file)?;
    std::fs::remove_file(copy)?;
    Ok(())
}

fn sum(one: Cost, other: Cost) -> Cost {
    Cost { wall: one.wall + other.wall, peak: one.peak.max(other.peak), cpu: one.cpu + other.cpu }
}

/// A point of 1 GiB copied out into an image of its own.
pub fn flatten(bench: &Bench) -> Result<Vec<Row>> {
    let mut row = Row::new(FLATTEN[0], flatten_what(bench), &[Target::Faster(1.0), Target::Within(1.3, CP)]);
    let place = bench.place(FLATTEN[0])?;
    flatten_on(bench, &mut row, place.path(), |_| Ok(()))?;
    row.note("qemu-img convert does not flush: a sync of its file is added");
    Ok(vec![row])
}

/// What [`flatten_on`] does, as text.
pub fn flatten_what(bench: &Bench) -> String {
    let mebibytes = flatten_bytes(bench) >> 20;
    format!("revert to an internal point that must be copied out, {mebibytes} MiB, nothing below")
}

fn flatten_bytes(bench: &Bench) -> u64 {
    if bench.quick { 128 << 20 } else { 1 << 30 }
}

/// The samples of the flatten row, in `place`.
pub fn flatten_on(
    bench: &Bench,
    row: &mut Row,
    place: &Path,
    mut around: impl FnMut(Around<'_>) -> Result<()>,
) -> Result<()> {
    let bytes = flatten_bytes(bench);
    let shape = Shape { snapshots: 0, size: bytes, extents: 0, extent: 1 << 20, orderly: true };
    let chain = Chain::make(bench, &place.join("ours"), shape)?;
    let extents: Vec<_> = (0..bytes >> 24).map(|n| Extent { offset: n << 24, length: 16 << 20 }).collect();
    image::write(&chain.disk(), &extents, 6)?;
    child::run(&mut chain.domsnap(bench, &["create", GUEST, "inside", "--internal"]))?;
    image::write(&chain.disk(), &[Extent { offset: 0, length: 16 << 20 }], 8)?;
    child::run(&mut chain.create(bench, "outside"))?;
    let source = place.join("source.qcow2");
    image::copy(&image::chain(&chain.disk())?.swap_remove(1), &source)?;
    let converted = place.join("converted.qcow2");
    let convert = |options: &[&str]| {
        let mut command = child::command("qemu-img", &["convert", "-q", "-f", "qcow2", "-O", "qcow2"]);
        command.args(options).args(["-l", "inside"]).arg(&source).arg(&converted);
        command
    };
    let peers: [(&str, &[&str]); 3] = [
        ("qemu-img convert + sync", &[]),
        ("qemu-img convert -m 16 -W + sync", &["-m", "16", "-W"]),
        ("qemu-img convert -m 16 -W -t none + sync", &["-m", "16", "-W", "-t", "none"]),
    ];
    bench.repeat(5, Duration::from_secs(30), |repetition| {
        around(Around::Before)?;
        let mut revert = chain.domsnap(bench, &["revert", GUEST, "inside"]);
        bench.time(row, OURS, &mut revert)?;
        around(Around::After(row, OURS))?;
        for (label, options) in peers {
            around(Around::Before)?;
            let converting = child::run(&mut convert(options))?;
            row.sample(label, sum(converting, child::run(&mut child::command("sync", &[&converted]))?));
            around(Around::After(row, label))?;
            if repetition == 0 {
                image::check(&chain.disk())?;
                image::compare(&chain.disk(), &converted)?;
            }
            std::fs::remove_file(&converted)?;
            image::flush(place)?;
        }
        copy_and_sync(row, &place.join("copied"), bytes)?;
        // Away from the copy again, which thereby goes.
        child::run(&mut chain.domsnap(bench, &["revert", GUEST, "outside"]))?;
        image::flush(place)
    })
}
