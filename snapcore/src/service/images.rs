//! Paths of images, and the files that they name.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};

use super::{DomainRef, GivenImage};
use crate::address::{DiskAddress, DiskIdentity, FileIdentity, file_identity, is_among_devices};
use crate::domain::{Disk, Domain};
use crate::error::{Error, ErrorKind, Result};
use crate::name::Target;
use crate::registry::Registry;
use crate::shell::shell_word;

/// The identity of the file that a path names, whatever its name.
pub(crate) fn file_id(path: &Utf8Path) -> Option<FileIdentity> {
    // An address of a backend of its own is no path, though a file of that name may be in the current
    // directory.
    if !path.is_absolute() {
        return None;
    }
    let found = path.metadata().ok()?;
    Some(file_identity(&found))
}

/// The paths of `domain`'s images, quoted for a command line.
pub(super) fn images_of(domain: &Domain) -> String {
    shell_word(&DomainRef::disks_of(domain).to_string())
}

/// Refuses images that do not exist.
///
/// # Errors
/// [`ErrorKind::NotFound`] with the first that does not.
pub(super) fn require_files(images: &[DiskAddress]) -> Result<()> {
    for image in images {
        if let Some(path) = image.local()
            && let Err(cause) = path.symlink_metadata()
            && cause.kind() == std::io::ErrorKind::NotFound
        {
            return Err(Error::new(ErrorKind::NotFound, format!("no such file: {path}")));
        }
    }
    Ok(())
}

impl GivenImage {
    /// Returns the path by which an image is known: without links and dots. A symbolic link to an image is
    /// followed, here and nowhere else: backing names are relative to the image's own directory. A file that
    /// does not exist has its directory's path.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`] for a link of another user to a file that is not that user's. The right to make
    /// links in a directory must not select the files that are changed. [`ErrorKind::Usage`] for a path that
    /// is neither a file nor a block device.
    pub fn known_path(path: &Utf8Path) -> Result<Utf8PathBuf> {
        let Ok(found) = path.symlink_metadata() else { return below_real_directory(path) };
        let about = match path.metadata() {
            Ok(about) => about,
            Err(cause) => {
                let leads = path.read_link_utf8().map(|to| format!(", a symbolic link to {to}"));
                let leads = leads.unwrap_or_default();
                let kind = match cause.kind() {
                    std::io::ErrorKind::NotFound => ErrorKind::NotFound,
                    _ => ErrorKind::Io,
                };
                let detail = match kind {
                    ErrorKind::NotFound => format!("no such file: {path}{leads}"),
                    _ => format!("{path}{leads}, cannot be opened"),
                };
                let error = Error::new(kind, detail).state("no changes made");
                return Err(if kind == ErrorKind::NotFound { error } else { error.because(cause) });
            }
        };
        if !about.is_file() && !about.file_type().is_block_device() {
            return Err(Error::new(
                ErrorKind::Usage,
                format!("{path} is not a regular file or block device"),
            )
            .advise("give the path of a disk image"));
        }
        // The lasting names of block devices are links; the names that they lead to change at the next boot.
        if !found.is_symlink() || about.file_type().is_block_device() {
            return below_real_directory(path);
        }
        let own = rustix::process::geteuid().as_raw();
        if ![0, own, about.uid()].contains(&found.uid()) {
            return Err(Error::new(
                ErrorKind::Refused,
                format!(
                    "the image path {path} is a symbolic link of user {} to a file of user {}",
                    found.uid(),
                    about.uid()
                ),
            )
            .state("no changes made")
            .advise("give the path that it leads to, if that is the image you mean"));
        }
        let real = path.canonicalize_utf8();
        real.map_err(|cause| {
            Error::new(ErrorKind::Io, format!("the symbolic link {path} cannot be followed")).because(cause)
        })
    }

    /// The path by which the image is known, for programs that work on the file itself: without links and
    /// dots.
    ///
    /// # Errors
    /// [`ErrorKind::NotFound`] where it does not exist; [`ErrorKind::Unsupported`] where it is no file of
    /// this machine; [`ErrorKind::Refused`] for a link of another user to a file that is not that user's.
    pub fn file(&self) -> Result<Utf8PathBuf> {
        let Some(path) = self.address.local() else {
            let detail = format!("{} is no file or block device of this machine", self.address);
            return Err(Error::new(ErrorKind::Unsupported, detail).advise("give the path of a disk image"));
        };
        let path = Self::known_path(path)?;
        require_files(&[DiskAddress::from(&path)])?;
        Ok(path)
    }
}

/// The disks whose images do not exist. Block devices are ignored: a volume that is not active has no node.
pub(super) fn missing(domain: &Domain) -> Vec<Target> {
    let is_missing = |disk: &Disk| {
        let file = disk.local().filter(|path| !is_among_devices(path));
        file.is_some_and(|path| {
            path.symlink_metadata().is_err_and(|cause| cause.kind() == std::io::ErrorKind::NotFound)
        })
    };
    let disks = domain.disks.iter().map(|record| &record.disk);
    disks.filter(|disk| is_missing(disk)).map(|disk| disk.target.clone()).collect()
}

/// The path with its directory's own name.
fn below_real_directory(path: &Utf8Path) -> Result<Utf8PathBuf> {
    let name = path
        .file_name()
        .ok_or_else(|| Error::new(ErrorKind::Usage, format!("{path} does not end in a file's name")))?;
    let directory = path.parent().unwrap_or_else(|| Utf8Path::new("/"));
    let directory = directory.canonicalize_utf8().map_err(|cause| match cause.kind() {
        std::io::ErrorKind::NotFound => Error::new(ErrorKind::NotFound, format!("no such file: {path}")),
        _ => Error::new(ErrorKind::Io, format!("the directory of the image {path} cannot be opened"))
            .because(cause),
    })?;
    Ok(directory.join(name))
}

/// Returns the one form of an image's address: its backend's for an address with a scheme, and
/// [`GivenImage::known_path`] for a path.
pub(super) async fn known_address(registry: &Registry, given: &DiskAddress) -> Result<DiskAddress> {
    match registry.of_scheme(given) {
        Some(backend) => backend.resolve(given).await,
        None => GivenImage::known_path(Utf8Path::new(given.as_str())).map(DiskAddress::from),
    }
}

/// Returns the absolute form of a given path, or an address with a scheme as it is. A scheme that no backend
/// has is the beginning of a path.
pub(super) fn absolute(registry: &Registry, given: &DiskAddress) -> Result<DiskAddress> {
    match registry.of_scheme(given) {
        Some(_) => Ok(given.clone()),
        None => camino::absolute_utf8(given.as_str()).map(DiskAddress::from).map_err(|cause| {
            Error::new(
                ErrorKind::Usage,
                format!("the image path {:?} cannot be made absolute", given.as_str()),
            )
            .because(cause)
        }),
    }
}

/// Returns images with the addresses that they are known by, and a sentence for each that was named by a
/// link.
pub(super) async fn real_images(
    registry: &Registry,
    given: &[GivenImage],
) -> Result<(Vec<GivenImage>, Vec<String>)> {
    let mut images: Vec<GivenImage> = Vec::new();
    let mut notes = Vec::new();
    for image in given {
        let real = GivenImage { address: known_address(registry, &image.address).await?, ..image.clone() };
        if let Some(same) = images.iter().find(|other| is_same_file(&other.address, &real.address)) {
            let detail = format!("{} is the image {}, which is given twice", image.address, same.address);
            return Err(Error::new(ErrorKind::Usage, detail));
        }
        notes.extend(followed(&image.address, &real.address));
        images.push(real);
    }
    Ok((images, notes))
}

/// Returns true if two paths name one file, also by two hard links.
pub(super) fn is_same_file(one: &DiskAddress, other: &DiskAddress) -> bool {
    one == other || one.inode().is_some_and(|id| Some(id) == other.inode())
}

/// The note for an image that was named by a symbolic link.
pub(super) fn followed(given: &DiskAddress, real: &DiskAddress) -> Option<String> {
    let is_link = given.local()?.symlink_metadata().is_ok_and(|found| found.is_symlink());
    (is_link && given != real)
        .then(|| format!("{given} is a symbolic link: the image is known by its own path, {real}"))
}

/// The disks of a new domain, with the addresses that they are known by, and a sentence for each that was
/// named by a link.
pub(super) async fn disks_of(
    registry: &Registry,
    spec: &super::DomainSpec,
) -> Result<(Vec<Disk>, Vec<String>)> {
    let mut disks: Vec<(Disk, Option<DiskIdentity>)> = Vec::new();
    let mut notes = Vec::new();
    for disk in &spec.disks {
        let named = |error: Error| error.context(format!("disk {}", disk.target));
        let given = absolute(registry, &disk.address)?;
        let address = known_address(registry, &given).await.map_err(named)?;
        let disk = Disk { address, ..disk.clone() };
        require_files(std::slice::from_ref(&disk.address)).map_err(named)?;
        notes.extend(followed(&given, &disk.address));
        let identity = identity_of(registry, &disk).await?;
        let is_same = |(known, its): &&(Disk, Option<DiskIdentity>)| {
            known.target == disk.target
                || known.address == disk.address
                || (its.is_some() && *its == identity)
        };
        if let Some((same, _)) = disks.iter().find(is_same) {
            return Err(Error::new(
                ErrorKind::Usage,
                format!(
                    "domain {} names a disk twice: {} at {}, and {} at {}",
                    spec.name, same.target, same.address, disk.target, disk.address
                ),
            )
            .advise("give each disk a target and an image of its own"));
        }
        disks.push((disk, identity));
    }
    Ok((disks.into_iter().map(|(disk, _)| disk).collect(), notes))
}

/// Returns the identity of the image at an address: an inode, or for an address with a scheme what its
/// backend gives. `None` if it does not exist, or this program has no backend of the scheme.
pub(super) async fn identity_at(registry: &Registry, address: &DiskAddress) -> Result<Option<DiskIdentity>> {
    match registry.of_scheme(address) {
        Some(backend) => {
            let disk = Disk::new(Target::new("vda")?, address.clone(), backend.format());
            backend.identity(&disk).await
        }
        None => Ok(address.inode().map(DiskIdentity::Inode)),
    }
}

/// Returns the identity that distinguishes a disk from every other. A format that no backend serves is
/// detected when the disk is adopted.
pub(super) async fn identity_of(registry: &Registry, disk: &Disk) -> Result<Option<DiskIdentity>> {
    match registry.serving(disk) {
        Ok(backend) => backend.identity(disk).await,
        Err(_) => Ok(disk.address.inode().map(DiskIdentity::Inode)),
    }
}
