//! [`GuestClone`]: a guest that continues from another's memory, in a QEMU that the program under test
//! started.

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::PathBuf,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};

use crate::guest::ShellOutput;

/// Within which it must say something.
const SOON: Duration = Duration::from_secs(180);

/// A clone of a [`crate::Guest`], by the directory that its sockets are in. It is not ended when this is
/// dropped.
pub struct GuestClone {
    dir: PathBuf,
}

impl GuestClone {
    /// The clone whose sockets are in a directory.
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Its QEMUs, by the monitor in their commands: one at most, if all is well.
    ///
    /// # Errors
    /// Processes cannot be listed.
    pub fn processes(&self) -> Result<Vec<u32>> {
        let wanted = format!("unix:{}/qmp", self.dir.display());
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Ok(pid) = entry.file_name().to_string_lossy().parse() else { continue };
            let line = fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
            if line.contains("qemu") && line.contains(&wanted) {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// The part that its QEMU has of all memory (Pss), in MiB: what several have is divided among them.
    ///
    /// # Errors
    /// It does not run.
    pub fn share_mib(&self) -> Result<u64> {
        let pid =
            *self.processes()?.last().with_context(|| format!("{} does not run", self.dir.display()))?;
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("it has a Pss")?;
        Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? >> 10)
    }

    /// Waits for so many of its ticks.
    ///
    /// # Errors
    /// It does not tick, or has found its memory and its disks to be of different instants.
    pub fn wait_ticks(&self, ticks: usize) -> Result<()> {
        let mut left = ticks;
        self.hear(None, |said| {
            left -= usize::from(said.starts_with("T "));
            (left == 0).then_some(())
        })
    }

    /// Runs a line of shell in it. The guest's own program does that: an agent may have an answer left that
    /// another client did not wait for.
    ///
    /// # Errors
    /// As [`GuestClone::wait_ticks`]; a status that is not 0 is none.
    pub fn shell(&self, line: &str) -> Result<ShellOutput> {
        let answer = self.hear(Some(&format!("clone sh {line}")), |said| {
            said.strip_prefix("R clone ").map(str::to_owned)
        })?;
        ShellOutput::of(&answer)
    }

    /// Says a line to it, and waits for one that `wanted` takes.
    fn hear<T>(&self, line: Option<&str>, mut wanted: impl FnMut(&str) -> Option<T>) -> Result<T> {
        let mut port = UnixStream::connect(self.dir.join("witness"))?;
        port.set_read_timeout(Some(SOON))?;
        if let Some(line) = line {
            writeln!(port, "{line}")?;
        }
        for said in BufReader::new(port).lines() {
            let said = said.with_context(|| format!("{} does not answer", self.dir.display()))?;
            ensure!(!said.contains("BAD") && !said.contains("ERR"), "{}: {said}", self.dir.display());
            if let Some(found) = wanted(&said) {
                return Ok(found);
            }
        }
        bail!("{} has ended", self.dir.display())
    }
}
