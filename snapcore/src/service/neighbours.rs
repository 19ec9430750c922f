//! Relations between domains of one catalogue: an image of one domain that is backed by a layer of another
//! keeps that layer.
//!
//! A backend finds the images beside a disk that are backed by its layers. Images of other domains may lie in
//! any directory, so they are read here. Where they cannot be read, or not down to their base (a file system
//! is not mounted), their recorded bases count too. These are recorded when a domain is registered and with
//! each operation of its own. They are recorded too whenever an operation of another domain has read
//! different bases: any tool may give an image another base.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use camino::Utf8Path;

use super::images::{file_id, identity_at};
use super::records::Records;
use crate::address::{DiskAddress, DiskIdentity};
use crate::backend::Base;
use crate::catalogue::{Change, EntrySummary};
use crate::domain::{DiskRecord, Domain};
use crate::error::Result;
use crate::name::{DomainName, LayerName};
use crate::plan::DiskInput;
use crate::registry::Registry;
use crate::state::{DiskState, Undetermined};

/// Knowledge of a domain's images.
#[derive(Default)]
struct Known {
    /// Their bases, as the images have them or else as recorded.
    bases: Vec<Base>,
    /// Images of which nothing is known.
    undetermined: Vec<Undetermined>,
    /// The files that all of them are backed by, where all could be read and the record differs.
    newer: Option<Vec<DiskAddress>>,
}

fn files_of(bases: &[Base]) -> Vec<DiskAddress> {
    let mut files: Vec<DiskAddress> = bases.iter().map(|base| base.file.clone()).collect();
    files.sort();
    files.dedup();
    files
}

/// Reads the bases of other domains' images.
#[derive(Clone)]
pub(super) struct Neighbours {
    records: Records,
    registry: Arc<Registry>,
    /// The bases that were found for other domains' images while a change was planned, where the record
    /// differs.
    newer: Arc<Mutex<BTreeMap<DomainName, Vec<DiskAddress>>>>,
}

impl Neighbours {
    /// The domains of a catalogue.
    pub(super) fn new(records: Records, registry: Arc<Registry>) -> Self {
        Self { records, registry, newer: Arc::default() }
    }

    /// Adds to the states of `disks`, of the domain `own`, the images of other domains that are backed by
    /// their layers.
    pub(super) async fn add_neighbours(&self, own: &DomainName, disks: &mut [&mut DiskInput]) -> Result<()> {
        let mut layers: HashMap<DiskIdentity, (usize, LayerName)> = HashMap::new();
        for (index, disk) in disks.iter().enumerate() {
            for layer in &disk.state.layers {
                let identity = identity_at(&self.registry, &layer.address).await?;
                layers.extend(identity.map(|id| (id, (index, layer.name.clone()))));
            }
        }
        for other in self.records.domains().await? {
            if other.domain.name == *own {
                continue;
            }
            let Known { bases, undetermined, newer } = self.bases_of(&other).await;
            if let Some(newer) = newer {
                self.newer_bases().insert(other.domain.name.clone(), newer);
            }
            for disk in disks.iter_mut() {
                disk.state.undetermined.extend(undetermined.iter().cloned());
            }
            for Base { image, file } in bases {
                let (of_file, of_image) = match self.identities(&file, &image).await {
                    Ok(identities) => identities,
                    // It may be one of our layers.
                    Err(error) => {
                        let why = format!("what it is backed by, {file}, cannot be identified ({error})");
                        for disk in disks.iter_mut() {
                            disk.state.undetermined.push(Undetermined::new(image.clone(), why.clone()));
                        }
                        continue;
                    }
                };
                let Some((index, layer)) = of_file.and_then(|id| layers.get(&id)) else { continue };
                if of_image.is_some_and(|id| layers.contains_key(&id)) {
                    continue;
                }
                let Some(disk) = disks.get_mut(*index) else { continue };
                let path = disk.record.disk.address.clone();
                add(&mut disk.state, layer, &path, &image, &file);
            }
        }
        Ok(())
    }

    /// Returns the identities of two images.
    async fn identities(
        &self,
        one: &DiskAddress,
        other: &DiskAddress,
    ) -> Result<(Option<DiskIdentity>, Option<DiskIdentity>)> {
        Ok((identity_at(&self.registry, one).await?, identity_at(&self.registry, other).await?))
    }

    /// Returns the bases of a domain's images.
    async fn bases_of(&self, entry: &EntrySummary) -> Known {
        let mut known = Known::default();
        let mut whole = true;
        for record in &entry.domain.disks {
            let path = &record.disk.address;
            let read = self.read_bases(record).await;
            whole &= matches!(&read, Ok((_, true)));
            match (read, &entry.bases) {
                (Ok((found, true)), _) | (Ok((found, false)), None) => known.bases.extend(found),
                // A file below does not exist now: its own base is known only from the record.
                (Ok((found, false)), Some(recorded)) => {
                    let last = found.last().map_or(path, |base| &base.file).clone();
                    let base = |file: &DiskAddress| Base { image: last.clone(), file: file.clone() };
                    known.bases.extend(found);
                    known.bases.extend(recorded.iter().map(base));
                }
                (Err(_), Some(recorded)) => {
                    let base = |file: &DiskAddress| Base { image: path.clone(), file: file.clone() };
                    known.bases.extend(recorded.iter().map(base));
                }
                // An image that was removed needs nothing; one whose directory does not exist may be back
                // tomorrow.
                (Err(_), None) if self.is_gone(record).await => {}
                (Err(error), None) => known.undetermined.push(Undetermined {
                    file: path.clone(),
                    why: format!(
                        "it is a disk of domain {name}, and cannot be read ({error}); mount its file system, or take that \
                         domain out with `domsnap domain remove {name}`",
                        name = entry.domain.name
                    ),
                }),
            }
        }
        if whole {
            let files = files_of(&known.bases);
            known.newer = (entry.bases.as_ref() != Some(&files)).then_some(files);
        }
        known
    }

    /// Returns true if a disk's image does not exist, although its place does.
    async fn is_gone(&self, record: &DiskRecord) -> bool {
        let address = &record.disk.address;
        match (address.local(), self.registry.serving(&record.disk)) {
            (Some(_), _) => address.inode().is_none() && address.directory().is_some_and(Utf8Path::exists),
            (None, Ok(backend)) => backend.is_gone(record).await.unwrap_or(false),
            (None, Err(_)) => false,
        }
    }

    /// Returns the bases of a disk's images, and true if all of them could be read, down to their bases.
    async fn read_bases(&self, record: &DiskRecord) -> Result<(Vec<Base>, bool)> {
        let found = self.registry.serving(&record.disk)?.bases(record).await?;
        let mut whole = true;
        for base in &found {
            whole &= matches!(identity_at(&self.registry, &base.file).await, Ok(Some(_)));
        }
        Ok((found, whole))
    }

    /// The change that records the bases which `domain`'s images need of others; none where they cannot be
    /// read.
    pub(super) async fn record_bases(&self, domain: &Domain) -> Option<Change> {
        let mut bases: Vec<Base> = Vec::new();
        for record in &domain.disks {
            match self.read_bases(record).await {
                Ok((found, true)) => bases.extend(found),
                _ => return None,
            }
        }
        Some(Change::Bases(files_of(&bases)))
    }

    /// Returns the bases that were found since the last call, to be recorded.
    pub(super) fn take_newer(&self) -> BTreeMap<DomainName, Vec<DiskAddress>> {
        std::mem::take(&mut *self.newer_bases())
    }

    fn newer_bases(&self) -> MutexGuard<'_, BTreeMap<DomainName, Vec<DiskAddress>>> {
        self.newer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The images of the catalogue's domains that are backed by the file `image`, whatever its name.
    pub(super) async fn backed_by(&self, image: &Utf8Path) -> Result<Vec<DiskAddress>> {
        let Some(wanted) = file_id(image) else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for entry in self.records.domains().await? {
            let Known { bases, .. } = self.bases_of(&entry).await;
            found.extend(
                bases.into_iter().filter(|base| base.file.inode() == Some(wanted)).map(|base| base.image),
            );
        }
        found.sort();
        found.dedup();
        Ok(found)
    }
}

fn add(
    state: &mut DiskState,
    layer: &LayerName,
    path: &DiskAddress,
    image: &DiskAddress,
    file: &DiskAddress,
) {
    if let Some(known) = state.layers.iter_mut().find(|known| known.name == *layer)
        && !known.dependents.contains(image)
    {
        known.dependents.push(image.clone());
    }
    let by_path = *layer == state.active && names_path(file, path)
        // The layer has another name than the path.
        && path.local().is_none_or(|path| !path.ends_with(layer.as_str()));
    if by_path && !state.path_dependents.contains(image) {
        state.path_dependents.push(image.clone());
    }
}

/// Returns true if a backing file is named by a disk's configured path.
fn names_path(file: &DiskAddress, path: &DiskAddress) -> bool {
    match (file.directory(), path.directory()) {
        (Some(one), Some(other)) => file.name() == path.name() && file_id(one) == file_id(other),
        _ => file == path,
    }
}
