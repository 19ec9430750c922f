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
        let recovered = self.recover_unfinished(&mut locked, cancel).await?;
        let _names = self.reserve_names(&request, cancel).await?;
        let entry = &locked.located.entry;
        let plan = self.planning.plan_for(entry, None, &request).await?;
        self.planning.preflight(&entry.domain, &locked.manifests, None, &plan, false).await?;
        let shown = Box::new(plan.clone());
        self.events.report(Event::Planned { domain: entry.domain.name.clone(), plan: shown });
        let prologue = self.record(&mut locked, &request).await?;
        let run = self.run_plan(&mut locked, None, None, &plan, prologue, cancel).await?;
        let mut outcome = outcome_of(&locked.located.entry, None, plan, run);
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
