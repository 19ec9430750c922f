//! `domsnap domain ...` and `domsnap import`.

use camino::Utf8Path;
use snapcore::service::{DomainRef, DomainSpec, ImportOptions, ImportReport, Scanned};
use snapcore::{Control, Error, ErrorKind, Hypervisor};

use crate::answer::Answer;
use crate::args::{Domain, DomainAdd, Import};
use crate::commands::change::names;
use crate::commands::list::{layers, stopped};
use crate::documents::{DomainDoc, DomainShowDoc, DomainsDoc, ListDoc, RemovalDoc, ScanDoc, ScannedDoc};
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
        Domain::Scan => scan(session),
    }
}

fn add(session: &Session, args: DomainAdd) -> Result<Answer, Failure> {
    let mut left_out = Vec::new();
    let spec = match (&args.file, args.name.clone()) {
        (Some(file), _) => read_file(file)?,
        (None, Some(name)) => {
            let mut spec = DomainSpec::new(name).active_path(args.active_path.into());
            let default = session.service.registry().default_format()?;
            for disk in &args.disks {
                let format = disk.format.as_deref().unwrap_or(default);
                spec = spec.disk(disk.target.clone(), disk.path.clone(), format);
            }
            match &args.qmp {
                Some(socket) => run_by_qemu(session, spec, socket, &args, &mut left_out)?,
                None => spec,
            }
        }
        (None, None) => {
            return Err(Error::new(ErrorKind::Usage, "a domain needs a name").into());
        }
    };
    let mut report = session.change(session.service.domain_add(&spec))?;
    report.notes.extend(left_out);
    Ok(session.changed(document(report), |document| told(document, "registered")))
}

/// A domain that a QEMU runs: reached as the command line says, with its disks if no others are said.
fn run_by_qemu(
    session: &Session,
    mut spec: DomainSpec,
    socket: &Utf8Path,
    args: &DomainAdd,
    left_out: &mut Vec<String>,
) -> Result<DomainSpec, Failure> {
    let absolute = |path: &Utf8Path| {
        camino::absolute_utf8(path).map_err(|cause| {
            Error::new(ErrorKind::Usage, format!("{path} cannot be made absolute")).because(cause)
        })
    };
    let mut control = Control {
        address: absolute(socket)?.into(),
        agent: args.agent.as_deref().map(absolute).transpose()?,
        memory_dir: args.memory_dir.as_deref().map(absolute).transpose()?,
        start: args.start.clone(),
    };
    if args.disks.is_empty() {
        let seen = session.ask(session.service.look(Hypervisor::Qemu, &control))?;
        for disk in seen.disks {
            match disk.left_out {
                None => spec = spec.disk(disk.target, disk.path, disk.format),
                Some(why) => left_out.push(format!("{} is left out: {why}", disk.target)),
            }
        }
        control.agent = control.agent.or(seen.agent);
    }
    Ok(spec.run_by(Hypervisor::Qemu, control))
}

fn scan(session: &Session) -> Result<Answer, Failure> {
    let known = session.ask(session.service.domains())?;
    let found = session.ask(session.service.scan())?.into_iter().map(|scanned| {
        let Scanned { hypervisor, control, seen, .. } = scanned;
        let is_it = |domain: &snapcore::Domain| {
            let known = domain.control.as_ref();
            domain.hypervisor == hypervisor && known.is_some_and(|known| known.address == control.address)
        };
        let registered = known.iter().map(|summary| &summary.domain).find(|domain| is_it(domain));
        ScannedDoc {
            registered: registered.map(|domain| domain.name.clone()),
            hypervisor,
            name: seen.name,
            running: seen.running,
            summary: seen.summary,
            disks: seen.disks,
            control,
        }
    });
    Ok(session.told(ScanDoc { found: found.collect() }, |document| {
        if document.found.is_empty() {
            return "no running domain was found that can be reached: a QEMU needs a QMP socket (-qmp unix:PATH,server=on,\
                    wait=off), and the right to open it\n"
                .to_owned();
        }
        document.found.iter().map(told_found).collect::<Vec<_>>().join("\n")
    }))
}

fn told_found(found: &ScannedDoc) -> String {
    let state = if found.running { "running" } else { "paused" };
    let name = found.name.as_deref().unwrap_or("unnamed");
    let mut text = format!("{name} ({state}): {}\n", found.summary);
    for disk in &found.disks {
        let why = disk.left_out.as_ref().map(|why| format!("; left out: {why}")).unwrap_or_default();
        text.push_str(&format!("  {}  {} ({}){why}\n", disk.target, disk.path, disk.format));
    }
    text + &match &found.registered {
        Some(domain) => format!("  registered as {domain}\n"),
        None => {
            let socket = crate::commands::change::shell_words(std::slice::from_ref(&found.control.address));
            format!("  register it: domsnap domain add NAME --qmp {socket}\n")
        }
    }
}

/// What a domain is doing, in a word; or why that cannot be told.
fn power(session: &Session, domain: &DomainRef) -> String {
    match session.ask(session.service.running(domain)) {
        Ok(None) => "off".to_owned(),
        Ok(Some(seen)) if seen.running => format!("running: {}", seen.summary),
        Ok(Some(seen)) => format!("paused: {}", seen.summary),
        Err(failure) => format!("not known: {}", failure.words()),
    }
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
    let power = power(session, domain);
    let document = DomainShowDoc { domain: listing.domain, disks, unfinished: listing.unfinished, power };
    Ok(session.told(document, |document| {
        let domain = &document.domain;
        let mut text = format!("domain       {}\n", domain.name);
        match &domain.control {
            None => text.push_str("hypervisor   none: disks at rest\n"),
            Some(control) => {
                text.push_str(&format!("hypervisor   {} at {}\n", domain.hypervisor, control.address));
                text.push_str(&format!("state        {}\n", document.power));
                for (what, path) in [("agent", &control.agent), ("memory in", &control.memory_dir)] {
                    if let Some(path) = path {
                        text.push_str(&format!("{what:<12} {path}\n"));
                    }
                }
            }
        }
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
