//! qcow2 overlays on images of other formats: the image of a disk is frozen, and the overlay receives all
//! later writes. From the commit point on, the disk belongs to this crate's backend; the image below is its
//! base, which is read, and never written, merged away or removed.
//!
//! | step | durable before what |
//! |---|---|
//! | create an overlay | the whole file under a temporary name, before it gets its own; that, before the commit |
//!
//! **What the domain wrote between a crash and the recovery.** The overlay of a create on a running domain
//! has the guest's writes since the instant. If that create is undone and no hypervisor is left that could
//! merge them, the overlay is saved as `rescued-<layer>`.

use camino::{Utf8Path, Utf8PathBuf};
use image_files::layer_name::layer_path;
use image_files::{FileSteps, kept_overlay_message, names};
use snapcore::backend::{DiskPlan, DiskState, InstantPlan, Salvage, StepStatus};
use snapcore::hypervisor::DiskInstant;
use snapcore::{DiskRecord, Edit, Error, ErrorKind, LayerName, Point, Result};

use crate::backing_string::resolve_backing;
use crate::image::{self, Backing, Image, NewImage, OpenOptions};

/// Adds to `plan` what makes the overlay `layer` the disk's image: the instant of a running domain, the
/// edits of the commit point, and the note. A step that makes the overlay is planned before. `base` names
/// the frozen image among the layers of the disk; with `is_kept` the record goes on to list it, so that a
/// chain may lead there.
pub fn freeze_under<A>(
    plan: &mut DiskPlan<A>,
    record: &DiskRecord,
    state: &DiskState,
    layer: &LayerName,
    base: LayerName,
    is_kept: bool,
) {
    let target = record.disk.target.clone();
    let path = layer_path(record.disk.path(), layer);
    if state.attached {
        let take = DiskInstant::Overlay { address: (&path).into(), format: "qcow2".to_owned() };
        plan.instant = Some(InstantPlan::new(take, Vec::new()));
    }
    plan.notes.push(format!(
        "{target}: the domain's configuration must now name {path}, with format qcow2; {} is its base, which nothing may \
         write any more",
        record.disk.path()
    ));
    // Names of layers are relative to the disk's path, which may move to another directory.
    let active = match layer.as_str().contains('/') {
        true => LayerName(path.file_name().unwrap_or("disk").to_owned()),
        false => layer.clone(),
    };
    let previous = record.active.clone();
    plan.commit.push(Edit::AddLayer { target: target.clone(), layer: active.clone() });
    // The base belongs to its owner.
    plan.commit.push(Edit::RemoveLayer { target: target.clone(), layer: previous });
    if is_kept {
        plan.commit.push(Edit::AddLayer { target: target.clone(), layer: base.clone() });
    }
    plan.commit.extend([
        Edit::SetActive { target: target.clone(), layer: active },
        Edit::SetFormat { target: target.clone(), format: "qcow2".to_owned() },
        Edit::SetPath { target, path: path.into() },
    ]);
    plan.point = Some(Point::external(base));
}

/// The step that makes such an overlay.
pub struct NewOverlay<'a> {
    /// The files of the disk, whose path names the frozen image.
    pub files: &'a FileSteps<'a>,
    /// The overlay.
    pub layer: &'a LayerName,
}

impl NewOverlay<'_> {
    /// Creates the overlay of `size` bytes, which states `format` as the format of the disk's image. One that
    /// exists is left as it is.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] if another file has its name; the system's.
    pub fn create(&self, format: &str, size: u64) -> Result<()> {
        let (file, path) = (self.file(), self.path());
        if names::file_id(&file)?.is_some() {
            if self.is_made_here()? {
                return Ok(());
            }
            return Err(Error::new(
                ErrorKind::Exists,
                format!("{file} exists, and nothing is written over it"),
            ));
        }
        // Relative if they are in the same directory, so that they can be moved together.
        let base = match file.parent() == path.parent() {
            true => path.file_name().unwrap_or_default().to_owned(),
            false => path.to_string(),
        };
        let new = NewImage::new(size).on(Backing { file: base, format: Some(format.to_owned()) });
        names::write_new(&file, path, |into, passing| {
            Ok(image::write_into(into, passing.as_std_path(), &new)?)
        })
    }

    /// Removes it.
    ///
    /// # Errors
    /// [`snapcore::ErrorKind::Busy`] if it is in use; the system's.
    pub fn undo(&self) -> Result<()> {
        let file = self.file();
        names::remove_name(&names::unfinished_name(&file))?;
        // Another program's file of this name stays.
        if self.is_made_here()? {
            self.files.refuse_in_use(&file)?;
            names::remove_name(&file)?;
        }
        names::flush_directory_of(&file)
    }

    /// Returns how far the step got.
    ///
    /// # Errors
    /// The system's.
    pub fn status(&self) -> Result<StepStatus> {
        let begun = names::file_id(&names::unfinished_name(&self.file()))?.is_some();
        Ok(match (self.files.is_there(self.layer)?, begun) {
            (true, _) => StepStatus::Done,
            (false, true) => StepStatus::Partly,
            (false, false) => StepStatus::NotDone,
        })
    }

    /// Saves what the domain wrote to it, if an undo of the step would lose that. An overlay that cannot be
    /// read is saved too: it may have been written.
    ///
    /// # Errors
    /// The system's.
    pub fn salvage(&self, done: bool) -> Result<Salvage> {
        let file = self.file();
        if !done || !self.is_made_here()? || !is_written(&file) {
            return Ok(Salvage::Nothing);
        }
        let kept = self.files.keep_as(self.layer)?;
        Ok(Salvage::Saved(kept_overlay_message(self.files.record, &file, &kept, "qcow2")))
    }

    /// Returns true if the file is an overlay on the disk's image.
    fn is_made_here(&self) -> Result<bool> {
        let file = self.file();
        if names::file_id(&file)?.is_none() {
            return Ok(false);
        }
        let backing = image::probe(file.as_std_path())?.and_then(|header| header.backing);
        match backing {
            Some(backing) => names::same_file(&resolve_backing(&file, &backing.file)?, self.path()),
            None => Ok(false),
        }
    }

    fn path(&self) -> &Utf8Path {
        self.files.path()
    }

    fn file(&self) -> Utf8PathBuf {
        self.files.file(self.layer)
    }
}

fn is_written(file: &Utf8Path) -> bool {
    Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())
        .and_then(|overlay| overlay.is_written())
        .unwrap_or(true)
}
