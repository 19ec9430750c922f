//! The statements, subject by subject.

mod crashes;
mod failures;
mod hostile;
mod points;
mod random;
mod reading;
mod together;

use anyhow::Result;
use snapcore::Capabilities;

use crate::fixture::Method;
use crate::test_backend::TestBackend;

/// One statement, and how it is run.
pub(crate) struct TestCase {
    /// What must be true of every backend that can do it.
    pub(crate) name: &'static str,
    /// Whether these capabilities call for it.
    pub(crate) needs: fn(&Capabilities, &dyn TestBackend) -> bool,
    /// Tries to break it.
    pub(crate) run: fn(&dyn TestBackend, &Method) -> Result<()>,
}

impl TestCase {
    const fn always(name: &'static str, run: fn(&dyn TestBackend, &Method) -> Result<()>) -> Self {
        Self { name, needs: |_, _| true, run }
    }

    const fn with(
        name: &'static str,
        needs: fn(&Capabilities, &dyn TestBackend) -> bool,
        run: fn(&dyn TestBackend, &Method) -> Result<()>,
    ) -> Self {
        Self { name, needs, run }
    }
}

/// All statements.
pub(crate) fn all() -> impl Iterator<Item = TestCase> {
    points::CASES
        .into_iter()
        .chain(reading::CASES)
        .chain(failures::CASES)
        .chain(crashes::CASES)
        .chain(hostile::CASES)
        .chain(together::CASES)
        .chain(random::CASES)
}

fn trees(can: &Capabilities, _: &dyn TestBackend) -> bool {
    can.snapshot_of_snapshot
}

fn trees_with_deletes(can: &Capabilities, _: &dyn TestBackend) -> bool {
    can.snapshot_of_snapshot && can.delete_in_chain
}
