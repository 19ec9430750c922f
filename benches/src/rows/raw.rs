//! Snapshots of a large raw image where blocks can be shared.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::bench::{self, Bench};
use crate::child;
use crate::image;
use crate::place::LoopMount;
use crate::row::{OURS, Row, Target};

/// The rows of [`measure`].
pub const ROWS: &[&str] = &["raw-reflink-xfs", "raw-reflink-btrfs"];

/// The image, where there is room for it and a copy of it.
const SIZE: u64 = 16 << 30;

/// What must stay free on the file system under ours.
const SPARE: u64 = 4 << 30;

const IOCTL: &str = "FICLONE alone";
const DURABLE: &str = "FICLONE, flushed";
const CP: &str = "cp";

/// A create of one raw disk that holds data everywhere, beside the bare call and beside `cp`.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    ROWS.iter()
        .zip(["xfs", "btrfs"])
        .filter(|(name, _)| bench.wants(name))
        .map(|(name, kind)| on(bench, name, kind))
        .collect()
}

fn on(bench: &Bench, name: &'static str, kind: &str) -> Result<Row> {
    let place = bench.place(kind)?;
    let stat = rustix::fs::statvfs(place.path()).context("ask how much is free")?;
    let room = (stat.f_bavail * stat.f_frsize).saturating_sub(SPARE) / 2;
    let wanted = if bench.quick { 1 << 30 } else { SIZE };
    let size = std::iter::successors(Some(wanted), |size| Some(size / 2)).find(|size| *size <= room);
    let size = size.filter(|size| *size >= 1 << 20).context("there is no room for an image and its copy")?;
    let targets = [Target::Within(2.0, IOCTL), Target::FasterThan(100.0, CP)];
    let what = format!("create of one raw disk of {} MiB, all of it data ({kind})", size >> 20);
    let mut row = Row::new(name, what, &targets);
    if !rustix::process::geteuid().is_root() {
        row.note("not measured: to mount a loop device takes root");
        return Ok(row);
    }
    if size < wanted {
        row.note(format!(
            "of {} MiB, since there is no room for {} MiB and a copy",
            size >> 20,
            wanted >> 20
        ));
    }
    row.note("domsnap: with its journal and catalogue, all durable; FICLONE alone: nothing is durable; cp: --reflink=never, not flushed");
    let mount = LoopMount::make(place.path(), kind, 2 * size + (4 << 30))?;
    let (disk, state) = (mount.path().join("disk.raw"), place.path().join("state"));
    bench::fill(&disk, size)?;
    image::flush(&disk)?;
    let args = ["domain", "add", "guest", "--disk", &format!("vda={},format=raw", disk.display())];
    child::run(&mut bench.domsnap(&state, &args))?;
    bench.repeat(9, Duration::from_secs(30), |repetition| {
        let (bare, flushed) = (mount.path().join("bare"), mount.path().join("flushed"));
        let sides = [
            (OURS, bench.domsnap(&state, &["create", "guest", "s", "--disk", "vda=reflink"])),
            (IOCTL, bench.probe(&["clone".as_ref(), disk.as_os_str(), bare.as_os_str()])?),
            (
                DURABLE,
                bench.probe(&[
                    "clone".as_ref(),
                    disk.as_os_str(),
                    flushed.as_os_str(),
                    "--durable".as_ref(),
                ])?,
            ),
        ];
        bench.alternate(&mut row, repetition, sides)?;
        if repetition == 0 {
            same(&disk, &point(mount.path())?)?;
        }
        child::run(&mut bench.domsnap(&state, &["delete", "guest", "s"]))?;
        for clone in [bare, flushed] {
            std::fs::remove_file(clone)?;
        }
        Ok(())
    })?;
    let create = bench.domsnap(&state, &["create", "guest", "counted", "--disk", "vda=reflink"]);
    row.flushes(OURS, child::flushes(&create)?);
    child::run(&mut bench.domsnap(&state, &["delete", "guest", "counted"]))?;
    bench.repeat(2, Duration::from_secs(60), |_| {
        let copy = mount.path().join("copy");
        let mut cp = child::command("cp", &["--reflink=never", "--sparse=never"]);
        bench.time(&mut row, CP, cp.arg(&disk).arg(&copy))?;
        std::fs::remove_file(copy)?;
        Ok(())
    })?;
    Ok(row)
}

/// The only point that lies in `directory`.
fn point(directory: &Path) -> Result<std::path::PathBuf> {
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with("disk.ds-") {
            return Ok(entry.path());
        }
    }
    anyhow::bail!("the create left no point in {}", directory.display())
}

/// Both are as long, and hold the same in a hundred places: to read all of both would empty every cache.
fn same(one: &Path, other: &Path) -> Result<()> {
    let (a, b) = (File::open(one)?, File::open(other)?);
    let length = a.metadata()?.len();
    ensure!(b.metadata()?.len() == length, "{} is not as long as {}", other.display(), one.display());
    let (mut left, mut right) = ([0; 4096], [0; 4096]);
    for at in (0..100).map(|part| part * (length - 4096) / 99) {
        a.read_exact_at(&mut left, at)?;
        b.read_exact_at(&mut right, at)?;
        ensure!(left == right, "{} differs from {} near {at}", other.display(), one.display());
    }
    Ok(())
}
