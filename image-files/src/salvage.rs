//! What a recovery saves of a chain's files: the domain may have run between the crash and the recovery, and
//! have written to the layer that the configured path named.

use camino::Utf8PathBuf;
use snapcore::backend::Salvage;
use snapcore::{Edit, LayerName, Result};

use crate::chain::ChainStep;
use crate::file_steps::{FileSteps, kept_layer_message, kept_overlay_message};
use crate::names;

impl FileSteps<'_> {
    /// Returns true if a merge into `into` merges the active layer down. It can only be the top of a run.
    pub fn merges_active_down(&self, run: &[LayerName], into: &LayerName) -> bool {
        run.last().is_some_and(|top| *top == self.record.active && top != into)
    }

    /// Returns true if `step`, which is done, must be repeated, because the steps after it would lose what
    /// the domain may have written since. Once the path names the layer that the active one was merged into,
    /// the domain writes there, and the previous top has older content.
    ///
    /// # Errors
    /// The system's.
    pub fn is_superseded(&self, step: &ChainStep) -> Result<bool> {
        let ChainStep::Merge { run, into, .. } = step else { return Ok(false) };
        Ok(self.merges_active_down(run, into)
            && names::file_id(self.path())?.is_some()
            && !self.is_named_by_path(into)?)
    }

    /// Makes a layer stay active that an undone create had switched to, since the domain wrote to it. On the
    /// previous active layer, it shows the current state.
    pub fn stays_active(&self, layer: &LayerName) -> Salvage {
        let target = self.record.disk.target.clone();
        let message = format!(
            "{target}: the domain ran after the crash and wrote into {layer}, so that stays its active layer; \
             the snapshot was not taken"
        );
        let edits = vec![
            Edit::AddLayer { target: target.clone(), layer: layer.clone() },
            Edit::SetActive { target, layer: layer.clone() },
        ];
        Salvage::Stays(edits, message)
    }

    /// Gives the file of a layer that an undo would remove a name that no undo knows. `below` is its backing
    /// file, and `format` its format.
    ///
    /// # Errors
    /// As [`FileSteps::keep_as`].
    pub fn save_layer(&self, layer: &LayerName, below: Option<Utf8PathBuf>, format: &str) -> Result<Salvage> {
        let (record, file) = (self.record, self.file(layer));
        let is_on_current = below.is_some_and(|below| names::same_file(&below, self.path()).unwrap_or(false));
        let kept = self.keep_as(layer)?;
        Ok(Salvage::Saved(match is_on_current {
            true => kept_overlay_message(record, &file, &kept, format),
            false => kept_layer_message(record, &file, &kept),
        }))
    }
}
