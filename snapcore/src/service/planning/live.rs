//! The planner's knowledge of a running domain.

use std::sync::Arc;

use super::Planning;
use crate::catalogue::Entry;
use crate::domain::{DiskRecord, Domain};
use crate::erased::AnyDiskSnapshotter;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{DomainStep, MemoryStore, OpenChain, PowerAfter};
use crate::plan::RunningDomain;
use crate::registry::Registry;
use crate::request::Request;
use crate::service::locator::Live;
use crate::shape::Plan;

impl Planning {
    /// Returns the running domain as the planner needs it.
    pub(super) fn alive<'a>(
        &self,
        entry: &Entry,
        live: &'a Live,
        request: &Request,
    ) -> Result<RunningDomain<'a>> {
        let (mut differs, mut media) = (Vec::new(), Vec::new());
        if let Request::Revert(revert) = request
            && let Ok(wanted) = revert.wanted(&entry.tree)
            && wanted.memory.is_some()
            && let Some(machine) = wanted.machine.as_deref().and_then(|id| entry.domain.machine(id))
        {
            differs = live.differences(&machine.record)?;
            media = live.media(&machine.record)?;
        }
        Ok(RunningDomain {
            profile: self.registry.hypervisor(&entry.domain.hypervisor)?.profile(),
            seen: live.seen(),
            differs,
            media,
            memory: self.memory_store(&entry.domain)?,
            cannot_save_memory: live.cannot_save_memory(),
            cannot_detach: live.cannot_detach(),
        })
    }

    /// The place of the domain's memory images.
    fn memory_store(&self, domain: &Domain) -> Result<Option<Arc<dyn MemoryStore>>> {
        self.registry.memory_store(domain, self.authority.manifests(domain)?.directory())
    }

    /// The place of the memory image that a plan makes, if it makes one.
    pub(in crate::service) fn memory_made_by(
        &self,
        plan: &Plan,
        domain: &Domain,
    ) -> Result<Option<Arc<dyn MemoryStore>>> {
        let makes_memory = |step: &DomainStep| matches!(step, DomainStep::Instant { memory: Some(_), .. });
        match plan.domain_steps().any(makes_memory) {
            true => self.memory_store(domain),
            false => Ok(None),
        }
    }

    /// Refuses a plan that ends with a start from memory which is known to fail. The domain does not run.
    pub(in crate::service) async fn refuse_start(&self, plan: &Plan, entry: &Entry) -> Result<()> {
        for step in plan.domain_steps() {
            let DomainStep::Continue { memory: Some(image), power, .. } = step else { continue };
            if *power != Some(PowerAfter::Off) {
                let saver = self.registry.hypervisor(&entry.domain.hypervisor)?;
                saver.may_start(&entry.domain, entry.machine_with(image)).await?;
            }
        }
        Ok(())
    }

    /// Refuses a plan that needs a memory image at an address which the domain's hypervisor does not read.
    pub(super) async fn refuse_unread_memory(&self, plan: &Plan, domain: &Domain) -> Result<()> {
        for step in plan.domain_steps() {
            let (DomainStep::CheckMemory { image } | DomainStep::RemoveMemory { image }) = step else {
                continue;
            };
            // A file that cannot be looked at is reported by the step.
            if image.named().is_none() {
                continue;
            }
            if let Err(error) = self.registry.memory_size(domain, image).await
                && error.kind() == ErrorKind::Unsupported
            {
                return Err(error
                    .context(format!("the memory image {image}"))
                    .state("no changes made")
                    .advise("use a domsnap whose hypervisor reads this address"));
            }
        }
        Ok(())
    }
}

/// Returns true if the hypervisor has the disk open as its configured path names it.
///
/// # Errors
/// [`ErrorKind::Refused`] where it has another image open, or the disk not at all. Changes to the one would
/// not be made to the other.
pub(super) async fn is_attached(
    live: &Live,
    backend: &AnyDiskSnapshotter,
    record: &DiskRecord,
) -> Result<bool> {
    let path = &record.disk.address;
    let target = &record.disk.target;
    let Some(disk) = live.disk(target) else {
        let known: Vec<String> =
            live.seen().disks.iter().map(|disk| format!("{} ({})", disk.target, disk.address)).collect();
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{target}: {path} is not open in the running domain; what it has is: {}",
                known.join(", ")
            ),
        )
        .state("no changes made")
        .advise("shut the domain down, or register it again with the disks that it has"));
    };
    if let Some(identity) = backend.identity(&record.disk).await?
        && disk.has_open(&identity).await?
    {
        return Ok(true);
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!("{target}: the running domain has another image open than {path} names now"),
    )
    .state("no changes made")
    .advise("if a file was moved or replaced under the running domain, put it back, or shut the domain down first"))
}

/// The chains that the configured paths of a domain's disks open now.
pub(in crate::service) async fn chains_of(registry: &Registry, domain: &Domain) -> Result<Vec<OpenChain>> {
    let mut chains = Vec::new();
    for record in &domain.disks {
        let layers = registry.serving(&record.disk)?.open_chain(record).await?;
        chains.push(OpenChain { target: record.disk.target.clone(), layers });
    }
    Ok(chains)
}
