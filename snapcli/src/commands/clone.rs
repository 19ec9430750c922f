//! `clone`.

use snapcore::service::{CloneRequest, DomainRef, Request};

use crate::answer::Answer;
use crate::args::CloneDomain;
use crate::commands::change::{dry_run, remarks};
use crate::commands::domain::absolute;
use crate::documents::CloneDoc;
use crate::failure::Failure;
use crate::session::Session;

/// `domsnap clone`
pub fn run(session: &Session, args: CloneDomain) -> Result<Answer, Failure> {
    let names = match args.count {
        None => vec![args.new],
        Some(count) => CloneRequest::numbered(&args.new, count)?,
    };
    let directory = args.to.map(|directory| absolute(&directory)).transpose()?;
    let request = CloneRequest::new(args.name.clone(), names.clone())
        .full(args.full)
        .disk_only(args.disk_only)
        .directory(directory);
    if args.dry_run {
        return dry_run(session, &args.domain, &Request::Clone(request));
    }
    let outcome = session.change(session.service.clone_domain(&args.domain, request, session.cancel()))?;
    let mut clones = Vec::new();
    for name in names {
        // One that is not registered is a note of the outcome, which says why.
        clones.extend(session.ask(session.service.resolve(&DomainRef::Name(name))).ok());
    }
    let document = CloneDoc { domain: outcome.domain.clone(), snapshot: args.name, clones, outcome };
    Ok(session.changed(document, |document| {
        let what = match &document.clones[..] {
            [only] => format!("domain {}", only.name),
            several => format!("{} domains", several.len()),
        };
        let mut text = format!("made {what} of {} at {}\n", document.domain, document.snapshot);
        for domain in &document.clones {
            let disks =
                domain.disks.iter().map(|record| format!("{} {}", record.disk.target, record.disk.address));
            text.push_str(&format!("  {}: {}\n", domain.name, disks.collect::<Vec<_>>().join(", ")));
        }
        text + &remarks(&document.outcome)
    }))
}
