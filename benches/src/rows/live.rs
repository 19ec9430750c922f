//! Running domains, side by side with QEMU's own snapshots of the same guest.

use std::ffi::OsStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use testguest::GuestOptions;

use super::served::Server;
use crate::bench::Bench;
use crate::chain::GUEST;
use crate::child::{self, Cost};
use crate::machine::Running;
use crate::proxy::{Asked, Proxy};
use crate::row::{LIMIT, OURS, Row, Target, seconds};
use crate::virsh::Virsh;

/// The rows of [`measure`].
pub const ROWS: &[&str] = &[
    "live-stall-128",
    "live-stall-512",
    "live-stall-512-slow",
    "live-stall-2048",
    "live-downtime-8",
    "live-revert",
    "live-revert-downtime",
    "live-own-8",
    "live-served",
];

const SAVE: &str = "QEMU snapshot-save";
const LOAD: &str = "QEMU snapshot-load";
const VIRSH: &str = "virsh snapshot-revert";

/// How long the guest is watched while nothing is done.
const IDLE: Duration = Duration::from_secs(3);

/// A guest's memory and load, in MiB and MiB a second.
#[derive(Clone, Copy)]
struct Load {
    memory: u64,
    dirty: u64,
    rate: f64,
}

/// As much dirtied as the memory lets, and twice the same with another rate.
const LOADS: [Load; 4] = [
    Load { memory: 128, dirty: 40, rate: 100.0 },
    Load { memory: 512, dirty: 300, rate: 100.0 },
    Load { memory: 512, dirty: 300, rate: 25.0 },
    Load { memory: 2048, dirty: 1400, rate: 100.0 },
];

/// All rows that are wanted, each on guests of its own: one runs at a time.
pub fn measure(bench: &Bench) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for (name, load) in ROWS.iter().zip(LOADS) {
        if bench.wants(name) && !(bench.quick && load.memory > 512) {
            rows.push(stall(bench, name, load)?);
        }
    }
    if bench.wants(ROWS[4]) {
        rows.push(downtime(bench)?);
    }
    if bench.wants(ROWS[5]) || bench.wants(ROWS[6]) {
        rows.extend(revert(bench)?);
    }
    if bench.wants(ROWS[7]) {
        rows.push(own(bench)?);
    }
    if bench.wants(ROWS[8]) {
        rows.push(served(bench)?);
    }
    Ok(rows)
}

/// A time that is not a process's.
fn time(wall: Duration) -> Cost {
    Cost { wall, peak: 0, cpu: Duration::ZERO }
}

/// Starts a guest under memory load.
fn loaded<'a>(bench: &'a Bench, row: &mut Row, load: Load) -> Result<Running<'a>> {
    let running = Running::start(bench, GuestOptions::new().memory_mib(load.memory))?;
    running.register(running.guest.qmp_socket())?;
    running.guest.dirty(load.dirty, load.rate)?;
    let (before, start) = (running.guest.status()?.dirtied, Instant::now());
    std::thread::sleep(IDLE);
    let pages = running.guest.status()?.dirtied.saturating_sub(before);
    let rate = (pages * 4096) as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64();
    row.note(format!("while nothing was done, the guest dirtied {rate:.0} MiB a second"));
    Ok(running)
}

fn about(load: Load) -> String {
    let Load { memory, dirty, rate } = load;
    format!("{memory} MiB of memory, {dirty} MiB of it dirtied at {rate} MiB/s, two disks")
}

fn stall(bench: &Bench, name: &'static str, load: Load) -> Result<Row> {
    let what = format!("the guest's largest stall at a live create with memory: {}", about(load));
    let mut row = Row::new(name, what, &[Target::Within(0.5, SAVE)]);
    let running = loaded(bench, &mut row, load)?;
    let (mut downtimes, mut methods) = (Vec::new(), Vec::new());
    bench.repeat(5, Duration::from_secs(60), |repetition| {
        let (idle, ()) = running.stall(|| {
            std::thread::sleep(IDLE);
            Ok(())
        })?;
        row.sample(LIMIT, time(idle));
        let mut sides = [OURS, SAVE];
        sides.rotate_left(repetition % 2);
        for side in sides {
            if side == OURS {
                let (stall, made) = running.stall(|| running.change(&["create", GUEST, "point"]))?;
                row.sample(OURS, Cost { wall: stall, ..made.cost });
                downtimes.push(made.downtime);
                methods.extend(made.method);
                running.delete("point")?;
            } else {
                let (stall, _) = running.stall(|| running.save("point"))?;
                row.sample(SAVE, time(stall));
                running.forget("point")?;
            }
            running.sound()?;
        }
        Ok(())
    })?;
    methods.sort_unstable();
    methods.dedup();
    row.note(format!("limit: the largest stall in {} s in which nothing is done", IDLE.as_secs()));
    row.note(format!("method: {}; between stop and resume {}", methods.join(", "), spread(&mut downtimes)));
    Ok(row)
}

/// The median and the ends, in milliseconds.
fn spread(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let ms = |time: Option<&Duration>| time.map_or(f64::NAN, |time| time.as_secs_f64() * 1e3);
    let median = times.get(times.len().saturating_sub(1) / 2);
    format!("{:.1} ms ({:.1} to {:.1})", ms(median), ms(times.first()), ms(times.last()))
}

fn eight(bench: &Bench) -> Result<Running<'_>> {
    Running::start(bench, GuestOptions::new().disks(GuestOptions::MAX_DISKS))
}

fn downtime(bench: &Bench) -> Result<Row> {
    let what = "between stop and resume of a disk-only create, eight disks";
    let mut row = Row::new(ROWS[4], what, &[Target::Under(Duration::from_millis(50))]);
    let running = eight(bench)?;
    running.register(running.guest.qmp_socket())?;
    let (idle, ()) = running.stall(|| {
        std::thread::sleep(IDLE);
        Ok(())
    })?;
    let mut stalls = Vec::new();
    bench.repeat(15, Duration::from_secs(60), |_| {
        let (stall, made) = running.stall(|| running.change(&["create", GUEST, "point", "--disk-only"]))?;
        row.sample(OURS, Cost { wall: made.downtime, ..made.cost });
        stalls.push(stall);
        running.delete("point")
    })?;
    row.note(format!(
        "the guest's largest stall meanwhile, by its own ticks: {}; in {} s in which nothing was done: {}",
        spread(&mut stalls),
        IDLE.as_secs(),
        seconds(idle.as_secs_f64())
    ));
    Ok(row)
}

fn revert(bench: &Bench) -> Result<Vec<Row>> {
    let load = LOADS[1];
    let what = format!("revert in place with memory: {}", about(load));
    let mut whole = Row::new(ROWS[5], what, &[Target::Within(0.2, VIRSH)]);
    let what = format!("the guest's largest stall at a revert in place with memory: {}", about(load));
    let mut stalls = Row::new(ROWS[6], what, &[]);
    let running = loaded(bench, &mut whole, load)?;
    let virsh = Virsh::start(bench, GuestOptions::new().memory_mib(load.memory), load.memory)?;
    virsh.guest.dirty(load.dirty, load.rate)?;
    virsh.suspend()?;
    let mut downtimes = Vec::new();
    bench.repeat(5, Duration::from_secs(120), |repetition| {
        let mut sides = [OURS, LOAD, VIRSH];
        sides.rotate_left(repetition % 3);
        for side in sides {
            if side == OURS {
                running.change(&["create", GUEST, "point"])?;
                let (stall, made) = running.stall(|| running.change(&["revert", GUEST, "point"]))?;
                whole.sample(OURS, made.cost);
                stalls.sample(OURS, Cost { wall: stall, ..made.cost });
                downtimes.push(made.downtime);
                running.delete("point")?;
            } else if side == LOAD {
                running.save("point")?;
                let (stall, wall) = running.stall(|| running.load("point"))?;
                whole.sample(LOAD, time(wall));
                stalls.sample(LOAD, time(stall));
                running.forget("point")?;
            } else {
                // One guest runs at a time: each takes a processor.
                running.guest.qmp("stop", serde_json::Value::Null)?;
                virsh.resume()?;
                virsh.create("point")?;
                virsh.guest.forget_gap();
                let cost = virsh.revert("point")?;
                whole.sample(VIRSH, cost);
                stalls.sample(VIRSH, time(virsh.guest.largest_gap()));
                virsh.delete("point")?;
                virsh.suspend()?;
                running.guest.qmp("cont", serde_json::Value::Null)?;
            }
        }
        Ok(())
    })?;
    whole.note("QEMU snapshot-load is the job alone, without a process to start");
    whole.note(format!(
        "libvirt {}: the snapshot and the disks internal, as it does by itself",
        virsh.version()?
    ));
    stalls.note(format!("domsnap's own measure of its downtime: {}", spread(&mut downtimes)));
    Ok(vec![whole, stalls])
}

fn own(bench: &Bench) -> Result<Row> {
    let what = "our own part of a disk-only create of eight disks: the process less the time that QEMU takes to answer";
    let mut row = Row::new(ROWS[7], what, &[Target::Under(Duration::from_millis(20))]);
    let running = eight(bench)?;
    let proxy = Proxy::open(&running.guest.dir().join("proxy"), running.guest.qmp_socket())?;
    running.register(proxy.socket())?;
    // What this QEMU can do is asked for once, and recorded with the first snapshot.
    running.change(&["create", GUEST, "base", "--disk-only"])?;
    let mut all = Vec::new();
    bench.repeat(15, Duration::from_secs(60), |_| {
        proxy.take();
        let made = running.change(&["create", GUEST, "point", "--disk-only"])?;
        let asked = proxy.take();
        row.sample(OURS, Cost { wall: made.cost.wall.saturating_sub(asked.busy), ..made.cost });
        row.sample("the whole process", made.cost);
        row.sample("QEMU's answers", time(asked.busy));
        row.sample("domsnap's processor time", time(made.cost.cpu));
        all.push(asked);
        running.delete("point")
    })?;
    row.note(slowest(&all));
    Ok(row)
}

/// A guest whose disk is a served VHD of the largest size: how long it waits while the server goes on in a
/// new child, one layer deeper each time.
fn served(bench: &Bench) -> Result<Row> {
    let what = "the guest's largest stall at a disk-only create: one served VHD of 2040 GiB, one snapshot deeper each time";
    let mut row = Row::new(ROWS[8], what, &[Target::Under(Duration::from_millis(50))]);
    let program = bench.program().to_owned();
    let servers = Arc::new(Mutex::new(Vec::new()));
    let kept = Arc::clone(&servers);
    let options = GuestOptions::new().disks(1).served(0, 30, move |image, socket| {
        let state = image.with_file_name("state");
        let domsnap = |args: &[&OsStr]| {
            let mut command = child::command(&program, &["--state-dir".as_ref(), state.as_os_str()]);
            command.args(args);
            command
        };
        // The guest has a file system in the first 64 MiB, and never sees that there is more.
        child::run(&mut domsnap(&[
            "disk".as_ref(),
            "resize".as_ref(),
            image.as_os_str(),
            "2040GiB".as_ref(),
        ]))?;
        let mut disk = image.as_os_str().to_owned();
        disk.push(",format=vhd");
        let server =
            domsnap(&["disk".as_ref(), "serve".as_ref(), &disk, "--socket".as_ref(), socket.as_os_str()]);
        let server = Server::start(server, socket.to_owned())?;
        kept.lock().unwrap_or_else(PoisonError::into_inner).push(server);
        Ok(())
    });
    let running = Running::start(bench, options)?;
    running.register(running.guest.qmp_socket())?;
    let (mut downtimes, mut whole) = (Vec::new(), Vec::new());
    let mut number = 0;
    bench.repeat(15, Duration::from_secs(60), |_| {
        let (idle, ()) = running.stall(|| {
            std::thread::sleep(IDLE / 3);
            Ok(())
        })?;
        row.sample(LIMIT, time(idle));
        number += 1;
        let name = format!("s{number}");
        let (stall, made) = running.stall(|| running.change(&["create", GUEST, &name, "--disk-only"]))?;
        row.sample(OURS, Cost { wall: stall, ..made.cost });
        downtimes.push(made.downtime);
        whole.push(made.cost.wall);
        Ok(())
    })?;
    row.note(format!("limit: the largest stall in {} s in which nothing is done", (IDLE / 3).as_secs()));
    row.note(format!(
        "between stop and resume {}; the whole command {}",
        spread(&mut downtimes),
        spread(&mut whole)
    ));
    drop(running);
    Ok(row)
}

/// The commands that take the most of QEMU's time, of the repetition that is the middle one.
fn slowest(all: &[Asked]) -> String {
    let mut sorted: Vec<_> = all.iter().collect();
    sorted.sort_by_key(|asked| asked.busy);
    let Some(asked) = sorted.get(sorted.len().saturating_sub(1) / 2) else {
        return "nothing was asked".to_owned();
    };
    let mut commands: Vec<_> = asked.commands.iter().collect();
    commands.sort_by_key(|(_, (_, time))| std::cmp::Reverse(*time));
    let parts = commands
        .iter()
        .take(6)
        .map(|(name, (count, time))| format!("{count} {name} {:.1} ms", time.as_secs_f64() * 1e3));
    let count: usize = asked.commands.values().map(|(count, _)| count).sum();
    format!("QEMU answered {count} commands; most of its time: {}", parts.collect::<Vec<_>>().join(", "))
}
