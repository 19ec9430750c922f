//! Whose images and manifests these are: whether the catalogue has the last word on a domain, and which domain a file
//! belongs to, also where the catalogue does not know it.
//!
//! Manifests say which catalogue wrote them, at which revision, of which domain. Where that is later than what the
//! catalogue has, or another's, the catalogue is an older copy of itself, or somebody works on the same images with
//! another one: then layers are not what it takes them for, and nothing may be changed on its word.

use std::collections::HashMap;

use camino::{Utf8Path, Utf8PathBuf};

use super::{Inner, Listing, image_list};
use crate::catalogue::Entry;
use crate::manifest::{DomainManifest, Manifests};
use crate::{
    Disk, DiskRecord, Domain, DomainName, Error, ErrorKind, FileIdentity, LayerName, Result, Target,
    file_identity, shell_word,
};

/// The most entries of a directory that are looked at for manifests.
const MAX_ENTRIES: usize = 100_000;

/// The domain that has an image as a layer, as the catalogue tells, or else the manifests beside the image.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Belonging {
    /// The domain, with its disks where the image is: a directory that was copied tells of the copy.
    pub listing: Listing,
    /// Of which disk it is a layer.
    pub target: Target,
    /// Which layer.
    pub layer: LayerName,
}

impl Belonging {
    /// Whether the image is what the domain writes.
    pub fn is_active(&self) -> bool {
        self.listing.domain.disk(&self.target).is_some_and(|record| record.active == self.layer)
    }
}

/// Manifests that were found in a directory, and the domain that they tell of, in that directory.
pub(super) struct Beside {
    pub(super) manifests: Manifests,
    /// Its disks as they lie here: a directory that was copied tells of the copy.
    pub(super) records: Vec<DiskRecord>,
    pub(super) manifest: DomainManifest,
}

/// Which file a path names, whatever its name.
pub(super) fn file_id(path: &Utf8Path) -> Option<FileIdentity> {
    let found = path.metadata().ok()?;
    Some(file_identity(&found))
}

/// The paths of `domain`'s images, as a command line takes them.
pub(super) fn images_of(domain: &Domain) -> String {
    shell_word(&image_list(domain.disks.iter().map(|record| (record.disk.path.as_path(), None))))
}

impl Inner {
    /// Why the catalogue does not have the last word on `entry`, if so.
    pub(super) async fn outdated(&self, entry: &Entry) -> Result<Option<Error>> {
        let Some(catalogue) = self.catalogue.identity().await? else { return Ok(None) };
        let manifests = self.manifests_of(&entry.domain)?;
        let directory = manifests.directory().to_path_buf();
        let found = tokio::task::spawn_blocking(move || manifests.domain()).await.map_err(|cause| {
            Error::new(ErrorKind::Internal, "reading manifests ended early").because(cause)
        })?;
        let Some(told) = found.filter(|told| !told.is_known_to(catalogue, entry)) else { return Ok(None) };
        let name = &entry.domain.name;
        let message = if told.catalogue.is_some_and(|other| other != catalogue) {
            format!(
                "the manifests in {directory} were written with another catalogue than this one: \
                 domain {name} was changed from another state directory"
            )
        } else if told.domain.name != *name {
            format!(
                "the manifests in {directory} are of domain {}, and not of {name}: \
                 images of that domain were copied here",
                told.domain.name
            )
        } else {
            format!(
                "the manifests in {directory} tell of domain {name} at revision {}, and the catalogue knows it at \
                 revision {}: the catalogue is an older copy, as one brought back from a backup",
                told.revision.0, entry.revision.0
            )
        };
        Ok(Some(
            Error::new(ErrorKind::Refused, message)
                .state("its layers may not be what this catalogue takes them for; no changes made")
                .advise(format!(
                    "use the state directory that the domain was last changed from; or take what manifests and images \
                     tell in place of what this one has: `domsnap import --replace {}`",
                    images_of(&entry.domain)
                )),
        ))
    }

    /// Refuses where the catalogue does not have the last word on `entry`.
    pub(super) async fn require_last_word(&self, entry: &Entry) -> Result<()> {
        match self.outdated(entry).await? {
            None => Ok(()),
            Some(error) => Err(error),
        }
    }

    /// The domains that manifests in `directory` tell of.
    pub(super) async fn beside(&self, directory: &Utf8Path) -> Result<Vec<Beside>> {
        let directory = directory.to_path_buf();
        let told = tokio::task::spawn_blocking(move || manifests_in(&directory)).await.map_err(|cause| {
            Error::new(ErrorKind::Internal, "looking for manifests ended early").because(cause)
        })?;
        Ok(told
            .into_iter()
            .map(|(manifests, manifest)| {
                let records = records_beside(manifests.directory(), &manifest.domain);
                Beside { manifests, records, manifest }
            })
            .collect())
    }

    /// Which layer of which of `records` the image is, by its name or by being the same file. A configured path comes
    /// first: an active layer has that name too.
    pub(super) fn layer_among<'a>(
        &self,
        image: &Utf8Path,
        records: impl IntoIterator<Item = &'a DiskRecord>,
    ) -> Option<(&'a DiskRecord, LayerName)> {
        let id = file_id(image);
        let directory = image.parent().and_then(file_id);
        let mut found = None;
        for record in records {
            if record.disk.path == image {
                return Some((record, record.active.clone()));
            }
            let Ok(backend) = self.registry.get(&record.disk.format) else { continue };
            if found.is_none() {
                // Layers lie beside the configured path, or have absolute names.
                let beside = record.disk.path.parent().and_then(file_id) == directory;
                let layers = record.owned.iter().chain([&record.active]);
                let layer = layers.filter(|layer| beside || layer.as_str().starts_with('/')).find(|layer| {
                    let file = backend.layer_file(record, layer);
                    file == image || (id.is_some() && file_id(&file) == id)
                });
                found = layer.map(|layer| (record, layer.clone()));
            }
        }
        found
    }

    /// Refuses images that manifests beside them say are layers of a domain, and not its configured paths; or are disks
    /// of a domain whose manifests are others than those in `own`: the domain would have two owners that do not know of
    /// each other.
    pub(super) async fn refuse_what_manifests_have(&self, disks: &[Disk], own: &Utf8Path) -> Result<()> {
        let mut seen: HashMap<Utf8PathBuf, Vec<Beside>> = HashMap::new();
        for disk in disks {
            let Some(directory) = disk.path.parent().map(Utf8Path::to_path_buf) else { continue };
            if !seen.contains_key(&directory) {
                let found = self.beside(&directory).await?;
                seen.insert(directory.clone(), found);
            }
            for beside in seen.get(&directory).into_iter().flatten() {
                let Some((record, _)) = self.layer_among(&disk.path, &beside.records) else { continue };
                let name = &beside.manifest.domain.name;
                let manifests = beside.manifests.directory();
                let images: Vec<&str> =
                    beside.records.iter().map(|record| record.disk.path.as_str()).collect();
                let (path, images) = (&disk.path, images.join(","));
                if record.disk.path != disk.path {
                    return Err(Error::new(
                        ErrorKind::Refused,
                        format!(
                            "the image {path} is a layer of disk {} of domain {name}, as the manifests in \
                             {manifests} tell",
                            record.disk.target
                        ),
                    )
                    .state("no changes made")
                    .advise(format!(
                        "name the domain's own images: {images}; where that domain is given up, move {manifests} away"
                    )));
                }
                if manifests != own {
                    return Err(Error::new(
                        ErrorKind::Refused,
                        format!("the image {path} is a disk of domain {name}, as the manifests in {manifests} tell"),
                    )
                    .state("no changes made")
                    .advise(format!(
                        "name all its images, in its order: {images}; where that domain is given up, move {manifests} \
                         away"
                    )));
                }
            }
        }
        Ok(())
    }

    /// The domain that has `image` as a layer.
    pub(super) async fn belonging(&self, image: &Utf8Path) -> Result<Option<Belonging>> {
        if file_id(image).is_none() {
            return Ok(None);
        }
        let image =
            &match (image.parent().and_then(|parent| parent.canonicalize_utf8().ok()), image.file_name()) {
                (Some(directory), Some(name)) => directory.join(name),
                _ => image.to_path_buf(),
            };
        for summary in self.catalogue.domains().await? {
            if let Some((record, layer)) = self.layer_among(image, &summary.domain.disks) {
                let target = record.disk.target.clone();
                let listing = self.list(&super::DomainRef::Name(summary.domain.name.clone())).await?;
                return Ok(Some(Belonging { listing, target, layer }));
            }
        }
        let Some(directory) = image.parent() else { return Ok(None) };
        for beside in self.beside(directory).await? {
            let Some((record, layer)) = self.layer_among(image, &beside.records) else { continue };
            let target = record.disk.target.clone();
            let found = self.read_manifests(beside.manifests.clone()).await?;
            let mut domain = beside.manifest.domain;
            domain.disks = beside.records;
            let listing =
                Listing { domain, catalogued: false, snapshots: found.snapshots, unfinished: Vec::new() };
            return Ok(Some(Belonging { listing, target, layer }));
        }
        Ok(None)
    }

    /// Refuses where the catalogue does not have the last word on the domain `name`.
    pub(super) async fn require_last_word_on(&self, name: &DomainName) -> Result<()> {
        match self.catalogue.load(name).await? {
            Some(entry) => self.require_last_word(&entry).await,
            None => Ok(()),
        }
    }
}

/// The directories in `directory` that hold a sound `domain.json`. One that cannot be read tells nothing.
fn manifests_in(directory: &Utf8Path) -> Vec<(Manifests, DomainManifest)> {
    let Ok(entries) = directory.read_dir_utf8() else { return Vec::new() };
    let mut found: Vec<_> = entries
        .take(MAX_ENTRIES)
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| {
            let manifests = Manifests::new(entry.path());
            let manifest = manifests.domain()?;
            Some((manifests, manifest))
        })
        .collect();
    found.sort_by(|(one, _), (other, _)| one.directory().cmp(other.directory()));
    found
}

/// The disks of `domain`, whose manifests are in `directory`: those that lay with the first one are beside the manifests,
/// also where the directory was moved or copied; the others are at the paths told.
fn records_beside(directory: &Utf8Path, domain: &Domain) -> Vec<DiskRecord> {
    let home = domain.disks.first().and_then(|record| record.disk.path.parent());
    let here = directory.parent();
    let at = |record: &DiskRecord| match (here, record.disk.path.file_name()) {
        (Some(here), Some(name)) if record.disk.path.parent() == home => here.join(name),
        _ => record.disk.path.clone(),
    };
    let here = |record: &DiskRecord| DiskRecord {
        disk: Disk { path: at(record), ..record.disk.clone() },
        ..record.clone()
    };
    domain.disks.iter().map(here).collect()
}
