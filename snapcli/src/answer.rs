//! A command's answer, and how it is written to standard output.

use std::io::Write;

use serde::Serialize;

use crate::documents::{SCHEMA, Versioned};
use crate::failure::exit;

/// A command's output and its exit status.
#[derive(Debug)]
pub struct Answer {
    /// For standard output.
    pub text: String,
    /// For standard error, where the answer is a bad one.
    pub complaint: Option<String>,
    /// The exit status.
    pub exit: u8,
    /// Something was changed: that holds whether or not the answer can be written.
    pub changed: bool,
}

impl Answer {
    /// `text`, done.
    pub fn text(text: impl Into<String>) -> Self {
        Self { text: text.into(), complaint: None, exit: exit::DONE, changed: false }
    }

    /// `document` with the version of its shape, done.
    pub fn document<T: Serialize>(document: T) -> Self {
        Self::text(json(&Versioned { schema: SCHEMA, document }))
    }
}

/// `document` as it is printed.
pub fn json<T: Serialize>(document: &T) -> String {
    match serde_json::to_string_pretty(document) {
        Ok(text) => text,
        // Only a map with keys that are no strings fails, and no document has one.
        Err(error) => format!("{{\"error\": \"{error}\"}}"),
    }
}

/// Writes `text` to standard output, with a line break at its end. Returns false, and says why, where it
/// cannot be written. A reader that has gone is no failure.
pub fn print(text: &str) -> bool {
    if text.is_empty() {
        return true;
    }
    let mut out = anstream::AutoStream::auto(std::io::stdout().lock());
    let end = if text.ends_with('\n') { "" } else { "\n" };
    if let Err(error) =
        out.write_all(text.as_bytes()).and_then(|()| out.write_all(end.as_bytes())).and_then(|()| out.flush())
        && error.kind() != std::io::ErrorKind::BrokenPipe
    {
        drop(writeln!(anstream::stderr(), "domsnap: write to standard output: {error}"));
        return false;
    }
    true
}
