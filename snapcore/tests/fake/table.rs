//! Manifests as rows of a table in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use camino::Utf8Path;
use snapcore::catalogue::{CatalogueId, Entry, Stamp};
use snapcore::manifest::{DomainManifest, Found, Item, ManifestStore};
use snapcore::{Disk, Result, Snapshot, SnapshotId};

/// The manifests of one domain.
#[derive(Debug, Clone, Default)]
struct Row {
    domain: Option<DomainManifest>,
    snapshots: BTreeMap<SnapshotId, (Stamp, Snapshot)>,
    aside: Vec<Item>,
}

/// The manifests of all domains, by the address of their first disk.
#[derive(Debug, Clone, Default)]
pub struct Rows(Arc<Mutex<BTreeMap<String, Row>>>);

impl Rows {
    /// The manifests of a domain with this first disk.
    pub fn of(&self, disk: &Disk) -> RowManifests {
        RowManifests { rows: self.clone(), key: disk.address.to_string() }
    }

    /// Returns true if there is no manifest of any domain.
    pub fn is_empty(&self) -> bool {
        self.rows().values().all(|row| row.domain.is_none() && row.snapshots.is_empty())
    }

    /// Changes the manifests of all snapshots, as whoever owns them could.
    pub fn change_snapshots(&self, change: impl Fn(&mut Snapshot)) {
        for row in self.rows().values_mut() {
            row.snapshots.values_mut().for_each(|(_, snapshot)| change(snapshot));
        }
    }

    fn rows(&self) -> MutexGuard<'_, BTreeMap<String, Row>> {
        self.0.lock().unwrap()
    }
}

/// The manifests of one domain in the table.
#[derive(Debug)]
pub struct RowManifests {
    rows: Rows,
    key: String,
}

impl RowManifests {
    fn row(&self) -> Row {
        self.rows.rows().get(&self.key).cloned().unwrap_or_default()
    }

    fn change(&self, change: impl FnOnce(&mut Row)) -> Result<()> {
        change(self.rows.rows().entry(self.key.clone()).or_default());
        Ok(())
    }
}

impl ManifestStore for RowManifests {
    fn place(&self) -> &str {
        &self.key
    }

    fn directory(&self) -> Option<&Utf8Path> {
        None
    }

    fn shown(&self, item: Item) -> String {
        format!("{item:?} of {}", self.key)
    }

    fn has(&self, snapshot: SnapshotId) -> bool {
        self.row().snapshots.contains_key(&snapshot)
    }

    fn is_empty(&self) -> bool {
        let row = self.row();
        row.domain.is_none() && row.snapshots.is_empty()
    }

    fn domain(&self) -> Option<DomainManifest> {
        self.row().domain
    }

    fn read(&self) -> Result<Found> {
        let row = self.row();
        let mut found = Found::default().domain(row.domain);
        for (id, (stamp, snapshot)) in row.snapshots {
            found.written.insert(id, stamp);
            found.snapshots.push(snapshot);
        }
        Ok(found)
    }

    fn write(&self, catalogue: CatalogueId, _: Option<&Entry>, after: &Entry) -> Result<()> {
        let stamp = Stamp::new(Some(catalogue), after.revision);
        self.change(|row| {
            // Manifests that another catalogue wrote stay.
            row.snapshots.retain(|_, (wrote, _)| wrote.catalogue != Some(catalogue));
            for snapshot in after.tree.iter() {
                row.snapshots.insert(snapshot.id, (stamp, snapshot.clone()));
            }
            row.domain = after.needs_manifests().then(|| DomainManifest::of(catalogue, after));
        })
    }

    fn remove(&self, snapshots: &[SnapshotId]) -> Result<()> {
        self.change(|row| row.snapshots.retain(|id, _| !snapshots.contains(id)))
    }

    fn clear(&self, catalogue: CatalogueId, _: &Entry) -> Result<()> {
        self.change(|row| {
            row.snapshots.retain(|_, (wrote, _)| wrote.catalogue != Some(catalogue));
            row.domain = row.domain.take().filter(|domain| domain.catalogue != Some(catalogue));
        })
    }

    fn move_aside(&self, items: &[Item]) -> Result<()> {
        self.change(|row| {
            for item in items {
                match item {
                    Item::Domain => row.domain = None,
                    Item::Snapshot(id) => drop(row.snapshots.remove(id)),
                }
            }
            row.aside.extend(items);
        })
    }

    fn have_no_place(&self) -> bool {
        false
    }
}
