//! What a live QEMU can be made to do: as primitives, and, over them, as the hypervisor that [`snapcore`] asks for ([`Qemu`]).
//!
//! | module | subject |
//! |---|---|
//! | [`discover`] | what machine this is: disks and chains, processors, memory, process; and what would not fit a memory image |
//! | [`instant`] | the cut: all disks and the memory at one instant, live or not |
//! | [`memory`] | the memory image: one file with three ways in, checked before it is used |
//! | [`graph`] | the block graph: overlays, re-homed images, chains swapped under a device, disks detached and attached |
//! | [`jobs`] | commit and stream, with the pivot in the caller's hands; what a crash left |
//! | [`quiesce`] | the guest's file systems flushed and frozen, for a bounded time |
//!
//! All speak to a [`Machine`]. [`Qemu`] puts them together for an engine: which disk is which device, and what there is still
//! to do of a step after a crash. Nothing here knows what an image has inside (the one exception is the wrapper around a memory
//! image, which this crate writes itself), keeps a catalogue, or decides what is to be done.
//!
//! # Names
//!
//! Every node, job and descriptor set that this crate makes begins with `domsnap-`: after a crash, [`jobs::reconcile`] says
//! what of ours there is in QEMU and in what state.
//!
//! # After an error
//!
//! Each function says what holds then. Where the connection is lost ([`ErrorKind::Lost`]), or a command was not answered
//! ([`ErrorKind::Timeout`]), nothing holds but what the images and, if it lives, QEMU itself say: ask them.
#![forbid(unsafe_code)]

pub mod discover;
mod error;
mod fdset;
pub mod graph;
mod guest_clock;
mod hold;
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

pub use error::{BoxError, Error, ErrorKind, Result};
pub use guest_clock::set_guest_clock;
pub use machine::{Machine, Paused};
pub use name::{Name, PREFIX, is_ours};
pub use run_state::RunState;
pub use saver::{NAME, Qemu, register};
