//! Failures: their text, JSON and exit status.

use std::io::{IsTerminal, Write};

use anstyle::{AnsiColor, Style};
use snapcore::{Error, ErrorKind};

use crate::documents::{ErrorBody, ErrorDoc, SCHEMA, Versioned};

/// The exit statuses that the command line promises.
pub mod exit {
    /// Done.
    pub const DONE: u8 = 0;
    /// Failed, and what was begun was undone. Of `check`: data are lost or at risk.
    pub const FAILED: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// Refused; no changes made.
    pub const REFUSED: u8 = 3;
    /// An operation is incomplete; `recover` continues it.
    pub const NEEDS_RECOVERY: u8 = 4;
}

/// A command that failed.
#[derive(Debug)]
pub struct Failure {
    error: Box<Error>,
    changing: bool,
    started: bool,
    /// The exit status of a command that has but one for all failures.
    only: Option<u8>,
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self { error: Box::new(error), changing: false, started: false, only: None }
    }
}

impl Failure {
    /// `error` of an operation that was to change things, and had been written into the journal when
    /// `started`.
    pub fn of(error: Error, started: bool) -> Self {
        Self { error: Box::new(error), changing: true, started, only: None }
    }

    /// The same failure of an operation that was only planned: it is refused as the operation itself would
    /// be.
    #[must_use]
    pub fn of_plan(self) -> Self {
        Self { changing: true, ..self }
    }

    /// The same failure of a command that had deleted the snapshots `done` before it.
    #[must_use]
    pub fn after(self, done: &[&str]) -> Self {
        if done.is_empty() {
            return self;
        }
        let state = format!("deleted before it: {}; the others are as they were", done.join(", "));
        Self { error: Box::new(self.error.state(state)), changing: true, started: true, ..self }
    }

    /// The same failure of a command that had done a part, and what that left.
    #[must_use]
    pub fn left(self, state: &str) -> Self {
        Self { error: Box::new(self.error.state(state)), changing: true, started: true, ..self }
    }

    /// The same failure of a command that ends with `status` whatever fails.
    #[must_use]
    pub fn ending_with(self, status: u8) -> Self {
        Self { only: Some(status), ..self }
    }

    /// The kind of the error.
    pub fn kind(&self) -> ErrorKind {
        self.error.kind()
    }

    /// The exit status.
    pub fn exit(&self) -> u8 {
        self.only.unwrap_or_else(|| self.meaning())
    }

    /// The exit status that says what the failure means.
    fn meaning(&self) -> u8 {
        match self.error.kind() {
            ErrorKind::NeedsRecovery => exit::NEEDS_RECOVERY,
            ErrorKind::Usage => exit::USAGE,
            ErrorKind::NotFound
            | ErrorKind::Exists
            | ErrorKind::Refused
            | ErrorKind::Busy
            | ErrorKind::Unsupported
                if !self.started =>
            {
                exit::REFUSED
            }
            // Damage that was found before anything was begun: that is a "no" too.
            ErrorKind::Corrupt | ErrorKind::Io | ErrorKind::NoSpace if self.changing && !self.started => {
                exit::REFUSED
            }
            _ => exit::FAILED,
        }
    }

    /// The failure, in a line.
    pub fn message(&self) -> String {
        self.error.to_string()
    }

    /// Returns true if the error is a refusal of a requested change.
    fn declined(&self) -> bool {
        matches!(self.error.kind(), ErrorKind::Refused | ErrorKind::Busy | ErrorKind::Exists)
    }

    fn body(&self) -> ErrorBody {
        let (state, advice) = (self.error.state_now(), self.error.advice());
        let state = match (state, self.meaning()) {
            (None, exit::REFUSED) if self.changing || self.declined() => Some("no changes made".to_owned()),
            (state, _) => state.map(str::to_owned),
        };
        ErrorBody {
            kind: self.error.kind(),
            // State and advice have fields of their own.
            message: self.error.summary(),
            state,
            advice: advice.map(str::to_owned),
            exit: self.exit(),
        }
    }

    /// Says it: for people on standard error, for programs as a document on standard output.
    pub fn report(&self, json: bool) {
        let body = self.body();
        if json {
            let document = Versioned { schema: SCHEMA, document: ErrorDoc { error: body } };
            crate::answer::print(&crate::answer::json(&document));
            return;
        }
        // The terminal may be gone.
        drop(writeln!(anstream::stderr(), "{}", paragraph(&body, std::io::stderr().is_terminal())));
    }
}

/// `domsnap: error`, then the state, then what to do, each on a line of its own.
fn paragraph(body: &ErrorBody, painted: bool) -> String {
    let red = match painted {
        true => AnsiColor::Red.on_default().bold(),
        false => Style::new(),
    };
    let mut text = format!("{red}domsnap:{red:#} {}", body.message);
    for line in [&body.state, &body.advice].into_iter().flatten() {
        text.push_str("\n  ");
        text.push_str(line);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(kind: ErrorKind, started: bool) -> u8 {
        Failure::of(Error::new(kind, "x"), started).exit()
    }

    #[test]
    fn a_refusal_before_anything_started_is_three() {
        use ErrorKind as K;
        for kind in [K::NotFound, K::Exists, K::Refused, K::Busy, K::Unsupported] {
            assert_eq!(status(kind, false), exit::REFUSED, "{kind:?}");
            assert_eq!(status(kind, true), exit::FAILED, "{kind:?}");
        }
    }

    #[test]
    fn what_failed_and_was_undone_is_one() {
        for kind in [ErrorKind::Cancelled, ErrorKind::Internal] {
            assert_eq!(status(kind, false), exit::FAILED, "{kind:?}");
            assert_eq!(status(kind, true), exit::FAILED, "{kind:?}");
        }
    }

    /// Damage that is found before a change begins is a refusal.
    #[test]
    fn damage_before_a_change_is_a_refusal() {
        assert_eq!(status(ErrorKind::Corrupt, false), exit::REFUSED);
        assert_eq!(status(ErrorKind::Corrupt, true), exit::FAILED);
        let looking = Failure::from(Error::new(ErrorKind::Corrupt, "x"));
        assert_eq!(looking.exit(), exit::FAILED);
    }

    #[test]
    fn half_done_operation_exits_with_four() {
        assert_eq!(status(ErrorKind::NeedsRecovery, false), exit::NEEDS_RECOVERY);
        assert_eq!(status(ErrorKind::NeedsRecovery, true), exit::NEEDS_RECOVERY);
        assert_eq!(status(ErrorKind::Usage, false), exit::USAGE);
    }

    /// State and advice have lines of their own, and nothing is printed twice.
    #[test]
    fn state_and_advice_have_their_own_lines() {
        let error = Error::new(ErrorKind::Io, "disk full")
            .because(std::io::Error::other("no space"))
            .context("creating s1 of web")
            .state("it was undone")
            .advise("make room");
        let text = paragraph(&Failure::of(error, true).body(), false);
        assert_eq!(text, "domsnap: creating s1 of web: disk full: no space\n  it was undone\n  make room");
    }

    #[test]
    fn a_refusal_says_that_nothing_was_touched() {
        let body = Failure::of(Error::new(ErrorKind::NotFound, "there is no snapshot x"), false).body();
        assert_eq!(body.state.as_deref(), Some("no changes made"));
    }
}
