//! The actions of a chain of files, and the effects of each on files.

use serde::{Deserialize, Serialize};
use snapcore::backend::{ClonePlace, FileUses, InternalPoint};
use snapcore::{DiskRecord, LayerName, TagIdentity};

use crate::clones::CloneFiles;
use crate::layer_name::layer_path;

/// An internal snapshot that a step works on.
///
/// The identity is kept in the journal, because a recovery may come days later: another program may have
/// deleted the snapshot meanwhile, and have made another of the same name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Tag {
    /// Its name in the image's snapshot table.
    pub name: String,
    /// Its identity when the step was planned. Absent if an earlier step of the same plan creates it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<TagIdentity>,
}

impl Tag {
    /// An internal snapshot that the same plan creates.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), identity: None }
    }

    /// Joins the names of several.
    pub fn names(tags: &[Self]) -> String {
        tags.iter().map(|tag| tag.name.as_str()).collect::<Vec<_>>().join(", ")
    }
}

impl From<&InternalPoint> for Tag {
    fn from(found: &InternalPoint) -> Self {
        Self { name: found.tag.clone(), identity: found.identity.clone() }
    }
}

/// The action of one step on a chain of files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum ChainStep {
    /// Gives the layer that the configured path names a second, permanent name (a hard link).
    NameLayer {
        /// The layer.
        layer: LayerName,
    },
    /// Makes an empty overlay under its permanent name.
    CreateOverlay {
        /// The new layer.
        layer: LayerName,
        /// Its backing file.
        on: LayerName,
        /// The format of the backing file.
        on_format: String,
        /// Its size, in bytes.
        virtual_size: u64,
        /// Its own format, if that is another than the disk's has been so far.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        format: Option<String>,
    },
    /// Copies an internal snapshot into a new layer with the same backing file as the snapshot's layer.
    Materialise {
        /// The layer that contains the snapshot.
        from: LayerName,
        /// The snapshot.
        tag: Tag,
        /// The new layer.
        layer: LayerName,
    },
    /// Creates an internal snapshot of a layer's own state.
    TakeInternal {
        /// The layer.
        layer: LayerName,
        /// The tag of the new snapshot.
        tag: String,
    },
    /// Moves the configured path from one layer to another.
    SwitchActive {
        /// The layer that it names now.
        from: LayerName,
        /// The layer that it will name.
        to: LayerName,
    },
    /// Makes a layer's own state that of an internal snapshot.
    ApplyInternal {
        /// The layer.
        layer: LayerName,
        /// The snapshot.
        tag: Tag,
        /// An internal snapshot of the previous state, which an undo applies.
        safety: Option<String>,
    },
    /// Deletes internal snapshots of a layer.
    DropInternal {
        /// The layer.
        layer: LayerName,
        /// The snapshots.
        tags: Vec<Tag>,
    },
    /// Removes damaged internal snapshots of a layer from its table, and leaves what they refer to allocated.
    ForgetInternal {
        /// The layer.
        layer: LayerName,
        /// The snapshots.
        tags: Vec<Tag>,
    },
    /// Makes one layer of a run show what the run's top shows. Its backing file becomes that of the run's
    /// bottom.
    Merge {
        /// The run, bottom first.
        run: Vec<LayerName>,
        /// The layer of it that receives the others' data.
        into: LayerName,
        /// Its backing file afterwards.
        below: Option<LayerName>,
    },
    /// Gives a layer another backing file, which shows the same as the previous one.
    Repoint {
        /// The layer whose backing file changes.
        child: LayerName,
        /// Its backing file afterwards.
        to: LayerName,
    },
    /// Removes the files of layers, each before its backing file.
    Remove {
        /// The layers.
        layers: Vec<LayerName>,
    },
    /// Removes the permanent name of the last layer: only the configured path is left.
    Unname {
        /// The layer.
        layer: LayerName,
    },
    /// Makes the image of a clone. No disk changes.
    Clone {
        /// Its files.
        files: CloneFiles,
        /// Its content.
        content: CloneContent,
        /// Its size, in bytes.
        virtual_size: u64,
        /// The internal snapshot that it gets of its content. Absent: none.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        keep: Option<String>,
    },
    /// Publishes clones, each a directory of its own.
    PublishClones {
        /// The directories.
        places: Vec<ClonePlace>,
    },
}

/// The content of a clone's image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "is", rename_all = "kebab-case")]
pub enum CloneContent {
    /// None: it is an overlay on a frozen layer.
    Overlay {
        /// Its backing file: a name in the clone's directory, or an absolute path.
        on: LayerName,
        /// The format of the backing file.
        on_format: String,
    },
    /// A copy of an internal snapshot's own data, with the same backing file as the snapshot's layer.
    CopyOfTag {
        /// The layer that contains the snapshot.
        from: LayerName,
        /// The snapshot.
        tag: Tag,
    },
    /// A copy of all that a point shows, without a backing file.
    CopyOfAll {
        /// The layer that is the point, or contains it.
        from: LayerName,
        /// The internal snapshot, if the point is one.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        tag: Option<Tag>,
    },
}

/// The least that any new file or table occupies: blocks of a file system are seldom smaller.
const BLOCK: u64 = 4096;

/// Returns the least bytes of an empty overlay of a disk of this size: its header, its refcounts, and the
/// table that has 8 bytes for each 512 MiB of the disk.
pub fn room_of_overlay(virtual_size: u64) -> u64 {
    let table = virtual_size.div_ceil(512 << 20).saturating_mul(8);
    table.next_multiple_of(BLOCK).saturating_add(3 * BLOCK)
}

/// Returns the effects of a chain's step on files, for [`snapcore::backend::DiskSnapshotter::uses`].
pub fn uses(record: &DiskRecord, step: &ChainStep) -> FileUses {
    let path = record.disk.path();
    let file = |layer: &LayerName| {
        let own = layer_path(path, layer);
        if own.exists() || *layer != record.active { own } else { path.to_owned() }
    };
    let mut uses = FileUses::default();
    match step {
        ChainStep::NameLayer { layer } => {
            uses.makes.push(layer_path(path, layer));
            uses.links.push(file(layer));
        }
        ChainStep::CreateOverlay { layer, virtual_size, .. } => {
            uses.makes.push(layer_path(path, layer));
            uses.room = room_of_overlay(*virtual_size);
        }
        ChainStep::Materialise { layer, .. } => {
            uses.makes.push(layer_path(path, layer));
            uses.room = 3 * BLOCK;
        }
        ChainStep::SwitchActive { to, .. } => {
            uses.makes.push(path.to_owned());
            uses.renames.push(path.to_owned());
            uses.links.push(layer_path(path, to));
        }
        ChainStep::TakeInternal { layer, .. }
        | ChainStep::ApplyInternal { layer, .. }
        | ChainStep::DropInternal { layer, .. }
        | ChainStep::ForgetInternal { layer, .. } => uses.writes.push(file(layer)),
        ChainStep::Merge { into, .. } => uses.writes.push(file(into)),
        ChainStep::Repoint { child, .. } => uses.writes.push(file(child)),
        ChainStep::Remove { layers } => uses.renames.extend(layers.iter().map(file)),
        ChainStep::Unname { layer } => uses.renames.push(file(layer)),
        ChainStep::Clone { files, .. } => return files.uses(),
        ChainStep::PublishClones { places } => {
            uses.makes.extend(places.iter().map(|place| place.directory.clone()));
        }
    }
    uses
}
