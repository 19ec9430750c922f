//! How long a create over eight volumes takes beside the bare `lvcreate` calls, in the machine with lvm2:
//! `cargo run -p lvmguest --example create_over_volumes -- DOMSNAP [ROUNDS]`, with a `domsnap` that was built
//! with --release.

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lvmguest::Machine;
use lvmguest::inside::{Volume, disks, done, succeed};

const VOLUMES: usize = 8;

fn main() -> Result<ExitCode> {
    let mut args = std::env::args().skip(1);
    let first = args.next().context("the domsnap that is measured is to be named")?;
    let rounds = args.next().unwrap_or_else(|| "5".to_owned());
    if first == "inside" {
        inside(rounds.parse()?)?;
        return Ok(ExitCode::SUCCESS);
    }
    let machine =
        Machine::new().program("speed", &std::env::current_exe()?).program("domsnap", &PathBuf::from(first));
    let ended = machine.run(&format!("/t/speed inside {rounds}"))?;
    print!("{}", ended.output);
    Ok(ExitCode::from(u8::try_from(ended.status).unwrap_or(1)))
}

fn inside(rounds: usize) -> Result<()> {
    let mut args = vec!["-q".to_owned(), "vg".to_owned()];
    args.extend(disks()?);
    succeed(Command::new("vgcreate").args(&args))?;
    let pool =
        ["-q", "-y", "--type", "thin-pool", "-n", "tp", "-L", "400M", "--poolmetadatasize", "8M", "vg"];
    succeed(Command::new("lvcreate").args(pool))?;
    let volumes: Vec<Volume> = (0..VOLUMES)
        .map(|number| Volume::thin("vg", "tp", &format!("v{number}"), 16))
        .collect::<Result<_>>()?;
    let paths: Vec<String> = volumes.iter().map(Volume::path).collect();
    let domain = paths.join(",");
    // The catalogue is made, and both sides have their files in memory.
    done(&["create", &domain, "warm"])?;
    done(&["delete", &domain, "warm"])?;
    let (mut bare, mut ours) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let begin = Instant::now();
        for volume in &volumes {
            let name = format!("{}.bare", volume.name);
            succeed(Command::new("lvcreate").args([
                "-q",
                "-y",
                "-s",
                "-ky",
                "-n",
                &name,
                &volume.qualified(),
            ]))?;
        }
        bare.push(begin.elapsed());
        let names = volumes.iter().map(|volume| format!("{}.bare", volume.qualified()));
        succeed(Command::new("lvremove").args(["-q", "-y"]).args(names))?;
        let begin = Instant::now();
        done(&["create", &domain, "measured"])?;
        ours.push(begin.elapsed());
        done(&["delete", &domain, "measured"])?;
        let ms = |times: &[Duration]| times.last().map_or(0, Duration::as_millis);
        println!("round {round}: bare {} ms, domsnap {} ms", ms(&bare), ms(&ours));
    }
    let (bare, ours) = (median(&mut bare), median(&mut ours));
    println!(
        "median of {rounds}: {VOLUMES} bare lvcreate {} ms, domsnap create {} ms: {:+.1} %",
        bare.as_millis(),
        ours.as_millis(),
        (ours.as_secs_f64() / bare.as_secs_f64() - 1.0) * 100.0
    );
    Ok(())
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}
