//! Clones: disks of new domains that are made of a point of a disk of files.
//!
//! A clone has a directory of its own. What it shares with the disk, frozen layers, has a further name there
//! (a hard link), with the file name that the layers above it use. So the clone needs nothing of the disk,
//! and the disk's owner may rename, move and delete what is his. A frozen layer with such a name is never
//! written or merged into ([`crate::names::require_own_names`]).
//!
//! **What is durable before what.** 1) The directory is made under a name that no other operation gives, with
//! everything in it; its names are flushed. 2) Publishing renames it, and flushes the directory above. A
//! crash before 2 leaves a hidden directory of ours, which the undo removes by the names that the step gave;
//! nothing else is removed. A crash after 2 leaves a complete clone: an undo first gives the hidden name
//! back.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{MetadataExt, fchown};

use camino::{Utf8Path, Utf8PathBuf};
use confined_files::{Directory, FileName};
use serde::{Deserialize, Serialize};
use snapcore::backend::{CloneDisk, ClonePlace, ClonePlan, DiskPlan, FileUses, StepStatus};
use snapcore::{
    ActivePath, Disk, DiskRecord, Error, ErrorKind, LayerName, Result, Step, Target, shell_command,
    shown_size,
};

use crate::is_held_by_others;
use crate::layer_name::layer_name;
use crate::names::{self, io_error, require_private_directory};

/// The longest mark that is added to a file name for a moment.
const LONGEST_MARK: usize = ".".len() + ".domsnap-switch".len();

/// One disk of one clone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct CloneFiles {
    /// Its directory.
    pub place: ClonePlace,
    /// The file name of its image.
    pub image: String,
    /// Frozen layers of the source that get a further name beside the image: each under its own file name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(with = "Vec<String>")]
    pub pins: Vec<Utf8PathBuf>,
}

impl CloneFiles {
    /// The disk `target` of the clone at `place`, like the source at `source`. It pins nothing yet.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for a name that is too long.
    pub fn new(place: &ClonePlace, target: &Target, source: &Utf8Path) -> Result<Self> {
        let extension = source.extension().map(|extension| format!(".{extension}")).unwrap_or_default();
        let image = format!("{}-{target}{extension}", place.domain);
        if image.len() + LONGEST_MARK > 255 {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{target}: the name {image} is too long for a file"),
            )
            .state("no changes made")
            .advise("give the clone a shorter name"));
        }
        Ok(Self { place: place.clone(), image, pins: Vec::new() })
    }

    /// The clone's image while it is made.
    pub fn unfinished_image(&self) -> Utf8PathBuf {
        self.place.unfinished.join(&self.image)
    }

    /// The record of the disk, whose only layer is the new image.
    pub fn record(&self, target: &Target, format: &str, active_path: ActivePath, stamp: u32) -> DiskRecord {
        let path = self.place.directory.join(&self.image);
        let active = match active_path {
            ActivePath::Keep => layer_name(&path, stamp),
            ActivePath::New => LayerName(self.image.clone()),
        };
        DiskRecord::new(Disk::new(target.clone(), path, format), active.clone()).owned(vec![active])
    }

    /// Makes the directory, where it is not there, and the further names of the pinned layers. An image of an
    /// earlier attempt is removed. Nothing is durable yet.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where a layer can have no further name there; the system's.
    pub fn begin(&self) -> Result<()> {
        let making = |error| io_error(error, format!("cannot make the directory {}", self.place.unfinished));
        let (above, name) = Directory::of(self.place.unfinished.as_std_path()).map_err(making)?;
        if above.make_subdirectory(&name, 0o700).map_err(making)? {
            let made = above.subdirectory(&name).map_err(making)?;
            made.map_or(Ok(()), |made| like(&made, &above)).map_err(making)?;
        }
        for pin in &self.pins {
            let new = self.place.unfinished.join(pin.file_name().unwrap_or_default());
            link(pin, &new)?;
        }
        names::remove_name(&names::unfinished_name(&self.unfinished_image()))?;
        names::remove_name(&self.unfinished_image())
    }

    /// Makes the names in the directory durable.
    ///
    /// # Errors
    /// The system's.
    pub fn end(&self) -> Result<()> {
        names::flush_directory_of(&self.unfinished_image())
    }

    /// Removes what [`CloneFiles::begin`] and the step made, and the directory if nothing else is in it.
    /// `beside` are further files that the step made, by their names there.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`] if another process uses the image; the system's.
    pub fn undo(&self, beside: &[String]) -> Result<()> {
        let failed = |error| io_error(error, format!("cannot remove {}", self.place.unfinished));
        let (above, name) = Directory::of(self.place.unfinished.as_std_path()).map_err(failed)?;
        let Some(directory) = above.subdirectory(&name).map_err(failed)? else {
            return above.sync().map_err(failed);
        };
        let image = self.unfinished_image();
        if names::file_id(&image)?.is_some() && is_held_by_others(&image)? {
            return Err(Error::new(
                ErrorKind::Busy,
                format!("another process uses {image}, a clone that is undone"),
            )
            .state("it was not removed")
            .advise("end that process, then run `domsnap recover`"));
        }
        let passing = names::unfinished_name(&image);
        let pins = self.pins.iter().filter_map(|pin| pin.file_name());
        let all = pins
            .chain([self.image.as_str()])
            .chain(passing.file_name())
            .chain(beside.iter().map(String::as_str));
        for file in all {
            let Ok(file) = FileName::new(file) else { continue };
            directory.remove(&file).map_err(failed)?;
        }
        match above.remove_subdirectory(&name) {
            // Another disk of the clone is in it, whose own undo comes next.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => {}
            removed => removed.map(drop).map_err(failed)?,
        }
        above.sync().map_err(failed)
    }

    /// Returns how far the making of the image got.
    ///
    /// # Errors
    /// The system's.
    pub fn status(&self) -> Result<StepStatus> {
        let there =
            |directory: &Utf8Path| Ok::<_, Error>(names::file_id(&directory.join(&self.image))?.is_some());
        Ok(match there(&self.place.unfinished)? || there(&self.place.directory)? {
            true => StepStatus::Done,
            false if names::file_id(&self.place.unfinished)?.is_some() => StepStatus::Partly,
            false => StepStatus::NotDone,
        })
    }

    /// The effects of the step that makes the image, on files outside of the clone's own directory.
    pub fn uses(&self) -> FileUses {
        FileUses::default().makes(vec![self.place.unfinished.clone()]).links(self.pins.clone())
    }
}

/// Gives a new directory the owner and the mode of the one above, but no other user may write in it.
fn like(made: &Directory, above: &Directory) -> io::Result<()> {
    use std::os::fd::AsFd;
    let model = File::from(above.as_fd().try_clone_to_owned()?).metadata()?;
    let made = File::from(made.as_fd().try_clone_to_owned()?);
    // Only root may; for others the directory stays theirs.
    let _ = fchown(&made, Some(model.uid()), Some(model.gid()));
    made.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(model.mode() & 0o755 | 0o700))
}

/// Gives a frozen layer a further name. If it has that already, nothing happens.
fn link(layer: &Utf8Path, new: &Utf8Path) -> Result<()> {
    let failed = |error: io::Error| {
        let message = format!("{layer} cannot have a further name (a hard link) {new}");
        match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
            Some(
                rustix::io::Errno::PERM
                | rustix::io::Errno::OPNOTSUPP
                | rustix::io::Errno::XDEV
                | rustix::io::Errno::MLINK,
            ) => Error::new(ErrorKind::Unsupported, message).because(error).advise(
                "make clones that share nothing with --full, or clones in another directory with --to",
            ),
            _ => io_error(error, message),
        }
    };
    let (from, name) = Directory::of(layer.as_std_path()).map_err(failed)?;
    let (to, new_name) = Directory::of(new.as_std_path()).map_err(failed)?;
    let wanted = from.look(&name).map_err(failed)?.map(|found| found.identity);
    match from.link(&name, &to, &new_name, wanted) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            match to.look(&new_name).map_err(failed)?.map(|found| found.identity) == wanted {
                true => Ok(()),
                false => Err(Error::new(
                    ErrorKind::Exists,
                    format!("another layer of the source has the file name of {layer}, and a clone has one directory"),
                )
                .advise("make clones that share nothing with --full")),
            }
        }
        linked => linked.map_err(failed),
    }
}

/// Publishes clones: their directories get their names. A clone that is published already, by another disk's
/// step, is left as it is. The names are durable when this returns.
///
/// # Errors
/// [`ErrorKind::Exists`] where another file got the name; the system's.
pub fn publish_clones(places: &[ClonePlace]) -> Result<()> {
    for place in places {
        if names::file_id(&place.unfinished)?.is_some() {
            rename(&place.unfinished, &place.directory)?;
        }
    }
    flush_above(places)
}

/// Takes the publishing of clones back: their directories get their hidden names again, durably. A directory
/// that was never published is left as it is; then one of its last name is another's.
///
/// # Errors
/// The system's.
pub fn unpublish_clones(places: &[ClonePlace]) -> Result<()> {
    for place in places {
        if names::file_id(&place.unfinished)?.is_none() && names::file_id(&place.directory)?.is_some() {
            rename(&place.directory, &place.unfinished)?;
        }
    }
    flush_above(places)
}

/// Returns how far the publishing got.
///
/// # Errors
/// The system's.
pub fn clones_published(places: &[ClonePlace]) -> Result<StepStatus> {
    let mut left = 0;
    for place in places {
        left += usize::from(names::file_id(&place.unfinished)?.is_some());
    }
    Ok(match left {
        0 => StepStatus::Done,
        left if left == places.len() => StepStatus::NotDone,
        _ => StepStatus::Partly,
    })
}

fn rename(from: &Utf8Path, to: &Utf8Path) -> Result<()> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AlreadyExists => {
            Error::new(ErrorKind::Exists, format!("{to} exists, and nothing is written over it"))
                .advise("choose another name for the clone, or another directory with --to")
        }
        _ => io_error(error, format!("cannot rename {from} to {to}")),
    };
    let (directory, from) = Directory::of(from.as_std_path()).map_err(failed)?;
    let (_, to) = Directory::of(to.as_std_path()).map_err(failed)?;
    directory.rename_subdirectory(&from, &to).map_err(failed)
}

/// Flushes each directory that has clones once.
fn flush_above(places: &[ClonePlace]) -> Result<()> {
    let mut flushed: Vec<&Utf8Path> = Vec::new();
    for place in places {
        let Some(above) = place.directory.parent().filter(|above| !flushed.contains(above)) else { continue };
        names::flush_directory_of(&place.directory)?;
        flushed.push(above);
    }
    Ok(())
}

/// Checks the places of clones of the disk at `source` before anything is made.
///
/// # Errors
/// [`ErrorKind::NotFound`] for a directory that does not exist; [`ErrorKind::Exists`] for a clone's own that
/// does; [`ErrorKind::Refused`] where other users could replace what is made there.
pub fn check_places(places: &[ClonePlace], source: &Utf8Path) -> Result<()> {
    let mut checked: Vec<&Utf8Path> = Vec::new();
    for place in places {
        let (Some(above), directory) = (place.directory.parent(), &place.directory) else { continue };
        if !checked.contains(&above) {
            if !above.is_dir() {
                return Err(Error::new(ErrorKind::NotFound, format!("the directory {above} does not exist"))
                    .state("no changes made")
                    .advise("make it, or give another one with --to"));
            }
            names::require_writable_directory_of(directory)?;
            require_private_directory(above, source)?;
            checked.push(above);
        }
        if names::file_id(directory)?.is_some() {
            return Err(Error::new(ErrorKind::Exists, format!("{directory} exists, and a clone gets a new directory"))
                .state("no changes made")
                .advise(format!(
                    "choose another name for the clone, give another directory with --to, or move that one away: `{}`",
                    shell_command(["mv", directory.as_str(), &format!("{directory}.old")])
                )));
        }
    }
    Ok(())
}

/// The plan of clones: the image of each, and then the names of their directories. `bytes` are copied for
/// each image; `make` returns the action that makes one, and what it does, for people.
///
/// # Errors
/// Those of [`CloneFiles::new`].
pub fn clone_plan<A>(
    source: &DiskRecord,
    request: &CloneDisk,
    pins: &[Utf8PathBuf],
    bytes: u64,
    make: impl Fn(CloneFiles) -> (A, String),
    publish: impl FnOnce(Vec<ClonePlace>) -> A,
) -> Result<ClonePlan<A>> {
    let Disk { target, format, .. } = &source.disk;
    let (mut plan, mut disks) = (DiskPlan::default(), Vec::new());
    for place in &request.clones {
        let mut files = CloneFiles::new(place, target, source.disk.path())?;
        files.pins = pins.to_vec();
        disks.push(files.record(target, format.as_str(), request.active_path, request.stamp));
        let (action, what) = make(files);
        let step = Step::new(target.clone(), action, format!("{what}, in {}", place.directory));
        plan.prepare.push(step.bytes(bytes));
    }
    let publish = publish(request.clones.clone());
    plan.cut.push(Step::new(target.clone(), publish, "give the directories of the clones their names"));
    Ok(ClonePlan::new(plan, disks))
}

/// Refuses clones that need more room than their directory has.
///
/// # Errors
/// [`ErrorKind::NoSpace`].
pub fn require_room(target: &Target, places: &[ClonePlace], bytes_each: u64) -> Result<()> {
    let Some(above) = places.first().and_then(|place| place.directory.parent()) else { return Ok(()) };
    let Ok(about) = rustix::fs::statvfs(above.as_std_path()) else { return Ok(()) };
    let (free, needed) =
        (about.f_bavail.saturating_mul(about.f_frsize), bytes_each.saturating_mul(places.len() as u64));
    match free >= needed {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::NoSpace,
            format!(
                "{target}: the copies need {}, and {above} has room for {}",
                shown_size(needed),
                shown_size(free)
            ),
        )
        .state("no changes made")
        .advise("free space there, or give a directory on another file system with --to")),
    }
}

/// One layer of the chain that a clone is to share: its file, and the string by which the layer above names
/// it. The uppermost has none: the clone's own image names it.
pub struct SharedLayer<'a> {
    /// The file.
    pub file: &'a Utf8Path,
    /// The backing string of the layer above.
    pub named: Option<&'a str>,
}

/// The layers that a clone gets names of, and notes on the others. `chain` is from the top down.
///
/// A layer is pinned by a further name in the clone's directory, where the layer above finds it. That needs a
/// plain file name. An absolute path leads to the same file from everywhere, so such a layer, and what is
/// below it, is not pinned, with a note. A path relative to another directory would lead elsewhere.
///
/// # Errors
/// [`ErrorKind::Refused`], with advice.
pub fn pins_of(
    target: &Target,
    places: &[ClonePlace],
    chain: &[SharedLayer<'_>],
) -> Result<(Vec<Utf8PathBuf>, Vec<String>)> {
    let (mut pins, mut notes): (Vec<Utf8PathBuf>, Vec<String>) = (Vec::new(), Vec::new());
    let Some(above) = places.first().and_then(|place| place.directory.parent()) else {
        return Ok((pins, notes));
    };
    let looking = |path: &Utf8Path, error| io_error(error, format!("cannot look at {path}"));
    let device = fs::metadata(above).map_err(|error| looking(above, error))?.dev();
    for SharedLayer { file, named } in chain {
        let about = fs::symlink_metadata(file).map_err(|error| looking(file, error))?;
        let plain = named.map(|named| named.trim_start_matches("./"));
        if named.is_some_and(|named| named.starts_with('/')) || !about.is_file() {
            notes.push(format!(
                "{target}: {file} stays where it is, and the clones need it there: nothing of domsnap's removes it"
            ));
            return Ok((pins, notes));
        }
        if let Some(plain) = plain.filter(|plain| plain.contains('/')) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "{target}: a layer is backed by {plain}, which leads elsewhere from a clone's directory"
                ),
            )
            .state("no changes made")
            .advise("make clones that share nothing with --full"));
        }
        if about.dev() != device {
            return Err(Error::new(
                ErrorKind::Refused,
                format!("{target}: {file} is on another file system than {above}, and can have no further name there"),
            )
            .state("no changes made")
            .advise("give a directory on its file system with --to, or make clones that share nothing with --full"));
        }
        pins.push((*file).to_owned());
    }
    Ok((pins, notes))
}

#[cfg(test)]
mod tests {
    use snapcore::DomainName;

    use super::*;

    fn place(directory: &Utf8Path, name: &str) -> ClonePlace {
        ClonePlace::new(DomainName::new(name).unwrap(), directory, 0x1a2b_3c4d)
    }

    fn vda() -> Target {
        Target::new("vda").unwrap()
    }

    /// The undo removes what the step made, and nothing else: also if the directory has been published.
    #[test]
    fn undo_removes_what_was_made_alone() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let layer = dir.join("gold.ds-00000001.img");
        fs::write(&layer, b"frozen").unwrap();
        let mut files = CloneFiles::new(&place(dir, "web"), &vda(), &dir.join("gold.img")).unwrap();
        files.pins.push(layer.clone());
        let places = [files.place.clone()];
        for published in [false, true] {
            files.begin().unwrap();
            fs::write(files.unfinished_image(), b"new").unwrap();
            files.end().unwrap();
            assert_eq!(files.status().unwrap(), StepStatus::Done);
            assert_eq!(fs::metadata(&layer).unwrap().nlink(), 2);
            if published {
                publish_clones(&places).unwrap();
                publish_clones(&places).unwrap();
                assert_eq!(clones_published(&places).unwrap(), StepStatus::Done);
                assert!(
                    dir.join("web/web-vda.img").exists() && dir.join("web/gold.ds-00000001.img").exists()
                );
                unpublish_clones(&places).unwrap();
                unpublish_clones(&places).unwrap();
            }
            files.undo(&[]).unwrap();
            files.undo(&[]).unwrap();
            assert_eq!(files.status().unwrap(), StepStatus::NotDone);
            assert_eq!((fs::metadata(&layer).unwrap().nlink(), fs::read_dir(dir).unwrap().count()), (1, 1));
        }
        // What another program put there stays, and keeps the directory.
        files.begin().unwrap();
        fs::write(files.place.unfinished.join("other"), b"x").unwrap();
        files.undo(&[]).unwrap();
        assert_eq!(fs::read_dir(&files.place.unfinished).unwrap().count(), 1);
    }

    /// Another's directory of the clone's name is refused beforehand, never replaced, and stays in an undo.
    #[test]
    fn directory_of_another_is_never_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let source = dir.join("gold.img");
        fs::write(&source, b"x").unwrap();
        let files = CloneFiles::new(&place(dir, "web"), &vda(), &source).unwrap();
        let places = [files.place.clone()];
        check_places(&places, &source).unwrap();
        files.begin().unwrap();
        fs::create_dir(dir.join("web")).unwrap();
        assert_eq!(check_places(&places, &source).unwrap_err().kind(), ErrorKind::Exists);
        assert_eq!(publish_clones(&places).unwrap_err().kind(), ErrorKind::Exists);
        unpublish_clones(&places).unwrap();
        files.undo(&[]).unwrap();
        assert!(dir.join("web").is_dir() && !files.place.unfinished.exists());
        let missing = [place(&dir.join("missing"), "web")];
        assert_eq!(check_places(&missing, &source).unwrap_err().kind(), ErrorKind::NotFound);
    }

    /// Only a plain name leads to the same layer from a clone's directory.
    #[test]
    fn only_plain_names_are_pinned() {
        let dir = tempfile::tempdir().unwrap();
        let dir = Utf8Path::from_path(dir.path()).unwrap();
        let (one, two) = (dir.join("one"), dir.join("two"));
        fs::write(&one, b"1").unwrap();
        fs::write(&two, b"2").unwrap();
        let places = [place(dir, "web")];
        let pins = |named| {
            let chain =
                [SharedLayer { file: &one, named: None }, SharedLayer { file: &two, named: Some(named) }];
            pins_of(&vda(), &places, &chain)
        };
        for plain in ["two", "./two"] {
            assert_eq!(pins(plain).unwrap().0, [one.clone(), two.clone()]);
        }
        let (pinned, notes) = pins(two.as_str()).unwrap();
        assert_eq!((pinned, notes.len()), (vec![one.clone()], 1));
        assert_eq!(pins("../x/two").unwrap_err().kind(), ErrorKind::Refused);
    }
}
