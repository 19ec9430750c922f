//! `domsnap disk serve`: one image over NBD, in a process of its own, for as long as that lives. `domsnap
//! serve`: the disks of a snapshot (`snapshot.rs`). `domsnap mount`: what is in them (`mount.rs`).
//!
//! The process holds the image's locks. A snapshot that it serves gets a hold, which ends with the process.
//! It changes nothing else of the catalogue. What only the service knows is asked of it before: whether a
//! running domain has the image open, whether it is a frozen layer, whether other images are backed by it.

mod held;
pub mod mount;
mod point;
mod raw;
mod read_only;
pub mod snapshot;
mod vhd;

use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use nbd_server::{Activation, Format, Place, Running, Served, Server, control_path, report_ready};
use snapcore::{Error, ErrorKind, Result};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use crate::answer::{self, Answer};
use crate::args::Serve;
use crate::documents::DiskServeDoc;
use crate::failure::Failure;
use crate::session::Session;
use crate::units;

/// The format of an image that is given by its path alone.
const DEFAULT_FORMAT: &str = "qcow2";

/// Serves the image until SIGTERM or SIGINT.
pub fn run(session: &Session, serve: Serve) -> Result<Answer, Failure> {
    let socket = camino::absolute_utf8(&serve.socket).map_err(|cause| {
        Error::new(ErrorKind::Usage, "the socket's path cannot be made absolute").because(cause)
    })?;
    let passed = Activation::take(&socket).map_err(of_server)?;
    let image = serve.image.file()?;
    let format = serve.image.format.as_deref().unwrap_or(DEFAULT_FORMAT);
    // Before the image is opened: then a delete finds either the hold or no server.
    let held = serve.at.as_ref().and_then(|name| held::Served::hold(session, &image, name));
    let served = serve_image(session, &serve, image, format, passed, &socket);
    if let Some(held) = held {
        held.release(session);
    }
    served
}

/// Opens the image, and serves it until SIGTERM or SIGINT.
fn serve_image(
    session: &Session,
    serve: &Serve,
    image: Utf8PathBuf,
    format: &str,
    passed: Activation,
    socket: &Utf8Path,
) -> Result<Answer, Failure> {
    let (served, formats) = open(session, &image, format, serve)?;
    let document = DiskServeDoc {
        image,
        format: served.format.clone(),
        snapshot: served.snapshot.clone(),
        virtual_size: served.image.size(),
        read_only: served.image.is_read_only(),
        socket: socket.to_owned(),
        control: control_path(socket),
    };
    // A failure before this point leaves no socket, and one after it removes both.
    let place = |passed: Option<Place>, path: &Utf8Path| match passed {
        Some(place) => Ok(place),
        None => Place::create(path).map_err(of_server),
    };
    let disk = place(passed.disk, socket)?;
    let control = place(passed.control, &document.control)?;
    until_the_end(|| {
        let running = Server::new(served, formats).start(disk, control).map_err(of_server)?;
        answer::print(&session.changed(document, reported).text);
        report_ready()
            .map_err(|cause| Error::new(ErrorKind::Io, "systemd cannot be notified").because(cause))?;
        Ok(vec![running])
    })?;
    Ok(Answer::text(""))
}

fn reported(document: &DiskServeDoc) -> String {
    let DiskServeDoc { image, format, snapshot, virtual_size, read_only, socket, control } = document;
    let size = units::bytes(*virtual_size);
    let at = snapshot.as_ref().map_or_else(String::new, |name| format!(" at {name}"));
    let how = if *read_only { ", read-only" } else { "" };
    format!("serving {image}{at} ({format}, {size}{how}) at {socket}\ncontrol socket: {control}\n")
}

/// What is served, and what opens other images for the control socket.
type Opened = (Served, Box<dyn Format>);

/// Opens what is to be served.
fn open(session: &Session, image: &Utf8Path, format: &str, serve: &Serve) -> Result<Opened, Failure> {
    let fixed = |served: Served| -> Opened {
        let format = served.format.clone();
        (served, Box::new(raw::Swapped { read_only: true, format }))
    };
    if !matches!(format, "raw" | "qcow2" | "vhd") {
        return Err(Error::new(ErrorKind::Unsupported, format!("{image} is given as format {format}"))
            .advise("formats that can be served: raw, qcow2 and vhd")
            .into());
    }
    if let Some(name) = &serve.at {
        return Ok(fixed(point::at(session, image, format, name)?));
    }
    if format == "qcow2" {
        // Opened first: the error for a file that is no qcow2 image says what it may be.
        let served = point::current(session, image, format)?;
        if serve.read_only {
            return Ok(fixed(served));
        }
        return Err(Error::new(
            ErrorKind::Unsupported,
            format!("{image} is a qcow2 image, and those are served read-only"),
        )
        .advise("add --read-only or --at SNAPSHOT; QEMU and qemu-nbd write qcow2 images themselves")
        .into());
    }
    if !serve.read_only {
        require_writable(session, image)?;
    }
    if format == "vhd" {
        let formats = vhd::VhdFormat::new(&session.global, serve.read_only)?;
        return Ok((formats.open_chain(image)?, Box::new(formats)));
    }
    let swapped = raw::Swapped { read_only: serve.read_only, format: format.to_owned() };
    Ok((raw::open(image, serve.read_only)?, Box::new(swapped)))
}

/// Refuses to write an image that a running domain has open, that is a frozen layer, or that backs others.
pub(super) fn require_writable(session: &Session, image: &Utf8Path) -> Result<(), Failure> {
    session.ask(session.service.require_closed(image))?;
    let owner = session.ask(session.service.belonging(image))?;
    // After a crash in the middle of an operation, the configured path names the image that the domain
    // writes, whatever the catalogue has. Its server must start before the recovery: the guest waits for it,
    // and the recovery asks it.
    let of_path = owner.as_ref().is_some_and(|owner| {
        let record = owner.listing.domain.disk(&owner.target);
        let configured = record.and_then(|record| record.disk.address.local());
        !owner.listing.unfinished.is_empty() && configured == Some(image)
    });
    if of_path {
        return Ok(());
    }
    if let Some(owner) = owner
        && !owner.is_active()
    {
        let message = format!(
            "{image} is a frozen layer of disk {} of domain {}",
            owner.target, owner.listing.domain.name
        );
        return Err(Error::new(ErrorKind::Refused, message).advise("serve it with --read-only").into());
    }
    match session.ask(session.service.backed_by(image))?.first() {
        None => Ok(()),
        Some(dependent) => Err(Error::new(
            ErrorKind::Refused,
            format!("{dependent} is backed by {image}: a write would change what it shows"),
        )
        .advise("serve it with --read-only")
        .into()),
    }
}

/// Starts the servers, waits for SIGTERM or SIGINT, and ends them in an orderly way. Signals are listened for
/// before a client can connect. The loss of a terminal does not end the server. Neither does a limit on the
/// size of files: that fails a write.
fn until_the_end(start: impl FnOnce() -> Result<Vec<Running>>) -> Result<()> {
    let running = until_signalled(start)?;
    // All of them end, also after a failure.
    let ended: Vec<_> = running.into_iter().map(|server| server.stop().map_err(of_server)).collect();
    ended.into_iter().collect()
}

/// Starts something, and gives it back after SIGTERM or SIGINT.
fn until_signalled<T>(start: impl FnOnce() -> Result<T>) -> Result<T> {
    let failed = |cause| Error::new(ErrorKind::Io, "signals cannot be listened for").because(cause);
    let runtime = Builder::new_current_thread().enable_all().build().map_err(failed)?;
    runtime.block_on(async {
        let _lost = signal(SignalKind::hangup()).map_err(failed)?;
        let _large = signal(SignalKind::from_raw(rustix::process::Signal::XFSZ.as_raw())).map_err(failed)?;
        let mut terminated = signal(SignalKind::terminate()).map_err(failed)?;
        let mut interrupted = signal(SignalKind::interrupt()).map_err(failed)?;
        let running = start()?;
        tokio::select! {
            _ = terminated.recv() => {}
            _ = interrupted.recv() => {}
        }
        Ok(running)
    })
}

/// Maps an error of the server.
fn of_server(error: nbd_server::Error) -> Error {
    use nbd_server::ErrorKind as Kind;
    let kind = match error.kind() {
        Kind::Busy => ErrorKind::Busy,
        Kind::Unsupported => ErrorKind::Unsupported,
        Kind::Refused => ErrorKind::Refused,
        Kind::Invalid => ErrorKind::Usage,
        _ => ErrorKind::Io,
    };
    let mapped = Error::new(kind, error.to_string());
    match error.advice() {
        Some(advice) => mapped.advise(advice.to_owned()),
        None => mapped,
    }
}

/// Maps an error of a backend to one of the server, for the control socket.
fn of_backend(error: &Error) -> nbd_server::Error {
    use nbd_server::ErrorKind as Kind;
    let kind = match error.kind() {
        ErrorKind::Busy => Kind::Busy,
        ErrorKind::Unsupported => Kind::Unsupported,
        ErrorKind::Io | ErrorKind::NoSpace => Kind::Io,
        ErrorKind::Cancelled => Kind::Cancelled,
        _ => Kind::Refused,
    };
    let mapped = nbd_server::Error::new(kind, error.summary());
    match error.advice() {
        Some(advice) => mapped.advise(advice),
        None => mapped,
    }
}

/// Describes an opened file as a layer.
fn layer(path: &Utf8Path, file: &std::fs::File) -> Result<nbd_server::Layer> {
    let about = file
        .metadata()
        .map_err(|cause| Error::new(ErrorKind::Io, format!("cannot look at {path}")).because(cause))?;
    Ok(layer_about(path, &about))
}

fn layer_about(path: &Utf8Path, about: &std::fs::Metadata) -> nbd_server::Layer {
    use std::os::unix::fs::MetadataExt;
    nbd_server::Layer { file: path.to_owned(), device: about.dev(), inode: about.ino() }
}

/// Makes the description of an opened image.
fn served(
    image: Arc<dyn nbd_server::Image>,
    path: &Utf8Path,
    format: &str,
    layers: Vec<nbd_server::Layer>,
) -> Served {
    Served { image, path: Utf8PathBuf::from(path), format: format.to_owned(), snapshot: None, layers }
}
