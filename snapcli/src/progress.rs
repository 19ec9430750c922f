//! Progress of a running operation: one subscriber of the service's events. Everything goes to standard
//! error.

use std::collections::HashMap;
use std::io::{IsTerminal, Write};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use snapcore::service::Event;
use snapcore::{DomainName, Target};
use tokio_util::sync::CancellationToken;

use crate::args::Global;
use crate::units;

/// Moves of fewer bytes are over before a bar could be read.
const WORTH_A_BAR: u64 = 32 << 20;

/// The view of one operation.
pub struct Progress {
    bar: Option<ProgressBar>,
    /// The operation that the bar shows.
    what: String,
    /// The step that runs now.
    step: String,
    shows_bars: bool,
    verbose: bool,
    speaks: bool,
    started: bool,
    committed: bool,
    moved: Moved,
    warnings: Vec<(DomainName, String)>,
}

/// Bytes to move, and bytes moved. A plan says what its steps will move; of memory, and of what a running
/// domain merges itself, only the step does, while it runs.
#[derive(Debug, Default)]
struct Moved {
    total: u64,
    steps: HashMap<u64, Step>,
}

#[derive(Debug, Default)]
struct Step {
    counted: u64,
    done: u64,
}

impl Moved {
    fn of(total: u64) -> Self {
        Self { total, steps: HashMap::new() }
    }

    fn begins(&mut self, index: u64, planned: u64) {
        self.steps.entry(index).or_default().counted = planned;
    }

    fn moves(&mut self, index: u64, done: u64, total: u64) {
        let step = self.steps.entry(index).or_default();
        self.total = self.total.saturating_add(total.saturating_sub(step.counted));
        step.counted = step.counted.max(total);
        step.done = done;
    }

    fn done(&self) -> u64 {
        self.steps.values().map(|step| step.done).fold(0, u64::saturating_add)
    }
}

impl Progress {
    /// A view as `global` wants it: bars on a terminal alone.
    pub fn new(global: &Global) -> Self {
        let speaks = !global.json && !global.quiet;
        Self {
            bar: None,
            what: String::new(),
            step: String::new(),
            shows_bars: speaks && std::io::stderr().is_terminal(),
            verbose: global.verbose,
            speaks,
            started: false,
            committed: false,
            moved: Moved::default(),
            warnings: Vec::new(),
        }
    }

    /// Warnings, each with its domain.
    pub fn warnings(self) -> Vec<(DomainName, String)> {
        self.warnings
    }

    /// Returns true if the requested operation was recorded in the journal.
    pub fn started(&self) -> bool {
        self.started
    }

    /// Shows `event`.
    pub fn report(&mut self, event: Event) {
        match event {
            Event::Started { kind, snapshots, bytes, .. } => {
                self.started = true;
                self.committed = false;
                let parts = std::iter::once(kind.as_str()).chain(snapshots.iter().map(|name| name.as_str()));
                self.what = parts.collect::<Vec<_>>().join(" ");
                self.moved = Moved::of(bytes);
                self.draw();
            }
            Event::StepStarted { index, target, summary, bytes, .. } => {
                let subject = target.as_ref().map_or("domain", Target::as_str);
                self.step = format!("{subject}: {summary}");
                self.moved.begins(index, bytes);
                if let Some(bar) = &self.bar {
                    bar.set_message(self.step.clone());
                }
                if self.verbose {
                    let size = match bytes {
                        0 => String::new(),
                        bytes => format!(" ({})", units::bytes(bytes)),
                    };
                    self.say(&format!("{subject}: {summary}{size}"));
                }
            }
            Event::Progress { index, done, total, .. } => {
                self.moved.moves(index, done, total);
                self.draw();
            }
            Event::Committed { .. } => {
                self.committed = true;
                if self.verbose {
                    self.say("committed; completing");
                }
            }
            // The error that ends the command gives the reason; it is not printed twice.
            Event::Undoing { reason, .. } if self.verbose => self.say(&format!("rolling back: {reason}")),
            Event::Undoing { .. } if self.speaks => self.say("rolling back"),
            Event::Warning { domain, message } => {
                if self.verbose {
                    self.say(&format!("warning: {message}"));
                }
                self.warnings.push((domain, message));
            }
            // The answer has these.
            _ => {}
        }
    }

    /// Cancels the work behind `cancel`, and says what that does.
    pub fn interrupted(&mut self, cancel: &CancellationToken) {
        let again = cancel.is_cancelled();
        cancel.cancel();
        self.say(match (self.committed, again) {
            (false, false) => "interrupted, rolling back",
            (false, true) => "interrupted already, still rolling back; it is safe to wait",
            (true, false) => "past the point of no return: completing (merges are deferred)",
            (true, true) => "past the point of no return: still completing; it is safe to wait",
        });
    }

    /// Draws the bar as far as it is, and begins one as soon as there is enough to move.
    fn draw(&mut self) {
        if self.bar.is_none() && self.shows_bars && self.moved.total >= WORTH_A_BAR {
            let bar = bar(&self.what, self.moved.total);
            bar.set_message(self.step.clone());
            self.bar = Some(bar);
        }
        if let Some(bar) = &self.bar {
            bar.set_length(self.moved.total);
            bar.set_position(self.moved.done());
        }
    }

    /// Takes the bar away.
    pub fn end(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }

    fn say(&self, line: &str) {
        // A lost terminal must not end the operation.
        let say = || drop(writeln!(anstream::stderr(), "{line}"));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_only_a_step_knows_to_be_moved_is_added_once() {
        let mut moved = Moved::of(100);
        moved.begins(0, 100);
        moved.moves(0, 40, 100);
        assert_eq!((moved.done(), moved.total), (40, 100));
        // Memory: planned as nothing, and the guest dirties more while it is written.
        moved.begins(1, 0);
        moved.moves(1, 10, 500);
        moved.moves(1, 300, 600);
        moved.moves(1, 590, 590);
        assert_eq!((moved.done(), moved.total), (630, 700));
    }
}
