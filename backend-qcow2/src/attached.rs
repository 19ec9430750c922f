//! Steps on images that a hypervisor has open. The hypervisor performs them
//! ([`image_files::merge_attached`]).

use image_files::chain::ChainStep;
use image_files::names::{file_id, same_file};
use image_files::{AttachedRun, FileIds, merge_attached};
use snapcore::backend::StepContext;
use snapcore::hypervisor::AttachedDisk;
use snapcore::{Error, ErrorKind, LayerName, Result};

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
            let named = if run.last() == Some(into) { below.as_ref() } else { Some(into) };
            let string = named.map(|layer| backing_string(path, layer));
            merge_attached(
                disk,
                open,
                AttachedRun { run, into, below: below.as_ref(), string },
                &file,
                context,
            )
            .await
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
