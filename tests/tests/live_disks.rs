//! Every disk that a running guest can write is in a snapshot, or skipped by name, or the snapshot is
//! refused; what the user said of his images' nodes survives.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domsnap::{Domsnap, Outcome, status};
use domsnap_tests::idle::{Idle, has_pattern};
use domsnap_tests::mounted::{Mounted, may_mount};
use domsnap_tests::qemu;
use serde_json::{Value, json};
use testguest::Version;

/// A directory with images of 1 MiB, and a state directory.
struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    fn new(images: &[&str]) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("domsnap-disks-").tempdir()?;
        let place = Self { dir };
        for image in images {
            let format = if image.ends_with(".raw") { "raw" } else { "qcow2" };
            qemu::img(&["create", "-q", "-f", format, &place.file(image), "1M"])?;
        }
        Ok(place)
    }

    fn file(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.dir.path().join("state"))
    }

    /// A machine with the disk `vda`, and more. `DIR` in a word is the directory.
    fn start(&self, name: &str, more: &[&str]) -> Result<Idle> {
        let args = [
            "-blockdev",
            "driver=qcow2,file.driver=file,file.filename=DIR/d.qcow2,node-name=d0",
            "-device",
            "virtio-blk-pci,drive=d0,id=vda",
        ];
        let dir = self.dir.path().display().to_string();
        let args: Vec<String> = args.iter().chain(more).map(|word| word.replace("DIR", &dir)).collect();
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        Idle::start(Version::New, self.dir.path(), name, &args)
    }
}

/// A server that ends with the test.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(args: &[&str], socket: &str) -> Result<Server> {
    let mut command = Command::new(args[0]);
    let server = Server(command.args(&args[1..]).stdin(Stdio::null()).spawn().context(args[0].to_owned())?);
    let until = Instant::now() + Duration::from_secs(240);
    while !Path::new(socket).exists() {
        ensure!(Instant::now() < until, "{args:?} does not serve {socket}");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(server)
}

fn refused(outcome: Outcome, args: &[&str]) -> Result<()> {
    let outcome = outcome.expect_status(status::REFUSED)?;
    for word in args {
        ensure!(outcome.stderr.contains(word), "{word:?} is not in: {}", outcome.stderr);
    }
    Ok(())
}

/// Each kind of disk that cannot be taken is named in the refusal, with memory and without, and can be
/// skipped.
#[test]
fn disk_that_cannot_be_taken_is_refused_by_name() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2", "f.qcow2", "n.qcow2", "u.qcow2", "s.raw"])?;
    let (nbd, vhost) = (place.file("n.sock"), place.file("vu.sock"));
    let _nbd = serve(&["qemu-nbd", "-t", "-f", "qcow2", "-k", &nbd, &place.file("n.qcow2")], &nbd)?;
    let served =
        format!("driver=qcow2,file.driver=file,file.filename={},node-name=un", place.file("u.qcow2"));
    let export =
        format!("type=vhost-user-blk,id=ex,node-name=un,addr.type=unix,addr.path={vhost},writable=on");
    let daemon = ["qemu-storage-daemon", "--blockdev", &served, "--export", &export];
    let _vhost = serve(&daemon, &vhost)?;
    let node = "driver=qcow2,file.driver=file,file.filename=DIR/e.qcow2,node-name=e0";
    let second = "driver=qcow2,file.driver=file,file.filename=DIR/f.qcow2,node-name=f0";
    let cases: [(&str, &[&str]); 8] = [
        (
            "network",
            &[
                "-blockdev",
                "driver=nbd,server.type=unix,server.path=DIR/n.sock,node-name=n0",
                "-device",
                "virtio-blk-pci,drive=n0,id=vdb",
            ],
        ),
        (
            "mirrored",
            &[
                "-blockdev",
                node,
                "-blockdev",
                second,
                "-blockdev",
                "driver=quorum,children.0=e0,children.1=f0,vote-threshold=1,node-name=q0",
                "-device",
                "virtio-blk-pci,drive=q0,id=vdb",
            ],
        ),
        (
            "verified",
            &[
                "-blockdev",
                second,
                "-blockdev",
                "driver=raw,file.driver=file,file.filename=DIR/s.raw,node-name=s0",
                "-blockdev",
                "driver=blkverify,test=f0,raw=s0,node-name=v0",
                "-device",
                "virtio-blk-pci,drive=v0,id=vdb",
            ],
        ),
        (
            "stick",
            &[
                "-device",
                "qemu-xhci",
                "-blockdev",
                node,
                "-device",
                "usb-storage,drive=e0,removable=on,id=vdb",
            ],
        ),
        ("card", &["-device", "sdhci-pci", "-blockdev", node, "-device", "sd-card,drive=e0,id=vdb"]),
        (
            "slice",
            &[
                "-blockdev",
                "driver=raw,offset=65536,size=524288,file.driver=file,file.filename=DIR/s.raw,node-name=e0",
                "-device",
                "virtio-blk-pci,drive=e0,id=vdb",
            ],
        ),
        (
            "reading-copies",
            &[
                "-drive",
                "file=DIR/e.qcow2,if=none,id=x,format=qcow2,copy-on-read=on",
                "-device",
                "virtio-blk-pci,drive=x,id=vdb",
            ],
        ),
        (
            "elsewhere",
            &[
                "-object",
                "memory-backend-memfd,id=mem,size=32M,share=on",
                "-machine",
                "q35,memory-backend=mem",
                "-chardev",
                "socket,id=vu,path=DIR/vu.sock",
                "-device",
                "vhost-user-blk-pci,chardev=vu,id=vdb",
            ],
        ),
    ];
    for (name, args) in cases {
        let qemu = place.start(name, args)?;
        // Each machine is another domain, with the same first disk.
        let domsnap = Domsnap::new(&place.dir.path().join(format!("state-{name}")));
        let create = |more: &[&str]| domsnap.run(&[&["create", &qemu.address()], more].concat());
        for more in [&["s"][..], &["s", "--disk-only"]] {
            refused(create(more)?, &["vdb", "--disk vdb=skip"])
                .with_context(|| format!("{name} {more:?}"))?;
        }
        let made = create(&["s", "--disk-only", "--disk", "vdb=skip", "--json"])?;
        let made: Value = made.expect_status(status::DONE).context(name)?.json()?;
        ensure!(made["snapshot"]["skipped"][0]["target"] == "vdb", "{name}: {made}");
        let shown = domsnap.done(&["show", &qemu.address(), "s"])?;
        ensure!(shown.stdout.contains("skipped") && shown.stdout.contains("vdb"), "{name}: {}", shown.stdout);
        let reverted = domsnap.done(&["revert", &qemu.address(), "s"])?;
        ensure!(reverted.stdout.contains("vdb"), "{name}: {}", reverted.stdout);
        qemu.quit()?;
        std::fs::remove_dir_all(place.dir.path().join("d.qcow2.domsnap")).ok();
        for image in ["d.qcow2", "e.qcow2"] {
            qemu::img(&["create", "-q", "-f", "qcow2", &place.file(image), "1M"])?;
        }
    }
    Ok(())
}

/// An image that was moved away, or replaced, under a running guest: what its name leads to is not what the
/// guest has. Nothing is done by that name, whichever layer it is, and the message says how to
/// put it right.
#[test]
fn moved_and_replaced_images_are_refused() -> Result<()> {
    for (format, image) in [("qcow2", "d.qcow2"), ("raw", "d.raw")] {
        let place = Place::new(&[image, "other.qcow2", "other.raw"])?;
        let other = place.file(&format!("other.{format}"));
        let drive = format!("driver={format},file.driver=file,file.filename=DIR/{image},node-name=d0");
        let dir = place.dir.path().display().to_string();
        // A file that QEMU only writes is no image that was moved.
        let (drive, serial) = (drive.replace("DIR", &dir), format!("file:{dir}/console"));
        let disk = ["-blockdev", &drive, "-device", "virtio-blk-pci,drive=d0,id=vda"];
        let args = [&disk[..], &["-serial", &serial]].concat();
        let qemu = Idle::start(Version::New, place.dir.path(), format, &args)?;
        let (domsnap, address) = (place.domsnap(), qemu.address());
        let (path, away) = (place.file(image), place.file("away"));
        qemu.write("vda", 7)?;
        let refuse = |operations: &[&[&str]], parts: &[&str]| -> Result<()> {
            for operation in operations {
                let args = [&operation[..1], &[address.as_str()], &operation[1..]].concat();
                refused(domsnap.run(&args)?, parts).with_context(|| format!("{format} {operation:?}"))?;
            }
            Ok(())
        };
        let replace = |image: &str| -> Result<()> {
            std::fs::rename(image, &away)?;
            std::fs::copy(&other, image)?;
            Ok(())
        };
        let put_back = |image: &str| std::fs::rename(&away, image);
        let untouched = std::fs::read(&other)?;
        let creates: [&[&str]; 3] =
            [&["create", "s"], &["create", "s", "--disk-only"], &["create", "s", "--external"]];

        // A domain that is not known yet.
        replace(&path)?;
        refuse(&creates, &["moved or replaced", &path, &format!("mv -T {away} {path}")])?;
        ensure!(std::fs::read(&path)? == untouched, "{format}: the other file was changed");
        put_back(&path)?;
        let how: &[&str] = if format == "raw" { &["--disk", "vda=copy"] } else { &["--external"] };
        domsnap.done(&[&["create", &address, "s"], how].concat())?;

        // The active image of a known one, and a frozen one below it.
        let with = |args: &[&'static str]| [args, how].concat();
        let creates = [with(&["create", "t"]), with(&["create", "t", "--disk-only"])];
        let all = [&creates[0][..], &creates[1], &["revert", "s"], &["delete", "s"]];
        replace(&path)?;
        refuse(&all[..if format == "raw" { 3 } else { 4 }], &["vda", &path])?;
        ensure!(std::fs::read(&path)? == untouched, "{format}: the other file was changed");
        put_back(&path)?;
        if format == "raw" {
            domsnap.done(&["revert", &address, "s"])?;
            qemu.quit()?;
            continue;
        }
        let layers =
            std::fs::read_dir(&dir)?.filter_map(|entry| Some(entry.ok()?.path().display().to_string()));
        let is_frozen = |layer: &String| {
            let node = qemu.qmp("query-named-block-nodes", json!({ "flat": true })).unwrap_or_default();
            let nodes = node.as_array().cloned().unwrap_or_default();
            nodes.iter().any(|node| node["file"] == layer.as_str() && node["ro"] == true)
        };
        let frozen =
            layers.filter(|layer| layer.contains(".ds-")).find(is_frozen).context("no frozen layer")?;
        replace(&frozen)?;
        refuse(&all, &["vda", &frozen])?;
        ensure!(std::fs::read(&frozen)? == untouched, "{format}: the other file was changed");
        put_back(&frozen)?;

        // Put right, all is as before: the guest has what it wrote.
        domsnap.done(&[&["create", &address, "t"], how].concat())?;
        domsnap.done(&["revert", &address, "s"])?;
        domsnap.done(&["delete", &address, "t"])?;
        qemu.flush("vda")?;
        ensure!(has_pattern(Path::new(&path), 7)?, "{format}: the guest has lost what it wrote");

        // A file without any name left.
        std::fs::remove_file(&path)?;
        std::fs::copy(&other, &path)?;
        refuse(&[&["create", "u"]], &["vda", &path])?;
        qemu.quit()?;
    }
    Ok(())
}

/// A disk that was plugged in later is missed, and a job that works on a disk keeps snapshots and reverts off
/// it.
#[test]
fn later_disk_and_busy_disk_are_refused() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2"])?;
    let qemu = place.start("m", &["-device", "pcie-root-port,id=rp0,chassis=1"])?;
    let domsnap = place.domsnap();
    let address = qemu.address();
    domsnap.done(&["create", &address, "first"])?;
    qemu.qmp(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "e0", "file": { "driver": "file", "filename": place.file("e.qcow2") } }),
    )?;
    qemu.qmp("device_add", json!({ "driver": "virtio-blk-pci", "drive": "e0", "id": "vdb", "bus": "rp0" }))?;
    refused(domsnap.run(&["create", &address, "second"])?, &["vdb", "not registered"])?;
    refused(domsnap.run(&["create", &address, "second", "--disk-only"])?, &["vdb"])?;
    domsnap.done(&["create", &address, "second", "--disk", "vdb=skip"])?;

    // A backup at the least speed that there is: it does not end by itself.
    qemu.write("vda", 7)?;
    qemu.qmp(
        "blockdev-add",
        json!({ "driver": "null-co", "node-name": "target", "size": 1 << 20, "read-zeroes": true }),
    )?;
    let backup =
        json!({ "job-id": "nightly", "device": "d0", "target": "target", "sync": "full", "speed": 1 });
    qemu.qmp("blockdev-backup", backup)?;
    let listed = domsnap.done(&["list", &address])?;
    ensure!(listed.stdout.contains("without vdb"), "{listed}");
    refused(domsnap.run(&["create", &address, "third", "--disk", "vdb=skip"])?, &["vda", "job nightly"])?;
    refused(domsnap.run(&["revert", &address, "second"])?, &["vda", "job nightly"])?;
    qemu.qmp("job-cancel", json!({ "id": "nightly" }))?;
    let until = Instant::now() + Duration::from_secs(240);
    while qemu.qmp("query-block-jobs", json!({}))?.as_array().is_some_and(|jobs| !jobs.is_empty()) {
        ensure!(Instant::now() < until, "the backup does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    // A mirror that waits for its end.
    let mirror = json!({ "job-id": "move", "device": "d0", "target": "target", "sync": "full" });
    qemu.qmp("blockdev-mirror", mirror)?;
    refused(domsnap.run(&["create", &address, "third", "--disk", "vdb=skip"])?, &["vda", "job move"])?;
    qemu.qmp("job-cancel", json!({ "id": "move" }))?;
    qemu.quit()
}

/// Waits until so many devices have images.
fn wait_for_backends(qemu: &Idle, wanted: usize) -> Result<()> {
    let until = Instant::now() + Duration::from_secs(240);
    loop {
        let graph = qemu.qmp("x-debug-query-block-graph", json!({}))?;
        let nodes = graph["nodes"].as_array().context("nodes")?;
        let backends = nodes.iter().filter(|node| node["type"] == "block-backend").count();
        if backends == wanted {
            return Ok(());
        }
        ensure!(Instant::now() < until, "{backends} devices have images, and not {wanted}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Memory that needs a disk which was plugged in is not loaded by a QEMU that is started without it: the
/// disks are reverted, and the command is for the user.
#[test]
fn memory_with_a_plugged_in_disk_is_not_started() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2"])?;
    let qemu = place.start("m", &["-device", "virtio-scsi-pci,id=bus0"])?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    qemu.write("vda", 1)?;
    let file = json!({ "driver": "file", "filename": place.file("e.qcow2") });
    qemu.qmp("blockdev-add", json!({ "driver": "qcow2", "node-name": "e0", "file": file }))?;
    qemu.qmp("device_add", json!({ "driver": "scsi-hd", "drive": "e0", "id": "sda", "bus": "bus0.0" }))?;
    domsnap.done(&["create", &address, "s"])?;
    qemu.write("vda", 2)?;
    domsnap.done(&["revert", &address, "s", "--off"])?;
    let reverted = domsnap.done(&["revert", &address, "s"])?;
    ensure!(reverted.stdout.contains("the domain was not started"), "{reverted}");
    ensure!(reverted.stdout.contains("its memory needs them: sda"), "{reverted}");
    ensure!(has_pattern(Path::new(&place.file("d.qcow2")), 1)?);
    domsnap.done(&["create", &address, "t"]).map(drop)
}

/// A disk that was unplugged after a snapshot is let go by QEMU: who unplugged it could not close the nodes
/// that depend on theirs.
#[test]
fn unplugged_disk_is_released() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2"])?;
    let qemu = place.start("m", &["-device", "virtio-scsi-pci,id=bus0"])?;
    let domsnap = place.domsnap();
    let address = qemu.address();
    qemu.qmp(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "e0", "file": { "driver": "file", "filename": place.file("e.qcow2") } }),
    )?;
    qemu.qmp("device_add", json!({ "driver": "scsi-hd", "drive": "e0", "id": "sda", "bus": "bus0.0" }))?;
    domsnap.done(&["create", &address, "s1", "--disk-only", "--external"])?;
    domsnap.done(&["create", &address, "s2", "--disk-only", "--external"])?;
    qemu.qmp("device_del", json!({ "id": "sda" }))?;
    // QEMU lets go of its image a moment later.
    wait_for_backends(&qemu, 1)?;
    domsnap.done(&["delete", &address, "s1"])?;
    ensure!(
        qemu.qmp("query-named-block-nodes", json!({ "flat": true }))?
            .as_array()
            .is_some_and(|nodes| nodes.iter().all(|node| !node["file"].to_string().contains("/e.qcow2"))),
        "QEMU has the unplugged disk open"
    );
    domsnap.done(&["create", &address, "s3", "--disk-only", "--disk", "sda=skip"])?;
    domsnap.done(&["delete", &address, "s2"])?;
    qemu.quit()
}

/// Layers of other sizes are merged in any order, while the guest runs and at rest: the disk keeps its last
/// size, what was written is there, and what was never written reads as zeroes.
#[test]
fn layers_of_growing_disks_are_merged_in_any_order() -> Result<()> {
    const MIB: u64 = 1 << 20;
    for (order, live) in [
        (["s1", "s2", "s3"], true),
        (["s3", "s2", "s1"], true),
        (["s2", "s3", "s1"], true),
        (["s2", "s1", "s3"], false),
    ] {
        let place = Place::new(&["d.qcow2"])?;
        let qemu = place.start("m", &[])?;
        let (domsnap, address) = (place.domsnap(), qemu.address());
        let vda = "/machine/peripheral/vda/virtio-backend";
        let writes = [(1_u8, 0), (2, MIB), (3, 3 * MIB), (4, 2 * MIB)];
        let write = |(pattern, at): (u8, u64)| {
            qemu.monitor(&format!("qemu-io -d {vda} \"write -P {pattern} {at} 64k\""))
        };
        write(writes[0])?;
        for (name, size, written) in
            [("s1", 2 * MIB, writes[1]), ("s2", 4 * MIB, writes[2]), ("s3", 4 * MIB, writes[3])]
        {
            domsnap.done(&["create", &address, name, "--external", "--disk-only"])?;
            let node = node_of(&qemu, vda)?;
            qemu.qmp("block_resize", json!({ "node-name": node, "size": size }))?;
            write(written)?;
        }
        qemu.flush("vda")?;
        let file = place.file("d.qcow2");
        let mut qemu = Some(qemu);
        let domain = if live {
            address
        } else {
            qemu.take().context("it runs")?.quit()?;
            file.clone()
        };
        for name in order {
            domsnap.done(&["delete", &domain, name])?;
            if let Some(qemu) = &qemu {
                qemu.flush("vda")?;
            }
            ensure!(
                size_of_image(&file)? == 4 * MIB,
                "{order:?}, live: {live}: size after {name} was deleted"
            );
            for (pattern, at, length) in [
                (1, 0, 64 << 10),
                (0, 64 << 10, MIB - (64 << 10)),
                (2, MIB, 64 << 10),
                (0, MIB + (64 << 10), MIB - (64 << 10)),
                (4, 2 * MIB, 64 << 10),
                (3, 3 * MIB, 64 << 10),
                (0, 3 * MIB + (64 << 10), MIB - (64 << 10)),
            ] {
                let read = format!("read -P {pattern} {at} {length}");
                let output = std::process::Command::new("qemu-io")
                    .args(["-U", "-r", "-f", "qcow2", "-c", &read, &file])
                    .output()?;
                let said = String::from_utf8_lossy(&output.stdout);
                ensure!(
                    output.status.success() && !said.contains("verification failed"),
                    "{order:?}, live: {live}, after {name} was deleted: {read}: {said}"
                );
            }
        }
        domsnap.done(&["check", &domain])?;
        if let Some(qemu) = qemu {
            qemu.quit()?;
        }
    }
    Ok(())
}

/// A throttle filter stays above what is done to the disk below it, and what the command line said of the
/// image is said again.
#[test]
fn throttle_and_node_options_survive_snapshots() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2"])?;
    let image = place.file("e.qcow2");
    let args = [
        "-object",
        "throttle-group,id=t,x-bps-total=99999999",
        "-blockdev",
        "driver=qcow2,file.driver=file,file.filename=DIR/e.qcow2,file.locking=off,node-name=e0,overlap-check=none",
        "-blockdev",
        "driver=throttle,throttle-group=t,file=e0,node-name=t0",
        "-device",
        "virtio-blk-pci,drive=t0,id=vdb",
    ];
    let qemu = place.start("t", &args)?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    let create = |name: &str, pattern: u8, more: &[&str]| -> Result<()> {
        qemu.write("vdb", pattern)?;
        domsnap.done(&[&["create", &address, name], more].concat()).map(drop)
    };
    create("inside", 1, &["--internal"])?;
    create("outside", 2, &["--external"])?;
    create("disks", 3, &["--external", "--disk-only"])?;
    qemu.write("vdb", 4)?;
    for (name, pattern) in [("inside", 1), ("outside", 2), ("disks", 3)] {
        domsnap.done(&["revert", &address, name])?;
        qemu.flush("vdb")?;
        ensure!(has_pattern(Path::new(&image), pattern)?, "{name}");
    }
    domsnap.done(&["delete", &address, "outside"])?;
    domsnap.done(&["delete", &address, "disks", "inside"])?;
    ensure!(has_pattern(Path::new(&image), 3)?);
    let nodes = qemu.qmp("query-named-block-nodes", json!({ "flat": true }))?;
    let drivers: Vec<&str> =
        nodes.as_array().context("nodes")?.iter().filter_map(|node| node["drv"].as_str()).collect();
    ensure!(drivers.contains(&"throttle"), "{drivers:?}");
    // An image that QEMU opened without locks is open without them still: no byte of it is locked.
    let free = Command::new("qemu-io").args(["-f", "qcow2", "-c", "read 0 64k", &image]).output()?;
    ensure!(free.status.success(), "{}", String::from_utf8_lossy(&free.stderr));
    qemu.quit()
}

/// Words for a disk `ID` with the image `ID.qcow2` and filters above it, the lowest first. A `target` has the
/// image `ID-t.qcow2`.
fn filtered(id: &str, filters: &[&str]) -> Vec<String> {
    let file = |name: &str| format!("driver=qcow2,file.driver=file,file.filename=DIR/{name}.qcow2");
    let mut args = vec!["-blockdev".to_owned(), format!("{},node-name={id}-0", file(id))];
    for (place, filter) in filters.iter().enumerate() {
        let target = format!("{id}-t");
        if filter.contains("target=") {
            args.extend(["-blockdev".to_owned(), format!("{},node-name={target}", file(&target))]);
        }
        let filter = filter.replace("BELOW", &format!("{id}-{place}")).replace("TARGET", &target);
        args.extend(["-blockdev".to_owned(), format!("{filter},node-name={id}-{}", place + 1)]);
    }
    let device = format!("virtio-blk-pci,drive={id}-{},id={id}", filters.len());
    args.extend(["-device".to_owned(), device]);
    args
}

const COPIES: &str = "driver=copy-before-write,file=BELOW,target=TARGET";
const WAITS: &str = "driver=throttle,throttle-group=t,file=BELOW";
const COMPRESSES: &str = "driver=compress,file=BELOW";
const GROUP: [&str; 2] = ["-object", "throttle-group,id=t,x-bps-total=99999999"];

/// Filters that pass everything through stay above the disk, whatever is done below them; through
/// `copy-before-write` QEMU takes no internal snapshot, which is known before, and ours deletes one that is
/// there already.
#[test]
fn filters_that_pass_through_are_kept() -> Result<()> {
    let stacks: [(&str, &[&str]); 4] = [
        ("copied", &[COPIES]),
        ("throttled-copied", &[WAITS, COPIES]),
        ("copied-throttled", &[COPIES, WAITS]),
        ("compressed", &[COMPRESSES, WAITS]),
    ];
    let images: Vec<String> = stacks
        .iter()
        .flat_map(|(id, _)| [format!("{id}.qcow2"), format!("{id}-t.qcow2")])
        .chain(["d.qcow2".to_owned()])
        .collect();
    let place = Place::new(&images.iter().map(String::as_str).collect::<Vec<_>>())?;
    let args: Vec<String> = GROUP
        .map(str::to_owned)
        .into_iter()
        .chain(stacks.iter().flat_map(|(id, filters)| filtered(id, filters)))
        .collect();
    let qemu = place.start("m", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    let write = |pattern: u8| stacks.iter().try_for_each(|(id, _)| qemu.write(id, pattern));
    write(1)?;
    domsnap.done(&["create", &address, "s1", "--external"])?;
    write(2)?;
    refused(
        domsnap.run(&["create", &address, "inside", "--internal"])?,
        &["copied", "copy-before-write filter", "takes no internal snapshot", "=external"],
    )?;
    ensure!(qemu.state()? == "running");
    domsnap.done(&["create", &address, "s2", "--external", "--disk-only"])?;
    write(3)?;
    for (name, pattern) in [("s1", 1), ("s2", 2)] {
        let reverted = domsnap.done(&["revert", &address, name])?;
        ensure!(reverted.stdout.contains("copied: its copy-before-write filter copied-1"), "{reverted}");
        for (id, _) in stacks {
            qemu.flush(id)?;
            ensure!(has_pattern(Path::new(&place.file(&format!("{id}.qcow2"))), pattern)?, "{id}: {name}");
        }
    }
    domsnap.done(&["delete", &address, "s1"])?;
    domsnap.done(&["delete", &address, "s2"])?;
    let devices = qemu.qmp("query-block", json!({}))?;
    for (id, filters) in stacks {
        let top = node_of(&qemu, &format!("/machine/peripheral/{id}/virtio-backend"))?;
        ensure!(top == format!("{id}-{}", filters.len()), "{id}: {devices}");
        ensure!(has_pattern(Path::new(&place.file(&format!("{id}.qcow2"))), 2)?, "{id}");
    }

    // The backup tool comes when internal snapshots are there.
    let made = domsnap.done(&["create", &address, "i1", "--disk-only", "--disk", "vda=internal"])?;
    ensure!(made.stdout.contains("copied: the snapshot is external: QEMU takes no internal"), "{made}");
    domsnap.done(&["create", &address, "i2", "--external"])?;
    domsnap.done(&["create", &address, "i3", "--disk-only", "--disk", "vda=internal"])?;
    let vda = "/machine/peripheral/vda/virtio-backend";
    let below = node_of(&qemu, vda)?;
    let drive = |node: &str| {
        qemu.qmp("qom-set", json!({ "path": "/machine/peripheral/vda", "property": "drive", "value": node }))
    };
    qemu.qmp("blockdev-add", json!({ "driver": "blkdebug", "node-name": "debug", "image": below }))?;
    drive("debug")?;
    for args in [&["revert", &address, "i3"][..], &["delete", &address, "i1"]] {
        refused(domsnap.run(args)?, &["vda", "blkdebug filter"]).with_context(|| format!("{args:?}"))?;
    }
    domsnap.done(&["recover", &address])?;
    drive(&below)?;
    qemu.qmp("blockdev-del", json!({ "node-name": "debug" }))?;
    let copies =
        json!({ "driver": "copy-before-write", "node-name": "copies", "file": below, "target": "kept" });
    qemu.qmp(
        "blockdev-add",
        json!({ "driver": "null-co", "node-name": "kept", "size": 1 << 20, "read-zeroes": true }),
    )?;
    qemu.qmp("blockdev-add", copies)?;
    drive("copies")?;
    domsnap.done(&["revert", &address, "i3"])?;
    for name in ["i3", "i1", "i2"] {
        domsnap.done(&["delete", &address, name])?;
    }
    let checked = domsnap.done(&["check", &address])?;
    ensure!(!checked.stdout.contains("warning"), "{checked}");
    qemu.quit()
}

/// A filter that does more, one below the format, and a backup that reads what a filter keeps, are refused by
/// name: with memory and without, before anything is made.
#[test]
fn filters_that_do_more_are_refused_by_name() -> Result<()> {
    let below = |filter: &str, child: &str| {
        format!("driver=qcow2,file.driver={filter},file.{child}.driver=file,file.{child}.filename=DIR/")
    };
    let ids =
        ["pre", "debug", "log", "cor", "raw", "fleeced", "exported", "pre-below", "debug-below", "middle"];
    let args: [(&str, &[&str], &str); 7] = [
        ("pre", &["driver=preallocate,file=BELOW"], "preallocate filter"),
        ("debug", &[WAITS, "driver=blkdebug,image=BELOW"], "blkdebug filter"),
        ("log", &["driver=blklogwrites,file=BELOW,log=TARGET"], "blklogwrites filter"),
        ("cor", &["driver=copy-on-read,file=BELOW"], "copy-on-read filter"),
        ("raw", &["driver=raw,file=BELOW"], "not a file with a name"),
        ("fleeced", &[COPIES], "the node reads uses"),
        ("exported", &[COPIES], "an export of this QEMU uses exported-t"),
    ];
    let images: Vec<String> = ids
        .iter()
        .flat_map(|id| [format!("{id}.qcow2"), format!("{id}-t.qcow2")])
        .chain(["d.qcow2".to_owned()])
        .collect();
    let place = Place::new(&images.iter().map(String::as_str).collect::<Vec<_>>())?;
    let mut all: Vec<String> = GROUP.map(str::to_owned).into();
    for (id, filters, _) in &args {
        let mut more = filtered(id, filters);
        // What `log=` names.
        if *id == "log" {
            let target = "driver=file,filename=DIR/log-t.qcow2,node-name=log-t".to_owned();
            more.splice(2..2, ["-blockdev".to_owned(), target]);
        }
        all.extend(more);
    }
    let fleece =
        "driver=qcow2,file.driver=file,file.filename=DIR/middle-t.qcow2,backing=fleeced-0,node-name=reads";
    let base = "driver=qcow2,file.driver=file,file.filename=DIR/middle.qcow2,node-name=middle-b";
    let middle =
        "driver=qcow2,file.driver=file,file.filename=DIR/cor-t.qcow2,backing=middle-f,node-name=middle-0";
    for (option, value) in [
        ("-blockdev", fleece.to_owned()),
        ("-blockdev", format!("{}pre-below.qcow2,node-name=pre-below-0", below("preallocate", "file"))),
        ("-blockdev", format!("{}debug-below.qcow2,node-name=debug-below-0", below("blkdebug", "image"))),
        ("-blockdev", base.to_owned()),
        ("-blockdev", "driver=throttle,throttle-group=t,file=middle-b,node-name=middle-f".to_owned()),
        ("-blockdev", middle.to_owned()),
        ("-device", "virtio-blk-pci,drive=pre-below-0,id=pre-below".to_owned()),
        ("-device", "virtio-blk-pci,drive=debug-below-0,id=debug-below".to_owned()),
        ("-device", "virtio-blk-pci,drive=middle-0,id=middle".to_owned()),
    ] {
        all.extend([option.to_owned(), value]);
    }
    let qemu = place.start("m", &all.iter().map(String::as_str).collect::<Vec<_>>())?;
    let server = json!({ "addr": { "type": "unix", "data": { "path": place.file("n.sock") } } });
    qemu.qmp("nbd-server-start", server)?;
    qemu.qmp("block-export-add", json!({ "type": "nbd", "id": "x", "node-name": "exported-t" }))?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    for more in [&[][..], &["--disk-only", "--external"]] {
        let outcome =
            domsnap.run(&[&["create", &address, "s"], more].concat())?.expect_status(status::REFUSED)?;
        let named = |id: &str, why: &str| {
            let begin = format!("{id} (");
            let part = outcome.stderr.split("; ").find(|part| part.contains(&begin));
            ensure!(part.is_some_and(|part| part.contains(why)), "{id}: {why:?} is not in {outcome}");
            Ok(())
        };
        for (id, _, why) in &args {
            named(id, why)?;
        }
        named("pre-below", "preallocate filter below")?;
        named("debug-below", "blkdebug filter below")?;
        named("middle", "throttle filter below")?;
        ensure!(outcome.stderr.contains("no changes made"), "{outcome}");
    }
    qemu.quit()
}

/// What else of the same QEMU uses an image is found before the guest is stopped; two devices on one image
/// are named as such; and dirty bitmaps that no file has are reported when they are left behind.
#[test]
fn images_that_qemu_itself_uses_twice_are_named() -> Result<()> {
    let place = Place::new(&["d.qcow2", "b.qcow2", "s.qcow2"])?;
    for image in ["e.qcow2", "f.qcow2"] {
        let (base, image) = (place.file("b.qcow2"), place.file(image));
        qemu::img(&["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image])?;
    }
    let args = [
        "-blockdev",
        "driver=qcow2,read-only=on,file.driver=file,file.filename=DIR/b.qcow2,node-name=base",
        "-blockdev",
        "driver=qcow2,file.driver=file,file.filename=DIR/e.qcow2,node-name=e0,backing=base",
        "-blockdev",
        "driver=qcow2,file.driver=file,file.filename=DIR/f.qcow2,node-name=left,backing=base",
        "-device",
        "virtio-blk-pci,drive=e0,id=vdb",
        "-blockdev",
        "driver=qcow2,file.driver=file,file.filename=DIR/s.qcow2,node-name=s0",
        "-device",
        "virtio-blk-pci,drive=s0,id=one,share-rw=on",
        "-device",
        "virtio-blk-pci,drive=s0,id=two,share-rw=on",
    ];
    let qemu = place.start("m", &args)?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    refused(
        domsnap.run(&["create", &address, "s"])?,
        &["one (", "the device two writes the same image", "two (", "the device one writes"],
    )?;
    let create = |name: &str, more: &[&str]| {
        let skip = ["create", &address, name, "--disk", "one=skip", "--disk", "two=skip"];
        domsnap.done(&[&skip[..], more].concat())
    };
    create("s", &["--disk-only"])?;
    refused(domsnap.run(&["revert", &address, "s"])?, &["left of the same QEMU uses", "vdb"])?;
    ensure!(qemu.state()? == "running");
    qemu.qmp("blockdev-del", json!({ "node-name": "left" }))?;
    domsnap.done(&["revert", &address, "s"])?;
    let node = node_of(&qemu, "/machine/peripheral/vda/virtio-backend")?;
    for (name, persistent) in [("kept", true), ("fleeting", false)] {
        let bitmap = json!({ "node": node, "name": name, "persistent": persistent });
        qemu.qmp("block-dirty-bitmap-add", bitmap)?;
    }
    let made = create("t", &["--external"])?;
    ensure!(made.stdout.contains("vda: its dirty bitmaps (") && made.stdout.contains("fleeting"), "{made}");
    ensure!(made.stdout.contains("must be a full one"), "{made}");
    let made = create("u", &["--external"])?;
    ensure!(!made.stdout.contains("bitmap"), "{made}");
    qemu.quit()
}

/// A slot that a disk can be plugged into.
const SLOTS: [&str; 6] = [
    "-device",
    "pcie-root-port,id=rp0,chassis=1",
    "-device",
    "pcie-root-port,id=rp1,chassis=2",
    "-device",
    "pcie-root-port,id=rp2,chassis=3",
];

fn plug(qemu: &Idle, slot: usize, drive: &str, id: &str) -> Result<()> {
    let device = json!({ "driver": "virtio-blk-pci", "drive": drive, "id": id, "bus": format!("rp{slot}") });
    qemu.qmp("device_add", device).map(drop)
}

fn is_unlocked(image: &str) -> Result<bool> {
    let free = Command::new("qemu-io").args(["-f", "qcow2", "-c", "read 0 64k", image]).output()?;
    Ok(free.status.success())
}

/// Of a disk that was plugged in, what QEMU does not report is found out, or its loss is noted; and one with
/// copy-on-read, which no query reports either, is refused before anything is made.
#[test]
fn options_of_plugged_in_disks_are_found_out_or_noted() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2", "f.qcow2", "g.qcow2"])?;
    let qemu = place.start("m", &SLOTS)?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    let image = place.file("e.qcow2");
    qemu.qmp(
        "blockdev-add",
        json!({ "driver": "qcow2", "node-name": "e0",
            "file": { "driver": "file", "filename": image, "locking": "off" } }),
    )?;
    plug(&qemu, 0, "e0", "vdb")?;
    qemu.write("vdb", 1)?;
    let made = domsnap.done(&["create", &address, "s1", "--external"])?;
    ensure!(made.stdout.contains("vdb: plugged in while QEMU ran"), "{made}");
    ensure!(!made.stdout.contains("deferred"), "{made}");
    ensure!(is_unlocked(&image)?, "the overlay is locked");
    qemu.write("vdb", 2)?;
    domsnap.done(&["revert", &address, "s1"])?;
    qemu.flush("vdb")?;
    ensure!(is_unlocked(&image)? && has_pattern(Path::new(&image), 1)?);
    let made = domsnap.done(&["create", &address, "s2", "--external", "--disk-only"])?;
    ensure!(!made.stdout.contains("plugged in"), "noted again: {made}");

    for (slot, image, name) in [(1, "f.qcow2", "unnamed"), (2, "g.qcow2", "named")] {
        let node = if name == "named" { ",node-name=g0" } else { "" };
        let drive = format!(
            "drive_add 0 file={},if=none,id={name},format=qcow2,copy-on-read=on{node}",
            place.file(image)
        );
        let said = qemu.monitor(&drive)?;
        ensure!(said.contains("OK"), "{said}");
        plug(&qemu, slot, name, &format!("vd-{name}"))?;
        refused(domsnap.run(&["create", &address, "s3", "--external"])?, &[name, "copy-on-read=on"])?;
        qemu.qmp("device_del", json!({ "id": format!("vd-{name}") }))?;
        // QEMU may have let go of the device already: then the drive has its own name.
        let skip =
            |target: &str| domsnap.run(&["create", &address, name, "--disk", &format!("{target}=skip")]);
        let skipped = skip(&format!("vd-{name}"))?;
        if skipped.stderr.contains("has no disk") {
            skip(name)?.expect_status(status::DONE)?;
        } else {
            skipped.expect_status(status::DONE)?;
        }
        if name == "unnamed" {
            // The firmware takes no notice of the unplug request; a reset does what it asks for.
            qemu.qmp("system_reset", json!({}))?;
            wait_for_backends(&qemu, 2)?;
        }
    }
    qemu.quit()
}

/// Of a disk that was plugged in as a part of a file, or with a filter between format and file, nothing is
/// taken.
#[test]
fn slices_and_filters_are_refused() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2", "s.raw"])?;
    let file = |name: &str| json!({ "driver": "file", "filename": place.file(name) });
    // A qcow2 image in the middle of a file.
    let inside = std::fs::read(place.file("e.qcow2"))?;
    let mut whole = vec![7_u8; 1 << 20];
    whole.extend(&inside);
    whole.resize(4 << 20, 7);
    std::fs::write(place.file("s.raw"), &whole)?;
    let cases = [
        ("size-only", json!({ "driver": "raw", "size": 524288, "file": file("s.raw") })),
        ("offset", json!({ "driver": "raw", "offset": 65536, "file": file("s.raw") })),
        (
            "inside",
            json!({ "driver": "qcow2", "file": { "driver": "raw", "offset": 1 << 20, "file": file("s.raw") } }),
        ),
        (
            "throttled",
            json!({ "driver": "qcow2",
                "file": { "driver": "throttle", "throttle-group": "t", "file": file("e.qcow2") } }),
        ),
        (
            "copied",
            json!({ "driver": "copy-on-read", "file": { "driver": "qcow2", "file": file("e.qcow2") } }),
        ),
    ];
    for (name, mut node) in cases {
        let args = [&SLOTS[..], &["-object", "throttle-group,id=t,x-bps-total=99999999"]].concat();
        let qemu = place.start(name, &args)?;
        let domsnap = Domsnap::new(&place.dir.path().join(format!("state-{name}")));
        let address = qemu.address();
        node["node-name"] = json!("n0");
        qemu.qmp("blockdev-add", node)?;
        plug(&qemu, 0, "n0", "vdb")?;
        for more in [&["s"][..], &["s", "--disk-only", "--external"]] {
            let outcome = domsnap.run(&[&["create", &address], more].concat())?;
            refused(outcome, &["vdb", "--disk vdb=skip"]).with_context(|| format!("{name} {more:?}"))?;
        }
        qemu.quit()?;
        std::fs::remove_dir_all(place.dir.path().join("d.qcow2.domsnap")).ok();
    }
    ensure!(std::fs::read(place.file("s.raw"))? == whole, "the file was changed");
    Ok(())
}

/// A byte lock on an image, as another QEMU's that writes it.
fn lock_as_a_writer(image: &str) -> Result<std::fs::File> {
    use nix::fcntl::{FcntlArg, fcntl};
    let file = std::fs::File::open(image)?;
    let lock = nix::libc::flock {
        l_type: nix::libc::F_RDLCK as _,
        l_whence: nix::libc::SEEK_SET as _,
        l_start: 101,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&file, FcntlArg::F_OFD_SETLK(&lock))?;
    Ok(file)
}

/// That QEMU cannot be given a frozen image by its new name does not lock the domain: it is deferred, what
/// needs it is deferred too, and a recovery does it.
#[test]
fn names_that_qemu_cannot_be_given_are_deferred() -> Result<()> {
    let place = Place::new(&["d.qcow2"])?;
    let qemu = place.start("m", &[])?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    // Its images are open as soon as it answers.
    qemu.state()?;
    let locked = lock_as_a_writer(&place.file("d.qcow2"))?;
    for (name, pattern) in [("s1", 1), ("s2", 2)] {
        qemu.write("vda", pattern)?;
        let made = domsnap.done(&["create", &address, name, "--external"])?;
        ensure!(made.stdout.contains("deferred") && made.stdout.contains("domsnap recover"), "{made}");
    }
    qemu.write("vda", 4)?;
    domsnap.done(&["create", &address, "s3", "--external", "--disk-only"])?;
    drop(locked);
    domsnap.done(&["recover", &address])?;
    domsnap.done(&["delete", &address, "s1"])?;
    for (name, pattern) in [("s2", 2), ("s3", 4)] {
        domsnap.done(&["revert", &address, name])?;
        qemu.flush("vda")?;
        ensure!(has_pattern(Path::new(&place.file("d.qcow2")), pattern)?, "{name}");
    }
    qemu.quit()
}

/// Waits on a second monitor until the guest is stopped, then locks an image for a moment as a writer.
fn lock_when_stopped(monitor: &str, image: &str) -> Result<()> {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(monitor)?;
    stream.set_read_timeout(Some(Duration::from_secs(240)))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n")?;
    loop {
        let line = lines.next().context("QEMU closed the monitor")??;
        if line.contains("\"STOP\"") {
            break;
        }
    }
    let locked = lock_as_a_writer(image)?;
    std::thread::sleep(Duration::from_millis(700));
    drop(locked);
    Ok(())
}

/// An image on which another program holds a writer's lock could not be opened again: its holder is named
/// before the guest is stopped. Where the lock comes later, the revert is rolled back as soon as it goes, and
/// the guest runs on.
#[test]
fn images_that_others_lock_are_not_detached() -> Result<()> {
    let place = Place::new(&["d.qcow2"])?;
    let second =
        ["-chardev", "socket,id=m2,path=DIR/m2.qmp,server=on,wait=off", "-mon", "chardev=m2,mode=control"];
    let qemu = place.start("m", &second)?;
    let (domsnap, address, image) = (place.domsnap(), qemu.address(), place.file("d.qcow2"));
    qemu.write("vda", 1)?;
    domsnap.done(&["create", &address, "s1", "--external"])?;
    qemu.write("vda", 2)?;
    domsnap.done(&["create", &address, "s2", "--internal"])?;
    qemu.write("vda", 3)?;
    let inode =
        |path: &Path| std::fs::metadata(path).map(|about| std::os::unix::fs::MetadataExt::ino(&about)).ok();
    let base = std::fs::read_dir(place.dir.path())?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.to_string_lossy().contains(".ds-") && inode(path) != inode(Path::new(&image)))
        .context("a frozen layer")?;
    let holder = format!("process {}", std::process::id());
    for file in [image.clone(), base.display().to_string()] {
        let locked = lock_as_a_writer(&file)?;
        for name in ["s1", "s2"] {
            refused(domsnap.run(&["revert", &address, name])?, &["vda", "is locked", &holder])
                .with_context(|| format!("{file}: {name}"))?;
            ensure!(qemu.state()? == "running", "the guest is stopped for nothing");
        }
        drop(locked);
    }
    // How fast the other program is decides whether it comes in between.
    let mut met = false;
    for _ in 0..10 {
        let (monitor, file) = (place.file("m2.qmp"), image.clone());
        let other = std::thread::spawn(move || lock_when_stopped(&monitor, &file));
        let reverted = domsnap.run(&["revert", &address, "s1"])?;
        other.join().map_err(|_| anyhow::anyhow!("the other program"))??;
        qemu.wait_state("running")?;
        met = reverted.status != Some(status::DONE);
        if met {
            reverted.expect_status(status::FAILED)?;
            domsnap.done(&["recover", &address])?;
            break;
        }
        qemu.write("vda", 3)?;
    }
    if !met {
        eprintln!("no lock came while the disk was detached: that half was not tried");
    }
    qemu.flush("vda")?;
    ensure!(has_pattern(Path::new(&image), 3)?, "the disk is not as before the revert");
    for (name, pattern) in [("s2", 2), ("s1", 1)] {
        domsnap.done(&["revert", &address, name])?;
        qemu.flush("vda")?;
        ensure!(has_pattern(Path::new(&image), pattern)?, "{name}");
    }
    qemu.quit()
}

/// Shared directories and files that are memory to the guest are named where they are not in a snapshot.
#[test]
fn shared_directories_and_mapped_files_are_named() -> Result<()> {
    let place = Place::new(&["d.qcow2"])?;
    let args = [
        "-machine",
        "nvdimm=on",
        "-m",
        "32,slots=2,maxmem=1G",
        "-object",
        "memory-backend-file,id=nv,share=on,mem-path=DIR/nv.raw,size=16M",
        "-device",
        "virtio-pmem-pci,memdev=nv,id=pm",
        "-fsdev",
        "local,id=fs,path=DIR,security_model=none",
        "-device",
        "virtio-9p-pci,fsdev=fs,mount_tag=host,id=p9",
        "-virtfs",
        "local,path=/usr,mount_tag=readonly,security_model=none,readonly=on",
    ];
    let qemu = place.start("m", &args)?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    let directory = format!("the shared directory {} (9p)", place.dir.path().display());
    let file = format!("the file {} of the memory device pm (virtio-pmem-pci)", place.file("nv.raw"));
    let made = domsnap.done(&["create", &address, "s", "--disk-only"])?;
    ensure!(made.stdout.contains(&format!("{directory}: not in the snapshot")), "{made}");
    ensure!(made.stdout.contains(&format!("{file}: not in the snapshot")), "{made}");
    ensure!(!made.stdout.contains("/usr"), "{made}");
    let made = domsnap.done(&["create", &address, "m"])?;
    ensure!(made.stdout.contains(&format!("{directory}: not in the snapshot")), "{made}");
    ensure!(made.stdout.contains(&format!("{file}: only in the snapshot's memory")), "{made}");
    let shown: Value = domsnap.done(&["show", &address, "m", "--json"])?.json()?;
    ensure!(shown["shared"] == json!([directory]) && shown["outside"] == json!([file]), "{shown}");
    let reverted = domsnap.done(&["revert", &address, "m"])?;
    ensure!(reverted.stdout.contains(&format!("{directory}: not reverted")), "{reverted}");
    ensure!(!reverted.stdout.contains(&file), "{reverted}");
    let reverted = domsnap.done(&["revert", &address, "s"])?;
    ensure!(reverted.stdout.contains(&format!("{directory}: not reverted")), "{reverted}");
    ensure!(reverted.stdout.contains(&format!("{file}: not reverted")), "{reverted}");
    qemu.quit()
}

/// A device whose state QEMU cannot save is named before anything is made, and the disks can be taken.
#[test]
fn device_that_cannot_be_migrated_is_named() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2"])?;
    let args = [
        "-blockdev",
        "driver=qcow2,file.driver=file,file.filename=DIR/e.qcow2,node-name=e0",
        "-device",
        "nvme,drive=e0,serial=x,id=vdb",
    ];
    let qemu = place.start("m", &args)?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    refused(domsnap.run(&["create", &address, "s"])?, &["nvme", "--disk-only", "no changes made"])?;
    ensure!(!Path::new(&place.file("e.qcow2.domsnap")).exists());
    domsnap.done(&["create", &address, "s", "--disk-only"])?;
    qemu.quit()
}

/// A disk whose device sits on the node of the file itself is a raw disk.
#[test]
fn file_node_without_format_is_a_raw_disk() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.raw"])?;
    let args = [
        "-blockdev",
        "driver=file,filename=DIR/e.raw,node-name=e0",
        "-device",
        "virtio-blk-pci,drive=e0,id=vdb",
    ];
    let qemu = place.start("m", &args)?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    qemu.write("vdb", 5)?;
    domsnap.done(&["create", &address, "s", "--disk", "vdb=copy"])?;
    qemu.write("vdb", 6)?;
    domsnap.done(&["revert", &address, "s"])?;
    qemu.flush("vdb")?;
    let held = std::fs::read(place.file("e.raw"))?;
    ensure!(held[256 << 10..][..65536].iter().all(|byte| *byte == 5));
    qemu.quit()
}

/// What is in each drive whose medium can be taken out.
fn media_in(qemu: impl Fn(&str) -> Result<Value>) -> Result<Vec<(String, String)>> {
    let drives = qemu("query-block")?;
    let drives = drives.as_array().context("drives")?.iter().filter(|drive| drive["removable"] == true);
    let mut media: Vec<_> = drives
        .map(|drive| {
            let file = drive["inserted"]["file"].as_str().unwrap_or_default();
            let name = file.rsplit('/').next().unwrap_or_default();
            (drive["qdev"].as_str().unwrap_or_default().to_owned(), name.to_owned())
        })
        .collect();
    media.sort();
    Ok(media)
}

/// A revert with memory puts back the media that the memory has in its drives: changed, ejected and inserted
/// ones, of CD-ROMs, floppies and USB; and where the memory is loaded by a QEMU that is started for it. One
/// that is gone is refused.
#[test]
fn media_are_put_back_before_memory_is_loaded() -> Result<()> {
    let place = Place::new(&["d.qcow2"])?;
    for image in ["a.raw", "b.raw"] {
        std::fs::File::create(place.file(image))?.set_len(1_474_560)?;
    }
    let args = [
        "-drive",
        "file=DIR/a.raw,format=raw,if=none,id=m,media=cdrom",
        "-device",
        "ide-cd,drive=m,id=cd",
        "-device",
        "isa-fdc,id=fdc",
        "-drive",
        "file=DIR/a.raw,format=raw,if=none,id=f,readonly=on",
        "-device",
        "floppy,drive=f,id=fl",
        "-drive",
        "if=none,id=e,media=cdrom",
        "-device",
        "ide-cd,drive=e,id=none,bus=ide.1",
        "-device",
        "qemu-xhci",
        "-drive",
        "file=DIR/a.raw,format=raw,if=none,id=u,readonly=on",
        "-device",
        "usb-storage,drive=u,removable=on,id=us",
    ];
    let qemu = place.start("m", &args)?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    let usb = "/machine/peripheral/us/us.0/legacy[0]";
    let all = [("cd", "a.raw"), ("fl", "a.raw"), ("none", ""), (usb, "a.raw")];
    let expect = |wanted: &[(&str, &str)]| -> Result<()> {
        let mut wanted: Vec<_> =
            wanted.iter().map(|(id, file)| ((*id).to_owned(), (*file).to_owned())).collect();
        wanted.sort();
        let has = media_in(|command| qemu.qmp(command, json!({})))?;
        ensure!(has == wanted, "{has:?} and not {wanted:?}");
        Ok(())
    };
    domsnap.done(&["create", &address, "s"])?;
    let change = |id: &str, file: &str| {
        let new = json!({ "id": id, "filename": place.file(file), "format": "raw" });
        qemu.qmp("blockdev-change-medium", new).map(drop)
    };
    for id in ["cd", "fl", "none", usb] {
        change(id, "b.raw")?;
    }
    domsnap.done(&["create", &address, "t"])?;
    let planned = domsnap.done(&["revert", &address, "s", "--dry-run"])?;
    for args in ["a.raw into drive cd", "a.raw into drive fl", "out of drive none"] {
        ensure!(planned.stdout.contains(args), "{planned}");
    }
    domsnap.done(&["revert", &address, "s", "--paused"])?;
    expect(&all)?;
    ensure!(qemu.state()? != "running");
    domsnap.done(&["revert", &address, "s"])?;
    for id in ["cd", "fl", usb] {
        qemu.qmp("eject", json!({ "id": id, "force": true }))?;
    }
    domsnap.done(&["revert", &address, "s"])?;
    expect(&all)?;

    change("cd", "b.raw")?;
    std::fs::rename(place.file("a.raw"), place.file("c.raw"))?;
    refused(
        domsnap.run(&["revert", &address, "s"])?,
        &["medium", "cd", "a.raw", "which is gone: put the file back"],
    )?;
    std::fs::rename(place.file("c.raw"), place.file("a.raw"))?;

    // Its command has other media than its memory.
    domsnap.done(&["revert", &address, "s", "--off"])?;
    domsnap.done(&["revert", &address, "t"])?;
    expect(&[("cd", "b.raw"), ("fl", "b.raw"), ("none", "b.raw"), (usb, "b.raw")])?;
    qemu.wait_state("running")?;
    domsnap.done(&["revert", &address, "s", "--off"]).map(drop)
}

/// A medium that the guest can write is in no snapshot, which is said; but memory that is restored finds the
/// medium that it has in its drive, because the guest would write what it has of one medium to another. A
/// drive that is one of the domain's disks is a disk as any other.
#[test]
fn writable_media_are_skipped_by_name_and_put_back() -> Result<()> {
    let place = Place::new(&["d.qcow2", "e.qcow2", "f.qcow2"])?;
    for image in ["a.raw", "b.raw", "c.raw", "x.raw"] {
        std::fs::File::create(place.file(image))?.set_len(1_474_560)?;
    }
    let args = [
        "-device",
        "isa-fdc,id=fdc",
        "-drive",
        "file=DIR/a.raw,format=raw,if=none,id=f",
        "-device",
        "floppy,drive=f,id=fl",
        "-drive",
        "file=DIR/c.raw,format=raw,if=none,id=r,readonly=on",
        "-device",
        "floppy,drive=r,id=ro",
        "-device",
        "qemu-xhci",
        "-drive",
        "file=DIR/e.qcow2,format=qcow2,if=none,id=u",
        "-device",
        "usb-storage,drive=u,removable=on,id=us",
        "-drive",
        "file=DIR/f.qcow2,format=qcow2,if=none,id=w",
        "-device",
        "usb-storage,drive=w,removable=on,id=own",
    ];
    let qemu = place.start("m", &args)?;
    let domsnap = place.domsnap();
    let disks = [format!("vda={}", place.file("d.qcow2")), format!("own={}", place.file("f.qcow2"))];
    let socket = qemu.socket().display().to_string();
    domsnap.done(&["domain", "add", "m", "--qmp", &socket, "--disk", &disks[0], "--disk", &disks[1]])?;
    refused(
        domsnap.run(&["create", "m", "s"])?,
        &["fl (", "us (", "its medium is removable", "--disk fl=skip"],
    )?;
    let made = domsnap.done(&["create", "m", "s", "--external", "--disk", "fl=skip", "--disk", "us=skip"])?;
    for word in ["fl: skipped as asked", "us: skipped as asked"] {
        ensure!(made.stdout.contains(word), "{made}");
    }
    let shown = domsnap.done(&["show", "m", "s"])?;
    ensure!(shown.stdout.contains("fl") && shown.stdout.contains("skipped"), "{shown}");
    let usb = "/machine/peripheral/us/us.0/legacy[0]";
    let change = |id: &str, file: &str, format: &str| {
        let new = json!({ "id": id, "filename": place.file(file), "format": format, "read-only-mode": "read-write" });
        qemu.qmp("blockdev-change-medium", new).map(drop)
    };
    change("ro", "b.raw", "raw")?;
    change("fl", "x.raw", "raw")?;
    qemu.qmp("eject", json!({ "id": usb, "force": true }))?;
    let reverted = domsnap.done(&["revert", "m", "s", "--paused"])?;
    ensure!(reverted.stdout.contains("fl"), "{reverted}");
    let drives = qemu.qmp("query-block", json!({}))?;
    let drive = |id: &str| {
        drives
            .as_array()
            .into_iter()
            .flatten()
            .find(|drive| drive["qdev"] == id)
            .cloned()
            .context(id.to_owned())
    };
    for (id, file, read_only) in [("fl", "a.raw", false), ("ro", "c.raw", true), (usb, "e.qcow2", false)] {
        let inserted = drive(id)?["inserted"].clone();
        ensure!(
            inserted["file"] == place.file(file).as_str() && inserted["ro"] == read_only,
            "{id}: {inserted}, and not {file}, read-only {read_only}"
        );
    }
    // The stick that is a disk has its snapshot, not the image that was in it when memory was saved.
    let own = drive("/machine/peripheral/own/own.0/legacy[0]")?["inserted"].clone();
    ensure!(own["ro"] == false && own["image"]["backing-image"].is_object(), "{own}");
    domsnap.done(&["delete", "m", "s"])?;
    qemu.quit()
}

/// A QEMU that records its guest's run would end where it is stopped: it is refused before.
#[test]
fn recorded_run_is_not_stopped() -> Result<()> {
    let place = Place::new(&["d.qcow2"])?;
    let mut qemu = place.start("m", &["-icount", "shift=auto,rr=record,rrfile=DIR/run.bin"])?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    for more in [&[][..], &["--disk-only", "--external"]] {
        refused(
            domsnap.run(&[&["create", &address, "s"], more].concat())?,
            &["records or replays", "no changes made"],
        )?;
    }
    ensure!(qemu.is_alive()? && qemu.state()? == "running");
    qemu.quit()
}

/// A reset does not end a QEMU that was instructed at run time to end where its guest reboots: no query
/// reports that.
#[test]
fn reset_does_not_end_a_qemu_that_ends_at_reboots() -> Result<()> {
    let place = Place::new(&["d.qcow2"])?;
    let mut qemu = place.start("m", &[])?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    domsnap.done(&["create", &address, "s", "--disk-only"])?;
    qemu.qmp("set-action", json!({ "reboot": "shutdown" }))?;
    let reverted = domsnap.done(&["revert", &address, "s"])?;
    ensure!(reverted.stdout.contains("guest was reset"), "{reverted}");
    // Firmware may reboot once more.
    qemu.qmp("system_reset", json!({}))?;
    ensure!(qemu.state()? == "running" && qemu.is_alive()?);
    qemu.quit()
}

/// Several disks of one kind, and kinds mixed in every order: what one does after the instant must not come
/// between it and what another does in it. Each disk is what its configured path names, and has its content
/// and its size back.
#[test]
fn disks_of_all_kinds_revert_with_sizes() -> Result<()> {
    for (methods, memory) in [
        (&["copy", "copy"][..], false),
        (&["copy", "external"], false),
        (&["external", "copy", "external"], true),
        (&["copy", "internal", "copy", "external", "internal", "external", "copy", "external"], false),
    ] {
        cut_together(methods, memory).with_context(|| format!("{methods:?}, memory: {memory}"))?;
    }
    Ok(())
}

fn cut_together(methods: &[&str], memory: bool) -> Result<()> {
    let named = |index: usize| match methods[index] {
        "copy" => format!("x{index}.raw"),
        _ => format!("x{index}.qcow2"),
    };
    let images: Vec<String> = (0..methods.len()).map(named).chain(["d.qcow2".to_owned()]).collect();
    let place = Place::new(&images.iter().map(String::as_str).collect::<Vec<_>>())?;
    let (mut args, mut create) = (Vec::new(), Vec::new());
    for (index, method) in methods.iter().enumerate() {
        let format = if *method == "copy" { "raw" } else { "qcow2" };
        let file = &images[index];
        args.extend([
            "-blockdev".to_owned(),
            format!("driver={format},file.driver=file,file.filename=DIR/{file},node-name=x{index}"),
            "-device".to_owned(),
            format!("virtio-blk-pci,drive=x{index},id=v{index}"),
        ]);
        create.extend(["--disk".to_owned(), format!("v{index}={method}")]);
    }
    let qemu = place.start("m", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    let devices: Vec<String> = (0..methods.len()).map(|index| format!("v{index}")).collect();
    let pattern = |index: usize| u8::try_from(index + 17);
    for (index, device) in devices.iter().enumerate() {
        qemu.write(device, pattern(index)?)?;
    }
    let create: Vec<&str> = ["create", &address, "s", if memory { "--memory" } else { "--disk-only" }]
        .into_iter()
        .chain(create.iter().map(String::as_str))
        .collect();
    domsnap.done(&create)?;
    // What is written now must be in what the configured path names.
    for (index, device) in devices.iter().enumerate() {
        qemu.write(device, 99)?;
        ensure!(holds(&place.file(&images[index]), 99)?, "{device}: its path names another file");
    }
    for (grown, size) in [(true, 3 << 20), (false, 512 << 10)] {
        for (index, device) in devices.iter().enumerate() {
            // QEMU shrinks no image that has an internal snapshot.
            if grown || methods[index] != "internal" {
                let path = format!("/machine/peripheral/{device}/virtio-backend");
                let node = node_of(&qemu, &path)?;
                qemu.qmp("block_resize", json!({ "node-name": node, "size": size }))?;
            }
        }
        domsnap.done(&["revert", &address, "s", "--paused"])?;
        for (index, device) in devices.iter().enumerate() {
            let path = format!("/machine/peripheral/{device}/virtio-backend");
            let seen = device_of(&qemu, &path)?["inserted"]["image"]["virtual-size"].as_u64();
            ensure!(
                seen == Some(1 << 20),
                "{device}: QEMU has {seen:?} bytes after a revert, grown: {grown}"
            );
            let file = place.file(&images[index]);
            ensure!(size_of_image(&file)? == 1 << 20, "{file}: size after a revert, grown: {grown}");
            qemu.flush(device)?;
            ensure!(holds(&file, pattern(index)?)?, "{device}: another content after a revert");
        }
    }
    domsnap.done(&["delete", &address, "s"])?;
    domsnap.done(&["check", &address])?;
    qemu.quit()
}

fn device_of(qemu: &Idle, path: &str) -> Result<Value> {
    let devices = qemu.qmp("query-block", json!({}))?;
    let found = devices.as_array().into_iter().flatten().find(|device| device["qdev"] == path).cloned();
    found.with_context(|| format!("{path}: {devices}"))
}

fn node_of(qemu: &Idle, path: &str) -> Result<String> {
    let device = device_of(qemu, path)?;
    Ok(device["inserted"]["node-name"].as_str().context("a device without a node")?.to_owned())
}

fn size_of_image(file: &str) -> Result<u64> {
    if file.ends_with(".raw") {
        return Ok(std::fs::metadata(file)?.len());
    }
    let output =
        Command::new("qemu-img").args(["info", "-U", "--output=json", "-f", "qcow2", file]).output()?;
    let info: Value = serde_json::from_slice(&output.stdout)?;
    info["virtual-size"].as_u64().with_context(|| info.to_string())
}

fn holds(file: &str, pattern: u8) -> Result<bool> {
    if file.ends_with(".raw") {
        let held = std::fs::read(file)?;
        return Ok(held[256 << 10..][..65536].iter().all(|byte| *byte == pattern));
    }
    has_pattern(Path::new(file), pattern)
}

/// Internal snapshots of a running domain that another program made again, or that are damaged: the one is
/// not taken for what was recorded, the other is forgotten with --force, in the active image and in a frozen
/// one.
#[test]
fn live_tags_replaced_or_damaged() -> Result<()> {
    let place = Place::new(&["d.qcow2"])?;
    let mut qemu = place.start("tags", &[])?;
    let (at, image) = (qemu.address(), place.file("d.qcow2"));
    let run = |args: &[&str]| place.domsnap().run(&[&[args[0], &at], &args[1..]].concat());
    let done = |args: &[&str]| run(args)?.expect_status(status::DONE);
    qemu.write("vda", 1)?;
    done(&["create", "s1", "--disk-only", "--internal"])?;
    qemu.write("vda", 2)?;
    qemu.qmp("blockdev-snapshot-delete-internal-sync", json!({ "device": "d0", "name": "s1" }))?;
    qemu.qmp("blockdev-snapshot-internal-sync", json!({ "device": "d0", "name": "s1" }))?;
    qemu.write("vda", 3)?;
    refused(run(&["revert", "s1"])?, &["not the one that was taken"])?;
    ensure!(run(&["check"])?.stdout.contains("not the one that was taken"), "check says nothing of it");
    let said = done(&["create", "s2", "--disk-only", "--internal"])?.stdout;
    ensure!(said.contains("snapshot s1: ") && said.contains("not the one that was taken"), "{said}");
    let said = done(&["delete", "s1"])?.stdout;
    ensure!(said.contains("it stays in the image"), "{said}");
    done(&["create", "s3", "--disk-only", "--internal"])?;

    damage_second(&image)?;
    refused(run(&["delete", "s2"])?, &["s2", "damaged"])?;
    let said = done(&["delete", "s2", "--force"])?.stdout;
    ensure!(said.contains("forgotten"), "{said}");
    ensure!(has_pattern(Path::new(&image), 3)?, "the guest's data is not what it wrote");
    done(&["create", "s4", "--disk-only", "--internal"])?;

    // And in an image that is open for reading alone.
    done(&["create", "e1", "--disk-only", "--external"])?;
    qemu.write("vda", 4)?;
    let shown = done(&["show", "e1", "--json"])?.json::<Value>()?;
    let frozen = shown["snapshot"]["points"][0]["layer"].as_str().context("no layer")?.to_owned();
    damage_second(&frozen)?;
    refused(run(&["delete", "s3"])?, &["s3", "damaged"])?;
    done(&["delete", "s3", "--force"])?;
    ensure!(qemu.is_alive()?, "QEMU ended");
    qemu.flush("vda")?;
    ensure!(has_pattern(Path::new(&image), 4)?, "the guest's data is not what it wrote");
    done(&["revert", "s4"])?;
    qemu.quit()?;
    ensure!(has_pattern(Path::new(&image), 3)?, "s4 is not what it was");
    let left = qemu::img(&["snapshot", "-l", &frozen])?;
    ensure!(!left.contains("s2") && !left.contains("s3") && left.contains("s4"), "{left}");
    Ok(())
}

/// Lets the first L1 entry of an image's second internal snapshot point far behind the file's end.
fn damage_second(image: &str) -> Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::options().read(true).write(true).open(image)?;
    let word = |at: u64| -> Result<u64> {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_be_bytes(bytes))
    };
    let first = word(64)?;
    let (sizes, extra) = (word(first + 8)?, word(first + 32)? & 0xffff_ffff);
    let lengths = (sizes >> 16 & 0xffff) + (sizes & 0xffff);
    let second = (first + 40 + extra + lengths).next_multiple_of(8);
    Ok(file.write_all_at(&(1_u64 << 63 | 0x2000_0000_0000).to_be_bytes(), word(second)?)?)
}

/// An image on btrfs that is written in place (`nocow`) stays so at its configured path, through live
/// creates, a revert and deletes: btrfs gives the flag to empty files alone.
#[test]
fn nocow_is_kept_live() -> Result<()> {
    if !may_mount("btrfs") {
        return Ok(());
    }
    let mounted = Mounted::make("btrfs", 128 << 20)?;
    let image = mounted.path().join("d.qcow2");
    std::fs::File::create(&image)?;
    let flags = |path: &Path| -> Result<String> {
        let said = Command::new("lsattr").arg("-d").arg(path).output().context("run scripts/install-deps")?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        Ok(said.split_whitespace().next().unwrap_or_default().to_owned())
    };
    let set = Command::new("chattr").arg("+C").arg(&image).status().context("run scripts/install-deps")?;
    ensure!(set.success(), "chattr failed");
    // `qemu-img create` empties the file that it finds, which keeps the flag.
    qemu::img(&["create", "-q", "-f", "qcow2", &image.display().to_string(), "1M"])?;
    ensure!(flags(&image)?.contains('C'), "the flag is not there to begin with");
    let disk = format!("driver=qcow2,file.driver=file,file.filename={},node-name=d0", image.display());
    let args = ["-blockdev", &disk, "-device", "virtio-blk-pci,drive=d0,id=vda"];
    let qemu = Idle::start(Version::New, mounted.path(), "m", &args)?;
    let domsnap = Domsnap::new(&mounted.path().join("state"));
    let address = qemu.address();
    for args in [
        &["create", &address, "a", "--external", "--disk-only"][..],
        &["create", &address, "b", "--internal"],
        &["create", &address, "c", "--external"],
        &["revert", &address, "b"],
        &["delete", &address, "c"],
        &["delete", &address, "b"],
        &["delete", &address, "a"],
    ] {
        domsnap.done(args)?;
        ensure!(flags(&image)?.contains('C'), "{args:?} took the flag off {}", image.display());
        for entry in std::fs::read_dir(mounted.path())? {
            let path = entry?.path();
            let is_image = path.extension().is_some_and(|extension| extension == "qcow2");
            ensure!(!is_image || flags(&path)?.contains('C'), "{args:?}: {} has no flag", path.display());
        }
    }
    qemu.quit()
}

/// A live delete of an internal snapshot says that QEMU keeps its room, `show` counts none, and what the
/// guest writes next goes there: the image does not grow.
#[test]
fn room_of_a_live_delete_is_used_again() -> Result<()> {
    let place = Place::new(&["d.qcow2"])?;
    let qemu = place.start("m", &[])?;
    let (domsnap, address) = (place.domsnap(), qemu.address());
    let room = || -> Result<u64> {
        Ok(std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(place.file("d.qcow2"))?) * 512)
    };
    qemu.write("vda", 1)?;
    domsnap.done(&["create", &address, "s", "--internal", "--disk-only"])?;
    qemu.write("vda", 2)?;
    let shown = domsnap.done(&["show", &address, "s"])?;
    ensure!(!shown.stdout.contains("would free 64"), "{shown}");
    let before = room()?;
    let deleted = domsnap.done(&["delete", &address, "s"])?;
    ensure!(deleted.stdout.contains("the space of s stays in"), "{deleted}");
    ensure!(deleted.stdout.contains("for what the guest writes next"), "{deleted}");
    // As much as the snapshot had, elsewhere on the disk.
    qemu.monitor("qemu-io -d /machine/peripheral/vda/virtio-backend \"write -P 3 512k 64k\"")?;
    qemu.flush("vda")?;
    ensure!(room()? <= before, "{} bytes before, {} after: the room was not used", before, room()?);
    qemu.quit()?;
    qemu::check(Path::new(&place.file("d.qcow2")))
}
