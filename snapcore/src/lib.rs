//! The core of domsnap: snapshots of whole virtual machines, planned, journalled and recovered.
//!
//! This crate knows no disk format and no hypervisor. Its parts are:
//!
//! - the terms of the field as types, and the trait that a storage backend fulfils ([`DiskSnapshotter`]);
//! - the pure planner ([`plan`]);
//! - the engine that carries a plan out so that the domain recovers from a crash at any time ([`engine`]);
//! - the contract of the catalogue that remembers the snapshots ([`catalogue`]; `catalogue-sqlite` implements
//!   it for one machine);
//! - the service that combines them ([`Domsnap`]).
//!
//! # Embedding
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use snapcore::{
//!     CreateRequest, DiskSnapshotter, DomainRef, Domsnap, Event, Registry, RevertRequest, SnapshotName,
//!     catalogue::Catalogue,
//! };
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

mod address;
mod backend;
pub mod catalogue;
mod confine;
mod disk_plan;
mod domain;
mod engine;
mod erased;
mod error;
mod event;
mod host;
mod hypervisor;
pub mod manifest;
mod name;
mod operation;
mod plan;
mod registry;
mod request;
mod secrets;
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

pub use address::{DiskAddress, DiskIdentity};
pub use backend::{
    Base, Capabilities, DeleteCost, DiskSnapshotter, FileUses, Finding, Guard, InspectDepth, Leftover,
    Progress, Salvage, Severity, StepContext, StepNeed,
};
pub use disk_plan::{DiskPlan, DiskRequest, InstantPlan};
pub use domain::{ActivePath, Disk, DiskRecord, Domain, Hypervisor, Machine};
pub use erased::AnyDiskSnapshotter;
pub use error::{Error, ErrorKind, Result};
pub(crate) use event::Events;
pub use event::{Event, EventStream};
pub use host::Host;
pub use hypervisor::{
    AttachedDisk, AttachedMerge, Control, DiskInstant, DomainContext, DomainInfo, DomainStep, FileIdentity,
    GuestChange, HypervisorProfile, Inside, LiveDomain, Medium, MemoryPlan, Obstacle, OpenChain, OpenLayer,
    PowerAfter, Quiesce, Restart, RestartSource, SeenDisk, StartFromMemory, StartedDomain, StepOutcome,
    Taken, VmStateSaver, file_identity,
};
pub use name::{DomainName, LayerName, SnapshotName, Target};
pub use operation::{Operation, OperationId, OperationState, StepState};
pub use registry::Registry;
pub use request::{CreateDisk, CreateRequest, DeleteRequest, DeleteScope, Request, RevertRequest};
pub use service::{DomainRef, DomainSpec, Domsnap};
pub use shape::{
    CutUnit, FinishStep, FinishUnit, HypervisorStep, NestedStep, PlacedStep, Plan, PlanStep, StepRef,
};
pub use shell::shell_command;
pub(crate) use shell::shell_word;
pub use size::shown_size;
pub use snapshot::{
    Consistency, DiskPoint, Found, FreeNames, MemoryPoint, Point, PointKind, SkippedDisk, Snapshot,
    SnapshotId, SnapshotTree,
};
pub use state::{DiskState, InternalPoint, Layer, TagIdentity, Undetermined};
pub use step::{Edit, Group, Step, StepStatus};
pub use zone::local_zone;
