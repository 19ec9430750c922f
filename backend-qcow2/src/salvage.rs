//! Salvage of data that the domain wrote between a crash and the recovery: it is found and saved.
//!
//! A user who starts a domain need not know that an operation was interrupted. The configured path is valid
//! at every point, and the domain writes to the layer that it names. A recovery must not lose that.
//!
//! | the path names | the operation | what was written |
//! |---|---|---|
//! | the previous active layer | is undone | stays where it is: nothing there is undone |
//! | a new overlay on the previous active layer | a create, undone | stays, and so do overlay and switch |
//! | a new overlay elsewhere, a tag's copy | a revert, undone | the file is saved as `rescued-<layer>` |
//! | a layer in which a tag was applied | a revert, undone | is saved as the tag `rescued-<...>` of that layer |
//! | the previous active layer | a merge down, carried through | is merged too: the merge is repeated before the switch |
//! | any other | is carried through | stays where it is: nothing there is changed any more |
//!
//! **What is durable before what.** The other name of a file, or the tag, is durable before the undo that
//! would lose the content. A repeated merge is durable before the path is moved. The move of the path is
//! durable before the merged layers are removed. So at every point the configured path shows where the domain
//! has written: if it names the previous active layer, there.
//!
//! Whether anything was written is read from the images, by comparison with what the steps had made.

use image_files::chain::{ChainStep, Tag};
use image_files::{RESCUED, names};
use snapcore::backend::Salvage;
use snapcore::{LayerName, Result, shell_command};

use crate::image::{self, RunLayer};
use crate::layers::file_of;
use crate::steps::StepRunner;
use crate::tags::has_tag;

impl StepRunner<'_> {
    /// Saves what the domain wrote, if undoing `step` would lose it.
    pub(crate) fn salvage(&self, step: &ChainStep, done: bool) -> Result<Salvage> {
        let path = self.files.record.disk.path();
        match step {
            ChainStep::SwitchActive { from, to } => {
                // An overlay on the previous active layer shows the same as that layer. With the new writes
                // it is the current state.
                let switched = names::same_file(&self.files.file(to), path)?;
                if !switched
                    || self.below(to)? != Some(self.files.file(from))
                    || !self.reading(to)?.is_written()?
                {
                    return Ok(Salvage::Nothing);
                }
                Ok(self.files.stays_active(to))
            }
            ChainStep::CreateOverlay { layer, .. } => match self.is_to_go(step, layer, done)? {
                true if self.reading(layer)?.is_written()? => self.save_layer(layer),
                _ => Ok(Salvage::Nothing),
            },
            // A copy that cannot be compared is saved: it may have been written.
            ChainStep::Materialise { from, tag, layer } => match self.is_to_go(step, layer, done)? {
                true if !self.is_copy_of(layer, from, tag).unwrap_or(false) => self.save_layer(layer),
                _ => Ok(Salvage::Nothing),
            },
            ChainStep::ApplyInternal { layer, tag, safety: Some(safety) } => {
                if !self.has_tag(layer, &Tag::new(safety))? {
                    return Ok(Salvage::Nothing);
                }
                let image = self.reading(layer)?;
                if image.snapshot_matches_active(&tag.name)? || image.snapshot_matches_active(safety)? {
                    return Ok(Salvage::Nothing);
                }
                let stem = safety.strip_prefix(".domsnap-undo-").unwrap_or(safety);
                self.keep_as_tag(layer, stem)
            }
            // Before the step was done, the state there was not needed. Since then only the domain can have
            // changed it.
            ChainStep::ApplyInternal { layer, tag, safety: None } => {
                let unchanged = |image: image::Image| image.snapshot_matches_active(&tag.name);
                if !done || !self.has_tag(layer, tag)? || unchanged(self.reading(layer)?)? {
                    return Ok(Salvage::Nothing);
                }
                self.keep_as_tag(layer, &tag.name)
            }
            ChainStep::NameLayer { .. }
            | ChainStep::TakeInternal { .. }
            | ChainStep::DropInternal { .. }
            | ChainStep::ForgetInternal { .. }
            | ChainStep::Merge { .. }
            | ChainStep::Repoint { .. }
            | ChainStep::Remove { .. }
            | ChainStep::Unname { .. }
            | ChainStep::Clone { .. }
            | ChainStep::PublishClones { .. } => Ok(Salvage::Nothing),
        }
    }

    /// Returns true if the undo of `step`, which made `layer`, would remove it although the domain may have
    /// written it.
    fn is_to_go(&self, step: &ChainStep, layer: &LayerName, done: bool) -> Result<bool> {
        Ok(done
            && self.is_made_by(step)?
            && !names::same_file(&self.files.file(layer), self.files.record.disk.path())?)
    }

    /// Returns true if `copy` is still the same as what was copied out of `from`.
    fn is_copy_of(&self, copy: &LayerName, from: &LayerName, tag: &Tag) -> Result<bool> {
        let (copy, source) = (self.reading(copy)?, self.reading(from)?);
        let Some(snapshot) = source.find_snapshot(&tag.name)? else { return Ok(false) };
        if !has_tag(&source, tag)? || !copy.snapshots()?.is_empty() {
            return Ok(false);
        }
        let backed = source.header().backing.is_some();
        Ok(image::same_content(RunLayer::snapshot(&source, snapshot)?, RunLayer::active(&copy)?, backed)?)
    }

    /// Gives the file of a layer that an undo would remove a name that no undo knows.
    fn save_layer(&self, layer: &LayerName) -> Result<Salvage> {
        self.files.save_layer(layer, self.below(layer).unwrap_or(None), "qcow2")
    }

    /// Saves the state of a layer as a tag of it, called after `stem`. If that was done before, the existing
    /// tag is reported.
    fn keep_as_tag(&self, layer: &LayerName, stem: &str) -> Result<Salvage> {
        let image = self.reading(layer)?;
        let mut aside = format!("{RESCUED}{stem}");
        let mut number = 1;
        while image.find_snapshot(&aside)?.is_some() && !image.snapshot_matches_active(&aside)? {
            number += 1;
            aside = format!("{RESCUED}{stem}-{number}");
        }
        drop(image);
        self.take(layer, &aside)?;
        let file = file_of(self.files.record, layer)?;
        Ok(Salvage::Saved(format!(
            "{}: the domain ran after the crash; the revert was undone, and what the domain wrote is kept as the internal \
             snapshot {aside} of {file}: `{}` copies it out, `{}` removes it",
            self.files.record.disk.target,
            shell_command([
                "qemu-img",
                "convert",
                "-O",
                "qcow2",
                "-l",
                &format!("snapshot.name={aside}"),
                file.as_str(),
                "NEW"
            ]),
            shell_command(["qemu-img", "snapshot", "-d", &aside, file.as_str()])
        )))
    }
}
