//! Running a process to its end, and what that cost.

use std::ffi::OsStr;
use std::io::{Read, Seek};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use wait4::Wait4;

/// What one process took.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    /// From before its start until it was waited for.
    pub wall: Duration,
    /// Its peak resident memory, in bytes.
    pub peak: u64,
    /// Processor time, its own and the kernel's for it.
    pub cpu: Duration,
}

/// The flushing calls of one process and its threads.
pub const FLUSHES: &str = "fsync,fdatasync,syncfs,sync_file_range,msync";

/// `program` with `args`, its input and output on nothing.
pub fn command<S: AsRef<OsStr>>(program: impl AsRef<OsStr>, args: &[S]) -> Command {
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C").env("NO_COLOR", "1").env_remove("DOMSNAP_STATE_DIR");
    // Nothing that is compared with keeps the replaced state.
    command.env("DOMSNAP_UNDO", "no");
    command
}

/// Runs `command`, which must succeed.
pub fn run(command: &mut Command) -> Result<Cost> {
    run_to(command, Stdio::null())
}

/// The same, with what it printed.
pub fn answered(command: &mut Command) -> Result<(Cost, String)> {
    let mut printed = tempfile::tempfile()?;
    let cost = run_to(command, Stdio::from(printed.try_clone()?));
    let mut text = String::new();
    printed.rewind()?;
    printed.read_to_string(&mut text).with_context(|| format!("read what {command:?} printed"))?;
    // With `--json` an error is an answer too.
    Ok((cost.with_context(|| format!("it answered {}", text.trim()))?, text))
}

fn run_to(command: &mut Command, output: Stdio) -> Result<Cost> {
    let mut errors = tempfile::tempfile()?;
    command.stdin(Stdio::null()).stdout(output).stderr(errors.try_clone()?);
    let start = Instant::now();
    let mut child = command.spawn().with_context(|| format!("start {command:?}"))?;
    let used = child.wait4().with_context(|| format!("wait for {command:?}"))?;
    let wall = start.elapsed();
    if !used.status.success() {
        let mut text = String::new();
        errors.rewind()?;
        errors.read_to_string(&mut text)?;
        let how = match used.status.signal() {
            Some(signal) => format!("was ended by signal {signal}"),
            None => format!("ended with status {:?}", used.status.code()),
        };
        bail!("{command:?} {how}: {}", text.trim());
    }
    Ok(Cost { wall, peak: used.rusage.maxrss, cpu: used.rusage.utime + used.rusage.stime })
}

/// Runs `command`, which must succeed, and gives its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    String::from_utf8(output.stdout).with_context(|| format!("read what {command:?} printed"))
}

/// Runs `command` under strace and gives the lines of its calls named in `calls`.
pub fn traced(command: &Command, calls: &str) -> Result<Vec<String>> {
    let log = tempfile::NamedTempFile::new()?;
    let mut strace = Command::new("strace");
    strace.args(["-f", "--seccomp-bpf", "-qq", "-s", "4096", "-e", "signal=none"]);
    strace.arg("-e").arg(format!("trace={calls}")).arg("-o").arg(log.path());
    strace.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => strace.env(name, value),
            None => strace.env_remove(name),
        };
    }
    run(&mut strace)?;
    let text = std::fs::read(log.path())?;
    let text = String::from_utf8_lossy(&text);
    // A call that another thread interrupted takes two lines.
    Ok(text.lines().filter(|line| !line.contains(" resumed>")).map(str::to_owned).collect())
}

/// How many times `command` flushes.
pub fn flushes(command: &Command) -> Result<usize> {
    Ok(traced(command, FLUSHES)?.len())
}

/// How many of `files` `command` opens. A file is known by its name alone, without its directory.
pub fn opened(command: &Command, files: &[PathBuf]) -> Result<usize> {
    let calls = traced(command, "open,openat,openat2")?;
    let paths: Vec<&Path> = calls.iter().filter_map(|line| line.split('"').nth(1)).map(Path::new).collect();
    Ok(files.iter().filter(|file| paths.iter().any(|path| path.file_name() == file.file_name())).count())
}
