//! Closes a disk's files under a paused guest, and reopens them later. Used for changes that need an image
//! that no process has open (applying an internal snapshot, ...).
//!
//! An empty overlay in memory is put on top, and the nodes below it are deleted from the graph. The guest
//! must not run meanwhile: it would read zeros.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    Graph, Stack,
    layer::{remove_layers, reopen_backing},
    swap::{close_opened, require_paused},
};
use crate::{
    error::{Error, ErrorKind, Result},
    fdset::FdSet,
    jobs,
    machine::Machine,
    memory::memory_file,
    name::{Name, is_ours},
    qcow2,
};

/// A device whose files are closed. Serialisable: a journal must have it before the guest may resume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
#[must_use = "the guest must not run until `attach`"]
pub struct Detached {
    /// The device, as the caller named it.
    pub device: String,
    /// The node of the empty overlay that replaces the chain.
    pub placeholder: Name,
    /// Nodes of the old chain that are still in use: their files stay open.
    pub still_open: Vec<String>,
}

/// Closes the files of a device's whole chain.
///
/// Needs a paused guest that stays paused until [`attach`]. Not idempotent: if the device has a placeholder
/// already, the error says so.
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Refused`] with QEMU's message. After an error the device has its old
/// chain, unless [`Error::state_now`] says otherwise.
pub async fn detach(machine: &Machine, device: &str) -> Result<Detached> {
    detach_as(machine, device, Name::fresh("ph")).await
}

/// Like [`detach`], with a given name for the placeholder, by which the disk is recognised after a crash.
pub(crate) async fn detach_as(machine: &Machine, device: &str, placeholder: Name) -> Result<Detached> {
    let attempted = "detaching a disk";
    require_paused(machine, attempted).await?;
    let graph = Graph::read(machine).await?;
    let root = graph.root(device).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, attempted, device, "QEMU has no such device or node")
    })?;
    if root.starts_with("domsnap-ph-") {
        let detail = format!("it is detached already: {root} replaces its chain");
        return Err(Error::new(ErrorKind::Invalid, attempted, device, detail).advise("attach it first"));
    }
    let root = graph.expect(attempted, root)?;
    let chain: Vec<String> = graph.chain(&root.name).iter().map(|node| node.name.clone()).collect();

    // 1) Lend the descriptors under a note that names the nodes. A crash from here on leaves the note, by
    //    which `close_detached_chains` finds nodes that are no longer in any chain.
    let file = memory_file("placeholder", &qcow2::empty(root.virtual_size)?)
        .map_err(|error| Error::new(ErrorKind::Io, attempted, device, error.to_string()).because(error))?;
    let set = FdSet::add(machine, &note_of(&graph, &placeholder, &chain), &[&file.0, &file.1]).await?;
    let node = json!({
        "driver": "qcow2", "node-name": placeholder.as_str(), "backing": null, "discard": "unmap",
        "file": { "driver": "file", "filename": set.path(), "node-name": placeholder.file() },
    });
    if let Err(error) = machine.run(attempted, device, "blockdev-add", node).await {
        set.remove(machine).await;
        return Err(error);
    }
    // 2) Put the empty overlay on top. A crash here leaves the old chain open below it: the disk still has
    //    its data.
    let on_top = json!({ "actions": [{ "type": "blockdev-snapshot",
        "data": { "node": root.name, "overlay": placeholder.as_str() } }] });
    if let Err(error) = machine.run(attempted, device, "transaction", on_top).await {
        let error = close_opened(machine, error, &[placeholder.to_string()]).await;
        set.remove(machine).await;
        return Err(error);
    }
    let graph = Graph::read(machine).await?;
    // 3) Take the old chain off the overlay. A crash after this leaves the chain's nodes open and unused.
    if let Err(mut error) = reopen_backing(machine, &graph, placeholder.as_str(), None).await {
        match jobs::fold(machine, placeholder.as_str(), &root.name).await {
            Ok(()) => {
                error = close_opened(machine, error, &[placeholder.to_string()]).await;
                set.remove(machine).await;
            }
            Err(second) => {
                error = error.state(format!("{device} keeps the empty overlay {placeholder} ({second})"))
            }
        }
        return Err(error);
    }
    // 4) Close the old chain: only now are the files free.
    let still_open = remove_layers(machine, &chain).await?;
    Ok(Detached { device: device.to_owned(), placeholder, still_open })
}

/// Gives a device a chain again. Opens the chain with a writable top, sets it as the placeholder's backing
/// image, and merges the placeholder down. The placeholder is empty, so no data is moved. It is then deleted,
/// and the device has the chain itself.
///
/// Needs a guest that has been paused since [`detach`]. May be repeated after an error, and after a crash
/// with the [`Detached`] from a journal. If the placeholder is gone, the disk was attached before; the call
/// reports this as [`ErrorKind::Invalid`].
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Refused`] with QEMU's message. After an error the device has its
/// placeholder and the chain's nodes are closed again (or [`Error::state_now`] names those left). The guest
/// must not run then.
pub async fn attach(machine: &Machine, detached: &Detached, stack: &Stack) -> Result<()> {
    let attempted = "attaching a disk";
    let device = &detached.device;
    let placeholder = detached.placeholder.as_str();
    let waiting = |error: Error| {
        error.state(format!(
            "{device} has no image, but the empty overlay {placeholder}: the guest must not run"
        ))
    };
    require_paused(machine, attempted).await?;
    let graph = Graph::read(machine).await?;
    graph.expect(attempted, placeholder)?;
    let Some(top) = stack.layers.last().map(|layer| layer.name.as_str()) else {
        let detail = "a chain needs a layer that can be written";
        return Err(waiting(Error::new(ErrorKind::Invalid, attempted, device, detail)));
    };
    let opened = stack.open(machine, true).await.map_err(waiting)?;
    if let Err(error) = resize_to(machine, placeholder, top).await {
        return Err(waiting(close_opened(machine, error, &opened).await));
    }
    if let Err(error) = reopen_backing(machine, &graph, placeholder, Some(top)).await {
        return Err(waiting(close_opened(machine, error, &opened).await));
    }
    if let Err(error) = jobs::fold(machine, placeholder, top).await {
        let error = match reopen_backing(machine, &graph, placeholder, None).await {
            Ok(()) => close_opened(machine, error, &opened).await,
            Err(second) => error.state(format!("{placeholder} is backed by the chain already ({second})")),
        };
        return Err(waiting(error));
    }
    remove_layers(machine, &[placeholder.to_owned()]).await?;
    take_back(machine, placeholder).await
}

/// Gives the placeholder the size of the image that is about to replace it.
///
/// It has the size of the disk when that was detached. The merge would enlarge a smaller image to that size,
/// and the device would keep it. While the placeholder has no backing image this changes no file, and a
/// repeated [`attach`] repeats it.
async fn resize_to(machine: &Machine, placeholder: &str, top: &str) -> Result<()> {
    let attempted = "attaching a disk";
    let graph = Graph::read(machine).await?;
    let wanted = graph.expect(attempted, top)?.virtual_size;
    if graph.expect(attempted, placeholder)?.virtual_size == wanted {
        return Ok(());
    }
    let size = json!({ "node-name": placeholder, "size": wanted });
    machine.run(attempted, placeholder, "block_resize", size).await.map(drop)
}

/// Makes the note under which the placeholder's descriptors are lent: its name, and the names of the user's
/// own nodes in the chain. A crash between taking the chain off and closing it leaves those nodes open and
/// locked without a user: then this note names them.
fn note_of(graph: &Graph, placeholder: &Name, chain: &[String]) -> String {
    let files = chain.iter().filter_map(|name| graph.file(name));
    // QEMU closes nodes that it named itself, and ours are recognised by their names.
    let own =
        chain.iter().map(String::as_str).chain(files).filter(|name| !name.starts_with('#') && !is_ours(name));
    let mut note = placeholder.to_string();
    for name in own {
        note.push(' ');
        note.push_str(name);
    }
    note
}

/// Closes the nodes of chains that were taken off their devices and that a crash left open. Returns their
/// number.
pub(crate) async fn close_detached_chains(machine: &Machine) -> Result<usize> {
    let sets = machine.query("query-fdsets", Value::Null).await?;
    let mut closed = 0;
    for (_, note) in crate::fdset::ours(&sets) {
        let mut fields = note.split(' ');
        let (Some(placeholder), chain) = (fields.next(), fields.collect::<Vec<_>>()) else { continue };
        let graph = machine.graph().await?;
        // If the device has the chain below its placeholder, the chain is in use.
        if chain.is_empty() || graph.node(placeholder).is_none() || graph.backing(placeholder).is_some() {
            continue;
        }
        let top = chain.iter().find(|name| graph.node(name).is_some() && graph.users(name).next().is_none());
        let Some(top) = top else { continue };
        let below = chain.iter().skip_while(|name| *name != top).map(|name| (*name).to_owned());
        let below: Vec<String> = below.filter(|name| graph.node(name).is_some()).collect();
        closed += below.len() - remove_layers(machine, &below).await?.len();
    }
    Ok(closed)
}

/// Takes back the descriptors that were lent under a name of ours.
pub(crate) async fn take_back(machine: &Machine, what: &str) -> Result<()> {
    let sets = machine.query("query-fdsets", Value::Null).await?;
    for (id, opaque) in crate::fdset::ours(&sets) {
        if opaque.split(' ').next() == Some(what) {
            FdSet::of(id).remove(machine).await;
        }
    }
    Ok(())
}
