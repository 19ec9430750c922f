//! The manifest of a directory of exports.
//!
//! It is an [`Envelope`], whose checksum finds damage. Nothing in it is authoritative: all of it is checked.

use std::collections::{HashMap, HashSet};

use checked_json::Envelope;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snapcore::hypervisor::{FIRMWARE_VARIABLES, TPM_STATE};
use snapcore::{Consistency, DomainName, Snapshot, SnapshotId, SnapshotName, Target};
use uuid::Uuid;

/// The envelope of the files that domsnap itself reads here, and the version of their content.
const ENVELOPE: Envelope = Envelope::new("domsnap-export", 1);

/// The longest manifest that is read, in bytes.
pub(crate) const MAX_BYTES: u64 = 64 << 20;

/// The most exports of one directory.
const MAX_EXPORTS: usize = 100_000;

/// The most disks of one export.
const MAX_DISKS: usize = 1024;

/// The formats of the machine's state.
const STATE_FORMATS: [&str; 2] = [FIRMWARE_VARIABLES, TPM_STATE];

/// The longest chain of increments.
const MAX_DEPTH: usize = 200;

/// The longest description, in bytes.
const MAX_DESCRIPTION: usize = 64 << 10;

/// The identity of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(transparent)]
pub struct ExportId(#[schemars(with = "String")] pub Uuid);

impl ExportId {
    /// Makes a new identity.
    pub fn fresh() -> Self {
        Self(Uuid::now_v7())
    }
}

impl std::fmt::Display for ExportId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// All exports of a directory, in the order in which they were made.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Manifest {
    /// The exports.
    pub exports: Vec<Export>,
}

/// One export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Export {
    /// Its identity.
    pub id: ExportId,
    /// The domain.
    pub domain: DomainName,
    /// The snapshot.
    pub snapshot: ExportedSnapshot,
    /// The export that the images of this one are backed by; absent: they have all data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<ExportId>,
    /// Time of the export.
    #[schemars(with = "String")]
    pub exported: Timestamp,
    /// The disks.
    pub disks: Vec<ExportedDisk>,
    /// State of the machine, which is no disk.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub machine_state: Vec<ExportedState>,
    /// The memory image, as the domain's hypervisor made it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<ExportedFile>,
}

/// The snapshot of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct ExportedSnapshot {
    /// Its identity.
    pub id: SnapshotId,
    /// Its name.
    pub name: SnapshotName,
    /// The snapshot that was current when it was created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<SnapshotId>,
    /// Time of its instant.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// The user's description.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub description: String,
    /// Consistency of its disks.
    pub consistency: Consistency,
}

impl ExportedSnapshot {
    /// Describes a snapshot.
    pub fn of(snapshot: &Snapshot) -> Self {
        Self {
            id: snapshot.id,
            name: snapshot.name.clone(),
            parent: snapshot.parent,
            created: snapshot.created,
            description: snapshot.description.clone(),
            consistency: snapshot.consistency,
        }
    }
}

/// A file of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct ExportedFile {
    /// Its name in the directory.
    pub file: String,
    /// Its length, in bytes.
    pub bytes: u64,
    /// Its SHA-256: 64 hex digits.
    pub sha256: String,
}

impl ExportedFile {
    pub(crate) fn new(file: String, bytes: u64, sha256: String) -> Self {
        Self { file, bytes, sha256 }
    }
}

/// A disk of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct ExportedDisk {
    /// The disk.
    pub target: Target,
    /// Bytes of the guest's disk.
    pub virtual_size: u64,
    /// Its image, in the format qcow2.
    #[serde(flatten)]
    pub image: ExportedFile,
    /// The file of the parent export that backs the image; absent: the image has all data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<String>,
}

/// State of the machine in an export: firmware variables, a TPM's state. It is the whole file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct ExportedState {
    /// Its name.
    pub target: Target,
    /// Its format: what it is a state of.
    pub format: String,
    /// The name of the file that the machine used.
    pub used_as: String,
    /// Its copy.
    #[serde(flatten)]
    pub copy: ExportedFile,
}

/// The name of a copy of the machine's state.
pub(crate) fn state_name(target: &Target, snapshot: &SnapshotName, format: &str) -> String {
    format!("{target}.{snapshot}.{format}")
}

/// The name of a disk's image.
pub(crate) fn image_name(target: &Target, snapshot: &SnapshotName) -> String {
    format!("{target}.{snapshot}.qcow2")
}

/// The name of a memory image.
pub(crate) fn memory_name(snapshot: &SnapshotName) -> String {
    format!("{snapshot}.memory")
}

/// The string by which an image names the file that backs it. QEMU takes what is before a colon for a
/// protocol, unless a slash comes first.
pub(crate) fn backing_string(file: &str) -> String {
    format!("./{file}")
}

impl Manifest {
    /// The export of a snapshot.
    pub fn of_snapshot(&self, id: SnapshotId) -> Option<&Export> {
        self.exports.iter().find(|export| export.snapshot.id == id)
    }

    /// The export of this identity.
    pub fn export(&self, id: ExportId) -> Option<&Export> {
        self.exports.iter().find(|export| export.id == id)
    }

    /// Exports and all exports that they need, from `export` down to the full one.
    pub fn chain<'a>(&'a self, export: &'a Export) -> Vec<&'a Export> {
        let mut chain = vec![export];
        let mut next = export.parent;
        while let Some(found) = next.and_then(|id| self.export(id)).filter(|_| chain.len() <= MAX_DEPTH) {
            chain.push(found);
            next = found.parent;
        }
        chain
    }

    /// All files of all exports.
    pub fn files(&self) -> impl Iterator<Item = &ExportedFile> {
        self.exports.iter().flat_map(Export::files)
    }

    /// Checks all that other code relies on: names are those that snapshot and disk give, and lead nowhere; a
    /// parent comes before its child, and has the backing files; nothing comes twice.
    fn check(&self) -> Result<(), String> {
        if self.exports.len() > MAX_EXPORTS {
            return Err(format!("it has more than {MAX_EXPORTS} exports"));
        }
        let mut earlier: HashMap<ExportId, (&Export, usize)> = HashMap::new();
        let (mut snapshots, mut files) = (HashSet::new(), HashSet::new());
        for export in &self.exports {
            let name = &export.snapshot.name;
            let fail = |why: String| Err(format!("the export of {name}: {why}"));
            if export.disks.len() > MAX_DISKS || export.snapshot.description.len() > MAX_DESCRIPTION {
                return fail("it has too many disks, or too long a description".to_owned());
            }
            let parent = match export.parent {
                None => None,
                Some(id) => match earlier.get(&id) {
                    Some(found) => Some(*found),
                    None => return fail(format!("its parent {id} is not among the exports before it")),
                },
            };
            let depth = parent.map_or(0, |(_, depth)| depth + 1);
            if depth > MAX_DEPTH {
                return fail(format!("its chain is longer than {MAX_DEPTH}"));
            }
            if !snapshots.insert(export.snapshot.id) || earlier.insert(export.id, (export, depth)).is_some() {
                return fail("the same export or snapshot comes twice".to_owned());
            }
            for disk in &export.disks {
                let target = &disk.target;
                if disk.image.file != image_name(target, name) {
                    return fail(format!("the file of {target} is called {:?}", disk.image.file));
                }
                if i64::try_from(disk.virtual_size).is_err() {
                    return fail(format!("{target} has {} bytes", disk.virtual_size));
                }
                let Some(backing) = &disk.backing else { continue };
                let below = parent.and_then(|(parent, _)| parent.disk(target));
                if below.is_none_or(|below| below.image.file != *backing) {
                    return fail(format!("its parent has no file {backing:?} for {target}"));
                }
            }
            if export.machine_state.len() > MAX_DISKS {
                return fail("it has too much state of the machine".to_owned());
            }
            for state in &export.machine_state {
                let (target, format) = (&state.target, state.format.as_str());
                if !STATE_FORMATS.contains(&format) {
                    return fail(format!("{target} is of the format {format:?}"));
                }
                if state.copy.file != state_name(target, name, format) {
                    return fail(format!("the file of {target} is called {:?}", state.copy.file));
                }
                let is_name = || {
                    confined_files::FileName::new(&state.used_as).is_ok() && !state.used_as.starts_with('.')
                };
                // Only swtpm needs the name.
                if format == TPM_STATE && !is_name() {
                    return fail(format!("{target} was in a file called {:?}", state.used_as));
                }
            }
            if export.memory.as_ref().is_some_and(|memory| memory.file != memory_name(name)) {
                return fail("its memory image has another name".to_owned());
            }
            for file in export.files() {
                let is_digest = file.sha256.len() == 64 && file.sha256.bytes().all(|c| c.is_ascii_hexdigit());
                if !is_digest || i64::try_from(file.bytes).is_err() {
                    return fail(format!("size or SHA-256 of {} is none", file.file));
                }
                if confined_files::FileName::new(&file.file).is_err() || !files.insert(file.file.as_str()) {
                    return fail(format!("the file name {:?} cannot be, or comes twice", file.file));
                }
            }
        }
        Ok(())
    }

    /// Reads a manifest.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let manifest: Self = open_envelope(bytes)?;
        manifest.check()?;
        Ok(manifest)
    }

    /// The text of the manifest's file.
    ///
    /// # Errors
    /// What no later reader would accept.
    pub(crate) fn text(&self) -> Result<Vec<u8>, String> {
        self.check()?;
        envelope(self)
    }
}

impl Export {
    /// The disk called `target`.
    pub fn disk(&self, target: &Target) -> Option<&ExportedDisk> {
        self.disks.iter().find(|disk| disk.target == *target)
    }

    /// Its files.
    pub fn files(&self) -> impl Iterator<Item = &ExportedFile> {
        let state = self.machine_state.iter().map(|state| &state.copy);
        self.disks.iter().map(|disk| &disk.image).chain(state).chain(&self.memory)
    }
}

pub(crate) fn envelope<T: Serialize>(content: &T) -> Result<Vec<u8>, String> {
    let text = ENVELOPE.write_in_lines(content).map_err(|cause| cause.to_string())?;
    match u64::try_from(text.len()) {
        Ok(length) if length <= MAX_BYTES => Ok(text),
        _ => Err(format!("it would be longer than {MAX_BYTES} bytes")),
    }
}

pub(crate) fn open_envelope<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    ENVELOPE.read(bytes).map_err(|cause| cause.to_string())
}
