//! Replaces the chain under a device in place: the revert to an external snapshot.

use serde_json::{Value, json};

use super::{
    Graph, Stack,
    layer::{remove_layers, reopen_backing},
};
use crate::{
    error::{Error, ErrorKind, Result},
    jobs,
    machine::Machine,
    name::Name,
};

/// One device and its new chain.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Swap {
    /// The device: its id, its drive's name, or its topmost node.
    pub device: String,
    /// An overlay that [`super::add_overlay`] has opened; it becomes the active image.
    pub overlay: Name,
    /// The backing image of the overlay afterwards: the image that is reverted to.
    pub onto: Stack,
}

impl Swap {
    /// Combines a device, its new active image, and the backing image of that.
    pub fn new(device: impl Into<String>, overlay: Name, onto: Stack) -> Self {
        Self { device: device.into(), overlay, onto }
    }
}

/// Replaces the chains of several devices, all or none. Nodes that become unused are deleted from the graph
/// (files are not touched).
///
/// Needs a paused guest: its disks change under it. Afterwards restore memory of the same instant, or reset
/// the guest. Each overlay must be empty and open, and as large as its image. Returns the old nodes that
/// could not be deleted because they are in use. Not idempotent: after a crash, [`Graph::root`] shows if it
/// was done.
///
/// # Errors
/// [`ErrorKind::Invalid`] if the guest runs or a node is missing; [`ErrorKind::Refused`] with QEMU's message.
/// After an error every device has its old chain (or [`Error::state_now`] names those that do not); the
/// overlays stay open.
pub async fn swap(machine: &Machine, swaps: &[Swap]) -> Result<Vec<String>> {
    let attempted = "replacing the chains of disks";
    require_paused(machine, attempted).await?;
    let graph = Graph::read(machine).await?;
    let mut roots = Vec::new();
    for swap in swaps {
        let root = graph.root(&swap.device).ok_or_else(|| {
            Error::new(ErrorKind::Invalid, attempted, &swap.device, "QEMU has no such device or node")
        })?;
        graph.expect(attempted, swap.overlay.as_str())?;
        roots.push(root.to_owned());
    }

    // 1) Open the new chains. Nothing uses them yet: an error closes them, a crash leaves nodes that `sweep`
    //    deletes.
    let mut opened: Vec<String> = Vec::new();
    for swap in swaps {
        match swap.onto.open(machine, false).await {
            Ok(layers) => opened.extend(layers),
            Err(error) => return Err(close_opened(machine, error, &opened).await),
        }
    }
    // 2) Put all overlays on top in one transaction. They are backed by the old chains until step 3.
    let actions: Vec<Value> = swaps
        .iter()
        .zip(&roots)
        .map(|(swap, root)| {
            json!({ "type": "blockdev-snapshot", "data": { "node": root, "overlay": swap.overlay.as_str() } })
        })
        .collect();
    let subject = machine.qmp().socket().display().to_string();
    if let Err(error) = machine.run(attempted, &subject, "transaction", json!({ "actions": actions })).await {
        return Err(close_opened(machine, error, &opened).await);
    }
    // 3) Move each overlay to its new chain. If one fails, the overlays that are already on top are taken off
    //    again: they are empty, so no data is lost.
    let graph_now = Graph::read(machine).await?;
    for swap in swaps {
        let hung = reopen_backing(machine, &graph_now, swap.overlay.as_str(), swap.onto.top()).await;
        let Err(mut error) = hung else { continue };
        for (swap, root) in swaps.iter().zip(&roots) {
            if let Err(second) = remove_overlay(machine, &swap.overlay, root).await {
                error = error
                    .state(format!("{} keeps the empty overlay {} ({second})", swap.device, swap.overlay));
            }
        }
        return Err(close_opened(machine, error, &opened).await);
    }
    // 4) Delete the old nodes that no new chain uses. Two disks may have one base: the node that one drops
    //    may be in use by the other.
    let after = Graph::read(machine).await?;
    let kept: Vec<&str> = swaps
        .iter()
        .flat_map(|swap| after.chain(swap.overlay.as_str()))
        .map(|node| node.name.as_str())
        .collect();
    let old = roots.iter().flat_map(|root| graph.chain(root)).map(|node| node.name.clone());
    let old: Vec<String> = old.filter(|name| !kept.contains(&name.as_str())).collect();
    remove_layers(machine, &old).await
}

/// Removes an empty overlay that was put on `root`, and leaves it open.
async fn remove_overlay(machine: &Machine, overlay: &Name, root: &str) -> Result<()> {
    let graph = Graph::read(machine).await?;
    if graph.backing(overlay.as_str()) != Some(root) {
        reopen_backing(machine, &graph, overlay.as_str(), Some(root)).await?;
    }
    jobs::fold(machine, overlay.as_str(), root).await
}

/// Merges a device's active image, an overlay of ours, into its backing image, and deletes its node. This
/// undoes an overlay. If the overlay is empty, no data is moved. The guest may run or be paused; its disks
/// must be active (not `postmigrate`).
///
/// # Errors
/// See [`crate::jobs::commit_active`]: the overlay is still on top.
pub async fn fold(machine: &Machine, overlay: &str) -> Result<()> {
    let attempted = "undoing an overlay";
    let graph = Graph::read(machine).await?;
    graph.expect(attempted, overlay)?;
    let below = graph.backing(overlay).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, attempted, format!("node {overlay}"), "it has no backing image")
    })?;
    jobs::fold(machine, overlay, below).await?;
    remove_layers(machine, &[overlay.to_owned()]).await.map(drop)
}

/// Closes the nodes that were opened, and adds to the error any that are left.
pub(super) async fn close_opened(machine: &Machine, error: Error, opened: &[String]) -> Error {
    match remove_layers(machine, opened).await {
        Ok(left) if left.is_empty() => error,
        Ok(left) => error.state(format!("these nodes of ours are left: {}", left.join(", "))),
        Err(second) => error.state(format!("nodes of ours may be left ({second})")),
    }
}

pub(super) async fn require_paused(machine: &Machine, attempted: &str) -> Result<()> {
    let state = machine.run_state().await?;
    let subject = machine.qmp().socket().display();
    if let Err(refusal) = machine.permits(&state).await?.disks {
        return Err(machine.refused(attempted, &state, refusal));
    }
    if state.running {
        return Err(
            Error::new(ErrorKind::Invalid, attempted, subject, "the guest runs").advise("pause it first")
        );
    }
    Ok(())
}
