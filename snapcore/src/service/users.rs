//! Other users of a file, as the kernel knows them.
//!
//! Image locks are advisory: QEMU with `locking=off`, a loop mount and a backup program take none, and QEMUs with `share-rw=on`
//! do not exclude each other. So the kernel is asked before an image is written, and again before the cut:
//!
//! | user | found by |
//! |---|---|
//! | a process with the file open | `/proc/PID/fd`, and `fdinfo` for whether it can write |
//! | a process that has mapped the file and closed it | `/proc/PID/maps` |
//! | a loop device | `/sys/block/loop*/loop/backing_file` |
//! | swap | `/proc/swaps` |
//! | a target of the kernel (iSCSI, vhost, NVMe) | its configuration in `/sys/kernel/config` |
//! | of a block device: a mount, a device made of it, an exclusive claim, a Xen domain | [`crate::devices`] |
//!
//! Who uses a partition uses the disk. A backend that knows more of its devices (how often one was opened) asks for itself.
//!
//! **Locks.** A program may hold QEMU's byte locks on an image that it has open for reading alone. A running QEMU that has the
//! image open is not hindered, but it could not open it again: so such a holder is refused where the plan detaches the disk.
//!
//! **Who matters.** Anyone who can write a layer of the disk. A reader matters where the plan writes the file that he reads in
//! place (an internal snapshot, a merge into it, a new backing file), unless a running domain writes it anyway; and where the
//! plan cannot be carried out as long as a device is open ([`crate::DiskSnapshotter::needs_of`]). A reader of a
//! layer that only stays as it is, or is removed, keeps what he reads. This process, and the process of the running domain
//! that is worked on, are nobody else.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, makedev, openat, statx};
use rustix::io::Errno;

use super::Inner;
use super::identity::file_id;
use super::live::Live;
use crate::chain::{ChainStep, layer_path};
use crate::devices::{self, DeviceUse};
use crate::engine::Watch;
use crate::hypervisor::{device_identity, is_device};
use crate::{
    Domain, DomainStep, Error, ErrorKind, FileIdentity, Hypervisor, Plan, Result, StepNeed, Target,
    file_identity,
};

/// How long a user is looked for again before he counts: a process that was just forked has files of its parent open for a
/// moment, and a look at an image takes no longer.
const PATIENCE: Duration = Duration::from_millis(120);

/// The same for block devices: programs that look at new devices, udev's among them, come by and go.
const PATIENCE_WITH_DEVICES: Duration = Duration::from_secs(1);

/// How long is waited between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(40);

/// How old an answer may be where the kernel is asked again: what lies between took no time then.
const FRESH: Duration = Duration::from_millis(20);

/// `O_PATH` in `fdinfo`: such a descriptor can neither read nor write.
const ONLY_PATH: u32 = 0o10_000_000;

/// Somebody who uses a file.
#[derive(Debug, Clone, PartialEq, Eq)]
struct User {
    file: FileIdentity,
    process: Option<u32>,
    /// For people: `process 12 (cp)`, `/dev/loop0`.
    who: String,
    writes: bool,
    locks: Locks,
}

/// QEMU's byte locks of a user on a file (`block/file-posix.c`: byte 100 + N stands for a permission that is used, 200 + N for one
/// that is kept from others).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Locks {
    /// None that keeps anybody off.
    #[default]
    None,
    /// Those of a reader, who does not share writing.
    Reader,
    /// Those of a writer, or one that nobody else can share.
    Writer,
}

impl Locks {
    /// Reads them off `fdinfo`.
    fn of(info: &str) -> Self {
        // Consistent read, write and resize.
        let (uses, keeps) = ([101, 103], [200, 201, 203]);
        let mut all = Self::None;
        for line in info.lines().filter_map(|line| line.strip_prefix("lock:")) {
            let words: Vec<&str> = line.split_ascii_whitespace().collect();
            let [.., kind, _, _, first, last] = words[..] else { continue };
            if !words.contains(&"OFDLCK") && !words.contains(&"POSIX") {
                continue;
            }
            let Ok(first) = first.parse::<u64>() else { continue };
            // `EOF` is no number: up to the end of all files.
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

/// What the kernel told.
#[derive(Debug, Default)]
struct Users {
    found: Vec<User>,
    /// Processes whose files we may not see.
    unreadable: u64,
    /// Whether other users' processes are not even listed (`hidepid`).
    hidden: bool,
    /// [`Watched::unknown_process`].
    unknown_process: bool,
    /// What it took to find out, in µs of a processor's time.
    cpu_us: u64,
}

/// A hypervisor's own answer: a running domain that has an image open.
struct OpenElsewhere {
    user: String,
    hypervisor: Hypervisor,
}

impl OpenElsewhere {
    fn error(&self, image: &str) -> Error {
        let Self { user, hypervisor } = self;
        Error::new(ErrorKind::Busy, format!("{image} is open in {user}, which {hypervisor} runs"))
            .state("no changes made")
            .advise(format!("take the snapshot of that domain ('{hypervisor}:NAME'), or shut it down first"))
    }
}

/// The files of a domain that nobody else may use.
pub(super) struct Watched {
    files: HashMap<FileIdentity, (Target, Utf8PathBuf)>,
    /// Those that the plan writes while nobody else writes them.
    in_place: HashSet<FileIdentity>,
    /// Those that the hypervisor must open again, and whether for writing.
    reopened: HashMap<FileIdentity, bool>,
    /// Processes that are not somebody else, and leaders of groups of such processes.
    own: HashSet<u32>,
    /// Those that the running domain has open.
    of_domain: HashSet<FileIdentity>,
    /// The running domain has files open, and in which process is not known: nobody else can be told from it.
    unknown_process: bool,
    /// When the kernel answered last that nobody else uses them.
    answered: Mutex<Option<Instant>>,
}

impl Watched {
    /// Refuses where somebody else uses one of the files; otherwise gives what could not be seen, in words.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming the file and its user.
    pub(super) async fn refuse_users(&self) -> Result<Option<String>> {
        self.refuse(true).await
    }

    /// As [`Watched::refuse_users`]; `mapped`: also those who have a file in their memory alone. Their lists are half of the cost.
    async fn refuse(&self, mapped: bool) -> Result<Option<String>> {
        let files: HashMap<FileIdentity, Utf8PathBuf> =
            self.files.iter().map(|(identity, (_, file))| (*identity, file.clone())).collect();
        let begun = Instant::now();
        loop {
            let (asked, own, of_domain) = (files.clone(), self.own.clone(), self.of_domain.clone());
            let looked =
                tokio::task::spawn_blocking(move || users_of(&asked, &own, &of_domain, mapped)).await;
            let mut users = looked.map_err(|cause| {
                Error::new(ErrorKind::Internal, "looking for users of the images ended early").because(cause)
            })?;
            users.unknown_process = self.unknown_process;
            let Some(user) = users
                .found
                .iter()
                .find(|user| user.writes || self.in_place.contains(&user.file) || self.is_locked_by(user))
            else {
                let took_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
                tracing::debug!(
                    files = files.len(),
                    took_us,
                    cpu_us = users.cpu_us,
                    "asked who else uses the disks"
                );
                *self.answered.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
                    Some(Instant::now());
                return Ok(users.words());
            };
            if begun.elapsed() < if is_device(user.file) { PATIENCE_WITH_DEVICES } else { PATIENCE } {
                tokio::time::sleep(BETWEEN_LOOKS).await;
                continue;
            }
            let Some((target, file)) = self.files.get(&user.file) else { return Ok(users.words()) };
            return Err(user.error(&format!("disk {target}: {file}")));
        }
    }

    /// Returns true if the locks of a user would keep the hypervisor from opening a file again.
    fn is_locked_by(&self, user: &User) -> bool {
        match (self.reopened.get(&user.file), user.locks) {
            (None, _) | (_, Locks::None) | (Some(false), Locks::Reader) => false,
            (Some(true), Locks::Reader) | (Some(_), Locks::Writer) => true,
        }
    }
}

#[async_trait]
impl Watch for Watched {
    async fn ask_again(&self) -> Result<()> {
        let answered = *self.answered.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        match answered.is_some_and(|at| at.elapsed() < FRESH) {
            true => Ok(()),
            // Who came since has it open.
            false => self.refuse(false).await.map(drop),
        }
    }
}

impl User {
    fn error(&self, image: &str) -> Error {
        let uses = match (self.writes, self.locks) {
            (true, _) => "is open for writing",
            (false, Locks::Writer | Locks::Reader) => "is locked, so that it could not be opened again,",
            (false, Locks::None) if is_device(self.file) => "is to be changed or closed, and is open",
            (false, Locks::None) => "would be changed, and is being read",
        };
        Error::new(ErrorKind::Busy, format!("{image} {uses} by {}", self.who)).state("no changes made").advise(
            "stop that program, unmount or detach the device ('losetup -d', 'swapoff'); where it is a virtual machine, take \
             the snapshot through its hypervisor ('domsnap domain scan' tells how) or shut it down",
        )
    }
}

impl Users {
    fn words(&self) -> Option<String> {
        let what = match (self.unreadable, self.hidden) {
            (0, false) if self.unknown_process => {
                return Some(
                    "the process of the running domain is not known: whether another process has its images open without a \
                     lock is not known"
                        .to_owned(),
                );
            }
            (0, false) => return None,
            (0, true) => "processes of other users are hidden here".to_owned(),
            (count, _) => format!("the files of {count} processes of other users cannot be seen"),
        };
        Some(format!(
            "{what}: whether one of them has the images open without a lock is not known (root can see it)"
        ))
    }
}

impl Inner {
    /// The files of `domain` that somebody else must not use while `plan` is carried out; without a plan, no reader matters.
    pub(super) async fn watched(
        &self,
        domain: &Domain,
        live: Option<&Live>,
        plan: Option<&Plan>,
    ) -> Result<Watched> {
        let mut watched = Watched {
            files: HashMap::new(),
            in_place: HashSet::new(),
            reopened: HashMap::new(),
            own: self.registry.processes().into_iter().chain([std::process::id()]).collect(),
            of_domain: HashSet::new(),
            unknown_process: false,
            answered: Mutex::default(),
        };
        let detached: HashSet<Target> = plan.iter().flat_map(|plan| detached_by(plan)).collect();
        let processes = live.map(|live| live.processes());
        let known = processes.as_ref().is_some_and(|processes| !processes.is_empty());
        watched.own.extend(processes.into_iter().flatten());
        for record in &domain.disks {
            let disk = &record.disk;
            let mut open = HashSet::new();
            if let Some(attached) = live.and_then(|live| live.disk(&disk.target)) {
                open = attached.open_files().await?;
            }
            // Where the running domain's process is not known, what it has open cannot be told from what others have.
            let by_the_kernel = || {
                devices::device_number(&disk.path)
                    .is_some_and(|device| !devices::xen_disks(device).is_empty())
            };
            watched.unknown_process |= !known && !open.is_empty() && !by_the_kernel();
            watched.of_domain.extend(&open);
            let told_apart = |file: &Utf8PathBuf| file_id(file).filter(|id| known || !open.contains(id));
            let known_backend = self.registry.get(&disk.format).ok();
            let backend = known_backend.as_deref();
            let layers = record.owned.iter().chain([&record.active]);
            let layers = layers.map(|layer| {
                let file = layer_path(&disk.path, layer);
                // What lies elsewhere than beside the disk only its backend knows.
                match backend.filter(|_| !file.exists()) {
                    Some(backend) => backend.layer_file(record, layer),
                    None => file,
                }
            });
            for file in layers.chain([disk.path.clone()]) {
                if let Some(identity) = told_apart(&file) {
                    if live.is_some() && detached.contains(&disk.target) {
                        let is_active = file == disk.path;
                        *watched.reopened.entry(identity).or_default() |= is_active;
                    }
                    watched.files.entry(identity).or_insert((disk.target.clone(), file));
                }
            }
            for planned in plan.iter().flat_map(|plan| &plan.steps) {
                if planned.step.target != disk.target {
                    continue;
                }
                for StepNeed { file, alone } in
                    backend.iter().flat_map(|backend| backend.needs_of(record, &planned.step))
                {
                    if let Some(identity) = told_apart(&file) {
                        watched.in_place.extend(alone.then_some(identity));
                        watched.files.entry(identity).or_insert((disk.target.clone(), file));
                    }
                }
                let Ok(action) = serde_json::from_value::<ChainStep>(planned.step.action.clone()) else {
                    continue;
                };
                let written = match action {
                    ChainStep::TakeInternal { layer, .. }
                    | ChainStep::ApplyInternal { layer, .. }
                    | ChainStep::DropInternal { layer, .. }
                    | ChainStep::ForgetInternal { layer, .. } => layer,
                    ChainStep::Merge { into, .. } => into,
                    ChainStep::Repoint { child, .. } => child,
                    ChainStep::NameLayer { .. }
                    | ChainStep::CreateOverlay { .. }
                    | ChainStep::Materialise { .. }
                    | ChainStep::SwitchActive { .. }
                    | ChainStep::Remove { .. }
                    | ChainStep::Unname { .. } => continue,
                };
                let named = Some(layer_path(&disk.path, &written)).filter(|file| file.exists());
                let file = named.unwrap_or_else(|| disk.path.clone());
                watched.in_place.extend(file_id(&file).filter(|id| !open.contains(id)));
            }
        }
        Ok(watched)
    }

    /// Refuses disks that somebody else uses, where he takes no locks that we would have met.
    pub(super) async fn refuse_open_elsewhere(&self, domain: &Domain, live: Option<&Live>) -> Result<()> {
        let watched = self.watched(domain, live, None).await?;
        let mut wanted: HashSet<FileIdentity> = watched.files.keys().copied().collect();
        for record in &domain.disks {
            if let Some(attached) = live.and_then(|live| live.disk(&record.disk.target)) {
                let open = attached.open_files().await?;
                wanted.retain(|file| !open.contains(file));
            }
        }
        match self.open_without_lock(&wanted).await? {
            Some((identity, open)) => {
                let Some((target, file)) = watched.files.get(&identity) else { return Ok(()) };
                Err(open.error(&format!("disk {target}: {file}")))
            }
            None => Ok(()),
        }
    }

    pub(super) async fn require_closed(&self, image: &Utf8Path) -> Result<()> {
        let Some(identity) = file_id(image) else { return Ok(()) };
        if let Some((_, open)) = self.open_without_lock(&HashSet::from([identity])).await? {
            return Err(open.error(image.as_str()));
        }
        let target = Target::new("vda")?;
        let watched = Watched {
            files: HashMap::from([(identity, (target, image.to_owned()))]),
            in_place: HashSet::from([identity]),
            reopened: HashMap::new(),
            own: HashSet::from([std::process::id()]),
            of_domain: HashSet::new(),
            unknown_process: false,
            answered: Mutex::default(),
        };
        watched.refuse_users().await.map(drop)
    }

    /// The first of these files that a running domain has open without a lock, and where.
    async fn open_without_lock(
        &self,
        files: &HashSet<FileIdentity>,
    ) -> Result<Option<(FileIdentity, OpenElsewhere)>> {
        for saver in self.registry.hypervisors() {
            let mut found = saver.open_without_lock(files).await?.into_iter();
            if let Some((identity, user)) = found.next() {
                return Ok(Some((identity, OpenElsewhere { user, hypervisor: saver.profile().name })));
            }
        }
        Ok(None)
    }
}

/// The disks that a plan takes from a running domain for a while.
fn detached_by(plan: &Plan) -> Vec<Target> {
    let steps = plan.steps.iter().filter(|planned| planned.step.target.is_domain());
    let steps = steps.filter_map(|planned| serde_json::from_value(planned.step.action.clone()).ok());
    steps
        .filter_map(|step| match step {
            DomainStep::OpenWindow { disks, .. } => Some(disks),
            _ => None,
        })
        .flatten()
        .collect()
}

/// Everyone who uses one of these files, but the processes `own` and the domain that has `of_domain` open.
fn users_of(
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
    let mut files: HashMap<FileIdentity, FileIdentity> = named.keys().map(|file| (*file, *file)).collect();
    for (file, path) in named.iter().filter(|(file, _)| is_device(**file)) {
        let Some(device) = devices::device_number(path) else { continue };
        files.extend(devices::partitions(device).into_iter().map(|part| (device_identity(part), *file)));
        // The kernel's driver may serve the disk to this very domain, unless a process of the domain's does.
        let is_own = || of_domain.contains(file) && !own.iter().any(|pid| has_open(*pid, *file));
        let mut xen = devices::xen_disks(device);
        if !xen.is_empty() && is_own() {
            xen.clear();
        }
        for DeviceUse { how, writes } in devices::kernel_use(path).into_iter().chain(xen) {
            let who = format!("this machine itself ({how})");
            users.found.push(User { file: *file, process: None, who, writes, locks: Locks::None });
        }
    }
    let files = &files;
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
    users.found.retain(|user| user.process.is_none_or(|pid| !own.contains(&group_of(pid))));
    let mut device = |who: String, file: &Path, writes: bool| {
        let Ok(about) = fs::metadata(file) else { return };
        let file = file_identity(&about);
        if let Some(file) = files.get(&file) {
            users.found.push(User { file: *file, process: None, who, writes, locks: Locks::None });
        }
    };
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(file) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        let file = file.trim_end_matches('\n');
        let writes = fs::read_to_string(entry.path().join("ro")).is_ok_and(|ro| ro.trim() == "0");
        let who = format!("/dev/{}", entry.file_name().to_string_lossy());
        device(who, Path::new(file.strip_suffix(" (deleted)").unwrap_or(file)), writes);
    }
    for line in fs::read_to_string("/proc/swaps").unwrap_or_default().lines().skip(1) {
        let name = line.split_ascii_whitespace().next().unwrap_or_default();
        device("the kernel, as swap".to_owned(), Path::new(&unescaped(name)), true);
    }
    for (kind, depth, name) in [("target/core", 2, "udev_path"), ("nvmet/subsystems", 3, "device_path")] {
        for file in configured(&Path::new("/sys/kernel/config").join(kind), depth, name) {
            device("the kernel, as a storage target".to_owned(), Path::new(&file), true);
        }
    }
    users.cpu_us = on_processor().saturating_sub(begun) / 1000;
    users
}

/// For how long this thread has had a processor, in ns: on a busy machine other times say nothing.
fn on_processor() -> u64 {
    let text = fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    text.split_ascii_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0)
}

struct Process<'a> {
    pid: u32,
    /// Each with the one that it is a part of.
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
            // Not asked of a server that may be away: what the kernel knows by itself identifies a file.
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
                // Closed since.
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

    /// The files that it has in its memory.
    fn mapped(&self, found: &mut Vec<User>) {
        let maps = fs::read(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
        for line in maps.split(|byte| *byte == b'\n') {
            let Some(mapping) = Mapping::of(line).filter(|mapping| self.inodes.contains(&mapping.inode))
            else {
                continue;
            };
            // The device in the list is the file system's, which is not what a file says of itself on all.
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

/// Whether a process has a file open, as far as can be seen.
fn has_open(pid: u32, file: FileIdentity) -> bool {
    let mut found = Vec::new();
    let (files, inodes) = (HashMap::from([(file, file)]), HashSet::new());
    // What was found before an error counts.
    let _ = Process { pid, files: &files, inodes: &inodes }.open(&mut found);
    !found.is_empty()
}

/// A line of `/proc/PID/maps` that is of a file.
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
        let mut words = line.splitn(6, ' ');
        let (range, permissions) = (words.next()?, words.next()?);
        let (device, inode) = (words.nth(1)?, words.next()?);
        let inode = inode.parse().ok().filter(|inode| *inode != 0)?;
        let (major, minor) = device.split_once(':')?;
        let number = |text| u32::from_str_radix(text, 16).ok();
        Some(Self {
            range,
            writes: permissions.contains('w') && permissions.ends_with('s'),
            device: makedev(number(major)?, number(minor)?),
            inode,
            path: words.next().unwrap_or_default().trim_start(),
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

/// The flags of an open file, as `fdinfo` has them.
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

/// Whether it is a thread of the kernel: those have no files.
fn is_of_the_kernel(pid: u32) -> bool {
    pid == 2 || stat_of(pid, 1) == Some(2)
}

/// The leader of the process's group: a backend's process leads those that it started.
fn group_of(pid: u32) -> u32 {
    stat_of(pid, 2).unwrap_or(pid)
}

/// A name in `/proc/swaps`, where spaces are written as `\040`.
fn unescaped(name: &str) -> String {
    name.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
}

/// What the files called `name` say, `depth` directories below `root`.
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

    /// Runs a shell command that says "ready" and waits until its standard input closes.
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
        let nobody = HashSet::new();
        assert_eq!(users_of(&HashSet::from([std::process::id()])).found, []);
        for (redirection, writes) in [("3<", false), ("3>>", true), ("3<>", true)] {
            with_shell(&format!("exec {redirection} '{}'", link.display()), |pid| {
                let found = users_of(&nobody).found;
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
            let of =
                |words: &str| Locks::of(&format!("pos:\t0\nlock:\t1: {words} -1 fe:00:17 {first} {last}\n"));
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
