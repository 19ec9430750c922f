//! Other users of a domain's volumes and points, beside the domain's own QEMU: each is named, and refused
//! before anything is done.

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use lvmguest::inside::{done, refused, succeed, write_block};
use lvmguest::{Machine, TestCase};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use testguest::Version;

use crate::matrix::{Sort, expect, group, volume, volumes};

const NAME: &str = "live";
pub const SOCKET: &str = "/run/live.qmp";

/// A machine with a QEMU, whose guests never run: they start at once.
pub fn machine() -> Machine {
    let program = testguest::parts::program(Version::New).expect("QEMU is not here");
    let machine = Machine::new().memory_mib(1536).program("qemu-system-x86_64", &program);
    let machine = machine.program("qemu-img", Path::new("/usr/bin/qemu-img"));
    testguest::parts::FIRMWARE.iter().fold(machine, |machine, file| machine.file(file, Path::new(file)))
}

/// A process that ends with this.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU on these devices, which lets others write them too.
fn qemu(devices: &[&str], socket: &str) -> Result<Running> {
    let mut qemu = Command::new("/t/qemu-system-x86_64");
    qemu.args(["-S", "-machine", "pc", "-accel", "tcg", "-m", "16", "-nodefaults", "-no-user-config"]);
    qemu.args(["-display", "none", "-qmp"]).arg(format!("unix:{socket},server=on,wait=off"));
    for (number, device) in devices.iter().enumerate() {
        let (format, driver) =
            if device.starts_with("/dev/") { ("raw", "host_device") } else { ("qcow2", "file") };
        let file = format!("file.driver={driver},file.filename={device}");
        qemu.args(["-blockdev", &format!("driver={format},node-name=n{number},{file}")]);
        let disk = format!("virtio-blk-pci,drive=n{number},id=vd{number},share-rw=on");
        qemu.args(["-device", &disk]);
    }
    let mut running = Running(qemu.stdin(Stdio::null()).spawn().context("QEMU cannot be started")?);
    let until = Instant::now() + Duration::from_secs(120);
    while std::os::unix::net::UnixStream::connect(socket).is_err() {
        if let Some(status) = running.0.try_wait()? {
            bail!("QEMU on {devices:?} ended with {status}");
        }
        ensure!(Instant::now() < until, "QEMU on {devices:?} does not listen");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(running)
}

/// A domain of a thin and a thick volume that runs, with the disk-only snapshot "one"; and its points, thin
/// and thick.
fn domain() -> Result<(Running, PathBuf, PathBuf)> {
    group(Sort::Thin)?;
    let (root, data) = (volume(Sort::Thin, "root")?.path(), volume(Sort::Thick, "data")?.mapper());
    let running = qemu(&[&root, &data], SOCKET)?;
    done(&["domain", "add", NAME, "--qmp", SOCKET])?;
    done(&["create", NAME, "one", "--disk-only"])?;
    let points = volumes()?;
    let point = |of: &str| {
        let name = points.iter().find(|name| name.starts_with(&format!("{of}.ds-")));
        name.map(|name| PathBuf::from(format!("/dev/vg/{name}"))).context("there is no point")
    };
    let (thin, thick) = (point("root")?, point("data")?);
    Ok((running, thin, thick))
}

/// Everything that changes the domain is refused for these reasons, and nothing is changed.
fn nothing_goes(args: &[&[&str]], reasons: &[&str]) -> Result<()> {
    let before = volumes()?;
    for args in args {
        refused(args, reasons)?;
    }
    ensure!(volumes()? == before, "{before:?} became {:?}", volumes()?);
    Ok(())
}

const CREATE: &[&str] = &["create", NAME, "no", "--disk-only"];
const REVERT: &[&str] = &["revert", NAME, "one"];
const DELETE: &[&str] = &["delete", NAME, "one"];

fn a_second_writer_of_a_volume_is_refused() -> Result<()> {
    let (_running, ..) = domain()?;
    // QEMUs that share their devices have no locks against each other.
    let second = qemu(&["/dev/vg/data"], "/run/second.qmp")?;
    let who = format!("process {} (qemu-system-x86", second.0.id());
    nothing_goes(&[CREATE, REVERT], &["/dev/mapper/vg-data", &who])?;
    drop(second);
    // A reader does no harm to a create; a revert closes the volume.
    let reader = OpenOptions::new().read(true).open("/dev/vg/root")?;
    nothing_goes(&[REVERT], &["/dev/vg/root", &format!("process {}", std::process::id())])?;
    done(CREATE)?;
    drop(reader);
    done(&["revert", NAME, "one"])?;
    Ok(())
}

fn a_point_that_is_used_is_refused_before_anything() -> Result<()> {
    let (_running, thin, thick) = domain()?;
    let process = format!("process {}", std::process::id());
    // Read: lvm neither removes nor merges what is open.
    let reader = OpenOptions::new().read(true).open(&thick)?;
    let name = thick.to_string_lossy().into_owned();
    nothing_goes(&[REVERT, DELETE], &[&name, &process])?;
    drop(reader);
    // Mounted, by the kernel: that is no process. A thin point is activated by hand.
    let qualified = format!("vg/{}", thin.file_name().unwrap_or_default().to_string_lossy());
    succeed(Command::new("lvchange").args(["-q", "-ay", "-K", &qualified]))?;
    succeed(Command::new("mke2fs").args(["-q", "-F"]).arg(&thin))?;
    std::fs::create_dir_all("/tmp/mnt")?;
    succeed(Command::new("/bin/busybox").args(["mount", "-t", "ext4"]).arg(&thin).arg("/tmp/mnt"))?;
    let mounted = ["mounted at /tmp/mnt", thin.to_str().unwrap_or_default()];
    let refused = nothing_goes(&[REVERT], &mounted);
    succeed(Command::new("/bin/busybox").args(["umount", "/tmp/mnt"]))?;
    refused?;
    // Part of another device, as kpartx makes it.
    let table = format!("0 8 linear {} 0", thick.display());
    succeed(Command::new("dmsetup").args(["create", "part1", "--table", &table]))?;
    let refused = nothing_goes(&[DELETE], &["part of the device part1", &name]);
    succeed(Command::new("dmsetup").args(["remove", "part1"]))?;
    refused?;
    done(DELETE)?;
    ensure!(volumes()? == ["data", "root"], "{:?}", volumes()?);
    Ok(())
}

fn a_user_whom_no_list_shows_is_counted() -> Result<()> {
    let (_running, ..) = domain()?;
    // A descriptor that is on its way between two processes is open, and is no process's. So is what Xen's
    // driver has open, and a process outside of this PID namespace.
    let device = OpenOptions::new().write(true).open("/dev/vg/data")?;
    let (sender, receiver) = std::os::unix::net::UnixStream::pair()?;
    let descriptors = [device.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    ensure!(ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)), "no room for a descriptor");
    let sent = sendmsg(&sender, &[IoSlice::new(b"x")], &mut ancillary, SendFlags::empty())?;
    ensure!(sent == 1, "it was not sent");
    drop(device);
    nothing_goes(&[CREATE], &["vg/data", "another user, which no process shows"])?;
    drop((sender, receiver));
    done(CREATE)?;
    Ok(())
}

fn a_base_device_that_is_written_is_refused() -> Result<()> {
    group(Sort::Thick)?;
    let device = volume(Sort::Thick, "plain")?.path();
    write_block(&device, 0, b'a')?;
    std::fs::create_dir_all("/tmp/over")?;
    let _running = qemu(&[&device], SOCKET)?;
    let disk = format!("vd0={device},format=raw");
    done(&["domain", "add", NAME, "--qmp", SOCKET, "--disk", &disk, "--active-path", "new"])?;
    let overlay = "vd0=external,path=/tmp/over/vd0.qcow2";
    let create = ["create", NAME, "no", "--disk-only", "--disk", overlay];
    let second = qemu(&[&device], "/run/second.qmp")?;
    refused(&create, &[&device, &format!("process {} (qemu-system-x86", second.0.id())])?;
    drop(second);
    let table = format!("0 8 linear {device} 0");
    succeed(Command::new("dmsetup").args(["create", "upper", "--table", &table]))?;
    let refusal = refused(&create, &[&device, "part of the device upper"]);
    succeed(Command::new("dmsetup").args(["remove", "upper"]))?;
    refusal?;
    done(&["create", NAME, "one", "--disk-only", "--disk", overlay])?;
    // What the overlay is backed by is still the user's own device: whoever writes it changes the disk.
    let writer = OpenOptions::new().write(true).open(&device)?;
    refused(CREATE, &[&device, &format!("process {}", std::process::id())])?;
    drop(writer);
    done(&["create", NAME, "two", "--disk-only"])?;
    Ok(())
}

/// One command of QMP; what it returns.
pub fn qmp(command: &str) -> Result<serde_json::Value> {
    let mut stream = std::os::unix::net::UnixStream::connect(SOCKET)?;
    stream.set_read_timeout(Some(Duration::from_secs(60)))?;
    stream.write_all(format!("{{\"execute\":\"qmp_capabilities\"}}\n{command}\n").as_bytes())?;
    let mut returned = BufReader::new(stream).lines().filter_map(|line| {
        let answer: serde_json::Value = serde_json::from_str(&line.ok()?).ok()?;
        answer.get("return").or_else(|| answer.get("error")).cloned()
    });
    // The first is that of the capabilities.
    let answer = returned.nth(1).context("QEMU does not answer")?;
    ensure!(answer.get("class").is_none(), "{command}: {answer}");
    Ok(answer)
}

/// The sizes of the guest's disks, in MiB, as QEMU has them.
fn guest_sizes() -> Result<Vec<u64>> {
    let listed = qmp("{\"execute\":\"query-block\"}")?;
    let sizes = listed.as_array().context("no list")?.iter();
    Ok(sizes
        .filter_map(|disk| disk.pointer("/inserted/image/virtual-size")?.as_u64())
        .map(|size| size >> 20)
        .collect())
}

/// Makes a volume larger, and the guest's disk with it, as `virsh blockresize` does.
fn extend(volume: &str, node: &str, mib: u64) -> Result<()> {
    succeed(Command::new("lvextend").args(["-q", "-L", &format!("{mib}M"), volume]))?;
    let command = serde_json::json!({ "execute": "block_resize", "arguments": { "node-name": node, "size": mib << 20 } });
    qmp(&command.to_string()).map(drop)
}

fn a_live_revert_brings_the_size_of_a_volume_back() -> Result<()> {
    group(Sort::Thin)?;
    let (root, data) = (volume(Sort::Thin, "root")?.path(), volume(Sort::Thick, "data")?.path());
    let image = "/vm/image.qcow2";
    succeed(Command::new("/t/qemu-img").args(["create", "-q", "-f", "qcow2", image, "32M"]))?;
    write_block(&root, 0, b'a')?;
    let running = qemu(&[&root, image], SOCKET)?;
    done(&["domain", "add", NAME, "--qmp", SOCKET])?;
    done(&["create", NAME, "small", "--disk-only"])?;
    let name = graph_node(&root)?;
    extend("vg/root", &name, 48)?;
    write_block(&root, 0, b'b')?;
    done(&["create", NAME, "large", "--disk-only"])?;
    let image_node = graph_node(image)?;
    let resize = serde_json::json!({ "node-name": image_node, "size": 64 << 20 });
    qmp(&serde_json::json!({ "execute": "block_resize", "arguments": resize }).to_string())?;
    for (snapshot, size, letter) in [("small", 32, b'a'), ("large", 48, b'b'), ("small", 32, b'a')] {
        done(&["revert", NAME, snapshot])?;
        ensure!(guest_sizes()? == [size, 32], "{snapshot}: the guest's disks have {:?} MiB", guest_sizes()?);
        expect(&root, 0, letter)?;
    }
    // The guest writes into the volume that is there now, and no further than that reaches.
    done(&["delete", NAME, "small", "large"])?;
    ensure!(volumes()? == ["data", "root"], "{:?}", volumes()?);
    drop(running);
    // lvm merges a thick volume's data and not its size: refused before the guest is paused.
    let _running = qemu(&[&data], SOCKET)?;
    done(&["domain", "add", "thick", "--qmp", SOCKET])?;
    done(&["create", "thick", "small", "--disk-only"])?;
    let extended = succeed(Command::new("lvextend").args(["-q", "-L", "48M", "vg/data"]));
    if extended.is_ok() {
        refused(&["revert", "thick", "small"], &["had 33554432 bytes", "no changes made"])?;
    }
    Ok(())
}

/// The node that a device is open by, on top of the file's.
fn graph_node(path: &str) -> Result<String> {
    let listed = qmp("{\"execute\":\"query-block\"}")?;
    let disks = listed.as_array().context("no list")?;
    let of_it = disks.iter().find(|disk| disk.pointer("/inserted/file").is_some_and(|file| file == path));
    let name = of_it.and_then(|disk| disk.pointer("/inserted/node-name")?.as_str());
    name.map(str::to_owned).with_context(|| format!("QEMU has no {path}: {listed}"))
}

pub static CASES: &[TestCase] = &[
    ("a second writer of a volume is refused", a_second_writer_of_a_volume_is_refused),
    ("a point that is used is refused before anything", a_point_that_is_used_is_refused_before_anything),
    ("a user whom no list shows is counted", a_user_whom_no_list_shows_is_counted),
    ("a live revert brings the size of a volume back", a_live_revert_brings_the_size_of_a_volume_back),
    ("a base device that is written is refused", a_base_device_that_is_written_is_refused),
];
