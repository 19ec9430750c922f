//! Measures clones with memory: how long a command that makes and starts some takes, beside the start of as
//! many QEMUs of the same command line until they answer, and the part of memory that each idle clone has.
//!
//! ```text
//! cargo run --release -p domsnap-tests --example clone_start [MIB [COUNT]]
//! ```

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use domsnap_tests::live::{Live, NAME};
use serde_json::Value;
use testguest::GuestOptions;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let mut number = |default: u64| args.next().map_or(Ok(default), |word| word.parse());
    let (mib, count) = (number(256)?, number(10)?);
    let options = GuestOptions::new().memory_mib(mib).tick_ms(1000);
    let live = Live::of(options)?;
    live.guest.dirty(0, 0.0)?;
    live.guest.blocks(0, 0.0)?;
    let domsnap = live.domsnap();
    domsnap.done(&["create", NAME, "s1", "--external", "--memory"])?;
    let to = live.guest.dir().join("c");
    fs::create_dir(&to)?;
    let to = to.display().to_string();
    let (many, wanted) = (count.to_string(), usize::try_from(count)?);

    let mut alone = Vec::new();
    for _ in 0..count {
        alone.push(plain_start(&live)?);
    }
    println!("QEMU alone, from its start until it answers: {}", spread(&mut alone));

    // The first takes the memory image apart.
    let begun = Instant::now();
    domsnap.done(&["clone", NAME, "s1", "first", "--memory", "--to", &to])?;
    println!("the first clone, not started: {:?}", begun.elapsed());
    let begun = Instant::now();
    domsnap.done(&["clone", NAME, "s1", "r", "--memory", "--count", &many, "--to", &to])?;
    println!("{count} further clones, not started: {:?}", begun.elapsed());
    let mut one = Vec::new();
    let mut pids = Vec::new();
    for number in 0..count {
        let name = format!("o{number}");
        let begun = Instant::now();
        let done =
            domsnap.done(&["clone", NAME, "s1", &name, "--memory", "--start", "--to", &to, "--json"])?;
        one.push(begun.elapsed());
        pids.extend(pids_of(&done.json()?));
    }
    println!("a command that makes and starts one clone: {}", spread(&mut one));
    let begun = Instant::now();
    let args = ["clone", NAME, "s1", "m", "--memory", "--start", "--count", &many, "--to", &to, "--json"];
    let done = domsnap.done(&args)?;
    println!("a command that makes and starts {count}: {:?}", begun.elapsed());
    pids.extend(pids_of(&done.json()?));
    ensure!(pids.len() == 2 * wanted, "{} clones run", pids.len());
    sleep(Duration::from_secs(3));
    let mut shares = pids.iter().map(|pid| share(*pid)).collect::<Result<Vec<u64>>>()?;
    shares.sort_unstable();
    println!("Pss of each of {} clones: {} to {} MiB", shares.len(), shares[0], shares[shares.len() - 1]);
    for pid in pids {
        Command::new("kill").args(["-9", &pid.to_string()]).status()?;
    }
    Ok(())
}

fn pids_of(answer: &Value) -> Vec<u64> {
    let clones = answer["outcome"]["clones"].as_array().into_iter().flatten();
    clones.filter_map(|clone| clone["started"]["pid"].as_u64()).collect()
}

/// The part that a process has of all memory (Pss), in MiB.
fn share(pid: u64) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("it has a Pss")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
}

fn spread(times: &mut [Duration]) -> String {
    times.sort_unstable();
    format!(
        "{:?} ({:?} to {:?}, n={})",
        times[times.len() / 2],
        times[0],
        times[times.len() - 1],
        times.len()
    )
}

/// Starts a QEMU of the guest's command line, without disks of its own, until it answers.
fn plain_start(live: &Live) -> Result<Duration> {
    let dir = tempfile::Builder::new().prefix("domsnap-plain-").tempdir()?;
    let from = format!("{}/", live.guest.dir().display());
    let to = format!("{}/", dir.path().display());
    let args: Vec<String> =
        live.guest.command_line().iter().map(|word| word.to_string_lossy().replace(&from, &to)).collect();
    for disk in live.guest.disks() {
        let name = disk.file_name().context("a name")?;
        let made = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2"])
            .arg(dir.path().join(name))
            .arg("64M")
            .status()?;
        ensure!(made.success());
    }
    let begun = Instant::now();
    let mut child = Command::new(&args[0])
        .args(&args[1..])
        .arg("-S")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .spawn()?;
    let answered = loop {
        if let Some(took) = greeting(&dir.path().join("qmp"), begun) {
            break took;
        }
        ensure!(child.try_wait()?.is_none(), "QEMU has ended");
        sleep(Duration::from_millis(1));
    };
    child.kill()?;
    child.wait()?;
    Ok(answered)
}

fn greeting(socket: &Path, begun: Instant) -> Option<Duration> {
    let socket = UnixStream::connect(socket).ok()?;
    let mut line = String::new();
    BufReader::new(socket).read_line(&mut line).ok()?;
    line.contains("QMP").then(|| begun.elapsed())
}
