//! Power losses: what was not flushed may be there or not.

use anyhow::{Context, Result, ensure};
use snapcore::backend::Capabilities;

use super::{TestCase, trees_with_deletes};
use crate::fixture::{Fixture, Method, Op};
use crate::powerloss::Baseline;
use crate::seed::from_env;
use crate::test_backend::TestBackend;

fn can_lose_power(_: &Capabilities, subject: &dyn TestBackend) -> bool {
    subject.can_lose_power()
}

pub(super) const CASES: [TestCase; 3] = [
    TestCase::with(
        "create_power_loss_is_atomic",
        "a create in which the power is lost happened whole or not at all",
        can_lose_power,
        |subject, method| losing_power(subject, method, &Op::Create("new".into())),
    ),
    TestCase::with(
        "revert_power_loss_is_atomic",
        "a revert in which the power is lost happened whole or not at all",
        can_lose_power,
        |subject, method| losing_power(subject, method, &Op::Revert { to: "a".into(), save: None }),
    ),
    TestCase::with(
        "delete_power_loss_is_completed",
        "a delete in which the power is lost is completed or did not begin",
        |can, subject| trees_with_deletes(can, subject) && subject.can_lose_power(),
        |subject, method| losing_power(subject, method, &Op::Delete(vec!["b".into()])),
    ),
];

/// Records an operation, and recovers from what a power loss leaves at a sample of the instants in it. The
/// first is the instant after its end: what was reported as done must have happened.
fn losing_power(subject: &dyn TestBackend, method: &Method, op: &Op) -> Result<()> {
    let mut fixture = Fixture::with_snapshots(subject, method)?;
    fixture.crash();
    let root = fixture.test_domain.root.clone();
    // Files are known by inode, and those of a copy have others: so this is read before the record is made.
    let baseline = Baseline::read(root.as_std_path())?;
    let records = fixture.record_child(op)?;
    ensure!(!records.is_empty(), "no file operation was recorded: its disks are not files of this process");
    let before = fixture.model.clone();
    let (seed, cases) = (from_env("TESTKIT_SEED", 1)?, from_env("TESTKIT_POWER_CASES", 12)?.max(1));
    let instants = records.len() as u64 + 1;
    for case in 0..cases {
        let done = match case {
            0 => records.len(),
            _ => usize::try_from((case * instants.div_ceil(cases) + case / instants) % instants)?,
        };
        fixture.crash();
        std::fs::remove_dir_all(&root)?;
        baseline.lose_power(&records, done, seed.wrapping_mul(1000) + case, root.as_std_path())?;
        fixture.model = before.clone();
        let at = || {
            let all = records.len();
            format!(
                "{op:?}, power lost after {done} of {all} file operations; TESTKIT_SEED={seed}, loss {case}"
            )
        };
        fixture.recover().with_context(at)?;
        let happened = fixture.sync_model(op).with_context(at)?;
        ensure!(happened || done < records.len(), "{}: it was reported as done, and is not", at());
        fixture.check_all().with_context(at)?;
    }
    Ok(())
}
