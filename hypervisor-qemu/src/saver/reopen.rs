//! Reopens frozen images by their permanent names.
//!
//! QEMU has the image that it was started with under the configured path, which is another image's as soon as
//! that one is frozen. QEMU reopens images by the names that it has, and would write the wrong one.

use snapcore::hypervisor::OpenChain;
use snapcore::{Error, ErrorKind, Result};

use super::{
    disk::{Disk, identity},
    error::to_engine,
};
use crate::{
    graph::{self},
    name::Name,
};

/// Gives every frozen image of a disk whose node has another image's name a node of its permanent name. The
/// guest may run. Returns the number of such images; may be repeated.
///
/// The images are identified by their position in the chain, counted from its base. On top QEMU may have an
/// overlay to which the path was not moved yet, or was moved back from. The active image keeps its node.
pub(super) async fn reopen_by_name(disk: &Disk, chain: &OpenChain) -> Result<usize> {
    if disk.server.is_some() {
        return Ok(0); // QEMU knows no image of it.
    }
    let mut count = 0;
    let open = disk.open().await.map_err(to_engine)?;
    if open.placeholder.is_some() {
        return Ok(0);
    }
    let really_open = disk.view.open_images();
    // From the base up: each new node is backed by one that is right already.
    for above_base in 0..open.layers.len().saturating_sub(1) {
        // Read again: an image that was reopened has another node.
        let now = disk.open().await.map_err(to_engine)?;
        let place = now.layers.len().saturating_sub(1 + above_base);
        let named = chain.layers.len().checked_sub(1 + above_base).and_then(|place| chain.layers.get(place));
        let (Some(layer), Some(above), Some(named)) =
            (now.layers.get(place), place.checked_sub(1).and_then(|above| now.layers.get(above)), named)
        else {
            break;
        };
        let Some(file) = identity(named.address.path().as_std_path()) else {
            let detail = format!("{} is gone, and QEMU has it open", named.address);
            return Err(Error::new(ErrorKind::NotFound, detail));
        };
        if layer.identity == Some(file) {
            continue;
        }
        if really_open.as_ref().is_some_and(|open| !open.contains_key(&file)) {
            let detail = format!(
                "QEMU has another image open at the place of {} in the chain of disk {}: its node {} names {}",
                named.address,
                disk.target,
                layer.node.name,
                layer.file.as_deref().map_or_else(|| "no file".to_owned(), |file| file.display().to_string()),
            );
            return Err(Error::new(ErrorKind::Corrupt, detail).advise(
                "shut the domain down and start it again, so that it opens the files of its configured paths",
            ));
        }
        let node = super::disk::layer(named, Name::node(), disk.like(&layer.node));
        let left = graph::reopen_by_name(&disk.machine, &above.node.name, &node).await.map_err(to_engine)?;
        if !left.is_empty() {
            tracing::warn!(nodes = left.join(", "), "the previous node of a frozen image is still in use");
        }
        count += 1;
    }
    Ok(count)
}
