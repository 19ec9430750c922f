//! Looks for damage in a domain.

use super::{Viewer, orphans};
use crate::backend::{Finding, InspectDepth, Severity};
use crate::catalogue::Entry;
use crate::domain::DiskRecord;
use crate::error::Result;
use crate::manifest::Problem;
use crate::service::DomainRef;
use crate::service::authority::Manifests;
use crate::service::images::images_of;
use crate::service::importer::point_problem;
use crate::service::locator::{Live, Located, attached};
use crate::snapshot::SnapshotTree;
use crate::state::DiskState;

/// The number of attempts to check a domain that is being changed.
const CHECKS: usize = 5;

/// The pause between two attempts while an operation runs or is interrupted.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

impl Viewer {
    /// Returns the findings on a domain. A domain that is changed meanwhile seems damaged, because the
    /// catalogue was read before the images and manifests. It is checked again. If it continues to be
    /// changed, only that is reported.
    pub(in crate::service) async fn check(&self, reference: &DomainRef) -> Result<Vec<Finding>> {
        let (mut name, mut last) = (String::new(), None);
        for _ in 0..CHECKS {
            let (entry, catalogued, findings) = self.check_once(reference).await?;
            // A running step changes images before the catalogue records it.
            let under_way = !self.records.unfinished(&entry.domain.name).await?.is_empty();
            let is_harmless = findings.iter().all(|finding| finding.severity == Severity::Note);
            if is_harmless || !catalogued {
                return Ok(findings);
            }
            let now = self.records.find(&entry.domain.name).await?;
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
        let message = "it is being changed, so what was seen of it may be of two moments, and is not reported: check it when that \
                     has ended";
        Ok(vec![finding(Severity::Warning, &name, message.to_owned())])
    }

    async fn check_once(&self, reference: &DomainRef) -> Result<(Entry, bool, Vec<Finding>)> {
        let Located { entry, catalogued, notes, .. } = self.locator.locate(reference).await?;
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
        let live = self.locator.connect_to_look(&entry.domain).await;
        if let Some(live) = &live
            && !live.seen().running
            && self.records.is_before_revert(&entry.domain.name).await?
        {
            findings.push(finding(
                Severity::Warning,
                &name,
                format!(
                    "the guest is paused for a revert that has saved the current state and not begun: it runs just now, \
                     or stopped there; `domsnap recover {name}` resumes the guest"
                ),
            ));
        }
        for record in &entry.domain.disks {
            self.check_disk(&entry, record, &live, &mut findings).await?;
        }
        if catalogued {
            let manifests = self.authority.manifests(&entry.domain)?;
            match self.authority.contradiction(&manifests, &entry).await? {
                Some(error) => findings.push(finding(Severity::Error, &name, error.to_string())),
                None => findings.extend(self.check_manifests(&manifests, &entry).await),
            }
        }
        findings.sort_by_key(|finding| std::cmp::Reverse(finding.severity));
        Ok((entry, catalogued, findings))
    }

    /// Adds the problems of a disk.
    async fn check_disk(
        &self,
        entry: &Entry,
        record: &DiskRecord,
        live: &Option<Live>,
        findings: &mut Vec<Finding>,
    ) -> Result<()> {
        let (name, path) = (&entry.domain.name, record.disk.address.as_str());
        let backend = self.registry.serving(&record.disk)?;
        let state = match backend.inspect(record, InspectDepth::Dependents, attached(live, record)).await {
            Ok(state) => state,
            Err(error) => {
                findings.push(finding(Severity::Error, path, error.to_string()));
                return Ok(());
            }
        };
        findings.extend(points_missing(record, &state, &entry.tree));
        for layer in orphans(record, &state, &entry.tree) {
            let Some(known) = state.layer(&layer) else { continue };
            // It is kept for the internal snapshots in it, which are needed.
            if !known.internal.is_empty() {
                continue;
            }
            let size = crate::size::shown_size(known.allocated);
            let note = format!(
                "no snapshot needs this layer of {size}; a delete or `domsnap recover {name}` merges it when that can be done"
            );
            findings.push(finding(Severity::Note, layer.as_str(), note));
        }
        match backend.check(record, &state).await {
            Ok(found) => findings.extend(found),
            Err(error) => {
                findings.push(finding(Severity::Error, path, format!("it cannot be checked: {error}")));
            }
        }
        Ok(())
    }

    async fn check_manifests(&self, manifests: &Manifests, entry: &Entry) -> Vec<Finding> {
        let place = manifests.place();
        let warn = |subject: &str, message: String| finding(Severity::Warning, subject, message);
        let found = match self.authority.read(manifests).await {
            Ok(found) => found,
            Err(error) => return vec![warn(place, error.to_string())],
        };
        let mut findings: Vec<Finding> = found
            .problems
            .iter()
            .map(|Problem { place, why, .. }| {
                warn(
                    place,
                    format!(
                        "the manifest is not usable: {why}; the next change of the domain writes it again"
                    ),
                )
            })
            .collect();
        for snapshot in entry.tree.iter() {
            let problem = match found.snapshots.iter().find(|recorded| recorded.id == snapshot.id) {
                Some(recorded) if recorded == snapshot => continue,
                Some(_) => "is stale",
                None => "is missing",
            };
            findings.push(warn(
                place,
                format!(
                    "the manifest of snapshot {} {problem}; `domsnap recover {}` writes it",
                    snapshot.name, entry.domain.name
                ),
            ));
        }
        for recorded in found.snapshots.iter().filter(|recorded| entry.tree.get(recorded.id).is_none()) {
            findings.push(warn(
                place,
                format!(
                    "there is a manifest of snapshot {}, which the catalogue does not have; `domsnap import --replace {}` imports what the manifests contain",
                    recorded.name,
                    images_of(&entry.domain)
                ),
            ));
        }
        findings
    }
}

fn finding(severity: Severity, subject: &str, message: String) -> Finding {
    Finding { severity, subject: subject.to_owned(), message }
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
