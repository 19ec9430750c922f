//! Block devices: which are logical volumes, who has one open, and whether it was written.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use camino::Utf8Path;
use serde::{Deserialize, Serialize};

/// The number of the device that a path leads to.
fn number(path: &Utf8Path) -> Option<u64> {
    let about = fs::metadata(path).ok()?;
    about.file_type().is_block_device().then(|| about.rdev())
}

/// What sysfs has of the device.
fn sysfs(path: &Utf8Path, file: &str) -> Option<String> {
    let device = number(path)?;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{file}")).ok()
}

/// Whether a path leads to a logical volume: device-mapper has who made a device in its identity.
pub(crate) fn is_volume(path: &Utf8Path) -> bool {
    sysfs(path, "dm/uuid").is_some_and(|uuid| uuid.starts_with("LVM-"))
}

/// Who has the device open, in words, as far as that can be seen.
pub(crate) fn holder(path: &Utf8Path) -> Option<String> {
    let device = number(path)?;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mounted = mounts.lines().find_map(|line| {
        let words: Vec<&str> = line.split(' ').collect();
        (words.get(2) == Some(&format!("{major}:{minor}").as_str())).then(|| words.get(4).copied())?
    });
    if let Some(at) = mounted {
        return Some(format!("it is mounted at {at}"));
    }
    let processes = fs::read_dir("/proc").ok()?.flatten();
    for process in processes {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let Ok(files) = fs::read_dir(process.path().join("fd")) else { continue };
        let has_it = |file: fs::DirEntry| {
            fs::metadata(file.path())
                .is_ok_and(|about| about.file_type().is_block_device() && about.rdev() == device)
        };
        if files.flatten().any(has_it) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!("process {pid} ({}) has it open", name.trim()));
        }
    }
    None
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
