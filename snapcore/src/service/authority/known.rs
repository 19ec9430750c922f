//! The manifests of one domain, with what one command has learned of them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use camino::Utf8Path;

use std::sync::Arc;

use crate::catalogue::{CatalogueId, Entry};
use crate::error::Result;
use crate::manifest::{DomainManifest, Found, Item, ManifestStore};
use crate::snapshot::SnapshotId;

/// Remembers the domain's manifest: it is read once, and known from then on from the writes.
///
/// It is made for one command, which has the domain's lease: no other process of this catalogue writes
/// meanwhile. After a write that failed, or one whose effect is not known here, it is read again.
#[derive(Debug)]
pub(super) struct KnownManifests {
    store: Arc<dyn ManifestStore>,
    /// The domain's manifest, once it is known; in it, absent where there is none.
    domain: Mutex<Option<Option<DomainManifest>>>,
}

impl KnownManifests {
    /// Manifests of which nothing is known yet.
    pub(super) fn new(store: Arc<dyn ManifestStore>) -> Self {
        Self { store, domain: Mutex::default() }
    }

    fn known(&self) -> MutexGuard<'_, Option<Option<DomainManifest>>> {
        self.domain.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does work that may change the domain's manifest: its effect is known only by reading.
    fn forgetting<T>(&self, work: impl FnOnce() -> T) -> T {
        // Forgotten before and after: a reader in between would remember a manifest that is being changed.
        *self.known() = None;
        let done = work();
        *self.known() = None;
        done
    }
}

impl ManifestStore for KnownManifests {
    fn place(&self) -> &str {
        self.store.place()
    }

    fn directory(&self) -> Option<&Utf8Path> {
        self.store.directory()
    }

    fn shown(&self, item: Item) -> String {
        self.store.shown(item)
    }

    fn has(&self, snapshot: SnapshotId) -> bool {
        self.store.has(snapshot)
    }

    fn is_empty(&self) -> bool {
        self.store.is_empty()
    }

    fn domain(&self) -> Option<DomainManifest> {
        self.known().get_or_insert_with(|| self.store.domain()).clone()
    }

    fn read(&self) -> Result<Found> {
        let found = self.forgetting(|| self.store.read())?;
        *self.known() = Some(found.domain.clone());
        Ok(found)
    }

    fn write(&self, catalogue: CatalogueId, before: Option<&Entry>, after: &Entry) -> Result<()> {
        self.forgetting(|| self.store.write(catalogue, before, after))?;
        *self.known() = Some(after.needs_manifests().then(|| DomainManifest::of(catalogue, after)));
        Ok(())
    }

    fn remove(&self, snapshots: &[SnapshotId]) -> Result<()> {
        self.store.remove(snapshots)
    }

    fn clear(&self, catalogue: CatalogueId, entry: &Entry) -> Result<()> {
        self.forgetting(|| self.store.clear(catalogue, entry))
    }

    fn move_aside(&self, items: &[Item]) -> Result<()> {
        match items.is_empty() {
            // The store has nothing to do, and the remembered manifest stays valid.
            true => Ok(()),
            false => self.forgetting(|| self.store.move_aside(items)),
        }
    }

    fn have_no_place(&self) -> bool {
        self.store.have_no_place()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use camino::Utf8PathBuf;

    use super::*;
    use crate::catalogue::Revision;
    use crate::domain::{ActivePath, Disk, DiskRecord, Domain, Hypervisor};
    use crate::manifest::ManifestDirectory;
    use crate::name::{DomainName, LayerName, Target};
    use crate::snapshot::SnapshotTree;

    /// A directory that counts how often the domain's manifest is read.
    #[derive(Debug)]
    struct Counting {
        directory: ManifestDirectory,
        reads: Arc<AtomicUsize>,
    }

    impl ManifestStore for Counting {
        fn place(&self) -> &str {
            self.directory.place()
        }
        fn directory(&self) -> Option<&Utf8Path> {
            self.directory.directory()
        }
        fn shown(&self, item: Item) -> String {
            self.directory.shown(item)
        }
        fn has(&self, snapshot: SnapshotId) -> bool {
            self.directory.has(snapshot)
        }
        fn is_empty(&self) -> bool {
            self.directory.is_empty()
        }
        fn domain(&self) -> Option<DomainManifest> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            self.directory.domain()
        }
        fn read(&self) -> Result<Found> {
            self.reads.fetch_add(1, Ordering::SeqCst);
            self.directory.read()
        }
        fn write(&self, catalogue: CatalogueId, before: Option<&Entry>, after: &Entry) -> Result<()> {
            self.directory.write(catalogue, before, after)
        }
        fn remove(&self, snapshots: &[SnapshotId]) -> Result<()> {
            self.directory.remove(snapshots)
        }
        fn clear(&self, catalogue: CatalogueId, entry: &Entry) -> Result<()> {
            self.directory.clear(catalogue, entry)
        }
        fn move_aside(&self, items: &[Item]) -> Result<()> {
            self.directory.move_aside(items)
        }
        fn have_no_place(&self) -> bool {
            self.directory.have_no_place()
        }
    }

    fn entry(revision: u64) -> Entry {
        let disk = Disk::new(Target::new("vda").unwrap(), "/a", "fake");
        let layers = ["a", "b"].map(|name| LayerName(name.into()));
        Entry {
            domain: Domain {
                name: DomainName::new("web").unwrap(),
                unregistered: false,
                hypervisor: Hypervisor::NONE,
                host: None,
                control: None,
                active_path: ActivePath::Keep,
                disks: vec![DiskRecord { disk, active: layers[0].clone(), owned: layers.to_vec() }],
                current: None,
                machines: Vec::new(),
                policy: None,
            },
            tree: SnapshotTree::new(Vec::new()),
            revision: Revision(revision),
            follows: None,
        }
    }

    /// The domain's manifest is read once, however often a command asks for it. The command's own writes are
    /// known without reading.
    #[test]
    fn the_domain_manifest_is_read_once() {
        let place = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(place.path().join("web")).unwrap();
        let (us, reads) = (CatalogueId::fresh(), Arc::new(AtomicUsize::new(0)));
        ManifestDirectory::new(&path).write(us, None, &entry(1)).unwrap();
        let counting = Counting { directory: ManifestDirectory::new(&path), reads: reads.clone() };
        let known = KnownManifests::new(Arc::new(counting));
        for _ in 0..3 {
            assert!(known.is_current(Some(us), &entry(1)) && !known.is_current(Some(us), &entry(2)));
        }
        known.write(us, Some(&entry(1)), &entry(2)).unwrap();
        assert!(known.is_current(Some(us), &entry(2)));
        assert_eq!(reads.load(Ordering::SeqCst), 1);
        assert_eq!(
            ManifestDirectory::new(&path).domain(),
            known.domain(),
            "what is remembered is what is there"
        );
        // After a change whose effect is not known here it is read again.
        known.move_aside(&[Item::Domain]).unwrap();
        assert_eq!(known.domain(), None);
        assert_eq!(reads.load(Ordering::SeqCst), 2);
    }
}
