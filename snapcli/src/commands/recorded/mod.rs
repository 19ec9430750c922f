//! Records that libvirt and the prototype of xl kept of snapshots, for `import --records`. They are only
//! read.

mod libvirt;
mod libxl;

use camino::{Utf8Path, Utf8PathBuf};
use snapcore::service::RecordedSnapshot;
use snapcore::{Error, ErrorKind, Result};

use crate::regular;

/// The most bytes of a file: libvirt's has the whole configuration of the domain.
const MAX_BYTES: u64 = 4 << 20;

/// The most files of a directory.
const MAX_FILES: usize = 10_000;

/// What is wrong with a record.
type Parsed = std::result::Result<RecordedSnapshot, String>;

/// Reads a record, or all those of a directory.
///
/// # Errors
/// [`ErrorKind::Usage`] for what is no record of a snapshot; the system's.
pub fn read(path: &Utf8Path) -> Result<Vec<RecordedSnapshot>> {
    let failed = |cause| Error::new(ErrorKind::Io, format!("cannot read {path}")).because(cause);
    if !std::fs::metadata(path).map_err(failed)?.is_dir() {
        return Ok(vec![read_file(path)?]);
    }
    let mut files: Vec<Utf8PathBuf> = Vec::new();
    for entry in path.read_dir_utf8().map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if entry.file_name().ends_with(".xml") || entry.file_name().ends_with(".libxl-json") {
            files.push(entry.into_path());
        }
        if files.len() > MAX_FILES {
            return Err(refused(format!("{path} has more than {MAX_FILES} records of snapshots")));
        }
    }
    if files.is_empty() {
        return Err(refused(format!("{path} has no records of snapshots: no file *.xml or *.libxl-json")));
    }
    // The order of a directory is that of no two runs.
    files.sort();
    files.iter().map(|file| read_file(file)).collect()
}

fn read_file(path: &Utf8Path) -> Result<RecordedSnapshot> {
    let Some(bytes) = regular::read(path, MAX_BYTES)? else {
        return Err(refused(format!("{path} is not a regular file")));
    };
    parse(&bytes).map_err(|why| refused(format!("{path} is no record of a snapshot: {why}")))
}

fn parse(bytes: &[u8]) -> Parsed {
    if bytes.len() as u64 > MAX_BYTES {
        return Err(format!("it is longer than {MAX_BYTES} bytes"));
    }
    let text = std::str::from_utf8(bytes).map_err(|_| "it is not UTF-8".to_owned())?;
    match text.trim_start().chars().next() {
        Some('<') => libvirt::parse(text),
        Some('{') => libxl::parse(text),
        _ => Err("it is neither XML nor JSON".to_owned()),
    }
}

fn refused(message: String) -> Error {
    Error::new(ErrorKind::Usage, message).state("no changes made").advise(
        "give what `virsh snapshot-dumpxml` prints, the directory /var/lib/libvirt/qemu/snapshot/DOMAIN, or one with \
         files snapshotdata-*.libxl-json (docs/moving.md)",
    )
}
