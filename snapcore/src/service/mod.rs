//! The service: what a program that embeds domsnap calls, and the command line is made of.

mod change;
mod identity;
mod live;
mod locate;
mod look;
mod neighbours;
mod preflight;
mod reference;
mod report;
mod trial;
mod users;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

pub use identity::Belonging;
pub use live::Scanned;
pub use locate::{image_path, require_files};
pub use reference::{DomainRef, DomainSpec, GivenImage, image_list};
pub use report::{
    Details, DiskReport, DomainSummary, ImportReport, Listing, Member, Outcome, Postponed, RecoveryEnd,
    RecoveryReport, Removal, Unfinished,
};

use self::change::to_the_end;
use crate::catalogue::Catalogue;
use crate::{
    Control, CreateRequest, DeleteRequest, Domain, DomainInfo, DomainName, Error, ErrorKind, EventStream,
    Events, Finding, Hypervisor, Plan, Registry, Request, Result, RevertRequest, SnapshotName, time_name,
};

/// How an import goes.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ImportOptions {
    /// The name that the domain is to have; absent: the one that its manifests tell, or one made of its first
    /// image's.
    pub name: Option<DomainName>,
    /// Replace what the catalogue has of the domain.
    pub replace: bool,
    /// Believe what manifests say of how the domain is reached and started, and of files outside of the disks' directories:
    /// the user has looked at it.
    pub trust: bool,
}

impl ImportOptions {
    /// Confirms what manifests say of how the domain is reached and started.
    #[must_use]
    pub fn trust(mut self) -> Self {
        self.trust = true;
        self
    }

    /// Registers the domain under `name`.
    #[must_use]
    pub fn name(mut self, name: DomainName) -> Self {
        self.name = Some(name);
        self
    }

    /// Replaces what the catalogue has of the domain.
    #[must_use]
    pub fn replace(mut self) -> Self {
        self.replace = true;
        self
    }
}

/// Snapshots of domains. Cheap to clone; may be used from many tasks at once.
#[derive(Clone)]
pub struct Domsnap {
    inner: Arc<Inner>,
}

struct Inner {
    registry: Registry,
    catalogue: Arc<dyn Catalogue>,
    events: Events,
    /// What other domains' images were found to be backed by while a change was planned, where something else is recorded.
    newer: Mutex<BTreeMap<DomainName, Vec<Utf8PathBuf>>>,
}

impl Domsnap {
    /// The service on a catalogue. Nothing is read or made yet.
    pub fn new(catalogue: Arc<dyn Catalogue>, registry: Registry) -> Self {
        Self {
            inner: Arc::new(Inner {
                registry,
                catalogue,
                events: Events::default(),
                newer: Mutex::default(),
            }),
        }
    }

    /// The backends that it was opened with.
    pub fn registry(&self) -> &Registry {
        &self.inner.registry
    }

    /// Everything that happens from now on.
    pub fn events(&self) -> EventStream {
        self.inner.events.subscribe()
    }

    /// A free name for a snapshot of `domain`, made from the time: [`time_name`].
    pub async fn default_name(&self, domain: &DomainRef) -> Result<SnapshotName> {
        let listing = self.list(domain).await?;
        locate::free_name(&time_name(Timestamp::now())?, &listing.snapshots)
    }

    /// Registers a domain: takes in its disks, with the snapshots that manifests beside them tell and the internal
    /// ones of their active images. Images that were used by their paths before keep their snapshots.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] for a name or an image that another domain has; what the images are wrong with.
    pub async fn domain_add(&self, spec: &DomainSpec) -> Result<ImportReport> {
        let (inner, spec) = (self.inner.clone(), spec.clone());
        to_the_end(&CancellationToken::new(), |cancel| inner.domain_add(spec, cancel)).await
    }

    /// Takes a domain out of the catalogue. Its images, snapshots and manifests stay as they are, and an import
    /// brings it back.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where an operation stopped half way; [`ErrorKind::Io`] where its manifests are not
    /// whole and cannot be written.
    pub async fn domain_remove(&self, domain: &DomainRef) -> Result<Removal> {
        let (inner, domain) = (self.inner.clone(), domain.clone());
        to_the_end(&CancellationToken::new(), |cancel| inner.domain_remove(domain, cancel)).await
    }

    /// What runs at an address. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where nothing does; [`ErrorKind::Unsupported`] where the hypervisor is not registered.
    pub async fn look(&self, hypervisor: &Hypervisor, control: &Control) -> Result<DomainInfo> {
        self.inner.look(hypervisor, control).await
    }

    /// The domains that run on this machine and could be registered, or are.
    pub async fn scan(&self) -> Result<Vec<Scanned>> {
        self.inner.scan().await
    }

    /// The running side of a domain as its hypervisor describes it; none where it does not run.
    ///
    /// # Errors
    /// As of [`Domsnap::resolve`]; where it cannot be told whether it runs.
    pub async fn running(&self, domain: &DomainRef) -> Result<Option<DomainInfo>> {
        let located = self.inner.locate(domain).await?;
        let live = self.inner.connect(&located.entry.domain).await?;
        Ok(live.map(|live| live.seen().clone()))
    }

    /// All domains that the catalogue has.
    pub async fn domains(&self) -> Result<Vec<DomainSummary>> {
        let found = self.inner.catalogue.domains().await?;
        Ok(found
            .into_iter()
            .map(|entry| DomainSummary {
                missing: locate::missing(&entry.domain),
                domain: entry.domain,
                snapshots: entry.snapshots,
                unfinished: entry.unfinished,
            })
            .collect())
    }

    /// The domain that is meant.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a name that is not registered; [`ErrorKind::Refused`] for images that are not
    /// exactly the disks of the domain they belong to, and for a symbolic link.
    pub async fn resolve(&self, domain: &DomainRef) -> Result<Domain> {
        Ok(self.inner.locate(domain).await?.entry.domain)
    }

    /// What `request` would do. Changes nothing and needs no lock. What only a try can tell is tried: an empty file of ours is
    /// made in each directory that the request works in, and removed.
    ///
    /// # Errors
    /// As the request itself would be refused; [`ErrorKind::NeedsRecovery`] where an operation stopped half way, so
    /// that the plan would not be what will be done.
    pub async fn plan(&self, domain: &DomainRef, request: &Request) -> Result<Plan> {
        let mut plans = self.plans(domain, request).await?;
        plans.pop().ok_or_else(|| Error::new(ErrorKind::Internal, "no plan was made"))
    }

    /// As [`Domsnap::plan`], with what is done before it. A revert of a running domain that saves the current state is two
    /// operations: the first plan is of the snapshot that saves it. The second is made again then, and may differ in
    /// what the first has changed.
    ///
    /// # Errors
    /// As of [`Domsnap::plan`].
    pub async fn plans(&self, domain: &DomainRef, request: &Request) -> Result<Vec<Plan>> {
        let located = self.inner.locate(domain).await?;
        let name = &located.entry.domain.name;
        if let Some(unfinished) = self.inner.catalogue.unfinished(name).await?.first() {
            return Err(Error::new(
                ErrorKind::NeedsRecovery,
                format!("a {} of domain {name} is {}", unfinished.plan.operation, unfinished.state),
            )
            .state("it runs just now, or stopped half way; no changes made")
            .advise(format!("run `domsnap recover {name}` first: only then is known what is to be done")));
        }
        if located.catalogued {
            self.inner.require_last_word(&located.entry).await?;
        }
        let live = self.inner.connect(&located.entry.domain).await?;
        let saved = match request {
            Request::Revert(revert) if live.is_some() => {
                let saver = self.inner.registry.hypervisor(&located.entry.domain.hypervisor)?;
                revert.in_two(saver.profile().recreates)
            }
            _ => None,
        };
        let mut plans = Vec::new();
        match saved {
            None => plans.push(self.inner.plan_for(&located.entry, live.as_ref(), request).await?),
            Some((save, revert)) => {
                for request in [Request::Create(save), Request::Revert(revert)] {
                    plans.push(self.inner.plan_for(&located.entry, live.as_ref(), &request).await?);
                }
            }
        }
        for plan in &plans {
            self.inner.preflight(&located.entry.domain, live.as_ref(), plan, true).await?;
        }
        if let Some(first) = plans.first_mut() {
            first.notes.splice(0..0, located.notes);
        }
        Ok(plans)
    }

    /// Takes a snapshot.
    ///
    /// Cancelled before its commit point, by the token or by dropping this future, everything is undone.
    ///
    /// # Errors
    /// Of whatever kind, with everything undone; but [`ErrorKind::NeedsRecovery`] tells what is left.
    pub async fn create(
        &self,
        domain: &DomainRef,
        request: CreateRequest,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        self.change(domain, Request::Create(request), cancel).await
    }

    /// Returns to a snapshot. The present is dropped, unless the request saves it.
    ///
    /// # Errors
    /// As of [`Domsnap::create`].
    pub async fn revert(
        &self,
        domain: &DomainRef,
        request: RevertRequest,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        self.change(domain, Request::Revert(request), cancel).await
    }

    /// Deletes snapshots. Once begun it happens: cancelling puts merges off, and [`Domsnap::tidy`] does them later.
    ///
    /// # Errors
    /// As of [`Domsnap::create`].
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
    /// As of [`Domsnap::create`].
    pub async fn tidy(&self, domain: &DomainRef, cancel: CancellationToken) -> Result<Outcome> {
        self.change(domain, Request::Tidy, cancel).await
    }

    async fn change(
        &self,
        domain: &DomainRef,
        request: Request,
        cancel: CancellationToken,
    ) -> Result<Outcome> {
        let (inner, domain) = (self.inner.clone(), domain.clone());
        to_the_end(&cancel, |cancel| inner.change(domain, request, cancel)).await
    }

    /// The domain and its snapshots, from the catalogue alone where it has the domain.
    ///
    /// # Errors
    /// As of [`Domsnap::resolve`].
    pub async fn list(&self, domain: &DomainRef) -> Result<Listing> {
        self.inner.list(domain).await
    }

    /// One snapshot in full, with sizes read from the images.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where there is none of this name; as of [`Domsnap::resolve`].
    pub async fn show(&self, domain: &DomainRef, name: &SnapshotName) -> Result<Details> {
        self.inner.show(domain, name).await
    }

    /// The domain that has the file `image` as a layer: from the catalogue, or else from manifests beside it. Reads
    /// images by no more than their names and identities.
    pub async fn belonging(&self, image: &Utf8Path) -> Result<Option<Belonging>> {
        self.inner.belonging(image).await
    }

    /// Whether the catalogue has the last word on the domain `name`: what manifests beside its images tell was written
    /// with this catalogue, and not later than it knows.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where it has not, with what to do.
    pub async fn require_last_word(&self, name: &DomainName) -> Result<()> {
        self.inner.require_last_word_on(name).await
    }

    /// Each disk as it is on the machine. A disk that cannot be read says so in its report.
    ///
    /// # Errors
    /// As of [`Domsnap::resolve`].
    pub async fn inspect(&self, domain: &DomainRef) -> Result<Vec<DiskReport>> {
        self.inner.inspect(domain).await
    }

    /// Refuses an image that a running domain has open without a lock which its writer would meet: for who is about to write
    /// it without this service.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Busy`], with the domain.
    pub async fn require_closed(&self, image: &camino::Utf8Path) -> Result<()> {
        self.inner.require_closed(image).await
    }

    /// The images of the catalogue's domains that are backed by the file `image`, in whatever directory they are.
    pub async fn backed_by(&self, image: &camino::Utf8Path) -> Result<Vec<Utf8PathBuf>> {
        self.inner.backed_by(image).await
    }

    /// Looks for damage: in the images, and between catalogue, manifests and images. Changes nothing. The worst
    /// comes first.
    ///
    /// # Errors
    /// As of [`Domsnap::resolve`]; what is wrong with images is a finding.
    pub async fn check(&self, domain: &DomainRef) -> Result<Vec<Finding>> {
        self.inner.check(domain).await
    }

    /// Finishes or undoes what stopped half way, in one domain or in all, and merges what was put off. Where a domain
    /// cannot be recovered, the others are all the same.
    ///
    /// # Errors
    /// The first domain's that could not be recovered.
    pub async fn recover(
        &self,
        domain: Option<&DomainRef>,
        cancel: CancellationToken,
    ) -> Result<Vec<RecoveryReport>> {
        let references = match domain {
            Some(domain) => vec![domain.clone()],
            None => {
                let all = self.inner.catalogue.domains().await?;
                all.into_iter().map(|entry| DomainRef::Name(entry.domain.name)).collect()
            }
        };
        let mut reports = Vec::new();
        let mut failure = None;
        for reference in references {
            let inner = self.inner.clone();
            match to_the_end(&cancel, |cancel| inner.recover(reference, cancel)).await {
                Ok(more) => reports.extend(more),
                // The first is the answer, and is not said twice.
                Err(error) if failure.is_none() => failure = Some(error),
                Err(error) => tracing::error!(%error, "recovering a domain"),
            }
        }
        match failure {
            Some(error) => Err(error),
            None => Ok(reports),
        }
    }

    /// Closes the operations of a domain that stopped half way, without doing or undoing anything more: for where a recovery
    /// cannot go on. No file is touched. Gives what each had left, in words.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the domain's guest waits for the operation with its disks taken from it.
    pub async fn abandon(&self, domain: &DomainRef) -> Result<Vec<RecoveryReport>> {
        let (inner, domain) = (self.inner.clone(), domain.clone());
        to_the_end(&CancellationToken::new(), |cancel| inner.abandon(domain, cancel)).await
    }

    /// Takes one disk out of a domain. Its image stays as it is, and the domain's snapshots go on without it.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] for a disk that the domain does not have; [`ErrorKind::Refused`] for its only one.
    pub async fn disk_remove(&self, domain: &DomainRef, target: &crate::Target) -> Result<Domain> {
        let (inner, domain, target) = (self.inner.clone(), domain.clone(), target.clone());
        to_the_end(&CancellationToken::new(), |cancel| inner.disk_remove(domain, target, cancel)).await
    }

    /// Adds a disk to a domain. Snapshots that it has go on without it.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] for a target or an image that a domain has already; what the image is wrong with.
    pub async fn disk_add(&self, domain: &DomainRef, disk: crate::Disk) -> Result<Domain> {
        let (inner, domain) = (self.inner.clone(), domain.clone());
        to_the_end(&CancellationToken::new(), |cancel| inner.disk_add(domain, disk, cancel)).await
    }

    /// Rebuilds the catalogue of a domain from the manifests beside its images, and adopts the snapshots and layers
    /// that the images themselves know. One image of a domain stands for all that its manifests name.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the catalogue has snapshots of the domain and replacing was not asked for.
    pub async fn import(&self, domain: &DomainRef, options: ImportOptions) -> Result<ImportReport> {
        let (inner, domain) = (self.inner.clone(), domain.clone());
        to_the_end(&CancellationToken::new(), |cancel| inner.import(domain, options, cancel)).await
    }
}
