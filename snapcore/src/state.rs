//! The state of a disk, read from the machine and not from records.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::address::DiskAddress;
use crate::name::{LayerName, Target};

/// Identity of an internal snapshot, to distinguish it from another of the same name that another program
/// made in its place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct TagIdentity {
    /// The ID in the image's snapshot table.
    pub id: String,
    /// Time of the snapshot by the image: seconds since 1970.
    pub seconds: u32,
    /// Time of the snapshot by the image: nanoseconds within the second.
    pub nanoseconds: u32,
    /// Running time of the guest, in nanoseconds.
    pub vm_clock: u64,
}

impl TagIdentity {
    /// Makes an identity.
    pub fn new(id: impl Into<String>, seconds: u32, nanoseconds: u32, vm_clock: u64) -> Self {
        Self { id: id.into(), seconds, nanoseconds, vm_clock }
    }
}

impl std::fmt::Display for TagIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let taken = Timestamp::new(i64::from(self.seconds), i32::try_from(self.nanoseconds).unwrap_or(0));
        write!(f, "ID {} of {}", self.id, taken.unwrap_or(Timestamp::UNIX_EPOCH))
    }
}

/// An internal snapshot found in a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct InternalPoint {
    /// Its name in the image's snapshot table.
    pub tag: String,
    /// The disk's size at that point, in bytes.
    pub virtual_size: u64,
    /// Time of the snapshot by the image.
    #[schemars(with = "String")]
    pub created: Timestamp,
    /// Bytes of its VM state.
    pub vm_state_size: u64,
    /// Its identity, to distinguish it from others of its name; absent if the backend does not provide one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<TagIdentity>,
}

impl InternalPoint {
    /// Makes an internal snapshot without VM state and without an identity.
    pub fn new(tag: impl Into<String>, virtual_size: u64, created: Timestamp) -> Self {
        Self { tag: tag.into(), virtual_size, created, vm_state_size: 0, identity: None }
    }
}

setters!(InternalPoint {
    vm_state_size: u64,
    identity: Option<TagIdentity>,
});

/// One image of a disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Layer {
    /// Its permanent name.
    pub name: LayerName,
    /// The address by which it can be opened now.
    #[serde(rename = "file")]
    #[schemars(with = "String")]
    pub address: DiskAddress,
    /// The stated format.
    pub format: String,
    /// True if a file of its permanent name exists.
    pub named: bool,
    /// Its backing layer.
    pub backing: Option<LayerName>,
    /// True if it is ours: domsnap may merge and remove it.
    pub owned: bool,
    /// Size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// Bytes on the disk.
    pub allocated: u64,
    /// Its internal snapshots, in the order of its table. Only the active layer and the owned ones are read.
    pub internal: Vec<InternalPoint>,
    /// Images that are directly backed by it, under any of its names, and are not layers of this disk.
    #[schemars(with = "Vec<String>")]
    pub dependents: Vec<DiskAddress>,
}

impl Layer {
    /// Makes a layer that has no file of its permanent name, no backing layer and no data, and that is not
    /// ours.
    pub fn new(
        name: LayerName,
        address: impl Into<DiskAddress>,
        format: impl Into<String>,
        virtual_size: u64,
    ) -> Self {
        Self {
            name,
            address: address.into(),
            format: format.into(),
            virtual_size,
            named: false,
            backing: None,
            owned: false,
            allocated: 0,
            internal: Vec::new(),
            dependents: Vec::new(),
        }
    }
}

setters!(Layer {
    named: bool,
    backing: Option<LayerName>,
    owned: bool,
    allocated: u64,
    internal: Vec<InternalPoint>,
    dependents: Vec<DiskAddress>,
});

/// A disk's layers as they are on the machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiskState {
    /// The disk.
    pub target: Target,
    /// The layer that the domain writes.
    pub active: LayerName,
    /// The active chain from the active layer down, then every other owned layer.
    pub layers: Vec<Layer>,
    /// True if a hypervisor has the active chain open. The service sets it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub attached: bool,
    /// True if it is attached, and a server has it open that reads the format itself
    /// ([`crate::hypervisor::AttachedDisk::is_served`]). The service sets it.
    #[serde(skip)]
    pub served: bool,
    /// The dependents of the active layer that name the configured path as their backing file. Their content
    /// changes as soon as that path names a layer with other content.
    #[serde(default)]
    #[schemars(with = "Vec<String>")]
    pub path_dependents: Vec<DiskAddress>,
    /// Files beside the layers whose backing file is undetermined. While there are any, no layer is merged,
    /// removed or left by a revert.
    #[serde(default)]
    pub undetermined: Vec<Undetermined>,
}

setters!(DiskState {
    attached: bool,
    path_dependents: Vec<DiskAddress>,
    undetermined: Vec<Undetermined>,
});

/// A file that may be backed by a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Undetermined {
    /// The file.
    #[schemars(with = "String")]
    pub file: DiskAddress,
    /// The reason.
    pub why: String,
}

impl Undetermined {
    /// Makes a file whose backing file is undetermined.
    pub fn new(file: impl Into<DiskAddress>, why: impl Into<String>) -> Self {
        Self { file: file.into(), why: why.into() }
    }
}

impl DiskState {
    /// Makes the state of a disk at rest that no file depends on.
    pub fn new(target: Target, active: LayerName, layers: Vec<Layer>) -> Self {
        Self {
            target,
            active,
            layers,
            attached: false,
            served: false,
            path_dependents: Vec::new(),
            undetermined: Vec::new(),
        }
    }

    /// The layer called `name`.
    pub fn layer(&self, name: &LayerName) -> Option<&Layer> {
        self.layers.iter().find(|layer| layer.name == *name)
    }

    /// The layers that are directly backed by `name`.
    pub fn children<'a>(&'a self, name: &'a LayerName) -> impl Iterator<Item = &'a Layer> {
        self.layers.iter().filter(move |layer| layer.backing.as_ref() == Some(name))
    }

    /// The chain of `name`: itself first, the base last.
    pub fn chain(&self, name: &LayerName) -> Vec<&Layer> {
        let mut chain = Vec::new();
        let mut next = self.layer(name);
        while let Some(layer) = next {
            chain.push(layer);
            if chain.len() > self.layers.len() {
                break; // A loop. Inspection refuses loops, so this only bounds the work.
            }
            next = layer.backing.as_ref().and_then(|backing| self.layer(backing));
        }
        chain
    }
}
