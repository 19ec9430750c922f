//! What a domain does now: from what an operation told, or asked of its hypervisor.

use std::collections::HashMap;
use std::time::Duration;

use snapcore::service::{DomainRef, Outcome};
use snapcore::{Domain, DomainName, PowerAfter, Seen};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::documents::Power;
use crate::session::Session;

/// How long a list waits for a hypervisor: one that hangs, or serves somebody else, is passed over.
const AT_ONCE: Duration = Duration::from_secs(2);

/// What a domain does, its machine in a line, and why that cannot be told.
#[derive(Debug, Default)]
pub struct Now {
    /// What it does.
    pub power: Option<Power>,
    /// What its machine is.
    pub machine: Option<String>,
    /// Why that is not known.
    pub problem: Option<String>,
}

/// What `domain` does now.
pub fn now(session: &Session, domain: &DomainRef) -> Now {
    match session.ask(session.service.running(domain)) {
        Ok(seen) => {
            Now { power: Some(of(seen.as_ref())), machine: seen.map(|seen| seen.summary), problem: None }
        }
        Err(failure) => Now { problem: Some(failure.words()), ..Now::default() },
    }
}

/// What each of `domains` does, as far as it is told at once; nothing of those that no hypervisor runs.
pub fn of_all<'a>(
    session: &Session,
    domains: impl Iterator<Item = &'a Domain>,
) -> HashMap<DomainName, Power> {
    let names: Vec<DomainName> =
        domains.filter(|domain| domain.control.is_some()).map(|domain| domain.name.clone()).collect();
    let asked = async {
        let mut asked = JoinSet::new();
        for name in names {
            let service = session.service.clone();
            asked.spawn(async move {
                let domain = DomainRef::Name(name.clone());
                let seen = timeout(AT_ONCE, service.running(&domain)).await.ok()?.ok()?;
                Some((name, of(seen.as_ref())))
            });
        }
        Ok(asked.join_all().await.into_iter().flatten().collect())
    };
    // What cannot be asked is not known, and that is what the list says of it.
    session.ask(asked).unwrap_or_default()
}

fn of(seen: Option<&Seen>) -> Power {
    match seen {
        None => Power::Off,
        Some(seen) if seen.running => Power::Running,
        Some(_) => Power::Paused,
    }
}

/// What a domain does after a create that was to leave it `then`; nothing where it did not run.
pub fn after_create(outcome: &Outcome, then: Option<PowerAfter>) -> Option<Power> {
    // Only a running domain, or a paused one, has a way of its instant.
    outcome.way.as_ref()?;
    Some(match (then, outcome.downtime_us) {
        (Some(PowerAfter::Off), _) => Power::Off,
        (Some(PowerAfter::Paused), _) => Power::Paused,
        (Some(PowerAfter::Running), _) | (None, Some(_)) => Power::Running,
        (None, None) => Power::Paused,
    })
}

/// What a domain does after a revert; nothing where no hypervisor runs it. One that went on is not asked: that would cost
/// more than the revert took the guest.
pub fn after_revert(session: &Session, domain: &DomainRef, outcome: &Outcome) -> Option<Power> {
    if outcome.downtime_us.is_some() {
        return Some(Power::Running);
    }
    let listing = session.ask(session.service.list(domain)).ok()?;
    listing.domain.control.as_ref()?;
    now(session, domain).power
}
