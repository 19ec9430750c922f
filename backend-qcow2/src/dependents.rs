//! Who else stands on a disk's layers: found by reading what lies beside them.
//!
//! Every file in the disk's directory and in the allowed ones is looked at, symbolic links followed, and files in their
//! subdirectories as far as [`DEEPEST`] and [`MOST_BELOW`]. A file that cannot be read, or whose backing string cannot be understood, is told as unclear, and
//! nothing is merged, removed or reverted while there is one. (In a subdirectory it is passed over: most of what lies there
//! is nothing to this disk.)

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use camino::{Utf8Path, Utf8PathBuf};
use image_files::is_held_by_others;
use image_files::layer_name::layer_path;
use image_files::names::{FileId, file_id, io_error, is_passing_name};
use rustix::io::Errno;
use snapcore::{
    Base, DiskRecord, DiskState, Error, ErrorKind, FileIdentity, Layer, LayerName, Result, Unclear,
};

use crate::backing_string::{Named, named};
use crate::image;
use crate::layers::Limits;
use image_files::FileIds;

/// Fills in which images beside a disk stand on its layers ([`Layer::dependents`], [`DiskState::unclear`]), for backends of
/// other formats: a qcow2 overlay may stand on any image. Files that are `open` in the domain's own hypervisor are in nobody
/// else's use for that.
///
/// # Errors
/// The system's, where the disk's directory cannot be listed.
pub fn find_dependents(
    record: &DiskRecord,
    state: &mut DiskState,
    open: &HashSet<FileIdentity>,
) -> Result<()> {
    let mut seen = HashMap::new();
    for layer in &state.layers {
        if let Some(id) = file_id(&layer.file)? {
            seen.insert(id, layer.name.clone());
        }
    }
    let limits = Limits { max_depth: 1, allowed: Vec::new() };
    find(record, &limits, state, &seen, open)
}

/// Fills in who stands on the layers of `state`. `seen` are the files of those layers; those that are `open` in the domain's own
/// hypervisor are in nobody else's use for that.
pub(crate) fn find(
    record: &DiskRecord,
    limits: &Limits,
    state: &mut DiskState,
    seen: &HashMap<FileId, LayerName>,
    open: &FileIds,
) -> Result<()> {
    let mut search = Search::new(record, &state.layers, seen)?;
    let own = record.disk.path.parent().map(Utf8Path::to_owned);
    let mut listed = HashSet::new();
    for directory in own.into_iter().chain(limits.allowed.iter().cloned()) {
        let Some(id) = file_id(&directory)? else { continue };
        if listed.insert(id) {
            search.directory(directory.as_std_path(), |_| true)?;
            let mut left = MOST_BELOW;
            search.below(directory.as_std_path(), id.0, DEEPEST, &mut left);
        }
    }
    let Search { on, on_path, unclear, names, .. } = search;
    for layer in &mut state.layers {
        layer.dependents =
            on.iter().filter(|(name, _)| *name == layer.name).map(|(_, file)| file.clone()).collect();
        let is_ours = file_id(&layer.file)?.is_some_and(|id| open.contains(&id));
        // A name in a directory that was not looked at: whoever has it may have images on it.
        if layer.name != record.active && layer.owned {
            let links = fs::symlink_metadata(&layer.file).map_or(0, |about| about.nlink());
            let seen = names.get(&layer.name).copied().unwrap_or(0).max(1);
            if links > seen {
                layer.dependents.push(Utf8PathBuf::from(format!(
                    "(another name of {}, a hard link in another directory)",
                    layer.file.file_name().unwrap_or_default()
                )));
            }
        }
        if layer.name != record.active && layer.owned && !is_ours && is_held_by_others(&layer.file)? {
            layer.dependents.push(Utf8PathBuf::from("(a running process)"));
        }
    }
    (state.on_path, state.unclear) = (on_path, unclear);
    Ok(())
}

/// The images in the disk's directory whose backing file is its configured path, by that name. Files that are ours by
/// their names are not opened, so that the length of the chain does not matter.
pub(crate) fn on_configured_path(record: &DiskRecord) -> Result<Vec<Utf8PathBuf>> {
    let Some(active) = file_id(&record.disk.path)? else { return Ok(Vec::new()) };
    let seen = HashMap::from([(active, record.active.clone())]);
    let mut search = Search::new(record, &[], &seen)?;
    let owned: HashSet<&str> = record.owned.iter().map(LayerName::as_str).collect();
    if let Some(directory) = record.disk.path.parent() {
        search.directory(directory.as_std_path(), |name| !owned.contains(name))?;
    }
    Ok(search.on_path)
}

/// The files that the layers of a disk are backed by, with everything below them.
///
/// # Errors
/// [`ErrorKind::NotFound`] where the disk's image is not there; [`ErrorKind::Refused`] where what an image names cannot be told.
pub(crate) fn bases(record: &DiskRecord) -> Result<Vec<Base>> {
    let path = &record.disk.path;
    if file_id(path)?.is_none() {
        return Err(Error::new(ErrorKind::NotFound, format!("the disk image {path} does not exist")));
    }
    let layers = record.owned.iter().map(|layer| layer_path(path, layer));
    let mut next: Vec<Utf8PathBuf> = layers.chain([path.clone()]).collect();
    let (mut found, mut seen) = (Vec::new(), HashSet::new());
    for layer in record.owned.iter().filter(|layer| **layer != record.active) {
        let file = layer_path(path, layer);
        if file_id(&file)?.is_none() {
            found.push(Base { image: path.clone(), file });
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
        // A file that is said to be there and is not is told too: what it is backed by is not known then.
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
            found.push(Base { image: image.clone(), file });
        }
    }
    Ok(found)
}

/// How deep subdirectories of a disk's directory are entered.
const DEEPEST: u32 = 2;

/// How many names below a directory are looked at. One costs an open and a read.
const MOST_BELOW: usize = 4096;

struct Search<'a> {
    record: &'a DiskRecord,
    layers: &'a [Layer],
    seen: &'a HashMap<FileId, LayerName>,
    /// The directory of the configured path and the name in it, where that is not the active layer's own name.
    configured: Option<(FileId, &'a str)>,
    on: Vec<(LayerName, Utf8PathBuf)>,
    /// How many names of each layer were found, links to it left out.
    names: HashMap<LayerName, u64>,
    on_path: Vec<Utf8PathBuf>,
    unclear: Vec<Unclear>,
}

impl<'a> Search<'a> {
    fn new(
        record: &'a DiskRecord,
        layers: &'a [Layer],
        seen: &'a HashMap<FileId, LayerName>,
    ) -> Result<Self> {
        let path = &record.disk.path;
        let mut configured = None;
        if *path != layer_path(path, &record.active)
            && let (Some(directory), Some(name)) = (path.parent(), path.file_name())
        {
            configured = file_id(directory)?.map(|directory| (directory, name));
        }
        let (on, names, on_path, unclear) = Default::default();
        Ok(Self { record, layers, seen, configured, on, names, on_path, unclear })
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
                // What an interrupted step left, or a name that is known.
                *self.names.entry(layer.clone()).or_default() += 1;
            }
        }
        files.sort();
        for file in files {
            if let Err(why) = self.file(&file) {
                self.unclear.push(Unclear { file: shown(&file), why });
            }
        }
        Ok(())
    }

    /// Looks at the files in subdirectories of one file system, which are entered by no link. What cannot be read or told
    /// there is passed over.
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
                // What is no image is passed over, as is one of which nothing can be told.
                if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                    let _ = self.file(&entry.path());
                }
            }
            self.below(&subdirectory, device, deeper, left);
        }
    }

    /// Looks at one file. The error is why it cannot be told what that stands on.
    fn file(&mut self, file: &Path) -> std::result::Result<(), String> {
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
        // A relative name is looked up beside the name by which the image is opened: a link's, or the file's own.
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
                self.on_path.push(shown(file));
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

    /// Whether the path leads to the configured path's own entry in its directory, and not to another name of the file.
    fn is_configured_path(&self, candidate: &Path) -> bool {
        let Some((directory, name)) = self.configured else { return false };
        let Ok(real) = fs::canonicalize(candidate) else { return false };
        let same_directory = real
            .parent()
            .and_then(|parent| fs::metadata(parent).ok())
            .is_some_and(|found| (found.dev(), found.ino()) == directory);
        same_directory && real.file_name().is_some_and(|found| found == name)
    }

    /// A further name that somebody gave a frozen layer is a copy in his eyes.
    fn is_known_name(&self, layer: &LayerName, file: &Path) -> bool {
        let path = &self.record.disk.path;
        self.layers.iter().any(|known| known.name == *layer && known.file == file)
            || path == file
            || layer_path(path, layer) == file
            || *layer == self.record.active
    }
}

/// Nothing is there: a link that leads nowhere, a file that went away.
fn is_nothing(error: &io::Error) -> bool {
    matches!(
        Errno::from_io_error(error),
        Some(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::NAMETOOLONG | Errno::INVAL)
    )
}

/// A path in words; what is not UTF-8 in it becomes a mark.
fn shown(path: &Path) -> Utf8PathBuf {
    Utf8PathBuf::from(path.to_string_lossy().into_owned())
}
