//! Block devices of this machine: their numbers, their partitions, and their uses by the kernel. A use is a
//! mount, swap, a device made of it, an exclusive claim, or a guest of a hypervisor.
//!
//! No process has such a device open, or none that shows it, and no lock shows it. Two writers destroy a
//! disk. A reader beside a merge or a removal gets inconsistent data.

#![forbid(unsafe_code)]

use std::fs::{self, OpenOptions};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use camino::Utf8Path;
use rustix::fs::{major, makedev, minor};

/// A use of a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceUse {
    /// Description for people: "mounted at /srv".
    pub how: String,
    /// True if the use may write the device.
    pub writes: bool,
}

/// Returns the number of the block device that a path leads to; `None` if it leads to something else.
pub fn device_number(path: &Utf8Path) -> Option<u64> {
    let about = fs::metadata(path).ok()?;
    about.file_type().is_block_device().then(|| about.rdev())
}

/// The directory of a device in sysfs.
pub fn sysfs(device: u64) -> PathBuf {
    PathBuf::from(format!("/sys/dev/block/{}:{}", major(device), minor(device)))
}

/// The partitions of a device, by their numbers. A use of a partition is a use of the device.
pub fn partitions(device: u64) -> Vec<u64> {
    let entries = fs::read_dir(sysfs(device)).into_iter().flatten().flatten();
    let partitions = entries.map(|entry| entry.path()).filter(|path| path.join("partition").exists());
    partitions.filter_map(|path| number_in(&path.join("dev"), 10)).collect()
}

/// Returns the first use of the device at `path` by the kernel, writers before readers.
pub fn kernel_use(path: &Utf8Path) -> Option<DeviceUse> {
    let device = device_number(path)?;
    let mut uses = Vec::new();
    for device in std::iter::once(device).chain(partitions(device)) {
        uses.extend(mounts(device));
        uses.extend(swap(device));
        uses.extend(holders(device));
    }
    uses.sort_by_key(|found| !found.writes);
    if uses.is_empty() {
        uses.extend(claim(path, device));
    }
    uses.into_iter().next()
}

fn mounts(device: u64) -> Option<DeviceUse> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let named = |source: &str| device_number(Utf8Path::new(source)) == Some(device);
    let (at, writes) = mounted_at(&text, (major(device), minor(device)), named)?;
    Some(DeviceUse { how: format!("mounted at {at}"), writes })
}

/// Finds in the text of `mountinfo` where a device is mounted, and if its file system may write it.
///
/// The options of the file system decide, not those of one mount: a file system that is mounted read-only in
/// one place may be writable in another. A file system of several devices (btrfs) has none of their numbers
/// and names one of them.
fn mounted_at(text: &str, (major, minor): (u32, u32), named: impl Fn(&str) -> bool) -> Option<(&str, bool)> {
    let number = format!("{major}:{minor}");
    text.lines().find_map(|line| {
        let (mount, file_system) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(2);
        let (found, at) = (mount.next()?, mount.nth(1)?);
        let mut file_system = file_system.split(' ').skip(1);
        let (source, options) = (file_system.next()?, file_system.next()?);
        let is_it =
            found == number || (found.starts_with("0:") && source.starts_with("/dev/") && named(source));
        is_it.then(|| (at, options.split(',').all(|option| option != "ro")))
    })
}

fn swap(device: u64) -> Option<DeviceUse> {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut names = text.lines().skip(1).filter_map(|line| line.split_ascii_whitespace().next());
    let is_it = names.any(|name| device_number(Utf8Path::new(name)) == Some(device));
    is_it.then(|| DeviceUse { how: "swap space".to_owned(), writes: true })
}

/// Finds devices that are made of it: a volume group, an array, a mapping by kpartx.
fn holders(device: u64) -> Option<DeviceUse> {
    let entries = fs::read_dir(sysfs(device).join("holders")).into_iter().flatten().flatten();
    let mut found: Vec<(String, bool)> = entries
        .map(|entry| {
            let (name, place) = (entry.file_name().to_string_lossy().into_owned(), entry.path());
            let read_only = fs::read_to_string(place.join("ro")).is_ok_and(|ro| ro.trim() == "1");
            let shown = match fs::read_to_string(place.join("dm/name")) {
                Ok(mapped) => format!("the device {} ({name})", mapped.trim()),
                Err(_) => format!("the device {name}"),
            };
            (shown, !read_only)
        })
        .collect();
    found.sort();
    let names: Vec<&str> = found.iter().map(|(name, _)| name.as_str()).collect();
    (!names.is_empty()).then(|| DeviceUse {
        how: format!("part of {}", names.join(", ")),
        writes: found.iter().any(|(_, writes)| *writes),
    })
}

/// Lists the guests that use the device as a disk through a driver of the kernel, which opens it like any
/// program. Xen's block driver is the one that there is.
pub fn guests_of(device: u64) -> Vec<DeviceUse> {
    let entries = fs::read_dir("/sys/bus/xen-backend/devices").into_iter().flatten().flatten();
    let of_it = entries
        .map(|entry| entry.path())
        .filter(|place| number_in(&place.join("physical_device"), 16).is_some_and(|number| number == device));
    of_it
        .map(|place| {
            let name = place.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let reads = fs::read_to_string(place.join("mode")).is_ok_and(|mode| mode.trim() == "r");
            DeviceUse { how: format!("the disk of a Xen domain ({name})"), writes: !reads }
        })
        .collect()
}

/// Finds an exclusive claim that is visible nowhere else: a mount in another namespace, a kernel target, a
/// file system check.
fn claim(path: &Utf8Path, device: u64) -> Option<DeviceUse> {
    let alone = OpenOptions::new()
        .read(true)
        .custom_flags((rustix::fs::OFlags::EXCL | rustix::fs::OFlags::NONBLOCK).bits().cast_signed())
        .open(path);
    let busy = alone.is_err_and(|error| error.raw_os_error() == Some(rustix::io::Errno::BUSY.raw_os_error()));
    let read_only = fs::read_to_string(sysfs(device).join("ro")).is_ok_and(|ro| ro.trim() == "1");
    busy.then(|| {
        let elsewhere = mounted_elsewhere(device);
        let how = elsewhere.unwrap_or_else(|| "mounted, or claimed by another program or device".to_owned());
        DeviceUse { how, writes: !read_only }
    })
}

/// Finds a mount that only another mount namespace has: of a service, of a container, or one that outlived
/// its `umount` here.
fn mounted_elsewhere(device: u64) -> Option<String> {
    let mut known: Vec<PathBuf> = fs::read_link("/proc/self/ns/mnt").into_iter().collect();
    for process in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let pid = process.file_name().to_string_lossy().into_owned();
        if !pid.bytes().all(|byte| byte.is_ascii_digit()) {
            continue;
        }
        let Ok(namespace) = fs::read_link(process.path().join("ns/mnt")) else { continue };
        if known.contains(&namespace) {
            continue;
        }
        let text = fs::read_to_string(process.path().join("mountinfo")).unwrap_or_default();
        if let Some((at, _)) = mounted_at(&text, (major(device), minor(device)), |_| false) {
            let name = fs::read_to_string(process.path().join("comm")).unwrap_or_default();
            return Some(format!(
                "mounted at {at} in the mount namespace of process {pid} ({})",
                name.trim()
            ));
        }
        known.push(namespace);
    }
    None
}

/// Reads a device's number from a file, as `MAJOR:MINOR`.
fn number_in(file: &Path, radix: u32) -> Option<u64> {
    let text = fs::read_to_string(file).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    let number = |text| u32::from_str_radix(text, radix).ok();
    Some(makedev(number(major)?, number(minor)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_are_found_by_number_or_name() {
        let mounts = "22 28 0:21 / /proc rw shared:12 - proc proc rw\n\
                      99 28 253:10 / /srv/a\\040b ro - ext4 /dev/mapper/vg-x rw,discard\n\
                      98 28 253:1 / /srv/b rw - ext4 /dev/mapper/vg-y ro\n\
                      97 28 0:44 /sub /srv/c rw - btrfs /dev/mapper/vg-z rw,subvol=/sub\n";
        let none = |_: &str| false;
        assert_eq!(mounted_at(mounts, (253, 1), none), Some(("/srv/b", false)));
        assert_eq!(mounted_at(mounts, (253, 10), none), Some(("/srv/a\\040b", true)));
        assert_eq!(mounted_at(mounts, (25, 31), none), None);
        let z = |name: &str| name == "/dev/mapper/vg-z";
        assert_eq!(mounted_at(mounts, (253, 5), z), Some(("/srv/c", true)));
        assert_eq!(mounted_at("253:1\n\n1 2 253:1", (253, 1), none), None);
    }
}
