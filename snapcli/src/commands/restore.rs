//! `import --to`: the exports of a directory as a domain.

use std::collections::HashSet;

use camino::{Utf8Path, Utf8PathBuf};
use export_directory::restore::{Restored, RestoredDisk, restore};
use export_directory::{ExportPlace, Manifest, Watch};
use snapcore::catalogue::{CatalogueId, Entry, Revision};
use snapcore::service::{DomainRef, DomainSpec};
use snapcore::{
    ActivePath, Consistency, Disk, Domain, DomainName, Error, ErrorKind, Point, Registry, Result, Snapshot,
    SnapshotId, SnapshotTree,
};

use crate::answer::Answer;
use crate::args::Import;
use crate::commands::domain::{absolute, document, reported};
use crate::failure::Failure;
use crate::session::Session;

/// The format of the images of exports.
const FORMAT: &str = "qcow2";

/// `domsnap import DIR --to NEW`
pub fn import(session: &Session, args: &Import, to: &Utf8Path) -> Result<Answer, Failure> {
    let (from, to) = (absolute(&directory_of(&args.domain)?)?, absolute(to)?);
    let place = ExportPlace::open(&from)?;
    let Some(newest) = place.manifest().exports.iter().max_by_key(|export| export.snapshot.created) else {
        return Err(Error::new(ErrorKind::NotFound, format!("{from} has no exports"))
            .state("no changes made")
            .advise("give a directory that `domsnap export` has made")
            .into());
    };
    let name = args.name.clone().unwrap_or_else(|| newest.domain.clone());
    let taken = session.ask(session.service.domains())?.iter().any(|known| known.domain.name == name);
    if taken {
        return Err(Error::new(ErrorKind::Exists, format!("there is a domain {name} already"))
            .state("no changes made")
            .advise("choose another name with --name")
            .into());
    }
    let total = place.manifest().files().map(|file| file.bytes).sum();
    let registry = session.service.registry();
    let restored = session.copy("import", &name, &newest.snapshot.name, total, |progress, cancelled| {
        let watch = Watch { progress, cancelled };
        restore(&place, &to, watch, |restored, first| {
            describe(registry, place.manifest(), &name, restored, first)
        })
    })?;
    let mut spec = DomainSpec::new(name);
    for disk in members(&restored) {
        spec = spec.disk(disk.target.clone(), disk.path.clone(), &disk.format);
    }
    let report = session.change(session.service.domain_add(&spec)).map_err(|failure| {
        let images: Vec<&str> = restored.disks.iter().map(|disk| disk.path.as_str()).collect();
        failure.left(&format!("the copies are in {to}; `domsnap import {}` registers them", images.join(",")))
    })?;
    let mut document = document(report);
    for image in restored.memory.values() {
        document.notes.push(format!("{image} is the memory of a snapshot: the domain has its disks alone"));
    }
    Ok(session.changed(document, |document| reported(document, "imported")))
}

/// The directory that an argument names, which may look like a domain or an image.
fn directory_of(argument: &DomainRef) -> Result<Utf8PathBuf> {
    let path = match argument {
        DomainRef::Name(name) => Some(Utf8PathBuf::from(name.as_str())),
        DomainRef::Images(images) => match &images[..] {
            [only] if only.format.is_none() => only.address.local().map(Utf8Path::to_owned),
            _ => None,
        },
        _ => None,
    };
    path.filter(|path| path.is_dir()).ok_or_else(|| {
        Error::new(ErrorKind::NotFound, format!("{argument} is no directory"))
            .state("no changes made")
            .advise("with --to, give a directory that `domsnap export` has made; without it, images are imported in place")
    })
}

/// Writes the manifests of the new domain beside its images: what `domsnap import` finds there, if this
/// process ends before the domain is registered.
fn describe(
    registry: &Registry,
    manifest: &Manifest,
    name: &DomainName,
    restored: &Restored,
    first: &Utf8Path,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .map_err(|cause| Error::new(ErrorKind::Io, "the event loop cannot be started").because(cause))?;
    let mut records = Vec::new();
    for disk in members(restored) {
        let now = first.with_file_name(disk.path.file_name().unwrap_or_default());
        let found = Disk::new(disk.target.clone(), now, &disk.format);
        let backend = registry.get(&disk.format)?;
        let mut record = runtime.block_on(backend.adopt(&found, ActivePath::Keep))?;
        record.owned.extend(disk.points.values().map(|(layer, _)| layer.clone()));
        record.disk.address = disk.path.clone().into();
        records.push(record);
    }
    let domain = Domain::new(name.clone(), records).current(Some(restored.current));
    let entry = Entry::new(domain, SnapshotTree::new(snapshots(manifest, restored)), Revision(1));
    let beside = Disk::new(first_target(restored)?, first, FORMAT);
    registry.get(FORMAT)?.manifests(&beside).write(CatalogueId::fresh(), None, &entry)
}

/// The disks, and the state of the machine.
fn members(restored: &Restored) -> impl Iterator<Item = &RestoredDisk> {
    restored.disks.iter().chain(&restored.machine_state)
}

fn first_target(restored: &Restored) -> Result<snapcore::Target> {
    let first = restored.disks.first().map(|disk| disk.target.clone());
    first.ok_or_else(|| Error::new(ErrorKind::Refused, "the exports have no disk").state("no changes made"))
}

/// The snapshots of all exports, with the frozen layers that have them.
fn snapshots(manifest: &Manifest, restored: &Restored) -> Vec<Snapshot> {
    let known: HashSet<SnapshotId> = manifest.exports.iter().map(|export| export.snapshot.id).collect();
    let snapshot = |export: &export_directory::Export| {
        let about = &export.snapshot;
        let disks = members(restored).filter_map(|disk| {
            let (layer, size) = disk.points.get(&about.id)?;
            let point = Point::external(layer.clone());
            Some(snapcore::DiskPoint::new(disk.target.clone(), point, *size))
        });
        let base = export.parent.and_then(|id| manifest.export(id)).map(|base| base.snapshot.id);
        let parent = about.parent.filter(|parent| known.contains(parent)).or(base);
        // Without its memory, a disk is as after a power failure.
        let consistency = match about.consistency {
            Consistency::Memory => Consistency::Crash,
            other => other,
        };
        Snapshot::new(about.name.clone(), about.created, disks.collect())
            .id(about.id)
            .parent(parent.filter(|parent| *parent != about.id))
            .description(about.description.clone())
            .consistency(consistency)
    };
    manifest.exports.iter().map(snapshot).collect()
}
