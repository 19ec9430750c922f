//! What is shown while an operation runs: one subscriber of the service's events. All of it goes to standard error.

use std::collections::HashMap;
use std::io::IsTerminal;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use snapcore::Event;
use tokio_util::sync::CancellationToken;

use crate::args::Global;
use crate::units;

/// Moves of fewer bytes are over before a bar could be read.
const WORTH_A_BAR: u64 = 32 << 20;

/// The view of one operation.
pub struct Progress {
    bar: Option<ProgressBar>,
    shows_bars: bool,
    verbose: bool,
    speaks: bool,
    started: bool,
    committed: bool,
    done: HashMap<u64, u64>,
}

impl Progress {
    /// A view as `global` wants it: bars on a terminal alone.
    pub fn new(global: &Global) -> Self {
        let speaks = !global.json && !global.quiet;
        Self {
            bar: None,
            shows_bars: speaks && std::io::stderr().is_terminal(),
            verbose: global.verbose,
            speaks,
            started: false,
            committed: false,
            done: HashMap::new(),
        }
    }

    /// Whether the operation that was asked for was written into the journal.
    pub fn started(&self) -> bool {
        self.started
    }

    /// Shows `event`.
    pub fn tell(&mut self, event: Event) {
        match event {
            Event::Started { kind, snapshots, bytes, .. } => {
                self.started = true;
                self.committed = false;
                if self.shows_bars && bytes >= WORTH_A_BAR {
                    let words =
                        std::iter::once(kind.as_str()).chain(snapshots.iter().map(|name| name.as_str()));
                    self.bar = Some(bar(&words.collect::<Vec<_>>().join(" "), bytes));
                }
            }
            Event::StepStarted { target, summary, bytes, .. } => {
                if let Some(bar) = &self.bar {
                    bar.set_message(format!("{target}: {summary}"));
                }
                if self.verbose {
                    let size = match bytes {
                        0 => String::new(),
                        bytes => format!(" ({})", units::bytes(bytes)),
                    };
                    self.say(&format!("{target}: {summary}{size}"));
                }
            }
            Event::Progress { index, done, .. } => {
                self.done.insert(index, done);
                if let Some(bar) = &self.bar {
                    bar.set_position(self.done.values().sum());
                }
            }
            Event::Committed { .. } => {
                self.committed = true;
                if self.verbose {
                    self.say("commit point: from here on it is carried through");
                }
            }
            Event::Undoing { reason, .. } if self.speaks => self.say(&format!("undoing: {reason}")),
            Event::Warning { message, .. } if self.verbose => self.say(&format!("warning: {message}")),
            // The answer tells of these.
            _ => {}
        }
    }

    /// Cancels the work behind `cancel`, and says what that does.
    pub fn interrupted(&mut self, cancel: &CancellationToken) {
        let again = cancel.is_cancelled();
        cancel.cancel();
        self.say(match (self.committed, again) {
            (false, false) => "interrupted: what was done is being undone",
            (false, true) => "interrupted already: it is still being undone; this is safe to wait for",
            (true, false) => {
                "too late to undo, it is past its commit point: it is being carried through, without merges that can wait"
            }
            (true, true) => "past its commit point: it is still being carried through; this is safe to wait for",
        });
    }

    /// Takes the bar away.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn say(&self, line: &str) {
        let say = || anstream::eprintln!("{line}");
        match &self.bar {
            Some(bar) => bar.suspend(say),
            None => say(),
        }
    }
}

fn bar(what: &str, bytes: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(bytes), ProgressDrawTarget::stderr());
    let style = "{prefix} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta} {wide_msg}";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_prefix(what.to_owned());
    bar
}
