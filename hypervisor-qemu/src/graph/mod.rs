//! The block graph: which nodes there are, what stands on what, and how it is changed under a device.
//!
//! `nodes` reads it, `layer` adds and deletes, `swap` replaces what is below a device, `detach` frees a disk's files under a
//! paused guest, `truth` proves that every node still has the file that it names.

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
