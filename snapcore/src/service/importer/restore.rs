//! Restores the snapshots that manifests describe, as far as the images have their points.

use std::collections::HashMap;

use camino::Utf8Path;
use serde_json::Value;

use super::adopt::Adopted;
use super::read::{Identity, Matched};
use super::{Importer, Report};
use crate::domain::{DiskRecord, Machine};
use crate::error::Result;
use crate::manifest::{DomainManifest, Item};
use crate::name::{DomainName, SnapshotName};
use crate::snapshot::{Consistency, DiskPoint, Snapshot, SnapshotId, SnapshotRole};
use crate::state::DiskState;

/// Snapshots that came from manifests.
#[derive(Default)]
pub(super) struct Restored {
    /// The snapshots.
    pub(super) snapshots: Vec<Snapshot>,
    /// Their names.
    pub(super) names: Vec<SnapshotName>,
    /// The snapshot from which the domain's current state derives, according to the manifest.
    pub(super) current: Option<SnapshotId>,
    /// The machines that they were taken on.
    pub(super) machines: Vec<Machine>,
}

impl Restored {
    /// Takes out the snapshots that an earlier import found in the images, so that another program's records
    /// can name and join them.
    pub(super) fn take_imported(&mut self) -> Vec<Snapshot> {
        let is_imported = |snapshot: &mut Snapshot| {
            snapshot.role == SnapshotRole::Snapshot && snapshot.consistency == Consistency::Unknown
        };
        let imported: Vec<Snapshot> = self.snapshots.extract_if(.., is_imported).collect();
        self.names = self.snapshots.iter().map(|snapshot| snapshot.name.clone()).collect();
        imported
    }
}

impl Importer {
    /// Restores the snapshots of the manifests.
    pub(super) async fn restore(
        &self,
        matched: &Matched,
        identity: &Identity,
        adopted: &Adopted,
        report: &mut Report,
    ) -> Result<Restored> {
        let mut restored = Restored::default();
        let items = |snapshots: &[Snapshot]| -> Vec<Item> {
            snapshots.iter().map(|snapshot| Item::Snapshot(snapshot.id)).collect()
        };
        if let Some(manifest) = matched.manifest() {
            let (machines, renamed) = self.kept_machines(manifest, matched);
            restored.machines = machines;
            restored.current = manifest.domain.current;
            for mut snapshot in matched.found.snapshots.iter().cloned() {
                if let Some(now) = snapshot.machine.as_ref().and_then(|machine| renamed.get(machine)) {
                    snapshot.machine = Some(now.clone());
                }
                find_memory(manifest, matched, identity, &mut snapshot, report);
                translate(matched, adopted, &mut snapshot);
                match missing_point(&snapshot, &adopted.records, &adopted.states) {
                    Some(why) => {
                        report.notes.push(format!("snapshot {} is left out: {why}", snapshot.name));
                        report.leftovers.left_out.push(Item::Snapshot(snapshot.id));
                    }
                    None => {
                        restored.names.push(snapshot.name.clone());
                        restored.snapshots.push(snapshot);
                    }
                }
            }
        } else if !matched.found.snapshots.is_empty() {
            report.notes.push(
                "manifests of snapshots are there, but none of their domain: they are left out".to_owned(),
            );
            report.leftovers.left_out.extend(items(&matched.found.snapshots));
        }
        let problems = &matched.found.problems;
        report.leftovers.left_out.extend(problems.iter().filter_map(|problem| problem.item));
        report.leftovers.refused |= problems.iter().any(|problem| problem.item.is_none());
        self.distinguish(&mut restored, matched, report).await?;
        Ok(restored)
    }

    /// Returns the machines of a manifest with the parts that their hypervisor says may be kept, and the
    /// names that have changed by that. Machines that the catalogue itself has are kept whole. Of a manifest
    /// that is not trusted and a hypervisor that is not known, nothing is kept: what in a record would be run
    /// is not known either.
    fn kept_machines(
        &self,
        manifest: &DomainManifest,
        matched: &Matched,
    ) -> (Vec<Machine>, HashMap<String, String>) {
        let (trust, known) = (matched.source.trust, matched.source.known.as_ref());
        let saver = self.registry.hypervisor(&manifest.domain.hypervisor).ok();
        let keep = |record: &Value, trusted: bool| match &saver {
            Some(saver) => saver.kept_machine(record, trusted),
            None if trusted => record.clone(),
            None => Value::Null,
        };
        let mut names = HashMap::new();
        let mut kept: Vec<Machine> = Vec::new();
        for machine in &manifest.domain.machines {
            let mut machine = machine.clone();
            machine.record = keep(&machine.record, true);
            if trust || known.is_some_and(|entry| entry.domain.machines.contains(&machine)) {
                kept.push(machine);
                continue;
            }
            let now = Machine::new(keep(&machine.record, false), machine.summary.clone());
            names.insert(machine.id.clone(), now.id.clone());
            if kept.iter().all(|other| other.id != now.id) {
                kept.push(now);
            }
        }
        (kept, names)
    }

    /// Gives snapshots new identities where another domain of the catalogue has the same ones. Then the
    /// images are a copy of a domain that exists too: two snapshots need two identities.
    async fn distinguish(
        &self,
        restored: &mut Restored,
        matched: &Matched,
        report: &mut Report,
    ) -> Result<()> {
        let own = matched.source.known_as.as_ref();
        let elsewhere = self.identities_elsewhere(&restored.snapshots, own).await?;
        let fresh: HashMap<SnapshotId, SnapshotId> =
            elsewhere.iter().map(|id| (*id, SnapshotId::fresh())).collect();
        let own = |id: SnapshotId| fresh.get(&id).copied().unwrap_or(id);
        for snapshot in &mut restored.snapshots {
            snapshot.id = own(snapshot.id);
            snapshot.parent = snapshot.parent.map(own);
        }
        restored.current = restored.current.map(own);
        report.leftovers.renamed.extend(elsewhere);
        Ok(())
    }

    /// The identities of `snapshots` that snapshots of other domains than `own` have.
    async fn identities_elsewhere(
        &self,
        snapshots: &[Snapshot],
        own: Option<&DomainName>,
    ) -> Result<Vec<SnapshotId>> {
        let mut found = Vec::new();
        if snapshots.is_empty() {
            return Ok(found);
        }
        for known in self.records.domains().await? {
            if Some(&known.domain.name) == own {
                continue;
            }
            let Some(entry) = self.records.find(&known.domain.name).await? else { continue };
            let theirs =
                snapshots.iter().map(|snapshot| snapshot.id).filter(|id| entry.tree.get(*id).is_some());
            found.extend(theirs);
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }
}

/// Finds the memory image of a snapshot. One outside of the domain's place for memory images must be
/// confirmed by the user, or known to the catalogue.
fn find_memory(
    manifest: &DomainManifest,
    matched: &Matched,
    identity: &Identity,
    snapshot: &mut Snapshot,
    report: &mut Report,
) {
    let Some(memory) = &mut snapshot.memory else { return };
    let is_known = matched.source.trust || matched.source.has_memory(snapshot.id, &memory.image);
    if is_known || identity.memory.as_ref().is_some_and(|store| store.holds(&memory.image)) {
        return;
    }
    // Only a file can have been moved with its directory.
    let file = memory.image.local();
    let beside = matched.manifests.directory().zip(file.and_then(Utf8Path::file_name));
    let here = beside.map(|(directory, name)| directory.join(name)).filter(|here| {
        here.symlink_metadata().is_ok_and(|about| about.is_file())
            && file.is_some_and(|file| !moved_from_elsewhere(manifest, file))
    });
    match here {
        // The directory was moved or copied, and the image with it.
        Some(here) => memory.image = here.into(),
        None => report.unconfirmed.push(format!("{} ({})", snapshot.name, memory.image)),
    }
}

/// Gives the members of a snapshot the layers and targets that the adopted disks have.
fn translate(matched: &Matched, adopted: &Adopted, snapshot: &mut Snapshot) {
    for member in &mut snapshot.disks {
        let Some(tag) = member.point.tag.clone() else { continue };
        if !adopted.copies.contains(&(member.target.clone(), member.point.layer.clone(), tag)) {
            continue;
        }
        let target = matched.targets.get(&member.target).unwrap_or(&member.target);
        if let Some(record) = adopted.records.iter().find(|record| record.disk.target == *target) {
            member.point.layer = record.active.clone();
        }
    }
    if matched.source.by_path {
        return;
    }
    for member in &mut snapshot.disks {
        if let Some(target) = matched.targets.get(&member.target) {
            member.target = target.clone();
        }
    }
}

/// Returns true where a memory image was not in the directory of its domain's manifests when they were
/// written.
fn moved_from_elsewhere(manifest: &DomainManifest, file: &Utf8Path) -> bool {
    let home = manifest.domain.disks.first().and_then(|record| record.disk.address.directory());
    file.parent().and_then(Utf8Path::parent) != home
}

/// The reason why a snapshot cannot be as its manifest describes it, if so.
fn missing_point(snapshot: &Snapshot, records: &[DiskRecord], states: &[DiskState]) -> Option<String> {
    snapshot.disks.iter().find_map(|member| {
        let (record, state) = records.iter().zip(states).find(|(r, _)| r.disk.target == member.target)?;
        point_problem(member, record, state).map(|why| format!("{}: {why}", member.target))
    })
}

/// The reason why a point is not available, if so.
pub(in crate::service) fn point_problem(
    member: &DiskPoint,
    record: &DiskRecord,
    state: &DiskState,
) -> Option<String> {
    let point = &member.point;
    let Some(layer) = state.layer(&point.layer) else {
        return Some(format!("the layer {} is gone", point.layer));
    };
    match &point.tag {
        Some(tag) if !layer.internal.iter().any(|internal| internal.tag == *tag) => {
            Some(format!("the image {} has no internal snapshot {tag}", layer.address))
        }
        None if point.layer == record.active => {
            Some(format!("the layer {} is the active image, not a frozen one", point.layer))
        }
        Some(_) | None => member.replaced(state),
    }
}
