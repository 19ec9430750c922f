//! `domsnap mount`: the file systems of a snapshot, read-only, until the command is stopped.
//!
//! The disks are shown as files of a directory of our own ([`disk_files`]), each with a throw-away scratch
//! over it. Loop devices make block devices of them, and `mount` mounts what `blkid` finds there: a file
//! system replays its journal into the scratch, so that a snapshot of a running guest is consistent. The
//! images are only read, and the snapshot is held.
//!
//! **What is undone in which order.** The file systems, then the loop devices, then the directory of the
//! files. A loop device is detached as soon as its file system is mounted: it goes with the last user. So if
//! this process is killed, `umount` of what is mounted ends all of it.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::process::Command;
use std::sync::Arc;

use camino::{Utf8Path, Utf8PathBuf};
use disk_files::{Content, DiskFiles, Shown};
use serde::Deserialize;
use snapcore::backend::PointImage;
use snapcore::service::{OpenSnapshot, OpenState};
use snapcore::{Error, ErrorKind, Holder, Result, Target, shown_size};

use super::read_only::Readable;
use super::snapshot::while_held;
use super::until_signalled;
use crate::answer::{self, Answer};
use crate::args::Mount;
use crate::commands::domain::absolute;
use crate::documents::{MountDoc, MountedDoc};
use crate::failure::Failure;
use crate::session::Session;
use crate::trusted::require_own;

/// The directory of the disks' files, inside of the one that the user names.
const FILES: &str = ".disks";

/// No program of the guest runs here, and none of its devices is opened.
const OPTIONS: &str = "ro,nosuid,nodev,noexec";

/// What `blkid` finds that is no file system, and why it is left out.
const NOT_MOUNTED: [(&str, &str); 4] = [
    ("LVM2_member", "a physical volume of LVM: the guest's volumes are not looked at"),
    ("crypto_LUKS", "encrypted by the guest"),
    ("linux_raid_member", "a member of a RAID of the guest"),
    ("swap", "swap space"),
];

/// `domsnap mount`
pub fn run(session: &Session, args: Mount) -> Result<Answer, Failure> {
    let directory = absolute(&args.dir)?;
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new(ErrorKind::Refused, "only root can mount file systems")
            .state("no changes made")
            .advise("as another user, serve the snapshot with `domsnap serve`, and read it with guestfish or nbdcopy")
            .into());
    }
    let place = MountDirectory::open(&directory)?;
    while_held(session, &args.domain, &args.name, &format!("mounted at {directory}"), |holder| {
        mount(session, &args, place, holder)
    })
}

/// Mounts, and waits for SIGTERM or SIGINT.
fn mount(session: &Session, args: &Mount, place: MountDirectory, holder: &Holder) -> Result<(), Failure> {
    let OpenSnapshot { domain, disks, machine_state, mut left_out, .. } =
        session.ask(session.service.open_snapshot(&args.domain, &args.name, &args.disks))?;
    left_out.extend(machine_state.iter().map(OpenState::why_no_disk));
    let targets: Vec<Target> = disks.iter().map(|disk| disk.target.clone()).collect();
    let shown = disks
        .into_iter()
        .map(|disk| Shown { name: disk.target.to_string(), content: Box::new(Disk(disk.image)) });
    let mut mounted = Mounted::begin(place, shown.collect())?;
    let mut document = MountDoc {
        domain: domain.name,
        snapshot: args.name.clone(),
        holder: holder.clone(),
        mounts: Vec::new(),
        notes: left_out,
    };
    // It ends whatever happens: what is mounted so far is unmounted when this is dropped.
    until_signalled(|| {
        for target in &targets {
            mounted.mount_disk(target, &mut document)?;
        }
        if document.mounts.is_empty() {
            let mut message = format!("snapshot {} has no file system that can be mounted", args.name);
            if !document.notes.is_empty() {
                message.push_str(&format!(": {}", document.notes.join("; ")));
            }
            return Err(Error::new(ErrorKind::Refused, message)
                .state("nothing is mounted")
                .advise("`domsnap serve` gives the disks to programs that read them, such as guestfish"));
        }
        answer::print(&session.changed(document, reported).text);
        nbd_server::report_ready()
            .map_err(|cause| Error::new(ErrorKind::Io, "systemd cannot be notified").because(cause))
    })?;
    Ok(mounted.end()?)
}

fn reported(document: &MountDoc) -> String {
    let MountDoc { domain, snapshot, holder, mounts, notes } = document;
    let mut text = format!("mounted {domain} at {snapshot}, read-only, held by {holder}\n");
    for MountedDoc { target, partition, filesystem, bytes, directory } in mounts {
        let number = partition.map_or_else(String::new, |number| number.to_string());
        text.push_str(&format!("  {target}{number}: {filesystem}, {}, at {directory}\n", shown_size(*bytes)));
    }
    for note in notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text + "it is unmounted when this command ends (Ctrl-C)\n"
}

/// A disk of a snapshot, as the content of a file.
struct Disk(Arc<dyn PointImage>);

impl Content for Disk {
    fn size(&self) -> u64 {
        Readable::size(&self.0)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Readable::read_at(&self.0, buf, offset)
    }
}

/// The directory that the user names. What was made of it is removed at the end.
struct MountDirectory {
    path: Utf8PathBuf,
    made: Vec<Utf8PathBuf>,
}

impl MountDirectory {
    fn open(path: &Utf8Path) -> Result<Self> {
        let mut place = Self { path: path.to_owned(), made: Vec::new() };
        match path.read_dir_utf8() {
            Ok(mut entries) => {
                if entries.next().is_some() {
                    return Err(Error::new(ErrorKind::Refused, format!("the directory {path} is not empty"))
                        .state("nothing is mounted")
                        .advise(
                            "name another one; what a mount that was killed left there goes with `umount DIR/* \
                             DIR/.disks`",
                        ));
                }
            }
            Err(_) => place.make(path.to_owned())?,
        }
        // What is mounted is named by path: whoever could put a link in its place would choose where.
        require_own(path, "the directory", "have file systems mounted anywhere")?;
        Ok(place)
    }

    fn make(&mut self, path: Utf8PathBuf) -> Result<()> {
        DirBuilder::new().mode(0o700).create(&path).map_err(|cause| {
            Error::new(ErrorKind::Io, format!("the directory {path} cannot be made"))
                .because(cause)
                .state("nothing is mounted")
        })?;
        self.made.push(path);
        Ok(())
    }
}

impl Drop for MountDirectory {
    fn drop(&mut self) {
        for path in self.made.iter().rev() {
            let _ = std::fs::remove_dir(path);
        }
    }
}

/// What is mounted, in the order in which it was.
struct Mounted {
    mounts: Vec<Utf8PathBuf>,
    files: Option<DiskFiles>,
    place: MountDirectory,
}

impl Mounted {
    fn begin(mut place: MountDirectory, disks: Vec<Shown>) -> Result<Self> {
        let files = place.path.join(FILES);
        place.make(files.clone())?;
        let shown = DiskFiles::show(disks, &files, &place.path).map_err(|cause| {
            Error::new(ErrorKind::Io, format!("the disks cannot be shown as files in {files}"))
                .because(cause)
                .state("nothing is mounted")
                .advise("this needs FUSE: /dev/fuse must be there, and DIR on a file system with O_TMPFILE")
        })?;
        Ok(Self { mounts: Vec::new(), files: Some(shown), place })
    }

    /// Mounts the file systems of a disk: the one that fills it, or those of its partitions.
    fn mount_disk(&mut self, target: &Target, document: &mut MountDoc) -> Result<()> {
        let file = self.place.path.join(FILES).join(target.as_str());
        let size = file.metadata().map_err(|cause| no_tool("looking at the disk", cause))?.len();
        let whole = Part { number: None, offset: 0, bytes: size };
        let mut parts = Vec::new();
        match probed(&file, &whole, "TYPE")? {
            Some(kind) => parts.push((whole, Some(kind))),
            None => {
                for part in partitions(&file)? {
                    let kind = probed(&file, &part, "TYPE")?;
                    parts.push((part, kind));
                }
            }
        }
        if parts.is_empty() {
            document.notes.push(format!("{target}: no file system and no partitions are found"));
        }
        for (part, kind) in parts {
            let name = part.number.map_or_else(|| target.to_string(), |number| format!("{target}{number}"));
            let Some(kind) = kind else {
                document.notes.push(format!("{name}: no file system is found"));
                continue;
            };
            if let Some((_, why)) = NOT_MOUNTED.iter().find(|(known, _)| *known == kind) {
                document.notes.push(format!("{name} is not mounted: {why}"));
                continue;
            }
            let directory = self.place.path.join(&name);
            match self.mount_part(&file, &part, &kind, &directory) {
                Ok(()) => document.mounts.push(MountedDoc {
                    target: target.clone(),
                    partition: part.number,
                    filesystem: kind,
                    bytes: part.bytes,
                    directory,
                }),
                // Others can be mounted all the same.
                Err(error) => {
                    document.notes.push(format!("{name} ({kind}) is not mounted: {}", error.summary()))
                }
            }
        }
        Ok(())
    }

    fn mount_part(&mut self, file: &Utf8Path, part: &Part, kind: &str, directory: &Utf8Path) -> Result<()> {
        if kind == "btrfs" {
            refuse_twin(file, part)?;
        }
        self.place.make(directory.to_owned())?;
        let (offset, bytes) = (part.offset.to_string(), part.bytes.to_string());
        let attach = ["--find", "--show", "--offset", &offset, "--sizelimit", &bytes, file.as_str()];
        let device = tool("losetup", &attach)?.trim().to_owned();
        // XFS refuses a second file system of one UUID, and the guest's may be mounted elsewhere.
        let options = if kind == "xfs" { format!("{OPTIONS},nouuid") } else { OPTIONS.to_owned() };
        let mounted = tool("mount", &["-t", kind, "-o", &options, "--", &device, directory.as_str()]);
        // It ends when the file system is unmounted; at once if it was not mounted.
        let detached = tool("losetup", &["--detach", &device]);
        mounted?;
        self.mounts.push(directory.to_owned());
        detached.map(drop)
    }

    /// Unmounts all. What is in use is detached, and its users get errors.
    ///
    /// # Errors
    /// That of the last one that was in use.
    fn end(mut self) -> Result<()> {
        self.unmount()
    }

    fn unmount(&mut self) -> Result<()> {
        let mut failed = None;
        while let Some(directory) = self.mounts.pop() {
            if let Err(error) = tool("umount", &["--", directory.as_str()]) {
                // A program has a file of it open, or is in it. It reads errors from now on.
                let _ = tool("umount", &["--lazy", "--", directory.as_str()]);
                failed =
                    Some(error.context(format!("{directory} was in use: its users get errors from now on")));
            }
        }
        if let Some(files) = self.files.take() {
            let path = self.place.path.join(FILES);
            if files.end().is_err() {
                let _ = tool("umount", &["--lazy", "--", path.as_str()]);
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = self.unmount();
    }
}

/// A part of a disk.
struct Part {
    number: Option<u32>,
    offset: u64,
    bytes: u64,
}

/// What `blkid` says of a part of a disk: its `TYPE` is the kind of file system, or of what else it is.
fn probed(file: &Utf8Path, part: &Part, tag: &str) -> Result<Option<String>> {
    let (offset, bytes) = (part.offset.to_string(), part.bytes.to_string());
    let args = ["--probe", "--match-tag", tag, "--output", "value", "--offset", &offset, "--size", &bytes];
    let output = command("blkid", &[&args[..], &["--", file.as_str()]].concat())
        .output()
        .map_err(|cause| no_tool("blkid", cause))?;
    // 2: nothing was found.
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    // It goes into a command line.
    let is_name = |said: &String| {
        !said.is_empty() && said.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_-+.".contains(&byte))
    };
    Ok(Some(said).filter(is_name))
}

/// Refuses a btrfs of which the host has one of the same UUID mounted: older kernels would show that one.
fn refuse_twin(file: &Utf8Path, part: &Part) -> Result<()> {
    match probed(file, part, "UUID")? {
        Some(id) if Utf8Path::new("/sys/fs/btrfs").join(&id).exists() => Err(Error::new(
            ErrorKind::Refused,
            format!("this machine has a btrfs of the same UUID {id} mounted"),
        )),
        _ => Ok(()),
    }
}

/// The partitions of a disk. A table that cannot be read has none.
fn partitions(file: &Utf8Path) -> Result<Vec<Part>> {
    #[derive(Deserialize)]
    struct Document {
        partitiontable: Table,
    }
    #[derive(Deserialize)]
    struct Table {
        #[serde(default = "sector")]
        sectorsize: u64,
        #[serde(default)]
        partitions: Vec<Row>,
    }
    #[derive(Deserialize)]
    struct Row {
        node: String,
        start: u64,
        size: u64,
    }
    fn sector() -> u64 {
        512
    }
    let output =
        command("sfdisk", &["--json", file.as_str()]).output().map_err(|cause| no_tool("sfdisk", cause))?;
    let Ok(found) = serde_json::from_slice::<Document>(&output.stdout) else { return Ok(Vec::new()) };
    let table = found.partitiontable;
    let part = |row: Row| {
        let number = row.node.rsplit(|c: char| !c.is_ascii_digit()).next()?.parse().ok()?;
        let (offset, bytes) =
            (row.start.checked_mul(table.sectorsize)?, row.size.checked_mul(table.sectorsize)?);
        Some(Part { number: Some(number), offset, bytes })
    };
    Ok(table.partitions.into_iter().filter_map(part).collect())
}

fn command(program: &str, args: &[&str]) -> Command {
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = Command::new(program);
    command.args(args).env("LC_ALL", "C").env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Runs a program; returns what it prints.
fn tool(program: &str, args: &[&str]) -> Result<String> {
    let output = command(program, args).output().map_err(|cause| no_tool(program, cause))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', " ");
    Err(Error::new(ErrorKind::Io, format!("{program} failed: {said}")))
}

fn no_tool(what: &str, cause: io::Error) -> Error {
    Error::new(ErrorKind::Io, format!("{what} failed")).because(cause).advise(
        "`losetup`, `mount`, `umount`, `blkid` and `sfdisk` are needed: install util-linux, mount and fdisk",
    )
}
