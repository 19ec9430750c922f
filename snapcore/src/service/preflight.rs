//! What is known to fail is tried before an operation begins, in one place: a refusal here leaves nothing to undo.
//!
//! For each disk: the names that the steps make fit the file system; the directory takes new names, and gives up those that are
//! removed (immutable, append-only, sticky); images that are written can be opened for writing; images that are linked or removed
//! carry no flag that forbids it; manifests of what is deleted can be removed. Backends check their formats when they plan; a running domain checks what its hypervisor can do.

use std::collections::HashSet;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;

use camino::{Utf8Path, Utf8PathBuf};
use rustix::fs::{Access, AtFlags, CWD, OFlags, StatxFlags, statvfs, statx};

use super::Inner;
use super::identity::file_id;
use super::live::Live;
use crate::chain::{ChainStep, layer_path};
use crate::{DiskRecord, Domain, Edit, Error, ErrorKind, Plan, Result, shell_word};

/// The most that a name gets which is made of another: a dot, and the mark of a name that is moved.
const LONGEST_MARK: usize = ".".len() + ".domsnap-switch".len();

/// The longest path that the system takes, with its end.
const PATH_MAX: usize = 4096;

/// `STATX_ATTR_IMMUTABLE` and `STATX_ATTR_APPEND`.
const FLAGS: [(u64, &str, char); 2] = [(0x10, "immutable", 'i'), (0x20, "append-only", 'a')];

/// What the steps of a plan do with a disk's files.
#[derive(Default)]
struct Uses {
    /// Names of files that are made.
    makes: Vec<String>,
    /// Files that are written in place.
    writes: Vec<Utf8PathBuf>,
    /// Files that get another name, or lose one.
    renames: Vec<Utf8PathBuf>,
}

impl Inner {
    /// Refuses a plan of which a step is known to fail.
    ///
    /// # Errors
    /// [`ErrorKind::Refused`], with what is in the way. Nothing was changed.
    pub(super) async fn preflight(&self, domain: &Domain, live: Option<&Live>, plan: &Plan) -> Result<()> {
        for record in &domain.disks {
            let mut open = HashSet::new();
            if let Some(attached) = live.and_then(|live| live.disk(&record.disk.target)) {
                open = attached.open_files().await?;
            }
            let uses = uses_of(record, plan);
            names_fit(record, &uses)?;
            for file in &uses.writes {
                if file_id(file).is_some_and(|id| !open.contains(&id)) {
                    is_writable(record, file)?;
                }
            }
            for file in &uses.renames {
                can_be_renamed(record, file)?;
            }
            if !uses.makes.is_empty() || !uses.renames.is_empty() {
                let directory = record.disk.path.parent().unwrap_or(Utf8Path::new("/"));
                if let Some((name, letter)) = flag_of(directory) {
                    return Err(flagged(record, directory, name, letter));
                }
            }
        }
        self.manifests_can_go(domain, plan)
    }

    /// Manifests of what a plan deletes can be removed: after its commit point nothing may be destroyed before they are.
    fn manifests_can_go(&self, domain: &Domain, plan: &Plan) -> Result<()> {
        let manifests = self.manifests_of(domain)?;
        let directory = manifests.directory();
        let doomed: Vec<Utf8PathBuf> = (plan.commit.iter())
            .filter_map(|edit| match edit {
                Edit::RemoveSnapshot { id } => Some(manifests.file_of(*id)),
                _ => None,
            })
            .filter(|file| file.symlink_metadata().is_ok())
            .collect();
        if doomed.is_empty() || manifests.have_no_place() {
            return Ok(());
        }
        let refused = |file: &Utf8Path, why: String| {
            Error::new(ErrorKind::Refused, format!("the manifest {file} would be removed, and {why}"))
                .state("nothing was touched")
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
}

fn take_off(letter: char, file: &Utf8Path) -> String {
    format!("take the flag off: `chattr -{letter} {}`", shell_word(file.as_str()))
}

fn uses_of(record: &DiskRecord, plan: &Plan) -> Uses {
    let path = &record.disk.path;
    let file = |layer: &crate::LayerName| {
        let own = layer_path(path, layer);
        if own.exists() || *layer != record.active { own } else { path.clone() }
    };
    let mut uses = Uses::default();
    for planned in plan.steps.iter().filter(|planned| planned.step.target == record.disk.target) {
        let Ok(step) = serde_json::from_value::<ChainStep>(planned.step.action.clone()) else {
            // A step of a format's own that makes a file says so by its name.
            let made = planned.step.action.get("layer").and_then(|layer| layer.as_str());
            uses.makes.extend(made.filter(|name| !name.contains('/')).map(str::to_owned));
            continue;
        };
        match step {
            ChainStep::NameLayer { layer } => {
                uses.makes.push(layer.0.clone());
                uses.renames.push(file(&layer));
            }
            ChainStep::CreateOverlay { layer, .. } | ChainStep::Materialise { layer, .. } => {
                uses.makes.push(layer.0);
            }
            ChainStep::SwitchActive { .. } => {
                uses.makes.extend(path.file_name().map(str::to_owned));
                uses.renames.push(path.clone());
            }
            ChainStep::TakeInternal { layer, .. }
            | ChainStep::ApplyInternal { layer, .. }
            | ChainStep::DropInternal { layer, .. }
            | ChainStep::ForgetInternal { layer, .. } => uses.writes.push(file(&layer)),
            ChainStep::Merge { into, .. } => uses.writes.push(file(&into)),
            ChainStep::Repoint { child, .. } => uses.writes.push(file(&child)),
            ChainStep::Remove { layers } => uses.renames.extend(layers.iter().map(file)),
            ChainStep::Unname { layer } => uses.renames.push(file(&layer)),
        }
    }
    uses
}

fn names_fit(record: &DiskRecord, uses: &Uses) -> Result<()> {
    let directory = record.disk.path.parent().unwrap_or(Utf8Path::new("/"));
    let Some(longest) = uses.makes.iter().max_by_key(|name| name.len()) else { return Ok(()) };
    // A directory that cannot be asked is found out by whoever works in it.
    let most = statvfs(directory.as_std_path()).map_or(255, |about| about.f_namemax);
    let name = longest.len() + LONGEST_MARK;
    let path = directory.as_str().len() + 1 + name + 1;
    if name as u64 <= most && path <= PATH_MAX {
        return Ok(());
    }
    let (length, limit) =
        if name as u64 > most { (name as u64, most) } else { (path as u64, PATH_MAX as u64) };
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "{}: the name {longest} is too long: with the marks of unfinished files it would have {length} bytes, and the \
             file system takes {limit}",
            record.disk.target
        ),
    )
    .state("nothing was touched")
    .advise("give the image a shorter name, or take the snapshot with --internal, which makes no files"))
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
            .state("nothing was touched")
            .advise(advice))
        }
    }
}

/// No flag and no sticky directory keeps the file from getting or losing a name.
fn can_be_renamed(record: &DiskRecord, file: &Utf8Path) -> Result<()> {
    use std::os::unix::fs::MetadataExt;
    if let Some((name, letter)) = flag_of(file) {
        return Err(flagged(record, file, name, letter));
    }
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
    .state("nothing was touched")
    .advise(format!("run as the owner of {file}, or move the image to a directory of its own")))
}

fn flagged(record: &DiskRecord, file: &Utf8Path, name: &str, letter: char) -> Error {
    Error::new(ErrorKind::Refused, format!("{}: {file} is {name}", record.disk.target))
        .state("nothing was touched")
        .advise(take_off(letter, file))
}

/// The flag of a file that keeps it from being written, linked, renamed and removed.
fn flag_of(file: &Utf8Path) -> Option<(&'static str, char)> {
    let about = statx(CWD, file.as_std_path(), AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let attributes: u64 = about.stx_attributes.bits();
    FLAGS.iter().find(|(bit, ..)| attributes & bit != 0).map(|(_, name, letter)| (*name, *letter))
}
