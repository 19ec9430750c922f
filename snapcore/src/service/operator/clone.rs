//! Makes new domains of a snapshot. The source's disks are neither locked nor changed, so it may run, also
//! without that this catalogue can reach it.
//!
//! **What is durable before what.** 1) The operation is in the source's journal before anything is made. 2)
//! The disks of all clones, in directories that no configuration names. 3) The directories get their names;
//! that is the cut. 4) The commit point, one transaction of the source: before it all clones are undone,
//! after it all are carried through. 5) Each clone enters the catalogue; then its manifests.

use tokio_util::sync::CancellationToken;

use super::{Locked, Operator, outcome_of};
use crate::catalogue::Lease;
use crate::engine::Engine;
use crate::error::{Error, ErrorKind, Result};
use crate::event::Event;
use crate::request::Request;
use crate::service::Outcome;

impl Operator {
    /// Carries out a [`Request::Clone`].
    pub(super) async fn make_clones(
        &self,
        mut locked: Locked,
        request: Request,
        cancel: &CancellationToken,
    ) -> Result<Outcome> {
        let mut recovered = Vec::new();
        if locked.located.catalogued {
            self.authority.require(&locked.manifests, &locked.located.entry).await?;
            // An interrupted operation may remove the snapshot, or merge one of its layers.
            let name = locked.located.entry.domain.name.clone();
            if !self.records.unfinished(&name).await?.is_empty() {
                let mut live = self.locator.connect(&locked.located.entry.domain).await?;
                recovered = self.recover_entry(&mut locked, &mut live, cancel).await?;
            }
        }
        if let Some(error) = locked.located.unconfirmed.take() {
            return Err(error);
        }
        let _names = self.reserve_names(&request, cancel).await?;
        let entry = &locked.located.entry;
        let plan = self.planning.plan_for(entry, None, &request).await?;
        self.planning.preflight(&entry.domain, &locked.manifests, None, &plan, false).await?;
        let shown = Box::new(plan.clone());
        self.events.report(Event::Planned { domain: entry.domain.name.clone(), plan: shown });
        let prologue = self.record(&mut locked, &request).await?;
        let engine = Engine {
            catalogue: self.ledger.catalogue(),
            registry: &self.registry,
            events: &self.events,
            manifests: &locked.manifests,
            live: None,
            watched: None,
        };
        let entry = &mut locked.located.entry;
        let run = engine.run(entry, plan.clone(), prologue, cancel).await.map_err(|error| {
            let names: Vec<&str> = plan.snapshots.iter().map(|name| name.as_str()).collect();
            error.context(format!("{} {} of domain {}", plan.operation, names.join(" "), entry.domain.name))
        })?;
        let mut outcome = outcome_of(entry, None, plan, run);
        outcome.notes.splice(0..0, std::mem::take(&mut locked.located.notes));
        outcome.recovered = recovered;
        Ok(outcome)
    }

    /// Locks the names of the new domains, which no domain may have.
    async fn reserve_names(&self, request: &Request, cancel: &CancellationToken) -> Result<Vec<Lease>> {
        let Request::Clone(clone) = request else {
            return Err(Error::new(ErrorKind::Internal, "the request makes no domains"));
        };
        self.records.require_new(&clone.clones).await?;
        let mut leases = Vec::new();
        for name in &clone.clones {
            leases.push(self.ledger.lease(name, cancel).await?);
        }
        // One may have been registered before it was locked.
        self.records.require_new(&clone.clones).await?;
        Ok(leases)
    }
}
