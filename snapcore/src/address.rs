//! Address and identity of a disk, and the address of a memory image.
//!
//! An address is a text. A disk of this machine has the absolute path of a file or of a block device. Any
//! other has `SCHEME:TEXT`, which the backend of that scheme alone can read
//! ([`DiskSnapshotter::scheme`](crate::backend::DiskSnapshotter::scheme)): nothing else takes it apart, and
//! no file is looked for by it. The same holds for a memory image, whose address its hypervisor reads.

use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};

use crate::domain::Disk;
use crate::error::{Error, ErrorKind, Result};
use crate::service::file_id;
use crate::state::Layer;

/// The address of a disk, of one of its layers, or of a memory image: a path on this machine, or
/// `SCHEME:TEXT`.
///
/// ```
/// use snapcore::DiskAddress;
///
/// let file = DiskAddress::from("/vm/web/root.img");
/// assert_eq!(file.local().map(|path| path.as_str()), Some("/vm/web/root.img"));
///
/// let image = DiskAddress::from("rbd:pool/root");
/// assert_eq!((image.local(), image.named()), (None, Some(("rbd", "pool/root"))));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskAddress(String);

/// No file can exist below this path, because it is no directory.
const NO_FILE: &str = "/dev/null/not-a-file-of-this-machine";

impl DiskAddress {
    /// The path, where it is a file or block device of this machine.
    pub fn local(&self) -> Option<&Utf8Path> {
        match self.named() {
            None => Some(Utf8Path::new(&self.0)),
            Some(_) => None,
        }
    }

    /// The scheme, and the text that the scheme's backend reads; `None` for a path.
    pub fn named(&self) -> Option<(&str, &str)> {
        split(&self.0)
    }

    /// The path, for a backend of files. The service gives such a backend no other address
    /// ([`Registry::serving`](crate::Registry::serving)). The result for another address is a path
    /// below which nothing can exist.
    pub fn path(&self) -> &Utf8Path {
        self.local().unwrap_or(Utf8Path::new(NO_FILE))
    }

    /// The path, for code that works on files and must refuse everything else.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] for an address with a scheme.
    pub fn require_path(&self) -> Result<&Utf8Path> {
        self.local().ok_or_else(|| {
            Error::new(ErrorKind::Unsupported, format!("{self} is no file or block device of this machine"))
        })
    }

    /// The address as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last part of its name.
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// The directory, where it is a file of this machine.
    /// Returns true for a path among the device nodes, where a name comes and goes with its device, and
    /// nothing is made beside it.
    pub fn is_among_devices(&self) -> bool {
        self.local().is_some_and(is_among_devices)
    }

    pub(crate) fn directory(&self) -> Option<&Utf8Path> {
        self.local().and_then(Utf8Path::parent)
    }

    /// The identity of the file or block device, where it is one of this machine.
    pub(crate) fn inode(&self) -> Option<FileIdentity> {
        self.local().and_then(file_id)
    }
}

impl From<String> for DiskAddress {
    /// Reads an address. Text without a scheme is a path.
    fn from(text: String) -> Self {
        Self(text)
    }
}

impl From<&str> for DiskAddress {
    fn from(text: &str) -> Self {
        Self(text.to_owned())
    }
}

impl From<Utf8PathBuf> for DiskAddress {
    fn from(path: Utf8PathBuf) -> Self {
        Self(path.into_string())
    }
}

impl From<&Utf8PathBuf> for DiskAddress {
    fn from(path: &Utf8PathBuf) -> Self {
        Self(path.to_string())
    }
}

impl From<&Utf8Path> for DiskAddress {
    fn from(path: &Utf8Path) -> Self {
        Self(path.as_str().to_owned())
    }
}

impl std::fmt::Display for DiskAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&self.0)
    }
}

/// See [`DiskAddress::is_among_devices`]. The shared memory below `/dev` is a directory of files like others.
pub(crate) fn is_among_devices(path: &Utf8Path) -> bool {
    path.starts_with("/dev") && !path.starts_with("/dev/shm")
}

/// The scheme of an address and its text. A scheme is 2 to 32 small letters, digits, `+` and `-`, beginning
/// with a letter.
fn split(address: &str) -> Option<(&str, &str)> {
    let (scheme, text) = address.split_once(':')?;
    let is_scheme = (2..=32).contains(&scheme.len())
        && scheme.starts_with(|first: char| first.is_ascii_lowercase())
        && scheme.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-".contains(c));
    (is_scheme && !text.is_empty()).then_some((scheme, text))
}

/// The device and inode of a file, or the number of a block device, because several nodes can lead to one.
pub type FileIdentity = (u64, u64);

/// Placeholder for the device in a block device's identity: no file system has this number.
const BLOCK_DEVICE: u64 = u64::MAX;

/// Returns the identity of the file, which does not depend on the name by which it was opened.
pub fn file_identity(about: &std::fs::Metadata) -> FileIdentity {
    match about.file_type().is_block_device() {
        true => device_identity(about.rdev()),
        false => (about.dev(), about.ino()),
    }
}

/// The identity of the block device of this number.
pub(crate) fn device_identity(number: u64) -> FileIdentity {
    (BLOCK_DEVICE, number)
}

/// Returns true if it is the identity of a block device.
pub(crate) fn is_device(identity: FileIdentity) -> bool {
    identity.0 == BLOCK_DEVICE
}

/// Identity of a disk, by whatever address it is named.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DiskIdentity {
    /// A file or block device of this machine.
    Inode(FileIdentity),
    /// A name that the disk's backend gives to it and to no other.
    Named(String),
}

impl Disk {
    /// The path, where the disk is a file or block device of this machine.
    pub fn local(&self) -> Option<&Utf8Path> {
        self.address.local()
    }

    /// The path, for a backend of files ([`DiskAddress::path`]).
    pub fn path(&self) -> &Utf8Path {
        self.address.path()
    }
}

impl Layer {
    /// The path, for a backend of files ([`DiskAddress::path`]).
    pub fn path(&self) -> &Utf8Path {
        self.address.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path is a path, colons and all, as long as it is absolute; a scheme is read by its form alone.
    #[test]
    fn addresses_are_paths_or_have_a_scheme() {
        for path in ["/vm/a.img", "/vm/rbd:a", "a", "C:x", "a:x", "rbd:", "Rbd:x", "-x:y"] {
            assert_eq!(DiskAddress::from(path).local(), Some(Utf8Path::new(path)), "{path}");
        }
        for (address, scheme, text) in
            [("rbd:pool/image", "rbd", "pool/image"), ("nbd+tls:a:1", "nbd+tls", "a:1")]
        {
            let read = DiskAddress::from(address);
            assert_eq!((read.named(), read.local()), (Some((scheme, text)), None));
            assert_eq!(read.to_string(), address);
        }
    }

    /// People keep disks of short lives in shared memory, which lies below `/dev` and has no devices.
    #[test]
    fn shared_memory_has_files() {
        for (path, among) in [
            ("/dev/vg/root", true),
            ("/dev/sda", true),
            ("/dev/shmem", true),
            ("/dev/shm/a.qcow2", false),
            ("/vm/dev/a", false),
            ("rbd:/dev/a", false),
        ] {
            assert_eq!(DiskAddress::from(path).is_among_devices(), among, "{path}");
        }
    }

    /// A backend of files that got the address of another kind would reach no file, whatever it appends.
    #[test]
    fn path_of_a_named_address_reaches_nothing() {
        let path = DiskAddress::from("rbd:pool/image").path().to_owned();
        for path in [path.with_file_name("a"), path.join("a"), path] {
            assert!(std::fs::File::create(&path).is_err() && path.symlink_metadata().is_err(), "{path}");
        }
    }
}
