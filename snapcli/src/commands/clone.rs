//! `clone`.

use std::io::Read;

use camino::Utf8Path;
use snapcore::hypervisor::CloneNetwork;
use snapcore::service::{CloneRequest, DomainRef, Request};
use snapcore::{Error, ErrorKind};

use crate::answer::Answer;
use crate::args::{CloneDomain, Network};
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
        .memory(args.memory)
        .start(args.start)
        .network(match args.network {
            Network::Off => CloneNetwork::Off,
            Network::Same => CloneNetwork::Same,
            Network::Swap => CloneNetwork::Swap,
        })
        .hook(args.run.as_deref().map(script).transpose()?)
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
            let run = document.outcome.clones.iter().find(|clone| clone.name == domain.name);
            let run = match run.map(|clone| clone.started.pid) {
                Some(Some(pid)) => format!(", running as process {pid}"),
                Some(None) => ", running".to_owned(),
                None => String::new(),
            };
            text.push_str(&format!("  {}: {}{run}\n", domain.name, disks.collect::<Vec<_>>().join(", ")));
        }
        text + &remarks(&document.outcome)
    }))
}

/// Longest script.
const LONGEST_SCRIPT: u64 = 256 << 10;

/// Reads the script of `--run`.
fn script(file: &Utf8Path) -> Result<Vec<u8>, Failure> {
    let refused = |what: String| Error::new(ErrorKind::Usage, what).state("no changes made");
    let opened = std::fs::File::open(file);
    let mut script = Vec::new();
    opened
        .and_then(|opened| opened.take(LONGEST_SCRIPT + 1).read_to_end(&mut script))
        .map_err(|cause| refused(format!("the script {file} cannot be read")).because(cause))?;
    match script.len() as u64 {
        1..=LONGEST_SCRIPT => Ok(script),
        0 => Err(refused(format!("the script {file} is empty")).into()),
        _ => Err(refused(format!("the script {file} has more than {LONGEST_SCRIPT} bytes")).into()),
    }
}
