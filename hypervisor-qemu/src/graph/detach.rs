//! A disk's files set free under a paused guest, and taken up again: for whatever can only be done to an image that nobody has
//! open (applying an internal snapshot, ...).
//!
//! An empty overlay in memory is put on top, and what is below it is deleted from the graph. The guest must not run meanwhile:
//! it would read zeros.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Graph, Stack,
    layer::{remove_layers, reopen_backing},
    swap::{standing_still, undone},
};
use crate::{
    error::{Error, ErrorKind, Result},
    fdset::FdSet,
    jobs,
    machine::Machine,
    memory::memory_file,
    name::Name,
    qcow2,
};

/// A device whose files are free. Serialisable: a journal must have it before the guest may go on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[must_use = "the guest must not run until `attach`"]
pub struct Detached {
    /// The device, as it was asked for.
    pub device: String,
    /// The node of the empty overlay that it has instead.
    pub placeholder: Name,
    /// Nodes of the old chain that something else uses: their files are not free.
    pub still_open: Vec<String>,
}

/// Sets the files of a device's whole chain free.
///
/// Needs a guest that stands still, and keeps standing still until [`attach`]. Not idempotent: where the device has a
/// placeholder already, that is an error which says so.
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Refused`] with what QEMU said. After an error the device has its old chain, or
/// [`Error::state`] says what it has.
pub async fn detach(machine: &Machine, device: &str) -> Result<Detached> {
    detach_as(machine, device, Name::fresh("ph")).await
}

/// [`detach`] with a name for the placeholder by which the disk is known after a crash.
pub(crate) async fn detach_as(machine: &Machine, device: &str, placeholder: Name) -> Result<Detached> {
    let attempted = "detaching a disk";
    standing_still(machine, attempted).await?;
    let graph = Graph::read(machine).await?;
    let root = graph.root(device).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, attempted, device, "QEMU has no such device or node")
    })?;
    if root.starts_with("domsnap-ph-") {
        let detail = format!("it is detached already: {root} stands for its chain");
        return Err(Error::new(ErrorKind::Invalid, attempted, device, detail).advice("attach it first"));
    }
    let root = graph.expect(attempted, root)?;
    let chain: Vec<String> = graph.chain(&root.name).iter().map(|node| node.name.clone()).collect();

    let file = memory_file("placeholder", &qcow2::empty(root.virtual_size)?)
        .map_err(|error| Error::new(ErrorKind::Io, attempted, device, error.to_string()).source(error))?;
    let set = FdSet::add(machine, placeholder.as_str(), &[&file.0, &file.1]).await?;
    let node = json!({
        "driver": "qcow2", "node-name": placeholder.as_str(), "backing": null, "discard": "unmap",
        "file": { "driver": "file", "filename": set.path(), "node-name": placeholder.file() },
    });
    if let Err(error) = machine.run(attempted, device, "blockdev-add", node).await {
        set.remove(machine).await;
        return Err(error);
    }
    let on_top = json!({ "actions": [{ "type": "blockdev-snapshot",
        "data": { "node": root.name, "overlay": placeholder.as_str() } }] });
    if let Err(error) = machine.run(attempted, device, "transaction", on_top).await {
        let error = undone(machine, error, &[placeholder.to_string()]).await;
        set.remove(machine).await;
        return Err(error);
    }
    let graph = Graph::read(machine).await?;
    if let Err(mut error) = reopen_backing(machine, &graph, placeholder.as_str(), None).await {
        match jobs::fold(machine, placeholder.as_str(), &root.name).await {
            Ok(()) => {
                error = undone(machine, error, &[placeholder.to_string()]).await;
                set.remove(machine).await;
            }
            Err(second) => {
                error = error.now(format!("{device} keeps the empty overlay {placeholder} ({second})"))
            }
        }
        return Err(error);
    }
    let still_open = remove_layers(machine, &chain).await?;
    Ok(Detached { device: device.to_owned(), placeholder, still_open })
}

/// Gives a device a chain again: opens it (its top writable), hangs the placeholder on it, merges it down (it is empty, so
/// nothing is moved), and deletes it. The device then has the chain itself.
///
/// Needs a guest that has stood still since [`detach`]. May be repeated after an error, and after a crash with the
/// [`Detached`] from a journal: where the placeholder is gone it was done, and this says so by [`ErrorKind::Invalid`].
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Refused`] with what QEMU said. After an error the device has its placeholder, the
/// chain's nodes are closed again (or [`Error::state`] says which are left), and the guest must not run.
pub async fn attach(machine: &Machine, detached: &Detached, stack: &Stack) -> Result<()> {
    let attempted = "attaching a disk";
    let device = &detached.device;
    let placeholder = detached.placeholder.as_str();
    let waiting = |error: Error| {
        error.now(format!(
            "{device} has no image, but the empty overlay {placeholder}: the guest must not run"
        ))
    };
    standing_still(machine, attempted).await?;
    let graph = Graph::read(machine).await?;
    graph.expect(attempted, placeholder)?;
    let Some(top) = stack.layers.last().map(|layer| layer.name.as_str()) else {
        let detail = "a chain needs a layer that can be written";
        return Err(waiting(Error::new(ErrorKind::Invalid, attempted, device, detail)));
    };
    let opened = stack.open(machine, true).await.map_err(waiting)?;
    if let Err(error) = reopen_backing(machine, &graph, placeholder, Some(top)).await {
        return Err(waiting(undone(machine, error, &opened).await));
    }
    if let Err(error) = jobs::fold(machine, placeholder, top).await {
        let error = match reopen_backing(machine, &graph, placeholder, None).await {
            Ok(()) => undone(machine, error, &opened).await,
            Err(second) => error.now(format!("{placeholder} stands on the chain already ({second})")),
        };
        return Err(waiting(error));
    }
    remove_layers(machine, &[placeholder.to_owned()]).await?;
    take_back(machine, placeholder).await
}

/// Takes back what was lent under a name of ours.
pub(crate) async fn take_back(machine: &Machine, what: &str) -> Result<()> {
    let sets = machine.query("query-fdsets", Value::Null).await?;
    for (id, opaque) in crate::fdset::ours(&sets) {
        if opaque == what {
            FdSet::of(id).remove(machine).await;
        }
    }
    Ok(())
}
