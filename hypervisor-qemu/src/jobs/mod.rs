//! Merging layers while the guest runs: commit and stream, and what a crash left of them.
//!
//! QEMU tells no progress by itself, so jobs are polled. They never dismiss themselves: how one ended is read before it goes.
//! Nodes that a job has made superfluous stay in the graph until they are deleted, top first; until then later operations
//! fail, so each function here deletes them.

mod merge;
mod reconcile;
mod run;

pub use merge::{ActiveCommit, LayerCommit, Stream, commit_active, commit_layers, drive_active, stream};
pub(crate) use merge::{fold, fold_job};
pub use reconcile::{OurNode, Ours, Outgoing, reconcile, sweep};
pub use run::{Progress, cancel, set_speed, status};
pub(crate) use run::{concluded, dismiss_ended, dismiss_streams, finish};
