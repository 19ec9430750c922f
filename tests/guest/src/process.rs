//! Other programs.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Directories of system programs that are not in every user's PATH.
const SYSTEM: &str = "/usr/sbin:/sbin";

/// A program that the system prefers to others: the machines in which tests run one after another decide how
/// long a whole run takes. `nice` runs it all the same for a user who may not ask for that.
pub fn preferred(program: &str) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "-5", program]);
    command
}

/// Runs a program that must succeed; gives its standard output.
///
/// # Errors
/// What it said, with the advice.
pub fn run(command: &mut Command, advice: &str) -> Result<String> {
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("LC_ALL", "C").env("PATH", format!("{path}:{SYSTEM}")).stdin(Stdio::null());
    let output = command.output().with_context(|| format!("{command:?} cannot be started: {advice}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} ended with {}: {}: {advice}", output.status, said.trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("{command:?} does not write UTF-8"))
}
