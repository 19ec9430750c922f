//! The abilities of a QEMU, from its own schema; never concluded from its version.

use qmp::Schema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    machine::Machine,
};

/// The abilities of a QEMU. A word in its schema does not mean that this host, or this guest's memory, allows
/// it: background-snapshot needs userfaultfd, and memory that is not shared.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Abilities {
    /// Memory is written while the guest keeps running, by write-protecting it.
    pub background_snapshot: bool,
    /// A background snapshot leaves the guest paused until `cont`, and running after a failure. QEMU 10.0 was
    /// seen to do so. QEMU 7.2 resumes the guest by itself; one that is cancelled or fails leaves the guest's
    /// processors hanging for ever. The schema has no word for this. The field is true if mapped-ram is
    /// there, which came in the version (9.0) that fixed the first of these.
    pub background_snapshot_holds: bool,
    /// Each page has a fixed offset in a file.
    pub mapped_ram: bool,
    /// A migration can be written to, and read from, a file at an offset.
    pub file_migration: bool,
    /// A migration waits before its end, with the guest stopped.
    pub pause_before_switchover: bool,
    /// A node's backing image can be replaced.
    pub blockdev_reopen: bool,
    /// VM state is loaded from a named node.
    pub snapshot_load: bool,
    /// A job waits before its end, until it is finalised.
    pub job_finalize: bool,
    /// Overlays and internal snapshots are put into one transaction.
    pub transaction: bool,
    /// The edges of the block graph are reported.
    pub block_graph: bool,
    /// A failed start from a memory image leaves the process alive, on request.
    pub exit_on_error: bool,
    /// RAM is mapped from a file that QEMU opens for reading alone. False if an older domsnap recorded the
    /// abilities.
    #[serde(default)]
    pub read_only_ram: bool,
}

impl Abilities {
    pub(crate) fn of(schema: &Schema) -> Self {
        let capability = |word| schema.has_value("migrate-set-capabilities", "capabilities.capability", word);
        let action = |word| schema.has_value("transaction", "actions.type", word);
        Self {
            background_snapshot: capability("background-snapshot"),
            background_snapshot_holds: capability("background-snapshot") && capability("mapped-ram"),
            mapped_ram: capability("mapped-ram"),
            file_migration: schema.has_argument("migrate", "channels.addr.transport=file.offset"),
            pause_before_switchover: capability("pause-before-switchover"),
            blockdev_reopen: schema.has_command("blockdev-reopen"),
            snapshot_load: schema.has_command("snapshot-load"),
            job_finalize: schema.has_argument("block-commit", "auto-finalize"),
            transaction: action("blockdev-snapshot") && action("blockdev-snapshot-internal-sync"),
            block_graph: schema.has_command("x-debug-query-block-graph"),
            exit_on_error: schema.has_argument("migrate-incoming", "exit-on-error"),
            read_only_ram: schema.has_argument("object-add", "qom-type=memory-backend-file.rom"),
        }
    }

    /// Returns true if a guest's writes during a pre-copy are copied again even without KVM.
    ///
    /// Before 9.0 they may not be. The marks of many pages were cleared without notifying the emulated
    /// processors, which kept writing without marking (fixed by "physmem: Fix migration dirty bitmap
    /// coherency with TCG memory access"). Mapped-ram came in the same version.
    pub fn emulation_marks_writes(&self) -> bool {
        self.mapped_ram
    }

    /// Returns true if `stop` stops a guest that sleeps (S3) until `cont`. Before 9.0 `stop` does nothing to
    /// it, and the guest may wake at any time. Mapped-ram came in the same version.
    pub(crate) fn keeps_suspended(&self) -> bool {
        self.mapped_ram
    }

    /// Reads the abilities of a QEMU again; [`Machine::abilities`] reads them once.
    ///
    /// # Errors
    /// Those of the connection.
    pub(crate) async fn read(machine: &Machine) -> Result<Self> {
        let schema = machine.schema().await?;
        Ok(Self::of(&schema))
    }
}

impl Machine {
    /// Returns QEMU's schema, which is read once per connection.
    pub(crate) async fn schema(&self) -> Result<std::sync::Arc<Schema>> {
        let schema = self.qmp().schema().await;
        schema.map_err(|error| Error::qmp("asking QEMU what it can do", self.qmp().socket().display(), error))
    }
}
