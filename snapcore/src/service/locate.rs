//! Which domain is meant; and taking in disks that the catalogue does not have.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};

use super::identity::{file_id, images_of};
use super::reference::target_at;
use super::reference::{Chosen, choose_disks};
use super::{DomainRef, GivenImage, Inner};
use crate::backend::is_gone_file;
use crate::catalogue::{Entry, Revision};
use crate::confine::is_elsewhere;
use crate::manifest::{DomainManifest, Found, Manifests};
use crate::{
    ActivePath, Control, Disk, DiskPoint, DiskRecord, DiskState, Domain, DomainName, Error, ErrorKind,
    Hypervisor, InspectDepth, LayerName, Machine, Point, Result, Snapshot, SnapshotId, SnapshotName,
    SnapshotTree, Target, shell_word,
};

/// A domain that was found.
pub(super) struct Located {
    /// The domain, from the catalogue or as it would enter it.
    pub entry: Entry,
    /// Whether the catalogue has exactly this.
    pub catalogued: bool,
    /// What is to be done with manifests that it was taken from.
    pub leftovers: Leftovers,
    /// What the user should know.
    pub notes: Vec<String>,
    /// As [`Taken::unconfirmed`].
    pub unconfirmed: Option<Error>,
}

impl Located {
    fn known(entry: Entry) -> Self {
        Self {
            entry,
            catalogued: true,
            leftovers: Leftovers::default(),
            notes: Vec::new(),
            unconfirmed: None,
        }
    }

    fn of(taken: Taken) -> Self {
        let Taken { entry, leftovers, notes, unconfirmed, .. } = taken;
        Self { entry, catalogued: false, leftovers, notes, unconfirmed }
    }
}

/// Manifests that stand beside disks which are taken in, and that those of the new entry do not replace.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Leftovers {
    /// Files of snapshots that could not be taken in.
    pub left_out: Vec<Utf8PathBuf>,
    /// Snapshots that were taken in under identities of their own.
    pub renamed: Vec<SnapshotId>,
}

/// What taking in disks found.
pub(super) struct Taken {
    /// The domain as it would enter the catalogue.
    pub entry: Entry,
    /// Snapshots that came from manifests.
    pub restored: Vec<SnapshotName>,
    /// Snapshots that the images themselves told.
    pub adopted: Vec<SnapshotName>,
    /// What could not be taken, and why.
    pub notes: Vec<String>,
    /// What is to be done with the manifests that it was taken from.
    pub leftovers: Leftovers,
    /// Why it may be shown and not changed: manifests name files that only the user can confirm.
    pub unconfirmed: Option<Error>,
}

/// What a domain is to be that is taken in.
pub(super) struct Intake {
    /// Its name; absent: its manifest's, or one made of its images' paths.
    pub name: Option<DomainName>,
    /// Its disks, with canonical paths.
    pub disks: Vec<Disk>,
    /// Who runs it, where no manifest is asked.
    pub hypervisor: Hypervisor,
    /// How it is reached, where no manifest is asked.
    pub control: Option<Control>,
    /// Where active images go, where no manifest is asked.
    pub active_path: ActivePath,
    /// Whether the disks were only given by their paths, so that a manifest may tell their targets and the domain's
    /// name.
    pub by_path: bool,
    /// The domain of the catalogue that these disks are, whose snapshots keep their identities.
    pub known_as: Option<DomainName>,
    /// Whether layers and snapshots that other tools made become ours, and a part of a manifest's disks stands for
    /// all of them. Otherwise only tags in the active images are taken.
    pub import: bool,
    /// Whether the user confirms what manifests say about more than the disks' own directory: how the domain is reached and
    /// started, where its memory images and layers are.
    pub trust: bool,
    /// What the catalogue has of the domain: confirmed before.
    pub known: Option<Entry>,
}

impl Intake {
    /// Returns true where the catalogue has the layer as the domain's own.
    fn owns(&self, path: &Utf8Path, layer: &LayerName) -> bool {
        self.known
            .iter()
            .flat_map(|entry| &entry.domain.disks)
            .any(|record| record.disk.path == path && record.owned.contains(layer))
    }

    /// Returns true where the catalogue has the memory image as the snapshot's.
    fn has_memory(&self, snapshot: SnapshotId, file: &Utf8Path) -> bool {
        let known = self.known.as_ref().and_then(|entry| entry.tree.get(snapshot)?.memory.as_ref());
        known.is_some_and(|memory| memory.file == file)
    }
}

/// The path by which an image is known: without links and dots. A symbolic link to an image is followed, here and nowhere
/// else: backing names are relative to the image's own directory. A file that is not there has its directory's path.
///
/// # Errors
/// [`ErrorKind::Refused`] for a link of another user to a file that is not that user's: who may make links in a directory may
/// not choose which files are worked on. [`ErrorKind::Usage`] for what is neither a file nor a block device.
pub fn image_path(path: &Utf8Path) -> Result<Utf8PathBuf> {
    let Ok(found) = path.symlink_metadata() else { return below_real_directory(path) };
    let about = match path.metadata() {
        Ok(about) => about,
        Err(cause) => {
            let leads = path.read_link_utf8().map(|to| format!(", a symbolic link to {to}"));
            let leads = leads.unwrap_or_default();
            let kind = match cause.kind() {
                std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                _ => ErrorKind::Io,
            };
            let detail = match kind {
                ErrorKind::NotFound => format!("no such file: {path}{leads}"),
                _ => format!("{path}{leads}, cannot be opened"),
            };
            let error = Error::new(kind, detail).state("no changes made");
            return Err(if kind == ErrorKind::NotFound { error } else { error.because(cause) });
        }
    };
    if !about.is_file() && !about.file_type().is_block_device() {
        return Err(Error::new(ErrorKind::Usage, format!("{path} is not a regular file or block device"))
            .advise("give the path of a disk image"));
    }
    // The lasting names of block devices are links; what they lead to is called otherwise after the next boot.
    if !found.is_symlink() || about.file_type().is_block_device() {
        return below_real_directory(path);
    }
    let own = rustix::process::geteuid().as_raw();
    if ![0, own, about.uid()].contains(&found.uid()) {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the image path {path} is a symbolic link of user {} to a file of user {}",
                found.uid(),
                about.uid()
            ),
        )
        .state("no changes made")
        .advise("give the path that it leads to, if that is the image you mean"));
    }
    let real = path.canonicalize_utf8();
    real.map_err(|cause| {
        Error::new(ErrorKind::Io, format!("the symbolic link {path} cannot be followed")).because(cause)
    })
}

/// Refuses images that are not there.
///
/// # Errors
/// [`ErrorKind::NotFound`] with the first that is not.
pub fn require_files(paths: &[Utf8PathBuf]) -> Result<()> {
    for path in paths {
        if let Err(cause) = path.symlink_metadata()
            && cause.kind() == std::io::ErrorKind::NotFound
        {
            return Err(Error::new(ErrorKind::NotFound, format!("no such file: {path}")));
        }
    }
    Ok(())
}

/// The disks whose images are not there. Block devices are passed over: a volume that is not active has no node.
pub(super) fn missing(domain: &Domain) -> Vec<Target> {
    let is_missing = |disk: &Disk| {
        !disk.path.starts_with("/dev")
            && disk.path.symlink_metadata().is_err_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
    };
    let disks = domain.disks.iter().map(|record| &record.disk);
    disks.filter(|disk| is_missing(disk)).map(|disk| disk.target.clone()).collect()
}

/// The path with its directory's own name.
fn below_real_directory(path: &Utf8Path) -> Result<Utf8PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| Error::new(ErrorKind::Usage, format!("{path} does not end in a file's name")))?;
    let directory = path.parent().unwrap_or_else(|| Utf8Path::new("/"));
    let directory = directory.canonicalize_utf8().map_err(|cause| match cause.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("no such file: {path}")),
        _ => Error::new(ErrorKind::Io, format!("the directory of the image {path} cannot be opened"))
            .because(cause),
    })?;
    Ok(directory.join(name))
}

/// Images by the paths that they are known by, and a sentence for each that was named by a link.
pub(super) fn real_images(given: &[GivenImage]) -> Result<(Vec<GivenImage>, Vec<String>)> {
    let mut images: Vec<GivenImage> = Vec::new();
    let mut notes = Vec::new();
    for image in given {
        let real = GivenImage { path: image_path(&image.path)?, ..image.clone() };
        if let Some(same) = images.iter().find(|other| is_same_file(&other.path, &real.path)) {
            let detail = format!("{} is the image {}, which is given twice", image.path, same.path);
            return Err(Error::new(ErrorKind::Usage, detail));
        }
        notes.extend(followed(&image.path, &real.path));
        images.push(real);
    }
    Ok((images, notes))
}

/// Returns true if two paths name one file, be it by two hard links.
pub(super) fn is_same_file(one: &Utf8Path, other: &Utf8Path) -> bool {
    one == other || file_id(one).is_some_and(|id| Some(id) == file_id(other))
}

/// What is to be said of an image that was named by a symbolic link.
pub(super) fn followed(given: &Utf8Path, real: &Utf8Path) -> Option<String> {
    let is_link = given.symlink_metadata().is_ok_and(|found| found.is_symlink());
    (is_link && given != real)
        .then(|| format!("{given} is a symbolic link: the image is known by its own path, {real}"))
}

/// Refuses a stated format that is another than the catalogue's.
fn same_formats(images: &[GivenImage], entry: &Entry) -> Result<()> {
    for image in images {
        let disk = entry.domain.disks.iter().map(|record| &record.disk).find(|disk| disk.path == image.path);
        if let (Some(disk), Some(format)) = (disk, &image.format)
            && disk.format != *format
        {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{} is known as an image of format {}, and format={format} was given",
                    image.path, disk.format
                ),
            )
            .state("no changes made")
            .advise(format!(
                "leave the format out, or take the domain out with `domsnap domain remove {}`",
                entry.domain.name
            )));
        }
    }
    Ok(())
}

/// The name of a domain that was never registered: the same images have the same name, always.
fn name_of_images(disks: &[Disk]) -> Result<DomainName> {
    let all: Vec<&str> = disks.iter().map(|disk| disk.path.as_str()).collect();
    let sum = crc32fast::hash(all.join("\n").as_bytes());
    let stem = disks.first().and_then(|disk| disk.path.file_stem()).unwrap_or("image");
    let mut stem: String = stem
        .trim_start_matches(['.', '-'])
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-+".contains(c) { c } else { '_' })
        .take(200)
        .collect();
    if stem.is_empty() {
        stem.push_str("image");
    }
    DomainName::new(format!("{stem}-{sum:08x}"))
}

impl Inner {
    /// The domain that is meant. Reads only.
    pub(super) async fn locate(&self, reference: &DomainRef) -> Result<Located> {
        match &*self.understood(reference)? {
            DomainRef::Name(name) => match self.catalogue.load(name).await? {
                Some(entry) => self.refresh(entry).await,
                None => Err(self.no_domain(name).await?),
            },
            DomainRef::Live { hypervisor, address } => {
                if let Some(name) = self.known_at(hypervisor, address).await?
                    && let Some(entry) = self.catalogue.load(&name).await?
                {
                    return Ok(Located::known(entry));
                }
                let (intake, followed) = self.intake_of_running(hypervisor, address).await?;
                let paths: Vec<Utf8PathBuf> = intake.disks.iter().map(|disk| disk.path.clone()).collect();
                if let Some(owner) = self.owner_of(&paths).await? {
                    return match self.catalogue.load(&owner).await? {
                        Some(entry) => self.reached(entry, hypervisor, address),
                        None => Err(self.no_domain(&owner).await?),
                    };
                }
                let mut taken = self.take_in(intake).await?;
                taken.notes.splice(0..0, followed);
                taken.entry.domain.unregistered = true;
                Ok(Located::of(taken))
            }
            DomainRef::Images(given) => {
                let (images, followed) = real_images(given)?;
                let paths: Vec<_> = images.iter().map(|image| image.path.clone()).collect();
                if let Some(owner) = self.owner_of(&paths).await? {
                    return match self.catalogue.load(&owner).await? {
                        Some(entry) => {
                            same_formats(&images, &entry)?;
                            self.refresh(entry).await
                        }
                        None => Err(self.no_domain(&owner).await?),
                    };
                }
                require_files(&paths)?;
                let intake = self.intake_of_images(&images)?;
                let mut taken = self.take_in(intake).await?;
                taken.notes.splice(0..0, followed);
                Ok(Located::of(taken))
            }
        }
    }

    /// A reference as the hypervisors of this program read it. Text that begins like an address of a hypervisor that there is not
    /// here is a name or a list of images.
    pub(super) fn understood<'r>(&self, reference: &'r DomainRef) -> Result<Cow<'r, DomainRef>> {
        let DomainRef::Live { hypervisor, address } = reference else { return Ok(Cow::Borrowed(reference)) };
        if self.registry.hypervisor(hypervisor).is_err() {
            return DomainRef::at_rest(&reference.to_string()).map(Cow::Owned);
        }
        let control = Control { address: address.clone(), ..Control::default() };
        let address = self.read_control(hypervisor, &control)?.address;
        Ok(Cow::Owned(DomainRef::Live { hypervisor: hypervisor.clone(), address }))
    }

    /// The domain of the catalogue that is reached at an address.
    pub(super) async fn known_at(
        &self,
        hypervisor: &Hypervisor,
        address: &str,
    ) -> Result<Option<DomainName>> {
        let all = self.catalogue.domains().await?;
        let known = all.into_iter().map(|entry| entry.domain).find(|domain| {
            domain.hypervisor == *hypervisor
                && domain.control.as_ref().is_some_and(|control| control.address == address)
        });
        Ok(known.map(|domain| domain.name))
    }

    /// A domain of the catalogue that runs at an address.
    fn reached(&self, entry: Entry, hypervisor: &Hypervisor, address: &str) -> Result<Located> {
        let domain = &entry.domain;
        let known = domain.control.as_ref().map(|control| control.address.as_str());
        if domain.hypervisor == *hypervisor && known == Some(address) {
            return Ok(Located::known(entry));
        }
        let (name, known) = (&domain.name, known.unwrap_or("nowhere"));
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "what runs at {address} has the disks of domain {name}, which the catalogue knows to run at {known}"
            ),
        )
        .state("no changes made")
        .advise(format!(
            "name it {name}; or, where it is reached at {address} from now on: `domsnap domain remove {name}`, then \
             `domsnap domain add {name} --at {}`",
            shell_word(&format!("{hypervisor}:{address}"))
        )))
    }

    /// What runs at an address, as it would be imported, and a sentence for each image that it has open by a link.
    pub(super) async fn intake_of_running(
        &self,
        hypervisor: &Hypervisor,
        address: &str,
    ) -> Result<(Intake, Vec<String>)> {
        let mut control = Control { address: address.to_owned(), ..Control::default() };
        let seen = self.look(hypervisor, &control).await?;
        control.agent = seen.agent.clone();
        control.config = seen.config.clone();
        let Chosen { mut disks, left_out: _ } = choose_disks(&seen)
            .map_err(|error| error.context(format!("looking at what runs at {address}")))?;
        let mut links = Vec::new();
        for disk in &mut disks {
            let real = image_path(&disk.path)?;
            links.extend(followed(&disk.path, &real));
            disk.path = real;
        }
        let name = match seen.name.clone().and_then(|name| DomainName::new(name).ok()) {
            Some(name) if self.catalogue.load(&name).await?.is_none() => name,
            _ => name_of_images(&disks)?,
        };
        let intake = Intake {
            name: Some(name),
            disks,
            hypervisor: hypervisor.clone(),
            control: Some(control),
            active_path: ActivePath::Keep,
            by_path: false,
            known_as: None,
            import: false,
            trust: false,
            known: None,
        };
        Ok((intake, links))
    }

    pub(super) fn intake_of_images(&self, images: &[GivenImage]) -> Result<Intake> {
        let default = self.registry.default_format()?;
        let disks = images
            .iter()
            .enumerate()
            .map(|(index, GivenImage { path, format })| {
                let format = format.as_deref();
                if let Some(format) = format {
                    self.registry.get(format)?;
                }
                let format = format.or_else(|| self.registry.recognise(path, None)).unwrap_or(default);
                Ok(Disk { target: target_at(index)?, path: path.clone(), format: format.to_owned() })
            })
            .collect::<Result<Vec<_>>>()?;
        Ok(Intake {
            name: None,
            disks,
            hypervisor: Hypervisor::NONE,
            control: None,
            active_path: ActivePath::Keep,
            by_path: true,
            known_as: None,
            import: false,
            trust: false,
            known: None,
        })
    }

    /// The domain whose disks are exactly `paths`.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where only a part of them, or of its, are the same.
    pub(super) async fn owner_of(&self, paths: &[Utf8PathBuf]) -> Result<Option<DomainName>> {
        let owners = self.catalogue.owners(paths).await?;
        let Some((path, owner)) = owners.first() else {
            self.refuse_layers(paths).await?;
            return Ok(None);
        };
        let Some(entry) = self.catalogue.load(owner).await? else { return Ok(None) };
        let disks: Vec<&str> = entry.domain.disks.iter().map(|record| record.disk.path.as_str()).collect();
        let same = owners.len() == paths.len()
            && disks.len() == paths.len()
            && owners.iter().all(|(_, other)| other == owner);
        if same {
            return Ok(Some(owner.clone()));
        }
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the image {path} is a disk of domain {owner}, and the images given are not exactly its disks"
            ),
        )
        .state("no changes made")
        .advise(format!("name the domain {owner}, or all its images: {}", images_of(&entry.domain))))
    }

    /// Refuses an image that is, under whatever name, a layer of a domain of the catalogue: it would have two owners
    /// that do not know of each other.
    async fn refuse_layers(&self, paths: &[Utf8PathBuf]) -> Result<()> {
        let given: Vec<_> = paths.iter().filter_map(|path| Some((path, file_id(path)?))).collect();
        for known in self.catalogue.domains().await? {
            let domain = known.domain;
            for record in &domain.disks {
                let Ok(backend) = self.registry.get(&record.disk.format) else { continue };
                for layer in &record.owned {
                    let Some(id) = file_id(&backend.layer_file(record, layer)) else { continue };
                    if let Some((path, _)) = given.iter().find(|(_, other)| *other == id) {
                        return Err(Error::new(
                            ErrorKind::Refused,
                            format!(
                                "the image {path} is a layer of disk {} of domain {}",
                                record.disk.target, domain.name
                            ),
                        )
                        .state("no changes made")
                        .advise(format!(
                            "name the domain {}, or its image {}",
                            domain.name, record.disk.path
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) async fn no_domain(&self, name: &DomainName) -> Result<Error> {
        let known = self.catalogue.domains().await?;
        let known: Vec<&str> = known.iter().map(|entry| entry.domain.name.as_str()).collect();
        let is_file = [".qcow2", ".raw", ".img"].iter().any(|ending| name.as_str().ends_with(ending));
        let detail = match is_file {
            true if Utf8Path::new(name.as_str()).exists() => {
                format!("{name} is not a regular file or block device; and there is no domain of that name")
            }
            true => format!("no such file: {name}; and there is no domain of that name"),
            false => format!("there is no domain {name}"),
        };
        let error = Error::new(ErrorKind::NotFound, detail);
        Ok(match known.is_empty() {
            true => error.advise(
                "register it with `domsnap domain add`, or bring it back from its manifests with `domsnap import IMAGE,...`",
            ),
            false => error.advise(format!(
                "the domains known are: {}; `domsnap import IMAGE,...` brings one back from its manifests",
                known.join(", ")
            )),
        })
    }

    /// A domain of the catalogue that was never registered and of which nothing is left is as its images are now:
    /// another image may be at the path.
    async fn refresh(&self, entry: Entry) -> Result<Located> {
        let bare = entry.domain.unregistered
            && entry.tree.is_empty()
            && entry.domain.disks.iter().all(|record| record.owned.len() <= 1);
        if !bare || !self.catalogue.unfinished(&entry.domain.name).await?.is_empty() {
            return Ok(Located::known(entry));
        }
        let mut same = true;
        for record in &entry.domain.disks {
            let adopted =
                self.registry.get(&record.disk.format)?.adopt(&record.disk, entry.domain.active_path).await?;
            same &= adopted.active == record.active;
        }
        if same {
            return Ok(Located::known(entry));
        }
        let intake = Intake {
            name: Some(entry.domain.name.clone()),
            disks: entry.domain.disks.iter().map(|record| record.disk.clone()).collect(),
            hypervisor: entry.domain.hypervisor,
            control: entry.domain.control.clone(),
            active_path: entry.domain.active_path,
            by_path: true,
            known_as: Some(entry.domain.name.clone()),
            import: false,
            trust: false,
            known: None,
        };
        let mut taken = self.take_in(intake).await?;
        taken.entry.revision = entry.revision;
        taken.entry.domain.unregistered = true;
        Ok(Located::of(taken))
    }

    /// Where the manifests of a domain of these disks are.
    pub(super) fn manifests_of(&self, domain: &Domain) -> Result<Manifests> {
        let first = domain
            .disks
            .first()
            .ok_or_else(|| Error::new(ErrorKind::Corrupt, format!("domain {} has no disk", domain.name)))?;
        let backend = self.registry.get(&first.disk.format)?;
        Ok(Manifests::new(backend.manifest_directory(&first.disk)))
    }

    pub(super) async fn read_manifests(&self, manifests: Manifests) -> Result<Found> {
        tokio::task::spawn_blocking(move || manifests.read()).await.map_err(|cause| {
            Error::new(ErrorKind::Internal, "reading manifests ended early").because(cause)
        })?
    }

    /// Takes in disks: from the manifests beside them, and from what the images themselves know. Changes nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for images that manifests beside them say are layers of a domain, or are disks of another.
    pub(super) async fn take_in(&self, mut intake: Intake) -> Result<Taken> {
        let Some(first) = intake.disks.first() else {
            return Err(Error::new(ErrorKind::Usage, "a domain needs one disk at least")
                .advise("add a [[disk]] with target, path and format"));
        };
        let directory = self.registry.get(&first.format)?.manifest_directory(first);
        let manifests = Manifests::new(&directory);
        let found = self.read_manifests(manifests.clone()).await?;
        if let Some(manifest) = &found.domain {
            follow_moved_paths(manifest, &mut intake);
        }
        self.refuse_what_manifests_have(&intake.disks, &directory).await?;
        let mut leftovers = Leftovers::default();
        let mut notes: Vec<String> = found
            .problems
            .iter()
            .map(|(path, why)| format!("the manifest {path} is left out: {why}"))
            .collect();
        let told = match &found.domain {
            Some(manifest) => Some(match_disks(manifest, &intake, &directory)?),
            None => None,
        };
        let targets: HashMap<Target, Target> = told.iter().flatten().cloned().collect();
        let manifest = found.domain.as_ref().filter(|_| told.is_some());
        let (disks, name) = match manifest {
            Some(manifest) if intake.by_path => (
                disks_of_manifest(manifest, &intake),
                intake.name.clone().or(Some(manifest.domain.name.clone())),
            ),
            _ => (intake.disks.clone(), intake.name.clone()),
        };
        let named_by_manifest = intake.name.is_none() && manifest.is_some();
        // Of a hypervisor that this program has not, nothing is known but disks at rest.
        let told_by = |told: &Domain| match self.registry.hypervisor(&told.hypervisor) {
            Ok(_) => told.hypervisor.clone(),
            Err(_) => Hypervisor::NONE,
        };
        let (hypervisor, control, active_path) = match manifest.map(|manifest| &manifest.domain) {
            Some(told) if intake.by_path && (intake.trust || told.control.is_none()) => {
                (told_by(told), told.control.clone(), told.active_path)
            }
            Some(told) if intake.by_path => {
                // Who reads a socket's name or a command from a file beside the image does what the owner of the directory
                // wants. What the catalogue has of it already stays.
                let known = intake.control.clone();
                if known.is_none() {
                    notes.push(not_confirmed(told));
                    // It is kept for the user to look at, under a name that is read no more.
                    leftovers.left_out.push(manifests.domain_file());
                }
                (told_by(told), known, told.active_path)
            }
            _ => (intake.hypervisor.clone(), intake.control.clone(), intake.active_path),
        };
        let unregistered = match (&intake.name, manifest) {
            (Some(_), _) => false,
            (None, Some(manifest)) => manifest.domain.unregistered,
            (None, None) => true,
        };
        let mut name = match name {
            Some(name) => name,
            None => name_of_images(&disks)?,
        };
        if named_by_manifest && self.catalogue.load(&name).await?.is_some() {
            // Another domain has the name: these images are a copy of its.
            let fallback = name_of_images(&disks)?;
            notes.push(format!(
                "the manifests name the domain {name}, which is another one; these are {fallback}"
            ));
            name = fallback;
        }

        let mut records = Vec::new();
        let mut states = Vec::new();
        let mut copies: HashSet<(Target, LayerName, String)> = HashSet::new();
        for disk in &disks {
            let backend = self.registry.get(&disk.format)?;
            let mut record = backend.adopt(disk, active_path).await?;
            let told = manifest.into_iter().flat_map(|manifest| &manifest.domain.disks).find(|told| {
                match intake.by_path {
                    true => told.disk.target == disk.target,
                    false => targets.get(&told.disk.target) == Some(&disk.target),
                }
            });
            if let Some(told) = told
                && active_path == ActivePath::Keep
                && backend.layer_file(&record, &record.active) == disk.path
                && !is_elsewhere(&told.active)
                && !backend.layer_file(&record, &told.active).exists()
            {
                // Neither was ever frozen, so neither has a file of its name: the image at the path is the one that the
                // manifests mean, in another file where it was copied.
                record =
                    DiskRecord { active: told.active.clone(), owned: vec![told.active.clone()], ..record };
            }
            for layer in told.into_iter().flat_map(|told| told.owned.clone()) {
                if !intake.trust && is_elsewhere(&layer) && !intake.owns(&disk.path, &layer) {
                    notes.push(format!(
                        "the layer {layer} lies outside of the directory of disk {}: it is only read, and never merged or \
                         removed; `domsnap import --trust` confirms that it is the domain's own",
                        disk.target
                    ));
                    continue;
                }
                let exists = backend.layer_file(&record, &layer).exists();
                if !record.owned.contains(&layer) && exists {
                    record.owned.push(layer);
                }
            }
            let state = backend.inspect(&record, InspectDepth::Layers, None).await?;
            if let Some(told) = told.filter(|told| told.active != record.active) {
                let copied = copied_tags(&state, &told.active);
                copies.extend(
                    copied.into_iter().map(|tag| (told.disk.target.clone(), told.active.clone(), tag)),
                );
            }
            states.push(state);
            records.push(record);
        }

        let mut snapshots: Vec<Snapshot> = Vec::new();
        let mut restored = Vec::new();
        let (machines, renamed_machines) = match manifest {
            Some(manifest) if intake.trust => (manifest.domain.machines.clone(), HashMap::new()),
            Some(manifest) => without_commands(&manifest.domain.machines, intake.known.as_ref()),
            None => Default::default(),
        };
        let memory_dir = control
            .as_ref()
            .and_then(|control| control.memory_dir.clone())
            .unwrap_or_else(|| directory.clone());
        let mut unconfirmed = Vec::new();
        if let Some(manifest) = manifest {
            for mut snapshot in found.snapshots {
                if let Some(machine) = &mut snapshot.machine
                    && let Some(now) = renamed_machines.get(machine)
                {
                    *machine = now.clone();
                }
                if let Some(memory) = &mut snapshot.memory
                    && !intake.trust
                    && !intake.has_memory(snapshot.id, &memory.file)
                    && memory.file.parent() != Some(&*memory_dir)
                {
                    let here = memory.file.file_name().map(|name| directory.join(name));
                    match here.filter(|here| {
                        here.symlink_metadata().is_ok_and(|about| about.is_file())
                            && !moved_from_elsewhere(manifest, &memory.file)
                    }) {
                        // The directory was moved or copied, and the image with it.
                        Some(here) => memory.file = here,
                        None => unconfirmed.push(format!("{} ({})", snapshot.name, memory.file)),
                    }
                }
                for member in &mut snapshot.disks {
                    let Some(tag) = member.point.tag.clone() else { continue };
                    if !copies.contains(&(member.target.clone(), member.point.layer.clone(), tag)) {
                        continue;
                    }
                    let target = targets.get(&member.target).unwrap_or(&member.target);
                    if let Some(record) = records.iter().find(|record| record.disk.target == *target) {
                        member.point.layer = record.active.clone();
                    }
                }
                if !intake.by_path {
                    for member in &mut snapshot.disks {
                        if let Some(target) = targets.get(&member.target) {
                            member.target = target.clone();
                        }
                    }
                }
                match missing_point(&snapshot, &records, &states) {
                    Some(why) => {
                        notes.push(format!("snapshot {} is left out: {why}", snapshot.name));
                        leftovers.left_out.push(manifests.file_of(snapshot.id));
                    }
                    None => {
                        restored.push(snapshot.name.clone());
                        snapshots.push(snapshot);
                    }
                }
            }
        } else if !found.snapshots.is_empty() {
            notes.push(
                "manifests of snapshots are there, but none of their domain: they are left out".to_owned(),
            );
            leftovers.left_out.extend(found.snapshots.iter().map(|snapshot| manifests.file_of(snapshot.id)));
        }
        leftovers.left_out.extend(found.problems.iter().map(|(path, _)| path.clone()));

        let mut told_current = manifest.and_then(|manifest| manifest.domain.current);
        let elsewhere = self.identities_elsewhere(&snapshots, intake.known_as.as_ref()).await?;
        if !elsewhere.is_empty() {
            // The images are a copy of a domain that is there too: two snapshots, so two identities.
            let fresh: HashMap<SnapshotId, SnapshotId> =
                elsewhere.iter().map(|id| (*id, SnapshotId::fresh())).collect();
            let own = |id: SnapshotId| fresh.get(&id).copied().unwrap_or(id);
            for snapshot in &mut snapshots {
                snapshot.id = own(snapshot.id);
                snapshot.parent = snapshot.parent.map(own);
            }
            told_current = told_current.map(own);
            leftovers.renamed.extend(elsewhere);
        }
        // Where all snapshots are there, a layer that is nobody's point is known as one that others only stand on.
        let whole = manifest.is_some_and(|manifest| manifest.snapshots == Some(restored.len() as u64))
            && leftovers.left_out.iter().all(|file| *file == manifests.domain_file());
        let unnamed: Vec<(Target, LayerName)> = match manifest.filter(|_| whole) {
            None => Vec::new(),
            Some(manifest) => manifest
                .domain
                .disks
                .iter()
                .map(|told| (if intake.by_path { None } else { targets.get(&told.disk.target) }, told))
                .flat_map(|(target, told)| {
                    let target = target.unwrap_or(&told.disk.target);
                    told.owned.iter().map(|layer| (target.clone(), layer.clone()))
                })
                .collect(),
        };
        let discovered = self.discover(&mut records, &snapshots, &unnamed, intake.import).await?;
        let newest = discovered.last().map(|snapshot| snapshot.id);
        let mut adopted = Vec::new();
        let mut names = Names::of(&snapshots);
        for mut snapshot in discovered {
            snapshot.name = names.free(&snapshot.name)?;
            adopted.push(snapshot.name.clone());
            snapshots.push(snapshot);
        }
        let ids: HashSet<SnapshotId> = snapshots.iter().map(|snapshot| snapshot.id).collect();
        for snapshot in &mut snapshots {
            snapshot.parent = snapshot.parent.filter(|parent| ids.contains(parent));
        }
        let current =
            told_current.filter(|id| ids.contains(id)).or(if restored.is_empty() { newest } else { None });
        let domain = Domain {
            name,
            unregistered,
            hypervisor,
            control,
            active_path,
            disks: records,
            current,
            machines,
        };
        let entry = Entry {
            domain,
            tree: SnapshotTree::new(snapshots),
            revision: Revision::ABSENT,
            follows: manifest.map(DomainManifest::stamp),
        };
        let unconfirmed = (!unconfirmed.is_empty()).then(|| {
            let images = images_of(&entry.domain);
            Error::new(
                ErrorKind::Refused,
                format!(
                    "the manifests in {directory} say that memory images are outside of {memory_dir}, the domain's directory \
                     for them: {}",
                    unconfirmed.join(", ")
                ),
            )
            .state("no changes made")
            .advise(format!(
                "where that is so, confirm it: `domsnap import --trust {images}`; the manifests were written by whoever owns \
                 the directory"
            ))
        });
        Ok(Taken { entry, restored, adopted, notes, leftovers, unconfirmed })
    }

    /// Which of `snapshots` have identities that snapshots of other domains than `own` have.
    async fn identities_elsewhere(
        &self,
        snapshots: &[Snapshot],
        own: Option<&DomainName>,
    ) -> Result<Vec<SnapshotId>> {
        let mut found = Vec::new();
        if snapshots.is_empty() {
            return Ok(found);
        }
        for known in self.catalogue.domains().await? {
            if known.snapshots == 0 || Some(&known.domain.name) == own {
                continue;
            }
            let Some(entry) = self.catalogue.load(&known.domain.name).await? else { continue };
            let theirs =
                snapshots.iter().map(|snapshot| snapshot.id).filter(|id| entry.tree.get(*id).is_some());
            found.extend(theirs);
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }

    /// What the images know and neither `known` nor `unnamed` does, disk by disk; snapshots of one name on several disks are one.
    async fn discover(
        &self,
        records: &mut [DiskRecord],
        known: &[Snapshot],
        unnamed: &[(Target, LayerName)],
        import: bool,
    ) -> Result<Vec<Snapshot>> {
        let mut merged: Vec<Snapshot> = Vec::new();
        let mut same: HashMap<SnapshotId, SnapshotId> = HashMap::new();
        for record in records {
            let backend = self.registry.get(&record.disk.format)?;
            let target = record.disk.target.clone();
            let points: Vec<Point> =
                known.iter().filter_map(|s| s.point(&target)).map(|member| member.point.clone()).collect();
            let unnamed = unnamed.iter().filter(|(of, _)| *of == target);
            let points: Vec<Point> =
                points.into_iter().chain(unnamed.map(|(_, layer)| Point::external(layer.clone()))).collect();
            let mut extended = record.clone();
            let found = backend.discover(&mut extended, &points).await?;
            if import {
                *record = extended;
            }
            let mut twins: HashMap<SnapshotName, Vec<usize>> = HashMap::new();
            for (place, other) in merged.iter().enumerate().rev() {
                if other.point(&target).is_none() {
                    twins.entry(other.name.clone()).or_default().push(place);
                }
            }
            for mut snapshot in found {
                let ours = |layer: &LayerName| *layer == record.active || record.owned.contains(layer);
                let taken =
                    import || snapshot.disks.iter().all(|m| m.point.tag.is_some() && ours(&m.point.layer));
                snapshot.parent = snapshot.parent.and_then(|parent| same.get(&parent).copied());
                if !taken {
                    // Its children take its place under its parent.
                    if let Some(parent) = snapshot.parent {
                        same.insert(snapshot.id, parent);
                    }
                    continue;
                }
                let twin =
                    twins.get_mut(&snapshot.name).and_then(Vec::pop).and_then(|place| merged.get_mut(place));
                match twin {
                    Some(twin) => {
                        same.insert(snapshot.id, twin.id);
                        twin.disks.append(&mut snapshot.disks);
                    }
                    None => {
                        same.insert(snapshot.id, snapshot.id);
                        merged.push(snapshot);
                    }
                }
            }
        }
        merged.sort_by_key(|snapshot| (snapshot.created, snapshot.id));
        Ok(merged)
    }
}

/// What is said of a domain whose manifests tell how it is reached, to a user who did not confirm that.
fn not_confirmed(told: &Domain) -> String {
    let what = match &told.control {
        Some(control) if !control.start.is_empty() => "how it is reached and which command starts it",
        _ => "how it is reached",
    };
    format!(
        "the manifests of domain {} say {what}: that is not used, because whoever owns the images' directory can have written \
         it; where it is right, confirm it before the domain is changed: `domsnap import --trust {}` (a change keeps what it \
         said as domain.json.left-out)",
        told.name,
        images_of(told)
    )
}

/// Machines without the commands that started them, and the names that they have now.
///
/// What the catalogue itself has of them is kept.
fn without_commands(machines: &[Machine], known: Option<&Entry>) -> (Vec<Machine>, HashMap<String, String>) {
    let mut names = HashMap::new();
    let mut kept: Vec<Machine> = Vec::new();
    for machine in machines {
        if known.is_some_and(|entry| entry.domain.machines.contains(machine)) {
            kept.push(machine.clone());
            continue;
        }
        let mut record = machine.record.clone();
        if let Some(process) = record.get_mut("process") {
            *process = serde_json::json!({ "command_line": [], "environment": [] });
        }
        let now = Machine::new(record, machine.summary.clone());
        names.insert(machine.id.clone(), now.id.clone());
        if kept.iter().all(|other| other.id != now.id) {
            kept.push(now);
        }
    }
    (kept, names)
}

/// Returns true where a memory image was not in the directory of its domain's manifests when they were written.
fn moved_from_elsewhere(manifest: &DomainManifest, file: &Utf8Path) -> bool {
    let home = manifest.domain.disks.first().and_then(|record| record.disk.path.parent());
    file.parent().and_then(Utf8Path::parent) != home
}

/// A disk of a domain of the catalogue that the manifest has at another path, because that is where its active image is
/// now ([`ActivePath::New`]), is taken from there.
fn follow_moved_paths(manifest: &DomainManifest, intake: &mut Intake) {
    if !intake.import || intake.known_as.is_none() {
        return;
    }
    for disk in &mut intake.disks {
        let told = manifest.domain.disks.iter().find(|told| told.disk.target == disk.target);
        let Some(told) = told.filter(|told| told.disk.path.parent() == disk.path.parent()) else { continue };
        let was = disk.path.file_name().unwrap_or_default();
        if told.disk.path != disk.path && told.owned.iter().any(|layer| layer.as_str() == was) {
            disk.path = told.disk.path.clone();
        }
    }
}

/// Which target of the manifest is which target of the intake, by the images' names: the directory may have moved.
///
/// # Errors
/// [`ErrorKind::Refused`] where the manifest, in `directory`, is of other images, or of more.
fn match_disks(
    manifest: &DomainManifest,
    intake: &Intake,
    directory: &Utf8Path,
) -> Result<Vec<(Target, Target)>> {
    let told = &manifest.domain.disks;
    let mut pairs = Vec::new();
    for record in told {
        let name = record.disk.path.file_name();
        let exact = intake.disks.iter().find(|disk| disk.path == record.disk.path);
        let disk = exact.or_else(|| intake.disks.iter().find(|disk| disk.path.file_name() == name));
        if let Some(disk) = disk {
            pairs.push((record.disk.target.clone(), disk.target.clone()));
        }
    }
    let whole = pairs.len() == told.len() && told.len() == intake.disks.len();
    if whole {
        return Ok(pairs);
    }
    let gone = |record: &DiskRecord| {
        pairs.iter().any(|(target, _)| *target == record.disk.target) || is_gone_file(&record.disk.path)
    };
    let told_by_machine = !intake.by_path && !intake.hypervisor.is_none();
    if !pairs.is_empty() && pairs.len() == intake.disks.len() && (told_by_machine || told.iter().all(gone)) {
        return Ok(pairs);
    }
    if intake.import && intake.by_path && !pairs.is_empty() && pairs.len() == intake.disks.len() {
        return Ok(pairs);
    }
    let all = images_of(&manifest.domain);
    if pairs.is_empty() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the manifests in {directory} are of domain {}, whose images are others: {all}",
                manifest.domain.name
            ),
        )
        .state("no changes made: what is written there would be lost")
        .advise(format!("name those images; or, where that domain is given up, move {directory} away")));
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "manifests beside the images say that they belong to domain {}, whose disks are others",
            manifest.domain.name
        ),
    )
    .state("no changes made")
    .advise(format!("name all its images: {all}; or bring it back with `domsnap import`")))
}

/// The disks that a manifest tells, at the paths that were given.
fn disks_of_manifest(manifest: &DomainManifest, intake: &Intake) -> Vec<Disk> {
    let directory = |disk: &Disk| disk.path.parent().map(Utf8Path::to_path_buf);
    manifest
        .domain
        .disks
        .iter()
        .filter(|record| {
            let (path, name) = (&record.disk.path, record.disk.path.file_name());
            let given = intake.disks.iter().any(|disk| disk.path == *path || disk.path.file_name() == name);
            // A disk that is gone stays out; one whose place is not there is waited for.
            given || !is_gone_file(path)
        })
        .map(|record| {
            let told = &record.disk;
            let exact = intake.disks.iter().find(|disk| disk.path == told.path);
            let given =
                exact.or_else(|| intake.disks.iter().find(|d| d.path.file_name() == told.path.file_name()));
            let path = match (given, intake.disks.first().and_then(directory), told.path.file_name()) {
                (Some(given), _, _) => given.path.clone(),
                (None, Some(beside), Some(name)) if !told.path.exists() => beside.join(name),
                (None, _, _) => told.path.clone(),
            };
            Disk { path, ..told.clone() }
        })
        .collect()
}

/// The internal points of the layer `told`, which was active, that the active image has too: a copy that kept no hard
/// links made two files of one image, and the one at the configured path is the one that goes on.
fn copied_tags(state: &DiskState, told: &LayerName) -> Vec<String> {
    let (Some(now), Some(then)) = (state.layer(&state.active), state.layer(told)) else { return Vec::new() };
    then.internal.iter().filter(|point| now.internal.contains(point)).map(|point| point.tag.clone()).collect()
}

/// Why a snapshot cannot be what its manifest says, if so.
fn missing_point(snapshot: &Snapshot, records: &[DiskRecord], states: &[DiskState]) -> Option<String> {
    snapshot.disks.iter().find_map(|member| {
        let (record, state) = records.iter().zip(states).find(|(r, _)| r.disk.target == member.target)?;
        point_problem(member, record, state).map(|why| format!("{}: {why}", member.target))
    })
}

/// Why a point is not to be had, if so.
pub(super) fn point_problem(member: &DiskPoint, record: &DiskRecord, state: &DiskState) -> Option<String> {
    let point = &member.point;
    let Some(layer) = state.layer(&point.layer) else {
        return Some(format!("the layer {} is gone", point.layer));
    };
    match &point.tag {
        Some(tag) if !layer.internal.iter().any(|internal| internal.tag == *tag) => {
            Some(format!("the image {} has no internal snapshot {tag}", layer.file))
        }
        None if point.layer == record.active => {
            Some(format!("the layer {} is the active image, not a frozen one", point.layer))
        }
        Some(_) | None => member.replaced(state),
    }
}

/// `wanted`, or with a number after it where that is taken.
pub(super) fn free_name<'a>(
    wanted: &SnapshotName,
    taken: impl IntoIterator<Item = &'a Snapshot>,
) -> Result<SnapshotName> {
    Names::of(taken).free(wanted)
}

/// Names that are taken; an image can have thousands of snapshots of one name.
struct Names {
    taken: HashSet<SnapshotName>,
    /// From which number on there may be a free one.
    next: HashMap<SnapshotName, u64>,
}

impl Names {
    fn of<'a>(snapshots: impl IntoIterator<Item = &'a Snapshot>) -> Self {
        let taken = snapshots.into_iter().map(|snapshot| snapshot.name.clone()).collect();
        Self { taken, next: HashMap::new() }
    }

    /// The name, or the first free one made of it, which is taken from now on.
    fn free(&mut self, wanted: &SnapshotName) -> Result<SnapshotName> {
        let mut name = wanted.clone();
        let number = self.next.entry(wanted.clone()).or_insert(2);
        while self.taken.contains(&name) {
            let suffix = format!("-{number}");
            let head: String = wanted.as_str().chars().take(crate::MAX_NAME_BYTES - suffix.len()).collect();
            name = SnapshotName::new(format!("{head}{suffix}"))?;
            *number += 1;
        }
        self.taken.insert(name.clone());
        Ok(name)
    }
}
