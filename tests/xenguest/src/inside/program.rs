//! Programs that a case runs in dom0.

use std::{
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, ensure};

/// How a program ended.
#[derive(Debug, Clone)]
pub struct Said {
    /// Its exit status; 255 where a signal ended it.
    pub status: i32,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

impl Said {
    /// Its standard output, where it succeeded.
    ///
    /// # Errors
    /// With what it said.
    pub fn ok(self) -> Result<String> {
        ensure!(self.status == 0, "it ended with {}: {}{}", self.status, self.out, self.err);
        Ok(self.out)
    }
}

/// Runs a program of dom0's to its end, and reports how long it took: the machine is slow, and a case that
/// fails is slow to repeat.
///
/// # Errors
/// It cannot be started.
pub fn program(name: &str, args: &[&str]) -> Result<Said> {
    let mut command = Command::new(name);
    command.args(args).env("LC_ALL", "C").stdin(Stdio::null());
    let begun = Instant::now();
    let output = command.output().with_context(|| format!("{name} cannot be started in dom0"))?;
    println!("{:>7} ms  {name} {}", begun.elapsed().as_millis(), args.join(" "));
    Ok(Said {
        status: output.status.code().unwrap_or(255),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs `xl`, which must succeed.
///
/// # Errors
/// With what it said.
pub fn xl(args: &[&str]) -> Result<String> {
    program("/usr/sbin/xl", args)?.ok().with_context(|| format!("xl {}", args.join(" ")))
}
