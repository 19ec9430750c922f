//! `domsnap serve`: the disks of a snapshot, read-only, each at a socket of its own.
//!
//! The snapshot is held by `serve:PID` from before its disks are opened until the process ends, so the point
//! stays what it is while the domain runs, and while other snapshots come and go. Another program may delete
//! an internal snapshot all the same. So after each read the point is looked up again, and what was read is
//! given to the client only if it is still there.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use nbd_server::{Content, Extent, Format, Place, Served, Server, control_path, report_ready};
use snapcore::backend::PointImage;
use snapcore::service::{DomainRef, HoldRequest, OpenDisk, OpenSnapshot, OpenState, ReleaseRequest};
use snapcore::{Error, ErrorKind, Holder, HoldingProcess, Result, SnapshotName};

use super::read_only::{ReadOnly, Readable};
use super::{layer_about, of_server, until_the_end};
use crate::answer::{self, Answer};
use crate::args::ServeSnapshot;
use crate::commands::domain::absolute;
use crate::documents::{ServeDoc, ServedDiskDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::units;

/// `domsnap serve`
pub fn run(session: &Session, args: ServeSnapshot) -> Result<Answer, Failure> {
    let directory = absolute(&args.dir)?;
    while_held(session, &args.domain, &args.name, &format!("served at {directory}"), |holder| {
        serve(session, &args, &directory, holder)
    })
}

/// Does something while this process holds a snapshot.
pub(super) fn while_held(
    session: &Session,
    domain: &DomainRef,
    name: &SnapshotName,
    reason: &str,
    work: impl FnOnce(&Holder) -> Result<(), Failure>,
) -> Result<Answer, Failure> {
    let process = HoldingProcess::own()?;
    let holder = Holder::new(format!("serve:{}", process.pid))?;
    let request =
        HoldRequest::new(name.clone(), holder.clone()).reason(reason.to_owned()).process(Some(process));
    // Before the disks are opened: then a delete finds either the hold or no server.
    session.ask(session.service.hold(domain, request))?;
    let done = work(&holder);
    // If that fails, the hold ends with this process all the same.
    let release = ReleaseRequest::new(name.clone(), holder).force(true);
    let released = session.ask(session.service.release(domain, release));
    done?;
    released?;
    Ok(Answer::text(""))
}

/// Serves the disks until SIGTERM or SIGINT.
fn serve(
    session: &Session,
    args: &ServeSnapshot,
    directory: &Utf8Path,
    holder: &Holder,
) -> Result<(), Failure> {
    let OpenSnapshot { domain, disks, machine_state, mut left_out, .. } =
        session.ask(session.service.open_snapshot(&args.domain, &args.name, &args.disks))?;
    left_out.extend(machine_state.iter().map(OpenState::why_no_disk));
    if disks.is_empty() {
        let detail = format!("snapshot {} has no disk that can be served", args.name);
        return Err(Error::new(ErrorKind::Refused, detail).state("no changes made").into());
    }
    let _directory = SocketDirectory::open(directory)?;
    // A failure before the last of these leaves no socket.
    let mut servers = Vec::new();
    let mut shown = Vec::new();
    for disk in &disks {
        let socket = directory.join(format!("{}.sock", disk.target));
        let control = control_path(&socket);
        let places =
            (Place::create(&socket).map_err(of_server)?, Place::create(&control).map_err(of_server)?);
        servers.push((Server::new(served(disk, &args.name)?, Box::new(Fixed)), places));
        let (target, virtual_size) = (disk.target.clone(), disk.image.size());
        shown.push(ServedDiskDoc { target, virtual_size, socket, control });
    }
    let document = ServeDoc {
        domain: domain.name,
        snapshot: args.name.clone(),
        holder: holder.clone(),
        disks: shown,
        notes: left_out,
    };
    until_the_end(|| {
        let started = servers.into_iter().map(|(server, (disk, control))| server.start(disk, control));
        let running = started.collect::<nbd_server::Result<Vec<_>>>().map_err(of_server)?;
        answer::print(&session.changed(document, reported).text);
        report_ready()
            .map_err(|cause| Error::new(ErrorKind::Io, "systemd cannot be notified").because(cause))?;
        Ok(running)
    })?;
    Ok(())
}

fn reported(document: &ServeDoc) -> String {
    let ServeDoc { domain, snapshot, holder, disks, notes } = document;
    let mut text = format!("serving {domain} at {snapshot}, read-only, held by {holder}\n");
    for ServedDiskDoc { target, virtual_size, socket, .. } in disks {
        text.push_str(&format!("  {target}: {} at {socket}\n", units::bytes(*virtual_size)));
    }
    for note in notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}

/// The directory of the sockets. One that was made for them is removed at the end if nothing else is in it.
struct SocketDirectory(Option<Utf8PathBuf>);

impl SocketDirectory {
    fn open(path: &Utf8Path) -> Result<Self> {
        match std::fs::DirBuilder::new().mode(0o700).create(path) {
            Ok(()) => Ok(Self(Some(path.to_owned()))),
            // What it is, and who may write to it, is checked with each socket.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(Self(None)),
            Err(cause) => Err(Error::new(ErrorKind::Io, format!("the directory {path} cannot be made"))
                .because(cause)
                .state("nothing is served")
                .advise("name one that exists, or whose parent does, with --dir")),
        }
    }
}

impl Drop for SocketDirectory {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_dir(path);
        }
    }
}

fn served(disk: &OpenDisk, name: &SnapshotName) -> Result<Served> {
    let file = disk.layer.require_path()?;
    let about = std::fs::metadata(file)
        .map_err(|cause| Error::new(ErrorKind::Io, format!("cannot look at {file}")).because(cause))?;
    let image = Arc::new(ReadOnly(Arc::clone(&disk.image)));
    let served = super::served(image, file, "raw", vec![layer_about(file, &about)]);
    Ok(Served { snapshot: Some(name.to_string()), ..served })
}

/// Refuses other images on the control socket: a snapshot is served, and nothing else.
struct Fixed;

impl Format for Fixed {
    fn open(&self, _: &Utf8Path) -> nbd_server::Result<Served> {
        let kind = nbd_server::ErrorKind::Unsupported;
        Err(nbd_server::Error::new(kind, "a snapshot is served, which is not exchanged for another image"))
    }
}

impl Readable for Arc<dyn PointImage> {
    fn size(&self) -> u64 {
        (**self).size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        (**self).read_at(buf, offset).map_err(io::Error::other)?;
        self.require_still().map_err(io::Error::other)
    }

    fn map(&self, offset: u64, length: u64, limit: usize) -> io::Result<Vec<Extent>> {
        let end = offset.saturating_add(length).min((**self).size());
        let extents = self.extents(offset, end, limit).map_err(io::Error::other)?;
        // A client skips the holes: they must be those of the point.
        self.require_still().map_err(io::Error::other)?;
        let content = |zero| if zero { Content::Hole } else { Content::Data };
        let extents = extents.into_iter();
        Ok(extents
            .map(|found| Extent { length: found.end - found.start, content: content(found.zero) })
            .collect())
    }
}
