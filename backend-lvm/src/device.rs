//! Block devices: which are logical volumes, their users, and whether they were written.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::{fmt, fs};

use block_devices::{DeviceUse, device_number as number, guests_of, kernel_use};
use camino::Utf8Path;
use serde::{Deserialize, Serialize};

/// Reads a file of the device in sysfs.
fn sysfs(path: &Utf8Path, file: &str) -> Option<String> {
    fs::read_to_string(block_devices::sysfs(number(path)?).join(file)).ok()
}

/// Returns true if a path leads to a logical volume: a device-mapper device has its creator in its identity.
pub(crate) fn is_volume(path: &Utf8Path) -> bool {
    sysfs(path, "dm/uuid").is_some_and(|uuid| uuid.starts_with("LVM-"))
}

/// Describes the user of an open device, as far as that is visible.
pub(crate) fn holder(path: &Utf8Path) -> Option<String> {
    let device = number(path)?;
    if let Some(DeviceUse { how, .. }) = kernel_use(path) {
        return Some(how);
    }
    processes(device).into_iter().next().map(|(pid, _)| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        format!("process {pid} ({}) has it open", name.trim())
    })
}

/// Returns how often processes, and drivers of guests, have the device open. `None` if the files of some
/// processes are not readable.
///
/// A duplicated descriptor counts each time, so the result is at least the kernel's count of them.
pub(crate) fn shown_openings(path: &Utf8Path) -> Option<usize> {
    let device = number(path)?;
    let seen: usize = processes(device).into_iter().map(|(_, times)| times).sum();
    let mut unseen = fs::read_dir("/proc").ok()?.flatten().filter(|process| {
        let denied = |error: std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
        is_process(process) && fs::read_dir(process.path().join("fd")).is_err_and(denied)
    });
    unseen.next().is_none().then(|| seen + guests_of(device).len())
}

/// Returns the processes that have the device open, each with its number of descriptors.
fn processes(device: u64) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten().filter(is_process) {
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        let has_it = |file: &fs::DirEntry| {
            fs::metadata(file.path())
                .is_ok_and(|about| about.file_type().is_block_device() && about.rdev() == device)
        };
        let times = files.flatten().filter(has_it).count();
        if times > 0 {
            found.push((process.file_name().to_string_lossy().into_owned(), times));
        }
    }
    found
}

fn is_process(entry: &fs::DirEntry) -> bool {
    entry.file_name().as_encoded_bytes().iter().all(u8::is_ascii_digit)
}

/// State of a device at one time, to detect later whether it was written since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceState {
    /// Identity of the machine's boot.
    boot: String,
    /// Number of writes to the device so far.
    writes: u64,
    /// Sequence number of the device, which no other device of this boot has (Linux 5.15 and later). A volume
    /// that is deactivated and activated again has a new device, whose writes are counted from 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    sequence: Option<u64>,
}

impl DeviceState {
    /// Takes the current state.
    pub(crate) fn now(path: &Utf8Path) -> Self {
        Self { boot: boot(), writes: writes(path).unwrap_or(0), sequence: sequence(path) }
    }

    /// Makes the state of a device that is about to be created.
    pub(crate) fn fresh() -> Self {
        Self { boot: boot(), writes: 0, sequence: None }
    }

    /// Returns true if the device may have been written since. That is not known after another boot, of a
    /// device that does not exist now (a volume that was deactivated), and of another device at the path.
    pub(crate) fn may_have_passed(&self, path: &Utf8Path) -> bool {
        let is_another = |then: u64| sequence(path).is_some_and(|now| now != then);
        boot() != self.boot
            || writes(path).is_none_or(|now| now != self.writes)
            || self.sequence.is_some_and(is_another)
    }

    /// Reads what was written with its `Display`.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        // A boot's identity is a UUID. Further fields, of a later version, are ignored.
        let mut fields = text.split(':');
        let (boot, writes) = (fields.next()?.to_owned(), fields.next()?.parse().ok()?);
        Some(Self { boot, writes, sequence: fields.next().and_then(|sequence| sequence.parse().ok()) })
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.boot, self.writes)?;
        match self.sequence {
            Some(sequence) => write!(f, ":{sequence}"),
            None => Ok(()),
        }
    }
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Documentation/block/stat.rst: the fifth is write I/Os.
fn writes(path: &Utf8Path) -> Option<u64> {
    sysfs(path, "stat")?.split_whitespace().nth(4)?.parse().ok()
}

/// Documentation/ABI/stable/sysfs-block: `diskseq`.
fn sequence(path: &Utf8Path) -> Option<u64> {
    sysfs(path, "diskseq")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A device that does not exist now, because its volume was deactivated, may have been written before.
    #[test]
    fn missing_device_may_have_been_written() {
        let missing = Utf8Path::new("/dev/domsnap-has-no-such-group/volume");
        assert!(DeviceState::fresh().may_have_passed(missing));
        assert!(DeviceState::now(missing).may_have_passed(missing));
    }

    /// A state is read with and without a sequence number, and with fields that are not known yet.
    #[test]
    fn state_is_read_with_and_without_a_sequence() {
        let read = |text: &str| DeviceState::parse(text).map(|state| (state.writes, state.sequence));
        assert_eq!(read("b:1"), Some((1, None)));
        assert_eq!(read("b:1:2"), Some((1, Some(2))));
        assert_eq!(read("b:1:2:x"), Some((1, Some(2))));
        assert_eq!(read("b:1:x"), Some((1, None)));
        assert_eq!(read("b"), None);
        assert_eq!(read("b:x:2"), None);
        let earlier = serde_json::from_str::<DeviceState>(r#"{"boot":"b","writes":1}"#).expect("a journal's");
        assert_eq!(earlier.to_string(), "b:1");
    }
}
