//! The block graph: its nodes and edges, and changes of it under a device.
//!
//! `nodes` reads it, `layer` adds and deletes, `swap` replaces the chain below a device. `detach` closes a
//! disk's files under a paused guest, `names` proves that every node still has the file that it names.

mod detach;
mod layer;
mod names;
mod nodes;
mod swap;

pub use detach::{Detached, attach, detach};
pub(crate) use detach::{close_detached_chains, detach_as, take_back};
pub(crate) use layer::reopen_backing;
pub use layer::{
    Layer, NodeOptions, Stack, add_layer, add_overlay, delete_internal, remove_layers, reopen_by_name,
};
pub use names::{NodeFile, verify_names};
pub(crate) use names::{is_of_xen, is_open_unlocked, open_images};
pub(crate) use nodes::{
    COPY_BEFORE_WRITE, all, device_id, device_names, is_filter, is_job_filter, passes_through,
};
pub use nodes::{Cache, Edge, Graph, InternalSnapshot, Node};
pub use swap::{Swap, fold, swap};
