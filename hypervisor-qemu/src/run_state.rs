//! QEMU's run states, and the operations that each permits.
//!
//! QEMU aborts ("invalid runstate transition") on an operation that its table of transitions does not have.
//! So nothing is asked of it in a state that this table does not allow, and an unknown state is refused.
//!
//! | state | disks: create, merge, detach | memory is saved by | memory is loaded |
//! |---|---|---|---|
//! | `running`, `suspended` | yes | background snapshot, pre-copy, or paused | as it is |
//! | `paused` | yes | background snapshot, or `snapshot-save` | as it is |
//! | `prelaunch`, `debug` | yes | `snapshot-save` | as it is |
//! | `io-error`, `guest-panicked`, `watchdog` | yes | `snapshot-save` | after a reset |
//! | `shutdown`, `internal-error` | yes | `snapshot-save` | after a reset (`cont` is refused without) |
//! | `restore-vm` | yes | no: it was loaded in part | as it is |
//! | `save-vm`, `finish-migrate`, `inmigrate` | no: wait until QEMU has ended it | no | no |
//! | `postmigrate`, `colo` | no: another QEMU may have the disks | no | no |
//!
//! * A background snapshot goes through `paused`. Only `paused` and a running state lead there and back. A
//!   migration that runs to its end leaves `postmigrate`, from which only `cont` leads; a paused guest must
//!   not get that. `snapshot-save` changes no state, so it is right in every state in which the guest is
//!   paused.
//! * `suspended` (the guest sleeps, S3) counts as running: the guest can wake at any time. QEMU before 9.0
//!   cannot keep such a guest asleep, so nothing is done there.
//! * The reset before a load takes QEMU from a state that describes a guest which is about to be replaced.
//!   The guest is `prelaunch` then, and paused until `cont`.
//!
//! A snapshot records whether the guest ran, not the name of the state. The memory of a guest that panicked
//! is restored paused, and continues from there when it is resumed.

use serde::{Deserialize, Serialize};

/// `query-status`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct RunState {
    /// True if the guest runs, or sleeps and can wake at any time.
    pub running: bool,
    /// QEMU's name of the state: `running`, `paused`, `postmigrate`, `restore-vm`, `shutdown`, ...
    pub word: String,
}

/// Methods to save memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SaveBy {
    /// The guest runs: it is paused by us, or by a migration.
    AnyMethod,
    /// A background snapshot, or `snapshot-save`.
    Paused,
    /// `snapshot-save` alone.
    SnapshotSave,
}

/// The operations that a run state permits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Permits {
    /// The reason why its disks cannot be worked on, and the advice.
    pub(crate) disks: Result<(), Refusal>,
    /// The method to save its memory, or the reason why there is none.
    pub(crate) memory: Result<SaveBy, Refusal>,
    /// True if the guest is reset before memory is loaded.
    pub(crate) reset_before_load: bool,
}

/// The reason for a refusal, and the advice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) why: &'static str,
    pub(crate) advice: &'static str,
}

impl RunState {
    pub(crate) fn new(running: bool, word: &str) -> Self {
        Self { running: running || word == "suspended", word: word.to_owned() }
    }

    /// Returns the permitted operations. `keeps_asleep`: a sleeping guest stays stopped after `stop`
    /// ([`crate::discover::Abilities::keeps_suspended`]).
    pub(crate) fn permits(&self, keeps_asleep: bool) -> Permits {
        let usable = |memory, reset_before_load| Permits { disks: Ok(()), memory, reset_before_load };
        let refused = |why, advice| {
            let refusal = Refusal { why, advice };
            Permits { disks: Err(refusal), memory: Err(refusal), reset_before_load: false }
        };
        match self.word.as_str() {
            "running" => usable(Ok(SaveBy::AnyMethod), false),
            "suspended" if keeps_asleep => usable(Ok(SaveBy::AnyMethod), false),
            "suspended" => refused(
                "the guest sleeps, and this QEMU cannot keep it from waking up in the middle",
                "wake it up first (`system_wakeup`)",
            ),
            "paused" => usable(Ok(SaveBy::Paused), false),
            "prelaunch" | "debug" => usable(Ok(SaveBy::SnapshotSave), false),
            "io-error" | "guest-panicked" | "watchdog" | "shutdown" | "internal-error" => {
                usable(Ok(SaveBy::SnapshotSave), true)
            }
            "restore-vm" => {
                let half = Refusal {
                    why: "its memory is that of a restore that failed or has not ended",
                    advice: "take the disks alone (--disk-only), reset the guest, or revert it to a snapshot",
                };
                usable(Err(half), false)
            }
            "save-vm" => refused("QEMU is saving its memory", "wait until that has ended"),
            "finish-migrate" => refused("QEMU is ending a migration", "wait until that has ended"),
            "inmigrate" => refused(
                "QEMU waits for the guest's memory from elsewhere",
                "wait until it has arrived, or start the guest without -incoming",
            ),
            "postmigrate" => refused(
                "the guest was migrated away, and its disks are another QEMU's, or a file has its memory",
                "if no other QEMU has these disks, resume it (`cont`); else use the one that the guest runs in",
            ),
            "colo" => refused(
                "the guest is the secondary of a COLO pair, and its disks are the primary's to write",
                "use the primary, or end the replication",
            ),
            _ => refused(
                "domsnap does not know this run state",
                "bring the guest to `running` or `paused`, or shut it down",
            ),
        }
    }

    /// Returns true if an event stopped the guest, and not a command.
    pub(crate) fn stopped_by_itself(&self) -> bool {
        let states = ["guest-panicked", "internal-error", "io-error", "shutdown", "watchdog"];
        states.contains(&self.word.as_str())
    }

    /// Returns true if QEMU refuses to resume the guest before a reset.
    pub(crate) fn must_be_reset(&self) -> bool {
        matches!(self.word.as_str(), "shutdown" | "internal-error")
    }

    /// Returns the remark for the user on memory that is saved in this state: it is restored paused.
    pub(crate) fn remark(&self) -> Option<&'static str> {
        match self.word.as_str() {
            "io-error" => Some("the guest was stopped by an error of a disk"),
            "guest-panicked" => Some("the guest had panicked"),
            "watchdog" => Some("the guest was stopped by its watchdog"),
            "shutdown" => Some("the guest had switched itself off"),
            "internal-error" => Some("the guest was stopped by an internal error of QEMU"),
            "prelaunch" => Some("the guest had not run since its last reset or restore"),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every state of QEMU 7.2 and 10.0.
    const ALL: [&str; 16] = [
        "colo",
        "debug",
        "finish-migrate",
        "guest-panicked",
        "inmigrate",
        "internal-error",
        "io-error",
        "paused",
        "postmigrate",
        "prelaunch",
        "restore-vm",
        "running",
        "save-vm",
        "shutdown",
        "suspended",
        "watchdog",
    ];

    /// Every state of QEMU has a row, and an unknown state is refused.
    #[test]
    fn every_run_state_is_known() {
        let unknown = RunState::new(false, "dreaming").permits(true);
        let why = unknown.disks.expect_err("refused").why;
        assert!(why.contains("does not know"));
        for word in ALL {
            let permits = RunState::new(word == "running", word).permits(true);
            assert!(permits.disks.err().is_none_or(|refusal| refusal.why != why), "{word} is not known");
        }
    }

    /// A background snapshot is permitted only in running states and in `paused`.
    #[test]
    fn background_snapshot_needs_running_or_paused() {
        for word in ALL {
            let memory = RunState::new(false, word).permits(true).memory;
            let background = matches!(memory, Ok(SaveBy::AnyMethod | SaveBy::Paused));
            assert_eq!(background, matches!(word, "running" | "suspended" | "paused"), "{word}");
        }
    }

    /// A sleeping guest counts as running if this QEMU can stop it; otherwise it is refused.
    #[test]
    fn sleeping_guest_counts_as_running() {
        let state = RunState::new(false, "suspended");
        assert!(state.running && state.permits(true).disks.is_ok());
        assert!(state.permits(false).disks.is_err() && state.permits(false).memory.is_err());
    }
}
