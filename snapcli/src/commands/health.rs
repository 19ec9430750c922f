//! `domsnap check` and `domsnap recover`.

use anstyle::{AnsiColor, Style};
use snapcore::backend::Severity;
use snapcore::catalogue::OperationState;
use snapcore::service::{DomainRef, RecoveryEnd, RecoveryReport};

use crate::answer::Answer;
use crate::args::Recover;
use crate::commands::change::{deferred, names};
use crate::documents::{CheckDoc, CheckedDomain, RecoverDoc, RecoverNote};
use crate::failure::{Failure, exit};
use crate::session::Session;
use crate::units;

/// Looks for damage. An error found is status 1; warnings and notes are not.
pub fn check(session: &Session, domain: Option<DomainRef>) -> Result<Answer, Failure> {
    let wanted = match domain {
        Some(domain) => vec![domain],
        None => {
            let known = session.ask(session.service.domains())?;
            known.into_iter().map(|summary| DomainRef::Name(summary.domain.name)).collect()
        }
    };
    let mut domains = Vec::new();
    for domain in wanted {
        let findings = session.ask(session.service.check(&domain))?;
        domains.push(CheckedDomain { domain: domain.to_string(), findings });
    }
    let findings = domains.iter().flat_map(|domain| &domain.findings);
    let errors = findings.filter(|found| found.severity == Severity::Error).count();
    let mut answer = session.reported(CheckDoc { domains }, findings_text);
    if errors > 0 {
        answer.exit = exit::FAILED;
        answer.complaint = Some(format!("the check found {}", units::count(errors, "error")));
    }
    Ok(answer)
}

fn findings_text(document: &CheckDoc) -> String {
    if document.domains.is_empty() {
        return "no domains are known: nothing to check\n".to_owned();
    }
    let mut text = String::new();
    for domain in &document.domains {
        if domain.findings.is_empty() {
            text.push_str(&format!("{}: all is well\n", domain.domain));
            continue;
        }
        text.push_str(&format!("{}: {}\n", domain.domain, units::count(domain.findings.len(), "finding")));
        for found in &domain.findings {
            let (word, style) = match found.severity {
                Severity::Note => ("note", Style::new()),
                Severity::Warning => ("warning", AnsiColor::Yellow.on_default()),
                Severity::Error => ("error", AnsiColor::Red.on_default().bold()),
            };
            text.push_str(&format!("  {style}{word}{style:#}: {}: {}\n", found.subject, found.message));
        }
    }
    text
}

/// Completes or rolls back interrupted operations.
pub fn recover(session: &Session, args: &Recover) -> Result<Answer, Failure> {
    let domain = args.domain.as_ref();
    if let Some(domain) = domain.filter(|_| args.take_over) {
        session.change(session.service.take_over(domain))?;
    }
    let recovered = match domain.filter(|_| args.abandon) {
        Some(domain) => session.change(session.service.abandon(domain))?,
        None => session.change(session.service.recover(domain, session.cancel()))?,
    };
    // A report's notes were also emitted as events.
    let is_noted = |message: &String| recovered.iter().any(|report| report.notes.contains(message));
    let others = session.warnings().into_iter().filter(|(_, message)| !is_noted(message));
    let notes = others.map(|(domain, message)| RecoverNote { domain, message }).collect();
    Ok(session.changed(RecoverDoc { recovered, notes }, |document| {
        if document.recovered.is_empty() && document.notes.is_empty() {
            return "nothing to recover\n".to_owned();
        }
        let notes = document.notes.iter().map(|note| format!("{}: {}\n", note.domain, note.message));
        document.recovered.iter().map(report).chain(notes).collect()
    }))
}

fn report(report: &RecoveryReport) -> String {
    let end = match report.end {
        RecoveryEnd::Done => "finished",
        RecoveryEnd::Undone => "undone: it did not happen",
        RecoveryEnd::Abandoned => "abandoned",
    };
    let what = match report.snapshots.is_empty() {
        true => report.operation.clone(),
        false => format!("{} of {}", report.operation, names(&report.snapshots)),
    };
    let mut text = match report.found {
        // Nothing was interrupted: merges had been deferred.
        OperationState::Planned => format!("{}: completed deferred merges\n", report.domain),
        found => format!("{}: {what} (found {found}): {end}\n", report.domain),
    };
    for note in &report.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    for postponed in &report.postponed {
        text.push_str(&format!("  deferred: {}\n", deferred(postponed)));
    }
    text
}
