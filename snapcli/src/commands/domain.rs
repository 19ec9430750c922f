//! `domsnap domain ...` and `domsnap import`.

use camino::Utf8Path;
use snapcore::service::{DomainRef, DomainSpec, ImportOptions, ImportReport};
use snapcore::{Error, ErrorKind};

use crate::answer::Answer;
use crate::args::{Domain, DomainAdd, Import};
use crate::commands::change::names;
use crate::commands::list::{layers, stopped};
use crate::documents::{DomainDoc, DomainShowDoc, DomainsDoc, ListDoc, RemovalDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::units;

/// Does what `domain` says.
pub fn run(session: &Session, domain: Domain) -> Result<Answer, Failure> {
    match domain {
        Domain::Add(args) => add(session, args),
        Domain::Remove { domain } => remove(session, &domain),
        Domain::List => list(session),
        Domain::Show { domain } => show(session, &domain),
    }
}

fn add(session: &Session, args: DomainAdd) -> Result<Answer, Failure> {
    let spec = match (&args.file, args.name) {
        (Some(file), _) => read_file(file)?,
        (None, Some(name)) => {
            let mut spec = DomainSpec::new(name).active_path(args.active_path.into());
            let default = session.service.registry().default_format()?;
            for disk in args.disks {
                spec = spec.disk(disk.target, disk.path, disk.format.as_deref().unwrap_or(default));
            }
            spec
        }
        (None, None) => {
            return Err(Error::new(ErrorKind::Usage, "a domain needs a name").into());
        }
    };
    let report = session.change(session.service.domain_add(&spec))?;
    Ok(session.changed(document(report), |document| told(document, "registered")))
}

fn read_file(file: &Utf8Path) -> Result<DomainSpec, Failure> {
    let said =
        |cause| Error::new(ErrorKind::Usage, format!("the domain file {file} cannot be read")).because(cause);
    let file = camino::absolute_utf8(file).map_err(said)?;
    let text = std::fs::read_to_string(&file).map_err(said)?;
    let directory = file.parent().unwrap_or(Utf8Path::new("/"));
    Ok(DomainSpec::from_toml(&text, directory).map_err(|error| error.context(format!("reading {file}")))?)
}

/// `domsnap import`
pub fn import(session: &Session, args: Import) -> Result<Answer, Failure> {
    let mut options = ImportOptions::default();
    if let Some(name) = args.name {
        options = options.name(name);
    }
    if args.replace {
        options = options.replace();
    }
    let report = session.change(session.service.import(&args.domain, options))?;
    Ok(session.changed(document(report), |document| told(document, "imported")))
}

fn document(report: ImportReport) -> DomainDoc {
    let ImportReport { domain, restored, adopted, notes, .. } = report;
    DomainDoc { domain, restored, adopted, notes }
}

fn told(document: &DomainDoc, done: &str) -> String {
    let domain = &document.domain;
    let mut text = format!("{done} {}: {}\n", domain.name, units::count(domain.disks.len(), "disk"));
    for record in &domain.disks {
        let disk = &record.disk;
        text.push_str(&format!("  {}  {} ({})\n", disk.target, disk.path, disk.format));
    }
    for (snapshots, from) in [(&document.restored, "from manifests"), (&document.adopted, "from the images")]
    {
        if !snapshots.is_empty() {
            let number = units::count(snapshots.len(), "snapshot");
            text.push_str(&format!("  {number} {from}: {}\n", names(snapshots)));
        }
    }
    for note in &document.notes {
        text.push_str(&format!("  note: {note}\n"));
    }
    text
}

fn remove(session: &Session, domain: &DomainRef) -> Result<Answer, Failure> {
    let removed = session.change(session.service.domain_remove(domain))?;
    Ok(session.changed(RemovalDoc { removed }, |RemovalDoc { removed }| {
        let mut text = format!("forgot {}; its images stay as they are", removed.domain);
        if removed.snapshots > 0 {
            text.push_str(&format!(
                ", with {} snapshots in them\n  manifests: {}; `domsnap import` brings the domain back",
                removed.snapshots, removed.manifests
            ));
        }
        text + "\n"
    }))
}

fn list(session: &Session) -> Result<Answer, Failure> {
    let domains = session.ask(session.service.domains())?;
    Ok(session.told(DomainsDoc { domains }, |document| {
        if document.domains.is_empty() {
            return "no domains are known; `domsnap domain add` registers one\n".to_owned();
        }
        let rows = document.domains.iter().map(|summary| {
            let disks: Vec<&str> = summary.domain.disks.iter().map(|d| d.disk.target.as_str()).collect();
            vec![
                summary.domain.name.to_string(),
                disks.join(", "),
                summary.snapshots.to_string(),
                if summary.unfinished { "needs recovery" } else { "ok" }.to_owned(),
            ]
        });
        table(&["NAME", "DISKS", ">SNAPSHOTS", "STATE"], rows)
    }))
}

fn show(session: &Session, domain: &DomainRef) -> Result<Answer, Failure> {
    let listing = session.ask(session.service.list(domain))?;
    let disks = session.ask(session.service.inspect(domain))?;
    let snapshots = ListDoc::of(&listing, session.service.registry()).snapshots;
    let document = DomainShowDoc { domain: listing.domain, disks, unfinished: listing.unfinished };
    Ok(session.told(document, |document| {
        let domain = &document.domain;
        let mut text = format!("domain       {}\n", domain.name);
        text.push_str("hypervisor   none: disks at rest\n");
        text.push_str(&format!("snapshots    {}\n", snapshots.len()));
        if let Some(current) = snapshots.iter().find(|snapshot| snapshot.current) {
            text.push_str(&format!("current      {}\n", current.name));
        }
        for disk in &document.disks {
            text.push('\n');
            text.push_str(&layers(disk, &snapshots));
        }
        text + &stopped(&document.unfinished, domain.name.as_str())
    }))
}
