//! lvm2's commands: finding them, running them, and their output.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek};
use std::os::unix::process::CommandExt;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::{Error, ErrorKind, Result};

use crate::names::Volume;
use crate::report::{self, FIELDS, VolumeGroup};

/// Directories where lvm2 is searched: the caller's PATH must not choose a program that runs as root.
const DIRECTORIES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// The program of device-mapper, which comes with lvm2. It reports what lvm does not.
const DMSETUP: &str = "dmsetup";

/// Time limit for a report.
const REPORT: Duration = Duration::from_secs(120);

/// Time limit for a change of metadata.
pub(crate) const CHANGE: Duration = Duration::from_secs(300);

/// Time limit for a merge.
pub(crate) const MERGE: Duration = Duration::from_secs(24 * 3600);

/// Time for which a report is used again while this process changes nothing: one operation asks for several
/// disks of a group.
const FRESH: Duration = Duration::from_secs(5);

/// The same, in multiples of the time that the report took: where lvm2 is slow, so is everybody who could
/// change the group.
const FRESH_REPORTS: u32 = 6;

/// One command of lvm2.
#[derive(Debug)]
pub struct Invocation<'a> {
    /// The command and its arguments: `lvcreate`, `-s`, ...; or `dmsetup` and its arguments.
    pub args: &'a [String],
    /// Its time limit.
    pub deadline: Duration,
    /// Its standard input: a lock that lasts until the command ends, even if this process ends before.
    pub lock: Option<&'a File>,
}

/// Result of a command.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    /// Its exit status; none if a signal ended it.
    pub status: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

/// Runs lvm2's commands.
pub trait Runner: Send + Sync {
    /// Runs one to its end, with any result.
    ///
    /// # Errors
    /// If it cannot be found or started, or does not end in time.
    fn run(&self, invocation: &Invocation<'_>) -> Result<Answer>;
}

/// The lvm2 of this machine.
#[derive(Debug, Default)]
pub struct Commands;

impl Runner for Commands {
    fn run(&self, invocation: &Invocation<'_>) -> Result<Answer> {
        let (program, args) = match invocation.args {
            [first, rest @ ..] if first == DMSETUP => (find(DMSETUP)?, rest),
            args => (find("lvm")?, args),
        };
        let shown = match args.len() == invocation.args.len() {
            true => format!("lvm {}", args.join(" ")),
            false => invocation.args.join(" "),
        };
        let failed = |what: &str, error: std::io::Error| {
            Error::new(ErrorKind::Io, format!("{shown}: {what}")).because(error)
        };
        // Output goes to files, not pipes: a child that outlives this process must not die of a write in the
        // middle of its work.
        let (stdout, stderr) = (tempfile::tempfile(), tempfile::tempfile());
        let (mut stdout, mut stderr) = match (stdout, stderr) {
            (Ok(stdout), Ok(stderr)) => (stdout, stderr),
            (Err(error), _) | (_, Err(error)) => return Err(failed("its output has no place", error)),
        };
        let copy = |file: &File| file.try_clone().map_err(|error| failed("its output has no place", error));
        let expression = duct::cmd(program.as_std_path(), args)
            .env("LC_ALL", "C")
            .env("LVM_SUPPRESS_FD_WARNINGS", "1")
            .dir("/")
            .stdout_file(copy(&stdout)?)
            .stderr_file(copy(&stderr)?)
            .unchecked()
            // An interrupt from the terminal must reach only this process: half a command leaves a volume
            // suspended.
            .before_spawn(|command| {
                command.process_group(0);
                Ok(())
            });
        let expression = match invocation.lock {
            Some(lock) => expression.stdin_file(copy(lock)?),
            None => expression.stdin_null(),
        };
        let begun = Instant::now();
        let handle = expression.start().map_err(|error| failed("it cannot be started", error))?;
        let status = match handle.wait_timeout(invocation.deadline) {
            Ok(Some(output)) => output.status,
            Ok(None) => {
                // The command is not killed: that might leave a volume suspended. It keeps the lock until it
                // ends.
                std::mem::forget(handle);
                return Err(Error::new(
                    ErrorKind::Io,
                    format!("{shown}: it has not ended after {} s, and was left alone", invocation.deadline.as_secs()),
                )
                .advise(
                    "see what it waits for ('dmsetup info' shows suspended devices, 'lvs -a' the state of volumes); when it \
                     has ended, run 'domsnap recover'",
                ));
            }
            Err(error) => return Err(failed("waiting for it failed", error)),
        };
        let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        tracing::debug!(asked = %shown, took_us, "lvm ended");
        let read = |file: &mut File| -> std::io::Result<String> {
            let mut bytes = Vec::new();
            file.rewind()?;
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let unread = |error| failed("its output cannot be read", error);
        Ok(Answer {
            status: status.code(),
            stdout: read(&mut stdout).map_err(unread)?,
            stderr: read(&mut stderr).map_err(unread)?,
        })
    }
}

fn find(program: &str) -> Result<Utf8PathBuf> {
    let found = DIRECTORIES.iter().map(|directory| Utf8Path::new(directory).join(program));
    found.into_iter().find(|file| file.is_file()).ok_or_else(|| {
        Error::new(ErrorKind::Unsupported, format!("there is no {program} in {}", DIRECTORIES.join(", ")))
            .advise("install lvm2 (Debian, Fedora: the package lvm2)")
    })
}

/// lvm2 with a short cache of each group's last report.
pub(crate) struct Lvm2 {
    runner: Arc<dyn Runner>,
    /// The last report of each group, and until when it is used again.
    known: Mutex<HashMap<String, (Instant, Arc<VolumeGroup>)>>,
}

impl Lvm2 {
    pub(crate) fn new(runner: Arc<dyn Runner>) -> Self {
        Self { runner, known: Mutex::default() }
    }

    /// Returns a group and all its volumes; the report may be a moment old.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] if there is no such group, or it has no volumes.
    pub(crate) fn group(&self, name: &str) -> Result<Arc<VolumeGroup>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        match known.get(name) {
            Some((until, group)) if Instant::now() < *until => Ok(Arc::clone(group)),
            _ => {
                drop(known);
                self.group_now(name)
            }
        }
    }

    /// Reads a group and all its volumes now.
    pub(crate) fn group_now(&self, name: &str) -> Result<Arc<VolumeGroup>> {
        let args = [
            "lvs",
            "-a",
            "--reportformat",
            "json",
            "--units",
            "b",
            "--nosuffix",
            "--binary",
            "--config",
            "report/time_format=\"%s\"",
            "-o",
            FIELDS,
            name,
        ];
        let args = args.map(str::to_owned);
        let begun = Instant::now();
        let answer = self.runner.run(&Invocation { args: &args, deadline: REPORT, lock: None })?;
        let until = begun + FRESH.max(begun.elapsed() * FRESH_REPORTS);
        if answer.status != Some(0) {
            return Err(Error::new(
                ErrorKind::NotFound,
                format!("lvm does not report the volume group {name}: {}", error_line(&answer)),
            )
            .state("no changes made")
            .advise("check the group's name and whether its devices are there: 'vgs', 'pvs'"));
        }
        let group = report::parse(&answer.stdout)?.ok_or_else(|| {
            Error::new(ErrorKind::NotFound, format!("the volume group {name} has no volumes"))
        })?;
        let group = Arc::new(group);
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.insert(name.to_owned(), (until, Arc::clone(&group)));
        Ok(group)
    }

    /// Returns the kernel's open count of an active volume's device; `None` if there is no such device.
    ///
    /// # Errors
    /// If dmsetup is missing, or its output is not understood.
    pub(crate) fn openings(&self, volume: &Volume) -> Result<Option<usize>> {
        let name = volume.device();
        let args = [DMSETUP, "info", "-c", "--noheadings", "-o", "open", &name].map(str::to_owned);
        let answer = self.runner.run(&Invocation { args: &args, deadline: REPORT, lock: None })?;
        if answer.status != Some(0) {
            return Ok(None);
        }
        let count = answer.stdout.trim().parse().map_err(|error| {
            let detail = format!("dmsetup does not say how often {name} is open: {:?}", answer.stdout.trim());
            Error::new(ErrorKind::Io, detail).because(error).state("no changes made")
        })?;
        Ok(Some(count))
    }

    /// Changes a group, and drops its cached report.
    ///
    /// # Errors
    /// lvm's error message.
    pub(crate) fn change(
        &self,
        group: &str,
        args: &[String],
        deadline: Duration,
        lock: Option<&File>,
    ) -> Result<()> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(group);
        let answer = self.runner.run(&Invocation { args, deadline, lock });
        self.known.lock().unwrap_or_else(PoisonError::into_inner).remove(group);
        let answer = answer?;
        match answer.status {
            Some(0) => Ok(()),
            _ => Err(Error::new(ErrorKind::Io, format!("lvm {}: {}", args.join(" "), error_line(&answer)))),
        }
    }
}

/// Returns the error output of a failed command in one line, without mere warnings.
fn error_line(answer: &Answer) -> String {
    let noise = |line: &&str| !line.is_empty() && !line.starts_with("WARNING") && !line.contains("lvmpolld");
    let lines: Vec<&str> = answer.stderr.lines().map(str::trim).filter(noise).collect();
    let status = match answer.status {
        Some(status) => format!("status {status}"),
        None => "ended by a signal".to_owned(),
    };
    match lines.is_empty() {
        true => status,
        false => format!("{} ({status})", lines.join(" ")),
    }
}
