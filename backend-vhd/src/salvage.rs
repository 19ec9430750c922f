//! Salvage of data that the domain wrote between a crash and the recovery: it is found and saved. The cases
//! are those of a chain without internal snapshots, as `backend-qcow2` describes them.
//!
//! **What is durable before what.** The other name of a file is durable before the undo that would lose the
//! content. A repeated merge is durable before the path is moved. The move of the path is durable before the
//! merged layers are removed.

use image_files::chain::ChainStep;
use snapcore::backend::Salvage;
use snapcore::{LayerName, Result};

use crate::layers::{file_of, reading};
use crate::steps::StepRunner;

impl StepRunner<'_> {
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
                Ok(self.files.stays_active(to))
            }
            ChainStep::CreateOverlay { layer, format: Some(_), .. } => self.qcow2(layer).salvage(done),
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
        self.files.save_layer(layer, self.below(layer).unwrap_or(None), "vhd")
    }
}
