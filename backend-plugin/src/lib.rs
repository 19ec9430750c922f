//! Backends by other people, in processes of their own.
//!
//! A plug-in is a program called `domsnap-backend-NAME` in a configured directory. It serves disks of the format `NAME` and speaks
//! JSON-RPC 2.0 on its standard input and output, one JSON document a line ([`protocol`]). [`found`] lists the plug-ins of a
//! directory; a [`Plugin`] is one of them as a [`snapcore::DiskSnapshotter`]. The program is started when it is first needed, and
//! killed when the [`Plugin`] is dropped.
//!
//! **Nothing that a plug-in says is believed unseen.** What it answers is checked before anybody uses it (`checks`): shapes,
//! names, paths, and that its plans change the records of their own disk alone. One that hangs, floods or speaks garbage is
//! killed, and the call fails; the engine undoes, or leaves the journal to a recovery, which starts the plug-in anew. While
//! a plug-in that died held a disk, nothing more is done to that disk in this process.
//!
//! **What stays with the plug-in's author** is what stays with every backend's: that a step is durable when it is said to be
//! done, and that `hold` is a lock which ends with the process and without which nothing is written. A plug-in reads the end of
//! its standard input when domsnap is gone, and must end; while it does not, its lock keeps the next domsnap away.

#![forbid(unsafe_code)]

mod checks;
mod connection;
mod directory;
mod plugin;
pub mod protocol;
mod stderr;

pub use connection::Limits;
pub use directory::{Found, PREFIX, found};
pub use plugin::Plugin;
