//! Notes of a plan on state that the guest can write and that no snapshot contains.

use crate::domain::Domain;
use crate::hypervisor::GuestChange;
use crate::registry::Registry;
use crate::request::Request;
use crate::service::locator::Live;
use crate::shape::Plan;
use crate::step::Edit;

/// The notes on a plan.
pub(super) fn notes_on(
    registry: &Registry,
    domain: &Domain,
    live: Option<&Live>,
    request: &Request,
    plan: &Plan,
) -> Vec<String> {
    let machine = live.map(|live| &live.seen().machine);
    let outside = note_on_outside(outside(registry, domain, machine), request, plan);
    let shared = note_on_shared(shared(registry, domain, machine), request, plan);
    outside.into_iter().chain(shared).collect()
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
        Request::Revert(_) if gets_memory(plan) => return None,
        Request::Revert(_) => "not reverted: they stay in their later state",
        Request::Delete(_)
        | Request::Tidy
        | Request::Undo(_)
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

/// The state that the guest of a domain can write and that only a snapshot's memory contains.
pub(in crate::service) fn outside(
    registry: &Registry,
    domain: &Domain,
    machine: Option<&serde_json::Value>,
) -> Vec<String> {
    registry
        .hypervisor(&domain.hypervisor)
        .map_or_else(|_| Vec::new(), |saver| saver.outside(domain, machine))
}

/// Returns true if the guest continues with a snapshot's memory after a plan.
fn gets_memory(plan: &Plan) -> bool {
    let change = plan.guest().map(|(change, _)| change);
    matches!(change, Some(GuestChange::Restored | GuestChange::RecreatedFromMemory | GuestChange::Started))
}
