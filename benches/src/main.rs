//! domsnap side by side with qemu-img: each operation as a user meets it, from the start of the process to
//! its end.
//!
//! Every row runs both programs alternately on files of one directory, checks once what they left (with
//! `qemu-img`), and prints medians, spread, ratios, peak memory and flush counts beside what domsnap aims at.
//! A missed target is a line of the report and not an error: the exit status is 1 only where something could
//! not be measured, or where an operation left a wrong result.
//!
//! - [`options`]: the command line
//! - [`mod@bench`]: what every row is given: programs, directory, how often to repeat
//! - [`child`]: running a process and what it cost; counting its calls
//! - [`row`]: samples of one row, its targets and their verdicts
//! - [`place`]: directories, the file system that they are on, loop devices
//! - [`image`]: images made by qemu-img
//! - [`chain`]: domains whose chains domsnap made
//! - [`machine`]: running guests, registered with domsnap, and QEMU's own snapshots of them
//! - [`virsh`]: the same guests under libvirt
//! - [`proxy`]: how long QEMU takes to answer
//! - [`probe`]: the least work that an operation can be
//! - [`rows`]: the measurements
//! - [`report`]: the table at the end

#![forbid(unsafe_code)]

mod bench;
mod chain;
mod child;
mod image;
mod machine;
mod options;
mod place;
mod probe;
mod proxy;
mod report;
mod row;
mod rows;
mod virsh;

use std::process::ExitCode;

use clap::Parser;

use crate::bench::Bench;
use crate::options::{Options, Probe};

fn main() -> ExitCode {
    let options = Options::parse();
    let outcome = match &options.probe {
        Some(Probe::Probe(probe)) => probe.run().map(|()| true),
        None => measure(&options),
    };
    match outcome {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every row that was asked for could be measured.
fn measure(options: &Options) -> anyhow::Result<bool> {
    let groups = options.groups()?;
    if options.list {
        for (group, name) in rows::names() {
            println!("{group:<10} {name}");
        }
        return Ok(true);
    }
    let bench = Bench::new(options)?;
    println!("{}", bench.about());
    let mut rows = Vec::new();
    let mut failures = Vec::new();
    for group in groups {
        match (group.measure)(&bench) {
            Ok(measured) => rows.extend(measured),
            Err(error) => {
                eprintln!("bench: group {} could not be measured: {error:#}", group.name);
                failures.push(group.name);
            }
        }
    }
    let measured: Vec<_> = rows.iter().filter(|row| bench.wants(row.name())).collect();
    println!("{}", report::text(&measured));
    if let Some(file) = &options.markdown {
        std::fs::write(file, report::markdown(&bench.about(), &measured))?;
    }
    if !failures.is_empty() {
        println!("NOT MEASURED: {}", failures.join(", "));
    }
    Ok(failures.is_empty())
}
