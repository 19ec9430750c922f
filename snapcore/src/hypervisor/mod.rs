//! The contract of a hypervisor: its operations on a running domain.
//!
//! A plan has steps of disks and steps of the domain ([`crate::HypervisorStep`]). The latter are
//! journalled like the others, and are carried out by a [`LiveDomain`]. For a disk that a hypervisor has
//! open, a backend's steps use [`AttachedDisk`]. So a backend knows no hypervisor, and a hypervisor no
//! format.

mod clone;
mod live;
mod memory;
mod saver;
mod step;

pub use clone::{CloneMachines, CloneNetwork, ClonedMachines, MachinePlace, StartClone};
pub use live::{
    AttachedDisk, AttachedMerge, DomainContext, Inside, LiveDomain, Meeting, OpenChain, OpenLayer, Rendezvous,
};
pub use memory::{MemoryDirectory, MemoryStore};
pub use saver::{
    Control, DomainInfo, FIRMWARE_VARIABLES, HypervisorProfile, Obstacle, SeenDisk, StartFromMemory,
    TPM_STATE, VmStateSaver,
};
pub use step::{
    DiskInstant, DomainStep, GuestChange, Medium, MemoryPlan, PowerAfter, Quiesce, Restart, RestartSource,
    StartedDomain, StepOutcome, Taken,
};
