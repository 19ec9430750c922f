//! Manifests beside an image: they name the domain of a file, also where the catalogue does not know it.

use std::collections::HashMap;

use camino::{Utf8Path, Utf8PathBuf};

use super::{Authority, blocking};
use crate::address::DiskAddress;
use crate::domain::{Disk, DiskRecord, Domain};
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::{DomainManifest, ManifestDirectory, ManifestStore};
use crate::name::LayerName;
use crate::registry::Registry;
use crate::service::images::file_id;

/// The most entries of a directory that are examined for manifests.
const MAX_ENTRIES: usize = 100_000;

/// Manifests that were found in a directory, and the domain that they describe, in that directory.
pub(in crate::service) struct Beside {
    /// The manifests.
    pub(in crate::service) manifests: ManifestDirectory,
    /// The domain's disks as they lie here: manifests in a directory that was copied describe the copy.
    pub(in crate::service) records: Vec<DiskRecord>,
    /// The domain's own manifest.
    pub(in crate::service) manifest: DomainManifest,
}

impl Beside {
    /// The path of the directory of the manifests.
    fn place(&self) -> &str {
        self.manifests.place()
    }
}

impl Authority {
    /// The domains that manifests in `directory` describe.
    pub(in crate::service) async fn beside(&self, directory: &Utf8Path) -> Result<Vec<Beside>> {
        let directory = directory.to_path_buf();
        let found = blocking(move || Ok(manifests_in(&directory))).await?;
        Ok(found
            .into_iter()
            .map(|(manifests, manifest)| {
                let records = records_at(Utf8Path::new(manifests.place()).parent(), &manifest.domain);
                Beside { manifests, records, manifest }
            })
            .collect())
    }

    /// Fails for images that manifests beside them call layers of a domain, and not its configured paths.
    /// Fails also for disks of a domain whose manifests are others than those in `own`. Otherwise the domain
    /// would have two owners that do not know of each other.
    pub(in crate::service) async fn refuse_claimed(
        &self,
        disks: &[Disk],
        own: Option<&Utf8Path>,
    ) -> Result<()> {
        let mut seen: HashMap<Utf8PathBuf, Vec<Beside>> = HashMap::new();
        for disk in disks {
            let Some(directory) = disk.local().and_then(Utf8Path::parent).map(Utf8Path::to_path_buf) else {
                continue;
            };
            if !seen.contains_key(&directory) {
                let found = self.beside(&directory).await?;
                seen.insert(directory.clone(), found);
            }
            for beside in seen.get(&directory).into_iter().flatten() {
                let claimed = layer_among(&self.registry, &disk.address, &beside.records);
                let Some((record, _)) = claimed else { continue };
                if record.disk.address != disk.address {
                    return Err(is_a_layer(disk, record, beside));
                }
                if beside.manifests.directory() != own {
                    return Err(is_anothers(disk, beside));
                }
            }
        }
        Ok(())
    }
}

/// The images of a domain that manifests describe, joined as on a command line.
fn images(beside: &Beside) -> String {
    let images: Vec<&str> = beside.records.iter().map(|record| record.disk.address.as_str()).collect();
    images.join(",")
}

fn is_a_layer(disk: &Disk, record: &DiskRecord, beside: &Beside) -> Error {
    let (path, name, manifests) = (&disk.address, &beside.manifest.domain.name, beside.place());
    Error::new(
        ErrorKind::Refused,
        format!(
            "the image {path} is a layer of disk {} of domain {name}, as the manifests in \
             {manifests} say",
            record.disk.target
        ),
    )
    .state("no changes made")
    .advise(format!(
        "name the domain's own images: {}; where that domain is given up, move {manifests} away",
        images(beside)
    ))
}

fn is_anothers(disk: &Disk, beside: &Beside) -> Error {
    let (path, name, manifests) = (&disk.address, &beside.manifest.domain.name, beside.place());
    Error::new(
        ErrorKind::Refused,
        format!("the image {path} is a disk of domain {name}, by the manifests in {manifests}"),
    )
    .state("no changes made")
    .advise(format!(
        "name all its images, in its order: {}; where that domain is given up, move {manifests} \
         away",
        images(beside)
    ))
}

/// Finds the layer, and its record in `records`, that the image is, by its name or by being the same file. A
/// configured path comes first: an active layer has that name too.
pub(in crate::service) fn layer_among<'a>(
    registry: &Registry,
    image: &DiskAddress,
    records: impl IntoIterator<Item = &'a DiskRecord>,
) -> Option<(&'a DiskRecord, LayerName)> {
    let id = image.inode();
    let directory = image.directory().and_then(file_id);
    let mut found = None;
    for record in records {
        if record.disk.address == *image {
            return Some((record, record.active.clone()));
        }
        let Ok(backend) = registry.serving(&record.disk) else { continue };
        if found.is_none() {
            // Layers lie beside the configured path, or have absolute names.
            let beside = record.disk.address.directory().and_then(file_id) == directory;
            let layers = record.owned.iter().chain([&record.active]);
            let layer = layers.filter(|layer| beside || layer.as_str().starts_with('/')).find(|layer| {
                let file = backend.layer_address(record, layer);
                file == *image || (id.is_some() && file.inode() == id)
            });
            found = layer.map(|layer| (record, layer.clone()));
        }
    }
    found
}

/// The directories in `directory` that have a sound `domain.json`. One that cannot be read is ignored.
fn manifests_in(directory: &Utf8Path) -> Vec<(ManifestDirectory, DomainManifest)> {
    let Ok(entries) = directory.read_dir_utf8() else { return Vec::new() };
    let mut found: Vec<_> = entries
        .take(MAX_ENTRIES)
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .filter_map(|entry| {
            let manifests = ManifestDirectory::new(entry.path());
            let manifest = manifests.domain()?;
            Some((manifests, manifest))
        })
        .collect();
    found.sort_by(|(one, _), (other, _)| one.place().cmp(other.place()));
    found
}

/// The disks of `domain`, as its manifests describe it, where its first disk is in the directory `here`.
/// Those that lay with the first one are there too, also where the directory was moved or copied. The others
/// are at the recorded paths.
pub(in crate::service) fn records_at(here: Option<&Utf8Path>, domain: &Domain) -> Vec<DiskRecord> {
    let home = domain.disks.first().and_then(|record| record.disk.address.directory());
    let at = |record: &DiskRecord| match (here, record.disk.local().and_then(Utf8Path::file_name)) {
        (Some(here), Some(name)) if record.disk.address.directory() == home => here.join(name).into(),
        _ => record.disk.address.clone(),
    };
    let here = |record: &DiskRecord| DiskRecord {
        disk: Disk { address: at(record), ..record.disk.clone() },
        ..record.clone()
    };
    domain.disks.iter().map(here).collect()
}
