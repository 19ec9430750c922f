//! Memory that is still being written while the guest runs again.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use tokio::time::timeout;

use crate::{
    error::{Error, ErrorKind, Result},
    machine::Machine,
    memory::Draft,
    migration::{self, Writing},
};

/// Time limit without any write: a disk that hangs would block the guest's writes to memory for ever.
const STALLED: Duration = Duration::from_secs(60);

/// Time between two polls.
const LOOK: Duration = Duration::from_millis(5);

/// Ends a memory save that a crash of ours left ([`crate::jobs::Ours::outgoing`]), and switches off the
/// settings of a cut; the bandwidth limit becomes QEMU's default. The guest is not resumed: only a journal
/// knows if we paused it. May be repeated. Call it only if a journal says that the migration is ours: QEMU
/// does not report that.
///
/// # Errors
/// Errors of the connection; [`ErrorKind::Timeout`] if it does not end.
pub async fn abandon(machine: &Machine) -> Result<()> {
    migration::abandon(machine).await
}

/// SaveProgress of the memory's write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct SaveProgress {
    /// Bytes written.
    pub written: u64,
    /// Bytes of memory that are not written yet.
    pub remaining: u64,
}

/// The memory of a cut that is being written.
///
/// Dropping it removes the draft, while QEMU still writes to a file that no longer has a name: call
/// [`Saving::wait`] or [`Saving::cancel`].
#[derive(Debug)]
#[must_use = "the memory is being written until `wait` or `cancel`"]
pub struct Saving {
    pub(super) machine: Machine,
    pub(super) draft: Draft,
    /// `None` once QEMU has completed it.
    pub(super) writing: Option<Writing>,
}

impl Saving {
    /// Waits until QEMU has written it, and returns the draft, which is to be sealed.
    ///
    /// # Errors
    /// [`ErrorKind::Failed`] with QEMU's message (a full disk, ...); [`ErrorKind::Timeout`] if nothing was
    /// written for a minute. After an error the draft is gone, the migration is cancelled and its settings
    /// are restored; the disks stay cut, and the guest runs.
    pub async fn wait(self, each: impl FnMut(SaveProgress)) -> Result<Draft> {
        self.wait_unless(std::future::pending(), each).await
    }

    /// Like [`Saving::wait`], until `cancelled` is ready.
    ///
    /// # Errors
    /// Also [`ErrorKind::Cancelled`], with the same state afterwards.
    pub async fn wait_unless(
        mut self,
        cancelled: impl Future<Output = ()>,
        mut each: impl FnMut(SaveProgress),
    ) -> Result<Draft> {
        let mut cancelled = std::pin::pin!(cancelled);
        let attempted = "saving memory";
        let subject = self.draft.path().display().to_string();
        let Some(writing) = self.writing.take() else { return Ok(self.draft) };
        let (mut before, mut moved) = (None, Instant::now());
        loop {
            let now = match migration::status(&self.machine).await {
                Ok(now) => now,
                Err(error) => return Err(self.cancel_after(writing, error).await),
            };
            if let Err(error) = now.check(attempted, &subject) {
                return Err(self.cancel_after(writing, error).await);
            }
            let progress = SaveProgress { written: now.transferred, remaining: now.remaining };
            if before != Some(progress) {
                each(progress);
                (before, moved) = (Some(progress), Instant::now());
            }
            if now.completed() {
                writing.tidy(&self.machine).await?;
                return Ok(self.draft);
            }
            if moved.elapsed() > STALLED {
                let detail = format!("nothing was written for {} s", STALLED.as_secs());
                let error = Error::new(ErrorKind::Timeout, attempted, &subject, detail);
                return Err(self.cancel_after(writing, error).await);
            }
            if timeout(LOOK, &mut cancelled).await.is_ok() {
                let error = Error::new(ErrorKind::Cancelled, attempted, &subject, "it was cancelled");
                return Err(self.cancel_after(writing, error).await);
            }
        }
    }

    async fn cancel_after(&self, writing: Writing, error: Error) -> Error {
        match writing.cancel(&self.machine).await {
            Ok(()) => error,
            Err(second) => error.state(second.to_string()),
        }
    }

    /// Cancels the write: there will be no memory image. The disks stay cut, and the guest runs.
    ///
    /// # Errors
    /// Errors of the connection: QEMU may still be writing.
    pub async fn cancel(mut self) -> Result<()> {
        match self.writing.take() {
            Some(writing) => writing.cancel(&self.machine).await,
            None => Ok(()),
        }
    }
}
