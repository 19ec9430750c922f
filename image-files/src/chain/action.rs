//! The actions of a chain of files, and what each does with files.

use serde::{Deserialize, Serialize};
use snapcore::{DiskRecord, FileUses, LayerName};

use crate::layer_name::layer_path;

/// What is done to a chain of files, one typed action a step.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum ChainStep {
    /// Gives the layer that the configured path names a file of its permanent name too (a hard link).
    NameLayer {
        /// The layer.
        layer: LayerName,
    },
    /// Makes an empty overlay under its permanent name.
    CreateOverlay {
        /// The new layer.
        layer: LayerName,
        /// What it stands on.
        on: LayerName,
        /// The format of that.
        on_format: String,
        /// Its size, in bytes.
        virtual_size: u64,
    },
    /// Copies an internal snapshot out into a new layer that stands on what the snapshot's layer stands on.
    Materialise {
        /// The layer that holds the snapshot.
        from: LayerName,
        /// The snapshot's tag.
        tag: String,
        /// The new layer.
        layer: LayerName,
    },
    /// Takes an internal snapshot of a layer's own state.
    TakeInternal {
        /// The layer.
        layer: LayerName,
        /// The tag that it gets.
        tag: String,
    },
    /// Moves the configured path from one layer to another.
    SwitchActive {
        /// The layer that it names.
        from: LayerName,
        /// The layer that it is to name.
        to: LayerName,
    },
    /// Makes a layer's own state that of an internal snapshot.
    ApplyInternal {
        /// The layer.
        layer: LayerName,
        /// The snapshot's tag.
        tag: String,
        /// An internal snapshot of the state before: what an undo applies.
        safety: Option<String>,
    },
    /// Deletes internal snapshots of a layer.
    DropInternal {
        /// The layer.
        layer: LayerName,
        /// Their tags.
        tags: Vec<String>,
    },
    /// Takes damaged internal snapshots of a layer out of its table, and leaves what they refer to in use.
    ForgetInternal {
        /// The layer.
        layer: LayerName,
        /// Their tags.
        tags: Vec<String>,
    },
    /// Makes one layer of a run show what the run's top shows, standing on what the run's bottom stands on.
    Merge {
        /// The run, bottom first.
        run: Vec<LayerName>,
        /// The layer of it that receives the others' data.
        into: LayerName,
        /// What it stands on afterwards.
        below: Option<LayerName>,
    },
    /// Makes a layer stand on another layer, which shows the same as the one before.
    Repoint {
        /// The layer whose backing changes.
        child: LayerName,
        /// What it stands on afterwards.
        to: LayerName,
    },
    /// Removes the files of layers, each before those that it stands on.
    Remove {
        /// The layers.
        layers: Vec<LayerName>,
    },
    /// Removes the permanent name of the last layer: the configured path alone is left.
    Unname {
        /// The layer.
        layer: LayerName,
    },
}

/// The least that any new file or table needs of a file system: its blocks are seldom smaller.
const BLOCK: u64 = 4096;

/// The bytes of an empty overlay of a disk of this size, at least: its header, its refcounts, and the table that has 8 bytes for each
/// 512 MiB of the disk.
pub fn room_of_overlay(virtual_size: u64) -> u64 {
    let table = virtual_size.div_ceil(512 << 20).saturating_mul(8);
    table.next_multiple_of(BLOCK).saturating_add(3 * BLOCK)
}

/// What a step of a chain does with files: for [`snapcore::DiskSnapshotter::uses`].
pub fn uses(record: &DiskRecord, step: &ChainStep) -> FileUses {
    let path = &record.disk.path;
    let file = |layer: &LayerName| {
        let own = layer_path(path, layer);
        if own.exists() || *layer != record.active { own } else { path.clone() }
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
            uses.makes.push(path.clone());
            uses.renames.push(path.clone());
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
    }
    uses
}
