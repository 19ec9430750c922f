//! The running guest in one run of an operation: what the operation has done to it so far.

use crate::hypervisor::DomainStep;
use crate::name::Target;

/// The effect of this run on the guest. It covers no run before a crash: that is read from the journal and
/// from the hypervisor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Guest {
    /// It runs, or is paused by its user: this run has not changed it.
    Running,
    /// The instant was taken: the guest continues on the layers that the cut made.
    Cut,
    /// The cut was undone. The guest's writes to the overlays of these disks are merged into the images
    /// below.
    Uncut {
        /// The disks.
        merged: Vec<Target>,
    },
    /// It is paused, and its disks are detached.
    Detached {
        /// The index of the step that detached them.
        since: usize,
    },
    /// It continues, or has ended, as the operation requires.
    Resumed,
}

impl Guest {
    /// The guest after the domain's step at `index` was done.
    pub(super) fn after(self, step: &DomainStep, index: usize) -> Self {
        match (self, step) {
            (_, DomainStep::Detach { .. }) => Self::Detached { since: index },
            (_, DomainStep::Continue { .. }) => Self::Resumed,
            (Self::Running | Self::Cut | Self::Uncut { .. } | Self::Resumed, DomainStep::Instant { .. }) => {
                Self::Cut
            }
            (guest @ Self::Detached { .. }, DomainStep::Instant { .. }) => guest,
            // Attached disks are the guest's again, and it is still paused: the step that resumes it comes
            // last.
            (
                guest @ (Self::Running
                | Self::Cut
                | Self::Uncut { .. }
                | Self::Detached { .. }
                | Self::Resumed),
                DomainStep::Attach { .. }
                | DomainStep::ReopenByName { .. }
                | DomainStep::Media { .. }
                | DomainStep::SaveMemory { .. }
                | DomainStep::CheckMemory { .. }
                | DomainStep::RemoveMemory { .. }
                | DomainStep::Register { .. }
                | DomainStep::CommitOthers { .. }
                | DomainStep::CloneMemory { .. },
            ) => guest,
        }
    }

    /// The guest after a cut was undone, which merged the overlays of these disks. A cut can be undone again,
    /// by a recovery whose first attempt failed.
    pub(super) fn after_undone_cut(self, mut merged: Vec<Target>) -> Self {
        match self {
            Self::Uncut { merged: before } => merged.extend(before),
            Self::Running | Self::Cut | Self::Detached { .. } | Self::Resumed => {}
        }
        Self::Uncut { merged }
    }

    /// The step that detached the disks, as long as they are detached.
    pub(super) fn detached_since(&self) -> Option<usize> {
        match self {
            Self::Detached { since } => Some(*since),
            Self::Running | Self::Cut | Self::Uncut { .. } | Self::Resumed => None,
        }
    }

    /// Returns true if the undo of the cut has merged the disk's overlay: nothing of it has to be salvaged.
    pub(super) fn has_merged(&self, disk: &Target) -> bool {
        match self {
            Self::Uncut { merged } => merged.contains(disk),
            Self::Running | Self::Cut | Self::Detached { .. } | Self::Resumed => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Disks are detached from the step that detaches them to the one that resumes the guest, whatever comes
    /// between.
    #[test]
    fn guest_is_detached_until_it_goes_on() {
        let open = DomainStep::Detach { disks: Vec::new(), running: true, restart: None };
        let attach = DomainStep::Attach { disks: Vec::new(), restart: None };
        let go_on = DomainStep::Continue { memory: None, reset: false, power: None };
        let guest = Guest::Running.after(&open, 3);
        assert_eq!(guest.detached_since(), Some(3));
        let guest = guest.after(&attach, 5);
        assert_eq!(guest.detached_since(), Some(3));
        assert_eq!(guest.after(&go_on, 6), Guest::Resumed);
    }

    /// The overlays that one undo has merged are remembered when the cut is undone again.
    #[test]
    fn merged_overlays_are_remembered() {
        let (vda, vdb) = (Target::new("vda").unwrap(), Target::new("vdb").unwrap());
        let guest = Guest::Cut.after_undone_cut(vec![vda.clone()]).after_undone_cut(vec![]);
        assert!(guest.has_merged(&vda) && !guest.has_merged(&vdb));
    }
}
