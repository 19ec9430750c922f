//! The virtual machine generation ID (`vmgenid`): a number in the guest's memory that is another one whenever
//! the guest was put back to an earlier state. A guest that sees another number reseeds its random number
//! generator; otherwise it repeats the random numbers that it gave out after the snapshot.
//!
//! QEMU's ID is an option of its start. When memory is loaded, QEMU writes that ID to the place that the
//! firmware chose, and notifies the guest, which finds the ID that it had. So after memory is loaded, and
//! before the guest runs, a fresh ID is written to that place; QEMU's notification is still pending then.
//!
//! Places are read from the image ([`crate::memory::Image::generation_ids`]), whose bytes the guest decides
//! in part. So a place counts only if it is in RAM and has QEMU's own ID: only there is anything written.

use std::time::Duration;

use serde_json::Value;
use tokio::time::timeout;

use crate::{
    error::{Error, ErrorKind, Result},
    gdb::{self, Stub},
    machine::Machine,
};

/// Bytes of an ID.
const LENGTH: u64 = 16;

/// Time limit of all of it: the guest waits meanwhile.
const SOON: Duration = Duration::from_secs(5);

/// Gives a guest whose memory was loaded a fresh ID. The guest must be paused, and must not have run since.
///
/// Returns true if the guest has a fresh ID, and false if it has no ID. The guest is as before after an
/// error, and may run: it has the ID that it had.
pub(crate) async fn renew(machine: &Machine, places: &[u64]) -> Result<bool> {
    if places.is_empty() {
        return Ok(false);
    }
    let done = timeout(SOON, renew_now(machine, places)).await.unwrap_or_else(|_| {
        let detail = format!("QEMU took longer than {} s", SOON.as_secs());
        Err(failed(ErrorKind::Timeout, detail))
    });
    // Whatever happened: no stub stays open. A crash before this leaves one that no process can reach, which
    // the next command closes.
    let closed = timeout(SOON, gdb::close(machine)).await;
    let closed =
        closed.unwrap_or_else(|_| Err(failed(ErrorKind::Timeout, "closing the gdb stub".to_owned())));
    let renewed = done?;
    closed.map(|()| renewed)
}

fn failed(kind: ErrorKind, detail: impl Into<String>) -> Error {
    Error::new(kind, "giving the guest a fresh generation ID", "its memory", detail)
}

async fn renew_now(machine: &Machine, places: &[u64]) -> Result<bool> {
    let Some(current) = current(machine).await? else { return Ok(false) };
    if !machine.qmp().passes_descriptors() {
        let detail =
            "QEMU's gdb stub would need a name that others can open: QMP over TCP passes no descriptors";
        return Err(failed(ErrorKind::Unsupported, detail));
    }
    // One that a killed process left.
    gdb::close(machine).await?;
    if gdb::is_in_use(machine).await? {
        return Err(failed(ErrorKind::Unsupported, "QEMU's gdb stub is in use"));
    }
    // A device's memory must not even be read: that can have effects.
    let mut in_ram = Vec::new();
    for &place in places {
        if is_ram(machine, place).await? && is_ram(machine, place.saturating_add(LENGTH - 1)).await? {
            in_ram.push(place);
        }
    }
    let stub = Stub::open(machine).await?;
    let written = tokio::task::spawn_blocking(move || write(stub, &in_ram, &current, &fresh(&current)));
    match written.await {
        Ok(Ok(0)) => {
            let detail = "the image does not say where in its memory the guest has it";
            Err(failed(ErrorKind::Refused, detail))
        }
        Ok(Ok(_)) => Ok(true),
        Ok(Err(error)) => Err(failed(ErrorKind::Io, error.to_string()).because(error)),
        Err(error) => Err(failed(ErrorKind::Io, error.to_string())),
    }
}

/// Writes an ID to each place that has the current one; returns their number.
fn write(mut stub: Stub, places: &[u64], current: &[u8; 16], fresh: &[u8; 16]) -> std::io::Result<usize> {
    stub.use_physical_addresses()?;
    let mut written = 0;
    for &place in places {
        if stub.read::<16>(place)? != *current {
            continue;
        }
        stub.write(place, fresh)?;
        if stub.read::<16>(place)? != *fresh {
            return Err(std::io::Error::other("what was written is not there"));
        }
        written += 1;
    }
    Ok(written)
}

/// A fresh ID in the guest's byte order.
fn fresh(current: &[u8; 16]) -> [u8; 16] {
    loop {
        let fresh = uuid::Uuid::new_v4().to_bytes_le();
        if fresh != *current {
            return fresh;
        }
    }
}

/// QEMU's own ID in the guest's byte order; none if the machine has no such device.
async fn current(machine: &Machine) -> Result<Option<[u8; 16]>> {
    let reply = match machine.query("query-vm-generation-id", Value::Null).await {
        Ok(reply) => reply,
        Err(error) if matches!(error.kind(), ErrorKind::Refused | ErrorKind::Unsupported) => return Ok(None),
        Err(error) => return Err(error),
    };
    let id = reply["guid"].as_str().and_then(|text| text.parse::<uuid::Uuid>().ok());
    let id = id.ok_or_else(|| machine.odd("query-vm-generation-id", &reply))?;
    Ok(Some(id.to_bytes_le()))
}

async fn is_ram(machine: &Machine, address: u64) -> Result<bool> {
    let attempted = "looking at the guest's memory";
    let said = gdb::monitor(machine, attempted, &format!("gpa2hva {address:#x}")).await?;
    Ok(said.starts_with("Host virtual address for "))
}

/// The note for the user on a guest that has no fresh ID.
pub(crate) fn note(error: &Error) -> String {
    format!(
        "the guest's generation ID (vmgenid) is the one that it had, so the guest may give out the same random numbers again: {} \
         (reboot it, or reseed it, if that matters)",
        error.detail()
    )
}
