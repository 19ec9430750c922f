//! The core of domsnap: snapshots of whole virtual machines, planned, journalled and recovered.
//!
//! This crate knows no disk format, no store and no hypervisor. Its modules are the parts of its interface:
//!
//! | module | for | has |
//! |---|---|---|
//! | [`backend`] | authors of storage backends | the contract ([`backend::DiskSnapshotter`]) and its data |
//! | [`manifest`] | authors of backends whose disks are no files | the records beside the data ([`manifest::ManifestStore`]) |
//! | [`hypervisor`] | authors of hypervisors | the contracts ([`hypervisor::VmStateSaver`], [`hypervisor::LiveDomain`], [`hypervisor::AttachedDisk`]) and their data |
//! | [`catalogue`] | authors of catalogues | the contract of the store ([`catalogue::Catalogue`]), and the journal |
//! | [`policy`] | programs that schedule | the rules of which snapshots are taken and kept, as pure functions |
//! | [`service`] | programs that embed domsnap | the service ([`service::Domsnap`]), requests, outcomes, events |
//!
//! What all of them speak of is here at the root: domains, disks, snapshots, plans, errors. The planner and
//! the engine, which carries a plan out so that the domain recovers from a crash at any time, are private.
//!
//! # Embedding
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use snapcore::backend::DiskSnapshotter;
//! use snapcore::catalogue::Catalogue;
//! use snapcore::service::{CreateRequest, DomainRef, Domsnap, Event, RevertRequest};
//! use snapcore::{Registry, SnapshotName};
//! use tokio_util::sync::CancellationToken;
//!
//! /// Takes a snapshot, tries something, and returns to the snapshot where that failed.
//! async fn protected(
//!     catalogue: Arc<dyn Catalogue>,
//!     backend: Arc<impl DiskSnapshotter + 'static>,
//!     attempt: impl AsyncFnOnce() -> bool,
//! ) -> snapcore::Result<()> {
//!     let mut registry = Registry::new();
//!     registry.register(backend)?;
//!     let domsnap = Domsnap::new(catalogue, registry);
//!
//!     let mut events = domsnap.events();
//!     tokio::spawn(async move {
//!         while let Some(event) = events.next().await {
//!             if let Event::Progress { done, total, .. } = event {
//!                 println!("{done} of {total} bytes");
//!             }
//!         }
//!     });
//!
//!     let domain = DomainRef::parse("/vm/web/root.img,/vm/web/data.img")?;
//!     let before = SnapshotName::new("before-update")?;
//!     let cancel = CancellationToken::new();
//!     domsnap.create(&domain, CreateRequest::new(before.clone()), cancel.clone()).await?;
//!     if !attempt().await {
//!         domsnap.revert(&domain, RevertRequest::new(before), cancel).await?;
//!     }
//!     Ok(())
//! }
//! ```

#![forbid(unsafe_code)]

// Before the modules that use its macro.
#[macro_use]
mod setters;

mod address;
pub mod backend;
pub mod catalogue;
mod confine;
mod disk_plan;
mod domain;
mod engine;
mod erased;
mod error;
mod event;
mod group;
mod hold;
mod host;
pub mod hypervisor;
pub mod manifest;
mod name;
mod operation;
mod plan;
pub mod policy;
mod reading;
mod registry;
mod request;
pub mod service;
mod shape;
mod shell;
mod size;
mod snapshot;
mod state;
mod step;
mod zone;

// Tests of what is not public use the backend and the catalogue of the tests in `tests/`, which know this
// crate by its name.
#[cfg(test)]
extern crate self as snapcore;
#[cfg(test)]
#[path = "../tests/fake/mod.rs"]
mod fake;

pub use address::{DiskAddress, DiskIdentity, FileIdentity, file_identity};
pub use domain::{ActivePath, Disk, DiskRecord, Domain, Hypervisor, Machine};
pub use error::{Error, ErrorKind, Result};
pub use group::{GroupId, GroupMember, OperationGroup, SnapshotGroup};
pub use hold::{Hold, Holder, HoldingProcess};
pub use host::Host;
pub use name::{DomainName, LayerName, SnapshotName, Target};
pub use registry::Registry;
pub use shape::{
    CutUnit, FinishStep, FinishUnit, HypervisorStep, NestedStep, PlacedStep, Plan, PlanStep, StepRef,
};
pub use shell::shell_command;
pub use size::{free_bytes, shown_size};
pub use snapshot::{
    Consistency, DiskPoint, MemoryPoint, Point, PointKind, SkippedDisk, Snapshot, SnapshotId, SnapshotRole,
    SnapshotTree,
};
pub use state::TagIdentity;
pub use step::{Edit, Group, Step};
pub use zone::local_zone;
