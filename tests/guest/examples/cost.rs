//! What a guest costs: processor time of its QEMU a second, idle and under the load of the live tests.
//!
//! `cargo run -p testguest --example cost -- [TICK_MS [CPU]]`

use std::time::{Duration, Instant};
use std::{env, fs, thread};

use anyhow::{Context, Result};
use testguest::{Guest, GuestOptions};

/// What the kernel counts processor time in, a second.
const TICKS_PER_SECOND: f64 = 100.0;

/// The processor time of the guest's QEMU so far, in seconds.
fn processor_time(guest: &Guest) -> Result<f64> {
    let pid = guest.pid().context("the guest has ended")?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let (_, fields) = stat.rsplit_once(')').context("a stat without a name")?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    Ok((fields[11].parse::<f64>()? + fields[12].parse::<f64>()?) / TICKS_PER_SECOND)
}

fn main() -> Result<()> {
    let options = GuestOptions::new().deadline(Duration::from_secs(60));
    let options = match env::args().nth(1) {
        Some(tick) => options.tick_ms(tick.parse()?),
        None => options,
    };
    let options = match env::args().nth(2) {
        Some(cpu) => options.cpu(&cpu),
        None => options,
    };
    let guest = options.start()?;
    println!("its start: {:.2} s of a processor", processor_time(&guest)?);
    for load in [false, true] {
        if load {
            guest.dirty(16, 20.0)?;
            guest.blocks(64, 20.0)?;
        }
        guest.wait_ticks(10)?;
        let (used, begun, ticks) = (processor_time(&guest)?, Instant::now(), guest.ticks()?);
        thread::sleep(Duration::from_secs(10));
        let seconds = begun.elapsed().as_secs_f64();
        println!(
            "{}: {:.1} % of a processor, {:.0} ticks a second",
            if load { "under load" } else { "idle" },
            (processor_time(&guest)? - used) / seconds * 100.0,
            (guest.ticks()? - ticks) as f64 / seconds
        );
    }
    Ok(())
}
