//! Domains and their disks.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::address::DiskAddress;
use crate::error::{Error, ErrorKind, Result};
use crate::host::Host;
use crate::hypervisor::Control;
use crate::name::{DomainName, LayerName, Target};
use crate::policy::Policy;
use crate::snapshot::SnapshotId;

/// The hypervisor of a domain, by its registered name, or none. Addresses of its domains begin with that name
/// (`NAME:ADDRESS`).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(try_from = "String", into = "String")]
#[schemars(with = "String")]
pub struct Hypervisor(Cow<'static, str>);

impl Hypervisor {
    /// No hypervisor: disks at rest.
    pub const NONE: Self = Self(Cow::Borrowed("none"));

    /// The hypervisor of a name that is known when the program is built.
    ///
    /// # Panics
    /// Panics for a name that [`Hypervisor::new`] refuses; for a constant, that is when it is built.
    pub const fn named(name: &'static str) -> Self {
        assert!(is_name(name.as_bytes()), "a hypervisor's name is 1 to 32 small letters, digits and '-'");
        Self(Cow::Borrowed(name))
    }

    /// The hypervisor of this name.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] where it is not 1 to 32 small letters, digits and `-`, beginning with a letter.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        match is_name(name.as_bytes()) {
            true => Ok(Self(Cow::Owned(name))),
            false => Err(Error::new(ErrorKind::Usage, format!("{name:?} is not the name of a hypervisor"))
                .advise("use 1 to 32 small letters, digits and '-', beginning with a letter")),
        }
    }

    /// Its name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns true if no hypervisor runs the domain.
    pub fn is_none(&self) -> bool {
        *self == Self::NONE
    }
}

const fn is_name(name: &[u8]) -> bool {
    let mut at = 0;
    while at < name.len() {
        let letter = name[at].is_ascii_lowercase();
        if !letter && (at == 0 || !(name[at].is_ascii_digit() || name[at] == b'-')) {
            return false;
        }
        at += 1;
    }
    0 < at && at <= 32
}

impl Default for Hypervisor {
    fn default() -> Self {
        Self::NONE
    }
}

impl TryFrom<String> for Hypervisor {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

impl From<Hypervisor> for String {
    fn from(hypervisor: Hypervisor) -> Self {
        hypervisor.0.into_owned()
    }
}

impl std::fmt::Display for Hypervisor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// The place of a disk's active image after an external snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema, Default)]
#[serde(rename_all = "lowercase")]
pub enum ActivePath {
    /// The configured path stays the active image: it is a hard link that moves from layer to layer.
    #[default]
    Keep,
    /// The configured path stays the file that it names; the active image gets a new path, and the domain's
    /// configuration must follow.
    New,
}

/// One disk of a domain, as its configuration has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Disk {
    /// Its name inside the domain.
    pub target: Target,
    /// The address in the domain's configuration. A file or block device of this machine has its absolute
    /// path, which is always the active image under [`ActivePath::Keep`]. Any other disk has `SCHEME:TEXT`.
    #[serde(rename = "path")]
    #[schemars(with = "String")]
    pub address: DiskAddress,
    /// The name of its backend. Stated, never guessed from content.
    pub format: String,
}

impl Disk {
    /// Makes a disk.
    pub fn new(target: Target, address: impl Into<DiskAddress>, format: impl Into<String>) -> Self {
        Self { target, address: address.into(), format: format.into() }
    }
}

/// A disk, and the catalogue's records of its layers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct DiskRecord {
    /// The disk.
    #[serde(flatten)]
    pub disk: Disk,
    /// The layer that the domain writes.
    pub active: LayerName,
    /// The layers that domsnap may merge and remove: those that it made, registered or imported. Every other
    /// image in a chain belongs to another owner and is only read.
    pub owned: Vec<LayerName>,
}

impl DiskRecord {
    /// Makes the record of a disk of which no layer is ours.
    pub fn new(disk: Disk, active: LayerName) -> Self {
        Self { disk, active, owned: Vec::new() }
    }
}

setters!(DiskRecord {
    owned: Vec<LayerName>,
});

/// A domain as the catalogue knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Domain {
    /// Its name: the registered one, or one made from the path of its first image.
    pub name: DomainName,
    /// Set if it was named by its image paths and never registered.
    pub unregistered: bool,
    /// The hypervisor that runs it.
    pub hypervisor: Hypervisor,
    /// The machine that it runs on, and that the paths of its disks are paths of. Absent: the machine has no
    /// ID, or an older domsnap recorded the domain; then it is this machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    /// The connection to it when it runs; absent where no hypervisor runs it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<Control>,
    /// The placement of active images.
    pub active_path: ActivePath,
    /// Its disks, in the order of its configuration.
    pub disks: Vec<DiskRecord>,
    /// The snapshot from which the current state derives.
    pub current: Option<SnapshotId>,
    /// The machines that its snapshots were taken on: few, because most were taken on the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub machines: Vec<Machine>,
    /// When its snapshots are taken without a user, and which of these are kept. It is in the catalogue
    /// alone: manifests are data of whoever owns the images' directory, and a policy has commands.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Policy>,
}

impl Domain {
    /// Makes a registered domain at rest without snapshots, of any host.
    pub fn new(name: DomainName, disks: Vec<DiskRecord>) -> Self {
        Self {
            name,
            disks,
            unregistered: false,
            hypervisor: Hypervisor::NONE,
            host: None,
            control: None,
            active_path: ActivePath::Keep,
            current: None,
            machines: Vec::new(),
            policy: None,
        }
    }
}

setters!(Domain {
    unregistered: bool,
    hypervisor: Hypervisor,
    host: Option<Host>,
    control: Option<Control>,
    active_path: ActivePath,
    current: Option<SnapshotId>,
    machines: Vec<Machine>,
    policy: Option<Policy>,
});

/// A running domain's machine, as its hypervisor described it at a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Machine {
    /// The name that snapshots refer to: made from the record, so that equal machines have equal names.
    pub id: String,
    /// A summary in one line, for people.
    #[serde(default)]
    pub summary: String,
    /// The hypervisor's own record ([`crate::hypervisor::DomainInfo::machine`]).
    pub record: serde_json::Value,
}

setters!(Machine { id: String });

impl Machine {
    /// The machine of a record.
    pub fn new(record: serde_json::Value, summary: impl Into<String>) -> Self {
        // Object keys are sorted, so equal records are equal texts.
        let text = record.to_string();
        let id = format!("{:08x}{:08x}", crc32fast::hash(text.as_bytes()), text.len());
        Self { id, summary: summary.into(), record }
    }
}

impl Domain {
    /// The disk called `target`.
    pub fn disk(&self, target: &Target) -> Option<&DiskRecord> {
        self.disks.iter().find(|record| record.disk.target == *target)
    }

    /// The machine called `id`.
    pub fn machine(&self, id: &str) -> Option<&Machine> {
        self.machines.iter().find(|machine| machine.id == id)
    }
}
