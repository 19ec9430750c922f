//! A copy of the test program that does one operation and is killed in it.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::house::{House, Op, Plot, Process};
use crate::strike::{How, Moment, Strike};
use crate::workshop::Workshop;

/// Tells a copy of the test program what to do.
const ERRAND: &str = "CONFORMANCE_ERRAND";

/// What a child does.
#[derive(Debug, Serialize, Deserialize)]
struct Errand {
    plot: Plot,
    op: Op,
    /// In the middle of steps; otherwise between them.
    inside: bool,
    number: u64,
}

/// Does a child's errand, where this process is one.
pub(crate) fn run(shop: &dyn Workshop) -> Option<ExitCode> {
    let errand = std::env::var(ERRAND).ok()?;
    Some(match go(shop, &errand) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    })
}

fn go(shop: &dyn Workshop, errand: &str) -> Result<()> {
    let Errand { plot, op, inside, number } = serde_json::from_str(errand)?;
    let process = Process::new(shop, &plot)?;
    let moments: &[Moment] = if inside { &[Moment::Progress] } else { &Moment::BETWEEN };
    process.strikes.arm(vec![Strike::new(moments, number, How::Kill)]);
    process.run_patiently(&op)??;
    Ok(())
}

impl House<'_> {
    /// Lets a child do `op` and be killed at the `number`th moment; gives whether it was. The model does not learn of it.
    pub(crate) fn is_killed(&mut self, op: &Op, inside: bool, number: u64) -> Result<bool> {
        self.crash();
        let errand = Errand { plot: self.plot.clone(), op: op.clone(), inside, number };
        let output = Command::new(std::env::current_exe()?)
            .env(ERRAND, serde_json::to_string(&errand)?)
            .stdin(Stdio::null())
            .output()
            .context("starting a copy of the test program")?;
        match (output.status.code(), output.status.signal()) {
            (Some(0), _) => Ok(false),
            (None, Some(9)) => Ok(true),
            _ => bail!("the copy ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr)),
        }
    }
}
