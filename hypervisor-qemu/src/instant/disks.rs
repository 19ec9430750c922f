//! The disks of a cut: one transaction, and its undo.

use serde_json::{Value, json};

use crate::{
    error::{Error, ErrorKind, Result},
    graph::{self, Graph},
    machine::Machine,
    name::Name,
};

/// The action on one disk at the cut.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum DiskCut {
    /// Its active image is frozen; the guest writes to an overlay that [`graph::add_overlay`] has opened.
    Overlay {
        /// The device: its id, its drive's name, or its topmost node.
        device: String,
        /// The overlay's node.
        overlay: Name,
    },
    /// Its active image gets an internal snapshot, without VM state.
    Internal {
        /// The device.
        device: String,
        /// The snapshot's name.
        tag: String,
    },
}

impl DiskCut {
    /// Returns the device.
    pub fn device(&self) -> &str {
        match self {
            Self::Overlay { device, .. } | Self::Internal { device, .. } => device,
        }
    }
}

/// The disks of a cut, with their nodes.
#[derive(Debug)]
pub(super) struct Disks {
    all: Vec<(DiskCut, String)>,
    /// The node to name in the command of each internal snapshot.
    tops: Vec<String>,
}

impl Disks {
    /// Finds the nodes. Changes nothing.
    pub(super) async fn find(machine: &Machine, disks: Vec<DiskCut>) -> Result<Self> {
        let attempted = "preparing the cut";
        let graph = machine.graph().await?;
        let mut all: Vec<(DiskCut, String)> = Vec::new();
        for disk in disks {
            let subject = disk.device().to_owned();
            let invalid = |detail: String| Error::new(ErrorKind::Invalid, attempted, &subject, detail);
            let root = graph.root(disk.device());
            let root = root.ok_or_else(|| invalid("QEMU has no such device or node".to_owned()))?.to_owned();
            if all.iter().any(|(_, other)| *other == root) {
                return Err(invalid("it is named twice".to_owned()));
            }
            match &disk {
                DiskCut::Overlay { overlay, .. } => {
                    graph.expect(attempted, overlay.as_str())?;
                    if let Some(user) = graph.users(overlay.as_str()).next() {
                        return Err(invalid(format!("the overlay {overlay} is used by {}", user.parent)));
                    }
                    if graph.backing(overlay.as_str()).is_some() {
                        return Err(invalid(format!("the overlay {overlay} has a backing image already")));
                    }
                }
                DiskCut::Internal { tag, .. } => {
                    // QEMU would give a second snapshot the same name.
                    let snapshots =
                        graph.node(&root).map(|node| node.snapshots.as_slice()).unwrap_or_default();
                    if snapshots.iter().any(|found| found.name == *tag) {
                        return Err(invalid(format!("its image has a snapshot {tag:?} already")));
                    }
                }
            }
            all.push((disk, root));
        }
        let tops = all.iter().map(|(_, root)| graph.top_of(root).to_owned()).collect();
        Ok(Self { all, tops })
    }

    /// Cuts all of them, or none.
    pub(super) async fn cut(&self, machine: &Machine) -> Result<()> {
        if self.all.is_empty() {
            return Ok(());
        }
        let action = |((disk, root), top): (&(DiskCut, String), &String)| match disk {
            DiskCut::Overlay { overlay, .. } => json!({ "type": "blockdev-snapshot",
                "data": { "node": root, "overlay": overlay.as_str() } }),
            DiskCut::Internal { tag, .. } => json!({ "type": "blockdev-snapshot-internal-sync",
                "data": { "device": top, "name": tag } }),
        };
        let actions: Vec<Value> = self.all.iter().zip(&self.tops).map(action).collect();
        let devices: Vec<_> = self.all.iter().map(|(disk, _)| disk.device()).collect();
        let subject = devices.join(", ");
        machine
            .run("cutting the disks", &subject, "transaction", json!({ "actions": actions }))
            .await
            .map(drop)
    }

    /// Returns true if the transaction has happened, judged by the nodes on top: used if its reply did not
    /// come. (QEMU runs commands one after another: when it answers this, the transaction is over.)
    async fn has_happened(&self, machine: &Machine) -> Result<bool> {
        let graph = Graph::read(machine).await?;
        Ok(self.all.iter().any(|(disk, root)| match disk {
            DiskCut::Overlay { overlay, .. } => graph.backing(overlay.as_str()) == Some(root),
            DiskCut::Internal { tag, .. } => {
                graph.node(root).is_some_and(|node| node.snapshots.iter().any(|found| found.name == *tag))
            }
        }))
    }

    /// Restores the disks, whether or not the transaction happened, and closes the overlays. Reports what it
    /// could not undo.
    pub(super) async fn undo(&self, machine: &Machine) -> std::result::Result<(), String> {
        let mut wrong = Vec::new();
        match self.has_happened(machine).await {
            Ok(true) => {
                for (disk, root) in &self.all {
                    let undone = match disk {
                        DiskCut::Overlay { overlay, .. } => graph::fold(machine, overlay.as_str()).await,
                        DiskCut::Internal { tag, .. } => {
                            graph::delete_internal(machine, root, tag).await.map(drop)
                        }
                    };
                    if let Err(error) = undone {
                        wrong.push(format!("{} is not as before ({error})", disk.device()));
                    }
                }
            }
            Ok(false) => {
                let overlays = self.all.iter().filter_map(|(disk, _)| match disk {
                    DiskCut::Overlay { overlay, .. } => Some(overlay.to_string()),
                    DiskCut::Internal { .. } => None,
                });
                match graph::remove_layers(machine, &overlays.collect::<Vec<_>>()).await {
                    Ok(left) if left.is_empty() => {}
                    Ok(left) => wrong.push(format!("the nodes {} are left", left.join(", "))),
                    Err(error) => wrong.push(format!("the overlays' nodes may be left ({error})")),
                }
            }
            Err(error) => wrong.push(format!("whether the disks were cut is not known ({error})")),
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong.join("; ")) }
    }
}
