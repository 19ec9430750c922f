//! The effect of an edit on a domain and its snapshots, defined once for every store.

use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::name::Target;
use crate::snapshot::{Snapshot, SnapshotRole, SnapshotTree};
use crate::step::Edit;

impl Edit {
    /// Applies the edit to a domain and its snapshots. Every store uses it.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] for a second snapshot of the same name or identity; [`ErrorKind::NotFound`] for
    /// a snapshot or disk that does not exist. `domain` and `tree` are then unchanged.
    pub fn apply(&self, domain: &mut Domain, tree: &mut SnapshotTree) -> Result<()> {
        match self {
            Edit::AddSnapshot { snapshot } => {
                if tree.iter().any(|known| known.name == snapshot.name || known.id == snapshot.id) {
                    return Err(Error::new(
                        ErrorKind::Exists,
                        format!("domain {} has a snapshot {} already", domain.name, snapshot.name),
                    )
                    .advise("choose another name"));
                }
                let mut all: Vec<Snapshot> = tree.iter().cloned().collect();
                drop_previous(&mut all, snapshot);
                all.push((**snapshot).clone());
                *tree = SnapshotTree::new(all);
            }
            Edit::Amend { snapshot } => {
                if tree.iter().any(|known| known.name == snapshot.name && known.id != snapshot.id) {
                    return Err(Error::new(
                        ErrorKind::Exists,
                        format!("domain {} has a snapshot {} already", domain.name, snapshot.name),
                    )
                    .advise("choose another name"));
                }
                let mut all: Vec<Snapshot> = tree.iter().cloned().collect();
                let Some(known) = all.iter_mut().find(|known| known.id == snapshot.id) else {
                    return Err(Error::new(
                        ErrorKind::NotFound,
                        format!("domain {} has no snapshot of the identity {}", domain.name, snapshot.id),
                    ));
                };
                let Snapshot { name, description, role, holds, deferred, expires, .. } = (**snapshot).clone();
                *known = Snapshot { name, description, role, holds, deferred, expires, ..known.clone() };
                drop_previous(&mut all, snapshot);
                *tree = SnapshotTree::new(all);
            }
            Edit::RemoveSnapshot { id } => {
                let Some(parent) = tree.get(*id).map(|snapshot| snapshot.parent) else {
                    return Err(Error::new(
                        ErrorKind::NotFound,
                        format!("domain {} has no snapshot of the identity {id}", domain.name),
                    ));
                };
                let rest = tree.iter().filter(|snapshot| snapshot.id != *id).cloned().map(|mut snapshot| {
                    if snapshot.parent == Some(*id) {
                        snapshot.parent = parent;
                    }
                    snapshot
                });
                *tree = SnapshotTree::new(rest.collect());
                domain.machines.retain(|machine| {
                    tree.iter().any(|snapshot| snapshot.machine.as_ref() == Some(&machine.id))
                });
                if domain.current == Some(*id) {
                    domain.current = parent;
                }
            }
            Edit::SetCurrent { id } => {
                if let Some(id) = id
                    && tree.get(*id).is_none()
                {
                    return Err(Error::new(
                        ErrorKind::NotFound,
                        format!("domain {} has no snapshot of the identity {id} to be current", domain.name),
                    ));
                }
                domain.current = *id;
            }
            Edit::SetActive { target, layer } => disk(domain, target)?.active = layer.clone(),
            Edit::AddLayer { target, layer } => {
                let owned = &mut disk(domain, target)?.owned;
                if !owned.contains(layer) {
                    owned.push(layer.clone());
                }
            }
            Edit::RemoveLayer { target, layer } => disk(domain, target)?.owned.retain(|known| known != layer),
            Edit::MovePoint { target, from, to } => {
                disk(domain, target)?;
                let moved = tree.iter().cloned().map(|mut snapshot| {
                    for member in &mut snapshot.disks {
                        if member.target == *target && member.point == *from {
                            member.point = to.clone();
                        }
                    }
                    snapshot
                });
                *tree = SnapshotTree::new(moved.collect());
            }
            Edit::AddMachine { machine } => {
                if domain.machine(&machine.id).is_none() {
                    domain.machines.push((**machine).clone());
                }
            }
            Edit::SetFormat { target, format } => disk(domain, target)?.disk.format = format.clone(),
            Edit::SetPath { target, path } => disk(domain, target)?.disk.address = path.clone(),
        }
        Ok(())
    }
}

/// Gives up the previous state of the domain where `added` takes its place: there is at most one.
fn drop_previous(all: &mut [Snapshot], added: &Snapshot) {
    if added.role != SnapshotRole::Previous {
        return;
    }
    for other in all.iter_mut().filter(|other| other.id != added.id) {
        if other.role == SnapshotRole::Previous {
            other.role = SnapshotRole::Dropped;
        }
    }
}

fn disk<'a>(domain: &'a mut Domain, target: &Target) -> Result<&'a mut crate::domain::DiskRecord> {
    let name = &domain.name;
    domain
        .disks
        .iter_mut()
        .find(|record| record.disk.target == *target)
        .ok_or_else(|| Error::new(ErrorKind::NotFound, format!("domain {name} has no disk {target}")))
}
