//! Block devices: which are logical volumes, who has one open, and whether it was written.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::Utf8Path;
use serde::{Deserialize, Serialize};
use snapcore::devices::{DeviceUse, device_number as number, kernel_use, xen_disks};

/// What sysfs has of the device.
fn sysfs(path: &Utf8Path, file: &str) -> Option<String> {
    fs::read_to_string(snapcore::devices::sysfs(number(path)?).join(file)).ok()
}

/// Whether a path leads to a logical volume: device-mapper has who made a device in its identity.
pub(crate) fn is_volume(path: &Utf8Path) -> bool {
    sysfs(path, "dm/uuid").is_some_and(|uuid| uuid.starts_with("LVM-"))
}

/// Who has the device open, in words, as far as that can be seen.
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

/// How often processes have the device open, and Xen's driver; none where some processes' files cannot be seen.
///
/// A descriptor that was duplicated counts each time, so it is at least as much as the kernel has counted of them.
pub(crate) fn shown_openings(path: &Utf8Path) -> Option<usize> {
    let device = number(path)?;
    let seen: usize = processes(device).into_iter().map(|(_, times)| times).sum();
    let mut unseen = fs::read_dir("/proc").ok()?.flatten().filter(|process| {
        let denied = |error: std::io::Error| error.kind() == std::io::ErrorKind::PermissionDenied;
        is_process(process) && fs::read_dir(process.path().join("fd")).is_err_and(denied)
    });
    unseen.next().is_none().then(|| seen + xen_disks(device).len())
}

/// The processes that have the device open, each with how often.
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

/// A moment in the life of a device, to tell later whether it was written since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Moment {
    /// The machine's start.
    boot: String,
    /// How many writes the device had had.
    writes: u64,
}

impl Moment {
    /// Now.
    pub(crate) fn now(path: &Utf8Path) -> Self {
        Self { boot: boot(), writes: writes(path).unwrap_or(0) }
    }

    /// The birth of a device that is about to be made.
    pub(crate) fn birth() -> Self {
        Self { boot: boot(), writes: 0 }
    }

    /// Whether the device may have been written since. One that is not there now was not, in this boot of the machine; of what
    /// was in another nobody knows.
    pub(crate) fn may_have_passed(&self, path: &Utf8Path) -> bool {
        boot() != self.boot || writes(path).is_some_and(|writes| writes != self.writes)
    }
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

/// Documentation/block/stat.rst: the fifth is write I/Os.
fn writes(path: &Utf8Path) -> Option<u64> {
    sysfs(path, "stat")?.split_whitespace().nth(4)?.parse().ok()
}
