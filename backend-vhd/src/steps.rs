//! Execution of a chain's steps on VHD images. Blocking; called on a blocking thread.
//!
//! | step | durable before what |
//! |---|---|
//! | name a layer | the second name, before any child refers to it |
//! | create a child | the whole file under a temporary name, before its own name; that, before the switch |
//! | switch | the new name, by one rename; the previous layer keeps its own name |
//! | merge | all data and metadata of the receiving image, before anything else refers to it |
//! | repoint | one write of the first page |
//! | remove, unname | nothing follows that depends on it |
//! | clone, publish clones | see [`image_files::clones`] |

use std::os::unix::fs::MetadataExt;

use backend_qcow2::NewOverlay;
use camino::{Utf8Path, Utf8PathBuf};
use image_files::chain::ChainStep;
use image_files::{FileSteps, clones, names};
use snapcore::backend::{Progress, StepStatus};
use snapcore::{Error, ErrorKind, LayerName, Result};
use tokio_util::sync::CancellationToken;

use crate::image::{self, Chain, Layer, Moving, NewImage, OpenOptions, ParentName, TimeStamp, UniqueId, Vhd};
use crate::layers::{Limits, file_of, parent_of, reading};

/// The context of a step.
pub(crate) struct StepRunner<'a> {
    pub(crate) files: FileSteps<'a>,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) cancel: &'a CancellationToken,
    /// Planned bytes that the step will move.
    pub(crate) bytes: u64,
    pub(crate) limits: &'a Limits,
    /// True if a process that stopped may have begun the step.
    pub(crate) resumed: bool,
}

impl StepRunner<'_> {
    /// Performs `step`.
    pub(crate) fn apply(&self, step: &ChainStep) -> Result<()> {
        match step {
            ChainStep::NameLayer { layer } => self.files.name(layer),
            ChainStep::CreateOverlay { layer, on_format, virtual_size, format: Some(_), .. } => {
                self.qcow2(layer).create(on_format, *virtual_size)
            }
            ChainStep::CreateOverlay { layer, on, on_format, virtual_size, format: None } => {
                self.create_child(layer, on, on_format, *virtual_size)
            }
            ChainStep::SwitchActive { from, to } => self.files.switch(from, to),
            ChainStep::Merge { run, into, below } => self.merge(run, into, below.as_ref()),
            ChainStep::Repoint { child, to } => self.repoint(child, to),
            ChainStep::Remove { layers } => self.files.remove(layers, |_| None),
            ChainStep::Unname { layer } => self.files.unname(layer),
            ChainStep::Clone { files, content, virtual_size, keep: _ } => {
                self.clone_disk(files, content, *virtual_size)
            }
            ChainStep::PublishClones { places } => clones::publish_clones(places),
            internal => Err(no_internal(internal)),
        }
    }

    /// Undoes `step`.
    pub(crate) fn undo(&self, step: &ChainStep) -> Result<()> {
        match step {
            ChainStep::NameLayer { layer } => self.files.unname(layer),
            ChainStep::CreateOverlay { layer, format: Some(_), .. } => self.qcow2(layer).undo(),
            ChainStep::CreateOverlay { layer, .. } => {
                let file = self.files.file(layer);
                names::remove_name(&names::unfinished_name(&file))?;
                // If the switch to the layer could not be undone, the layer stays too.
                if self.is_made_by(step)? && !self.files.is_named_by_path(layer)? {
                    self.files.refuse_in_use(&file)?;
                    names::remove_name(&file)?;
                }
                names::flush_directory_of(&file)
            }
            ChainStep::SwitchActive { from, to } => self.files.undo_switch(from, to),
            ChainStep::Clone { files, .. } => files.undo(&[]),
            ChainStep::PublishClones { places } => clones::unpublish_clones(places),
            after => Err(Error::new(
                ErrorKind::Internal,
                format!("the step {after:?} runs after the commit point only"),
            )),
        }
    }

    /// Returns how far `step` got.
    pub(crate) fn status(&self, step: &ChainStep) -> Result<StepStatus> {
        let done = match step {
            ChainStep::NameLayer { layer } => self.files.is_named_by_path(layer)?,
            ChainStep::CreateOverlay { layer, format: Some(_), .. } => return self.qcow2(layer).status(),
            ChainStep::CreateOverlay { layer, .. } => {
                let unfinished = names::unfinished_name(&self.files.file(layer));
                if names::file_id(&unfinished)?.is_some() {
                    return Ok(StepStatus::Partly);
                }
                self.is_made_by(step)?
            }
            ChainStep::SwitchActive { to, .. } => self.files.is_named_by_path(to)?,
            // Only a repetition can show it, and it is harmless.
            ChainStep::Merge { .. } => return Ok(StepStatus::Partly),
            ChainStep::Repoint { child, to } => {
                let child = reading(&file_of(self.files.record, child)?)?;
                child.parent_id() == Some(self.parent_name(to, false)?.id)
            }
            ChainStep::Remove { layers } => return self.files.removed(layers),
            ChainStep::Unname { layer } => !self.files.is_there(layer)?,
            ChainStep::Clone { files, .. } => return files.status(),
            ChainStep::PublishClones { places } => return clones::clones_published(places),
            internal => return Err(no_internal(internal)),
        };
        Ok(if done { StepStatus::Done } else { StepStatus::NotDone })
    }

    /// Returns true if the file of a new layer is the one that `step` makes, and not another file of the same
    /// name.
    pub(crate) fn is_made_by(&self, step: &ChainStep) -> Result<bool> {
        let ChainStep::CreateOverlay { layer, on, on_format, .. } = step else { return Ok(false) };
        let file = self.files.file(layer);
        if names::file_id(&file)?.is_none() {
            return Ok(false);
        }
        let Ok(made) = reading(&file) else { return Ok(false) };
        Ok(made.parent_id() == Some(self.parent_name(on, on_format == "raw")?.id))
    }

    /// The qcow2 overlay that a disk goes on in, as a disk of that format.
    pub(crate) fn qcow2<'a>(&'a self, layer: &'a LayerName) -> NewOverlay<'a> {
        NewOverlay { files: &self.files, layer }
    }

    /// The file below a layer.
    pub(crate) fn below(&self, layer: &LayerName) -> Result<Option<Utf8PathBuf>> {
        let file = file_of(self.files.record, layer)?;
        Ok(parent_of(&reading(&file)?, &file, self.limits)?.map(|(path, _)| path))
    }

    /// Describes a layer as the parent of another.
    fn parent_name(&self, layer: &LayerName, is_raw: bool) -> Result<ParentName> {
        parent_name(self.files.path(), &file_of(self.files.record, layer)?, layer, is_raw)
    }

    /// Creates a child. New files are made under a temporary name, and get their own name when they are
    /// complete and durable.
    fn create_child(&self, layer: &LayerName, on: &LayerName, on_format: &str, size: u64) -> Result<()> {
        let file = self.files.file(layer);
        let base = file_of(self.files.record, on)?;
        let parent = self.parent_name(on, on_format == "raw")?;
        // A repetition finds its own child complete: empty, and on the same parent.
        let step = ChainStep::CreateOverlay {
            layer: layer.clone(),
            on: on.clone(),
            on_format: on_format.to_owned(),
            virtual_size: size,
            format: None,
        };
        if self.is_made_by(&step)? && !self.is_written(layer)? {
            names::remove_name(&names::unfinished_name(&file))?;
            names::flush_directory_of(&file)?;
            return self.files.lock(&file);
        }
        write_child(&file, &base, &NewImage::new(size).on(parent))?;
        self.files.lock(&file)
    }

    /// Opens a layer for writing, under the lock of the operation.
    fn writing(&self, layer: &LayerName) -> Result<Vhd> {
        let file = file_of(self.files.record, layer)?;
        self.files.refuse_open(&file)?;
        let mut options = OpenOptions::read_write();
        if self.files.locks.is_some() {
            self.files.lock(&file)?;
            options = options.unlocked();
        }
        let image = Vhd::open(file.as_std_path(), &options)?;
        Ok(if self.resumed { image.resume()? } else { image })
    }

    fn merge(&self, run: &[LayerName], into: &LayerName, below: Option<&LayerName>) -> Result<()> {
        let Some(index) = run.iter().position(|layer| layer == into) else {
            return Err(Error::new(
                ErrorKind::Internal,
                format!("{into} is not in the run that is merged into it"),
            ));
        };
        let Some(bottom) = run.first() else { return Ok(()) };
        let stated = {
            let file = file_of(self.files.record, bottom)?;
            parent_of(&reading(&file)?, &file, self.limits)?
        };
        let parent = match (below, &stated) {
            (Some(name), Some((file, format)))
                if names::same_file(&file_of(self.files.record, name)?, file)? =>
            {
                Some(self.parent_name(name, format == "raw")?)
            }
            (None, None) => None,
            (expected, found) => {
                return Err(Error::new(
                    ErrorKind::Corrupt,
                    format!("the parent of {bottom} should be {expected:?}, and it is {found:?}"),
                )
                .advise("run 'domsnap check'"));
            }
        };
        for layer in run {
            self.files.lock(&file_of(self.files.record, layer)?)?;
        }
        names::require_own_names(&file_of(self.files.record, into)?, self.files.path())?;
        let mut layers = Vec::new();
        for (number, layer) in run.iter().enumerate() {
            let opened = match number == index {
                true => self.writing(layer)?,
                false => reading(&file_of(self.files.record, layer)?)?,
            };
            layers.push(Layer::Vhd(Box::new(opened)));
        }
        let mut chain = Chain::new(layers)?;
        let merge = |moving: &Moving<'_>| image::merge(&mut chain, index, parent.as_ref(), moving);
        Moving::reported(self.progress, self.bytes, &|| self.cancel.is_cancelled(), merge)?;
        Ok(())
    }

    fn repoint(&self, child: &LayerName, to: &LayerName) -> Result<()> {
        let parent = self.parent_name(to, false)?;
        Ok(self.writing(child)?.set_parent(&parent)?)
    }
}

/// Writes a new image, with the attributes of its parent. It gets its name when it is complete and durable.
///
/// # Errors
/// [`ErrorKind::Exists`]; the system's.
pub fn write_child(file: &Utf8Path, parent: &Utf8Path, new: &NewImage) -> Result<()> {
    names::write_new(file, parent, |into, passing| Ok(image::write_into(into, passing.as_std_path(), new)?))
}

/// Describes the image `file` as the parent of a layer of the disk at `path`.
pub(crate) fn parent_name(
    path: &Utf8Path,
    file: &Utf8Path,
    layer: &LayerName,
    is_raw: bool,
) -> Result<ParentName> {
    let id = if is_raw { UniqueId::NULL } else { reading(file)?.id() };
    if !is_raw && id.is_null() {
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!(
                "{file} has a null unique id, and no image can be made on it: the id would mean a raw parent"
            ),
        )
        .advise("copy it to a new image with `domsnap disk materialise`"));
    }
    let about =
        std::fs::metadata(file).map_err(|error| names::io_error(error, format!("cannot look at {file}")))?;
    let relative = match layer.as_str().contains('/') {
        false => layer.as_str().to_owned(),
        true => relative_to(path.parent().unwrap_or(Utf8Path::new("/")), Utf8Path::new(layer.as_str())),
    };
    let name = Utf8Path::new(layer.as_str()).file_name().unwrap_or_default().to_owned();
    Ok(ParentName { id, time: TimeStamp::from_unix(about.mtime()), name, relative })
}

/// Describes the image at `parent` as the parent of the one at `child`.
///
/// # Errors
/// [`ErrorKind::Unsupported`] for an image that cannot be a parent; those of the image.
pub fn parent_name_for(child: &Utf8Path, parent: &Utf8Path) -> Result<ParentName> {
    parent_name(child, parent, &LayerName(parent.to_string()), false)
}

/// The path of `file` from `directory`: up as far as needed, and down again.
fn relative_to(directory: &Utf8Path, file: &Utf8Path) -> String {
    let real = |path: &Utf8Path| path.canonicalize_utf8().unwrap_or_else(|_| path.to_owned());
    let (from, to) = (real(directory), real(file));
    let common = from.components().zip(to.components()).take_while(|(a, b)| a == b).count();
    let up = from.components().skip(common).map(|_| "..");
    let down = to.components().skip(common);
    let parts: Vec<String> = up.map(str::to_owned).chain(down.map(|part| part.to_string())).collect();
    parts.join("/")
}

fn no_internal(step: &ChainStep) -> Error {
    Error::new(
        ErrorKind::Internal,
        format!("VHD has no internal snapshots, and the step {step:?} needs them"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_path_goes_up_and_down() {
        let path = |text| relative_to(Utf8Path::new("/nowhere/vm/web"), Utf8Path::new(text));
        assert_eq!(path("/nowhere/vm/gold/base.vhd"), "../gold/base.vhd");
        assert_eq!(path("/nowhere/vm/web/base.vhd"), "base.vhd");
    }
}
