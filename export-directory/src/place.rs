//! A directory of exports that is worked on, under its lock.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;

use backend_qcow2::image::{self, OpenOptions};
use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Directory, DirectoryLock, FileName, Kind};
use image_files::names::io_error;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use snapcore::backend::PointImage;
use snapcore::{DomainName, Error, ErrorKind, Result, Snapshot, SnapshotId, shown_size};

use crate::copy::{DiskSource, Done, Layout, Sources, Watch, copy_file, copy_state};
use crate::manifest::{
    Export, ExportId, ExportedDisk, ExportedFile, ExportedSnapshot, ExportedState, MAX_BYTES, Manifest,
    backing_string, envelope, image_name, memory_name, open_envelope, state_name,
};

const MANIFEST: &str = "manifest.json";
const MANIFEST_PART: &str = ".domsnap-manifest.part";
const PENDING: &str = ".domsnap-pending.json";
const PENDING_PART: &str = ".domsnap-pending.part";

/// The beginning and the end of the names that files have while they are written.
const PART: (&str, &str) = (".domsnap-", ".part");

/// The most names that are read of a directory.
const MAX_NAMES: usize = 1_000_000;

/// Bytes that must stay free beside an export: for the manifests, and for the file system's own use.
const RESERVE: u64 = 4 << 20;

/// A file that is complete, and is getting its name.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Named {
    part: String,
    file: String,
    /// Device and inode.
    identity: (u64, u64),
}

/// Exports that are complete and are being published.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Pending {
    /// The manifest when that is done.
    manifest: Manifest,
    /// The files that get a name.
    files: Vec<Named>,
}

/// A directory of exports.
pub struct ExportPlace {
    path: Utf8PathBuf,
    directory: Directory,
    manifest: Manifest,
    /// The directory was made for this export.
    is_new: bool,
    _lock: DirectoryLock,
}

impl std::fmt::Debug for ExportPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ExportPlace").field("path", &self.path).finish_non_exhaustive()
    }
}

impl Drop for ExportPlace {
    fn drop(&mut self) {
        if self.is_new && self.manifest.exports.is_empty() {
            // It fails if anything is in it.
            let _ = std::fs::remove_dir(self.path.as_std_path());
        }
    }
}

/// An export that fits the directory.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Planned {
    /// The export that the new one is an increment to.
    pub parent: Option<Export>,
}

/// A new export.
#[derive(Clone, Copy)]
pub struct NewExport<'a> {
    /// Its identity.
    pub id: ExportId,
    /// The domain.
    pub domain: &'a DomainName,
    /// The snapshot.
    pub snapshot: &'a Snapshot,
    /// Its place among the others.
    pub planned: &'a Planned,
    /// What is copied.
    pub sources: &'a Sources,
}

impl Planned {
    /// The file that will back a disk's image.
    fn backing(&self, source: &DiskSource) -> Option<&ExportedDisk> {
        source.changed.as_ref()?;
        self.parent.as_ref()?.disk(&source.target)
    }
}

fn name(text: &str) -> Result<FileName> {
    FileName::new(text).map_err(|cause| {
        Error::new(ErrorKind::Usage, format!("{text:?} cannot be the name of a file"))
            .because(cause)
            .state("no changes made")
            .advise("give the snapshot a shorter name with `domsnap rename`")
    })
}

impl ExportPlace {
    /// Opens a directory of exports, and locks it. It is made, open to its owner alone, if it does not exist.
    /// What an interrupted export left is completed, or removed.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another process works on it; [`ErrorKind::Corrupt`] for a manifest that is not
    /// whole; the system's.
    pub fn create(path: &Utf8Path) -> Result<Self> {
        let is_new = !path.as_std_path().exists();
        let directory = Directory::make_all(path.as_std_path(), 0o700)
            .map_err(|error| io_error(error, format!("cannot open the directory {path}")))?;
        let mut place = Self::of(path, directory, is_new)?;
        place.complete()?;
        Ok(place)
    }

    /// Opens a directory of exports that exists, and locks it. Nothing is changed.
    ///
    /// # Errors
    /// As [`ExportPlace::create`]; [`ErrorKind::NotFound`].
    pub fn open(path: &Utf8Path) -> Result<Self> {
        let directory = Directory::open(path.as_std_path())
            .map_err(|error| io_error(error, format!("cannot open the directory {path}")))?;
        Self::of(path, directory, false)
    }

    fn of(path: &Utf8Path, directory: Directory, is_new: bool) -> Result<Self> {
        let locked = directory.try_lock().map_err(|error| {
            io_error(error, format!("cannot lock the directory {path}"))
                .advise("use a directory on a file system of this machine, and copy it from there")
        })?;
        let Some(lock) = locked else {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("another process works on the exports in {path}"),
            )
            .state("no changes made")
            .advise("wait until it has ended"));
        };
        let path = path.to_owned();
        let mut place = Self { path, directory, manifest: Manifest::default(), is_new, _lock: lock };
        if let Some(bytes) = place.read(MANIFEST)? {
            place.manifest =
                Manifest::parse(&bytes).map_err(|why| place.broken(&place.path.join(MANIFEST), &why))?;
        }
        Ok(place)
    }

    fn broken(&self, file: &Utf8Path, why: &str) -> Error {
        Error::new(ErrorKind::Corrupt, format!("{file}: {why}"))
            .state("no changes made")
            .advise("restore the directory from its backup, or export into an empty one")
    }

    /// The exports in it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The directory.
    pub fn path(&self) -> &Utf8Path {
        &self.path
    }

    pub(crate) fn directory(&self) -> &Directory {
        &self.directory
    }

    /// Reads a manifest; `None` if there is none.
    fn read(&self, file: &str) -> Result<Option<Vec<u8>>> {
        let shown = self.path.join(file);
        let failed = |error| io_error(error, format!("cannot read {shown}"));
        let opened = match self.directory.open_file(&name(file)?, false, Kind::Regular) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(failed)?,
        };
        let mut bytes = Vec::new();
        opened.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
        match u64::try_from(bytes.len()) {
            Ok(length) if length <= MAX_BYTES => Ok(Some(bytes)),
            _ => Err(self.broken(&shown, &format!("it is longer than {MAX_BYTES} bytes"))),
        }
    }

    /// Completes the exports that were being published, and removes files that were being written.
    fn complete(&mut self) -> Result<()> {
        if let Some(bytes) = self.read(PENDING)? {
            let shown = self.path.join(PENDING);
            let pending: Pending = open_envelope(&bytes).map_err(|why| self.broken(&shown, &why))?;
            // Its manifest is checked like any other one.
            let text = pending.manifest.text().map_err(|why| self.broken(&shown, &why))?;
            let known: Vec<&str> = pending.manifest.files().map(|file| file.file.as_str()).collect();
            let is_part = |part: &str| part.starts_with(PART.0) && part.ends_with(PART.1);
            if pending.files.iter().any(|file| !known.contains(&file.file.as_str()) || !is_part(&file.part)) {
                return Err(self.broken(&shown, "it names a file that is none of an export"));
            }
            self.publish(&pending, &text)?;
        }
        let failed = |error| io_error(error, format!("cannot remove what an export left in {}", self.path));
        for found in self.directory.names(MAX_NAMES).map_err(failed)? {
            let Some(text) = found.to_str() else { continue };
            if text.starts_with(PART.0) && text.ends_with(PART.1) {
                self.directory.remove(&name(text)?).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Step 3 and 4 of the crate's order. It is repeated after a crash.
    fn publish(&mut self, pending: &Pending, text: &[u8]) -> Result<()> {
        for file in &pending.files {
            let failed = |error| io_error(error, format!("cannot name {}", self.path.join(&file.file)));
            let (part, last) = (name(&file.part)?, name(&file.file)?);
            match self.directory.look(&last).map_err(failed)? {
                Some(found) if found.is_file() && found.identity == file.identity => continue,
                Some(_) => return Err(self.is_taken(&file.file)),
                None => self.directory.rename_new(&part, &last, Some(file.identity)).map_err(failed)?,
            }
        }
        let failed = |error| io_error(error, format!("cannot write {}", self.path.join(MANIFEST)));
        // The names are durable before the manifest says so.
        self.directory.sync().map_err(failed)?;
        self.put(MANIFEST_PART, MANIFEST, text)?;
        self.manifest = pending.manifest.clone();
        self.directory.remove(&name(PENDING)?).map_err(failed)?;
        self.directory.sync().map_err(failed)
    }

    /// Writes a small file under a name that it gets when it is durable.
    fn put(&self, part: &str, file: &str, text: &[u8]) -> Result<()> {
        let write = || {
            let named = |text| {
                FileName::new(text).map_err(|cause| io::Error::new(io::ErrorKind::InvalidInput, cause))
            };
            let (part, file) = (named(part)?, named(file)?);
            self.directory.remove(&part)?;
            let mut made = self.directory.create_new(&part, 0o600)?;
            made.write_all(text)?;
            made.sync_all()?;
            let about = made.metadata()?;
            self.directory.rename(&part, &file, Some((about.dev(), about.ino())))?;
            self.directory.sync()
        };
        write().map_err(|error| {
            // The failure is reported; what stays is removed by the next work on the directory.
            let _ = name(part).map(|part| self.directory.remove(&part));
            io_error(error, format!("cannot write {}", self.path.join(file)))
        })
    }

    fn is_taken(&self, file: &str) -> Error {
        Error::new(ErrorKind::Exists, format!("{} is there, and is of no export", self.path.join(file)))
            .state("no export was made")
            .advise("move it away, or export into another directory")
    }

    /// Checks that an export of `snapshot` can be added: in full, or as an increment to that of `since`.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if it is there already; [`ErrorKind::NotFound`] for a `since` that is not there,
    /// with the exports that are.
    pub fn plan(
        &self,
        domain: &DomainName,
        snapshot: &Snapshot,
        since: Option<&Snapshot>,
        others: &[Snapshot],
    ) -> Result<Planned> {
        if let Some(found) = self.manifest.of_snapshot(snapshot.id) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!(
                    "{} has an export of snapshot {} already, of {}",
                    self.path, snapshot.name, found.exported
                ),
            )
            .state("no changes made")
            .advise("export another snapshot, or into another directory"));
        }
        if let Some(found) = self.manifest.exports.iter().find(|export| export.snapshot.name == snapshot.name)
        {
            return Err(Error::new(
                ErrorKind::Exists,
                format!(
                    "{} has an export of another snapshot that was called {}, of domain {}",
                    self.path, snapshot.name, found.domain
                ),
            )
            .state("no changes made")
            .advise("rename this snapshot with `domsnap rename`, or export into another directory"));
        }
        let parent = match since {
            None => None,
            Some(since) => match self.manifest.of_snapshot(since.id) {
                Some(found) => Some(found.clone()),
                None => return Err(self.not_exported(domain, since, others)),
            },
        };
        for member in &snapshot.disks {
            name(&image_name(&member.target, &snapshot.name))?;
        }
        name(&memory_name(&snapshot.name))?;
        Ok(Planned { parent })
    }

    fn not_exported(&self, domain: &DomainName, since: &Snapshot, others: &[Snapshot]) -> Error {
        let error = Error::new(
            ErrorKind::NotFound,
            format!("{} has no export of snapshot {} of domain {domain}", self.path, since.name),
        )
        .state("no changes made");
        let exported = |id: SnapshotId| self.manifest.of_snapshot(id).is_some();
        // The nearest one before it, else the newest.
        let earlier = others.iter().filter(|other| exported(other.id) && other.created <= since.created);
        let found = earlier.max_by_key(|other| other.created);
        let found =
            found.or_else(|| others.iter().filter(|other| exported(other.id)).max_by_key(|o| o.created));
        match found {
            Some(found) => error.advise(format!("the nearest one that is there: --since {}", found.name)),
            None => {
                error.advise("export in full, without --since; the next export can be an increment to that")
            }
        }
    }

    /// Bytes of the files of an export, and bytes that are free. Nothing is written.
    ///
    /// # Errors
    /// Those of the disks; the system's.
    pub fn measure(&self, planned: &Planned, sources: &Sources) -> Result<(u64, u64)> {
        let mut bytes = sources.state_bytes();
        if let Some(memory) = &sources.memory {
            bytes += opened_memory(&memory.path)?.1;
        }
        for source in &sources.disks {
            bytes += self.layout(planned, source)?.file_bytes();
        }
        let free = self.directory.free_bytes();
        Ok((bytes, free.map_err(|error| io_error(error, format!("cannot look at {}", self.path)))?))
    }

    fn layout(&self, planned: &Planned, source: &DiskSource) -> Result<Layout> {
        let backing = planned.backing(source);
        Layout::of(source, backing.map(|disk| backing_string(&disk.image.file)))
    }

    /// Refuses an increment to files that are not those of the export.
    fn require_whole(&self, parent: &Export) -> Result<()> {
        for export in self.manifest.chain(parent) {
            for disk in &export.disks {
                let (file, shown) = (&disk.image, self.path.join(&disk.image.file));
                let damaged = |why: &str| {
                    Error::new(ErrorKind::Corrupt, format!("{shown}, which the increment needs, {why}"))
                        .state("no changes made")
                        .advise("export in full, without --since, into another directory")
                };
                let found = self.directory.look(&name(&file.file)?);
                match found.map_err(|error| io_error(error, format!("cannot look at {shown}")))? {
                    None => return Err(damaged("does not exist")),
                    Some(found) if !found.is_file() || found.size != file.bytes => {
                        return Err(damaged(&format!(
                            "is not the file of {} bytes that was exported",
                            file.bytes
                        )));
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    /// Refuses an export for which there is no room.
    ///
    /// # Errors
    /// [`ErrorKind::NoSpace`].
    pub fn require_room(&self, bytes: u64, free: u64) -> Result<()> {
        if bytes.saturating_add(RESERVE) <= free {
            return Ok(());
        }
        Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "the export needs {}, and {} has {} free",
                shown_size(bytes),
                self.path,
                shown_size(free)
            ),
        )
        .state("no changes made")
        .advise("make room, or export into another directory"))
    }

    /// Adds an export. After an error the directory is as it was, unless the error says otherwise.
    ///
    /// # Errors
    /// Those of the disks: also if another program has deleted the snapshot meanwhile.
    /// [`ErrorKind::NoSpace`], [`ErrorKind::Cancelled`]; the system's.
    pub fn add(&mut self, new: &NewExport<'_>, watch: Watch<'_>) -> Result<Export> {
        if let Some(parent) = &new.planned.parent {
            self.require_whole(parent)?;
        }
        let mut parts = Vec::new();
        let made = self.write(new, watch, &mut parts);
        match made {
            Ok(export) => Ok(export),
            Err(error) => {
                let pending =
                    name(PENDING).ok().and_then(|pending| self.directory.look(&pending).ok().flatten());
                if pending.is_some() {
                    return Err(error
                        .state("the files of the export are complete, and not all have their names")
                        .advise(
                            "make room if there is none; the next export into the directory completes it",
                        ));
                }
                let was_begun = !parts.is_empty();
                for part in parts {
                    // The next work on the directory removes what stays.
                    let _ = name(&part).map(|part| self.directory.remove(&part));
                }
                match (was_begun, error.kind()) {
                    (false, _) => Err(error),
                    (true, ErrorKind::Cancelled | ErrorKind::NoSpace | ErrorKind::Corrupt) => {
                        Err(error.state("no export was made; what was written of it is removed"))
                    }
                    // It is no refusal any more.
                    (true, _) => Err(error
                        .with_kind(ErrorKind::Io)
                        .state("no export was made; what was written of it is removed")),
                }
            }
        }
    }

    fn write(&mut self, new: &NewExport<'_>, watch: Watch<'_>, parts: &mut Vec<String>) -> Result<Export> {
        let NewExport { id, domain, snapshot, planned, sources } = *new;
        let Sources { disks: disk_sources, machine_state: states, memory } = sources;
        let mut layouts = Vec::new();
        for source in disk_sources {
            layouts.push(self.layout(planned, source)?);
        }
        let mut opened = memory.as_ref().map(|memory| opened_memory(&memory.path)).transpose()?;
        let bytes = layouts.iter().map(Layout::file_bytes).sum::<u64>() + sources.state_bytes();
        let total = bytes + opened.as_ref().map_or(0, |(_, length)| *length);
        let free = self.directory.free_bytes();
        let free = free.map_err(|error| io_error(error, format!("cannot look at {}", self.path)))?;
        self.require_room(total, free)?;
        let images = disk_sources.iter().map(|source| image_name(&source.target, &snapshot.name));
        let copies = states.iter().map(|state| state_name(&state.target, &snapshot.name, &state.format));
        for file in images.chain(copies) {
            self.require_free_name(&file)?;
        }
        let mut done = Done { watch, done: 0, total };
        let (mut files, mut disks) = (Vec::new(), Vec::new());
        for (source, layout) in disk_sources.iter().zip(&layouts) {
            let (part, file) = self.begin(parts)?;
            let last = image_name(&source.target, &snapshot.name);
            let sha256 = layout.write(source, &file, self.path.join(&part).as_str(), &mut done)?;
            files.push(named(&part, &last, &file)?);
            disks.push(ExportedDisk {
                target: source.target.clone(),
                virtual_size: layout.virtual_size,
                image: ExportedFile::new(last, layout.file_bytes(), sha256),
                backing: planned.backing(source).map(|disk| disk.image.file.clone()),
            });
        }
        let mut machine_state = Vec::new();
        for state in states {
            let (part, file) = self.begin(parts)?;
            let last = state_name(&state.target, &snapshot.name, &state.format);
            let (bytes, sum) = copy_state(state, &file, self.path.join(&part).as_str(), &mut done)?;
            files.push(named(&part, &last, &file)?);
            machine_state.push(ExportedState {
                target: state.target.clone(),
                format: state.format.clone(),
                used_as: state.file_name.clone(),
                copy: ExportedFile::new(last, bytes, sum),
            });
        }
        let mut exported_memory = None;
        if let (Some(memory), Some((from, _))) = (memory, &mut opened) {
            let last = memory_name(&snapshot.name);
            self.require_free_name(&last)?;
            let (part, file) = self.begin(parts)?;
            let shown = self.path.join(&part);
            let (bytes, sum) = copy_file(from, memory.path.as_str(), &file, shown.as_str(), &mut done)?;
            files.push(named(&part, &last, &file)?);
            exported_memory = Some(ExportedFile::new(last, bytes, sum));
        }
        // What was read is of this snapshot only if that is still there.
        let images = disk_sources.iter().map(|source| &source.image);
        for image in images.chain(states.iter().map(|state| &state.image)) {
            image.require_still()?;
        }
        let export = Export {
            id,
            domain: domain.clone(),
            snapshot: ExportedSnapshot::of(snapshot),
            parent: planned.parent.as_ref().map(|parent| parent.id),
            exported: Timestamp::now(),
            disks,
            machine_state,
            memory: exported_memory,
        };
        let mut manifest = self.manifest.clone();
        manifest.exports.push(export.clone());
        let defect =
            |why: String| Error::new(ErrorKind::Internal, format!("the manifest cannot be written: {why}"));
        let text = manifest.text().map_err(defect)?;
        let pending = Pending { manifest, files };
        watch.require_wanted()?;
        // The names of the parts are durable before anything refers to them.
        self.directory.sync().map_err(|error| io_error(error, format!("cannot write into {}", self.path)))?;
        self.put(PENDING_PART, PENDING, &envelope(&pending).map_err(defect)?)?;
        self.publish(&pending, &text)?;
        Ok(export)
    }

    fn require_free_name(&self, file: &str) -> Result<()> {
        let found = self.directory.look(&name(file)?);
        match found.map_err(|error| io_error(error, format!("cannot look at {}", self.path.join(file))))? {
            None => Ok(()),
            Some(_) => Err(self.is_taken(file)),
        }
    }

    /// Makes the next file that is going to be written.
    fn begin(&self, parts: &mut Vec<String>) -> Result<(String, File)> {
        let part = format!("{}{}{}", PART.0, parts.len(), PART.1);
        let made = self.directory.create_new(&name(&part)?, 0o600);
        let file = made.map_err(|error| io_error(error, format!("cannot make {}", self.path.join(&part))))?;
        parts.push(part.clone());
        Ok((part, file))
    }
}

fn named(part: &str, file: &str, made: &File) -> Result<Named> {
    let about = made.metadata().map_err(|error| io_error(error, format!("cannot look at {part}")))?;
    Ok(Named { part: part.to_owned(), file: file.to_owned(), identity: (about.dev(), about.ino()) })
}

fn opened_memory(path: &Utf8Path) -> Result<(File, u64)> {
    let failed = |error| io_error(error, format!("cannot open the memory image {path}"));
    let file = confined_files::open_regular(path.as_std_path(), false).map_err(failed)?;
    let length = file.metadata().map_err(failed)?.len();
    Ok((file, length))
}

/// Bytes of the image of a disk that is exported in full.
///
/// # Errors
/// Those of the disk.
pub fn image_bytes(source: &DiskSource) -> Result<u64> {
    let full = DiskSource { changed: None, ..source.clone() };
    Ok(Layout::of(&full, None)?.file_bytes())
}

/// Writes a disk's data to `out`, all of it, zeros too.
///
/// # Errors
/// Those of the disk, also if another program has deleted the snapshot meanwhile; those of `out`.
pub fn write_raw(image: &dyn PointImage, out: &mut dyn Write, watch: Watch<'_>) -> Result<u64> {
    let failed = |error| io_error(error, "cannot write the disk to standard output".to_owned());
    let (size, mut at) = (image.size(), 0);
    let mut done = Done { watch, done: 0, total: size };
    let mut chunk = vec![0; 1 << 20];
    while at < size {
        let length = (size - at).min(chunk.len() as u64) as usize;
        let Some(part) = chunk.get_mut(..length) else { break };
        image.read_at(part, at)?;
        out.write_all(part).map_err(failed)?;
        done.add(length as u64)?;
        at += length as u64;
    }
    out.flush().map_err(failed)?;
    image.require_still()?;
    Ok(size)
}

/// Opens an image of an export for reading, and checks that it is the one that the manifest describes.
pub(crate) fn require_image(file: &Utf8Path, disk: &ExportedDisk) -> Result<()> {
    let opened = image::Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?;
    let header = opened.header();
    let backing = header.backing.as_ref().map(|backing| backing.file.clone());
    let format = header.backing.as_ref().and_then(|backing| backing.format.clone());
    let wanted = disk.backing.as_ref().map(|file| backing_string(file));
    let is_plain = header.encryption == image::Encryption::None && !header.has_data_file();
    if backing != wanted || wanted.is_some() && format.as_deref() != Some("qcow2") || !is_plain {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{file} names the backing file {:?}, and the manifest of the exports says {:?}",
                backing.unwrap_or_default(),
                wanted.unwrap_or_default()
            ),
        ));
    }
    if opened.virtual_size() != disk.virtual_size || !opened.snapshots()?.is_empty() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{file} has a disk of another size than the manifest of the exports says, or internal snapshots"
            ),
        ));
    }
    Ok(())
}
