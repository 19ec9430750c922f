//! A catalogue in memory, with faults at its commits.

use std::collections::{BTreeMap, HashMap};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use async_trait::async_trait;
use futures_core::Stream;
use snapcore::catalogue::{
    Catalogue, CatalogueId, Change, Entry, EntrySummary, Lease, Operation, OperationId, OperationState,
    Revision, Revisions,
};
use snapcore::{DiskAddress, DomainName, Error, ErrorKind, Result, SnapshotTree};
use tokio::sync::watch;
use tokio_util::sync::{CancellationToken, ReusableBoxFuture};

use super::{Faults, When};

/// The records of one domain.
#[derive(Debug, Clone)]
struct Records {
    entry: Entry,
    bases: Option<Vec<DiskAddress>>,
    operations: Vec<Operation>,
}

/// The contents: all that another process finds.
#[derive(Debug)]
struct Store {
    identity: Option<CatalogueId>,
    last: Revision,
    domains: BTreeMap<DomainName, Records>,
    watched: HashMap<DomainName, watch::Sender<Revision>>,
}

impl Default for Store {
    fn default() -> Self {
        let last = Revision::ABSENT;
        Self { identity: None, last, domains: BTreeMap::new(), watched: HashMap::new() }
    }
}

impl Store {
    fn revision(&self, name: &DomainName) -> Revision {
        self.domains.get(name).map_or(Revision::ABSENT, |records| records.entry.revision)
    }

    fn commit(&mut self, name: &DomainName, expected: Revision, changes: Vec<Change>) -> Result<Revision> {
        if self.revision(name) != expected {
            let why = format!("the records of domain {name} were changed by another process");
            return Err(Error::new(ErrorKind::Busy, why));
        }
        let followed = changes.iter().map(|change| match change {
            Change::Follow(stamp) => stamp.revision,
            _ => Revision::ABSENT,
        });
        let last = followed.fold(self.last, Revision::max);
        let next = Revision(last.0 + 1);
        // All or nothing: the changes are made to a copy.
        let mut records = self.domains.get(name).cloned();
        for change in changes {
            apply(name, &mut records, change)?;
        }
        self.require_own_disks(name, records.as_ref())?;
        self.identity.get_or_insert_with(CatalogueId::fresh);
        self.last = next;
        match records {
            Some(mut records) => {
                records.entry.revision = next;
                self.domains.insert(name.clone(), records);
            }
            None => {
                self.domains.remove(name);
            }
        }
        let revision = self.revision(name);
        if let Some(watched) = self.watched.get(name) {
            watched.send_replace(revision);
        }
        Ok(revision)
    }

    fn require_own_disks(&self, name: &DomainName, records: Option<&Records>) -> Result<()> {
        for record in records.iter().flat_map(|records| &records.entry.domain.disks) {
            let address = &record.disk.address;
            if self.owner(address).is_some_and(|owner| owner != name) {
                return Err(Error::new(ErrorKind::Exists, format!("{address} belongs to another domain")));
            }
        }
        Ok(())
    }

    fn owner(&self, address: &DiskAddress) -> Option<&DomainName> {
        let has = |records: &Records| records.entry.domain.disks.iter().any(|d| d.disk.address == *address);
        self.domains.iter().find(|(_, records)| has(records)).map(|(name, _)| name)
    }
}

fn apply(name: &DomainName, records: &mut Option<Records>, change: Change) -> Result<()> {
    if let Change::PutDomain(domain, snapshots) = change {
        let tree = SnapshotTree::new(snapshots);
        match records {
            Some(Records { entry, .. }) => (entry.domain, entry.tree) = (*domain, tree),
            None => {
                let entry = Entry::new(*domain, tree, Revision::ABSENT);
                *records = Some(Records { entry, bases: None, operations: Vec::new() });
            }
        }
        return Ok(());
    }
    let Some(Records { entry, bases, operations }) = records else {
        return Err(Error::new(ErrorKind::NotFound, format!("there is no domain {name}")));
    };
    match change {
        Change::PutDomain(..) => {}
        Change::Follow(stamp) => entry.follows = Some(stamp),
        Change::Bases(files) => *bases = Some(files),
        Change::RemoveDomain => *records = None,
        Change::Edit(edit) => edit.apply(&mut entry.domain, &mut entry.tree)?,
        Change::Begin(operation) => operations.push(*operation),
        Change::Operation(id, state, error) => {
            if let Some(operation) = find(operations, id) {
                operation.state = state;
                operation.errors.extend(error);
            }
        }
        Change::Ready(id, edits) => {
            if let Some(operation) = find(operations, id) {
                (operation.state, operation.plan.commit) = (OperationState::Ready, edits);
            }
        }
        Change::Step(id, index, state) => {
            match find(operations, id).and_then(|found| found.steps.get_mut(index)) {
                Some(step) => *step = state,
                None => return Err(Error::new(ErrorKind::Internal, format!("{id} has no step {index}"))),
            }
        }
    }
    Ok(())
}

fn find(operations: &mut [Operation], id: OperationId) -> Option<&mut Operation> {
    operations.iter_mut().find(|operation| operation.id == id)
}

/// The catalogue of one process. Those of other processes share its contents.
#[derive(Default)]
pub struct FakeCatalogue {
    store: Arc<Mutex<Store>>,
    leases: Arc<Mutex<HashMap<String, String>>>,
    pub commits: Faults,
}

impl FakeCatalogue {
    /// The catalogue as another process opens it, without faults.
    pub fn again(&self) -> Self {
        Self { store: self.store.clone(), leases: self.leases.clone(), commits: Faults::default() }
    }

    fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap()
    }
}

#[async_trait]
impl Catalogue for FakeCatalogue {
    async fn identity(&self) -> Result<Option<CatalogueId>> {
        Ok(self.store().identity)
    }

    async fn domains(&self) -> Result<Vec<EntrySummary>> {
        let store = self.store();
        let summary = |records: &Records| {
            EntrySummary::new(records.entry.domain.clone(), records.entry.tree.taken().count() as u64)
                .unfinished(records.operations.iter().any(|operation| !operation.state.is_final()))
                .bases(records.bases.clone())
        };
        Ok(store.domains.values().map(summary).collect())
    }

    async fn load(&self, name: &DomainName) -> Result<Option<Entry>> {
        Ok(self.store().domains.get(name).map(|records| records.entry.clone()))
    }

    async fn owners(&self, disks: &[DiskAddress]) -> Result<Vec<(DiskAddress, DomainName)>> {
        let store = self.store();
        let owned = disks.iter().filter_map(|disk| Some((disk.clone(), store.owner(disk)?.clone())));
        Ok(owned.collect())
    }

    async fn unfinished(&self, name: &DomainName) -> Result<Vec<Operation>> {
        let store = self.store();
        let all = store.domains.get(name).into_iter().flat_map(|records| &records.operations);
        Ok(all.filter(|operation| !operation.state.is_final()).cloned().collect())
    }

    async fn operations(&self, name: &DomainName) -> Result<Vec<Operation>> {
        let store = self.store();
        let all = store.domains.get(name).into_iter().flat_map(|records| &records.operations);
        Ok(all.cloned().collect())
    }

    async fn operation(&self, name: &DomainName, id: OperationId) -> Result<Option<Operation>> {
        let store = self.store();
        let mut all = store.domains.get(name).into_iter().flat_map(|records| &records.operations);
        Ok(all.find(|operation| operation.id == id).cloned())
    }

    async fn commit(&self, name: &DomainName, expected: Revision, changes: Vec<Change>) -> Result<Revision> {
        let number = self.commits.next();
        self.commits.inject(number, When::Before).await?;
        let revision = self.store().commit(name, expected, changes)?;
        self.commits.inject(number, When::After).await?;
        Ok(revision)
    }

    async fn watch(&self, name: &DomainName) -> Result<Revisions> {
        let mut store = self.store();
        let present = store.revision(name);
        let sender = store.watched.entry(name.clone()).or_insert_with(|| watch::Sender::new(present));
        let mut receiver = sender.subscribe();
        receiver.mark_changed();
        Ok(Box::pin(Watched(ReusableBoxFuture::new(next(receiver)))))
    }

    async fn lease(&self, name: &str, holder: &str, _: Duration) -> Result<Lease> {
        let mut leases = self.leases.lock().unwrap();
        if let Some(other) = leases.get(name) {
            return Err(Error::new(ErrorKind::Busy, format!("{name} is in use by {other}")));
        }
        leases.insert(name.to_owned(), holder.to_owned());
        let guard = LeaseGuard { leases: self.leases.clone(), name: name.to_owned() };
        Ok(Lease::new(guard, CancellationToken::new()))
    }
}

/// A lease in force. It ends with its holder.
struct LeaseGuard {
    leases: Arc<Mutex<HashMap<String, String>>>,
    name: String,
}

impl Drop for LeaseGuard {
    fn drop(&mut self) {
        self.leases.lock().unwrap().remove(&self.name);
    }
}

type Next = (Option<Revision>, watch::Receiver<Revision>);

/// The revisions of a watched domain.
struct Watched(ReusableBoxFuture<'static, Next>);

async fn next(mut receiver: watch::Receiver<Revision>) -> Next {
    let changed = receiver.changed().await.is_ok();
    let revision = changed.then(|| *receiver.borrow_and_update());
    (revision, receiver)
}

impl Stream for Watched {
    type Item = Revision;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Revision>> {
        let (revision, receiver) = ready!(self.0.poll(context));
        self.0.set(next(receiver));
        Poll::Ready(revision)
    }
}
