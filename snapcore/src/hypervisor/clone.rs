//! Clones with memory: further machines that continue from the memory of one snapshot.

use camino::Utf8PathBuf;
use serde::{Deserialize, Serialize};

use super::saver::Control;
use crate::address::DiskAddress;
use crate::domain::Domain;
use crate::name::DomainName;

/// The network of a clone whose guest continues from a memory that other guests continue from too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum CloneNetwork {
    /// Its links are down. The user sets them up when the guest has an identity of its own.
    #[default]
    Off,
    /// Its links are up. The guest has the addresses of the snapshot.
    Same,
    /// Its network devices are removed from the guest and added again, with new MAC addresses.
    Swap,
}

/// The place of one clone's machine.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct MachinePlace {
    /// The name of the new domain.
    pub domain: DomainName,
    /// The directory for its sockets and logs: an absolute path, which does not exist yet.
    pub directory: Utf8PathBuf,
    /// Its disks: the address in the source's configuration, and the address in its own.
    pub disks: Vec<(DiskAddress, DiskAddress)>,
}

impl MachinePlace {
    /// The place of a machine with these disks.
    pub fn new(
        domain: DomainName,
        directory: impl Into<Utf8PathBuf>,
        disks: Vec<(DiskAddress, DiskAddress)>,
    ) -> Self {
        Self { domain, directory: directory.into(), disks }
    }
}

/// A question to a hypervisor: the machines of clones, before anything is made.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct CloneMachines<'a> {
    /// The source.
    pub domain: &'a Domain,
    /// The machine that was recorded with the snapshot.
    pub machine: &'a serde_json::Value,
    /// The memory image of the snapshot.
    pub image: &'a DiskAddress,
    /// The clones.
    pub clones: &'a [MachinePlace],
    /// The network that they are to have.
    pub network: CloneNetwork,
    /// True if a program is to be run in each guest, by its agent.
    pub hook: bool,
}

impl<'a> CloneMachines<'a> {
    /// Asks for the machines of clones without a link.
    pub fn new(
        domain: &'a Domain,
        machine: &'a serde_json::Value,
        image: &'a DiskAddress,
        clones: &'a [MachinePlace],
    ) -> Self {
        Self { domain, machine, image, clones, network: CloneNetwork::Off, hook: false }
    }
}

setters!(<'a> CloneMachines<'a> {
    network: CloneNetwork,
    hook: bool,
});

/// A hypervisor's answer: the machines of clones.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct ClonedMachines {
    /// How each clone is reached and started, in the order of the question.
    pub controls: Vec<Control>,
    /// The machine's record of each, in the same order.
    pub records: Vec<serde_json::Value>,
    /// True if the clones share the snapshot's memory; otherwise each reads all of it when it starts.
    pub shares: bool,
    /// Bytes that are written once, for all clones together.
    pub bytes: u64,
    /// Notes for the user.
    pub notes: Vec<String>,
}

setters!(ClonedMachines {
    controls: Vec<Control>,
    records: Vec<serde_json::Value>,
    shares: bool,
    bytes: u64,
    notes: Vec<String>,
});

/// Input for the first start of a clone with memory.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct StartClone<'a> {
    /// The clone, as it is registered.
    pub domain: &'a Domain,
    /// Its machine's record.
    pub machine: &'a serde_json::Value,
    /// Its memory image.
    pub image: &'a DiskAddress,
    /// Its network.
    pub network: CloneNetwork,
    /// A shell script that its guest runs once, before its links go up.
    pub hook: Option<&'a [u8]>,
}

impl<'a> StartClone<'a> {
    /// Makes the input for the start of a clone without a link.
    pub fn new(domain: &'a Domain, machine: &'a serde_json::Value, image: &'a DiskAddress) -> Self {
        Self { domain, machine, image, network: CloneNetwork::Off, hook: None }
    }
}

setters!(<'a> StartClone<'a> {
    network: CloneNetwork,
    hook: Option<&'a [u8]>,
});
