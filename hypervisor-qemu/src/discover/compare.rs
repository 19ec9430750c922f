//! Differences between the recorded machine and the current one that break the restore of a memory image.

use std::fmt;

use snapcore::hypervisor::Medium;

use super::{Device, Discovery};

/// One difference from the record.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// Name of the part: the machine type, a device, ...
    pub what: String,
    /// Its value when the memory was saved.
    pub recorded: String,
    /// Its value now.
    pub now: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: recorded {}, now {}", self.what, self.recorded, self.now)
    }
}

/// Lists every difference that prevents a restore of memory: machine type, processors, memory, devices and
/// drives.
///
/// Contents, files and chains of disks may differ: the revert puts them in place. QEMU accepts another `-cpu`
/// without a word, and the guest then runs on features that are gone. So this is checked before anything is
/// changed.
pub fn compare(recorded: &Discovery, now: &Discovery) -> Vec<Difference> {
    let mut differences = Vec::new();
    let mut differ = |what: &str, recorded: String, now: String| {
        if recorded != now {
            differences.push(Difference { what: what.to_owned(), recorded, now });
        }
    };
    differ("machine type", recorded.machine.clone(), now.machine.clone());
    differ("CPU model", recorded.cpu.model.clone(), now.cpu.model.clone());
    differ("number of CPUs", recorded.cpu.count.to_string(), now.cpu.count.to_string());
    let mib = |bytes: u64| match bytes % (1 << 20) {
        0 => format!("{} MiB", bytes >> 20),
        _ => format!("{bytes} bytes"),
    };
    differ("memory", mib(recorded.memory.base), mib(now.memory.base));
    differ("memory plugged in", mib(recorded.memory.plugged), mib(now.memory.plugged));

    let known = |discovery: &Discovery, name: &str| {
        let found = discovery.cpu.features.iter().find(|feature| feature.0 == name);
        found.map_or_else(
            || "none".to_owned(),
            |(_, value)| match value.as_u64() {
                Some(word) if name.starts_with("cpuid") => format!("{word:#x}"),
                _ => value.to_string(),
            },
        )
    };
    // A QEMU of another version may know more feature words: a missing word counts as an empty one.
    let empty = |value: &str| matches!(value, "none" | "0x0");
    let names = recorded.cpu.features.iter().chain(&now.cpu.features).map(|feature| feature.0.as_str());
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let (before, after) = (known(recorded, name), known(now, name));
        if !(empty(&before) && empty(&after)) {
            differ(&format!("CPU {name}"), before, after);
        }
    }

    let device = |device: &Device| match &device.address {
        Some(address) => format!("{} at {address}", device.kind),
        None => device.kind.clone(),
    };
    let none = || "none".to_owned();
    both(
        &recorded.devices,
        &now.devices,
        |device| device.path.clone(),
        |path, before, after| {
            differ(
                &format!("device {path}"),
                before.map_or_else(none, device),
                after.map_or_else(none, device),
            );
        },
    );
    both(
        &recorded.drives,
        &now.drives,
        |drive| drive.target.clone(),
        |target, before, after| {
            let shown = |drive: &super::BlockDevice| {
                let size = drive.chain.first().map(|layer| layer.node.virtual_size);
                format!(
                    "{:?}{}",
                    drive.role,
                    size.map(|size| format!(" of {size} bytes")).unwrap_or_default()
                )
            };
            // A disk that grew since is put in place by the revert.
            let present = before.is_some() == after.is_some();
            let same_role = before.map(|drive| drive.role) == after.map(|drive| drive.role);
            if !present || !same_role {
                differ(
                    &format!("drive {target}"),
                    before.map_or_else(none, shown),
                    after.map_or_else(none, shown),
                );
            }
            // The guest may have the medium mounted: its memory refers to what it has read from that medium.
            let medium = |drive: Option<&super::BlockDevice>| drive.and_then(|drive| drive.medium.clone());
            let format = before.and_then(|drive| drive.medium_format.clone());
            if let (Some(before), Some(after)) = (medium(before), medium(after)) {
                // The revert can put it back ([`media`]).
                if before != after && can_be_put_back(&before, format.as_deref()) {
                    return;
                }
                let named = |medium: String| if medium.is_empty() { "none".to_owned() } else { medium };
                differ(&format!("medium in drive {target}"), named(before), named(after));
            }
        },
    );
    differ("TPM devices", recorded.tpms.join(", "), now.tpms.join(", "));
    differences
}

/// Returns true if a recorded medium can be put back: there was none, or it is a file of a known format.
fn can_be_put_back(medium: &str, format: Option<&str>) -> bool {
    medium.is_empty() || (format.is_some() && !medium.starts_with("json:"))
}

/// Returns the recorded media that are no longer in their drives, if they can be put back.
pub(crate) fn media(recorded: &Discovery, now: &Discovery) -> Vec<Medium> {
    let mut media = Vec::new();
    for before in &recorded.drives {
        let after = now.drives.iter().find(|drive| drive.target == before.target);
        let Some(after) = after.filter(|drive| drive.role == before.role) else { continue };
        let (Some(wanted), Some(has)) = (&before.medium, &after.medium) else { continue };
        let format = before.medium_format.as_deref();
        if wanted != has && can_be_put_back(wanted, format) {
            media.push(
                Medium::new(before.target.clone(), format.unwrap_or_default())
                    .address((!wanted.is_empty()).then(|| wanted.as_str().into()))
                    .writable(!wanted.is_empty() && !before.read_only),
            );
        }
    }
    media
}

/// Calls `each` for every key in either of two lists.
fn both<'a, T>(
    before: &'a [T],
    after: &'a [T],
    key: impl Fn(&T) -> String,
    mut each: impl FnMut(&str, Option<&'a T>, Option<&'a T>),
) {
    let mut keys: Vec<_> = before.iter().chain(after).map(&key).collect();
    keys.sort_unstable();
    keys.dedup();
    for wanted in keys {
        let find = |list: &'a [T]| list.iter().find(|item| key(item) == wanted);
        each(&wanted, find(before), find(after));
    }
}
