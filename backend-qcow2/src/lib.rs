//! The qcow2 backend of domsnap, with an image engine of its own.
//!
//! A program registers [`Qcow2`]. [`image`] is the engine below it: it reads and writes images, and knows
//! nothing of domains.

#![forbid(unsafe_code)]

mod attached;
mod backend;
mod backing_string;
mod below;
mod clone;
mod dependents;
pub mod image;
mod layers;
mod overlay;
mod preflight;
mod reading;
mod salvage;
mod sizes;
mod steps;
mod tags;

use std::sync::Arc;

pub use backend::{DEFAULT_MAX_DEPTH, Qcow2};
pub use dependents::find_dependents;
pub use overlay::{NewOverlay, freeze_under};

/// Registers the backend with its default limits.
///
/// # Errors
/// If the registry has a backend for qcow2 already.
pub fn register(registry: &mut snapcore::Registry) -> snapcore::Result<()> {
    registry.register(Arc::new(Qcow2::new()))
}

#[cfg(test)]
mod tests {
    use camino::Utf8Path;

    use super::*;

    /// A hypervisor may have a disk open by the permanent name of its active layer: it is known by its
    /// configured path, unless that names another file by now.
    #[tokio::test]
    async fn open_layer_is_known_by_its_disk() {
        let directory = tempfile::tempdir().unwrap();
        let directory = Utf8Path::from_path(directory.path()).unwrap();
        let mut registry = snapcore::Registry::new();
        register(&mut registry).unwrap();
        let (layer, path) = (directory.join("a.ds-0123abcd.qcow2"), directory.join("a.qcow2"));
        std::fs::write(&layer, "").unwrap();
        std::fs::hard_link(&layer, &path).unwrap();
        let target = snapcore::Target::new("vda").unwrap();
        let configured = async |open: &camino::Utf8PathBuf| {
            let address = registry.configured_address(&target, &open.into()).await;
            address.local().map(Utf8Path::to_owned)
        };
        assert_eq!(configured(&layer).await.as_ref(), Some(&path));
        assert_eq!(configured(&path).await.as_ref(), Some(&path));
        let other = directory.join("b.ds-0123abcd.qcow2");
        std::fs::write(&other, "").unwrap();
        assert_eq!(configured(&other).await.as_ref(), Some(&other));
        std::fs::write(directory.join("b.qcow2"), "").unwrap();
        assert_eq!(configured(&other).await.as_ref(), Some(&other));
    }
}
