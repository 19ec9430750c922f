//! A domain's power state: from an operation's outcome, or asked from its hypervisor.

use std::collections::HashMap;
use std::time::Duration;

use snapcore::hypervisor::{DomainInfo, PowerAfter};
use snapcore::service::{DomainRef, Outcome};
use snapcore::{Domain, DomainName};
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::documents::Power;
use crate::session::Session;

/// Time that a list waits for a hypervisor. One that hangs, or serves another client, is skipped.
const AT_ONCE: Duration = Duration::from_secs(2);

/// A domain's power state, its machine in a line, or why neither is known.
#[derive(Debug, Default)]
pub struct Now {
    /// The power state.
    pub power: Option<Power>,
    /// The machine, in a line.
    pub machine: Option<String>,
    /// Why that is not known.
    pub problem: Option<String>,
}

/// Asks for the state of `domain` now.
pub fn now(session: &Session, domain: &DomainRef) -> Now {
    match session.ask(session.service.running(domain)) {
        Ok(seen) => {
            Now { power: Some(of(seen.as_ref())), machine: seen.map(|seen| seen.summary), problem: None }
        }
        Err(failure) => Now { problem: Some(failure.message()), ..Now::default() },
    }
}

/// Asks for the state of each of `domains`, as far as it is known at once. Disks at rest have none.
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
    // A domain that cannot be asked is listed as unknown.
    session.ask(asked).unwrap_or_default()
}

fn of(seen: Option<&DomainInfo>) -> Power {
    match seen {
        None => Power::Off,
        Some(seen) if seen.running => Power::Running,
        Some(_) => Power::Paused,
    }
}

/// Returns the power state after a create that was to leave the domain `then`. None if it did not run.
pub fn after_create(outcome: &Outcome, then: Option<PowerAfter>) -> Option<Power> {
    // Only a running or paused domain has a method of its instant.
    outcome.method.as_ref()?;
    Some(match (then, outcome.downtime_us) {
        (Some(PowerAfter::Off), _) => Power::Off,
        (Some(PowerAfter::Paused), _) => Power::Paused,
        (Some(PowerAfter::Running), _) | (None, Some(_)) => Power::Running,
        (None, None) => Power::Paused,
    })
}

/// What a domain does after a revert; nothing where no hypervisor runs it. One that went on is not asked:
/// that would cost more than the revert took the guest.
pub fn after_revert(session: &Session, domain: &DomainRef, outcome: &Outcome) -> Option<Power> {
    if outcome.downtime_us.is_some() {
        return Some(Power::Running);
    }
    let listing = session.ask(session.service.list(domain)).ok()?;
    listing.domain.control.as_ref()?;
    now(session, domain).power
}
