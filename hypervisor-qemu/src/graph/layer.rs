//! Nodes of layers: added, re-homed, deleted.

use std::{collections::HashSet, os::unix::fs::FileTypeExt, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Graph, Node};
use crate::{
    discover::Given,
    error::{Error, ErrorKind, Result},
    jobs,
    machine::Machine,
    name::Name,
};

/// How a node is opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeOptions {
    /// O_DIRECT.
    pub cache_direct: bool,
    /// Flushes are ignored.
    pub cache_no_flush: bool,
    /// `off`, `on` or `unmap`.
    pub detect_zeroes: String,
    /// More of the format's node, as QMP takes them: `discard`, `l2-cache-size`, ...
    #[serde(default)]
    pub format: Map<String, Value>,
    /// More of the file's node: `aio`, `locking`, ...
    #[serde(default)]
    pub file: Map<String, Value>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        let (format, file) = (Map::new(), Map::new());
        Self { cache_direct: false, cache_no_flush: false, detect_zeroes: "off".to_owned(), format, file }
    }
}

impl NodeOptions {
    /// As another node was opened, as far as QEMU reports it: an overlay behaves as its backing file.
    pub fn like(node: &Node) -> Self {
        Self {
            cache_direct: node.cache.direct,
            cache_no_flush: node.cache.no_flush,
            detect_zeroes: node.detect_zeroes.clone(),
            ..Self::default()
        }
    }

    /// The same, with what else the user's command line says of the disk's image.
    pub(crate) fn and(mut self, given: Option<&Given>) -> Self {
        if let Some(given) = given {
            self.format = given.format.clone();
            self.file = given.file.clone();
        }
        self
    }

    /// What else is said of a node of the driver `driver`, on top of `node`.
    fn extend(&self, driver: &str, node: &mut Value) {
        for (key, value) in &self.format {
            if driver == "qcow2" || key == "discard" {
                node[key] = value.clone();
            }
        }
    }
}

/// One image file, to be opened as a node of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Layer {
    /// The node's name; that of the file below it has `-f` behind it.
    pub name: Name,
    /// The image's permanent name, absolute. It must never be renamed while a QEMU has it: QEMU opens it again, by this name,
    /// whenever the node turns writable or read-only.
    pub file: PathBuf,
    /// QEMU's word for the format: `qcow2`, `raw`, ... Stated, never guessed.
    pub driver: String,
    /// Whether the format has backing images.
    pub backed: bool,
    /// How it is opened.
    pub options: NodeOptions,
}

impl Layer {
    /// A qcow2 layer.
    pub fn qcow2(name: Name, file: impl Into<PathBuf>) -> Self {
        Self {
            name,
            file: file.into(),
            driver: "qcow2".to_owned(),
            backed: true,
            options: NodeOptions::default(),
        }
    }

    /// A raw layer: only ever the base.
    pub fn raw(name: Name, file: impl Into<PathBuf>) -> Self {
        Self {
            name,
            file: file.into(),
            driver: "raw".to_owned(),
            backed: false,
            options: NodeOptions::default(),
        }
    }

    /// The same with other options.
    pub fn options(mut self, options: NodeOptions) -> Self {
        self.options = options;
        self
    }

    fn arguments(&self, backing: Option<&str>, read_only: bool) -> Result<Value> {
        let attempted = "opening a layer";
        let invalid =
            |detail: &str| Error::new(ErrorKind::Invalid, attempted, self.file.display(), detail.to_owned());
        let path = self.file.to_str().ok_or_else(|| invalid("its path is not UTF-8, which QMP must have"))?;
        if !path.starts_with('/') {
            return Err(invalid("its path is not absolute"));
        }
        let about = std::fs::metadata(&self.file).map_err(|error| Error::io(attempted, &self.file, error))?;
        let protocol = if about.file_type().is_block_device() { "host_device" } else { "file" };
        let mut file = json!({ "driver": protocol, "filename": path, "node-name": self.name.file() });
        for (key, value) in &self.options.file {
            file[key] = value.clone();
        }
        let mut node = json!({
            "driver": self.driver,
            "node-name": self.name.as_str(),
            "read-only": read_only,
            // Where nothing is known, the guest's discards are passed on: a device that has them off never sends any.
            "discard": "unmap",
            "detect-zeroes": self.options.detect_zeroes,
            "cache": { "direct": self.options.cache_direct, "no-flush": self.options.cache_no_flush },
            "file": file,
        });
        self.options.extend(&self.driver, &mut node);
        if self.backed {
            node["backing"] = json!(backing);
        } else if let Some(backing) = backing {
            return Err(invalid(&format!("a {} image stands on nothing, not on {backing}", self.driver)));
        }
        Ok(node)
    }
}

/// A chain that is to be under a device: layers to open, bottom first, on a node that is there already, or on nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stack {
    /// The node on which the first layer stands.
    pub below: Option<String>,
    /// The layers to open, bottom first.
    pub layers: Vec<Layer>,
}

impl Stack {
    /// A node that is there already.
    pub fn node(name: impl Into<String>) -> Self {
        Self { below: Some(name.into()), layers: Vec::new() }
    }

    /// Layers, bottom first, on nothing.
    pub fn layers(layers: impl IntoIterator<Item = Layer>) -> Self {
        Self { below: None, layers: layers.into_iter().collect() }
    }

    /// One more on top.
    pub fn and(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// The name of its topmost node.
    pub(super) fn top(&self) -> Option<&str> {
        self.layers.last().map(|layer| layer.name.as_str()).or(self.below.as_deref())
    }

    /// Opens its layers; gives those that were opened, top first. After an error none of them is open.
    pub(super) async fn open(&self, machine: &Machine, top_writable: bool) -> Result<Vec<String>> {
        let mut opened: Vec<String> = Vec::new();
        let mut below = self.below.clone();
        for (number, layer) in self.layers.iter().enumerate() {
            let read_only = !(top_writable && number + 1 == self.layers.len());
            if let Err(error) = add_layer(machine, layer, below.as_deref(), read_only).await {
                return Err(match remove_layers(machine, &opened).await {
                    Ok(left) if left.is_empty() => error,
                    Ok(left) => error.now(format!("these nodes of ours are left: {}", left.join(", "))),
                    Err(second) => error.now(format!("what was opened before it is left ({second})")),
                });
            }
            below = Some(layer.name.to_string());
            opened.insert(0, layer.name.to_string());
        }
        Ok(opened)
    }
}

/// Opens a layer as a node. With `backing` none, it stands on nothing, whatever its file says.
///
/// Not idempotent: a name can be taken once.
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Io`] for a file that is not there; [`ErrorKind::Refused`] with what QEMU said. After
/// an error there is no such node.
pub async fn add_layer(
    machine: &Machine,
    layer: &Layer,
    backing: Option<&str>,
    read_only: bool,
) -> Result<()> {
    let arguments = layer.arguments(backing, read_only)?;
    let subject = layer.file.display().to_string();
    machine.run("opening a layer", &subject, "blockdev-add", arguments).await?;
    machine.remember_options(layer.name.as_str(), &layer.options);
    Ok(())
}

/// Opens an empty image as an overlay that is to be put on top of a device by the cut ([`crate::instant`]) or by
/// [`super::swap()`]: writable, standing on nothing until then.
///
/// # Errors
/// As [`add_layer`].
pub async fn add_overlay(machine: &Machine, overlay: &Layer) -> Result<()> {
    add_layer(machine, overlay, None, false).await
}

/// Puts another image below a node of ours. Its other options stay as they are.
pub(crate) async fn reopen_backing(
    machine: &Machine,
    graph: &Graph,
    name: &str,
    backing: Option<&str>,
) -> Result<()> {
    let attempted = "replacing a backing image";
    let node = graph.expect(attempted, name)?;
    let file = graph.file(name).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, attempted, format!("node {name}"), "it has no file below it")
    })?;
    let mut options = json!({
        "driver": node.driver,
        "node-name": name,
        "read-only": node.read_only,
        "discard": "unmap",
        "detect-zeroes": node.detect_zeroes,
        "cache": { "direct": node.cache.direct, "no-flush": node.cache.no_flush },
        "file": file,
        "backing": backing,
    });
    // An option that is not said again is QEMU's default from then on.
    if let Some(known) = machine.options_of(name) {
        known.extend(&node.driver, &mut options);
    }
    let subject = format!("node {name}");
    machine.run(attempted, &subject, "blockdev-reopen", json!({ "options": [options] })).await.map(drop)
}

/// Gives the frozen image below an overlay of ours a node that knows it by its layer's name: the node that QEMU was started
/// with knows it by the configured path, which is another image's by now.
///
/// Opens the layer, read-only, on what the old node stands on; hangs the overlay on it; deletes the old node. The guest may
/// run. May be repeated: where the overlay stands on the layer's node already, only what is left of the old one is deleted.
/// Gives the nodes that could not be deleted because something else uses them.
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Refused`]. After an error the overlay stands on the old node (and the layer's is
/// gone), or on the layer's.
pub async fn rehome(machine: &Machine, overlay: &str, layer: &Layer) -> Result<Vec<String>> {
    let attempted = "giving a frozen image a node of its own name";
    let graph = machine.graph().await?;
    graph.expect(attempted, overlay)?;
    let old = graph.backing(overlay).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, attempted, format!("node {overlay}"), "it stands on nothing")
    })?;
    if old == layer.name.as_str() {
        return Ok(Vec::new());
    }
    add_layer(machine, layer, graph.backing(old), true).await?;
    if let Err(error) = reopen_backing(machine, &graph, overlay, Some(layer.name.as_str())).await {
        let removed = remove_layers(machine, &[layer.name.to_string()]).await;
        return Err(match removed {
            Ok(_) => error,
            Err(second) => error.now(format!("the node {} is left ({second})", layer.name)),
        });
    }
    // The old node's file is the one that it had.
    remove_layers_of(machine, &graph, &[old.to_owned()]).await
}

/// Deletes nodes, in the order given (top first), each with the node of its file. One that is gone already is passed over,
/// so this may be repeated. One that something still uses is not deleted, and named in what this gives.
///
/// # Errors
/// Those of the connection.
pub async fn remove_layers(machine: &Machine, names: &[String]) -> Result<Vec<String>> {
    let before = machine.graph().await?;
    remove_layers_of(machine, &before, names).await
}

/// The same, where the graph with the nodes was read before.
async fn remove_layers_of(machine: &Machine, before: &Graph, names: &[String]) -> Result<Vec<String>> {
    let mut wanted = Vec::new();
    for name in names {
        let file = before.file(name).map(str::to_owned);
        wanted.push(name.clone());
        wanted.extend(file);
    }
    // A node of QEMU's own making goes by itself with the last that uses it, and its name tells nobody anything.
    for name in &wanted {
        if before.node(name).is_none() {
            continue;
        }
        let gone = machine.run("deleting a node", name, "blockdev-del", json!({ "node-name": name })).await;
        match gone {
            Err(error) if error.kind() != ErrorKind::Refused => return Err(error),
            _ => {}
        }
    }
    let after = machine.read_graph().await?;
    let mut seen = HashSet::new();
    Ok(wanted.into_iter().filter(|name| seen.insert(name.clone()) && after.node(name).is_some()).collect())
}

/// Deletes an internal snapshot of a device's active image. The guest may run. Gives whether it was there, so it may be
/// repeated.
///
/// # Errors
/// [`ErrorKind::Invalid`] where there is no such device; [`ErrorKind::Refused`] with what QEMU said: the snapshot is there
/// still.
pub async fn delete_internal(machine: &Machine, device: &str, tag: &str) -> Result<bool> {
    let attempted = "deleting an internal snapshot";
    let graph = Graph::read(machine).await?;
    let Some(root) = graph.root(device) else {
        let detail = "QEMU has no such device or node";
        return Err(Error::new(ErrorKind::Invalid, attempted, device, detail));
    };
    let there = graph.node(root).is_some_and(|node| node.snapshots.iter().any(|found| found.name == tag));
    if !there {
        return Ok(false);
    }
    let subject = format!("{tag} of {device}");
    if graph.keeps_internal_off(root).is_some() {
        // Such a filter lets nothing through to its image; this job names the image itself.
        let job = Name::job();
        let arguments = json!({ "job-id": job.as_str(), "tag": tag, "devices": [root] });
        machine.run(attempted, &subject, "snapshot-delete", arguments).await?;
        jobs::finish(machine, &job, |_| {}).await?;
        return Ok(true);
    }
    let arguments = json!({ "device": graph.top_of(root), "name": tag });
    machine.run(attempted, &subject, "blockdev-snapshot-delete-internal-sync", arguments).await?;
    Ok(true)
}
