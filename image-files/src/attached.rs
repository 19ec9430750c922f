//! Merges of images that a hypervisor has open. The hypervisor performs them.
//!
//! **What is durable before what.** A merge of the active image into a lower one moves the configured path at
//! the pivot. At this point both images show the same, and the guest's writes wait or go to both. The path is
//! moved, and its directory flushed, before the guest writes to the lower image alone. From then on the merge
//! is only carried through. If the path cannot be moved, it is moved back before the hypervisor continues
//! with the upper image.

use async_trait::async_trait;
use camino::Utf8PathBuf;
use snapcore::backend::StepContext;
use snapcore::hypervisor::{AttachedDisk, AttachedMerge, Inside};
use snapcore::{Error, ErrorKind, LayerName, Result, Target};
use tokio_util::sync::CancellationToken;

use crate::file_steps::FileIds;
use crate::layer_name::layer_path;
use crate::names::{self, file_id, same_file};

/// The layers of a merge step.
#[derive(Debug)]
pub struct AttachedRun<'a> {
    /// The layers, the bottom first.
    pub run: &'a [LayerName],
    /// The layer that receives the others' data.
    pub into: &'a LayerName,
    /// The layer below the run.
    pub below: Option<&'a LayerName>,
    /// The backing string for [`AttachedMerge::string`], in formats that have one.
    pub string: Option<String>,
}

/// Merges layers through the hypervisor, if it has any of them open (`open`). Returns false if the step must
/// be done like at rest. `file` returns the file of a layer.
///
/// # Errors
/// The hypervisor's; the system's.
pub async fn merge_attached(
    disk: &dyn AttachedDisk,
    open: &FileIds,
    layers: AttachedRun<'_>,
    file: &(dyn Fn(&LayerName) -> Result<Utf8PathBuf> + Sync),
    context: StepContext<'_>,
) -> Result<bool> {
    let path = context.disk.disk.path();
    let AttachedRun { run, into, below, string } = layers;
    let mut files = Vec::new();
    let mut any_open = false;
    for layer in run {
        let file = file(layer)?;
        any_open |= file_id(&file)?.is_some_and(|id| open.contains(&id));
        files.push(file.into());
    }
    // If the merge was done before and only not recorded, the hypervisor has only the receiving image open,
    // and reports that.
    if !any_open {
        return Ok(false);
    }
    let into_file = file(into)?;
    let below = below.map(file).transpose()?.map(Into::into);
    let merge = AttachedMerge::new(files, &into_file).below(below).string(string);
    names::require_own_names(&into_file, path)?;
    let top = run.last().filter(|top| **top == context.disk.active && *top != into);
    match top.map(|top| layer_path(path, top)) {
        // With `--active-path=new` the path is the layer's own name and different after each change: it is
        // not moved.
        Some(from) if from != path => {
            let pivot = Pivot { inside: context.inside, path: path.to_owned(), from, to: into_file };
            // A crash came after the move. The guest's writes wait for the end of the merge, so it must not
            // be cancelled.
            let never_cancelled = CancellationToken::new();
            let cancel = if same_file(&pivot.to, path)? { &never_cancelled } else { context.cancel };
            let merged = disk.merge(&merge, &pivot, context.progress, cancel).await;
            merged.map_err(|error| pivot.must_go_on(error))?;
        }
        _ => disk.merge(&merge, context.inside, context.progress, context.cancel).await?,
    }
    Ok(true)
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
