//! The test cases, subject by subject.

mod crashes;
mod failures;
mod hostile;
mod live;
mod points;
mod power;
mod random;
mod reading;
mod together;

use anyhow::Result;
use snapcore::backend::Capabilities;

use crate::fixture::{Fixture, Method};
use crate::seed::from_env;
use crate::test_backend::TestBackend;

/// A test case: a promise of the contract, and the attempt to break it.
pub(crate) struct TestCase {
    /// Its name on the command line and in results.
    pub(crate) name: &'static str,
    /// The promise, as a sentence.
    pub(crate) promise: &'static str,
    /// The domain that it is about.
    pub(crate) domain: DomainKind,
    /// Returns true if these capabilities call for it.
    pub(crate) needs: fn(&Capabilities, &dyn TestBackend) -> bool,
    /// Tries to break the promise.
    pub(crate) run: Attempt,
}

/// A kind of domain, on which it depends what is asked of a backend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DomainKind {
    /// Its disks are at rest.
    AtRest,
    /// It runs, and the backend takes the points of its disks itself.
    Running,
    /// It runs, and its hypervisor takes the points of its disks.
    RunningByHypervisor,
}

impl DomainKind {
    /// Returns true for the domains whose points are taken like this by the method.
    pub(crate) fn is_of(self, subject: &dyn TestBackend, method: &Method) -> bool {
        match self {
            Self::AtRest => true,
            Self::Running => subject.takes_live_points(&method.to_string()),
            Self::RunningByHypervisor => !subject.takes_live_points(&method.to_string()),
        }
    }
}

type Attempt = fn(&dyn TestBackend, &Method) -> Result<()>;

impl TestCase {
    const fn always(name: &'static str, promise: &'static str, run: Attempt) -> Self {
        Self { name, promise, domain: DomainKind::AtRest, needs: |_, _| true, run }
    }

    const fn with(
        name: &'static str,
        promise: &'static str,
        needs: fn(&Capabilities, &dyn TestBackend) -> bool,
        run: Attempt,
    ) -> Self {
        Self { name, promise, domain: DomainKind::AtRest, needs, run }
    }

    const fn of(mut self, domain: DomainKind) -> Self {
        self.domain = domain;
        self
    }
}

/// All test cases.
pub(crate) fn all() -> impl Iterator<Item = TestCase> {
    points::CASES
        .into_iter()
        .chain(reading::CASES)
        .chain(failures::CASES)
        .chain(crashes::CASES)
        .chain(power::CASES)
        .chain(hostile::CASES)
        .chain(together::CASES)
        .chain(live::CASES)
        .chain(random::CASES)
}

/// Returns true for one of `TESTKIT_EVERY` numbers, by default 6; 1 is all of them. `TESTKIT_SEED` chooses
/// which.
fn is_sampled(number: u64) -> Result<bool> {
    let every = from_env("TESTKIT_EVERY", 6)?.max(1);
    Ok(number.wrapping_add(from_env("TESTKIT_SEED", 1)?) % every == 0)
}

fn trees(can: &Capabilities, _: &dyn TestBackend) -> bool {
    can.snapshot_of_snapshot
}

fn trees_with_deletes(can: &Capabilities, _: &dyn TestBackend) -> bool {
    can.snapshot_of_snapshot && can.delete_in_chain
}

/// Compares the current state with the model, and every snapshot too if `number` is sampled. Damage to a
/// snapshot lasts, so a later comparison finds it: each test case compares all of them at its end.
fn check_sampled(fixture: &mut Fixture<'_>, number: u64) -> Result<()> {
    if is_sampled(number)? { fixture.check_all() } else { fixture.check_current() }
}
