//! What every row is given.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::child;
use crate::image;
use crate::options::Options;
use crate::place;
use crate::row::{LIMIT, Row};

/// Programs, directory, and how often to repeat.
pub struct Bench {
    domsnap: PathBuf,
    dir: tempfile::TempDir,
    only: Vec<String>,
    /// Smaller and fewer.
    pub quick: bool,
    file_system: String,
}

impl Bench {
    /// Finds the programs and makes the directory.
    pub fn new(options: &Options) -> Result<Bench> {
        let named = options.domsnap.clone().or_else(|| std::env::var_os("DOMSNAP_BIN").map(PathBuf::from));
        let domsnap = match named {
            Some(file) => file,
            None => std::env::current_exe()?.with_file_name("domsnap"),
        };
        let domsnap = domsnap.canonicalize().with_context(|| {
            format!(
                "find {}: run `cargo build --release -p snapcli` first, or say --domsnap FILE",
                domsnap.display()
            )
        })?;
        let mut builder = tempfile::Builder::new();
        let dir = match &options.dir {
            Some(parent) => builder.prefix("domsnap-bench-").tempdir_in(parent),
            None => builder.prefix("domsnap-bench-").tempdir(),
        };
        let dir = dir.context("make the directory to measure in")?;
        place::refuse_memory(dir.path())?;
        let file_system = place::file_system(dir.path())?;
        Ok(Bench { domsnap, dir, only: options.only.clone(), quick: options.quick, file_system })
    }

    /// What is measured where, in a few lines.
    pub fn about(&self) -> String {
        let line = |command: &mut Command| {
            let text = child::output(command).unwrap_or_else(|error| format!("unknown ({error:#})"));
            text.lines().next().unwrap_or("unknown").to_owned()
        };
        let cpus = std::thread::available_parallelism().map_or(0, usize::from);
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
        format!(
            "{} against {}\nLinux {}, {cpus} CPUs, load at the start {}\nfiles on {}{}",
            line(&mut self.domsnap(self.path(), &["--version"])),
            line(&mut child::command("qemu-img", &["--version"])),
            kernel.trim(),
            load.split(' ').next().unwrap_or("unknown"),
            self.file_system,
            if self.quick { "\n--quick: small images, few repetitions; not for comparison" } else { "" },
        )
    }

    /// The directory of all of it.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// A new directory for a row.
    pub fn place(&self, name: &str) -> Result<tempfile::TempDir> {
        Ok(tempfile::Builder::new().prefix(&format!("{name}-")).tempdir_in(self.path())?)
    }

    /// Whether `--only` leaves the row in.
    pub fn wants(&self, row: &str) -> bool {
        self.only.is_empty()
            || self.only.iter().any(|only| {
                only == row || crate::rows::names().any(|(group, name)| group == only && name == row)
            })
    }

    /// The program that is measured.
    pub fn program(&self) -> &Path {
        &self.domsnap
    }

    /// `domsnap --state-dir STATE WORDS`.
    pub fn domsnap<S: AsRef<OsStr>>(&self, state: &Path, args: &[S]) -> Command {
        let mut command = child::command(&self.domsnap, &["--state-dir".as_ref(), state.as_os_str()]);
        command.args(args);
        command
    }

    /// The probe with `args`.
    pub fn probe<S: AsRef<OsStr>>(&self, args: &[S]) -> Result<Command> {
        let mut command = child::command(std::env::current_exe()?, &["probe"]);
        command.args(args);
        Ok(command)
    }

    /// `most` repetitions, or fewer: no more begin after `budget` is spent, but one is always made.
    pub fn repeat(
        &self,
        most: usize,
        budget: Duration,
        mut once: impl FnMut(usize) -> Result<()>,
    ) -> Result<()> {
        let start = Instant::now();
        let most = if self.quick { most.min(2) } else { most };
        for repetition in 0..most {
            once(repetition)?;
            if start.elapsed() > budget {
                break;
            }
        }
        Ok(())
    }

    /// One sample of `command` in `row`.
    pub fn time(&self, row: &mut Row, label: &str, command: &mut Command) -> Result<()> {
        row.sample(label, child::run(command)?);
        Ok(())
    }

    /// One sample of each side, another one first in each repetition.
    pub fn alternate<const N: usize>(
        &self,
        row: &mut Row,
        repetition: usize,
        mut sides: [(&str, Command); N],
    ) -> Result<()> {
        sides.rotate_left(repetition % N);
        for (label, mut command) in sides {
            self.time(row, label, &mut command)?;
        }
        Ok(())
    }

    /// Samples of a probe that reads and rewrites `bytes` with `flushes`.
    pub fn rewrite_limit(&self, row: &mut Row, bytes: u64, flushes: u32) -> Result<()> {
        let place = self.place("limit")?;
        let file = place.path().join("metadata");
        fill(&file, bytes)?;
        image::flush(&file)?;
        self.repeat(5, Duration::from_secs(5), |_| {
            let args = ["rewrite".into(), file.display().to_string(), bytes.to_string(), flushes.to_string()];
            self.time(row, LIMIT, &mut self.probe(&args)?)
        })
    }
}

/// Makes a file of so many bytes. This process must stay small meanwhile: until a child runs its own program
/// its memory is ours, and counts in its peak.
pub fn fill(file: &Path, bytes: u64) -> Result<()> {
    let mut out = std::fs::File::create(file)?;
    let piece = vec![3; 1 << 20];
    let mut left = bytes;
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(piece.len()).min(piece.len());
        std::io::Write::write_all(&mut out, &piece[..length])?;
        left -= length as u64;
    }
    Ok(())
}
