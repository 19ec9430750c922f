//! What a policy asks for: snapshots that are due, and deletes of those that no rule keeps.

use jiff::{SignedDuration, Timestamp};

use super::Planner;
use crate::error::{Error, ErrorKind, Result};
use crate::policy::{PolicyId, newest_of, review};
use crate::snapshot::{Snapshot, SnapshotId};

/// The least time between two snapshots of one policy.
const STEP: SignedDuration = SignedDuration::from_millis(1);

impl Planner<'_> {
    /// Records the policy `id` in a new snapshot, and dates the snapshot after the last one of that policy.
    /// Otherwise a clock that was set back would make the last one the newest, and this one the first that is
    /// pruned. Returns the note on that.
    pub(super) fn date_after_last(&self, snapshot: &mut Snapshot, id: PolicyId) -> Option<String> {
        snapshot.policy = Some(id);
        let last = newest_of(self.tree, id).filter(|last| snapshot.created <= last.created)?;
        snapshot.created = last.created.checked_add(STEP).unwrap_or(Timestamp::MAX);
        Some(format!(
            "the clock was set back: the snapshot is dated {}, just after {}",
            snapshot.created.strftime("%Y-%m-%dT%H:%M:%SZ"),
            last.name
        ))
    }

    /// Returns true if the domain's policy keeps the state that the last revert replaced, at the time `now`.
    pub(super) fn keeps_undo(&self, now: Timestamp) -> bool {
        let age = self.domain.policy.as_ref().and_then(|policy| policy.spec.keep_undo);
        match (age, self.tree.previous()) {
            (Some(age), Some(previous)) => age.after(previous.created) > now,
            _ => false,
        }
    }

    /// Returns the snapshot `id` if the domain's policy prunes it at the time `now`. It may have been held,
    /// reverted to or cloned since it was looked at, or the policy may have changed.
    pub(super) fn require_pruned(&self, id: SnapshotId, now: Timestamp) -> Result<SnapshotId> {
        let review = review(self.domain, self.tree, self.disks, now, false)?;
        let found = review.snapshots.iter().find(|snapshot| snapshot.id == id);
        let why = match found {
            Some(snapshot) if snapshot.prune.is_some() => return Ok(id),
            Some(snapshot) => {
                let reasons: Vec<String> = snapshot.keep.iter().map(ToString::to_string).collect();
                format!("the policy keeps snapshot {}: {}", snapshot.name, reasons.join(", "))
            }
            None => format!("domain {} has no snapshot of the identity {id} any more", self.domain.name),
        };
        Err(Error::new(ErrorKind::Refused, why).state("no changes made"))
    }
}
