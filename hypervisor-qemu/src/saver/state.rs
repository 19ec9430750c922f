//! Files of a machine's state beside its disks: firmware variables, a TPM.
//!
//! Nothing is done to them in QEMU. They are found, so that snapshots have copies of them, which are made
//! while the guest is paused: QEMU has written all of the flash to its file then, and swtpm each change of
//! its state.
//!
//! No query names the directory of a TPM. It is known by the process that serves the socket of the TPM's
//! character device, and by the lock file that this process has open in the directory: the kernel reports
//! both. What the process says of itself, its command line, is not asked.

use std::{
    collections::HashSet,
    fs,
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
};

use async_trait::async_trait;
use camino::{Utf8Path, Utf8PathBuf};
use serde_json::Value;
use snapcore::backend::Progress;
use snapcore::hypervisor::{AttachedDisk, AttachedMerge, FIRMWARE_VARIABLES, Inside, TPM_STATE};
use snapcore::{DiskIdentity, DiskRecord, Error, ErrorKind, FileIdentity, Result, Target, file_identity};
use tokio_util::sync::CancellationToken;

use super::disk::{FileView, QemuChain, identity, target_name};
use crate::{
    discover::{BlockDevice, Discovery, Role},
    graph::Graph,
    machine::Machine,
};

/// The files in which swtpm has the permanent state of a TPM 2.0, and of a TPM 1.2.
const TPM_FILES: [&str; 2] = ["tpm2-00.permall", "tpm-00.permall"];

/// swtpm's lock file, beside them.
const TPM_LOCK: &str = ".lock";

/// A file of a running machine's state.
#[derive(Debug, Clone)]
pub(super) struct StateFile {
    /// The disk of the domain that it is; before that is known, QEMU's name of the device.
    pub(super) target: Target,
    pub(super) path: Utf8PathBuf,
    /// [`FIRMWARE_VARIABLES`] or [`TPM_STATE`].
    pub(super) format: &'static str,
    /// The file that QEMU has open. A TPM replaces its file at each change.
    pub(super) file: Option<FileIdentity>,
}

impl StateFile {
    /// Finds those of a machine that are files of their own. Changes nothing.
    pub(super) async fn find(
        machine: &Machine,
        discovery: &Discovery,
        view: &FileView,
        graph: &Graph,
    ) -> crate::Result<Vec<Self>> {
        let mut found: Vec<Self> =
            discovery.drives.iter().filter_map(|drive| flash(drive, view, graph)).collect();
        if !discovery.tpms.is_empty() {
            let tpms = machine.query("query-tpm", Value::Null).await?;
            let chardevs = machine.query("query-chardev", Value::Null).await?;
            for tpm in tpms.as_array().into_iter().flatten() {
                found.extend(emulated_tpm(tpm, &chardevs, view));
            }
        }
        Ok(found)
    }

    /// The one that a disk of the domain is.
    pub(super) fn of<'a>(record: &DiskRecord, found: &'a [Self]) -> Option<&'a Self> {
        let disk = &record.disk;
        let is_it = |state: &&Self| {
            let same = || identity(disk.path().as_std_path()).is_some_and(|file| state.file == Some(file));
            state.format == disk.format && (state.path == disk.path() || same())
        };
        found.iter().find(is_it)
    }

    /// Returns true if a disk of this format is one.
    pub(super) fn is_format(format: &str) -> bool {
        [FIRMWARE_VARIABLES, TPM_STATE].contains(&format)
    }
}

/// The file of firmware variables: of a flash that the guest can write, all of one file, without a format.
pub(super) fn flash(drive: &BlockDevice, view: &FileView, graph: &Graph) -> Option<StateFile> {
    if drive.role != Role::Firmware || drive.read_only {
        return None;
    }
    let open = QemuChain::read(graph, view, drive.root()?);
    let [layer] = &open.layers[..] else { return None };
    let is_whole = matches!(layer.node.driver.as_str(), "raw" | "file") && layer.node.slice().is_none();
    let as_it_is = open.placeholder.is_none() && open.filter.is_none() && open.inner_filter.is_none();
    let file = layer.identity.filter(|_| is_whole && as_it_is)?;
    // The name may lead to another file by now.
    if view.open_images().is_some_and(|images| !images.contains_key(&file)) {
        return None;
    }
    let path = Utf8PathBuf::from_path_buf(layer.file.clone()?).ok()?;
    // In a mount namespace of its own the name is another file's here.
    if identity(path.as_std_path()) != Some(file) {
        return None;
    }
    let target = Target::new(target_name(&drive.target)).ok()?;
    Some(StateFile { target, path, format: FIRMWARE_VARIABLES, file: Some(file) })
}

/// The state of a TPM that swtpm emulates.
fn emulated_tpm(tpm: &Value, chardevs: &Value, view: &FileView) -> Option<StateFile> {
    if tpm["options"]["type"] != "emulator" {
        return None;
    }
    let label = tpm["options"]["data"]["chardev"].as_str()?;
    let chardev = chardevs.as_array()?.iter().find(|chardev| chardev["label"] == label)?;
    let socket = chardev["filename"].as_str()?;
    let socket = socket.strip_prefix("disconnected:").unwrap_or(socket).strip_prefix("unix:")?;
    let socket = view.absolute(socket);
    let mut servers = processes().filter(|process| serves(process, &socket));
    let (server, None) = (servers.next()?, servers.next()) else { return None };
    let path = Utf8PathBuf::from_path_buf(state_of(&server)?).ok()?;
    let target = Target::new(target_name(tpm["id"].as_str()?)).ok()?;
    Some(StateFile { target, path, format: TPM_STATE, file: None })
}

/// The processes of swtpm: `/proc/PID`.
fn processes() -> impl Iterator<Item = PathBuf> {
    let all = fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path());
    all.filter(|process| fs::read(process.join("comm")).is_ok_and(|name| name.starts_with(b"swtpm")))
}

/// The files that a process has open, as the kernel names them.
fn open_by(process: &Path) -> Vec<(PathBuf, PathBuf)> {
    let open = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
    open.filter_map(|entry| Some((entry.path(), fs::read_link(entry.path()).ok()?))).collect()
}

/// Returns true if a process has a Unix socket open, or a connection to it, that was bound to this path.
fn serves(process: &Path, socket: &Path) -> bool {
    let Ok(directory) = fs::read_link(process.join("cwd")) else { return false };
    let table = fs::read(process.join("net/unix")).unwrap_or_default();
    let bound: HashSet<String> = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| {
            let line = std::str::from_utf8(line).ok()?;
            let mut rest = line;
            let mut inode = "";
            // Number, references, protocol, flags, type, state, inode, and then the path.
            for _ in 0..7 {
                rest = rest.trim_start();
                let end = rest.find(' ')?;
                (inode, rest) = rest.split_at(end);
            }
            let path = rest.strip_prefix(' ')?;
            (directory.join(path) == socket).then(|| format!("socket:[{inode}]"))
        })
        .collect();
    !bound.is_empty()
        && open_by(process).iter().any(|(_, name)| name.to_str().is_some_and(|name| bound.contains(name)))
}

/// The state's file, in the directory whose lock file a swtpm has open.
fn state_of(process: &Path) -> Option<PathBuf> {
    let locks = open_by(process);
    let is_lock = |name: &Path| name.file_name().is_some_and(|name| name.as_bytes() == TPM_LOCK.as_bytes());
    let (descriptor, lock) = locks.into_iter().find(|(_, name)| is_lock(name))?;
    // In a mount namespace of its own the name is another file's here.
    let its = fs::metadata(descriptor).ok().map(|about| file_identity(&about));
    if its.is_none() || its != fs::symlink_metadata(&lock).ok().map(|about| file_identity(&about)) {
        return None;
    }
    let owner = fs::metadata(process).ok()?.uid();
    let mut files = TPM_FILES.iter().map(|name| lock.with_file_name(name)).filter(|file| {
        // It was made by this process, or by the user who gave it to its user.
        fs::symlink_metadata(file).is_ok_and(|about| about.is_file() && about.uid() == owner)
    });
    match (files.next(), files.next()) {
        (Some(file), None) => Some(file),
        // Of two TPMs it is not known which one runs.
        _ => None,
    }
}

#[async_trait]
impl AttachedDisk for StateFile {
    /// Known since the connection was made, so that it is known after the end of the machine too.
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        Ok(self.file.or_else(|| identity(self.path.as_std_path())).into_iter().collect())
    }

    async fn has_open(&self, image: &DiskIdentity) -> Result<bool> {
        match (image, self.file) {
            (DiskIdentity::Inode(file), Some(open)) => Ok(*file == open),
            // The TPM's own path was compared with the disk's.
            (DiskIdentity::Inode(_), None) => Ok(true),
            _ => Ok(false),
        }
    }

    async fn merge(
        &self,
        _merge: &AttachedMerge,
        _inside: &dyn Inside,
        _progress: &dyn Progress,
        _cancel: &CancellationToken,
    ) -> Result<()> {
        Err(no_chain(&self.path))
    }

    async fn drop_internal(&self, _tags: &[String]) -> Result<()> {
        Err(no_chain(&self.path))
    }
}

fn no_chain(path: &Utf8Path) -> Error {
    Error::new(ErrorKind::Internal, format!("{path} is state of the machine, and no chain of images"))
}
