//! The guest's console: its program's lines are read from the log that xenconsoled keeps, and commands go
//! into the terminal that it has for the guest. (`tests/guest/src-guest/witness.c` has the lines.)
//!
//! The log goes on over saves, restores and reboots; the terminal is another one after each.

use std::{
    fs::{self, File},
    io::{Read, Seek, SeekFrom, Write},
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

use super::program;

const LOOK: Duration = Duration::from_millis(50);

pub(super) struct Console {
    log: PathBuf,
    name: String,
    /// Where what belongs to this guest begins: a name may be used again.
    begin: u64,
    questions: u32,
}

impl Console {
    /// That of the guest of a name, from now on.
    pub(super) fn new(name: &str) -> Self {
        let log = PathBuf::from(format!("/var/log/xen/console/guest-{name}.log"));
        let begin = fs::metadata(&log).map_or(0, |about| about.len());
        Self { log, name: name.to_owned(), begin, questions: 0 }
    }

    /// What was said since a place.
    fn since(&self, from: u64) -> String {
        let read = || -> std::io::Result<Vec<u8>> {
            let mut file = File::open(&self.log)?;
            file.seek(SeekFrom::Start(from))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        String::from_utf8_lossy(&read().unwrap_or_default()).replace('\r', "")
    }

    /// All that was said.
    pub(super) fn text(&self) -> String {
        self.since(self.begin)
    }

    /// Where it begins.
    pub(super) fn begin(&self) -> u64 {
        self.begin
    }

    /// How much was said.
    pub(super) fn place(&self) -> u64 {
        fs::metadata(&self.log).map_or(self.begin, |about| about.len())
    }

    /// Waits for something in what is said since a place.
    pub(super) fn wait<T>(
        &self,
        from: u64,
        deadline: Duration,
        what: &str,
        found: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let until = Instant::now() + deadline;
        loop {
            let text = self.since(from);
            if let Some(found) = found(&text) {
                return Ok(found);
            }
            if Instant::now() > until {
                let tail: Vec<&str> = text.lines().rev().take(8).collect();
                bail!("{what}: not within {deadline:?}; the guest's last lines, newest first: {tail:?}");
            }
            thread::sleep(LOOK);
        }
    }

    /// Asks the program, and waits for the answer, without its "ok".
    pub(super) fn ask(&mut self, command: &str, deadline: Duration) -> Result<String> {
        self.questions += 1;
        let id = format!("q{}-{}-{}", std::process::id(), self.questions, self.place());
        let from = self.place();
        let domid = program::xl(&["domid", &self.name])?;
        let key = format!("/local/domain/{}/console/tty", domid.trim());
        let tty = program::program("/usr/bin/xenstore-read", &[&key])?.ok()?;
        let mut terminal =
            File::options().write(true).open(tty.trim()).context("the guest has no console")?;
        terminal.write_all(format!("\n{id} {command}\n").as_bytes())?;
        drop(terminal);
        let begin = format!("R {id} ");
        let answer = self.wait(from, deadline, &format!("an answer to {command:?}"), |text| {
            let (whole, _) = text.rsplit_once('\n')?;
            Some(whole.lines().find_map(|line| line.strip_prefix(&begin))?.to_owned())
        })?;
        match answer.split_once(' ') {
            None if answer == "ok" => Ok(String::new()),
            Some(("ok", rest)) => Ok(rest.to_owned()),
            _ => bail!("the guest answered {command:?} with {answer:?}"),
        }
    }
}
