//! Refuses plans for which the file system has no room, before anything is begun.
//!
//! Only what is certain is refused: data that a step writes, less what earlier steps of the plan give back.

use camino::Utf8Path;
use snapcore::backend::{DiskPlan, DiskState};
use snapcore::{DiskRecord, Error, ErrorKind, Result, free_bytes, shown_size};

use super::cost::files_of;
use super::{ChainStep, Measure};
use crate::removal::freed_by_removing;

/// `EXT4_SUPER_MAGIC`, which ext2 and ext3 have too, and `TMPFS_MAGIC`: file systems whose files share no
/// blocks, so that a copy takes as much room as its source.
const SHARES_NOTHING: [i64; 2] = [0xef53, 0x0102_1994];

/// Refuses a plan with a merge, or a copy of an internal snapshot, that does not fit.
///
/// # Errors
/// [`ErrorKind::NoSpace`], with the numbers; those of `measure`.
pub fn require_room(
    record: &DiskRecord,
    state: &DiskState,
    plan: &DiskPlan<ChainStep>,
    measure: &mut dyn Measure,
) -> Result<()> {
    let writes = |step: &ChainStep| matches!(step, ChainStep::Merge { .. } | ChainStep::Materialise { .. });
    if !plan.steps().any(|step| writes(&step.action)) {
        return Ok(());
    }
    let directory = record.disk.path().parent().unwrap_or(Utf8Path::new("."));
    let Some(mut free) = free_bytes(directory) else { return Ok(()) };
    let target = &record.disk.target;
    for step in plan.steps() {
        match &step.action {
            ChainStep::Remove { layers } => {
                let freed = freed_by_removing(files_of(state, layers), std::iter::empty());
                free = free.saturating_add(freed.frees);
            }
            ChainStep::DropInternal { layer, tags } => {
                free = free.saturating_add(measure.dropped(layer, tags, false)?.frees);
            }
            ChainStep::Merge { run, into, below } => {
                let needed = measure.merged(run, into, below.is_some(), step.bytes)?.more;
                if needed > free {
                    return Err(no_room(
                        format!("{target}: a merge adds {} to {into}", shown_size(needed)),
                        directory,
                        free,
                    )
                    .advise(
                        "free space there; or delete other snapshots first: `domsnap du` shows what each frees, and \
                         moves; or use --force, which leaves the layers until `domsnap recover` finds room",
                    ));
                }
                free -= needed;
            }
            ChainStep::Materialise { from, tag, .. } => {
                let shares = rustix::fs::statfs(directory.as_std_path())
                    .is_ok_and(|system| !SHARES_NOTHING.contains(&system.f_type));
                let needed = if shares { 0 } else { measure.copied(from, tag)? };
                if needed > free {
                    return Err(no_room(
                        format!("{target}: {} is copied out of {from}: {}", tag.name, shown_size(needed)),
                        directory,
                        free,
                    )
                    .advise(
                        "free space there, or delete the snapshots that depend on that layer: then nothing is copied",
                    ));
                }
                free -= needed;
            }
            _ => {}
        }
    }
    Ok(())
}

fn no_room(what: String, directory: &Utf8Path, free: u64) -> Error {
    Error::new(ErrorKind::NoSpace, format!("{what}, and {directory} has {} free", shown_size(free)))
        .state("no changes made")
}
