//! Operations on a live QEMU: primitives and, built on them, the hypervisor driver that [`snapcore`] asks for
//! ([`Qemu`]).
//!
//! | module | subject |
//! |---|---|
//! | [`discover`] | the machine: disks and chains, processors, memory, process; what breaks a restore |
//! | [`instant`] | the cut: all disks and the memory at one instant, with the guest running or paused |
//! | [`memory`] | the memory image: one file, loaded in three ways, checked before use |
//! | [`stream`] | a memory image taken apart, for many QEMUs that start from it |
//! | [`clone`] | a further machine from one memory image: its command, and its start |
//! | [`graph`] | the block graph: overlays, images reopened by name, chains swapped, disks detached |
//! | [`jobs`] | commit and stream, with the pivot under the caller's control; what a crash left |
//! | [`quiesce`] | the guest's file systems flushed and frozen, for a bounded time |
//!
//! All of them work on a [`Machine`]. [`Qemu`] combines them for the engine: it finds the device of each disk
//! and the part of a step that is still to be done after a crash. Nothing here reads the content of an image,
//! keeps a catalogue, or decides what is done. One exception: this crate writes the wrapper around a memory
//! image itself.
//!
//! # Names
//!
//! Every node, job and descriptor set that this crate creates has a name that begins with `domsnap-`. After a
//! crash, [`jobs::reconcile`] lists those that are in QEMU, and their states.
//!
//! # After an error
//!
//! Each function documents the state after an error. If the connection is lost ([`ErrorKind::Lost`]) or a
//! command is not answered ([`ErrorKind::Timeout`]), the state is undetermined: read it from the images and,
//! if it lives, from QEMU.
#![forbid(unsafe_code)]

pub mod clone;
pub mod discover;
mod drain;
mod error;
mod fdset;
mod gdb;
mod generation_id;
pub mod graph;
mod guest_clock;
mod guest_exec;
pub mod instant;
pub mod jobs;
mod machine;
pub mod memory;
mod migration;
mod name;
mod qcow2;
pub mod quiesce;
mod run_state;
mod saver;
mod server;
pub mod stream;

pub use error::{BoxError, Error, ErrorKind, Result};
pub use guest_clock::set_guest_clock;
pub use machine::{Machine, Paused};
pub use name::{Name, PREFIX, is_ours};
pub use run_state::RunState;
pub use saver::{NAME, Qemu, register};
