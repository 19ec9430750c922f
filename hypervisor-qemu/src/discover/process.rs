//! The process of a QEMU: all that is needed to start it again.

use std::{fs, io, os::unix::fs::MetadataExt, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::machine::Machine;
use crate::saver::secrets::keeps_variable;

/// The process behind a QMP socket, from `/proc`. A part that could not be read is missing, and `unread`
/// gives the reason.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Process {
    /// Its id.
    pub pid: Option<u32>,
    /// Its start time, in clock ticks since boot: distinguishes it from a later process with the same id.
    pub start_ticks: Option<u64>,
    /// The user that it runs as.
    pub uid: Option<u32>,
    /// The program.
    pub program: Option<PathBuf>,
    /// Identity of the program file: device, inode, size and time of change. The abilities of one build do
    /// not change.
    #[serde(default)]
    pub build: Option<String>,
    /// Its command line, the first word included.
    #[serde(default)]
    pub command_line: Vec<String>,
    /// The environment variables that the next start needs. No other is kept anywhere, because they hold
    /// tokens and passwords of the user who started it.
    #[serde(default)]
    pub environment: Vec<(String, String)>,
    /// Its working directory: relative names of images begin there.
    pub directory: Option<PathBuf>,
    /// Parts that could not be read, and the reasons. A snapshot does not record them.
    #[serde(default)]
    pub unread: Vec<String>,
}

impl Process {
    pub(crate) fn read(machine: &Machine) -> Self {
        let mut process = Self::default();
        let Some(peer) = machine.qmp().peer() else {
            process.unread.push("the system does not report the process of the socket".to_owned());
            return process;
        };
        let pid = peer.pid;
        process.program = process.keep("program", fs::read_link(format!("/proc/{pid}/exe")));
        process.build =
            process.keep("program's file", fs::metadata(format!("/proc/{pid}/exe"))).map(|about| {
                let (dev, ino, size) = (about.dev(), about.ino(), about.size());
                format!("{dev:x}:{ino}:{size}:{}.{:09}", about.ctime(), about.ctime_nsec())
            });
        let args = process.keep("command line", fs::read(format!("/proc/{pid}/cmdline")));
        let args = split(&args.unwrap_or_default());
        let program =
            process.program.as_deref().and_then(|path| path.file_name()).map(|name| name.to_owned());
        let is_qemu = program
            .map(|name| name.to_string_lossy().into_owned())
            .or_else(|| args.first().map(|word| String::from_utf8_lossy(word).into_owned()))
            .is_some_and(|name| name.contains("qemu") || name.contains("kvm"));
        if !is_qemu {
            // A socket that was handed to QEMU belongs to the process that made it listen: its command line
            // is not QEMU's.
            let unread =
                format!("the socket was opened by process {pid}, which is not a QEMU: its supervisor");
            return Self { unread: vec![unread], ..Self::default() };
        }
        process.pid = Some(pid);
        process.start_ticks = peer.start_ticks;
        process.uid = Some(peer.uid);
        process.directory = process.keep("working directory", fs::read_link(format!("/proc/{pid}/cwd")));
        for word in args {
            let word = process.text("a word of the command line", word);
            process.command_line.push(word);
        }
        let environment = process.keep("environment", fs::read(format!("/proc/{pid}/environ")));
        for entry in split(&environment.unwrap_or_default()) {
            let entry = process.text("an entry of the environment", entry);
            if let Some((name, value)) = entry.split_once('=').filter(|(name, _)| keeps_variable(name)) {
                process.environment.push((name.to_owned(), value.to_owned()));
            }
        }
        process
    }

    fn keep<T>(&mut self, what: &str, read: io::Result<T>) -> Option<T> {
        read.map_err(|error| self.unread.push(format!("its {what}: {error}"))).ok()
    }

    fn text(&mut self, what: &str, bytes: Vec<u8>) -> String {
        String::from_utf8(bytes).unwrap_or_else(|error| {
            let text = String::from_utf8_lossy(error.as_bytes()).into_owned();
            self.unread.push(format!("{what} is not UTF-8: {text}"));
            text
        })
    }

    /// Returns the value of an option of the command line: `-cpu` or `--cpu` as a word of its own, then the
    /// value. The last one counts, as in QEMU.
    pub fn option(&self, name: &str) -> Option<&str> {
        let is = |word: &str| word == name || word.strip_prefix('-') == Some(name);
        self.command_line.windows(2).rev().find_map(|pair| match pair {
            [word, value] if is(word) => Some(value.as_str()),
            _ => None,
        })
    }

    /// Returns true if its command line makes QEMU end when the guest reboots. (No query reports what
    /// `set-action` changed since.)
    pub(crate) fn ends_at_reboot(&self) -> bool {
        let is = |word: &str, name: &str| word == name || word.strip_prefix('-') == Some(name);
        let mut ends = false;
        for (number, word) in self.command_line.iter().enumerate().skip(1) {
            if is(word, "-no-reboot") {
                ends = true;
            } else if is(word, "-action") {
                let actions = self.command_line.get(number + 1).map(String::as_str).unwrap_or_default();
                if let Some(action) =
                    actions.split(',').rev().find_map(|action| action.strip_prefix("reboot="))
                {
                    ends = action == "shutdown";
                }
            }
        }
        ends
    }
}

/// Splits strings that each end in a NUL.
fn split(bytes: &[u8]) -> Vec<Vec<u8>> {
    let bytes = bytes.strip_suffix(&[0]).unwrap_or(bytes);
    if bytes.is_empty() {
        return Vec::new();
    }
    bytes.split(|&byte| byte == 0).map(<[u8]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A QEMU that ends when its guest reboots is recognised by its command line.
    #[test]
    fn end_at_reboot_is_read_from_command_line() {
        let ends = |args: &[&str]| {
            let command_line = ["qemu"].iter().chain(args).map(|word| (*word).to_owned()).collect();
            Process { command_line, ..Process::default() }.ends_at_reboot()
        };
        assert!(ends(&["-no-reboot"]) && ends(&["--no-reboot", "-m", "1"]));
        assert!(ends(&["-action", "panic=pause,reboot=shutdown"]));
        assert!(!ends(&["-no-reboot", "-action", "reboot=reset"]) && !ends(&["-m", "1"]));
    }

    /// The last occurrence of an option counts, and its value may be empty.
    #[test]
    fn last_option_counts_and_may_be_empty() {
        let args = split(b"qemu\0-cpu\0max\0-name\0\0--cpu\0host\0");
        let command_line = args.into_iter().map(|word| String::from_utf8(word).expect("text")).collect();
        let process = Process { command_line, ..Process::default() };
        assert_eq!((process.option("-cpu"), process.option("-name")), (Some("host"), Some("")));
        assert_eq!(process.option("-m"), None);
        assert!(split(b"").is_empty());
    }
}
