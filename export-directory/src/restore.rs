//! Taking exports apart again: into images of a domain, elsewhere.

use std::collections::HashMap;
use std::fs::File;

use backend_qcow2::image::{self, Backing, NewImage, OpenOptions};
use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Directory, FileName, Kind};
use image_files::layer_name::layer_name;
use image_files::names::io_error;
use snapcore::hypervisor::TPM_STATE;
use snapcore::{Error, ErrorKind, LayerName, Result, SnapshotId, Target, shown_size};

use crate::copy::{Done, Watch, copy_file, sum_of};
use crate::manifest::{Export, ExportedDisk, ExportedFile, ExportedState};
use crate::place::{ExportPlace, require_image};

/// The beginning of the name that the new directory has while it is filled.
const UNFINISHED: &str = ".domsnap-import-";

/// A disk of the restored domain, or state of its machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct RestoredDisk {
    /// The disk.
    pub target: Target,
    /// Its format: of state of the machine, that of the export.
    pub format: String,
    /// The image that the domain will write, or the state that the machine will use.
    pub path: Utf8PathBuf,
    /// For each snapshot, the frozen layer that has it, and the bytes of its disk.
    pub points: HashMap<SnapshotId, (LayerName, u64)>,
}

/// A restored domain.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Restored {
    /// The disks.
    pub disks: Vec<RestoredDisk>,
    /// State of the machine.
    pub machine_state: Vec<RestoredDisk>,
    /// The export that the current state derives from.
    pub current: SnapshotId,
    /// Memory images, by snapshot.
    pub memory: HashMap<SnapshotId, Utf8PathBuf>,
}

/// Reads all files of all exports, and compares them with the manifest.
///
/// # Errors
/// [`ErrorKind::Corrupt`] for the first file that differs; the system's.
pub fn verify(place: &ExportPlace, watch: Watch<'_>) -> Result<u64> {
    let total = place.manifest().files().map(|file| file.bytes).sum();
    let mut done = Done { watch, done: 0, total };
    for export in &place.manifest().exports {
        for file in export.files() {
            let mut opened = open(place, file)?;
            let found = sum_of(&mut opened, place.path().join(&file.file).as_str(), &mut done)?;
            require_same(place, file, &found)?;
        }
        for disk in &export.disks {
            require_image(&place.path().join(&disk.image.file), disk)?;
        }
    }
    Ok(total)
}

/// Opens a file of an export, without following a link.
fn open(place: &ExportPlace, file: &ExportedFile) -> Result<File> {
    let shown = place.path().join(&file.file);
    let name = FileName::new(&file.file).map_err(|cause| {
        Error::new(ErrorKind::Refused, format!("{shown} is no name of a file")).because(cause)
    })?;
    let opened = place
        .directory()
        .open_file(&name, false, Kind::Regular)
        .map_err(|error| io_error(error, format!("cannot open {shown}")).state("no changes made"))?;
    let length = opened.metadata().map_err(|error| io_error(error, format!("cannot look at {shown}")))?.len();
    match length == file.bytes {
        true => Ok(opened),
        false => {
            Err(damaged(place, file, &format!("has {length} bytes, and was exported with {}", file.bytes)))
        }
    }
}

fn require_same(place: &ExportPlace, file: &ExportedFile, (length, sum): &(u64, String)) -> Result<()> {
    if *length == file.bytes && sum.eq_ignore_ascii_case(&file.sha256) {
        return Ok(());
    }
    Err(damaged(place, file, &format!("has the SHA-256 {sum}, and was exported with {}", file.sha256)))
}

fn damaged(place: &ExportPlace, file: &ExportedFile, why: &str) -> Error {
    Error::new(ErrorKind::Corrupt, format!("{} {why}", place.path().join(&file.file)))
        .state("no changes made")
        .advise("restore the file from a backup of the directory; exports that do not need it are whole")
}

/// Copies all exports into a new directory as the disks of a domain at rest: a frozen layer for each export,
/// and an image on the newest one that the domain will write. The directory gets its name when all is
/// verified and durable, so a crash leaves a hidden directory at most.
///
/// # Errors
/// [`ErrorKind::Exists`] for a directory that is there; [`ErrorKind::Corrupt`], [`ErrorKind::NoSpace`],
/// [`ErrorKind::Cancelled`]; the system's. The directory then does not exist.
///
/// `describe` gets what was restored, with its final paths, and the image of the first disk where it is now.
/// It writes what belongs beside the images before the directory gets its name.
pub fn restore(
    place: &ExportPlace,
    to: &Utf8Path,
    watch: Watch<'_>,
    describe: impl FnOnce(&Restored, &Utf8Path) -> Result<()>,
) -> Result<Restored> {
    let manifest = place.manifest();
    let Some(newest) =
        manifest.exports.iter().max_by_key(|export| (export.snapshot.created, export.snapshot.id))
    else {
        return Err(Error::new(ErrorKind::NotFound, format!("{} has no exports", place.path()))
            .state("no changes made")
            .advise("give a directory that `domsnap export` has made"));
    };
    let shown = |error| io_error(error, format!("cannot make the directory {to}"));
    let (above, name) = Directory::of(to.as_std_path()).map_err(shown)?;
    if above.look(&name).map_err(shown)?.is_some() {
        return Err(Error::new(ErrorKind::Exists, format!("{to} exists"))
            .state("no changes made")
            .advise("name a directory that does not exist: it is made"));
    }
    let total: u64 = manifest.files().map(|file| file.bytes).sum();
    let free = above.free_bytes().map_err(shown)?;
    if total > free {
        return Err(Error::new(
            ErrorKind::NoSpace,
            format!("the exports have {}, and {} are free at {to}", shown_size(total), shown_size(free)),
        )
        .state("no changes made")
        .advise("make room, or import into another directory"));
    }
    let unfinished = format!("{UNFINISHED}{}", newest.id);
    let hidden = FileName::new(&unfinished)
        .map_err(|cause| Error::new(ErrorKind::Internal, "the directory has no name").because(cause))?;
    let path = to.with_file_name(&unfinished);
    // An interrupted import of the same exports left it. Nothing refers to it.
    clear(&above, &hidden).map_err(shown)?;
    if !above.make_subdirectory(&hidden, 0o700).map_err(shown)? {
        return Err(Error::new(ErrorKind::Busy, format!("{path} exists")).advise("remove it"));
    }
    let publish = || {
        let mut restored = fill(place, &above, &hidden, &path, newest, watch)?;
        let first = restored.disks.first().map(|disk| disk.path.clone()).unwrap_or_default();
        for disk in restored.disks.iter_mut().chain(&mut restored.machine_state) {
            disk.path = to.join(disk.path.file_name().unwrap_or_default());
        }
        for memory in restored.memory.values_mut() {
            *memory = to.join(memory.file_name().unwrap_or_default());
        }
        describe(&restored, &first)?;
        above.rename_subdirectory(&hidden, &name).and_then(|()| above.sync()).map_err(shown)?;
        Ok(restored)
    };
    publish().inspect_err(|_| {
        // The failure is reported; what stays has a hidden name, and the next import removes it.
        let _ = clear(&above, &hidden);
    })
}

/// Removes a hidden directory and the files in it.
fn clear(above: &Directory, hidden: &FileName) -> std::io::Result<()> {
    let Some(directory) = above.subdirectory(hidden)? else { return Ok(()) };
    for name in directory.names(1_000_000)? {
        let Ok(name) = FileName::new(&name) else { continue };
        match directory.look(&name)? {
            Some(found) if found.is_directory() => clear(&directory, &name)?,
            _ => drop(directory.remove(&name)?),
        }
    }
    above.remove_subdirectory(hidden).map(drop)
}

fn fill(
    place: &ExportPlace,
    above: &Directory,
    hidden: &FileName,
    path: &Utf8Path,
    newest: &Export,
    watch: Watch<'_>,
) -> Result<Restored> {
    let failed = |error| io_error(error, format!("cannot write into {path}"));
    let directory = above
        .subdirectory(hidden)
        .map_err(failed)?
        .ok_or_else(|| failed(std::io::ErrorKind::NotFound.into()))?;
    let manifest = place.manifest();
    let now = state_now(place, newest);
    let files = manifest.files().chain(now.iter().map(|state| &state.copy));
    let mut done = Done { watch, done: 0, total: files.map(|file| file.bytes).sum() };
    let (mut disks, mut machine_state) = (Vec::<RestoredDisk>::new(), Vec::<RestoredDisk>::new());
    let mut memory = HashMap::new();
    // By the name that it has in the directory of exports.
    let mut layers: HashMap<&str, LayerName> = HashMap::new();
    let mut exports: Vec<&Export> = manifest.exports.iter().collect();
    // A parent comes before its children in the manifest. The newest comes last: the current state is on it.
    exports.sort_by_key(|export| export.id == newest.id && !has_children(place, export));
    for export in exports {
        for disk in &export.disks {
            let file = path.join(format!("{}.qcow2", disk.target));
            let Some(restored) = entry(&mut disks, &disk.target, "qcow2", file) else { continue };
            let stamp = u32::try_from(layers.len()).unwrap_or(u32::MAX);
            let layer = layer_name(&restored.path, stamp);
            copy_layer(place, &directory, path, disk, &layer, &layers, &mut done)?;
            layers.insert(disk.image.file.as_str(), layer.clone());
            restored.points.insert(export.snapshot.id, (layer, disk.virtual_size));
        }
        for state in &export.machine_state {
            // swtpm knows its state by the file's name. Firmware variables may be in any file.
            let file = match state.format.as_str() {
                TPM_STATE => state.used_as.clone(),
                _ => format!("{}.fd", state.target),
            };
            let Some(restored) = entry(&mut machine_state, &state.target, &state.format, path.join(file))
            else {
                continue;
            };
            let stamp = u32::try_from(layers.len()).unwrap_or(u32::MAX);
            let layer = layer_name(&restored.path, stamp);
            copy_checked(place, &directory, &state.copy, layer.as_str(), &mut done)?;
            layers.insert(state.copy.file.as_str(), layer.clone());
            restored.points.insert(export.snapshot.id, (layer, state.copy.bytes));
        }
        if let Some(file) = &export.memory {
            copy_checked(place, &directory, file, &file.file, &mut done)?;
            memory.insert(export.snapshot.id, path.join(&file.file));
        }
    }
    for disk in &disks {
        let of_newest = disk.points.get(&newest.snapshot.id);
        let Some((layer, size)) = of_newest.or_else(|| disk.points.values().next()) else { continue };
        let backing = Backing { file: format!("./{layer}"), format: Some("qcow2".to_owned()) };
        image::create(disk.path.as_std_path(), &NewImage::new(*size).on(backing))?;
    }
    for state in &now {
        let restored = machine_state.iter().find(|found| found.target == state.target);
        if let Some(file) = restored.and_then(|restored| restored.path.file_name()) {
            copy_checked(place, &directory, &state.copy, file, &mut done)?;
        }
    }
    directory.sync().map_err(failed)?;
    Ok(Restored { disks, machine_state, current: newest.snapshot.id, memory })
}

/// The state with which the machine goes on: what the newest export has, and what only earlier ones have,
/// as it is in the last of them.
fn state_now<'a>(place: &'a ExportPlace, newest: &'a Export) -> Vec<&'a ExportedState> {
    let earlier = place.manifest().exports.iter().rev();
    let mut now: Vec<&ExportedState> = Vec::new();
    for state in [newest].into_iter().chain(earlier).flat_map(|export| &export.machine_state) {
        if !now.iter().any(|found| found.target == state.target) {
            now.push(state);
        }
    }
    now
}

/// The restored disk of this name; a new one, if it is the first export that has it. `None` if what has the
/// name is of another format.
fn entry<'a>(
    disks: &'a mut Vec<RestoredDisk>,
    target: &Target,
    format: &str,
    path: Utf8PathBuf,
) -> Option<&'a mut RestoredDisk> {
    if !disks.iter().any(|found| found.target == *target) {
        let (target, format) = (target.clone(), format.to_owned());
        disks.push(RestoredDisk { target, format, path, points: HashMap::new() });
    }
    disks.iter_mut().find(|found| found.target == *target && found.format == format)
}

fn has_children(place: &ExportPlace, export: &Export) -> bool {
    place.manifest().exports.iter().any(|child| child.parent == Some(export.id))
}

/// Copies an image, verifies what was copied, and makes it name the copy of the image below it.
fn copy_layer(
    place: &ExportPlace,
    directory: &Directory,
    path: &Utf8Path,
    disk: &ExportedDisk,
    layer: &LayerName,
    layers: &HashMap<&str, LayerName>,
    done: &mut Done<'_>,
) -> Result<()> {
    copy_checked(place, directory, &disk.image, layer.as_str(), done)?;
    let copy = path.join(layer.as_str());
    // The copy is ours, and nothing changes it meanwhile. Its backing file is not opened.
    require_image(&copy, disk)?;
    let report = image::Image::open(copy.as_std_path(), &OpenOptions::read_only())?.check()?;
    if !report.is_sound() {
        return Err(Error::new(ErrorKind::Corrupt, format!("{} is not a sound image", disk.image.file))
            .state("no changes made")
            .advise("`qemu-img check` shows what is wrong with it"));
    }
    if let Some(backing) = &disk.backing {
        let below = layers.get(backing.as_str()).ok_or_else(|| {
            Error::new(
                ErrorKind::Corrupt,
                format!("{} is backed by {backing}, which was not copied", disk.image.file),
            )
        })?;
        let mut image = image::Image::open(copy.as_std_path(), &OpenOptions::read_write())?;
        image.set_backing(Some(Backing { file: format!("./{below}"), format: Some("qcow2".to_owned()) }))?;
    }
    Ok(())
}

fn copy_checked(
    place: &ExportPlace,
    directory: &Directory,
    file: &ExportedFile,
    to: &str,
    done: &mut Done<'_>,
) -> Result<()> {
    let mut from = open(place, file)?;
    let failed = |error| io_error(error, format!("cannot make {to}"));
    let name = FileName::new(to).map_err(|cause| {
        Error::new(ErrorKind::Refused, format!("{to:?} is no name of a file")).because(cause)
    })?;
    let made = directory.create_new(&name, 0o600).map_err(failed)?;
    let found = copy_file(&mut from, &file.file, &made, to, done)?;
    require_same(place, file, &found)
}
