//! `domsnap xl`: the options, the configuration file and the output that the design paper's prototype gave to
//! `xl`.
//!
//! The work itself is that of `create`, `list`, `revert` and `delete`. As xl, these commands end with 0 or 1.

mod config;
mod listed;

use camino::Utf8Path;
use jiff::Timestamp;
use serde_json::{Value, json};
use snapcore::service::{CreateDisk, CreateRequest, DeleteRequest, DomainRef, Request, RevertRequest};
use snapcore::{Domain, Error, ErrorKind, Hypervisor, LayerName, PointKind, SnapshotName, Target};

use self::config::{Config, DiskLine, How, device_number};
use crate::answer::Answer;
use crate::args::{
    Create, CreateRunning, Delete, Kind, Revert, ThenPower, Xl, XlCommand, XlCreate, XlDelete, XlList,
    XlRevert,
};
use crate::commands::change;
use crate::documents::{ListDoc, SnapshotDoc};
use crate::failure::{Failure, exit};
use crate::session::Session;

/// `domsnap xl`
pub fn run(session: &Session, args: Xl) -> Result<Answer, Failure> {
    let done = match args.command {
        XlCommand::Create(create) => self::create(session, create, args.dry_run),
        XlCommand::List(list) => self::list(session, &list),
        XlCommand::Revert(revert) => self::revert(session, revert, args.dry_run),
        XlCommand::Delete(delete) => self::delete(session, delete, args.dry_run),
    };
    done.map_err(|failure| failure.ending_with(exit::FAILED))
}

/// Tells what the user should know, beside the output that scripts read.
fn note(session: &Session, text: &str) {
    if !session.global.quiet {
        anstream::eprintln!("domsnap: note: {text}");
    }
}

/// The domain that a word means: one of ours, or a name or number of Xen.
fn domain_of(session: &Session, word: &str) -> Result<(DomainRef, Domain), Failure> {
    let resolve = |domain: DomainRef| {
        session.ask(session.service.resolve(&domain)).map(|found| (domain, found)).map_err(Failure::of_plan)
    };
    let unknown = match DomainRef::parse(word) {
        Ok(domain @ DomainRef::Name(_)) => match session.ask(session.service.resolve(&domain)) {
            Ok(found) => return Ok((domain, found)),
            Err(failure) if failure.kind() == ErrorKind::NotFound => failure,
            Err(failure) => return Err(failure.of_plan()),
        },
        Ok(other) => return resolve(other),
        // Xen allows more characters in a name.
        Err(error) => error.into(),
    };
    match session.ask(hypervisor_xen::domain_called(word))? {
        Some(address) => resolve(DomainRef::Live { hypervisor: Hypervisor::named("xen"), address }),
        None => Err(unknown.of_plan()),
    }
}

/// The name of a snapshot, of what was given as one. The prototype allows any character.
fn snapshot_name(given: &str) -> Result<SnapshotName, Error> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+:".contains(c);
    let name: String = given.chars().map(|c| if allowed(c) { c } else { '-' }).collect();
    SnapshotName::new(name)
}

fn create(session: &Session, args: XlCreate, dry_run: bool) -> Result<Answer, Failure> {
    let (file, word) = match args.arguments.as_slice() {
        [domain] => (None, domain),
        // The prototype's manual has both orders.
        [domain, file] if Utf8Path::new(file).is_file() && !Utf8Path::new(domain).is_file() => {
            (Some(file), domain)
        }
        [file, domain, ..] => (Some(file), domain),
        [] => return Err(Error::new(ErrorKind::Usage, "no domain is given").into()),
    };
    let config = file.map(|file| Config::read(Utf8Path::new(file))).transpose()?;
    let (reference, domain) = domain_of(session, word)?;
    let wanted = wanted(session, &args, config.as_ref(), &domain)?;
    for text in &wanted.notes {
        note(session, text);
    }
    if dry_run {
        let mut request = CreateRequest::new(wanted.name.clone()).description(wanted.description.clone());
        for (target, how) in &wanted.disks {
            request = request.disk(target.clone(), how.clone());
        }
        if let Some(memory) = wanted.memory {
            request = request.memory(memory);
        }
        let planned = Request::Create(request);
        session.ask(session.service.plan(&reference, &planned)).map_err(Failure::of_plan)?;
        let paused = session.ask(session.service.running(&reference))?.map(|seen| !seen.running);
        return Ok(Answer::text(pretty(&wanted.document(&domain, paused))));
    }
    let create = Create {
        domain: reference.into(),
        name: Some(wanted.name),
        group: false,
        kind: Kind { internal: false, external: false },
        disks: wanted.disks,
        description: wanted.description,
        expires: None,
        dry_run: false,
        running: CreateRunning {
            memory: wanted.memory == Some(true),
            disk_only: wanted.memory == Some(false),
            ..CreateRunning::default()
        },
    };
    change::create(session, create)
}

/// A snapshot that is to be created.
#[derive(Debug)]
struct Wanted {
    name: SnapshotName,
    description: String,
    /// Absent: if the domain runs.
    memory: Option<bool>,
    disks: Vec<(Target, CreateDisk)>,
    notes: Vec<String>,
}

/// What options and file ask for together.
fn wanted(
    session: &Session,
    args: &XlCreate,
    config: Option<&Config>,
    domain: &Domain,
) -> Result<Wanted, Error> {
    let refuse = |why: String| Error::new(ErrorKind::Refused, why).state("no changes made");
    let mut notes = Vec::new();
    let in_file = config.and_then(|config| config.name.as_deref());
    if let (Some(option), Some(file)) = (args.name.as_deref(), in_file)
        && option != file
    {
        return Err(refuse(format!("-n says {option:?}, and the configuration file {file:?}"))
            .advise("give one name, or the same in both"));
    }
    if args.disk_only && config.is_some_and(|config| config.memory) {
        return Err(refuse("-D leaves memory out, and the configuration file asks for it".to_owned())
            .advise("leave out -D, or memory in the file"));
    }
    let given = match args.name.as_deref().or(in_file) {
        Some(given) => given.to_owned(),
        None => Timestamp::now().as_second().to_string(),
    };
    let name = snapshot_name(&given)?;
    if name.as_str() != given {
        notes.push(format!("the snapshot {given:?} is called {name}"));
    }
    if config.is_some_and(|config| config.has_time) {
        notes.push("creationtime is not used: it is the time of the snapshot".to_owned());
    }
    let memory = match config {
        Some(config) => Some(config.memory),
        None => args.disk_only.then_some(false),
    };
    let kind = config.and_then(|config| config.kind);
    let mut disks = Vec::new();
    match config.and_then(|config| config.disks.as_deref()) {
        None => {
            for record in &domain.disks {
                // A format without snapshots of the kind has others: a volume's is a volume.
                let capabilities = session.service.registry().get(&record.disk.format)?.capabilities();
                let how = match kind.unwrap_or(PointKind::Internal) {
                    PointKind::Internal if capabilities.internal => PointKind::Internal,
                    PointKind::External if capabilities.external => PointKind::External,
                    kind => {
                        let (what, target) = (change::kind_word(kind), &record.disk.target);
                        notes.push(format!(
                            "{target}: {} has no {what} snapshots; its own kind is taken",
                            record.disk.format
                        ));
                        continue;
                    }
                };
                disks.push((record.disk.target.clone(), CreateDisk::Take(how, None)));
            }
        }
        Some(listed) => {
            for line in listed {
                let target = target_of(domain, line)?;
                if disks.iter().any(|(known, _)| *known == target) {
                    return Err(refuse(format!("line {}: the disk {target} comes twice", line.line)));
                }
                let how = match &line.how {
                    How::Default => CreateDisk::Take(kind.unwrap_or(PointKind::Internal), None),
                    How::Internal => CreateDisk::Take(PointKind::Internal, None),
                    How::External(file) => {
                        CreateDisk::Take(PointKind::External, Some(overlay(domain, &target, file)?))
                    }
                };
                disks.push((target, how));
            }
            for record in &domain.disks {
                let target = &record.disk.target;
                if !disks.iter().any(|(named, _)| named == target) {
                    notes.push(format!("{target} is left out: the configuration file does not name it"));
                    disks.push((target.clone(), CreateDisk::Skip));
                }
            }
        }
    }
    let description = config.and_then(|config| config.description.clone()).unwrap_or_default();
    Ok(Wanted { name, description, memory, disks, notes })
}

/// The disk that a line of a configuration file names: by its target, or by its number (`hda` is `xvda`).
fn target_of(domain: &Domain, line: &DiskLine) -> Result<Target, Error> {
    let targets = || domain.disks.iter().map(|record| &record.disk.target);
    if let Some(exact) = targets().find(|target| target.as_str() == line.vdev) {
        return Ok(exact.clone());
    }
    let number = device_number(&line.vdev);
    let same: Vec<&Target> =
        targets().filter(|target| number.is_some() && device_number(target.as_str()) == number).collect();
    let all = || targets().map(Target::as_str).collect::<Vec<_>>().join(", ");
    match same.as_slice() {
        [one] => Ok((*one).clone()),
        [] => Err(Error::new(
            ErrorKind::Refused,
            format!("line {}: the domain has no disk {}, only {}", line.line, line.vdev, all()),
        )
        .state("no changes made")),
        _ => Err(Error::new(
            ErrorKind::Refused,
            format!("line {}: {} may mean several disks of {}", line.line, line.vdev, all()),
        )
        .state("no changes made")
        .advise("name the disk exactly")),
    }
}

/// The name of a new overlay that is given by its path. It lies beside the image, whose chain has names
/// without a directory.
fn overlay(domain: &Domain, target: &Target, file: &Utf8Path) -> Result<LayerName, Error> {
    let place = |path: &Utf8Path| {
        let directory = path.parent()?;
        Some(directory.canonicalize_utf8().unwrap_or_else(|_| directory.to_owned()))
    };
    let image = domain.disk(target).and_then(|record| record.disk.address.local());
    match (image, file.file_name()) {
        (Some(image), Some(name)) if place(image) == place(file) => Ok(LayerName(name.to_owned())),
        _ => Err(Error::new(
            ErrorKind::Refused,
            format!("{target}: {file} is not in the directory of the disk's image, where its overlays are"),
        )
        .state("no changes made")
        .advise("give a path there, or no target: type=\"external\" lets domsnap name the overlay")),
    }
}

impl Wanted {
    /// The snapshot as the prototype prints it. `paused`: whether the guest is paused; absent: the domain is
    /// off.
    fn document(&self, domain: &Domain, paused: Option<bool>) -> Value {
        let memory = self.memory.unwrap_or(paused.is_some());
        let disks = domain.disks.iter().filter_map(|record| {
            let target = &record.disk.target;
            let how = self.disks.iter().find(|(named, _)| named == target).map(|(_, how)| how);
            let (kind, file) = match how {
                Some(CreateDisk::Skip) => return None,
                Some(CreateDisk::Take(PointKind::External, file)) => (PointKind::External, file.as_ref()),
                Some(CreateDisk::Take(PointKind::Internal, _)) => (PointKind::Internal, None),
                _ => (PointKind::External, None),
            };
            let name = (kind == PointKind::Internal).then(|| self.name.to_string());
            Some(disk(target.as_str(), name, file.map(|file| file.as_str()), &record.disk.format, kind))
        });
        json!({
            "domain": domain.name,
            "snapshot": {
                "name": self.name,
                "description": self.description,
                "creation_time": Timestamp::now().as_second(),
                "memory": if memory { "yes" } else { "no" },
                "running": paused == Some(false),
                "paused": paused == Some(true),
                "disks": disks.collect::<Vec<_>>(),
            },
        })
    }
}

/// A disk of a snapshot as the prototype prints it.
fn disk(device: &str, name: Option<String>, file: Option<&str>, format: &str, kind: PointKind) -> Value {
    json!({
        "device": device,
        "name": name,
        "file": file,
        "format": format,
        "type": change::kind_word(kind),
    })
}

/// An existing snapshot as the prototype prints it.
fn document(domain: &Domain, snapshot: &SnapshotDoc) -> Value {
    let disks = snapshot.points.iter().map(|point| {
        let format = domain.disk(&point.target).map_or("", |record| record.disk.format.as_str());
        let file = (point.kind == PointKind::External).then(|| point.layer.as_str());
        disk(point.target.as_str(), point.tag.clone(), file, format, point.kind)
    });
    json!({
        "domain": domain.name,
        "snapshot": {
            "name": snapshot.name,
            "description": snapshot.description,
            "creation_time": snapshot.created.as_second(),
            "memory": snapshot.memory.as_ref().map_or("no", |memory| memory.image.as_str()),
            "running": snapshot.memory.as_ref().is_some_and(|memory| memory.running),
            "paused": snapshot.memory.as_ref().is_some_and(|memory| !memory.running),
            "disks": disks.collect::<Vec<_>>(),
        },
    })
}

fn pretty(document: &Value) -> String {
    format!("{document:#}\n")
}

fn list(session: &Session, args: &XlList) -> Result<Answer, Failure> {
    let (reference, domain) = domain_of(session, &args.domain)?;
    let listing = session.ask(session.service.list(&reference))?;
    let mut document = ListDoc::of(&listing, session.service.registry());
    if let Some(given) = &args.name {
        let name = snapshot_name(given)?;
        document.snapshots.retain(|snapshot| snapshot.name == name);
        if document.snapshots.is_empty() {
            return Err(missing(&reference, &name));
        }
    }
    document.snapshots.sort_by_key(|snapshot| snapshot.created);
    Ok(session.reported(document, |document| listed::table(&domain, &document.snapshots, args.long)))
}

fn missing(domain: &DomainRef, name: &SnapshotName) -> Failure {
    Error::new(ErrorKind::NotFound, format!("{domain} has no snapshot {name}"))
        .advise(format!("`domsnap xl snapshot-list {domain}` lists those that it has"))
        .into()
}

/// The document of a snapshot that an operation is planned for.
fn planned(
    session: &Session,
    reference: &DomainRef,
    name: &SnapshotName,
    request: &Request,
) -> Result<Answer, Failure> {
    session.ask(session.service.plan(reference, request)).map_err(Failure::of_plan)?;
    let listing = session.ask(session.service.list(reference))?;
    let listed = ListDoc::of(&listing, session.service.registry());
    let snapshot = listed.snapshots.iter().find(|snapshot| snapshot.name == *name);
    let snapshot = snapshot.ok_or_else(|| missing(reference, name))?;
    Ok(Answer::text(pretty(&document(&listing.domain, snapshot))))
}

fn revert(session: &Session, args: XlRevert, dry_run: bool) -> Result<Answer, Failure> {
    let (domain, _) = domain_of(session, &args.domain)?;
    let name = snapshot_name(&args.name)?;
    for option in args.unused() {
        note(session, &format!("not used: {option}"));
    }
    if dry_run {
        return planned(session, &domain, &name, &Request::Revert(RevertRequest::new(name.clone())));
    }
    let revert = Revert {
        domain: domain.into(),
        name,
        group: false,
        save_current: None,
        undo: None,
        then: ThenPower { running: false, paused: args.paused, off: false },
        skip: Vec::new(),
        no_safety: false,
        config: None,
        dry_run: false,
    };
    change::revert(session, revert)
}

fn delete(session: &Session, args: XlDelete, dry_run: bool) -> Result<Answer, Failure> {
    let (domain, _) = domain_of(session, &args.domain)?;
    let name = snapshot_name(&args.name)?;
    if dry_run {
        let request = Request::Delete(DeleteRequest::new(vec![name.clone()]));
        return planned(session, &domain, &name, &request);
    }
    let delete = Delete {
        domain: domain.into(),
        names: vec![name],
        group: false,
        defer: false,
        expired: false,
        children: false,
        children_only: false,
        limit: 0,
        force: false,
        dry_run: false,
    };
    change::delete(session, delete)
}
