//! Manifests as files in a directory beside the first disk.
//!
//! `domain.json` describes the domain, one `<snapshot id>.json` a snapshot. Each is an
//! [`Envelope`] of its own kind, which shows damage.
//!
//! **What is durable before what.** Every file is written under a temporary name, flushed, and renamed; then
//! the directory is flushed once for all. `domain.json` is renamed last. It has the catalogue's revision that
//! the whole directory represents, so it shows when a crash left the directory incomplete. Manifests of
//! deleted snapshots are gone, durably, when [`ManifestStore::write`] returns: the engine destroys data only
//! after that.
//!
//! **Nothing in them is authoritative.** The owner of the images' directory can write them. So they are read
//! and written through the directory's descriptor, no link is followed, and sizes are limited. Every name in
//! them is checked before other code gets it ([`crate::confine`]).

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;

use camino::{Utf8Path, Utf8PathBuf};
use checked_json::Envelope;
use confined_files::{Directory, FileName, Kind, is_trusted, refusal};
use serde::{Deserialize, Serialize};

use super::{DomainManifest, Found, Item, ManifestStore, Problem};
use crate::catalogue::{CatalogueId, Entry, Revision, Stamp};
use crate::error::{Error, ErrorKind, Result};
use crate::shell::shell_word;
use crate::snapshot::{Snapshot, SnapshotId};

/// The envelope of all files here, and the version of their content.
const ENVELOPE: Envelope = Envelope::new("domsnap-manifest", 1);

/// The size of the longest manifest that is read: a snapshot of a thousand disks is far below it.
pub(crate) const MAX_BYTES: u64 = 4 << 20;

/// The most bytes that are read of all manifests of one directory.
pub(crate) const MAX_ALL_BYTES: u64 = 256 << 20;

/// The most manifests that are read from one directory.
pub(crate) const MAX_FILES: usize = 100_000;

/// The greatest revision that is accepted: a thousand a second reach it in a hundred million years.
const MAX_REVISION: u64 = 1 << 62;

const DOMAIN_FILE: &str = "domain.json";

/// The name that a manifest is written under before it gets its own.
const TEMPORARY_SUFFIX: &str = ".tmp";

/// The suffix for the name of a manifest whose content could not be imported: it is read no more.
const ASIDE_SUFFIX: &str = ".left-out";

/// The content of a snapshot's file.
#[derive(Serialize, Deserialize)]
struct SnapshotManifest {
    #[serde(default)]
    catalogue: Option<CatalogueId>,
    #[serde(default)]
    revision: Option<Revision>,
    #[serde(flatten)]
    snapshot: Snapshot,
}

/// The manifests of one domain, in a directory.
#[derive(Debug, Clone)]
pub struct ManifestDirectory {
    directory: Utf8PathBuf,
}

impl ManifestDirectory {
    /// The manifests in `directory`, which need not exist.
    pub fn new(directory: impl Into<Utf8PathBuf>) -> Self {
        Self { directory: directory.into() }
    }

    /// The file of a snapshot's manifest.
    fn file_of(&self, id: SnapshotId) -> Utf8PathBuf {
        self.directory.join(format!("{id}.json"))
    }

    /// Opens the directory; `None` where it does not exist.
    ///
    /// The owner must be a trusted user, or the owner of the directory above it. A directory of another user
    /// was put there by a user who may only make files beside the images. Nothing in it is read, and nothing
    /// is written into it.
    fn open(&self) -> io::Result<Option<Directory>> {
        let (above, name) = match Directory::of(self.directory.as_std_path()) {
            Err(cause) if is_nothing(&cause) => return Ok(None),
            other => other?,
        };
        let Some(directory) = above.subdirectory(&name)? else { return Ok(None) };
        self.require_ours(&above, &directory)?;
        Ok(Some(directory))
    }

    /// Opens the directory as [`ManifestDirectory::open`] does. Returns `None` also where the existing
    /// directory is not ours to read, so that no manifest in it has any effect.
    fn open_if_ours(&self) -> io::Result<Option<Directory>> {
        self.open().or_else(|cause| if refusal(&cause).is_some() { Ok(None) } else { Err(cause) })
    }

    /// The advice for the user where writing failed with `cause`.
    fn advice(&self, cause: &io::Error) -> String {
        let directory = shell_word(self.directory.as_str());
        let next = "the next change of the domain writes them again";
        match cause.kind() {
            _ if self.directory.file_name().is_some_and(|name| file_name(name).is_err()) => {
                "the catalogue alone knows these snapshots; give the image a shorter name".to_owned()
            }
            _ if self.have_no_place() => format!("move {directory} away; {next}"),
            io::ErrorKind::ReadOnlyFilesystem => format!("remount its file system writable; {next}"),
            io::ErrorKind::PermissionDenied => format!(
                "run as a user who may write there, and take the flags off that `lsattr -d {directory} {directory}/*` \
                 shows (`chattr -i`, `chattr -a`); {next}"
            ),
            _ => format!("`domsnap check` lists which are missing; {next}"),
        }
    }

    fn require_ours(&self, above: &Directory, directory: &Directory) -> io::Result<()> {
        let (owner, home) = (directory.about()?.uid, above.about()?.uid);
        match is_trusted(owner) || owner == home {
            true => Ok(()),
            false => Err(confined_files::refused(format!(
                "{} belongs to user {owner}, who is neither root nor the owner of the directory that it is in",
                self.directory
            ))),
        }
    }

    /// The names in the directory, sorted; none where it does not exist.
    fn names(&self) -> io::Result<BTreeSet<String>> {
        self.open()?.map_or_else(|| Ok(BTreeSet::new()), |directory| names_in(&directory))
    }

    fn make_directory(&self) -> io::Result<Directory> {
        let (Some(parent), Some(name)) = (self.directory.parent(), self.directory.file_name()) else {
            return Err(io::ErrorKind::NotFound.into());
        };
        let above = Directory::make_all(parent.as_std_path(), 0o700)?;
        let name = file_name(name)?;
        if above.make_subdirectory(&name, 0o700)? {
            above.sync()?;
        }
        let directory = above.subdirectory(&name)?.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?;
        self.require_ours(&above, &directory)?;
        Ok(directory)
    }

    /// Removes `domain.json` and `files`, then the directory. Directories above it that were made for it are
    /// removed too if they are empty then.
    fn remove_all(&self, files: &[Utf8PathBuf]) -> io::Result<()> {
        let Some(directory) = self.open_if_ours()? else { return Ok(()) };
        // The domain first: without it, the rest is known as the remains of a removal.
        directory.remove(&file_name(DOMAIN_FILE)?)?;
        for file in files {
            remove(&directory, file)?;
        }
        let (above, name) = Directory::of(self.directory.as_std_path())?;
        match above.remove_subdirectory(&name) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(cause) if cause.kind() == io::ErrorKind::DirectoryNotEmpty => return directory.sync(),
            Err(cause) => return Err(cause),
        }
        above.sync()?;
        let Some(parent) = self.directory.parent() else { return Ok(()) };
        if parent.file_name().is_some_and(|name| name.starts_with('.')) {
            // A hidden directory that contained only manifests goes with the last of them; one with other
            // content stays.
            let (higher, hidden) = Directory::of(parent.as_std_path())?;
            if higher.remove_subdirectory(&hidden).is_ok_and(|removed| removed) {
                higher.sync()?;
            }
        }
        Ok(())
    }

    /// The file of a manifest.
    fn file(&self, item: Item) -> Utf8PathBuf {
        match item {
            Item::Domain => self.directory.join(DOMAIN_FILE),
            Item::Snapshot(id) => self.file_of(id),
        }
    }
}

impl ManifestStore for ManifestDirectory {
    fn place(&self) -> &str {
        self.directory.as_str()
    }

    fn directory(&self) -> Option<&Utf8Path> {
        Some(&self.directory)
    }

    fn shown(&self, item: Item) -> String {
        self.file(item).into_string()
    }

    fn has(&self, snapshot: SnapshotId) -> bool {
        self.file_of(snapshot).symlink_metadata().is_ok()
    }

    fn is_empty(&self) -> bool {
        self.names().is_ok_and(|names| !names.iter().any(|name| is_ours(name)))
    }

    fn domain(&self) -> Option<DomainManifest> {
        let directory = self.open().ok()??;
        let bytes = read_bounded(&directory, DOMAIN_FILE, MAX_BYTES).ok()?;
        open_domain(&bytes).ok()
    }

    fn write(&self, catalogue: CatalogueId, before: Option<&Entry>, after: &Entry) -> Result<()> {
        let failed = |cause: io::Error| {
            let advice = self.advice(&cause);
            failure(cause, format!("the manifests in {} cannot be written", self.directory)).advise(advice)
        };
        // `recorded`: the manifests that are there and right. `gone`: the files that are there and have to
        // go.
        let mut recorded: Vec<Snapshot> = Vec::new();
        let mut gone: Vec<Utf8PathBuf> = Vec::new();
        let is_gone = |snapshot: &Snapshot| after.tree.get(snapshot.id).is_none();
        if let Some(before) = before {
            recorded.extend(before.tree.iter().cloned());
        } else {
            let found = self.read()?;
            recorded.extend(found.snapshots.iter().cloned());
            recorded.retain(|snapshot| found.is_by(snapshot.id, catalogue, after.revision));
            let names = self.names().map_err(failed)?;
            let half = names.iter().filter(|name| is_ours(name) && name.ends_with(TEMPORARY_SUFFIX));
            gone.extend(half.map(|name| self.directory.join(name)));
        }
        gone.extend(
            recorded.iter().filter(|recorded| is_gone(recorded)).map(|recorded| self.file_of(recorded.id)),
        );
        if !after.needs_manifests() {
            return self.remove_all(&gone).map_err(failed);
        }
        let directory = self.make_directory().map_err(failed)?;
        let mut removed = false;
        for path in &gone {
            removed |= remove(&directory, path).map_err(failed)?;
        }
        for snapshot in after.tree.iter().filter(|snapshot| !recorded.contains(snapshot)) {
            let manifest = SnapshotManifest {
                catalogue: Some(catalogue),
                revision: Some(after.revision),
                snapshot: snapshot.clone(),
            };
            put(&directory, &format!("{}.json", snapshot.id), &manifest).map_err(failed)?;
        }
        if removed {
            // Manifests of deleted snapshots must be gone before a newer domain.json is visible.
            directory.sync().map_err(failed)?;
        }
        put(&directory, DOMAIN_FILE, &DomainManifest::of(catalogue, after)).map_err(failed)?;
        directory.sync().map_err(failed)
    }

    fn remove(&self, snapshots: &[SnapshotId]) -> Result<()> {
        let attempt = || {
            let Some(directory) = self.open_if_ours()? else { return Ok(()) };
            let mut removed = false;
            for id in snapshots {
                removed |= remove(&directory, &self.file_of(*id))?;
            }
            if removed { directory.sync() } else { Ok(()) }
        };
        attempt()
            .map_err(|cause| failure(cause, format!("manifests in {} cannot be removed", self.directory)))
    }

    fn clear(&self, catalogue: CatalogueId, entry: &Entry) -> Result<()> {
        let found = self.read()?;
        if !found.domain.as_ref().is_some_and(|manifest| manifest.is_known_to(catalogue, entry)) {
            return Ok(());
        }
        let own =
            found.snapshots.iter().filter(|snapshot| found.is_by(snapshot.id, catalogue, entry.revision));
        let files: Vec<Utf8PathBuf> = own.map(|snapshot| self.file_of(snapshot.id)).collect();
        self.remove_all(&files).map_err(|cause| {
            failure(cause, format!("the previous manifests in {} cannot be removed", self.directory))
        })
    }

    fn move_aside(&self, items: &[Item]) -> Result<()> {
        let attempt = || {
            let Some(directory) = self.open_if_ours()? else { return Ok(()) };
            for name in items.iter().map(|item| name_of(*item)) {
                let (from, to) = (file_name(&name)?, file_name(&format!("{name}{ASIDE_SUFFIX}"))?);
                // An entry that is not a regular file is no manifest, and stays.
                if directory.look(&from)?.is_some_and(|found| found.is_file()) {
                    directory.rename(&from, &to, None)?;
                }
            }
            if items.is_empty() { Ok(()) } else { directory.sync() }
        };
        attempt()
            .map_err(|cause| failure(cause, format!("manifests in {} cannot be moved aside", self.directory)))
    }

    fn read(&self) -> Result<Found> {
        let failed =
            |cause: io::Error| failure(cause, format!("the manifests in {} cannot be read", self.directory));
        let mut found = Found::default();
        let directory = match self.open() {
            Ok(Some(directory)) => directory,
            Ok(None) => return Ok(found),
            Err(cause) => match refusal(&cause) {
                // The directory is not ours to read, which is no reason to stop.
                Some(why) => {
                    found.problems.push(Problem { item: None, place: self.directory.to_string(), why });
                    return Ok(found);
                }
                None => return Err(failed(cause)),
            },
        };
        let names = names_in(&directory).map_err(failed)?;
        let mut left = MAX_ALL_BYTES;
        for name in names.iter().filter(|name| is_ours(name) && !name.ends_with(TEMPORARY_SUFFIX)) {
            let item = id_of(name).map_or(Item::Domain, Item::Snapshot);
            let read = read_bounded(&directory, name, MAX_BYTES.min(left));
            left -= read.as_ref().map_or(0, |bytes| bytes.len() as u64);
            let outcome = read.and_then(|bytes| match id_of(name) {
                None => {
                    found.domain = Some(open_domain(&bytes)?);
                    Ok(())
                }
                Some(id) => {
                    let SnapshotManifest { catalogue, revision, snapshot } = open_envelope(&bytes)?;
                    snapshot.check_names()?;
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
                found.problems.push(Problem { item: Some(item), place: self.shown(item), why });
            }
        }
        Ok(found)
    }

    fn have_no_place(&self) -> bool {
        self.directory.file_name().is_none_or(|name| file_name(name).is_err())
            || self.open().is_err_and(|cause| refusal(&cause).is_some())
    }
}

fn failure(cause: io::Error, message: String) -> Error {
    let kind = match cause.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorKind::NoSpace,
        _ if refusal(&cause).is_some() => ErrorKind::Refused,
        _ => ErrorKind::Io,
    };
    Error::new(kind, message).because(cause)
}

fn file_name(name: &str) -> io::Result<FileName> {
    FileName::new(name).map_err(|bad| confined_files::refused(bad.to_string()))
}

/// Returns true where an error says that there is no such file.
fn is_nothing(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidFilename)
}

fn names_in(directory: &Directory) -> io::Result<BTreeSet<String>> {
    let names = directory.names(MAX_FILES)?;
    Ok(names.into_iter().filter_map(|name| name.into_string().ok()).collect())
}

/// Writes one: under a temporary name that is new, flushed, and renamed while it is the file that was
/// written.
fn put<T: Serialize>(directory: &Directory, name: &str, content: &T) -> io::Result<()> {
    let text = ENVELOPE.write(content).map_err(io::Error::other)?;
    let (temporary, name) = (file_name(&format!("{name}{TEMPORARY_SUFFIX}"))?, file_name(name)?);
    directory.remove(&temporary)?;
    let write = || {
        let mut file = directory.create_new(&temporary, 0o600)?;
        file.write_all(&text)?;
        file.sync_all()?;
        let about = file.metadata()?;
        directory.rename(&temporary, &name, Some((about.dev(), about.ino())))
    };
    write().inspect_err(|_| {
        // The failure is reported; a temporary file that stays is removed by the next write.
        let _ = directory.remove(&temporary);
    })
}

fn remove(directory: &Directory, path: &Utf8Path) -> io::Result<bool> {
    match path.file_name() {
        Some(name) => directory.remove(&file_name(name)?),
        None => Ok(false),
    }
}

fn name_of(item: Item) -> String {
    match item {
        Item::Domain => DOMAIN_FILE.to_owned(),
        Item::Snapshot(id) => format!("{id}.json"),
    }
}

fn id_of(name: &str) -> Option<SnapshotId> {
    name.strip_suffix(".json")?.parse().ok().map(SnapshotId)
}

/// Returns true if a file of this name is a manifest, or an unfinished one. Others are left alone.
fn is_ours(name: &str) -> bool {
    let name = name.strip_suffix(TEMPORARY_SUFFIX).unwrap_or(name);
    name == DOMAIN_FILE || id_of(name).is_some()
}

fn read_bounded(directory: &Directory, name: &str, most: u64) -> Result<Vec<u8>, String> {
    let read = || {
        let mut bytes = Vec::new();
        let file = directory.open_file(&file_name(name)?, false, Kind::Regular)?;
        file.take(most + 1).read_to_end(&mut bytes)?;
        io::Result::Ok(bytes)
    };
    let bytes = read().map_err(|cause| format!("it cannot be read: {cause}"))?;
    match u64::try_from(bytes.len()) {
        Ok(length) if length <= most => Ok(bytes),
        _ if most < MAX_BYTES => Err(format!("all manifests here are longer than {MAX_ALL_BYTES} bytes")),
        _ => Err(format!("it is longer than {MAX_BYTES} bytes")),
    }
}

fn open_domain(bytes: &[u8]) -> Result<DomainManifest, String> {
    let manifest: DomainManifest = open_envelope(bytes)?;
    manifest.domain.check_names()?;
    match manifest.revision {
        Revision(0..=MAX_REVISION) => Ok(manifest),
        Revision(more) => Err(format!("its revision is {more}, which no catalogue gives")),
    }
}

fn open_envelope<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    ENVELOPE.read(bytes).map_err(|cause| cause.to_string())
}

#[cfg(test)]
mod tests;
