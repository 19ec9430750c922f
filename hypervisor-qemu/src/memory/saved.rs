//! Saves the memory of a paused guest if a background snapshot is not possible. A migration would leave the
//! guest `postmigrate`, from which it returns to `paused` only through running.
//!
//! `snapshot-save` does not change the run state. It writes into a scratch image without a name. The stream
//! is copied from there; it is the same as that of a migration.

use std::{
    fs::File,
    io,
    os::{fd::OwnedFd, unix::fs::FileExt},
    time::Duration,
};

use serde_json::json;

use super::Draft;
use crate::{
    error::{Error, Result},
    fdset::{FdSet, reopen_read_only},
    jobs,
    machine::Machine,
    name::Name,
    qcow2::{self, STREAM},
};

/// Time limit: QEMU answers nothing until its memory is written.
const SAVING: Duration = Duration::from_secs(600);

const TAG: &str = "domsnap";

/// Saves the memory of a guest that is paused, and stays so, into a draft. Needs space for twice the memory
/// in the draft's directory.
///
/// After an error QEMU is as before.
pub(crate) async fn save(machine: &Machine, draft: &Draft) -> Result<()> {
    let attempted = "saving memory";
    let failed = |error: io::Error| Error::io(attempted, draft.path(), error);
    let scratch = scratch(draft).map_err(failed)?;
    scratch.write_all_at(&qcow2::empty(1 << 16)?, 0).map_err(failed)?;
    let read_only = reopen_read_only(&scratch).map_err(failed)?;
    let writable = OwnedFd::from(scratch.try_clone().map_err(failed)?);
    let set = FdSet::for_now(machine, "memory", &[&writable, &read_only]).await?;
    let saved = run(machine, draft, &set).await;
    set.remove(machine).await;
    saved?;
    let target = File::from(draft.writable()?);
    let copied = tokio::task::spawn_blocking(move || copy(&scratch, &target));
    copied.await.map_err(io::Error::other).and_then(|copied| copied).map_err(failed)
}

/// Creates a file without a name.
fn scratch(draft: &Draft) -> io::Result<File> {
    let name = format!(".{}.scratch", uuid::Uuid::new_v4().simple());
    let path = draft.path().with_file_name(name);
    let file = confined_files::create_private(&path)?;
    confined_files::remove(&path)?;
    Ok(file)
}

async fn run(machine: &Machine, draft: &Draft, set: &FdSet) -> Result<()> {
    let attempted = "saving memory";
    let subject = draft.path().display().to_string();
    let node = Name::fresh("vs");
    let added = json!({ "driver": "qcow2", "node-name": node.as_str(),
        "file": { "driver": "file", "filename": set.path() } });
    machine.run(attempted, &subject, "blockdev-add", added).await?;
    let (job, patient) = (Name::job(), machine.within(SAVING));
    let arguments =
        json!({ "job-id": job.as_str(), "tag": TAG, "vmstate": node.as_str(), "devices": [node.as_str()] });
    let saved = async {
        patient.run(attempted, &subject, "snapshot-save", arguments).await?;
        jobs::concluded(&patient, &job, SAVING).await
    };
    let saved = saved.await;
    let removed = json!({ "node-name": node.as_str() });
    let removed = machine.run("closing the scratch image", node.as_str(), "blockdev-del", removed).await;
    saved?;
    removed.map(drop)
}

/// Copies the VM state of the one snapshot of a scratch image to the stream's offset.
fn copy(scratch: &File, target: &File) -> io::Result<()> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("the scratch image: {what}"));
    let long = |at: u64| -> io::Result<u64> {
        let mut bytes = [0; 8];
        scratch.read_exact_at(&mut bytes, at)?;
        Ok(u64::from_be_bytes(bytes))
    };
    const CLUSTER: u64 = 1 << 16;
    const PLACE: u64 = 0x00ff_ffff_ffff_fe00;
    let count = long(56)? & 0xffff_ffff; // the low half of what is at 56 is the number at 60
    if count != 1 {
        return Err(wrong("it does not have one snapshot"));
    }
    let table = long(64)?;
    let first = long(table)?;
    let entries = long(table + 8)? >> 32;
    // The size is in the extra data after the fixed part; the 32-bit field before that is too small for it.
    let size = long(table + 40)?;
    if size == 0 || size > qcow2::LONGEST {
        return Err(wrong("its snapshot has no VM state"));
    }
    let mut buffer = vec![0; usize::try_from(CLUSTER).map_err(io::Error::other)?];
    let per_table = CLUSTER / 8;
    let mut done = 0;
    while done < size {
        // The VM state begins behind the disk, which has one entry of the first-level table.
        let cluster = done / CLUSTER;
        let index = 1 + cluster / per_table;
        if index >= entries {
            return Err(wrong("its VM state is longer than its tables"));
        }
        let second = long(first + 8 * index)? & PLACE;
        let place = if second == 0 { 0 } else { long(second + 8 * (cluster % per_table))? };
        let length = usize::try_from((size - done).min(CLUSTER)).map_err(io::Error::other)?;
        let piece = buffer.get_mut(..length).ok_or_else(|| wrong("no buffer"))?;
        // Bit 0 of an entry: the cluster reads as zeros; bit 62: compressed, which a VM state never is.
        match place & PLACE {
            _ if place & (1 << 62) != 0 => return Err(wrong("its VM state is compressed")),
            0 => piece.fill(0),
            _ if place & 1 != 0 => piece.fill(0),
            place => scratch.read_exact_at(piece, place)?,
        }
        target.write_all_at(piece, STREAM + done)?;
        done += length as u64;
    }
    target.set_len(STREAM + size)
}
