//! [`Graph`]: QEMU's block nodes, from `query-named-block-nodes`, `query-block` and
//! `x-debug-query-block-graph`.
//!
//! QEMU calls the last one unstable, but it is in every version since 4.0. It is the only query that reports
//! the edges of all nodes, with and without a device; before 10.1 `query-named-block-nodes` does not.

use std::collections::{HashMap, HashSet};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    error::{Error, ErrorKind, Result},
    jobs,
    machine::Machine,
};

/// Filters that only QEMU creates, for a job.
const JOB_FILTERS: [&str; 2] = ["commit_top", "mirror_top"];

/// Filters that a user puts above an image. The last may be a job's too.
const FILTERS: [&str; 8] = [
    "throttle",
    "copy-on-read",
    "compress",
    "blklogwrites",
    "preallocate",
    "blkdebug",
    "blkreplay",
    COPY_BEFORE_WRITE,
];

/// The filter that saves to a target the data that the guest overwrites; it belongs to a backup job or a
/// backup tool.
pub(crate) const COPY_BEFORE_WRITE: &str = "copy-before-write";

/// Returns true if a node of this driver is not an image, but filters the one below it.
pub(crate) fn is_filter(driver: &str) -> bool {
    FILTERS.contains(&driver) || is_job_filter(driver)
}

/// Returns true if only a job of QEMU has such a filter.
pub(crate) fn is_job_filter(driver: &str) -> bool {
    JOB_FILTERS.contains(&driver)
}

/// Returns true if a filter of this driver passes everything through that matters to a snapshot. Images can
/// then be exchanged below it. `copy-on-read` does not, because it may keep its images; nor do filters that
/// log or check each write.
pub(crate) fn passes_through(driver: &str) -> bool {
    matches!(driver, "throttle" | "compress" | COPY_BEFORE_WRITE)
}

/// Returns true if QEMU takes internal snapshots through a filter of this driver. It does not if the filter
/// has a second node below itself, which would need a snapshot too.
fn passes_internal_snapshots(driver: &str) -> bool {
    driver != COPY_BEFORE_WRITE
}

/// Limit for the length of a chain, and of every walk.
const LONGEST_CHAIN: usize = 4096;

/// One node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Node {
    /// Its name; `#block123` where QEMU made it up.
    pub name: String,
    /// `qcow2`, `raw`, `file`, ...
    pub driver: String,
    /// QEMU's name of its file; for a format node, that of the file below. May be a `json:` string.
    pub file: String,
    /// True if it was opened read-only.
    pub read_only: bool,
    /// Its cache options.
    pub cache: Cache,
    /// `off`, `on` or `unmap`.
    pub detect_zeroes: String,
    /// Size that the guest sees, in bytes.
    pub virtual_size: u64,
    /// The snapshots inside of the image.
    pub snapshots: Vec<InternalSnapshot>,
    /// Names of the dirty bitmaps that only QEMU has: they are in no file (yet).
    #[serde(default)]
    pub bitmaps: Vec<String>,
    /// True if it may be written and locked, which is not so after a migration. `None` for a QEMU before
    /// 10.0.
    #[serde(default)]
    pub active: Option<bool>,
}

impl Node {
    /// Returns the part of its file that it shows, if that is not the whole (`offset` or `size` of a raw
    /// node). QEMU names such a node by a `json:` string, because a plain name would not open the same.
    pub(crate) fn slice(&self) -> Option<Slice> {
        let options: Value = serde_json::from_str(self.file.strip_prefix("json:")?).ok()?;
        if self.driver != "raw" || (options.get("offset").is_none() && options.get("size").is_none()) {
            return None;
        }
        // QEMU writes them as numbers, or as text where the user's command line had them so.
        let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.parse().ok());
        Some(Slice {
            offset: options.get("offset").map_or(Some(0), number),
            size: options.get("size").and_then(number),
        })
    }

    /// Returns the bytes that it shows from the beginning of its file, if it shows no others.
    pub(crate) fn head(&self) -> Option<u64> {
        self.slice().filter(|slice| slice.offset == Some(0)).and_then(|slice| slice.size)
    }
}

/// The part of a file that a raw node shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slice {
    /// Where it begins. Absent: it is not known.
    pub(crate) offset: Option<u64>,
    /// Its length. Absent: up to the file's end, or not known.
    pub(crate) size: Option<u64>,
}

/// A node's cache options.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Cache {
    /// O_DIRECT.
    pub direct: bool,
    /// Flushes are ignored.
    pub no_flush: bool,
}

/// A snapshot inside of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InternalSnapshot {
    /// Its id.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Size of its VM state, in bytes; 0 if there is none.
    pub vm_state_size: u64,
}

/// The user of a node, and the role of the node in it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Edge {
    /// Name of the node above, of the device or drive, or of the job.
    pub parent: String,
    /// Kind of the parent: a node, a `block-backend` (a device), or a `block-job`.
    pub parent_type: String,
    /// `backing`, `file`, `root`, ...
    pub role: String,
    /// Name of the node below.
    pub child: String,
}

/// The nodes and their edges.
#[derive(Debug, Clone)]
pub struct Graph {
    nodes: Vec<Node>,
    edges: Vec<Edge>,
    /// Root nodes by each name of a device: the drive's name, its path in QOM, its id.
    roots: HashMap<String, String>,
    drives: Vec<Value>,
}

impl Graph {
    /// Reads the graph. A job that ends meanwhile may make it stale.
    ///
    /// QEMU 10.0 crashes (segmentation fault) if its nodes are queried while a stream job is concluded and
    /// not dismissed. One of ours, which a crash left, is dismissed first: its effect is in the chains.
    /// Nothing else is changed.
    ///
    /// # Errors
    /// Errors of the connection; [`ErrorKind::Unsupported`] if QEMU has no `x-debug-query-block-graph`;
    /// [`ErrorKind::Invalid`] if another program has a concluded stream job.
    pub async fn read(machine: &Machine) -> Result<Self> {
        jobs::dismiss_streams(machine).await?;
        // All three at once: QEMU answers them one after the other, without a turn of ours in between.
        let (listed, graph, drives) = tokio::try_join!(
            machine.query("query-named-block-nodes", json!({ "flat": true })),
            machine.query("x-debug-query-block-graph", Value::Null),
            machine.query("query-block", Value::Null),
        )?;
        let nodes = all(&listed, node).ok_or_else(|| machine.odd("query-named-block-nodes", &listed))?;
        let edges = edges(&graph).ok_or_else(|| machine.odd("x-debug-query-block-graph", &graph))?;
        let drives = drives.as_array().ok_or_else(|| machine.odd("query-block", &drives))?.clone();
        let mut roots = HashMap::new();
        for drive in &drives {
            let Some(root) = drive["inserted"]["node-name"].as_str() else { continue };
            for name in device_names(drive) {
                roots.insert(name, root.to_owned());
            }
        }
        let mut graph = Self { nodes, edges, roots: HashMap::new(), drives };
        graph.roots = roots.into_iter().map(|(name, root)| (name, graph.below_filters(root))).collect();
        Ok(graph)
    }

    /// Returns the node below the user's filters, or the node itself. A filter that passes everything through
    /// is a part of the device: operations on the disk happen below it, and it stays.
    fn below_filters(&self, root: String) -> String {
        let mut at = root;
        for _ in 0..LONGEST_CHAIN {
            match self.node(&at).filter(|node| passes_through(&node.driver)).and_then(|_| self.backing(&at)) {
                Some(below) => at = below.to_owned(),
                None => break,
            }
        }
        at
    }

    /// Returns the filters on a node that pass everything through, the topmost last.
    pub(crate) fn filters_on(&self, name: &str) -> Vec<&Node> {
        let (mut filters, mut at): (Vec<&Node>, &str) = (Vec::new(), name);
        while let Some(filter) = self
            .users(at)
            .filter(|edge| edge.role == "file")
            .filter_map(|edge| self.node(&edge.parent))
            .find(|node| passes_through(&node.driver))
            .filter(|_| filters.len() < LONGEST_CHAIN)
        {
            filters.push(filter);
            at = &filter.name;
        }
        filters
    }

    /// Returns the topmost of those filters, or the node itself. Jobs and internal snapshots need the node
    /// that no other node is above, which QEMU calls a root node.
    pub(crate) fn top_of<'a>(&'a self, name: &'a str) -> &'a str {
        self.filters_on(name).last().map_or(name, |filter| filter.name.as_str())
    }

    /// Returns the filter on a node that blocks QEMU's internal snapshots.
    pub(crate) fn internal_snapshot_blocker(&self, name: &str) -> Option<&Node> {
        self.filters_on(name).into_iter().find(|filter| !passes_internal_snapshots(&filter.driver))
    }

    /// Returns all nodes below a node, and that node. The target of a filter is not below it.
    pub(crate) fn all_below<'a>(&'a self, top: &'a str) -> Vec<&'a str> {
        let mut all = vec![top];
        let mut seen = 0;
        while let Some(at) = all.get(seen).copied() {
            seen += 1;
            for edge in self.edges.iter().filter(|edge| edge.parent == at && edge.role != "target") {
                if !all.contains(&edge.child.as_str()) {
                    all.push(&edge.child);
                }
            }
        }
        all
    }

    /// Returns all nodes.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// Returns all edges.
    pub fn edges(&self) -> &[Edge] {
        &self.edges
    }

    pub(crate) fn drives(&self) -> &[Value] {
        &self.drives
    }

    /// Finds a node by its name.
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.iter().find(|node| node.name == name)
    }

    /// Finds a node by its name, or returns an error.
    pub(crate) fn expect(&self, attempted: &str, name: &str) -> Result<&Node> {
        self.node(name).ok_or_else(|| {
            let detail = "QEMU has no such node";
            Error::new(ErrorKind::Invalid, attempted, format!("node {name}"), detail)
                .advise("discover the disks again")
        })
    }

    /// Finds the root node of a device: the topmost that is not a filter which passes everything through.
    /// `device` is its id (`vda`), its drive's name, its path in QOM, or the node's own name.
    pub fn root(&self, device: &str) -> Option<&str> {
        let root = self.roots.get(device).map(String::as_str);
        root.or_else(|| self.node(device).map(|node| node.name.as_str()))
    }

    /// Returns the child of a node in a role. Filters of jobs are skipped.
    fn below<'a>(&'a self, name: &'a str, role: &'a str) -> Option<&'a str> {
        let mut at = name;
        let mut role = role;
        for _ in 0..LONGEST_CHAIN {
            let edge = self.edges.iter().find(|edge| edge.parent == at && edge.role == role)?;
            at = edge.child.as_str();
            let filter = self.node(at).is_some_and(|node| is_job_filter(&node.driver));
            if !filter {
                return Some(at);
            }
            role = if self.edges.iter().any(|edge| edge.parent == at && edge.role == "file") {
                "file"
            } else {
                "backing"
            };
        }
        None
    }

    /// Returns the node of its backing image; for a filter (`throttle`, ...), the filtered node.
    pub fn backing<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        let filter = self.node(name).is_some_and(|node| is_filter(&node.driver));
        // Most filters have the filtered node as their file; those of commit and mirror jobs as their backing
        // image; blkdebug and blkreplay as an image.
        let has = |role: &&str| self.edges.iter().any(|edge| edge.parent == name && edge.role == *role);
        let role = ["file", "image"].into_iter().find(has).filter(|_| filter);
        self.below(name, role.unwrap_or("backing"))
    }

    /// Returns the file node below a format node.
    pub fn file<'a>(&'a self, name: &'a str) -> Option<&'a str> {
        self.below(name, "file")
    }

    /// Returns the layers from a node down to the base, that node first. File nodes are not included.
    pub fn chain<'a>(&'a self, top: &'a str) -> Vec<&'a Node> {
        let (mut chain, mut seen, mut at) = (Vec::new(), HashSet::new(), Some(top));
        while let Some(node) = at.and_then(|name| self.node(name)) {
            if !seen.insert(&node.name) || chain.len() >= LONGEST_CHAIN {
                break;
            }
            chain.push(node);
            at = self.backing(&node.name);
        }
        chain
    }

    /// Returns the edges from a node's direct users.
    pub fn users(&self, name: &str) -> impl Iterator<Item = &Edge> {
        self.edges.iter().filter(move |edge| edge.child == name)
    }
}

/// Returns all names of a device: `/machine/peripheral/vda/virtio-backend` is also `vda`.
pub(crate) fn device_names(drive: &Value) -> Vec<String> {
    let mut names = Vec::new();
    if let Some(device) = drive["device"].as_str().filter(|device| !device.is_empty()) {
        names.push(device.to_owned());
    }
    if let Some(qdev) = drive["qdev"].as_str() {
        names.push(qdev.to_owned());
        if let Some(id) = device_id(qdev) {
            names.push(id.to_owned());
        }
    }
    names
}

/// Returns the id of a device from its path in QOM, if it has one.
pub(crate) fn device_id(qdev: &str) -> Option<&str> {
    if !qdev.starts_with('/') {
        return Some(qdev);
    }
    qdev.strip_prefix("/machine/peripheral/")?.split('/').next()
}

fn node(value: &Value) -> Option<Node> {
    let text = |key: &str| value.get(key)?.as_str().map(str::to_owned);
    let cache = &value["cache"];
    let image = &value["image"];
    let snapshots = image["snapshots"].as_array().map(Vec::as_slice).unwrap_or_default();
    Some(Node {
        name: text("node-name")?,
        driver: text("drv")?,
        file: text("file")?,
        read_only: value["ro"].as_bool()?,
        cache: Cache {
            direct: cache["direct"].as_bool().unwrap_or(false),
            no_flush: cache["no-flush"].as_bool().unwrap_or(false),
        },
        detect_zeroes: text("detect_zeroes").unwrap_or_else(|| "off".to_owned()),
        virtual_size: image["virtual-size"].as_u64()?,
        snapshots: snapshots.iter().map(snapshot).collect::<Option<_>>()?,
        bitmaps: unstored_bitmaps(value),
        active: value["active"].as_bool(),
    })
}

/// Returns the dirty bitmaps of a node that its image's file does not have.
fn unstored_bitmaps(node: &Value) -> Vec<String> {
    let names = |list: &Value| -> Vec<String> {
        let all = list.as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter().filter_map(|bitmap| bitmap["name"].as_str()).map(str::to_owned).collect()
    };
    let stored = names(&node["image"]["format-specific"]["data"]["bitmaps"]);
    let mut all = names(&node["dirty-bitmaps"]);
    all.retain(|name| !stored.contains(name));
    all
}

fn snapshot(value: &Value) -> Option<InternalSnapshot> {
    Some(InternalSnapshot {
        id: value["id"].as_str()?.to_owned(),
        name: value["name"].as_str()?.to_owned(),
        vm_state_size: value["vm-state-size"].as_u64()?,
    })
}

fn edges(graph: &Value) -> Option<Vec<Edge>> {
    let mut names = HashMap::new();
    for node in graph["nodes"].as_array()? {
        names.insert(node["id"].as_u64()?, (node["name"].as_str()?, node["type"].as_str()?));
    }
    all(&graph["edges"], |edge| {
        let (parent, parent_type) = names.get(&edge["parent"].as_u64()?)?;
        let (child, _) = names.get(&edge["child"].as_u64()?)?;
        Some(Edge {
            parent: (*parent).to_owned(),
            parent_type: (*parent_type).to_owned(),
            role: edge["name"].as_str()?.to_owned(),
            child: (*child).to_owned(),
        })
    })
}

/// Reads all entries of a list; none if one of them cannot be read, because skipping it would be worse.
pub(crate) fn all<T>(value: &Value, each: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    value.as_array()?.iter().map(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str, driver: &str) -> Node {
        Node {
            name: name.into(),
            driver: driver.into(),
            file: String::new(),
            read_only: false,
            cache: Cache::default(),
            detect_zeroes: "off".into(),
            virtual_size: 0,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            active: None,
        }
    }

    fn graph(nodes: &[(&str, &str)], edges: &[(&str, &str, &str)]) -> Graph {
        let edge = |&(parent, role, child): &(&str, &str, &str)| Edge {
            parent: parent.into(),
            parent_type: "block-driver".into(),
            role: role.into(),
            child: child.into(),
        };
        Graph {
            nodes: nodes.iter().map(|(name, driver)| named(name, driver)).collect(),
            edges: edges.iter().map(edge).collect(),
            roots: HashMap::new(),
            drives: Vec::new(),
        }
    }

    /// A chain skips the filter of a job, and a circular one has an end.
    #[test]
    fn chain_skips_job_filters_and_ends_in_a_circle() {
        let graph = graph(
            &[("a", "qcow2"), ("x", "commit_top"), ("b", "qcow2"), ("c", "qcow2")],
            &[("a", "backing", "x"), ("x", "backing", "b"), ("b", "backing", "c"), ("c", "backing", "a")],
        );
        let chain: Vec<_> = graph.chain("a").iter().map(|node| node.name.as_str()).collect();
        assert_eq!(chain, ["a", "b", "c"]);
    }

    #[test]
    fn a_device_is_known_by_its_id_its_drive_and_its_path() {
        let drive = json!({ "device": "drive0", "qdev": "/machine/peripheral/vda/virtio-backend" });
        assert_eq!(device_names(&drive), ["drive0", "/machine/peripheral/vda/virtio-backend", "vda"]);
        assert_eq!(device_id("/machine/peripheral-anon/device[1]/virtio-backend"), None);
        assert_eq!(device_id("ide0-0-1"), Some("ide0-0-1"));
    }
}
