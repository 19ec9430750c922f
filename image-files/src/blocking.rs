//! File work from async code. It is positioned I/O on blocking threads, because async I/O is slower.

use snapcore::{Error, ErrorKind, Result};

/// Runs `work` on a blocking thread.
///
/// # Errors
/// Those of the work; [`ErrorKind::Internal`] if it panicked.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(outcome) => outcome,
        Err(failure) => {
            Err(Error::new(ErrorKind::Internal, "the work on an image broke off").because(failure))
        }
    }
}

/// Runs `work` on this thread, because what it borrows does not outlive the call. Other tasks of this thread
/// continue on another one.
pub fn in_place<T>(work: impl FnOnce() -> T) -> T {
    match tokio::runtime::Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(tokio::runtime::RuntimeFlavor::MultiThread) => tokio::task::block_in_place(work),
        _ => work(),
    }
}
