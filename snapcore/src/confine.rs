//! Checks of names in files beside images, before any code uses them. Such files are data from the owner of
//! the directory.
//!
//! A layer of ours lies in its disk's directory, so its name is one component. A path is absolute and has no
//! `..`, so that the compared path is the opened path.

use std::collections::HashSet;

use camino::{Utf8Component, Utf8Path};
use confined_files::FileName;

use crate::{DiskAddress, Domain, LayerName, Snapshot};

/// Checks the names of a domain's disks and of the layers that are ours.
///
/// # Errors
/// The wrong name, with the reason.
pub fn check_domain(domain: &Domain) -> Result<(), String> {
    let (mut targets, mut paths) = (HashSet::new(), HashSet::new());
    for record in &domain.disks {
        let disk = &record.disk;
        check_address(&disk.address)?;
        if !targets.insert(&disk.target) || !paths.insert(&disk.address) {
            return Err(format!("it has the disk {} ({}) twice", disk.target, disk.address));
        }
        for layer in record.owned.iter().chain([&record.active]) {
            check_layer(layer)?;
        }
    }
    Ok(())
}

/// Checks the names of a snapshot's layers and of its memory image.
///
/// # Errors
/// The wrong name, with the reason.
pub fn check_snapshot(snapshot: &Snapshot) -> Result<(), String> {
    for member in &snapshot.disks {
        check_layer(&member.point.layer)?;
    }
    match &snapshot.memory {
        Some(memory) => check_path(&memory.file),
        None => Ok(()),
    }
}

/// Checks a layer's name: a name in the disk's directory, or an absolute path. The latter is only trusted if
/// the user confirms it ([`is_elsewhere`]), or if the chain itself leads to it.
fn check_layer(layer: &LayerName) -> Result<(), String> {
    if is_elsewhere(layer) {
        return check_path(Utf8Path::new(layer.as_str()));
    }
    check_name(layer.as_str()).map_err(|bad| format!("a layer must lie in its disk's own directory: {bad}"))
}

/// Checks that a text is the name of a file in a directory: one component of at most 255 bytes.
///
/// # Errors
/// The reason.
pub fn check_name(name: &str) -> Result<(), String> {
    FileName::new(name).map(|_| ()).map_err(|bad| bad.to_string())
}

/// Returns true for a layer that does not lie in its disk's directory.
pub fn is_elsewhere(layer: &LayerName) -> bool {
    layer.as_str().starts_with('/')
}

/// Checks that an address is a path, as [`check_path`] does, or has a scheme and no character that cannot be
/// shown.
///
/// # Errors
/// The message: the violated rule.
pub fn check_address(address: &DiskAddress) -> Result<(), String> {
    match (address.local(), address.as_str()) {
        (Some(path), _) => check_path(path),
        (None, text) if !text.contains(char::is_control) => Ok(()),
        (None, text) => Err(format!("the address {text:?} has control characters")),
    }
}

/// Checks that a path is absolute and canonical: without `.`, `..` and empty parts.
///
/// # Errors
/// The reason.
pub fn check_path(path: &Utf8Path) -> Result<(), String> {
    let plain =
        path.components().all(|part| matches!(part, Utf8Component::RootDir | Utf8Component::Normal(_)));
    // `components` skips single dots and doubled slashes: such a path differs from what is compared with it.
    let normal: camino::Utf8PathBuf = path.components().collect();
    if path.is_absolute() && plain && normal.as_str() == path.as_str() && !path.as_str().contains('\0') {
        return Ok(());
    }
    Err(format!("the path {path:?} must be absolute, without '.', '..' and empty parts"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_lead_out_are_refused() {
        for bad in ["../b.qcow2", "/etc/../a", "a/b", "..", ".", "", "a\0"] {
            check_layer(&LayerName(bad.to_owned())).expect_err(bad);
        }
        check_layer(&LayerName("a.ds-12345678.qcow2".to_owned())).unwrap();
        for bad in ["a", "/a/../b", "/a/./b", "/a//b", "../a", "/a/", "/a\0"] {
            check_path(Utf8Path::new(bad)).expect_err(bad);
        }
        check_path(Utf8Path::new("/a/b.qcow2")).unwrap();
    }
}
