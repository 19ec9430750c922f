//! Restores a memory image into a running QEMU.

use std::time::Duration;

use serde_json::json;

use super::Image;
use crate::{
    error::{Error, ErrorKind, Result},
    fdset::{FdSet, reopen_read_only},
    jobs,
    machine::Machine,
    name::Name,
    qcow2,
    run_state::RunState,
};

/// Result of a restore.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restored {
    /// The run state now: `paused`, or `restore-vm` if this QEMU returns to `paused` only through running.
    /// The guest is paused in both, and [`Machine::cont`] resumes it.
    pub state: RunState,
}

/// Loads a memory image into a running QEMU: memory and devices of the guest are as they were, and the guest
/// is paused.
///
/// It needs a paused guest, and disks with their content of the image's instant. Excepted are the disks of
/// `devices`: nodes with an internal snapshot of the image's tag, which are reverted to it in the same step.
/// Call [`Image::verify`] before. The processor and the devices must be those of the image
/// ([`crate::discover::compare`]). May be repeated.
///
/// The image is not written: QEMU's writes (it updates the snapshot's tables) go to an overlay in memory.
/// Both are lent as descriptors, so QEMU needs no rights to the path, and a crash leaves nothing on disk.
///
/// # Errors
/// [`ErrorKind::Invalid`] if the guest runs, [`ErrorKind::Failed`] with QEMU's message. After an error the
/// guest is paused. If the load had begun, its memory is undefined, and the disks of `devices` may be
/// reverted. Load another memory image or reset the guest then. Resume it only if [`Error::state_now`]
/// reports that nothing was changed.
pub async fn restore_in_place(
    machine: &Machine,
    image: &Image,
    devices: &[String],
    deadline: Duration,
) -> Result<Restored> {
    let attempted = "restoring memory";
    let subject = image.path().display().to_string();
    let state = machine.run_state().await?;
    if state.running {
        return Err(
            Error::new(ErrorKind::Invalid, attempted, subject, "the guest runs").advise("pause it first")
        );
    }
    let length = image.length()?;
    let overlay = memory_file("overlay", &qcow2::empty(length)?)
        .map_err(|error| Error::io(attempted, image.path(), error))
        .map_err(untouched)?;
    let below = FdSet::add(machine, "memory", &[&image.descriptor()?]).await.map_err(untouched)?;
    let above = match FdSet::add(machine, "overlay", &[&overlay.0, &overlay.1]).await {
        Ok(above) => above,
        Err(error) => {
            below.remove(machine).await;
            return Err(untouched(error));
        }
    };
    let node = Name::fresh("vm");
    let outcome = load(machine, image, &node, &below, &above, devices, deadline).await;
    // Removed also after a failure, so that no process has the image open.
    let removed =
        machine.run(attempted, &subject, "blockdev-del", json!({ "node-name": node.as_str() })).await;
    below.remove(machine).await;
    above.remove(machine).await;
    if let (Err(error), Ok(())) = (&removed, &outcome) {
        tracing::warn!(%error, "the memory image stays open in QEMU");
    }
    outcome?;
    Ok(Restored { state: machine.run_state().await? })
}

async fn load(
    machine: &Machine,
    image: &Image,
    node: &Name,
    below: &FdSet,
    above: &FdSet,
    devices: &[String],
    deadline: Duration,
) -> Result<()> {
    let attempted = "restoring memory";
    let subject = image.path().display().to_string();
    // A qcow2 node whose *file* is an overlay of the image's file.
    let raw = json!({ "driver": "raw", "read-only": true,
        "file": { "driver": "file", "filename": below.path(), "read-only": true } });
    let file = json!({ "driver": "qcow2", "node-name": node.file(), "backing": raw,
        "file": { "driver": "file", "filename": above.path() } });
    let added = json!({ "driver": "qcow2", "node-name": node.as_str(), "file": file });
    machine.run(attempted, &subject, "blockdev-add", added).await.map_err(untouched)?;
    let mut all: Vec<&str> = devices.iter().map(String::as_str).collect();
    all.push(node.as_str());
    let job = Name::job();
    let arguments =
        json!({ "job-id": job.as_str(), "tag": image.tag(), "vmstate": node.as_str(), "devices": all });
    let patient = machine.within(deadline);
    patient.run(attempted, &subject, "snapshot-load", arguments).await.map_err(untouched)?;
    let ended = jobs::concluded(&patient, &job, deadline).await;
    match ended {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::Failed => {
            let early = ["does not have the requested snapshot", "does not exist", "is not found"];
            let text = error.to_string();
            if early.iter().any(|pattern| text.contains(pattern)) {
                return Err(untouched(error));
            }
            Err(error
                .state("the guest is stopped, its memory is undefined; disks with internal snapshots may be reverted")
                .advise("restore another memory image, or reset the guest (revert without memory)"))
        }
        Err(error) => Err(error.state("QEMU did not report the result")),
    }
}

fn untouched(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Timeout | ErrorKind::Protocol => error,
        _ => error.state("the guest's memory and disks were not touched; it is paused"),
    }
}

/// Creates a file in memory with these bytes; returns a writable and a read-only descriptor.
pub(crate) fn memory_file(
    name: &str,
    bytes: &[u8],
) -> std::io::Result<(std::os::fd::OwnedFd, std::os::fd::OwnedFd)> {
    use std::os::unix::fs::FileExt;
    let fd = rustix::fs::memfd_create(format!("domsnap-{name}"), rustix::fs::MemfdFlags::CLOEXEC)?;
    let file = std::fs::File::from(fd);
    file.write_all_at(bytes, 0)?;
    let read_only = reopen_read_only(&file)?;
    Ok((file.into(), read_only))
}
