//! A disk that a `domsnap disk serve` serves to QEMU: the server behind a node of QEMU's NBD driver.
//!
//! QEMU knows the socket alone. The server, asked at its control socket, says which files it has open, by
//! their identities. A name is never trusted: the socket must be of this user or of root, the server's client
//! must be this QEMU, and the files are compared with those of the catalogue.
//!
//! What QEMU does to the images that it has open, the server does to these, while the guest is paused as for
//! QEMU's own: it goes on in an overlay, closes the chain and opens another one, merges layers. The node in
//! QEMU and its connection stay.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use camino::{Utf8Path, Utf8PathBuf};
use nbd_server::{ControlInfo, MergeRequest, control_path};
use serde_json::{Value, json};
use snapcore::{Error, ErrorKind, FileIdentity, Result, file_identity};

use crate::graph::Node;

/// A server that looks at its own state answers at once.
const SOON: Duration = Duration::from_secs(5);

/// A server waits 10 seconds at most for the requests on their way, and then opens and flushes images.
const PATIENCE: Duration = Duration::from_secs(60);

/// The server of a disk, by its control socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskServer {
    control: Utf8PathBuf,
}

/// What is behind a node of QEMU's NBD driver.
#[derive(Debug, Clone)]
pub(crate) enum Behind {
    /// A server of ours, which answers.
    Ours(DiskServer, Box<ControlInfo>),
    /// Something else, or a server that does not answer. The text is the reason why the disk is left out.
    Unknown {
        /// The reason.
        why: String,
        /// True if it may be a server of ours that is down.
        is_down: bool,
    },
}

impl Behind {
    /// Asks who is behind `node`. `None` if it is not a node of the NBD driver. `absolute` completes QEMU's
    /// relative names, and `client` is QEMU's process.
    pub(crate) fn ask(
        node: &Node,
        absolute: impl FnOnce(&str) -> PathBuf,
        client: Option<u32>,
    ) -> Option<Self> {
        if node.driver != "nbd" {
            return None;
        }
        let unknown = |why: String, is_down| Some(Self::Unknown { why, is_down });
        let Some(socket) = socket_of(&node.file) else {
            return unknown(
                format!("it is served over the network ({}), by a server that cannot be asked", node.file),
                false,
            );
        };
        let Ok(socket) = Utf8PathBuf::from_path_buf(absolute(&socket)) else {
            return unknown("the path of its server's socket is not UTF-8".to_owned(), false);
        };
        let server = DiskServer { control: control_path(&socket) };
        if !exists(&server.control) {
            let serve = format!("serve its image with `domsnap disk serve IMAGE --socket {socket}`");
            return match exists(&socket) {
                true => unknown(
                    format!("it is served by another program than domsnap, at {socket}: {serve}"),
                    false,
                ),
                false => unknown(format!("there is no server at {socket}: {serve}"), true),
            };
        }
        let info = match server.info() {
            Ok(info) => info,
            Err(error) => {
                return unknown(
                    format!("its server does not answer ({error}): start it again, at the same socket"),
                    true,
                );
            }
        };
        let other =
            info.client.as_ref().and_then(|client| client.pid).and_then(|pid| u32::try_from(pid).ok());
        match (other, client) {
            (Some(other), Some(client)) if other != client => unknown(
                format!("its server at {socket} serves process {other}, and not this QEMU ({client})"),
                false,
            ),
            _ => Some(Self::Ours(server, Box::new(info))),
        }
    }
}

fn exists(path: &Utf8Path) -> bool {
    path.symlink_metadata().is_ok()
}

/// Returns the unix socket in QEMU's name of an NBD node.
pub(crate) fn socket_of(file: &str) -> Option<String> {
    if let Some(text) = file.strip_prefix("json:") {
        let options: Value = serde_json::from_str(text).ok()?;
        let nested = options["server"]["path"].as_str();
        return nested.or_else(|| options["server.path"].as_str()).map(str::to_owned);
    }
    // QEMU does not escape the path.
    let (_, socket) = file.strip_prefix("nbd+unix://")?.split_once("?socket=")?;
    Some(socket.to_owned())
}

/// Returns the identities of the files that a server has open, the top first.
pub(crate) fn files(info: &ControlInfo) -> Vec<(PathBuf, FileIdentity)> {
    let layers = info.layers.iter().map(|layer| {
        let opened = (layer.device, layer.inode);
        // A block device is known by its number.
        let device = layer.file.metadata().ok().filter(|about| {
            use std::os::unix::fs::MetadataExt;
            (about.dev(), about.ino()) == opened
        });
        let identity = device.map_or(opened, |about| file_identity(&about));
        (layer.file.clone().into_std_path_buf(), identity)
    });
    layers.collect()
}

impl DiskServer {
    /// Returns its state.
    ///
    /// # Errors
    /// [`ErrorKind::Io`] if it does not answer; [`ErrorKind::Refused`] if it is not this user's.
    pub(crate) fn info(&self) -> Result<ControlInfo> {
        let answer = self.ask(&json!({ "do": "info" }), SOON)?;
        let info: ControlInfo = serde_json::from_value(answer).map_err(|error| {
            Error::new(
                ErrorKind::Unsupported,
                format!("the server at {} is of another version", self.control),
            )
            .because(error)
            .advise("restart it: with reconnect-delay its guest waits meanwhile")
        })?;
        match info.version {
            1 => Ok(info),
            other => Err(Error::new(
                ErrorKind::Unsupported,
                format!("the server at {} speaks version {other} of the control protocol", self.control),
            )),
        }
    }

    /// Opens `image` ahead of a [`DiskServer::swap`] to it, while the guest runs.
    pub(crate) async fn prepare(&self, image: &Path) -> Result<()> {
        self.send(json!({ "do": "prepare", "image": image })).await
    }

    /// Closes what was prepared, if there is something.
    pub(crate) async fn forget(&self) -> Result<()> {
        self.send(json!({ "do": "forget" })).await
    }

    /// Makes the server go on in `image`, which shows what its image shows now.
    pub(crate) async fn swap(&self, image: &Path) -> Result<()> {
        self.send(json!({ "do": "swap", "image": image })).await
    }

    /// Closes the images of the disk. Its requests wait until [`DiskServer::attach`].
    pub(crate) async fn detach(&self, label: &str) -> Result<()> {
        self.send(json!({ "do": "detach", "label": label })).await
    }

    /// Opens the chain of `image` for a disk that was detached.
    pub(crate) async fn attach(&self, image: &Path) -> Result<()> {
        self.send(json!({ "do": "attach", "image": image })).await
    }

    /// Begins a merge of layers, at most `rate` bytes a second if that is not 0. The same one again changes
    /// nothing.
    pub(crate) async fn begin_merge(&self, request: &MergeRequest, rate: u64) -> Result<()> {
        self.send(json!({ "do": "merge", "run": request.run, "into": request.into, "rate": rate })).await
    }

    /// Gives the merge that is on its way another limit, in bytes a second; 0 is none.
    pub(crate) async fn limit_merge(&self, rate: u64) -> Result<()> {
        self.send(json!({ "do": "limit", "rate": rate })).await
    }

    /// Ends a merge that waits for its pivot.
    pub(crate) async fn pivot(&self) -> Result<()> {
        self.send(json!({ "do": "pivot" })).await
    }

    /// Cancels the merge, if one is on its way.
    pub(crate) async fn cancel_merge(&self) -> Result<()> {
        self.send(json!({ "do": "cancel-merge" })).await
    }

    /// Sends a request whose answer does not matter.
    async fn send(&self, request: Value) -> Result<()> {
        let server = self.clone();
        let sent = tokio::task::spawn_blocking(move || server.ask(&request, PATIENCE).map(drop));
        sent.await.unwrap_or_else(|error| {
            Err(Error::new(ErrorKind::Internal, "a thread that asked a server ended").because(error))
        })
    }

    fn ask(&self, request: &Value, patience: Duration) -> Result<Value> {
        nbd_server::ask(&self.control, request, patience).map_err(|error| {
            use nbd_server::ErrorKind as Kind;
            let kind = match error.kind() {
                Kind::Busy => ErrorKind::Busy,
                Kind::Unsupported => ErrorKind::Unsupported,
                Kind::Refused | Kind::Invalid => ErrorKind::Refused,
                Kind::Cancelled => ErrorKind::Cancelled,
                _ => ErrorKind::Io,
            };
            let advice = error.advice().map(str::to_owned);
            let text = error.to_string();
            let about = match text.contains(self.control.as_str()) {
                true => text,
                false => format!("the server at {}: {text}", self.control),
            };
            let mapped = Error::new(kind, about);
            mapped.advise(advice.unwrap_or_else(|| {
                "start the server again if it is down (`domsnap disk serve`), then run `domsnap recover`"
                    .to_owned()
            }))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The socket is found in each form of QEMU's name; a server on the network has none.
    #[test]
    fn socket_is_found_in_each_form_of_the_name() {
        for (file, socket) in [
            ("nbd+unix:///?socket=/run/a b.sock", Some("/run/a b.sock")),
            ("nbd+unix:///export?socket=s", Some("s")),
            (r#"json:{"driver":"nbd","server":{"type":"unix","path":"/s"}}"#, Some("/s")),
            (r#"json:{"driver":"nbd","server.type":"unix","server.path":"/s"}"#, Some("/s")),
            ("nbd://127.0.0.1:10809", None),
            (r#"json:{"driver":"nbd","server":{"type":"inet","host":"h","port":"1"}}"#, None),
        ] {
            assert_eq!(socket_of(file).as_deref(), socket, "{file}");
        }
    }
}
