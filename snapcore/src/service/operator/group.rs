//! Carries a request out on several domains as one: in all of them, or in none.
//!
//! The domains are locked in the order of their names, so that two commands never wait for each other. What
//! can be refused is refused for all before the first journal begins. Then the operations run side by side
//! (`engine/group.rs` says what is durable before what). The domain with the first name decides.

use std::collections::HashMap;

use tokio_util::sync::CancellationToken;

use super::{Locked, Operator, outcome_of};
use crate::address::DiskIdentity;
use crate::backend::Guard;
use crate::catalogue::{Change, Entry};
use crate::domain::Domain;
use crate::engine::{GroupRun, Run, Verdict, side_by_side};
use crate::error::{Error, ErrorKind, Result};
use crate::group::{GroupId, GroupMember, MOST_DOMAINS, OperationGroup, SnapshotGroup};
use crate::hypervisor::{DomainStep, Quiesce};
use crate::name::{DomainName, SnapshotName};
use crate::operation::{Operation, OperationId, OperationState};
use crate::request::{CreateRequest, DeleteScope, KeepPrevious, Request};
use crate::service::images::identity_of;
use crate::service::locator::Live;
use crate::service::planning::Watched;
use crate::service::{BoxFuture, DomainRef, GroupOutcome, RecoveryReport};
use crate::shape::{FinishUnit, HypervisorStep, Plan};
use crate::snapshot::SnapshotTree;

/// A domain of the group, locked.
struct Member {
    locked: Locked,
    live: Option<Live>,
    recovered: Vec<RecoveryReport>,
}

impl Member {
    fn entry(&self) -> &Entry {
        &self.locked.located.entry
    }
}

/// The operation of one domain, ready to be run.
struct Prepared {
    request: Request,
    plan: Plan,
    watched: Watched,
    prologue: Vec<Change>,
    _held: Vec<Guard>,
}

impl Operator {
    /// Carries `request` out on all domains that `references` name, or on none.
    pub(in crate::service) fn change_group(
        &self,
        references: Vec<DomainRef>,
        request: Request,
        cancel: CancellationToken,
    ) -> BoxFuture<'_, Result<GroupOutcome>> {
        Box::pin(async move {
            refuse_options(&request)?;
            let mut members = Vec::new();
            for reference in self.in_order(references).await? {
                let locked = self.locks.lock(&reference, &cancel).await?;
                members.push(Member { locked, live: None, recovered: Vec::new() });
            }
            for member in &mut members {
                self.recover_member(member, &cancel).await?;
            }
            let all: Vec<(&Entry, Option<&Live>)> =
                members.iter().map(|member| (member.entry(), member.live.as_ref())).collect();
            let (group, requests) = self.requests(&all, &request).await?;
            let mut prepared = Vec::new();
            for (member, request) in members.iter_mut().zip(requests) {
                prepared.push(self.prepare_member(member, request).await?);
            }
            let operations: Vec<GroupMember> = members
                .iter()
                .map(|member| GroupMember::new(member.entry().domain.name.clone(), OperationId::fresh()))
                .collect();
            let (decider, others) = operations.split_first().ok_or_else(without_members)?;
            if let Some(first) = prepared.first_mut() {
                first.plan.finish.push(commit_step(others));
            }
            // Order of durability: see `Operator::run`. What enters the catalogue here is true of each domain
            // alone, whatever becomes of the group.
            for (member, prepared) in members.iter_mut().zip(&mut prepared) {
                prepared.prologue = self.record(&mut member.locked, &prepared.request).await?;
            }
            self.ledger.record_neighbours().await;
            let stop = cancel.child_token();
            let run =
                GroupRun::new(OperationGroup::new(group, decider.clone()), operations.clone(), stop.clone());
            let works =
                members.iter_mut().zip(&mut prepared).enumerate().map(|(index, (member, prepared))| {
                    let (seat, stop) = (run.seat(index), &stop);
                    let prologue = std::mem::take(&mut prepared.prologue);
                    let Member { locked, live, .. } = member;
                    let Prepared { plan, watched, .. } = prepared;
                    async move {
                        let (live, watched) = (live.as_ref(), Some(&*watched));
                        let done =
                            self.run_seated(locked, live, watched, plan, prologue, Some(seat), stop).await;
                        seat.end();
                        done
                    }
                });
            let runs = side_by_side(works.collect()).await;
            let runs = all_or_error(runs, run.failed())?;
            let mut outcomes = Vec::new();
            for ((member, Prepared { plan, _held, .. }), mut run) in
                members.iter_mut().zip(prepared).zip(runs)
            {
                self.follow_moved_disk(&mut member.locked, &mut run.warnings).await;
                drop(_held);
                let entry = member.entry();
                let saver = self.registry.hypervisor(&entry.domain.hypervisor).ok();
                let mut outcome = outcome_of(entry, saver.as_deref(), plan, run);
                self.remove_due(&mut member.locked, &mut outcome, &cancel).await;
                outcome.notes.splice(0..0, std::mem::take(&mut member.locked.located.notes));
                outcome.recovered = std::mem::take(&mut member.recovered);
                outcomes.push(outcome);
            }
            Ok(GroupOutcome { group, outcomes })
        })
    }

    /// Plans a request on a group without carrying it out: the plan of each domain, in the order of names.
    pub(in crate::service) async fn plan_group(
        &self,
        references: Vec<DomainRef>,
        request: Request,
    ) -> Result<Vec<(DomainName, Plan)>> {
        refuse_options(&request)?;
        let mut found = Vec::new();
        for reference in self.in_order(references).await? {
            let located = self.locator.locate(&reference).await?;
            let entry = located.entry;
            let manifests = self.authority.manifests(&entry.domain)?;
            if located.catalogued {
                self.authority.require(&manifests, &entry).await?;
            }
            let live = self.locator.connect(&entry.domain).await?;
            found.push((entry, manifests, live));
        }
        let all: Vec<(&Entry, Option<&Live>)> =
            found.iter().map(|(entry, _, live)| (entry, live.as_ref())).collect();
        let (_, requests) = self.requests(&all, &request).await?;
        let mut plans = Vec::new();
        for ((entry, manifests, live), request) in found.iter().zip(requests) {
            let live = live.as_ref();
            let plan = self.planning.plan_for(entry, live, &request).await?;
            self.planning.preflight(&entry.domain, manifests, live, &plan, true).await?;
            if live.is_none() {
                self.planning.refuse_start(&plan, entry).await?;
            }
            let saver = self.registry.hypervisor(&entry.domain.hypervisor).ok();
            plans.push((entry.domain.name.clone(), plan.shown(saver.as_deref())));
        }
        let others = found.iter().skip(1);
        let others: Vec<GroupMember> = others
            .map(|(entry, ..)| GroupMember::new(entry.domain.name.clone(), OperationId::fresh()))
            .collect();
        if let Some((_, plan)) = plans.first_mut() {
            plan.finish.push(commit_step(&others));
        }
        Ok(plans)
    }

    /// The references in the order of the domains' names.
    async fn in_order(&self, references: Vec<DomainRef>) -> Result<Vec<DomainRef>> {
        if references.len() < 2 {
            return Err(Error::new(ErrorKind::Usage, "a group has two domains or more")
                .state("no changes made")
                .advise("join their names by commas, or leave --group out"));
        }
        if references.len() > MOST_DOMAINS {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("a group of {} domains is too large: {MOST_DOMAINS} are the most", references.len()),
            )
            .state("no changes made"));
        }
        let mut named: Vec<(DomainName, DomainRef)> = Vec::new();
        for reference in references {
            let name = self.locator.locate(&reference).await?.entry.domain.name;
            if named.iter().any(|(known, _)| *known == name) {
                return Err(Error::new(ErrorKind::Usage, format!("domain {name} is named twice"))
                    .state("no changes made")
                    .advise("name each domain of the group once"));
            }
            named.push((name, reference));
        }
        named.sort_by(|(one, _), (other, _)| one.cmp(other));
        Ok(named.into_iter().map(|(_, reference)| reference).collect())
    }

    /// Recovers a domain of the group, and connects to it.
    async fn recover_member(&self, member: &mut Member, cancel: &CancellationToken) -> Result<()> {
        let Member { locked, live, recovered } = member;
        if locked.located.catalogued {
            // The recovery of a domain before it may have recorded in this one what its group decided.
            let name = locked.located.entry.domain.name.clone();
            locked.located.entry = self.records.load(&name).await?;
        }
        self.end_interrupted_start(&locked.located.entry.domain).await?;
        *live = self.locator.connect(&locked.located.entry.domain).await?;
        if locked.located.catalogued {
            self.authority.require(&locked.manifests, &locked.located.entry).await?;
            *recovered = self.recover_entry(locked, live, cancel).await?;
        }
        match locked.located.unconfirmed.take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// The request for each domain, and the identity of the group that is made or meant.
    async fn requests(
        &self,
        members: &[(&Entry, Option<&Live>)],
        request: &Request,
    ) -> Result<(GroupId, Vec<Request>)> {
        self.refuse_same_files(members).await?;
        self.refuse_without_groups(members)?;
        let each = members.len();
        match request {
            Request::Create(create) => {
                let id = GroupId::fresh();
                let domains = members.iter().map(|(entry, _)| entry.domain.name.clone()).collect();
                let group = SnapshotGroup::new(id, domains);
                let runs = members.iter().any(|(_, live)| live.is_some());
                let of_member = |(_, live): &(&Entry, Option<&Live>)| {
                    let mut create = create.clone();
                    if live.is_none() && runs {
                        create = at_rest(create);
                    }
                    create.group = Some(group.clone());
                    Request::Create(create)
                };
                Ok((id, members.iter().map(of_member).collect()))
            }
            Request::Revert(revert) => {
                let id = require_one_group(members, &revert.name)?;
                Ok((id, vec![request.clone(); each]))
            }
            Request::Delete(delete) => {
                let mut first = None;
                for name in &delete.names {
                    first.get_or_insert(require_one_group(members, name)?);
                }
                let id = first.ok_or_else(without_members)?;
                let runs = members.iter().any(|(_, live)| live.is_some());
                let of_member = |(_, live): &(&Entry, Option<&Live>)| {
                    let mut delete = delete.clone();
                    delete.group = true;
                    if live.is_none() && runs {
                        delete.limit = 0;
                    }
                    Request::Delete(delete)
                };
                Ok((id, members.iter().map(of_member).collect()))
            }
            _ => Err(Error::new(ErrorKind::Internal, "the request is not one for a group")),
        }
    }

    /// Refuses domains that share a file which one of them writes, or the process that runs them.
    async fn refuse_same_files(&self, members: &[(&Entry, Option<&Live>)]) -> Result<()> {
        let mut known: HashMap<DiskIdentity, &Domain> = HashMap::new();
        for (entry, _) in members {
            for record in &entry.domain.disks {
                let Some(identity) = identity_of(&self.registry, &record.disk).await? else { continue };
                match known.insert(identity, &entry.domain) {
                    Some(other) if other.name != entry.domain.name => {
                        return Err(Error::new(
                            ErrorKind::Refused,
                            format!(
                                "domains {} and {} write the same file, {}",
                                other.name, entry.domain.name, record.disk.address
                            ),
                        )
                        .state("no changes made")
                        .advise(
                            "give each domain images of its own, or leave one of them out of the group",
                        ));
                    }
                    _ => {}
                }
            }
        }
        let mut processes: HashMap<u32, &DomainName> = HashMap::new();
        for (entry, live) in members {
            for process in live.map(|live| live.processes()).unwrap_or_default() {
                if let Some(other) = processes.insert(process, &entry.domain.name)
                    && *other != entry.domain.name
                {
                    return Err(Error::new(
                        ErrorKind::Refused,
                        format!(
                            "domains {other} and {} are one running machine, process {process}",
                            entry.domain.name
                        ),
                    )
                    .state("no changes made")
                    .advise("register the disks of both as one domain, or leave one of them out"));
                }
            }
        }
        Ok(())
    }

    /// Refuses running domains of a hypervisor that cannot pause them together with others.
    fn refuse_without_groups(&self, members: &[(&Entry, Option<&Live>)]) -> Result<()> {
        for (entry, live) in members {
            let profile = self.registry.hypervisor(&entry.domain.hypervisor).ok();
            let Some(profile) = profile.map(|saver| saver.profile()).filter(|_| live.is_some()) else {
                continue;
            };
            if !profile.groups {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    format!(
                        "domain {} runs under {}, whose domains cannot be paused at one instant with others",
                        entry.domain.name, profile.title
                    ),
                )
                .state("no changes made")
                .advise(format!(
                    "leave {} out of the group, or shut it down first: its disks take part then",
                    entry.domain.name
                )));
            }
        }
        Ok(())
    }

    /// Locks the disks of a domain and plans its operation. Nothing is begun.
    async fn prepare_member(&self, member: &mut Member, request: Request) -> Result<Prepared> {
        let Member { locked, live, .. } = member;
        let held = self.hold_disks(&locked.located.entry.domain, live.as_ref()).await?;
        let (plan, watched) = self.prepare(locked, live.as_ref(), &request).await?;
        if !plan.has_steps() && plan.commit.is_empty() {
            let detail = format!("there is nothing to do in domain {}", locked.located.entry.domain.name);
            return Err(Error::new(ErrorKind::Internal, detail).state("no changes made"));
        }
        Ok(Prepared { request, plan, watched, prologue: Vec::new(), _held: held })
    }

    /// The decision about an operation that is ready, from the journal of the domain that decides. Of other
    /// operations nothing has to be known.
    ///
    /// Where the deciding operation was interrupted before its commit point, it is marked as being undone, so
    /// that the decision stands before anything is undone here.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] while another process works in the deciding domain.
    pub(super) async fn verdict(&self, own: &DomainName, operation: &Operation) -> Result<Verdict> {
        let (OperationState::Ready, Some(group)) = (operation.state, &operation.group) else {
            return Ok(Verdict::Unknown);
        };
        let GroupMember { domain: decider, operation: id } = &group.decider;
        if let Some(verdict) = self.decided(decider, *id).await? {
            return Ok(verdict);
        }
        // The process that ran the group has ended, or this domain's lease would not be free. The decider's
        // lease makes sure that no other one recovers it just now.
        let _lease = self.ledger.lease_for_a_moment(decider).await.map_err(|error| {
            error.context(format!(
                "finding out if the {} of domain {own} has happened, which domain {decider} decides",
                operation.plan.operation
            ))
        })?;
        if let Some(verdict) = self.decided(decider, *id).await? {
            return Ok(verdict);
        }
        let Some(entry) = self.records.find(decider).await? else { return Ok(Verdict::Undone) };
        let reason = format!("the group was undone by the recovery of domain {own}");
        let changes = vec![Change::Operation(*id, OperationState::Undoing, Some(reason))];
        self.ledger.commit(decider, entry.revision, changes).await?;
        Ok(Verdict::Undone)
    }

    /// The decision, as far as the journal of the deciding domain has it.
    async fn decided(&self, decider: &DomainName, id: OperationId) -> Result<Option<Verdict>> {
        let found = self.ledger.catalogue().operation(decider, id).await?;
        Ok(match found.map(|operation| operation.state) {
            // It ends only when all others have committed: one that is not there any more did not happen.
            None | Some(OperationState::Undoing | OperationState::Undone) => Some(Verdict::Undone),
            Some(OperationState::Finishing | OperationState::Done) => Some(Verdict::Committed),
            Some(
                OperationState::Planned
                | OperationState::Preparing
                | OperationState::Cutting
                | OperationState::Ready,
            ) => None,
        })
    }
}

/// The step with which the operation of the first domain waits for the others.
fn commit_step(others: &[GroupMember]) -> FinishUnit {
    let names: Vec<&str> = others.iter().map(|member| member.domain.as_str()).collect();
    let summary = format!("record in {} that the group's operation has happened", names.join(", "));
    FinishUnit::Domain(HypervisorStep::new(DomainStep::CommitOthers { members: others.to_vec() }, summary))
}

fn without_members() -> Error {
    Error::new(ErrorKind::Internal, "a group without domains or snapshots")
}

/// A create without what only a running domain can be asked for.
fn at_rest(mut create: CreateRequest) -> CreateRequest {
    create.memory = None;
    create.live = None;
    create.budget = None;
    create.compress = None;
    create.quiesce = Quiesce::No;
    create.then = None;
    create
}

/// Refuses what is asked for with regard to one domain alone.
fn refuse_options(request: &Request) -> Result<()> {
    let refused = |what: &str, advice: &str| {
        Err(Error::new(ErrorKind::Usage, format!("{what} cannot be asked of a group"))
            .state("no changes made")
            .advise(advice))
    };
    match request {
        Request::Create(create) if !create.disks.is_empty() => {
            refused("--disk", "register each domain without the disks that are to be left out")
        }
        Request::Revert(revert) if revert.save_current.is_some() => {
            refused("--save-current", "create a snapshot of the group first, with `domsnap create --group`")
        }
        Request::Revert(revert) if revert.keep == KeepPrevious::Memory => refused(
            "--undo=memory",
            "create a snapshot of the group first, with `domsnap create --group`, or say --undo=disks",
        ),
        Request::Revert(revert) if !revert.skip.is_empty() => {
            refused("--disk", "revert the domains one by one, where a disk is to be left as it is")
        }
        Request::Revert(revert) if revert.config.is_some() || !revert.safety => {
            refused("--config or --no-safety", "they concern Xen, whose running domains are not in a group")
        }
        Request::Delete(delete) if delete.scope != DeleteScope::Only => {
            refused("--children", "name the snapshots that are to be deleted")
        }
        Request::Delete(delete) if delete.expired || delete.defer || delete.prune.is_some() => {
            refused("--expired or --defer", "name snapshots that are not held")
        }
        _ => Ok(()),
    }
}

/// The group whose snapshots of this name the domains have.
///
/// # Errors
/// [`ErrorKind::NotFound`] where a domain has none; [`ErrorKind::Refused`] where they are not of one group.
fn require_one_group(members: &[(&Entry, Option<&Live>)], name: &SnapshotName) -> Result<GroupId> {
    let mut found: Option<(GroupId, &DomainName)> = None;
    for (entry, _) in members {
        let own = &entry.domain.name;
        let tree: &SnapshotTree = &entry.tree;
        let snapshot = tree.named(name).map_err(|error| error.context(format!("domain {own}")))?;
        let refused = |what: String| {
            Error::new(ErrorKind::Refused, what).state("no changes made").advise(
                "snapshots that were not taken at one instant are reverted or deleted one by one, without --group",
            )
        };
        match (&snapshot.group, found) {
            (None, _) => {
                return Err(refused(format!("snapshot {name} of domain {own} belongs to no group")));
            }
            (Some(group), Some((id, other))) if group.id != id => {
                return Err(refused(format!(
                    "the snapshots {name} of domains {other} and {own} belong to different groups"
                )));
            }
            (Some(_), Some(_)) => {}
            (Some(group), None) => found = Some((group.id, own)),
        }
    }
    found.map(|(id, _)| id).ok_or_else(without_members)
}

/// The runs of all domains, or one error for the group. `failed` is the domain because of which all were
/// undone.
fn all_or_error(runs: Vec<Result<Run>>, failed: Option<usize>) -> Result<Vec<Run>> {
    let count = runs.len();
    let (mut done, mut errors) = (Vec::new(), Vec::new());
    for (index, run) in runs.into_iter().enumerate() {
        match run {
            Ok(run) => done.push(run),
            Err(error) => errors.push((index, error)),
        }
    }
    if errors.is_empty() {
        return Ok(done);
    }
    // The reason first; then what a recovery has to be run for.
    let first = errors.iter().position(|(index, _)| Some(*index) == failed).unwrap_or_default();
    let (index, mut error) = errors.swap_remove(first);
    let stuck: Vec<String> = errors
        .iter()
        .filter(|(_, error)| error.kind() == ErrorKind::NeedsRecovery)
        .map(|(_, error)| error.to_string())
        .collect();
    let undone = failed == Some(index);
    if !stuck.is_empty() {
        return Err(error
            .with_kind(ErrorKind::NeedsRecovery)
            .state(format!("also: {}", stuck.join("; ")))
            .advise("run `domsnap recover`"));
    }
    if undone && error.kind() != ErrorKind::NeedsRecovery {
        let all = format!("rolled back in all {count} domains of the group");
        error = match error.state_now() {
            None | Some("rolled back") => error.state(all),
            Some(own) => {
                let both = format!("{own}; {all}");
                error.state(both)
            }
        };
    }
    Err(error)
}
