//! Images that are backed by a disk's layers, found by reading the files beside them.
//!
//! Every file in the disk's directory and in the allowed ones is read, also through symbolic links. Files in
//! their subdirectories are read as far as [`DEEPEST`] and [`MOST_BELOW`]. A file that cannot be read, or
//! whose backing string cannot be understood, is reported as undetermined. Nothing is merged, removed or
//! reverted while there is one. In a subdirectory such a file is skipped, because most files there do not
//! concern this disk.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use camino::{Utf8Path, Utf8PathBuf};
use image_files::is_held_by_others;
use image_files::layer_name::layer_path;
use image_files::names::{FileId, file_id, io_error, is_of_catalogue, is_passing_name};
use rustix::io::Errno;
use snapcore::backend::{Base, DiskState, Layer, Undetermined};
use snapcore::{DiskAddress, DiskRecord, Error, ErrorKind, FileIdentity, LayerName, Result};

use crate::backing_string::{Named, named};
use crate::image;
use crate::layers::Limits;
use image_files::FileIds;

/// Adds the images beside a disk that are backed by its layers ([`Layer::dependents`],
/// [`DiskState::undetermined`]), for backends of other formats: a qcow2 overlay may be backed by any image.
/// Files that are `open` in the domain's own hypervisor do not count as used by others.
///
/// # Errors
/// The system's, if the disk's directory cannot be listed.
pub fn find_dependents(
    record: &DiskRecord,
    state: &mut DiskState,
    open: &HashSet<FileIdentity>,
) -> Result<()> {
    let mut seen = HashMap::new();
    for layer in &state.layers {
        if let Some(id) = file_id(layer.path())? {
            seen.insert(id, layer.name.clone());
        }
    }
    let limits = Limits { max_depth: 1, allowed: Vec::new() };
    find(record, &limits, state, &seen, open)
}

/// Adds the images that are backed by the layers of `state`. `seen` are the files of those layers. Those that
/// are `open` in the domain's own hypervisor do not count as used by others.
pub(crate) fn find(
    record: &DiskRecord,
    limits: &Limits,
    state: &mut DiskState,
    seen: &HashMap<FileId, LayerName>,
    open: &FileIds,
) -> Result<()> {
    let mut search = Search::new(record, &state.layers, seen)?;
    let own = record.disk.path().parent().map(Utf8Path::to_owned);
    let mut listed = HashSet::new();
    for directory in own.into_iter().chain(limits.allowed.iter().cloned()) {
        let Some(id) = file_id(&directory)? else { continue };
        if listed.insert(id) {
            search.directory(directory.as_std_path(), |_| true)?;
            let mut left = MOST_BELOW;
            search.below(directory.as_std_path(), id.0, DEEPEST, &mut left);
        }
    }
    let Search { on, path_dependents, undetermined, names, .. } = search;
    for layer in &mut state.layers {
        layer.dependents =
            on.iter().filter(|(name, _)| *name == layer.name).map(|(_, file)| file.into()).collect();
        let is_ours = file_id(layer.path())?.is_some_and(|id| open.contains(&id));
        // A name in a directory that was not searched: its owner may have images on it.
        if layer.name != record.active && layer.owned {
            let links = fs::symlink_metadata(layer.path()).map_or(0, |about| about.nlink());
            let seen = names.get(&layer.name).copied().unwrap_or(0).max(1);
            if links > seen {
                layer.dependents.push("(a hard link of it in another directory)".into());
            }
        }
        if layer.name != record.active && layer.owned && !is_ours && is_held_by_others(layer.path())? {
            layer.dependents.push("(a running process)".into());
        }
    }
    state.path_dependents = path_dependents.into_iter().map(DiskAddress::from).collect();
    state.undetermined = undetermined;
    Ok(())
}

/// Lists the images in the disk's directory whose backing file is its configured path, by that name. Files
/// that are ours by their names are not opened, so the length of the chain does not matter.
pub(crate) fn on_configured_path(record: &DiskRecord) -> Result<Vec<Utf8PathBuf>> {
    let Some(active) = file_id(record.disk.path())? else { return Ok(Vec::new()) };
    let seen = HashMap::from([(active, record.active.clone())]);
    let mut search = Search::new(record, &[], &seen)?;
    let owned: HashSet<&str> = record.owned.iter().map(LayerName::as_str).collect();
    if let Some(directory) = record.disk.path().parent() {
        search.directory(directory.as_std_path(), |name| !owned.contains(name))?;
    }
    Ok(search.path_dependents)
}

/// Lists the files that back the layers of a disk, with everything below them.
///
/// # Errors
/// [`ErrorKind::NotFound`] if the disk's image does not exist; [`ErrorKind::Refused`] if the object of a
/// backing string is undetermined.
pub(crate) fn bases(record: &DiskRecord) -> Result<Vec<Base>> {
    let path = record.disk.path();
    if file_id(path)?.is_none() {
        return Err(Error::new(ErrorKind::NotFound, format!("the disk image {path} does not exist")));
    }
    let layers = record.owned.iter().map(|layer| layer_path(path, layer));
    let mut next: Vec<Utf8PathBuf> = layers.chain([path.to_owned()]).collect();
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for layer in record.owned.iter().filter(|layer| **layer != record.active) {
        let file = layer_path(path, layer);
        if file_id(&file)?.is_none() {
            found.push(Base::new(path, file));
        }
    }
    while let Some(image) = next.pop() {
        match file_id(&image)? {
            Some(id) if seen.insert(id) => {}
            _ => continue,
        }
        let string = match image::stated_backing(image.as_std_path()) {
            Ok(Some(string)) => string,
            Ok(None) => continue,
            Err(error) => return Err(io_error(error, format!("cannot read {image}"))),
        };
        let directories: Vec<&Path> = image.parent().into_iter().map(Utf8Path::as_std_path).collect();
        // A named file that is missing is reported too: its own backing file is unknown then.
        let mut certain = false;
        let candidates = match named(&directories, &string) {
            Named::Files(candidates) => {
                certain = candidates.len() == 1;
                candidates
            }
            Named::Perhaps(candidates) => candidates,
            Named::NoFile => continue,
            Named::Unknown(why) => return Err(Error::new(ErrorKind::Refused, format!("{image}: {why}"))),
        };
        for candidate in candidates {
            let Ok(file) = Utf8PathBuf::from_path_buf(candidate) else { continue };
            match file_id(&file)? {
                Some(_) => next.push(file.clone()),
                None if certain => {}
                None => continue,
            }
            found.push(Base::new(&image, file));
        }
    }
    Ok(found)
}

/// Depth to which subdirectories of a disk's directory are searched.
const DEEPEST: u32 = 2;

/// Number of names below a directory that are read. Each costs an open and a read.
const MOST_BELOW: usize = 4096;

struct Search<'a> {
    record: &'a DiskRecord,
    layers: &'a [Layer],
    seen: &'a HashMap<FileId, LayerName>,
    /// The directory of the configured path and the name in it, unless that is the active layer's own name.
    configured: Option<(FileId, &'a str)>,
    on: Vec<(LayerName, Utf8PathBuf)>,
    /// Number of names of each layer that were found, without symbolic links.
    names: HashMap<LayerName, u64>,
    path_dependents: Vec<Utf8PathBuf>,
    undetermined: Vec<Undetermined>,
}

impl<'a> Search<'a> {
    fn new(
        record: &'a DiskRecord,
        layers: &'a [Layer],
        seen: &'a HashMap<FileId, LayerName>,
    ) -> Result<Self> {
        let path = record.disk.path();
        let mut configured = None;
        if *path != layer_path(path, &record.active)
            && let (Some(directory), Some(name)) = (path.parent(), path.file_name())
        {
            configured = file_id(directory)?.map(|directory| (directory, name));
        }
        let (on, names, path_dependents, undetermined) = Default::default();
        Ok(Self { record, layers, seen, configured, on, names, path_dependents, undetermined })
    }

    fn directory(&mut self, directory: &Path, wanted: impl Fn(&str) -> bool) -> Result<()> {
        let failed = |error| io_error(error, format!("cannot list {}", directory.display()));
        let mut files = Vec::new();
        for entry in fs::read_dir(directory).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if !is_passing_name(&name) && wanted(&name) {
                files.push(entry.path());
            } else if let Ok(found) = entry.metadata()
                && found.is_file()
                && let Some(layer) = self.seen.get(&(found.dev(), found.ino()))
            {
                // A leftover of an interrupted step, or a known name.
                *self.names.entry(layer.clone()).or_default() += 1;
            }
        }
        files.sort();
        for file in files {
            if let Err(why) = self.file(&file) {
                self.undetermined.push(Undetermined::new(shown(&file), why));
            }
        }
        Ok(())
    }

    /// Reads the files in subdirectories on the same file system, without following links to directories.
    /// Files that cannot be read or understood are skipped.
    fn below(&mut self, directory: &Path, device: u64, deep: u32, left: &mut usize) {
        let Some(deeper) = deep.checked_sub(1) else { return };
        let Ok(entries) = fs::read_dir(directory) else { return };
        let is_directory = |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
        let mut subdirectories: Vec<PathBuf> =
            entries.filter_map(io::Result::ok).filter(is_directory).map(|entry| entry.path()).collect();
        subdirectories.sort();
        for subdirectory in subdirectories {
            if fs::symlink_metadata(&subdirectory).map_or(true, |found| found.dev() != device) {
                continue;
            }
            let Ok(entries) = fs::read_dir(&subdirectory) else { continue };
            for entry in entries.filter_map(io::Result::ok) {
                let Some(fewer) = left.checked_sub(1) else { return };
                *left = fewer;
                // Files that are not images are skipped, and so are undetermined ones.
                if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                    let _ = self.file(&entry.path());
                }
            }
            self.below(&subdirectory, device, deeper, left);
        }
    }

    /// Reads one file. The error is the reason for which its backing file is undetermined.
    fn file(&mut self, file: &Path) -> std::result::Result<(), String> {
        if file.file_name().and_then(|name| name.to_str()).is_some_and(is_of_catalogue) {
            return Ok(());
        }
        let unreadable = |error: io::Error| format!("it cannot be read: {error}");
        let metadata = match fs::metadata(file) {
            Ok(metadata) => metadata,
            Err(error) if is_nothing(&error) => return Ok(()),
            Err(error) => return Err(unreadable(error)),
        };
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            return Ok(());
        }
        if let Some(layer) = self.seen.get(&(metadata.dev(), metadata.ino())) {
            if fs::symlink_metadata(file).is_ok_and(|found| found.is_file()) {
                *self.names.entry(layer.clone()).or_default() += 1;
            }
            if !self.is_known_name(layer, file) {
                self.on.push((layer.clone(), shown(file)));
            }
            return Ok(());
        }
        let string = match image::stated_backing(file) {
            Ok(Some(string)) => string,
            Ok(None) => return Ok(()),
            Err(error) if is_nothing(&error) => return Ok(()),
            Err(error) => return Err(unreadable(error)),
        };
        // A relative name is looked up beside the name by which the image is opened: that of a link, or the
        // file's own.
        let real = fs::canonicalize(file).unwrap_or_else(|_| file.to_owned());
        let directories: Vec<&Path> = match (file.parent(), real.parent()) {
            (Some(one), Some(other)) if one != other => vec![one, other],
            (one, _) => one.into_iter().collect(),
        };
        let (candidates, certain) = match named(&directories, &string) {
            Named::Files(candidates) => (candidates, true),
            Named::Perhaps(candidates) => (candidates, false),
            Named::NoFile => return Ok(()),
            Named::Unknown(why) => return Err(why),
        };
        self.candidates(file, &candidates, certain)
    }

    fn candidates(
        &mut self,
        file: &Path,
        candidates: &[PathBuf],
        certain: bool,
    ) -> std::result::Result<(), String> {
        let mut exists = false;
        for candidate in candidates {
            let metadata = match fs::metadata(candidate) {
                Ok(metadata) => metadata,
                Err(error) if is_nothing(&error) => continue,
                Err(error) => {
                    return Err(format!(
                        "its backing file {} cannot be looked at: {error}",
                        candidate.display()
                    ));
                }
            };
            exists = true;
            let Some(layer) = self.seen.get(&(metadata.dev(), metadata.ino())) else { continue };
            self.on.push((layer.clone(), shown(file)));
            if *layer == self.record.active && self.is_configured_path(candidate) {
                self.path_dependents.push(shown(file));
            }
            return Ok(());
        }
        match (certain || exists, candidates.first()) {
            (false, Some(first)) => Err(format!(
                "its backing file {} is relative to a directory that is not known",
                Path::new(first.file_name().unwrap_or_default()).display()
            )),
            _ => Ok(()),
        }
    }

    /// Returns true if the path leads to the configured path's own entry in its directory, not to another
    /// name of the file.
    fn is_configured_path(&self, candidate: &Path) -> bool {
        let Some((directory, name)) = self.configured else { return false };
        let Ok(real) = fs::canonicalize(candidate) else { return false };
        let same_directory = real
            .parent()
            .and_then(|parent| fs::metadata(parent).ok())
            .is_some_and(|found| (found.dev(), found.ino()) == directory);
        same_directory && real.file_name().is_some_and(|found| found == name)
    }

    /// Returns true for a name that domsnap made. Any other name of a frozen layer is a copy in the eyes of
    /// the user who made it.
    fn is_known_name(&self, layer: &LayerName, file: &Path) -> bool {
        let path = self.record.disk.path();
        self.layers.iter().any(|known| known.name == *layer && known.path() == file)
            || path == file
            || layer_path(path, layer) == file
            || *layer == self.record.active
    }
}

/// Returns true if an error means that there is no file: a broken link, or a file that was removed meanwhile.
fn is_nothing(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::INVAL)
    )
}

/// Converts a path to text. Bytes that are not UTF-8 become a mark.
fn shown(path: &Path) -> Utf8PathBuf {
    Utf8PathBuf::from(path.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use rustix::fs::{FlockOperation, fcntl_lock};
    use snapcore::{Disk, Target};

    use super::*;

    /// A search that meets a catalogue opens none of its files: closing them would release SQLite's locks.
    #[test]
    fn search_leaves_the_locks_of_a_catalogue() {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8PathBuf::from_path_buf(directory.path().join("d.qcow2")).unwrap();
        image::create(path.as_std_path(), &image::NewImage::new(1 << 20)).unwrap();
        let state = directory.path().join("state");
        fs::create_dir(&state).unwrap();
        let index = fs::File::create(state.join("catalogue.db-shm")).unwrap();
        fcntl_lock(&index, FlockOperation::NonBlockingLockExclusive).unwrap();
        let is_locked = || {
            let inode = format!(":{} ", index.metadata().unwrap().ino());
            let pid = format!(" {} ", std::process::id());
            let locks = fs::read_to_string("/proc/locks").unwrap();
            locks.lines().any(|line| line.contains("POSIX") && line.contains(&pid) && line.contains(&inode))
        };
        assert!(is_locked());
        let active = LayerName("d.qcow2".to_owned());
        let disk = Disk::new(Target::new("vda").unwrap(), path, "qcow2");
        let record = DiskRecord::new(disk, active.clone());
        let mut found = DiskState::new(record.disk.target.clone(), active, Vec::new());
        find_dependents(&record, &mut found, &HashSet::new()).unwrap();
        assert!(is_locked());
    }
}
