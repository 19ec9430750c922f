//! `domsnap disk ...`: one image, no domain.
//!
//! Internal snapshots go straight to the image engine: no catalogue, no journal, no event loop, because the engine alone
//! makes each of them whole or not at all. Before something is taken away the catalogue and the manifests beside the
//! image are asked whether a domain counts on it, and the images beside it whether one stands on it. External snapshots,
//! and whatever was made that way, go through the service as a domain of one disk.

use backend_qcow2::image::{Image, NewSnapshot, OpenOptions};
use camino::{Utf8Path, Utf8PathBuf};
use jiff::Timestamp;
use snapcore::service::{Belonging, DomainRef, GivenImage, Listing, image_list, image_path, require_files};
use snapcore::{
    ActivePath, CreateRequest, DeleteRequest, Disk as DomainDisk, Error, ErrorKind, InspectDepth, Point,
    PointKind, Result, RevertRequest, Snapshot, SnapshotName, Target, shell_word, time_name,
};

use crate::answer::Answer;
use crate::args::{Disk, Global};
use crate::commands::change::kind_word;
use crate::documents::{DiskDoc, DiskListDoc, DiskSnapshotDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::table::table;
use crate::units;

/// The backend that images given by their path alone have.
const FORMAT: &str = "qcow2";

/// Does what `disk` says.
pub fn run(global: Global, disk: Disk) -> Result<Answer, Failure> {
    let session = Session::open(global)?;
    match disk {
        Disk::Create { image, name, kind } => create(&session, &path_of(&image)?, name, kind.wanted()),
        Disk::Revert { image, name, kind } => revert(&session, &path_of(&image)?, &name, kind.wanted()),
        Disk::Delete { image, names, kind } => delete(&session, &path_of(&image)?, names, kind.wanted()),
        Disk::List { image } => list(&session, &path_of(&image)?),
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
        None => time_name(Timestamp::now())?,
    };
    let kind = kind.unwrap_or(PointKind::Internal);
    match kind {
        PointKind::Internal => {
            let now = Timestamp::now();
            // The table counts seconds in 32 bits: a clock beyond 2106 says 1970.
            let seconds = u32::try_from(now.as_second()).unwrap_or_default();
            let nanoseconds = u32::try_from(now.subsec_nanosecond()).unwrap_or_default();
            open_to_write(session, image)?
                .create_snapshot(&NewSnapshot::new(name.as_str(), seconds, nanoseconds))
                .map_err(Error::from)?;
        }
        PointKind::External => {
            let request = CreateRequest::new(name.clone()).kind(kind);
            session.change(session.service.create(&alone(image)?, request, session.cancel()))?;
        }
    }
    Ok(done(session, "create", image, vec![name.to_string()], kind))
}

/// Opens an image to write it, which no running domain may have open: not every hypervisor takes the locks that this does.
fn open_to_write(session: &Session, image: &Utf8Path) -> Result<Image, Failure> {
    session.ask(session.service.require_closed(image))?;
    Ok(open(image, &OpenOptions::read_write())?)
}

fn revert(
    session: &Session,
    image: &Utf8Path,
    name: &str,
    kind: Option<PointKind>,
) -> Result<Answer, Failure> {
    let owner = owner_to_ask(session, image)?;
    let through_service = match &owner {
        _ if kind == Some(PointKind::External) => true,
        Some(owner) => owner.is_alone(name)?,
        None => false,
    };
    if through_service {
        let request = RevertRequest::new(SnapshotName::new(name)?);
        session.change(session.service.revert(&alone(image)?, request, session.cancel()))?;
        return Ok(done(session, "revert", image, vec![name.to_owned()], PointKind::External));
    }
    if let Some(owner) = &owner {
        owner.counts_on(image, name, "revert")?;
        owner.writes(image)?;
    }
    nobody_stands_on(session, image)?;
    open_to_write(session, image)?.apply_snapshot(name).map_err(Error::from)?;
    Ok(done(session, "revert", image, vec![name.to_owned()], PointKind::Internal))
}

fn delete(
    session: &Session,
    image: &Utf8Path,
    names: Vec<String>,
    kind: Option<PointKind>,
) -> Result<Answer, Failure> {
    let owner = owner_to_ask(session, image)?;
    let mut known = Vec::new();
    let mut tags = Vec::new();
    for name in &names {
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
        }
        tags.push(name.as_str());
    }
    if !tags.is_empty() {
        open_to_write(session, image)?.delete_snapshots(&tags).map_err(Error::from)?;
    }
    let kind = if tags.is_empty() { PointKind::External } else { PointKind::Internal };
    if !known.is_empty() {
        let request = DeleteRequest::new(known);
        session.change(session.service.delete(&alone(image)?, request, session.cancel()))?;
    }
    Ok(done(session, "delete", image, names, kind))
}

fn list(session: &Session, image: &Utf8Path) -> Result<Answer, Failure> {
    // Without a lock: looking at an image that a guest runs on is no harm to either.
    let opened = open(image, &OpenOptions::read_only().unlocked())?;
    let mut snapshots: Vec<DiskSnapshotDoc> = opened
        .snapshots()
        .map_err(Error::from)?
        .iter()
        .map(|tag| DiskSnapshotDoc {
            name: tag.name().into_owned(),
            kind: PointKind::Internal,
            created: Timestamp::new(i64::from(tag.date_seconds), 0).unwrap_or(Timestamp::UNIX_EPOCH),
            virtual_size: tag.disk_size,
            vm_state_size: tag.vm_state_size,
        })
        .collect();
    if let Some(owner) = owner(session, image)? {
        let Belonging { listing, target, .. } = &owner.0;
        for snapshot in &listing.snapshots {
            let Some(member) = snapshot.point(target) else { continue };
            if member.point.kind() == PointKind::External {
                snapshots.push(DiskSnapshotDoc {
                    name: snapshot.name.to_string(),
                    kind: PointKind::External,
                    created: snapshot.created,
                    virtual_size: member.virtual_size,
                    vm_state_size: 0,
                });
            }
        }
    }
    let document = DiskListDoc { image: image.to_owned(), snapshots };
    Ok(session.told(document, |document| {
        if document.snapshots.is_empty() {
            return format!("{} has no snapshots\n", document.image);
        }
        let zone = units::zone();
        let rows = document.snapshots.iter().map(|snapshot| {
            vec![
                snapshot.name.clone(),
                kind_word(snapshot.kind).to_owned(),
                units::time(snapshot.created, &zone),
                units::bytes(snapshot.virtual_size),
                match snapshot.vm_state_size {
                    0 => "-".to_owned(),
                    size => units::bytes(size),
                },
            ]
        });
        table(&["NAME", "KIND", "CREATED", ">DISK SIZE", ">VM STATE"], rows)
    }))
}

/// The path by which an image is known, which must be there, and of the one format that these commands work on.
fn path_of(image: &GivenImage) -> Result<Utf8PathBuf> {
    if let Some(format) = image.format.as_deref().filter(|format| *format != FORMAT) {
        let all = shell_word(&image_list([(image.path.as_path(), Some(format))]));
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{} is said to be of format {format}, and `domsnap disk` works on {FORMAT} images",
                image.path
            ),
        )
        .advise(format!("name it as a domain: `domsnap create {all}`, `domsnap list {all}`")));
    }
    let path = image_path(&image.path)?;
    require_files(std::slice::from_ref(&path))?;
    Ok(path)
}

fn open(image: &Utf8Path, options: &OpenOptions) -> Result<Image> {
    Ok(Image::open(image.as_std_path(), options)?)
}

/// The image as a domain of one disk.
fn alone(image: &Utf8Path) -> Result<DomainRef> {
    DomainRef::images([image])
}

fn done(session: &Session, operation: &str, image: &Utf8Path, names: Vec<String>, kind: PointKind) -> Answer {
    let document = DiskDoc { operation: operation.to_owned(), image: image.to_owned(), names, kind };
    session.changed(document, |document| {
        let names = document.names.join(", ");
        match operation {
            "create" => format!("created {} snapshot {names} of {image}\n", kind_word(kind)),
            "revert" => format!("reverted {image} to {names}\n"),
            _ if document.names.len() == 1 => format!("deleted snapshot {names} of {image}\n"),
            _ => format!("deleted {} snapshots of {image}: {names}\n", document.names.len()),
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

    /// Whether `name` is a snapshot of this image as a domain of one disk, which nobody registered: then the service
    /// is the way to it.
    ///
    /// # Errors
    /// [`ErrorKind::NeedsRecovery`] where an operation on the domain stopped half way.
    fn is_alone(&self, name: &str) -> Result<bool> {
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
            .state("or it runs just now; nothing was touched")
            .advise(format!("run `domsnap recover {}` first", domain.name)));
        }
        Ok(domain.unregistered
            && domain.disks.len() == 1
            && listing.snapshots.iter().any(|snapshot| snapshot.name.as_str() == name))
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
            .state("nothing was touched")
            .advise(format!(
                "{}use `domsnap {command} {domain} {}`, which takes all its disks",
                self.brought_back(),
                snapshot.name
            ))),
        }
    }

    /// What comes before a command on the domain, where only its manifests tell of it.
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
            .state("nothing was touched")
            .advise(format!(
                "{}use the image that the domain writes: {}",
                self.brought_back(),
                record.disk.path
            ))),
            _ => Ok(()),
        }
    }
}

fn images_of(listing: &Listing) -> String {
    shell_word(&image_list(listing.domain.disks.iter().map(|record| (record.disk.path.as_path(), None))))
}

/// Who has `image` as a layer. Reads the catalogue, if there is one, and the manifests beside the image; changes nothing.
fn owner(session: &Session, image: &Utf8Path) -> Result<Option<Owner>, Failure> {
    Ok(session.ask(session.service.belonging(image))?.map(Owner))
}

/// As [`owner`], before something is taken away on its word: the catalogue must have the last one, and what the
/// catalogue does not know must be no frozen layer.
fn owner_to_ask(session: &Session, image: &Utf8Path) -> Result<Option<Owner>, Failure> {
    let owner = owner(session, image)?;
    if let Some(owner) = &owner {
        match owner.0.listing.catalogued {
            true => session.ask(session.service.require_last_word(&owner.0.listing.domain.name))?,
            false => owner.writes(image)?,
        }
    }
    Ok(owner)
}

/// Refuses where another image in the same directory stands on `image`: to change what it shows would change theirs.
fn nobody_stands_on(session: &Session, image: &Utf8Path) -> Result<(), Failure> {
    let backend = session.service.registry().get(FORMAT)?;
    let disk = DomainDisk { target: Target::new("vda")?, path: image.to_owned(), format: FORMAT.to_owned() };
    let (dependents, unclear) = session.ask(async {
        let record = backend.adopt(&disk, ActivePath::Keep).await?;
        let state = backend.inspect(&record, InspectDepth::Dependents, None).await?;
        let dependents = state.layer(&state.active).map(|layer| layer.dependents.clone()).unwrap_or_default();
        Ok((dependents, state.unclear))
    })?;
    if let Some(unclear) = unclear.first() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("whether {} stands on {image} cannot be told: {}", unclear.file, unclear.why),
        )
        .state("nothing was touched")
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
            format!("{dependent} stands on {image}: a revert would change what it shows"),
        )
        .advise("revert in an overlay of its own, or delete that image first")
        .into()),
    }
}
