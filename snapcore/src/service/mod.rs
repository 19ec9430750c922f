//! The service: the interface for programs that embed domsnap, and for the command line.
//!
//! [`Domsnap`] only hands requests to *rooms*. A room is a type in a directory of its own. Its constructor
//! gives it exactly what it may touch:
//!
//! | room | does | knows |
//! |---|---|---|
//! | `authority` | reads and writes manifests; decides between them and the catalogue | records, backends |
//! | `importer` | makes a domain of disks that the catalogue does not have | records, backends, authority |
//! | `locator` | finds a named domain; connects to it | records, backends and hypervisors, importer |
//! | `planning` | plans, runs tests, finds users of files | records, backends and hypervisors, authority |
//! | `operator` | locks, recovers, runs plans | locator, planning, authority, and the ledger |
//! | `registrar` | registers, imports, removes domains | locator, importer, authority, locks, the ledger |
//! | `viewer` | lists, shows, measures and checks | records, backends, locator, authority, planning |
//!
//! A room knows those above it in this table and none below. `records` is the catalogue for reading. `ledger`
//! is the catalogue for leases and commits, and only the operator and the registrar have it. So no other room
//! can change what is recorded, and only the operator runs steps.

mod authority;
mod domsnap;
mod images;
mod importer;
mod ledger;
mod locator;
mod neighbours;
mod operator;
mod planning;
mod recorded;
mod records;
mod reference;
mod registrar;
mod report;
mod rooms;
mod viewer;

use std::pin::Pin;

pub use crate::event::{Event, EventStream};
pub use crate::request::{
    AmendRequest, CloneRequest, CreateDisk, CreateRequest, DeleteRequest, DeleteScope, HoldRequest,
    KeepPrevious, ReleaseRequest, Request, RevertRequest, UndoRequest,
};
pub use domsnap::Domsnap;
pub(crate) use images::file_id;
pub use locator::Scanned;
pub use recorded::RecordedSnapshot;
pub use reference::{DomainRef, DomainSpec, GivenImage};
pub use report::{
    Details, DiskReport, DomainSummary, GroupOutcome, ImportOptions, ImportReport, Listing, Member, Outcome,
    PastOperation, PolicyChange, Postponed, PreviousState, RecoveryEnd, RecoveryReport, Removal,
    StartedClone, Unfinished,
};
pub use viewer::{
    Belonging, ComparedDisk, DiffExtent, DiffReport, DiffRequest, DiskDiff, DiskSize, OpenDisk, OpenSnapshot,
    OpenState, SetSize, SizeReport, SnapshotSize,
};

/// The future of a room's main entrance, compiled here. The body of a plain `async fn` is compiled in each
/// crate that awaits it, and with it all that it calls: the engine and the importer in every program and kit.
type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;
