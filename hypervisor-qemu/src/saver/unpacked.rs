//! [`Unpacked`]: compressed memory images between their check and their use.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::Result;
use snapcore::backend::Progress;

use super::error::blocking;
use crate::memory::{Image, Stored};

/// Images that were unpacked before anything was changed, so that the guest is not paused for it. They have
/// no name, so they are gone with the process. After a crash the next process unpacks them again.
#[derive(Debug, Clone, Default)]
pub(super) struct Unpacked(Arc<Mutex<HashMap<Utf8PathBuf, Arc<Image>>>>);

impl Unpacked {
    fn all(&self) -> MutexGuard<'_, HashMap<Utf8PathBuf, Arc<Image>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads an image and checks it against its checksums. A compressed one is unpacked for that, and kept.
    pub(super) async fn check(&self, file: &Utf8Path, progress: &dyn Progress) -> Result<()> {
        self.release(file);
        let path = file.to_owned();
        let checked = blocking(move || {
            let stored = Stored::open(path.as_std_path())?;
            let length = stored.length()?;
            let unpacked = match stored {
                Stored::Plain(image) => {
                    image.verify()?;
                    None
                }
                Stored::Packed(packed) => Some(packed.unpack()?),
            };
            Ok((length, unpacked))
        });
        let (length, unpacked) = checked.await?;
        if let Some(image) = unpacked {
            self.all().insert(file.to_owned(), Arc::new(image));
        }
        progress.bytes(length, length);
        Ok(())
    }

    /// Returns the image that QEMU can load, and keeps it no longer: the one that was checked, or one
    /// unpacked now.
    pub(super) async fn take(&self, file: &Utf8Path) -> Result<Arc<Image>> {
        let kept = self.all().remove(file);
        if let Some(image) = kept {
            return Ok(image);
        }
        let path = file.to_owned();
        blocking(move || Stored::open(path.as_std_path())?.ready()).await.map(Arc::new)
    }

    /// Drops an image that will not be loaded.
    pub(super) fn release(&self, file: &Utf8Path) {
        self.all().remove(file);
    }
}
