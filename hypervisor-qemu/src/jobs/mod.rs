//! Merges of layers while the guest runs: commit and stream, and what a crash left of them.
//!
//! QEMU sends no progress events, so jobs are polled. Jobs never dismiss themselves: their result is read
//! first. Nodes that a job made superfluous stay in the graph until they are deleted, top first. Until then
//! later operations fail, so each function here deletes them.

mod merge;
mod reconcile;
mod run;

pub use merge::{ActiveCommit, LayerCommit, Stream, commit_active, commit_layers, drive_active, stream};
pub(crate) use merge::{fold, fold_job};
pub use reconcile::{OurNode, Ours, Outgoing, reconcile, sweep};
pub use run::{JobProgress, cancel, set_speed, status};
pub(crate) use run::{concluded, dismiss_ended, dismiss_streams, finish};
