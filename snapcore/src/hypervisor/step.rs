//! The steps of a hypervisor in a plan, and their outcomes. They are recorded in the journal.

use std::time::Duration;

use camino::Utf8PathBuf;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::address::DiskAddress;
use crate::domain::Domain;
use crate::group::GroupMember;
use crate::name::Target;
use crate::snapshot::{Consistency, Snapshot};

/// Freezing of the guest's file systems during the cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Quiesce {
    /// They are not frozen.
    #[default]
    No,
    /// They are frozen if the guest can. Otherwise the snapshot is created anyway, and reports it.
    Try,
    /// They are frozen, or no snapshot is created.
    Require,
}

/// Power state of the domain after an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum PowerAfter {
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
    /// The domain is off: its process ends.
    Off,
}

/// The cut of one disk: what happens to it at the instant of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "take", rename_all = "kebab-case")]
pub enum DiskInstant {
    /// The guest writes to an empty overlay from then on. The overlay exists and is durable.
    Overlay {
        /// The overlay's permanent address.
        #[serde(rename = "file")]
        #[schemars(with = "String")]
        address: DiskAddress,
        /// Its format.
        format: String,
    },
    /// The active image gets an internal snapshot.
    Internal {
        /// Its name.
        tag: String,
    },
    /// The hypervisor does nothing. The disk's backend takes the point, by steps nested in the cut. The guest
    /// is paused then, and everything that it wrote is in the file.
    ByBackend,
}

/// Saving of memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct MemoryPlan {
    /// The memory image.
    #[serde(rename = "file")]
    #[schemars(with = "String")]
    pub image: DiskAddress,
    /// True if the guest runs meanwhile.
    pub live: bool,
    /// Time limit of pre-copy, in milliseconds, after which the guest is paused. It applies where the
    /// hypervisor must repeatedly copy the pages that the guest changes.
    pub budget_ms: u64,
}

impl MemoryPlan {
    /// Plans the saving of memory.
    pub fn new(image: impl Into<DiskAddress>, live: bool, budget_ms: u64) -> Self {
        Self { image: image.into(), live, budget_ms }
    }
}

/// The restart of a domain after a detached section in which its current state was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct Restart {
    /// The source of the restart.
    pub from: RestartSource,
    /// True to keep the current memory until the restart is certain, if the hypervisor must end the domain
    /// for it. A failure then restores the previous guest.
    pub safety: bool,
    /// The file from which the domain is created instead of its own, if its hypervisor uses one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub config: Option<Utf8PathBuf>,
    /// True if the hypervisor ends the domain and creates it again.
    #[serde(default)]
    pub recreated: bool,
    /// The memory image of the state that is given up, if it was saved just before and the guest has been
    /// paused since: a failure restores the previous guest from it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub kept: Option<DiskAddress>,
}

impl Restart {
    /// Makes a restart by a hypervisor that keeps the domain.
    pub fn new(from: RestartSource, safety: bool) -> Self {
        Self { from, safety, config: None, recreated: false, kept: None }
    }
}

setters!(Restart {
    config: Option<Utf8PathBuf>,
    recreated: bool,
    kept: Option<DiskAddress>,
});

/// The source of a domain's restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum RestartSource {
    /// This memory image: the guest continues from its instant.
    Memory(#[schemars(with = "String")] DiskAddress),
    /// A boot, as after a reset.
    Boot,
    /// None: the domain is off.
    Off,
}

/// One action of a hypervisor on a whole domain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum DomainStep {
    /// Reads a memory image and compares it with its checksums, before anything is changed.
    CheckMemory {
        /// The memory image.
        #[serde(rename = "file")]
        #[schemars(with = "String")]
        image: DiskAddress,
    },
    /// The cut of a snapshot: all disks, and memory, at one instant. The steps nested in it (which move
    /// configured paths) run while the guest is paused. Undo merges the overlays down again, with what the
    /// guest wrote since, and deletes tags.
    Instant {
        /// The disks.
        disks: Vec<(Target, DiskInstant)>,
        /// True if the guest ran when this was planned. An undo after a crash finds the guest paused and then
        /// resumes it.
        running: bool,
        /// Memory, if it is saved.
        memory: Option<MemoryPlan>,
        /// Freezing of file systems during the cut.
        quiesce: Quiesce,
        /// Time limit of the freeze, in milliseconds.
        quiesce_limit_ms: u64,
        /// Power state of the guest afterwards; absent: the same as before.
        then: Option<PowerAfter>,
        /// True if a revert follows at once, and the guest is paused for that alone. If no revert follows,
        /// the recovery resumes it.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        for_revert: bool,
    },
    /// Waits until the memory of the instant is written, and makes it a complete and durable memory image.
    /// Undo removes the image, also a partial one.
    SaveMemory {
        /// The memory image.
        #[serde(rename = "file")]
        #[schemars(with = "String")]
        image: DiskAddress,
        /// The tag of its internal snapshot.
        tag: String,
        /// Compression level, 1 to 19; 0: none.
        #[serde(default)]
        compress: u8,
    },
    /// Reopens each frozen image by its permanent name. The hypervisor may know it by the configured path,
    /// which names another image by now.
    ReopenByName {
        /// The disks.
        disks: Vec<Target>,
    },
    /// Opens a detached section: pauses the guest and closes the files of these disks, so that they can be
    /// changed like disks at rest. Undo reopens what the configured paths name, and resumes the guest if it
    /// was paused only for this.
    Detach {
        /// The disks.
        disks: Vec<Target>,
        /// True if the guest ran when this was planned. The end of the section then resumes it, also after a
        /// crash.
        running: bool,
        /// The restart of the domain, if the guest's current state is given up. A hypervisor that cannot
        /// close the disks of a running guest ends the domain in this case.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        restart: Option<Restart>,
    },
    /// Opens for the disks what the configured paths name now. The guest is still paused. Undo closes the
    /// files again.
    Attach {
        /// The disks.
        disks: Vec<Target>,
        /// The same as of the detached section. A hypervisor that ended the domain creates it again here,
        /// paused, so that a failure can still be undone.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        restart: Option<Restart>,
    },
    /// Loads media into drives, as the memory that is loaded next expects them. Part of a detached section.
    Media {
        /// The drives that have another medium now.
        media: Vec<Medium>,
    },
    /// Ends a detached section: loads memory, resets the guest, or neither; then resumes it or leaves it
    /// paused.
    Continue {
        /// The memory image to load.
        #[schemars(with = "Option<String>")]
        memory: Option<DiskAddress>,
        /// True if the guest is reset: its disks have changed and its memory is not restored.
        reset: bool,
        /// Power state afterwards; absent: the same as before the detached section, which the step that
        /// opened it records.
        power: Option<PowerAfter>,
    },
    /// Removes a memory image.
    RemoveMemory {
        /// The memory image.
        #[serde(rename = "file")]
        #[schemars(with = "String")]
        image: DiskAddress,
    },
    /// Enters new domains into the catalogue, whose disks exist, and writes their manifests. The engine does
    /// it: no hypervisor gets this step.
    Register {
        /// The domains.
        domains: Vec<Domain>,
        /// The first snapshot of each, in the same order: the one that it is a clone of, with memory. Empty:
        /// they have none.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        snapshots: Vec<Snapshot>,
    },
    /// Waits until the operations of the other domains of a group have committed, and commits those that a
    /// crash left ready. It is a step of the operation that decides about the group, which therefore does not
    /// end before. The engine does it: no hypervisor gets this step.
    CommitOthers {
        /// The operations of the other domains.
        members: Vec<GroupMember>,
    },
    /// Gives clones the memory of a snapshot, in the directories in which they are made. The engine asks the
    /// hypervisor for it without a connection to the domain. Undo removes it.
    CloneMemory {
        /// The snapshot's memory image.
        #[serde(rename = "file")]
        #[schemars(with = "String")]
        image: DiskAddress,
        /// The memory image of each clone, by its address until the clones are published.
        #[schemars(with = "Vec<String>")]
        clones: Vec<DiskAddress>,
        /// True if the guests are to share what none of them writes.
        shares: bool,
    },
}

/// Content of a drive with a removable medium.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct Medium {
    /// The drive, by the hypervisor's name.
    pub drive: String,
    /// The address of the medium, which the hypervisor reads; absent: the drive is empty.
    #[serde(rename = "file")]
    #[schemars(with = "Option<String>")]
    pub address: Option<DiskAddress>,
    /// The medium's format, by the hypervisor's name.
    pub format: String,
    /// True if the guest can write it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub writable: bool,
}

impl Medium {
    /// Makes an empty drive.
    pub fn new(drive: impl Into<String>, format: impl Into<String>) -> Self {
        Self { drive: drive.into(), format: format.into(), address: None, writable: false }
    }
}

setters!(Medium {
    address: Option<DiskAddress>,
    writable: bool,
});

/// Effect of an operation on the guest of a domain, other than a pause.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum GuestChange {
    /// The snapshot's memory was loaded into the running process: the guest continues from the instant of the
    /// snapshot.
    Restored,
    /// The guest was reset in the running process: it boots from the disks of the snapshot, and the content
    /// of its memory is lost.
    Reset,
    /// Its domain was destroyed, and created again from the snapshot's memory.
    RecreatedFromMemory,
    /// Its domain was destroyed, and created again: it boots from the disks of the snapshot.
    Recreated,
    /// The domain was off, and was started from the snapshot's memory.
    Started,
    /// Its domain was ended: it is off.
    Ended,
}

impl std::fmt::Display for GuestChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Restored => "the snapshot's memory was restored",
            Self::Reset => "guest was reset",
            Self::RecreatedFromMemory => "the domain was destroyed and restored from the snapshot's memory",
            Self::Recreated => "the domain was destroyed and created again; its guest boots",
            Self::Started => "the domain was started from the snapshot's memory",
            Self::Ended => "the domain was ended and is off",
        })
    }
}

/// The process or domain that an operation started or created again.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[non_exhaustive]
pub struct StartedDomain {
    /// Process ID, if it is a process.
    pub pid: Option<u32>,
    /// Domain ID, if its hypervisor numbers domains.
    pub domid: Option<u32>,
    /// The command that started it.
    pub command: Vec<String>,
}

impl StartedDomain {
    /// A process, and the command that started it.
    pub fn process(pid: Option<u32>, command: Vec<String>) -> Self {
        Self { pid, domid: None, command }
    }

    /// A domain by its ID.
    pub fn number(domid: u32) -> Self {
        Self { domid: Some(domid), ..Self::default() }
    }
}

/// The outcome of a domain step.
#[derive(Debug, Clone, Default, PartialEq)]
#[non_exhaustive]
pub struct StepOutcome {
    /// Effect on the guest.
    pub guest: Option<GuestChange>,
    /// The started process or domain, if the step started one.
    pub started: Option<StartedDomain>,
    /// Notes for the user.
    pub notes: Vec<String>,
    /// Details of a cut.
    pub taken: Option<Taken>,
    /// Size of a saved memory image, in bytes.
    pub memory_bytes: Option<u64>,
    /// Uncompressed size of a compressed memory image, in bytes.
    pub memory_full: Option<u64>,
    /// Time that the guest was paused, if this step resumed it.
    pub downtime: Option<Duration>,
    /// The command that starts the domain, if the user must run it.
    pub start: Vec<String>,
}

setters!(StepOutcome {
    guest: Option<GuestChange>,
    started: Option<StartedDomain>,
    notes: Vec<String>,
    taken: Option<Taken>,
    memory_bytes: Option<u64>,
    memory_full: Option<u64>,
    downtime: Option<Duration>,
    start: Vec<String>,
});

/// Details of the cut of a snapshot.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Taken {
    /// The instant.
    pub at: Timestamp,
    /// Consistency of the disks and the memory.
    pub consistency: Consistency,
    /// True if the guest ran before.
    pub running: bool,
    /// The method, for people: `background snapshot`, `pre-copy`, `disks only`.
    pub method: String,
}

impl Taken {
    /// Makes the details of a cut.
    pub fn new(at: Timestamp, consistency: Consistency, running: bool, method: impl Into<String>) -> Self {
        Self { at, consistency, running, method: method.into() }
    }
}
