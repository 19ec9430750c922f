//! The state of a raw disk on the machine.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::sync::Arc;

use backend_qcow2::find_dependents;
use camino::Utf8Path;
use image_files::layer_name::{disk_name, is_layer_name, layer_path};
use image_files::names::{self, io_error};
use image_files::{FileIds, look_at_path, manifests_beside, refused_link, size_at};
use jiff::Timestamp;
use snapcore::backend::{DiskState, FoundSnapshots, InspectDepth, Layer};
use snapcore::manifest::{ManifestDirectory, ManifestStore};
use snapcore::{Disk, DiskRecord, Error, ErrorKind, LayerName, Point, Result, Snapshot};

/// The name of the active layer. It is the path's own and never changes.
pub(crate) fn active_name(disk: &Disk) -> LayerName {
    LayerName(disk.path().file_name().unwrap_or("disk").to_owned())
}

/// Returns true for a block device, by its own name or by a link.
pub(crate) fn is_device(path: &Utf8Path) -> bool {
    path.metadata().is_ok_and(|about| about.file_type().is_block_device())
}

/// Refuses a device that this machine itself uses: for a mounted file system, a volume group, an array.
pub(crate) fn refuse_used_device(path: &Utf8Path) -> Result<()> {
    let alone =
        OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed()).open(path);
    match alone {
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()) => {
            Err(Error::new(
                ErrorKind::Busy,
                format!("this machine itself uses {path}: it is mounted, or part of another device"),
            )
            .state("no changes made")
            .advise("unmount it here (`lsblk` shows by what it is used): two that write one disk destroy it"))
        }
        Err(error) => Err(io_error(error, format!("cannot open {path}"))),
        Ok(_) => Ok(()),
    }
}

/// Refuses a path of which no points can be taken.
pub(crate) fn check_path(disk: &Disk) -> Result<()> {
    let path = disk.path();
    let about = look_at_path(path)?;
    if is_device(path) {
        return Ok(());
    }
    if about.is_symlink() && std::fs::metadata(path).is_ok_and(|about| about.is_file()) {
        return Err(refused_link(path, ", which a revert would replace by a file"));
    }
    if !about.is_file() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{path} is neither a file nor a block device"),
        )
        .advise("give the path of a disk image, or of the device"));
    }
    let configured = path.with_file_name(disk_name(path));
    if configured != *path && names::file_id(&configured)?.is_some() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("{path} has the name of a point of the disk {configured}"),
        )
        .advise(format!("use {configured}, or give the file another name")));
    }
    Ok(())
}

/// Reads the state of the disk.
pub(crate) fn inspect(record: &DiskRecord, depth: InspectDepth, open: &FileIds) -> Result<DiskState> {
    let path = record.disk.path();
    check_path(&record.disk)?;
    let mut layers = vec![layer(record, record.active.clone(), path)?];
    if depth != InspectDepth::Active {
        for name in record.owned.iter().filter(|name| **name != record.active) {
            let file = layer_path(path, name);
            if names::file_id(&file)?.is_some() {
                names::require_own(&file)?;
                layers.push(layer(record, name.clone(), &file)?);
            }
        }
    }
    let mut state = DiskState::new(record.disk.target.clone(), record.active.clone(), layers);
    // No image beside a device can be backed by it.
    if depth == InspectDepth::Dependents && !is_device(path) {
        find_dependents(record, &mut state, open)?;
    }
    Ok(state)
}

fn layer(record: &DiskRecord, name: LayerName, file: &Utf8Path) -> Result<Layer> {
    let failed = |error| io_error(error, format!("cannot look at {file}"));
    let about = std::fs::metadata(file).map_err(failed)?;
    let size = size_at(file).map_err(failed)?;
    let owned = record.owned.contains(&name);
    Ok(Layer::new(name, file, "raw", size).owned(owned).named(true).allocated(about.blocks() * 512))
}

/// Lists the files beside the disk that are named like its points and are not in the catalogue.
pub(crate) fn strays(record: &DiskRecord) -> Result<Vec<LayerName>> {
    let path = record.disk.path();
    let directory = path.parent().unwrap_or(Utf8Path::new("."));
    let failed = |error| io_error(error, format!("cannot list {directory}"));
    let mut strays = Vec::new();
    if is_device(path) {
        return Ok(strays);
    }
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(name) = name.to_str().filter(|name| is_layer_name(path, name)) else { continue };
        let layer = LayerName(name.to_owned());
        if !record.owned.contains(&layer) && layer != record.active {
            strays.push(layer);
        }
    }
    strays.sort();
    Ok(strays)
}

/// Imports such files as snapshots, oldest first.
pub(crate) fn discover(record: &mut DiskRecord, known: &[Point]) -> Result<Vec<Snapshot>> {
    let mut dated: Vec<(Timestamp, LayerName, u64)> = Vec::new();
    for name in strays(record)? {
        let file = layer_path(record.disk.path(), &name);
        let about =
            std::fs::metadata(&file).map_err(|error| io_error(error, format!("cannot look at {file}")))?;
        // A second name of the current image is not a point.
        if known.contains(&Point::external(name.clone())) || names::same_file(&file, record.disk.path())? {
            continue;
        }
        let modified = about.modified().ok().and_then(|time| Timestamp::try_from(time).ok());
        dated.push((modified.unwrap_or(Timestamp::UNIX_EPOCH), name, about.len()));
    }
    dated.sort();
    let mut found = FoundSnapshots::default();
    for (modified, name, size) in dated {
        record.owned.push(name.clone());
        let stem = Utf8Path::new(name.as_str()).file_stem().unwrap_or("point").to_owned();
        found.add(record, &stem, modified, Point::external(name), size);
    }
    Ok(found.into_snapshots())
}

/// The directory of manifests of devices. No file can lie beside a device.
const DEVICES: &str = "/var/lib/domsnap/devices";

/// The manifests of the domain whose first disk is `disk`.
pub(crate) fn manifests(disk: &Disk) -> Arc<dyn ManifestStore> {
    if is_device(disk.path()) {
        let directory = Utf8Path::new(DEVICES).join(format!("{}.domsnap", active_name(disk)));
        return Arc::new(ManifestDirectory::new(directory));
    }
    manifests_beside(disk.path())
}
