//! Domains whose images were moved: found by what the manifests beside the images say of the catalogue, of
//! the domain and of its revision, never by a name alone.

use std::collections::VecDeque;
use std::os::unix::fs::MetadataExt;

use camino::{Utf8Path, Utf8PathBuf};

use super::{Registrar, not_catalogued};
use crate::address::DiskAddress;
use crate::backend::is_gone_file;
use crate::catalogue::{CatalogueId, Entry};
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::ManifestStore;
use crate::service::DomainRef;
use crate::service::authority::Beside;
use crate::service::images::images_of;
use crate::service::importer::ImportSource;

/// How deep directories are searched, from the nearest one that is left of the domain's own.
const DEPTH: usize = 3;

/// The most directories that are searched.
const MAX_DIRECTORIES: usize = 20_000;

/// A domain of the catalogue, and where its disks seem to be now.
pub(super) struct Moved {
    /// What the catalogue has of it.
    pub(super) entry: Entry,
    /// The domain with all its disks: those that were moved, and those that stayed.
    now: Domain,
}

impl Moved {
    /// What `beside` says of a domain of `catalogue`, if its images are there and gone from where the
    /// catalogue has them.
    fn by(beside: &Beside, catalogue: CatalogueId, entry: &Entry) -> Option<Self> {
        let manifest = &beside.manifest;
        // The same catalogue wrote them, of this domain as it is: they are neither an older copy, nor newer
        // than a catalogue that was brought back from a backup, nor another domain's of this name.
        if manifest.catalogue != Some(catalogue)
            || manifest.domain.name != entry.domain.name
            || manifest.revision != entry.revision
        {
            return None;
        }
        let mut now = entry.domain.clone();
        for record in &mut now.disks {
            let here = beside.records.iter().find(|here| here.disk.target == record.disk.target)?;
            let address = &here.disk.address;
            if *address == record.disk.address {
                continue;
            }
            address.inode()?;
            record.disk.local().filter(|path| is_missing(path))?;
            record.disk.address = address.clone();
        }
        (now.disks != entry.domain.disks).then(|| Self { entry: entry.clone(), now })
    }

    /// The source of an import from the new place. What the catalogue has of the domain stays.
    pub(super) fn source(&self) -> ImportSource {
        let disks = self.now.disks.iter().map(|record| record.disk.clone()).collect();
        ImportSource { disks, ..ImportSource::of_entry(self.entry.clone()) }
    }

    /// The error for an import of these images by a user who did not say that they were moved.
    pub(super) fn unconfirmed(&self) -> Error {
        let (name, old, images) =
            (&self.entry.domain.name, images_of(&self.entry.domain), images_of(&self.now));
        Error::new(
            ErrorKind::Refused,
            format!(
                "manifests beside {images} say that these are the images of domain {name}, which the catalogue has \
                 at {old}, where they are gone"
            ),
        )
        .state("no changes made")
        .advise(format!(
            "if they were moved: `domsnap import --replace {images}`; if this is a copy of them, give it another \
             name: `domsnap import --name NEW {images}`"
        ))
    }
}

impl Registrar {
    /// The domain of the catalogue that `images` are, if its own images are gone.
    pub(super) async fn moved_to(&self, images: &[DiskAddress]) -> Result<Option<Moved>> {
        let Some(directory) = images.first().and_then(DiskAddress::directory) else { return Ok(None) };
        let Some(catalogue) = self.records.identity().await? else { return Ok(None) };
        for beside in self.authority.beside(directory).await? {
            let Some(entry) = self.records.find(&beside.manifest.domain.name).await? else { continue };
            let Some(moved) = Moved::by(&beside, catalogue, &entry) else { continue };
            let has =
                |image: &DiskAddress| moved.now.disks.iter().any(|record| record.disk.address == *image);
            if images.iter().all(has) {
                return Ok(Some(moved));
            }
        }
        Ok(None)
    }

    /// Searches the places where a domain's images may have been moved to. Returns the images in each.
    pub(in crate::service) async fn find_moved(&self, reference: &DomainRef) -> Result<Vec<DomainRef>> {
        let DomainRef::Name(name) = reference else { return Ok(Vec::new()) };
        let entry = self.records.find(name).await?.ok_or_else(|| not_catalogued(reference))?;
        let first =
            entry.domain.disks.iter().find_map(|record| record.disk.local().filter(|path| is_missing(path)));
        let Some(parent) = first.and_then(Utf8Path::parent) else { return Ok(Vec::new()) };
        let Some(catalogue) = self.records.identity().await? else { return Ok(Vec::new()) };
        let parent = parent.to_owned();
        let directories =
            tokio::task::spawn_blocking(move || directories_near(&parent)).await.map_err(|cause| {
                Error::new(ErrorKind::Internal, "the search for moved images broke off").because(cause)
            })?;
        let mut found = Vec::new();
        for directory in directories {
            for beside in self.authority.beside(&directory).await? {
                // What a search finds was written by this user. Anyone can write what these files say.
                let moved = Moved::by(&beside, catalogue, &entry)
                    .filter(|_| directory_is_own(Utf8Path::new(beside.manifests.place())));
                found.extend(moved.map(|moved| DomainRef::disks_of(&moved.now)));
            }
        }
        found.dedup();
        Ok(found)
    }
}

/// Returns true for a directory of this user, and no link to one.
fn directory_is_own(path: &Utf8Path) -> bool {
    let own = rustix::process::geteuid().as_raw();
    path.symlink_metadata().is_ok_and(|about| about.is_dir() && about.uid() == own)
}

/// Returns true if an image does not exist, or its directory does not.
fn is_missing(path: &Utf8Path) -> bool {
    is_gone_file(path) || path.parent().is_some_and(|parent| is_gone_file(parent) || is_missing(parent))
}

/// The directories of one file system near one that may be gone, the nearest first. Links are not followed:
/// they may lead anywhere.
fn directories_near(gone: &Utf8Path) -> Vec<Utf8PathBuf> {
    let there = |above: &&Utf8Path| above.symlink_metadata().is_ok_and(|about| about.is_dir());
    let Some(start) = gone.ancestors().find(there) else { return Vec::new() };
    let Ok(device) = start.metadata().map(|about| about.dev()) else { return Vec::new() };
    let mut waiting = VecDeque::from([(start.to_owned(), 0)]);
    let mut found = Vec::new();
    while let Some((directory, depth)) = waiting.pop_front() {
        if depth < DEPTH && waiting.len() + found.len() < MAX_DIRECTORIES {
            let entries = directory.read_dir_utf8().into_iter().flatten().flatten();
            let below = entries.filter(|entry| {
                entry.file_type().is_ok_and(|kind| kind.is_dir())
                    && entry.metadata().is_ok_and(|about| about.dev() == device)
            });
            waiting.extend(below.map(|entry| (entry.into_path(), depth + 1)));
        }
        found.push(directory);
    }
    found
}
