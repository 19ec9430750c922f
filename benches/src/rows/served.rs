//! VHD served over NBD: `domsnap disk serve` beside qemu-nbd, each by fio on the same image.
//!
//! Both servers run at once, each on an image of its own, and fio works on one after the other. A sample is
//! what fio says its requests took, without its start.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use backend_vhd::image::{Chain, ChainOptions, NewImage, write_into};
use backend_vhd::{parent_name_for, write_child};
use serde_json::Value;

use crate::bench::Bench;
use crate::child::{self, Cost};
use crate::row::{OURS, Row, Target};

/// The rows of [`measure`].
pub const ROWS: &[&str] = &["served-read", "served-write", "served-random-write", "served-depth"];

const QEMU: &str = "qemu-nbd -f vpc";
const SHALLOW: &str = "domsnap, one image";
const LAYERS: u64 = 30;

/// All of them.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let size: u64 = if bench.quick { 64 << 20 } else { 256 << 20 };
    let mib = size >> 20;
    let place = bench.place("served")?;
    let images = ["ours.vhd", "theirs.vhd"].map(|name| place.path().join(name));
    for image in &images {
        full(image, size)?;
    }
    let ours = Server::domsnap(bench, &images[0])?;
    let theirs = Server::qemu(&images[1])?;
    let what = format!("dynamic VHD of {mib} MiB, all of its blocks stored");
    let rows = [
        (ROWS[0], "read in order, 1 MiB each", &["--rw=read", "--bs=1m"][..], Target::Within(1.11, QEMU)),
        (ROWS[1], "written in order, 1 MiB each", &["--rw=write", "--bs=1m"], Target::Within(1.11, QEMU)),
        (
            ROWS[2],
            "4 KiB written at random, 2048 times",
            &["--rw=randwrite", "--bs=4k", "--number_ios=2048", "--randseed=7"],
            Target::FasterThan(8.0, QEMU),
        ),
    ];
    let mut all = Vec::new();
    for (name, doing, args, target) in rows {
        if !bench.wants(name) {
            continue;
        }
        let mut row = Row::new(name, format!("served: {what}: {doing}"), &[target]);
        bench.repeat(7, Duration::from_secs(60), |repetition| {
            let mut sides = [(OURS, &ours), (QEMU, &theirs)];
            sides.rotate_left(repetition % 2);
            sides.into_iter().try_for_each(|(label, server)| server.sample(&mut row, label, args))
        })?;
        row.note("4 requests at once, by fio's NBD engine; qemu-nbd with its default cache");
        all.push(row);
    }
    drop((ours, theirs));
    if bench.wants(ROWS[3]) {
        all.push(depth(bench, place.path(), size)?);
    }
    Ok(all)
}

/// Random reads of a chain of 30 images, beside those of one image with the same content.
fn depth(bench: &Bench, place: &Path, size: u64) -> Result<Row> {
    let directory = place.join("deep");
    std::fs::create_dir(&directory)?;
    let image = |number: u64| directory.join(format!("{number}.vhd"));
    full(&image(0), size)?;
    for number in 1..LAYERS {
        let (child, parent) = (image(number), image(number - 1));
        let (file, below) = (child.as_path().try_into()?, parent.as_path().try_into()?);
        write_child(file, below, &NewImage::new(size).on(parent_name_for(file, below)?))?;
        let pieces = (0..256).map(|piece| ((piece * 7919 + number * 104_729) * 4096 % size, 4096));
        write(&child, pieces, number as u8)?;
    }
    let top = image(LAYERS - 1);
    let flat = directory.join("flat.vhd");
    let mut chain = Chain::open(&top, &ChainOptions::read_only())?;
    let mut content = vec![0; size as usize];
    chain.read_at(&mut content, 0)?;
    drop(chain);
    create(&flat, size)?;
    let mut one = Chain::open(&flat, &ChainOptions::read_write())?;
    one.write_at(&content, 0)?;
    one.flush()?;
    drop((one, content));
    let (deep, shallow) = (Server::domsnap(bench, &top)?, Server::domsnap(bench, &flat)?);
    let mut row = Row::new(
        ROWS[3],
        format!(
            "served: 4 KiB read at random, 20,000 times, of a chain of {LAYERS} VHDs of {} MiB",
            size >> 20
        ),
        &[Target::Within(1.43, SHALLOW)],
    );
    let args = &["--rw=randread", "--bs=4k", "--number_ios=20000", "--norandommap", "--randseed=7"];
    bench.repeat(7, Duration::from_secs(60), |repetition| {
        let mut sides = [(OURS, &deep), (SHALLOW, &shallow)];
        sides.rotate_left(repetition % 2);
        sides.into_iter().try_for_each(|(label, server)| server.sample(&mut row, label, args))
    })?;
    row.note("4 requests at once, by fio's NBD engine; 1 MiB in 4 KiB pieces in each child");
    Ok(row)
}

fn create(path: &Path, size: u64) -> Result<()> {
    let file = std::fs::File::options().read(true).write(true).create_new(true).open(path)?;
    write_into(file, path, &NewImage::new(size))?;
    Ok(())
}

fn write(path: &Path, pieces: impl IntoIterator<Item = (u64, u64)>, byte: u8) -> Result<()> {
    let mut chain = Chain::open(path, &ChainOptions::read_write())?;
    for (at, length) in pieces {
        chain.write_at(&vec![byte; length as usize], at)?;
    }
    chain.flush()?;
    Ok(())
}

/// An image with data everywhere.
fn full(path: &Path, size: u64) -> Result<()> {
    create(path, size)?;
    write(path, (0..size >> 20).map(|number| (number << 20, 1 << 20)), 0x5A)
}

/// A server, which ends with this.
pub struct Server {
    child: Child,
    socket: PathBuf,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn domsnap(bench: &Bench, image: &Path) -> Result<Self> {
        let socket = image.with_extension("s");
        let image = format!("{},format=vhd", image.display());
        let state = socket.with_extension("state");
        let mut command = bench.domsnap(&state, &["disk", "serve", image.as_str(), "--socket"]);
        command.arg(&socket);
        Self::start(command, socket)
    }

    fn qemu(image: &Path) -> Result<Self> {
        let socket = image.with_extension("s");
        let mut command = child::command("qemu-nbd", &["-t", "-f", "vpc", "-k"]);
        command.arg(&socket).arg(image);
        Self::start(command, socket)
    }

    /// Starts one, and waits until it answers.
    pub fn start(mut command: Command, socket: PathBuf) -> Result<Self> {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().with_context(|| format!("start {command:?}"))?;
        let mut server = Self { child, socket };
        let until = Instant::now() + Duration::from_secs(30);
        while std::os::unix::net::UnixStream::connect(&server.socket).is_err() {
            ensure!(server.child.try_wait()?.is_none(), "{command:?} ended");
            ensure!(Instant::now() < until, "{command:?} does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(server)
    }

    /// One sample of fio's requests.
    fn sample(&self, row: &mut Row, label: &str, args: &[&str]) -> Result<()> {
        let uri = format!("--uri=nbd+unix:///?socket={}", self.socket.display());
        let fixed = ["--name=b", "--ioengine=nbd", "--iodepth=4", "--output-format=json"];
        let mut fio = child::command("fio", &fixed);
        fio.arg(uri).args(args);
        let text = child::output(&mut fio)?;
        // The engine's own lines may come before.
        let found: Value = serde_json::from_str(text.get(text.find('{').unwrap_or(0)..).unwrap_or_default())
            .with_context(|| format!("fio said {text}"))?;
        let job = &found["jobs"][0];
        let took = |kind: &str| job[kind]["runtime"].as_u64().filter(|_| job[kind]["total_ios"] != 0);
        let took = took("read").or_else(|| took("write")).context("fio reports no time")?;
        ensure!(job["error"] == 0 && took > 0, "fio: {job}");
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
        let peak = peak.and_then(|peak| peak.trim().parse::<u64>().ok()).unwrap_or(0) << 10;
        row.sample(label, Cost { wall: Duration::from_millis(took), peak, cpu: Duration::ZERO });
        Ok(())
    }
}
