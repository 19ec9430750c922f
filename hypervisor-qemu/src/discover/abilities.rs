//! What a QEMU can do, by its own schema; never concluded from its version.

use qmp::Schema;
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result},
    machine::Machine,
};

/// What a QEMU can do. That it knows a word does not mean that this host, or this guest's memory, allows it:
/// background-snapshot needs userfaultfd, and memory that is not shared.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Abilities {
    /// Memory is written while the guest runs on, by write-protecting it.
    pub background_snapshot: bool,
    /// A background snapshot leaves the guest paused until it is told to go on, and running after a failure. Seen to hold in
    /// 10.0; 7.2 resumes the guest by itself, and one that is cancelled, or fails, leaves the guest's processors hanging for
    /// ever. No word of the schema's tells; this is whether there is mapped-ram, which came in the version (9.0) that mended
    /// the first.
    pub background_snapshot_holds: bool,
    /// Each page at a place of its own in a file.
    pub mapped_ram: bool,
    /// A migration goes to, and comes from, a file, at an offset.
    pub file_migration: bool,
    /// A migration waits, with the guest stopped, before it ends.
    pub pause_before_switchover: bool,
    /// A node's backing image can be replaced.
    pub blockdev_reopen: bool,
    /// VM state is loaded from a named node.
    pub snapshot_load: bool,
    /// A job waits before it ends, until it is told to.
    pub job_finalize: bool,
    /// Overlays and internal snapshots are put into one transaction.
    pub transaction: bool,
    /// Who stands on what is told.
    pub block_graph: bool,
    /// A failed start from a memory image leaves the process alive, on request.
    pub exit_on_error: bool,
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
        }
    }

    /// Whether, without KVM too, what a guest writes during a pre-copy is copied again.
    ///
    /// Before 9.0 it may not be: the marks of many pages were cleared without telling the emulated processors, which wrote on
    /// without marking (mended by "physmem: Fix migration dirty bitmap coherency with TCG memory access"). Mapped-ram came in
    /// the same version.
    pub fn emulation_marks_writes(&self) -> bool {
        self.mapped_ram
    }

    /// Returns true if `stop` stops a guest that sleeps (S3): it stays so until `cont`. Before 9.0 it does
    /// nothing, and the guest may wake at any time. Mapped-ram came in the same version.
    pub(crate) fn keeps_suspended(&self) -> bool {
        self.mapped_ram
    }

    /// Asks a QEMU, each time anew: [`Machine::abilities`] asks once.
    ///
    /// # Errors
    /// Those of the connection.
    pub(crate) async fn read(machine: &Machine) -> Result<Self> {
        let schema = machine.schema().await?;
        Ok(Self::of(&schema))
    }
}

impl Machine {
    /// What this QEMU can be asked; asked for once a connection.
    pub(crate) async fn schema(&self) -> Result<std::sync::Arc<Schema>> {
        let schema = self.qmp().schema().await;
        schema.map_err(|error| Error::qmp("asking QEMU what it can do", self.qmp().socket().display(), error))
    }
}
