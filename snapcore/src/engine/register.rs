//! Enters clones into the catalogue, after the commit point of the operation that made their disks.
//!
//! The disks of all clones are durable and published before. Each domain is one transaction of its own,
//! because a transaction never spans domains. A crash between two leaves some domains unregistered, and the
//! step recorded as begun: it is repeated, finds those that are registered, and registers the others.

use super::{Running, on_a_thread};
use crate::address::DiskAddress;
use crate::catalogue::{Change, Entry, Revision};
use crate::domain::Domain;
use crate::error::{ErrorKind, Result};
use crate::hypervisor::StepOutcome;
use crate::shell::shell_command;
use crate::snapshot::{Snapshot, SnapshotTree};

impl Running<'_> {
    /// Registers `domains`, each with its first snapshot if it has one. One that cannot be, because its name
    /// or an image got into use since the commit point, is a note: its disks are whole.
    ///
    /// # Errors
    /// Those of the catalogue.
    pub(super) async fn register(&self, domains: &[Domain], snapshots: &[Snapshot]) -> Result<StepOutcome> {
        let mut notes = Vec::new();
        for (number, domain) in domains.iter().enumerate() {
            notes.extend(self.register_one(domain, snapshots.get(number)).await?);
        }
        Ok(StepOutcome { notes, ..StepOutcome::default() })
    }

    async fn register_one(&self, domain: &Domain, snapshot: Option<&Snapshot>) -> Result<Option<String>> {
        let catalogue = self.engine.catalogue;
        let is_this = |entry: &Entry| {
            let address = |domain: &Domain| domain.disks.first().map(|record| record.disk.address.clone());
            address(&entry.domain) == address(domain)
        };
        let entry = match catalogue.load(&domain.name).await? {
            // It was registered before a crash, and may have been used since.
            Some(entry) if is_this(&entry) => return Ok(None),
            Some(_) => return Ok(Some(not_registered(domain, "another domain has the name by now"))),
            None => {
                let snapshots: Vec<Snapshot> = snapshot.into_iter().cloned().collect();
                let mut changes = vec![Change::PutDomain(Box::new(domain.clone()), snapshots.clone())];
                changes.extend(self.bases_of(domain).await);
                match catalogue.commit(&domain.name, Revision::ABSENT, changes).await {
                    Ok(revision) => Entry::new(domain.clone(), SnapshotTree::new(snapshots), revision),
                    Err(error) if error.kind() == ErrorKind::Exists => {
                        return Ok(Some(not_registered(
                            domain,
                            "another domain has one of its images by now",
                        )));
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        Ok(self.write_manifests_of(entry).await.err().map(|error| error.to_string()))
    }

    /// The change that records the files which the images of a clone are backed by.
    async fn bases_of(&self, domain: &Domain) -> Option<Change> {
        let mut files: Vec<DiskAddress> = Vec::new();
        for record in &domain.disks {
            let backend = self.engine.registry.serving(&record.disk).ok()?;
            files.extend(backend.bases(record).await.ok()?.into_iter().map(|base| base.file));
        }
        files.sort();
        files.dedup();
        Some(Change::Bases(files))
    }

    async fn write_manifests_of(&self, entry: Entry) -> Result<()> {
        let (Some(first), Some(catalogue)) =
            (entry.domain.disks.first(), self.engine.catalogue.identity().await?)
        else {
            return Ok(());
        };
        let manifests = self.engine.registry.serving(&first.disk)?.manifests(&first.disk);
        on_a_thread(move || manifests.write(catalogue, None, &entry)).await
    }
}

fn not_registered(domain: &Domain, why: &str) -> String {
    let mut command =
        vec!["domsnap".to_owned(), "domain".to_owned(), "add".to_owned(), "NEW-NAME".to_owned()];
    for record in &domain.disks {
        let disk = &record.disk;
        command.extend([
            "--disk".to_owned(),
            format!("{}={},format={}", disk.target, disk.address, disk.format),
        ]);
    }
    let command = shell_command(command.iter().map(String::as_str));
    format!("the clone {} is complete and not registered: {why}; `{command}` registers it", domain.name)
}
