//! Reads the manifests beside disks, matches them with the disks, and identifies their domain.

use std::collections::HashMap;
use std::sync::Arc;

use camino::Utf8Path;

use super::{ImportSource, Importer, Report};
use crate::backend::is_gone_file;
use crate::domain::{ActivePath, Disk, DiskRecord, Domain, Hypervisor};
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::hypervisor::{Control, MemoryStore};
use crate::manifest::{DomainManifest, Found, Item};
use crate::name::{DomainName, LayerName, Target};
use crate::service::authority::{Leftovers, Manifests, records_at};
use crate::service::images::images_of;

/// Disks, and the manifests that were found to be theirs.
pub(super) struct Matched {
    /// The source of the import.
    pub(super) source: ImportSource,
    /// The manifests beside the first disk.
    pub(super) manifests: Manifests,
    /// Their content.
    pub(super) found: Found,
    /// For each target of the domain's manifest the target of the source.
    pub(super) targets: HashMap<Target, Target>,
    /// The domain's disks: those of the manifest, where the source has only paths.
    pub(super) disks: Vec<Disk>,
}

impl Matched {
    /// The domain's manifest.
    pub(super) fn manifest(&self) -> Option<&DomainManifest> {
        self.found.domain.as_ref()
    }

    /// The manifest's record of a disk.
    pub(super) fn record_of(&self, disk: &Disk) -> Option<&DiskRecord> {
        self.manifest()?.domain.disks.iter().find(|recorded| match self.source.by_path {
            true => recorded.disk.target == disk.target,
            false => self.targets.get(&recorded.disk.target) == Some(&disk.target),
        })
    }

    /// The domain of the disks, as far as it is known before they are adopted.
    fn described_as(&self, name: &DomainName, hypervisor: &Hypervisor, control: Option<&Control>) -> Domain {
        let record = |disk: &Disk| {
            let recorded = self.record_of(disk).map(|recorded| recorded.active.clone());
            DiskRecord::new(disk.clone(), recorded.unwrap_or(LayerName(disk.address.name().to_owned())))
        };
        Domain::new(name.clone(), self.disks.iter().map(record).collect())
            .hypervisor(hypervisor.clone())
            .control(control.cloned())
    }

    /// Layers that may be no snapshot's own, which discovery must not take for snapshots. They are known only
    /// if all `restored` snapshots of the manifest exist: then a layer that is the point of no snapshot is an
    /// orphan.
    pub(super) fn orphans(&self, restored: usize, leftovers: &Leftovers) -> Vec<(Target, LayerName)> {
        let is_whole = |manifest: &&DomainManifest| {
            manifest.snapshots == Some(restored as u64)
                && !leftovers.refused
                && leftovers.left_out.iter().all(|item| *item == Item::Domain)
        };
        let Some(manifest) = self.manifest().filter(is_whole) else { return Vec::new() };
        let disks = manifest.domain.disks.iter();
        disks
            .flat_map(|recorded| {
                let renamed = self.targets.get(&recorded.disk.target).filter(|_| !self.source.by_path);
                let target = renamed.unwrap_or(&recorded.disk.target);
                recorded.owned.iter().map(|layer| (target.clone(), layer.clone()))
            })
            .collect()
    }
}

/// The identity of the domain to which the disks belong.
pub(super) struct Identity {
    /// Its name.
    pub(super) name: DomainName,
    /// Set where it was never registered.
    pub(super) unregistered: bool,
    /// Its hypervisor.
    pub(super) hypervisor: Hypervisor,
    /// The connection to it.
    pub(super) control: Option<Control>,
    /// The placement of its active images.
    pub(super) active_path: ActivePath,
    /// The place of its memory images, where it has one.
    pub(super) memory: Option<Arc<dyn MemoryStore>>,
}

impl Importer {
    /// Reads the manifests beside the disks and matches the two.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] where the manifests are of other images.
    pub(super) async fn read(&self, mut source: ImportSource, report: &mut Report) -> Result<Matched> {
        let Some(first) = source.disks.first() else {
            return Err(Error::new(ErrorKind::Usage, "a domain needs one disk at least")
                .advise("add a [[disk]] with target, path and format"));
        };
        let manifests = self.authority.manifests_of_disk(first)?;
        let found = self.authority.read(&manifests).await?;
        if let Some(manifest) = &found.domain {
            follow_moved_paths(manifest, &mut source);
        }
        self.authority.refuse_claimed(&source.disks, manifests.directory()).await?;
        let problems = found.problems.iter();
        report.notes.extend(
            problems.map(|problem| format!("the manifest {} is left out: {}", problem.place, problem.why)),
        );
        let recorded = match &found.domain {
            Some(manifest) => match_disks(manifest, &source, manifests.place())?,
            None => Vec::new(),
        };
        let targets: HashMap<Target, Target> = recorded.into_iter().collect();
        let disks = match &found.domain {
            Some(manifest) if source.by_path => disks_of_manifest(manifest, &source),
            _ => source.disks.clone(),
        };
        Ok(Matched { source, manifests, found, targets, disks })
    }

    /// Identifies the domain of the disks: by the source, and by the manifest where the source has only
    /// paths.
    pub(super) async fn identify(&self, matched: &Matched, report: &mut Report) -> Result<Identity> {
        let (source, manifest) = (&matched.source, matched.manifest());
        let (hypervisor, control, active_path) = self.reached(matched, report);
        let unregistered = match (&source.name, manifest) {
            (Some(_), _) => false,
            (None, Some(manifest)) => manifest.domain.unregistered,
            (None, None) => true,
        };
        let by_manifest = manifest.filter(|_| source.by_path).map(|manifest| &manifest.domain.name);
        let mut name = match source.name.as_ref().or(by_manifest) {
            Some(name) => name.clone(),
            None => name_of_images(&matched.disks)?,
        };
        let named_by_manifest = source.name.is_none() && manifest.is_some();
        if named_by_manifest && self.records.find(&name).await?.is_some() {
            // Another domain has the name: these images are a copy of its.
            let fallback = name_of_images(&matched.disks)?;
            report.notes.push(format!(
                "the manifests name the domain {name}, which is another one; these are {fallback}"
            ));
            name = fallback;
        }
        let there = manifest.and_then(|manifest| manifest.domain.host.as_ref());
        if let (Some(there), false) = (there, Host::is_here(there, self.host.as_ref())) {
            report.notes.push(format!(
                "the manifests of domain {name} were written on host {there}; from the next change on it is a domain of \
                 this one"
            ));
        }
        let described = matched.described_as(&name, &hypervisor, control.as_ref());
        // A place that the hypervisor does not have holds no image.
        let memory = self.registry.memory_store(&described, matched.manifests.directory()).ok().flatten();
        Ok(Identity { name, unregistered, hypervisor, control, active_path, memory })
    }

    /// Returns the connection to the domain, with its hypervisor.
    ///
    /// A socket's name or a command from a file beside the image would do what the owner of the directory
    /// wants. So it is used only where the user confirms it. A connection that the catalogue has already
    /// stays.
    fn reached(&self, matched: &Matched, report: &mut Report) -> (Hypervisor, Option<Control>, ActivePath) {
        let source = &matched.source;
        let Some(recorded) = matched.manifest().map(|manifest| &manifest.domain).filter(|_| source.by_path)
        else {
            return (source.hypervisor.clone(), source.control.clone(), source.active_path);
        };
        // Without its hypervisor in this program, the domain is known only as disks at rest.
        let hypervisor = match self.registry.hypervisor(&recorded.hypervisor) {
            Ok(_) => recorded.hypervisor.clone(),
            Err(_) => Hypervisor::NONE,
        };
        if source.trust || recorded.control.is_none() {
            return (hypervisor, recorded.control.clone(), recorded.active_path);
        }
        if source.control.is_none() {
            report.notes.push(not_confirmed(recorded));
            // The manifest is kept for the user to inspect, under a name that is not read again.
            report.leftovers.left_out.push(Item::Domain);
        }
        (hypervisor, source.control.clone(), recorded.active_path)
    }
}

/// The name of a domain that was never registered: the same images have the same name, always.
pub(in crate::service) fn name_of_images(disks: &[Disk]) -> Result<DomainName> {
    let all: Vec<&str> = disks.iter().map(|disk| disk.address.as_str()).collect();
    let sum = crc32fast::hash(all.join("\n").as_bytes());
    let stem =
        disks.first().and_then(|disk| Utf8Path::new(disk.address.name()).file_stem()).unwrap_or("image");
    let mut stem: String = stem
        .trim_start_matches(['.', '-'])
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || "._-+".contains(c) { c } else { '_' })
        .take(200)
        .collect();
    if stem.is_empty() {
        stem.push_str("image");
    }
    DomainName::new(format!("{stem}-{sum:08x}"))
}

/// The message for a user who did not confirm the connection that manifests give for a domain.
fn not_confirmed(recorded: &Domain) -> String {
    let what = match &recorded.control {
        Some(control) if !control.start.is_empty() => "how it is reached and which command starts it",
        _ => "how it is reached",
    };
    format!(
        "the manifests of domain {} say {what}: that is not used, because whoever owns the images' directory can have written \
         it; where it is right, confirm it before the domain is changed: `domsnap import --trust {}` (a change keeps what it \
         said as domain.json.left-out)",
        recorded.name,
        images_of(recorded)
    )
}

/// Follows disks whose active image has moved. The manifest may have a disk of a catalogued domain at another
/// path, because its active image is there now ([`ActivePath::New`]). Then the disk is taken from there.
fn follow_moved_paths(manifest: &DomainManifest, source: &mut ImportSource) {
    if !source.import || source.known_as.is_none() {
        return;
    }
    for disk in &mut source.disks {
        let recorded = manifest.domain.disks.iter().find(|recorded| recorded.disk.target == disk.target);
        let Some(recorded) =
            recorded.filter(|recorded| recorded.disk.address.directory() == disk.address.directory())
        else {
            continue;
        };
        let was = disk.address.name();
        if recorded.disk.address != disk.address && recorded.owned.iter().any(|layer| layer.as_str() == was) {
            disk.address = recorded.disk.address.clone();
        }
    }
}

/// Matches the targets of the manifest with those of the source, by the images' names: the directory may have
/// moved.
///
/// # Errors
/// [`ErrorKind::Refused`] where the manifest, in `place`, is of other images, or of more.
fn match_disks(
    manifest: &DomainManifest,
    source: &ImportSource,
    place: &str,
) -> Result<Vec<(Target, Target)>> {
    let recorded = &manifest.domain.disks;
    let mut pairs = Vec::new();
    for record in recorded {
        let name = record.disk.address.name();
        let exact = source.disks.iter().find(|disk| disk.address == record.disk.address);
        let disk = exact.or_else(|| source.disks.iter().find(|disk| disk.address.name() == name));
        if let Some(disk) = disk {
            pairs.push((record.disk.target.clone(), disk.target.clone()));
        }
    }
    let whole = pairs.len() == recorded.len() && recorded.len() == source.disks.len();
    if whole {
        return Ok(pairs);
    }
    let gone = |record: &DiskRecord| {
        pairs.iter().any(|(target, _)| *target == record.disk.target)
            || record.disk.local().is_some_and(is_gone_file)
    };
    let reported_by_machine = !source.by_path && !source.hypervisor.is_none();
    if !pairs.is_empty()
        && pairs.len() == source.disks.len()
        && (reported_by_machine || recorded.iter().all(gone))
    {
        return Ok(pairs);
    }
    if source.import && source.by_path && !pairs.is_empty() && pairs.len() == source.disks.len() {
        return Ok(pairs);
    }
    let all = images_of(&manifest.domain);
    if pairs.is_empty() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "the manifests in {place} are of domain {}, whose images are others: {all}",
                manifest.domain.name
            ),
        )
        .state("no changes made: what is written there would be lost")
        .advise(format!("name those images; or, where that domain is given up, move {place} away")));
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "manifests beside the images say that they belong to domain {}, whose disks are others",
            manifest.domain.name
        ),
    )
    .state("no changes made")
    .advise(format!("name all its images: {all}; or bring it back with `domsnap import`")))
}

/// The disks that a manifest describes, at the paths that were given.
fn disks_of_manifest(manifest: &DomainManifest, source: &ImportSource) -> Vec<Disk> {
    let beside = source.disks.first().and_then(|disk| disk.address.directory());
    let at = |(record, here): (&DiskRecord, DiskRecord)| {
        let (recorded, address) = (&record.disk, here.disk.address);
        let (exact, named) = (
            source.disks.iter().find(|disk| disk.address == recorded.address),
            source.disks.iter().find(|disk| disk.address.name() == recorded.address.name()),
        );
        if let Some(given) = exact.or(named) {
            return Some(Disk { address: given.address.clone(), ..recorded.clone() });
        }
        // A disk whose file is gone stays out. One whose directory is missing as well stays in: it may come
        // back. One that is missing in a copy stays in too, so that its adoption says so.
        if address == recorded.address && address.local().is_some_and(is_gone_file) {
            return None;
        }
        let address = match (beside, address.local()) {
            (Some(beside), Some(path)) if !path.exists() => beside.join(address.name()).into(),
            _ => address,
        };
        Some(Disk { address, ..recorded.clone() })
    };
    manifest.domain.disks.iter().zip(records_at(beside, &manifest.domain)).filter_map(at).collect()
}
