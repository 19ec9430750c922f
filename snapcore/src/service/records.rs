//! The catalogue for rooms that read it and must not change it.

use std::sync::Arc;

use camino::Utf8Path;

use crate::address::DiskAddress;
use crate::backend::DiskSnapshotter;
use crate::catalogue::{Catalogue, CatalogueId, Entry, EntrySummary};
use crate::domain::Hypervisor;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::DomainStep;
use crate::name::DomainName;
use crate::operation::{Operation, OperationState};
use crate::registry::Registry;

/// Read access to the catalogue: no lease, no commit.
#[derive(Clone)]
pub(super) struct Records(Arc<dyn Catalogue>, Arc<Registry>);

impl Records {
    /// Read access to `catalogue`. The backends of `registry` tell names of files.
    pub(super) fn new(catalogue: Arc<dyn Catalogue>, registry: Arc<Registry>) -> Self {
        Self(catalogue, registry)
    }

    /// The identity of the catalogue; absent where nothing was ever recorded in it.
    pub(super) async fn identity(&self) -> Result<Option<CatalogueId>> {
        self.0.identity().await
    }

    /// All domains, by name.
    pub(super) async fn domains(&self) -> Result<Vec<EntrySummary>> {
        self.0.domains().await
    }

    /// The domain of this name, if there is one.
    pub(super) async fn find(&self, name: &DomainName) -> Result<Option<Entry>> {
        self.0.load(name).await
    }

    /// The domain of this name.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], listing the domains that there are.
    pub(super) async fn load(&self, name: &DomainName) -> Result<Entry> {
        match self.find(name).await? {
            Some(entry) => Ok(entry),
            None => Err(self.no_domain(name).await?),
        }
    }

    /// Returns those of `paths` that are disks of domains, each with the domain.
    pub(super) async fn owners(&self, images: &[DiskAddress]) -> Result<Vec<(DiskAddress, DomainName)>> {
        self.0.owners(images).await
    }

    /// The operations of a domain that the journal still has, oldest first.
    pub(super) async fn operations(&self, name: &DomainName) -> Result<Vec<Operation>> {
        self.0.operations(name).await
    }

    /// The operations of a domain that have not ended, oldest first.
    pub(super) async fn unfinished(&self, name: &DomainName) -> Result<Vec<Operation>> {
        self.0.unfinished(name).await
    }

    /// Returns true if the last operation on the domain's disks that took effect saved the current state for
    /// a revert. No unfinished operation has a record that the guest is paused for it: the revert did not
    /// begin, or was undone before it got to the guest.
    pub(super) async fn is_before_revert(&self, name: &DomainName) -> Result<bool> {
        let operations = self.operations(name).await?;
        let took_effect = |operation: &&Operation| {
            let plan = &operation.plan;
            plan.has_steps() && !plan.leaves_disks() && operation.state != OperationState::Undone
        };
        let last = operations.iter().rev().find(took_effect);
        let is_it = |step: &DomainStep| matches!(step, DomainStep::Instant { for_revert: true, .. });
        Ok(last.is_some_and(|last| last.state == OperationState::Done && last.plan.domain_steps().any(is_it)))
    }

    /// Fails if an operation of the domain has not ended.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], with the command that ends it.
    pub(super) async fn refuse_unfinished(&self, entry: &Entry) -> Result<()> {
        match self.unfinished(&entry.domain.name).await?.first() {
            None => Ok(()),
            Some(operation) => Err(Error::new(
                ErrorKind::Refused,
                format!("a {} of domain {} stopped half way", operation.plan.operation, entry.domain.name),
            )
            .state("no changes made")
            .advise(format!("run `domsnap recover {}` first", entry.domain.name))),
        }
    }

    /// Fails unless all of these names can be given to new domains.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`]; [`ErrorKind::Usage`] for a name that begins as an address does.
    pub(super) async fn require_new(&self, names: &[DomainName]) -> Result<()> {
        for name in names {
            require_no_address(&self.1, name)?;
        }
        let known = self.0.domains().await?;
        match names.iter().find(|name| known.iter().any(|entry| entry.domain.name == **name)) {
            None => Ok(()),
            Some(taken) => Err(Error::new(ErrorKind::Exists, format!("there is a domain {taken} already"))
                .state("no changes made")
                .advise(format!(
                    "choose another name, or remove that one with `domsnap domain remove {taken}`"
                ))),
        }
    }

    /// The error for a name that no domain has.
    async fn no_domain(&self, name: &DomainName) -> Result<Error> {
        let known = self.0.domains().await?;
        let known: Vec<&str> = known.iter().map(|entry| entry.domain.name.as_str()).collect();
        // An image's name often ends with its format.
        let formats = self.1.iter().map(DiskSnapshotter::format).chain(["img"]);
        let ending = Utf8Path::new(name.as_str()).extension();
        let is_file = formats.map(Some).any(|format| format == ending);
        let detail = match is_file {
            true if Utf8Path::new(name.as_str()).exists() => {
                format!("{name} is not a regular file or block device; and there is no domain of that name")
            }
            true => format!("no such file: {name}; and there is no domain of that name"),
            false => format!("there is no domain {name}"),
        };
        let error = Error::new(ErrorKind::NotFound, detail);
        Ok(match known.is_empty() {
            true => error.advise(
                "register it with `domsnap domain add`, or bring it back from its manifests with `domsnap import IMAGE,...`",
            ),
            false => error.advise(format!(
                "the domains known are: {}; `domsnap import IMAGE,...` brings one back from its manifests",
                known.join(", ")
            )),
        })
    }
}

/// Fails for a name that no reference could use, because it begins as an address does.
///
/// # Errors
/// [`ErrorKind::Usage`].
pub(super) fn require_no_address(registry: &Registry, name: &DomainName) -> Result<()> {
    let hypervisor = name.as_str().split_once(':').and_then(|(word, _)| Hypervisor::new(word).ok());
    match hypervisor.filter(|hypervisor| registry.hypervisor(hypervisor).is_ok()) {
        None => Ok(()),
        Some(hypervisor) => Err(Error::new(
            ErrorKind::Usage,
            format!("the name {name} begins with '{hypervisor}:', which says where a domain is reached"),
        )
        .state("no changes made")
        .advise("choose another name")),
    }
}
