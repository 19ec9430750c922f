//! Steps on images that a hypervisor has open: done through it.

use std::collections::HashSet;

use camino::Utf8PathBuf;
use snapcore::chain::{ChainStep, layer_path};
use snapcore::{AttachedDisk, AttachedMerge, Error, ErrorKind, FileIdentity, LayerName, Result, StepContext};

use crate::backing_string::{backing_string, resolve_backing};
use crate::image::{Image, OpenOptions};
use crate::names::file_id;
use crate::steps::same_file;

/// Identities of files.
pub(crate) type FileIds = HashSet<FileIdentity>;

/// The files that a hypervisor has open of a disk.
pub(crate) async fn open_files(disk: Option<&dyn AttachedDisk>) -> Result<FileIds> {
    match disk {
        Some(disk) => disk.open_files().await,
        None => Ok(FileIds::new()),
    }
}

/// Does `action` through the hypervisor, where its images are `open` there; otherwise gives that it is to be done as at rest.
pub(crate) async fn apply(
    disk: &dyn AttachedDisk,
    open: &FileIds,
    action: &ChainStep,
    context: StepContext<'_>,
) -> Result<bool> {
    let path = &context.disk.disk.path;
    let file = |layer: &LayerName| layer_path(path, layer);
    let is_open = |layer: &LayerName| -> Result<bool> {
        Ok(file_id(&file(layer))?.is_some_and(|id| open.contains(&id)))
    };
    match action {
        ChainStep::Merge { run, into, below } => {
            // With a pivot behind it the hypervisor has none of the others open, unless a job waits there for its end: the
            // path was moved, and the guest's writes are held.
            let mut others_open = false;
            for layer in run.iter().filter(|layer| *layer != into) {
                others_open |= is_open(layer)?;
            }
            if !others_open {
                return Ok(false);
            }
            let run: Vec<Utf8PathBuf> = run.iter().map(file).collect();
            let is_top = run.last().is_some_and(|top| *top == file(into));
            let named = if is_top { below.as_ref() } else { Some(into) };
            let merge = AttachedMerge {
                run,
                into: file(into),
                below: below.as_ref().map(file),
                string: named.map(|layer| backing_string(path, layer)),
            };
            disk.merge(&merge, context.inside, context.progress, context.cancel).await?;
            Ok(true)
        }
        ChainStep::DropInternal { layer, tags }
            if same_file(&file(layer), path)? || *layer == context.disk.active =>
        {
            disk.drop_internal(tags).await?;
            Ok(true)
        }
        ChainStep::Repoint { child, to } if is_open(child)? => {
            let child = file(child);
            let image = Image::open(child.as_std_path(), &OpenOptions::read_only().unlocked())?;
            let stands_on = match &image.header().backing {
                Some(backing) => same_file(&resolve_backing(&child, &backing.file)?, &file(to))?,
                None => false,
            };
            if stands_on {
                return Ok(true);
            }
            Err(Error::new(
                ErrorKind::Internal,
                format!("{child} should stand on {to} since the merge below it, and the running domain has it open"),
            )
            .state("nothing was changed"))
        }
        _ => Ok(false),
    }
}
