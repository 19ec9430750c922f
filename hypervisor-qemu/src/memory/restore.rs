//! A memory image back into a running QEMU.

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

/// How a restore went.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Restored {
    /// The run state now: `paused`, or `restore-vm` where QEMU has no way back to `paused` but through running. The guest
    /// stands still in both, and [`Machine::cont`] lets it go on.
    pub state: RunState,
}

/// Puts a memory image into a running QEMU: its guest's memory and devices are as they were, and it stands still.
///
/// Needs: a guest that is paused; disks that are as they were at the image's instant, except those of `devices`: nodes with an
/// internal snapshot of the image's tag, which are reverted to it too, in one go. [`Image::verify`] before. The processor and
/// the devices must be those of the image ([`crate::discover::compare`]). May be repeated.
///
/// The image is not written: QEMU's writes (it takes up the snapshot's tables) go to an overlay in memory. Both are lent as
/// descriptors, so QEMU needs no right to the path, and nothing is left on disk by a crash.
///
/// # Errors
/// [`ErrorKind::Invalid`] where the guest runs, [`ErrorKind::Failed`] with what QEMU said. After an error the guest stands
/// still; where the load had begun its memory is undefined, and the disks of `devices` may be reverted: load another memory
/// image, reset the guest, or (only where [`Error::state`] says that no changes made) let it go on.
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
            Error::new(ErrorKind::Invalid, attempted, subject, "the guest runs").advice("pause it first")
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
    // Taken out also after a failure, so that nothing holds the image.
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
    // An image whose *file* is an overlay of the image's file.
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
            if early.iter().any(|words| text.contains(words)) {
                return Err(untouched(error));
            }
            Err(error
                .now("the guest is stopped, its memory is undefined; disks with internal snapshots may be reverted")
                .advice("restore another memory image, or reset the guest (revert without memory)"))
        }
        Err(error) => Err(error.now("QEMU did not say how it ended")),
    }
}

fn untouched(error: Error) -> Error {
    match error.kind() {
        ErrorKind::Timeout | ErrorKind::Protocol => error,
        _ => error.now("the guest's memory and disks were not touched; it is paused"),
    }
}

/// A file in memory with these bytes, for writing and for reading.
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
