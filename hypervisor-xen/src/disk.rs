//! One disk of a domain, as the steps of a backend use it.

use std::{
    collections::HashSet,
    fs,
    sync::{Arc, atomic::AtomicBool},
};

use async_trait::async_trait;
use camino::Utf8PathBuf;
use snapcore::backend::Progress;
use snapcore::hypervisor::{AttachedDisk, AttachedMerge, Inside, LiveDomain};
use snapcore::{Error, ErrorKind, FileIdentity, Result, Target, file_identity};
use tokio::sync::RwLock;
use tokio_util::sync::CancellationToken;

use crate::describe::{MAKE_QDISK, Server};

/// The domain's QEMU, while it has one: it ends with the domain, and the next domain has another.
pub(crate) type Qemu = Arc<RwLock<Option<Arc<dyn LiveDomain>>>>;

/// A disk of the domain.
pub(crate) struct Disk {
    pub(crate) target: Target,
    pub(crate) path: Utf8PathBuf,
    /// True if the domain runs without it.
    pub(crate) detached: AtomicBool,
    /// `None` while the domain does not exist.
    pub(crate) server: Arc<RwLock<Option<Server>>>,
    pub(crate) qemu: Qemu,
}

impl Disk {
    fn not_qemus(&self) -> Error {
        Error::new(ErrorKind::Refused, format!("disk {} is not served by the domain's QEMU", self.target))
            .state("no changes made")
            .advise(format!("shut the domain down, and do it then; or {MAKE_QDISK}"))
    }
}

#[async_trait]
impl AttachedDisk for Disk {
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        match *self.server.read().await {
            None => Ok(HashSet::new()),
            Some(Server::Qdisk) => match &*self.qemu.read().await {
                None => Ok(HashSet::new()),
                Some(qemu) => match qemu.disk(&self.target) {
                    Some(disk) => disk.open_files().await,
                    None => Ok(HashSet::new()),
                },
            },
            Some(Server::Device) => {
                let about = fs::metadata(&self.path).map_err(|cause| {
                    Error::new(ErrorKind::NotFound, format!("the device {} is gone", self.path))
                        .because(cause)
                })?;
                Ok(HashSet::from([file_identity(&about)]))
            }
            Some(Server::Loop | Server::Other) => Err(self.not_qemus()),
        }
    }

    async fn merge(
        &self,
        merge: &AttachedMerge,
        inside: &dyn Inside,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let qemu = self.qemu.read().await.clone();
        match qemu.as_ref().and_then(|qemu| qemu.disk(&self.target)) {
            Some(disk) => disk.merge(merge, inside, progress, cancel).await,
            None => Err(self.not_qemus()),
        }
    }

    async fn drop_internal(&self, tags: &[String]) -> Result<()> {
        let qemu = self.qemu.read().await.clone();
        match qemu.as_ref().and_then(|qemu| qemu.disk(&self.target)) {
            Some(disk) => disk.drop_internal(tags).await,
            None => Err(self.not_qemus()),
        }
    }
}
