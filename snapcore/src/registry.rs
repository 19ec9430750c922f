//! The backend for each format, and the known hypervisors: listed explicitly by the code that assembles the
//! program.

use std::sync::Arc;

use camino::Utf8Path;

use crate::address::DiskAddress;
use crate::backend::{DeleteCost, DiskSnapshotter};
use crate::domain::{Disk, Domain, Hypervisor};
use crate::erased::AnyDiskSnapshotter;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::{MemoryDirectory, MemoryStore, VmStateSaver};
use crate::name::Target;

/// The backends of a program, in the order of their registration. The first is the default: it serves images
/// that are given by their path alone.
///
/// ```
/// use std::sync::Arc;
///
/// use snapcore::{ErrorKind, Registry};
/// use snapcore::backend::AnyDiskSnapshotter;
///
/// /// The backends of a program: listed explicitly, none is found automatically.
/// fn registry(backends: Vec<Arc<AnyDiskSnapshotter>>) -> snapcore::Result<Registry> {
///     let mut registry = Registry::new();
///     for backend in backends {
///         registry.register(backend)?;
///     }
///     Ok(registry)
/// }
///
/// # fn main() -> snapcore::Result<()> {
/// let unknown = registry(Vec::new())?.get("qcow2").err().expect("nothing is registered");
/// assert_eq!(unknown.kind(), ErrorKind::NotFound);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Default)]
pub struct Registry {
    backends: Vec<Arc<AnyDiskSnapshotter>>,
    hypervisors: Vec<Arc<dyn VmStateSaver>>,
}

impl Registry {
    /// An empty registry, without any format.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a backend.
    ///
    /// # Errors
    /// [`ErrorKind::Exists`] where its format has one already.
    pub fn register<B: DiskSnapshotter + ?Sized + 'static>(&mut self, backend: Arc<B>) -> Result<()> {
        let format = backend.format();
        if self.backends.iter().any(|known| known.format() == format) {
            return Err(Error::new(
                ErrorKind::Exists,
                format!("a backend for the format {format:?} is registered already"),
            )
            .advise("register each format once"));
        }
        self.backends.push(AnyDiskSnapshotter::of(backend));
        Ok(())
    }

    /// The backend that serves `format`.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`], listing the formats that are known.
    pub fn get(&self, format: &str) -> Result<Arc<AnyDiskSnapshotter>> {
        self.backends.iter().find(|backend| backend.format() == format).cloned().ok_or_else(|| {
            let known: Vec<&str> = self.iter().map(DiskSnapshotter::format).collect();
            let error = Error::new(ErrorKind::NotFound, format!("no backend serves the format {format:?}"));
            match known.is_empty() {
                true => error.advise("no backend is registered"),
                false => error.advise(format!("the formats known are: {}", known.join(", "))),
            }
        })
    }

    /// The name of the backend for a disk for which the user named none. It is found by the format that its
    /// hypervisor opens it with, or by its path alone ([`DiskSnapshotter::recognises`]). Absent: none
    /// recognises it.
    pub fn recognise(&self, address: &DiskAddress, open_format: Option<&str>) -> Option<&str> {
        let known = || self.iter().filter(|backend| backend.recognises(address, open_format));
        // A backend that has another name than the format is the more particular one.
        let particular = known().find(|backend| open_format != Some(backend.format()));
        particular.or_else(|| known().next()).map(DiskSnapshotter::format)
    }

    /// The backend that serves a disk.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] like [`Registry::get`]; [`ErrorKind::Refused`] where its addresses are of
    /// another kind than the disk's: a backend of files never gets another address than a path.
    pub fn serving(&self, disk: &Disk) -> Result<Arc<AnyDiskSnapshotter>> {
        let backend = self.get(&disk.format)?;
        let scheme = disk.address.named().map(|(scheme, _)| scheme);
        if backend.scheme() == scheme {
            return Ok(backend);
        }
        let kind = |scheme: Option<&str>| scheme.map_or("paths".to_owned(), |scheme| format!("{scheme}:..."));
        Err(Error::new(
            ErrorKind::Refused,
            format!(
                "disk {} ({}) is recorded with the format {}, whose disks have other addresses: {}",
                disk.target,
                disk.address,
                disk.format,
                kind(backend.scheme())
            ),
        )
        .state("no changes made")
        .advise("state the format to which this address belongs"))
    }

    /// The backend whose disks have addresses of this scheme.
    pub fn of_scheme(&self, address: &DiskAddress) -> Option<&AnyDiskSnapshotter> {
        let (scheme, _) = address.named()?;
        self.iter().find(|backend| backend.scheme() == Some(scheme))
    }

    /// The address that a domain's configuration has for the disk `target`, which its hypervisor has open as
    /// `open`, perhaps by the permanent name of a layer. It differs from `open` only where both are the same
    /// image now.
    pub async fn configured_address(&self, target: &Target, open: &DiskAddress) -> DiskAddress {
        let scheme = open.named().map(|(scheme, _)| scheme);
        for backend in self.iter().filter(|backend| backend.scheme() == scheme) {
            let Some(configured) = backend.configured_address(open) else { continue };
            let disk = |address: &DiskAddress| Disk::new(target.clone(), address.clone(), backend.format());
            let (its, ours) =
                (backend.identity(&disk(open)).await, backend.identity(&disk(&configured)).await);
            if let (Ok(Some(its)), Ok(Some(ours))) = (its, ours)
                && its == ours
            {
                return configured;
            }
        }
        open.clone()
    }

    /// The format of images that are given by their path alone: the first that was registered.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where nothing is registered.
    pub fn default_format(&self) -> Result<&str> {
        self.backends.first().map(|backend| backend.format()).ok_or_else(|| {
            Error::new(ErrorKind::NotFound, "no backend is registered")
                .advise("register one before anything else")
        })
    }

    /// Adds a hypervisor, and replaces another one of the same name.
    pub fn register_hypervisor(&mut self, saver: Arc<dyn VmStateSaver>) {
        self.hypervisors.retain(|known| known.profile().name != saver.profile().name);
        self.hypervisors.push(saver);
    }

    /// The hypervisor of this name.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where this program has none.
    pub fn hypervisor(&self, name: &Hypervisor) -> Result<Arc<dyn VmStateSaver>> {
        self.hypervisors.iter().find(|known| known.profile().name == *name).cloned().ok_or_else(|| {
            let known: Vec<String> =
                self.hypervisors().map(|known| known.profile().name.to_string()).collect();
            let error =
                Error::new(ErrorKind::Unsupported, format!("this program knows no hypervisor {name}"));
            match known.is_empty() {
                true => error.advise("use a domsnap that was built with it"),
                false => error.advise(format!(
                    "use a domsnap that was built with it; this one knows {}",
                    known.join(", ")
                )),
            }
        })
    }

    /// All hypervisors, in the order of their registration.
    pub fn hypervisors(&self) -> impl Iterator<Item = &dyn VmStateSaver> {
        self.hypervisors.iter().map(Arc::as_ref)
    }

    /// The place of a domain's memory images ([`VmStateSaver::memory_store`]). Those of a domain that no
    /// hypervisor of this program runs are files.
    pub(crate) fn memory_store(
        &self,
        domain: &Domain,
        beside: Option<&Utf8Path>,
    ) -> Result<Option<Arc<dyn MemoryStore>>> {
        match self.hypervisor(&domain.hypervisor) {
            Ok(saver) => saver.memory_store(domain, beside),
            Err(_) => MemoryDirectory::of(domain, beside),
        }
    }

    /// The size of a memory image of a domain ([`VmStateSaver::memory_size`]).
    pub(crate) async fn memory_size(&self, domain: &Domain, image: &DiskAddress) -> Result<Option<u64>> {
        match self.hypervisor(&domain.hypervisor) {
            Ok(saver) => saver.memory_size(image).await,
            Err(_) => MemoryDirectory::size(image),
        }
    }

    /// What the removal of a memory image of a domain frees ([`VmStateSaver::memory_freed`]).
    pub(crate) async fn memory_freed(
        &self,
        domain: &Domain,
        image: &DiskAddress,
    ) -> Result<Option<DeleteCost>> {
        match self.hypervisor(&domain.hypervisor) {
            Ok(saver) => saver.memory_freed(image).await,
            Err(_) => MemoryDirectory::freed(image),
        }
    }

    /// The processes of all backends.
    pub fn processes(&self) -> Vec<u32> {
        self.iter().flat_map(DiskSnapshotter::processes).collect()
    }

    /// All backends, in the order of their registration.
    pub fn iter(&self) -> impl Iterator<Item = &AnyDiskSnapshotter> {
        self.backends.iter().map(Arc::as_ref)
    }
}
