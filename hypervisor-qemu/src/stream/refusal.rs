//! [`Refusal`]: the reason why a stream is not taken apart.

use std::io;

/// The reason why a stream is not taken apart.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// It is not as QEMU writes it.
    Wrong {
        /// Offset in the stream, in bytes.
        at: u64,
        /// What is wrong there.
        what: String,
    },
    /// It may be as a QEMU writes it, in a form that is not known here.
    Unknown {
        /// Offset in the stream, in bytes.
        at: u64,
        /// What is there.
        what: String,
    },
    /// It could not be read.
    Read(io::Error),
    /// Its parts could not be written.
    Write(io::Error),
}

impl Refusal {
    pub(super) fn wrong(at: u64, what: impl Into<String>) -> Self {
        Self::Wrong { at, what: what.into() }
    }

    pub(super) fn unknown(at: u64, what: impl Into<String>) -> Self {
        Self::Unknown { at, what: what.into() }
    }
}
