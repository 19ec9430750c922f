//! Commands that only look: no lock, nothing made, nothing changed.

use std::collections::BTreeSet;

use super::identity::images_of;
use super::live::attached;
use super::locate::{Located, point_problem};
use super::{Details, DiskReport, DomainRef, Inner, Listing, Member, Unfinished};
use crate::catalogue::Entry;
use crate::{
    DiskRecord, DiskState, Finding, InspectDepth, LayerName, Operation, Result, Severity, SnapshotName,
    SnapshotTree,
};

/// How often a domain is looked at that is being changed.
const CHECKS: usize = 5;

/// Between two looks while an operation is under way, or has stopped half way.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

impl Inner {
    async fn unfinished_of(&self, entry: &Entry) -> Result<Vec<Unfinished>> {
        let unfinished = self.catalogue.unfinished(&entry.domain.name).await?;
        Ok(unfinished.into_iter().map(shown).collect())
    }

    pub(super) async fn list(&self, reference: &DomainRef) -> Result<Listing> {
        let Located { entry, catalogued, .. } = self.locate(reference).await?;
        let unfinished = self.unfinished_of(&entry).await?;
        let snapshots = entry.tree.iter().cloned().collect();
        Ok(Listing { domain: entry.domain, catalogued, snapshots, unfinished })
    }

    pub(super) async fn show(&self, reference: &DomainRef, name: &SnapshotName) -> Result<Details> {
        let Located { entry, .. } = self.locate(reference).await?;
        let Entry { domain, tree, .. } = entry;
        let snapshot =
            tree.named(name).map_err(|error| error.context(format!("domain {}", domain.name)))?.clone();
        let name_of = |id| tree.get(id).map(|snapshot| snapshot.name.clone());
        let live = self.connect_to_look(&domain).await;
        let mut members = Vec::new();
        for member in &snapshot.disks {
            let Some(record) = domain.disk(&member.target) else { continue };
            let backend = self.registry.get(&record.disk.format)?;
            // An image that cannot be read leaves out what only it can tell; `check` says why.
            let state = backend.inspect(record, InspectDepth::Dependents, attached(&live, record)).await.ok();
            let layer = state.as_ref().and_then(|state| state.layer(&member.point.layer));
            let delete = match &state {
                None => None,
                Some(state) => {
                    let doomed = BTreeSet::from([snapshot.id]);
                    let (drop, keep) = crate::plan::split_points(&tree, &member.target, &doomed);
                    backend.cost_of_delete(record, state, &drop, &keep).await.ok()
                }
            };
            members.push(Member {
                target: member.target.clone(),
                point: member.point.clone(),
                kind: member.point.kind(),
                file: match layer {
                    Some(layer) => layer.file.clone(),
                    None => backend.layer_file(record, &member.point.layer),
                },
                virtual_size: member.virtual_size,
                allocated: layer.map(|layer| layer.allocated),
                delete,
            });
        }
        let record =
            snapshot.machine.as_deref().and_then(|id| domain.machine(id)).map(|machine| &machine.record);
        let outside = self.outside(&domain, record);
        let shared = self.shared(&domain, record);
        Ok(Details {
            outside,
            shared,
            current: domain.current == Some(snapshot.id),
            parent: snapshot.parent.and_then(name_of),
            children: tree.children(Some(snapshot.id)).map(|child| child.name.clone()).collect(),
            machine: snapshot
                .machine
                .as_deref()
                .and_then(|id| domain.machine(id))
                .map(|machine| machine.summary.clone()),
            domain: domain.name,
            snapshot,
            members,
        })
    }

    pub(super) async fn inspect(&self, reference: &DomainRef) -> Result<Vec<DiskReport>> {
        let Located { entry, .. } = self.locate(reference).await?;
        let live = self.connect_to_look(&entry.domain).await;
        let mut reports = Vec::new();
        for record in entry.domain.disks {
            let backend = self.registry.get(&record.disk.format)?;
            reports.push(
                match backend.inspect(&record, InspectDepth::Dependents, attached(&live, &record)).await {
                    Ok(state) => {
                        let unnamed = unnamed(&record, &state, &entry.tree);
                        DiskReport { record, state: Some(state), unnamed, problem: None }
                    }
                    Err(error) => DiskReport {
                        record,
                        state: None,
                        unnamed: Vec::new(),
                        problem: Some(error.to_string()),
                    },
                },
            );
        }
        Ok(reports)
    }

    /// What there is to be said of a domain. One that is changed meanwhile looks wrong (the catalogue was read before
    /// the images and manifests): it is looked at again, and if it goes on being changed, that alone is told.
    pub(super) async fn check(&self, reference: &DomainRef) -> Result<Vec<Finding>> {
        let (mut name, mut last) = (String::new(), None);
        for _ in 0..CHECKS {
            let (entry, catalogued, findings) = self.check_once(reference).await?;
            // A step that is under way changes images before the catalogue says so.
            let under_way = !self.catalogue.unfinished(&entry.domain.name).await?.is_empty();
            let is_harmless = findings.iter().all(|finding| finding.severity == Severity::Note);
            if is_harmless || !catalogued {
                return Ok(findings);
            }
            let now = self.catalogue.load(&entry.domain.name).await?;
            let is_same = now.is_none_or(|now| now.revision == entry.revision);
            if is_same && (!under_way || last.as_ref() == Some(&findings)) {
                return Ok(findings);
            }
            last = Some(findings);
            if under_way {
                tokio::time::sleep(PAUSE).await;
            }
            name = entry.domain.name.to_string();
        }
        let words = "it is being changed, so what was seen of it may be of two moments, and is not told: check it when that \
                     has ended";
        Ok(vec![finding(Severity::Warning, &name, words.to_owned())])
    }

    async fn check_once(&self, reference: &DomainRef) -> Result<(Entry, bool, Vec<Finding>)> {
        let Located { entry, catalogued, notes, .. } = self.locate(reference).await?;
        let name = entry.domain.name.to_string();
        let mut findings: Vec<Finding> =
            notes.into_iter().map(|note| finding(Severity::Note, &name, note)).collect();
        for unfinished in self.unfinished_of(&entry).await? {
            findings.push(finding(
                Severity::Warning,
                &name,
                format!(
                    "a {} begun at {} is {}: it runs just now, or stopped half way; `domsnap recover {name}` ends it",
                    unfinished.operation, unfinished.started, unfinished.state
                ),
            ));
        }
        let live = self.connect_to_look(&entry.domain).await;
        for record in &entry.domain.disks {
            let backend = self.registry.get(&record.disk.format)?;
            match backend.inspect(record, InspectDepth::Dependents, attached(&live, record)).await {
                Err(error) => {
                    findings.push(finding(Severity::Error, record.disk.path.as_str(), error.to_string()));
                }
                Ok(state) => {
                    findings.extend(points_missing(record, &state, &entry.tree));
                    for layer in unnamed(record, &state, &entry.tree) {
                        let Some(known) = state.layer(&layer) else { continue };
                        // It is kept for the internal snapshots in it, which are needed.
                        if !known.internal.is_empty() {
                            continue;
                        }
                        let size = known.allocated;
                        findings.push(finding(
                            Severity::Note,
                            layer.as_str(),
                            format!("no snapshot needs this layer of {}; a delete or `domsnap recover {name}` merges it when that can be done", crate::shown_size(size)),
                        ));
                    }
                    match backend.check(record, &state).await {
                        Ok(found) => findings.extend(found),
                        Err(error) => findings.push(finding(
                            Severity::Error,
                            record.disk.path.as_str(),
                            format!("it cannot be checked: {error}"),
                        )),
                    }
                }
            }
        }
        if catalogued && let Some(error) = self.outdated(&entry).await? {
            findings.push(finding(Severity::Error, &name, error.to_string()));
        } else if catalogued {
            findings.extend(self.check_manifests(&entry).await?);
        }
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Ok((entry, catalogued, findings))
    }

    async fn check_manifests(&self, entry: &Entry) -> Result<Vec<Finding>> {
        let manifests = self.manifests_of(&entry.domain)?;
        let directory = manifests.directory().to_path_buf();
        let warn = |subject: &str, message: String| finding(Severity::Warning, subject, message);
        let found = match self.read_manifests(manifests).await {
            Ok(found) => found,
            Err(error) => return Ok(vec![warn(directory.as_str(), error.to_string())]),
        };
        let mut findings: Vec<Finding> = found
            .problems
            .iter()
            .map(|(path, why)| {
                warn(
                    path.as_str(),
                    format!(
                        "the manifest is not usable: {why}; the next change of the domain writes it again"
                    ),
                )
            })
            .collect();
        for snapshot in entry.tree.iter() {
            let problem = match found.snapshots.iter().find(|told| told.id == snapshot.id) {
                Some(told) if told == snapshot => continue,
                Some(_) => "is stale",
                None => "is missing",
            };
            findings.push(warn(
                directory.as_str(),
                format!(
                    "the manifest of snapshot {} {problem}; `domsnap recover {}` writes it",
                    snapshot.name, entry.domain.name
                ),
            ));
        }
        for told in found.snapshots.iter().filter(|told| entry.tree.get(told.id).is_none()) {
            findings.push(warn(
                directory.as_str(),
                format!(
                    "there is a manifest of snapshot {}, which the catalogue does not have; `domsnap import --replace {}` takes in what manifests tell",
                    told.name,
                    images_of(&entry.domain)
                ),
            ));
        }
        Ok(findings)
    }
}

fn finding(severity: Severity, subject: &str, message: String) -> Finding {
    Finding { severity, subject: subject.to_owned(), message }
}

fn shown(operation: Operation) -> Unfinished {
    Unfinished {
        id: operation.id,
        operation: operation.plan.operation,
        snapshots: operation.plan.snapshots,
        state: operation.state,
        started: operation.started,
    }
}

fn points_missing<'a>(
    record: &'a DiskRecord,
    state: &'a DiskState,
    tree: &'a SnapshotTree,
) -> impl Iterator<Item = Finding> + 'a {
    tree.iter().filter_map(move |snapshot| {
        let member = snapshot.point(&record.disk.target)?;
        let why = point_problem(member, record, state)?;
        let subject = format!("snapshot {}", snapshot.name);
        Some(finding(Severity::Error, &subject, format!("{}: {why}; delete the snapshot", member.target)))
    })
}

/// The owned layers whose own state nothing needs: not the active one, no point is the layer itself, and no foreign
/// image stands on it.
fn unnamed(record: &DiskRecord, state: &DiskState, tree: &SnapshotTree) -> Vec<LayerName> {
    state
        .layers
        .iter()
        .filter(|layer| {
            layer.owned
                && layer.name != state.active
                && layer.dependents.is_empty()
                && !tree.points(&record.disk.target).any(|p| p.tag.is_none() && p.layer == layer.name)
        })
        .map(|layer| layer.name.clone())
        .collect()
}
