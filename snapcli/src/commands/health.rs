//! `domsnap check` and `domsnap recover`.

use anstyle::{AnsiColor, Style};
use snapcore::backend::{Finding, Severity};
use snapcore::catalogue::OperationState;
use snapcore::service::{DomainRef, ImportOptions, RecoveryEnd, RecoveryReport};
use snapcore::{Error, ErrorKind};

use crate::answer::Answer;
use crate::args::{Check, Recover};
use crate::commands::change::{deferred, names};
use crate::documents::{CheckDoc, CheckedDomain, RecoverDoc, RecoverNote};
use crate::failure::{Failure, exit};
use crate::session::Session;
use crate::units;

/// Looks for damage. An error found is status 1; warnings and notes are not.
pub fn check(session: &Session, args: Check) -> Result<Answer, Failure> {
    let wanted = match args.domain {
        Some(domain) => vec![domain],
        None => {
            let known = session.ask(session.service.domains())?;
            known.into_iter().map(|summary| DomainRef::Name(summary.domain.name)).collect()
        }
    };
    let mut domains = Vec::new();
    for domain in wanted {
        let places = session.ask(session.service.find_moved(&domain))?;
        let repaired = if args.repair { follow(session, &domain, &places)? } else { None };
        let mut findings = session.ask(session.service.check(&domain))?;
        if !args.repair {
            findings.extend(places.iter().map(|images| found_at(&domain, images)));
        }
        domains.push(CheckedDomain { domain: domain.to_string(), findings, repaired });
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

/// The images that are gone from where the catalogue has them, and where they seem to be.
fn found_at(domain: &DomainRef, images: &DomainRef) -> Finding {
    let message = format!(
        "its images seem to be {images} now; unless their file system is only not mounted, `domsnap check {domain} \
         --repair` records that"
    );
    Finding::new(Severity::Note, domain.to_string(), message)
}

/// Records the place to which the images of a domain were moved. Returns what was done.
fn follow(session: &Session, domain: &DomainRef, places: &[DomainRef]) -> Result<Option<String>, Failure> {
    match places {
        [] => Ok(None),
        [images] => {
            session.change(session.service.import(images, ImportOptions::default().replace()))?;
            Ok(Some(format!("was moved, and its images are {images} now")))
        }
        many => {
            let all: Vec<String> = many.iter().map(DomainRef::to_string).collect();
            let message = format!("the images of {domain} may have been moved to any of: {}", all.join("; "));
            Err(Error::new(ErrorKind::Refused, message)
                .state("no changes made")
                .advise("say which: `domsnap import --replace IMAGES`; the others are copies")
                .into())
        }
    }
}

fn findings_text(document: &CheckDoc) -> String {
    if document.domains.is_empty() {
        return "no domains are known: nothing to check\n".to_owned();
    }
    let mut text = String::new();
    for domain in &document.domains {
        if let Some(repaired) = &domain.repaired {
            text.push_str(&format!("{}: {repaired}\n", domain.domain));
        }
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
