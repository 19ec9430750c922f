//! Names, checked once where they enter: code behind these types never sees an unchecked name.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// The longest name, in bytes.
const MAX_BYTES: usize = 255;

fn check(what: &str, name: &str) -> Result<()> {
    let refuse = |why: &str| {
        Err(Error::new(ErrorKind::Usage, format!("{what} name {name:?} {why}")).advise(
            "use 1 to 255 bytes of letters, digits, '.', '_', '-', '+', ':', not starting with '.' or '-'",
        ))
    };
    if name.is_empty() {
        return refuse("is empty");
    }
    if name.len() > MAX_BYTES {
        return refuse("is longer than 255 bytes");
    }
    if name.starts_with(['.', '-']) {
        return refuse("starts with '.' or '-'");
    }
    if let Some(bad) = name.chars().find(|c| !(c.is_ascii_alphanumeric() || "._-+:".contains(*c))) {
        return refuse(&format!("contains {bad:?}"));
    }
    Ok(())
}

macro_rules! checked_name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The longest name, in bytes.
            pub const MAX_BYTES: usize = MAX_BYTES;

            /// Checks `name` and wraps it.
            ///
            /// # Errors
            /// [`ErrorKind::Usage`] if it is empty, too long, or has a character that is not allowed.
            pub fn new(name: impl Into<String>) -> Result<Self> {
                let name = name.into();
                check($what, &name)?;
                Ok(Self(name))
            }

            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(name: String) -> Result<Self> {
                Self::new(name)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl std::str::FromStr for $name {
            type Err = Error;
            fn from_str(name: &str) -> Result<Self> {
                Self::new(name)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    };
}

checked_name!(
    /// The name of a snapshot, unique within its domain.
    SnapshotName,
    "snapshot"
);
checked_name!(
    /// The name of a registered domain.
    DomainName,
    "domain"
);
checked_name!(
    /// The name of a disk inside its domain: `vda`, `xvda`.
    Target,
    "target"
);

/// The permanent name of one layer of a disk, in its backend's own terms.
///
/// For file formats it is a file name in the directory of the disk's configured path, or an absolute path for
/// an image elsewhere. It never changes while the layer exists. A layer that was never frozen may have no
/// file of this name yet. In this case the layer is the file that the configured path names.
#[derive(
    Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, schemars::JsonSchema,
)]
#[serde(transparent)]
pub struct LayerName(pub String);

impl LayerName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_allowed_characters_pass() {
        for name in ["a", "before-update", "2026-11-22T10:00:00+01:00", "v1.2_3", &"x".repeat(255)] {
            assert_eq!(SnapshotName::new(name).unwrap().as_str(), name);
        }
    }

    #[test]
    fn other_names_are_refused_with_the_rule() {
        for name in ["", ".hidden", "-option", "a b", "a/b", "ä", "a\n", "../x", &"x".repeat(256)] {
            let error = SnapshotName::new(name).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Usage, "{name:?}");
            assert!(error.to_string().contains("letters, digits"), "{error}");
        }
    }
}
