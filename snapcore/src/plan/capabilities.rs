//! Refuses, before anything is done, requests that a backend declares it cannot do. Found out later, the
//! result would be a point taken at another instant than the others, or a merge that no code can do.

use std::collections::BTreeSet;

use super::{DiskInput, Planner};
use crate::error::{Error, ErrorKind, Result};
use crate::snapshot::{PointKind, SnapshotId};

impl Planner<'_> {
    /// Refuses a kind or a method that the format does not have.
    pub(super) fn require_kind(
        &self,
        disk: &DiskInput,
        kind: Option<PointKind>,
        method: Option<&str>,
    ) -> Result<()> {
        let can = disk.backend.capabilities();
        if let Some(method) = method
            && !can.methods.iter().any(|known| known == method)
        {
            let kinds = [(can.internal, "internal"), (can.external, "external")];
            let kinds = kinds.iter().filter(|(can, _)| *can).map(|(_, kind)| *kind);
            let known: Vec<&str> = kinds.chain(can.methods.iter().map(String::as_str)).collect();
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("{}: format {} has no method '{method}'", disk.target(), disk.backend.format()),
            )
            .state("no changes made")
            .advise(format!(
                "leave the method to the backend, leave the disk out with {}=skip, or take one of: {}",
                disk.target(),
                known.join(", ")
            )));
        }
        let (possible, other) = match kind {
            None => return Ok(()),
            Some(PointKind::Internal) => (can.internal, "--external"),
            Some(PointKind::External) => (can.external, "--internal"),
        };
        if possible {
            return Ok(());
        }
        let kind = if other == "--external" { "internal" } else { "external" };
        Err(Error::new(
            ErrorKind::Unsupported,
            format!("{}: format {} has no {kind} snapshots", disk.target(), disk.backend.format()),
        )
        .advise(format!("take this disk with {other}, or leave it out")))
    }

    /// Refuses a point on a point where the format can have only one at a time.
    pub(super) fn require_new_point(&self, disk: &DiskInput) -> Result<()> {
        if disk.backend.capabilities().snapshot_of_snapshot {
            return Ok(());
        }
        let Some(there) = self.tree.iter().find(|snapshot| snapshot.point(disk.target()).is_some()) else {
            return Ok(());
        };
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: format {} holds one snapshot of a disk at a time, and it holds {} now",
                disk.target(),
                disk.backend.format(),
                there.name
            ),
        )
        .state("no changes made")
        .advise(format!(
            "delete {} first (domsnap delete {} {}), or leave the disk out with --disk {}=skip",
            there.name,
            self.domain.name,
            there.name,
            disk.target()
        )))
    }

    /// Refuses to change a disk of a running domain by a backend that works only on disks at rest. It would
    /// work while the guest runs, at no instant that the other disks share.
    pub(super) fn require_live(&self, disk: &DiskInput) -> Result<()> {
        if self.alive.is_none() || disk.backend.capabilities().live {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{}: format {} cannot be changed while domain {} runs",
                disk.target(),
                disk.backend.format(),
                self.domain.name
            ),
        )
        .state("no changes made")
        .advise(format!(
            "shut the domain down first, or leave the disk out of a snapshot with --disk {}=skip",
            disk.target()
        )))
    }

    /// Refuses to delete a point from which others derive, where the format can delete only the newest.
    pub(super) fn require_last(&self, disk: &DiskInput, doomed: &BTreeSet<SnapshotId>) -> Result<()> {
        if disk.backend.capabilities().delete_in_chain {
            return Ok(());
        }
        for snapshot in self.tree.iter().filter(|snapshot| doomed.contains(&snapshot.id)) {
            if snapshot.point(disk.target()).is_none() {
                continue;
            }
            let later = self.tree.descendants(snapshot.id).into_iter();
            let mut later = later.filter(|later| later.point(disk.target()).is_some());
            let Some(later) = later.find(|later| !doomed.contains(&later.id)) else { continue };
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!(
                    "{}: format {} cannot delete {}, because {} derives from it",
                    disk.target(),
                    disk.backend.format(),
                    snapshot.name,
                    later.name
                ),
            )
            .state("no changes made")
            .advise(format!(
                "delete {} too (domsnap delete {} {} --children), or keep both",
                later.name, self.domain.name, snapshot.name
            )));
        }
        Ok(())
    }
}
