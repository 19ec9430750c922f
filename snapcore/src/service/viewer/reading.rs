//! Snapshots that are read and compared. No lock, nothing changed; a caller that reads for long holds the
//! snapshot.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::Viewer;
use crate::address::DiskAddress;
use crate::backend::{Differences, InspectDepth, PointImage, Ranges};
use crate::catalogue::Entry;
use crate::domain::{Disk, DiskRecord, Domain};
use crate::error::{Error, ErrorKind, Result};
use crate::name::{DomainName, SnapshotName, Target};
use crate::service::DomainRef;
use crate::service::locator::{Live, Located, attached};
use crate::snapshot::{DiskPoint, Point, Snapshot};
use crate::state::DiskState;

/// Extents that are asked for at once.
const EXTENTS: usize = 1024;

/// A request to compare two states of a domain's disks.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct DiffRequest {
    /// The first snapshot.
    pub from: SnapshotName,
    /// The second one; absent: the current state of a domain that does not run.
    pub to: Option<SnapshotName>,
    /// The disks; empty: all.
    pub disks: Vec<Target>,
    /// True to compare the data where metadata cannot exclude a difference.
    pub exact: bool,
}

setters!(DiffRequest {
    to: Option<SnapshotName>,
    disks: Vec<Target>,
    exact: bool,
});

impl DiffRequest {
    /// Compares all disks of a snapshot with the current state, by metadata.
    pub fn new(from: SnapshotName) -> Self {
        Self { from, to: None, disks: Vec::new(), exact: false }
    }
}

/// Differences between two states of a domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiffReport {
    /// The domain.
    pub domain: DomainName,
    /// The first snapshot.
    pub from: SnapshotName,
    /// The second one; absent: the current state.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to: Option<SnapshotName>,
    /// The disks that both have.
    pub disks: Vec<DiskDiff>,
    /// Remarks for the user.
    pub notes: Vec<String>,
}

/// Differences of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiskDiff {
    /// The disk.
    pub target: Target,
    /// Bytes of the disk in the first state.
    pub from_size: u64,
    /// Bytes of the disk in the second state.
    pub to_size: u64,
    /// Bytes in the extents.
    pub changed: u64,
    /// True if the data were compared; otherwise an extent may also have data that are equal in both.
    pub exact: bool,
    /// The extents that differ, ascending. They are within the second state's disk.
    pub extents: Vec<DiffExtent>,
}

/// An extent that differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiffExtent {
    /// First byte.
    pub start: u64,
    /// Bytes.
    pub length: u64,
    /// True if it reads as zeros in the second state, by metadata.
    pub zero: bool,
}

/// The differences of one disk, with both states open.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct ComparedDisk {
    /// The disk.
    pub target: Target,
    /// The differences.
    pub differences: Differences,
}

/// A snapshot whose disks are open for reading.
#[non_exhaustive]
pub struct OpenSnapshot {
    /// The domain.
    pub domain: Domain,
    /// The snapshot.
    pub snapshot: Snapshot,
    /// Its disks, those that the domain still has.
    pub disks: Vec<OpenDisk>,
    /// Its copies of state of the machine, which is no disk: firmware variables, a TPM's state.
    pub machine_state: Vec<OpenState>,
    /// The other disks of the domain and of the snapshot, each with the reason.
    pub left_out: Vec<String>,
}

/// A disk of an open snapshot.
#[derive(Clone)]
#[non_exhaustive]
pub struct OpenDisk {
    /// The disk.
    pub target: Target,
    /// The layer in which the state is.
    pub layer: DiskAddress,
    /// The state.
    pub image: Arc<dyn PointImage>,
}

/// A copy of state of the machine in an open snapshot.
#[derive(Clone)]
#[non_exhaustive]
pub struct OpenState {
    /// Its name.
    pub target: Target,
    /// Its format: what it is a state of.
    pub format: String,
    /// The file that the machine uses.
    pub used: DiskAddress,
    /// The address of the copy.
    pub copy: DiskAddress,
    /// The copy.
    pub image: Arc<dyn PointImage>,
}

impl OpenState {
    /// Why it is not among the disks.
    pub fn why_no_disk(&self) -> String {
        format!("{}; it is the file {}", is_no_disk(&self.target, &self.format), self.copy)
    }
}

fn is_no_disk(target: &Target, format: &str) -> String {
    format!("{target} is state of the machine (format {format}), which is not read as a disk")
}

impl Viewer {
    /// Compares a snapshot with another one, or with the current state.
    pub(in crate::service) async fn diff(
        &self,
        reference: &DomainRef,
        request: &DiffRequest,
    ) -> Result<DiffReport> {
        let Located { entry, .. } = self.locator.locate(reference).await?;
        let (compared, mut notes) = self.compare(&entry, request).await?;
        let mut disks = Vec::new();
        for ComparedDisk { target, differences } in compared {
            notes.extend(differences.notes.iter().map(|note| format!("{target}: {note}")));
            let exact = request.exact;
            let disk = blocking(move || disk_diff(target, &differences, exact)).await?;
            disks.push(disk);
        }
        let DiffRequest { from, to, .. } = request.clone();
        Ok(DiffReport { domain: entry.domain.name, from, to, disks, notes })
    }

    /// Compares two states, and leaves both open.
    pub(in crate::service) async fn differences(
        &self,
        reference: &DomainRef,
        request: &DiffRequest,
    ) -> Result<Vec<ComparedDisk>> {
        let Located { entry, .. } = self.locator.locate(reference).await?;
        Ok(self.compare(&entry, request).await?.0)
    }

    async fn compare(
        &self,
        entry: &Entry,
        request: &DiffRequest,
    ) -> Result<(Vec<ComparedDisk>, Vec<String>)> {
        let named = |name| {
            entry.tree.named(name).map_err(|error| error.context(format!("domain {}", entry.domain.name)))
        };
        let from = named(&request.from)?;
        let to = request.to.as_ref().map(named).transpose()?;
        self.require_disks(entry, &request.disks)?;
        let live = match to {
            // Where it cannot be known if the domain runs, its current state is not read.
            None => self.locator.connect(&entry.domain).await?,
            Some(_) => self.locator.connect_to_look(&entry.domain).await,
        };
        let (mut compared, mut notes) = (Vec::new(), Vec::new());
        for record in &entry.domain.disks {
            let target = &record.disk.target;
            if !request.disks.is_empty() && !request.disks.contains(target) {
                continue;
            }
            let Some(first) = from.point(target) else {
                notes.push(format!("{target} is {}", from.why_without(target)));
                continue;
            };
            let second = match to {
                None => {
                    require_closed(&live, record)?;
                    Point::external(record.active.clone())
                }
                Some(to) => match to.point(target) {
                    Some(second) => second.point.clone(),
                    None => {
                        notes.push(format!("{target} is {}", to.why_without(target)));
                        continue;
                    }
                },
            };
            if let Some(why) = self.unread_state(record)? {
                notes.push(why);
                continue;
            }
            let state = self.state(record, &live).await?;
            let members = [Some(first), to.and_then(|to| to.point(target))];
            for member in members.into_iter().flatten() {
                require_recorded(member, &state)?;
            }
            let backend = self.registry.serving(&record.disk)?;
            let differences = backend.differences(record, &state, &first.point, &second).await?;
            compared.push(ComparedDisk { target: target.clone(), differences });
        }
        Ok((compared, notes))
    }

    /// Opens the disks of a snapshot.
    pub(in crate::service) async fn open_snapshot(
        &self,
        reference: &DomainRef,
        name: &SnapshotName,
        targets: &[Target],
    ) -> Result<OpenSnapshot> {
        let Located { entry, .. } = self.locator.locate(reference).await?;
        let snapshot = entry
            .tree
            .named(name)
            .map_err(|error| error.context(format!("domain {}", entry.domain.name)))?
            .clone();
        self.require_disks(&entry, targets)?;
        let live = self.locator.connect_to_look(&entry.domain).await;
        let (mut disks, mut machine_state, mut left_out) = (Vec::new(), Vec::new(), Vec::new());
        let gone = snapshot.disks.iter().filter(|member| entry.domain.disk(&member.target).is_none());
        left_out.extend(gone.map(|member| format!("{} is no disk of the domain any more", member.target)));
        for record in &entry.domain.disks {
            let target = &record.disk.target;
            if !targets.is_empty() && !targets.contains(target) {
                continue;
            }
            let Some(member) = snapshot.point(target) else {
                left_out.push(format!("{target} is {}", snapshot.why_without(target)));
                continue;
            };
            let backend = self.registry.serving(&record.disk)?;
            if let Some(why) = self.unread_state(record)? {
                let copy = backend.layer_address(record, &member.point.layer);
                let opened = async {
                    let state = self.state(record, &live).await?;
                    require_recorded(member, &state)?;
                    backend.open_point(record, &state, &member.point).await
                };
                // It keeps no disk from being read.
                match opened.await {
                    Ok(image) => machine_state.push(OpenState {
                        target: target.clone(),
                        format: record.disk.format.clone(),
                        used: record.disk.address.clone(),
                        copy,
                        image,
                    }),
                    Err(error) => left_out.push(format!("{why}; it is the file {copy}: {error}")),
                }
                continue;
            }
            let state = self.state(record, &live).await?;
            require_recorded(member, &state)?;
            let image = backend.open_point(record, &state, &member.point).await?;
            let layer = state.layer(&member.point.layer).map_or(&record.disk.address, |found| &found.address);
            disks.push(OpenDisk { target: target.clone(), layer: layer.clone(), image });
        }
        Ok(OpenSnapshot { domain: entry.domain, snapshot, disks, machine_state, left_out })
    }

    async fn state(&self, record: &DiskRecord, live: &Option<Live>) -> Result<DiskState> {
        let backend = self.registry.serving(&record.disk)?;
        backend.inspect(record, InspectDepth::Layers, attached(live, record)).await
    }

    /// Returns the reason why a part of the machine is not read. It is no disk: a whole domain is not refused
    /// for it.
    fn unread_state(&self, record: &DiskRecord) -> Result<Option<String>> {
        let can = self.registry.serving(&record.disk)?.capabilities();
        let Disk { target, format, .. } = &record.disk;
        Ok((can.machine_state && !can.reads_points).then(|| is_no_disk(target, format)))
    }

    fn require_disks(&self, entry: &Entry, targets: &[Target]) -> Result<()> {
        match targets.iter().find(|target| entry.domain.disk(target).is_none()) {
            None => Ok(()),
            Some(target) => {
                let known: Vec<&str> =
                    entry.domain.disks.iter().map(|record| record.disk.target.as_str()).collect();
                Err(Error::new(
                    ErrorKind::NotFound,
                    format!("domain {} has no disk {target}", entry.domain.name),
                )
                .state("no changes made")
                .advise(format!("its disks are: {}", known.join(", "))))
            }
        }
    }
}

/// Refuses the current state of a disk that a running domain writes.
fn require_closed(live: &Option<Live>, record: &DiskRecord) -> Result<()> {
    if attached(live, record).is_none() {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!("{}: the domain runs, and its current state changes all the time", record.disk.target),
    )
    .state("no changes made")
    .advise("take a snapshot and compare with that, or shut the domain down"))
}

/// Refuses an internal snapshot that another program has replaced.
fn require_recorded(member: &DiskPoint, state: &DiskState) -> Result<()> {
    match member.replaced(state) {
        None => Ok(()),
        Some(why) => Err(Error::new(ErrorKind::NotFound, format!("{}: {why}", member.target))
            .state("no changes made")
            .advise("`domsnap check` lists which snapshots have lost their data")),
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|cause| {
        Err(Error::new(ErrorKind::Internal, "the comparison of two states broke off").because(cause))
    })
}

fn disk_diff(target: Target, found: &Differences, exact: bool) -> Result<DiskDiff> {
    let ranges = match exact {
        true => by_data(found)?,
        false => found.ranges.clone(),
    };
    let mut extents = Vec::new();
    let mut changed = 0u64;
    for range in ranges {
        changed = changed.saturating_add(range.end - range.start);
        let mut at = range.start;
        while at < range.end {
            let pieces = found.to.extents(at, range.end, EXTENTS)?;
            let Some(last) = pieces.last().map(|piece| piece.end).filter(|end| *end > at) else {
                extents.push(DiffExtent { start: at, length: range.end - at, zero: false });
                break;
            };
            extents.extend(pieces.iter().map(|piece| DiffExtent {
                start: piece.start,
                length: piece.end - piece.start,
                zero: piece.zero,
            }));
            at = last;
        }
    }
    found.from.require_still()?;
    found.to.require_still()?;
    let (from_size, to_size) = (found.from.size(), found.to.size());
    Ok(DiskDiff { target, from_size, to_size, changed, exact, extents })
}

/// The blocks of the ranges whose data differ, and what is beyond the end of the first disk.
fn by_data(found: &Differences) -> Result<Vec<Range<u64>>> {
    let mut ranges = Ranges::default();
    for range in &found.ranges {
        let both = range.end.min(found.from.size()).max(range.start);
        ranges.add_differences(found.from.as_ref(), found.to.as_ref(), range.start..both)?;
        ranges.add(both..range.end);
    }
    Ok(ranges.into_vec())
}
