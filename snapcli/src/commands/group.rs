//! `create`, `revert` and `delete` of several domains as one.

use snapcore::service::{CreateRequest, DeleteRequest, DomainRef, GroupOutcome, Request, RevertRequest};
use snapcore::{Result, SnapshotName};

use crate::answer::Answer;
use crate::commands::change::{created, guest_now, names, pause_summary, plan_document, plan_text, remarks};
use crate::commands::power;
use crate::documents::{CreateDoc, GroupDoc, GroupDomainDoc, GroupPlanDoc, RevertDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::units;

/// A name for a snapshot that is free in all of these domains.
pub fn free_name(session: &Session, domains: &[DomainRef]) -> Result<SnapshotName, Failure> {
    let mut name = SnapshotName::of_time(jiff::Timestamp::now())?;
    // One that is free in the last may be taken in the first. Each turn but the last adds to the name.
    for _ in 0..=domains.len() {
        let before = name.clone();
        for domain in domains {
            let free = session.service.free_name(domain, &name);
            name = session.ask(free).map_err(Failure::of_plan)?;
        }
        if name == before {
            break;
        }
    }
    Ok(name)
}

/// `domsnap create --group`
pub fn create(session: &Session, domains: &[DomainRef], request: CreateRequest) -> Result<Answer, Failure> {
    let (name, then) = (request.name.clone(), request.then);
    let outcome = session.change(session.service.create_group(domains, request, session.cancel()))?;
    let GroupOutcome { group, outcomes, .. } = outcome;
    let mut each = Vec::new();
    for outcome in outcomes {
        let domain = DomainRef::Name(outcome.domain.clone());
        let power = power::after_create(&outcome, then);
        let CreateDoc { domain, snapshot, outcome, .. } = created(session, &domain, &name, outcome)?;
        each.push(GroupDomainDoc { domain, snapshot: Some(snapshot), outcome, power });
    }
    Ok(session.changed(GroupDoc { group, domains: each }, |document| {
        let mut text = format!("created snapshot {name} of {} at one instant\n", listed(document));
        for member in &document.domains {
            let pause = pause_summary(member.power, &member.outcome);
            let memory = member.snapshot.as_ref().and_then(|snapshot| snapshot.memory.as_ref());
            let what = if memory.is_some() { "disks and memory" } else { "disks" };
            text.push_str(&format!("{}: {what}{pause}\n{}", member.domain, remarks(&member.outcome)));
        }
        text
    }))
}

/// `domsnap revert --group`
pub fn revert(session: &Session, domains: &[DomainRef], request: RevertRequest) -> Result<Answer, Failure> {
    let name = request.name.clone();
    let outcome = session.change(session.service.revert_group(domains, request, session.cancel()))?;
    let GroupOutcome { group, outcomes, .. } = outcome;
    let each = outcomes.into_iter().map(|outcome| {
        let power = power::after_revert(session, &DomainRef::Name(outcome.domain.clone()), &outcome);
        GroupDomainDoc { domain: outcome.domain.clone(), snapshot: None, outcome, power }
    });
    let document = GroupDoc { group, domains: each.collect() };
    Ok(session.changed(document, |document| {
        let mut text = format!("reverted {} to {name}\n", listed(document));
        for member in &document.domains {
            let GroupDomainDoc { domain, outcome, power, .. } = member;
            let of_one = RevertDoc { domain: domain.clone(), outcome: outcome.clone(), power: *power };
            let kept = if outcome.kept { "; the previous state is kept for `domsnap undo`" } else { "" };
            let (guest, notes) = (guest_now(&of_one), remarks(outcome));
            text.push_str(&format!("{domain}: reverted{kept}{guest}\n{notes}"));
        }
        text
    }))
}

/// `domsnap delete --group`
pub fn delete(session: &Session, domains: &[DomainRef], request: DeleteRequest) -> Result<Answer, Failure> {
    let deleted = request.names.clone();
    let outcome = session.change(session.service.delete_group(domains, request, session.cancel()))?;
    let GroupOutcome { group, outcomes, .. } = outcome;
    let of_one = |outcome: snapcore::service::Outcome| GroupDomainDoc {
        domain: outcome.domain.clone(),
        snapshot: None,
        outcome,
        power: None,
    };
    let document = GroupDoc { group, domains: outcomes.into_iter().map(of_one).collect() };
    Ok(session.changed(document, |document| {
        let mut text = format!("deleted {} of {}\n", names(&deleted), listed(document));
        for member in &document.domains {
            let moved = units::bytes(member.outcome.bytes_moved);
            text.push_str(&format!("{}: {moved} moved\n{}", member.domain, remarks(&member.outcome)));
        }
        text
    }))
}

/// Plans a request on a group.
pub fn dry_run(session: &Session, domains: &[DomainRef], request: &Request) -> Result<Answer, Failure> {
    let planned = session.service.plan_group(domains, request);
    let plans = session.ask(planned).map_err(Failure::of_plan)?;
    let each = plans.into_iter().map(|(domain, plan)| plan_document(domain.to_string(), None, plan));
    Ok(session.reported(GroupPlanDoc { domains: each.collect() }, |document| {
        let texts = document.domains.iter().map(|member| plan_text(&member.domain, &member.plan));
        texts.collect::<String>() + "no changes made\n"
    }))
}

fn listed(document: &GroupDoc) -> String {
    let names = document.domains.iter().map(|member| member.domain.as_str());
    names.collect::<Vec<_>>().join(", ")
}
