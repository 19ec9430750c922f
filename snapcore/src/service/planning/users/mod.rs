//! Other users of a file, as the kernel knows them.
//!
//! Image locks are advisory: a loop mount and a backup program take none, a hypervisor can be set to take
//! none, or to share an image. So the kernel is asked before an image is written, and again before the cut:
//!
//! | user | found by |
//! |---|---|
//! | a process with the file open | `/proc/PID/fd`, and `fdinfo`, which shows if it can write |
//! | a process that has mapped the file and closed it | `/proc/PID/maps` |
//! | a loop device | `/sys/block/loop*/loop/backing_file` |
//! | swap | `/proc/swaps` |
//! | a target of the kernel (iSCSI, vhost, NVMe) | its configuration in `/sys/kernel/config` |
//! | of a block device: a mount, a device made of it, an exclusive claim, a guest | [`block_devices`] |
//!
//! The user of a partition uses the disk. A backend that knows more of its devices (the number of times one
//! is opened) asks for itself.
//!
//! **Locks.** A program may have byte locks on an image that it has open only for reading. A hypervisor that
//! has the image open is not hindered, but it could not open the image again. So such a program is refused
//! where the plan detaches the disk.
//!
//! **Relevant users.** Every process that can write a layer of the disk is relevant. A reader is relevant in
//! two cases:
//!
//! - The plan writes the file in place (an internal snapshot, a merge into it, a new backing file), and no
//!   running domain writes it anyway.
//! - The plan cannot be carried out as long as a device is open
//!   ([`crate::backend::DiskSnapshotter::needs_of`]).
//!
//! A reader of a layer that only stays as it is, or is removed, keeps its data. This process, and the process
//! of the running domain that is worked on, do not count as other users.

mod kernel;

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};

use self::kernel::{Locks, User, Users, users_of};
use crate::address::{DiskAddress, DiskIdentity, FileIdentity, is_device};
use crate::backend::StepNeed;
use crate::domain::{DiskRecord, Domain, Hypervisor};
use crate::engine::Watch;
use crate::erased::AnyDiskSnapshotter;
use crate::error::{Error, ErrorKind, Result};
use crate::hypervisor::DomainStep;
use crate::name::Target;
use crate::registry::Registry;
use crate::service::images::{file_id, identity_at};
use crate::service::locator::Live;
use crate::shape::Plan;
use crate::step::Step;

/// The time for which a user is looked for again before it counts. A process that was just forked has files
/// of its parent open for a moment, and a look at an image takes no longer.
const PATIENCE: Duration = Duration::from_millis(120);

/// The same for block devices: programs that look at new devices, udev's among them, open them briefly.
const PATIENCE_WITH_DEVICES: Duration = Duration::from_secs(1);

/// The pause between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(40);

/// The greatest age of an answer where the kernel would be asked again: the steps between took no time then.
const FRESH: Duration = Duration::from_millis(20);

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

/// The files of a domain that no other process may use.
pub(in crate::service) struct Watched {
    files: HashMap<FileIdentity, (Target, Utf8PathBuf)>,
    /// Files that the plan writes while no other process writes them.
    in_place: HashSet<FileIdentity>,
    /// Files that the hypervisor must open again; true: for writing.
    reopened: HashMap<FileIdentity, bool>,
    /// Processes that do not count as others, and leaders of groups of such processes.
    own: HashSet<u32>,
    /// Files that the running domain has open.
    of_domain: HashSet<FileIdentity>,
    /// Set if the running domain has files open by an unknown process: other users cannot be distinguished
    /// from it.
    unknown_process: bool,
    /// The time of the kernel's last answer that no other process uses them.
    answered: Mutex<Option<Instant>>,
}

impl Watched {
    /// Fails if another process uses one of the files; otherwise returns a message on what could not be read.
    ///
    /// # Errors
    /// [`ErrorKind::Busy`], naming the file and its user.
    pub(in crate::service) async fn refuse_users(&self) -> Result<Option<String>> {
        self.refuse(true).await
    }

    /// Checks like [`Watched::refuse_users`]. With `mapped`, it also finds processes that only have a file
    /// mapped. Their lists are half of the cost.
    async fn refuse(&self, mapped: bool) -> Result<Option<String>> {
        let files: HashMap<FileIdentity, Utf8PathBuf> =
            self.files.iter().map(|(identity, (_, file))| (*identity, file.clone())).collect();
        let begun = Instant::now();
        loop {
            let (asked, own, of_domain) = (files.clone(), self.own.clone(), self.of_domain.clone());
            let looked =
                tokio::task::spawn_blocking(move || users_of(&asked, &own, &of_domain, mapped)).await;
            let users = looked.map_err(|cause| {
                Error::new(ErrorKind::Internal, "looking for users of the images ended early").because(cause)
            })?;
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
                return Ok(self.message(&users));
            };
            if begun.elapsed() < if is_device(user.file) { PATIENCE_WITH_DEVICES } else { PATIENCE } {
                tokio::time::sleep(BETWEEN_LOOKS).await;
                continue;
            }
            let Some((target, file)) = self.files.get(&user.file) else { return Ok(self.message(&users)) };
            return Err(user.error(&format!("disk {target}: {file}")));
        }
    }

    /// Returns the message on what could not be read.
    fn message(&self, users: &Users) -> Option<String> {
        let what = match (users.unreadable, users.hidden) {
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

    /// Returns true if the locks of a user would prevent the hypervisor from opening a file again.
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
            // A user that came since then still has the file open: mappings need not be read.
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
             the snapshot through its hypervisor ('domsnap domain scan' shows how) or shut it down",
        )
    }
}

/// A disk whose files are to be watched.
struct WatchedDisk<'a> {
    record: &'a DiskRecord,
    backend: Option<&'a AnyDiskSnapshotter>,
    /// The files that the running domain has open for it.
    open: HashSet<FileIdentity>,
    /// Set where the running domain's process is known.
    known: bool,
}

impl WatchedDisk<'_> {
    /// The identity of a file whose users can be distinguished from the running domain.
    fn identity(&self, file: &Utf8Path) -> Option<FileIdentity> {
        file_id(file).filter(|id| self.known || !self.open.contains(id))
    }

    /// Adds the disk's layers; with `reopened`, as files that the hypervisor must open again.
    fn add_layers(&self, watched: &mut Watched, reopened: bool) {
        let (record, disk) = (self.record, &self.record.disk);
        let layers = record.owned.iter().chain([&record.active]);
        let layers = layers.map(|layer| {
            let file = disk.path().with_file_name(layer.as_str());
            // Only the backend knows the place of a layer that does not lie beside the disk.
            match self.backend.filter(|_| !file.exists()) {
                Some(backend) => backend.layer_address(record, layer).path().to_owned(),
                None => file,
            }
        });
        for file in layers.chain([disk.path().to_owned()]) {
            let Some(identity) = self.identity(&file) else { continue };
            if reopened {
                *watched.reopened.entry(identity).or_default() |= file == disk.path();
            }
            watched.files.entry(identity).or_insert((disk.target.clone(), file));
        }
    }

    /// Adds the files that a step needs, and the file that it writes in place.
    fn add_step(&self, watched: &mut Watched, step: &Step) {
        let disk = &self.record.disk;
        let needs = self.backend.iter().flat_map(|backend| backend.needs_of(self.record, step));
        for StepNeed { file, alone } in needs {
            if let Some(identity) = self.identity(&file) {
                watched.in_place.extend(alone.then_some(identity));
                watched.files.entry(identity).or_insert((disk.target.clone(), file));
            }
        }
        let written = self.backend.map(|backend| backend.uses(self.record, step).writes);
        for file in written.into_iter().flatten() {
            watched.in_place.extend(file_id(&file).filter(|id| !self.open.contains(id)));
        }
    }
}

/// Finds other users of a domain's files: asks the kernel and the hypervisors.
#[derive(Clone)]
pub(in crate::service) struct Watcher {
    registry: Arc<Registry>,
}

impl Watcher {
    /// A watcher that knows the processes of these backends and hypervisors.
    pub(in crate::service) fn new(registry: Arc<Registry>) -> Self {
        Self { registry }
    }

    /// Returns the files of `domain` that no other process may use while `plan` is carried out. Without a
    /// plan, no reader matters.
    pub(in crate::service) async fn watched(
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
            // If the running domain's process is not known, its open files cannot be distinguished from those
            // of others.
            let by_the_kernel = || {
                disk.local()
                    .and_then(block_devices::device_number)
                    .is_some_and(|device| !block_devices::guests_of(device).is_empty())
            };
            watched.unknown_process |= !known && !open.is_empty() && !by_the_kernel();
            watched.of_domain.extend(&open);
            if record.disk.local().is_none() {
                // Only its backend, which locks it, can find other users.
                continue;
            }
            let backend = self.registry.serving(disk).ok();
            let disk = WatchedDisk { record, backend: backend.as_deref(), open, known };
            disk.add_layers(&mut watched, live.is_some() && detached.contains(&record.disk.target));
            for step in plan.iter().flat_map(|plan| plan.steps_of(&record.disk.target)) {
                disk.add_step(&mut watched, step);
            }
        }
        Ok(watched)
    }

    /// Refuses disks that another process uses without taking locks that would have excluded us.
    pub(in crate::service) async fn refuse_open_elsewhere(
        &self,
        domain: &Domain,
        live: Option<&Live>,
    ) -> Result<()> {
        let watched = self.watched(domain, live, None).await?;
        let files = watched.files.into_iter();
        let mut wanted: HashMap<DiskIdentity, (Target, DiskAddress)> =
            files.map(|(file, (target, path))| (DiskIdentity::Inode(file), (target, path.into()))).collect();
        for record in &domain.disks {
            if record.disk.local().is_none() {
                self.add_named(record, &mut wanted).await?;
            }
        }
        for record in &domain.disks {
            if let Some(attached) = live.and_then(|live| live.disk(&record.disk.target)) {
                let (open, mut others) = (attached.open_files().await?, HashMap::new());
                for (image, place) in wanted {
                    let is_open = match &image {
                        DiskIdentity::Inode(file) => open.contains(file),
                        DiskIdentity::Named(_) => attached.has_open(&image).await?,
                    };
                    if !is_open {
                        others.insert(image, place);
                    }
                }
                wanted = others;
            }
        }
        match self.open_without_lock(&wanted.keys().cloned().collect()).await? {
            Some((identity, open)) => {
                let Some((target, address)) = wanted.get(&identity) else { return Ok(()) };
                Err(open.error(&format!("disk {target}: {address}")))
            }
            None => Ok(()),
        }
    }

    /// Adds the layers of a disk that is no file of this machine.
    async fn add_named(
        &self,
        record: &DiskRecord,
        wanted: &mut HashMap<DiskIdentity, (Target, DiskAddress)>,
    ) -> Result<()> {
        let Ok(backend) = self.registry.serving(&record.disk) else { return Ok(()) };
        let layers = record.owned.iter().chain([&record.active]);
        let layers = layers.map(|layer| backend.layer_address(record, layer));
        for address in layers.chain([record.disk.address.clone()]) {
            if let Some(identity) = identity_at(&self.registry, &address).await? {
                wanted.entry(identity).or_insert((record.disk.target.clone(), address));
            }
        }
        Ok(())
    }

    pub(in crate::service) async fn require_closed(&self, image: &Utf8Path) -> Result<()> {
        let Some(identity) = file_id(image) else { return Ok(()) };
        let image_identity = DiskIdentity::Inode(identity);
        if let Some((_, open)) = self.open_without_lock(&HashSet::from([image_identity])).await? {
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

    /// The first of these images that a running domain has open without a lock, and where.
    async fn open_without_lock(
        &self,
        images: &HashSet<DiskIdentity>,
    ) -> Result<Option<(DiskIdentity, OpenElsewhere)>> {
        for saver in self.registry.hypervisors() {
            let mut found = saver.open_without_lock(images).await?.into_iter();
            if let Some((identity, user)) = found.next() {
                return Ok(Some((identity, OpenElsewhere { user, hypervisor: saver.profile().name })));
            }
        }
        Ok(None)
    }
}

/// The disks that a plan detaches from a running domain for a while.
fn detached_by(plan: &Plan) -> Vec<Target> {
    plan.domain_steps()
        .filter_map(|step| match step {
            DomainStep::Detach { disks, .. } => Some(disks.clone()),
            _ => None,
        })
        .flatten()
        .collect()
}
