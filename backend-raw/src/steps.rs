//! Execution of a raw disk's steps, one typed action for each. Blocking.
//!
//! | step | durable before what |
//! |---|---|
//! | write out | nothing: it only makes the cut shorter |
//! | copy, publish | all data of a copy, then its checksum, before it gets its own name; that, before commit or switch |
//! | create an overlay | as [`NewOverlay`] says |
//! | name | the second name of the current image, before the path moves away from it |
//! | switch | the new name, by one rename; the previous image keeps its own name |
//! | remove, unname | nothing follows that depends on it |
//! | clone, publish clones | see [`image_files::clones`] |
//!
//! **What the domain wrote between a crash and the recovery.** The path is valid at every point, so the
//! domain may run. While it names the previous image, an undo loses nothing. It may name the copy that a
//! revert made, and the revert is undone. Then the copy is compared with its point; if it differs, it is
//! saved as `rescued-<layer>` before the copy is removed. Overlays: see [`NewOverlay`].

use backend_qcow2::NewOverlay;
use camino::{Utf8Path, Utf8PathBuf};
use image_files::chain::room_of_overlay;
use image_files::clones::{self, CloneFiles};
use image_files::layer_name::layer_path;
use image_files::{FileSteps, kept_layer_message, names};
use serde::{Deserialize, Serialize};
use snapcore::backend::{ClonePlace, FileUses, Salvage, StepStatus};
use snapcore::{DiskRecord, Error, ErrorKind, LayerName, Result, Step};

use crate::copy::{self, Watch};
use crate::place::reflink;
use crate::state::Sort;

/// Method of making a file with the content of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CopyMethod {
    /// By sharing its blocks.
    Reflink,
    /// By copying its data.
    Copy,
}

/// The action of a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum RawStep {
    /// Flushes the current image from memory to the disk, so that less is left to write during the cut.
    WriteOut,
    /// Makes a new layer from a layer, or from the current image.
    Copy {
        /// The layer; absent: the current image.
        from: Option<LayerName>,
        layer: LayerName,
        method: CopyMethod,
        /// True if a later step makes it durable and names it, so that the guest is not paused for that.
        published_later: bool,
        /// True if space for all of the new layer is reserved, as it was for the disk.
        #[serde(default)]
        reserve: bool,
    },
    /// Makes a copy durable, and gives it its name.
    Publish { layer: LayerName },
    /// Creates an empty qcow2 overlay on the current image.
    CreateOverlay { layer: LayerName, virtual_size: u64 },
    /// Gives the current image a second name of its own (a hard link).
    Name { layer: LayerName },
    /// Moves the configured path from one layer to another.
    Switch { from: LayerName, to: LayerName },
    /// Removes the own name of the image that the path names.
    Unname { layer: LayerName },
    /// Removes layers.
    Remove { layers: Vec<LayerName> },
    /// Makes the image of a clone from a layer.
    Clone {
        files: CloneFiles,
        from: LayerName,
        method: CopyMethod,
        /// As of a copy.
        #[serde(default)]
        reserve: bool,
        /// The clone's own copy of the point, if it keeps one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        point: Option<LayerName>,
    },
    /// Publishes clones, each a directory of its own.
    PublishClones { places: Vec<ClonePlace> },
}

/// Returns the effects of a step on files.
pub(crate) fn uses(record: &DiskRecord, step: &Step<RawStep>) -> FileUses {
    let path = record.disk.path();
    let file = |layer: &LayerName| layer_path(path, layer);
    let mut uses = FileUses::default();
    match &step.action {
        RawStep::WriteOut | RawStep::Publish { .. } => {}
        RawStep::Copy { layer, .. } => {
            // With its checksum.
            uses.makes.extend([file(layer), copy::sum_file(&file(layer))]);
            uses.room = step.bytes;
        }
        RawStep::CreateOverlay { layer, virtual_size } => {
            uses.makes.push(file(layer));
            uses.room = room_of_overlay(*virtual_size);
        }
        RawStep::Name { layer } => {
            uses.makes.push(file(layer));
            uses.links.push(path.to_owned());
        }
        RawStep::Switch { to, .. } => {
            uses.makes.push(path.to_owned());
            uses.renames.push(path.to_owned());
            uses.links.push(file(to));
        }
        RawStep::Unname { layer } => uses.renames.push(file(layer)),
        RawStep::Remove { layers } => uses.renames.extend(layers.iter().map(file)),
        RawStep::Clone { files, .. } => return files.uses(),
        RawStep::PublishClones { places } => {
            uses.makes.extend(places.iter().map(|place| place.directory.clone()));
        }
    }
    uses
}

/// The context of a step.
pub(crate) struct StepRunner<'a> {
    pub(crate) files: FileSteps<'a>,
    pub(crate) watch: Watch<'a>,
    pub(crate) sort: Sort,
    /// True if another process began the operation: the domain may have run since.
    pub(crate) resumed: bool,
}

impl StepRunner<'_> {
    /// Performs `step`.
    pub(crate) fn apply(&self, step: &RawStep) -> Result<()> {
        let path = self.path();
        match step {
            RawStep::WriteOut => write_out(path),
            RawStep::Copy { layer, .. } if names::file_id(&self.file(layer))?.is_some() => Ok(()),
            RawStep::Copy { from, layer, method, published_later, reserve } => {
                self.copy(from.as_ref(), layer, *method, *reserve, *published_later)?;
                if *published_later { Ok(()) } else { self.publish(layer, false) }
            }
            RawStep::Publish { layer } => self.publish(layer, self.sort != Sort::Disk),
            RawStep::CreateOverlay { layer, virtual_size } => {
                self.overlay(layer).create("raw", *virtual_size)
            }
            RawStep::Name { layer } => self.files.name(layer),
            RawStep::Switch { from, to } => self.files.switch(from, to),
            RawStep::Unname { layer } if self.sort == Sort::Tpm => self.complete_switch(layer),
            RawStep::Unname { layer } => self.files.unname(layer),
            RawStep::Remove { layers } => self.files.remove(layers, |file| Some(copy::sum_file(file))),
            RawStep::Clone { files, from, method, reserve, point } => {
                self.clone_disk(files, from, *method, *reserve, point.as_ref())
            }
            RawStep::PublishClones { places } => clones::publish_clones(places),
        }
    }

    /// Undoes `step`.
    pub(crate) fn undo(&self, step: &RawStep) -> Result<()> {
        let path = self.path();
        match step {
            RawStep::WriteOut | RawStep::Publish { .. } => Ok(()),
            RawStep::CreateOverlay { layer, .. } => self.overlay(layer).undo(),
            RawStep::Copy { layer, .. } => {
                let file = self.file(layer);
                names::remove_name(&names::unfinished_name(&file))?;
                names::remove_name(&names::unfinished_name(&copy::sum_file(&file)))?;
                // If the path was moved to the file and could not be moved back, the file stays.
                if !names::same_file(&file, path)? {
                    self.files.refuse_in_use(&file)?;
                    names::remove_name(&file)?;
                    names::remove_name(&copy::sum_file(&file))?;
                }
                names::flush_directory_of(&file)
            }
            RawStep::Name { layer } => self.files.unname(layer),
            RawStep::Switch { from, to } => self.files.undo_switch(from, to),
            RawStep::Clone { files, point, .. } => {
                let names = |point: &LayerName| {
                    let file = layer_path(&files.unfinished_image(), point);
                    let sum = copy::sum_file(&file);
                    let all = [names::unfinished_name(&file), names::unfinished_name(&sum), sum, file];
                    all.map(|file| file.file_name().unwrap_or_default().to_owned()).to_vec()
                };
                files.undo(&point.as_ref().map(names).unwrap_or_default())
            }
            RawStep::PublishClones { places } => clones::unpublish_clones(places),
            RawStep::Unname { .. } | RawStep::Remove { .. } => Err(Error::new(
                ErrorKind::Internal,
                format!("the step {step:?} runs after the commit point only"),
            )),
        }
    }

    /// Returns how far `step` got.
    pub(crate) fn status(&self, step: &RawStep) -> Result<StepStatus> {
        let done = |done: bool| Ok(if done { StepStatus::Done } else { StepStatus::NotDone });
        let is_there = |layer: &LayerName| self.files.is_there(layer);
        match step {
            // It leaves no trace, and nothing needs it.
            RawStep::WriteOut => Ok(StepStatus::Done),
            RawStep::Copy { layer, published_later, from, .. } => {
                if is_there(layer)? {
                    return Ok(StepStatus::Done);
                }
                let length = |file: &Utf8Path| std::fs::metadata(file).map(|about| about.len()).ok();
                let made = length(&names::unfinished_name(&self.file(layer)));
                // A copy gets its length last.
                let whole = made.is_some() && made == length(&self.source(from.as_ref()));
                Ok(match (made, whole && *published_later) {
                    (None, _) => StepStatus::NotDone,
                    (Some(_), true) => StepStatus::Done,
                    (Some(_), false) => StepStatus::Partly,
                })
            }
            RawStep::CreateOverlay { layer, .. } => self.overlay(layer).status(),
            RawStep::Publish { layer } => done(is_there(layer)?),
            RawStep::Name { layer } => done(names::same_file(self.path(), &self.file(layer))?),
            RawStep::Switch { to, .. } => done(names::same_file(self.path(), &self.file(to))?),
            RawStep::Unname { layer } => done(!is_there(layer)?),
            RawStep::Remove { layers } => self.files.removed(layers),
            RawStep::Clone { files, .. } => files.status(),
            RawStep::PublishClones { places } => clones::clones_published(places),
        }
    }

    /// Saves what the domain wrote, if undoing `step` would lose it.
    pub(crate) fn salvage(&self, step: &RawStep, done: bool) -> Result<Salvage> {
        let (from, layer) = match step {
            RawStep::CreateOverlay { layer, .. } => return self.overlay(layer).salvage(done),
            RawStep::Copy { from: Some(from), layer, .. } => (from, layer),
            _ => return Ok(Salvage::Nothing),
        };
        let (record, file) = (self.files.record, self.file(layer));
        let goes = done && names::file_id(&file)?.is_some() && !names::same_file(&file, self.path())?;
        // A copy that cannot be read is saved: it may have been written.
        if !goes || copy::same_content(&file, &self.source(Some(from))).unwrap_or(false) {
            return Ok(Salvage::Nothing);
        }
        let kept = self.files.keep_as(layer)?;
        Ok(Salvage::Saved(kept_layer_message(record, &file, &kept)))
    }

    /// Removes the own name of the TPM state that the path was moved to. Until its domain had ended, a TPM
    /// may have carried out a command that its guest gave it before the pause, and put another state in its
    /// place: then the path is moved to it again. After a crash that state may be of a domain that was
    /// started since, and stays.
    fn complete_switch(&self, layer: &LayerName) -> Result<()> {
        if !self.files.is_there(layer)? {
            return Ok(());
        }
        if !self.files.is_named_by_path(layer)? && !self.resumed {
            names::move_name(self.path(), &self.file(layer))?;
        }
        names::remove(&self.file(layer))
    }

    fn overlay<'a>(&'a self, layer: &'a LayerName) -> NewOverlay<'a> {
        NewOverlay { files: &self.files, layer }
    }

    fn path(&self) -> &Utf8Path {
        self.files.path()
    }

    fn file(&self, layer: &LayerName) -> Utf8PathBuf {
        self.files.file(layer)
    }

    fn source(&self, from: Option<&LayerName>) -> Utf8PathBuf {
        from.map_or_else(|| self.path().to_owned(), |layer| self.file(layer))
    }

    /// Makes the image of a clone. A point with a checksum is compared with it first.
    fn clone_disk(
        &self,
        files: &CloneFiles,
        from: &LayerName,
        method: CopyMethod,
        reserve: bool,
        point: Option<&LayerName>,
    ) -> Result<()> {
        files.begin()?;
        let (source, file) = (self.source(Some(from)), files.unfinished_image());
        copy::verify(&source, self.watch)?;
        let old = names::open_own(&source, false)?;
        // The image comes last: where it has its name, the step is done.
        if let Some(point) = point {
            let kept = layer_path(&file, point);
            names::remove_name(&kept)?;
            names::write_new(&kept, &source, |new, passing| {
                let sum = copy::copy(&old, &source, &new, passing, reserve, self.watch)?;
                copy::write_sum(&kept, sum)?;
                new.sync_all()
                    .map_err(|error| names::io_error(error, format!("cannot make {passing} durable")))
            })?;
        }
        names::write_new(&file, &source, |new, passing| {
            match method {
                CopyMethod::Reflink => {
                    reflink(&old, &source, &new, passing)?;
                    if reserve {
                        let length = new.metadata().map(|about| about.len());
                        let looking = |error| names::io_error(error, format!("cannot look at {passing}"));
                        copy::reserve_all(&new, passing, length.map_err(looking)?)?;
                    }
                }
                CopyMethod::Copy => {
                    copy::copy(&old, &source, &new, passing, reserve, self.watch)?;
                }
            }
            new.sync_all().map_err(|error| names::io_error(error, format!("cannot make {passing} durable")))
        })
    }

    /// Makes a complete copy under a temporary name.
    fn copy(
        &self,
        from: Option<&LayerName>,
        layer: &LayerName,
        method: CopyMethod,
        reserve: bool,
        published_later: bool,
    ) -> Result<()> {
        let (source, file) = (self.source(from), self.file(layer));
        if from.is_some() {
            copy::verify(&source, self.watch)?;
        }
        let passing = names::unfinished_name(&file);
        let old = match from {
            Some(_) => names::open_own(&source, false)?,
            None => names::open_image(&source, false)?,
        };
        let new = names::create_unfinished(&file, &old, &source)?;
        match method {
            CopyMethod::Reflink => {
                reflink(&old, &source, &new, &passing)?;
                if reserve {
                    let length = new.metadata().map(|about| about.len());
                    let looking = |error| names::io_error(error, format!("cannot look at {passing}"));
                    copy::reserve_all(&new, &passing, length.map_err(looking)?)?;
                }
            }
            CopyMethod::Copy => {
                let sum = copy::copy(&old, &source, &new, &passing, reserve, self.watch)?;
                // The new current image changes as soon as the domain runs. Only a point has a checksum. That
                // of a small file is computed later, when the guest is not paused.
                let later = published_later && self.sort != Sort::Disk;
                if from.is_none() && !later {
                    copy::write_sum(&file, sum)?;
                }
            }
        }
        Ok(())
    }

    /// Makes a copy durable, then gives it its name. With `sums` it gets its checksum first, if it has none.
    /// If that was done before, nothing happens.
    fn publish(&self, layer: &LayerName, sums: bool) -> Result<()> {
        let file = self.file(layer);
        let passing = names::unfinished_name(&file);
        if names::file_id(&passing)?.is_none() && names::file_id(&file)?.is_some() {
            return Ok(());
        }
        let made = names::open_own(&passing, false)?;
        if sums && names::file_id(&copy::sum_file(&file))?.is_none() {
            copy::write_sum(&file, copy::sum(&made, &passing, self.watch)?)?;
        }
        made.sync_all().map_err(|error| names::io_error(error, format!("cannot make {passing} durable")))?;
        names::publish(&passing, &file, Some(&made))
    }
}

fn write_out(path: &Utf8Path) -> Result<()> {
    names::open_image(path, false)?
        .sync_data()
        .map_err(|error| names::io_error(error, format!("cannot write {path} out")))
}
