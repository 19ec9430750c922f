//! Return of freed clusters to the file system, as QEMU does it (`pass-discard-snapshot`).
//!
//! **What is durable before a cluster is punched.** A punched cluster reads as zeros, so nothing durable may
//! refer to it:
//!
//! 1. The header sector or the tables that no longer refer to it are durable.
//! 2. Its refcount of zero is durable.
//! 3. Then it is punched, and nothing has to be made durable after that.
//!
//! A crash before 3 leaves a free cluster that still occupies space in the file system. The image may use it
//! again, and [`Image::repair`] returns such space too. Nothing is allocated between 2 and 3, and the
//! refcount of each cluster is read again before it is punched. A file system that cannot punch keeps the
//! space; that is not an error.

use super::error::Result;
use super::open::Image;
use super::refcount::FILE_BLOCK;
use super::units::HostOffset;

impl Image {
    /// Punches the clusters that became free since the image was opened, or since the last call. Call it only
    /// when everything that was written is durable, refcounts included.
    ///
    /// # Errors
    /// The system's, of reading refcounts.
    pub(crate) fn punch_freed(&mut self) -> Result<()> {
        let punch = self.punch;
        let (file, refcounts, _) = self.parts()?;
        if !punch {
            refcounts.forget_freed();
            return Ok(());
        }
        let runs = refcounts.take_freed_runs(file)?;
        self.punch_runs(runs)
    }

    /// Punches every free cluster of the file.
    ///
    /// # Errors
    /// The system's, of reading refcounts.
    pub(crate) fn punch_free(&mut self) -> Result<()> {
        if !self.punch {
            return Ok(());
        }
        let end = self.header.cluster_bits.clusters_for(self.file.len()?);
        let (file, refcounts, _) = self.parts()?;
        let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
        let mut at = 1;
        while at < end {
            let first = refcounts.first_free(file, at, end)?;
            let last = refcounts.first_used(file, first, end)?;
            if first < last {
                runs.push(first..last);
            }
            at = last.max(first + 1);
        }
        self.punch_runs(runs)
    }

    fn punch_runs(&mut self, runs: Vec<std::ops::Range<u64>>) -> Result<()> {
        let file_len = self.file.len()?;
        let (file, refcounts, header) = self.parts()?;
        let bits = header.cluster_bits;
        for run in runs {
            let run = refcounts.widened(file, run, |_| None)?;
            let from = run.start << bits.bits();
            // The last block of the file may be partial. A hole up to the block's end covers it whole.
            let to = (run.end << bits.bits()).min(file_len.next_multiple_of(FILE_BLOCK));
            if from < to && !file.punch(HostOffset(from), to - from) {
                return Ok(());
            }
        }
        Ok(())
    }
}
