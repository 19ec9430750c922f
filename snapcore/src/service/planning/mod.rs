//! Planning: the effect of an operation on a domain as it is on the machine, and the obstacles to it. Changes
//! nothing but files of its own that it makes and removes as a test ([`probe`]).

mod live;
mod notes;
mod preflight;
mod probe;
mod users;

use std::sync::Arc;

use jiff::Timestamp;

use super::BoxFuture;
use super::authority::Authority;
use super::locator::Live;
use super::neighbours::Neighbours;
use crate::backend::InspectDepth;
use crate::catalogue::Entry;
use crate::domain::DiskRecord;
use crate::error::Result;
use crate::name::{DomainName, Target};
use crate::plan::DiskInput;
use crate::policy::PolicyReview;
use crate::registry::Registry;
use crate::request::{CreateDisk, DeleteRequest, Request};
use crate::shape::Plan;

pub(super) use live::chains_of;
pub(super) use notes::{outside, shared};
pub(super) use users::{Watched, Watcher};

/// Makes plans.
#[derive(Clone)]
pub(super) struct Planning {
    registry: Arc<Registry>,
    authority: Authority,
    neighbours: Neighbours,
}

/// The part of a disk in an operation.
enum Part {
    /// The disk takes part as it is.
    Whole,
    /// The disk takes part as a disk at rest, though the domain runs: its machine does not have the disk any
    /// more.
    AtRest,
    /// The disk takes no part; with the note on that, if any.
    Not(Option<String>),
}

impl Planning {
    /// The planning for domains of a catalogue.
    pub(super) fn new(registry: Arc<Registry>, authority: Authority, neighbours: Neighbours) -> Self {
        Self { registry, authority, neighbours }
    }

    /// The plan for `request` on the domain as it is on the machine.
    pub(super) fn plan_for<'a>(
        &'a self,
        entry: &'a Entry,
        live: Option<&'a Live>,
        request: &'a Request,
    ) -> BoxFuture<'a, Result<Plan>> {
        Box::pin(async move {
            let depth = match request {
                Request::Create(_) => InspectDepth::Active,
                Request::Clone(_) => InspectDepth::Layers,
                Request::Revert(_) | Request::Delete(_) | Request::Tidy | Request::Undo(_) => {
                    InspectDepth::Dependents
                }
                Request::Hold(_) | Request::Release(_) | Request::Amend(_) => {
                    return crate::plan::records_only(&entry.domain, &entry.tree, request, Timestamp::now());
                }
            };
            let (disks, without) = self.disks_for(entry, live, request, depth).await?;
            let alive = live.map(|live| self.alive(entry, live, request)).transpose()?;
            let saver = self.registry.hypervisor(&entry.domain.hypervisor).ok();
            let saver = saver.as_deref();
            let mut plan =
                crate::plan::plan(&entry.domain, &entry.tree, &disks, alive.as_ref(), saver, request).await?;
            plan.notes.extend(without);
            if let Some(live) = live {
                live.preflight(&plan, &[], false).await?;
            }
            let notes = notes::notes_on(&self.registry, entry, live, request, &plan);
            plan.notes.extend(notes);
            Ok(plan)
        })
    }

    /// What a run of the domain's policy would do at the time `now`; with `planned`, after it has taken a
    /// snapshot that is due.
    pub(super) async fn review(
        &self,
        entry: &Entry,
        live: Option<&Live>,
        now: Timestamp,
        planned: bool,
    ) -> Result<PolicyReview> {
        // Without a policy, no image needs to be read.
        crate::policy::policy_of(&entry.domain)?;
        let request = Request::Delete(DeleteRequest::new(Vec::new()));
        let (disks, _) = self.disks_for(entry, live, &request, InspectDepth::Dependents).await?;
        crate::policy::review(&entry.domain, &entry.tree, &disks, now, planned)
    }

    /// Reads the disks that take part in `request`. Returns notes on the others too.
    async fn disks_for(
        &self,
        entry: &Entry,
        live: Option<&Live>,
        request: &Request,
        depth: InspectDepth,
    ) -> Result<(Vec<DiskInput>, Vec<String>)> {
        let mut disks = Vec::new();
        let mut without = Vec::new();
        for record in &entry.domain.disks {
            let at_rest = match self.part(entry, record, live, request).await? {
                Part::Whole => false,
                Part::AtRest => true,
                Part::Not(note) => {
                    without.extend(note);
                    continue;
                }
            };
            let check = !matches!(request, Request::Tidy);
            disks.push(self.read_disk(record, live, depth, at_rest, check).await?);
        }
        if depth == InspectDepth::Dependents {
            let mut all: Vec<&mut DiskInput> = disks.iter_mut().collect();
            self.neighbours.add_neighbours(&entry.domain.name, &mut all).await?;
        }
        Ok((disks, without))
    }

    /// Reads a disk as it is on the machine. With `check`, it must be open there as its backend reads it.
    async fn read_disk(
        &self,
        record: &DiskRecord,
        live: Option<&Live>,
        depth: InspectDepth,
        at_rest: bool,
        check: bool,
    ) -> Result<DiskInput> {
        let backend = self.registry.serving(&record.disk)?;
        let mut state = backend
            .inspect(record, depth, live.and_then(|live| live.disk(&record.disk.target)))
            .await
            .map_err(|error| error.context(format!("reading disk {}", record.disk.target)))?;
        if let Some(live) = live {
            state.attached = !at_rest && live::is_attached(live, &*backend, record).await?;
            let attached = live.disk(&record.disk.target);
            state.served = state.attached && attached.is_some_and(|disk| disk.is_served());
            if state.attached && !state.served && check {
                let mut seen = live.seen().disks.iter();
                if let Some(seen) = seen.find(|disk| disk.member.as_ref() == Some(&record.disk.target)) {
                    backend.require_shown(&record.disk.address, seen).await?;
                }
            }
        }
        Ok(DiskInput { record: record.clone(), state, backend })
    }

    /// Reads every disk as a delete would find it, each by itself: one that cannot be read keeps no other
    /// from being looked at.
    pub(super) async fn read_each(
        &self,
        entry: &Entry,
        live: Option<&Live>,
    ) -> Vec<(Target, Result<DiskInput>)> {
        let mut all = Vec::new();
        for record in &entry.domain.disks {
            let at_rest = live.is_some_and(|live| live.disk(&record.disk.target).is_none());
            let read = self.read_disk(record, live, InspectDepth::Dependents, at_rest, false).await;
            all.push((record.disk.target.clone(), read));
        }
        self.add_neighbours_of_each(&entry.domain.name, &mut all).await;
        all
    }

    /// Adds other domains' images to the disks that were read. A disk for which that fails gets the error.
    async fn add_neighbours_of_each(&self, own: &DomainName, disks: &mut [(Target, Result<DiskInput>)]) {
        // It reads the images of all other domains: once for all disks, if none is in the way.
        let mut read: Vec<&mut DiskInput> =
            disks.iter_mut().filter_map(|(_, disk)| disk.as_mut().ok()).collect();
        if read.is_empty() || self.neighbours.add_neighbours(own, &mut read).await.is_ok() {
            return;
        }
        for (_, disk) in disks {
            let Ok(found) = disk else { continue };
            if let Err(error) = self.neighbours.add_neighbours(own, &mut [found]).await {
                *disk = Err(error);
            }
        }
    }

    /// Returns the part of a disk in what `request` does.
    async fn part(
        &self,
        entry: &Entry,
        record: &DiskRecord,
        live: Option<&Live>,
        request: &Request,
    ) -> Result<Part> {
        let target = &record.disk.target;
        let gone = self.registry.serving(&record.disk)?.is_gone(record).await?;
        let unplugged = live.is_some_and(|live| live.disk(target).is_none());
        Ok(match request {
            Request::Create(create) if gone || unplugged => {
                let stated = create.disks.iter().rev().find(|(known, _)| known == target);
                match stated {
                    Some((_, CreateDisk::Skip)) => Part::Not(Some(format!("{target}: left out, as asked"))),
                    _ => Part::Whole,
                }
            }
            // The plan itself has the note.
            Request::Revert(revert) if (gone || unplugged) && revert.skip.contains(target) => Part::Not(None),
            Request::Delete(_) | Request::Tidy | Request::Undo(_) if gone => Part::Not(Some(format!(
                "{target}: {} and all its layers are gone; `domsnap domain disk remove {} {target}` takes the disk out",
                record.disk.address, entry.domain.name
            ))),
            // A delete changes it like a disk at rest.
            Request::Delete(_) | Request::Tidy | Request::Undo(_) if unplugged => Part::AtRest,
            Request::Create(_)
            | Request::Revert(_)
            | Request::Delete(_)
            | Request::Tidy
            | Request::Undo(_)
            | Request::Hold(_)
            | Request::Release(_)
            | Request::Amend(_)
            | Request::Clone(_) => Part::Whole,
        })
    }
}
