//! Address and identity of a disk.
//!
//! An address is a text. A disk of this machine has the absolute path of a file or of a block device. Any
//! other has `SCHEME:TEXT`, which the backend of that scheme alone can read
//! ([`DiskSnapshotter::scheme`](crate::DiskSnapshotter::scheme)): nothing else takes it apart, and no file is
//! looked for by it.

use camino::Utf8Path;

use crate::{Disk, FileIdentity};

/// A disk's address, as its form says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskAddress<'a> {
    /// A file or block device of this machine, by its absolute path.
    Local(&'a Utf8Path),
    /// An address of a backend of its own.
    Named {
        /// The backend's scheme.
        scheme: &'a str,
        /// The rest, which the backend reads.
        text: &'a str,
    },
}

impl<'a> DiskAddress<'a> {
    /// Reads an address. Text without a scheme is a path.
    pub fn of(address: &'a Utf8Path) -> Self {
        match split(address.as_str()) {
            Some((scheme, text)) => Self::Named { scheme, text },
            None => Self::Local(address),
        }
    }

    /// The path, where the disk is a file or block device of this machine.
    pub fn as_local(self) -> Option<&'a Utf8Path> {
        match self {
            Self::Local(path) => Some(path),
            Self::Named { .. } => None,
        }
    }
}

impl std::fmt::Display for DiskAddress<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Local(path) => path.fmt(f),
            Self::Named { scheme, text } => write!(f, "{scheme}:{text}"),
        }
    }
}

/// The scheme of an address and its text. A scheme is 2 to 32 small letters, digits, `+` and `-`, beginning
/// with a letter.
pub(crate) fn split(address: &str) -> Option<(&str, &str)> {
    let (scheme, text) = address.split_once(':')?;
    let is_scheme = (2..=32).contains(&scheme.len())
        && scheme.starts_with(|first: char| first.is_ascii_lowercase())
        && scheme.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "+-".contains(c));
    (is_scheme && !text.is_empty()).then_some((scheme, text))
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
    /// The disk's address.
    pub fn address(&self) -> DiskAddress<'_> {
        DiskAddress::of(&self.path)
    }

    /// The path, where the disk is a file or block device of this machine.
    pub fn local(&self) -> Option<&Utf8Path> {
        self.address().as_local()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A path is a path, colons and all, as long as it is absolute; a scheme is read by its form alone.
    #[test]
    fn addresses_are_paths_or_have_a_scheme() {
        for path in ["/vm/a.qcow2", "/vm/rbd:a", "a", "C:x", "a:x", "rbd:", "Rbd:x", "-x:y"] {
            assert_eq!(DiskAddress::of(Utf8Path::new(path)).as_local(), Some(Utf8Path::new(path)), "{path}");
        }
        for (address, scheme, text) in
            [("rbd:pool/image", "rbd", "pool/image"), ("nbd+tls:a:1", "nbd+tls", "a:1")]
        {
            let read = DiskAddress::of(Utf8Path::new(address));
            assert_eq!(read, DiskAddress::Named { scheme, text });
            assert_eq!((read.as_local(), read.to_string().as_str()), (None, address));
        }
    }
}
