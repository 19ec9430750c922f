//! Third-party backends, in processes of their own.
//!
//! A plug-in is a program called `domsnap-backend-NAME` in a configured directory. It serves disks of the
//! format `NAME`. It speaks JSON-RPC 2.0 on its standard input and output, one JSON document a line
//! ([`protocol`]). [`found`] lists the plug-ins of a directory. A [`Plugin`] is one of them as a
//! [`snapcore::backend::DiskSnapshotter`]. The program is started when it is first needed, and killed when
//! the [`Plugin`] is dropped.
//!
//! **No answer of a plug-in is used unchecked** (`checks`): shapes, names, paths, and that its plans only
//! change the records of their own disk. A plug-in that hangs, floods or sends garbage is killed, and the
//! call fails. The engine then undoes the operation, or leaves the journal to a recovery, which starts the
//! plug-in again. If a plug-in dies while it has a disk locked, nothing more is done to that disk in this
//! process.
//!
//! **The plug-in's author is responsible** for what every backend must guarantee. A step is durable when it
//! is reported as done. `lock` takes a lock that ends with the process, and nothing is written without it.
//! When domsnap ends, the plug-in reads the end of its standard input and must end. Until it does, its lock
//! keeps the next domsnap away.

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
