//! Plans: typed, serialisable steps that are journalled before they run.

use serde::{Deserialize, Serialize};

use crate::domain::Machine;
use crate::error::Result;
use crate::name::{LayerName, Target};
use crate::snapshot::{Point, Snapshot, SnapshotId};

/// Parts of a plan, by the time at which their steps run.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Group {
    /// Before the cut, while a guest would run. Can be undone.
    Prepare,
    /// The cut. Can be undone until the plan is committed.
    Cut,
    /// After the commit point: carried through, never undone.
    Finish,
}

/// One action of a backend on one disk.
///
/// A backend plans and receives its own type of action ([`crate::backend::DiskSnapshotter::Action`]). In the
/// journal, and to the engine, the action is JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[schemars(rename = "Step")]
#[non_exhaustive]
pub struct Step<A = serde_json::Value> {
    /// The disk.
    pub target: Target,
    /// The backend's own typed action.
    pub action: A,
    /// Description for people: "freeze base.img as base.ds-1a2b3c4d.img".
    pub summary: String,
    /// Bytes of data that it will move, as far as known beforehand; 0 if it only changes metadata.
    pub bytes: u64,
}

impl<A> Step<A> {
    /// Makes a step that only changes metadata.
    pub fn new(target: Target, action: A, summary: impl Into<String>) -> Self {
        Self { target, action, summary: summary.into(), bytes: 0 }
    }
}

setters!(<A> Step<A> {
    bytes: u64,
});

impl<A> Step<A> {
    /// Converts the step to another representation of its action.
    ///
    /// # Errors
    /// Those of `change`.
    pub fn try_map<B>(self, change: impl FnOnce(A) -> Result<B>) -> Result<Step<B>> {
        let Self { target, action, summary, bytes } = self;
        Ok(Step { target, action: change(action)?, summary, bytes })
    }
}

/// One change of the catalogue.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case", tag = "edit")]
#[non_exhaustive]
pub enum Edit {
    /// Adds a snapshot.
    AddSnapshot {
        /// The snapshot.
        snapshot: Box<Snapshot>,
    },
    /// Removes a snapshot; its children become its parent's.
    RemoveSnapshot {
        /// Its identity.
        id: SnapshotId,
    },
    /// Gives the snapshot of the same identity this one's name, description, role, holds and expiry. Its
    /// points, its memory and its parent stay.
    Amend {
        /// The snapshot as it will be.
        snapshot: Box<Snapshot>,
    },
    /// Makes this snapshot the one from which the current state derives.
    SetCurrent {
        /// Its identity, if any.
        id: Option<SnapshotId>,
    },
    /// Sets the layer that the domain writes.
    SetActive {
        /// The disk.
        target: Target,
        /// The layer.
        layer: LayerName,
    },
    /// Adds a layer that is ours.
    AddLayer {
        /// The disk.
        target: Target,
        /// The layer.
        layer: LayerName,
    },
    /// Removes a layer.
    RemoveLayer {
        /// The disk.
        target: Target,
        /// The layer.
        layer: LayerName,
    },
    /// Replaces the point `from` of the disk by `to` in all snapshots.
    MovePoint {
        /// The disk.
        target: Target,
        /// The previous point.
        from: Point,
        /// The new point.
        to: Point,
    },
    /// Records the machine on which snapshots were created.
    AddMachine {
        /// The machine.
        machine: Box<Machine>,
    },
    /// Sets the disk's format, and with it another backend.
    SetFormat {
        /// The disk.
        target: Target,
        /// The name of the backend.
        format: String,
    },
    /// Sets the disk's configured path.
    SetPath {
        /// The disk.
        target: Target,
        /// The address.
        #[schemars(with = "String")]
        path: crate::address::DiskAddress,
    },
}

/// Progress of a step, read from the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum StepStatus {
    /// No trace of it.
    NotDone,
    /// A part of it is done: it can both be done again and undone.
    Partly,
    /// All of it is done.
    Done,
}
