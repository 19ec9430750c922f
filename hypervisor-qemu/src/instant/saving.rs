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

/// Within which something must be written: a disk that hangs would hold the guest's writes to memory for ever.
const STALLED: Duration = Duration::from_secs(60);

/// Between two looks.
const LOOK: Duration = Duration::from_millis(5);

/// Ends the saving of memory that a crash of ours left ([`crate::jobs::Ours::outgoing`]), and switches off what a cut switches
/// on; the limit of bandwidth becomes QEMU's default. The guest is not resumed: whether it was we who paused it, a journal
/// knows. May be repeated. Only where a journal says that the migration is ours: QEMU does not tell.
///
/// # Errors
/// Those of the connection; [`ErrorKind::Timeout`] where it does not end.
pub async fn abandon(machine: &Machine) -> Result<()> {
    migration::abandon(machine).await
}

/// How far the memory is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes written.
    pub written: u64,
    /// Bytes of memory that are not written yet.
    pub remaining: u64,
}

/// The memory of a cut that is being written.
///
/// Dropping it removes the draft, and leaves QEMU writing to a file that has no name any more: call [`Saving::wait`] or
/// [`Saving::cancel`].
#[derive(Debug)]
#[must_use = "the memory is being written until `wait` or `cancel`"]
pub struct Saving {
    pub(super) machine: Machine,
    pub(super) draft: Draft,
    /// None once QEMU has completed it.
    pub(super) writing: Option<Writing>,
}

impl Saving {
    /// Waits until QEMU has written it, and gives the draft, which is to be sealed.
    ///
    /// # Errors
    /// [`ErrorKind::Failed`] with what QEMU said (a full disk, ...); [`ErrorKind::Timeout`] where nothing was written for a
    /// minute. After an error the draft is gone, the migration is cancelled and its settings are put back; the disks stay cut,
    /// and the guest runs on.
    pub async fn wait(self, each: impl FnMut(Progress)) -> Result<Draft> {
        self.wait_unless(std::future::pending(), each).await
    }

    /// [`Saving::wait`], until `cancelled` is ready.
    ///
    /// # Errors
    /// And [`ErrorKind::Cancelled`], with the same left.
    pub async fn wait_unless(
        mut self,
        cancelled: impl Future<Output = ()>,
        mut each: impl FnMut(Progress),
    ) -> Result<Draft> {
        let mut cancelled = std::pin::pin!(cancelled);
        let attempted = "saving memory";
        let subject = self.draft.path().display().to_string();
        let Some(writing) = self.writing.take() else { return Ok(self.draft) };
        let (mut before, mut moved) = (None, Instant::now());
        loop {
            let now = match migration::status(&self.machine).await {
                Ok(now) => now,
                Err(error) => return Err(self.given_up(writing, error).await),
            };
            if let Err(error) = now.check(attempted, &subject) {
                return Err(self.given_up(writing, error).await);
            }
            let progress = Progress { written: now.transferred, remaining: now.remaining };
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
                return Err(self.given_up(writing, error).await);
            }
            if timeout(LOOK, &mut cancelled).await.is_ok() {
                let error = Error::new(ErrorKind::Cancelled, attempted, &subject, "it was cancelled");
                return Err(self.given_up(writing, error).await);
            }
        }
    }

    async fn given_up(&self, writing: Writing, error: Error) -> Error {
        match writing.cancel(&self.machine).await {
            Ok(()) => error,
            Err(second) => error.now(second.to_string()),
        }
    }

    /// Ends it: no memory image. The disks stay cut, and the guest runs on.
    ///
    /// # Errors
    /// Those of the connection: QEMU may go on writing.
    pub async fn cancel(mut self) -> Result<()> {
        match self.writing.take() {
            Some(writing) => writing.cancel(&self.machine).await,
            None => Ok(()),
        }
    }
}
