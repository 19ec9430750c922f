//! `domsnap domain ...` and `domsnap import`.

use std::io::Read;

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::hypervisor::Control;
use snapcore::service::{DomainRef, DomainSpec, DomainSummary, ImportOptions, ImportReport};
use snapcore::{DiskAddress, Error, ErrorKind, Hypervisor};

use crate::answer::Answer;
use crate::args::{Domain, DomainAdd, DomainDisk, Import};
use crate::commands::change::{names, shell_text};
use crate::commands::list::{layers, stopped};
use crate::commands::power::{self, Now};
use crate::commands::{recorded, restore, scan};
use crate::documents::{DomainDoc, DomainShowDoc, DomainsDoc, ListDoc, ListedDomain, Power, RemovalDoc};
use crate::domain_file;
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::trusted::require_own;
use crate::units;

/// Does what `domain` says.
pub fn run(session: &Session, domain: Domain) -> Result<Answer, Failure> {
    match domain {
        Domain::Add(args) => add(session, args),
        Domain::Remove { domain } => remove(session, &domain),
        Domain::List => list(session),
        Domain::Show { domain } => show(session, &domain),
        Domain::Scan => scan::run(session),
        Domain::Disk(DomainDisk::Add { domain, disk }) => {
            let default = session.service.registry().default_format()?;
            let format = disk.format.as_deref().unwrap_or(default);
            let disk = snapcore::Disk::new(disk.target, disk.path, format);
            let domain = session.change(session.service.disk_add(&domain, disk))?;
            Ok(session.changed(with_disks(domain), |document| reported(document, "changed")))
        }
        Domain::Disk(DomainDisk::Remove { domain, target }) => {
            let domain = session.change(session.service.disk_remove(&domain, &target))?;
            Ok(session.changed(with_disks(domain), |document| reported(document, "changed")))
        }
    }
}

fn with_disks(domain: snapcore::Domain) -> DomainDoc {
    DomainDoc { domain, restored: Vec::new(), adopted: Vec::new(), notes: Vec::new() }
}

fn add(session: &Session, args: DomainAdd) -> Result<Answer, Failure> {
    let mut spec = match (&args.file, args.name.clone()) {
        (Some(file), _) => read_file(session, file)?,
        (None, Some(name)) => {
            let mut spec = DomainSpec::new(name).active_path(args.active_path.into());
            let default = session.service.registry().default_format()?;
            for disk in &args.disks {
                let format = disk.format.as_deref().unwrap_or(default);
                spec = spec.disk(disk.target.clone(), disk.path.clone(), format);
            }
            match args.place() {
                None => spec,
                Some(place) => {
                    let (hypervisor, address) = read_place(session, &place)?;
                    spec.run_by(hypervisor, control(address, &args)?)
                }
            }
        }
        (None, None) => {
            return Err(Error::new(ErrorKind::Usage, "a domain needs a name").into());
        }
    };
    let mut left_out = Vec::new();
    if spec.disks.is_empty()
        && let Some(control) = &spec.control
    {
        let seen = session.ask(session.service.look(&spec.hypervisor, control)).map_err(Failure::of_plan)?;
        left_out = spec.disks_of(&seen)?;
    }
    let mut report = session.change(session.service.domain_add(&spec))?;
    report.notes.extend(left_out);
    if report.domain.policy.is_some() {
        report.notes.push(format!(
            "its policy is recorded; `domsnap policy install {}` has systemd run it",
            report.domain.name
        ));
    }
    Ok(session.changed(document(report), |document| reported(document, "registered")))
}

/// Parses `HYPERVISOR:ADDRESS` with the hypervisors of this program.
fn read_place(session: &Session, place: &str) -> Result<(Hypervisor, String), Failure> {
    match DomainRef::parse(place) {
        Ok(DomainRef::Live { hypervisor, address }) => {
            session.service.registry().hypervisor(&hypervisor)?;
            Ok((hypervisor, address))
        }
        _ => Err(Error::new(ErrorKind::Usage, format!("{place:?} does not say where a domain runs"))
            .advise("write it as HYPERVISOR:ADDRESS; 'domsnap domain scan' shows what runs here, and where")
            .into()),
    }
}

/// Builds the record of how a domain is reached, from the command line.
fn control(address: String, args: &DomainAdd) -> Result<Control, Failure> {
    Ok(Control::at(address)
        .agent(args.agent.clone().map(Into::into))
        // Its hypervisor reads the address, and makes a path absolute.
        .memory_dir(args.memory_dir.clone())
        .start(args.start.clone())
        .compress(args.compress)
        .config(args.config.as_deref().map(absolute).transpose()?))
}

/// A path that the user gave, from the root on.
pub fn absolute(path: &Utf8Path) -> Result<Utf8PathBuf, Error> {
    camino::absolute_utf8(path).map_err(|cause| {
        Error::new(ErrorKind::Usage, format!("the path {path:?} cannot be made absolute")).because(cause)
    })
}

/// Reads a domain file. One with commands is refused if another user could have written them.
pub fn read_file(session: &Session, file: &Utf8Path) -> Result<DomainSpec, Failure> {
    let said =
        |cause| Error::new(ErrorKind::Usage, format!("the domain file {file} cannot be read")).because(cause);
    let file = camino::absolute_utf8(file).map_err(said)?;
    let opened = std::fs::File::open(&file).map_err(said)?;
    let is_regular = opened.metadata().map_err(said)?.is_file();
    let mut text = String::new();
    opened.take(MAX_FILE + 1).read_to_string(&mut text).map_err(said)?;
    if text.len() as u64 > MAX_FILE {
        return Err(
            Error::new(ErrorKind::Usage, format!("the domain file {file} has more than 1 MiB")).into()
        );
    }
    let directory = file.parent().unwrap_or(Utf8Path::new("/"));
    let spec = domain_file::read(&text, directory, session.service.registry())
        .map_err(|error| error.context(format!("reading {file}")))?;
    // What is run as this user comes from this user. A pipe is of who typed the command.
    if is_regular && has_commands(&spec) {
        require_own(&file, "the domain file", "have any program run by its commands")
            .map_err(|error| Failure::of(error, false))?;
    }
    Ok(spec)
}

/// The most bytes of a domain file.
const MAX_FILE: u64 = 1 << 20;

/// Returns true if a domain file has commands that domsnap runs.
fn has_commands(spec: &DomainSpec) -> bool {
    let starts = spec.control.as_ref().is_some_and(|control| !control.start.is_empty());
    starts || spec.policy.iter().any(|policy| !policy.before.is_empty() || !policy.after.is_empty())
}

/// `domsnap import`
pub fn import(session: &Session, args: Import) -> Result<Answer, Failure> {
    if let Some(to) = &args.to {
        return restore::import(session, &args, to).map_err(Failure::of_plan);
    }
    let mut options = ImportOptions::default();
    if let Some(name) = args.name {
        options = options.name(name);
    }
    if args.replace {
        options = options.replace();
    }
    if args.trust {
        options = options.trust();
    }
    if let Some(records) = &args.records {
        options = options.recorded(recorded::read(&absolute(records)?)?);
    }
    let report = session.change(session.service.import(&args.domain, options))?;
    Ok(session.changed(document(report), |document| reported(document, "imported")))
}

pub fn document(report: ImportReport) -> DomainDoc {
    let ImportReport { domain, restored, adopted, notes, .. } = report;
    DomainDoc { domain, restored, adopted, notes }
}

pub fn reported(document: &DomainDoc, done: &str) -> String {
    let domain = &document.domain;
    let mut text = format!("{done} {}: {}\n", domain.name, units::count(domain.disks.len(), "disk"));
    for record in &domain.disks {
        let disk = &record.disk;
        text.push_str(&format!("  {}  {} ({})\n", disk.target, disk.address, disk.format));
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
                ", with {} in them\n  manifests: {}; `domsnap import` brings the domain back",
                units::count(removed.snapshots as usize, "snapshot"),
                removed.manifests
            ));
        }
        text + "\n"
    }))
}

fn list(session: &Session) -> Result<Answer, Failure> {
    let domains = session.ask(session.service.domains())?;
    let powers = power::of_all(session, domains.iter().map(|summary| &summary.domain));
    let listed = |summary: DomainSummary| {
        let power = powers.get(&summary.domain.name).copied();
        ListedDomain { summary, power }
    };
    let document = DomainsDoc { domains: domains.into_iter().map(listed).collect() };
    Ok(session.reported(document, |document| {
        if document.domains.is_empty() {
            return "no domains are known; `domsnap domain add` registers one\n".to_owned();
        }
        let runs = document.domains.iter().any(|listed| listed.summary.domain.control.is_some());
        let columns = ["NAME", "DISKS", ">SNAPSHOTS", "STATE", "NOW", "RUN AT"];
        // If all domains are disks at rest, the columns about hypervisors are left out.
        let columns = if runs { &columns[..] } else { &columns[..4] };
        table(columns, document.domains.iter().map(|listed| row(listed, columns.len())))
    }))
}

fn row(listed: &ListedDomain, columns: usize) -> Vec<String> {
    let domain = &listed.summary.domain;
    let disks: Vec<&str> = domain.disks.iter().map(|record| record.disk.target.as_str()).collect();
    let (now, place) = match &domain.control {
        None => ("-", "-".to_owned()),
        Some(control) => {
            (listed.power.map_or("?", Power::word), format!("{}:{}", domain.hypervisor, control.address))
        }
    };
    let mut row = vec![
        domain.name.to_string(),
        disks.join(", "),
        listed.summary.snapshots.to_string(),
        match (listed.summary.unfinished, listed.summary.missing.as_slice()) {
            (true, _) => "needs recovery".to_owned(),
            (false, []) => "ok".to_owned(),
            (false, missing) => {
                let targets: Vec<&str> = missing.iter().map(|target| target.as_str()).collect();
                format!("image of {} missing", targets.join(", "))
            }
        },
        now.to_owned(),
        place,
    ];
    row.truncate(columns);
    row
}

fn show(session: &Session, domain: &DomainRef) -> Result<Answer, Failure> {
    let listing = session.ask(session.service.list(domain))?;
    let disks = session.ask(session.service.inspect(domain))?;
    let ListDoc { snapshots, previous, .. } = ListDoc::of(&listing, session.service.registry());
    let Now { power, machine, problem } = match listing.domain.control {
        Some(_) => power::now(session, domain),
        None => Now::default(),
    };
    let (domain, unfinished) = (listing.domain, listing.unfinished);
    let document = DomainShowDoc { domain, disks, unfinished, power, machine, problem };
    Ok(session.reported(document, |document| {
        let mut text = facts(document);
        text.push_str(&format!("snapshots    {}\n", snapshots.len()));
        if let Some(current) = snapshots.iter().find(|snapshot| snapshot.current) {
            text.push_str(&format!("current      {}\n", current.name));
        }
        for disk in &document.disks {
            text.push('\n');
            text.push_str(&layers(disk, &snapshots, previous.as_ref()));
        }
        text + &stopped(&document.unfinished, document.domain.name.as_str())
    }))
}

/// Formats the domain, its hypervisor, and its state now.
fn facts(document: &DomainShowDoc) -> String {
    let domain = &document.domain;
    let mut text = String::new();
    let mut line = |what: &str, said: &str| text.push_str(&format!("{what:<12} {said}\n"));
    line("domain", domain.name.as_str());
    if domain.policy.is_some() {
        line("policy", &format!("`domsnap policy show {}` shows it", domain.name));
    }
    let Some(control) = &domain.control else {
        line("hypervisor", "none: disks at rest");
        return text;
    };
    line("hypervisor", &format!("{} at {}", domain.hypervisor, control.address));
    match (document.power, &document.problem) {
        (Some(power), _) => line("now", power.word()),
        (None, problem) => line("now", &format!("not known: {}", problem.as_deref().unwrap_or("unknown"))),
    }
    if let Some(machine) = &document.machine {
        line("machine", machine);
    }
    for (what, path) in [
        ("agent", control.agent.as_deref().map(Utf8Path::as_str)),
        ("memory in", control.memory_dir.as_ref().map(DiskAddress::as_str)),
        ("created from", control.config.as_deref().map(Utf8Path::as_str)),
    ] {
        if let Some(path) = path {
            line(what, path);
        }
    }
    if let Some(level) = control.compress.filter(|level| *level > 0) {
        line("compresses", &format!("memory, at level {level}"));
    }
    if !control.start.is_empty() {
        line("started by", &shell_text(&control.start));
    }
    text
}
