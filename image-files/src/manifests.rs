//! The manifests of a disk that is a file.

use std::sync::Arc;

use camino::Utf8Path;
use snapcore::manifest::{ManifestDirectory, ManifestStore};

use crate::layer_name::disk_name;

/// The manifests in the directory beside the disk at `path`: the same directory for all its layers.
pub fn manifests_beside(path: &Utf8Path) -> Arc<dyn ManifestStore> {
    Arc::new(ManifestDirectory::new(path.with_file_name(format!("{}.domsnap", disk_name(path)))))
}
