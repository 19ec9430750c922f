//! Running `domsnap` under `faultfs`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::domsnap::{self, Domsnap};
use crate::place;
use crate::record::Record;

/// `domsnap` with the shim preloaded, watching `root`, and nothing asked of it yet. What is tried before an
/// operation begins, with empty files of their own, is left alone: it is the same before each, and tests of
/// its own fail and kill it ([`TRIED`]).
pub fn watching(domsnap: Domsnap, root: &Path) -> Result<Domsnap> {
    let library = domsnap::product("DOMSNAP_FAULTFS", "libfaultfs.so", "faultfs");
    let root = root.canonicalize().with_context(|| format!("find {}", root.display()))?;
    Ok(domsnap.env("LD_PRELOAD", library).env("FAULTFS_ROOT", root).env("FAULTFS_LEAVE", TRIED))
}

/// A part of the names of files by which directories are tried.
pub const TRIED: &str = "/.domsnap-probe-";

/// [`watching`], also what is tried before an operation begins.
///
/// # Errors
/// As of [`watching`].
pub fn watching_all(domsnap: Domsnap, root: &Path) -> Result<Domsnap> {
    Ok(watching(domsnap, root)?.env("FAULTFS_LEAVE", ""))
}

/// One operation as the shim counted it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counted {
    /// From 1.
    pub number: u64,
    /// Kind, path, offset and length, as text.
    pub line: String,
}

impl Counted {
    /// Whether it is a write of more than one byte, which can be torn.
    pub fn can_tear(&self) -> bool {
        self.line.starts_with("write ")
            && !self.line.ends_with(" length 1")
            && !self.line.ends_with(" length 0")
    }

    /// Whether it is one before which a step of an operation on a running domain begins: the journal is made
    /// durable, or a name of an image or memory image changes.
    pub fn begins_a_step(&self) -> bool {
        let journal = self.line.contains("-wal") && !self.line.starts_with("write ");
        let names = ["rename ", "link ", "unlink "].iter().any(|kind| self.line.starts_with(kind));
        journal
            || (names
                && (self.line.contains(".qcow2") || self.line.contains(".memory"))
                && !self.line.contains(".domsnap/domain.json"))
    }

    /// Whether all that it changes is what a temporary file has in it, or whether that is there.
    pub fn is_within_a_temporary(&self) -> bool {
        let mut fields = self.line.split(' ');
        let kind = fields.next().unwrap_or_default();
        let path = fields.next().unwrap_or_default();
        !["rename", "link"].contains(&kind)
            && [".domsnap-new", ".domsnap-switch", ".json.tmp", ".part"].iter().any(|end| path.ends_with(end))
    }

    /// Whether it is a write to SQLite's log, or one of a checkpoint: to the database, of what is in the log.
    pub fn is_of_the_catalogue(&self) -> bool {
        self.line.starts_with("write ") && ["-wal at ", ".db at "].iter().any(|file| self.line.contains(file))
    }
}

/// Adds a list of operations to be written to `file`.
pub fn counting(domsnap: Domsnap, file: &Path) -> Domsnap {
    domsnap.env("FAULTFS_COUNT", file)
}

/// The list that [`counting`] asked for. No file is no operation.
///
/// # Errors
/// If a line is not what the shim writes.
pub fn counted(file: &Path) -> Result<Vec<Counted>> {
    let text = match std::fs::read_to_string(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text?,
    };
    text.lines()
        .map(|line| {
            let (number, line) = line.split_once(' ').with_context(|| format!("{line:?} is no operation"))?;
            Ok(Counted { number: number.parse()?, line: line.to_owned() })
        })
        .collect()
}

/// `domsnap` with the shim preloaded, which is to watch no files: for what it does to QMP commands.
pub fn preloaded(domsnap: Domsnap) -> Domsnap {
    domsnap.env("LD_PRELOAD", domsnap::product("DOMSNAP_FAULTFS", "libfaultfs.so", "faultfs"))
}

/// `domsnap` with the shim preloaded, whose clock begins at `second` (since 1970) in each process.
pub fn at_time(domsnap: Domsnap, second: i64) -> Domsnap {
    preloaded(domsnap).env("FAULTFS_CLOCK", second.to_string())
}

/// Adds a list of the QMP commands that change something to be written to `file`.
pub fn counting_commands(domsnap: Domsnap, file: &Path) -> Domsnap {
    domsnap.env("FAULTFS_QMP_COUNT", file)
}

/// SIGKILL just before QMP command `number`, or, where `sent`, just after it was sent.
pub fn killing_at_command(domsnap: Domsnap, number: u64, sent: bool) -> Domsnap {
    let domsnap = domsnap.env("FAULTFS_QMP_KILL_AT", number.to_string());
    if sent { domsnap.env("FAULTFS_QMP_KILL_MODE", "sent") } else { domsnap }
}

/// A signal just before QMP command `number`, with time to hear it.
pub fn signalling_at_command(domsnap: Domsnap, number: u64, signal: i32) -> Domsnap {
    killing_at_command(domsnap, number, false).env("FAULTFS_QMP_SIGNAL", signal.to_string())
}

/// Adds a binary record to be written to `file`.
pub fn recording(domsnap: Domsnap, file: &Path) -> Domsnap {
    domsnap.env("FAULTFS_LOG", file)
}

/// The record that [`recording`] asked for.
///
/// # Errors
/// If it cannot be read.
pub fn recorded(file: &Path) -> Result<Vec<Record>> {
    Record::decode_all(&std::fs::read(file)?).map_err(anyhow::Error::msg)
}

/// SIGKILL just before operation `number`, or in the middle of it if it is a write and `torn`.
pub fn killing(domsnap: Domsnap, number: u64, torn: bool) -> Domsnap {
    let domsnap = domsnap.env("FAULTFS_KILL_AT", number.to_string());
    if torn { domsnap.env("FAULTFS_KILL_MODE", "torn") } else { domsnap }
}

/// SIGSTOP just before operation `number`: the process holds what it holds, until it gets SIGCONT.
pub fn stopping(domsnap: Domsnap, number: u64) -> Domsnap {
    domsnap.env("FAULTFS_STOP_AT", number.to_string())
}

/// SIGINT just before operation `number`.
pub fn interrupting(domsnap: Domsnap, number: u64) -> Domsnap {
    domsnap.env("FAULTFS_INTERRUPT_AT", number.to_string())
}

/// How often an injected error happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Often {
    /// Once.
    Once,
    /// From then on, to everything that needs space.
    FromThenOn,
}

/// `errno` (`ENOSPC`, `EIO`, `EDQUOT`) instead of operation `number`.
pub fn failing(domsnap: Domsnap, number: u64, errno: &str, often: Often) -> Domsnap {
    let domsnap = domsnap.env("FAULTFS_FAIL_AT", number.to_string()).env("FAULTFS_ERRNO", errno);
    match often {
        Often::Once => domsnap,
        Often::FromThenOn => domsnap.env("FAULTFS_FAIL_MODE", "on"),
    }
}

/// A fresh directory for the shim's own files, outside of what it watches.
///
/// # Errors
/// If there is none to be had.
pub fn outputs() -> Result<(tempfile::TempDir, PathBuf)> {
    let dir = place::directory("domsnap-shim-")?;
    let file = dir.path().join("operations");
    Ok((dir, file))
}
