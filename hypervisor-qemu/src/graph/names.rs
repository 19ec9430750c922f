//! Proof that every node has the file that it names.
//!
//! QEMU reopens a file by the name it knows whenever a node turns writable or read-only. If that name leads
//! to another file by then, QEMU writes the wrong image, without an error. So no operation may leave such a
//! node.

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::FileTypeExt,
    path::{Path, PathBuf},
};

use snapcore::file_identity;

use super::Graph;
use crate::{
    error::{Error, ErrorKind, Result},
    machine::Machine,
};

/// A node and the file that it names.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct NodeFile {
    /// The node.
    pub node: String,
    /// The file that it names.
    pub file: PathBuf,
    /// Device and inode of the file that has this name now; `None` if there is no such file.
    pub names: Option<(u64, u64)>,
    /// True if QEMU has that file open.
    pub is_open: bool,
}

/// Compares the files that have the nodes' names with the files that QEMU has open, in both directions. Each
/// node's file must be open, and each open image (QEMU has byte locks on it) must be a node's. So this finds
/// a name that leads to another image which QEMU has open too: then no node names the original image. Returns
/// all file nodes.
///
/// Nodes of lent descriptors (`/dev/fdset/N`) have no name that could be wrong. This check cannot find two
/// open images whose names were exchanged, nor images opened with `locking=off`.
///
/// # Errors
/// [`ErrorKind::NameMismatch`], naming each node that is wrong; [`ErrorKind::Unsupported`] if the process is
/// not known; [`ErrorKind::Io`] if `/proc` is not readable (be root, or the user that QEMU runs as).
pub async fn verify_names(machine: &Machine) -> Result<Vec<NodeFile>> {
    let attempted = "comparing nodes with their files";
    let subject = machine.qmp().socket().display().to_string();
    let graph = Graph::read(machine).await?;
    let Some(pid) = machine.pid() else {
        let detail = "the system does not report the process of the socket";
        return Err(Error::new(ErrorKind::Unsupported, attempted, subject, detail));
    };
    let process = PathBuf::from(format!("/proc/{pid}"));
    let open = open_files(&process).map_err(|error| Error::io(attempted, &process.join("fd"), error))?;
    let directory = fs::read_link(process.join("cwd")).unwrap_or_default();
    let mut files = Vec::new();
    for node in graph.nodes() {
        let of_a_file = matches!(node.driver.as_str(), "file" | "host_device" | "host_cdrom");
        if !of_a_file || node.file.starts_with("/dev/fdset/") {
            continue;
        }
        let file = directory.join(&node.file);
        // QEMU may run in a mount namespace of its own.
        let seen_by_it = process.join("root").join(file.strip_prefix("/").unwrap_or(&file));
        let about = fs::metadata(&seen_by_it).or_else(|_| fs::metadata(&file)).ok();
        let names = about.map(|about| file_identity(&about));
        let is_open = names.is_some_and(|names| open.contains_key(&names));
        files.push(NodeFile { node: node.name.clone(), file, names, is_open });
    }
    let mut wrong: Vec<_> = files.iter().filter(|file| !file.is_open).map(shown).collect();
    let named: HashSet<_> = files.iter().filter_map(|file| file.names).collect();
    for (identity, file) in &open {
        if file.is_image && !named.contains(identity) {
            let path = file.path.display();
            wrong.push(format!(
                "no node names the image that it has open as {path}, so one of them names another"
            ));
        }
    }
    if wrong.is_empty() {
        return Ok(files);
    }
    wrong.sort();
    let detail = format!("QEMU does not have these files open: {}", wrong.join("; "));
    Err(Error::new(ErrorKind::NameMismatch, attempted, subject, detail).advise(
        "let nothing commit, snapshot or reopen these images until QEMU was restarted from the right files",
    ))
}

fn shown(file: &NodeFile) -> String {
    let what = if file.names.is_some() { "which is another file by now" } else { "which is gone" };
    format!("node {} names {}, {what}", file.node, file.file.display())
}

/// Returns device and inode of each file that a QEMU has open and that may be an image, with its name now.
/// Locks do not identify images: an image that was hot-plugged with `locking=off` has none, and no query
/// reports that option.
///
/// # Errors
/// An error if `/proc` is not readable.
pub(crate) fn open_images(process: &Path) -> std::io::Result<HashMap<(u64, u64), PathBuf>> {
    let open = open_files(process)?;
    let is_one = |file: &OpenFile| file.is_image || file.may_be_image;
    Ok(open.into_iter().filter(|(_, file)| is_one(file)).map(|(id, file)| (id, file.path)).collect())
}

/// Returns true if a QEMU has a file open without any of its image locks. For an image of a machine with
/// active disks, that means `locking=off`. For a QEMU that serves a domain of Xen it means nothing.
pub(crate) fn is_open_unlocked(process: &Path, image: (u64, u64)) -> bool {
    if is_of_xen(process) {
        return false;
    }
    let open = open_files(process).unwrap_or_default();
    open.get(&image).is_some_and(|file| file.may_be_image && !file.is_image)
}

/// A file that QEMU has open.
struct OpenFile {
    path: PathBuf,
    is_image: bool,
    /// True if it is of a kind that an image can be.
    may_be_image: bool,
}

fn open_files(process: &Path) -> std::io::Result<HashMap<(u64, u64), OpenFile>> {
    let mut open = HashMap::new();
    let locks_nothing = is_of_xen(process);
    for entry in fs::read_dir(process.join("fd"))? {
        let entry = entry?;
        // A file that is closed meanwhile is no longer open.
        let Ok(about) = fs::metadata(entry.path()) else { continue };
        let path = fs::read_link(entry.path()).unwrap_or_default();
        let info = fs::read_to_string(process.join("fdinfo").join(entry.file_name())).unwrap_or_default();
        let lent = path.starts_with("/memfd:");
        let standard = matches!(entry.file_name().to_str(), Some("0" | "1" | "2"));
        let kind = about.file_type();
        let may_be_image =
            !lent && !standard && !is_only_written(&info) && (kind.is_file() || kind.is_block_device());
        let is_image = may_be_image && locks_nothing || !lent && info.lines().any(is_image_lock);
        let file = open.entry(file_identity(&about)).or_insert(OpenFile { path, is_image, may_be_image });
        file.is_image |= is_image;
    }
    Ok(open)
}

/// Returns true if a QEMU serves the disks of a domain of Xen. Such a QEMU opens their images with
/// `locking=off`, and no file but images (its log is its standard output).
pub(crate) fn is_of_xen(process: &Path) -> bool {
    let line = fs::read(process.join("cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).any(|word| word == b"-xen-domid")
}

/// Returns true if a file is open for writing alone, or for appending, by its `/proc/PID/fdinfo/N`: a log, or
/// the file of a serial port. An image is read, too.
fn is_only_written(info: &str) -> bool {
    const O_ACCMODE: u32 = 0o3;
    const O_WRONLY: u32 = 0o1;
    const O_APPEND: u32 = 0o2000;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
    let flags = flags.and_then(|flags| u32::from_str_radix(flags.trim(), 8).ok());
    flags.is_some_and(|flags| flags & O_ACCMODE == O_WRONLY || flags & O_APPEND != 0)
}

/// Returns true if a line of `/proc/PID/fdinfo/N` is a lock by which QEMU processes detect each other: bytes
/// from 100 on, and from 200 on.
fn is_image_lock(line: &str) -> bool {
    let Some(lock) = line.strip_prefix("lock:") else { return false };
    let fields: Vec<_> = lock.split_whitespace().collect();
    let begin = fields.len().checked_sub(2).and_then(|at| fields.get(at)?.parse::<u64>().ok());
    fields.contains(&"OFDLCK") && begin.is_some_and(|begin| (100..300).contains(&begin))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_are_only_written_are_no_images() {
        let flags = |flags: &str| format!("pos:\t0\nflags:\t{flags}\nmnt_id:\t29\n");
        // A log (O_WRONLY|O_APPEND), a serial port's file (O_WRONLY), one that is read and appended to.
        for written in ["02102001", "0100001", "02002"] {
            assert!(is_only_written(&flags(written)), "{written}");
        }
        // O_RDWR|O_CLOEXEC, O_RDONLY|O_CLOEXEC, O_RDWR|O_DIRECT; and what cannot be read.
        for image in [flags("02100002"), flags("02100000"), flags("0140002"), String::new()] {
            assert!(!is_only_written(&image), "{image}");
        }
    }

    #[test]
    fn a_lock_of_qemus_is_known_among_others() {
        assert!(is_image_lock("lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10174527 100 101"));
        assert!(!is_image_lock("lock:\t1: FLOCK  ADVISORY  WRITE 81 fe:00:4 0 EOF"));
        assert!(!is_image_lock("lock:\t1: OFDLCK ADVISORY  WRITE -1 fe:00:4 0 EOF"));
        assert!(!is_image_lock("pos:\t100"));
    }
}
