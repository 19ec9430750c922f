//! Plans of what concerns records alone: holds, names, descriptions, times of expiry. And what they decide
//! about deletes: what is held stays, what was deferred goes when its last hold has ended.

use std::collections::BTreeSet;

use jiff::Timestamp;

use super::{Planner, refuse_reserved, refuse_taken};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::hold::Hold;
use crate::name::SnapshotName;
use crate::request::{AmendRequest, HoldRequest, ReleaseRequest, Request};
use crate::shape::Plan;
use crate::shell::shell_command;
use crate::snapshot::{Snapshot, SnapshotId, SnapshotRole, SnapshotTree};
use crate::step::Edit;

/// Plans a request that changes records alone ([`Request::is_of_records`]), at the time `now`.
///
/// # Errors
/// [`ErrorKind::NotFound`], [`ErrorKind::Exists`], [`ErrorKind::Usage`], [`ErrorKind::Refused`]. Nothing was
/// touched.
pub(crate) fn records_only(
    domain: &Domain,
    tree: &SnapshotTree,
    request: &Request,
    now: Timestamp,
) -> Result<Plan> {
    let named = |name: &SnapshotName| {
        let found = tree.named(name).map_err(|error| error.context(format!("domain {}", domain.name)))?;
        let mut snapshot = found.clone();
        // Holds that have ended go with the next change.
        snapshot.holds.retain(|hold| hold.is_active(now));
        Ok::<_, Error>(snapshot)
    };
    let (operation, snapshot) = match request {
        Request::Hold(hold) => ("hold", held(domain, named(&hold.name)?, hold, now)?),
        Request::Release(release) => ("release", released(domain, named(&release.name)?, release)?),
        Request::Amend(amend) => ("amend", amended(domain, tree, named(&amend.name)?, amend)?),
        Request::Create(_)
        | Request::Revert(_)
        | Request::Delete(_)
        | Request::Tidy
        | Request::Undo(_)
        | Request::Clone(_) => {
            return Err(Error::new(ErrorKind::Internal, "the request changes more than records"));
        }
    };
    snapshot.check_holds().map_err(|why| {
        Error::new(ErrorKind::Usage, format!("snapshot {}: {why}", snapshot.name)).state("no changes made")
    })?;
    let name = snapshot.name.clone();
    let changed = tree.get(snapshot.id) != Some(&snapshot);
    let commit = if changed { vec![Edit::Amend { snapshot: Box::new(snapshot) }] } else { Vec::new() };
    Ok(Plan::new(operation, vec![name]).commit(commit))
}

fn held(domain: &Domain, mut snapshot: Snapshot, request: &HoldRequest, now: Timestamp) -> Result<Snapshot> {
    let HoldRequest { holder, reason, until, process, .. } = request;
    if holder.is_automatic() && process.is_none() {
        return Err(Error::new(
            ErrorKind::Usage,
            format!("{holder}: names that begin with clone:, serve: and export: are domsnap's own"),
        )
        .state("no changes made")
        .advise("choose another holder"));
    }
    if until.is_some_and(|until| until <= now) {
        return Err(Error::new(ErrorKind::Usage, "the hold would end before it begins")
            .state("no changes made")
            .advise("give a time in the future with --until"));
    }
    if snapshot.holds.iter().any(|hold| hold.holder == *holder) {
        let (name, snapshot) = (domain.name.as_str(), snapshot.name.as_str());
        let release = ["domsnap", "release", name, snapshot, "--holder", holder.as_str()];
        return Err(Error::new(
            ErrorKind::Exists,
            format!("{holder} holds snapshot {snapshot} of domain {name} already"),
        )
        .state("no changes made")
        .advise(format!(
            "give another holder with --holder, or release that hold first: `{}`",
            shell_command(release)
        )));
    }
    let hold = Hold::new(holder.clone(), now).reason(reason.clone());
    snapshot.holds.push(hold.until(*until).process(process.clone()));
    Ok(snapshot)
}

fn released(domain: &Domain, mut snapshot: Snapshot, request: &ReleaseRequest) -> Result<Snapshot> {
    let ReleaseRequest { holder, force, .. } = request;
    let Some(hold) = snapshot.holds.iter().find(|hold| hold.holder == *holder) else {
        let by: Vec<String> = snapshot.holds.iter().map(ToString::to_string).collect();
        let (name, of) = (&snapshot.name, &domain.name);
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("{holder} does not hold snapshot {name} of domain {of}"),
        )
        .state("no changes made")
        .advise(match by.is_empty() {
            true => "nothing holds it".to_owned(),
            false => format!("it is held by {}: name one of them with --holder", by.join(", ")),
        }));
    };
    if holder.is_automatic() && !force {
        let ends = match &hold.process {
            Some(process) => format!("it ends with process {}", process.pid),
            None => "it ends with what it is for".to_owned(),
        };
        return Err(Error::new(ErrorKind::Refused, format!("the hold of {holder} is domsnap's own: {ends}"))
            .state("no changes made")
            .advise("--force releases it all the same: what it is for may then fail"));
    }
    snapshot.holds.retain(|hold| hold.holder != *holder);
    Ok(snapshot)
}

fn amended(
    domain: &Domain,
    tree: &SnapshotTree,
    mut snapshot: Snapshot,
    request: &AmendRequest,
) -> Result<Snapshot> {
    if let Some(name) = request.rename.as_ref().filter(|name| **name != snapshot.name) {
        refuse_reserved(name)?;
        refuse_taken(domain, tree, name)?;
        snapshot.name = name.clone();
    }
    if let Some(description) = &request.description {
        snapshot.description.clone_from(description);
    }
    if let Some(expires) = request.expires {
        snapshot.expires = expires;
    }
    Ok(snapshot)
}

/// The note on a snapshot whose deletion is deferred.
pub(super) fn held_note(snapshot: &Snapshot, now: Timestamp) -> String {
    let by: Vec<String> = snapshot.active_holds(now).map(ToString::to_string).collect();
    format!("snapshot {} is held by {}: it is deleted when the last hold ends", snapshot.name, by.join(", "))
}

impl Planner<'_> {
    /// The snapshots that have expired and are not held, except the one that the current state derives from.
    pub(super) fn expired(&self, now: Timestamp) -> impl Iterator<Item = &Snapshot> {
        self.tree.taken().filter(move |snapshot| {
            let over = snapshot.expires.is_some_and(|expires| expires <= now);
            over && self.domain.current != Some(snapshot.id) && snapshot.active_holds(now).next().is_none()
        })
    }

    /// Takes the held snapshots out of `doomed`. Returns them as they are recorded when their deletion is
    /// deferred.
    pub(super) fn defer_held(&self, doomed: &mut BTreeSet<SnapshotId>, now: Timestamp) -> Vec<Snapshot> {
        let held = self.tree.iter().filter(|snapshot| snapshot.active_holds(now).next().is_some());
        let held = held.filter(|snapshot| doomed.contains(&snapshot.id));
        let held: Vec<Snapshot> = held.map(|snapshot| snapshot.clone().deferred(true)).collect();
        for snapshot in &held {
            doomed.remove(&snapshot.id);
        }
        held
    }

    /// The edit that gives the previous state up; none where there is none.
    pub(super) fn drop_previous(&self) -> Option<Edit> {
        let dropped = self.tree.previous()?.clone().role(SnapshotRole::Dropped);
        Some(Edit::Amend { snapshot: Box::new(dropped) })
    }

    /// The edit that makes the hidden snapshot `name` the previous state.
    pub(super) fn promote(&self, name: &SnapshotName) -> Result<Option<Edit>> {
        let saved = self.tree.iter().find(|snapshot| snapshot.name == *name).ok_or_else(|| {
            Error::new(ErrorKind::Internal, format!("the saved state {name} is not recorded"))
                .state("no changes made")
        })?;
        let snapshot = saved.clone().role(SnapshotRole::Previous);
        Ok(Some(Edit::Amend { snapshot: Box::new(snapshot) }))
    }

    /// Removes the previous state, at the user's request.
    /// With `replaced_by`, only if the revert that replaced it was then or before.
    pub(super) async fn forget(&self, replaced_by: Option<Timestamp>) -> Result<Plan> {
        let is_old = |snapshot: &&Snapshot| {
            snapshot.role == SnapshotRole::Dropped || replaced_by.is_none_or(|time| snapshot.created <= time)
        };
        let previous = self.tree.iter().filter(|snapshot| snapshot.role != SnapshotRole::Snapshot);
        let previous = previous.filter(is_old);
        let doomed: BTreeSet<SnapshotId> = previous.map(|snapshot| snapshot.id).collect();
        self.drop_snapshots("forget", &doomed, false).await
    }

    /// Removes earlier previous states, and snapshots whose deletion was deferred until now. Then it does
    /// deferred merges. If the first cannot be removed now, that is a note, and the merges are done all the
    /// same.
    pub(super) async fn tidy(&self) -> Result<Plan> {
        let due: BTreeSet<SnapshotId> = self.tree.due(Timestamp::now()).map(|snapshot| snapshot.id).collect();
        let why = match due.is_empty() {
            true => None,
            false => match self.drop_snapshots("tidy", &due, false).await {
                Ok(plan) => return Ok(plan),
                Err(error) => Some(error.to_string()),
            },
        };
        let mut plan = self.drop_snapshots("tidy", &BTreeSet::new(), false).await?;
        plan.notes.extend(why.map(|why| format!("states that are not needed stay for now: {why}")));
        Ok(plan)
    }
}

impl SnapshotTree {
    /// The snapshots that are to be removed at the time `now` without a further request: earlier previous
    /// states, and snapshots whose deletion was deferred and that are no longer held.
    pub(crate) fn due(&self, now: Timestamp) -> impl Iterator<Item = &Snapshot> {
        self.iter().filter(move |snapshot| {
            let free = || snapshot.active_holds(now).next().is_none();
            snapshot.role == SnapshotRole::Dropped || (snapshot.deferred && free())
        })
    }
}
