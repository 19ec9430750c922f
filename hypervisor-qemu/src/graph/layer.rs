//! Nodes of layers: added, reopened by name, deleted.

use std::{collections::HashSet, os::unix::fs::FileTypeExt, path::PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Graph, Node};
use crate::{
    discover::ImageOptions,
    error::{Error, ErrorKind, Result},
    jobs,
    machine::Machine,
    name::Name,
};

/// Options with which a node is opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct NodeOptions {
    /// O_DIRECT.
    pub cache_direct: bool,
    /// Flushes are ignored.
    pub cache_no_flush: bool,
    /// `off`, `on` or `unmap`.
    pub detect_zeroes: String,
    /// Other options of the format node, in QMP's form: `discard`, `l2-cache-size`, ...
    #[serde(default)]
    pub format: Map<String, Value>,
    /// Other options of the file node: `aio`, `locking`, ...
    #[serde(default)]
    pub file: Map<String, Value>,
    /// Bytes of the file that a raw node shows, if not the whole.
    #[serde(default)]
    pub part: Option<u64>,
}

impl Default for NodeOptions {
    fn default() -> Self {
        let (format, file) = (Map::new(), Map::new());
        Self {
            cache_direct: false,
            cache_no_flush: false,
            detect_zeroes: "off".to_owned(),
            format,
            file,
            part: None,
        }
    }
}

impl NodeOptions {
    /// Returns the options of another node, as far as QEMU reports them: an overlay behaves as its backing
    /// file.
    pub fn like(node: &Node) -> Self {
        Self {
            cache_direct: node.cache.direct,
            cache_no_flush: node.cache.no_flush,
            detect_zeroes: node.detect_zeroes.clone(),
            part: node.head(),
            ..Self::default()
        }
    }

    /// Adds the other options that the user's command line gives for the disk's image.
    pub(crate) fn and(mut self, given: Option<&ImageOptions>) -> Self {
        if let Some(given) = given {
            self.format = given.format.clone();
            self.file = given.file.clone();
        }
        self
    }

    /// Adds the other options that fit the driver to a node.
    fn extend(&self, driver: &str, node: &mut Value) {
        for (key, value) in &self.format {
            if driver == "qcow2" || key == "discard" {
                node[key] = value.clone();
            }
        }
        if let Some(part) = self.part.filter(|_| driver == "raw") {
            node["size"] = json!(part);
        }
    }
}

/// One image file, to be opened as a node of ours.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Layer {
    /// The node's name. The file node below it has `-f` appended.
    pub name: Name,
    /// The image's permanent name, absolute. It must never be renamed while a QEMU has it open. QEMU reopens
    /// it by this name whenever the node turns writable or read-only.
    pub file: PathBuf,
    /// QEMU's name of the format: `qcow2`, `raw`, ... Stated, never guessed.
    pub driver: String,
    /// True if the format has backing images.
    pub backed: bool,
    /// Its options.
    pub options: NodeOptions,
}

impl Layer {
    /// Makes a qcow2 layer.
    pub fn qcow2(name: Name, file: impl Into<PathBuf>) -> Self {
        Self {
            name,
            file: file.into(),
            driver: "qcow2".to_owned(),
            backed: true,
            options: NodeOptions::default(),
        }
    }

    /// Makes a raw layer, which is always the base.
    pub fn raw(name: Name, file: impl Into<PathBuf>) -> Self {
        Self {
            name,
            file: file.into(),
            driver: "raw".to_owned(),
            backed: false,
            options: NodeOptions::default(),
        }
    }

    /// Sets other options.
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
            // Without known options, discards of the guest are passed on: a device that has them off never
            // sends any.
            "discard": "unmap",
            "detect-zeroes": self.options.detect_zeroes,
            "cache": { "direct": self.options.cache_direct, "no-flush": self.options.cache_no_flush },
            "file": file,
        });
        self.options.extend(&self.driver, &mut node);
        if self.backed {
            node["backing"] = json!(backing);
        } else if let Some(backing) = backing {
            return Err(invalid(&format!("a {} image has no backing image, so not {backing}", self.driver)));
        }
        Ok(node)
    }
}

/// The new chain of a device: layers to open, bottom first, on an existing node or on nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Stack {
    /// The node that backs the first layer.
    pub below: Option<String>,
    /// The layers to open, bottom first.
    pub layers: Vec<Layer>,
}

impl Stack {
    /// Makes a stack of one existing node.
    pub fn node(name: impl Into<String>) -> Self {
        Self { below: Some(name.into()), layers: Vec::new() }
    }

    /// Makes a stack of layers, bottom first, without a node below.
    pub fn layers(layers: impl IntoIterator<Item = Layer>) -> Self {
        Self { below: None, layers: layers.into_iter().collect() }
    }

    /// Adds a layer on top.
    pub fn and(mut self, layer: Layer) -> Self {
        self.layers.push(layer);
        self
    }

    /// Returns the name of its topmost node.
    pub(super) fn top(&self) -> Option<&str> {
        self.layers.last().map(|layer| layer.name.as_str()).or(self.below.as_deref())
    }

    /// Opens its layers; returns those that were opened, top first. After an error none of them is open.
    pub(super) async fn open(&self, machine: &Machine, top_writable: bool) -> Result<Vec<String>> {
        let mut opened: Vec<String> = Vec::new();
        let mut below = self.below.clone();
        for (number, layer) in self.layers.iter().enumerate() {
            let read_only = !(top_writable && number + 1 == self.layers.len());
            if let Err(error) = add_layer(machine, layer, below.as_deref(), read_only).await {
                return Err(match remove_layers(machine, &opened).await {
                    Ok(left) if left.is_empty() => error,
                    Ok(left) => error.state(format!("these nodes of ours are left: {}", left.join(", "))),
                    Err(second) => error.state(format!("nodes that were opened before are left ({second})")),
                });
            }
            below = Some(layer.name.to_string());
            opened.insert(0, layer.name.to_string());
        }
        Ok(opened)
    }
}

/// Opens a layer as a node. With `backing` none it has no backing image, whatever its file says.
///
/// Not idempotent: a node name is unique.
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Io`] for a missing file; [`ErrorKind::Refused`] with QEMU's message.
/// After an error there is no such node.
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

/// Opens an empty image as an overlay, which the cut ([`crate::instant`]) or [`super::swap()`] then puts on
/// top of a device. It is writable and has no backing image until then.
///
/// # Errors
/// See [`add_layer`].
pub async fn add_overlay(machine: &Machine, overlay: &Layer) -> Result<()> {
    add_layer(machine, overlay, None, false).await
}

/// Replaces the backing image of a node of ours. Its other options stay as they are.
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
    // An option that is not repeated here returns to QEMU's default.
    if let Some(known) = machine.options_of(name) {
        known.extend(&node.driver, &mut options);
    }
    let subject = format!("node {name}");
    machine.run(attempted, &subject, "blockdev-reopen", json!({ "options": [options] })).await.map(drop)
}

/// Replaces the node of the frozen image below an overlay of ours by one with the layer's permanent name. The
/// node that QEMU was started with has the configured path as its name, which is another image's by now.
///
/// Opens the layer read-only on the old node's backing node, makes it the overlay's backing image, and
/// deletes the old node. The guest may run. May be repeated: if the overlay is backed by the layer's node
/// already, this does nothing. Returns the nodes that could not be deleted because they are in use.
///
/// # Errors
/// [`ErrorKind::Invalid`], [`ErrorKind::Refused`]. After an error the overlay is backed by the old node (and
/// the layer's is gone), or by the layer's.
pub async fn reopen_by_name(machine: &Machine, overlay: &str, layer: &Layer) -> Result<Vec<String>> {
    let attempted = "giving a frozen image a node of its own name";
    let graph = machine.graph().await?;
    graph.expect(attempted, overlay)?;
    let old = graph.backing(overlay).ok_or_else(|| {
        Error::new(ErrorKind::Invalid, attempted, format!("node {overlay}"), "it has no backing image")
    })?;
    if old == layer.name.as_str() {
        return Ok(Vec::new());
    }
    add_layer(machine, layer, graph.backing(old), true).await?;
    if let Err(error) = reopen_backing(machine, &graph, overlay, Some(layer.name.as_str())).await {
        let removed = remove_layers(machine, &[layer.name.to_string()]).await;
        return Err(match removed {
            Ok(_) => error,
            Err(second) => error.state(format!("the node {} is left ({second})", layer.name)),
        });
    }
    // The old node's file is the one that the graph had before.
    remove_layers_of(machine, &graph, &[old.to_owned()]).await
}

/// Deletes nodes in the given order (top first), each with its file node. A node that is gone already is
/// skipped, so this may be repeated. A node that is still in use is not deleted; its name is returned.
///
/// # Errors
/// Errors of the connection.
pub async fn remove_layers(machine: &Machine, names: &[String]) -> Result<Vec<String>> {
    let before = machine.graph().await?;
    remove_layers_of(machine, &before, names).await
}

/// Like [`remove_layers`], with the graph that was read before.
async fn remove_layers_of(machine: &Machine, before: &Graph, names: &[String]) -> Result<Vec<String>> {
    let mut wanted = Vec::new();
    for name in names {
        let file = before.file(name).map(str::to_owned);
        wanted.push(name.clone());
        wanted.extend(file);
    }
    // A node that QEMU named itself is deleted by QEMU with its last user; its name need not be returned.
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

/// Deletes an internal snapshot of a device's active image. The guest may run. Returns false if there was
/// none, so it may be repeated.
///
/// # Errors
/// [`ErrorKind::Invalid`] if there is no such device; [`ErrorKind::Refused`] with QEMU's message: the
/// snapshot still exists.
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
    if graph.internal_snapshot_blocker(root).is_some() {
        // Such a filter passes no snapshot command to its image; this job names the image itself.
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
