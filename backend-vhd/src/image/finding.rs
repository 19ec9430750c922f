//! Findings of a check of an image.

use std::fmt;

/// Importance of a finding.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Unusual, and without consequence.
    Note,
    /// Some program reads the image wrongly or refuses it; this engine reads it. It is written only after a
    /// repair where [`Finding::blocks_writing`] is true.
    Warning,
    /// The image contradicts itself.
    Error,
}

/// One finding about an image.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// Importance.
    pub severity: Severity,
    /// The message.
    pub text: String,
    /// True if [`Vhd::repair`](super::Vhd::repair) corrects it.
    pub repairable: bool,
    /// True if the image is not written before that.
    pub blocks_writing: bool,
}

impl Finding {
    /// An error.
    pub fn error(text: impl Into<String>) -> Self {
        Self { severity: Severity::Error, text: text.into(), repairable: false, blocks_writing: true }
    }

    /// A warning.
    pub fn warning(text: impl Into<String>) -> Self {
        Self { severity: Severity::Warning, text: text.into(), repairable: false, blocks_writing: false }
    }

    /// A note.
    pub fn note(text: impl Into<String>) -> Self {
        Self { severity: Severity::Note, text: text.into(), repairable: false, blocks_writing: false }
    }

    /// The same finding, which a repair corrects.
    #[must_use]
    pub fn repairable(mut self) -> Self {
        self.repairable = true;
        self
    }

    /// The same finding, which keeps the image from being written.
    #[must_use]
    pub fn blocking(mut self) -> Self {
        self.blocks_writing = true;
        self
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}
