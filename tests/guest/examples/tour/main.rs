//! The second and the third act of `make demo`, with guests that run.
//!
//! The second: a guest is snapshotted, loses its file system, and is returned to the snapshot in place. What
//! is shown as a pause is what the guest saw. The third is in [`fork`].

mod fork;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use testguest::{Guest, GuestOptions};

struct Tour {
    guest: Guest,
    domsnap: PathBuf,
}

impl Tour {
    fn run(&self, args: &[&str]) -> Result<Duration> {
        println!("\n$ domsnap {}", args.join(" "));
        let begun = Instant::now();
        let status = Command::new(&self.domsnap)
            .args(args)
            .env("DOMSNAP_STATE_DIR", self.guest.dir().join("state"))
            .status()
            .with_context(|| format!("{}: run make build", self.domsnap.display()))?;
        ensure!(status.success(), "domsnap ended with {status}");
        Ok(begun.elapsed())
    }

    fn inside(&self, line: &str) -> Result<String> {
        println!("guest# {line}");
        let said = String::from_utf8_lossy(&self.guest.shell(line)?.stdout).into_owned();
        for line in said.lines() {
            println!("  {line}");
        }
        Ok(said)
    }

    fn counting(&self) -> Result<u64> {
        let now = self.guest.ticks()?;
        println!("the guest counts: {now}");
        Ok(now)
    }
}

fn chapter(title: &str) {
    println!("\n== {title}");
}

fn main() -> Result<()> {
    let domsnap: PathBuf = std::env::args_os().nth(1).context("give the path of domsnap")?.into();
    in_place(&domsnap)?;
    fork::act(&domsnap)
}

fn in_place(domsnap: &Path) -> Result<()> {
    chapter("A guest that runs: two disks, memory that it writes to all the time");
    println!("(the first time its kernel is fetched and it is booted; later it begins where it was)");
    let guest = GuestOptions::new().tick_ms(5).deadline(Duration::from_secs(60)).start()?;
    guest.dirty(32, 50.0)?;
    guest.blocks(64, 100.0)?;
    let tour = Tour { guest, domsnap: domsnap.to_owned() };
    tour.inside("echo 'dear reader' > /vda/letter; sync; ls /vda")?;
    tour.counting()?;
    let socket = tour.guest.qmp_socket().display().to_string();
    let agent = tour.guest.agent_socket().display().to_string();
    tour.run(&["domain", "add", "web", "--qmp", &socket, "--agent", &agent])?;

    chapter("A snapshot of memory and disks, while it runs");
    tour.guest.forget_gap();
    tour.run(&["create", "web", "good", "--external", "--description", "all is well"])?;
    tour.guest.wait_ticks(5)?;
    println!("the longest pause of the guest, by its own clock: {} ms", tour.guest.largest_gap().as_millis());
    let then = tour.counting()?;

    chapter("Disaster");
    tour.inside("rm /vda/letter; dd if=/dev/urandom of=/dev/vda bs=1M count=16 2>&1 | tail -n 1; sync; ls /vda/letter 2>&1")?;

    chapter("Back, in place: the same QEMU, the same process");
    let pid = tour.guest.pid();
    let took = tour.run(&["revert", "web", "good"])?;
    ensure!(tour.guest.pid() == pid, "the QEMU is another one");
    println!("all of it took {} ms", took.as_millis());
    // Until then it saw what the disaster did.
    tour.guest.forget_bad();
    let now = tour.counting()?;
    let said = tour.inside("cat /vda/letter")?;
    ensure!(said.contains("dear reader"), "the letter is not there");
    ensure!(now < then + 100, "the guest counts on from elsewhere");
    tour.guest.wait_ticks(10)?;
    tour.guest.expect_no_bad()?;
    tour.guest.verify_blocks()?;
    println!(
        "proven from inside: memory and disks are of one instant, at every tick since, and every block is whole"
    );

    chapter(
        "The disks alone, with the guest's file systems frozen; then what is not needed goes, while it runs",
    );
    tour.run(&["create", "web", "nightly", "--disk-only", "--external", "--quiesce=try"])?;
    tour.run(&["list", "web", "--tree"])?;
    tour.run(&["delete", "web", "good"])?;
    tour.run(&["list", "web", "--tree", "--disks"])?;
    tour.guest.wait_ticks(5)?;
    tour.guest.expect_no_bad()?;
    println!("\nthe guest runs on, and found nothing wrong");
    Ok(())
}
