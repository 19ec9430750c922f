//! Test cases find what they are for: a backend that keeps the promise passes, one that breaks it fails.

use std::env;
use std::process::{Command, ExitCode};
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use backend_raw::Raw;
use libtest_mimic::{Arguments, Trial};
use snapcore::backend::AnyDiskSnapshotter;
use snapcore_testkit::{TestBackend, wrong};

/// What the backend under test does wrong; set in the copies of this program that run the kit.
const WRONG: &str = "WRONG_BACKEND";

struct Files(String);

impl TestBackend for Files {
    fn backend(&self) -> Arc<AnyDiskSnapshotter> {
        let right = AnyDiskSnapshotter::of(Arc::new(Raw::new()));
        if self.0 == "free deletes" { wrong::free_deletes(right) } else { right }
    }

    fn offers(&self, method: &str) -> bool {
        method == "copy"
    }
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
    let case = |name: &str, wrong: &'static str, case: &'static str, message: &'static str| {
        let attempt = move || is_found(wrong, case, message).map_err(|error| format!("{error:#}").into());
        Trial::test(name, attempt)
    };
    let cases = vec![
        case("free_deletes", "free deletes", "delete_cost_is_not_always_zero", "to delete any frees"),
        case("no_flush", "no flush", "revert_power_loss_is_atomic", "power lost after"),
    ];
    libtest_mimic::run(&Arguments::from_args(), cases).exit_code()
}
