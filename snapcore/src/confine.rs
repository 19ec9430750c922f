//! Checks of names in files beside images, before any code uses them. Such files are data from the owner of
//! the directory.
//!
//! A layer of ours lies in its disk's directory, so its name is one component. A path is absolute and has no
//! `..`, so that the compared path is the opened path.

use std::collections::HashSet;

use camino::{Utf8Component, Utf8Path};
use confined_files::FileName;

use crate::address::DiskAddress;
use crate::domain::Domain;
use crate::name::LayerName;
use crate::snapshot::Snapshot;

impl Domain {
    /// Checks the names of its disks and of the layers that are ours, as far as they come from a manifest.
    ///
    /// # Errors
    /// The wrong name, with the reason.
    pub fn check_names(&self) -> Result<(), String> {
        let (mut targets, mut paths) = (HashSet::new(), HashSet::new());
        for record in &self.disks {
            let disk = &record.disk;
            disk.address.check()?;
            if !targets.insert(&disk.target) || !paths.insert(&disk.address) {
                return Err(format!("it has the disk {} ({}) twice", disk.target, disk.address));
            }
            for layer in record.owned.iter().chain([&record.active]) {
                check_layer(layer)?;
            }
        }
        Ok(())
    }
}

impl Snapshot {
    /// Checks the names of its layers and of its memory image, as far as they come from a manifest.
    ///
    /// # Errors
    /// The wrong name, with the reason.
    pub fn check_names(&self) -> Result<(), String> {
        for member in &self.disks {
            check_layer(&member.point.layer)?;
        }
        self.check_holds()?;
        match &self.memory {
            Some(memory) => memory.image.check(),
            None => Ok(()),
        }
    }
}

/// Checks a layer's name: a name in the disk's directory, or an absolute path. The latter is only trusted if
/// the user confirms it ([`LayerName::is_elsewhere`]), or if the chain itself leads to it.
fn check_layer(layer: &LayerName) -> Result<(), String> {
    if layer.is_elsewhere() {
        return check_path(Utf8Path::new(layer.as_str()));
    }
    FileName::new(layer.as_str())
        .map(|_| ())
        .map_err(|bad| format!("a layer must lie in its disk's own directory: {bad}"))
}

impl LayerName {
    /// Returns true for a layer that does not lie in its disk's directory.
    pub fn is_elsewhere(&self) -> bool {
        self.as_str().starts_with('/')
    }
}

impl DiskAddress {
    /// Checks that the address is an absolute, canonical path, without `.`, `..` and empty parts, or has a
    /// scheme and no character that cannot be shown.
    ///
    /// # Errors
    /// The message: the violated rule.
    pub fn check(&self) -> Result<(), String> {
        match (self.local(), self.as_str()) {
            (Some(path), _) => check_path(path),
            (None, text) if !text.contains(char::is_control) => Ok(()),
            (None, text) => Err(format!("the address {text:?} has control characters")),
        }
    }
}

/// Checks that a path is absolute and canonical: without `.`, `..` and empty parts.
fn check_path(path: &Utf8Path) -> Result<(), String> {
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
        for bad in ["../b.img", "/etc/../a", "a/b", "..", ".", "", "a\0"] {
            check_layer(&LayerName(bad.to_owned())).expect_err(bad);
        }
        check_layer(&LayerName("a.ds-12345678.img".to_owned())).unwrap();
        for bad in ["a", "/a/../b", "/a/./b", "/a//b", "../a", "/a/", "/a\0"] {
            check_path(Utf8Path::new(bad)).expect_err(bad);
        }
        check_path(Utf8Path::new("/a/b.img")).unwrap();
    }
}
