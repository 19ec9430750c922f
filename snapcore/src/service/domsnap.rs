//! The service's interface: hands each request to its room.

use std::sync::Arc;

use camino::Utf8Path;
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::rooms::{Rooms, to_the_end};
use super::{
    Belonging, ComparedDisk, Details, DiffReport, DiffRequest, DiskReport, DomainRef, DomainSpec,
    DomainSummary, GroupOutcome, ImportOptions, ImportReport, Listing, OpenSnapshot, Outcome, PastOperation,
    PolicyChange, RecoveryReport, Removal, Scanned, SizeReport, images, importer,
};
use crate::address::DiskAddress;
use crate::backend::Finding;
use crate::catalogue::{Catalogue, Lease};
use crate::domain::{Domain, Hypervisor};
use crate::error::{Error, ErrorKind, Result};
use crate::event::EventStream;
use crate::host::Host;
use crate::hypervisor::{Control, DomainInfo};
use crate::name::{DomainName, SnapshotName};
use crate::policy::{PolicyReview, PolicySpec};
use crate::registry::Registry;
use crate::request::{
    AmendRequest, CloneRequest, CreateRequest, DeleteRequest, HoldRequest, ReleaseRequest, Request,
    RevertRequest, UndoRequest,
};
use crate::shape::Plan;

/// Snapshots of domains. Cheap to clone; may be used from many tasks at once.
#[derive(Clone)]
pub struct Domsnap {
    rooms: Arc<Rooms>,
}

impl Domsnap {
    /// The service on a catalogue, on this machine ([`Host::local`]). Nothing is made yet.
    pub fn new(catalogue: Arc<dyn Catalogue>, registry: Registry) -> Self {
        Self::on_host(catalogue, registry, Host::local())
    }

    /// The service on a catalogue, for a program that knows its machine by another way: in a container, for
    /// example. Without a host, domains of all machines count as this machine's.
    pub fn on_host(catalogue: Arc<dyn Catalogue>, registry: Registry, host: Option<Host>) -> Self {
        Self { rooms: Arc::new(Rooms::new(catalogue, registry, host)) }
    }

    /// The backends that it was opened with.
    pub fn registry(&self) -> &Registry {
        &self.rooms.registry
    }

    /// A stream of all events from now on.
    pub fn events(&self) -> EventStream {
        self.rooms.events.subscribe()
    }

    /// A free name for a snapshot of `domain`, made from the time: [`SnapshotName::of_time`].
    pub async fn default_name(&self, domain: &DomainRef) -> Result<SnapshotName> {
        let listing = self.list(domain).await?;
        importer::free_name(&SnapshotName::of_time(Timestamp::now())?, &listing.snapshots)
    }

    /// Returns `wanted`, or with a number after it where a snapshot of `domain` has that name.
    pub async fn free_name(&self, domain: &DomainRef, wanted: &SnapshotName) -> Result<SnapshotName> {
        let listing = self.list(domain).await?;
        importer::free_name(wanted, &listing.snapshots)
    }

    /// Registers a domain: imports its disks, with the snapshots that manifests beside them describe and the
    /// internal ones of their active images. Images that were used by their paths before keep their
    /// snapshots.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] for a name or an image that another domain has; the error of an image that is
    /// not usable.
    pub async fn domain_add(&self, spec: &DomainSpec) -> Result<ImportReport> {
        let (room, spec) = (self.rooms.registrar.clone(), spec.clone());
        to_the_end(&CancellationToken::new(), |cancel| async move { room.add(spec, cancel).await }).await
    }

    /// Removes a domain from the catalogue. Its images, snapshots and manifests stay as they are, and an
    /// import brings it back.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where an operation was interrupted; [`ErrorKind::Io`] where its manifests are
    /// not whole and cannot be written.
    pub async fn domain_remove(&self, domain: &DomainRef) -> Result<Removal> {
        let (room, domain) = (self.rooms.registrar.clone(), domain.clone());
        to_the_end(&CancellationToken::new(), |cancel| async move { room.remove(domain, cancel).await }).await
    }

    /// Describes the domain that runs at an address. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where none does; [`ErrorKind::Unsupported`] where the hypervisor is not
    /// registered.
    pub async fn look(&self, hypervisor: &Hypervisor, control: &Control) -> Result<DomainInfo> {
        self.rooms.locator.look(hypervisor, control).await
    }

    /// The domains that run on this machine and could be registered, or are.
    pub async fn scan(&self) -> Result<Vec<Scanned>> {
        self.rooms.locator.scan().await
    }

    /// Describes the running side of a domain, as its hypervisor reports it; none where it does not run.
    ///
    /// # Errors
    /// The errors of [`Domsnap::resolve`]; an error where it cannot be found out if the domain runs.
    pub async fn running(&self, domain: &DomainRef) -> Result<Option<DomainInfo>> {
        let located = self.rooms.locator.locate(domain).await?;
        let live = self.rooms.locator.connect(&located.entry.domain).await?;
        Ok(live.map(|live| live.seen().clone()))
    }

    /// All domains that the catalogue has.
    pub async fn domains(&self) -> Result<Vec<DomainSummary>> {
        let found = self.rooms.records.domains().await?;
        Ok(found
            .into_iter()
            .map(|entry| DomainSummary {
                missing: images::missing(&entry.domain),
                domain: entry.domain,
                snapshots: entry.snapshots,
                unfinished: entry.unfinished,
            })
            .collect())
    }

    /// The domain that a reference names.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a name that is not registered. [`ErrorKind::Refused`] for images that are
    /// not exactly the disks of the domain they belong to, and for a symbolic link.
    pub async fn resolve(&self, domain: &DomainRef) -> Result<Domain> {
        Ok(self.rooms.locator.locate(domain).await?.entry.domain)
    }

    /// Plans `request` without carrying it out. Changes nothing and needs no lock. What only a try can show
    /// is tried: an empty file of ours is made in each directory that the request works in, and removed. The
    /// plan is fit for display: it has no secrets of a machine.
    ///
    /// # Errors
    /// The refusal that the request itself would get. [`ErrorKind::NeedsRecovery`] where an operation was
    /// interrupted: the plan would not be the one that is carried out later.
    pub async fn plan(&self, domain: &DomainRef, request: &Request) -> Result<Plan> {
        let mut plans = self.plans(domain, request).await?;
        plans.pop().ok_or_else(|| Error::new(ErrorKind::Internal, "no plan was made"))
    }

    /// Plans like [`Domsnap::plan`], and returns also the plan that comes before it. A revert of a running
    /// domain that saves the current state is two operations: the first plan is of the snapshot that saves
    /// it. The second plan is made again after the first operation, and may differ in what that has changed.
    ///
    /// # Errors
    /// The errors of [`Domsnap::plan`].
    pub async fn plans(&self, domain: &DomainRef, request: &Request) -> Result<Vec<Plan>> {
        let located = self.rooms.locator.locate(domain).await?;
        self.refuse_interrupted(&located.entry.domain.name).await?;
        let manifests = self.rooms.authority.manifests(&located.entry.domain)?;
        if located.catalogued {
            self.rooms.authority.require(&manifests, &located.entry).await?;
        }
        if request.is_of_records() {
            return Ok(vec![self.rooms.planning.plan_for(&located.entry, None, request).await?]);
        }
        // Clones are made of the disks as they are on the machine, whether the domain runs or not.
        let live = match request {
            Request::Clone(clone) => {
                self.rooms.records.require_new(&clone.clones).await?;
                None
            }
            _ => self.rooms.locator.connect(&located.entry.domain).await?,
        };
        let entry = &located.entry;
        let request = &request.clone().resolved(&entry.domain, &entry.tree, live.is_some())?;
        let saved = match request {
            Request::Revert(revert) if live.is_some() => {
                let saver = self.rooms.registry.hypervisor(&located.entry.domain.hypervisor)?;
                revert.in_two(saver.profile().recreates)
            }
            _ => None,
        };
        let mut plans = Vec::new();
        match saved {
            None => plans.push(self.rooms.planning.plan_for(&located.entry, live.as_ref(), request).await?),
            Some((save, mut revert)) => {
                // The hidden snapshot is not there yet.
                revert.saved = None;
                for request in [Request::Create(save), Request::Revert(revert)] {
                    plans.push(self.rooms.planning.plan_for(&located.entry, live.as_ref(), &request).await?);
                }
            }
        }
        for plan in &plans {
            self.rooms
                .planning
                .preflight(&located.entry.domain, &manifests, live.as_ref(), plan, true)
                .await?;
            if live.is_none() {
                self.rooms.planning.refuse_start(plan, &located.entry).await?;
            }
        }
        if let Some(first) = plans.first_mut() {
            first.notes.splice(0..0, located.notes);
        }
        let saver = self.rooms.registry.hypervisor(&located.entry.domain.hypervisor).ok();
        Ok(plans.into_iter().map(|plan| plan.shown(saver.as_deref())).collect())
    }

    /// Takes a snapshot.
    ///
    /// If it is cancelled before its commit point, by the token or by dropping this future, everything is
    /// undone.
    ///
    /// # Errors
    /// Any kind, with everything undone; but [`ErrorKind::NeedsRecovery`] says what is left.
    pub async fn create(
        &self,
        domain: &DomainRef,
        request: CreateRequest,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        self.change(domain, Request::Create(request), cancel).await
    }

    /// Takes a snapshot of several domains at one instant: of all of them, or of none. Those that run are
    /// paused together, and none goes on before the disks and the memory of all are of the instant. Of those
    /// that are off, the disks take part as they are.
    ///
    /// ```no_run
    /// # use snapcore::service::{CreateRequest, DomainRef, Domsnap};
    /// # use snapcore::SnapshotName;
    /// # use tokio_util::sync::CancellationToken;
    /// # async fn shop(domsnap: &Domsnap) -> snapcore::Result<()> {
    /// let shop = [DomainRef::parse("web")?, DomainRef::parse("db")?];
    /// let request = CreateRequest::new(SnapshotName::new("before-update")?);
    /// let taken = domsnap.create_group(&shop, request, CancellationToken::new()).await?;
    /// for outcome in taken.outcomes {
    ///     println!("{} was paused for {:?} us", outcome.domain, outcome.downtime_us);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// Any kind, with everything undone in all domains; but [`ErrorKind::NeedsRecovery`] says what is left.
    /// [`ErrorKind::Unsupported`] for a running domain whose hypervisor takes no part in groups.
    pub async fn create_group(
        &self,
        domains: &[DomainRef],
        request: CreateRequest,
        cancel: CancellationToken,
    ) -> Result<GroupOutcome> {
        self.change_group(domains, Request::Create(request), cancel).await
    }

    /// Returns several domains to a snapshot that was taken of them at one instant: all of them, or none.
    ///
    /// # Errors
    /// The errors of [`Domsnap::create_group`]; [`ErrorKind::NotFound`] where a domain has no snapshot of the
    /// name, and [`ErrorKind::Refused`] where the snapshots are not of one group.
    pub async fn revert_group(
        &self,
        domains: &[DomainRef],
        request: RevertRequest,
        cancel: CancellationToken,
    ) -> Result<GroupOutcome> {
        self.change_group(domains, Request::Revert(request), cancel).await
    }

    /// Deletes the snapshots of a group in all of these domains, or in none.
    ///
    /// # Errors
    /// The errors of [`Domsnap::revert_group`].
    pub async fn delete_group(
        &self,
        domains: &[DomainRef],
        request: DeleteRequest,
        cancel: CancellationToken,
    ) -> Result<GroupOutcome> {
        self.change_group(domains, Request::Delete(request), cancel).await
    }

    /// Plans a request on several domains like [`Domsnap::plan`]. Returns the plan of each, in the order of
    /// their names.
    ///
    /// # Errors
    /// The refusal that the request itself would get.
    pub async fn plan_group(
        &self,
        domains: &[DomainRef],
        request: &Request,
    ) -> Result<Vec<(DomainName, Plan)>> {
        for domain in domains {
            let located = self.rooms.locator.locate(domain).await?;
            self.refuse_interrupted(&located.entry.domain.name).await?;
        }
        self.rooms.operator.plan_group(domains.to_vec(), request.clone()).await
    }

    async fn change_group(
        &self,
        domains: &[DomainRef],
        request: Request,
        cancel: CancellationToken,
    ) -> Result<GroupOutcome> {
        let (room, domains) = (self.rooms.operator.clone(), domains.to_vec());
        to_the_end(&cancel, |cancel| async move { room.change_group(domains, request, cancel).await }).await
    }

    /// Returns to a snapshot. The current state is dropped, unless the request saves it.
    ///
    /// # Errors
    /// The errors of [`Domsnap::create`].
    pub async fn revert(
        &self,
        domain: &DomainRef,
        request: RevertRequest,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        self.change(domain, Request::Revert(request), cancel).await
    }

    /// Deletes snapshots. Once begun, the delete happens: cancelling defers merges, and [`Domsnap::tidy`]
    /// does them later.
    ///
    /// # Errors
    /// The errors of [`Domsnap::create`].
    pub async fn delete(
        &self,
        domain: &DomainRef,
        request: DeleteRequest,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        self.change(domain, Request::Delete(request), cancel).await
    }

    /// Merges and removes layers that nothing needs any more.
    ///
    /// # Errors
    /// The errors of [`Domsnap::create`].
    pub async fn tidy(&self, domain: &DomainRef, cancel: CancellationToken) -> Result<Outcome> {
        self.change(domain, Request::Tidy, cancel).await
    }

    /// Brings back the state that the last revert replaced, or gives it up. The state that is replaced now is
    /// kept in its place, so an undo of the undo is the identity.
    ///
    /// ```no_run
    /// # use snapcore::service::{DomainRef, Domsnap, KeepPrevious, RevertRequest, UndoRequest};
    /// # use snapcore::SnapshotName;
    /// # use tokio_util::sync::CancellationToken;
    /// # async fn undo(domsnap: &Domsnap) -> snapcore::Result<()> {
    /// let web = DomainRef::parse("web")?;
    /// let monday = RevertRequest::new(SnapshotName::new("monday")?).keep(KeepPrevious::IfFree);
    /// if domsnap.revert(&web, monday, CancellationToken::new()).await?.kept {
    ///     // It was the wrong domain.
    ///     domsnap.undo(&web, UndoRequest::new(), CancellationToken::new()).await?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where no state is kept; the errors of [`Domsnap::revert`] or
    /// [`Domsnap::delete`].
    pub async fn undo(
        &self,
        domain: &DomainRef,
        request: UndoRequest,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        self.change(domain, Request::Undo(request), cancel).await
    }

    /// Makes new domains of a snapshot's disks: all of them, or none. The domain may run, and its disks stay
    /// as they are. A clone has a name of its own for all that it shares, so the snapshot may be deleted, and
    /// the domain removed, while it exists.
    ///
    /// ```no_run
    /// # use snapcore::service::{CloneRequest, DomainRef, Domsnap};
    /// # use snapcore::{DomainName, SnapshotName};
    /// # use tokio_util::sync::CancellationToken;
    /// # async fn ten(domsnap: &Domsnap) -> snapcore::Result<()> {
    /// let names = CloneRequest::numbered(&DomainName::new("web")?, 10)?;
    /// let request = CloneRequest::new(SnapshotName::new("installed")?, names);
    /// domsnap.clone_domain(&DomainRef::parse("gold")?, request, CancellationToken::new()).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// The errors of [`Domsnap::create`]; [`ErrorKind::Exists`] for a name or a directory that is in use.
    pub async fn clone_domain(
        &self,
        domain: &DomainRef,
        request: CloneRequest,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        self.change(domain, Request::Clone(request), cancel).await
    }

    /// Holds a snapshot, so that it is not deleted. A snapshot can have many holds, one by each holder. Only
    /// records change, so the domain may run.
    ///
    /// ```no_run
    /// # use snapcore::service::{DeleteRequest, DomainRef, Domsnap, HoldRequest, ReleaseRequest};
    /// # use snapcore::{Holder, SnapshotName};
    /// # use tokio_util::sync::CancellationToken;
    /// # async fn copied(domsnap: &Domsnap) -> snapcore::Result<()> {
    /// let (web, monday) = (DomainRef::parse("web")?, SnapshotName::new("monday")?);
    /// let holder = Holder::new("copy-job")?;
    /// domsnap.hold(&web, HoldRequest::new(monday.clone(), holder.clone())).await?;
    /// // Copy it. If a user wants to delete it meanwhile, that waits.
    /// let deferred = DeleteRequest::new(vec![monday.clone()]).defer(true);
    /// domsnap.delete(&web, deferred, CancellationToken::new()).await?;
    /// // Now it is deleted.
    /// domsnap.release(&web, ReleaseRequest::new(monday, holder)).await?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], [`ErrorKind::Usage`]; [`ErrorKind::Exists`] where the holder holds it.
    pub async fn hold(&self, domain: &DomainRef, request: HoldRequest) -> Result<Outcome> {
        self.change(domain, Request::Hold(request), CancellationToken::new()).await
    }

    /// Ends a hold. If it was the last one of a snapshot whose deletion was deferred, the snapshot is
    /// deleted; a failure of that is a note of the outcome, and `recover` tries it again.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Refused`] for a hold that domsnap itself gave.
    pub async fn release(&self, domain: &DomainRef, request: ReleaseRequest) -> Result<Outcome> {
        self.change(domain, Request::Release(request), CancellationToken::new()).await
    }

    /// Changes the name, the description or the expiry of a snapshot.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Exists`] for a name that is in use.
    pub async fn amend(&self, domain: &DomainRef, request: AmendRequest) -> Result<Outcome> {
        self.change(domain, Request::Amend(request), CancellationToken::new()).await
    }

    /// The last operations on a domain, oldest first. The journal has a limited number of them.
    ///
    /// # Errors
    /// The errors of [`Domsnap::resolve`].
    pub async fn history(&self, domain: &DomainRef) -> Result<Vec<PastOperation>> {
        self.rooms.viewer.history(domain).await
    }

    /// Records the policy of a registered domain, or takes it away. A policy that is changed keeps its
    /// identity, so that its snapshots stay its own. With `adopt`, a domain without a policy gets the
    /// identity of the newest snapshot that a policy took, so that the snapshots of an earlier policy are
    /// this one's.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] for a policy that cannot be followed; [`ErrorKind::Refused`] for a domain that is
    /// not registered.
    pub async fn set_policy(
        &self,
        domain: &DomainRef,
        spec: Option<PolicySpec>,
        adopt: bool,
    ) -> Result<PolicyChange> {
        let (room, domain) = (self.rooms.registrar.clone(), domain.clone());
        to_the_end(&CancellationToken::new(), |cancel| async move {
            room.set_policy(domain, spec, adopt, cancel).await
        })
        .await
    }

    /// What a run of the domain's policy would do now: if a snapshot is due, and of each snapshot if it stays
    /// and why. With `planned`, a snapshot that is due counts as taken. Changes nothing.
    ///
    /// A run is: [`Domsnap::create`] with [`CreateRequest::policy()`], then for each snapshot that is pruned,
    /// oldest first, [`Domsnap::delete`] with [`DeleteRequest::pruning`]. Both decide again under the
    /// domain's lock.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a domain without a policy; [`ErrorKind::NeedsRecovery`] where an operation
    /// was interrupted; the errors of [`Domsnap::plan`].
    pub async fn policy_review(&self, domain: &DomainRef, planned: bool) -> Result<PolicyReview> {
        let located = self.rooms.locator.locate(domain).await?;
        self.refuse_interrupted(&located.entry.domain.name).await?;
        let live = self.rooms.locator.connect(&located.entry.domain).await?;
        self.rooms.planning.review(&located.entry, live.as_ref(), Timestamp::now(), planned).await
    }

    /// Locks the runs of the domain's policy, so that its commands run once at a time. Operations on
    /// the domain are not locked out.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] where another process runs it.
    pub async fn policy_turn(&self, domain: &DomainRef) -> Result<Lease> {
        self.rooms.registrar.policy_turn(domain).await
    }

    async fn refuse_interrupted(&self, name: &DomainName) -> Result<()> {
        let unfinished = self.rooms.records.unfinished(name).await?;
        let Some(unfinished) = unfinished.first() else { return Ok(()) };
        Err(Error::new(
            ErrorKind::NeedsRecovery,
            format!("a {} of domain {name} is {}", unfinished.plan.operation, unfinished.state),
        )
        .state("it runs just now, or stopped half way; no changes made")
        .advise(format!("run `domsnap recover {name}` first: only then is known what is to be done")))
    }

    async fn change(
        &self,
        domain: &DomainRef,
        request: Request,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        let (room, domain) = (self.rooms.operator.clone(), domain.clone());
        to_the_end(&cancel, |cancel| async move { room.change(domain, request, cancel).await }).await
    }

    /// The domain and its snapshots, from the catalogue alone where it has the domain.
    ///
    /// # Errors
    /// The errors of [`Domsnap::resolve`].
    pub async fn list(&self, domain: &DomainRef) -> Result<Listing> {
        self.rooms.viewer.list(domain).await
    }

    /// One snapshot in full, with sizes read from the images.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none of this name; the errors of [`Domsnap::resolve`].
    pub async fn show(&self, domain: &DomainRef, name: &SnapshotName) -> Result<Details> {
        self.rooms.viewer.show(domain, name).await
    }

    /// The space that snapshots take, and what a delete of exactly these frees; of all, if none is named.
    /// Reads the images.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none of a name; the errors of [`Domsnap::resolve`]. A disk that
    /// cannot be read is no error: its sizes are unknown, with the reason.
    pub async fn sizes(&self, domain: &DomainRef, names: &[SnapshotName]) -> Result<SizeReport> {
        self.rooms.viewer.sizes(domain, names).await
    }

    /// The domain that has the file `image` as a layer: from the catalogue, or else from manifests beside it.
    /// Reads images by no more than their names and identities.
    pub async fn belonging(&self, image: &Utf8Path) -> Result<Option<Belonging>> {
        self.rooms.viewer.belonging(image).await
    }

    /// Checks that the catalogue is authoritative for the domain `name`. Then every manifest beside its
    /// images was written with this catalogue, and none is newer than the catalogue.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where it is not, with what to do.
    pub async fn require_authoritative(&self, name: &DomainName) -> Result<()> {
        self.rooms.authority.require_for(name).await
    }

    /// Reports each disk as it is on the machine. The report of a disk that cannot be read says so.
    ///
    /// # Errors
    /// The errors of [`Domsnap::resolve`].
    pub async fn inspect(&self, domain: &DomainRef) -> Result<Vec<DiskReport>> {
        self.rooms.viewer.inspect(domain).await
    }

    /// Fails if a running domain has the image open without holding a lock. Call it before you write to an
    /// image without this service.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], with the domain.
    pub async fn require_closed(&self, image: &Utf8Path) -> Result<()> {
        self.rooms.watcher.require_closed(image).await
    }

    /// The images of the catalogue's domains that are backed by the file `image`, in whatever directory they
    /// are.
    pub async fn backed_by(&self, image: &Utf8Path) -> Result<Vec<DiskAddress>> {
        self.rooms.neighbours.backed_by(image).await
    }

    /// Finds the extents of a domain's disks that differ between two snapshots, in either order of time and
    /// on any branches, or between a snapshot and the current state of a domain that does not run. Metadata
    /// is compared, as far as the formats have such; nothing needs to have been recorded before.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] for a disk whose backend does not compare;
    /// [`ErrorKind::Refused`] for the current state of a running domain; [`ErrorKind::Busy`].
    pub async fn diff(&self, domain: &DomainRef, request: &DiffRequest) -> Result<DiffReport> {
        self.rooms.viewer.diff(domain, request).await
    }

    /// Compares as [`Domsnap::diff`] does, and leaves both states open for reading.
    ///
    /// # Errors
    /// The errors of [`Domsnap::diff`].
    pub async fn differences(&self, domain: &DomainRef, request: &DiffRequest) -> Result<Vec<ComparedDisk>> {
        self.rooms.viewer.differences(domain, request).await
    }

    /// Opens the disks of a snapshot for reading: those that `targets` names, or all. The domain may run.
    /// Hold the snapshot ([`Domsnap::hold`]) while it is read.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`]; [`ErrorKind::Unsupported`] for a disk whose backend does not read points;
    /// [`ErrorKind::Busy`].
    pub async fn open_snapshot(
        &self,
        domain: &DomainRef,
        name: &SnapshotName,
        targets: &[crate::name::Target],
    ) -> Result<OpenSnapshot> {
        self.rooms.viewer.open_snapshot(domain, name, targets).await
    }

    /// Looks for damage: in the images, and between catalogue, manifests and images. Changes nothing. The
    /// worst findings come first.
    ///
    /// # Errors
    /// The errors of [`Domsnap::resolve`]; damage of images is a finding, not an error.
    pub async fn check(&self, domain: &DomainRef) -> Result<Vec<Finding>> {
        self.rooms.viewer.check(domain).await
    }

    /// Finishes or undoes interrupted operations, in one domain or in all, and does deferred merges. If one
    /// domain cannot be recovered, the others are recovered all the same.
    ///
    /// # Errors
    /// The error of the first domain that could not be recovered.
    pub async fn recover(
        &self,
        domain: Option<&DomainRef>,
        cancel: CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        let references = match domain {
            Some(domain) => vec![domain.clone()],
            None => {
                let all = self.rooms.records.domains().await?;
                all.into_iter().map(|entry| DomainRef::Name(entry.domain.name)).collect()
            }
        };
        let mut reports = Vec::new();
        let mut failure = None;
        for reference in references {
            let room = self.rooms.operator.clone();
            match to_the_end(&cancel, |cancel| async move { room.recover(reference, cancel).await }).await {
                Ok(more) => reports.extend(more),
                // The first error is returned, so only the later ones are logged.
                Err(error) if failure.is_none() => failure = Some(error),
                Err(error) => tracing::error!(%error, "recovering a domain"),
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(reports),
        }
    }

    /// Closes the interrupted operations of a domain without doing or undoing anything more. It is for a
    /// domain whose recovery cannot continue. No file is touched. Returns what each operation left, as
    /// messages.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the domain's guest waits for the operation with its disks detached.
    pub async fn abandon(&self, domain: &DomainRef) -> Result<Vec<RecoveryReport>> {
        let (room, domain) = (self.rooms.operator.clone(), domain.clone());
        to_the_end(&CancellationToken::new(), |cancel| async move { room.abandon(domain, cancel).await })
            .await
    }

    /// Records that a domain runs on this machine from now on. It is for a domain of another machine that
    /// does not run there any more, and for a machine that got another machine ID. Nothing else is changed.
    /// Returns the machine that it was recorded for.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the catalogue has no such domain.
    pub async fn take_over(&self, domain: &DomainRef) -> Result<Option<Host>> {
        let (room, domain) = (self.rooms.registrar.clone(), domain.clone());
        to_the_end(&CancellationToken::new(), |cancel| async move { room.take_over(domain, cancel).await })
            .await
    }

    /// Removes one disk from a domain. Its image stays as it is, and the domain's snapshots continue without
    /// it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a disk that the domain does not have; [`ErrorKind::Refused`] for its only
    /// one.
    pub async fn disk_remove(&self, domain: &DomainRef, target: &crate::name::Target) -> Result<Domain> {
        let (room, domain, target) = (self.rooms.registrar.clone(), domain.clone(), target.clone());
        to_the_end(&CancellationToken::new(), |cancel| async move {
            room.disk_remove(domain, target, cancel).await
        })
        .await
    }

    /// Adds a disk to a domain. The snapshots that it has continue without the disk.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] for a target or an image that a domain has already; the error of an image that
    /// is not usable.
    pub async fn disk_add(&self, domain: &DomainRef, disk: crate::domain::Disk) -> Result<Domain> {
        let (room, domain) = (self.rooms.registrar.clone(), domain.clone());
        to_the_end(
            &CancellationToken::new(),
            |cancel| async move { room.disk_add(domain, disk, cancel).await },
        )
        .await
    }

    /// Searches the places where the images of a domain may have been moved to, near where they were. Returns
    /// the images in each, which an import that replaces the domain takes. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where the catalogue does not have the domain.
    pub async fn find_moved(&self, domain: &DomainRef) -> Result<Vec<DomainRef>> {
        self.rooms.registrar.find_moved(domain).await
    }

    /// Rebuilds the catalogue's records of a domain from the manifests beside its images, and adopts the
    /// snapshots and layers that the images themselves know. One image of a domain is enough to import all
    /// that its manifests name.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the catalogue has snapshots of the domain and the caller did not ask to
    /// replace them.
    pub async fn import(&self, domain: &DomainRef, options: ImportOptions) -> Result<ImportReport> {
        let (room, domain) = (self.rooms.registrar.clone(), domain.clone());
        to_the_end(
            &CancellationToken::new(),
            |cancel| async move { room.import(domain, options, cancel).await },
        )
        .await
    }
}
