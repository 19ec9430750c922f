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

use crate::house::Way;
use crate::workshop::Workshop;

/// One statement, and how it is tried.
pub(crate) struct Statement {
    /// What must be true of every backend that can do it.
    pub(crate) words: &'static str,
    /// Whether these capabilities call for it.
    pub(crate) needs: fn(&Capabilities, &dyn Workshop) -> bool,
    /// Tries to break it.
    pub(crate) tried: fn(&dyn Workshop, &Way) -> Result<()>,
}

impl Statement {
    const fn always(words: &'static str, tried: fn(&dyn Workshop, &Way) -> Result<()>) -> Self {
        Self { words, needs: |_, _| true, tried }
    }

    const fn with(
        words: &'static str,
        needs: fn(&Capabilities, &dyn Workshop) -> bool,
        tried: fn(&dyn Workshop, &Way) -> Result<()>,
    ) -> Self {
        Self { words, needs, tried }
    }
}

/// All statements.
pub(crate) fn all() -> impl Iterator<Item = Statement> {
    points::STATEMENTS
        .into_iter()
        .chain(reading::STATEMENTS)
        .chain(failures::STATEMENTS)
        .chain(crashes::STATEMENTS)
        .chain(hostile::STATEMENTS)
        .chain(together::STATEMENTS)
        .chain(random::STATEMENTS)
}

fn trees(can: &Capabilities, _: &dyn Workshop) -> bool {
    can.snapshot_of_snapshot
}

fn trees_with_deletes(can: &Capabilities, _: &dyn Workshop) -> bool {
    can.snapshot_of_snapshot && can.delete_in_chain
}
