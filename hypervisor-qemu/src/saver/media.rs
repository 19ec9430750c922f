//! Puts media back into the drives that the memory has them in.

use serde_json::json;
use snapcore::hypervisor::Medium;
use snapcore::{DiskAddress, Error, ErrorKind, Result};

use super::{error::to_engine, preflight};
use crate::{
    graph::{Graph, device_names},
    machine::Machine,
};

/// Gives each drive its medium. Needs a paused guest. A medium that is in its drive already is skipped, so
/// this may be repeated.
///
/// The guest's drive notices the change; its state is the memory's as soon as that is loaded.
pub(super) async fn put_back(machine: &Machine, media: &[Medium]) -> Result<()> {
    for medium in media {
        let changing = |error: Error| error.context(format!("changing the medium in drive {}", medium.drive));
        let graph = Graph::read(machine).await.map_err(to_engine).map_err(changing)?;
        let drive = graph.drives().iter().find(|drive| device_names(drive).contains(&medium.drive));
        let Some((drive, id)) = drive.and_then(|drive| Some((drive, drive["qdev"].as_str()?))) else {
            return Err(changing(Error::new(ErrorKind::NotFound, "QEMU has no such drive")));
        };
        let has = drive["inserted"]["file"].as_str();
        if has == medium.address.as_ref().map(DiskAddress::as_str) {
            continue;
        }
        let run = async |command: &str, arguments: serde_json::Value| {
            let done = machine.run("changing a medium", &medium.drive, command, arguments).await;
            done.map(drop).map_err(to_engine).map_err(changing)
        };
        // Forced, because a guest that has a medium mounted locks the tray.
        run("blockdev-open-tray", json!({ "id": id, "force": true })).await?;
        match &medium.address {
            Some(address) => {
                let mode = if medium.writable { "read-write" } else { "read-only" };
                let medium = json!({ "id": id, "filename": address.as_str(), "format": medium.format,
                    "read-only-mode": mode });
                run("blockdev-change-medium", medium).await?;
            }
            None => {
                run("blockdev-remove-medium", json!({ "id": id })).await?;
                run("blockdev-close-tray", json!({ "id": id })).await?;
            }
        }
    }
    Ok(())
}

/// Refuses media that QEMU cannot open.
pub(super) async fn check(machine: &Machine, media: &[Medium]) -> Result<()> {
    for medium in media {
        let Some(address) = &medium.address else { continue };
        // A device of the host is opened by another driver, which QEMU finds by its name.
        if address.is_among_devices() {
            continue;
        }
        let file = address.as_str();
        preflight::open_and_close(machine, "file", file, medium.writable).await.map_err(|error| {
            to_engine(error)
                .context(format!("the memory has the medium {file} in drive {}", medium.drive))
                .state("no changes made")
                .advise("put the file back, or revert the disks alone with --off")
        })?;
    }
    Ok(())
}
