//! Steps on images that a hypervisor has open. The hypervisor performs them.
//!
//! **What is durable before what.** A merge of the active image into a lower one moves the configured path at
//! the pivot. At this point both images show the same, and the guest's writes wait. The path is moved, and
//! its directory flushed, before the guest writes to the lower image. From then on the merge is only carried
//! through. If the path cannot be moved, it is moved back before the hypervisor continues with the upper
//! image.

use async_trait::async_trait;
use camino::Utf8PathBuf;
use image_files::FileIds;
use image_files::chain::ChainStep;
use image_files::layer_name::layer_path;
use image_files::names::{self, file_id, same_file};
use snapcore::backend::StepContext;
use snapcore::hypervisor::{AttachedDisk, AttachedMerge, Inside};
use snapcore::{Error, ErrorKind, LayerName, Result, Target};
use tokio_util::sync::CancellationToken;

use crate::backing_string::{backing_string, resolve_backing};
use crate::image::{Image, OpenOptions};
use crate::layers::file_of;
use crate::tags::present;

/// Performs `action` through the hypervisor if it has the images open (`open`). Returns `false` if the step
/// must be done like at rest.
pub(crate) async fn apply(
    disk: &dyn AttachedDisk,
    open: &FileIds,
    action: &ChainStep,
    context: StepContext<'_>,
) -> Result<bool> {
    let path = context.disk.disk.path();
    let file = |layer: &LayerName| file_of(context.disk, layer);
    let is_open = |layer: &LayerName| -> Result<bool> {
        Ok(file_id(&file(layer)?)?.is_some_and(|id| open.contains(&id)))
    };
    match action {
        ChainStep::Merge { run, into, below } => {
            let mut files = Vec::new();
            let mut any_open = false;
            for layer in run {
                files.push(file(layer)?);
                any_open |= is_open(layer)?;
            }
            // If the merge was done before and only not recorded, the hypervisor has only the receiving image
            // open, and reports that.
            if !any_open {
                return Ok(false);
            }
            let is_top = run.last() == Some(into);
            let named = if is_top { below.as_ref() } else { Some(into) };
            let merge = AttachedMerge::new(files, file(into)?)
                .below(below.as_ref().map(file).transpose()?)
                .string(named.map(|layer| backing_string(path, layer)));
            names::require_own_names(&merge.into, path)?;
            let top = run.last().filter(|top| **top == context.disk.active && !is_top);
            match top.map(|top| layer_path(path, top)) {
                // With `--active-path=new` the path is the layer's own name and different after each change:
                // it is not moved.
                Some(from) if from != path => {
                    let pivot =
                        Pivot { inside: context.inside, path: path.to_owned(), from, to: merge.into.clone() };
                    // A crash came after the move. The guest's writes wait for the end of the merge, so it
                    // must not be cancelled.
                    let never_cancelled = CancellationToken::new();
                    let cancel = if same_file(&pivot.to, path)? { &never_cancelled } else { context.cancel };
                    let merged = disk.merge(&merge, &pivot, context.progress, cancel).await;
                    merged.map_err(|error| pivot.must_go_on(error))?;
                }
                _ => disk.merge(&merge, context.inside, context.progress, context.cancel).await?,
            }
            Ok(true)
        }
        ChainStep::DropInternal { layer, tags } if is_open(layer)? && same_file(&file(layer)?, path)? => {
            let file = file(layer)?;
            let image = Image::open(file.as_std_path(), &OpenOptions::read_only().unlocked())?;
            let names: Vec<String> = present(&image, tags)?.into_iter().map(str::to_owned).collect();
            drop(image);
            disk.drop_internal(&names).await?;
            Ok(true)
        }
        ChainStep::Repoint { child, to } if is_open(child)? => {
            let child = file(child)?;
            let image = Image::open(child.as_std_path(), &OpenOptions::read_only().unlocked())?;
            let depends_on = match &image.header().backing {
                Some(backing) => same_file(&resolve_backing(&child, &backing.file)?, &file(to)?)?,
                None => false,
            };
            if depends_on {
                return Ok(true);
            }
            Err(Error::new(
                ErrorKind::Internal,
                format!("{child} should have the backing file {to} since the merge below it, and the running domain has it open"),
            )
            .state("nothing was changed"))
        }
        _ => Ok(false),
    }
}

/// Work nested in the pivot of a merge. Afterwards the configured path names the image that the guest will
/// write to. At rest the move is a later step; for a running guest that would be too late.
struct Pivot<'a> {
    inside: &'a dyn Inside,
    path: Utf8PathBuf,
    from: Utf8PathBuf,
    to: Utf8PathBuf,
}

#[async_trait]
impl Inside for Pivot<'_> {
    async fn run(&self, only: Option<&Target>) -> Result<()> {
        let moved = match self.inside.run(only).await {
            Ok(()) if same_file(&self.to, &self.path)? => Ok(()),
            Ok(()) => names::move_name(&self.path, &self.to),
            Err(error) => Err(error),
        };
        let Err(error) = moved else { return Ok(()) };
        // The guest continues with the upper image, so the path must name it again.
        if same_file(&self.to, &self.path)?
            && let Err(second) = names::move_name(&self.path, &self.from)
        {
            let message = format!("{} could not be given back to {}: {second}", self.path, self.from);
            return Err(Error::new(ErrorKind::Io, message).because(error));
        }
        Err(error)
    }

    async fn back(&self, only: Option<&Target>) -> Result<()> {
        self.inside.back(only).await?;
        match same_file(&self.to, &self.path)? {
            true => names::move_name(&self.path, &self.from),
            false => Ok(()),
        }
    }
}

impl Pivot<'_> {
    /// Prevents that a merge is deferred after its path was moved, whatever stopped it. Until the merge is
    /// done, the guest's writes wait, or go to an image that the path does not name.
    fn must_go_on(&self, error: Error) -> Error {
        match same_file(&self.to, &self.path) {
            Ok(false) => error,
            Ok(true) | Err(_) => error
                .with_kind(ErrorKind::Internal)
                .state(format!(
                    "{} names {} already, and the merge must be carried to its end",
                    self.path, self.to
                ))
                .advise("run 'domsnap recover' while the domain runs"),
        }
    }
}
