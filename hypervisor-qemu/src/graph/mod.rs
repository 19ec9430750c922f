//! The block graph: its nodes and edges, and changes of it under a device.
//!
//! `nodes` reads it, `layer` adds and deletes, `swap` replaces the chain below a device. `detach` closes a
//! disk's files under a paused guest, `truth` proves that every node still has the file that it names.

mod detach;
mod layer;
mod nodes;
mod swap;
mod truth;

pub use detach::{Detached, attach, detach};
pub(crate) use detach::{close_taken_off, detach_as, take_back};
pub(crate) use layer::reopen_backing;
pub use layer::{Layer, NodeOptions, Stack, add_layer, add_overlay, delete_internal, rehome, remove_layers};
pub(crate) use nodes::{
    COPY_BEFORE_WRITE, all, device_id, device_names, is_filter, is_job_filter, passes_through,
};
pub use nodes::{Cache, Edge, Graph, InternalSnapshot, Node};
pub use swap::{Swap, fold, swap};
pub use truth::{NodeFile, names_true};
pub(crate) use truth::{is_of_xen, is_open_unlocked, open_images};
