//! Steps on images that a server has open, for a running domain. The server performs them
//! ([`image_files::merge_attached`], [`crate::ServedMerge`]).

use image_files::chain::ChainStep;
use image_files::names::file_id;
use image_files::{AttachedRun, FileIds, merge_attached};
use snapcore::backend::StepContext;
use snapcore::hypervisor::AttachedDisk;
use snapcore::{Error, ErrorKind, LayerName, Result};

use crate::layers::{file_of, reading};

/// Performs `action` through the server if it has the images open (`open`). Returns `false` if the step must
/// be done like at rest.
pub(crate) async fn apply(
    disk: &dyn AttachedDisk,
    open: &FileIds,
    action: &ChainStep,
    context: StepContext<'_>,
) -> Result<bool> {
    let file = |layer: &LayerName| file_of(context.disk, layer);
    match action {
        ChainStep::Merge { run, into, below } => {
            let layers = AttachedRun { run, into, below: below.as_ref(), string: None };
            merge_attached(disk, open, layers, &file, context).await
        }
        ChainStep::Repoint { child, to } => {
            let (child, to) = (file(child)?, file(to)?);
            if !file_id(&child)?.is_some_and(|id| open.contains(&id)) {
                return Ok(false);
            }
            // The merge below it has done that.
            if reading(&child)?.parent_id() == Some(reading(&to)?.id()) {
                return Ok(true);
            }
            Err(Error::new(
                ErrorKind::Internal,
                format!(
                    "{child} should have the parent {to} since the merge below it, and its server has it open"
                ),
            )
            .state("nothing was changed"))
        }
        _ => Ok(false),
    }
}
