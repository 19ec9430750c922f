//! Other programs.

use std::{
    fmt,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, bail};

/// What one run gave.
#[derive(Debug, Clone)]
pub struct Output {
    /// The command line, to be shown.
    pub command: String,
    /// The exit status; none if a signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ended with {:?}: {}{}", self.command, self.status, self.stdout, self.stderr)
    }
}

/// Runs a program to its end, whatever that is.
///
/// # Errors
/// It cannot be started.
pub fn run(command: &mut Command) -> Result<Output> {
    let shown = format!("{command:?}");
    command.env("LC_ALL", "C").stdin(Stdio::null());
    let output = command.output().with_context(|| format!("{shown} cannot be started"))?;
    Ok(Output {
        command: shown,
        status: output.status.code(),
        stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs a program that must succeed.
///
/// # Errors
/// It does not.
pub fn succeed(command: &mut Command) -> Result<Output> {
    let output = run(command)?;
    match output.status {
        Some(0) => Ok(output),
        _ => bail!("{output}"),
    }
}
