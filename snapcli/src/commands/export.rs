//! `export`.

use std::io::IsTerminal;

use export_directory::{
    DiskSource, ExportId, ExportPlace, MemorySource, NewExport, Planned, Sources, StateSource, Watch,
    write_raw,
};
use snapcore::service::{DiffRequest, DomainRef, HoldRequest, Listing, OpenSnapshot, ReleaseRequest};
use snapcore::{Error, ErrorKind, Holder, HoldingProcess, Result, Snapshot, SnapshotName};

use crate::answer::Answer;
use crate::args::Export;
use crate::commands::domain::absolute;
use crate::documents::{ExportDoc, ExportedDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::units;

/// `domsnap export`
pub fn run(session: &Session, args: Export) -> Result<Answer, Failure> {
    if args.to == "-" {
        return stream(session, &args);
    }
    let directory = absolute(&args.to)?;
    let listing = session.ask(session.service.list(&args.domain))?;
    let mut notes = Vec::new();
    if listing.snapshots.is_empty() {
        let detail = format!("domain {} has no snapshots", listing.domain.name);
        return Err(Error::new(ErrorKind::NotFound, detail)
            .state("no changes made")
            .advise("take one with `domsnap create`")
            .into());
    }
    let wanted = match &args.name {
        Some(name) => vec![named(&listing, name)?],
        None => listing.snapshots.iter().collect(),
    };
    let since = args.since.as_ref().map(|name| named(&listing, name)).transpose()?;
    // A dry run makes no directory.
    let mut place = match args.dry_run {
        true if !directory.exists() => None,
        true => Some(ExportPlace::open(&directory)?),
        false => Some(ExportPlace::create(&directory)?),
    };
    let mut exports = Vec::new();
    for snapshot in wanted {
        let known = place.as_ref().map(ExportPlace::manifest);
        let is_there =
            |snapshot: &Snapshot| known.is_some_and(|known| known.of_snapshot(snapshot.id).is_some());
        if args.all && is_there(snapshot) {
            continue;
        }
        // With --all, on the nearest ancestor that is exported, or will have been.
        let base = match args.all {
            false => since,
            true => ancestors(&listing, snapshot).find(|found| {
                is_there(found) || exports.iter().any(|done: &ExportedDoc| done.snapshot == found.name)
            }),
        };
        let work = Work { session, args: &args, listing: &listing, snapshot, since: base };
        let made = match &mut place {
            Some(place) if args.dry_run => work.measure(Some(place), &mut notes)?,
            Some(place) => work.export(place, &mut notes)?,
            None => work.measure(None, &mut notes)?,
        };
        exports.push(made);
    }
    let document =
        ExportDoc { domain: listing.domain.name, directory, dry_run: args.dry_run, exports, notes };
    Ok(session.changed(document, shown))
}

fn shown(document: &ExportDoc) -> String {
    let mut text = String::new();
    let verb = if document.dry_run { "would export" } else { "exported" };
    for export in &document.exports {
        let since =
            export.since.as_ref().map_or_else(|| "in full".to_owned(), |name| format!("since {name}"));
        text.push_str(&format!(
            "{verb} {} at {} {since}: {}\n",
            document.domain,
            export.snapshot,
            units::bytes(export.bytes)
        ));
        let files = export.export.iter().flat_map(export_directory::Export::files);
        for file in files {
            text.push_str(&format!("  {}\n", document.directory.join(&file.file)));
        }
    }
    if document.exports.is_empty() {
        text.push_str(&format!("{} has all snapshots of {}\n", document.directory, document.domain));
    }
    for note in &document.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

fn named<'a>(listing: &'a Listing, name: &SnapshotName) -> Result<&'a Snapshot> {
    listing.snapshots.iter().find(|snapshot| snapshot.name == *name).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("domain {} has no snapshot {name}", listing.domain.name))
            .state("no changes made")
            .advise(format!("`domsnap list {}` shows those that it has", listing.domain.name))
    })
}

/// The snapshots that a snapshot derives from, the nearest first.
fn ancestors<'a>(listing: &'a Listing, snapshot: &'a Snapshot) -> impl Iterator<Item = &'a Snapshot> {
    let parent = |of: &Snapshot| {
        let id = of.parent?;
        listing.snapshots.iter().find(|found| found.id == id)
    };
    std::iter::successors(parent(snapshot), move |of| parent(of)).take(listing.snapshots.len())
}

/// One snapshot to export.
struct Work<'a> {
    session: &'a Session,
    args: &'a Export,
    listing: &'a Listing,
    snapshot: &'a Snapshot,
    since: Option<&'a Snapshot>,
}

impl Work<'_> {
    /// Exports the snapshot under a hold.
    fn export(&self, place: &mut ExportPlace, notes: &mut Vec<String>) -> Result<ExportedDoc, Failure> {
        let planned = self.plan(place)?;
        let id = ExportId::fresh();
        let held = ExportHold::take(self, id, place)?;
        let exported = self.sources(notes).and_then(|sources| {
            let name = self.snapshot.name.clone();
            let bytes = place.measure(&planned, &sources)?.0;
            let (domain, snapshot) = (&self.listing.domain.name, self.snapshot);
            let export = self.session.copy("export", domain, &name, bytes, |progress, cancelled| {
                let watch = Watch { progress, cancelled };
                let (planned, sources) = (&planned, &sources);
                place.add(&NewExport { id, domain, snapshot, planned, sources }, watch)
            })?;
            Ok(self.document(export.files().map(|file| file.bytes).sum(), Some(export)))
        });
        held.release(self.session, notes);
        exported
    }

    /// Finds out what an export would write. Without a directory, one that does not exist yet.
    fn measure(&self, place: Option<&ExportPlace>, notes: &mut Vec<String>) -> Result<ExportedDoc, Failure> {
        let planned = match place {
            Some(place) => Some(self.plan_or_later(place)?),
            None if self.since.is_some() && !self.args.all => {
                let detail =
                    format!("{} does not exist, and has no export that can be added to", self.args.to);
                return Err(Error::new(ErrorKind::NotFound, detail)
                    .state("no changes made")
                    .advise("export in full, without --since")
                    .into());
            }
            None => None,
        };
        let sources = self.sources(notes)?;
        let mut bytes = 0;
        match (place, planned) {
            (Some(place), Some(planned)) => {
                let (needed, free) = place.measure(&planned, &sources)?;
                place.require_room(needed, free)?;
                bytes = needed;
            }
            _ => {
                for source in &sources.disks {
                    bytes += export_directory::image_bytes(source)?;
                }
                bytes += sources.state_bytes();
            }
        }
        Ok(self.document(bytes, None))
    }

    fn document(&self, bytes: u64, export: Option<export_directory::Export>) -> ExportedDoc {
        ExportedDoc {
            snapshot: self.snapshot.name.clone(),
            since: self.since.map(|since| since.name.clone()),
            bytes,
            export,
        }
    }

    fn plan(&self, place: &ExportPlace) -> Result<Planned> {
        place.plan(&self.listing.domain.name, self.snapshot, self.since, &self.listing.snapshots)
    }

    /// As [`Work::plan`]. In a dry run of many, the base may be one that would have been exported before.
    fn plan_or_later(&self, place: &ExportPlace) -> Result<Planned> {
        let is_there = |since: &Snapshot| place.manifest().of_snapshot(since.id).is_some();
        let since = self.since.filter(|since| !self.args.all || is_there(since));
        place.plan(&self.listing.domain.name, self.snapshot, since, &self.listing.snapshots)
    }

    /// Opens the disks, and compares them with those of the export that is added to.
    fn sources(&self, notes: &mut Vec<String>) -> Result<Sources, Failure> {
        let (session, domain) = (self.session, &self.args.domain);
        let opened: OpenSnapshot =
            session.ask(session.service.open_snapshot(domain, &self.snapshot.name, &self.args.disks))?;
        let compared = match self.since {
            None => Vec::new(),
            Some(since) => {
                let request = DiffRequest::new(since.name.clone())
                    .to(Some(self.snapshot.name.clone()))
                    .disks(self.args.disks.clone());
                session.ask(session.service.differences(domain, &request))?
            }
        };
        let mut disks = Vec::new();
        for disk in opened.disks {
            let found = compared.iter().find(|compared| compared.target == disk.target);
            let source = match found {
                Some(compared) => {
                    // The ranges are right only if the first state was there while it was compared.
                    compared.differences.from.require_still()?;
                    let differences = &compared.differences;
                    DiskSource {
                        target: disk.target,
                        image: differences.to.clone(),
                        changed: Some(differences.ranges.clone()),
                    }
                }
                None => DiskSource { target: disk.target, image: disk.image, changed: None },
            };
            disks.push(source);
        }
        let machine_state = opened.machine_state.into_iter().map(|state| StateSource {
            file_name: state.used.path().file_name().unwrap_or_default().to_owned(),
            target: state.target,
            format: state.format,
            image: state.image,
        });
        let machine_state = machine_state.collect();
        for left_out in opened.left_out {
            notes.push(format!("snapshot {}: {left_out}", self.snapshot.name));
        }
        if disks.is_empty() {
            let detail = format!("snapshot {} has no disk that can be exported", self.snapshot.name);
            return Err(Error::new(ErrorKind::Refused, detail).state("no changes made").into());
        }
        let memory = match (&self.snapshot.memory, self.args.disk_only || !self.args.disks.is_empty()) {
            (None, _) | (_, true) => None,
            (Some(memory), false) => match memory.image.local() {
                Some(path) => Some(MemorySource { path: path.to_owned() }),
                None => {
                    let detail = format!("the memory image {} is no file of this machine", memory.image);
                    return Err(Error::new(ErrorKind::Unsupported, detail)
                        .state("no changes made")
                        .advise("export the disks alone, with --disk-only")
                        .into());
                }
            },
        };
        Ok(Sources { disks, machine_state, memory })
    }
}

/// The hold of an export. It ends with the process, also if that is killed.
struct ExportHold {
    domain: DomainRef,
    name: SnapshotName,
    holder: Holder,
}

impl ExportHold {
    fn take(work: &Work<'_>, id: ExportId, place: &ExportPlace) -> Result<Self, Failure> {
        let (session, name) = (work.session, work.snapshot.name.clone());
        let holder = Holder::new(format!("export:{id}"))?;
        let request = HoldRequest::new(name.clone(), holder.clone())
            .reason(format!("exported to {}", place.path()))
            .process(Some(HoldingProcess::own()?));
        session.ask(session.service.hold(&work.args.domain, request))?;
        Ok(Self { domain: work.args.domain.clone(), name, holder })
    }

    fn release(self, session: &Session, notes: &mut Vec<String>) {
        let request = ReleaseRequest::new(self.name, self.holder).force(true);
        if let Err(failure) = session.ask(session.service.release(&self.domain, request)) {
            notes.push(format!("the hold of the export ends with its process: {}", failure.message()));
        }
    }
}

/// Writes one disk to standard output.
fn stream(session: &Session, args: &Export) -> Result<Answer, Failure> {
    let usage = |message: &str, advice: &str| {
        Error::new(ErrorKind::Usage, message).state("no changes made").advise(advice.to_owned())
    };
    let Some(name) = &args.name else {
        return Err(usage("standard output takes one snapshot", "name it, without --all").into());
    };
    if args.since.is_some() || session.global.json || args.dry_run {
        let message = "standard output takes the data of a disk alone, all of them";
        return Err(usage(message, "leave out --since, --json and --dry-run").into());
    }
    if std::io::stdout().is_terminal() {
        return Err(usage("standard output is a terminal", "send it to a program or a file").into());
    }
    let listing = session.ask(session.service.list(&args.domain))?;
    let snapshot = named(&listing, name)?;
    let members =
        snapshot.disks.iter().filter(|disk| args.disks.is_empty() || args.disks.contains(&disk.target));
    if members.count() != 1 {
        let targets: Vec<&str> = snapshot.disks.iter().map(|disk| disk.target.as_str()).collect();
        let advice = format!("name one with --disk: {}", targets.join(", "));
        return Err(usage("standard output takes one disk", &advice).into());
    }
    let holder = Holder::new(format!("export:{}", ExportId::fresh()))?;
    let request = HoldRequest::new(name.clone(), holder.clone())
        .reason("exported to standard output".to_owned())
        .process(Some(HoldingProcess::own()?));
    session.ask(session.service.hold(&args.domain, request))?;
    let held = ExportHold { domain: args.domain.clone(), name: name.clone(), holder };
    let opened = session.ask(session.service.open_snapshot(&args.domain, name, &args.disks));
    let written = opened.and_then(|opened| {
        let state = opened.machine_state.iter().map(|state| &state.image);
        let Some(image) = opened.disks.iter().map(|disk| &disk.image).chain(state).next() else {
            let detail = format!("snapshot {name} has no disk that can be exported");
            return Err(Error::new(ErrorKind::Refused, detail).state("no changes made").into());
        };
        session.copy("export", &listing.domain.name, name, image.size(), |progress, cancelled| {
            let watch = Watch { progress, cancelled };
            write_raw(&**image, &mut std::io::stdout().lock(), watch)
        })
    });
    let mut notes = Vec::new();
    held.release(session, &mut notes);
    written?;
    Ok(Answer { changed: true, ..Answer::text("") })
}
