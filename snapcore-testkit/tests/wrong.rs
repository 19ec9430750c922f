//! Test cases find what they are for: a backend that keeps the promise passes, one that breaks it fails.

use std::env;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use backend_raw::Raw;
use libtest_mimic::{Arguments, Trial};
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::TestBackend;
use snapcore_testkit::wrong::{self, Wrong};

/// What the backend under test does wrong; set in the copies of this program that run the kit.
const WRONG: &str = "WRONG_BACKEND";

/// Each broken promise, the test case that finds it, and a part of its message.
const BROKEN: [(Wrong, &str, &str); 14] = [
    (Wrong::FreeDeletes, "delete_cost_is_not_always_zero", "to delete any frees"),
    (Wrong::LatePoint, "live_point_is_of_instant", "and the instant was at"),
    (Wrong::EarlyPoint, "live_point_is_of_instant", "and the instant was at"),
    (Wrong::LateSecondDisk, "live_disks_share_instant", "the disks are of different instants"),
    // The backend's own checksums find it first.
    (Wrong::SharedPoint, "live_writes_never_reach_point", "is not what was copied into it"),
    (Wrong::EarlyRevert, "live_revert_is_detached", "and the instant was at"),
    (Wrong::DeleteDamages, "live_delete_keeps_current", "what the guest wrote"),
    (Wrong::DeleteDamages, "live_delete_crash_is_completed", "what the guest wrote"),
    (Wrong::LatePoint, "live_dry_run_changes_nothing", "steps at the instant"),
    (Wrong::PlanWrites, "live_dry_run_changes_nothing", ".planned"),
    (Wrong::UndoRestores, "live_failed_create_is_undone", "what the guest wrote"),
    (Wrong::UndoLeaves, "live_cancel_is_atomic", "it was undone, and left"),
    (Wrong::UndoLeaves, "live_create_crash_keeps_writes", "it was undone, and left"),
    (Wrong::UndoLeaves, "live_revert_crash_is_atomic", "which crashed at moment"),
];

/// A test backend that says of points which the backend takes that a hypervisor does.
const HYPERVISOR: &str = "points by a hypervisor";

struct Files(String);

impl TestBackend for Files {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        let right = AnyDiskSnapshotter::of(Arc::new(Raw::new()));
        match BROKEN.iter().find(|(wrong, ..)| name_of(*wrong) == self.0) {
            Some((wrong, ..)) => wrong::backend(right, *wrong),
            None => right,
        }
    }

    fn takes_live_points(&self, _: &str) -> bool {
        self.0 != HYPERVISOR
    }

    fn offers(&self, method: &str) -> bool {
        method == "copy"
    }
}

fn name_of(wrong: Wrong) -> String {
    format!("{wrong:?}")
}

/// Runs one test case on a backend that does `wrong`, and returns what it printed and if it passed.
fn passes(wrong: &str, case: &str) -> Result<(bool, String)> {
    let mut kit = Command::new(env::current_exe()?);
    kit.args(["--exact", &format!("copy::{case}")]).env(WRONG, wrong).env("TESTKIT_POWER_CASES", "40");
    if wrong == "no flush" {
        // The record of a backend that never flushes a file of a disk.
        kit.env("FAULTFS_FORGET_FLUSH", "/disks/");
    }
    let output = kit.output()?;
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(printed.contains("running 1 test"), "{case} did not run: {printed}");
    Ok((output.status.success(), printed))
}

fn is_found(wrong: &str, case: &str, message: &str) -> Result<()> {
    let (right, printed) = passes("nothing", case)?;
    ensure!(right, "a right backend fails {case}: {printed}");
    let (missed, printed) = passes(wrong, case)?;
    ensure!(!missed, "a backend with {wrong} passes {case}");
    printed.contains(message).then_some(()).with_context(|| format!("it fails for another reason: {printed}"))
}

fn main() -> ExitCode {
    if let Ok(wrong) = env::var(WRONG) {
        return snapcore_testkit::run(Files(wrong));
    }
    let broken = BROKEN.map(|(wrong, case, message)| {
        let name = format!("{}::{case}", name_of(wrong));
        Trial::test(name, move || {
            is_found(&name_of(wrong), case, message).map_err(|error| format!("{error:#}").into())
        })
    });
    let no_flush = Trial::test("no_flush", || {
        let found = is_found("no flush", "revert_power_loss_is_atomic", "power lost after");
        found.map_err(|error| format!("{error:#}").into())
    });
    // No right one passes it: the points of this backend are never a hypervisor's.
    let left_to_hypervisor = Trial::test("left_to_hypervisor", || {
        let (passed, printed) = passes(HYPERVISOR, "live_plan_leaves_points_to_hypervisor")?;
        let found = printed.contains("let takes_live_points return true");
        (!passed && found).then_some(()).ok_or_else(|| printed.into())
    });
    let cases = broken.into_iter().chain([no_flush, left_to_hypervisor]).collect();
    libtest_mimic::run(&Arguments::from_args(), cases).exit_code()
}
