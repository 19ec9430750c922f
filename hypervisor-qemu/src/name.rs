//! The names that this crate gives in QEMU. All begin with `domsnap-`, so that ours can be recognised after a
//! crash.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::error::{Error, ErrorKind, Result};

/// The prefix of every name of ours in QEMU.
pub const PREFIX: &str = "domsnap-";

/// QEMU's node names have at most 31 bytes; two are for the suffix of the file node below.
const LONGEST: usize = 29;

/// The name of a node or a job of ours: `domsnap-` and letters, digits, `-`, `_` and `.`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

impl Name {
    /// Checks a given name. Used for names that a journal records before they are used.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if it does not begin with `domsnap-`, is longer than 29 bytes, or has other
    /// characters.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let name = name.into();
        let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
        let rest = name.strip_prefix(PREFIX).unwrap_or_default();
        if rest.is_empty() || name.len() > LONGEST || !rest.bytes().all(allowed) {
            let detail = format!(
                "a name of domsnap's in QEMU is {PREFIX:?} and letters, digits, '-', '_' or '.', {LONGEST} bytes at most"
            );
            return Err(Error::new(ErrorKind::Invalid, "naming a node or job", name, detail));
        }
        Ok(Self(name))
    }

    /// Makes a unique name: `domsnap-`, one letter or two, and 48 random bits.
    pub(crate) fn fresh(kind: &str) -> Self {
        let random = uuid::Uuid::new_v4().simple().to_string();
        Self(format!("{PREFIX}{kind}-{}", random.get(..12).unwrap_or(&random)))
    }

    /// Makes the name that belongs to a text: `domsnap-`, one letter or two, and 64 bits (FNV-1a) of the
    /// text.
    pub(crate) fn of(kind: &str, text: &str) -> Self {
        let step = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325, step);
        Self(format!("{PREFIX}{kind}-{hash:016x}"))
    }

    /// Makes a fresh name for a node of a disk's layer.
    pub fn node() -> Self {
        Self::fresh("n")
    }

    /// Makes a fresh name for a job.
    pub fn job() -> Self {
        Self::fresh("j")
    }

    /// Returns the name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the name of the node of the file below this node.
    pub fn file(&self) -> String {
        format!("{}-f", self.0)
    }
}

/// Returns true if a name in QEMU is one of ours.
pub fn is_ours(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// The prefix of a mark's name. A mark is a node that nothing uses; its existence alone carries the
/// information.
pub(crate) const MARK: &str = "domsnap-mark-";

/// Returns true if a name is that of a mark.
pub(crate) fn is_mark(name: &str) -> bool {
    name.starts_with(MARK)
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(name: String) -> Result<Self> {
        Self::new(name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Our names fit into QEMU with their suffix, and are recognised as ours.
    #[test]
    fn our_names_fit_and_are_recognised() {
        for name in [
            Name::node(),
            Name::job(),
            Name::of("ph", "vda"),
            Name::new("domsnap-0123456789012345678.-").expect("29 bytes"),
        ] {
            assert!(name.file().len() <= 31 && is_ours(name.as_str()) && is_ours(&name.file()), "{name}");
            assert_eq!(Name::new(name.as_str()).expect("valid"), name);
        }
        assert_ne!(Name::node(), Name::node());
        assert_eq!(
            Name::of("ph", "vda").as_str(),
            "domsnap-ph-691523194edfe322",
            "it is known after a crash"
        );
    }

    /// Names without our prefix, too long ones and those with other characters are refused.
    #[test]
    fn invalid_names_are_refused() {
        for name in
            ["", "domsnap-", "d0", "domsnap-0123456789012345678901", "domsnap-a b", "domsnap-ä", "domsnap-#1"]
        {
            let error = Name::new(name).expect_err(name);
            assert_eq!(error.kind(), ErrorKind::Invalid);
        }
    }
}
