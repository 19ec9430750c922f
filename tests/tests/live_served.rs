//! A running guest whose disk is a VHD that domsnap serves to QEMU: snapshots with memory, reverts in place,
//! deletes while it runs, and what a crash of any program leaves.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use backend_vhd::image::NewImage;
use domsnap_tests::domsnap::{Domsnap, status};
use domsnap_tests::idle::Idle;
use domsnap_tests::live::crash::{Operation, Victim, inject, nothing, there, without_x};
use domsnap_tests::live::{Live, NAME};
use domsnap_tests::qemu;
use domsnap_tests::served::{self, Server};
use serde_json::{Value, json};
use testguest::{GuestOptions, Version};

/// A guest whose disk `vda` is served, and whose `vdb` is a qcow2 image of QEMU's.
fn guest() -> Result<Live> {
    Live::of_served(GuestOptions::new().disk_mib(48), 30)
}

/// The disk is found as the VHD that is served; snapshots with memory and of the disks alone are taken at one
/// instant with a qcow2 disk, and reverted to in place; deletes merge while the guest runs. The server and
/// its connection stay.
#[test]
fn served_vhd_is_a_disk_of_a_running_domain() -> Result<()> {
    let mut live = guest()?;
    let socket = live.guest.disk(0).with_extension("sock");
    let who = |info: &Value| (info["pid"].clone(), info["client"].clone());
    let server = who(&served::ask(&socket, &json!({ "do": "info" }))?);
    let shown = live.domsnap().done(&["domain", "show", NAME])?.stdout;
    ensure!(shown.contains("vda.vhd") && shown.contains("vhd"), "{shown}");
    let first = live.create("first", &[])?;
    ensure!(first.downtime_us.is_some(), "{first:?}");
    live.create("second", &["--disk-only"])?;
    let now = served::ask(&socket, &json!({ "do": "info" }))?;
    ensure!(now["prepares"] == true && now["prepared"].is_null(), "{now}");
    live.create("third", &[])?;
    live.revert("first", &[])?;
    live.verify()?;
    live.create("fourth", &[])?;
    live.revert("second", &[])?;
    live.revert("third", &[])?;
    live.verify()?;
    live.domsnap().done(&["check", NAME])?;
    let now = served::ask(&socket, &json!({ "do": "info" }))?;
    ensure!(who(&now) == server, "{now}");
    live.delete(&["first"], &[])?;
    live.delete(&["fourth"], &[])?;
    live.revert("third", &[])?;
    // The domain is ended, and started again on the disks of a snapshot: the server is still there.
    live.domsnap().done(&["revert", NAME, "second", "--off"])?;
    live.guest.wait_end()?;
    live.guest.restart()?;
    ensure!(live.guest.counters_at_boot().iter().all(Option::is_some), "a disk's counter is not whole");
    live.load()?;
    live.sound()?;
    live.delete(&["second", "third"], &[])?;
    let now = served::ask(&socket, &json!({ "do": "info" }))?;
    ensure!(now["pid"] == server.0, "{now}");
    ensure!(now["layers"].as_array().is_some_and(|layers| layers.len() == 1), "{now}");
    live.sound()?;
    live.finish()
}

/// A domain that is off goes on from a snapshot with memory in one command, while the server of its disk
/// runs: it lends the disk, and serves the snapshot's by the time that QEMU comes. Snapshots at rest are
/// taken so too.
#[test]
fn stopped_domain_is_started_from_a_served_disk() -> Result<()> {
    let mut live = guest()?;
    let socket = live.guest.disk(0).with_extension("sock");
    let server = served::ask(&socket, &json!({ "do": "info" }))?["pid"].clone();
    live.create("first", &[])?;
    live.guest.wait_ticks(10)?;
    live.create("second", &[])?;
    for (name, stopped) in [("first", false), ("second", true)] {
        match stopped {
            true => {
                live.domsnap().done(&["revert", NAME, "first", "--off"])?;
            }
            // As a host that goes down, or a supervisor that stops it.
            false => live.guest.quit()?,
        }
        live.guest.wait_end()?;
        live.domsnap().done(&["create", NAME, "off", "--disk-only"])?;
        live.domsnap().done(&["delete", NAME, "off"])?;
        // The server is down: QEMU could not start, so nothing is done.
        if !stopped {
            live.servers.kill()?;
            let refused = live.domsnap().run(&["revert", NAME, name])?;
            ensure!(refused.status == Some(status::REFUSED), "{refused}");
            ensure!(
                refused.stderr.contains("disk serve") && refused.stderr.contains("no changes made"),
                "{refused}"
            );
            live.servers.start()?;
        }
        let answer = live.domsnap().done(&["revert", NAME, name])?;
        live.guest.expect_no_bad().with_context(|| answer.stdout.clone())?;
        live.wait_running()?;
        live.sound().with_context(|| format!("started from {name}"))?;
    }
    let now = served::ask(&socket, &json!({ "do": "info" }))?;
    ensure!(now["pid"] == server || !now["client"].is_null(), "{now}");
    live.verify()?;
    live.finish()
}

/// Snapshots with memory of a guest under load, with a served VHD, a raw file and a qcow2 image, are each of
/// one instant.
#[test]
fn served_vhd_raw_and_qcow2_are_of_one_instant() -> Result<()> {
    let mut live = Live::of_served(GuestOptions::new().disk_mib(32).disks(3).raw(&[1]), 30)?;
    for name in ["a", "b", "c"] {
        live.create(name, &["--disk", "vdb=copy"])?;
    }
    for name in ["b", "a", "c"] {
        live.revert(name, &[])?;
    }
    live.verify()?;
    live.delete(&["b"], &[])?;
    live.finish()
}

/// Six snapshots with memory of a guest under load are each of one instant, and the guest waits for the disks
/// for a moment only.
#[test]
fn served_disk_is_cut_in_a_moment() -> Result<()> {
    let mut live = guest()?;
    let mut waits = Vec::new();
    for number in 0..6 {
        let taken = live.create(&format!("disks-{number}"), &["--disk-only"])?;
        waits.push(Duration::from_micros(taken.downtime_us.context("no downtime")?));
    }
    println!("disks alone: {waits:?}");
    // A machine that is slow is not wrong: the figures are those of the shortest, and are printed.
    let shortest = waits.iter().min().context("none was taken")?;
    ensure!(*shortest < Duration::from_secs(5), "{waits:?}");
    for number in 0..6 {
        live.create(&format!("memory-{number}"), &[])?;
    }
    for number in [3, 0, 5] {
        live.revert(&format!("memory-{number}"), &[])?;
    }
    live.verify()?;
    live.finish()
}

/// A served disk of an I/O thread is drained before the guest is paused, as QEMU's own are.
#[test]
fn served_disk_of_an_io_thread_is_cut() -> Result<()> {
    let mut live = Live::of_served(GuestOptions::new().disk_mib(48).iothreads(1), 30)?;
    live.create("a", &[])?;
    live.create("b", &["--disk-only"])?;
    live.revert("a", &[])?;
    live.delete(&["b"], &[])?;
    live.verify()?;
    live.finish()
}

fn on_x(live: &mut Live) -> Result<()> {
    match there(live, "x")? {
        true => Ok(()),
        false => live.create("x", &["--disk-only"]).map(drop),
    }
}

/// `x` is in the middle of the chain.
fn under_y(live: &mut Live) -> Result<()> {
    if !there(live, "x")? {
        if there(live, "y")? {
            live.delete(&["y"], &[])?;
        }
        live.create("x", &["--disk-only"])?;
        live.guest.wait_ticks(10)?;
        live.create("y", &["--disk-only"])?;
    }
    Ok(())
}

const CREATE: Operation =
    Operation { args: &["create", "x"], takes: Some("x"), deletes: None, again: without_x };
const REVERT: Operation = Operation { args: &["revert", "base"], takes: None, deletes: None, again: nothing };
const DELETE_ACTIVE: Operation =
    Operation { args: &["delete", "x"], takes: None, deletes: Some("x"), again: on_x };
const DELETE_FROZEN: Operation =
    Operation { args: &["delete", "x"], takes: None, deletes: Some("x"), again: under_y };

macro_rules! killed {
    ($($test:ident: $operation:ident, $victim:ident, $first:literal, $every:literal;)*) => {$(
        #[test]
        fn $test() -> Result<()> {
            let mut live = guest()?;
            live.create("base", &[])?;
            inject(&mut live, &$operation, Victim::$victim, $first, $every)?;
            live.finish()
        }
    )*};
}

killed! {
    domsnap_dies_in_a_create: CREATE, Domsnap, 0, 1;
    domsnap_dies_in_a_revert: REVERT, Domsnap, 0, 1;
    domsnap_dies_in_a_merge_of_the_served_image: DELETE_ACTIVE, Domsnap, 0, 1;
    domsnap_dies_in_a_merge_below_it: DELETE_FROZEN, Domsnap, 0, 1;
    server_dies_in_a_create: CREATE, Server, 0, 1;
    server_dies_in_a_revert: REVERT, Server, 0, 1;
    server_dies_in_a_merge_of_the_served_image: DELETE_ACTIVE, Server, 0, 1;
    server_dies_in_a_merge_below_it: DELETE_FROZEN, Server, 1, 1;
}

/// The limit of a merge is that of the command that carries it out. A recovery after the death of the one
/// that began it gives the merge its own, which is none here.
#[test]
fn limit_of_a_running_merge_is_changed() -> Result<()> {
    let mut live = guest()?;
    live.create("x", &["--disk-only"])?;
    live.guest.wait_ticks(10)?;
    live.create("y", &["--disk-only"])?;
    let socket = live.guest.disk(0).with_extension("sock");
    let info = || served::ask(&socket, &json!({ "do": "info" }));
    // A few bytes a second: it would not end before the test does.
    let mut deleting =
        live.domsnap().command(&["delete", NAME, "x", "--limit", "16"]).stderr(Stdio::null()).spawn()?;
    let until = Instant::now() + Duration::from_secs(120);
    while info()?["merge"]["phase"] != "moving" {
        ensure!(deleting.try_wait()?.is_none(), "the delete ended: {}", info()?);
        ensure!(Instant::now() < until, "no merge begins: {}", info()?);
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(Duration::from_secs(1));
    ensure!(info()?["merge"]["phase"] == "moving", "the limit is not obeyed: {}", info()?);
    deleting.kill()?;
    deleting.wait()?;
    live.domsnap().done(&["recover", NAME])?;
    let now = info()?;
    ensure!(now["merge"]["phase"] == "done" && now["layers"].as_array().map(Vec::len) == Some(2), "{now}");
    ensure!(!there(&live, "x")?, "x is still there");
    live.sound()?;
    live.delete(&["y"], &[])?;
    live.finish()
}

/// A guest under load goes on over the death of the server, and nothing is lost. Meanwhile a snapshot is
/// refused before anything, with what to do.
#[test]
fn killed_server_is_waited_for() -> Result<()> {
    let mut live = guest()?;
    live.create("before", &[])?;
    live.servers.kill()?;
    let refused = live.domsnap().run(&["create", NAME, "x"])?;
    ensure!(refused.status == Some(status::REFUSED), "{refused}");
    ensure!(refused.stderr.contains("disk serve"), "{refused}");
    live.servers.start()?;
    live.wait_running()?;
    live.sound()?;
    live.create("after", &[])?;
    live.revert("before", &[])?;
    live.verify()?;
    live.finish()
}

/// A disk that another program serves is no disk of the domain: a snapshot without it is refused with the
/// reason, and taken if it is skipped.
#[test]
fn foreign_server_is_refused_by_name() -> Result<()> {
    let options = GuestOptions::new().disk_mib(48).served(0, 0, |image, socket| {
        let mut server = Command::new("qemu-nbd");
        server.args(["--fork", "-t", "-f", "vpc", "-k"]).arg(socket).arg("--pid-file");
        ensure!(
            server.arg(image.with_extension("pid")).arg(image).status()?.success(),
            "qemu-nbd does not start"
        );
        Ok(())
    });
    let mut live = Live::of(options)?;
    let refused = live.domsnap().run(&["create", NAME, "x"])?;
    ensure!(refused.status == Some(status::REFUSED), "{refused}");
    ensure!(refused.stderr.contains("vda") && refused.stderr.contains("another program"), "{refused}");
    live.domsnap().done(&["create", NAME, "x", "--disk", "vda=skip"])?;
    live.remember("x", (0, u64::MAX / 2))?;
    live.guest.wait_ticks(3)?;
    live.guest.expect_no_bad()?;
    live.guest.quit()?;
    let pid = std::fs::read_to_string(live.guest.disk(0).with_extension("pid"))?;
    ensure!(Command::new("kill").arg(pid.trim()).status()?.success(), "qemu-nbd is gone already");
    Ok(())
}

/// A raw file that is served is a disk of the domain: copies of it are taken and reverted to, and an overlay,
/// which its server does not write, is refused before anything.
#[test]
fn served_raw_file_has_copies_and_no_overlay() -> Result<()> {
    let directory = tempfile::Builder::new().prefix("domsnap-served-").tempdir()?;
    let (image, socket) = (directory.path().join("d.raw"), directory.path().join("d.sock"));
    qemu::img(&["create", "-q", "-f", "raw", &image.display().to_string(), "1M"])?;
    let domsnap = Domsnap::new(&directory.path().join("state"));
    let server = Server::start(&domsnap, &socket, &[&format!("{},format=raw", image.display())])?;
    let node = format!("driver=nbd,server.type=unix,server.path={},node-name=v", socket.display());
    let machine = Idle::start(
        Version::New,
        directory.path(),
        "raw",
        &["-blockdev", &node, "-device", "virtio-blk-pci,drive=v,id=vda"],
    )?;
    domsnap.done(&["domain", "add", "raw", "--qmp", &machine.socket().display().to_string()])?;
    let has = |pattern: u8| -> Result<bool> {
        machine.flush("vda")?;
        Ok(std::fs::read(&image)?[256 << 10..(256 << 10) + (64 << 10)].iter().all(|byte| *byte == pattern))
    };
    machine.write("vda", 1)?;
    let refused = domsnap.run(&["create", "raw", "s", "--disk-only", "--disk", "vda=overlay"])?;
    ensure!(refused.status == Some(status::REFUSED) && refused.stderr.contains("overlay"), "{refused}");
    domsnap.done(&["create", "raw", "s", "--disk", "vda=copy"])?;
    machine.write("vda", 2)?;
    ensure!(has(2)?, "the second pattern is not in the image");
    domsnap.done(&["revert", "raw", "s"])?;
    ensure!(has(1)?, "the first pattern is not in the image after the revert");
    machine.write("vda", 3)?;
    ensure!(has(3)?, "what is written after the revert is not in the image");
    domsnap.done(&["delete", "raw", "s"])?;
    machine.quit()?;
    drop(server);
    Ok(())
}

/// A VHD that QEMU has open itself gets an overlay under a new path alone: the refusal says so, and how the
/// disk is served. A child is refused because QEMU shows zeros, and so is what QEMU shows otherwise than it
/// is.
#[test]
fn vhd_of_qemus_own_driver_is_refused() -> Result<()> {
    let directory = tempfile::Builder::new().prefix("domsnap-vpc-").tempdir()?;
    let file = |name: &str| directory.path().join(name).display().to_string();
    let domsnap = Domsnap::new(&directory.path().join("state"));
    for (name, kind) in [("dynamic", "dynamic"), ("parent", "dynamic"), ("fixed", "fixed")] {
        let options = format!("force_size=on,subformat={kind}");
        qemu::img(&["create", "-q", "-f", "vpc", "-o", &options, &file(&format!("{name}.vhd")), "8M"])?;
    }
    let (child, parent) = (directory.path().join("child.vhd"), directory.path().join("parent.vhd"));
    let (child, parent) = (child.as_path().try_into()?, parent.as_path().try_into()?);
    let name = backend_vhd::parent_name_for(child, parent)?;
    backend_vhd::write_child(child, parent, &NewImage::new(8 << 20).on(name))?;
    let vpc = |name: &str| format!("driver=vpc,file.driver=file,file.filename={},node-name=v", file(name));
    let slice = |options: &str| {
        format!("driver=raw,{options},file.driver=file,file.filename={},node-name=v", file("fixed.vhd"))
    };
    for (name, node, reasons) in [
        ("dynamic", vpc("dynamic.vhd"), &["--active-path=new", "disk serve"][..]),
        ("child", vpc("child.vhd"), &["reads zeros", "disk serve"]),
        ("fixed", slice("size=8388608"), &["--active-path=new", "disk serve"]),
        ("short", slice("size=8388096"), &["slice of a file", "disk serve"]),
        ("late", slice("offset=512,size=8388096"), &["slice of a file"]),
    ] {
        let args = ["-blockdev", &node, "-device", "virtio-blk-pci,drive=v,id=vda"];
        let mut machine = Idle::start(Version::New, directory.path(), name, &args)?;
        let address = machine.address();
        for more in [&["--disk-only"][..], &[]] {
            let outcome = domsnap.run(&[&["create", &address, "s"][..], more].concat())?;
            ensure!(outcome.status == Some(status::REFUSED), "{name}: {outcome}");
            for word in reasons {
                ensure!(outcome.stderr.contains(word), "{name}: {word:?} is not in: {outcome}");
            }
        }
        machine.kill()?;
    }
    Ok(())
}
