//! Looks for users of files in the kernel's tables.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;

use block_devices::DeviceUse;
use camino::Utf8PathBuf;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, makedev, openat, statx};
use rustix::io::Errno;

use crate::address::{FileIdentity, file_identity};
use crate::address::{device_identity, is_device};

/// `O_PATH` in `fdinfo`: such a descriptor can neither read nor write.
const ONLY_PATH: u32 = 0o10_000_000;

/// A user of a file: a process, or the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    /// The file.
    pub(super) file: FileIdentity,
    process: Option<u32>,
    /// For people: `process 12 (cp)`, `/dev/loop0`.
    pub(super) who: String,
    /// Set where the user may write.
    pub(super) writes: bool,
    /// The locks that the user has.
    pub(super) locks: Locks,
}

/// The byte locks by which programs that work on images exclude each other. Byte 100 + N is a permission that
/// is used; byte 200 + N is one that is not shared with others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Locks {
    /// None that excludes another process.
    #[default]
    None,
    /// The locks of a reader, which does not share writing.
    Reader,
    /// The locks of a writer, or one that no other process can share.
    Writer,
}

impl Locks {
    /// Reads the locks from `fdinfo`.
    fn of(info: &str) -> Self {
        // The permissions: consistent read (0), write (1) and resize (3).
        let (uses, keeps) = ([101, 103], [200, 201, 203]);
        let mut all = Self::None;
        for line in info.lines().filter_map(|line| line.strip_prefix("lock:")) {
            let fields: Vec<&str> = line.split_ascii_whitespace().collect();
            let [.., kind, _, _, first, last] = fields[..] else { continue };
            if !fields.contains(&"OFDLCK") && !fields.contains(&"POSIX") {
                continue;
            }
            let Ok(first) = first.parse::<u64>() else { continue };
            // `EOF` is not a number: the lock reaches to the end of every file.
            let last = last.parse::<u64>().unwrap_or(u64::MAX);
            let covers = |bytes: &[u64]| bytes.iter().any(|byte| (first..=last).contains(byte));
            if covers(&uses) || kind == "WRITE" && covers(&[100, 200, 201, 203]) {
                return Self::Writer;
            }
            if covers(&keeps) {
                all = Self::Reader;
            }
        }
        all
    }
}

/// The result of a search in the kernel's tables.
#[derive(Debug, Default)]
pub(super) struct Users {
    /// The users.
    pub(super) found: Vec<User>,
    /// Processes whose files we may not read.
    pub(super) unreadable: u64,
    /// Set if other users' processes are not even listed (`hidepid`).
    pub(super) hidden: bool,
    /// The cost of the search, in µs of a processor's time.
    pub(super) cpu_us: u64,
}

/// Finds all users of these files, except the processes `own` and the domain that has `of_domain` open.
pub(super) fn users_of(
    named: &HashMap<FileIdentity, Utf8PathBuf>,
    own: &HashSet<u32>,
    of_domain: &HashSet<FileIdentity>,
    mapped: bool,
) -> Users {
    let mut users = Users::default();
    if named.is_empty() {
        return users;
    }
    let begun = on_processor();
    let files = with_partitions(named, own, of_domain, &mut users.found);
    add_processes(&files, own, mapped, &mut users);
    users.found.retain(|user| user.process.is_none_or(|pid| !own.contains(&group_of(pid))));
    add_kernel_services(&files, &mut users.found);
    users.cpu_us = on_processor().saturating_sub(begun) / 1000;
    users
}

/// Adds the uses of block devices by the kernel itself. Returns the files and the partitions of the devices,
/// each with the file that it is a part of.
fn with_partitions(
    named: &HashMap<FileIdentity, Utf8PathBuf>,
    own: &HashSet<u32>,
    of_domain: &HashSet<FileIdentity>,
    found: &mut Vec<User>,
) -> HashMap<FileIdentity, FileIdentity> {
    let mut files: HashMap<FileIdentity, FileIdentity> = named.keys().map(|file| (*file, *file)).collect();
    for (file, path) in named.iter().filter(|(file, _)| is_device(**file)) {
        let Some(device) = block_devices::device_number(path) else { continue };
        files
            .extend(block_devices::partitions(device).into_iter().map(|part| (device_identity(part), *file)));
        // The kernel's driver may serve the disk to this very domain, unless a process of the domain does.
        let is_own = || of_domain.contains(file) && !own.iter().any(|pid| has_open(*pid, *file));
        let mut guests = block_devices::guests_of(device);
        if !guests.is_empty() && is_own() {
            guests.clear();
        }
        for DeviceUse { how, writes } in block_devices::kernel_use(path).into_iter().chain(guests) {
            let who = format!("this machine itself ({how})");
            found.push(User { file: *file, process: None, who, writes, locks: Locks::None });
        }
    }
    files
}

/// Adds the processes that have one of the files open, or mapped.
fn add_processes(
    files: &HashMap<FileIdentity, FileIdentity>,
    own: &HashSet<u32>,
    mapped: bool,
    users: &mut Users,
) {
    let inodes: HashSet<u64> = files.keys().map(|(_, inode)| *inode).collect();
    let mut others = false;
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else {
            continue;
        };
        others = others || pid == 1;
        if own.contains(&pid) {
            continue;
        }
        let process = Process { pid, files, inodes: &inodes };
        // A process that has ended uses nothing.
        if matches!(process.open(&mut users.found), Err(Errno::ACCESS | Errno::PERM))
            && !is_of_the_kernel(pid)
        {
            users.unreadable += 1;
        }
        if mapped {
            process.mapped(&mut users.found);
        }
    }
    users.hidden = !others;
}

/// Adds loop devices, swap and storage targets that use one of the files.
fn add_kernel_services(files: &HashMap<FileIdentity, FileIdentity>, found: &mut Vec<User>) {
    let mut add = |who: String, file: &Path, writes: bool| {
        let Ok(about) = fs::metadata(file) else { return };
        if let Some(file) = files.get(&file_identity(&about)) {
            found.push(User { file: *file, process: None, who, writes, locks: Locks::None });
        }
    };
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        let file = file.trim_end_matches('\n');
        let writes = fs::read_to_string(entry.path().join("ro")).is_ok_and(|ro| ro.trim() == "0");
        let who = format!("/dev/{}", entry.file_name().to_string_lossy());
        add(who, Path::new(file.strip_suffix(" (deleted)").unwrap_or(file)), writes);
    }
    for line in fs::read_to_string("/proc/swaps").unwrap_or_default().lines().skip(1) {
        let name = line.split_ascii_whitespace().next().unwrap_or_default();
        add("the kernel, as swap".to_owned(), Path::new(&unescaped(name)), true);
    }
    for (kind, depth, name) in [("target/core", 2, "udev_path"), ("nvmet/subsystems", 3, "device_path")] {
        for file in configured(&Path::new("/sys/kernel/config").join(kind), depth, name) {
            add("the kernel, as a storage target".to_owned(), Path::new(&file), true);
        }
    }
}

/// The time for which this thread has had a processor, in ns: on a busy machine other times are useless.
fn on_processor() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_ascii_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0)
}

struct Process<'a> {
    pid: u32,
    /// Each file with the one that it is a part of.
    files: &'a HashMap<FileIdentity, FileIdentity>,
    inodes: &'a HashSet<u64>,
}

impl Process<'_> {
    fn who(&self) -> String {
        let name = fs::read_to_string(format!("/proc/{}/comm", self.pid)).unwrap_or_default();
        let name: String = name.chars().filter(|character| !character.is_control()).collect();
        format!("process {} ({name})", self.pid)
    }

    /// The files that it has open.
    fn open(&self, found: &mut Vec<User>) -> rustix::io::Result<()> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = openat(CWD, format!("/proc/{}/fd", self.pid), flags, Mode::empty())?;
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name();
            if name.to_bytes().starts_with(b".") {
                continue;
            }
            // A server that may be unreachable is not asked: the kernel's cached values identify a file.
            let flags = AtFlags::STATX_DONT_SYNC;
            let Ok(about) = statx(&directory, name, flags, StatxFlags::TYPE | StatxFlags::INO) else {
                continue;
            };
            let Some(file) = identity_of(&about).and_then(|file| self.files.get(&file)).copied() else {
                continue;
            };
            let name = name.to_string_lossy();
            let (flags, locks) = match fs::read_to_string(format!("/proc/{}/fdinfo/{name}", self.pid)) {
                Ok(info) => (flags_of(&info), Locks::of(&info)),
                // The file was closed since.
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => continue,
                Err(_) => (None, Locks::None),
            };
            let writes = match flags {
                Some(flags) if flags & ONLY_PATH != 0 => continue,
                Some(flags) => flags & 0o3 != 0,
                None => true,
            };
            found.push(User { file, process: Some(self.pid), who: self.who(), writes, locks });
        }
        Ok(())
    }

    /// The files that it has mapped.
    fn mapped(&self, found: &mut Vec<User>) {
        let maps = fs::read(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
        for line in maps.split(|byte| *byte == b'\n') {
            let Some(mapping) = Mapping::of(line).filter(|mapping| self.inodes.contains(&mapping.inode))
            else {
                continue;
            };
            // The device in the list is the file system's. On some file systems it differs from the device
            // that a file reports itself.
            let by_range = format!("/proc/{}/map_files/{}", self.pid, mapping.range);
            let identity = fs::metadata(by_range).or_else(|_| fs::metadata(mapping.path));
            let file = identity.map_or((mapping.device, mapping.inode), |about| file_identity(&about));
            if let Some(file) = self.files.get(&file).copied() {
                let (writes, locks) = (mapping.writes, Locks::None);
                found.push(User { file, process: Some(self.pid), who: self.who(), writes, locks });
            }
        }
    }
}

/// Returns true if a process has a file open, as far as can be read.
fn has_open(pid: u32, file: FileIdentity) -> bool {
    let mut found = Vec::new();
    let (files, inodes) = (HashMap::from([(file, file)]), HashSet::new());
    // Results from before an error count.
    let _ = Process { pid, files: &files, inodes: &inodes }.open(&mut found);
    !found.is_empty()
}

/// A line of `/proc/PID/maps` for a file.
#[derive(Debug, PartialEq, Eq)]
struct Mapping<'a> {
    range: &'a str,
    writes: bool,
    device: u64,
    inode: u64,
    path: &'a str,
}

impl<'a> Mapping<'a> {
    fn of(line: &'a [u8]) -> Option<Self> {
        let line = std::str::from_utf8(line).ok()?;
        let mut fields = line.splitn(6, ' ');
        let (range, permissions) = (fields.next()?, fields.next()?);
        let (device, inode) = (fields.nth(1)?, fields.next()?);
        let inode = inode.parse().ok().filter(|inode| *inode != 0)?;
        let (major, minor) = device.split_once(':')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        Some(Self {
            range,
            writes: permissions.contains('w') && permissions.ends_with('s'),
            device: makedev(number(major)?, number(minor)?),
            inode,
            path: fields.next().unwrap_or_default().trim_start(),
        })
    }
}

fn identity_of(about: &rustix::fs::Statx) -> Option<FileIdentity> {
    match FileType::from_raw_mode(about.stx_mode.into()) {
        FileType::RegularFile => Some((makedev(about.stx_dev_major, about.stx_dev_minor), about.stx_ino)),
        FileType::BlockDevice => Some(device_identity(makedev(about.stx_rdev_major, about.stx_rdev_minor))),
        _ => None,
    }
}

/// The flags of an open file, from `fdinfo`.
fn flags_of(info: &str) -> Option<u32> {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(flags.trim(), 8).ok()
}

/// A field of `/proc/PID/stat`, counted from the process's state.
fn stat_of(pid: u32, field: usize) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after) = stat.rsplit_once(')')?;
    after.split_ascii_whitespace().nth(field)?.parse().ok()
}

/// Returns true for a thread of the kernel: those have no files.
fn is_of_the_kernel(pid: u32) -> bool {
    pid == 2 || stat_of(pid, 1) == Some(2)
}

/// The leader of the process's group: a backend's process leads the processes that it started.
fn group_of(pid: u32) -> u32 {
    stat_of(pid, 2).unwrap_or(pid)
}

/// Decodes a name in `/proc/swaps`, where spaces are written as `\040`.
fn unescaped(name: &str) -> String {
    name.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
}

/// The content of the files called `name`, `depth` directories below `root`.
fn configured(root: &Path, depth: u32, name: &str) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(root).into_iter().flatten().flatten() {
        match depth {
            0 | 1 => {
                let said = fs::read_to_string(entry.path().join(name));
                found
                    .extend(said.map(|said| said.trim_end().to_owned()).ok().filter(|said| !said.is_empty()));
            }
            more => found.extend(configured(&entry.path(), more - 1, name)),
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::process::{Command, Stdio};

    use super::*;

    fn id(path: &Path) -> FileIdentity {
        file_identity(&fs::metadata(path).unwrap())
    }

    /// Runs a shell command that prints "ready" and waits until its standard input closes.
    fn with_shell(command: &str, check: impl FnOnce(u32)) {
        let mut child = Command::new("/bin/sh")
            .args(["-c", &format!("{command}; echo ready; read end")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut said).unwrap();
        check(child.id());
        child.stdin.take().unwrap().write_all(b"\n").unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn open_files_of_processes_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a");
        fs::write(&file, b"x").unwrap();
        let link = dir.path().join("another name");
        fs::hard_link(&file, &link).unwrap();
        let users_of = |own: &HashSet<u32>| {
            let file = Utf8PathBuf::from_path_buf(file.clone()).unwrap();
            users_of(&HashMap::from([(id(file.as_std_path()), file)]), own, &HashSet::new(), true)
        };
        let none = HashSet::new();
        assert_eq!(users_of(&HashSet::from([std::process::id()])).found, []);
        for (redirection, writes) in [("3<", false), ("3>>", true), ("3<>", true)] {
            with_shell(&format!("exec {redirection} '{}'", link.display()), |pid| {
                let found = users_of(&none).found;
                let user =
                    found.iter().find(|user| user.who.starts_with(&format!("process {pid} "))).unwrap();
                assert_eq!((user.file, user.writes), (id(&file), writes), "{redirection}");
                assert!(users_of(&HashSet::from([pid, std::process::id()])).found.is_empty());
            });
        }
    }

    #[test]
    fn lines_of_the_memory_map_are_read() {
        let line = b"7f8e1000-7f8e2000 rw-s 00000000 fd:01 1234                       /srv/a b.raw";
        let mapping = Mapping::of(line).unwrap();
        assert_eq!((mapping.range, mapping.writes, mapping.inode), ("7f8e1000-7f8e2000", true, 1234));
        assert_eq!((mapping.device, mapping.path), (makedev(0xfd, 1), "/srv/a b.raw"));
        let private = Mapping::of(b"7f8e1000-7f8e2000 rw-p 00000000 fd:01 1234 /x").unwrap();
        assert!(!private.writes);
        for line in ["7f8e1000-7f8e2000 rw-p 00000000 00:00 0 [heap]", "", "nonsense", "a b c d"] {
            assert_eq!(Mapping::of(line.as_bytes()), None, "{line}");
        }
    }

    #[test]
    fn locks_of_images_are_read() {
        let lock = |kind: &str, first: &str, last: &str| {
            let of = |fields: &str| {
                Locks::of(&format!("pos:\t0\nlock:\t1: {fields} -1 fe:00:17 {first} {last}\n"))
            };
            (of(&format!("OFDLCK ADVISORY  {kind}")), of(&format!("POSIX  ADVISORY  {kind}")))
        };
        let both = |locks: Locks| (locks, locks);
        assert_eq!(lock("READ", "101", "101"), both(Locks::Writer));
        assert_eq!(lock("READ", "201", "201"), both(Locks::Reader));
        assert_eq!(lock("READ", "100", "100"), both(Locks::None));
        assert_eq!(lock("WRITE", "0", "EOF"), both(Locks::Writer));
        assert_eq!(lock("WRITE", "0", "0"), both(Locks::None));
        assert_eq!(Locks::of("lock:\t1: FLOCK  ADVISORY  WRITE 81 fe:00:4 0 EOF\n"), Locks::None);
        assert_eq!(Locks::of("flags:\t0100000\n"), Locks::None);
    }

    #[test]
    fn flags_and_names_of_the_kernel_are_read() {
        assert_eq!(flags_of("pos:\t0\nflags:\t0100002\nmnt_id:\t27\n"), Some(0o100_002));
        assert_eq!(flags_of("pos:\t0\n"), None);
        assert_eq!(unescaped("/swap\\040file"), "/swap file");
    }
}
