//! Salvage of data that the domain wrote between a crash and the recovery: it is found and saved. The cases
//! are those of a chain without internal snapshots, as `backend-qcow2` describes them.
//!
//! **What is durable before what.** The other name of a file is durable before the undo that would lose the
//! content. A repeated merge is durable before the path is moved. The move of the path is durable before the
//! merged layers are removed.

use image_files::chain::ChainStep;
use image_files::{kept_layer_message, kept_overlay_message, names};
use snapcore::{Edit, LayerName, Result, Salvage};

use crate::layers::{file_of, reading};
use crate::steps::StepRunner;

impl StepRunner<'_> {
    /// Returns true if `step`, which is done, must be repeated, because the steps after it would lose what
    /// the domain may have written since.
    pub(crate) fn is_superseded(&self, step: &ChainStep) -> Result<bool> {
        let ChainStep::Merge { run, into, .. } = step else { return Ok(false) };
        let path = &self.files.record.disk.path;
        // The active layer can only be the top of a run. Once the path names the layer that it was merged
        // into, the domain writes there, and the previous top has older content.
        let merged_down = run.last().is_some_and(|top| *top == self.files.record.active && top != into);
        Ok(merged_down && names::file_id(path)?.is_some() && !self.files.is_named_by_path(into)?)
    }

    /// Saves what the domain wrote, if undoing `step` would lose it.
    pub(crate) fn salvage(&self, step: &ChainStep, done: bool) -> Result<Salvage> {
        match step {
            ChainStep::SwitchActive { from, to } => {
                // A child of the previous active layer shows the same as that layer. With the new writes it
                // is the current state.
                if !self.files.is_named_by_path(to)?
                    || self.below(to)? != Some(self.files.file(from))
                    || !self.is_written(to)?
                {
                    return Ok(Salvage::Nothing);
                }
                let target = self.files.record.disk.target.clone();
                let edits = vec![
                    Edit::AddLayer { target: target.clone(), layer: to.clone() },
                    Edit::SetActive { target: target.clone(), layer: to.clone() },
                ];
                let message = format!(
                    "{target}: the domain ran after the crash and wrote into {to}, so that stays its active layer; \
                     the snapshot was not taken"
                );
                Ok(Salvage::Stays(edits, message))
            }
            ChainStep::CreateOverlay { layer, .. } => {
                let is_to_go = done && self.is_made_by(step)? && !self.files.is_named_by_path(layer)?;
                match is_to_go && self.is_written(layer)? {
                    true => self.save_layer(layer),
                    false => Ok(Salvage::Nothing),
                }
            }
            _ => Ok(Salvage::Nothing),
        }
    }

    /// Returns true if anything was written to an image that was empty when it was made.
    pub(crate) fn is_written(&self, layer: &LayerName) -> Result<bool> {
        Ok(reading(&file_of(self.files.record, layer)?)?.is_written()?)
    }

    /// Gives the file of a layer that an undo would remove a name that no undo knows.
    fn save_layer(&self, layer: &LayerName) -> Result<Salvage> {
        let (record, file) = (self.files.record, self.files.file(layer));
        let base = self.below(layer).unwrap_or(None);
        let is_on_current =
            base.is_some_and(|base| names::same_file(&base, self.files.path()).unwrap_or(false));
        let kept = self.files.keep_as(layer)?;
        Ok(Salvage::Saved(match is_on_current {
            true => kept_overlay_message(record, &file, &kept, "vhd"),
            false => kept_layer_message(record, &file, &kept),
        }))
    }
}
