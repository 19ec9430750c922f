//! `domsnap disk ...`: one image, no domain. A second way to write an image, beside the service, and on
//! purpose.
//!
//! **Why internal snapshots may go past the service.** A script that knows no domains wants what
//! `qemu-img snapshot` does: one image, no catalogue, no journal. The image engine alone makes each change
//! whole or not at all, so there is nothing to journal, and nothing to recover. The image's lock is taken by
//! the engine. What only the service knows is asked of it first: whether a running domain has the image open
//! ([`Domsnap::require_closed`]), whether a domain counts on what is taken away ([`Domsnap::belonging`],
//! [`Domsnap::require_authoritative`]), and which images it backs ([`Domsnap::backed_by`]).
//!
//! **Everything else goes through the service**, as a domain of one disk: external snapshots, and each image
//! with a history in the catalogue.
//!
//! [`Domsnap::require_closed`]: snapcore::service::Domsnap::require_closed
//! [`Domsnap::belonging`]: snapcore::service::Domsnap::belonging
//! [`Domsnap::require_authoritative`]: snapcore::service::Domsnap::require_authoritative
//! [`Domsnap::backed_by`]: snapcore::service::Domsnap::backed_by

use backend_qcow2::image::{self, Image, NewSnapshot, OpenOptions};
use camino::{Utf8Path, Utf8PathBuf};
use image_files::layer_name::layer_path;
use jiff::Timestamp;
use snapcore::backend::InspectDepth;
use snapcore::service::{Belonging, DomainRef, GivenImage, Listing};
use snapcore::service::{CreateRequest, DeleteRequest, RevertRequest};
use snapcore::{
    ActivePath, Disk as DomainDisk, Error, ErrorKind, Point, PointKind, Result, Snapshot, SnapshotName,
    SnapshotRole, Target, shell_command,
};

use crate::answer::Answer;
use crate::args::{Disk, Global};
use crate::backends::Register;
use crate::commands::change::kind_word;
use crate::commands::vhd;
use crate::documents::{DiskDoc, DiskListDoc, DiskSnapshotDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::units;

/// The backend that images given by their path alone have.
const FORMAT: &str = "qcow2";

/// Does what `disk` says.
pub fn run(global: Global, disk: Disk, register: Register<'_>) -> Result<Answer, Failure> {
    let session = Session::open(global, register)?;
    let looks = matches!(disk, Disk::List { .. } | Disk::Check { repair: false, .. });
    let work = || match disk {
        Disk::Create { image, name, kind } => create(&session, &path_of(&image)?, name, kind.wanted()),
        Disk::Revert { image, name, kind } => revert(&session, &path_of(&image)?, &name, kind.wanted()),
        Disk::Delete { image, names, kind, force } => {
            delete(&session, &path_of(&image)?, names, kind.wanted(), force)
        }
        Disk::List { image } => list(&session, &path_of(&image)?),
        Disk::Serve(serve) => super::serve::run(&session, serve),
        Disk::Check { image, repair, data } => vhd::check(&session, &image, repair, data),
        Disk::Materialise { image, copy, format, align } => vhd::copy(&session, &image, &copy, format, align),
        Disk::Relocate { image, parent } => vhd::relocate(&session, &image, &parent),
        Disk::Resize { image, size } => vhd::resize(&session, &image, size),
    };
    match looks {
        true => work(),
        // A failure before the change begins is a refusal.
        false => work().map_err(Failure::of_plan),
    }
}

fn create(
    session: &Session,
    image: &Utf8Path,
    name: Option<SnapshotName>,
    kind: Option<PointKind>,
) -> Result<Answer, Failure> {
    let name = match name {
        Some(name) => name,
        None => SnapshotName::of_time(Timestamp::now())?,
    };
    let kind = kind.unwrap_or(PointKind::Internal);
    // Of an image with a history of its own the catalogue must know this snapshot too: a revert may leave the
    // layer that it is in, and nothing else would lead to it.
    let through_service = match owner(session, image)? {
        Some(owner) if owner.0.listing.catalogued => owner.is_lone()? && owner.0.is_active(),
        _ => false,
    };
    match kind {
        PointKind::Internal if !through_service => {
            let now = Timestamp::now();
            // The table counts seconds in 32 bits: a clock beyond 2106 says 1970.
            let seconds = u32::try_from(now.as_second()).unwrap_or_default();
            let nanoseconds = u32::try_from(now.subsec_nanosecond()).unwrap_or_default();
            let new = NewSnapshot::new(name.as_str(), seconds, nanoseconds);
            of_engine(open_to_write(session, image)?.create_snapshot(&new))?;
        }
        PointKind::Internal | PointKind::External => {
            let request = CreateRequest::new(name.clone()).kind(kind);
            session.change(session.service.create(&alone(image)?, request, session.cancel()))?;
        }
    }
    Ok(done(session, "create", image, vec![name.to_string()], kind, Vec::new()))
}

/// Opens an image to write it, which no running domain may have open: not every hypervisor takes the locks
/// that this does.
fn open_to_write(session: &Session, image: &Utf8Path) -> Result<Image, Failure> {
    session.ask(session.service.require_closed(image))?;
    let options = OpenOptions::read_write();
    let options = if session.global.no_punch { options.without_punching() } else { options };
    of_engine(Image::open(image.as_std_path(), &options))
}

/// Maps an error of the image engine: a refusal if it has written nothing.
fn of_engine<T>(done: image::Result<T>) -> Result<T, Failure> {
    done.map_err(|error| {
        let begun = error.is_half_done();
        Failure::of(error.into(), begun)
    })
}

fn revert(
    session: &Session,
    image: &Utf8Path,
    name: &str,
    kind: Option<PointKind>,
) -> Result<Answer, Failure> {
    let owner = owner_to_ask(session, image)?;
    if let Some(owner) = &owner {
        owner.require_kind(image, name, kind)?;
    }
    let through_service = match &owner {
        _ if kind == Some(PointKind::External) => true,
        Some(owner) => owner.is_alone(name)?,
        None => false,
    };
    if through_service {
        let request = RevertRequest::new(SnapshotName::new(name)?);
        session.change(session.service.revert(&alone(image)?, request, session.cancel()))?;
        return Ok(done(session, "revert", image, vec![name.to_owned()], PointKind::External, Vec::new()));
    }
    if let Some(owner) = &owner {
        owner.counts_on(image, name, "revert")?;
        owner.writes(image)?;
    }
    if let Some(owner) = &owner
        && !has_tag(image, name)?
    {
        owner.in_other_layer(image, name)?;
    }
    require_no_dependents(session, image)?;
    of_engine(open_to_write(session, image)?.apply_snapshot(name))?;
    Ok(done(session, "revert", image, vec![name.to_owned()], PointKind::Internal, Vec::new()))
}

fn delete(
    session: &Session,
    image: &Utf8Path,
    names: Vec<String>,
    kind: Option<PointKind>,
    force: bool,
) -> Result<Answer, Failure> {
    let owner = owner_to_ask(session, image)?;
    let mut known = Vec::new();
    let mut tags = Vec::new();
    for name in &names {
        if let Some(owner) = &owner {
            owner.require_kind(image, name, kind)?;
        }
        let through_service = match &owner {
            _ if kind == Some(PointKind::External) => true,
            Some(owner) => owner.is_alone(name)?,
            None => false,
        };
        if through_service {
            known.push(SnapshotName::new(name.as_str())?);
            continue;
        }
        if let Some(owner) = &owner {
            owner.counts_on(image, name, "delete")?;
            if !has_tag(image, name)? {
                owner.in_other_layer(image, name)?;
            }
        }
        tags.push(name.as_str());
    }
    let mut forgotten = Vec::new();
    if !tags.is_empty() {
        let mut opened = open_to_write(session, image)?;
        if force {
            for tag in &tags {
                if opened.could_delete(&[tag]).is_err_and(|error| error.kind() == image::ErrorKind::Corrupt) {
                    forgotten.push(*tag);
                }
            }
            of_engine(opened.forget_snapshots(&forgotten))?;
            tags.retain(|tag| !forgotten.contains(tag));
        }
        of_engine(opened.delete_snapshots(&tags)).map_err(|failure| failure.after(&forgotten))?;
        tags.extend(&forgotten);
    }
    let forgotten: Vec<String> = forgotten.into_iter().map(str::to_owned).collect();
    let kind = if tags.is_empty() { PointKind::External } else { PointKind::Internal };
    if !known.is_empty() {
        let request = DeleteRequest::new(known).force(force);
        session
            .change(session.service.delete(&alone(image)?, request, session.cancel()))
            .map_err(|failure| failure.after(&tags))?;
    }
    Ok(done(session, "delete", image, names, kind, forgotten))
}

fn has_tag(image: &Utf8Path, tag: &str) -> Result<bool> {
    let opened = open(image, &OpenOptions::read_only().unlocked())?;
    Ok(opened.find_snapshot(tag)?.is_some())
}

/// The internal snapshots of an image; `layer` where it is not the one that was asked for.
fn tags_of(opened: &Image, layer: Option<&Utf8Path>) -> Result<Vec<DiskSnapshotDoc>> {
    let tags = opened.snapshots()?.iter().map(|tag| DiskSnapshotDoc {
        name: tag.name().into_owned(),
        kind: PointKind::Internal,
        created: Timestamp::new(i64::from(tag.date_seconds), 0).unwrap_or(Timestamp::UNIX_EPOCH),
        virtual_size: tag.disk_size,
        vm_state_size: tag.vm_state_size,
        layer: layer.map(Utf8Path::to_owned),
    });
    Ok(tags.collect())
}

fn list(session: &Session, image: &Utf8Path) -> Result<Answer, Failure> {
    // Without a lock: looking at an image that a guest runs on is no harm to either.
    let opened = open(image, &OpenOptions::read_only().unlocked())?;
    let mut snapshots = tags_of(&opened, None)?;
    if let Some(owner) = owner(session, image)? {
        for file in owner.other_layers() {
            // A missing or damaged layer is reported by `check`.
            if let Ok(lower) = open(&file, &OpenOptions::read_only().unlocked()) {
                snapshots.extend(tags_of(&lower, Some(&file)).unwrap_or_default());
            }
        }
        let Belonging { listing, target, .. } = &owner.0;
        for snapshot in listing.snapshots.iter().filter(|snapshot| snapshot.role == SnapshotRole::Snapshot) {
            let Some(member) = snapshot.point(target) else { continue };
            if member.point.kind() == PointKind::External {
                snapshots.push(DiskSnapshotDoc {
                    name: snapshot.name.to_string(),
                    kind: PointKind::External,
                    created: snapshot.created,
                    virtual_size: member.virtual_size,
                    vm_state_size: 0,
                    layer: None,
                });
            }
        }
    }
    let document = DiskListDoc { image: image.to_owned(), snapshots };
    Ok(session.reported(document, |document| {
        if document.snapshots.is_empty() {
            return format!("{} has no snapshots\n", document.image);
        }
        let zone = units::zone();
        let lower = document.snapshots.iter().any(|snapshot| snapshot.layer.is_some());
        let rows = document.snapshots.iter().map(|snapshot| {
            let mut row = vec![
                snapshot.name.clone(),
                kind_word(snapshot.kind).to_owned(),
                units::time(snapshot.created, &zone),
                units::bytes(snapshot.virtual_size),
                match snapshot.vm_state_size {
                    0 => "-".to_owned(),
                    size => units::bytes(size),
                },
            ];
            if lower {
                let layer = snapshot.layer.as_ref().and_then(|layer| layer.file_name());
                row.push(layer.unwrap_or("-").to_owned());
            }
            row
        });
        match lower {
            false => table(&["NAME", "KIND", "CREATED", ">DISK SIZE", ">VM STATE"], rows),
            true => table(&["NAME", "KIND", "CREATED", ">DISK SIZE", ">VM STATE", "IN LAYER"], rows),
        }
    }))
}

/// The path by which an image is known, which must be there, and of the one format that these commands work
/// on.
fn path_of(image: &GivenImage) -> Result<Utf8PathBuf> {
    if let Some(format) = image.format.as_deref().filter(|format| *format != FORMAT) {
        let all = shell_command([image.to_string().as_str()]);
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} was given as format {format}, and `domsnap disk` works on {FORMAT} images",
                image.address
            ),
        )
        .advise(format!("name it as a domain: `domsnap create {all}`, `domsnap list {all}`")));
    }
    image.file()
}

fn open(image: &Utf8Path, options: &OpenOptions) -> Result<Image> {
    Ok(Image::open(image.as_std_path(), options)?)
}

/// The image as a domain of one disk.
fn alone(image: &Utf8Path) -> Result<DomainRef> {
    DomainRef::images([image])
}

fn done(
    session: &Session,
    operation: &str,
    image: &Utf8Path,
    names: Vec<String>,
    kind: PointKind,
    forgotten: Vec<String>,
) -> Answer {
    let document =
        DiskDoc { operation: operation.to_owned(), image: image.to_owned(), names, kind, forgotten };
    session.changed(document, |document| {
        let names = document.names.join(", ");
        let text = match operation {
            "create" => format!("created {} snapshot {names} of {image}\n", kind_word(kind)),
            "revert" => format!("reverted {image} to {names}\n"),
            _ if document.names.len() == 1 => format!("deleted snapshot {names} of {image}\n"),
            _ => format!("deleted {} snapshots of {image}: {names}\n", document.names.len()),
        };
        match document.forgotten.is_empty() {
            true => text,
            false => format!(
                "{text}  note: damaged, so their space stays in use: {}; `qemu-img check -r leaks {image}` gives it back\n",
                document.forgotten.join(", ")
            ),
        }
    })
}

/// The domain that has an image as a layer, by the catalogue or by the manifests beside the image.
struct Owner(Belonging);

impl Owner {
    /// The snapshot that is the internal point `tag` of the image.
    fn snapshot_in(&self, tag: &str) -> Option<&Snapshot> {
        let point = Point::internal(self.0.layer.clone(), tag);
        self.0
            .listing
            .snapshots
            .iter()
            .find(|snapshot| snapshot.point(&self.0.target).is_some_and(|member| member.point == point))
    }

    /// Refuses where the snapshot `name` is not of the kind that the command line says.
    fn require_kind(&self, image: &Utf8Path, name: &str, said: Option<PointKind>) -> Result<()> {
        let found = self.0.listing.snapshots.iter().find(|snapshot| snapshot.name.as_str() == name);
        let found =
            found.and_then(|snapshot| snapshot.point(&self.0.target)).map(|member| member.point.kind());
        let (Some(found), Some(said)) = (found, said) else { return Ok(()) };
        if found == said || (said == PointKind::Internal && has_tag(image, name)?) {
            return Ok(());
        }
        let (found, said) = (kind_word(found), kind_word(said));
        Err(Error::new(
            ErrorKind::NotFound,
            format!("{image} has no {said} snapshot {name}: the one of that name is {found}"),
        )
        .state("no changes made")
        .advise(format!("say --{found}, or leave --{said} out")))
    }

    /// Returns true if `name` is a snapshot of this image as an unregistered domain of one disk: then the
    /// service handles it.
    ///
    /// # Errors
    /// [`ErrorKind::NeedsRecovery`] if an operation on the domain was interrupted.
    fn is_alone(&self, name: &str) -> Result<bool> {
        Ok(self.is_lone()? && self.0.listing.snapshots.iter().any(|snapshot| snapshot.name.as_str() == name))
    }

    /// Returns true if the domain is this one disk and is not registered.
    ///
    /// # Errors
    /// [`ErrorKind::NeedsRecovery`] if an operation on the domain was interrupted.
    fn is_lone(&self) -> Result<bool> {
        let Belonging { listing, .. } = &self.0;
        let domain = &listing.domain;
        if !listing.unfinished.is_empty() {
            return Err(Error::new(
                ErrorKind::NeedsRecovery,
                format!(
                    "an operation on domain {}, which this image belongs to, stopped half way",
                    domain.name
                ),
            )
            .state("or it runs just now; no changes made")
            .advise(format!("run `domsnap recover {}` first", domain.name)));
        }
        Ok(domain.unregistered && domain.disks.len() == 1)
    }

    /// The files of the disk's other layers.
    fn other_layers(&self) -> Vec<Utf8PathBuf> {
        let Belonging { listing, target, layer, .. } = &self.0;
        let Some(record) = listing.domain.disk(target) else { return Vec::new() };
        let others = record.owned.iter().filter(|other| *other != layer);
        others.map(|other| layer_path(record.disk.path(), other)).collect()
    }

    /// Refuses a tag that is in another layer of the disk and that the catalogue does not know, with the way
    /// to it.
    fn in_other_layer(&self, image: &Utf8Path, tag: &str) -> Result<()> {
        for file in self.other_layers() {
            let Ok(opened) = open(&file, &OpenOptions::read_only().unlocked()) else { continue };
            if opened.find_snapshot(tag).is_ok_and(|found| found.is_some()) {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!("{tag} is an internal snapshot of {file}, a lower layer of {image}, and the catalogue does not know it"),
                )
                .state("no changes made")
                .advise(format!(
                    "run `domsnap import {image} --replace`, which adopts it, then the same command again"
                )));
            }
        }
        Ok(())
    }

    /// Refuses where a snapshot of the domain is the tag `name` of the image.
    fn counts_on(&self, image: &Utf8Path, name: &str, command: &str) -> Result<()> {
        let domain = &self.0.listing.domain.name;
        match self.snapshot_in(name) {
            None => Ok(()),
            Some(snapshot) => Err(Error::new(
                ErrorKind::Refused,
                format!("{name} of {image} is part of snapshot {} of domain {domain}", snapshot.name),
            )
            .state("no changes made")
            .advise(match snapshot.role {
                SnapshotRole::Snapshot => format!(
                    "{}use `domsnap {command} {domain} {}`, which takes all its disks",
                    self.brought_back(),
                    snapshot.name
                ),
                _ => format!(
                    "{}it is the state that the last revert replaced: `domsnap undo {domain} --forget` removes it",
                    self.brought_back()
                ),
            })),
        }
    }

    /// Prefix of a command on a domain that only manifests describe.
    fn brought_back(&self) -> String {
        let Belonging { listing, .. } = &self.0;
        match listing.catalogued {
            true => String::new(),
            false => format!("bring the domain back with `domsnap import {}`, then ", images_of(listing)),
        }
    }

    /// Refuses where the domain does not write the image: it is a frozen layer then.
    fn writes(&self, image: &Utf8Path) -> Result<()> {
        let Belonging { listing, target, .. } = &self.0;
        match listing.domain.disk(target) {
            Some(record) if !self.0.is_active() => Err(Error::new(
                ErrorKind::Refused,
                format!("{image} is a frozen layer of disk {target} of domain {}", listing.domain.name),
            )
            .state("no changes made")
            .advise(format!(
                "{}use the image that the domain writes: {}",
                self.brought_back(),
                record.disk.path()
            ))),
            _ => Ok(()),
        }
    }
}

fn images_of(listing: &Listing) -> String {
    shell_command([DomainRef::disks_of(&listing.domain).to_string().as_str()])
}

/// Who has `image` as a layer. Reads the catalogue, if there is one, and the manifests beside the image;
/// changes nothing.
fn owner(session: &Session, image: &Utf8Path) -> Result<Option<Owner>, Failure> {
    Ok(session.ask(session.service.belonging(image))?.map(Owner))
}

/// As [`owner`], before something is taken away on its word: the catalogue must have the last one, and what
/// the catalogue does not know must be no frozen layer.
fn owner_to_ask(session: &Session, image: &Utf8Path) -> Result<Option<Owner>, Failure> {
    let owner = owner(session, image)?;
    if let Some(owner) = &owner {
        match owner.0.listing.catalogued {
            true => session.ask(session.service.require_authoritative(&owner.0.listing.domain.name))?,
            false => owner.writes(image)?,
        }
    }
    Ok(owner)
}

/// Refuses if `image` is the backing file of another one: a change of its content would change that one's.
fn require_no_dependents(session: &Session, image: &Utf8Path) -> Result<(), Failure> {
    let backend = session.service.registry().get(FORMAT)?;
    let disk = DomainDisk::new(Target::new("vda")?, image, FORMAT);
    let (dependents, undetermined) = session.ask(async {
        let record = backend.adopt(&disk, ActivePath::Keep).await?;
        let state = backend.inspect(&record, InspectDepth::Dependents, None).await?;
        let dependents = state.layer(&state.active).map(|layer| layer.dependents.clone()).unwrap_or_default();
        Ok((dependents, state.undetermined))
    })?;
    if let Some(undetermined) = undetermined.first() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("{} may depend on {image}: {}", undetermined.file, undetermined.why),
        )
        .state("no changes made")
        .advise(
            "make that file readable with a plain path as its backing file, or move it to another directory",
        )
        .into());
    }
    let elsewhere = session.ask(session.service.backed_by(image))?;
    match dependents.iter().chain(&elsewhere).next() {
        None => Ok(()),
        Some(dependent) => Err(Error::new(
            ErrorKind::Refused,
            format!("{dependent} is backed by {image}: a revert would change what it shows"),
        )
        .advise("revert in an overlay of its own, or delete that image first")
        .into()),
    }
}
