//! Notes of a plan on state that the guest can write and that no snapshot contains.

use crate::catalogue::Entry;
use crate::domain::Domain;
use crate::hypervisor::{GuestChange, PowerAfter};
use crate::name::Target;
use crate::registry::Registry;
use crate::request::Request;
use crate::service::locator::Live;
use crate::shape::Plan;
use crate::step::Edit;

/// The notes on a plan.
pub(super) fn notes_on(
    registry: &Registry,
    entry: &Entry,
    live: Option<&Live>,
    request: &Request,
    plan: &Plan,
) -> Vec<String> {
    let domain = &entry.domain;
    let machine = live.map(|live| &live.seen().machine);
    let takes_part = |target: &Target| takes_part(entry, live, request, plan, target);
    let outside = note_on_outside(outside(registry, domain, machine, takes_part), request, plan);
    let shared = note_on_shared(shared(registry, domain, machine), request, plan);
    outside.into_iter().chain(shared).collect()
}

/// Returns true if the state of a disk is in the snapshot that a plan makes, or is brought back by it. The
/// file of a running machine's state is not reverted: memory brings that, or nothing does.
fn takes_part(entry: &Entry, live: Option<&Live>, request: &Request, plan: &Plan, target: &Target) -> bool {
    match request {
        Request::Create(_) => plan
            .commit
            .iter()
            .any(|edit| matches!(edit, Edit::AddSnapshot { snapshot } if snapshot.point(target).is_some())),
        Request::Revert(revert) => {
            let wanted = revert.wanted(&entry.tree).is_ok_and(|wanted| wanted.point(target).is_some());
            let closed = live.is_none() || revert.power == Some(PowerAfter::Off);
            wanted && closed && !revert.skip.contains(target)
        }
        // An undo reverts to what the last revert replaced.
        Request::Undo(_) => live.is_none(),
        Request::Delete(_)
        | Request::Tidy
        | Request::Hold(_)
        | Request::Release(_)
        | Request::Amend(_)
        | Request::Clone(_) => true,
    }
}

/// The note on state that only a snapshot's memory contains.
fn note_on_outside(outside: Vec<String>, request: &Request, plan: &Plan) -> Option<String> {
    let note = match request {
        Request::Create(_) => {
            let memory = plan
                .commit
                .iter()
                .any(|edit| matches!(edit, Edit::AddSnapshot { snapshot } if snapshot.memory.is_some()));
            match memory {
                true => {
                    "only in the snapshot's memory: a revert without it (--off) leaves them in their later state"
                }
                false => "not in the snapshot: a revert leaves them in their later state",
            }
        }
        Request::Revert(_) | Request::Undo(_) if gets_memory(plan) => return None,
        Request::Undo(undo) if undo.forget => return None,
        Request::Revert(_) | Request::Undo(_) => "not reverted: they stay in their later state",
        Request::Delete(_)
        | Request::Tidy
        | Request::Hold(_)
        | Request::Release(_)
        | Request::Amend(_)
        | Request::Clone(_) => return None,
    };
    (!outside.is_empty()).then(|| format!("{}: {note}", outside.join(", ")))
}

/// The note on state that no snapshot contains at all.
fn note_on_shared(shared: Vec<String>, request: &Request, plan: &Plan) -> Option<String> {
    let note = match request {
        Request::Create(_) => "not in the snapshot: a revert leaves them as they are then",
        Request::Revert(_) if gets_memory(plan) => {
            "not reverted: the guest's memory goes on with what it knew of them; mount them again in the guest"
        }
        Request::Revert(_) => "not reverted: they stay as they are",
        Request::Delete(_)
        | Request::Tidy
        | Request::Undo(_)
        | Request::Hold(_)
        | Request::Release(_)
        | Request::Amend(_)
        | Request::Clone(_) => return None,
    };
    (!shared.is_empty()).then(|| format!("{}: {note}", shared.join(", ")))
}

/// The state that the guest of a domain can write and that no snapshot contains at all.
pub(in crate::service) fn shared(
    registry: &Registry,
    domain: &Domain,
    machine: Option<&serde_json::Value>,
) -> Vec<String> {
    registry.hypervisor(&domain.hypervisor).map_or_else(|_| Vec::new(), |saver| saver.shared(domain, machine))
}

/// The state that the guest of a domain can write and that only a snapshot's memory contains, where the disks
/// of which `takes_part` is true are in the snapshot.
pub(in crate::service) fn outside(
    registry: &Registry,
    domain: &Domain,
    machine: Option<&serde_json::Value>,
    takes_part: impl Fn(&Target) -> bool,
) -> Vec<String> {
    let mut covered = domain.clone();
    covered.disks.retain(|record| takes_part(&record.disk.target));
    registry
        .hypervisor(&domain.hypervisor)
        .map_or_else(|_| Vec::new(), |saver| saver.outside(&covered, machine))
}

/// Returns true if the guest continues with a snapshot's memory after a plan.
fn gets_memory(plan: &Plan) -> bool {
    let change = plan.guest().map(|(change, _)| change);
    matches!(change, Some(GuestChange::Restored | GuestChange::RecreatedFromMemory | GuestChange::Started))
}
