//! One disk of a running domain: its device, and the images that it has open.

use std::{
    collections::{HashMap, HashSet},
    fs,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use async_trait::async_trait;
use snapcore::backend::Progress;
use snapcore::hypervisor::{AttachedDisk, AttachedMerge, Inside, OpenLayer};
use snapcore::{DiskRecord, Error, ErrorKind, FileIdentity, Result, Target, file_identity};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{error::to_engine, merge};
use crate::{
    discover::{BlockDevice, ImageOptions},
    graph::{self, Graph, Layer, Node, NodeOptions},
    machine::Machine,
    name::Name,
    server::{self, Behind, DiskServer},
};

/// Prefix of every placeholder's name.
pub(super) const PLACEHOLDER: &str = "domsnap-ph-";

/// The file system as a QEMU sees it.
#[derive(Debug, Clone)]
pub(super) struct FileView {
    /// `/proc/PID`; `None` if the process is not known.
    process: Option<PathBuf>,
    directory: PathBuf,
}

impl FileView {
    pub(super) fn of(machine: &Machine) -> Self {
        let process = machine.pid().map(|pid| PathBuf::from(format!("/proc/{pid}")));
        let directory = process.as_ref().and_then(|process| fs::read_link(process.join("cwd")).ok());
        Self { process, directory: directory.unwrap_or_default() }
    }

    /// Makes a name of QEMU absolute.
    pub(super) fn absolute(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Returns device and inode of the file that has this name for QEMU.
    pub(super) fn identity(&self, file: &Path) -> Option<FileIdentity> {
        let inside = self.process.as_ref().map(|process| {
            // QEMU may run in a mount namespace of its own.
            process.join("root").join(file.strip_prefix("/").unwrap_or(file))
        });
        inside.and_then(|inside| identity(&inside)).or_else(|| identity(file))
    }

    /// Returns the images that QEMU has open, with their names now, whatever the nodes name; `None` if the
    /// system does not report it.
    pub(super) fn open_images(&self) -> Option<HashMap<FileIdentity, PathBuf>> {
        graph::open_images(self.process.as_deref()?).ok()
    }

    /// Returns those of the images that QEMU has open which no node names.
    pub(super) fn unnamed(
        &self,
        graph: &Graph,
        mut open: HashMap<FileIdentity, PathBuf>,
    ) -> HashMap<FileIdentity, PathBuf> {
        let named = graph.nodes().iter().filter_map(|node| self.identity(&self.file(node)?));
        let named: HashSet<FileIdentity> = named.collect();
        open.retain(|file, _| !named.contains(file));
        open
    }

    /// Asks who serves the disk of an NBD node.
    fn behind(&self, node: &Node) -> Option<Behind> {
        let pid = self.process.as_ref().and_then(|process| process.file_name()?.to_str()?.parse().ok());
        Behind::ask(node, |name| self.absolute(name), pid)
    }

    /// Returns true if QEMU has a file open without an image lock ([`graph::is_open_unlocked`]).
    pub(super) fn is_open_unlocked(&self, file: FileIdentity) -> bool {
        self.process.as_deref().is_some_and(|process| graph::is_open_unlocked(process, file))
    }

    /// Returns true if it serves the disks of a domain of Xen.
    pub(super) fn is_of_xen(&self) -> bool {
        self.process.as_deref().is_some_and(graph::is_of_xen)
    }

    /// Returns the file of a node; for an image, that of the file node below it.
    fn file(&self, node: &Node) -> Option<PathBuf> {
        let is_file = matches!(node.driver.as_str(), "file" | "host_device" | "host_cdrom");
        (is_file && !node.file.starts_with("/dev/fdset/")).then(|| self.directory.join(&node.file))
    }
}

/// Returns device and inode of a file; `None` if it does not exist.
pub(super) fn identity(file: &Path) -> Option<FileIdentity> {
    fs::metadata(file).ok().map(|about| file_identity(&about))
}

/// An image that a device has open.
#[derive(Debug, Clone)]
pub(super) struct QemuLayer {
    pub(super) node: Node,
    /// The file that the node names; `None` if it has none.
    pub(super) file: Option<PathBuf>,
    /// The file that has this name now.
    pub(super) identity: Option<FileIdentity>,
}

/// The images that a device has open.
#[derive(Debug, Clone, Default)]
pub(super) struct QemuChain {
    /// The node of the empty overlay that replaces the chain of a detached disk.
    pub(super) placeholder: Option<String>,
    /// The images, the active one first. Filters are left out, and so is the placeholder.
    pub(super) layers: Vec<QemuLayer>,
    /// The driver of a filter on top below which nothing can be put.
    pub(super) filter: Option<String>,
    /// The driver of a filter between two images, or between an image and its file. Reopening the images
    /// would lose it.
    pub(super) inner_filter: Option<String>,
    /// What is behind the node, if another program serves the disk. If it is a server of ours, the images
    /// are those that the server has open, and all have QEMU's one node. While the server has closed them,
    /// the placeholder is the label that it was given for that.
    pub(super) behind: Option<Behind>,
}

impl QemuChain {
    pub(super) fn root(&self) -> Option<&QemuLayer> {
        self.layers.first()
    }

    /// Returns the position of the image that is this file, by the file that its node names.
    pub(super) fn position(&self, file: FileIdentity) -> Option<usize> {
        self.layers.iter().position(|layer| layer.identity == Some(file))
    }

    pub(super) fn read(graph: &Graph, view: &FileView, root: &str) -> Self {
        let mut open = Self::default();
        for node in graph.chain(root) {
            if node.name.starts_with(PLACEHOLDER) {
                open.placeholder = Some(node.name.clone());
                continue;
            }
            if graph::is_filter(&node.driver) {
                let of = if open.layers.is_empty() { &mut open.filter } else { &mut open.inner_filter };
                if of.is_none() && (!open.layers.is_empty() || !graph::passes_through(&node.driver)) {
                    *of = Some(node.driver.clone());
                }
                continue;
            }
            let below = graph.file(&node.name).and_then(|file| graph.node(file)).unwrap_or(node);
            if graph::is_filter(&below.driver) {
                open.inner_filter.get_or_insert_with(|| below.driver.clone());
            }
            let behind = view.behind(below);
            if let Some(Behind::Ours(_, info)) = &behind {
                open.placeholder.clone_from(&info.detached);
                let layers = server::files(info).into_iter().map(|(file, identity)| QemuLayer {
                    node: node.clone(),
                    file: Some(file),
                    identity: Some(identity),
                });
                open.layers.extend(layers);
                open.behind = behind;
                break;
            }
            open.behind = open.behind.or(behind);
            let file = view.file(below);
            let identity = file.as_deref().and_then(|file| view.identity(file));
            open.layers.push(QemuLayer { node: node.clone(), file, identity });
        }
        open
    }

    /// Returns the server that has the images open, if that is one of ours.
    pub(super) fn server(&self) -> Option<&DiskServer> {
        match &self.behind {
            Some(Behind::Ours(server, _)) => Some(server),
            _ => None,
        }
    }
}

/// Options with which images were opened, by file.
type Options = HashMap<FileIdentity, NodeOptions>;

/// One disk that a QEMU has.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) machine: Machine,
    pub(super) view: FileView,
    pub(super) target: Target,
    /// QEMU's name of the device.
    pub(super) device: String,
    /// Speed limit of merges, in bytes a second.
    pub(super) speed: watch::Receiver<u64>,
    /// Options of its images before they were closed, and the options for any other image of it.
    options: Mutex<(Options, NodeOptions)>,
    /// Options that the command line gives for its image.
    pub(super) given: Option<ImageOptions>,
    /// True if the command line does not name its image: some of its options are not known.
    pub(super) options_unknown: bool,
    /// The server that has its images open, if QEMU itself does not.
    pub(super) server: Option<DiskServer>,
}

impl Disk {
    pub(super) fn new(
        machine: &Machine,
        view: &FileView,
        target: &Target,
        device: &str,
        speed: watch::Receiver<u64>,
        given: Option<ImageOptions>,
    ) -> Self {
        Self {
            machine: machine.clone(),
            view: view.clone(),
            target: target.clone(),
            device: device.to_owned(),
            speed,
            options: Mutex::default(),
            given,
            options_unknown: false,
            server: None,
        }
    }

    /// Returns the images that the device has open now.
    pub(super) async fn open(&self) -> crate::Result<QemuChain> {
        let graph = self.machine.graph().await?;
        Ok(self.open_in(&graph))
    }

    pub(super) fn open_in(&self, graph: &Graph) -> QemuChain {
        graph.root(&self.device).map(|root| QemuChain::read(graph, &self.view, root)).unwrap_or_default()
    }

    /// Returns the name of its placeholder, by which the disk is recognised after a crash.
    pub(super) fn placeholder(&self) -> Name {
        placeholder(&self.target)
    }

    /// Records the options of its open images.
    pub(super) fn remember(&self, open: &QemuChain) {
        let mut options = self.options.lock().unwrap_or_else(PoisonError::into_inner);
        for layer in &open.layers {
            if let Some(identity) = layer.identity {
                options.0.insert(identity, self.like(&layer.node));
            }
        }
        if let Some(root) = open.root() {
            options.1 = self.like(&root.node);
        }
    }

    /// Returns options for a node that is to behave as `node`, an image of the disk.
    pub(super) fn like(&self, node: &Node) -> NodeOptions {
        NodeOptions::like(node).and(self.given.as_ref())
    }

    /// Makes a node for an image of its chain: with the image's own previous options, or else those of the
    /// active image.
    pub(super) fn layer(&self, file: &OpenLayer, name: Name) -> Layer {
        let options = self.options.lock().unwrap_or_else(PoisonError::into_inner);
        let known = identity(file.address.path().as_std_path()).and_then(|identity| options.0.get(&identity));
        layer(file, name, known.unwrap_or(&options.1).clone())
    }
}

/// Makes a node for an image.
pub(super) fn layer(file: &OpenLayer, name: Name, options: NodeOptions) -> Layer {
    let path = file.address.path().as_std_path().to_owned();
    Layer { name, file: path, driver: file.format.clone(), backed: file.format == "qcow2", options }
}

fn placeholder(target: &Target) -> Name {
    Name::of("ph", target.as_str())
}

/// Makes a target name for a device: its id or its drive's name, or else its path in QOM. Characters that a
/// target may not have are replaced.
pub(super) fn target_name(device: &str) -> String {
    let short = device.strip_prefix("/machine/").unwrap_or(device);
    let short = short.strip_suffix("/virtio-backend").unwrap_or(short);
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+:".contains(c);
    let name: String = short.chars().map(|c| if allowed(c) { c } else { '-' }).collect();
    let name = name.trim_matches(['-', '.']).replace("--", "-");
    if name.is_empty() { "drive".to_owned() } else { name }
}

/// Returns the files of a disk's layers, as QEMU sees them.
pub(super) fn files_of(record: &DiskRecord, view: &FileView) -> Vec<FileIdentity> {
    let path = record.disk.path().as_std_path();
    let directory = path.parent().unwrap_or(Path::new(""));
    let layers = record.owned.iter().chain([&record.active]);
    let layers = layers.filter_map(|layer| view.identity(&directory.join(layer.as_str())));
    layers.chain(view.identity(path)).collect()
}

/// A criterion by which a device is recognised as a certain disk.
type Rank<'a> = &'a dyn Fn(&BlockDevice, &QemuChain) -> bool;

/// Finds the device of a disk of the domain. The criteria, strongest first: its active image is the
/// configured path; it has the disk's placeholder; one of its images is a layer of the disk; it has a
/// placeholder and the disk's name. If several devices match, the one with the disk's name is taken.
pub(super) fn device_of<'a>(
    record: &DiskRecord,
    drives: &'a [BlockDevice],
    graph: &Graph,
    view: &FileView,
) -> Option<&'a BlockDevice> {
    let disk = &record.disk;
    let path = view.identity(disk.path().as_std_path());
    let layers = files_of(record, view);
    let chains: Vec<(&BlockDevice, QemuChain)> = drives
        .iter()
        .filter(|drive| drive.guest_writes())
        .map(|drive| (drive, drive.root().map(|root| QemuChain::read(graph, view, root)).unwrap_or_default()))
        .collect();
    let is_called = |drive: &BlockDevice| {
        drive.names.iter().any(|name| *name == disk.target.as_str())
            || target_name(&drive.target) == disk.target.as_str()
    };
    let has = |open: &QemuChain, wanted: FileIdentity| open.position(wanted).is_some();
    let ranks: [Rank<'_>; 4] = [
        &|_, open| path.is_some() && open.root().is_some_and(|root| root.identity == path),
        &|_, open| open.placeholder.as_deref() == Some(placeholder(&disk.target).as_str()),
        &|_, open| layers.iter().any(|layer| has(open, *layer)),
        &|drive, open| open.placeholder.is_some() && is_called(drive),
    ];
    for rank in ranks {
        let found: Vec<_> = chains.iter().filter(|(drive, open)| rank(drive, open)).collect();
        match &found[..] {
            [] => {}
            [(drive, _)] => return Some(drive),
            several => return several.iter().map(|(drive, _)| *drive).find(|drive| is_called(drive)),
        }
    }
    None
}

/// Refuses a disk that no device has, if it may be the one of a server that is down: the guest goes on with
/// it as soon as the server is back.
pub(super) fn refuse_hidden(
    record: &DiskRecord,
    drives: &[BlockDevice],
    graph: &Graph,
    view: &FileView,
) -> crate::Result<()> {
    for drive in drives.iter().filter(|drive| drive.guest_writes()) {
        let open = drive.root().map(|root| QemuChain::read(graph, view, root)).unwrap_or_default();
        if let Some(Behind::Unknown { why, is_down: true }) = open.behind {
            let detail = format!("it may be the disk of the drive {}: {why}", target_name(&drive.target));
            let attempted = "looking for the disks of the running domain";
            let error = crate::Error::new(crate::ErrorKind::Refused, attempted, record.disk.path(), detail);
            return Err(error.advise(format!(
                "start the server (`domsnap disk serve {},format={} --socket SOCKET`), and repeat the command",
                record.disk.path(),
                record.disk.format
            )));
        }
    }
    Ok(())
}

#[async_trait]
impl AttachedDisk for Disk {
    async fn open_files(&self) -> Result<HashSet<FileIdentity>> {
        let graph = self.machine.graph().await.map_err(to_engine)?;
        let open = self.open_in(&graph);
        let named: Vec<FileIdentity> = open.layers.iter().filter_map(|layer| layer.identity).collect();
        let mut files: HashSet<FileIdentity> = named.iter().copied().collect();
        if self.server.is_some() {
            if let Some(Behind::Unknown { why, .. }) = open.behind {
                let detail = format!("disk {}: {why}", self.target);
                return Err(Error::new(ErrorKind::Io, detail));
            }
            return Ok(files);
        }
        if files.len() < open.layers.len() {
            // A frozen image may still have the configured path as its name. Its file is one that QEMU has
            // open and no node names.
            let open = self.view.open_images().unwrap_or_default();
            files.extend(self.view.unnamed(&graph, open).into_keys());
        }
        Ok(files)
    }

    async fn merge(
        &self,
        merge: &AttachedMerge,
        inside: &dyn Inside,
        progress: &dyn Progress,
        cancel: &CancellationToken,
    ) -> Result<()> {
        merge::merge(self, merge, inside, progress, cancel).await
    }

    fn is_served(&self) -> bool {
        self.server.is_some()
    }

    async fn drop_internal(&self, tags: &[String]) -> Result<()> {
        for tag in tags {
            graph::delete_internal(&self.machine, &self.device, tag).await.map_err(to_engine)?;
        }
        Ok(())
    }
}

/// Creates the channel for the speed limit of merges, shared by all disks of a domain.
pub(super) fn speed() -> (Arc<watch::Sender<u64>>, watch::Receiver<u64>) {
    let (sender, receiver) = watch::channel(0);
    (Arc::new(sender), receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_device_has_a_name_that_is_a_target() {
        for (device, name) in [
            ("vda", "vda"),
            ("drive-virtio-disk0", "drive-virtio-disk0"),
            ("/machine/peripheral-anon/device[1]/virtio-backend", "peripheral-anon-device-1"),
            ("/machine/unattached/device[22]", "unattached-device-22"),
            ("#", "drive"),
        ] {
            assert_eq!(target_name(device), name);
            Target::new(target_name(device)).expect("a target");
        }
    }
}
