//! The `domsnap` command: snapshots of whole virtual machines, from the command line.
//!
//! It has its own backends and hypervisors. A program that adds another one is written like this:
//!
//! ```no_run
//! # use std::sync::Arc;
//! # fn mine() -> Arc<dyn snapcore::hypervisor::VmStateSaver> { unimplemented!() }
//! fn main() -> std::process::ExitCode {
//!     snapcli::run(|registry| {
//!         registry.register_hypervisor(mine());
//!         Ok(())
//!     })
//! }
//! ```

#![forbid(unsafe_code)]

mod answer;
mod args;
mod backends;
mod commands;
mod documents;
mod domain_file;
mod failure;
mod log;
mod progress;
mod regular;
mod session;
mod table;
mod tree;
mod trusted;
mod units;

use std::process::ExitCode;

use clap::Parser;
use snapcore::{Registry, Result};

/// Runs the command line, with the program's own backends and hypervisors and those that `register` adds.
pub fn run(register: impl Fn(&mut Registry) -> Result<()>) -> ExitCode {
    let cli = match args::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    let json = cli.global.json;
    log::begin();
    match commands::run(cli, &register) {
        Ok(answer) => {
            let written = answer::print(&answer.text);
            if let Some(complaint) = &answer.complaint {
                anstream::eprintln!("domsnap: {complaint}");
            }
            match written || answer.changed {
                true => ExitCode::from(answer.exit),
                // The requested output was not written completely.
                false => ExitCode::from(failure::exit::FAILED),
            }
        }
        Err(failure) => {
            failure.report(json);
            ExitCode::from(failure.exit())
        }
    }
}

/// Prints help and version as answers; anything else is a usage error, printed as JSON if that was requested.
fn usage(error: &clap::Error) -> ExitCode {
    let wrong = error.use_stderr();
    if wrong && std::env::args_os().any(|word| word == "--json") {
        let message = error.render().to_string();
        let message = message.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
        let error = snapcore::Error::new(snapcore::ErrorKind::Usage, message)
            .advise("`domsnap --help` and `domsnap COMMAND --help` describe the command line");
        failure::Failure::from(error).report(true);
    } else {
        // If standard error is closed, there is no place left for a report.
        let _ = error.print();
    }
    // As xl itself, its commands have one status for all that fails.
    let is_xl = std::env::args_os().nth(1).is_some_and(|word| word == "xl");
    ExitCode::from(match (wrong, is_xl) {
        (false, _) => failure::exit::DONE,
        (true, false) => failure::exit::USAGE,
        (true, true) => failure::exit::FAILED,
    })
}
