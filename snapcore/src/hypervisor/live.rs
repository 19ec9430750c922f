//! A running domain that is connected to, its disks, and what they are given.

use std::collections::HashSet;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;

use super::saver::{DomainInfo, Obstacle};
use super::step::{DomainStep, Medium, StepOutcome};
use crate::address::{DiskAddress, DiskIdentity, FileIdentity};
use crate::backend::Progress;
use crate::domain::Domain;
use crate::error::Result;
use crate::name::Target;
use crate::shape::Plan;

/// One layer of a chain, for a hypervisor to open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct OpenLayer {
    /// The layer's permanent address; a path is absolute. The hypervisor may open it again by this address
    /// at any time.
    #[serde(rename = "file")]
    #[schemars(with = "String")]
    pub address: DiskAddress,
    /// Its format, as stated.
    pub format: String,
}

impl OpenLayer {
    /// Makes a layer to open.
    pub fn new(address: impl Into<DiskAddress>, format: impl Into<String>) -> Self {
        Self { address: address.into(), format: format.into() }
    }
}

/// The layers that the configured path of a disk opens.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct OpenChain {
    /// The disk.
    pub target: Target,
    /// The active layer first, the base last.
    pub layers: Vec<OpenLayer>,
}

impl OpenChain {
    /// Makes a chain.
    pub fn new(target: Target, layers: Vec<OpenLayer>) -> Self {
        Self { target, layers }
    }
}

/// Work nested in a step: at the instant of a snapshot, at the pivot of a merge.
///
/// ```no_run
/// use async_trait::async_trait;
/// use snapcore::hypervisor::Inside;
/// use snapcore::{Error, ErrorKind, Result, Target};
///
/// /// Moves the configured path of one disk, by a link that takes its place.
/// struct MovePath {
///     path: &'static str,
///     from: &'static str,
///     to: &'static str,
/// }
///
/// impl MovePath {
///     fn link(&self, layer: &str) -> Result<()> {
///         let new = format!("{}.new", self.path);
///         let moved = std::fs::hard_link(layer, &new).and_then(|()| std::fs::rename(&new, self.path));
///         moved.map_err(|cause| {
///             Error::new(ErrorKind::Io, format!("{} cannot be moved to {layer}", self.path)).because(cause)
///         })
///     }
/// }
///
/// #[async_trait]
/// impl Inside for MovePath {
///     async fn run(&self, _only: Option<&Target>) -> Result<()> {
///         self.link(self.to)
///     }
///
///     async fn back(&self, _only: Option<&Target>) -> Result<()> {
///         self.link(self.from)
///     }
/// }
/// ```
#[async_trait]
pub trait Inside: Send + Sync {
    /// Performs the work for one disk, or for all without one. If it fails, it has undone its changes.
    async fn run(&self, only: Option<&Target>) -> Result<()>;

    /// Reverses [`Inside::run`] after its purpose failed: the pivot failed, and the guest continues to write
    /// to the same image as before.
    async fn back(&self, only: Option<&Target>) -> Result<()>;
}

/// No nested work.
#[async_trait]
impl Inside for () {
    async fn run(&self, _: Option<&Target>) -> Result<()> {
        Ok(())
    }

    async fn back(&self, _: Option<&Target>) -> Result<()> {
        Ok(())
    }
}

/// A point at which the domains of a group wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Meeting {
    /// The guest can be paused: all that could be prepared is prepared.
    Ready,
    /// The guest is paused. A guest that does not run meets here too.
    Paused,
    /// Disks and memory are of the instant, configured paths are moved, and the guest could go on.
    Cut,
    /// The guest could go on after a revert: its disks and its memory are those of the snapshot.
    Loaded,
}

/// The other domains of a group, whose instants are to be one with this domain's.
///
/// A hypervisor that can take part in a group ([`super::HypervisorProfile::groups`]) calls it in
/// [`LiveDomain::apply`]: in [`DomainStep::Instant`] at [`Meeting::Ready`], [`Meeting::Paused`] and
/// [`Meeting::Cut`], in [`DomainStep::Detach`] at the first two, and in [`DomainStep::Continue`] at
/// [`Meeting::Loaded`].
#[async_trait]
pub trait Rendezvous: Send + Sync {
    /// Waits until all domains of the group have come this far. It may be repeated.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Cancelled`] if another domain failed before its commit point. The step then undoes
    /// what it has done, and fails.
    async fn meet(&self, meeting: Meeting) -> Result<()>;
}

/// No other domain.
#[async_trait]
impl Rendezvous for () {
    async fn meet(&self, _: Meeting) -> Result<()> {
        Ok(())
    }
}

/// Context of a domain step.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct DomainContext<'a> {
    /// The domain, as recorded in the catalogue.
    pub domain: &'a Domain,
    /// The layers that the configured paths of the step's disks open now, in the order of the domain's disks.
    pub chains: &'a [OpenChain],
    /// The work nested in the step. In [`LiveDomain::apply`] of a cut it is the nested steps, run together
    /// while the guest is paused. In [`LiveDomain::undo`] it is their undo, disk by disk, each at the pivot
    /// of that disk. If the path were moved back before the pivot, what the guest still writes to the overlay
    /// would be lost.
    pub inside: &'a dyn Inside,
    /// Receiver of progress.
    pub progress: &'a dyn Progress,
    /// If it is cancelled, a step before the commit point soon fails with
    /// [`crate::ErrorKind::Cancelled`].
    pub cancel: &'a CancellationToken,
    /// The other domains of a group; `()` where there is no group.
    pub together: &'a dyn Rendezvous,
}

impl<'a> DomainContext<'a> {
    /// Makes the context of a step with nothing nested in it.
    pub fn new(
        domain: &'a Domain,
        chains: &'a [OpenChain],
        progress: &'a dyn Progress,
        cancel: &'a CancellationToken,
    ) -> Self {
        Self { domain, chains, progress, cancel, inside: &(), together: &() }
    }
}

setters!(<'a> DomainContext<'a> {
    inside: &'a dyn Inside,
    together: &'a dyn Rendezvous,
});

/// A merge of layers of an open chain into one.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct AttachedMerge {
    /// The layers, by their permanent addresses, bottom first.
    pub run: Vec<DiskAddress>,
    /// The layer that receives the others' data: the first or the last of them.
    pub into: DiskAddress,
    /// The layer that backs the run's bottom.
    pub below: Option<DiskAddress>,
    /// The backing string that the image above the merged ones gets: it names `into`. If `into` is the last,
    /// it is the backing string of `into`.
    pub string: Option<String>,
}

impl AttachedMerge {
    /// Makes a merge of layers that have no backing file, and no image above them.
    pub fn new(run: Vec<DiskAddress>, into: impl Into<DiskAddress>) -> Self {
        Self { run, into: into.into(), below: None, string: None }
    }
}

setters!(AttachedMerge {
    below: Option<DiskAddress>,
    string: Option<String>,
});

/// One disk of a running domain that its hypervisor has open.
///
/// A hypervisor implements it, and a backend's steps use it:
///
/// ```no_run
/// use snapcore::backend::StepContext;
/// use snapcore::hypervisor::AttachedMerge;
/// use snapcore::{Error, ErrorKind, Result};
///
/// /// Merges the layer `upper` into `lower`, below the active image.
/// async fn merge(context: StepContext<'_>, lower: &str, upper: &str) -> Result<()> {
///     let Some(attached) = context.attached else {
///         return Err(Error::new(ErrorKind::Internal, "no hypervisor has the images open"));
///     };
///     let run = vec![lower.into(), upper.into()];
///     let merge = AttachedMerge::new(run, lower).string(Some(lower.to_owned()));
///     attached.merge(&merge, context.inside, context.progress, context.cancel).await
/// }
/// ```
#[async_trait]
pub trait AttachedDisk: Send + Sync {
    /// The image files that the hypervisor has open for this disk now: none in a detached section. The
    /// hypervisor has them locked and controls their contents.
    async fn open_files(&self) -> Result<HashSet<FileIdentity>>;

    /// Returns true if the hypervisor has the image of this identity open for this disk now. The identity is
    /// one that the disk's backend gives ([`crate::backend::DiskSnapshotter::identity`]). A hypervisor with
    /// disks that are no files of this machine knows them by their names.
    async fn has_open(&self, image: &DiskIdentity) -> Result<bool> {
        match image {
            DiskIdentity::Inode(file) => Ok(self.open_files().await?.contains(file)),
            DiskIdentity::Named(_) => Ok(false),
        }
    }

    /// Merges layers of the open chain while the guest runs. Afterwards the hypervisor has closed the others,
    /// and the image above is backed by the merged one.
    ///
    /// If the last layer of the run is the active image and is merged down, `inside` runs at the pivot, when
    /// both show the same and the guest's writes wait. It moves the configured path.
    ///
    /// The call may be repeated, also after a crash in the middle: it continues where it stopped.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Cancelled`], or the failure: the chain is as before.
    async fn merge(
        &self,
        merge: &AttachedMerge,
        inside: &dyn Inside,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<()>;

    /// Returns true if the images are open in a server that reads their format itself. Otherwise the
    /// hypervisor reads them, with its own driver of the format.
    fn is_served(&self) -> bool {
        false
    }

    /// Deletes internal snapshots of the active image. A missing one is ignored.
    async fn drop_internal(&self, tags: &[String]) -> Result<()>;
}

/// A connection to one running domain.
///
/// What the engine does with one, for a section in which disks are changed as if the domain were at rest:
///
/// ```no_run
/// use snapcore::hypervisor::{DomainContext, DomainStep, LiveDomain};
/// use snapcore::{Result, Target};
///
/// async fn section(
///     live: &dyn LiveDomain,
///     disks: Vec<Target>,
///     context: DomainContext<'_>,
///     change: impl AsyncFnOnce() -> Result<()>,
/// ) -> Result<()> {
///     let running = live.seen().running;
///     let detach = DomainStep::Detach { disks: disks.clone(), running, restart: None };
///     live.apply(&detach, context).await?;
///     if let Err(error) = change().await {
///         // Opens what the paths name, and resumes the guest.
///         live.undo(&detach, context).await?;
///         return Err(error.state("rolled back"));
///     }
///     live.apply(&DomainStep::Attach { disks, restart: None }, context).await?;
///     live.apply(&DomainStep::Continue { memory: None, reset: true, power: None }, context).await?;
///     Ok(())
/// }
/// ```
#[async_trait]
pub trait LiveDomain: Send + Sync {
    /// The domain as it was when the connection was made.
    fn seen(&self) -> &DomainInfo;

    /// The processes of the hypervisor that have its disks open, if known. Their open files do not count as
    /// uses by other programs. Empty: not known.
    fn processes(&self) -> Vec<u32> {
        Vec::new()
    }

    /// One of its disks; absent: the running domain has no disk whose image is a layer of it.
    fn disk(&self, target: &Target) -> Option<&dyn AttachedDisk>;

    /// Lists the differences from a recorded machine ([`DomainInfo::machine`]) that would prevent a revert
    /// with memory, as text.
    fn differences(&self, recorded: &serde_json::Value) -> Result<Vec<String>>;

    /// Lists the media of a recorded machine that are not in their drives now, and can be inserted before
    /// memory is loaded. A medium that cannot be inserted is one of the [`LiveDomain::differences`].
    fn media(&self, _recorded: &serde_json::Value) -> Result<Vec<Medium>> {
        Ok(Vec::new())
    }

    /// Returns the obstacle, if memory cannot be saved through this connection.
    fn cannot_save_memory(&self) -> Option<Obstacle> {
        None
    }

    /// Returns the obstacle, if disks cannot be detached through this connection. There is no detached
    /// section then.
    fn cannot_detach(&self) -> Option<Obstacle> {
        None
    }

    /// Resumes the guest, regardless of what paused it.
    async fn resume(&self) -> Result<()>;

    /// Resumes a guest that a cut left paused for a revert ([`DomainStep::Instant`]) that did not follow,
    /// because the program was killed. Returns true if it was paused for that.
    ///
    /// It is called for a paused guest whose last operation was that cut. By default every such guest is
    /// resumed. A hypervisor that can tell if the machine was started again since does not resume that one.
    async fn resume_left(&self) -> Result<bool> {
        self.resume().await.map(|()| true)
    }

    /// Thaws file systems of the guest that a killed process left frozen. Returns messages for the user. It
    /// is called before an operation that freezes them is recovered: until then the guest's programs wait,
    /// and the recovery may take long, or fail. [`LiveDomain::clean_up`] does it too.
    async fn thaw(&self) -> Vec<String> {
        Vec::new()
    }

    /// Limits the rate of merges, in bytes per second; 0: no limit.
    fn limit(&self, bytes_per_second: u64);

    /// Refuses a plan that cannot be carried out, as far as that is known before anything is begun. The
    /// guest's state may not permit it, or the hypervisor may be unable to open a file. `chains` has all
    /// disks.
    ///
    /// With `probe`, the hypervisor may be asked to open images and close them again. Such a call follows one
    /// without it for the same plan under the same locks. Without `probe`, nothing is changed, not even for a
    /// moment.
    ///
    /// # Errors
    /// [`crate::ErrorKind::Refused`], [`crate::ErrorKind::Unsupported`]: no changes made.
    async fn preflight(&self, plan: &Plan, chains: &[OpenChain], probe: bool) -> Result<()> {
        let _ = (plan, chains, probe);
        Ok(())
    }

    /// Closes nodes that a crash left open and unused in the hypervisor, so that their images can be locked.
    /// It is called before an unfinished operation is recovered. Nodes of a device are not changed.
    async fn tidy(&self) -> Result<()> {
        Ok(())
    }

    /// Performs the part of a step that does not need the guest to be paused. Used by drivers that pause it
    /// by other means before they apply the step. Other programs see no change. [`LiveDomain::undo`] reverses
    /// it, and so does [`LiveDomain::clean_up`].
    async fn prepare(&self, step: &DomainStep) -> Result<()> {
        let _ = step;
        Ok(())
    }

    /// Performs a step. It is idempotent, also after a crash: completed work is not repeated.
    async fn apply(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<StepOutcome>;

    /// Undoes a step, however far it got. It is idempotent.
    async fn undo(&self, step: &DomainStep, context: DomainContext<'_>) -> Result<()>;

    /// Cleans up what an interrupted run left in the hypervisor and the journal does not record: thaws the
    /// guest, closes unused nodes, reopens images under their permanent names. Does not resume a guest.
    /// `chains` has all disks. Returns a description of what it did.
    async fn clean_up(&self, chains: &[OpenChain]) -> Result<Vec<String>>;
}
