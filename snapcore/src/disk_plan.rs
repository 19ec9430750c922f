//! The plan of a backend for one disk, and the request that it fulfils.

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};

use crate::domain::{ActivePath, DiskRecord};
use crate::error::Result;
use crate::hypervisor::DiskInstant;
use crate::name::{DomainName, LayerName, SnapshotName};
use crate::shape::{FinishStep, NestedStep};
use crate::snapshot::{DiskPoint, Point, PointKind};
use crate::step::{Edit, Group, Step};

/// A request to one disk's backend when a plan is made.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "request")]
#[non_exhaustive]
pub enum DiskRequest {
    /// Take a point of the disk as it is.
    Create {
        /// The kind of point; absent: the backend chooses.
        kind: Option<PointKind>,
        /// One of the backend's own methods ([`crate::backend::Capabilities::methods`]), if the user
        /// requested it; then `kind` is absent.
        method: Option<String>,
        /// The snapshot's name, for a tag.
        name: SnapshotName,
        /// The file of the new overlay, if the user chose one.
        overlay: Option<LayerName>,
        /// All points of this disk in the catalogue.
        keep: Vec<Point>,
        /// A random number for the name of a new layer.
        stamp: u32,
    },
    /// Return the disk to its state at `to`. The cut step that gives the current state up can be undone until
    /// the commit point, because other disks and the commit come after it.
    Revert {
        /// The point to return to.
        to: Point,
        /// Save the current state as a point, under this name if it needs a tag.
        save: Option<SnapshotName>,
        /// All points of this disk in the catalogue.
        keep: Vec<Point>,
        /// A random number for the name of a new layer.
        stamp: u32,
    },
    /// Delete points, then merge and remove layers that are no longer needed.
    Delete {
        /// The points to delete.
        drop: Vec<Point>,
        /// All points of this disk that are kept.
        keep: Vec<Point>,
        /// True if a damaged point may be forgotten: what it refers to is unknown and stays allocated.
        #[serde(default)]
        force: bool,
    },
}

/// A request for disks of new domains, made of a point of one disk.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct CloneDisk {
    /// The point.
    pub point: Point,
    /// True if the clones share nothing with the disk.
    pub full: bool,
    /// The placement of the clones' active images.
    pub active_path: ActivePath,
    /// The new domains, one disk each.
    pub clones: Vec<ClonePlace>,
    /// A random number for names of layers.
    pub stamp: u32,
    /// If given, each clone has the point itself too, so that its disk can be reverted to it. A point inside
    /// of an image gets this name there.
    pub keep: Option<String>,
}

impl CloneDisk {
    /// Requests clones of `point` that share its content.
    pub fn new(point: Point, clones: Vec<ClonePlace>, stamp: u32) -> Self {
        Self { point, clones, stamp, full: false, active_path: ActivePath::Keep, keep: None }
    }
}

setters!(CloneDisk { full: bool, active_path: ActivePath, keep: Option<String> });

/// The place of the disks of one clone. A backend whose disks are no files uses the name alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct ClonePlace {
    /// The name of the new domain.
    pub domain: DomainName,
    /// The directory of its disks: an absolute path. It does not exist yet.
    #[schemars(with = "String")]
    pub directory: Utf8PathBuf,
    /// The name of that directory until the clone is complete, beside it. No other operation gives this name.
    #[schemars(with = "String")]
    pub unfinished: Utf8PathBuf,
}

impl ClonePlace {
    /// The place of the clone `domain` in the directory `parent`. `stamp` distinguishes the operation.
    pub fn new(domain: DomainName, parent: &camino::Utf8Path, stamp: u32) -> Self {
        let directory = parent.join(domain.as_str());
        let unfinished = parent.join(format!(".{domain}.ds-{stamp:08x}"));
        Self { domain, directory, unfinished }
    }
}

/// A backend's answer: the disks of clones, and the steps that make them.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct ClonePlan<A = serde_json::Value> {
    /// The steps, which are prepare and cut steps alone, and notes for the user.
    pub plan: DiskPlan<A>,
    /// The disk of each clone, in the order of the request. Its target is that of the source.
    pub disks: Vec<DiskRecord>,
    /// The point in each clone ([`CloneDisk::keep`]), in the same order. Empty: a backend that keeps none.
    pub points: Vec<DiskPoint>,
}

impl<A> ClonePlan<A> {
    /// Makes an answer.
    pub fn new(plan: DiskPlan<A>, disks: Vec<DiskRecord>) -> Self {
        Self { plan, disks, points: Vec::new() }
    }
}

setters!(<A> ClonePlan<A> {
    points: Vec<DiskPoint>,
});

/// A backend's answer: the steps for one disk, by their places in the operation, and the changes of the
/// catalogue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "DiskPlan")]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct DiskPlan<A = serde_json::Value> {
    /// Steps before the cut, while a guest would run. They can be undone.
    pub prepare: Vec<Step<A>>,
    /// The disk's part in the hypervisor's cut, for a create on an attached disk.
    pub instant: Option<InstantPlan<A>>,
    /// Steps of the cut, after the hypervisor's. They can be undone until the commit point. A revert of a
    /// running domain does them while nothing has the disk open.
    pub cut: Vec<Step<A>>,
    /// Changes of the catalogue at the commit point.
    pub commit: Vec<Edit>,
    /// Steps of a delete that change a frozen image of an open chain, which no program may have open then. On
    /// a running domain the planner puts a detached section around them. They come before `finish`.
    #[serde(skip)]
    pub detached: Vec<FinishStep<A>>,
    /// Steps after the commit point: carried through, never undone.
    pub finish: Vec<FinishStep<A>>,
    /// The point of a create, or of a revert that saves the current state.
    pub point: Option<Point>,
    /// For a revert that saves the current state: the room that this reserves, beyond what the domain will
    /// write, as a message. Absent: it costs nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserves: Option<String>,
    /// For a revert: true if the point is taken up and taken again. It is refused while the snapshot is held.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub consumes: bool,
    /// Notes for the user.
    pub notes: Vec<String>,
}

setters!(<A> DiskPlan<A> {
    prepare: Vec<Step<A>>,
    instant: Option<InstantPlan<A>>,
    cut: Vec<Step<A>>,
    commit: Vec<Edit>,
    detached: Vec<FinishStep<A>>,
    finish: Vec<FinishStep<A>>,
    point: Option<Point>,
    reserves: Option<String>,
    consumes: bool,
    notes: Vec<String>,
});

/// One disk's part in the hypervisor's cut.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "InstantPlan")]
#[serde(bound(deserialize = "A: Deserialize<'de>"))]
#[non_exhaustive]
pub struct InstantPlan<A = serde_json::Value> {
    /// The hypervisor's part.
    #[serde(flatten)]
    pub take: DiskInstant,
    /// The backend's steps, nested in the cut: the guest is paused, and nothing is written. They move the
    /// configured path, or take the point under [`DiskInstant::ByBackend`].
    #[serde(default)]
    pub nested: Vec<Step<A>>,
}

impl<A> InstantPlan<A> {
    /// Makes the part of one disk.
    pub fn new(take: DiskInstant, nested: Vec<Step<A>>) -> Self {
        Self { take, nested }
    }
}

impl<A> Default for DiskPlan<A> {
    fn default() -> Self {
        Self {
            prepare: Vec::new(),
            instant: None,
            cut: Vec::new(),
            commit: Vec::new(),
            detached: Vec::new(),
            finish: Vec::new(),
            point: None,
            reserves: None,
            consumes: false,
            notes: Vec::new(),
        }
    }
}

impl<A> DiskPlan<A> {
    /// Adds a step to the end of a part. A finish step has no edits yet, and must be done.
    pub fn push(&mut self, group: Group, step: Step<A>) {
        match group {
            Group::Prepare => self.prepare.push(step),
            Group::Cut => self.cut.push(step),
            Group::Finish => self.finish.push(FinishStep::new(step)),
        }
    }

    /// All steps, in running order.
    pub fn steps(&self) -> impl Iterator<Item = &Step<A>> {
        let nested = self.instant.iter().flat_map(|instant| &instant.nested);
        let finish = self.detached.iter().chain(&self.finish);
        let finish = finish.flat_map(|FinishStep { step, nested, .. }| {
            std::iter::once(step).chain(nested.iter().map(|nested| &nested.step))
        });
        self.prepare.iter().chain(nested).chain(&self.cut).chain(finish)
    }

    /// Converts the plan to another representation of its actions.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn try_map<B>(self, mut change: impl FnMut(A) -> Result<B>) -> Result<DiskPlan<B>> {
        let Self { prepare, instant, cut, commit, detached, finish, point, reserves, consumes, notes } = self;
        let mut steps = |steps: Vec<Step<A>>| -> Result<Vec<Step<B>>> {
            steps.into_iter().map(|step| step.try_map(&mut change)).collect()
        };
        let prepare = steps(prepare)?;
        let instant = match instant {
            Some(InstantPlan { take, nested }) => Some(InstantPlan { take, nested: steps(nested)? }),
            None => None,
        };
        let cut = steps(cut)?;
        let mut units = |units: Vec<FinishStep<A>>| -> Result<Vec<FinishStep<B>>> {
            units.into_iter().map(|unit| unit.try_map(&mut change)).collect()
        };
        let (detached, finish) = (units(detached)?, units(finish)?);
        Ok(DiskPlan { prepare, instant, cut, commit, detached, finish, point, reserves, consumes, notes })
    }
}

impl<A> FinishStep<A> {
    fn try_map<B>(self, change: &mut impl FnMut(A) -> Result<B>) -> Result<FinishStep<B>> {
        let Self { step, edits, deferrable, nested } = self;
        let step = step.try_map(&mut *change)?;
        let nested = nested
            .into_iter()
            .map(|NestedStep { step, edits }| Ok(NestedStep { step: step.try_map(&mut *change)?, edits }));
        Ok(FinishStep { step, edits, deferrable, nested: nested.collect::<Result<_>>()? })
    }
}
