//! The place of a domain's memory images.

use std::sync::Arc;

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use confined_files::Directory;

use crate::address::DiskAddress;
use crate::backend::DeleteCost;
use crate::domain::Domain;
use crate::error::{Error, ErrorKind, Result};
use crate::snapshot::SnapshotId;

/// The place of a domain's memory images: it names new ones, and knows its own.
///
/// A hypervisor names one for each domain
/// ([`VmStateSaver::memory_store`](super::VmStateSaver::memory_store)), and reads, checks, measures and
/// removes the images itself. A [`MemoryDirectory`] keeps them as files. Images elsewhere (in a storage
/// cluster, for example) have addresses with a scheme, which only the hypervisor reads.
#[async_trait]
pub trait MemoryStore: Send + Sync + std::fmt::Debug {
    /// The place, for people.
    fn place(&self) -> &str;

    /// The directory of the images, where they are files of this machine. Before an operation, the service
    /// tests what it permits, and its free space.
    fn directory(&self) -> Option<&Utf8Path>;

    /// The address of a new snapshot's image. It is the same each time, and no other snapshot's.
    fn address_of(&self, snapshot: SnapshotId) -> DiskAddress;

    /// Returns true if an image of this address is in this place. A manifest, which anyone may have written,
    /// can name an image elsewhere only if the user confirms it.
    fn holds(&self, image: &DiskAddress) -> bool;

    /// Refuses an image that certainly could not be made. Changes nothing that lasts. What a directory
    /// permits is tested by the service.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], [`ErrorKind::NoSpace`] or [`ErrorKind::Unsupported`]: no changes made.
    async fn preflight(&self) -> Result<()> {
        Ok(())
    }

    /// Makes the place, for its owner alone. A place that exists is left as it is. It is called before an
    /// operation begins.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] and others: no changes made.
    async fn prepare(&self) -> Result<()>;
}

/// Memory images as files in a directory.
///
/// ```
/// use snapcore::SnapshotId;
/// use snapcore::hypervisor::{MemoryDirectory, MemoryStore};
///
/// let store = MemoryDirectory::new("/vm/web/memory");
/// let image = store.address_of(SnapshotId::fresh());
/// assert!(store.holds(&image) && image.as_str().ends_with(".memory"));
/// assert!(!store.holds(&"/etc/shadow".into()));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MemoryDirectory(Utf8PathBuf);

impl MemoryDirectory {
    /// The memory images in `directory`, an absolute path.
    pub fn new(directory: impl Into<Utf8PathBuf>) -> Self {
        Self(directory.into())
    }

    /// The usual place of a domain's memory images: the directory that the user named
    /// ([`Control::memory_dir`](super::Control::memory_dir)), or else `beside`, the directory of its
    /// manifests. `None` without either.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the user named a place that is no directory of this machine.
    pub fn of(domain: &Domain, beside: Option<&Utf8Path>) -> Result<Option<Arc<dyn MemoryStore>>> {
        let named = domain.control.as_ref().and_then(|control| control.memory_dir.as_ref());
        let named = named.map(DiskAddress::require_path).transpose()?;
        Ok(named.or(beside).map(|directory| Arc::new(Self::new(directory)) as Arc<dyn MemoryStore>))
    }

    /// The canonical form of a directory as a user names it: an absolute path, which starts at `directory`
    /// unless it is one already. Text with a scheme is a path too.
    ///
    /// # Errors
    /// [`ErrorKind::Usage`] if it is empty.
    pub fn read(named: &DiskAddress, directory: &Utf8Path) -> Result<DiskAddress> {
        let named = named.as_str();
        let path = if named.is_empty() { Utf8PathBuf::new() } else { directory.join(named) };
        camino::absolute_utf8(path).map(DiskAddress::from).map_err(|cause| {
            Error::new(ErrorKind::Usage, format!("the path {named:?} cannot be made absolute")).because(cause)
        })
    }

    /// The size of an image that is a file, in bytes; `None` if it does not exist.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for another address; [`ErrorKind::Io`].
    pub fn size(image: &DiskAddress) -> Result<Option<u64>> {
        Ok(looked_at(image.require_path()?)?.map(|about| about.len()))
    }

    /// What the removal of an image frees, if it is a file: its room on the file system, unless it has
    /// further names, as in a clone. `None` if it does not exist.
    ///
    /// # Errors
    /// As [`MemoryDirectory::size`].
    pub fn freed(image: &DiskAddress) -> Result<Option<DeleteCost>> {
        use std::os::unix::fs::MetadataExt;
        let freed = |about: std::fs::Metadata| if about.nlink() > 1 { 0 } else { about.blocks() * 512 };
        Ok(looked_at(image.require_path()?)?.map(|about| DeleteCost::new(freed(about), 0).exact()))
    }
}

fn looked_at(file: &Utf8Path) -> Result<Option<std::fs::Metadata>> {
    match file.symlink_metadata() {
        Ok(about) => Ok(Some(about)),
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => {
            Err(Error::new(ErrorKind::Io, format!("the memory image {file} cannot be looked at"))
                .because(cause))
        }
    }
}

#[async_trait]
impl MemoryStore for MemoryDirectory {
    fn place(&self) -> &str {
        self.0.as_str()
    }

    fn directory(&self) -> Option<&Utf8Path> {
        Some(&self.0)
    }

    fn address_of(&self, snapshot: SnapshotId) -> DiskAddress {
        self.0.join(format!("{snapshot}.memory")).into()
    }

    fn holds(&self, image: &DiskAddress) -> bool {
        image.directory() == Some(self.0.as_path())
    }

    async fn prepare(&self) -> Result<()> {
        let directory = &self.0;
        Directory::make_all(directory.as_std_path(), 0o700).map(|_| ()).map_err(|cause| {
            Error::new(ErrorKind::Io, format!("the directory {directory} for memory images cannot be made"))
                .because(cause)
                .state("no changes made")
                .advise("make it, or name another one with --memory-dir when the domain is registered")
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hypervisor::Control;
    use crate::name::DomainName;

    /// The directory that the user named comes before the one of the manifests. A place that is no directory
    /// is refused, and so is an image that is no file: neither is taken for a path.
    #[test]
    fn directory_is_the_users_or_of_manifests() {
        let domain = Domain::new(DomainName::new("web").unwrap(), Vec::new());
        let place = |domain: &Domain, beside: Option<&str>| {
            let store = MemoryDirectory::of(domain, beside.map(Utf8Path::new))?;
            Ok::<_, Error>(store.map(|store| store.place().to_owned()))
        };
        assert_eq!(place(&domain, None).unwrap(), None);
        assert_eq!(place(&domain, Some("/vm/web.domsnap")).unwrap().as_deref(), Some("/vm/web.domsnap"));
        let named =
            |place: &str| domain.clone().control(Some(Control::at("a").memory_dir(Some(place.into()))));
        assert_eq!(place(&named("/memory"), Some("/vm/web.domsnap")).unwrap().as_deref(), Some("/memory"));
        let elsewhere = place(&named("rbd:pool"), Some("/vm/web.domsnap")).unwrap_err();
        assert_eq!(elsewhere.kind(), ErrorKind::Unsupported);
        assert_eq!(
            MemoryDirectory::size(&"rbd:pool/image".into()).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
        assert_eq!(MemoryDirectory::size(&"/nowhere/image".into()).unwrap(), None);
        let read = |named: &str| MemoryDirectory::read(&named.into(), "/vm".into());
        for (named, path) in [("memory", "/vm/memory"), ("/m/./a", "/m/a"), ("rbd:pool", "/vm/rbd:pool")] {
            assert_eq!(read(named).unwrap(), path.into());
        }
        assert_eq!(read("").unwrap_err().kind(), ErrorKind::Usage);
        assert!(!MemoryDirectory::new("/memory").holds(&"rbd:/memory/image".into()));
    }
}
