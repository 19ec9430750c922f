//! Execution of a chain's steps on qcow2 images. Blocking; called on a blocking thread.
//!
//! | step | durable before what |
//! |---|---|
//! | name a layer | the second name, before any overlay refers to it |
//! | create an overlay, materialise | the whole file under a temporary name, before it gets its own; that, before the switch |
//! | take, apply, drop a tag | see [`crate::image`] |
//! | switch | the new name, by one rename; the previous layer keeps its own name |
//! | merge | all data and metadata of the receiving layer, before anything else refers to it |
//! | repoint | one header write |
//! | remove, unname | nothing follows that depends on it |
//! | clone, publish clones | see [`image_files::clones`] |

use std::fs::File;

use camino::{Utf8Path, Utf8PathBuf};
use image_files::chain::{ChainStep, Tag};
use image_files::{Bases, FileSteps, ImageLocks, clones, names};
use jiff::Timestamp;
use snapcore::backend::{Progress, StepStatus};
use snapcore::{Error, ErrorKind, LayerName, Result};
use tokio_util::sync::CancellationToken;

use crate::backing_string::{backing_string, resolve_backing};
use crate::below::Below;
use crate::image::{self, Backing, Image, NewImage, NewSnapshot, OpenOptions, RunLayer};
use crate::layers::file_of;
use crate::tags::{has_tag, present, require_tag};

/// The context of a step.
pub(crate) struct StepRunner<'a> {
    pub(crate) files: FileSteps<'a>,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) cancel: &'a CancellationToken,
    /// Planned bytes that the step will move.
    pub(crate) bytes: u64,
    pub(crate) max_depth: u32,
    pub(crate) bases: &'a Bases,
    /// True if the space of freed clusters is returned to the file system.
    pub(crate) punch: bool,
    /// True if a process that stopped may have begun the step.
    pub(crate) resumed: bool,
}

impl StepRunner<'_> {
    /// Performs `step`.
    pub(crate) fn apply(&self, step: &ChainStep) -> Result<()> {
        match step {
            ChainStep::NameLayer { layer } => self.files.name(layer),
            ChainStep::CreateOverlay { layer, on, on_format, virtual_size, .. } => {
                self.create_overlay(layer, on, on_format, *virtual_size)
            }
            ChainStep::Materialise { from, tag, layer } => self.materialise(from, tag, layer),
            ChainStep::TakeInternal { layer, tag } => self.take(layer, tag),
            ChainStep::SwitchActive { from, to } => self.files.switch(from, to),
            ChainStep::ApplyInternal { layer, tag, .. } => self.apply_tag(layer, tag),
            ChainStep::DropInternal { layer, tags } => self.drop_tags(layer, tags, false),
            ChainStep::ForgetInternal { layer, tags } => self.drop_tags(layer, tags, true),
            ChainStep::Merge { run, into, .. } if self.has_pivoted(run, into)? => Ok(()),
            ChainStep::Merge { run, into, below } => self.merge(run, into, below.as_ref()),
            ChainStep::Repoint { child, to } => self.repoint(child, to),
            ChainStep::Remove { layers } => self.files.remove(layers, |_| None),
            ChainStep::Unname { layer } => self.files.unname(layer),
            ChainStep::Clone { files, content, virtual_size, keep } => {
                self.clone_disk(files, content, *virtual_size, keep.as_deref())
            }
            ChainStep::PublishClones { places } => clones::publish_clones(places),
        }
    }

    /// Undoes `step`.
    pub(crate) fn undo(&self, step: &ChainStep) -> Result<()> {
        let path = self.files.record.disk.path();
        match step {
            // A hypervisor may have it open by this name.
            ChainStep::NameLayer { layer } if self.files.is_open(&self.files.file(layer))? => Ok(()),
            ChainStep::NameLayer { layer } => self.files.unname(layer),
            ChainStep::CreateOverlay { layer, .. } | ChainStep::Materialise { layer, .. } => {
                let file = self.files.file(layer);
                names::remove_name(&names::unfinished_name(&file))?;
                // If the switch to the layer could not be undone, the layer stays too.
                if self.is_made_by(step)? && !names::same_file(&file, path)? {
                    self.files.refuse_in_use(&file)?;
                    names::remove_name(&file)?;
                }
                names::flush_directory_of(&file)
            }
            ChainStep::TakeInternal { layer, tag } => self.drop_tags(layer, &[Tag::new(tag)], false),
            ChainStep::SwitchActive { from, to } => self.files.undo_switch(from, to),
            ChainStep::ApplyInternal { layer, safety: Some(safety), .. } => {
                let safety = Tag::new(safety);
                match self.has_tag(layer, &safety)? {
                    true => self.apply_tag(layer, &safety),
                    false => Ok(()), // The copy comes first, so the apply never began.
                }
            }
            // A step without a safety copy: the state that was there before is not needed.
            ChainStep::ApplyInternal { layer, safety: None, .. } => {
                self.mend(layer);
                Ok(())
            }
            ChainStep::Clone { files, .. } => files.undo(&[]),
            ChainStep::PublishClones { places } => clones::unpublish_clones(places),
            ChainStep::DropInternal { .. }
            | ChainStep::ForgetInternal { .. }
            | ChainStep::Merge { .. }
            | ChainStep::Repoint { .. }
            | ChainStep::Remove { .. }
            | ChainStep::Unname { .. } => Err(Error::new(
                ErrorKind::Internal,
                format!("the step {step:?} runs after the commit point only"),
            )),
        }
    }

    /// Returns how far `step` got.
    pub(crate) fn status(&self, step: &ChainStep) -> Result<StepStatus> {
        let path = self.files.record.disk.path();
        let done = match step {
            ChainStep::NameLayer { layer } => names::same_file(path, &self.files.file(layer))?,
            ChainStep::CreateOverlay { layer, .. } | ChainStep::Materialise { layer, .. } => {
                let unfinished = names::unfinished_name(&self.files.file(layer));
                if names::file_id(&unfinished)?.is_some() {
                    return Ok(StepStatus::Partly);
                }
                self.is_made_by(step)?
            }
            ChainStep::TakeInternal { layer, tag } => self.has_tag(layer, &Tag::new(tag))?,
            ChainStep::SwitchActive { to, .. } => names::same_file(path, &self.files.file(to))?,
            ChainStep::ApplyInternal { layer, tag, .. } => {
                let image = self.reading(layer)?;
                has_tag(&image, tag)? && image.snapshot_matches_active(&tag.name)?
            }
            ChainStep::DropInternal { layer, tags } | ChainStep::ForgetInternal { layer, tags } => {
                let mut left = 0;
                for tag in tags {
                    left += usize::from(self.has_tag(layer, tag)?);
                }
                match left {
                    0 => true,
                    left if left == tags.len() => false,
                    _ => return Ok(StepStatus::Partly),
                }
            }
            // Only a repetition can show it, and it is harmless.
            ChainStep::Merge { .. } => return Ok(StepStatus::Partly),
            ChainStep::Repoint { child, to } => {
                let file = file_of(self.files.record, child)?;
                match self.reading(child)?.header().backing.clone() {
                    Some(backing) => {
                        names::same_file(&resolve_backing(&file, &backing.file)?, &self.files.file(to))?
                    }
                    None => false,
                }
            }
            ChainStep::Remove { layers } => return self.files.removed(layers),
            ChainStep::Unname { layer } => names::file_id(&self.files.file(layer))?.is_none(),
            ChainStep::Clone { files, .. } => return files.status(),
            ChainStep::PublishClones { places } => return clones::clones_published(places),
        };
        Ok(if done { StepStatus::Done } else { StepStatus::NotDone })
    }

    pub(crate) fn reading(&self, layer: &LayerName) -> Result<Image> {
        let file = file_of(self.files.record, layer)?;
        Ok(Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?)
    }

    /// The backing string of an image on `layer`.
    fn string(&self, layer: &LayerName) -> String {
        backing_string(self.files.record.disk.path(), layer)
    }

    /// Returns true if a hypervisor merged the active layer into a lower one and moved the path at the pivot,
    /// before a crash prevented its record. The domain has written to that layer since. Merging the previous
    /// active layer once more would bring its old data back. (At rest the path is moved by a step of its own,
    /// after the merge is recorded.)
    fn has_pivoted(&self, run: &[LayerName], into: &LayerName) -> Result<bool> {
        Ok(self.files.merges_active_down(run, into) && self.files.is_named_by_path(into)?)
    }

    fn writing(&self, layer: &LayerName) -> Result<Image> {
        let file = file_of(self.files.record, layer)?;
        self.files.refuse_open(&file)?;
        let options = writing(self.files.locks, &file)?;
        let options = if self.punch { options } else { options.without_punching() };
        Ok(Image::open(file.as_std_path(), &options)?)
    }

    pub(crate) fn has_tag(&self, layer: &LayerName, tag: &Tag) -> Result<bool> {
        has_tag(&self.reading(layer)?, tag)
    }

    /// Returns true if the file of a new layer is the one that `step` makes, and not another file of the same
    /// name.
    pub(crate) fn is_made_by(&self, step: &ChainStep) -> Result<bool> {
        let (layer, on) = match step {
            ChainStep::CreateOverlay { layer, on, .. } => (layer, Some(self.files.file(on))),
            ChainStep::Materialise { layer, from, .. } => (layer, self.below(from)?),
            _ => return Ok(false),
        };
        let file = self.files.file(layer);
        if names::file_id(&file)?.is_none() {
            return Ok(false);
        }
        let Some(header) = image::probe(file.as_std_path())? else { return Ok(false) };
        match (header.backing, on) {
            (Some(backing), Some(on)) => names::same_file(&resolve_backing(&file, &backing.file)?, &on),
            (None, None) => Ok(true),
            _ => Ok(false),
        }
    }

    /// Returns the backing file of a layer.
    pub(crate) fn below(&self, layer: &LayerName) -> Result<Option<Utf8PathBuf>> {
        let file = file_of(self.files.record, layer)?;
        match self.reading(layer)?.header().backing.clone() {
            Some(backing) => Ok(Some(resolve_backing(&file, &backing.file)?)),
            None => Ok(None),
        }
    }

    /// Creates an overlay. New files are made under a temporary name, and get their own name when they are
    /// complete and durable.
    fn create_overlay(&self, layer: &LayerName, on: &LayerName, on_format: &str, size: u64) -> Result<()> {
        let file = self.files.file(layer);
        let base = self.files.file(on);
        let mut new =
            NewImage::new(size).on(Backing { file: self.string(on), format: Some(on_format.to_owned()) });
        if on_format == "qcow2" {
            let base = Image::open(base.as_std_path(), &OpenOptions::read_only().unlocked())?;
            new = new.like(base.header());
            // Only version 3 can mark a cluster above a backing file as zeros.
            new.version = 3;
        }
        let (made, ()) = names::write_unfinished(&file, &base, |into, passing| {
            Ok::<_, Error>(image::write_into(into, passing.as_std_path(), &new)?)
        })?;
        publish(&names::unfinished_name(&file), &file, Some(&made))?;
        self.files.lock(&file)
    }

    fn materialise(&self, from: &LayerName, tag: &Tag, layer: &LayerName) -> Result<()> {
        let file = self.files.file(layer);
        let unfinished = names::unfinished_name(&file);
        names::remove_name(&unfinished)?;
        let source = file_of(self.files.record, from)?;
        let image = Image::open(source.as_std_path(), &OpenOptions::read_only().unlocked())?;
        require_tag(&image, &source, tag)?;
        self.moving(|moving| image::materialise(&image, &tag.name, unfinished.as_std_path(), moving))?;
        publish(&unfinished, &file, None)?;
        self.files.lock(&file)
    }

    pub(crate) fn take(&self, layer: &LayerName, tag: &str) -> Result<()> {
        let mut image = self.writing(layer)?;
        if image.find_snapshot(tag)?.is_none() {
            image.create_snapshot(&new_snapshot(tag))?;
        }
        Ok(())
    }

    fn apply_tag(&self, layer: &LayerName, tag: &Tag) -> Result<()> {
        let file = file_of(self.files.record, layer)?;
        self.files.refuse_open(&file)?;
        let image = self.reading(layer)?;
        require_tag(&image, &file, tag)?;
        if image.snapshot_matches_active(&tag.name)? {
            self.mend(layer);
            return Ok(());
        }
        let mut image = self.writing(layer)?;
        // Asked once more of what is written: the first answer was read without a lock.
        require_tag(&image, &file, tag)?;
        image.apply_snapshot(&tag.name)?;
        drop(image);
        self.mend_if_resumed(layer)
    }

    /// Deletes tags. With `forget`, what they refer to is not freed. A tag that another program has deleted
    /// is done; one that it made in its place is not ours to delete.
    fn drop_tags(&self, layer: &LayerName, tags: &[Tag], forget: bool) -> Result<()> {
        if present(&self.reading(layer)?, tags)?.is_empty() {
            self.mend(layer);
            return Ok(());
        }
        let mut image = self.writing(layer)?;
        let present = present(&image, tags)?;
        if forget {
            image.forget_snapshots(&present)?;
            return Ok(());
        }
        image.delete_snapshots(&present)?;
        drop(image);
        self.mend_if_resumed(layer)
    }

    /// Frees what a crash or a failed call may have left of a step that is done, or was never begun: leaked
    /// clusters, and clear COPIED bits. This is an optimisation, because the image is valid without it. So
    /// its errors are not this step's to report, and must not keep an undo from ending. It is tried twice, so
    /// that one more failed call does not decide.
    fn mend(&self, layer: &LayerName) {
        for _ in 0..2 {
            match self.writing(layer).and_then(|mut image| Ok(image.repair()?)) {
                Ok(_) => return,
                Err(error) => tracing::warn!(%layer, %error, "what a stopped step left is not given back"),
            }
        }
    }

    /// After a crash, frees what the interrupted step allocated in `layer` and nothing refers to.
    fn mend_if_resumed(&self, layer: &LayerName) -> Result<()> {
        if self.resumed && !self.files.is_open(&file_of(self.files.record, layer)?)? {
            self.mend(layer);
        }
        Ok(())
    }

    fn merge(&self, run: &[LayerName], into: &LayerName, below: Option<&LayerName>) -> Result<()> {
        let mut files = Vec::new();
        for layer in run {
            files.push(file_of(self.files.record, layer)?);
        }
        let Some(index) = run.iter().position(|layer| layer == into) else {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("{into} is not in the run that is merged into it"),
            ));
        };
        let Some(bottom) = run.first() else { return Ok(()) };
        // The run's bottom states the format of its backing file.
        let stated = self.reading(bottom)?.header().backing.clone();
        let mut lower = None;
        let backing = match (below, stated) {
            (Some(name), Some(Backing { format: Some(format), .. })) => {
                lower = Some(Below::new(
                    self.files.file(name),
                    format.clone(),
                    self.max_depth,
                    self.bases.clone(),
                ));
                Some(Backing { file: self.string(name), format: Some(format) })
            }
            (None, None) => None,
            (expected, found) => {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!(
                        "the backing file of {bottom} should be {expected:?}, and its header says {found:?}"
                    ),
                )
                .advise("run 'domsnap check'"));
            }
        };
        for file in &files {
            self.files.lock(file)?;
        }
        names::require_own_names(&file_of(self.files.record, into)?, self.files.record.disk.path())?;
        // An interrupted merge may have allocated clusters that no table refers to yet. They are freed first,
        // because this merge may need their space.
        self.mend_if_resumed(into)?;
        let mut layers = Vec::new();
        for file in &files {
            let image = Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?;
            layers.push(RunLayer::active(&image)?);
        }
        let over = layers.split_off(index + 1);
        layers.truncate(index);
        let mut target = self.writing(into)?;
        let lower =
            backing.zip(lower.as_mut()).map(|(backing, reader)| image::RunBacking { backing, reader });
        let merged = self.moving(|moving| image::merge(layers, &mut target, over, lower, moving));
        drop(target);
        if merged.is_err() {
            // Frees clusters that no table refers to yet; the next attempt allocates its own.
            self.mend(into);
        }
        merged.map(drop)
    }

    /// Moves data, and reports progress.
    pub(crate) fn moving<T>(&self, work: impl FnOnce(&image::Moving<'_>) -> image::Result<T>) -> Result<T> {
        Ok(image::Moving::reported(self.progress, self.bytes, &|| self.cancel.is_cancelled(), work)?)
    }

    fn repoint(&self, child: &LayerName, to: &LayerName) -> Result<()> {
        let backing = Backing { file: self.string(to), format: Some("qcow2".to_owned()) };
        Ok(self.writing(child)?.set_backing(Some(backing))?)
    }
}

/// Gives a new image its own name. If that exists and is exactly the same image, the step was done before.
/// Any other file there belongs to another program, or has been written to, and is not overwritten.
fn publish(unfinished: &Utf8Path, file: &Utf8Path, made: Option<&File>) -> Result<()> {
    match names::publish(unfinished, file, made) {
        Err(error)
            if error.kind() == ErrorKind::Exists && is_same_image(unfinished, file).unwrap_or(false) =>
        {
            names::remove_name(unfinished)?;
            names::flush_directory_of(file)
        }
        published => published,
    }
}

fn is_same_image(one: &Utf8Path, other: &Utf8Path) -> Result<bool> {
    let open = |file: &Utf8Path| Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked());
    let (one, other) = (open(one)?, open(other)?);
    let backing = one.header().backing.clone();
    if backing != other.header().backing || !one.snapshots()?.is_empty() || !other.snapshots()?.is_empty() {
        return Ok(false);
    }
    let (one, other) = (image::RunLayer::active(&one)?, image::RunLayer::active(&other)?);
    Ok(image::same_content(one, other, backing.is_some())?)
}

/// Returns the options to open the image at `file` for writing under `locks`, or with a lock of its own
/// without one.
fn writing(locks: Option<&ImageLocks>, file: &Utf8Path) -> Result<OpenOptions> {
    match locks {
        Some(locks) => {
            locks.lock(file)?;
            Ok(OpenOptions::read_write().unlocked())
        }
        None => Ok(OpenOptions::read_write()),
    }
}

/// An internal snapshot of this moment.
pub(crate) fn new_snapshot(tag: &str) -> NewSnapshot {
    let now = Timestamp::now();
    let seconds = u32::try_from(now.as_second()).unwrap_or(u32::MAX);
    let nanoseconds = u32::try_from(now.subsec_nanosecond()).unwrap_or(0);
    NewSnapshot::new(tag, seconds, nanoseconds)
}
