//! Names of files that cannot lead out of their directory.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The longest name that Linux's file systems take, in bytes.
const LONGEST: usize = 255;

/// The name of a file in a directory: one component.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileName(OsString);

/// Why a text is not the name of a file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not the name of a file in a directory: {why}")]
pub struct BadName {
    name: OsString,
    why: &'static str,
}

impl FileName {
    /// Checks `name` and takes it.
    ///
    /// # Errors
    /// [`BadName`] where it is empty, `.` or `..`, longer than 255 bytes, or has a `/` or a NUL.
    pub fn new(name: impl AsRef<OsStr>) -> Result<Self, BadName> {
        let name = name.as_ref();
        let bytes = name.as_bytes();
        let why = match bytes {
            b"" => "it is empty",
            b"." | b".." => "it names a directory",
            _ if bytes.contains(&b'/') => "it has a '/'",
            _ if bytes.contains(&0) => "it has a NUL",
            _ if bytes.len() > LONGEST => "it is longer than 255 bytes",
            _ => return Ok(Self(name.to_owned())),
        };
        Err(BadName { name: name.to_owned(), why })
    }

    /// The name.
    pub fn as_os_str(&self) -> &OsStr {
        &self.0
    }
}

impl AsRef<Path> for FileName {
    fn as_ref(&self) -> &Path {
        Path::new(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_lead_out() {
        for bad in ["", ".", "..", "a/b", "/a", "../a", "a\0b", &"x".repeat(256)] {
            FileName::new(bad).expect_err(bad);
        }
        for good in ["a", "...", ".a", "a.qcow2", &"x".repeat(255)] {
            assert_eq!(FileName::new(good).unwrap().as_os_str(), good);
        }
    }
}
