//! VHD at rest: snapshots, lists and merges of differencing chains, and copies. No program that is installed
//! with QEMU does the first three; vhd-util's figures are from another run, and are notes.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use backend_vhd::image::{Chain, ChainOptions, NewImage, write_into};

use super::merging::{CP, copy_and_sync};
use crate::bench::Bench;
use crate::child;
use crate::image;
use crate::row::{OURS, Row, Target};

/// The rows of [`measure`].
pub const ROWS: &[&str] =
    &["vhd-snapshot", "vhd-overlaps", "vhd-list-129", "vhd-merge", "vhd-merge-largest", "vhd-copy"];

/// The largest disk, and its blocks.
const LARGEST: u64 = 2040 << 30;
const BLOCK: u64 = 2 << 20;
/// What vhd-util (blktap 79774319) took on another machine, under load. Counts are exact, times minima.
const PEER: &str = "vhd-util of blktap 79774319, measured elsewhere: ";
const WRITTEN: &str = "KiB written to images";

type Measure = fn(&Bench, &'static str) -> Result<Row>;

/// All of them.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let measures: [Measure; 6] = [snapshot, overlaps, list, merge, merge_largest, copy];
    let rows = ROWS.iter().zip(measures).filter(|(name, _)| bench.wants(name));
    rows.map(|(name, measure)| measure(bench, name).with_context(|| (*name).to_owned())).collect()
}

/// A disk in a directory of its own.
struct Disk {
    place: tempfile::TempDir,
}

impl Disk {
    fn new(bench: &Bench, size: u64) -> Result<Self> {
        let disk = Self { place: bench.place("vhd")? };
        let file = File::options().read(true).write(true).create_new(true).open(disk.path())?;
        write_into(file, &disk.path(), &NewImage::new(size))?;
        Ok(disk)
    }

    fn path(&self) -> PathBuf {
        self.place.path().join("disk.vhd")
    }

    fn run(&self, bench: &Bench, verb: &str, names: &[&str]) -> Command {
        let image = format!("{},format=vhd", self.path().display());
        let mut command = bench.domsnap(&self.place.path().join("state"), &[verb, image.as_str()]);
        command.args(names);
        command
    }

    /// Writes pieces of the disk, durably.
    fn write(&self, pieces: impl IntoIterator<Item = (u64, u64)>) -> Result<()> {
        let mut chain = Chain::open(&self.path(), &ChainOptions::read_write())?;
        for (at, length) in pieces {
            chain.write_at(&vec![7; length as usize], at)?;
        }
        chain.flush()?;
        image::flush(&self.path())
    }
}

/// Bytes that a command writes to files, except to SQLite's log, in KiB.
fn written(command: &Command) -> Result<usize> {
    let calls = child::traced(command, "pwrite64,copy_file_range")?;
    let bytes = calls.iter().filter_map(|line| line.rsplit_once("= ")?.1.trim().parse::<u64>().ok());
    Ok((bytes.sum::<u64>() / 1024) as usize)
}

/// A snapshot of the largest disk; the second one is on the first one's child.
fn snapshot(bench: &Bench, name: &'static str) -> Result<Row> {
    let targets = [Target::Under(Duration::from_millis(20))];
    let mut row = Row::new(name, "create of one VHD of 2040 GiB, one snapshot deeper each time", &targets);
    let disk = Disk::new(bench, LARGEST)?;
    bench.repeat(9, Duration::from_secs(20), |number| {
        bench.time(&mut row, OURS, &mut disk.run(bench, "create", &[&format!("s{number}")]))
    })?;
    row.flushes(OURS, child::flushes(&disk.run(bench, "create", &["counted"]))?);
    row.note("domsnap: with its journal and catalogue; at most two of its flushes are of images, which a test asserts");
    row.note(format!("{PEER}snapshot at depth 1, 30 and 128: 19, 39 and 116 ms, and 6, 35 and 133 flushes"));
    Ok(row)
}

/// A snapshot of the largest disk with every block stored: before it, no two of them may overlap.
fn overlaps(bench: &Bench, name: &'static str) -> Result<Row> {
    let targets = [Target::Under(Duration::from_millis(500))];
    let mut row =
        Row::new(name, "create of one VHD of 2040 GiB, all 1,044,480 blocks stored and compared", &targets);
    bench.repeat(3, Duration::from_secs(30), |_| {
        let disk = Disk::new(bench, LARGEST)?;
        let blocks = LARGEST / BLOCK;
        let first = (4096 + blocks * 4 + 512u64).next_multiple_of(4096) + 4096;
        let entry = |block: u64| ((first + block * (BLOCK + 4096) - 512) / 512) as u32;
        let table: Vec<u8> = (0..blocks).flat_map(|block| entry(block).to_be_bytes()).collect();
        let file = File::options().read(true).write(true).open(disk.path())?;
        let mut footer = [0; 512];
        file.read_exact_at(&mut footer, 0)?;
        file.write_all_at(&table, 4096)?;
        file.write_all_at(&footer, first + blocks * (BLOCK + 4096) - 4096)?;
        drop(file);
        image::flush(&disk.path())?;
        bench.time(&mut row, OURS, &mut disk.run(bench, "create", &["one"]))
    })?;
    row.note(format!("{PEER}the check of a full image of 64 GiB alone takes 2.0 s of processor time"));
    Ok(row)
}

/// The list of a chain of 129 layers.
fn list(bench: &Bench, name: &'static str) -> Result<Row> {
    let layers = if bench.quick { 20 } else { 128 };
    let targets = [Target::Under(Duration::from_millis(10)), Target::Flushes(0)];
    let mut row = Row::new(name, format!("list of a VHD with {layers} snapshots, 2 GiB"), &targets);
    let disk = Disk::new(bench, 2 << 30)?;
    let deep = |mut command: Command| {
        command.args(["--max-depth", "200"]);
        command
    };
    for number in 0..layers {
        child::run(&mut deep(disk.run(bench, "create", &[&format!("s{number}")])))?;
    }
    bench.repeat(9, Duration::from_secs(10), |_| {
        bench.time(&mut row, OURS, &mut deep(disk.run(bench, "list", &[])))
    })?;
    row.flushes(OURS, child::flushes(&deep(disk.run(bench, "list", &[])))?);
    row.note(format!("{PEER}query -d of 129 layers: 62 to 395 ms and 129 flushes; scan -a: 46 ms"));
    Ok(row)
}

/// Pieces of 64 KiB and a little more, scattered over a disk of 2 GiB: 10.7 MB.
fn scattered() -> impl Iterator<Item = (u64, u64)> {
    (0..163u64).map(|number| (number * 7919 % 1000 * BLOCK + number % 7 * 65536, 65536 + 512 * (number % 3)))
}

/// A merge of what is scattered in a child into a parent that stores nothing there.
fn merge(bench: &Bench, name: &'static str) -> Result<Row> {
    let bytes: u64 = scattered().map(|(_, length)| length).sum();
    let most = (bytes * 102 / 100 + 163 * 512 + 65536) / 1024;
    let targets = [Target::Within(1.3, CP), Target::Count(WRITTEN, most as usize)];
    let mut row = Row::new(
        name,
        format!("delete: {} KiB in 163 pieces into a sparse VHD of 2 GiB", bytes >> 10),
        &targets,
    );
    let prepared = || -> Result<Disk> {
        let disk = Disk::new(bench, 2 << 30)?;
        // More than is merged, so that the merge goes into the layer below.
        disk.write([(1001 * BLOCK, 16 << 20)])?;
        child::run(&mut disk.run(bench, "create", &["one"]))?;
        disk.write(scattered())?;
        child::run(&mut disk.run(bench, "create", &["two"]))?;
        Ok(disk)
    };
    bench.repeat(5, Duration::from_secs(30), |_| {
        let disk = prepared()?;
        bench.time(&mut row, OURS, &mut disk.run(bench, "delete", &["one"]))?;
        copy_and_sync(&mut row, &disk.place.path().join("copied"), bytes)
    })?;
    let disk = prepared()?;
    row.count(WRITTEN, written(&disk.run(bench, "delete", &["one"]))?);
    row.note("written: with bitmaps, table, catalogue and journal; cp + sync: a file of as many bytes");
    row.note(format!("{PEER}943 writes of 328.8 MB, 791 to 1,778 ms; with -s 12.2 MB, 133 to 291 ms"));
    Ok(row)
}

/// A merge of 64 blocks into a parent of the largest size.
fn merge_largest(bench: &Bench, name: &'static str) -> Result<Row> {
    let targets = [Target::Count(WRITTEN, 5_000_000 / 1024)];
    let mut row = Row::new(name, "delete: 64 pieces of 64 KiB into a sparse VHD of 2040 GiB", &targets);
    let prepared = || -> Result<Disk> {
        let disk = Disk::new(bench, LARGEST)?;
        disk.write([(1 << 30, 16 << 20)])?;
        child::run(&mut disk.run(bench, "create", &["one"]))?;
        disk.write((0..64).map(|number| ((number * 31) << 30, 65536)))?;
        child::run(&mut disk.run(bench, "create", &["two"]))?;
        Ok(disk)
    };
    bench.repeat(5, Duration::from_secs(20), |_| {
        bench.time(&mut row, OURS, &mut prepared()?.run(bench, "delete", &["one"]))
    })?;
    row.count(WRITTEN, written(&prepared()?.run(bench, "delete", &["one"]))?);
    row.note(format!("{PEER}406 MB, 1.64 s; with -s 272 MB, 0.76 s"));
    Ok(row)
}

/// A copy of a dynamic image to a fixed one and to raw bytes, beside qemu-img and `cp` of as many bytes.
fn copy(bench: &Bench, name: &'static str) -> Result<Row> {
    let size: u64 = if bench.quick { 64 << 20 } else { 256 << 20 };
    let mut row = Row::new(
        name,
        format!("disk materialise of {} MiB of data to a fixed VHD", size >> 20),
        &[Target::Within(1.2, CP)],
    );
    let disk = Disk::new(bench, size)?;
    disk.write((0..size / BLOCK).map(|block| (block * BLOCK, BLOCK)))?;
    let (fixed, raw) = (disk.place.path().join("fixed.vhd"), disk.place.path().join("copy.img"));
    let state = disk.place.path().join("state");
    let ours = |to: &Path, format: &str| {
        let mut command = bench.domsnap(&state, &["disk", "materialise"]);
        command.arg(disk.path()).arg(to).args(["--format", format]);
        command
    };
    bench.repeat(5, Duration::from_secs(30), |repetition| {
        let theirs = disk.place.path().join("theirs.img");
        let mut convert = child::command("qemu-img", &["convert", "-f", "vpc", "-O", "raw"]);
        convert.arg(disk.path()).arg(&theirs);
        bench.time(&mut row, OURS, &mut ours(&fixed, "vhd-fixed"))?;
        bench.time(&mut row, "qemu-img convert to raw, not durable", &mut convert)?;
        if repetition == 0 {
            child::run(&mut ours(&raw, "raw"))?;
            child::output(
                child::command("qemu-img", &["compare", "-q", "-f", "raw", "-F", "raw"])
                    .arg(&raw)
                    .arg(&theirs),
            )?;
            ensure!(std::fs::metadata(&fixed)?.len() == size + 512, "the fixed copy has another size");
        }
        std::fs::remove_file(&fixed)?;
        std::fs::remove_file(&theirs)?;
        copy_and_sync(&mut row, &disk.place.path().join("copied"), size)
    })?;
    row.note(format!("{PEER}vhd-util copy of as many bytes: 1.13 s, where cp and a flush took 0.29 s"));
    Ok(row)
}
