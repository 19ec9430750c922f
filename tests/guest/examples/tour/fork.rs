//! The third act: a guest that runs is forked into five, each with an identity of its own. Then it is
//! exported, once in full and once what changed since, and the export becomes a domain elsewhere, which
//! boots.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use testguest::{GuestClone, GuestOptions};

use super::{Tour, chapter};

const CLONES: usize = 5;

/// What a clone does before its links go up.
const IDENTITY: &str = "hostname \"$DOMSNAP_DOMAIN\"\n";

/// Clones in a directory. Their QEMUs are ended when it is dropped.
struct Fork {
    place: PathBuf,
}

impl Fork {
    fn clones(&self) -> impl Iterator<Item = (String, GuestClone)> {
        (1..=CLONES).map(|number| format!("web-{number}")).map(|name| {
            let clone = GuestClone::at(self.place.join(&name));
            (name, clone)
        })
    }
}

impl Drop for Fork {
    fn drop(&mut self) {
        for pid in self.clones().filter_map(|(_, clone)| clone.processes().ok()).flatten() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
    }
}

/// Runs a line in a clone's guest; returns what it says.
fn inside(clone: &GuestClone, line: &str) -> Result<String> {
    Ok(String::from_utf8_lossy(&clone.shell(line)?.stdout).trim().to_owned())
}

/// A row of a table.
fn row(columns: [&str; 4]) {
    let [name, host, random, share] = columns;
    println!("  {name:<7} {host:<7} {random:<24} {share}");
}

/// The bytes of the files that an export added since it had these.
fn added(export: &Path, known: &mut BTreeSet<PathBuf>) -> Result<u64> {
    let mut bytes = 0;
    for entry in fs::read_dir(export)?.flatten() {
        if known.insert(entry.path()) {
            bytes += entry.metadata()?.len();
        }
    }
    Ok(bytes)
}

/// The act, in under a minute after the guest has started.
pub(super) fn act(domsnap: &Path) -> Result<()> {
    chapter("A machine that is ready: it runs, its programs are started, its caches are warm");
    println!("(the first time another kernel is fetched and booted; later it begins where it was)");
    let guest = GuestOptions::new()
        .generic_kernel()
        .deadline(Duration::from_secs(120))
        .more(&[
            "-device",
            "vmgenid,guid=324e6eaf-d1d1-4bf6-bf41-b9bb6c91fb87",
            "-netdev",
            "user,id=net0,restrict=on",
            "-device",
            "virtio-net-pci,netdev=net0,id=nic0,mac=52:54:00:11:22:33,romfile=",
        ])
        .start()?;
    let begun = Instant::now();
    let mut tour = Tour { guest, domsnap: domsnap.to_owned() };
    let at = |name: &str| tour.guest.dir().join(name).display().to_string();
    let (identity, export, elsewhere) = (at("identity"), at("backup"), at("elsewhere"));
    fs::write(&identity, IDENTITY)?;
    let fork = Fork { place: tour.guest.dir().join("clones") };
    fs::create_dir(&fork.place)?;
    let clones = fork.place.display().to_string();
    tour.guest.await_agent()?;
    tour.inside("hostname gold; echo 'dear reader' > /vda/letter; sync; hostname")?;
    let socket = tour.guest.qmp_socket().display().to_string();
    let agent = tour.guest.agent_socket().display().to_string();
    tour.run(&["domain", "add", "gold", "--qmp", &socket, "--agent", &agent])?;
    tour.run(&["create", "gold", "ready", "--external"])?;

    chapter("Forked into five, which continue at that instant; gold runs on");
    println!("\n$ cat identity\n{IDENTITY}");
    let count = CLONES.to_string();
    let took = tour.run(&[
        "clone",
        "gold",
        "ready",
        "web",
        "--memory",
        "--count",
        &count,
        "--start",
        "--network",
        "same",
        "--run",
        &identity,
        "--to",
        &clones,
    ])?;
    println!("\nall of it took {} ms; each guest says who it is, and a random number:\n", took.as_millis());
    row(["clone", "host", "random", "memory of its own"]);
    let mut numbers = BTreeSet::new();
    for (name, clone) in fork.clones() {
        let host = inside(&clone, "hostname")?;
        let random = inside(&clone, "head -c 8 /dev/urandom | od -An -tx1")?;
        row([&name, &host, &random, &format!("{} MiB", clone.share_mib()?)]);
        ensure!(host == name, "{name} says that it is {host}");
        numbers.insert(random);
    }
    ensure!(numbers.len() == CLONES, "two clones have the same random number");
    for (name, clone) in fork.clones() {
        let letter = inside(&clone, &format!("cat /vda/letter; echo {name} > /vda/letter; sync"))?;
        ensure!(letter == "dear reader", "{name} reads {letter:?}");
        clone.wait_ticks(1)?;
    }
    tour.guest.wait_ticks(3)?;
    tour.guest.expect_no_bad()?;
    println!("\nproven from inside: each has a name and random numbers of its own, and counts on; what one");
    println!("writes to its disk no other sees; memory and disks of each are of one instant");

    chapter("Out of the host: a full export, and then what has changed");
    let mut known = BTreeSet::new();
    tour.run(&["export", "gold", "ready", "--to", &export, "--disk-only"])?;
    let full = added(Path::new(&export), &mut known)?;
    tour.inside("echo 'and goodbye' >> /vda/letter; sync")?;
    tour.run(&["create", "gold", "evening", "--disk-only", "--external", "--quiesce=try"])?;
    tour.run(&["export", "gold", "evening", "--since", "ready", "--to", &export])?;
    let increment = added(Path::new(&export), &mut known)?;
    println!("\nfull: {} KiB; the increment: {} KiB", full >> 10, increment >> 10);
    ensure!(increment < full, "the increment is not smaller");

    chapter("Restored elsewhere, where it boots");
    tour.run(&["import", &export, "--to", &elsewhere, "--name", "moved"])?;
    tour.run(&["list", "moved", "--tree"])?;
    let images: Vec<PathBuf> = (tour.guest.targets().iter())
        .map(|target| Path::new(&elsewhere).join(format!("{target}.qcow2")))
        .collect();
    let disks: Vec<_> =
        images.iter().enumerate().map(|(number, image)| (number, "qcow2", image.as_path())).collect();
    drop(fork);
    println!("\nthe guest is ended, and boots from the images of moved");
    tour.guest.restart_on(&disks)?;
    let said = tour.inside("cat /vda/letter")?;
    ensure!(said.contains("dear reader") && said.contains("goodbye"), "the letter is not whole");
    tour.guest.expect_no_bad()?;
    println!("\nthe third act took {} s", begun.elapsed().as_secs());
    Ok(())
}
