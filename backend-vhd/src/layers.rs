//! VHD images as layers of a chain, and the images beside them that are backed by them.
//!
//! An image names its parent by its unique id, so identity never depends on a name. Null ids lead to raw
//! files.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::PathBuf;

use camino::{Utf8Path, Utf8PathBuf};
use image_files::FileIds;
use image_files::layer_name::layer_path;
use image_files::layers::{ChainFormat, ImageFacts};
pub(crate) use image_files::layers::{Limits, file_of};
use image_files::names::{FileId, file_id, io_error, is_of_catalogue, is_passing_name};
use snapcore::backend::{Base, DiskState, Layer, Undetermined};
use snapcore::{DiskRecord, Error, ErrorKind, LayerName, Result, shell_command};

use crate::image::{self, DiskType, OpenOptions, UniqueId, Vhd, find_parent};

/// The VHD format.
pub(crate) struct VhdChain;

impl ChainFormat for VhdChain {
    fn name(&self) -> &str {
        "vhd"
    }

    fn read(&self, file: &Utf8Path, limits: &Limits, _owned: bool) -> Result<ImageFacts> {
        let opened = reading(file)?;
        let backing = parent_of(&opened, file, limits)?;
        Ok(ImageFacts { virtual_size: opened.size(), internal: Vec::new(), backing })
    }

    fn backing_of(&self, file: &Utf8Path, limits: &Limits) -> Option<Utf8PathBuf> {
        let opened = reading(file).ok()?;
        parent_of(&opened, file, limits).ok()?.map(|(path, _)| path)
    }

    fn dependents(
        &self,
        record: &DiskRecord,
        limits: &Limits,
        state: &mut DiskState,
        seen: &HashMap<FileId, LayerName>,
        open: &FileIds,
    ) -> Result<()> {
        // Overlays of qcow2, other names, and processes that have a layer open.
        backend_qcow2::find_dependents(record, state, open)?;
        children(record, limits, state, seen)
    }

    fn mend_backing(&self) -> &'static str {
        "one of its images has the unique id of another: a copied image needs an id of its own"
    }

    fn rename_backing(&self, child: &Utf8Path, below: &Utf8Path, _of: &str) -> String {
        shell_command(["domsnap", "disk", "relocate", child.as_str(), below.as_str()])
    }
}

/// Opens the image of a layer for reading, without a lock.
pub(crate) fn reading(file: &Utf8Path) -> Result<Vhd> {
    Ok(Vhd::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?)
}

/// Returns the parent's file and format. A file in the child's own directory is named through it as the child
/// is.
pub(crate) fn parent_of(
    child: &Vhd,
    file: &Utf8Path,
    limits: &Limits,
) -> Result<Option<(Utf8PathBuf, String)>> {
    let allowed: Vec<PathBuf> = limits.allowed.iter().map(|path| path.as_std_path().to_owned()).collect();
    let Some(parent) = find_parent(child, &allowed)? else { return Ok(None) };
    let format = if parent.is_raw { "raw" } else { "vhd" };
    let path = Utf8PathBuf::from_path_buf(parent.path).map_err(|path| {
        Error::new(ErrorKind::Unsupported, format!("the path {} is not UTF-8", path.display()))
            .advise("rename the parent image")
    })?;
    let own = file.parent().filter(|own| !own.as_str().is_empty());
    let beside = own.filter(|own| own.canonicalize_utf8().ok().as_deref() == path.parent());
    let path = match (beside, path.file_name()) {
        (Some(own), Some(name)) => own.join(name),
        _ => path,
    };
    Ok(Some((path, format.to_owned())))
}

/// Lists the parents of all images of a disk, down to their bases.
///
/// # Errors
/// [`ErrorKind::NotFound`] if the disk's image, or a parent, is missing; those of the images.
pub(crate) fn bases(record: &DiskRecord, limits: &Limits) -> Result<Vec<Base>> {
    let path = record.disk.path();
    if file_id(path)?.is_none() {
        return Err(Error::new(ErrorKind::NotFound, format!("the disk image {path} does not exist")));
    }
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    let mut next = vec![path.to_owned()];
    for layer in &record.owned {
        let file = layer_path(path, layer);
        match file_id(&file)? {
            Some(_) => next.push(file),
            None if *layer != record.active => found.push(Base::new(path, file)),
            None => {}
        }
    }
    while let Some(image) = next.pop() {
        if !file_id(&image)?.is_some_and(|id| seen.insert(id)) {
            continue;
        }
        if let Some((file, format)) = parent_of(&reading(&image)?, &image, limits)? {
            if format == "vhd" {
                next.push(file.clone());
            }
            found.push(Base::new(image, file));
        }
    }
    Ok(found)
}

/// Adds the VHD images beside the disk whose parent is one of its layers.
fn children(
    record: &DiskRecord,
    limits: &Limits,
    state: &mut DiskState,
    seen: &HashMap<FileId, LayerName>,
) -> Result<()> {
    let mut ids: HashMap<UniqueId, LayerName> = HashMap::new();
    for layer in state.layers.iter().filter(|layer| layer.format == "vhd") {
        ids.insert(reading(layer.path())?.id(), layer.name.clone());
    }
    let own = record.disk.path().parent().map(Utf8Path::to_owned);
    let mut listed = HashSet::new();
    for directory in own.into_iter().chain(limits.allowed.iter().cloned()) {
        let Some(id) = file_id(&directory)? else { continue };
        if !listed.insert(id) {
            continue;
        }
        search(&directory, limits, &mut state.layers, &mut state.undetermined, seen, &ids)?;
    }
    Ok(())
}

/// Looks at the files of one directory.
fn search(
    directory: &Utf8Path,
    limits: &Limits,
    layers: &mut [Layer],
    undetermined: &mut Vec<Undetermined>,
    seen: &HashMap<FileId, LayerName>,
    ids: &HashMap<UniqueId, LayerName>,
) -> Result<()> {
    let failed = |error| io_error(error, format!("cannot list {directory}"));
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        names.extend(entry.map_err(failed)?.file_name().into_string().ok());
    }
    names.sort();
    for name in names.iter().filter(|name| !is_passing_name(name) && !is_of_catalogue(name)) {
        child(&directory.join(name), limits, layers, undetermined, seen, ids);
    }
    Ok(())
}

/// Lists the VHD images beside the one at `path` whose parent it is.
///
/// # Errors
/// Those of the image; the system's.
pub fn find_children(path: &Utf8Path) -> Result<Vec<Utf8PathBuf>> {
    let limits = Limits { max_depth: 1, allowed: Vec::new() };
    let Some(file) = file_id(path)? else { return Ok(Vec::new()) };
    let name = LayerName(path.file_name().unwrap_or_default().to_owned());
    let layer = Layer::new(name.clone(), path, "vhd", 0).named(true).owned(true);
    let mut layers = vec![layer];
    let ids = HashMap::from([(reading(path)?.id(), name.clone())]);
    let seen = HashMap::from([(file, name)]);
    let mut undetermined = Vec::new();
    if let Some(own) = path.parent() {
        search(own, &limits, &mut layers, &mut undetermined, &seen, &ids)?;
    }
    let children = layers.iter().flat_map(|layer| &layer.dependents);
    Ok(children.map(|child| child.path().to_owned()).collect())
}

/// Looks at one file. What is no VHD child has nothing to do with the disk.
fn child(
    file: &Utf8Path,
    limits: &Limits,
    layers: &mut [Layer],
    undetermined: &mut Vec<Undetermined>,
    seen: &HashMap<FileId, LayerName>,
    ids: &HashMap<UniqueId, LayerName>,
) {
    let is_regular = fs::symlink_metadata(file).is_ok_and(|about| about.is_file());
    if !is_regular || file_id(file).ok().flatten().is_none_or(|id| seen.contains_key(&id)) {
        return;
    }
    let opened = match image::Vhd::open(file.as_std_path(), &OpenOptions::read_only().unlocked()) {
        Ok(opened) if opened.disk_type() == DiskType::Differencing => opened,
        Err(error) if error.kind() == image::ErrorKind::Corrupt => {
            let why = format!("it is a damaged VHD: {error}");
            undetermined.push(Undetermined::new(file, why));
            return;
        }
        Ok(_) | Err(_) => return,
    };
    let layer = match parent_of(&opened, file, limits) {
        Ok(Some((parent, _))) => file_id(&parent).ok().flatten().and_then(|id| seen.get(&id)).cloned(),
        Ok(None) => None,
        // It is ours by its id, wherever its locators lead.
        Err(_) => opened.parent_id().and_then(|id| ids.get(&id)).cloned(),
    };
    if let Some(layer) = layer.and_then(|name| layers.iter_mut().find(|layer| layer.name == name)) {
        layer.dependents.push(file.into());
    }
}
