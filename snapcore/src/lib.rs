//! The core of domsnap: snapshots of whole virtual machines, planned, journalled and recovered.
//!
//! This crate knows no disk format and no hypervisor. It has the words of the field as types, the trait that a
//! storage backend fulfils ([`DiskSnapshotter`]), the pure planner ([`plan`]), the engine that carries a plan out
//! so that a crash at any instant heals ([`engine`]), and the catalogue that remembers what was taken.

#![forbid(unsafe_code)]

mod backend;
pub mod catalogue;
pub mod chain;
mod domain;
pub mod engine;
mod error;
mod event;
pub mod manifest;
mod name;
mod operation;
pub mod plan;
mod registry;
mod request;
pub mod service;
mod snapshot;
mod state;
mod step;

pub use backend::{
    Capabilities, DeleteCost, DiskSnapshotter, Finding, Guard, InspectDepth, Progress, Salvage, Severity,
    StepContext,
};
pub use domain::{ActivePath, Disk, DiskRecord, Domain, Hypervisor};
pub use error::{Error, ErrorKind, Result};
pub use event::{Event, EventStream, Events};
pub use name::{DomainName, LayerName, MAX_NAME_BYTES, SnapshotName, Target};
pub use operation::{Operation, OperationId, OperationState, StepState, Transition};
pub use registry::Registry;
pub use request::{CreateDisk, CreateRequest, DeleteRequest, DeleteScope, Request, RevertRequest};
pub use service::{DomainRef, DomainSpec, Domsnap, StateDir};
pub use snapshot::{Consistency, DiskPoint, Point, PointKind, Snapshot, SnapshotId, SnapshotTree};
pub use state::{DiskState, InternalPoint, Layer};
pub use step::{DiskPlan, DiskRequest, Edit, Group, Plan, PlannedStep, Step, StepStatus};
