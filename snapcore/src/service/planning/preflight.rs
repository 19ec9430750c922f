//! Tests before an operation begins for everything that is known to fail, in one place: a refusal here leaves
//! nothing to undo.
//!
//! For each disk:
//!
//! - the names that the steps make fit the file system;
//! - the directory accepts new names, and lets names be removed (immutable, append-only, sticky);
//! - images that are written can be opened for writing;
//! - images that are linked or removed have no flag that forbids it, and are no mount points;
//! - manifests of deleted snapshots can be removed.
//!
//! Then each directory that the plan works in is tested for what only a try can show ([`super::probe`]), and
//! its free space is checked. Backends check their formats when they plan; a running domain checks what its
//! hypervisor can do.
//!
//! A dry run does the same, so that it is refused as the operation would be. It leaves nothing, like the
//! operation's own preflight.

use std::collections::{BTreeMap, HashSet};
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Access, AtFlags, CWD, OFlags, StatxFlags, statvfs, statx};

use super::Planning;
use super::probe::{MAKE_ROOM, Needs, Probe, no_room};
use crate::address::is_among_devices;
use crate::backend::{AdviceOn, FileUses};
use crate::domain::{DiskRecord, Domain};
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::Item;
use crate::service::BoxFuture;
use crate::service::authority::Manifests;
use crate::service::images::file_id;
use crate::service::locator::Live;
use crate::shape::Plan;
use crate::shell::shell_word;
use crate::size::{free_of, is_root};
use crate::step::Edit;

/// The most bytes that are added to a name to make another: a dot, and the mark of a name that is moved.
const LONGEST_MARK: usize = ".".len() + ".domsnap-switch".len();

/// The longest path that the system accepts, with its terminating byte.
const PATH_MAX: usize = 4096;

/// The least space that a small file needs.
const BLOCK: u64 = 4096;

/// The most bytes that are allocated for a moment, to check that there is space for them.
const MOST_TRIED: u64 = 16 << 20;

/// `STATX_ATTR_IMMUTABLE` and `STATX_ATTR_APPEND`.
const FLAGS: [(u64, &str, char); 2] = [(0x10, "immutable", 'i'), (0x20, "append-only", 'a')];

/// `STATX_ATTR_MOUNT_ROOT`.
const MOUNT_ROOT: u64 = 0x2000;

impl Planning {
    /// Refuses a plan if one of its steps is known to fail. The domain is locked, unless this is a `dry` run.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], [`ErrorKind::Unsupported`] or [`ErrorKind::NoSpace`], with the obstacle.
    /// Nothing was changed.
    pub(in crate::service) fn preflight<'a>(
        &'a self,
        domain: &'a Domain,
        manifests: &'a Manifests,
        live: Option<&'a Live>,
        plan: &'a Plan,
        dry: bool,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            let mut works = Works::default();
            for record in &domain.disks {
                let mut open = HashSet::new();
                if let Some(attached) = live.and_then(|live| live.disk(&record.disk.target)) {
                    open = attached.open_files().await?;
                }
                let backend = self.registry.serving(&record.disk)?;
                let mut uses = FileUses::default();
                for step in plan.steps_of(&record.disk.target) {
                    let of_step = backend.uses(record, step);
                    // The copies of all disks of all clones together.
                    if plan.operation == "clone" {
                        works.add_copy(&of_step, step.bytes);
                    }
                    uses.extend(of_step);
                    uses.room = uses.room.saturating_add(backend.room(record, step));
                }
                let without_files = || backend.advice(record, AdviceOn::NewFiles);
                names_fit(record, &uses, &without_files)?;
                for file in &uses.writes {
                    if file_id(file).is_some_and(|id| !open.contains(&id)) {
                        is_writable(record, file)?;
                    }
                }
                for file in &uses.renames {
                    can_be_renamed(record, file)?;
                }
                for file in uses.renames.iter().chain(&uses.links) {
                    can_get_names(record, file, &without_files)?;
                }
                for directory in uses.makes.iter().chain(&uses.renames).filter_map(|file| file.parent()) {
                    if let Some((name, letter)) = flag_of(directory) {
                        return Err(flagged(record.disk.target.as_str(), directory, name, letter));
                    }
                }
                works.add(record, &uses);
            }
            manifests_can_go(manifests, plan)?;
            self.refuse_unread_memory(plan, domain).await?;
            let memory = self.memory_made_by(plan, domain)?;
            if let Some(memory) = &memory {
                memory.preflight().await?;
            }
            works.memory = memory.and_then(|memory| memory.directory().map(Utf8Path::to_owned));
            works.manifests = manifests.directory().map(Utf8Path::to_owned);
            let (room, plan, records) = (manifests_room(domain, plan), plan.clone(), domain.disks.clone());
            tokio::task::spawn_blocking(move || works.check(&plan, &records, room, dry)).await.map_err(
                |cause| {
                    Error::new(ErrorKind::Internal, "trying what an operation needs broke off").because(cause)
                },
            )?
        })
    }
}

/// Checks that manifests of deleted snapshots can be removed: after the plan's commit point nothing may be
/// destroyed before they are.
fn manifests_can_go(manifests: &Manifests, plan: &Plan) -> Result<()> {
    let Some(directory) = manifests.directory() else { return Ok(()) };
    let doomed: Vec<Utf8PathBuf> = (plan.commit.iter())
        .filter_map(|edit| match edit {
            Edit::RemoveSnapshot { id } if manifests.has(*id) => {
                Some(Utf8PathBuf::from(manifests.shown(Item::Snapshot(*id))))
            }
            _ => None,
        })
        .collect();
    if doomed.is_empty() || manifests.have_no_place() {
        return Ok(());
    }
    let refused = |file: &Utf8Path, why: String| {
        Error::new(ErrorKind::Refused, format!("the manifest {file} would be removed, and {why}"))
            .state("no changes made")
    };
    for file in std::iter::once(directory).chain(doomed.iter().map(Utf8PathBuf::as_path)) {
        if let Some((name, letter)) = flag_of(file) {
            return Err(refused(&doomed[0], format!("{file} is {name}")).advise(take_off(letter, file)));
        }
    }
    let (write, first) = (Access::WRITE_OK | Access::EXEC_OK, &doomed[0]);
    rustix::fs::access(directory.as_std_path(), write).map_err(|errno| {
        refused(first, "its directory cannot be written".to_owned())
            .because(std::io::Error::from(errno))
            .advise(format!("run as a user who may write in {directory}, or move {directory} away"))
    })
}

/// The directories in which an operation works, and its needs there.
#[derive(Default)]
struct Works {
    /// Directories of images: the kind of changes there, the bytes that are needed, and the number of files
    /// that are made.
    images: BTreeMap<Utf8PathBuf, (Needs, u64, u64)>,
    memory: Option<Utf8PathBuf>,
    manifests: Option<Utf8PathBuf>,
}

impl Works {
    fn add(&mut self, record: &DiskRecord, uses: &FileUses) {
        // Nothing is made beside a device, except files that the step itself names.
        let own =
            record.disk.local().and_then(Utf8Path::parent).filter(|directory| !is_among_devices(directory));
        for file in uses.makes.iter().chain(&uses.renames) {
            let Some(directory) = file.parent().filter(|directory| !is_among_devices(directory)) else {
                continue;
            };
            let (needs, _, files) = self.images.entry(directory.to_owned()).or_default();
            *files += u64::from(uses.makes.contains(file));
            *needs = (*needs).max(if uses.links.is_empty() { Needs::Names } else { Needs::Links });
        }
        if let Some((_, bytes, _)) = own.and_then(|own| self.images.get_mut(own)) {
            *bytes = bytes.saturating_add(uses.room);
        }
    }

    /// Adds the room of a file that a step makes in a directory of its own, which does not exist yet.
    fn add_copy(&mut self, uses: &FileUses, bytes: u64) {
        if let Some(above) = uses.makes.first().and_then(|made| made.parent()).filter(|_| bytes > 0) {
            let (_, all, _) = self.images.entry(above.to_owned()).or_default();
            *all = all.saturating_add(bytes);
        }
    }

    /// Tests the directories, and checks their free space.
    fn check(self, plan: &Plan, records: &[DiskRecord], manifests_room: u64, dry: bool) -> Result<()> {
        // Remains of a crash are removed, also where nothing is to be done.
        if !dry {
            let beside = records.iter().filter_map(|record| record.disk.local().and_then(Utf8Path::parent));
            let others = [&self.memory, &self.manifests].into_iter().flatten().map(|path| &**path);
            let all = beside.chain(self.images.keys().map(|path| &**path)).chain(others);
            for directory in all.filter(|directory| !is_among_devices(directory)) {
                Probe::of(directory, records, false).sweep();
            }
        }
        if !plan.has_steps() && plan.commit.is_empty() {
            return Ok(());
        }
        // An operation that frees space needs none.
        let gives_room = plan.operation == "delete" || plan.operation == "tidy";
        let mut places: Vec<(Utf8PathBuf, Option<Needs>, u64, u64)> = Vec::new();
        for (directory, (needs, bytes, files)) in self.images {
            places.push((directory, Some(needs), bytes, files));
        }
        if let Some(directory) = self.memory {
            places.push((nearest(&directory), Some(Needs::Names), BLOCK, 1));
        }
        // Manifests may lag: if none can be made, the operation reports it at its end. So only their space is
        // checked.
        if let Some(directory) = self.manifests {
            places.push((nearest(&directory), None, manifests_room, 2));
        }
        // The sum of all needs in one file system, which is tested once.
        let mut room: BTreeMap<u64, (u64, u64)> = BTreeMap::new();
        if !gives_room {
            for (directory, _, bytes, files) in &places {
                let Ok(about) = std::fs::metadata(directory) else { continue };
                let (all_bytes, all_files) = room.entry(about.dev()).or_default();
                *all_bytes = all_bytes.saturating_add(*bytes);
                *all_files = all_files.saturating_add(*files);
            }
        }
        for (directory, needs, ..) in places {
            let of_system = std::fs::metadata(&directory).ok().and_then(|about| room.remove(&about.dev()));
            let (bytes, files) = of_system.unwrap_or_default();
            has_room(&directory, bytes, files)?;
            let Some(needs) = needs else { continue };
            if let Some((name, letter)) = flag_of(&directory) {
                return Err(flagged("what is made", &directory, name, letter));
            }
            match Probe::of(&directory, records, dry).run(needs, bytes.min(MOST_TRIED)) {
                Err(error) if gives_room && error.kind() == ErrorKind::NoSpace => {}
                tried => tried?,
            }
        }
        Ok(())
    }
}

fn take_off(letter: char, file: &Utf8Path) -> String {
    format!("take the flag off: `chattr -{letter} {}`", shell_word(file.as_str()))
}

/// The directory itself, or the nearest one above it that exists: it will be made.
fn nearest(directory: &Utf8Path) -> Utf8PathBuf {
    let there = |above: &&Utf8Path| above.symlink_metadata().is_ok();
    directory.ancestors().find(there).unwrap_or(Utf8Path::new("/")).to_owned()
}

/// The space for the manifests that are written at the end: those of new snapshots, and the domain's beside
/// its previous one.
fn manifests_room(domain: &Domain, plan: &Plan) -> u64 {
    let length = |text: serde_json::Result<String>| text.map_or(0, |text| text.len() as u64);
    let mut room = length(serde_json::to_string(domain)).next_multiple_of(BLOCK);
    for edit in &plan.commit {
        room += match edit {
            Edit::AddSnapshot { .. } => length(serde_json::to_string(edit)).next_multiple_of(BLOCK),
            Edit::AddMachine { .. } => length(serde_json::to_string(edit)),
            _ => 0,
        };
    }
    room.next_multiple_of(BLOCK)
}

/// Refuses if a file system reports less space than the least that is needed.
fn has_room(directory: &Utf8Path, bytes: u64, files: u64) -> Result<()> {
    let Ok(about) = statvfs(directory.as_std_path()) else { return Ok(()) };
    let inodes = if is_root() { about.f_ffree } else { about.f_favail };
    // A file system without a table of files reports 0 of them, which does not mean that all are used.
    if about.f_files > 0 && inodes < files {
        let message =
            format!("the file system of {directory} takes {inodes} more files, and this makes {files}");
        return Err(Error::new(ErrorKind::NoSpace, message).state("no changes made").advise(MAKE_ROOM));
    }
    match free_of(&about).filter(|free| *free < bytes) {
        Some(free) => Err(no_room(directory, bytes, Some(free))),
        None => Ok(()),
    }
}

fn names_fit(record: &DiskRecord, uses: &FileUses, without_files: &dyn Fn() -> Option<String>) -> Result<()> {
    for file in &uses.makes {
        let (Some(directory), Some(made)) = (file.parent(), file.file_name()) else { continue };
        // An error of a directory that cannot be examined is reported by the step that works in it.
        let most = statvfs(directory.as_std_path()).map_or(255, |about| about.f_namemax);
        let name = made.len() + LONGEST_MARK;
        let path = directory.as_str().len() + 1 + name + 1;
        if name as u64 <= most && path <= PATH_MAX {
            continue;
        }
        let (length, limit) =
            if name as u64 > most { (name as u64, most) } else { (path as u64, PATH_MAX as u64) };
        return Err(Error::new(
            ErrorKind::Refused,
            format!(
                "{}: the name {made} is too long: with the marks of unfinished files it would have {length} bytes, and the \
                 file system takes {limit}",
                record.disk.target
            ),
        )
        .state("no changes made")
        .advise(either("give the image a shorter name", without_files())));
    }
    Ok(())
}

/// Joins advice that is good for every format and the backend's own.
fn either(advice: &str, of_backend: Option<String>) -> String {
    of_backend.map_or(advice.to_owned(), |other| format!("{advice}, or {other}"))
}

fn is_writable(record: &DiskRecord, file: &Utf8Path) -> Result<()> {
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    match OpenOptions::new().read(true).write(true).custom_flags(flags).open(file) {
        Ok(_) => Ok(()),
        Err(cause) => {
            let advice = match flag_of(file) {
                Some((_, letter)) => {
                    format!(
                        "it has the flag {letter}: `chattr -{letter} {}` takes it off",
                        shell_word(file.as_str())
                    )
                }
                None => "make the image writable for this user, or run as one who may write it".to_owned(),
            };
            Err(Error::new(
                ErrorKind::Refused,
                format!("{}: {file} would be changed, and cannot be opened for writing", record.disk.target),
            )
            .because(cause)
            .state("no changes made")
            .advise(advice))
        }
    }
}

/// Checks that no flag prevents the file from getting or losing a name, and that it is no mount point.
fn can_get_names(
    record: &DiskRecord,
    file: &Utf8Path,
    without_files: &dyn Fn() -> Option<String>,
) -> Result<()> {
    if let Some((name, letter)) = flag_of(file) {
        return Err(flagged(record.disk.target.as_str(), file, name, letter));
    }
    if attributes_of(file) & MOUNT_ROOT != 0 {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("{}: {file} is a mount point, whose name cannot be moved", record.disk.target),
        )
        .state("no changes made")
        .advise(either("mount the directory that it is in instead of the one file", without_files())));
    }
    Ok(())
}

/// Checks that no sticky directory prevents the file from losing its name.
fn can_be_renamed(record: &DiskRecord, file: &Utf8Path) -> Result<()> {
    let us = rustix::process::geteuid().as_raw();
    let (Some(directory), Ok(about)) = (file.parent(), file.symlink_metadata()) else { return Ok(()) };
    let Ok(above) = directory.metadata() else { return Ok(()) };
    if us == 0 || above.mode() & 0o1000 == 0 || above.uid() == us || about.uid() == us {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "{}: {file} belongs to another user, and its directory is sticky: only that user can rename or remove it",
            record.disk.target
        ),
    )
    .state("no changes made")
    .advise(format!("run as the owner of {file}, or move the image to a directory of its own")))
}

fn flagged(what: &str, file: &Utf8Path, name: &str, letter: char) -> Error {
    Error::new(ErrorKind::Refused, format!("{what}: {file} is {name}"))
        .state("no changes made")
        .advise(take_off(letter, file))
}

/// The flag of a file that prevents it from being written, linked, renamed and removed.
fn flag_of(file: &Utf8Path) -> Option<(&'static str, char)> {
    let attributes = attributes_of(file);
    FLAGS.iter().find(|(bit, ..)| attributes & bit != 0).map(|(_, name, letter)| (*name, *letter))
}

/// The attributes of a file, of the link itself if it is one; none where they cannot be read.
fn attributes_of(file: &Utf8Path) -> u64 {
    let flags = AtFlags::STATX_DONT_SYNC;
    statx(CWD, file.as_std_path(), flags, StatxFlags::TYPE).map_or(0, |about| about.stx_attributes.bits())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Disk;
    use crate::name::{LayerName, Target};

    /// A name that does not fit is refused. Only a backend that has another method is quoted with one.
    #[test]
    fn long_name_is_refused_with_backends_advice() {
        let directory = tempfile::tempdir().unwrap();
        let path = Utf8Path::from_path(directory.path()).unwrap().join("x".repeat(250));
        let disk = Disk::new(Target::new("vda").unwrap(), &path, "fake");
        let record = DiskRecord::new(disk, LayerName("x".to_owned()));
        let uses = FileUses { makes: vec![path], ..FileUses::default() };
        for (of_backend, advice) in [
            (None, "give the image a shorter name"),
            (Some("take it inside"), "give the image a shorter name, or take it inside"),
        ] {
            let error = names_fit(&record, &uses, &|| of_backend.map(str::to_owned)).unwrap_err();
            assert_eq!((error.kind(), error.advice()), (ErrorKind::Refused, Some(advice)), "{error}");
        }
    }
}
