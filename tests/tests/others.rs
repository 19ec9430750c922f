//! Others who use the images and take no lock: QEMU with `locking=off`, loop devices, programs that read or
//! write; and other domains of the same catalogue. They are met before anything is changed.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::domain::{Domain, NAME, Shape, images, same_images};
use domsnap_tests::domsnap::status;
use domsnap_tests::{qemu, report};

/// A process that ends with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A QEMU without a guest that has `image` open and takes no lock on it.
fn unlocked_qemu(image: &Path, at: &Path) -> Result<Running> {
    let ready = at.join("qemu.pid");
    let node = format!("driver=file,filename={},node-name=f,locking=off", image.display());
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-machine", "none", "-accel", "tcg"]);
    command.args(["-blockdev", &node, "-blockdev", "driver=qcow2,file=f,node-name=q", "-pidfile"]);
    let child = command.arg(&ready).stdin(Stdio::null()).spawn().context("starting QEMU")?;
    let running = Running(child);
    let begun = Instant::now();
    while !ready.exists() {
        ensure!(begun.elapsed() < Duration::from_secs(300), "QEMU does not start");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(running)
}

/// All that writes a disk is refused, names `who`, and changes nothing.
fn is_refused(domain: &Domain, who: &str, commands: &[&[&str]]) -> Result<()> {
    let before = images(&domain.disks())?;
    for args in commands {
        let said = domain.declined(args, status::REFUSED)?;
        ensure!(said.stderr.contains(who), "{who} is not named: {said}");
    }
    same_images(&domain.disks(), &before)
}

/// Whoever can write the image, or reads what would be changed under him, is named, and nothing is changed.
#[test]
fn users_without_locks_are_met() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.create("inner", "internal")?;
    domain.create("outer", "external")?;
    domain.write_everywhere()?;
    let path = domain.path("vda");
    let internal: &[&str] = &["create", NAME, "new", "--internal"];
    let external: &[&str] = &["create", NAME, "new", "--external"];
    let all: &[&[&str]] = &[internal, external, &["revert", NAME, "inner"], &["delete", NAME, "outer"]];
    let own = format!("process {}", std::process::id());

    let writer = OpenOptions::new().append(true).open(&path)?;
    is_refused(&domain, &own, all)?;
    let image = path.to_str().context("a path that is no text")?;
    is_refused(&domain, &own, &[&["disk", "create", image, "new"]])?;
    drop(writer);

    // Reading what is only frozen, or removed, is no harm to either.
    let reader = File::open(&path)?;
    is_refused(&domain, &own, &[internal])?;
    domain.create("beside-a-reader", "external")?;
    drop(reader);

    let machine = unlocked_qemu(&path, domain.root())?;
    // (It has locks on the layers below: a delete keeps those.)
    is_refused(&domain, "qemu-system", &all[..3])?;
    drop(machine);

    let device = qemu::run("losetup", &["-f", "--show", image]);
    match device {
        Ok(device) => {
            let device = device.trim();
            let met = is_refused(&domain, device, all);
            qemu::run("losetup", &["-d", device])?;
            met?;
        }
        Err(error) => println!("SKIPPED: no loop device to be had: {error:#}"),
    }
    domain.delete(&["outer"])?;
    domain.verify()
}

/// A layer that another domain's image in another directory is backed by stays, whether that can be read just
/// now or not.
#[test]
fn domains_of_a_catalogue_keep_what_each_needs() -> Result<()> {
    let mut domain = Domain::new(&Shape::disks(1))?;
    domain.write_everywhere()?;
    domain.create("s1", "external")?;
    domain.write_everywhere()?;
    domain.create("s2", "external")?;
    domain.write_everywhere()?;
    let list = report::list(&domain.domsnap(), NAME)?;
    let snapshot = list.snapshots.iter().find(|snapshot| snapshot.name == "s1").context("no s1")?;
    let layer = domain.disks().join(&snapshot.points[0].layer);

    let place = domain.root().join("another place");
    std::fs::create_dir(&place)?;
    let other = place.join("other.qcow2");
    let args = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"].map(std::ffi::OsStr::new);
    qemu::img(&[&args[..], &[layer.as_os_str(), other.as_os_str()]].concat())?;
    let shown = qemu::read(&other, None)?;
    let allowed = domain.disks().to_string_lossy().into_owned();
    let disk = format!("vda={}", other.display());
    domain.domsnap().done(&["--allow-backing", &allowed, "domain", "add", "other", "--disk", &disk])?;

    // Its file system is not mounted: what was recorded counts.
    let away = domain.root().join("away");
    std::fs::rename(&place, &away)?;
    domain.domsnap().done(&["delete", NAME, "s1"])?;
    std::fs::rename(&away, &place)?;
    ensure!(qemu::read(&other, None)? == shown, "the other domain's disk shows something else");
    let said = domain.domsnap().done(&["delete", NAME, "s2"])?;
    ensure!(said.stdout.contains("other.qcow2"), "it is not said who needs the layer: {said}");
    ensure!(qemu::read(&other, None)? == shown, "the other domain's disk shows something else");

    domain.domsnap().done(&["domain", "remove", "other"])?;
    std::fs::remove_file(&other)?;
    domain.domsnap().done(&["recover", NAME])?;
    ensure!(!layer.exists(), "nothing needs {} any more", layer.display());
    Ok(())
}
