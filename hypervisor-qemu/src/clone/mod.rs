//! Clones with memory: further machines that start from one memory image, each with an identity of its own.
//!
//! [`command`] makes the command of a clone from that of the machine whose memory was saved. [`start`] starts
//! it, paused, with the links of its network devices down.
//!
//! The command is rewritten word by word, and it is strict: a clone must not write a file, listen on a socket
//! or use a device that is another machine's. So an option that is not known, and a file or socket that the
//! identity does not replace, are refused before anything is started.
//!
//! # What is not in the command
//!
//! The guest's memory decides these until the guest changes them, or boots:
//!
//! * the UUID that the guest sees (SMBIOS is in its memory);
//! * the MAC addresses: those of the stream win over those of the command;
//! * host name, machine ID, keys, leases: whatever the guest has set up itself.

mod command;
mod start;

use std::path::PathBuf;

use uuid::Uuid;

pub use command::command;
pub(crate) use command::own_files;
pub(crate) use start::start_as;
pub use start::{Clone, Source, start};

/// The identity of a clone.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Identity {
    /// Its name (`-name`).
    pub name: String,
    /// Its UUID (`-uuid`).
    pub uuid: Uuid,
    /// Its files and sockets: the path in the command of the first machine, and the path in its own. Both are
    /// absolute.
    pub paths: Vec<(PathBuf, PathBuf)>,
    /// The MAC addresses of its network devices from its next boot on: the old and the new ones.
    pub macs: Vec<(String, String)>,
}

impl Identity {
    /// Makes an identity without paths and MAC addresses.
    pub fn new(name: impl Into<String>, uuid: Uuid) -> Self {
        Self { name: name.into(), uuid, paths: Vec::new(), macs: Vec::new() }
    }

    /// Replaces a file or a socket.
    #[must_use]
    pub fn path(mut self, from: impl Into<PathBuf>, to: impl Into<PathBuf>) -> Self {
        self.paths.push((from.into(), to.into()));
        self
    }

    /// Replaces a MAC address.
    #[must_use]
    pub fn mac(mut self, from: impl Into<String>, to: impl Into<String>) -> Self {
        self.macs.push((from.into(), to.into()));
        self
    }
}
