//! Domains whose images were moved: found by what the manifests beside the images say of the catalogue, of
//! the domain and of its revision, never by a name alone.

use std::collections::{BTreeSet, VecDeque};
use std::os::unix::fs::MetadataExt;

use camino::{Utf8Path, Utf8PathBuf};

use super::{Registrar, not_catalogued};
use crate::address::DiskAddress;
use crate::backend::is_gone_file;
use crate::catalogue::Entry;
use crate::domain::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::ManifestStore;
use crate::service::DomainRef;
use crate::service::importer::ImportSource;
use crate::shell::shell_word;

/// How deep directories are searched, from the nearest one that is left of the domain's own.
const DEPTH: usize = 3;

/// The most directories that are searched.
const MAX_DIRECTORIES: usize = 20_000;

/// A domain of the catalogue, and where its disks seem to be now.
pub(super) struct Moved {
    pub(super) entry: Entry,
    /// All its disks: those that were moved, and those that stayed.
    pub(super) disks: Vec<Disk>,
}

impl Moved {
    /// The source of an import from the new place. What the catalogue has of the domain stays.
    pub(super) fn source(&self) -> ImportSource {
        ImportSource { disks: self.disks.clone(), ..ImportSource::of_entry(self.entry.clone()) }
    }

    /// The error for an import of these images by a user who did not say that they were moved.
    pub(super) fn unconfirmed(&self) -> Error {
        let (name, images) = (&self.entry.domain.name, self.images());
        let old = joined(self.entry.domain.disks.iter().map(|record| &record.disk.address));
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

    fn images(&self) -> String {
        joined(self.disks.iter().map(|disk| &disk.address))
    }
}

/// Images as one word of a command line.
fn joined<'a>(images: impl Iterator<Item = &'a DiskAddress>) -> String {
    shell_word(&images.map(DiskAddress::as_str).collect::<Vec<_>>().join(","))
}

impl Registrar {
    /// The domain of the catalogue that `images` are, if its own images are gone.
    pub(super) async fn moved_to(&self, images: &[DiskAddress]) -> Result<Option<Moved>> {
        let Some(directory) = images.first().and_then(DiskAddress::directory) else { return Ok(None) };
        let found = self.moved_into(directory, None).await?;
        Ok(found
            .into_iter()
            .find(|moved| images.iter().all(|image| moved.disks.iter().any(|disk| disk.address == *image))))
    }

    /// The domains whose images are in a directory, and gone from where the catalogue has them. With
    /// `wanted`, this one alone.
    async fn moved_into(&self, directory: &Utf8Path, wanted: Option<&Entry>) -> Result<Vec<Moved>> {
        let mut moved = Vec::new();
        let Some(catalogue) = self.records.identity().await? else { return Ok(moved) };
        for beside in self.authority.beside(directory).await? {
            let name = &beside.manifest.domain.name;
            // What a search finds was written by this user. Anyone can write what these files say.
            let is_own = || directory_is_own(Utf8Path::new(beside.manifests.place()));
            if wanted.is_some_and(|wanted| wanted.domain.name != *name || !is_own()) {
                continue;
            }
            let Some(entry) = self.records.find(name).await? else { continue };
            // The same catalogue wrote them, of this domain, and not later than it knows: neither an older
            // backup of the catalogue, nor another domain of this name.
            if !beside.manifest.is_known_to(catalogue, &entry)
                || beside.manifest.catalogue != Some(catalogue)
                || beside.manifest.revision != entry.revision
            {
                continue;
            }
            let now = |record: &crate::domain::DiskRecord| {
                let here = beside.records.iter().find(|here| here.disk.target == record.disk.target)?;
                let address = &here.disk.address;
                let stays = *address == record.disk.address;
                let is_here = stays || address.inode().is_some();
                let was_left = stays || record.disk.local().is_some_and(is_missing);
                (is_here && was_left).then(|| Disk { address: address.clone(), ..record.disk.clone() })
            };
            let disks: Option<Vec<Disk>> = entry.domain.disks.iter().map(now).collect();
            let Some(disks) = disks else { continue };
            let has_moved =
                disks.iter().zip(&entry.domain.disks).any(|(now, was)| now.address != was.disk.address);
            if has_moved {
                moved.push(Moved { entry, disks });
            }
        }
        Ok(moved)
    }

    /// Searches the places where a domain's images may have been moved to. Returns each as a list of images.
    pub(in crate::service) async fn find_moved(
        &self,
        reference: &DomainRef,
    ) -> Result<Vec<Vec<DiskAddress>>> {
        let DomainRef::Name(name) = reference else { return Ok(Vec::new()) };
        let entry = self.records.find(name).await?.ok_or_else(|| not_catalogued(reference))?;
        let first =
            entry.domain.disks.iter().find_map(|record| record.disk.local().filter(|path| is_missing(path)));
        let Some(parent) = first.and_then(Utf8Path::parent) else { return Ok(Vec::new()) };
        let parent = parent.to_owned();
        let directories =
            tokio::task::spawn_blocking(move || directories_near(&parent)).await.map_err(|cause| {
                Error::new(ErrorKind::Internal, "the search for moved images broke off").because(cause)
            })?;
        let mut found = BTreeSet::new();
        for directory in directories {
            for moved in self.moved_into(&directory, Some(&entry)).await? {
                found.insert(moved.disks.into_iter().map(|disk| disk.address).collect::<Vec<_>>());
            }
        }
        Ok(found.into_iter().collect())
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
