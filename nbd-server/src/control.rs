//! The control socket: one JSON document a line in each direction.
//!
//! | request | answer |
//! |---|---|
//! | `{"do":"info"}` | [`ControlInfo`] |
//! | `{"do":"flush"}` | `{}` |
//! | `{"do":"hold","seconds":N}` | `{"hold":NUMBER}`: no request runs until `go`, or for N seconds |
//! | `{"do":"go","hold":NUMBER}` | `{}` |
//! | `{"do":"prepare","image":PATH}` | `{}`: the image of the next `swap` is opened, locked and checked |
//! | `{"do":"forget"}` | `{}`: what was prepared is closed |
//! | `{"do":"swap","image":PATH}` | `{"generation":N}` |
//! | `{"do":"detach","label":TEXT}` | `{"generation":N}`: the image is closed; requests wait |
//! | `{"do":"attach","image":PATH}` | `{"generation":N}` |
//! | `{"do":"snapshot","child":PATH,"id":TEXT}` | `{"generation":N}` |
//! | `{"do":"merge","run":[PATH, ...],"into":PATH,"rate":BYTES}` | `{}`: it begins; [`ControlInfo::merge`] |
//! | `{"do":"pivot"}` | `{}`: the merge of the top, which is ready, is done |
//! | `{"do":"limit","rate":BYTES}` | `{}`: the merge that is on its way has this limit from now on |
//! | `{"do":"cancel-merge"}` | `{}` |
//! | `{"do":"lend","image":PATH}` | `{}`: the image is closed, for as long as this connection lasts |
//! | `{"do":"give-back"}` | `{"generation":N}`: PATH is opened; the disk is no longer lent |
//!
//! `swap` and `snapshot` take the number of the caller's hold as `hold`. `swap`, `snapshot` and
//! `attach` can be repeated: if the image is served already, nothing happens. So can `detach`. An answer is
//! `{"ok":...}` or `{"error":{"kind":...,"message":...}}`. Only this user and root are answered.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use camino::{Utf8Path, Utf8PathBuf};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use crate::disk::MAX_HOLD;
use crate::disk::{Disk, Look, file_at};
use crate::error::{Error, ErrorKind, Result};
use crate::image::{Format, Layer, MergeRequest, Served};
use crate::loan::lend;
use crate::merge::{MergeInfo, Merges};
use crate::sys::peer_of;

/// Bytes of a request.
pub(crate) const MAX_LINE: u64 = 4 << 10;
/// Bytes of an answer that [`ask`] accepts.
const MAX_ANSWER: u64 = 4 << 20;
/// A connection without a request for so long is closed.
const IDLE: Duration = Duration::from_secs(60);

/// A request.
#[derive(Deserialize, Debug)]
#[serde(tag = "do", rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum ControlRequest {
    Info {},
    Flush {},
    Hold { seconds: Option<u64> },
    Go { hold: u64 },
    Prepare { image: Utf8PathBuf },
    Forget {},
    Swap { image: Utf8PathBuf, hold: Option<u64> },
    Detach { label: String },
    Attach { image: Utf8PathBuf },
    Snapshot { child: Utf8PathBuf, id: String, hold: Option<u64> },
    Merge { run: Vec<Utf8PathBuf>, into: Utf8PathBuf, rate: Option<u64> },
    Pivot {},
    Limit { rate: u64 },
    CancelMerge {},
    Lend { image: Utf8PathBuf },
    GiveBack {},
}

/// The state of a server.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ControlInfo {
    /// The version of the control protocol: 1.
    pub version: u32,
    /// The process of the server.
    pub pid: u32,
    /// The path of the image; while the disk is detached, that of the previous one.
    pub image: Utf8PathBuf,
    /// Its format.
    pub format: String,
    /// The snapshot that is served, if it is not the current state.
    pub snapshot: Option<String>,
    /// The files of its chain, the top first; none while the disk is detached.
    pub layers: Vec<Layer>,
    /// While the disk is detached: the label that the caller gave.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detached: Option<String>,
    /// Bytes of the disk.
    pub size: u64,
    /// True if the disk cannot be written.
    pub read_only: bool,
    /// Counts the images that were served; 1 is the first.
    pub generation: u64,
    /// True while requests are held.
    pub held: bool,
    /// True if the server knows `prepare` and `forget`.
    #[serde(default)]
    pub prepares: bool,
    /// True if the server knows `lend`.
    #[serde(default)]
    pub lends: bool,
    /// The image that is ready for the next exchange.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepared: Option<Utf8PathBuf>,
    /// The merge that is on its way, or the last one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merge: Option<MergeInfo>,
    /// The client, if there is one.
    pub client: Option<ClientInfo>,
}

/// The program that uses the disk.
#[derive(Serialize, Deserialize, Debug, Clone, PartialEq, Eq)]
pub struct ClientInfo {
    /// Its process, if it is known.
    pub pid: Option<i32>,
}

/// Answers one connection until it ends.
pub(crate) fn converse(
    stream: &UnixStream,
    disk: &Arc<Disk>,
    merges: &Arc<Merges>,
    format: &dyn Format,
) -> std::io::Result<()> {
    let peer = peer_of(stream.as_fd())?;
    let own = rustix::process::geteuid().as_raw();
    stream.set_read_timeout(Some(IDLE))?;
    stream.set_write_timeout(Some(IDLE))?;
    let mut outgoing = stream;
    if peer.uid != own && peer.uid != 0 {
        let error = Error::new(ErrorKind::Refused, "the control socket is for its server's user and root");
        return outgoing.write_all(&line(&answer(Err(error))));
    }
    let mut incoming = BufReader::new(stream);
    loop {
        let mut request = Vec::new();
        let read = (&mut incoming).take(MAX_LINE).read_until(b'\n', &mut request)?;
        if read == 0 {
            return Ok(());
        }
        if request.pop() != Some(b'\n') {
            // Either it is too long or the connection ended inside of it.
            let error = Error::new(ErrorKind::Invalid, "a request is one line of at most 4096 bytes");
            return outgoing.write_all(&line(&answer(Err(error))));
        }
        let outcome = match parse(&request) {
            Ok(ControlRequest::Lend { image }) => match lend(&image, peer.pid, disk, merges, format) {
                Ok(lent) => {
                    // An operation of the borrower may take hours.
                    stream.set_read_timeout(None)?;
                    let answered = lent.last(&mut incoming, outgoing);
                    stream.set_read_timeout(Some(IDLE))?;
                    answered?
                }
                Err(error) => Err(error),
            },
            Ok(request) => carry_out(request, disk, merges, format),
            Err(error) => Err(error),
        };
        outgoing.write_all(&line(&answer(outcome)))?;
    }
}

/// Reads a request.
pub(crate) fn parse(line: &[u8]) -> Result<ControlRequest> {
    serde_json::from_slice(line)
        .map_err(|error| Error::new(ErrorKind::Invalid, format!("not a request: {error}")))
}

fn carry_out(
    request: ControlRequest,
    disk: &Arc<Disk>,
    merges: &Arc<Merges>,
    format: &dyn Format,
) -> Result<Value> {
    match request {
        ControlRequest::Info {} => serde_json::to_value(info(disk.look(), merges))
            .map_err(|error| Error::new(ErrorKind::Invalid, error.to_string())),
        ControlRequest::Flush {} => disk.flush().map(|()| json!({})),
        ControlRequest::Hold { seconds } => {
            let time = seconds.map_or(MAX_HOLD, Duration::from_secs);
            disk.hold(time).map(|number| json!({ "hold": number }))
        }
        ControlRequest::Go { hold } => disk.go(hold).map(|()| json!({})),
        ControlRequest::Prepare { image } => {
            require_absolute(&image)?;
            let _none = merges.none()?;
            if !disk.look().served.is_some_and(|served| is_served(&served, &image)) {
                disk.prepare(&image, |current| format.prepare(current, &image))?;
            }
            Ok(json!({}))
        }
        ControlRequest::Forget {} => {
            disk.forget();
            Ok(json!({}))
        }
        ControlRequest::Swap { image, hold } => {
            require_absolute(&image)?;
            let _none = merges.none()?;
            exchange(disk, hold, &image, |_| match disk.take_prepared(&image) {
                Some(ready) => ready.serve(),
                None => format.open(&image),
            })
        }
        ControlRequest::Detach { label } => {
            let _none = merges.none()?;
            disk.detach(&label, || format.close()).map(|generation| json!({ "generation": generation }))
        }
        ControlRequest::Attach { image } => {
            require_absolute(&image)?;
            let look = disk.look();
            let is_there = look.served.is_some_and(|served| is_served(&served, &image));
            let generation = match is_there {
                true => look.generation,
                false => disk.attach(|| format.open(&image))?,
            };
            Ok(json!({ "generation": generation }))
        }
        ControlRequest::Snapshot { child, id, hold } => {
            require_absolute(&child)?;
            let _none = merges.none()?;
            if !disk.look().served.is_some_and(|served| is_served(&served, &child)) {
                // No file is made for an exchange that cannot begin.
                disk.may_exchange(hold)?;
                disk.prepare(&child, |current| format.prepare_child(current, &child, &id).map(Some))?;
            }
            exchange(disk, hold, &child, |_| match disk.take_prepared(&child) {
                Some(ready) => ready.serve(),
                None => Err(Error::new(ErrorKind::Busy, "another exchange was faster")),
            })
        }
        ControlRequest::Merge { run, into, rate } => {
            run.iter().chain([&into]).try_for_each(|path| require_absolute(path))?;
            merges.begin(disk, format, MergeRequest { run, into }, rate.unwrap_or(0)).map(|()| json!({}))
        }
        ControlRequest::Pivot {} => merges.pivot().map(|()| json!({})),
        ControlRequest::Limit { rate } => {
            merges.limit(rate);
            Ok(json!({}))
        }
        ControlRequest::CancelMerge {} => merges.cancel().map(|()| json!({})),
        // A loan is its connection's: `converse` has both.
        ControlRequest::Lend { .. } | ControlRequest::GiveBack {} => {
            Err(Error::new(ErrorKind::Refused, "this connection has not borrowed the disk"))
        }
    }
}

/// Exchanges the image for `wanted`, unless it is served already.
fn exchange(
    disk: &Disk,
    hold: Option<u64>,
    wanted: &Utf8Path,
    open: impl FnOnce(&Served) -> Result<Served>,
) -> Result<Value> {
    let look = disk.look();
    let generation = match look.served.is_some_and(|served| is_served(&served, wanted)) {
        true => look.generation,
        false => disk.exchange(hold, open)?,
    };
    Ok(json!({ "generation": generation }))
}

/// Returns true if the file `wanted` is the top layer of what is served. A name may lead to another file by
/// now, so the file's identity decides.
pub(crate) fn is_served(served: &Served, wanted: &Utf8Path) -> bool {
    let top = served.layers.first().map(|layer| (layer.device, layer.inode));
    top.is_some() && file_at(wanted) == top
}

pub(crate) fn require_absolute(path: &Utf8Path) -> Result<()> {
    match path.is_absolute() {
        true => Ok(()),
        false => Err(Error::new(ErrorKind::Invalid, format!("{path} is not an absolute path"))),
    }
}

fn info(look: Look, merges: &Merges) -> ControlInfo {
    let Look { served, export, path, format, detached, generation, is_held, prepared, client } = look;
    ControlInfo {
        version: 1,
        pid: std::process::id(),
        size: export.size,
        read_only: export.read_only,
        image: path,
        format,
        snapshot: served.as_ref().and_then(|served| served.snapshot.clone()),
        layers: served.map(|served| served.layers.clone()).unwrap_or_default(),
        detached,
        generation,
        held: is_held,
        prepares: true,
        lends: true,
        prepared,
        merge: merges.info(),
        client: client.map(|pid| ClientInfo { pid: (pid != 0).then_some(pid) }),
    }
}

pub(crate) fn answer(outcome: Result<Value>) -> Value {
    match outcome {
        Ok(value) => json!({ "ok": value }),
        Err(error) => {
            json!({ "error": { "kind": error.kind(), "message": error.to_string(), "advice": error.advice() } })
        }
    }
}

pub(crate) fn line(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

/// Sends a request to the control socket at `path`, and returns the answer's content. Waits `patience` for
/// each part of it.
///
/// # Errors
/// The server's error; the system's; [`ErrorKind::Invalid`] for what is no answer; [`ErrorKind::Refused`] for
/// the server of a user who is neither root nor this one.
pub fn ask(path: &Utf8Path, request: &Value, patience: Duration) -> Result<Value> {
    ask_on(&connect(path, patience)?, path, request)
}

/// Connects to the control socket at `path`. A server of another user than this one and root is refused.
pub(crate) fn connect(path: &Utf8Path, patience: Duration) -> Result<UnixStream> {
    let failed = |error| Error::io(format!("cannot ask {path}"), error);
    let stream = UnixStream::connect(path).map_err(failed)?;
    // Every user can listen in a directory of their own. systemd, which may have made the socket, is root.
    let peer = peer_of(stream.as_fd()).map_err(failed)?;
    if peer.uid != 0 && peer.uid != rustix::process::geteuid().as_raw() {
        return Err(Error::new(
            ErrorKind::Refused,
            format!("{path} is the socket of user {}, who is neither root nor this user", peer.uid),
        )
        .advise("run the command as the user of the server"));
    }
    stream.set_read_timeout(Some(patience)).map_err(failed)?;
    stream.set_write_timeout(Some(patience)).map_err(failed)?;
    Ok(stream)
}

/// Sends one request on a connection to the control socket at `path`, and reads its answer.
pub(crate) fn ask_on(mut stream: &UnixStream, path: &Utf8Path, request: &Value) -> Result<Value> {
    let failed = |error| Error::io(format!("cannot ask {path}"), error);
    stream.write_all(&line(request)).map_err(failed)?;
    let mut bytes = Vec::new();
    BufReader::new(stream).take(MAX_ANSWER).read_until(b'\n', &mut bytes).map_err(failed)?;
    #[derive(Deserialize)]
    #[serde(rename_all = "kebab-case")]
    enum Answer {
        Ok(Value),
        Error { kind: ErrorKind, message: String, advice: Option<String> },
    }
    match serde_json::from_slice(&bytes) {
        Ok(Answer::Ok(value)) => Ok(value),
        Ok(Answer::Error { kind, message, advice }) => {
            let error = Error::new(kind, message);
            Err(match advice {
                Some(advice) => error.advise(advice),
                None => error,
            })
        }
        Err(error) => {
            Err(Error::new(ErrorKind::Invalid, format!("{path} does not answer as a server: {error}")))
        }
    }
}
