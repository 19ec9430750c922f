//! Manifests: what the catalogue knows of a domain, written beside its data, so that the catalogue can be lost.
//!
//! A directory that the first disk's backend names has `domain.json`, and one `<snapshot id>.json` a snapshot. Each
//! is an envelope: a version, the CRC-32 of the content's text, and the content. The content of each says which
//! catalogue wrote it, and at which revision.
//!
//! **Whose they are.** A catalogue removes a manifest only of a snapshot that it deleted itself: one that it wrote, and
//! has no more. Others stay; when a domain is taken in, those that could not be are put aside under a name of their own
//! ([`Manifests::put_aside`]). Whether `domain.json` may be written over is decided before an operation begins, by
//! [`DomainManifest::is_known_to`].
//!
//! **What is durable before what.** Every file is written under a temporary name, flushed, and renamed; then the
//! directory is flushed once for all. `domain.json` is renamed last: it tells the catalogue's revision that the
//! whole directory stands for, so a directory that a crash left half way is known by it. Manifests of deleted
//! snapshots are gone, durably, when [`Manifests::write`] returns: the engine destroys data only after that.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::catalogue::{CatalogueId, Entry, Revision, Stamp};
use crate::{Domain, Error, ErrorKind, Result, Snapshot, SnapshotId};

/// The version of the envelope and of what is in it.
pub const VERSION: u32 = 1;

/// The longest manifest that is read: a snapshot of a thousand disks is far below it.
pub const MAX_BYTES: u64 = 4 << 20;

/// The most manifests that are read from one directory.
pub const MAX_FILES: usize = 100_000;

/// The greatest revision that is believed: a thousand a second reach it in a hundred million years.
const MAX_REVISION: u64 = 1 << 62;

const DOMAIN_FILE: &str = "domain.json";

/// The name that a manifest is written under before it gets its own.
const TEMPORARY_SUFFIX: &str = ".tmp";

/// What a manifest's name gets that describes what could not be taken in: it is read no more.
const ASIDE_SUFFIX: &str = ".left-out";

#[derive(Serialize, Deserialize)]
struct Envelope<T> {
    /// [`VERSION`].
    #[serde(rename = "domsnap-manifest")]
    version: u32,
    /// Of the content's bytes, as they stand in the file: 8 hex digits.
    crc32: String,
    content: T,
}

/// What `domain.json` holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct DomainManifest {
    /// The catalogue that wrote it; absent where an older domsnap did, whose catalogues had no identity.
    #[serde(default)]
    pub catalogue: Option<CatalogueId>,
    /// The catalogue's revision when it was written.
    pub revision: Revision,
    /// How many snapshots the domain has: fewer manifests are not all.
    #[serde(default)]
    pub snapshots: Option<u64>,
    /// The domain.
    #[serde(flatten)]
    pub domain: Domain,
}

impl DomainManifest {
    /// Who wrote it, and when.
    pub fn stamp(&self) -> Stamp {
        Stamp { catalogue: self.catalogue, revision: self.revision }
    }

    /// Whether `entry` of `catalogue` has all that this manifest tells: it was written from the entry as it is or as it
    /// was before, or the entry was taken from it. Where not, the catalogue is stale, or the manifest is another's.
    pub fn is_known_to(&self, catalogue: CatalogueId, entry: &Entry) -> bool {
        let own = self.catalogue.is_none_or(|wrote| wrote == catalogue)
            && self.domain.name == entry.domain.name
            && self.revision <= entry.revision;
        own || entry
            .follows
            .is_some_and(|taken| taken.catalogue == self.catalogue && self.revision <= taken.revision)
    }
}

/// What a snapshot's file holds.
#[derive(Serialize, Deserialize)]
struct SnapshotManifest {
    #[serde(default)]
    catalogue: Option<CatalogueId>,
    #[serde(default)]
    revision: Option<Revision>,
    #[serde(flatten)]
    snapshot: Snapshot,
}

/// What a directory of manifests tells.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Found {
    /// The domain; absent where there is no sound `domain.json`.
    pub domain: Option<DomainManifest>,
    /// The snapshots of all sound manifests.
    pub snapshots: Vec<Snapshot>,
    /// Who wrote the manifest of a snapshot, where it says so.
    pub written: HashMap<SnapshotId, Stamp>,
    /// Manifests that were refused, and why.
    pub problems: Vec<(Utf8PathBuf, String)>,
}

impl Found {
    /// Whether `catalogue`, which is at `revision` now, wrote the manifest of `snapshot`.
    fn is_by(&self, snapshot: SnapshotId, catalogue: CatalogueId, revision: Revision) -> bool {
        self.written
            .get(&snapshot)
            .is_some_and(|stamp| stamp.catalogue == Some(catalogue) && stamp.revision <= revision)
    }
}

/// The manifests of one domain.
#[derive(Debug, Clone)]
pub struct Manifests {
    directory: Utf8PathBuf,
}

impl Manifests {
    /// Those in `directory`, which need not exist.
    pub fn new(directory: impl Into<Utf8PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// Where they are.
    pub fn directory(&self) -> &Utf8Path {
        &self.directory
    }

    /// The sound `domain.json`, where there is one: who wrote the directory last, and what it stands for.
    pub fn domain(&self) -> Option<DomainManifest> {
        let bytes = read_bounded(&self.directory.join(DOMAIN_FILE)).ok()?;
        open_domain(&bytes).ok()
    }

    /// Whether the directory says what `entry` of `catalogue` says. A catalogue without an identity never wrote any.
    pub fn is_current(&self, catalogue: Option<CatalogueId>, entry: &Entry) -> bool {
        match self.domain() {
            Some(manifest) => {
                catalogue.is_some()
                    && manifest.stamp() == Stamp { catalogue, revision: entry.revision }
                    && manifest.domain.name == entry.domain.name
            }
            None => !wanted(entry) && self.names().is_ok_and(|names| !names.iter().any(|name| is_ours(name))),
        }
    }

    /// Makes the directory say what `after` of `catalogue` says. Where `before` is given, the directory is known to stand
    /// for it, and only what differs is written. Where nothing is left to be told, the directory goes. Manifests of
    /// snapshots that `catalogue` never knew stay.
    ///
    /// # Errors
    /// [`ErrorKind::Io`], [`ErrorKind::NoSpace`]; the directory may then be half way, and is known as such.
    pub fn write(&self, catalogue: CatalogueId, before: Option<&Entry>, after: &Entry) -> Result<()> {
        let failed = |cause: io::Error| {
            let kind = match cause.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
                _ => ErrorKind::Io,
            };
            Error::new(kind, format!("the manifests in {} cannot be written", self.directory))
                .because(cause)
                .advise("`domsnap check` tells which are missing; the next change of the domain writes them again")
        };
        // What is there and right, and what is there and no more.
        let mut told: Vec<Snapshot> = Vec::new();
        let mut gone: Vec<Utf8PathBuf> = Vec::new();
        let is_gone = |snapshot: &Snapshot| after.tree.get(snapshot.id).is_none();
        if let Some(before) = before {
            told.extend(before.tree.iter().cloned());
        } else {
            let found = self.read()?;
            told.extend(found.snapshots.iter().cloned());
            told.retain(|snapshot| found.is_by(snapshot.id, catalogue, after.revision));
            let names = self.names().map_err(failed)?;
            let half = names.iter().filter(|name| is_ours(name) && name.ends_with(TEMPORARY_SUFFIX));
            gone.extend(half.map(|name| self.directory.join(name)));
        }
        gone.extend(told.iter().filter(|told| is_gone(told)).map(|told| self.file_of(told.id)));
        if !wanted(after) {
            return self.remove_all(&gone).map_err(failed);
        }
        self.make_directory().map_err(failed)?;
        let mut removed = false;
        for path in &gone {
            removed |= remove(path).map_err(failed)?;
        }
        for snapshot in after.tree.iter().filter(|snapshot| !told.contains(snapshot)) {
            let manifest = SnapshotManifest {
                catalogue: Some(catalogue),
                revision: Some(after.revision),
                snapshot: snapshot.clone(),
            };
            self.put(&self.file_of(snapshot.id), &manifest).map_err(failed)?;
        }
        if removed {
            // What is deleted must be gone before a newer domain.json can be seen.
            self.flush_directory().map_err(failed)?;
        }
        let manifest = DomainManifest {
            catalogue: Some(catalogue),
            revision: after.revision,
            snapshots: Some(after.tree.len() as u64),
            domain: after.domain.clone(),
        };
        self.put(&self.directory.join(DOMAIN_FILE), &manifest).map_err(failed)?;
        self.flush_directory().map_err(failed)
    }

    /// Removes the manifests of `snapshots`, which the caller has under other identities now. Durable when it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn remove(&self, snapshots: &[SnapshotId]) -> Result<()> {
        let attempt = || {
            let mut removed = false;
            for id in snapshots {
                removed |= remove(&self.file_of(*id))?;
            }
            if removed { self.flush_directory() } else { Ok(()) }
        };
        attempt().map_err(|cause| {
            Error::new(ErrorKind::Io, format!("manifests in {} cannot be removed", self.directory))
                .because(cause)
        })
    }

    /// Gives manifests a name under which they are kept and read no more. Durable when it returns. One that is not there
    /// is passed over.
    ///
    /// # Errors
    /// [`ErrorKind::Io`].
    pub fn put_aside(&self, files: &[Utf8PathBuf]) -> Result<()> {
        let attempt = || {
            for file in files {
                match fs::rename(file, format!("{file}{ASIDE_SUFFIX}")) {
                    Ok(()) => {}
                    Err(cause) if cause.kind() == io::ErrorKind::NotFound => {}
                    Err(cause) => return Err(cause),
                }
            }
            if files.is_empty() { Ok(()) } else { self.flush_directory() }
        };
        attempt().map_err(|cause| {
            Error::new(ErrorKind::Io, format!("manifests in {} cannot be put aside", self.directory))
                .because(cause)
        })
    }

    /// Reads all manifests. One that is damaged is a problem of its own and stops nothing.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] where the directory exists and cannot be read.
    pub fn read(&self) -> Result<Found> {
        let names = self.names().map_err(|cause| {
            Error::new(ErrorKind::Io, format!("the manifests in {} cannot be read", self.directory))
                .because(cause)
        })?;
        let mut found = Found::default();
        for name in names.iter().filter(|name| is_ours(name) && !name.ends_with(TEMPORARY_SUFFIX)) {
            let path = self.directory.join(name);
            let outcome = read_bounded(&path).and_then(|bytes| match id_of(name) {
                None => {
                    found.domain = Some(open_domain(&bytes)?);
                    Ok(())
                }
                Some(id) => {
                    let SnapshotManifest { catalogue, revision, snapshot } = open_envelope(&bytes)?;
                    if snapshot.id != id {
                        return Err(format!("it describes the snapshot {}", snapshot.id));
                    }
                    if let Some(revision) = revision {
                        found.written.insert(id, Stamp { catalogue, revision });
                    }
                    found.snapshots.push(snapshot);
                    Ok(())
                }
            });
            if let Err(why) = outcome {
                found.problems.push((path, why));
            }
        }
        Ok(found)
    }

    /// The file of a snapshot's manifest.
    pub fn file_of(&self, id: SnapshotId) -> Utf8PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// The names in the directory, sorted; none where it does not exist.
    fn names(&self) -> io::Result<BTreeSet<String>> {
        let entries = match fs::read_dir(&self.directory) {
            Ok(entries) => entries,
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
            Err(cause) => return Err(cause),
        };
        let mut names = BTreeSet::new();
        for entry in entries {
            if let Ok(name) = entry?.file_name().into_string() {
                names.insert(name);
            }
            if names.len() > MAX_FILES {
                return Err(io::Error::other(format!("it has more than {MAX_FILES} files")));
            }
        }
        Ok(names)
    }

    fn make_directory(&self) -> io::Result<()> {
        let missing: Vec<&Utf8Path> =
            self.directory.ancestors().take_while(|above| !above.exists()).collect();
        for made in missing.into_iter().rev() {
            match DirBuilder::new().mode(0o700).create(made) {
                Ok(()) => {}
                Err(cause) if cause.kind() == io::ErrorKind::AlreadyExists => {}
                Err(cause) => return Err(cause),
            }
            if let Some(parent) = made.parent() {
                File::open(parent)?.sync_all()?;
            }
        }
        Ok(())
    }

    fn flush_directory(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }

    fn put<T: Serialize>(&self, path: &Utf8Path, content: &T) -> io::Result<()> {
        let content = serde_json::to_string(content)?;
        let envelope = Envelope {
            version: VERSION,
            crc32: format!("{:08x}", crc32fast::hash(content.as_bytes())),
            content: RawValue::from_string(content)?,
        };
        let mut text = serde_json::to_vec(&envelope)?;
        text.push(b'\n');
        let temporary = Utf8PathBuf::from(format!("{path}{TEMPORARY_SUFFIX}"));
        let write = || {
            let mut file =
                OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&temporary)?;
            file.write_all(&text)?;
            file.sync_all()?;
            fs::rename(&temporary, path)
        };
        write().inspect_err(|_| {
            // The failure is what is told; a temporary file that stays is removed by the next full write.
            let _ = fs::remove_file(&temporary);
        })
    }

    /// Removes `domain.json` and `files`, then the directory and those above it that were made for it, where they are
    /// empty then.
    fn remove_all(&self, files: &[Utf8PathBuf]) -> io::Result<()> {
        // The domain first: without it the rest is known to be what a removal left.
        remove(&self.directory.join(DOMAIN_FILE))?;
        for file in files {
            remove(file)?;
        }
        match fs::remove_dir(&self.directory) {
            Ok(()) => {}
            Err(cause) if cause.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(cause) if cause.kind() == io::ErrorKind::DirectoryNotEmpty => return self.flush_directory(),
            Err(cause) => return Err(cause),
        }
        let Some(parent) = self.directory.parent() else { return Ok(()) };
        File::open(parent)?.sync_all()?;
        if let Some(above) =
            parent.parent().filter(|_| parent.file_name().is_some_and(|n| n.starts_with('.')))
        {
            // A hidden directory that only held manifests goes with the last of them; one with other content stays.
            if fs::remove_dir(parent).is_ok() {
                File::open(above)?.sync_all()?;
            }
        }
        Ok(())
    }
}

/// Whether `entry` has anything that the images themselves do not tell.
fn wanted(entry: &Entry) -> bool {
    !entry.tree.is_empty() || entry.domain.disks.iter().any(|record| record.owned.len() > 1)
}

fn remove(path: &Utf8Path) -> io::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(cause) if cause.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(cause) => Err(cause),
    }
}

fn id_of(name: &str) -> Option<SnapshotId> {
    name.strip_suffix(".json")?.parse().ok().map(SnapshotId)
}

/// Whether a file of this name is a manifest, or the beginning of one. Others are left alone.
fn is_ours(name: &str) -> bool {
    let name = name.strip_suffix(TEMPORARY_SUFFIX).unwrap_or(name);
    name == DOMAIN_FILE || id_of(name).is_some()
}

fn read_bounded(path: &Utf8Path) -> Result<Vec<u8>, String> {
    let read = || {
        let mut bytes = Vec::new();
        File::open(path)?.take(MAX_BYTES + 1).read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    let bytes = read().map_err(|cause| format!("it cannot be read: {cause}"))?;
    match u64::try_from(bytes.len()) {
        Ok(length) if length <= MAX_BYTES => Ok(bytes),
        _ => Err(format!("it is longer than {MAX_BYTES} bytes")),
    }
}

fn open_domain(bytes: &[u8]) -> Result<DomainManifest, String> {
    let manifest: DomainManifest = open_envelope(bytes)?;
    match manifest.revision {
        Revision(0..=MAX_REVISION) => Ok(manifest),
        Revision(more) => Err(format!("its revision is {more}, which no catalogue gives")),
    }
}

fn open_envelope<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    let envelope: Envelope<&RawValue> =
        serde_json::from_slice(bytes).map_err(|cause| format!("it is not a manifest: {cause}"))?;
    if envelope.version != VERSION {
        return Err(format!(
            "it is of version {}, and this domsnap knows version {VERSION}",
            envelope.version
        ));
    }
    let found = format!("{:08x}", crc32fast::hash(envelope.content.get().as_bytes()));
    if found != envelope.crc32 {
        return Err(format!("its content has the checksum {found}, and it says {}", envelope.crc32));
    }
    serde_json::from_str(envelope.content.get())
        .map_err(|cause| format!("its content is not understood: {cause}"))
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;

    use super::*;
    use crate::{
        ActivePath, Consistency, Disk, DiskPoint, DiskRecord, DomainName, Hypervisor, LayerName, Point,
        SnapshotName, SnapshotTree, Target,
    };

    fn snapshot(name: &str) -> Snapshot {
        Snapshot {
            id: SnapshotId::fresh(),
            name: SnapshotName::new(name).unwrap(),
            parent: None,
            created: Timestamp::now(),
            description: "tab\there \"quoted\" ünï".to_owned(),
            consistency: Consistency::Clean,
            disks: vec![DiskPoint {
                target: Target::new("vda").unwrap(),
                point: Point::internal(LayerName("a.layer".into()), name),
                virtual_size: 1 << 40,
            }],
            memory: None,
            machine: None,
            skipped: Vec::new(),
        }
    }

    fn entry(revision: u64, snapshots: &[Snapshot]) -> Entry {
        let disk = Disk { target: Target::new("vda").unwrap(), path: "/a".into(), format: "fake".into() };
        let layer = LayerName("a.layer".into());
        Entry {
            domain: Domain {
                name: DomainName::new("web").unwrap(),
                unregistered: false,
                hypervisor: Hypervisor::None,
                control: None,
                active_path: ActivePath::Keep,
                disks: vec![DiskRecord { disk, active: layer.clone(), owned: vec![layer] }],
                current: snapshots.last().map(|snapshot| snapshot.id),
                machines: Vec::new(),
            },
            tree: SnapshotTree::new(snapshots.to_vec()),
            revision: Revision(revision),
            follows: None,
        }
    }

    struct Place {
        directory: tempfile::TempDir,
    }

    impl Place {
        fn new() -> Self {
            Self { directory: tempfile::tempdir().unwrap() }
        }

        fn manifests(&self) -> Manifests {
            let root = Utf8Path::from_path(self.directory.path()).unwrap();
            Manifests::new(root.join(".hidden/web"))
        }

        fn files(&self) -> Vec<String> {
            self.manifests().names().unwrap().into_iter().collect()
        }
    }

    #[test]
    fn what_is_written_is_read_and_the_last_deletion_takes_the_directory() {
        let place = Place::new();
        let manifests = place.manifests();
        let us = CatalogueId::fresh();
        let (one, two) = (snapshot("s1"), snapshot("s2"));
        let mut before = entry(1, &[]);
        assert!(manifests.is_current(None, &before));
        for after in [
            entry(5, std::slice::from_ref(&one)),
            entry(7, &[one.clone(), two.clone()]),
            entry(9, std::slice::from_ref(&two)),
        ] {
            manifests.write(us, Some(&before), &after).unwrap();
            let found = manifests.read().unwrap();
            assert_eq!(found.problems, Vec::new());
            assert_eq!(SnapshotTree::new(found.snapshots), after.tree);
            let told = found.domain.unwrap();
            assert_eq!(
                (told.revision, told.catalogue, &told.domain),
                (after.revision, Some(us), &after.domain)
            );
            assert!(manifests.is_current(Some(us), &after) && !manifests.is_current(Some(us), &before));
            assert!(!manifests.is_current(Some(CatalogueId::fresh()), &after));
            before = after;
        }
        manifests.write(us, Some(&before), &entry(11, &[])).unwrap();
        assert_eq!(fs::read_dir(place.directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_stale_directory_is_made_right_and_files_of_others_stay() {
        let place = Place::new();
        let manifests = place.manifests();
        let us = CatalogueId::fresh();
        let (old, kept) = (snapshot("old"), snapshot("kept"));
        manifests.write(us, None, &entry(1, &[old.clone(), kept.clone()])).unwrap();
        let half = format!("{}.json{TEMPORARY_SUFFIX}", SnapshotId::fresh());
        fs::write(manifests.directory().join(&half), "half").unwrap();
        fs::write(manifests.directory().join("readme"), "of somebody").unwrap();
        fs::write(manifests.directory().join(format!("{}.json", kept.id)), "damaged").unwrap();
        let now = entry(4, std::slice::from_ref(&kept));
        manifests.write(us, None, &now).unwrap();
        let mut expected = vec![format!("{}.json", kept.id), DOMAIN_FILE.to_owned(), "readme".to_owned()];
        expected.sort();
        assert_eq!(place.files(), expected);
        assert_eq!(manifests.read().unwrap().snapshots, [kept]);
        manifests.write(us, Some(&now), &entry(6, &[])).unwrap();
        assert_eq!(place.files(), ["readme"]);
    }

    #[test]
    fn manifests_of_snapshots_that_the_writer_never_knew_stay() {
        let place = Place::new();
        let manifests = place.manifests();
        let (us, them) = (CatalogueId::fresh(), CatalogueId::fresh());
        let (ours, theirs, newer) = (snapshot("ours"), snapshot("theirs"), snapshot("newer"));
        manifests.write(them, None, &entry(1, std::slice::from_ref(&theirs))).unwrap();
        manifests.write(us, None, &entry(9, std::slice::from_ref(&newer))).unwrap();
        let stays = [&theirs, &newer].map(|snapshot| format!("{}.json", snapshot.id));
        let here = |place: &Place| stays.iter().all(|name| place.files().contains(name));
        // At revision 4 this catalogue, put back from a backup, does not know what it wrote at 9.
        for before in [None, Some(entry(4, &[]))] {
            manifests.write(us, before.as_ref(), &entry(5, std::slice::from_ref(&ours))).unwrap();
            assert!(here(&place), "{:?}", place.files());
        }
        manifests.write(us, None, &entry(6, &[])).unwrap();
        assert!(here(&place) && place.files().len() == 2, "{:?}", place.files());
        assert!(!manifests.is_current(Some(us), &entry(6, &[])));
        manifests.put_aside(&[manifests.file_of(theirs.id), manifests.file_of(ours.id)]).unwrap();
        assert_eq!(manifests.read().unwrap().snapshots, std::slice::from_ref(&newer));
        assert!(place.files().contains(&format!("{}.json.left-out", theirs.id)));
        manifests.write(us, None, &entry(10, &[])).unwrap();
        assert_eq!(place.files(), [format!("{}.json.left-out", theirs.id)]);
    }

    #[test]
    fn a_manifest_is_known_to_the_catalogue_that_wrote_it_or_followed_it_and_to_no_other() {
        let (us, them) = (CatalogueId::fresh(), CatalogueId::fresh());
        let told = |catalogue, revision| DomainManifest {
            catalogue,
            revision: Revision(revision),
            snapshots: Some(0),
            domain: entry(revision, &[]).domain,
        };
        let ours = entry(7, &[]);
        // Behind: a crash came between the catalogue and the manifests.
        assert!(told(Some(us), 7).is_known_to(us, &ours) && told(Some(us), 5).is_known_to(us, &ours));
        assert!(!told(Some(us), 8).is_known_to(us, &ours));
        assert!(!told(Some(them), 3).is_known_to(us, &ours));
        assert!(told(None, 7).is_known_to(us, &ours) && !told(None, 8).is_known_to(us, &ours));
        let mut of_another = told(Some(us), 5);
        of_another.domain.name = DomainName::new("other").unwrap();
        assert!(!of_another.is_known_to(us, &ours));
        let follows = Some(Stamp { catalogue: Some(them), revision: Revision(6) });
        let taken = Entry { follows, ..entry(7, &[]) };
        assert!(told(Some(them), 6).is_known_to(us, &taken) && told(Some(us), 7).is_known_to(us, &taken));
        assert!(!told(Some(them), 7).is_known_to(us, &taken));
    }

    #[test]
    fn a_damaged_manifest_is_refused_by_name_and_stops_no_other() {
        let place = Place::new();
        let manifests = place.manifests();
        let all = [snapshot("s1"), snapshot("s2"), snapshot("s3"), snapshot("s4"), snapshot("s5")];
        manifests.write(CatalogueId::fresh(), None, &entry(1, &all)).unwrap();
        let path = |snapshot: &Snapshot| manifests.file_of(snapshot.id);
        let text = |snapshot| fs::read_to_string(path(snapshot)).unwrap();
        fs::write(path(&all[0]), text(&all[0]).replace("s1", "sx")).unwrap();
        fs::write(path(&all[1]), text(&all[1]).replace("manifest\":1", "manifest\":2")).unwrap();
        fs::write(path(&all[2]), text(&all[3])).unwrap();
        let long = File::create(path(&all[4])).unwrap();
        long.set_len(MAX_BYTES + 1).unwrap();
        let found = manifests.read().unwrap();
        assert_eq!(found.snapshots, [all[3].clone()]);
        let why = |snapshot| &found.problems.iter().find(|(file, _)| *file == path(snapshot)).unwrap().1;
        assert!(why(&all[0]).contains("checksum"));
        assert!(why(&all[1]).contains("version 2"));
        assert!(why(&all[2]).contains("describes the snapshot"));
        assert!(why(&all[4]).contains("longer than"));
    }

    #[test]
    fn fields_of_a_newer_program_are_passed_over() {
        let content = r#"{"id":"0190a0c0-0000-7000-8000-000000000000","name":"s1","parent":null,
            "created":"2026-11-22T10:00:00Z","consistency":"clean","disks":[],"mood":"good"}"#;
        let crc = crc32fast::hash(content.as_bytes());
        let text = format!(r#"{{"domsnap-manifest":1,"crc32":"{crc:08x}","extra":[],"content":{content}}}"#);
        let snapshot: Snapshot = open_envelope(text.as_bytes()).unwrap();
        assert_eq!(snapshot.name.as_str(), "s1");
    }
}
