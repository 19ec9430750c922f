//! Domains of one catalogue know each other: an image of one that is backed by a layer of another keeps that layer.
//!
//! A backend finds the images beside a disk that are backed by its layers. Those of other domains may lie in any directory, so
//! they are read here. Where they cannot be read (their file system is not mounted), what was recorded of them counts.

use std::collections::HashMap;

use camino::{Utf8Path, Utf8PathBuf};

use super::Inner;
use super::identity::file_id;
use crate::catalogue::{Change, EntrySummary};
use crate::plan::DiskInput;
use crate::{Base, DiskState, Domain, DomainName, FileIdentity, LayerName, Result, Unclear};

impl Inner {
    /// Adds to the states of `disks`, of the domain `own`, which images of other domains are backed by their layers.
    pub(super) async fn add_neighbours(&self, own: &DomainName, disks: &mut [DiskInput]) -> Result<()> {
        let mut layers: HashMap<FileIdentity, (usize, LayerName)> = HashMap::new();
        for (index, disk) in disks.iter().enumerate() {
            for layer in &disk.state.layers {
                layers.extend(file_id(&layer.file).map(|id| (id, (index, layer.name.clone()))));
            }
        }
        for other in self.catalogue.domains().await? {
            if other.domain.name == *own {
                continue;
            }
            let (bases, unclear) = self.bases_of(&other).await;
            for disk in disks.iter_mut() {
                disk.state.unclear.extend(unclear.iter().cloned());
            }
            for Base { image, file } in bases {
                let Some((index, layer)) = file_id(&file).and_then(|id| layers.get(&id)) else { continue };
                if file_id(&image).is_some_and(|id| layers.contains_key(&id)) {
                    continue;
                }
                let Some(disk) = disks.get_mut(*index) else { continue };
                let path = disk.record.disk.path.clone();
                add(&mut disk.state, layer, &path, &image, &file);
            }
        }
        Ok(())
    }

    /// What the images of a domain are backed by, as they say or else as it is recorded; and those that nothing is known of.
    async fn bases_of(&self, entry: &EntrySummary) -> (Vec<Base>, Vec<Unclear>) {
        let (mut bases, mut unclear) = (Vec::new(), Vec::new());
        for record in &entry.domain.disks {
            let path = &record.disk.path;
            let read = match self.registry.get(&record.disk.format) {
                Ok(backend) => backend.bases(record).await,
                Err(error) => Err(error),
            };
            match (read, &entry.bases) {
                (Ok(found), _) => bases.extend(found),
                (Err(_), Some(recorded)) => {
                    let base = |file: &Utf8PathBuf| Base { image: path.clone(), file: file.clone() };
                    bases.extend(recorded.iter().map(base));
                }
                // An image that was removed needs nothing; one whose directory is not there may be back tomorrow.
                (Err(_), None) if file_id(path).is_none() && path.parent().is_some_and(Utf8Path::exists) => {}
                (Err(error), None) => unclear.push(Unclear {
                    file: path.clone(),
                    why: format!(
                        "it is a disk of domain {name}, and cannot be read ({error}); mount its file system, or take that \
                         domain out with `domsnap domain remove {name}`",
                        name = entry.domain.name
                    ),
                }),
            }
        }
        (bases, unclear)
    }

    /// What the catalogue is to know of the images that `domain` needs of others; nothing where they cannot be read.
    pub(super) async fn record_bases(&self, domain: &Domain) -> Option<Change> {
        let mut files: Vec<Utf8PathBuf> = Vec::new();
        for record in &domain.disks {
            let found = self.registry.get(&record.disk.format).ok()?.bases(record).await.ok()?;
            files.extend(found.into_iter().map(|base| base.file));
        }
        files.sort();
        files.dedup();
        Some(Change::Bases(files))
    }

    /// The images of the catalogue's domains that are backed by the file `image`, whatever its name.
    pub(super) async fn backed_by(&self, image: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
        let Some(wanted) = file_id(image) else { return Ok(Vec::new()) };
        let mut found = Vec::new();
        for entry in self.catalogue.domains().await? {
            let (bases, _) = self.bases_of(&entry).await;
            found.extend(
                bases.into_iter().filter(|base| file_id(&base.file) == Some(wanted)).map(|base| base.image),
            );
        }
        found.sort();
        found.dedup();
        Ok(found)
    }
}

fn add(state: &mut DiskState, layer: &LayerName, path: &Utf8Path, image: &Utf8PathBuf, file: &Utf8Path) {
    if let Some(known) = state.layers.iter_mut().find(|known| known.name == *layer)
        && !known.dependents.contains(image)
    {
        known.dependents.push(image.clone());
    }
    let by_path = *layer == state.active
        && file.file_name() == path.file_name()
        && file.parent().and_then(file_id) == path.parent().and_then(file_id)
        && crate::chain::layer_path(path, layer) != path;
    if by_path && !state.on_path.contains(image) {
        state.on_path.push(image.clone());
    }
}
