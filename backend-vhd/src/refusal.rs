//! Plans that are refused before anything is begun, since a step of them would fail.

use std::collections::HashSet;

use camino::{Utf8Path, Utf8PathBuf};
use image_files::chain::ChainStep;
use image_files::names::file_id;
use image_files::{FileIds, size_at};
use snapcore::backend::{DiskPlan, DiskState};
use snapcore::{DiskRecord, Error, ErrorKind, LayerName, Result};

use crate::image::{Context, DiskType, MAX_SIZE, OpenOptions, SECTOR, Vhd};
use crate::layers::{file_of, reading};
use crate::steps::parent_name;

/// Refuses a plan with steps that would fail.
///
/// # Errors
/// [`ErrorKind::Unsupported`], [`ErrorKind::Refused`] or [`ErrorKind::Corrupt`], with advice.
pub(crate) fn check(record: &DiskRecord, state: &DiskState, plan: &mut DiskPlan<ChainStep>) -> Result<()> {
    let mut notes = Vec::new();
    let mut sound = HashSet::new();
    // What another program made may be wrong anywhere in the chain. Layers of our own were checked when they
    // were frozen.
    for layer in state.layers.iter().filter(|layer| !layer.owned && layer.format == "vhd") {
        require_sound(&mut sound, layer.path())?;
    }
    for step in plan.steps() {
        match &step.action {
            ChainStep::CreateOverlay { layer, on, on_format, .. } => {
                require_parent(record, on, on_format == "raw")?;
                let file = file_of(record, on)?;
                // An earlier step of the plan may give it its name.
                let file = if file.exists() { file } else { record.disk.path().to_owned() };
                if on_format == "vhd" {
                    require_sound(&mut sound, &file)?;
                }
                if !layer.as_str().is_ascii() || !on.as_str().is_ascii() {
                    notes.push(format!(
                        "{}: the name of {on} or {layer} is not ASCII: vhd-util of XenServer cannot open the chain",
                        record.disk.target
                    ));
                }
            }
            ChainStep::Merge { run, into, below } => {
                for layer in run {
                    require_sound(&mut sound, &file_of(record, layer)?)?;
                }
                require_writable(&file_of(record, into)?)?;
                if let Some(below) = below {
                    let is_raw = state.layer(below).is_some_and(|layer| layer.format == "raw");
                    require_parent(record, below, is_raw)?;
                }
            }
            ChainStep::Repoint { child, to } => {
                require_writable(&file_of(record, child)?)?;
                require_parent(record, to, false)?;
            }
            _ => {}
        }
    }
    plan.notes.extend(notes);
    Ok(())
}

/// Refuses a differencing image that a hypervisor has open: QEMU's driver `vpc`, also behind Xen's qdisk with
/// `format=vhd`, does not know parents.
///
/// # Errors
/// [`ErrorKind::Refused`]; those of the image.
pub(crate) fn refuse_open_child(record: &DiskRecord, open: &FileIds) -> Result<()> {
    let path = record.disk.path();
    if open.is_empty() || !file_id(path)?.is_some_and(|id| open.contains(&id)) {
        return Ok(());
    }
    if reading(path)?.disk_type() != DiskType::Differencing {
        return Ok(());
    }
    Err(Error::new(
        ErrorKind::Refused,
        format!(
            "{}: the running domain has {path} open, which is a child of another VHD, and QEMU's driver vpc does not know parents: it reads zeros where only the parent has data",
            record.disk.target
        ),
    )
    .state("no changes made")
    .advise(format!(
        "shut the domain down at once, and start it on the chain as `domsnap disk serve {path},format=vhd --socket SOCKET` serves it"
    )))
}

/// The refusal to change an image that a running QEMU has open by its own driver.
pub(crate) fn open_in_qemu(record: &DiskRecord) -> Error {
    let path = record.disk.path();
    Error::new(
        ErrorKind::Unsupported,
        format!(
            "{}: the running domain has {path} open by QEMU itself, which has no snapshots of VHD",
            record.disk.target
        ),
    )
    .state("no changes made")
    .advise(format!("shut the domain down; or {}", serve_it(path)))
}

/// How a disk is served to QEMU, as advice.
pub(crate) fn serve_it(path: &Utf8Path) -> String {
    format!(
        "serve the disk for the next start (`domsnap disk serve {path},format=vhd --socket SOCKET`) and give QEMU the \
         socket: -blockdev driver=nbd,server.type=unix,server.path=SOCKET,reconnect-delay=30"
    )
}

/// Refuses a parent that an image cannot name, or whose size no VHD can have.
fn require_parent(record: &DiskRecord, on: &LayerName, is_raw: bool) -> Result<()> {
    let file = file_of(record, on)?;
    // An earlier step of the plan may create it.
    if !file.exists() {
        return Ok(());
    }
    parent_name(record.disk.path(), &file, on, is_raw)?.require_short()?;
    if is_raw {
        let size = size_at(&file)
            .map_err(|error| image_files::names::io_error(error, format!("cannot look at {file}")))?;
        if size == 0 || size % SECTOR != 0 || size > MAX_SIZE {
            return Err(Error::new(
                ErrorKind::Unsupported,
                format!("a VHD cannot be made on {file}, which has {size} bytes: whole sectors, and 2040 GiB at most"),
            )
            .advise("use format=raw for the disk: its snapshots are qcow2 overlays"));
        }
    }
    Ok(())
}

/// Refuses an image that must not be frozen or read for a merge. `sound` has those that were looked at.
fn require_sound(sound: &mut HashSet<Utf8PathBuf>, file: &Utf8Path) -> Result<()> {
    if sound.insert(file.to_owned()) {
        let mut image = reading(file)?;
        image.require_sound().context("use", file.as_std_path())?;
    }
    Ok(())
}

fn require_writable(file: &Utf8Path) -> Result<()> {
    Ok(Vhd::open(file.as_std_path(), &OpenOptions::read_write().unlocked())?.require_writable()?)
}
