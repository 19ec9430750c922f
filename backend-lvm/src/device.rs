//! Block devices: which are logical volumes, who has one open, and whether it was written.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};

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

/// How the kernel of this machine itself uses the device, in words; none where it does not. No snapshot of
/// such a device is of one instant beside a domain that writes it too, and a revert would change what the
/// kernel knows by heart.
pub(crate) fn kernel_use(path: &Utf8Path) -> Option<String> {
    let device = number(path)?;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    if let Some(at) = mounted_at(&mounts, major, minor) {
        return Some(format!("it is mounted at {at}"));
    }
    let named = |line: &str| line.split_ascii_whitespace().next().map(str::to_owned);
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    if swaps.lines().skip(1).filter_map(named).any(|name| number(Utf8Path::new(&name)) == Some(device)) {
        return Some("it is swap space".to_owned());
    }
    let holders = fs::read_dir(format!("/sys/dev/block/{major}:{minor}/holders"));
    let mut holders: Vec<String> =
        holders.into_iter().flatten().flatten().map(|entry| used_by(&entry)).collect();
    holders.sort();
    if !holders.is_empty() {
        return Some(format!("it is a part of {}", holders.join(", ")));
    }
    // Whatever claims it without being shown: a mount in another namespace, a target of the kernel.
    let alone =
        OpenOptions::new().read(true).custom_flags(rustix::fs::OFlags::EXCL.bits().cast_signed()).open(path);
    let busy = alone.is_err_and(|error| error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()));
    busy.then(|| "it is mounted, or claimed by another program".to_owned())
}

/// A device above, by its name and what device-mapper calls it.
fn used_by(holder: &fs::DirEntry) -> String {
    let device = holder.file_name().to_string_lossy().into_owned();
    match fs::read_to_string(holder.path().join("dm/name")) {
        Ok(name) => format!("the device {} ({device})", name.trim()),
        Err(_) => format!("the device {device}"),
    }
}

/// Where a device is mounted, by the text of `mountinfo`.
fn mounted_at(mounts: &str, major: u32, minor: u32) -> Option<&str> {
    let device = format!("{major}:{minor}");
    mounts.lines().find_map(|line| {
        let mut words = line.split(' ');
        (words.nth(2)? == device).then(|| words.nth(1)).flatten()
    })
}

/// Who has the device open, in words, as far as that can be seen.
pub(crate) fn holder(path: &Utf8Path) -> Option<String> {
    let device = number(path)?;
    if let Some(words) = kernel_use(path) {
        return Some(words);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number() {
        let mounts = "22 28 0:21 / /proc rw shared:12 - proc proc rw\n\
                      99 28 253:10 / /srv/a\\040b rw - ext4 /dev/mapper/vg-x rw\n\
                      98 28 253:1 / /srv/b rw - ext4 /dev/mapper/vg-y rw\n";
        assert_eq!(mounted_at(mounts, 253, 1), Some("/srv/b"));
        assert_eq!(mounted_at(mounts, 253, 10), Some("/srv/a\\040b"));
        assert_eq!(mounted_at(mounts, 25, 31), None);
        assert_eq!(mounted_at("253:1\n\n1 2 253:1", 253, 1), None);
    }
}
