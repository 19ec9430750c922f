//! What is done to a disk, step by step. Each can be done again, and those before the commit point can be
//! undone, wherever they had got to: what was done is read from the files.

use std::fs;

use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use snapcore::backend::{Salvage, StepContext, StepStatus};
use snapcore::{Error, ErrorKind, Result};

use crate::files::{
    copy, failed, flush, flush_around, part, point, points, remove, same_content, same_file, tidy,
};
use crate::lock::DiskLocks;

/// One step: what the journal keeps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "kebab-case")]
pub enum Action {
    /// Copies what the domain writes.
    Copy {
        /// The copy's name.
        tag: String,
    },
    /// Copies a point, to be what the domain writes.
    Stage {
        /// The point.
        from: String,
        /// The copy's name.
        next: String,
    },
    /// Puts that in its place.
    Exchange {
        /// The point.
        from: String,
        /// The copy's name.
        next: String,
        /// The name that what was there gets.
        previous: String,
    },
    /// Removes points.
    Drop {
        /// Their names.
        tags: Vec<String>,
    },
}

impl Action {
    pub(crate) fn apply(&self, disk: &Utf8Path, locks: &DiskLocks, context: StepContext<'_>) -> Result<()> {
        match self {
            Self::Copy { tag } => copy(disk, disk, &point(disk, tag), context),
            Self::Stage { from, next } => copy(disk, &point(disk, from), &point(disk, next), context),
            Self::Exchange { next, previous, .. } => {
                let (next, previous) = (point(disk, next), point(disk, previous));
                if !next.exists() && previous.exists() {
                    return Ok(()); // done before
                }
                locks.lock_too(disk, &next)?;
                // What is there gets a second name, then the first name moves: at every instant the path
                // opens to a whole disk.
                if !previous.exists() {
                    fs::hard_link(disk, &previous).map_err(failed(format!("cannot name {previous}")))?;
                    flush(&points(disk))?;
                }
                fs::rename(&next, disk)
                    .map_err(failed(format!("cannot put {next} in the place of {disk}")))?;
                flush_around(disk)?;
                flush(&points(disk))
            }
            Self::Drop { tags } => {
                tags.iter().try_for_each(|tag| remove(&point(disk, tag)))?;
                tidy(disk)
            }
        }
    }

    pub(crate) fn undo(&self, disk: &Utf8Path, locks: &DiskLocks) -> Result<()> {
        match self {
            Self::Copy { tag: made } | Self::Stage { next: made, .. } => {
                let made = point(disk, made);
                remove(&made)?;
                remove(&part(&made))?;
                tidy(disk)
            }
            Self::Exchange { previous, .. } => {
                let previous = point(disk, previous);
                if !previous.exists() {
                    return Ok(()); // never begun, or undone before
                }
                if same_file(&previous, disk) {
                    remove(&previous)?;
                } else {
                    locks.lock_too(disk, &previous)?;
                    fs::rename(&previous, disk).map_err(failed(format!("cannot put {previous} back")))?;
                    flush_around(disk)?;
                }
                flush(&points(disk))
            }
            Self::Drop { .. } => {
                Err(Error::new(ErrorKind::Internal, "points that were deleted do not come back"))
            }
        }
    }

    /// The exchange alone makes another file what the domain writes: what it wrote there would go with the
    /// undo.
    pub(crate) fn salvage(&self, target: &str, disk: &Utf8Path) -> Result<Salvage> {
        let Self::Exchange { from, previous, .. } = self else { return Ok(Salvage::Nothing) };
        let (kept, rescued) = (point(disk, previous), point(disk, &format!("rescued-{previous}")));
        let exchanged = kept.exists() && !same_file(&kept, disk);
        if !exchanged || same_content(disk, &point(disk, from))? {
            return Ok(Salvage::Nothing);
        }
        if !rescued.exists() {
            fs::hard_link(disk, &rescued).map_err(failed(format!("cannot name {rescued}")))?;
            flush(&points(disk))?;
        }
        Ok(Salvage::Saved(format!("{target}: the domain ran after the crash; what it wrote is in {rescued}")))
    }

    pub(crate) fn status(&self, disk: &Utf8Path) -> StepStatus {
        let there = |name: &String| point(disk, name).exists();
        match self {
            Self::Copy { tag: made } | Self::Stage { next: made, .. } => {
                match (there(made), part(&point(disk, made)).exists()) {
                    (true, _) => StepStatus::Done,
                    (false, true) => StepStatus::Partly,
                    (false, false) => StepStatus::NotDone,
                }
            }
            Self::Exchange { next, previous, .. } => match (there(next), there(previous)) {
                (false, true) => StepStatus::Done,
                (true, true) => StepStatus::Partly,
                (_, false) => StepStatus::NotDone,
            },
            Self::Drop { tags } => match tags.iter().filter(|tag| there(tag)).count() {
                0 => StepStatus::Done,
                left if left == tags.len() => StepStatus::NotDone,
                _ => StepStatus::Partly,
            },
        }
    }
}
