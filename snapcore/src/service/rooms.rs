//! Assembles the rooms: each gets only what it may touch.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use super::authority::Authority;
use super::importer::Importer;
use super::ledger::Ledger;
use super::locator::Locator;
use super::neighbours::Neighbours;
use super::operator::{Locks, Operator};
use super::planning::{Planning, Watcher};
use super::records::Records;
use super::registrar::Registrar;
use super::viewer::Viewer;
use crate::catalogue::Catalogue;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Events;
use crate::host::Host;
use crate::registry::Registry;

/// The rooms of one service.
pub(super) struct Rooms {
    pub(super) registry: Arc<Registry>,
    pub(super) records: Records,
    pub(super) events: Events,
    pub(super) authority: Authority,
    pub(super) locator: Locator,
    pub(super) planning: Planning,
    pub(super) watcher: Watcher,
    pub(super) neighbours: Neighbours,
    pub(super) operator: Operator,
    pub(super) registrar: Registrar,
    pub(super) viewer: Viewer,
}

impl Rooms {
    pub(super) fn new(catalogue: Arc<dyn Catalogue>, registry: Registry, host: Option<Host>) -> Self {
        let (registry, events) = (Arc::new(registry), Events::default());
        let records = Records::new(catalogue.clone(), registry.clone());
        let authority = Authority::new(records.clone(), registry.clone());
        let importer = Importer::new(records.clone(), registry.clone(), authority.clone(), host.clone());
        let locator = Locator::new(records.clone(), registry.clone(), importer.clone(), host.clone());
        let neighbours = Neighbours::new(records.clone(), registry.clone());
        let planning = Planning::new(registry.clone(), authority.clone(), neighbours.clone());
        let watcher = Watcher::new(registry.clone());
        let ledger = Ledger::new(catalogue, neighbours.clone());
        let locks = Locks::new(records.clone(), ledger.clone(), locator.clone(), authority.clone());
        let viewer = Viewer {
            records: records.clone(),
            registry: registry.clone(),
            locator: locator.clone(),
            authority: authority.clone(),
            planning: planning.clone(),
        };
        let operator = Operator {
            records: records.clone(),
            ledger: ledger.clone(),
            registry: registry.clone(),
            events: events.clone(),
            locks: locks.clone(),
            locator: locator.clone(),
            authority: authority.clone(),
            planning: planning.clone(),
            watcher: watcher.clone(),
            neighbours: neighbours.clone(),
        };
        let registrar = Registrar {
            records: records.clone(),
            ledger,
            registry: registry.clone(),
            events: events.clone(),
            locks,
            locator: locator.clone(),
            importer,
            authority: authority.clone(),
            host,
        };
        Self {
            registry,
            records,
            events,
            authority,
            locator,
            planning,
            watcher,
            neighbours,
            operator,
            registrar,
            viewer,
        }
    }
}

/// Runs `work` to its end even when the caller goes away. Then the work is cancelled, so that it undoes and
/// releases its locks, instead of stopping between two steps.
pub(super) async fn to_the_end<T: Send + 'static, F>(
    cancel: &CancellationToken,
    work: impl FnOnce(CancellationToken) -> F,
) -> Result<T>
where
    F: Future<Output = Result<T>> + Send + 'static,
{
    let cancel = cancel.child_token();
    let _cancelled_when_dropped = cancel.clone().drop_guard();
    tokio::spawn(work(cancel)).await.map_err(|cause| {
        Error::new(ErrorKind::Internal, "the operation ended before its end")
            .because(cause)
            .state("the journal knows how far it got")
            .advise("run `domsnap recover`, and please report it")
    })?
}
