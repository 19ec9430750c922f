//! The layers of a disk that is a chain of files, read from the machine: the active chain, and the other
//! layers that are ours. A [`ChainFormat`] reads the images.

use std::collections::{HashMap, HashSet};
use std::os::unix::fs::MetadataExt;

use crate::layer_name::{disk_name, is_layer_name, layer_name, layer_path};
use crate::names::{FileId, file_id, io_error, require_own, require_own_or_device};
use crate::size_at;
use camino::{Utf8Path, Utf8PathBuf};
use snapcore::backend::{DiskState, Finding, InspectDepth, InternalPoint, Layer, Severity};
use snapcore::hypervisor::OpenLayer;
use snapcore::{ActivePath, Disk, DiskRecord, Error, ErrorKind, LayerName, Result, shell_command};

use crate::{FileIds, look_at_path, refused_link};

/// Assumed number of foreign layers in a chain, for the check if it may be near its limit.
const FOREIGN_LAYERS: usize = 32;

/// The user's limits of a chain.
#[derive(Debug, Clone)]
pub struct Limits {
    /// The deepest chain that is followed and made.
    pub max_depth: u32,
    /// Directories besides the disk's own where backing files may be.
    pub allowed: Vec<Utf8PathBuf>,
}

/// The content of one image, as far as a chain needs it.
#[derive(Debug, Clone)]
pub struct ImageFacts {
    /// Bytes of the disk.
    pub virtual_size: u64,
    /// Internal snapshots, where they were asked for.
    pub internal: Vec<InternalPoint>,
    /// The file of the backing image, and its format.
    pub backing: Option<(Utf8PathBuf, String)>,
}

/// A format whose disks are chains of files.
pub trait ChainFormat {
    /// The format's name.
    fn name(&self) -> &str;

    /// Reads an image of the format; its internal snapshots only if it is `owned`.
    ///
    /// # Errors
    /// Those of the image; [`ErrorKind::Refused`] if it does not say what it is backed by.
    fn read(&self, file: &Utf8Path, limits: &Limits, owned: bool) -> Result<ImageFacts>;

    /// Returns the backing file of an image, if it can be determined.
    fn backing_of(&self, file: &Utf8Path, limits: &Limits) -> Option<Utf8PathBuf>;

    /// Adds the images that are backed by layers of `state`. `seen` are the files of those layers. Those that
    /// are `open` in the domain's own hypervisor do not count as used by others.
    ///
    /// # Errors
    /// The system's.
    fn dependents(
        &self,
        record: &DiskRecord,
        limits: &Limits,
        state: &mut DiskState,
        seen: &HashMap<FileId, LayerName>,
        open: &FileIds,
    ) -> Result<()>;

    /// Returns the bytes of the disk that an image of another format shows at the end of a chain, if that is
    /// not its file's length ([`crate::BaseFormat::size`]).
    ///
    /// # Errors
    /// As there.
    fn base_size(&self, _file: &Utf8Path, _format: &str, _above: &[u64]) -> Result<Option<u64>> {
        Ok(None)
    }

    /// Advice for an image that names a wrong backing file.
    fn mend_backing(&self) -> &'static str;

    /// The command by which an image names `below`, a file of the format `of`, in place of its backing file,
    /// and nothing else is changed.
    fn rename_backing(&self, child: &Utf8Path, below: &Utf8Path, of: &str) -> String;
}

/// Returns the file by which a layer opens: its permanent name, or the configured path if it has none yet.
pub fn file_of(record: &DiskRecord, layer: &LayerName) -> Result<Utf8PathBuf> {
    let file = layer_path(record.disk.path(), layer);
    if file_id(&file)?.is_some() || *layer != record.active {
        return Ok(file);
    }
    Ok(record.disk.path().to_owned())
}

/// Takes a disk that is not in the catalogue into it: checks its path, and reads its layers.
///
/// # Errors
/// As [`inspect`], and if the path cannot be one of an image.
pub fn adopt(
    format: &dyn ChainFormat,
    disk: Disk,
    active_path: ActivePath,
    limits: &Limits,
) -> Result<DiskRecord> {
    check_path(format, &disk)?;
    let active = match active_path {
        ActivePath::Keep => adopted_name(&disk)?,
        ActivePath::New => LayerName(disk.path().file_name().unwrap_or("disk").to_owned()),
    };
    let record = DiskRecord::new(disk, active.clone()).owned(vec![active]);
    inspect(format, &record, InspectDepth::Layers, limits, &FileIds::new())?;
    Ok(record)
}

/// Reads the state of the disk.
pub fn inspect(
    format: &dyn ChainFormat,
    record: &DiskRecord,
    depth: InspectDepth,
    limits: &Limits,
    open: &FileIds,
) -> Result<DiskState> {
    let path = record.disk.path();
    let Some(configured) = file_id(path)? else {
        return Err(missing_path(record));
    };
    let own = layer_path(path, &record.active);
    if let Some(active) = file_id(&own)?
        && active != configured
    {
        return Err(replaced(format, record, &own, active, configured, limits));
    }
    let mut reader = Reader { format, record, limits, layers: Vec::new(), seen: HashMap::new() };
    if depth == InspectDepth::Active && record.owned.len() + FOREIGN_LAYERS <= limits.max_depth as usize {
        let (layer, _) =
            reader.layer(record.active.clone(), &file_of(record, &record.active)?, format.name())?;
        return Ok(DiskState::new(record.disk.target.clone(), record.active.clone(), vec![layer]));
    }
    reader.chain(record.active.clone())?;
    for layer in &record.owned {
        if reader.layers.iter().all(|known| known.name != *layer)
            && file_id(&file_of(record, layer)?)?.is_some()
        {
            reader.chain(layer.clone())?;
        }
    }
    reader.measure_bases()?;
    let Reader { layers, seen, .. } = reader;
    let mut state = DiskState::new(record.disk.target.clone(), record.active.clone(), layers);
    if depth == InspectDepth::Dependents {
        format.dependents(record, limits, &mut state, &seen, open)?;
    }
    Ok(state)
}

/// Returns the layers that the configured path opens now, the active layer first, by permanent names if they
/// have one.
pub fn open_chain(format: &dyn ChainFormat, record: &DiskRecord, limits: &Limits) -> Result<Vec<OpenLayer>> {
    let path = record.disk.path();
    let id = file_id(path)?.ok_or_else(|| missing_path(record))?;
    let own = layer_path(path, &record.active);
    let active = match file_id(&own)? == Some(id) {
        true => record.active.clone(),
        false => own_name_of(&record.disk, id)?
            .unwrap_or_else(|| LayerName(path.file_name().unwrap_or("disk").to_owned())),
    };
    let mut reader = Reader { format, record, limits, layers: Vec::new(), seen: HashMap::new() };
    reader.chain(active)?;
    Ok(reader.layers.into_iter().map(|layer| OpenLayer::new(layer.address, layer.format)).collect())
}

/// Makes the error for a configured path that is not the active layer. If the file is a later layer of the
/// same disk, the catalogue is outdated, and putting the layer back would lose later writes.
fn replaced(
    format: &dyn ChainFormat,
    record: &DiskRecord,
    own: &Utf8Path,
    active: FileId,
    configured: FileId,
    limits: &Limits,
) -> Error {
    let path = record.disk.path();
    let other_layer = own_name_of(&record.disk, configured).unwrap_or_default();
    let later = other_layer.is_some() || stands_above(format, path, active, limits);
    if later {
        let found = other_layer.map_or_else(|| "an image that is backed by that".to_owned(), |name| name.0);
        return Error::new(
            ErrorKind::Corrupt,
            format!(
                "{path} is not what this catalogue left there: it should be {own}, and is {found}, a layer of the same \
                 disk: something else than this catalogue changed the disk"
            ),
        )
        .state("no changes made")
        .advise(
            "if another state directory is in use for this disk, use that; otherwise take the disk in as it is with \
             'domsnap import --replace'. Do not put the previous layer back: what was written since is in this one",
        );
    }
    Error::new(
        ErrorKind::Corrupt,
        format!("{path} is not the file that domsnap left there: it should be {own}, and is another file"),
    )
    .state("no changes made; all snapshots are as they were")
    .advise(format!(
        "if the replacement was not meant, put the layer back: `{}` and `{}`; if it was, import the new file with \
         `{}`",
        shell_command(["mv", path.as_str(), &format!("{path}.found")]),
        shell_command(["ln", own.as_str(), path.as_str()]),
        shell_command(["domsnap", "import", "--replace", path.as_str()])
    ))
}

/// Returns true if the chain of the image at `top` leads to the file `below`, as far as it can be followed.
fn stands_above(format: &dyn ChainFormat, top: &Utf8Path, below: FileId, limits: &Limits) -> bool {
    let mut file = top.to_owned();
    for _ in 0..limits.max_depth {
        let Some(next) = format.backing_of(&file, limits) else { return false };
        match file_id(&next) {
            Ok(Some(id)) if id == below => return true,
            Ok(Some(_)) => file = next,
            Ok(None) | Err(_) => return false,
        }
    }
    false
}

fn missing_path(record: &DiskRecord) -> Error {
    let path = record.disk.path();
    let own = layer_path(path, &record.active);
    let error = Error::new(ErrorKind::NotFound, format!("the disk image {path} does not exist"));
    match file_id(&own) {
        Ok(Some(_)) => error.advise(format!(
            "its content is still there as {own}: `{}` brings it back",
            shell_command(["ln", own.as_str(), path.as_str()])
        )),
        _ => error.advise("check the path, and whether its file system is mounted"),
    }
}

struct Reader<'a> {
    format: &'a dyn ChainFormat,
    record: &'a DiskRecord,
    limits: &'a Limits,
    layers: Vec<Layer>,
    seen: HashMap<FileId, LayerName>,
}

impl Reader<'_> {
    /// Reads `top` and its backing chain, as far as they are not known yet.
    fn chain(&mut self, top: LayerName) -> Result<()> {
        let mut next = Some((top.clone(), self.format.name().to_owned()));
        let mut depth = 0u32;
        let mut this_chain = HashSet::new();
        while let Some((name, format)) = next.take() {
            depth += 1;
            if depth > self.limits.max_depth {
                return Err(Error::new(
                    ErrorKind::Refused,
                    format!(
                        "the chain under {top} is deeper than the limit of {} layers",
                        self.limits.max_depth
                    ),
                )
                .advise("shorten it by deleting snapshots, or flatten it; '--max-depth' raises the limit"));
            }
            let file = file_of(self.record, &name)?;
            let id = file_id(&file)?.ok_or_else(|| self.missing(&file))?;
            if !this_chain.insert(id) {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("the chain under {top} is a loop: {file} comes twice"),
                )
                .advise(self.format.mend_backing()));
            }
            if self.seen.contains_key(&id) {
                return Ok(()); // joins a chain that was already read
            }
            let (layer, backing) = self.layer(name.clone(), &file, &format)?;
            self.seen.insert(id, name);
            self.layers.push(layer);
            next = backing;
        }
        Ok(())
    }

    /// Sets the sizes of the images of other formats: what a chain shows of such an image can depend on the
    /// layers on it.
    fn measure_bases(&mut self) -> Result<()> {
        for number in 0..self.layers.len() {
            let Some(base) = self.layers.get(number).filter(|layer| layer.format != self.format.name())
            else {
                continue;
            };
            let above = sizes_above(&self.layers, &base.name);
            let size = self.format.base_size(base.path(), &base.format, &above)?;
            if let (Some(base), Some(size)) = (self.layers.get_mut(number), size) {
                base.virtual_size = size;
            }
        }
        Ok(())
    }

    fn missing(&self, file: &Utf8Path) -> Error {
        let child = self
            .layers
            .last()
            .map_or_else(|| self.record.disk.path().to_owned(), |layer| layer.path().to_owned());
        Error::new(ErrorKind::NotFound, format!("{file}, the backing file of {child}, does not exist"))
            .state("no changes made")
            .advise("bring that file back, or mount its file system, before anything is done to this disk")
    }

    /// Reads one layer. Returns it, and its backing file with the stated format.
    fn layer(
        &self,
        name: LayerName,
        file: &Utf8Path,
        format: &str,
    ) -> Result<(Layer, Option<(LayerName, String)>)> {
        let owned = self.record.owned.contains(&name);
        match (owned, format) {
            (false, _) => {}
            (true, format) if format == self.format.name() => require_own(file)?,
            // The lowest layer of a disk that was a raw device, under overlays elsewhere.
            (true, _) => require_own_or_device(file)?,
        }
        let metadata =
            std::fs::metadata(file).map_err(|error| io_error(error, format!("cannot look at {file}")))?;
        let named = file_id(&layer_path(self.record.disk.path(), &name))?.is_some();
        let mut layer = Layer::new(name, file, format, metadata.len())
            .named(named)
            .owned(owned)
            .allocated(metadata.blocks() * 512);
        if format != self.format.name() {
            // A layer of another stated format: every program that opens the chain reads it so, and the chain
            // ends here. It may be a device.
            layer.virtual_size =
                size_at(file).map_err(|error| io_error(error, format!("cannot look at {file}")))?;
            return Ok((layer, None));
        }
        let facts = self.format.read(file, self.limits, owned)?;
        layer.virtual_size = facts.virtual_size;
        layer.internal = facts.internal;
        let mut backing = None;
        if let Some((below, format)) = facts.backing {
            self.confine(file, &below, &format)?;
            backing = Some((name_of(self.record.disk.path(), &below), format));
        }
        layer.backing = backing.as_ref().map(|(name, _)| name.clone());
        Ok((layer, backing))
    }

    /// Refuses a backing file outside of the disk's own directory and the directories that the user allows.
    fn confine(&self, child: &Utf8Path, file: &Utf8Path, format: &str) -> Result<()> {
        let plain = std::fs::symlink_metadata(file).is_ok_and(|metadata| !metadata.is_symlink());
        if plain && file.parent() == self.record.disk.path().parent() {
            return Ok(());
        }
        let real = |path: &Utf8Path| path.canonicalize_utf8().unwrap_or_else(|_| path.to_owned());
        let found = real(file);
        let own = self.record.disk.path().parent().map(real);
        let allowed = own
            .into_iter()
            .chain(self.limits.allowed.iter().map(|directory| real(directory)))
            .any(|directory| found.starts_with(directory));
        if allowed || self.record.owned.iter().any(|layer| layer_path(self.record.disk.path(), layer) == file)
        {
            return Ok(());
        }
        let beside = child.parent().zip(file.file_name()).map(|(here, name)| here.join(name));
        let is_moved =
            std::fs::symlink_metadata(file).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound);
        // A name alone proves nothing: whether it is the file that was meant, the user must know.
        if let Some(beside) = beside.filter(|beside| is_moved && beside.exists()) {
            let message =
                format!("{child} names the backing file {file}, which does not exist, and {beside} does");
            return Err(Error::new(ErrorKind::Refused, message).state("no changes made").advise(format!(
                "if the images were moved here together, and {beside} is as it was: `{}`",
                self.format.rename_backing(child, &beside, format)
            )));
        }
        let directory = found.parent().unwrap_or(&found).to_owned();
        Err(Error::new(
            ErrorKind::Refused,
            format!("{child} names the backing file {file}, which is outside the disk's directory"),
        )
        .state("no changes made")
        .advise(format!("if that is meant, allow it: '--allow-backing {directory}'")))
    }
}

/// Returns the sizes of the disks that the layers directly on `base` show, in bytes.
pub fn sizes_above(layers: &[Layer], base: &LayerName) -> Vec<u64> {
    let above = layers.iter().filter(|layer| layer.backing.as_ref() == Some(base));
    above.map(|layer| layer.virtual_size).collect()
}

/// Returns the name of a file as a layer of the disk at `path`: its file name, if it is in the disk's
/// directory.
pub fn name_of(path: &Utf8Path, file: &Utf8Path) -> LayerName {
    match (file.parent(), file.file_name()) {
        (Some(directory), Some(name)) if Some(directory) == path.parent() => LayerName(name.to_owned()),
        _ => LayerName(file.to_string()),
    }
}

/// Returns a layer name for an active image that is not in the catalogue. It is the name that the image had
/// before, if that still exists (a lost catalogue), or a new one.
fn adopted_name(disk: &Disk) -> Result<LayerName> {
    let Some(id) = file_id(disk.path())? else {
        return Err(Error::new(
            ErrorKind::NotFound,
            format!("the disk image {} does not exist", disk.address),
        ));
    };
    if let Some(name) = own_name_of(disk, id)? {
        return Ok(name);
    }
    // Derived from the file's identity, so that it is the same each time until the catalogue records it.
    let stamp = (id.1 ^ (id.1 >> 32) ^ id.0.rotate_left(16)) as u32;
    let name = layer_name(disk.path(), stamp);
    // The configured path moves, but a permanent name never does: they must differ.
    Ok(match Some(name.as_str()) == disk.path().file_name() {
        true => layer_name(disk.path(), stamp.wrapping_add(1)),
        false => name,
    })
}

/// Finds what is wrong around a disk's images, whatever their format: images that name the configured path as
/// their backing file, images whose backing file is undetermined, files that are named like layers and are
/// none, and layers whose files are gone.
///
/// # Errors
/// The system's.
pub fn findings(record: &DiskRecord, state: &DiskState) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let path = record.disk.path();
    let mut find = |severity, subject: &str, message: String| {
        findings.push(Finding::new(severity, subject, message));
    };
    for overlay in &state.path_dependents {
        let message = format!(
            "its backing file is {path} by that name: a revert is refused, and whatever the domain writes changes what it shows"
        );
        find(Severity::Warning, overlay.as_str(), message);
    }
    for undetermined in &state.undetermined {
        let message = format!(
            "it may depend on a layer of {path}, so reverts and deletes are refused: {}",
            undetermined.why
        );
        find(Severity::Warning, undetermined.file.as_str(), message);
    }
    for stray in strays(record, state)? {
        let message = "it has the name of a layer of this disk, and is none that the catalogue knows; 'domsnap import' \
                     looks what it is"
            .to_owned();
        find(Severity::Note, stray.as_str(), message);
    }
    for owned in record.owned.iter().filter(|owned| state.layer(owned).is_none()) {
        let message = "the catalogue knows this layer, and its file is gone; where no snapshot needs it, `domsnap recover` \
                     forgets it"
            .to_owned();
        find(Severity::Warning, layer_path(path, owned).as_str(), message);
    }
    Ok(findings)
}

/// Lists the files in the disk's directory that are named like its layers and are none.
fn strays(record: &DiskRecord, state: &DiskState) -> Result<Vec<Utf8PathBuf>> {
    let path = record.disk.path();
    let directory = path.parent().unwrap_or(Utf8Path::new("."));
    let failed = |error| io_error(error, format!("cannot list {directory}"));
    let mut strays = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed)? {
        let name = entry.map_err(failed)?.file_name();
        let Some(name) = name.to_str().filter(|name| is_layer_name(path, name)) else { continue };
        let layer = LayerName(name.to_owned());
        if state.layer(&layer).is_none() && !record.owned.contains(&layer) {
            strays.push(layer_path(path, &layer));
        }
    }
    strays.sort();
    Ok(strays)
}

/// Returns the permanent name of the layer that is the file `id`, if it has one in the disk's directory.
fn own_name_of(disk: &Disk, id: FileId) -> Result<Option<LayerName>> {
    let directory = disk.path().parent().unwrap_or(Utf8Path::new("."));
    let entries =
        directory.read_dir_utf8().map_err(|error| io_error(error, format!("cannot list {directory}")))?;
    for entry in entries.flatten() {
        let is_layer = entry.path() != disk.path() && is_layer_name(disk.path(), entry.file_name());
        if is_layer && entry.metadata().is_ok_and(|found| (found.dev(), found.ino()) == id) {
            return Ok(Some(LayerName(entry.file_name().to_owned())));
        }
    }
    Ok(None)
}

/// Refuses a configured path for which promise 1 cannot be kept.
fn check_path(format: &dyn ChainFormat, disk: &Disk) -> Result<()> {
    let path = disk.path();
    let metadata = look_at_path(path)?;
    if metadata.is_symlink() {
        return Err(refused_link(
            path,
            ": the relative names of backing files would be looked up beside the link",
        ));
    }
    let configured = path.with_file_name(disk_name(path));
    if configured != *path && file_id(&configured)? == file_id(path)? {
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{path} is the permanent name of a layer: the disk that it is of has the path {configured}"
            ),
        )
        .advise(format!("use {configured}, as the domain's own configuration should")));
    }
    if !metadata.is_file() {
        return Err(Error::new(ErrorKind::Unsupported, format!("{path} is not a regular file")).advise(
            format!(
                "{} on a block device has no room for a chain beside it; put the image into a file",
                format.name()
            ),
        ));
    }
    Ok(())
}
