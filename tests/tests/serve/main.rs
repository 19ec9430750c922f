//! `domsnap disk serve`: judged by nbdinfo, nbdcopy, fio and QEMU; killed; with snapshots; with systemd's
//! sockets; under a guest.

mod reports;
mod snapshot;
mod vhd;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape};
use domsnap_tests::domsnap::{Domsnap, binary, status};
use domsnap_tests::qemu;
use domsnap_tests::served::{Client, Server};
use serde_json::json;
use testguest::GuestOptions;

/// A directory with a state directory, for images and sockets.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Result<Self> {
        Ok(Self(tempfile::Builder::new().prefix("domsnap-serve-").tempdir()?))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn domsnap(&self) -> Domsnap {
        Domsnap::new(&self.file("state"))
    }

    /// A raw image of `mib` MiB with data in every second one.
    fn raw(&self, name: &str, mib: u64) -> Result<PathBuf> {
        let path = self.file(name);
        let file = std::fs::File::create(&path)?;
        file.set_len(mib << 20)?;
        for number in (0..mib).step_by(2) {
            file.write_all_at(&vec![number as u8 + 1; 1 << 20], number << 20)?;
        }
        Ok(path)
    }

    /// A server of an image of this directory.
    fn serve(&self, image: &str, more: &[&str]) -> Result<Server> {
        let image = self.file(image).display().to_string();
        let args: Vec<&str> = std::iter::once(image.as_str()).chain(more.iter().copied()).collect();
        Server::start(&self.domsnap(), &self.file("s"), &args)
    }
}

fn bytes(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).with_context(|| path.display().to_string())
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// nbdinfo shows what the disk is; nbdcopy reads and writes it whole; fio verifies what it wrote; qemu-img
/// finds the same content and the same map.
#[test]
fn judges_agree_on_a_raw_disk() -> Result<()> {
    let place = Place::new()?;
    let (image, other) = (place.raw("a.raw", 16)?, place.file("b.raw"));
    let server = place.serve("a.raw,format=raw", &[])?;
    let uri = server.uri();
    let info = qemu::run("nbdinfo", &[&uri])?;
    for line in ["export-size: 16777216", "can_fua: true", "can_multi_conn: false", "base:allocation"] {
        ensure!(info.contains(line), "{line} is not in {info}");
    }
    let map = qemu::run("nbdinfo", &["--map", &uri])?;
    let kinds: Vec<_> = map.lines().filter_map(|line| line.split_whitespace().nth(3)).collect();
    ensure!(kinds.chunks(2).all(|pair| *pair == ["data", "hole,zero"]) && kinds.len() == 16, "{map}");
    qemu::run("nbdcopy", &[&uri, &text(&other)])?;
    ensure!(bytes(&image)? == bytes(&other)?, "nbdcopy read something else");
    std::fs::write(&other, vec![0x5a; 16 << 20])?;
    qemu::run("nbdcopy", &["--flush", &text(&other), &uri])?;
    ensure!(bytes(&image)? == bytes(&other)?, "nbdcopy's data is not in the image");
    let job = format!("--uri={uri}");
    let args = ["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--size=16M"];
    let more = [job.as_str(), "--verify=crc32c", "--verify_state_save=0", "--output-format=terse"];
    qemu::run("fio", &[&args[..], &more].concat())?;
    qemu::img(&["compare", "-U", "-f", "raw", "-F", "raw", &text(&image), &uri])?;
    qemu::run(
        "qemu-io",
        &["-f", "raw", "-c", "write -z -u 1M 2M", "-c", "discard 4M 1M", "-c", "flush", &uri],
    )?;
    qemu::img(&["compare", "-U", "-f", "raw", "-F", "raw", &text(&image), &uri])?;
    Ok(())
}

/// A thousand writes that were acknowledged and not flushed are there after SIGKILL of the server, and the
/// next server takes the sockets that it left.
#[test]
fn acknowledged_writes_survive_sigkill() -> Result<()> {
    let place = Place::new()?;
    place.raw("a.raw", 8)?;
    let mut server = place.serve("a.raw,format=raw", &[])?;
    let mut client = Client::connect(&place.file("s"))?;
    let written = |number: u64| (number * 7919 % 1024 * 4096, [number as u8 ^ 0xa5; 512]);
    for number in 0..1000 {
        let (at, data) = written(number);
        client.write(at, &data)?;
    }
    server.kill()?;
    ensure!(place.file("s").exists() && client.read(0, 1).is_err());
    let mut server = place.serve("a.raw,format=raw", &[])?;
    let mut client = Client::connect(&place.file("s"))?;
    for number in 0..1000 {
        let (at, data) = written(number);
        ensure!(client.read(at, 512)? == data, "write {number} is lost");
    }
    client.flush()?;
    server.stop()?;
    ensure!(!place.file("s").exists() && !place.file("s.control").exists(), "a stopped server leaves names");
    Ok(())
}

/// A second client, a second server of the image, and a second server at the socket are refused with a
/// message.
#[test]
fn second_user_is_refused() -> Result<()> {
    let place = Place::new()?;
    let image = place.raw("a.raw", 1)?;
    place.raw("b.raw", 1)?;
    let _server = place.serve("a.raw,format=raw", &[])?;
    let mut client = Client::connect(&place.file("s"))?;
    let refused = Client::connect(&place.file("s")).err().context("a second client was served")?;
    ensure!(refused.to_string().contains(&format!("process {}", std::process::id())), "{refused}");
    client.write(0, b"goes on")?;
    let domsnap = place.domsnap();
    let serve = |image: &Path, socket: &str| {
        let (image, socket) = (format!("{},format=raw", image.display()), text(&place.file(socket)));
        domsnap.run(&["disk", "serve", &image, "--socket", &socket])?.expect_status(status::REFUSED)
    };
    let refused = serve(&image, "t")?;
    ensure!(refused.stderr.contains("open for writing by process"), "{refused}");
    let refused = serve(&place.file("b.raw"), "s")?;
    ensure!(refused.stderr.contains("another server answers"), "{refused}");
    let refused =
        domsnap.run(&["create", &format!("{},format=raw", image.display()), "s1", "--disk=vda=copy"])?;
    let refused = refused.expect_status(status::REFUSED)?;
    // Its server cannot lend it while it has a client.
    ensure!(refused.stderr.contains(&format!("client (process {})", std::process::id())), "{refused}");
    ensure!(!place.file("t").exists());
    Ok(())
}

/// Each snapshot of a disk is served as it was, also those inside of an image. None of it can be written.
#[test]
fn any_snapshot_is_served_read_only() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    let image = domain.path("vda");
    let mut expected = Vec::new();
    for (name, kind) in [("s1", "external"), ("s2", "internal"), ("s3", "external")] {
        domain.write_and_create(name, kind)?;
        expected.push((name, qemu::read(&image, None)?));
        domain.write_everywhere()?;
    }
    let (socket, copy) = (domain.root().join("s"), domain.root().join("copy.raw"));
    let current = qemu::read(&image, None)?;
    for (name, content) in
        expected.iter().map(|(name, content)| (Some(*name), content)).chain([(None, &current)])
    {
        let image = text(&image);
        let args = match name {
            Some(name) => vec![image.as_str(), "--at", name],
            None => vec![image.as_str(), "--read-only"],
        };
        let mut server = Server::start(&domain.domsnap(), &socket, &args)?;
        let info = server.ask(&json!({ "do": "info" }))?;
        ensure!(info["read_only"] == true && info["snapshot"].as_str() == name, "{info}");
        qemu::run("nbdcopy", &[&server.uri(), &text(&copy)])?;
        ensure!(bytes(&copy)? == *content, "{name:?} differs");
        let written = Client::connect(&socket)?.write(0, b"x").err().context("a snapshot was written")?;
        ensure!(written.to_string().contains("failed"), "{written}");
        server.stop()?;
    }
    // A snapshot that is served is held: its deletion waits for the server's end.
    let server = Server::start(&domain.domsnap(), &socket, &[&text(&image), "--at", "s1"])?;
    let held = domain.declined(&["delete", NAME, "s1"], status::REFUSED)?;
    ensure!(held.stderr.contains("is held by serve:"), "{held}");
    domain.domsnap().done(&["delete", NAME, "s1", "--defer"])?;
    domain.model.delete(&["s1".to_owned()]);
    qemu::run("nbdcopy", &[&server.uri(), &text(&copy)])?;
    ensure!(bytes(&copy)? == expected[0].1, "the served snapshot changed when it was deleted");
    drop(server);
    domain.domsnap().done(&["recover", NAME])?;
    domain.verify_beside_others()?;
    let missing =
        domain.declined(&["disk", "serve", &text(&image), "--at", "s9", "--socket", "s"], status::REFUSED)?;
    ensure!(missing.stderr.contains("has no snapshot s9"), "{missing}");
    let refused = domain.declined(&["disk", "serve", &text(&image), "--socket", "s"], status::REFUSED)?;
    ensure!(refused.stderr.contains("--read-only"), "{refused}");
    Ok(())
}

/// A frozen layer and an image that backs others are not served for writing.
#[test]
fn image_that_backs_others_is_not_written() -> Result<()> {
    let place = Place::new()?;
    let (base, top) = (place.raw("base.raw", 1)?, place.file("top.qcow2"));
    qemu::img(&["create", "-q", "-f", "qcow2", "-b", &text(&base), "-F", "raw", &text(&top)])?;
    place.domsnap().done(&["domain", "add", "x", "--disk", &format!("vda={}", top.display())])?;
    let image = format!("{},format=raw", base.display());
    let refused = place.domsnap().run(&["disk", "serve", &image, "--socket", &text(&place.file("s"))])?;
    let refused = refused.expect_status(status::REFUSED)?;
    ensure!(refused.stderr.contains("backed by") && refused.stderr.contains("--read-only"), "{refused}");
    Ok(())
}

/// The socket that systemd passes is used, and stays when the server ends.
#[test]
fn socket_of_systemd_is_used_and_kept() -> Result<()> {
    let place = Place::new()?;
    let image = place.raw("a.raw", 1)?;
    // As systemd does: the socket is descriptor 3, and the process knows that it is meant.
    let script = "import os, socket, sys\n\
        s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n\
        os.dup2(s.fileno(), 3); os.set_inheritable(3, True)\n\
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1', LISTEN_FDNAMES='disk')\n\
        os.execv(sys.argv[2], sys.argv[2:])";
    let start = || {
        let mut command = Command::new("python3");
        command.args(["-c", script]).arg(place.file("s")).arg(binary());
        command.arg("--state-dir").arg(place.file("state")).arg("disk").arg("serve");
        command.arg(format!("{},format=raw", image.display())).arg("--socket").arg(place.file("s"));
        command.stdout(std::process::Stdio::null()).spawn()
    };
    let mut child = start()?;
    let until = Instant::now() + Duration::from_secs(240);
    while Client::connect(&place.file("s")).is_err() {
        ensure!(Instant::now() < until && child.try_wait()?.is_none(), "the server does not answer");
        std::thread::sleep(Duration::from_millis(20));
    }
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::TERM)?;
    ensure!(child.wait()?.success());
    ensure!(place.file("s").exists(), "the socket is systemd's to remove");
    ensure!(!place.file("s.control").exists());
    Ok(())
}

/// The commands of the guide's page do what it says.
#[test]
fn commands_of_the_guide_work() -> Result<()> {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/serve.md"))?;
    let blocks: Vec<&str> =
        page.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    ensure!(blocks.len() == 3, "the page has {} blocks of commands", blocks.len());
    let place = Place::new()?;
    let mut programs = binary().parent().context("the binary's directory")?.as_os_str().to_owned();
    programs.push(":");
    programs.push(std::env::var_os("PATH").context("PATH")?);
    for block in blocks {
        // `wait` ends with the status of the job that was ended; nothing else may fail.
        let mut command = Command::new("timeout");
        command.args(["60", "bash", "-emc", block]).current_dir(place.0.path());
        let done = command.env("PATH", &programs).env("DOMSNAP_STATE_DIR", place.file("state")).output()?;
        let said = String::from_utf8_lossy(&done.stdout);
        ensure!(done.status.success(), "{block}\n{said}{}", String::from_utf8_lossy(&done.stderr));
        if block.contains("head -n 1") {
            ensure!(said.lines().last() == Some("hello"), "{said}");
        }
    }
    ensure!(std::fs::metadata(place.file("monday.raw"))?.len() == 64 << 20);
    Ok(())
}

/// systemd accepts the units, but for the program, which is not installed here.
#[test]
fn units_are_valid() -> Result<()> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/../dist/systemd");
    let place = Place::new()?;
    // The instance's names, and a program that exists.
    for unit in ["domsnap-serve@.service", "domsnap-serve@.socket"] {
        let unit_text = std::fs::read_to_string(format!("{folder}/{unit}"))?;
        let unit_text = unit_text.replace("/usr/bin/domsnap", &text(binary()));
        std::fs::write(place.file(&unit.replace('@', "@x")), unit_text)?;
    }
    let units = ["domsnap-serve@x.service", "domsnap-serve@x.socket"].map(|unit| text(&place.file(unit)));
    let Ok(done) = Command::new("systemd-analyze").args(["verify", "--man=no"]).args(&units).output() else {
        println!("skipped: systemd-analyze is not installed");
        return Ok(());
    };
    let said = String::from_utf8_lossy(&done.stderr);
    let ours: Vec<_> = said.lines().filter(|line| line.contains("domsnap-serve")).collect();
    ensure!(ours.is_empty(), "{ours:?}");
    Ok(())
}

/// A guest goes on over SIGKILL and a restart of the server of its disk, and over a hold. Nothing that it
/// wrote is lost.
#[test]
fn guest_goes_on_over_a_restart() -> Result<()> {
    let place = Place::new()?;
    let image = place.raw("a.raw", 16)?;
    let mut server = place.serve("a.raw,format=raw", &[])?;
    let node = format!(
        "driver=nbd,server.type=unix,server.path={},node-name=n0,reconnect-delay=60",
        place.file("s").display()
    );
    let more = ["-blockdev", &node, "-device", "virtio-blk-pci,drive=n0,id=served,serial=served"];
    let guest = GuestOptions::new().disks(1).from_boot().more(&more).start()?;
    let device = guest.shell("basename $(dirname $(grep -l served /sys/block/vd*/serial))")?;
    let device = String::from_utf8(device.stdout)?.trim().to_owned();
    ensure!(device.starts_with("vd"), "the guest does not have the disk: {device}");
    let script = format!(
        "for i in $(seq 1 64); do dd if=/dev/urandom of=/tmp/w bs=64k count=1 2>/dev/null; \
         dd if=/tmp/w of=/dev/{device} bs=64k seek=$i oflag=direct conv=notrunc 2>/dev/null || exit 1; \
         dd if=/dev/{device} of=/tmp/r bs=64k skip=$i count=1 iflag=direct 2>/dev/null || exit 2; \
         cmp /tmp/w /tmp/r || exit 3; done; dd if=/dev/{device} bs=64k skip=1 count=64 2>/dev/null | md5sum"
    );
    let done = std::thread::scope(|scope| -> Result<_> {
        let working = scope.spawn(|| guest.shell(&script));
        for _ in 0..3 {
            std::thread::sleep(Duration::from_millis(300));
            server.kill()?;
            std::thread::sleep(Duration::from_millis(500));
            server = place.serve("a.raw,format=raw", &[])?;
            let hold = server.ask(&json!({ "do": "hold", "seconds": 5 }))?["hold"].clone();
            std::thread::sleep(Duration::from_millis(200));
            server.ask(&json!({ "do": "go", "hold": hold }))?;
        }
        working.join().map_err(|_| anyhow::anyhow!("the guest's thread panicked"))?
    })?;
    ensure!(done.status == 0, "the guest's writes ended with {}", done.status);
    guest.expect_no_bad()?;
    let sum = String::from_utf8(done.stdout)?;
    let content = bytes(&image)?;
    let mut md5 = Command::new("md5sum")
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()?;
    std::io::Write::write_all(&mut md5.stdin.take().context("stdin")?, &content[64 << 10..65 * (64 << 10)])?;
    let ours = String::from_utf8(md5.wait_with_output()?.stdout)?;
    ensure!(
        sum.split_whitespace().next() == ours.split_whitespace().next(),
        "{sum} in the guest, {ours} here"
    );
    Ok(())
}
