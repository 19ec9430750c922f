//! The machine that a domain runs on, and that paths of files are paths of.

use std::hash::Hasher;
use std::path::Path;

use serde::{Deserialize, Serialize};

/// A machine, as a domain's record names it.
///
/// A machine is known by its machine ID (`man 5 machine-id`). A machine without one has no `Host`. It takes
/// every domain for its own, and records none.
///
/// A virtual machine and its clone have one ID as long as the user does not give the clone another. Until
/// then they are one machine. A machine that gets another ID, because it was installed again, takes its
/// domains over with `domsnap recover --take-over`.
#[derive(Debug, Clone, Serialize, Deserialize, schemars::JsonSchema)]
pub struct Host {
    /// Derived from the machine ID, which is no secret of a file beside an image.
    id: String,
    /// The machine's name when it was recorded, for people.
    name: String,
}

/// The files that may have the machine ID: systemd's, and that of D-Bus without systemd.
const MACHINE_ID: [&str; 2] = ["/etc/machine-id", "/var/lib/dbus/machine-id"];

impl Host {
    /// Returns the machine that this program runs on; `None` if it has no machine ID.
    pub fn local() -> Option<Self> {
        let id = MACHINE_ID.iter().find_map(|file| machine_id(Path::new(file)))?;
        let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Some(Self::new(&id, name.trim()))
    }

    /// Makes the machine of a machine ID and a name.
    pub fn new(machine_id: &str, name: &str) -> Self {
        Self { id: derived(machine_id), name: name.to_owned() }
    }

    /// Returns true if a domain that is recorded for `recorded` is a domain of the machine `here`. It is not
    /// only if both are known and differ.
    pub(crate) fn is_here(recorded: Option<&Self>, here: Option<&Self>) -> bool {
        recorded.zip(here).is_none_or(|(recorded, here)| recorded == here)
    }
}

/// The name is for people alone: a machine may be renamed.
impl PartialEq for Host {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Host {}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", if self.name.is_empty() { "without a name" } else { &self.name }, self.id)
    }
}

/// Reads a machine ID: 32 hexadecimal digits, not all zero. A system that was not set up yet has another text
/// there (`uninitialized`), or none.
fn machine_id(file: &Path) -> Option<String> {
    let text = std::fs::read_to_string(file).ok()?;
    let id = text.trim().to_ascii_lowercase();
    let is_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
    (is_id && id.bytes().any(|byte| byte != b'0')).then_some(id)
}

/// Derives an ID of this program's own, as `man 5 machine-id` asks for. Manifests are read by others.
fn derived(machine_id: &str) -> String {
    #[expect(deprecated, reason = "its successor does not promise the same result in later versions")]
    let mut hasher = std::hash::SipHasher::new_with_keys(0x646f_6d73_6e61_7000, 0x6d61_6368_696e_6500);
    hasher.write(machine_id.as_bytes());
    format!("{:016x}", hasher.finish())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "fedcba9876543210fedcba9876543210";

    /// A record without a host, and a machine without an ID, exclude nothing. A new name is the same machine.
    #[test]
    fn unknown_hosts_exclude_nothing() {
        let (here, there) = (Host::new(ONE, "here"), Host::new(OTHER, "there"));
        assert!(!Host::is_here(Some(&there), Some(&here)));
        assert!(Host::is_here(Some(&Host::new(ONE, "renamed")), Some(&here)));
        assert!(Host::is_here(None, Some(&here)) && Host::is_here(Some(&there), None));
    }

    /// Derived IDs are recorded, so they must never change. They do not show the machine ID.
    #[test]
    fn derived_id_is_always_the_same() {
        assert_eq!(Host::new(ONE, "a").id, "ac7dc2f985749d01");
    }

    /// A file that has no ID yet is no machine ID.
    #[test]
    fn machine_id_is_32_digits() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("machine-id");
        assert_eq!(machine_id(&file), None);
        for (text, id) in [
            (format!("{ONE}\n"), Some(ONE)),
            ("uninitialized\n".to_owned(), None),
            (String::new(), None),
            ("0".repeat(32), None),
            ("g".repeat(32), None),
            (format!("{ONE}0"), None),
        ] {
            std::fs::write(&file, &text).unwrap();
            assert_eq!(machine_id(&file).as_deref(), id, "{text:?}");
        }
    }
}
